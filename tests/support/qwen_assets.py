"""Hugging Face folders for tests, made on this machine: Qwen's real tokenizer, and tiny models with random weights.

Nothing is downloaded. Qwen's 151k vocabulary comes from PyPI's dashscope, which ships it as `qwen.tiktoken` (token and
rank); the BPE merges follow from the ranks. Templates and special tokens are the hub's.
"""

import base64
import json
import os
import tempfile
import uuid
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from tests.support.chat_templates import QWEN2_5

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_NAMES = (
    "endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start quad_end "
    "vision_start vision_end vision_pad image_pad video_pad fim_prefix fim_middle fim_suffix fim_pad repo_name file_sep"
)
_TOKENS = [f"<|{name}|>" for name in _NAMES.split(" ")]
# In the order of their ids, from 151643; the second list is not `special` (decode keeps it), but still never split.
SPECIAL, ADDED = _TOKENS[:14], ["<tool_call>", "</tool_call>", *_TOKENS[14:]]

VL_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}{% for message in messages "
    "%}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful "
    "assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ "
    "message['content'] }}<|im_end|>\n{% else %}{% for content in message['content'] %}{% if content['type'] == "
    "'image' or 'image' in content or 'image_url' in content %}{% set image_count.value = image_count.value + 1 %}{% "
    "if add_vision_id %}Picture {{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>{% "
    "elif content['type'] == 'video' or 'video' in content %}{% set video_count.value = video_count.value + 1 %}{% "
    "if add_vision_id %}Video {{ video_count.value }}: {% endif %}<|vision_start|><|video_pad|><|vision_end|>{% elif "
    "'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}{% if "
    "add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def real_tokenizer_folder(path: Path | str, *, vision: bool = True) -> Path:
    """Qwen2.5-VL's (or with vision=False Qwen2.5's) tokenizer, template and processor settings; no weights.

    The first call on a machine derives the merges (some seconds) and keeps the file in the temporary folder.
    """
    return write_folder(Path(path), real_tokenizer_json(), vision, min_pixels=56 * 56, max_pixels=16384 * 28 * 28)


def tiny_tokenizer_folder(path: Path | str, *, vision: bool) -> Path:
    """As `real_tokenizer_folder`, with a vocabulary of 600 tokens."""
    return write_folder(Path(path), tiny_tokenizer_json(), vision, min_pixels=56 * 56, max_pixels=256 * 28 * 28)


def tiny_vl_folder(
    path: Path | str,
    *,
    tied: bool = True,
    seed: int = 0,
    layers: int = 2,
    min_pixels: int = 56 * 56,
    max_pixels: int = 256 * 28 * 28,
    vision_hidden_size: int = 64,
    real_vocabulary: bool = False,
) -> Path:
    """A Qwen2.5-VL of 64 channels with random weights in float32, with tokenizer, template and processor settings.

    Grouped-query attention (4 heads, 2 groups, 16 channels a head), a vision tower of 4 layers with window attention in
    layers 0 and 2. `max_pixels` bounds an image to 256 tokens. No weight is trivial: norms are not 1, biases not 0.
    """
    import transformers

    text = real_tokenizer_json() if real_vocabulary else tiny_tokenizer_json()
    folder = write_folder(Path(path), text, True, min_pixels=min_pixels, max_pixels=max_pixels)
    token = Tokenizer.from_str(text).token_to_id
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            **language_config(text, layers),
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
        },
        vision_config={
            "depth": 4,
            "hidden_size": vision_hidden_size,
            "num_heads": 4,
            "intermediate_size": 84,
            "out_hidden_size": 64,
            "window_size": 112,
            "fullatt_block_indexes": [1, 3],
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=tied,
    )
    save_random(transformers.Qwen2_5_VLForConditionalGeneration(config), folder, seed)
    return folder


def tiny_text_folder(
    path: Path | str, *, tied: bool = True, seed: int = 0, layers: int = 2, real_vocabulary: bool = False
) -> Path:
    """A Qwen2.5 of 64 channels with random weights in float32, with tokenizer and template; as `tiny_vl_folder`."""
    import transformers

    text = real_tokenizer_json() if real_vocabulary else tiny_tokenizer_json()
    folder = write_folder(Path(path), text, False)
    config = transformers.Qwen2Config(
        **language_config(text, layers),
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=tied,
    )
    save_random(transformers.Qwen2ForCausalLM(config), folder, seed)
    return folder


def language_config(tokenizer_json: str, layers: int) -> dict[str, Any]:
    tokenizer = Tokenizer.from_str(tokenizer_json)
    size = tokenizer.get_vocab_size()
    return {
        "vocab_size": -(-size // 8) * 8 + 8,  # like Qwen's, a little larger than the tokenizer
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "bos_token_id": tokenizer.token_to_id("<|endoftext|>"),
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
        # No pad_token_id, as in Qwen's own: transformers gives the embedding of that token no gradient.
    }


def save_random(model: Any, folder: Path, seed: int) -> None:
    """Weights so large that a wrong position or mask shows in the logits, and no norm or bias is at its default."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(dict(model.named_parameters()).items()):
            if weight.dim() == 1:
                weight.copy_(
                    float("norm" in name or "ln_q" in name) + 0.1 * torch.randn(weight.shape, generator=generator)
                )
            else:
                weight.copy_(torch.randn(weight.shape, generator=generator) * weight[0].numel() ** -0.5)
    model.save_pretrained(folder)


def write_folder(
    folder: Path,
    tokenizer_json: str,
    vision: bool,
    min_pixels: int = 0,
    max_pixels: int = 0,
    template: str | None = None,
    processor: dict[str, Any] | None = None,
) -> Path:
    """Write tokenizer, template and, with `vision`, processor settings. `template`, `processor`: None for Qwen2.5's."""
    folder.mkdir(parents=True, exist_ok=True)
    added = {
        str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in json.loads(tokenizer_json)["added_tokens"]
    }
    settings = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": SPECIAL[1:],
        "bos_token": None,
        "chat_template": template or (VL_TEMPLATE if vision else QWEN2_5),
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    (folder / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    if vision:
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": template or VL_TEMPLATE}, indent=2))
        processor = processor or {
            "min_pixels": min_pixels,
            "max_pixels": max_pixels,
            "patch_size": 14,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2_5_VLProcessor",
        }
        (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2))
    return folder


def _qwen_tokenizer(model: models.BPE) -> Tokenizer:
    """The parts around the BPE as in Qwen2Tokenizer: NFC, the split pattern, byte level."""
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def _add_tokens(tokenizer: Tokenizer) -> str:
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in ADDED])
    return tokenizer.to_str()


@cache
def tiny_tokenizer_json() -> str:
    """A BPE of 600 tokens trained on a little text, with Qwen's special tokens behind it."""
    from pydoc_data.topics import topics

    tokenizer = _qwen_tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([topics[name] for name in sorted(topics)[:20]], trainer)
    return _add_tokens(tokenizer)


@cache
def real_tokenizer_json() -> str:
    cached = Path(tempfile.gettempdir()) / f"qwen-tokenizer-{version('dashscope')}-{version('tokenizers')}-1.json"
    if not cached.exists():
        attempt = cached.with_suffix(f".{uuid.uuid4().hex}")
        attempt.write_text(_derive_real_tokenizer_json(), encoding="utf-8")
        os.replace(attempt, cached)  # another test process may be doing the same
    return cached.read_text(encoding="utf-8")


def _derive_real_tokenizer_json() -> str:
    text = files("dashscope").joinpath("resources/qwen.tiktoken").read_text()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(str.split, text.splitlines())}
    letters = _byte_letters()
    written = {token: "".join(letters[b] for b in token) for token in ranks}
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            left = _last_merge(ranks, token, rank)
            merges.append((written[token[:left]], written[token[left:]]))
    vocabulary = {written[token]: rank for token, rank in ranks.items()}
    return _add_tokens(_qwen_tokenizer(models.BPE(vocab=vocabulary, merges=merges)))


def _last_merge(ranks: dict[bytes, int], token: bytes, rank: int) -> int:
    """Bytes of the left half of the merge that makes `token`: byte-pair encode it with the tokens that came before."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(parts[i] + parts[i + 1], rank) for i in range(len(parts) - 1)]
        best = min(range(len(pairs)), key=pairs.__getitem__)
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return len(parts[0])


def _byte_letters() -> dict[int, str]:
    """GPT-2's printable letter for each byte, as the byte-level pre-tokeniser writes them."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + n) for n, b in enumerate(others)}
