"""Qwen3-VL: Qwen3 with visual tokens in place of its image tokens, and more of them behind its first layers."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trainer.data.batch import Batch
from trainer.models.config import BFLOAT16, Compute, ModelConfig
from trainer.models.language import LanguageModel
from trainer.models.qwen2_5.vision_language import with_visual_tokens
from trainer.models.qwen2_5.vision_layers import VisionLayers
from trainer.models.qwen3_vl.config import vision_of
from trainer.models.qwen3_vl.vision import VisionTower
from trainer.models.qwen3_vl.vision_layers import ReferenceLayers
from trainer.runtime import Runtime


class Qwen3VL(LanguageModel):
    """A batch always has patches, dummies if there is no image: every step of every rank does the same work."""

    def __init__(self, model_config: ModelConfig, runtime: Runtime, compute: Compute = BFLOAT16) -> None:
        super().__init__(model_config, runtime, compute)
        self.language.rotary_pos_emb = InterleavedRotary(model_config, runtime.device)
        # The tower is whole on every tensor-parallel rank.
        vision, layers = vision_of(model_config), self._layers(runtime)
        self.vision = VisionTower(vision, layers, runtime.device, runtime.dtype, compute.recomputed_blocks)
        for number, layer in zip(range(len(vision.deepstack_blocks)), self.language.decoder.layers):
            layer.register_forward_hook(partial(_add_deepstack, number), with_kwargs=True)

    def _layers(self, runtime: Runtime) -> VisionLayers:
        if runtime.cuda:
            from trainer.models.qwen3_vl.vision_layers_te import TELayers

            return TELayers(vision_of(self.model_config), self.config, runtime.device)
        return ReferenceLayers()

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        assert batch.vision is not None, "a batch for an image model carries patches, even if they are dummies"
        text, index = self._embed(batch), batch.vision.token_index
        images, deepstack = self.vision(batch.vision)
        inputs: dict[str, Any] = {"decoder_input": with_visual_tokens(text, images[:, None], index, self.config)}
        if deepstack:
            # GPTModel hands `context`, meant for cross attention, to every layer.
            nothing = text.new_zeros(len(text), len(deepstack), text.shape[-1])
            context = with_visual_tokens(nothing, torch.stack(deepstack, dim=1), index, self.config)
            inputs["extra_block_kwargs"] = {"context": context}
        return inputs


def _add_deepstack(
    number: int, layer: nn.Module, args: Any, kwargs: Any, output: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Forward hook of decoder layer `number`: add its part of the context [T, deepstack blocks, H], 0 at text."""
    hidden_states, context = output
    return hidden_states + context[:, number, None], context


class InterleavedRotary(nn.Module):
    """RoPE angles by time, height and width in turns (t, h, w, t, h, w, ...), where megatron.core's are in blocks.

    Height and width have as many frequencies as mrope_section says, time all others.
    """

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        super().__init__()
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
        # No buffers: those would be cast to bfloat16 with the parameters.
        self.inv_freq = 1 / config.rope_theta**exponents
        self.axes = torch.zeros(len(exponents), dtype=torch.int64, device=device)
        for axis in (1, 2):
            self.axes[axis : 3 * config.mrope_section[axis] : 3] = axis

    def forward(self, position_ids: Tensor, mrope_section: list[int], cp_group: Any = None) -> Tensor:
        """position_ids [3, 1, T] -> angles [T, 1, 1, head_dim] float32, as GPTModel asks for them."""
        angles = position_ids[self.axes, 0].T * self.inv_freq
        return angles.repeat(1, 2)[:, None, None]
