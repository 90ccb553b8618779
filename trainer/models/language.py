"""The language model of every family: megatron.core's GPTModel over a pack.

A pack is one sequence of batch 1 with separate position ids; cu_seqlens reach the core attention as the attention mask.
GPTModel is deprecated in megatron.core 0.19 (its successor has no mrope): only this file knows it.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import silu

from kanyun.errors import UserError
from trainer.data.batch import Batch
from trainer.kernels.constants import IGNORED
from trainer.kernels.embedding import LookUp
from trainer.kernels.loss import LinearCrossEntropy
from trainer.models.config import BFLOAT16, Compute, ModelConfig
from trainer.models.offload import ActivationOffload
from trainer.optim.fp8_weights import Fp8Weights
from trainer.optim.sharded_layers import ShardedLayers
from trainer.optim.sharded_vocabulary import ShardedVocabulary
from trainer.optim.shards import ShardGroups, Shards, matrices_without_memory, ranks_of_a_node
from trainer.runtime import Runtime

EXTRA_STATE = "._extra_state"


class LanguageModel(MegatronModule):
    """Batch in, loss out. A family whose model is more than a decoder has a subclass."""

    def __init__(self, model_config: ModelConfig, runtime: Runtime, compute: Compute = BFLOAT16) -> None:
        super().__init__(core_config(model_config, runtime, compute))
        self.model_config = model_config
        with matrices_without_memory() if runtime.weight_shards > 1 else nullcontext():
            self.language = GPTModel(
                self.config,
                _layers(model_config, runtime, compute),
                vocab_size=model_config.vocab_size,
                max_sequence_length=model_config.max_positions,
                position_embedding_type="mrope",
                rotary_base=model_config.rope_theta,
                share_embeddings_and_output_weights=model_config.tied,
                scatter_embedding_sequence_parallel=model_config.vision is None,
            )
        self.offload: ActivationOffload | None = None
        if compute.offloaded_layers:
            self.offload = ActivationOffload(
                self.language.decoder.layers,
                count=compute.offloaded_layers,
                width=2 * model_config.intermediate_size // runtime.tensor_parallel,
            )
        # Under tensor parallelism each rank has a part of the vocabulary, which megatron.core's own modules add up.
        self._fused = runtime.cuda and runtime.tensor_parallel == 1
        self.vocabulary: ShardedVocabulary | None = None
        self.sharded: tuple[Shards, ...] = ()
        self.fp8_weights: Fp8Weights | None = None  # set by who wraps the model for training
        self.register_load_state_dict_post_hook(_ignore_extra_state)

    def forward(self, batch: Batch, observe: Callable[[Tensor], None] | None = None) -> Tensor:
        """Return the cross entropy summed over the trained tokens, a float32 scalar: a mean would weigh packs unevenly.

        On a GPU the gradients of embeddings and output head go straight into main_grad, so the model must be in a
        DistributedDataParallel, and `backward` be called on the sum itself. `observe` is given the loss of each token,
        [T] float32, 0 where not trained, without gradient.
        """
        if self._fused or self.vocabulary:
            labels = batch.labels.masked_fill(batch.loss_mask == 0, IGNORED)
            head = self.vocabulary.cross_entropy if self.vocabulary else _fused_head
            total, losses = self._language(batch, labels=labels, output_processor=head)
        else:
            losses = self._language(batch, labels=batch.labels[None])[0] * batch.loss_mask
            total = losses.sum()
        if observe is not None:
            observe(losses.detach())
        return total

    def shard(self, runtime: Runtime) -> None:
        """Share the matrices of the decoder, embedding and output head with other ranks. They lose their values."""
        shards, decoder, device = runtime.weight_shards, self.language.decoder, runtime.device
        fp8 = self.config.fp8 is not None
        layers = ShardedLayers(decoder, decoder.layers, ShardGroups.of(shards), fp8=fp8, device=device)
        # Within a node at most: what the vocabulary exchanges grows with the ranks, what a rank keeps is small by then.
        groups = ShardGroups.of(min(shards, ranks_of_a_node()))
        self.vocabulary = ShardedVocabulary(self.language, groups, device)
        self.sharded = (layers, self.vocabulary)

    def logits(self, batch: Batch) -> Tensor:
        """Return the logits [T, V]; under tensor parallelism gathered from all ranks. Not of a sharded model."""
        logits: Tensor = self._language(batch, runtime_gather_output=True)
        return logits[0]

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return megatron.core's state, without the linear layers' `_extra_state`.

        Nothing we train needs it, it differs between CPU and CUDA layers, and it would be pickled into checkpoints.
        """
        with self.masters(), ExitStack() as stack:
            empty = [stack.enter_context(shards.placeholders()) for shards in self.sharded]
            state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        for shards, matrices in zip(self.sharded, empty, strict=True):
            state = shards.in_checkpoint(state, matrices)
        return {name: tensor for name, tensor in state.items() if not name.endswith(EXTRA_STATE)}

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield what this rank keeps: parameters, and its parts of what is sharded."""
        elsewhere = {id(matrix) for shards in self.sharded for row in shards.parameters for matrix in row}
        with self.masters():
            named = list(self.named_parameters())
        for name, parameter in named:
            if id(parameter) not in elsewhere:
                yield name, parameter
        for shards in self.sharded:
            yield from shards.named_parts()

    def masters(self) -> AbstractContextManager[None]:
        """Let the parameters be those that are optimized, for the block, where layers compute with fp8 copies."""
        return self.fp8_weights.masters() if self.fp8_weights else nullcontext()

    def publish(self) -> None:
        """Let the layers compute with weights that changed otherwise than by a step. Every rank calls it."""
        for shards in self.sharded:
            shards.publish()
        if self.fp8_weights:
            self.fp8_weights.cast()

    def clear_padding(self) -> None:
        """Zero what random weights have filled but must be 0. A decoder has no such padding."""

    def _language(self, batch: Batch, **kwargs: Any) -> Any:
        return self.language(
            input_ids=batch.input_ids[None],
            position_ids=batch.position_ids[:, None],
            attention_mask=batch.cu_seqlens,
            **self._inputs(batch),
            **kwargs,
        )

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        """Return what GPTModel is given to compute on: its `decoder_input`, [T, 1, H], and a family's additions."""
        return {"decoder_input": self._embed(batch)}

    def _embed(self, batch: Batch) -> Tensor:
        """Return the input embeddings [T, 1, H]."""
        if self.vocabulary:
            return self.vocabulary.embed(batch.input_ids)[:, None]
        if self._fused:
            tokens: Tensor = LookUp.apply(batch.input_ids, self.language.embedding.word_embeddings.weight)
            return tokens[:, None]
        embeddings: Tensor = self.language.embedding(input_ids=batch.input_ids[None], position_ids=None)
        return embeddings


def _fused_head(hidden_states: Tensor, output_layer: Module, output_weight: Tensor | None, **kwargs: Any) -> Any:
    """Return LinearCrossEntropy of the decoder's output [T, 1, H]. GPTModel calls it as its output processor."""
    weight = output_layer.weight if output_weight is None else output_weight
    return LinearCrossEntropy.apply(hidden_states[:, 0], weight, kwargs["labels"], torch.is_grad_enabled())


def _ignore_extra_state(model: Module, keys: Any) -> None:
    """Drop extra state from load_state_dict's missing keys: no checkpoint has it."""
    keys.missing_keys[:] = [name for name in keys.missing_keys if not name.endswith(EXTRA_STATE)]


def core_config(config: ModelConfig, runtime: Runtime, compute: Compute = BFLOAT16) -> TransformerConfig:
    """Return megatron.core's configuration of the model, with the fused kernels that this device has.

    Raises UserError if the tensor-parallel size does not divide the model.
    """
    divided = {
        "attention heads": config.num_heads,
        "key/value heads": config.num_kv_heads,
        "MLP neurons": config.intermediate_size,
        "tokens": config.vocab_size,
    }
    for what, count in divided.items():
        if count % runtime.tensor_parallel:
            # The vocabulary is not padded here: Qwen's own (151,936 or 152,064) are multiples of 128 already.
            raise UserError(f"tensor parallelism {runtime.tensor_parallel} does not divide the model's {count} {what}")
    cuda = runtime.cuda
    return TransformerConfig(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        num_attention_heads=config.num_heads,
        num_query_groups=config.num_kv_heads,
        kv_channels=config.head_dim,
        mrope_section=list(config.mrope_section),
        normalization="RMSNorm",
        layernorm_epsilon=config.norm_eps,
        activation_func=silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        add_qkv_bias=config.qkv_bias,
        qk_layernorm=config.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        perform_initialization=False,  # initialize.py does it, the same for any parallelism
        calculate_per_token_loss=True,
        params_dtype=runtime.dtype,
        bf16=runtime.dtype == torch.bfloat16,
        # Scales of the tensors at hand, not of steps before: no history that a checkpoint or a CUDA graph would carry.
        fp8="hybrid" if compute.fp8 else None,
        fp8_recipe="tensorwise",
        # Weights without fp8 copies (tensor parallelism) are cast in every micro-batch. megatron.core would do so in a
        # step's first one, by a flag of the host that a graph does not see: it replays the capture's for ever.
        disable_parameter_transpose_cache=True,
        tensor_model_parallel_size=runtime.tensor_parallel,
        sequence_parallel=runtime.tensor_parallel > 1,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        apply_rope_fusion=cuda,
        # Splits query, key and value and rotates them in one kernel: no place for a norm in between.
        fused_single_qkv_rope=cuda and not config.qk_norm,
        cross_entropy_loss_fusion=cuda,
        cross_entropy_fusion_impl="te" if cuda else "native",
        # Were cuDNN's kernels refused, attention would run five times slower without a word; forced, it fails instead.
        attention_backend=AttnBackend.fused if cuda else AttnBackend.auto,
        deterministic_mode=runtime.deterministic,
    )


def _layers(config: ModelConfig, runtime: Runtime, compute: Compute) -> TransformerBlockSubmodules:
    if runtime.cuda:
        from trainer.models.layers_te import te_layers

        return te_layers(config, compute, runtime.deterministic)
    from trainer.models.layers import reference_layers

    return reference_layers(config, compute)
