"""What runs of the benchmarks without a GPU: the peer of megatron.core, unrepeated packs, bands, the log of clocks."""

import argparse
import math
from pathlib import Path

import numpy as np
import pytest

from benchmarks import clocks, losses
from benchmarks.peers import megatron_core
from benchmarks.unrepeated_data import text_packs
from tests.support.training_job import write_job
from trainer.config import TrainConfig


def test_stock_megatron_core_learns_from_our_packs(tmp_path: Path) -> None:
    config = TrainConfig(**write_job(tmp_path, images=False))
    args = argparse.Namespace(precision="bf16", micro_batch=None, global_batch=2, peer_steps=17)
    first, last = megatron_core.run(args, config)["losses"]
    assert first == pytest.approx(math.log(904), rel=0.02)  # knows nothing
    assert last < first - 0.1


def test_text_packs_are_full_and_hold_every_token_once_in_order() -> None:
    documents = [np.arange(start, start + size, dtype=np.int32) for start, size in ((0, 5), (5, 20), (25, 7), (32, 9))]
    packs = list(text_packs(documents, 8))
    assert [sum(len(sample.input_ids) for sample in pack) for pack in packs] == [8] * 5
    tokens = np.concatenate([sample.input_ids for pack in packs for sample in pack])
    assert tokens.tolist() == list(range(40))  # the last one is of a pack that is not full
    assert [len(pack) for pack in packs] == [2, 1, 1, 2, 1]


def test_table_pairs_precisions_by_seed_and_draws_their_bands() -> None:
    steps, curves = 20, losses.Curves()
    for seed in (0, 1):
        curves["bf16", seed] = [5.0 + seed] * (steps + 1)
        curves["fp8", seed] = [5.25 + seed] * (steps + 1)
    curves["bf16", 2] = [1.0] * (steps + 1)  # its fp8 was left out
    rows = losses.table(curves, steps).splitlines()
    assert rows[2] == "| 1 to 2 | 5.0000, 6.0000 | 5.2500, 6.2500 | +0.2500 ± 0.0000 |"
    assert rows[-1].startswith("| held-out packs, after the last | 5.0000, 6.0000 |")
    drawing = losses.draw(curves, steps)
    assert "bf16, 3 seeds" in drawing
    assert drawing.count("<polygon") == 3


def test_clocks_of_a_busy_gpu_alone_and_what_holds_it_back() -> None:
    busy = [str(clock) + ",2619,690.5,700.00,60,N/A,100,0x0000000000000004" for clock in (1500, 1700, 1600)]
    idle = ["345,2619,70,700,30,N/A,0,0x0000000000000001", "1980,2619,[N/A]"]
    found = clocks.summary([row.split(",") for row in [*busy, *idle]])
    assert "| clocks.sm | 1600 | 1500 | 1700 |" in found
    assert "| held back by: power cap | 100% | | |" in found
    assert "idle" not in found
