"""Why a row is not trained on: one Check a reason code, with its rule, its limit, and its line in docs/datasets.md."""

import json
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import chain
from typing import Any

MIN_SIDE = 28  # pixels: a token of Qwen2.5-VL; to Qwen3-VL's, of 32, a side is enlarged, as transformers does
MAX_ASPECT_RATIO = 200  # Qwen's own smart_resize refuses more
MAX_PIXELS = 89_478_485  # Pillow's own limit before it warns of a decompression bomb: 1 GB as 4 x 24 bits
MAX_IMAGE_BYTES = 64 << 20  # of one encoded image: a record batch of packs is never larger
MAX_ROW = 64 << 20  # characters or bytes of one raw row, without the images in it
MIN_TEXT = 4  # characters after the last image; a dataset class may state another
DECODE_SECONDS = 60.0  # of CPU time for an image; the slowest that is sound, JPEG 2000 of MAX_PIXELS, takes about 30
MAX_EVIDENCE = 500  # characters
ROLES = ("system", "user", "assistant", "tool")

Part = dict[str, Any]  # {"type": "text", "text": ...} or {"type": "image", "text": None}
Message = dict[str, Any]  # {"role": ..., "content": [Part, ...] or None}, and "loss", "extra": see schema.MESSAGE


class Reason(StrEnum):
    """In people's scripts and in their quarantined data: a name, once given, stays."""

    MALFORMED_ROW = "malformed_row"
    ROW_TOO_LARGE = "row_too_large"
    VIDEO = "video"
    AUDIO = "audio"
    IMAGE_COUNT_MISMATCH = "image_count_mismatch"
    TEXT_TOO_SHORT = "text_too_short"
    IMAGE_PATH_ESCAPES = "image_path_escapes"
    IMAGE_MISSING = "image_missing"
    IMAGE_TOO_LARGE = "image_too_large"
    IMAGE_UNREADABLE = "image_unreadable"
    IMAGE_TOO_SMALL = "image_too_small"
    IMAGE_ASPECT_RATIO = "image_aspect_ratio"
    PROCESSOR_FAILED = "processor_failed"
    DUPLICATE = "duplicate"
    NEAR_DUPLICATE = "near_duplicate"
    TOO_LONG = "too_long"


class RowError(Exception):
    """A row is bad: its reason, and in `evidence` the value and the limit, without long base64."""

    def __init__(self, reason: Reason, evidence: str):
        super().__init__(reason, evidence)
        self.reason = reason
        self.evidence = without_base64(evidence.encode(errors="backslashreplace").decode())[:MAX_EVIDENCE]


# A rule returns its evidence against what it is given, or None.
Rule = Callable[..., str | None]


@dataclass(frozen=True)
class Candidate:
    """A row as its dataset class understands it, its images not read yet: what the rules of `On.CANDIDATE` are given.

    Either `messages` or `text` is None.
    """

    messages: Sequence[Message] | None
    text: str | None
    images: int
    image_field: str  # where the dataset class looked for images, as evidence calls it
    min_text: int  # characters after the last image


class On(StrEnum):
    """What a rule is given."""

    ROW = "row"  # the fields of a raw row
    CANDIDATE = "candidate"  # a Candidate
    IMAGE = "image"  # width, height in pixels
    ELSEWHERE = "elsewhere"  # nothing: whoever meets the fault raises RowError


@dataclass(frozen=True)
class Check:
    """A reason code, its rule and its limit; also a line of docs/datasets.md."""

    reason: Reason
    row: str  # what such a row is or has
    limit: str = ""  # "" = none
    on: On = On.ELSEWHERE
    rule: Rule | None = None


def malformed(evidence: str) -> RowError:
    return RowError(Reason.MALFORMED_ROW, evidence)


def too_large(size: int) -> RowError:
    return RowError(Reason.ROW_TOO_LARGE, f"the row has {size} bytes, limit {MAX_ROW}")


def run_checks(on: On, *subject: Any) -> None:
    """Run the rules for this kind of subject in the order of CHECKS. Raises RowError at the first that fails."""
    for check in CHECKS:
        if check.on == on and check.rule is not None and (evidence := check.rule(*subject)) is not None:
            raise RowError(check.reason, evidence)


def _messages(candidate: Candidate) -> str | None:
    if candidate.messages is None:
        return None
    roles = [message["role"] for message in candidate.messages]
    if not roles:
        return "the row has no message"
    for number, message in enumerate(candidate.messages):
        if message["role"] not in ROLES:
            return f"message {number} has role {message['role']!r}, known are {', '.join(ROLES)}"
    if "assistant" not in roles:
        return f"no message of {len(roles)} has role 'assistant': there is nothing to train on"
    if not any(map(_is_trained, candidate.messages)):
        return f"loss or weight of all {roles.count('assistant')} assistant messages is 0: there is nothing to train on"
    return None


def _video(row: Mapping[str, object]) -> str | None:
    return _has(row, "video", "videos")


def _audio(row: Mapping[str, object]) -> str | None:
    return _has(row, "audio", "audios")


def _has(row: Mapping[str, object], *names: str) -> str | None:
    values = ((name, row.get(name)) for name in names)  # "[]": a list as JSON text
    return next((f"the row has {name}: {value!r:.200}" for name, value in values if value and value != "[]"), None)


def _image_count(candidate: Candidate) -> str | None:
    places = sum(part["type"] == "image" for part in _parts(candidate.messages or ()))
    if places == candidate.images or candidate.messages is None:
        return None
    return f"{places} image markers in the messages, {candidate.images} images in {candidate.image_field}"


def _text(candidate: Candidate) -> str | None:
    for number, message in enumerate(candidate.messages or ()):
        if _is_trained(message) and says_nothing(_all_text([message])) and not visible(_in_fields(message)):
            return f"message {number} is an empty answer of the assistant"
    text = candidate.text or "" if candidate.messages is None else _text_after_images(candidate.messages)
    text += "".join(_in_fields(message) for message in candidate.messages or () if _is_trained(message))
    length = len(visible(text))
    if length < candidate.min_text:
        return f"{length} characters after the last image, {candidate.min_text} are needed: {text!r}"
    return None


def _short_side(width: int, height: int) -> str | None:
    return f"{width} x {height} pixels, a side needs {MIN_SIDE}" if min(width, height) < MIN_SIDE else None


def _aspect_ratio(width: int, height: int) -> str | None:
    short, long = sorted((width, height))
    if long <= MAX_ASPECT_RATIO * short:
        return None
    return f"{width} x {height} pixels: aspect ratio {long / short:.1f}, limit {MAX_ASPECT_RATIO}"


# In the order in which a row meets them: it has the first reason that fits.
CHECKS = (
    Check(
        Reason.MALFORMED_ROW,
        "is no JSON object, lacks a field, has one of a wrong type, or no assistant turn to train on; or its file is "
        "damaged",
        on=On.CANDIDATE,
        rule=_messages,
    ),
    Check(Reason.ROW_TOO_LARGE, "is longer than a row may be, its images not counted", f"{MAX_ROW >> 20} MiB"),
    Check(Reason.VIDEO, "has a video: only images are trained on so far", on=On.ROW, rule=_video),
    Check(Reason.AUDIO, "has a sound: only images are trained on so far", on=On.ROW, rule=_audio),
    Check(
        Reason.IMAGE_COUNT_MISMATCH,
        "has more or fewer `<image>` places than images",
        on=On.CANDIDATE,
        rule=_image_count,
    ),
    Check(
        Reason.TEXT_TOO_SHORT,
        "has too little text after its last image (without images: at all), or an empty answer",
        f"{MIN_TEXT} characters, or a dataset class's `min_text`",
        on=On.CANDIDATE,
        rule=_text,
    ),
    Check(Reason.IMAGE_PATH_ESCAPES, "names an image outside of the raw folder, or a URL"),
    Check(Reason.IMAGE_MISSING, "names a file that does not exist"),
    Check(
        Reason.IMAGE_TOO_LARGE,
        "has a decompression bomb (told by its header), or an image file that is too large",
        f"{MAX_PIXELS:,} pixels, {MAX_IMAGE_BYTES >> 20} MiB",
    ),
    Check(Reason.IMAGE_UNREADABLE, "has an image that is truncated, damaged, or none"),
    Check(
        Reason.IMAGE_TOO_SMALL,
        "has an image with a short side",
        f"{MIN_SIDE} pixels",
        on=On.IMAGE,
        rule=_short_side,
    ),
    Check(
        Reason.IMAGE_ASPECT_RATIO,
        "has an image with one side far longer than the other",
        f"{MAX_ASPECT_RATIO} to 1",
        on=On.IMAGE,
        rule=_aspect_ratio,
    ),
    Check(
        Reason.PROCESSOR_FAILED,
        "has an image or text that transformers' processor refuses, an image that crashes or stalls its decoder, or "
        "tools, calls or results that the chat template does not print",
        f"{DECODE_SECONDS:g} s of CPU time an image",
    ),
    Check(Reason.DUPLICATE, "says and shows the same as an earlier row"),
    Check(
        Reason.NEAR_DUPLICATE,
        "has an image that looks like another one of an earlier row; only where `near_duplicates: drop` asks for it",
        "64-bit dHash, 16 neighbouring bits aside",
    ),
    Check(Reason.TOO_LONG, "has more tokens than a pack", "`length`"),
)


_BASE64 = re.compile(r"(?:[A-Za-z0-9+/]|\\/){100,}={0,2}")


def without_base64(text: str, kept: int = 24) -> str:
    """Return `text` with runs of 100 and more base64 characters cut to their first `kept` and their length."""
    return _BASE64.sub(lambda run: f"{run[0][:kept]}<{len(run[0])} characters>", text)


# White space, and what shows as little: zero-width spaces and joiners, byte order marks, marks of direction, control
# characters, variation selectors, fillers. All of them are in these two ranges of Unicode.
_INVISIBLE = "".join(
    character
    for character in map(chr, chain(range(0x1D180), range(0xE0000, 0xE1000)))
    if character.isspace() or unicodedata.category(character) in ("Cc", "Cf")
) + "".join(map(chr, [0x34F, 0x115F, 0x1160, 0x17B4, 0x17B5, *range(0x180B, 0x1810), 0x2800, 0x3164, 0xFFA0,
                      *range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0)]))  # fmt: skip


def visible(text: str) -> str:
    """Return `text` without white space and other characters that show nothing at its ends."""
    return text.strip(_INVISIBLE)


def says_nothing(answer: str) -> bool:
    """Whether an assistant's answer, raw or as its template renders it, would train an end of turn alone."""
    thought, closed, rest = visible(answer).removeprefix("<think>").partition("</think>")
    return not visible(thought) and not (closed and visible(rest))


def _in_fields(message: Message) -> str:
    """What a message says beside its content: its tool calls, as JSON, and its thinking."""
    extra = json.loads(message.get("extra") or "{}")
    calls = extra.get("tool_calls")
    return (json.dumps(calls) if calls else "") + (extra.get("reasoning_content") or "")


def _is_trained(message: Message) -> bool:
    return message["role"] == "assistant" and message.get("loss") is not False


def _text_after_images(messages: Sequence[Message]) -> str:
    """All text after the last image, over all messages; all text if there is no image."""
    parts = _parts(messages)
    images = [number for number, part in enumerate(parts) if part["type"] == "image"]
    return "".join(part["text"] for part in parts[images[-1] + 1 if images else 0 :])


def _all_text(messages: Sequence[Message]) -> str:
    return "".join(part["text"] for part in _parts(messages) if part["type"] == "text")


def _parts(messages: Sequence[Message]) -> list[Part]:
    return [part for message in messages for part in message["content"] or ()]
