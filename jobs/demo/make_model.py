"""Write demo/model: a tiny Qwen2.5-VL or Qwen3-VL as Hugging Face has it: config, tokenizer, processor; no weights yet.

The tokenizer is a byte-level BPE trained on the demo's own text, with Qwen's pre-tokeniser, special tokens and chat
template, so that the model needs 2,048 embeddings instead of 151,936 and learns within minutes on a laptop.

usage: make_model.py RAW OUT FAMILY    FAMILY: qwen2_5_vl or qwen3_vl
example: python jobs/demo/make_model.py demo/raw demo/model qwen3_vl
"""

import json
import sys
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen3VLConfig

VOCABULARY = 2048
# Qwen2's pre-tokeniser: contractions, words, single digits, punctuation, line ends, spaces.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]


def train_tokenizer(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    size = VOCABULARY - len(SPECIAL)
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return tokenizer


def decoder(tokenizer: Tokenizer, **rope: Any) -> dict[str, Any]:
    """With the tower 1.4 M parameters, and everything the real ones have: grouped queries, mrope, a tied head."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.06,  # about 1 / sqrt(hidden): at the 0.02 of wide models it starts four times slower
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, **rope},
        "bos_token_id": tokenizer.token_to_id("<|endoftext|>"),
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
    }


TOWER = {
    "depth": 3,
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_heads": 4,
    "out_hidden_size": 128,
    "initializer_range": 0.08,
}


def tokens(tokenizer: Tokenizer) -> dict[str, Any]:
    """What the root of both families' configurations has."""
    names = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    ids = {f"{name}_token_id": tokenizer.token_to_id(f"<|{token}|>") for name, token in names.items()}
    return {"tie_word_embeddings": True, "dtype": "float32", **ids}


def qwen2_5_vl(tokenizer: Tokenizer) -> PretrainedConfig:
    """Window and full attention in the tower."""
    return Qwen2_5_VLConfig(
        architectures=["Qwen2_5_VLForConditionalGeneration"],
        text_config=decoder(tokenizer, mrope_section=[4, 6, 6]),
        vision_config={**TOWER, "window_size": 56, "fullatt_block_indexes": [2]},
        **tokens(tokenizer),
    )


def qwen3_vl(tokenizer: Tokenizer) -> PretrainedConfig:
    """Interleaved mrope, norms of query and key, learned positions of 8 x 8 patches, two blocks of deepstack."""
    return Qwen3VLConfig(
        architectures=["Qwen3VLForConditionalGeneration"],
        text_config={"head_dim": 32, **decoder(tokenizer, mrope_section=[6, 5, 5], mrope_interleaved=True)},
        vision_config={**TOWER, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]},
        **tokens(tokenizer),
    )


CLIP = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
# Family -> configuration, settings of its processor. A picture has 4 to 64 tokens.
FAMILIES = {
    "qwen2_5_vl": (
        qwen2_5_vl,
        {"processor_class": "Qwen2_5_VLProcessor", "patch_size": 14, "min_pixels": 56**2, "max_pixels": 64 * 28**2}
        | CLIP,
    ),
    "qwen3_vl": (
        qwen3_vl,
        {
            "processor_class": "Qwen3VLProcessor",
            "patch_size": 16,
            "size": {"shortest_edge": 4 * 32**2, "longest_edge": 64 * 32**2},
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
        },
    ),
}


def main(raw: Path, out: Path, family: str) -> None:
    documents = [json.loads(line)["text"] for line in (raw / "pydoc/documents.jsonl").read_text().splitlines()]
    questions = (raw / "digits/train.jsonl").read_text().splitlines()[:500]
    write_model([*documents, *questions], out, family)


def write_model(texts: list[str], out: Path, family: str) -> None:
    """Write the folder; its tokenizer is trained on `texts`."""
    make_config, settings = FAMILIES[family]
    tokenizer = train_tokenizer(texts)
    template = (Path(__file__).parent / "chat_template.jinja").read_text()

    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL[1:],
        chat_template=template,
        model_max_length=4096,
    )
    fast.save_pretrained(out)
    make_config(tokenizer).save_pretrained(out)
    GenerationConfig(
        eos_token_id=tokenizer.token_to_id("<|im_end|>"), pad_token_id=tokenizer.token_to_id("<|endoftext|>")
    ).save_pretrained(out)
    shared = {"image_processor_type": "Qwen2VLImageProcessor", "temporal_patch_size": 2, "merge_size": 2}
    (out / "preprocessor_config.json").write_text(json.dumps(settings | shared, indent=2) + "\n")
    print(f"{out}: {VOCABULARY} tokens, {family} with {make_config(tokenizer).text_config.num_hidden_layers} layers")


if __name__ == "__main__":
    if len(sys.argv) != 4 or sys.argv[3] not in FAMILIES:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
