"""A message's content and its images, in all the spellings that people use."""

import base64
import binascii
import re
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any
from urllib.parse import unquote_to_bytes

from pipeline.checks import Message, Part, Reason, RowError, malformed
from pipeline.datasets.fields import as_text, from_json, need

MARKER = "<image>"
IMAGE_FIELDS = ("images", "image")  # of a row, in this order
# Where people put a place for an image: first, last, or alone in a line. Within a sentence it is a word.
_STANDS_APART = re.compile(rf"\A\s*{MARKER}|{MARKER}\s*\Z|^\s*{MARKER}\s*$", re.MULTILINE)
_NONE: tuple[object, ...] = (None, "", b"", [])  # what tables and LLaVA's rows of text alone have in IMAGE_FIELDS
# Qwen-VL's and ms-swift 2's place for an image. HTML's <img> has no content.
_IMG = re.compile(r"<img>[^<>\n]{1,1000}</img>")
# Base64 of 100 bytes and more without the head of a data: URI: no path, which has a dot.
_BARE_BASE64 = re.compile(r"[A-Za-z0-9+/_\s-]{132,}={0,2}\s*")
_TEXT, _IMAGE = ("text", "input_text", "output_text"), ("image", "image_url", "input_image")
_VIDEO, _AUDIO = ("video", "video_url"), ("audio", "audio_url", "input_audio")

Image = str | bytes  # a path relative to the raw file, or the encoded image


def images(value: Any) -> tuple[Image, ...]:
    """Return a row's images: null, or a list of paths, data URIs, encoded bytes, or {"bytes": ..., "path": ...}.

    The list may be its JSON text. Raises RowError.
    """
    value = _listed(value)
    return () if value is None else tuple(map(_image, need(value, "images", list)))


def image_fields(row: Mapping[str, Any]) -> tuple[Image, ...]:
    """Return the images in the first of IMAGE_FIELDS that the row has: a list of them, or one alone."""
    value = next((value for name in IMAGE_FIELDS if not _is_none(value := _listed(row.get(name)))), None)
    return images(value if isinstance(value, list | None) else [value])


def _listed(value: Any) -> Any:
    """Return `value`, or the list that it is the JSON text of. A path may begin with a bracket, too."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with suppress(RowError):
            return from_json(value, "images")
    return value


def _is_none(value: Any) -> bool:
    """Whether it is no image: tables also have objects of nulls, as {"bytes": null, "path": null}."""
    return value in _NONE or (isinstance(value, dict) and all(one in _NONE for one in value.values()))


def content(value: Any) -> str | list[Part]:
    """Return a string as it is, and a list as parts.

    An image part may carry its own image in "image", or in "index" which of the row's images it is (from 0).
    """
    value = as_text(value)
    if isinstance(value, str):
        return value
    return [_part(part) for part in need(value, "a message's content", list, "a string or ")]


def place(messages: Sequence[Message], listed: Sequence[Image]) -> tuple[list[Message], tuple[Image, ...]]:
    """Return messages made of parts alone, and all images in the order of their places.

    Places with an index take that one of `listed`. Other places without an image take one of the rest each, as long as
    there are any; what is left comes last. In a row without images a marker is text, unless it stands apart in a
    message that is not the assistant's: its image is lost.

    Raises RowError if an index or an `<img>PATH</img>` leads to no image.
    """
    own = [part for message in messages if isinstance(message["content"], list) for part in message["content"]]
    indexed = {part["index"] for part in own if "index" in part}
    if missing := sorted(indexed.difference(range(len(listed)))):
        raise RowError(Reason.IMAGE_COUNT_MISMATCH, f"a part is image {missing[0]}, the row has {len(listed)} images")
    waiting = deque(image for number, image in enumerate(listed) if number not in indexed)
    imageless = not listed and not any("image" in part for part in own)
    ordered: list[Image] = []
    placed = []
    for message in messages:
        parts = message["content"]
        if isinstance(parts, str):
            lost = imageless and message["role"] != "assistant" and _STANDS_APART.search(parts)
            if imageless and message["role"] != "assistant" and (named := _IMG.search(parts)):
                evidence = (
                    f"{named[0]!r:.200} is text here: write {MARKER}, and the image's path in {IMAGE_FIELDS[0]!r}"
                )
                raise RowError(Reason.IMAGE_COUNT_MISMATCH, evidence)
            parts = _split(parts) if listed or lost else [_text(parts)] if parts else []
        for part in parts or ():
            if part["type"] == "image" and (image := part.get("image")) is not None:
                ordered.append(image)
            elif "index" in part:
                ordered.append(listed[part["index"]])
            elif part["type"] == "image" and waiting:
                ordered.append(waiting.popleft())
        bare = None if parts is None else [{"type": part["type"], "text": part["text"]} for part in parts]
        placed.append(message | {"content": bare})
    return placed, (*ordered, *waiting)


def _split(text: str) -> list[Part]:
    parts: list[Part] = []
    for number, piece in enumerate(text.split(MARKER)):
        if number:
            parts.append({"type": "image", "text": None})
        if piece:
            parts.append(_text(piece))
    return parts


def _text(text: str) -> Part:
    return {"type": "text", "text": text}


def _part(part: Any) -> Part:
    what = "a part of a message's content"
    # Tables fill the fields that a part does not have with null.
    fields = {name: value for name, value in need(part, what, dict).items() if value is not None}
    kind = as_text(fields.get("type")) or next((name for name in ("text", "image", "video") if name in fields), None)
    if kind in _VIDEO:
        raise RowError(Reason.VIDEO, f"{what} is {part!r:.200}")
    if kind in _AUDIO:
        raise RowError(Reason.AUDIO, f"{what} is {part!r:.200}")
    if kind in _TEXT and isinstance(text := as_text(fields.get("text")), str):
        return _text(text)
    if kind in _IMAGE:
        named = [fields[name] for name in ("image", "image_url", "url", "path", "bytes", "source") if name in fields]
        image: Part = {"type": "image", "text": None}
        if named:
            return image | {"image": _image(named[0])}
        return image | ({"index": _index(fields["index"])} if "index" in fields else {})
    raise malformed(f"{what} is {part!r:.200}, known types are 'text' (with its text), 'image' and 'image_url'")


def _index(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0 or value % 1:
        raise malformed(f"an image part's index is {value!r:.200}, a whole number from 0 on is needed")
    return int(value)  # pandas makes floats of whole numbers that have nulls between them


def _image(value: Any) -> Image:
    match value:
        case str() if value.lstrip()[:5].lower() == "data:":
            return _data_uri(value.strip())
        case str() if _BARE_BASE64.fullmatch(value):
            return _base64(value, value)
        case str() if value:
            return value
        case bytes():  # none at all, too: an image that cannot be read
            return value
        case {"bytes": bytes(data)} if data:
            return data
        case {"bytes": str(text)} | {"data": str(text)} if text:  # JSON has no bytes; Anthropic's API has `data`
            return _base64(text, text)
        case {"path": str(named)} | {"url": str(named)} | {"image": named} | {"image_url": named}:
            return _image(named)
        case {"bytes": bytes(data)}:
            return data
    raise malformed(f"an image is {value!r:.200}, a path or bytes are needed")


def _data_uri(uri: str) -> bytes:
    """The bytes in data:[TYPE][;base64],DATA (RFC 2397), where people also write `; base64` and put it first."""
    header, _, data = uri.partition(",")
    quoted = unquote_to_bytes(data.encode(errors="backslashreplace"))
    is_base64 = "base64" in [parameter.strip() for parameter in header.lower().split(";")[1:]]
    return _base64(quoted, uri) if is_base64 else quoted


def _base64(text: str | bytes, shown: str) -> bytes:
    """The bytes in base64, with `+/` or `-_` as its last two characters, padded or not."""
    data = text.encode(errors="backslashreplace") if isinstance(text, str) else text
    data = b"".join(data.split()).rstrip(b"=").translate(_URL_SAFE)
    try:
        return base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
    except binascii.Error as error:
        raise RowError(Reason.IMAGE_UNREADABLE, f"{shown[:60]!r}... is no base64: {error}") from error


_URL_SAFE = bytes.maketrans(b"-_", b"+/")
