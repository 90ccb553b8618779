"""What all dataset classes ask of a value in a raw row."""

import json
from typing import Any

from pipeline.checks import malformed

_NAMES = {dict: "an object", list: "a list", str: "a string", bytes: "bytes", type(None): "null", bool: "a boolean"}


def need[T](value: Any, what: str, kind: type[T]) -> T:
    """Return `value`, which must be of this type; `what` names it in the RowError that is raised if it is not."""
    if not isinstance(value, kind):
        is_a = "a number" if isinstance(value, int | float) and not isinstance(value, bool) else _NAMES.get(type(value))
        raise malformed(f"{what} is {is_a or type(value).__name__}, {_NAMES[kind]} is needed: {value!r:.200}")
    return value


def from_json(value: Any, what: str) -> Any:
    """Return `value`; where it is a text, what that says as JSON, as many tables have lists and objects.

    Raises RowError if the text is no JSON. One of white space alone is None.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError) as error:
        raise malformed(f"{what}: a text that is no JSON ({error}): {value!r:.200}") from error
