"""Hugging Face folders of Qwen3 for tests: its tokens, its chat template, a tiny model.

Qwen3's tokenizer is Qwen2.5's with four more tokens. Its template writes the thinking of the turn in progress and
strips that of earlier turns; `<think>` stands in the content, or `reasoning_content` beside it.
"""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from tests.support.chat_templates import QWEN3 as TEMPLATE
from tests.support.qwen_assets import (
    language_config,
    real_tokenizer_json,
    save_random,
    tiny_tokenizer_json,
    write_folder,
)

ADDED = ["<tool_response>", "</tool_response>", "<think>", "</think>"]  # ids 151665 to 151668


def qwen3_tokenizer_folder(path: Path | str, *, real_vocabulary: bool = True) -> Path:
    """Qwen3's tokenizer and template; no weights."""
    return write_folder(Path(path), qwen3_tokenizer_json(real_vocabulary), False, template=TEMPLATE)


def tiny_qwen3_folder(
    path: Path | str, *, tied: bool = True, seed: int = 0, layers: int = 2, real_vocabulary: bool = False
) -> Path:
    """A Qwen3 of 64 channels with random weights in float32, with tokenizer and template.

    4 heads of 32 channels, so that heads x head_dim = 128 is not the hidden size; 2 key/value groups. Norms are not 1.
    """
    import transformers

    folder = qwen3_tokenizer_folder(path, real_vocabulary=real_vocabulary)
    config = transformers.Qwen3Config(
        **language_config(qwen3_tokenizer_json(real_vocabulary), layers),
        head_dim=32,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=tied,
    )
    save_random(transformers.Qwen3ForCausalLM(config), folder, seed)
    return folder


def qwen3_tokenizer_json(real_vocabulary: bool) -> str:
    tokenizer = Tokenizer.from_str(real_tokenizer_json() if real_vocabulary else tiny_tokenizer_json())
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in ADDED])
    return json.dumps(json.loads(tokenizer.to_str()))
