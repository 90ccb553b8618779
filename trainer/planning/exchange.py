"""Predicted time of what GPUs send each other in a step, and how much of it no compute hides.

Of whole weights, gradients are reduced and weights gathered once a step. Of sharded weights, each layer is gathered in
both passes of every micro-batch, and its gradient added up. Measured figures: docs/design.md, two H100s, NVLink.
"""

from dataclasses import dataclass

from trainer.planning.gpus import NETWORK, NETWORK_NODE, NVLINK

# Parts of an exchange's time alone that it costs beside compute. 1.5B on two H100s, whole weights: 11 of 15 ms; a
# reduce-scatter of a 7B layer 0.98 of 1.67. NCCL's kernels hold multiprocessors that matrix products wait for.
BESIDE = 0.6
# A 7B layer of 233 M parameters on two GPUs, whose gathers in both passes receive 233 MB in fp8, whose gradient is
# 233 MB in bfloat16; ms alone and exposed (docs/design.md; alone: the table of exchange_floor.py). By copy engines
# 0.84 and 0.46 to gather, 0.20 more to pull gradients, whose addition is not in that. By NCCL 0.98 and 0.88 to gather,
# 0.93 and 0.67 to reduce-scatter. bfloat16 gathers, and more than two GPUs: by their bytes, not measured. Copy engines
# reach the GPUs of a node; between nodes NCCL does it, taken to be no faster than it was within one.
COPY_RATE, COPY_GATHER, COPY_PULL = 277e9, 0.46 / 0.84, 0.20 / 0.84
NCCL_RATE, NCCL_GATHER, NCCL_SCATTER = 238e9, 0.88 / 0.98, 0.67 / 0.93
# Seconds that each GPU adds to the way round a ring of NCCL's; usual between nodes, not measured here. It is why
# weights are not sharded over more GPUs than needed: over 512, a layer's gather would take 5 ms for nothing else.
HOP = 10e-6
# Bytes of a parameter through memory in each micro-batch, beside the addition to a shard's float32 sum: its bfloat16
# gradient is written, and read once by the rank that adds it up, in one kernel. (Two separate additions took 0.86 ms a
# layer of 7B; by its bytes one takes 0.47.)
SHARDED_GRADIENT = 4


@dataclass(frozen=True)
class WeightExchange:
    """Of sharded weights: seconds alone of a micro-batch's gathers in either pass and of the gradients' way to their
    ranks, with the parts of them that cost time beside compute; and seconds of a step between replicas.
    """

    forward: float
    backward: float
    gradients: float
    gather_part: float
    gradient_part: float
    replicas: float

    def exposed(self, forward: float, backward: float, micro_batches: int) -> float:
        """Return the seconds of a step beside `forward` and `backward` seconds of compute in each micro-batch."""
        there = exposed(self.forward, forward, self.gather_part)
        alone = self.backward + self.gradients
        part = (self.backward * self.gather_part + self.gradients * self.gradient_part) / alone
        back = exposed(alone, backward, part)
        return micro_batches * (there + back) + exposed(self.replicas, backward)


def weight_exchange(
    layers: float, embeddings: float, *, count: int, fp8: bool, gpus: int, shards: int, node: int
) -> WeightExchange:
    """Return the exchange of `layers` and `embeddings` parameters, `count` layers, over `shards` neighbouring GPUs.

    The embedding is needed in the forward pass alone, the output head once for both, each in bfloat16.
    """
    inside = shards <= node
    rate = COPY_RATE if inside else min(NCCL_RATE, NETWORK_NODE)
    received = (shards - 1) / shards / rate
    latency = 0.0 if inside else count * (shards - 1) * HOP
    size, replicas = (1 if fp8 else 2), gpus // shards
    # An all-reduce of the float32 shards between GPUs at the same place of their nodes: each has its network card.
    between = 2 * 4 * (layers + embeddings) / shards * (replicas - 1) / replicas / NETWORK
    return WeightExchange(
        forward=(size * layers + 2 * embeddings) * received + latency,
        backward=size * layers * received + latency,
        gradients=2 * (layers + embeddings) * received + latency,
        gather_part=COPY_GATHER if inside else NCCL_GATHER,
        gradient_part=COPY_PULL if inside else NCCL_SCATTER,
        replicas=between,
    )


def whole_exchange(parameters: float, *, gpus: int, tensor_parallel: int, node: int) -> tuple[float, float]:
    """Return the seconds alone of the float32 gradients' reduce-scatter and of the bfloat16 weights' all-gather.

    `parameters`: those of a rank, which all data-parallel ranks have.
    """
    ranks = gpus // tensor_parallel
    link = NVLINK if gpus <= node else min(NETWORK * max(node // tensor_parallel, 1), NETWORK_NODE)
    sent = parameters * (ranks - 1) / ranks / link
    return 4 * sent, 2 * sent


def exposed(exchange: float, compute: float, part: float = BESIDE) -> float:
    """Return the seconds that an exchange adds to the compute it runs beside. `part`: of its time, all the same."""
    return max(exchange - compute, 0.0) + part * min(exchange, compute)
