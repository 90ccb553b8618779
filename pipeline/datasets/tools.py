"""What a message or a row carries beside its content: loss flags, tools, calls, and other fields of chat templates."""

import json
from collections.abc import Mapping
from typing import Any

from pipeline.checks import malformed
from pipeline.datasets.fields import need

_EXTRA = ("tool_calls", "tool_call_id", "name", "reasoning_content")  # what templates read of a message


def is_trained(message: Mapping[str, Any]) -> bool:
    """Return False if the raw message has `loss: false` or `weight: 0`. Raises RowError for any value but 0 and 1."""
    flags = [(name, message[name]) for name in ("loss", "weight") if message.get(name) is not None]
    for name, value in flags:
        if value not in (0, 1):
            raise malformed(f"a message's {name} is {value!r:.200}, known are 0 or false and 1 or true")
    return all(value for _, value in flags)


def extra_fields(message: Mapping[str, Any]) -> str | None:
    """Return the raw message's fields that chat templates read, as JSON; None if it has none. Raises RowError."""
    extra = {name: message[name] for name in _EXTRA if message.get(name) is not None}
    calls = _parsed(extra.pop("tool_calls", None))
    for call in need([] if calls is None else calls, "a message's tool_calls", list):
        function = need(call, "a tool call", dict).get("function", call)
        need(need(function, "a tool call's function", dict).get("name"), "a tool call's function name", str)
    return _dump(extra | ({"tool_calls": calls} if calls else {}))


def tools(value: Any) -> str | None:
    """Return a row's tools as JSON for the chat template; None if it has none. Raises RowError.

    value: null, a list of objects, or the JSON text of one, as tables have it.
    """
    offered = _parsed(value)
    for tool in need([] if offered is None else offered, "tools", list):
        need(tool, "a tool", dict)
    return _dump(offered)


def _parsed(value: Any) -> Any:
    if not isinstance(value, str) or not value.strip():
        return value or None
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise malformed(f"tools or tool calls are a text that is no JSON: {error}") from error


def _dump(value: Any) -> str | None:
    """Half of a surrogate pair stays what it is: whoever hashes the row finds it."""
    return json.dumps(value, ensure_ascii=False) if value else None
