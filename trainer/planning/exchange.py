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
# 233 MB in bfloat16; ms alone and exposed (docs/design.md; alone: the table of exchange_floor.py). Gathers by copy
# engines 0.84 and 0.46, and NCCL's reduce-scatter beside those 0.93 and 0.53. All by NCCL: 0.98 and 0.88, 0.93 and
# 0.50. (Gradients pulled by copy engines would be 0.20.) bfloat16 gathers, and more than two GPUs: by their bytes, not
# measured. Copy engines reach the GPUs of a node; between nodes NCCL is taken to be as fast as it was within one.
COPY_RATE, NCCL_RATE = 277e9, 238e9
COPY_GATHER, SCATTER_BESIDE_COPIES = 0.46 / 0.84, 0.53 / 0.98
NCCL_GATHER, NCCL_SCATTER = 0.88 / 0.98, 0.50 / 0.98
# Seconds that each GPU adds to the way round a ring of NCCL's; usual between nodes, not measured here. It is why
# weights are not sharded over more GPUs than needed: over 512, a layer's gather would take 5 ms for nothing else.
HOP = 10e-6
# Bytes of a sharded parameter through memory in each micro-batch: its gradient is written in bfloat16, received by the
# rank that has this part, and added to a float32 sum there: read, read and written. Whole weights: 8, in place.
SHARDED_GRADIENT, SHARDED_SUM = 2, 2 + 8


@dataclass(frozen=True)
class WeightExchange:
    """Of sharded weights: seconds alone of a micro-batch's gathers in either pass and of the gradients' way to their
    ranks, with the parts of them that cost time beside compute; and seconds of a step between replicas.
    """

    gather: float
    gradients: float
    gather_part: float
    gradient_part: float
    replicas: float

    def exposed(self, forward: float, backward: float, micro_batches: int) -> float:
        """Return the seconds of a step beside `forward` and `backward` seconds of compute in each micro-batch."""
        there = exposed(self.gather, forward, self.gather_part)
        alone = self.gather + self.gradients
        part = (self.gather * self.gather_part + self.gradients * self.gradient_part) / alone
        back = exposed(alone, backward, part)
        return micro_batches * (there + back) + self.replicas  # after the last backward pass


def weight_exchange(parameters: float, *, layers: int, fp8: bool, gpus: int, shards: int, node: int) -> WeightExchange:
    """Return the exchange of `layers` layers with together `parameters`, sharded over `shards` neighbouring GPUs."""
    inside, replicas = shards <= node, gpus // shards
    received = (shards - 1) / shards * parameters
    latency = 0.0 if inside else layers * (shards - 1) * HOP
    nccl = NCCL_RATE if inside else min(NCCL_RATE, NETWORK_NODE)
    gather = (1 if fp8 else 2) * received / (COPY_RATE if inside else nccl) + latency
    return WeightExchange(
        gather=gather,
        gradients=2 * received / nccl + latency,
        gather_part=COPY_GATHER if inside else NCCL_GATHER,
        gradient_part=SCATTER_BESIDE_COPIES if inside else NCCL_SCATTER,
        replicas=_between_replicas(parameters / shards, replicas),
    )


def vocabulary_exchange(values: float, parameters: float, *, gpus: int, shards: int) -> float:
    """Return the seconds that embedding and output head, `parameters` sharded over `shards` GPUs of a node, exchange.

    `values`: of a GPU's tokens in a step, one for each channel. Each GPU receives them from all others, in bfloat16:
    embeddings, decoder outputs, and the gradients of both. No compute runs beside.
    """
    return 4 * 2 * values * (shards - 1) / NCCL_RATE + _between_replicas(parameters / shards, gpus // shards)


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


def _between_replicas(parameters: float, replicas: int) -> float:
    """Return the seconds of an all-reduce of a GPU's float32 gradients with those of GPUs that have the same parts.

    They are at the same place of their nodes, and each has its network card.
    """
    return 2 * 4 * parameters * (replicas - 1) / replicas / NETWORK
