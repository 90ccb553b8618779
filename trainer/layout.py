"""Print the layouts that a run could get, the fastest first: python -m trainer.layout Qwen2.5-7B --gpus 8 --top 3."""

import argparse
import json
from typing import Any

from kanyun.cli.parser import Parser
from kanyun.errors import UserError, run_cli
from kanyun.storage import Folder
from trainer.models.config import ModelConfig
from trainer.models.registry import costs_of, published_sizes
from trainer.planning.gpus import GPUS, NODE
from trainer.planning.planner import GB, MARGIN, MOST_GPUS, Layout, LayoutPlanner
from trainer.planning.speed import SEGMENT, SpeedModel, StepTime

PARTS = StepTime._fields


def parser() -> Parser:
    prog = "python -m trainer.layout"
    example = f"{prog} Qwen2.5-7B --gpus 8 --card H100 --top 3"
    parser = Parser(prog=prog, description="The layouts that a run could get.", example=example)
    parser.add_argument("model", help=f"{', '.join(published_sizes())}; or a Hugging Face folder")
    parser.add_argument("--gpus", type=_gpus, required=True, help=f"1 to {MOST_GPUS}")
    parser.add_argument("--node", type=_gpus, default=NODE, help=f"of them in a node ({NODE})")
    parser.add_argument("--card", choices=list(GPUS), default="H100")
    parser.add_argument("--length", type=int, default=8192, help="token slots a pack (8192)")
    parser.add_argument(
        "--patches", type=int, help="vision patches a pack; default: twice the length, half of all tokens"
    )
    parser.add_argument("--global-batch", type=int, help="packs a step; default: 16 for each GPU")
    parser.add_argument("--top", type=int, default=1, help="how many (1)")
    parser.add_json()
    return parser


def main() -> int:
    args, sizes = parser().parse_args(), published_sizes()
    if args.model not in sizes and not Folder(args.model).exists("config.json"):
        raise UserError(f"there is no model {args.model}: give {', '.join(sizes)}; or a Hugging Face folder")
    model = sizes[args.model] if args.model in sizes else ModelConfig.from_hf(args.model)
    patches = 2 * args.length if args.patches is None else args.patches
    if model.vision is None:
        patches = 0
    packs = args.global_batch or 16 * args.gpus
    planner = LayoutPlanner(model, GPUS[args.card], args.gpus, args.node)
    data = {"length": args.length, "global_batch": packs, "patches": patches}
    ranked = planner.ranked(**data)
    flops = SpeedModel(model, GPUS[args.card]).flops(packs * args.length, packs * patches)
    if args.json:
        print(json.dumps([values(layout, args.gpus, packs * args.length, flops) for layout in ranked[: args.top]]))
        return 0
    print(
        f"{args.model}, {costs_of(model).parameters:,} parameters, on {args.gpus} x {args.card} with "
        f"{GPUS[args.card].usable / GB:.0f} usable GB each; a step of {packs} packs of {args.length} token slots"
        f"{f' and {patches} patches' if patches else ''}\n"
    )
    print(table(ranked[: args.top], args.gpus, packs * args.length, flops))
    print(f"""
Predicted; tokens/s and TFLOP/s of a GPU, in samples of about {SEGMENT} tokens. The parts of a step, in s, add up to it;
exchange is what no compute hides. Recomputation and offloading with several packs a micro-batch, which have not been
measured, are ranked as if {MARGIN - 1:.0%} slower.""")
    for number, layout in enumerate(ranked[: args.top], 1):
        print(f"{number}: {layout.reason}; {_why(layout, ranked)}")
    print("A run gets 1.")
    return 0


def table(layouts: list[Layout], gpus: int, tokens: int, flops: float) -> str:
    """Return a line of figures for each layout; `tokens` and `flops`: of a step."""
    lines = [["", "weights", "packs", "recomputed, offloaded", "GB", "tokens/s", "TFLOP/s", "step", *PARTS]]
    for number, layout in enumerate(layouts, 1):
        assert layout.step is not None
        lines.append(
            [
                str(number),
                sharding(layout),
                str(layout.micro_batch),
                recomputed(layout),
                f"{(layout.memory or 0) / GB:.1f}",
                f"{tokens / gpus / layout.step.seconds:,.0f}",
                f"{flops / gpus / layout.step.seconds / 1e12:.0f}",
                f"{layout.step.seconds:.2f}",
                *(f"{part:.2f}" for part in layout.step),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def values(layout: Layout, gpus: int, tokens: int, flops: float) -> dict[str, Any]:
    """Return the figures of a line of `table`, for a script; of a GPU, and in seconds, as there."""
    assert layout.step is not None
    seconds = layout.step.seconds
    return {
        "weight_shards": layout.weight_shards,
        "tensor_parallel": layout.tensor_parallel,
        "micro_batch": layout.micro_batch,
        "recomputed_layers": layout.compute.recomputed_layers,
        "recomputed_blocks": layout.compute.recomputed_blocks,
        "offloaded_layers": layout.compute.offloaded_layers,
        "memory": layout.memory,  # bytes
        "tokens_per_second": tokens / gpus / seconds,
        "flops": flops / gpus / seconds,
        "seconds": seconds,
        **layout.step._asdict(),
        "reason": layout.reason,
    }


def sharding(layout: Layout) -> str:
    if layout.weight_shards > 1:
        return f"sharded over {layout.weight_shards}"
    return "whole" if layout.tensor_parallel == 1 else f"tensor parallel {layout.tensor_parallel}"


def recomputed(layout: Layout) -> str:
    """Vision blocks and layers that are recomputed, and layers whose SwiGLU inputs are offloaded."""
    compute = layout.compute
    counts = {"blocks": compute.recomputed_blocks, "layers": compute.recomputed_layers}
    counts["offloaded"] = compute.offloaded_layers
    return ", ".join(f"{count} {what}" for what, count in counts.items() if count) or "-"


def _why(layout: Layout, ranked: list[Layout]) -> str:
    """Return how it compares with the first: the two parts of a step that differ most."""
    first = ranked[0].step
    assert layout.step is not None
    assert first is not None
    if layout is ranked[0]:
        return f"the fastest of {len(ranked)} that fit" if len(ranked) > 1 else "the only one that fits"
    more = layout.step.seconds - first.seconds
    parts = sorted(zip(layout.step, first, PARTS, strict=True), key=lambda part: -abs(part[0] - part[1]))[:2]
    differences = ", ".join(f"{part} {mine - its:+.2f} s" for mine, its, part in parts)
    slower = (
        f"{more / first.seconds:.1%} slower than 1" if more > 0 else "faster than 1 by less than predictions are off"
    )
    return f"{slower}: {differences}"


def _gpus(text: str) -> int:
    """A number of GPUs. argparse says which values it takes."""
    count = int(text)
    if not 1 <= count <= MOST_GPUS:
        raise argparse.ArgumentTypeError(f"{count} GPUs: layouts are known for 1 to {MOST_GPUS}")
    return count


if __name__ == "__main__":
    run_cli(main)
