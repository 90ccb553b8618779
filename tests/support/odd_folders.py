"""Variants of a tiny Hugging Face folder, as fine-tunes and other tools leave them: how each is made."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
Weights = dict[str, Tensor]
Edit = Callable[[Path], object]


def weights(change: Callable[[Weights], Weights]) -> Edit:
    """Return an edit of the tensors."""

    def edit(folder: Path) -> None:
        changed = change(load_file(folder / WEIGHTS))
        copies = {name: tensor.contiguous().clone() for name, tensor in changed.items()}
        save_file(copies, folder / WEIGHTS, metadata={"format": "pt"})

    return edit


def tensor(name: str, change: Callable[[Tensor], Tensor]) -> Edit:
    """Return an edit of one tensor."""
    return weights(lambda old: old | {name: change(old[name])})


def renamed(change: Callable[[str], str]) -> Edit:
    return weights(lambda old: {change(name): tensor for name, tensor in old.items()})


def config(*absent: str, **changes: Any) -> Edit:
    """Return an edit of config.json."""

    def edit(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text())
        kept = {name: value for name, value in values.items() if name not in absent}
        (folder / "config.json").write_text(json.dumps(kept | changes))

    return edit


def _part(part: str, **changes: Any) -> Edit:
    """Return an edit of a part of config.json."""

    def edit(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text())
        values[part] |= changes
        (folder / "config.json").write_text(json.dumps(values))

    return edit


vision_config, text_config = partial(_part, "vision_config"), partial(_part, "text_config")


def sharded(then: Callable[[Path, dict[str, Any]], None]) -> Edit:
    """Return an edit that splits the weights over two files with an index, then edits folder and index."""

    def edit(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        where = {name: f"model-0000{1 + n % 2}-of-00002.safetensors" for n, name in enumerate(tensors)}
        for file in set(where.values()):
            part = {name: tensors[name] for name in tensors if where[name] == file}
            save_file(part, folder / file, metadata={"format": "pt"})
        index: dict[str, Any] = {"metadata": {}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index))
        then(folder, index)

    return edit


def index_text(change: Callable[[str], str]) -> Edit:
    """Return an edit that leaves shards with a changed index."""
    return sharded(lambda folder, index: (folder / INDEX).write_text(change(json.dumps(index))) and None)


def without_metadata(folder: Path, index: dict[str, Any]) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": index["weight_map"]}))


def single_file_beside_shards(folder: Path, index: dict[str, Any]) -> None:
    tensors = {name: load_file(folder / file)[name] for name, file in index["weight_map"].items()}
    save_file(tensors | {NORM: tensors[NORM] + 1}, folder / WEIGHTS, metadata={"format": "pt"})


def tensor_in_both_shards(difference: float) -> Callable[[Path, dict[str, Any]], None]:
    def edit(folder: Path, index: dict[str, Any]) -> None:
        home = index["weight_map"][NORM]
        other = next(file for file in index["weight_map"].values() if file != home)
        moved = load_file(folder / home)[NORM] + difference
        save_file(load_file(folder / other) | {NORM: moved}, folder / other, metadata={"format": "pt"})

    return edit


def spoiled(value: float) -> Callable[[Tensor], Tensor]:
    def spoil(tensor: Tensor) -> Tensor:
        copy = tensor.clone()
        copy[3, 5] = value
        return copy

    return spoil


def forget_digests(step: Path) -> None:
    """Make a checkpoint one of those that were made before digests were recorded."""
    state = json.loads((step / "state.json").read_text())
    kept = {name: value for name, value in state.items() if name not in ("files", "digest")}
    (step / "state.json").write_text(json.dumps(kept))


def linked_to_nothing(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to("../../blobs/0123")


def folder_in_place_of(file: Path) -> None:
    file.unlink(missing_ok=True)
    file.mkdir()


def marked(name: str) -> Edit:
    """Return an edit that puts a byte order mark before a file's text."""
    return lambda folder: (folder / name).write_bytes(b"\xef\xbb\xbf" + (folder / name).read_bytes())


def adapter(folder: Path) -> None:
    """What peft saves of a model: the weights that were added, and no others."""
    (folder / WEIGHTS).rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "Qwen/Qwen2.5-7B"}')


def section(*frequencies: float) -> Edit:
    """Return an edit of the frequencies of time, height and width."""

    def edit(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text())
        values["text_config"]["rope_parameters"]["mrope_section"] = frequencies
        (folder / "config.json").write_text(json.dumps(values))

    return edit


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def tokens_added(folder: Path) -> None:
    """Add tokens with transformers, up to the first that the embedding has no row for, and resize no model."""
    import transformers

    values = json.loads((folder / "config.json").read_text())
    rows = values.get("text_config", values)["vocab_size"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<new {n}>" for n in range(len(tokenizer), rows + 1)])
    tokenizer.save_pretrained(folder)


def _with_rotary_buffers(old: Weights) -> Weights:
    return old | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}


WINDOW = {"use_sliding_window": True, "sliding_window": 16}
# name -> (model: tied | untied | vision, edit): each loads, with transformers' own logits
LOADED: dict[str, tuple[str, Edit]] = {
    "a tied model that stores its head": ("tied", weights(lambda old: old | {HEAD: old[EMBEDDING].clone()})),
    "a tied model that stores its head alone": ("tied", renamed(lambda name: HEAD if name == EMBEDDING else name)),
    "rotary buffers of old versions": ("tied", weights(_with_rotary_buffers)),
    "rotary buffers of a tower": (
        "vision",
        weights(lambda old: old | {"visual.rotary_pos_emb.inv_freq": torch.ones(8)}),
    ),
    "a base model without the prefix": ("tied", renamed(lambda name: name.removeprefix("model."))),
    "norms in another dtype": ("tied", tensor(NORM, lambda old: old.bfloat16())),
    "a single file beside other shards": ("untied", sharded(single_file_beside_shards)),
    "a tensor in two files, equal": ("untied", sharded(tensor_in_both_shards(0.0))),
    "a window that no layer uses": ("tied", config("layer_types", **WINDOW, max_window_layers=2)),
    "no rope_theta": ("tied", config("rope_parameters")),
    "one name in both layouts": (
        "vision",
        weights(lambda old: old | {"model.language_model.norm.weight": old[NORM].clone()}),
    ),
    "an image model's head_dim null": ("vision", text_config(head_dim=None)),
    "a vision-language base model": (
        "vision",
        renamed(lambda name: name.replace("model.", "language_model.", 1) if name.startswith("model.") else name),
    ),
}

_Q, _UP = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"
# name -> (model, edit, what the one sentence must say)
REFUSED: dict[str, tuple[str, Edit, str]] = {
    "head differs": ("tied", weights(lambda old: old | {HEAD: old[EMBEDDING] + 1}), "lm_head.weight differs from"),
    "embedding short": ("tied", tensor(EMBEDDING, lambda old: old[:600]), f"{EMBEDDING} has shape [600, 64]"),
    "embedding long": ("tied", tensor(EMBEDDING, lambda old: torch.cat([old, old])), f"{EMBEDDING} has shape"),
    "head short": ("untied", tensor(HEAD, lambda old: old[:600]), "lm_head.weight has shape [600, 64]"),
    "norm short": ("tied", tensor(NORM, lambda old: old[:60]), f"{NORM} has shape [60], by config.json [64]"),
    "up short": ("tied", tensor(_UP, lambda old: old[:90]), f"{_UP} has shape [90, 64], by config.json [128, 64]"),
    "vision norm": ("vision", tensor("visual.merger.ln_q.weight", lambda old: old[:31]), "visual.merger.ln_q.weight"),
    "last part fp16": ("tied", tensor(_UP, lambda old: old.half()), f"{_UP} is torch.float16"),
    "first part bf16": ("tied", tensor(_Q, lambda old: old.bfloat16()), "must have one dtype"),
    "NaN": ("tied", tensor(_Q, spoiled(float("nan"))), f"{_Q} holds nan at [3, 5]"),
    "infinite": ("vision", tensor("visual.blocks.1.attn.proj.weight", spoiled(float("inf"))), "holds inf at [3, 5]"),
    "adapter": ("tied", weights(lambda old: old | {_Q + ".lora_A": old[NORM]}), f"{_Q}.lora_A is left over"),
    "two values": ("untied", sharded(tensor_in_both_shards(1.0)), f"{NORM} in model-0000"),
    "index cut": ("tied", index_text(lambda text: text[:200]), f"{INDEX} is damaged (Unterminated string"),
    "index without map": ("tied", index_text(lambda text: '{"metadata": {}}'), f"{INDEX} is damaged (no 'weight_map')"),
    "index empty map": ("tied", index_text(lambda text: '{"weight_map": {}}'), "its weight_map is empty"),
    "index without metadata": ("tied", sharded(without_metadata), f"{INDEX} is damaged (no 'metadata')"),
    "index nested too deep": ("tied", index_text(lambda text: "[" * 10**5), f"{INDEX} is damaged (maximum recursion"),
    "index is a list": ("tied", index_text(lambda text: "[]"), f"{INDEX} is damaged"),
    "index names a number": (
        "tied",
        index_text(lambda text: '{"weight_map": {"a": 5}}'),
        "names 5 as a file",
    ),
    "broken link": ("tied", linked_to_nothing, f"{WEIGHTS} links to ../../blobs/0123, which does not exist"),
    "generation settings": (
        "tied",
        lambda folder: (folder / "generation_config.json").write_text("[]"),
        "generation_config.json is damaged (it is no object of names and values)",
    ),
    "generation settings are a folder": (
        "tied",
        lambda folder: folder_in_place_of(folder / "generation_config.json"),
        "generation_config.json is damaged ([Errno 21] Is a directory",
    ),
    "pickle": ("tied", pickled, "is a pickle"),
    "adapter alone": ("tied", adapter, "it is a LoRA adapter, so merge it into its base model"),
    "an image model's rope": (
        "tied",
        config(rope_parameters={"rope_type": "mrope", "rope_theta": 1e6}),
        "means rope type mrope to transformers, and default to the trainer",
    ),
    "section of no whole numbers": ("vision", section(4.0, 2.0, 2.0), "has mrope_section [4.0, 2.0, 2.0], which are"),
    "section below zero": ("vision", section(-2, 5, 5), "has mrope_section [-2, 5, 5], which are not whole numbers"),
    "yarn": ("tied", config(rope_parameters={"rope_type": "yarn", "factor": 4.0}), "has rope scaling 'yarn'"),
    "rope twice": (
        "tied",
        config(rope_scaling={"type": "linear", "factor": 2.0}),
        "has rope scaling 'linear'",
    ),
    "layers of another kind": (
        "tied",
        config(layer_types=["linear_attention"] * 2),
        "means layer_types linear_attention to transformers",
    ),
    "window": ("tied", config("layer_types", **WINDOW, max_window_layers=1), "has sliding-window attention"),
    "layer_types": ("tied", config(layer_types=["sliding_attention"] * 2), "has sliding-window attention"),
    "head_dim": ("tied", config(head_dim=32), "has head_dim 32, not hidden_size / num_attention_heads = 16"),
    "tower's activation": ("vision", vision_config(hidden_act="gelu"), "has vision hidden_act 'gelu'"),
    "quantized": ("tied", config(quantization_config={"quant_method": "awq"}), "has weights quantized by 'awq'"),
    "fewer layers": ("tied", config(num_hidden_layers=1), "and 6 more are left over"),
    "layer_types short": ("tied", config(layer_types=["full_attention"]), "transformers refuses"),
    "layers as text": ("tied", config(num_hidden_layers="2"), "num_layers is '2', not a whole number above 0"),
    "eps NaN": ("tied", config(rms_norm_eps=float("nan")), "norm_eps is nan, not a number above 0"),
    "theta negative": ("tied", config(rope_parameters={"rope_theta": -1}), "rope_theta is -1.0, not a number above 0"),
    "kv heads": ("tied", config(num_key_value_heads=3), "has 4 heads, no multiple of its 3 key-value heads"),
    "tower's heads": (
        "vision",
        vision_config(num_heads=3),
        "has 64 channels of the tower, no multiple of its 3 heads",
    ),
    "tower's window": (
        "vision",
        vision_config(window_size=14),
        "window_size is 14, less than one visual token's 28 pixels",
    ),
    "channels of a picture": (
        "vision",
        vision_config(in_channels=1),
        "means in_channels 1 to transformers, and 3 to the trainer",
    ),
    "head_dim null": ("tied", config(head_dim=None), "means head_dim None to transformers, and 16 to the trainer"),
    "padding beyond": ("tied", config(pad_token_id=99999), "has pad_token_id 99999, but the embedding has 632 rows"),
    "tokenizer with a byte order mark": ("tied", marked("tokenizer.json"), "tokenizer.json is not JSON (Unexpected"),
    "index with a byte order mark": (
        "tied",
        index_text(lambda text: chr(0xFEFF) + text),
        f"{INDEX} is damaged (Unexpected UTF-8 BOM",
    ),
    "no heads": ("tied", config(num_attention_heads=0), "config.json is damaged"),
    "config nested too deep": (
        "tied",
        lambda folder: (folder / "config.json").write_text("[" * 10**5),
        "config.json is damaged (maximum recursion depth",
    ),
    "config is a list": ("tied", lambda folder: (folder / "config.json").write_text("[]"), "config.json is damaged"),
    "tokenizer is a list": (
        "tied",
        lambda folder: (folder / "tokenizer.json").write_text("[]"),
        "tokenizer.json is not JSON (it is no object of names and values)",
    ),
    "added tokens as text": (
        "tied",
        lambda folder: (folder / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"x": {}}}'),
        "is damaged (KeyError('content'))",
    ),
    "image token": ("vision", config(image_token_id=5), "has image_token_id 5, but the tokenizer's <|image_pad|> is"),
    "token beyond": ("tied", tokens_added, "has id 632, but config.json has vocab_size 632"),
}
