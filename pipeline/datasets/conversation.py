"""A row's conversation: the roles and fields that people use, as the roles and fields that chat templates read."""

import json
from collections.abc import Mapping
from typing import Any

from pipeline.checks import Message, malformed
from pipeline.datasets.fields import from_json, need
from pipeline.datasets.parts import content
from pipeline.datasets.tools import extra_fields, is_trained, openai_calls

# ShareGPT's names, LLaMA-Factory's `observation`, ms-swift's `tool_response`, OpenAI's `function` and `developer`.
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "observation": "tool",
    "tool_response": "tool",
    "function": "tool",
    "developer": "system",
}
CALLS = ("function_call", "tool_call")  # LLaMA-Factory's and ms-swift's role of a turn that is calls alone, as JSON


def conversation(turns: list[Any], system: Any = None) -> list[Message]:
    """Return the messages of `turns`, objects with `role` and `content`, or with ShareGPT's `from` and `value`.

    system: the row's own system text, used if the first turn is no system message.
    Turns of CALLS are tool calls of the assistant: with those before them, or an answer before them, they are one turn.
    Raises RowError.
    """
    messages: list[Message] = []
    for turn in turns:
        turn = need(from_json(turn, "a message"), "a message", dict)
        role = turn.get("from")
        name, value = (turn.get("role"), "content") if role is None else (role, "value")
        name = need(name, "a message's role", str)
        if name in CALLS:
            _add_calls(messages, turn, turn.get(value))
        else:
            messages.append(message(ROLES.get(name, name), turn.get(value), turn))
    if system and (not messages or messages[0]["role"] != "system"):
        messages.insert(0, message("system", need(system, "the row's system", str)))
    return messages


def message(role: Any, value: Any, fields: Mapping[str, Any] | None = None) -> Message:
    """Return a message.

    value: its content, a string, in which each `<image>` stands for an image, or a list of parts, taken as it is.
    fields: the raw message, for its loss flag, `tool_calls` and what else chat templates read.
    Raises RowError.
    """
    fields = fields or {}
    extra = extra_fields(fields)
    made: Message = {"role": need(role, "a message's role", str)}
    made |= {"content": None if value is None and "tool_calls" in extra else content(value)}
    return made | ({} if is_trained(fields) else {"loss": False}) | _as_json(extra)


def _add_calls(messages: list[Message], turn: Mapping[str, Any], value: Any) -> None:
    """Add a turn of calls: to the assistant's message before it, if there is one."""
    calls, loss = openai_calls(value), {} if is_trained(turn) else {"loss": False}
    if not calls:
        raise malformed(f"a turn of tool calls has none: {value!r:.200}")
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": None, **loss})
    before = messages[-1]
    if before.get("loss") != loss.get("loss"):
        raise malformed("an answer and the tool calls behind it are one turn, and only one of them is to be trained")
    extra = json.loads(before.get("extra", "{}"))
    before.update(_as_json(extra | {"tool_calls": [*extra.get("tool_calls", []), *calls]}))


def _as_json(extra: dict[str, Any]) -> dict[str, str]:
    """Half of a surrogate pair stays what it is: whoever hashes the row finds it."""
    return {"extra": json.dumps(extra, ensure_ascii=False)} if extra else {}
