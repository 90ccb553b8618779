"""What all dataset classes ask of a value in a raw row."""

from typing import Any

from pipeline.checks import malformed

_NAMES = {dict: "an object", list: "a list", str: "a string", bytes: "bytes", type(None): "null", bool: "a boolean"}


def need[T](value: Any, what: str, kind: type[T]) -> T:
    """Return `value`, which must be of this type; `what` names it in the RowError that is raised if it is not."""
    if not isinstance(value, kind):
        is_a = "a number" if isinstance(value, int | float) and not isinstance(value, bool) else _NAMES.get(type(value))
        raise malformed(f"{what} is {is_a or type(value).__name__}, {_NAMES[kind]} is needed: {value!r:.200}")
    return value
