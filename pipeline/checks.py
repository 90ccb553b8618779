"""Why a row is not trained on: the reason codes, and the rules behind those that need no image bytes."""

from collections.abc import Sequence
from enum import StrEnum

MIN_SIDE = 28  # pixels: one merged patch of Qwen2.5-VL
MAX_ASPECT_RATIO = 200  # Qwen's own smart_resize refuses more
MIN_TEXT = 4  # characters after the last image; a dataset class may state another
MAX_EVIDENCE = 500  # characters
ROLES = ("system", "user", "assistant")

Part = dict[str, str | None]  # {"type": "text", "text": ...} or {"type": "image", "text": None}
Message = dict[str, str | list[Part]]  # {"role": ..., "content": [Part, ...]}


class Reason(StrEnum):
    MALFORMED_ROW = "malformed_row"  # no JSON object, invalid UTF-8, a wrong type, no assistant turn
    IMAGE_COUNT_MISMATCH = "image_count_mismatch"  # image markers or tokens in the text != images of the row
    TEXT_TOO_SHORT = "text_too_short"  # fewer than MIN_TEXT characters after the last image
    IMAGE_PATH_ESCAPES = "image_path_escapes"  # a URL, or a path that leads out of the raw folder
    IMAGE_MISSING = "image_missing"  # no such file
    IMAGE_TOO_LARGE = "image_too_large"  # more pixels than Pillow takes without a warning, or too many bytes
    IMAGE_UNREADABLE = "image_unreadable"  # not an image, truncated, damaged
    IMAGE_TOO_SMALL = "image_too_small"  # a side below MIN_SIDE
    IMAGE_ASPECT_RATIO = "image_aspect_ratio"  # long side / short side above MAX_ASPECT_RATIO
    PROCESSOR_FAILED = "processor_failed"  # a readable image or text that transformers' processor does not take
    TOO_LONG = "too_long"  # more tokens than a pack has
    DUPLICATE = "duplicate"  # the same messages or text and the same image bytes as an earlier row


class RowError(Exception):
    """A row is bad: its reason, and in `evidence` what was seen, with the value and the limit."""

    def __init__(self, reason: Reason, evidence: str):
        super().__init__(reason, evidence)
        self.reason = reason
        self.evidence = evidence.encode(errors="backslashreplace").decode()[:MAX_EVIDENCE]


def malformed(evidence: str) -> RowError:
    return RowError(Reason.MALFORMED_ROW, evidence)


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
