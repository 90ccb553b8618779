"""A conversation as the tokenizer folder's own chat template renders it, and which of its characters are trained.

The template runs once a row, as transformers runs it, so whatever it does to a text (strip earlier thinking, print
tools, wrap tool results) is in the tokens. It costs 30 to 40 us of CPU a conversation; tokenizing 190 tokens costs 400.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

TURN, END_OF_TURN = "<|im_start|>", "<|im_end|>"
_ASSISTANT = re.compile(re.escape(f"{TURN}assistant\n"))
_MARKER, _HIDDEN = "<|im_", "<\ue000im_"  # of one length, so that positions stay


@dataclass(frozen=True)
class Rendered:
    text: str
    answers: list[tuple[int, int]]  # of each trained assistant turn: its first character, the start of its end of turn


class ChatTemplate:
    """A compiled chat template in ChatML: each turn is `<|im_start|>ROLE\\n...<|im_end|>`."""

    def __init__(self, source: str | None, variables: Mapping[str, str]):
        self._template = _compile(source) if source else None
        self._variables = dict(variables)
        self._takes_text = _takes_text(self._apply) if source else False
        self._null = None if self._takes_null() else ""

    def render(self, messages: Sequence[Mapping[str, Any]], tools: str | None) -> Rendered:
        """Render `messages` (schema.MESSAGE) and `tools` (JSON) as `apply_chat_template(messages, tools=tools)` does.

        Raises ValueError if the template drops tools, a call or a result, or if its assistant turns cannot be told
        apart; jinja2's errors and any other that the template, which is a program, runs into.
        """
        conversation = [self._for_template(message) for message in messages]
        tool_list = json.loads(tools) if tools else None
        text = self._apply(conversation, tool_list)
        marked = self._without_markers_of_texts(conversation, tool_list, text)
        answers = _assistant_turns(marked)
        assistants = [message for message in conversation if message["role"] == "assistant"]
        if len(answers) != len(assistants):
            raise ValueError(
                f"it prints {len(answers)} assistant turns for {len(assistants)} assistant messages, so the trained "
                "tokens are not known"
            )
        if tool_list and self._apply(conversation, None) == text:
            raise ValueError(f"it does not print tools, and the row has {len(tool_list)}")
        _refuse_dropped(conversation, [text[start:end] for start, end in answers], text)
        trained = [message.get("loss") is not False for message in messages if message["role"] == "assistant"]
        return Rendered(text, [answer for answer, kept in zip(answers, trained) if kept])

    def _takes_null(self) -> bool:
        """Return whether it prints a tool call whose message has null content.

        OpenAI's rows have null there. Qwen3-VL's template loops over the content and fails, unless it is "".
        """
        message = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
        try:
            return bool(self._apply([{"role": "user", "content": "u"}, message], None))
        except Exception:  # a template is a program
            return False

    def _apply(self, conversation: list[dict[str, Any]], tools: Any) -> str:
        if self._template is None:
            raise ValueError("the tokenizer folder has none")
        return self._template.render(
            messages=conversation, tools=tools, documents=None, add_generation_prompt=False, **self._variables
        )

    def _for_template(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """A message as its raw row has it. Content is plain text, which all templates take, unless it has an image."""
        parts = message["content"]
        content: Any = self._null
        if parts is not None and any(part["type"] == "image" for part in parts):
            content = [{"type": "text", "text": part["text"]} if part["type"] == "text" else _IMAGE for part in parts]
        elif parts is not None:
            content = "".join(part["text"] for part in parts)
        fields = message.get("extra")
        extra = json.loads(fields) if fields else {}
        if not self._takes_text:
            for call in extra.get("tool_calls", ()):
                _parse_arguments(call.get("function", call))
        return {"role": message["role"], "content": content, **extra}

    def _without_markers_of_texts(self, conversation: list[dict[str, Any]], tools: Any, text: str) -> str:
        """`text`, in which only the template's own turn markers are markers: those in the row's texts are hidden."""
        if not _has_marker([conversation, tools]):
            return text
        marked = self._apply(_hide(conversation), _hide(tools))
        if marked.replace(_HIDDEN, _MARKER) != text:
            raise ValueError(f"it changes texts with {_MARKER}...|> in them, so the trained tokens are not known")
        return marked


_IMAGE = {"type": "image"}


def _takes_text(apply: Callable[[list[dict[str, Any]], Any], str]) -> bool:
    """Whether a template prints arguments that are JSON text, as OpenAI's API has them, as they are.

    Qwen3's does. Qwen2.5's quotes them once more, which no parser of its calls would take for arguments.
    """
    text = '{"a":1}'
    call = {"type": "function", "function": {"name": "f", "arguments": text}}
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    try:
        return text in apply(turns, None)
    except Exception:  # a template is a program
        return False


def _parse_arguments(function: dict[str, Any]) -> None:
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            function["arguments"] = json.loads(arguments) if arguments.strip() else {}
        except ValueError as error:
            raise ValueError(
                f"the arguments of {function['name']} are no JSON ({error}): {arguments!r:.200}"
            ) from error


def _assistant_turns(marked: str) -> list[tuple[int, int]]:
    """(first character, start of the end of turn) of each assistant turn."""
    turns = []
    for header in _ASSISTANT.finditer(marked):
        end = marked.find(END_OF_TURN, header.end())
        if end < 0 or marked.find(TURN, header.end(), end) >= 0:
            raise ValueError(f"it prints no {END_OF_TURN} after an assistant message")
        turns.append((header.end(), end))
    return turns


def _refuse_dropped(conversation: list[dict[str, Any]], answers: list[str], text: str) -> None:
    """Raises ValueError if a tool call is not in its turn, or a tool's result nowhere."""
    turns = iter(answers)
    for number, message in enumerate(conversation):
        answer = next(turns) if message["role"] == "assistant" else ""
        for call in message.get("tool_calls") or []:
            name = call.get("function", call)["name"]
            if message["role"] != "assistant" or name not in answer:
                raise ValueError(f"it does not print the tool call {name!r} of message {number}")
        content = message["content"]
        if message["role"] == "tool" and isinstance(content, str) and content.strip() not in text:
            raise ValueError(f"it does not print message {number}, a tool's result")


def _has_marker(value: Any) -> bool:
    if isinstance(value, str):
        return _MARKER in value
    if isinstance(value, dict):
        return any(map(_has_marker, value)) or any(map(_has_marker, value.values()))
    return isinstance(value, list) and any(map(_has_marker, value))


def _hide(value: Any) -> Any:
    match value:
        case str():
            return value.replace(_MARKER, _HIDDEN)
        case list():
            return [_hide(one) for one in value]
        case dict():
            return {_hide(key): _hide(one) for key, one in value.items()}
    return value


class _Generation(jinja2.ext.Extension):
    """{% generation %} marks what is trained in some templates; transformers prints what is inside, and so do we."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _compile(template: str) -> jinja2.Template:
    """Compile as transformers.utils.chat_template_utils does."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:  # jinja's own escapes HTML
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment.globals["raise_exception"] = raise_exception
    environment.filters["tojson"] = tojson
    return environment.from_string(template)
