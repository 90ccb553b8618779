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

from pipeline.checks import MIN_TEXT, Message, malformed
from pipeline.datasets.fields import need
from pipeline.datasets.parts import content, images, place
from pipeline.datasets.tools import extra_fields, is_trained, tools

__all__ = ["Dataset", "RawSample", "Row", "field", "images", "message", "need", "tools"]

Row = Mapping[str, Any]


@dataclass(frozen=True)
class RawSample:
    """Either a conversation (`messages`) or a document (`text`)."""

    messages: list[Message] | None = None
    text: str | None = None
    images: tuple[str | bytes, ...] = ()  # path relative to the raw file, or the encoded image itself
    tools: str | None = None  # JSON, see `tools`
    image_field: str = "the row"  # where the images were looked for, as evidence calls it

    def placed(self) -> "RawSample":
        """Return the sample with a part for each `<image>` and its images in the order of their places.

        In rows without images `<image>` is text, see `parts.place`.
        """
        if self.messages is None:
            return self
        messages, ordered = place(self.messages, self.images)
        return RawSample(messages, None, ordered, self.tools, self.image_field)


class Dataset:
    """One class a kind of raw data. It knows rows and not files, which pipeline/readers/ reads."""

    name: ClassVar[str]
    min_text: ClassVar[int] = MIN_TEXT  # characters after the last image
    known: ClassVar[dict[str, type["Dataset"]]] = {}

    def __init_subclass__(cls) -> None:
        Dataset.known[cls.name] = cls

    def sample(self, row: Row) -> RawSample:
        """Raises RowError if the row is malformed. A KeyError, TypeError or the like means the same."""
        raise NotImplementedError


def field[T](row: Row, name: str, kind: type[T]) -> T:
    """Return the row's field, which must be there and of this type. Raises RowError."""
    if name not in row:
        raise malformed(f"the row has no field {name!r}, it has {', '.join(map(repr, row)) or 'none'}")
    return need(row[name], name, kind)


def message(role: Any, value: Any, fields: Row | None = None) -> Message:
    """Return a message.

    value: its content, a string, in which each `<image>` stands for an image, or a list of parts, taken as it is.
    fields: the raw message, for its `loss` or `weight`, `tool_calls` and what else chat templates read.
    Raises RowError.
    """
    fields = fields or {}
    extra = extra_fields(fields)
    made: Message = {"role": need(role, "a message's role", str)}
    made |= {"content": None if value is None and fields.get("tool_calls") else content(value)}
    made |= {} if is_trained(fields) else {"loss": False}
    return made | ({"extra": extra} if extra else {})
