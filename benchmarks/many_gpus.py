"""7B and 72B, text and VL, on 8, 64 and 512 H100s, from the layout's own formulas: the table of docs/scale.md.

usage: python -m benchmarks.many_gpus [--packs 16]
Needs no GPU. The layout is the one that a run gets: the fastest of those that fit.
"""

from kanyun.cli.parser import Parser
from kanyun.errors import UserError
from trainer.layout import recomputed, sharding
from trainer.models.registry import published_sizes
from trainer.planning.gpus import GPUS
from trainer.planning.planner import GB, LayoutPlanner
from trainer.planning.speed import SpeedModel

LENGTH, PATCHES = 8192, 2 * 8192
MODELS = ("7B", "VL-7B", "72B", "VL-72B")
COUNTS = (8, 16, 32, 64, 512)
HEADER = (
    "| | H100s | weights | packs, recomputed, offloaded | GB | step s | exchange exposed s | tokens/s a GPU "
    "| TFLOP/s a GPU |"
)


def table(packs: int = 16) -> list[str]:
    """Return the lines of the table, of `packs` packs a GPU and step."""
    lines = [HEADER, "|---|--:|---|---|--:|--:|--:|--:|--:|"]
    for size in MODELS:
        model = published_sizes()[f"Qwen2.5-{size}"]
        patches = PATCHES if model.vision else 0
        for gpus in COUNTS:
            if gpus in (16, 32) and "72B" not in size:
                continue
            try:
                planner = LayoutPlanner(model, GPUS["H100"], gpus)
                layout = planner.ranked(length=LENGTH, global_batch=packs * gpus, patches=patches)[0]
            except UserError as error:
                lines.append(f"| {size} | {gpus} | {str(error).split('usable, ')[1]} |")
                continue
            assert layout.step is not None
            seconds, exchange = layout.step.seconds, layout.step.exchange
            flops = SpeedModel(model, GPUS["H100"]).flops(packs * LENGTH, packs * patches)
            lines.append(
                f"| {size} | {gpus} | {sharding(layout)} | {layout.micro_batch}, {recomputed(layout)} "
                f"| {(layout.memory or 0) / GB:.1f} | {seconds:.2f} | {exchange:.2f} ({exchange / seconds:.1%}) "
                f"| {packs * LENGTH / seconds:,.0f} | {flops / seconds / 1e12:.0f} |"
            )
    return lines


if __name__ == "__main__":
    parser = Parser(description=__doc__, example="python -m benchmarks.many_gpus --packs 32")
    parser.add_argument("--packs", type=int, default=16, help="packs a GPU and step (16)")
    print("\n".join(table(parser.parse_args().packs)))
