"""For golden tests of the model: transformers' weights under our names, samples as packs, transformers' answers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from kanyun.schema import Pack
from trainer.data.batch import Batch, BatchFormat, make_batch
from trainer.data.shapes import StaticShape
from trainer.models.config import ModelConfig
from trainer.models.language import LanguageModel
from trainer.models.qwen3_vl.config import DeepstackVisionConfig


@dataclass
class Example:
    """One sample: its tokens, which of them are trained, its images."""

    input_ids: Tensor  # [n]
    trained: Tensor  # [n] bool
    processed: Mapping[str, Tensor] = field(default_factory=dict)  # what transformers' processor made of the images
    images: list[bytes] = field(default_factory=list)
    grids: list[list[int]] = field(default_factory=list)


def examples(vocabulary: int, *lengths: int) -> list[Example]:
    generator = torch.Generator().manual_seed(sum(lengths))
    ids = [torch.randint(0, vocabulary, (length,), generator=generator) for length in lengths]
    return [Example(x, torch.rand(len(x), generator=generator) < 0.5) for x in ids]


def batch_of(
    config: ModelConfig, packs: Sequence[Sequence[Example]], length: int, static: StaticShape | None = None
) -> Batch:
    """Return the packs as the loader would hand them to the model."""
    return make_batch([_pack(examples, length) for examples in packs], BatchFormat.of(config, static))


def _pack(examples: Sequence[Example], length: int) -> Pack:
    sizes = [len(example.input_ids) for example in examples]
    tail = length - sum(sizes)
    grids = [grid for example in examples for grid in example.grids]
    return Pack(
        pack_id=0,
        input_ids=np.concatenate([*(e.input_ids.numpy() for e in examples), np.zeros(tail)]).astype(np.int32),
        loss_mask=np.concatenate([*(e.trained.numpy() for e in examples), np.zeros(tail, bool)]),
        cu_seqlens=np.cumsum([0, *sizes, *([tail] if tail else [])]).astype(np.int32),
        sample_ids=np.arange(len(examples), dtype=np.uint64),
        dataset=["golden"] * len(examples),
        image_grid_thw=np.array(grids, np.int32).reshape(-1, 3),
        images=[image for example in examples for image in example.images],
    )


def transformers_answer(reference: Any, example: Example) -> tuple[Tensor, Tensor]:
    """Return the logits [n, vocabulary] of the sample alone, and the summed loss of its trained tokens."""
    labels = torch.where(example.trained, example.input_ids, -100)
    out = reference(input_ids=example.input_ids[None], labels=labels[None], **example.processed)
    return out.logits[0], out.loss * example.trained[1:].sum() if example.trained[1:].any() else out.logits.sum() * 0


def ours(tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """transformers' weights, or their gradients, under our names and in our shapes. `tensors`: name -> tensor."""
    found: dict[str, Tensor] = {}
    get: Callable[[str], Tensor] = lambda name: tensors[name]  # noqa: E731
    root = "model.language_model." if config.vision else "model."
    found["language.embedding.word_embeddings.weight"] = get(f"{root}embed_tokens.weight")
    found["language.decoder.final_layernorm.weight"] = get(f"{root}norm.weight")
    if not config.tied:
        found["language.output_layer.weight"] = get("lm_head.weight")
    for n in range(config.num_layers):
        theirs, mine = f"{root}layers.{n}", f"language.decoder.layers.{n}"
        for kind in ("weight", "bias") if config.qkv_bias else ("weight",):
            # One group after the other: its query heads, its key head, its value head.
            parts = [get(f"{theirs}.self_attn.{x}_proj.{kind}").unflatten(0, (config.num_kv_heads, -1)) for x in "qkv"]
            found[f"{mine}.self_attention.linear_qkv.{kind}"] = torch.cat(parts, dim=1).flatten(0, 1)
        if config.qk_norm:
            for x in "qk":
                found[f"{mine}.self_attention.{x}_layernorm.weight"] = get(f"{theirs}.self_attn.{x}_norm.weight")
        found[f"{mine}.self_attention.linear_proj.weight"] = get(f"{theirs}.self_attn.o_proj.weight")
        gate_up = [get(f"{theirs}.mlp.{x}_proj.weight") for x in ("gate", "up")]
        found[f"{mine}.mlp.linear_fc1.weight"] = torch.cat(gate_up)
        found[f"{mine}.mlp.linear_fc2.weight"] = get(f"{theirs}.mlp.down_proj.weight")
        found[f"{mine}.input_layernorm.weight"] = get(f"{theirs}.input_layernorm.weight")
        found[f"{mine}.pre_mlp_layernorm.weight"] = get(f"{theirs}.post_attention_layernorm.weight")
    if isinstance(config.vision, DeepstackVisionConfig):
        found |= _qwen3_vision(get, config.vision)
    elif config.vision:
        found |= _vision(get, config.vision.depth)
    return found


def _qwen3_vision(get: Callable[[str], Tensor], vision: DeepstackVisionConfig) -> dict[str, Tensor]:
    found = {"vision.position_embed.weight": get("model.visual.pos_embed.weight")}
    mergers = [f"deepstack_merger_list.{n}" for n in range(len(vision.deepstack_blocks))]
    for kind in ("weight", "bias"):
        found[f"vision.patch_embed.{kind}"] = get(f"model.visual.patch_embed.proj.{kind}").flatten(1 - (kind == "bias"))
        for n in range(vision.depth):
            for layer in ("norm1", "norm2", "attn.qkv", "attn.proj"):
                found[f"vision.blocks.{n}.{layer}.{kind}"] = get(f"model.visual.blocks.{n}.{layer}.{kind}")
            for layer in ("fc1", "fc2"):
                found[f"vision.blocks.{n}.mlp.{layer}.{kind}"] = get(
                    f"model.visual.blocks.{n}.mlp.linear_{layer}.{kind}"
                )
        for n, theirs in enumerate(["merger", *mergers]):
            mine = f"vision.merger.deepstack.{n - 1}" if n else "vision.merger"
            found[f"{mine}.norm.{kind}"] = get(f"model.visual.{theirs}.norm.{kind}")
            for layer in ("fc1", "fc2"):
                found[f"{mine}.{layer}.{kind}"] = get(f"model.visual.{theirs}.linear_{layer}.{kind}")
    return found


def _vision(get: Callable[[str], Tensor], depth: int) -> dict[str, Tensor]:
    found = {"vision.patch_embed.weight": get("model.visual.patch_embed.proj.weight").flatten(1)}
    merger = {"norm.weight": "ln_q.weight"} | {
        f"fc{i + 1}.{kind}": f"mlp.{2 * i}.{kind}" for i in range(2) for kind in ("weight", "bias")
    }
    found |= {f"vision.merger.{mine}": get(f"model.visual.merger.{theirs}") for mine, theirs in merger.items()}
    for n in range(depth):
        block = f"blocks.{n}"
        for kind in ("weight", "bias"):
            for layer in ("attn.qkv", "attn.proj"):
                found[f"vision.{block}.{layer}.{kind}"] = get(f"model.visual.{block}.{layer}.{kind}")
            gate, up = (get(f"model.visual.{block}.mlp.{x}_proj.{kind}") for x in ("gate", "up"))
            missing = torch.zeros_like(gate[: -len(gate) % 64])  # neurons up to a multiple of 64
            assert 0 < len(missing) < 64
            found[f"vision.{block}.mlp.gate_up.{kind}"] = torch.cat([gate, missing, up, missing])
        down = get(f"model.visual.{block}.mlp.down_proj.weight")
        found[f"vision.{block}.mlp.down.weight"] = torch.nn.functional.pad(down, (0, -down.shape[1] % 64))
        found[f"vision.{block}.mlp.down.bias"] = get(f"model.visual.{block}.mlp.down_proj.bias")
        for norm in ("norm1.weight", "norm2.weight"):
            found[f"vision.{block}.{norm}"] = get(f"model.visual.{block}.{norm}")
    return found


def expected_tensors(model: LanguageModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`ours`, where Transformer Engine's layers (on CUDA) hold the norms before them."""
    fused = {
        "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
        "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
    }
    found = ours(tensors, model.model_config)
    if "language.decoder.layers.0.input_layernorm.weight" in dict(model.named_parameters()):
        return found
    for theirs, mine in fused.items():
        found = {name.replace(theirs, mine): tensor for name, tensor in found.items()}
    return found


@torch.no_grad()
def load(model: LanguageModel, reference: Any) -> None:
    """Fill our model with transformers' weights: every parameter, none left over."""
    weights = expected_tensors(model, dict(reference.named_parameters()))
    parameters = dict(model.named_parameters())
    assert weights.keys() == parameters.keys()
    for name, parameter in parameters.items():
        parameter.copy_(weights[name])


def gradient_errors(model: LanguageModel, reference: Any) -> dict[str, float]:
    """Difference of each parameter's gradient from transformers', relative to the gradient's own norm.

    Where transformers has none, as of the vision tower for a text, ours must be 0.
    """
    errors = {}
    for name, expected in expected_tensors(model, gradients(reference)).items():
        gradient, norm = model.get_parameter(name).grad, expected.norm().item()
        assert gradient is not None, name
        assert norm == 0 or norm > 1e-3, f"{name}: a gradient of {norm:.1e} proves nothing"
        errors[name] = (gradient - expected).norm().item() / (norm or 1e-300)
    return errors


def assert_as_near(
    ddp: DistributedDataParallel, exact: Any, rounded: Any, packs: Sequence[Sequence[Example]], batch: Batch
) -> None:
    """Ours is about as far from transformers in float32 as transformers in bfloat16 is: logits, loss, every gradient.

    `batch` holds the packs; `ddp` has the weights of `exact`, and of `rounded`, in main_grad its gradients.
    """
    model, device, length = ddp.module, batch.input_ids.device, len(batch.input_ids) // len(packs)
    samples = [[moved(sample, device) for sample in pack] for pack in packs]
    with torch.no_grad():
        logits = model.logits(batch)
        for row, pack in enumerate(samples):
            start = row * length
            for sample in pack:
                expected = transformers_answer(exact, sample)[0]
                error = (logits[start : start + len(expected)] - expected).norm() / expected.norm()
                theirs = (transformers_answer(rounded, sample)[0] - expected).norm() / expected.norm()
                assert error < 1.5 * theirs + 0.002 < 0.2, f"{error:.4f} against {theirs:.4f}"
                start += len(expected)

    ddp.zero_grad_buffer()
    total = ddp(batch)
    losses = [sum(transformers_answer(r, sample)[1] for pack in samples for sample in pack) for r in (exact, rounded)]
    assert total.item() == pytest.approx(losses[0].item(), rel=0.01)
    for reference in (exact, rounded):
        reference.zero_grad()
    for value in (total, *losses):
        value.backward()
    true, near = (expected_tensors(model, gradients(reference)) for reference in (exact, rounded))
    for name, expected in true.items():
        error, theirs = (model.get_parameter(name).main_grad - expected).norm(), (near[name] - expected).norm()
        # Exactly zero where transformers has none: the vision tower's of a pack without images.
        assert error <= 1.5 * theirs + 0.01 * expected.norm(), f"{name}: {error} against {theirs} of {expected.norm()}"


def gradients(reference: Any) -> dict[str, Tensor]:
    parameters = reference.named_parameters()
    return {name: torch.zeros_like(p.data).float() if p.grad is None else p.grad.float() for name, p in parameters}


def moved(sample: Example, device: torch.device) -> Example:
    processed = {name: value.to(device) for name, value in sample.processed.items()}
    return replace(
        sample, input_ids=sample.input_ids.to(device), trained=sample.trained.to(device), processed=processed
    )
