"""What a dataset class is: it turns one raw row into messages (or a text) and images.

A further dataset is a class in a new file of this folder; it is found by its `name`:

    class ShareGpt(Dataset):
        name = "sharegpt"

        def sample(self, row: Row) -> RawSample:
            messages = conversation(field(row, "items", list), row.get("system"))
            return RawSample(messages=messages, images=images(row.get("images")), tools=tools(row.get("tools")))
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from pipeline.checks import MIN_TEXT, Message, malformed
from pipeline.datasets.conversation import conversation, message
from pipeline.datasets.fields import from_json, need
from pipeline.datasets.parts import images, place
from pipeline.datasets.tools import tools

__all__ = ["Dataset", "RawSample", "Row", "conversation", "field", "images", "message", "need", "tools"]

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
    """Return the row's field, which must be there and of this type; lists and objects also as JSON text.

    Raises RowError.
    """
    if name not in row:
        raise malformed(f"the row has no field {name!r}, it has {', '.join(map(repr, row)) or 'none'}")
    return need(from_json(row[name], name) if kind in (list, dict) else row[name], name, kind)
