"""Conversations with tools and calls, for tests of chat templates, and the way of a raw row to the encoder."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from pipeline.checks import Candidate, On, run_checks
from pipeline.datasets import dataset
from pipeline.encoder import Encoder, Settings
from tests.support.qwen_assets import real_tokenizer_folder

Rows = list[dict[str, Any]]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": 'weather <b> of a töwn, "now" <|im_end|>',
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}, "n": {"type": ["number", "null"]}}},
    },
}


def call(**arguments: Any) -> dict[str, Any]:
    return {"type": "function", "id": "c1", "function": {"name": "get_weather", "arguments": arguments}}


def u(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def a(content: str | None, *calls: Any, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **({"tool_calls": list(calls)} if calls else {}), **fields}


def result(content: str) -> dict[str, Any]:
    return {"role": "tool", "content": content, "tool_call_id": "c1"}


CALLED = '<tool_call>\n{"name": "get_weather", "arguments": {"town": "Ålesund", "n": 1.5}}\n</tool_call>'
TOWN = call(town="Ålesund", n=1.5)


def tokenizer_folder(path: Path, template: str, *, vision: bool = False) -> Path:
    """Write a folder with the real tokenizer and a chat template; return it."""
    made = real_tokenizer_folder(path, vision=vision)
    config = json.loads((made / "tokenizer_config.json").read_text())
    (made / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    return made


load_tokenizer = cache(AutoTokenizer.from_pretrained)


@cache  # its 151,643 tokens take two seconds
def load_encoder(folder: Path) -> Encoder:
    return Encoder(Settings.load(str(folder)))


def sample_row(raw: dict[str, Any], name: str = "messages") -> dict[str, Any]:
    """A raw row through dataset class and checks, as preprocess stores it."""
    sample = dataset(name).sample(raw).placed()
    run_checks(On.CANDIDATE, Candidate(sample.messages, sample.text, len(sample.images), "the row", 4))
    return {"messages": sample.messages, "tools": sample.tools, "text": None, "images": []}
