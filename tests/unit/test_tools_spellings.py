"""Tools and calls as other libraries spell them: the tokens are those of the spelling that templates expect."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.encoder import Encoded
from tests.support.chat_templates import QWEN2_5, QWEN3
from tests.support.tool_chats import (
    CALLED,
    TOWN,
    WEATHER,
    Rows,
    a,
    call,
    load_encoder,
    load_tokenizer,
    result,
    sample_row,
    tokenizer_folder,
    u,
)


@pytest.fixture(scope="module")
def qwen2_5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenizer_folder(tmp_path_factory.mktemp("qwen2_5"), QWEN2_5)


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenizer_folder(tmp_path_factory.mktemp("qwen3"), QWEN3)


def test_arguments_and_tools_as_text(qwen3: Path) -> None:
    """OpenAI's arguments are JSON text, and tables have tools as JSON text. Qwen3 prints the former as it is."""
    messages = [u("Weather?"), a("", {"function": {"name": "get_weather", "arguments": '{"town":"Oslo"}'}})]
    row = sample_row({"messages": messages, "tools": json.dumps([WEATHER])})
    (encoded,) = load_encoder(qwen3).encode([row])
    tokenizer = load_tokenizer(qwen3)
    assert isinstance(encoded, Encoded)
    expected = tokenizer.apply_chat_template(messages, tools=[WEATHER], return_dict=True)["input_ids"]
    assert encoded.input_ids.tolist() == expected


def test_arguments_as_text_are_no_text_within_text(qwen2_5: Path) -> None:
    """Qwen2.5's template would print "arguments": "{\\"town\\"...": a call that no parser takes."""
    calls = [{"function": {"name": "get_weather", "arguments": text}} for text in ('{"town":"Oslo"}', " ")]
    messages = [u("Weather?"), a("", *calls)]
    (encoded,) = load_encoder(qwen2_5).encode([sample_row({"messages": messages, "tools": [WEATHER]})])
    parsed = [u("Weather?"), a("", call(town="Oslo"), call())]
    expected = load_tokenizer(qwen2_5).apply_chat_template(parsed, tools=[WEATHER], return_dict=True)
    assert isinstance(encoded, Encoded)
    assert encoded.input_ids.tolist() == expected["input_ids"]


CALL_TEXT = json.dumps({"name": "get_weather", "arguments": {"town": "Ålesund", "n": 1.5}}, ensure_ascii=False)
ARGUMENTS = json.dumps(TOWN["function"]["arguments"], ensure_ascii=False)
SWIFT = {
    "tools": [json.dumps(WEATHER)],
    "messages": [
        u("Both?"), a("Let me look."), {"role": "tool_call", "content": CALL_TEXT},
        {"role": "tool_call", "content": CALL_TEXT}, {"role": "tool_response", "content": "rain"},
        {"role": "tool_response", "content": "sun"}, a("Rain, sun."),
    ],
}  # fmt: skip
LLAMA_FACTORY = {
    "system": "Be brief.",
    "tools": json.dumps([WEATHER]),
    "conversations": [
        {"from": "human", "value": "Both?"},
        {"from": "function_call", "value": f"[{CALL_TEXT}, {CALL_TEXT}]"},
        {"from": "observation", "value": "rain"},
        {"from": "gpt", "value": "Rain."},
    ],
}
OPENAI_OLDER = {
    "functions": [WEATHER["function"]],
    "messages": [
        {"role": "developer", "content": "Be brief."}, u("Weather?"),
        {"role": "assistant", "content": None, "function_call": {**TOWN["function"], "arguments": ARGUMENTS}},
        {"role": "function", "name": "get_weather", "content": "rain"}, a("It rains."),
    ],
}  # fmt: skip
HERMES = {
    "conversations": [
        {"from": "system", "value": "<tools>[...]</tools>"},
        {"from": "human", "value": "Weather?"},
        {"from": "gpt", "value": CALLED},
        {"from": "tool", "value": "rain"},
        {"from": "gpt", "value": "It rains."},
    ],
}
AXOLOTL = {
    "conversations": [
        {"from": "human", "value": "1+1", "train": False},
        {"from": "gpt", "value": "3", "train": False},
        {"from": "human", "value": "1+1", "weight": 0},
        {"from": "gpt", "value": "2", "train": True, "train_detail": None},
    ],
}
BRIEF = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("name", "raw", "messages", "trained"),
    [
        (
            "messages",
            SWIFT,
            [u("Both?"), a("Let me look.", TOWN, TOWN), result("rain"), result("sun"), a("Rain, sun.")],
            [f"Let me look.\n{CALLED}\n{CALLED}", "Rain, sun."],
        ),
        (
            "llava",
            LLAMA_FACTORY,
            [BRIEF, u("Both?"), a(None, TOWN, TOWN), result("rain"), a("Rain.")],
            [f"{CALLED}\n{CALLED}", "Rain."],
        ),
        (
            "messages",
            OPENAI_OLDER,
            [BRIEF, u("Weather?"), a(None, TOWN), result("rain"), a("It rains.")],
            [CALLED, "It rains."],
        ),
        (
            "llava",
            HERMES,
            [
                {"role": "system", "content": "<tools>[...]</tools>"},
                u("Weather?"),
                a(CALLED),
                result("rain"),
                a("It rains."),
            ],
            [CALLED, "It rains."],
        ),
        ("llava", AXOLOTL, [u("1+1"), a("3"), u("1+1"), a("2")], ["2"]),
    ],
)
def test_the_spellings_of_other_libraries(
    name: str, raw: dict[str, Any], messages: Rows, trained: list[str], qwen2_5: Path
) -> None:
    (encoded,) = load_encoder(qwen2_5).encode([sample_row(raw, name)])
    tokenizer = load_tokenizer(qwen2_5)
    offered = [WEATHER] if {"tools", "functions"} & raw.keys() else None
    assert isinstance(encoded, Encoded), encoded
    assert (
        encoded.input_ids.tolist()
        == tokenizer.apply_chat_template(messages, tools=offered, return_dict=True)["input_ids"]
    )
    assert tokenizer.decode(encoded.input_ids[encoded.loss_mask]) == "".join(f"{turn}<|im_end|>" for turn in trained)
