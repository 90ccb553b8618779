"""What a dataset class is: it turns one raw row into messages (or a text) and images.

A further dataset is a class in a new file of this folder; it is found by its `name`:

    class ShareGpt(Dataset):
        name = "sharegpt"

        def sample(self, row: Row) -> RawSample:
            roles = {"human": "user", "gpt": "assistant"}
            turns = [need(turn, "conversation", dict) for turn in field(row, "items", list)]
            messages = [message(roles.get(turn.get("from"), "?"), turn.get("value")) for turn in turns]
            return RawSample(messages=messages, images=images(row.get("images")))
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from pipeline.checks import MIN_TEXT, Message, Part, Reason, RowError, malformed

MARKER, VIDEO_MARKER = "<image>", "<video>"
Row = Mapping[str, Any]
_NAMES = {dict: "an object", list: "a list", str: "a string", bytes: "bytes", type(None): "null", bool: "a boolean"}


@dataclass(frozen=True)
class RawSample:
    """Either a conversation (`messages`) or a document (`text`)."""

    messages: list[Message] | None = None
    text: str | None = None
    images: tuple[str | bytes, ...] = ()  # path relative to the raw file, or the encoded image itself


class Dataset:
    """One class a kind of raw data. Knows rows, not files: those are read by pipeline/readers."""

    name: ClassVar[str]
    min_text: ClassVar[int] = MIN_TEXT  # characters after the last image
    known: ClassVar[dict[str, type["Dataset"]]] = {}

    def __init_subclass__(cls) -> None:
        Dataset.known[cls.name] = cls

    def sample(self, row: Row) -> RawSample:
        """Raises RowError if the row is malformed. A KeyError, TypeError or the like means the same."""
        raise NotImplementedError


def need[T](value: Any, what: str, kind: type[T]) -> T:
    """`value`, which must be of this type; else RowError says so of `what`."""
    if not isinstance(value, kind):
        is_a = "a number" if isinstance(value, int | float) and not isinstance(value, bool) else _NAMES.get(type(value))
        raise malformed(f"{what} is {is_a or type(value).__name__}, {_NAMES[kind]} is needed: {value!r:.200}")
    return value


def field[T](row: Row, name: str, kind: type[T]) -> T:
    """The row's field, which must be there and of this type."""
    if name not in row:
        raise malformed(f"the row has no field {name!r}, it has {', '.join(map(repr, row)) or 'none'}")
    return need(row[name], name, kind)


def message(role: Any, content: Any) -> Message:
    """`content`: a string, in which each `<image>` stands for an image, or a list of parts, taken as it is."""
    return {"role": need(role, "a message's role", str), "content": _content(content)}


def images(value: Any) -> tuple[str | bytes, ...]:
    """Images as rows have them: null, or a list of paths, of encoded bytes, or of {"bytes": ..., "path": ...}."""
    return () if value is None else tuple(map(_image, need(value, "images", list)))


def _content(content: Any) -> list[Part]:
    if isinstance(content, str):
        if VIDEO_MARKER in content:
            raise RowError(Reason.VIDEO, f"a message has {VIDEO_MARKER}: {content!r:.200}")
        parts: list[Part] = []
        for number, text in enumerate(content.split(MARKER)):
            if number:
                parts.append({"type": "image", "text": None})
            if text:
                parts.append({"type": "text", "text": text})
        return parts
    return [_part(part) for part in need(content, "a message's content", list)]


def _part(part: Any) -> Part:
    match need(part, "a part of a message's content", dict):
        case {"type": "image"}:
            return {"type": "image", "text": None}
        case {"type": "text", "text": str(text)}:
            return {"type": "text", "text": text}
        case {"type": "video"}:
            raise RowError(Reason.VIDEO, f"a part of a message's content is {part!r:.200}")
    raise malformed(
        f"a part of a message's content is {part!r:.200}, known types are 'text' (with its text) and 'image'"
    )


def _image(value: Any) -> str | bytes:
    match value:
        case str() | bytes():
            return value
        case {"bytes": bytes(data)}:
            return data
        case {"path": str(path)}:
            return path
    raise malformed(f"an image is {value!r:.200}, a path or bytes are needed")
