"""What all dataset classes ask of a value in a raw row."""

import json
from contextlib import suppress
from typing import Any

from pipeline.checks import malformed

_NAMES = {dict: "an object", list: "a list", str: "a string", bytes: "bytes", type(None): "null", bool: "a boolean"}


def need[T](value: Any, what: str, kind: type[T], or_else: str = "") -> T:
    """Return `value`, which must be of this type, bytes as the text in them where that is a string.

    Raises RowError if it is not. `what` names it there, and `or_else` what else it could be ("a string or ").
    """
    if kind is str:
        value = as_text(value)
    if not isinstance(value, kind):
        is_a = "a number" if isinstance(value, int | float) and not isinstance(value, bool) else _NAMES.get(type(value))
        needed = or_else + _NAMES[kind]
        raise malformed(f"{what} is {is_a or type(value).__name__}, {needed} is needed: {value!r:.200}")
    return value


def as_text(value: Any) -> Any:
    """Return `value`, or the text that it is in UTF-8: tables of Hive and Impala, and members of tars, have bytes."""
    if isinstance(value, bytes):
        with suppress(UnicodeDecodeError):
            return value.decode()
    return value


def from_json(value: Any, what: str) -> Any:
    """Return `value`; where it is a text, what that says as JSON, as many tables have lists and objects.

    Raises RowError if the text is no JSON. One of white space alone is None.
    """
    value = as_text(value)
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError) as error:
        raise malformed(f"{what}: a text that is no JSON ({error}): {value!r:.200}") from error
