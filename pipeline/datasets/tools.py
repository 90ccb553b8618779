"""What a message or a row carries beside its content: loss flags, tools, calls, and other fields of chat templates."""

import json
from collections.abc import Mapping
from typing import Any

from pipeline.checks import malformed
from pipeline.datasets.fields import from_json, need

_EXTRA = ("tool_call_id", "name", "reasoning_content")  # what templates read of a message, beside its tool_calls
# ms-swift's and OpenAI's, then axolotl's (message_field_training).
_FLAGS = ("loss", "weight", "loss_scale", "train", "training")
_DETAILS = ("train_detail", "training_detail")  # axolotl's ranges of characters


def is_trained(message: Mapping[str, Any]) -> bool:
    """Return False if one of the raw message's loss flags (`loss`, `weight` ...) is false or 0.

    Raises RowError for any value but 0 and 1, and if only parts of the message are to be trained.
    """
    flags = [(name, message[name]) for name in _FLAGS if message.get(name) is not None]
    for name, value in flags:
        if isinstance(value, str) or value not in (0, 1):
            raise malformed(f"a message's {name} is {value!r:.200}, known are 0 or false and 1 or true")
    for name in _DETAILS:
        if message.get(name):
            raise malformed(f"a message's {name} is {message[name]!r:.200}: only whole messages are trained or not")
    return all(value for _, value in flags)


def extra_fields(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return the raw message's fields that chat templates read, as they came. Raises RowError."""
    calls = calls_in(message.get("tool_calls")) + openai_calls(message.get("function_call"))
    extra = {name: message[name] for name in _EXTRA if message.get(name) is not None}
    if "reasoning_content" in extra:  # templates drop what is no text, and the answer would be trained without it
        need(extra["reasoning_content"], "a message's reasoning_content", str)
    return extra | ({"tool_calls": calls} if calls else {})


def openai_calls(value: Any) -> list[dict[str, Any]]:
    """Return the calls in `value`, of which {"name": ..., "arguments": ...} may stand alone, in OpenAI's spelling."""
    calls = calls_in(value)
    return [call if "function" in call else {"type": "function", "function": call} for call in calls]


def calls_in(value: Any) -> list[dict[str, Any]]:
    """Return the calls in `value`: null, an object or a list of objects, each as itself or as JSON text.

    Raises RowError.
    """
    value = from_json(value, "tool calls") or []
    calls = []
    for one in need([value] if isinstance(value, dict) else value, "a message's tool_calls", list):
        call = need(from_json(one, "a tool call"), "a tool call", dict)
        function = need(call.get("function", call), "a tool call's function", dict)
        need(function.get("name"), "a tool call's function name", str)
        calls.append(call)
    return calls


def tools(value: Any, functions: Any = None) -> str | None:
    """Return a row's tools as JSON for the chat template; None if it has none. Raises RowError.

    value: null, a list of objects, or the JSON text of the list or of each object, as tables have it.
    functions: the same, of OpenAI's older `functions`; used if there is no `value`.
    """
    offered = _objects(value)
    if not offered:
        offered = [{"type": "function", "function": function} for function in _objects(functions)]
    return json.dumps(offered, ensure_ascii=False) if offered else None


def _objects(value: Any) -> list[dict[str, Any]]:
    listed = need(from_json(value, "tools") or [], "tools", list)
    return [need(from_json(tool, "a tool"), "a tool", dict) for tool in listed]
