"""Why a row is not trained on: the reason codes as a table, and the rules behind those that need no image bytes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

MIN_SIDE = 28  # pixels: one merged patch of Qwen2.5-VL
MAX_ASPECT_RATIO = 200  # Qwen's own smart_resize refuses more
MAX_PIXELS = 89_478_485  # Pillow's own limit before it warns of a decompression bomb: 1 GB as 4 x 24 bits
MAX_IMAGE_BYTES = 64 << 20  # of one encoded image: a record batch of packs is never larger
MAX_ROW = 64 << 20  # characters or bytes of one raw row, without the images in it
MIN_TEXT = 4  # characters after the last image; a dataset class may state another
DECODE_SECONDS = 60.0  # of CPU time for an image; the slowest that is sound, JPEG 2000 of MAX_PIXELS, takes about 30
MAX_EVIDENCE = 500  # characters
ROLES = ("system", "user", "assistant")

Part = dict[str, str | None]  # {"type": "text", "text": ...} or {"type": "image", "text": None}
Message = dict[str, str | list[Part]]  # {"role": ..., "content": [Part, ...]}


class Reason(StrEnum):
    """In people's scripts and in their quarantined data: a name, once given, stays."""

    MALFORMED_ROW = "malformed_row"
    ROW_TOO_LARGE = "row_too_large"
    VIDEO = "video"
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


@dataclass(frozen=True)
class Check:
    """A line of the table below, and of README's."""

    reason: Reason
    row: str  # what such a row is or has
    limit: str  # "" = none
    evidence: str  # what is told of the row


# In the order in which a row meets them: it has the first reason that fits.
CHECKS = (
    Check(
        Reason.MALFORMED_ROW,
        "is no JSON object, lacks a field, has one of a wrong type, or no assistant turn; or its file is damaged",
        "",
        "the field or byte, and what is there",
    ),
    Check(Reason.ROW_TOO_LARGE, "is longer than a row may be, its images not counted", f"{MAX_ROW >> 20} MiB", "bytes"),
    Check(Reason.VIDEO, "has a video: only images are trained on so far", "", "the field or message"),
    Check(Reason.IMAGE_COUNT_MISMATCH, "has more or fewer `<image>` places than images", "", "both numbers"),
    Check(
        Reason.TEXT_TOO_SHORT,
        "has too little text after its last image (without images: at all)",
        f"{MIN_TEXT} characters, or a dataset class's `min_text`",
        "the text",
    ),
    Check(Reason.IMAGE_PATH_ESCAPES, "names an image outside of the raw folder, or a URL", "", "the path"),
    Check(Reason.IMAGE_MISSING, "names a file that does not exist", "", "the path"),
    Check(
        Reason.IMAGE_TOO_LARGE,
        "has a decompression bomb (told by its header), or an image file that is too large",
        f"{MAX_PIXELS:,} pixels, {MAX_IMAGE_BYTES >> 20} MiB",
        "pixels or bytes",
    ),
    Check(Reason.IMAGE_UNREADABLE, "has an image that is truncated, damaged, or none", "", "what Pillow says"),
    Check(Reason.IMAGE_TOO_SMALL, "has an image with a short side", f"{MIN_SIDE} pixels", "width and height"),
    Check(
        Reason.IMAGE_ASPECT_RATIO,
        "has an image with one side far longer than the other",
        f"{MAX_ASPECT_RATIO} to 1",
        "width and height",
    ),
    Check(
        Reason.PROCESSOR_FAILED,
        "has an image or text that transformers' processor refuses, or an image that crashes or stalls its decoder",
        f"{DECODE_SECONDS:g} s of CPU time an image",
        "the error or signal",
    ),
    Check(Reason.DUPLICATE, "says and shows the same as an earlier row", "", "the first such row, and how many"),
    Check(
        Reason.NEAR_DUPLICATE,
        "has an image that looks like another one of an earlier row; only where `near_duplicates: drop` asks for it",
        "64-bit dHash, 16 neighbouring bits aside",
        "the earlier row",
    ),
    Check(Reason.TOO_LONG, "has more tokens than a pack", "`length`", "tokens"),
)


class RowError(Exception):
    """A row is bad: its reason, and in `evidence` what was seen, with the value and the limit."""

    def __init__(self, reason: Reason, evidence: str):
        super().__init__(reason, evidence)
        self.reason = reason
        self.evidence = evidence.encode(errors="backslashreplace").decode()[:MAX_EVIDENCE]


def malformed(evidence: str) -> RowError:
    return RowError(Reason.MALFORMED_ROW, evidence)


def too_large(size: int) -> RowError:
    return RowError(Reason.ROW_TOO_LARGE, f"the row has {size} bytes, limit {MAX_ROW}")


def check_messages(messages: Sequence[Message]) -> None:
    """Raises RowError: no message, a role that is none of ROLES, no assistant turn."""
    roles = [message["role"] for message in messages]
    if not roles:
        raise malformed("the row has no message")
    for number, role in enumerate(roles):
        if role not in ROLES:
            raise malformed(f"message {number} has role {role!r}, known are {', '.join(ROLES)}")
    if "assistant" not in roles:
        raise malformed(f"no message of {len(roles)} has role 'assistant': there is nothing to train on")


def check_no_video(row: Mapping[str, object]) -> None:
    """Raises RowError if a raw row has a field for videos that is not empty."""
    for name in ("video", "videos"):
        if row.get(name):
            raise RowError(Reason.VIDEO, f"the row has {name}: {row[name]!r:.200}")


def check_image_count(messages: Sequence[Message], images: int) -> None:
    """Raises RowError if the messages do not have one image part for each image."""
    places = sum(part["type"] == "image" for part in _parts(messages))
    if places != images:
        raise RowError(Reason.IMAGE_COUNT_MISMATCH, f"{places} image markers in the text, {images} images in the row")


def check_text(text: str, limit: int) -> None:
    """Raises RowError if `text`, the whole text or all of it after the last image, is too short."""
    length = len(text.strip())
    if length < limit:
        raise RowError(Reason.TEXT_TOO_SHORT, f"{length} characters after the last image, {limit} are needed: {text!r}")


def check_size(width: int, height: int) -> None:
    """Raises RowError: an image (pixels) too small or too narrow."""
    short, long = sorted((width, height))
    if short < MIN_SIDE:
        raise RowError(Reason.IMAGE_TOO_SMALL, f"{width} x {height} pixels, a side needs {MIN_SIDE}")
    if long > MAX_ASPECT_RATIO * short:
        raise RowError(
            Reason.IMAGE_ASPECT_RATIO,
            f"{width} x {height} pixels: aspect ratio {long / short:.1f}, limit {MAX_ASPECT_RATIO}",
        )


def text_after_images(messages: Sequence[Message]) -> str:
    """All text after the last image, over all messages; all text if there is no image."""
    texts: list[str] = []
    for part in _parts(messages):
        if part["type"] == "image":
            texts.clear()
        else:
            texts.append(part["text"] or "")
    return "".join(texts)


def _parts(messages: Sequence[Message]) -> list[Part]:
    return [part for message in messages for part in message["content"] if isinstance(part, dict)]
