"""What a model costs: parameters, floating point operations, and bytes kept for the backward pass.

FLOPs are those that the mathematics needs, the numerator of MFU. A matrix product [m, k] x [k, n] takes 2 m k n.
Attention of a segment takes two such products a layer: scores (query x key) and output (probabilities x value). Norms,
softmax, RoPE and activations are left out, as usual; they are below 1 %.
"""

from typing import TYPE_CHECKING

from trainer.data.source import PackCost
from trainer.models.config import Compute, ModelConfig

if TYPE_CHECKING:
    from trainer.data.batch import Batch

# The backward pass computes two products for each one of the forward pass: gradients of the input and of the weight.
TRAINING = 3


class Costs:
    """A dense decoder's. A family with a vision tower, or with other layers, has a subclass.

    Letters: H hidden size, F MLP neurons, Q and KV the widths of all query heads and of all key (or value) heads.
    """

    def __init__(self, model: ModelConfig) -> None:
        self.model = model
        self.query_width = model.num_heads * model.head_dim
        self.kv_width = model.num_kv_heads * model.head_dim

    @property
    def parameters(self) -> int:
        """All parameters, a tied head counted once."""
        return self.decoder_parameters + self.vision_parameters

    @property
    def embedding_parameters(self) -> int:
        """Input embedding, and the output head where it is not tied to it."""
        return self.model.vocab_size * self.model.hidden_size * (1 if self.model.tied else 2)

    @property
    def decoder_parameters(self) -> int:
        model, h, q, kv = self.model, self.model.hidden_size, self.query_width, self.kv_width
        layer = h * (q + 2 * kv) + q * h + 3 * h * model.intermediate_size + 2 * h
        layer += model.qkv_bias * (q + 2 * kv) + model.qk_norm * 2 * model.head_dim
        return model.num_layers * layer + self.embedding_parameters + h

    @property
    def vision_parameters(self) -> int:
        return 0

    @property
    def head_flops(self) -> int:
        """Output head, forward, of one token."""
        return 2 * self.model.hidden_size * self.model.vocab_size

    @property
    def token_flops(self) -> int:
        """Matrix products of one token, forward: in each layer q, k and v; output; gate and up; down. Then the head."""
        h, q, kv = self.model.hidden_size, self.query_width, self.kv_width
        layer = h * (q + 2 * kv) + q * h + 3 * h * self.model.intermediate_size
        return 2 * self.model.num_layers * layer + self.head_flops

    @property
    def pair_flops(self) -> int:
        """One token attending to one token, forward: scores and output, over all heads and layers."""
        return self.model.num_layers * 2 * 2 * self.query_width

    @property
    def patch_flops(self) -> int:
        """Matrix products of one vision patch, forward."""
        return 0

    @property
    def picture_flops(self) -> int:
        """Attention of one vision patch, forward, in a tower that attends within whole pictures."""
        return 0

    @property
    def pack_cost(self) -> PackCost:
        """What makes one pack dearer than another, for choosing packs of near-equal cost: n^2 / 2 pairs a segment."""
        return PackCost(pair=self.pair_flops / 2, patch=0)

    def forward_flops(self, batch: "Batch") -> int:
        """Return the FLOPs of one micro-batch on the CPU: every token slot, each segment's attention, the real images.

        Padding tails of packs count (1 to 2 % of the slots); patches that fill up a static shape do not.
        """
        # Causal: token i of a segment attends to i + 1 tokens, so a segment of n has n (n + 1) / 2 pairs.
        lengths = batch.cu_seqlens.diff().long()
        pairs = int((lengths * (lengths + 1)).sum()) // 2
        return len(batch.input_ids) * self.token_flops + pairs * self.pair_flops

    def layer_bytes(self, compute: Compute) -> int:
        """Bytes that one decoder layer keeps of a token for its backward pass, over all tensor-parallel ranks."""
        h, q, kv, f = self.model.hidden_size, self.query_width, self.kv_width, self.model.intermediate_size
        # In bfloat16: both norms' inputs; query, key and value; attention's output; gate and up. q/k norm keeps the
        # three once more, as they were before it.
        kept = 2 * (2 * h + (q + 2 * kv) + q + 2 * f) + self.model.qk_norm * 2 * (q + 2 * kv)
        # And the inputs of the matrix products: both norms' outputs and the product of gate and up; in fp8 in 8 bits,
        # where attention's output is kept once more.
        return kept + ((2 * h + q + f) if compute.fp8 else 2 * (2 * h + f))

    @property
    def swiglu_bytes(self) -> int:
        """Of these bytes, gate and up in bfloat16: what activation offloading moves to the host."""
        return 2 * 2 * self.model.intermediate_size

    def patch_bytes(self, compute: Compute) -> int:
        """Bytes that the vision tower keeps of a patch for its backward pass."""
        return 0

    @property
    def norm_bytes(self) -> int:
        """Bytes that one layer's norms, RoPE, residuals and biases read and write for a token, both passes."""
        # q/k norm: read and written forward; backward input, output gradient and input gradient. Not measured yet.
        return 2 * 24 * self.model.hidden_size + self.model.qk_norm * 2 * 5 * (self.query_width + 2 * self.kv_width)
