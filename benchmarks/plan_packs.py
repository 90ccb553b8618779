"""Plan packs on one core: ours and three peers on the same lengths, and how time grows from 1x to 16x.

Peers, called as their frameworks call them; a missing one is named and skipped:
    pip install --no-deps --target /tmp/peers trl datasets dill multiprocess llamafactory binpacking
- TRL: `_pack_bfd`, best fit decreasing over all samples. It takes a table of tokens; they are one byte each here.
- ms-swift: `binpacking.to_constant_volume` on (sample, length) pairs, 1,000 at a time.
- LLaMA-Factory: `greedy_knapsack`, on 1,000 at a time (the batch of its `datasets.map`).

usage: python -m benchmarks.plan_packs [--peers DIR]
"""

import importlib.util
import re
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa

from kanyun.cli.parser import Parser
from pipeline.stages.bin_packing import DEFAULT_VISION_SLACK, lower_bound, mean_demand, pack
from tests.support.packed_data import many_sizes, useful_patches

LENGTH = 8192
SCALES = {"1x": 10_000, "4x": 40_000, "16x": 160_000}
MANY = 10_000_000
BATCH = 1_000
Planner = Callable[[np.ndarray], int]  # lengths -> packs


def distributions(count: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "uniform": rng.integers(1, LENGTH + 1, count),
        "log-normal": np.clip(rng.lognormal(6, 1.2, count), 1, LENGTH).astype(np.int64),
        "real": rng.choice(_real(), count),
    }


def _real(limit: int = 30_000_000) -> np.ndarray:
    """Count words and signs of each top-level piece of the standard library, about its tokens. [pieces]"""
    lengths: list[int] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if "site-packages" not in path.parts and limit > 0:
            text = path.read_text(errors="replace")
            limit -= len(text)
            lengths += [len(re.findall(r"\w+|[^\w\s]", piece)) for piece in text.split("\n\n\n")]
    return np.clip(np.array(lengths), 1, LENGTH)


def ours(lengths: np.ndarray) -> int:
    return int(pack(lengths, np.zeros_like(lengths), np.arange(len(lengths)), LENGTH, 0).max()) + 1


def peers(folder: str) -> dict[str, Planner]:
    """Return name -> planner of the peers installed in `folder`."""
    sys.path.append(folder)
    planners: dict[str, Planner] = {}
    for name, module, make in (
        ("TRL _pack_bfd", "trl/data_utils.py", _trl),
        ("binpacking, as ms-swift", "binpacking/__init__.py", _binpacking),
        ("LLaMA-Factory greedy_knapsack", "llamafactory/data/processor/processor_utils.py", _knapsack),
    ):
        try:
            planners[name] = make(_load(Path(folder, module)))
        except (ImportError, OSError) as error:
            print(f"{name} is missing ({error}): see --help")
    return planners


def _load(path: Path) -> ModuleType:
    """Import one file of a package without the package's own imports."""
    spec = importlib.util.spec_from_file_location(f"peer_{path.stem}", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look for it
    spec.loader.exec_module(module)
    return module


def _trl(module: ModuleType) -> Planner:
    def plan(lengths: np.ndarray) -> int:
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]))
        tokens = pa.LargeListArray.from_arrays(offsets, pa.array(np.zeros(int(lengths.sum()), np.int8)))
        return len(module._pack_bfd(pa.table({"input_ids": tokens}), LENGTH))

    return plan


def _binpacking(module: ModuleType) -> Planner:
    def plan(lengths: np.ndarray) -> int:
        pairs = list(enumerate(lengths.tolist()))
        batches = (pairs[start : start + BATCH] for start in range(0, len(pairs), BATCH))
        return sum(len(module.to_constant_volume(batch, LENGTH, weight_pos=1)) for batch in batches)

    return plan


def _knapsack(module: ModuleType) -> Planner:
    def plan(lengths: np.ndarray) -> int:
        batches = (lengths[start : start + BATCH].tolist() for start in range(0, len(lengths), BATCH))
        return sum(len(module.greedy_knapsack(batch, LENGTH)) for batch in batches)

    return plan


def _timed(planner: Planner, lengths: np.ndarray) -> tuple[float, float]:
    """Return (CPU seconds, lower bound / packs)."""
    started = time.process_time()
    packs = planner(lengths)
    seconds = time.process_time() - started
    return seconds, lower_bound(lengths, np.zeros_like(lengths), LENGTH, 0) / packs


def one_budget(planners: dict[str, Planner]) -> None:
    print("| planner | lengths | 1x: 10,000 | 4x | 16x | growth from 4x to 16x | bound / packs at 16x |")
    print("|---|---|--:|--:|--:|--:|--:|")
    for kind, lengths in distributions(SCALES["16x"]).items():
        for name, planner in planners.items():
            runs = [_timed(planner, lengths[:count]) for count in SCALES.values()]
            seconds = " | ".join(f"{second:.3f} s" for second, _ in runs)
            growth = runs[-1][0] / runs[-2][0]
            print(f"| {name} | {kind} | {seconds} | {growth:.1f} x | {runs[-1][1]:.3%} |", flush=True)
    print(f"\n| ours, {MANY:,} lengths | seconds (to reach: 10) | bound / packs (to reach: 99.9 %) |\n|---|--:|--:|")
    for kind, lengths in distributions(MANY).items():
        took, full = _timed(ours, lengths)
        print(f"| {kind} | {took:.1f} | {full:.3%} |", flush=True)


def two_budgets() -> None:
    """Plan images of 64 to 1,280 tokens, four patches each, with text around them; and pictures of many sizes."""
    print("\n| ours, two budgets | 1x: 10,000 | 4x | 16x | growth from 4x to 16x | us a sample ", end="")
    print("| bound / packs (to reach: 99.5 %) | useful patches (99.5 %) | bound / packs at 1.06 x mean demand |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|--:|")
    rng, count = np.random.default_rng(1), SCALES["16x"]
    images = rng.integers(64, 1281, count)
    text = np.clip(rng.lognormal(4.5, 0.8, count), 1, LENGTH - 1280).astype(np.int64)
    half = np.where(np.arange(count) % 2, images, 0)
    uniform = rng.integers(1, LENGTH - 1280, count)
    kinds = {
        kind: (shown + words, 4 * shown)
        for kind, shown, words in (
            ("all have an image, log-normal text", images, text),
            ("half have one, log-normal text", half, text),
            ("half have one, uniform text", half, uniform),
            ("half have one, real text", half, np.minimum(distributions(count)["real"], LENGTH - 1280)),
        )
    }
    kinds["half have pictures of many sizes"] = many_sizes(count)
    for kind, (tokens, patches) in kinds.items():
        runs = [_two(tokens[:n], patches[:n], DEFAULT_VISION_SLACK) for n in SCALES.values()]
        seconds = " | ".join(f"{second:.3f} s" for second, _, _ in runs)
        growth, each = runs[-1][0] / runs[-2][0], 1e6 * runs[-1][0] / count
        shares = " | ".join(f"{share:.2%}" for share in (*runs[-1][1:], _two(tokens, patches, 1.06)[1]))
        print(f"| {kind} | {seconds} | {growth:.1f} x | {each:.1f} | {shares} |", flush=True)


def _two(tokens: np.ndarray, patches: np.ndarray, slack: float) -> tuple[float, float, float]:
    """Return (CPU seconds, lower bound / packs, useful share of the patches after padding to shape buckets)."""
    demand = mean_demand(int(tokens.sum()), int(patches.sum()), LENGTH)
    budget = max(int(slack * demand), int(patches.max()))
    started = time.process_time()
    assigned = pack(tokens, patches, np.arange(len(tokens)), LENGTH, budget)
    seconds, filled = time.process_time() - started, np.bincount(assigned, patches)
    return seconds, lower_bound(tokens, patches, LENGTH, budget) / len(filled), useful_patches(filled)


def main() -> None:
    parser = Parser(description=__doc__, example="python -m benchmarks.plan_packs --peers /tmp/peers")
    parser.add_argument("--peers", default="/tmp/peers", metavar="DIR", help="where pip put the peers")
    planners: dict[str, Any] = {"ours": ours} | peers(parser.parse_args().peers)
    one_budget(planners)
    two_budgets()


if __name__ == "__main__":
    main()
