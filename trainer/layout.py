"""Print the layout that a run would get: python -m trainer.layout Qwen2.5-7B --gpus 8 --card H100 --length 8192."""

import argparse

from kanyun.errors import run_cli
from trainer.models.config import ModelConfig
from trainer.models.registry import costs_of, published_sizes
from trainer.planning.gpus import GPUS
from trainer.planning.planner import GB, LayoutPlanner
from trainer.planning.speed import SEGMENT, SpeedModel


def main() -> int:
    sizes = published_sizes()
    parser = argparse.ArgumentParser(prog="python -m trainer.layout", description="The layout that a run would get.")
    parser.add_argument("model", help=f"{', '.join(sizes)}; or a Hugging Face folder")
    parser.add_argument("--gpus", type=int, required=True)
    parser.add_argument("--card", choices=list(GPUS), default="H100")
    parser.add_argument("--length", type=int, default=8192, help="token slots a pack (8192)")
    parser.add_argument(
        "--patches", type=int, help="vision patches a pack; default: twice the length, half of all tokens"
    )
    parser.add_argument("--global-batch", type=int, help="packs a step; default: 16 for each GPU")
    args = parser.parse_args()
    model = sizes[args.model] if args.model in sizes else ModelConfig.from_hf(args.model)
    gpu, patches = GPUS[args.card], 2 * args.length if args.patches is None else args.patches
    packs = args.global_batch or 16 * args.gpus
    layout = LayoutPlanner(model, gpu, args.gpus).plan(length=args.length, global_batch=packs, patches=patches)
    share = packs * layout.tensor_parallel / args.gpus  # packs of a step that one model replica has
    seconds = SpeedModel(model, gpu).step_seconds(
        gpus=args.gpus,
        tensor_parallel=layout.tensor_parallel,
        tokens=round(share * args.length),
        patches=round(share * patches),
        compute=layout.compute,
        micro_batches=round(share / layout.micro_batch),
    )
    rate = packs * args.length / seconds
    for name, value in {
        "model": f"{args.model}, {costs_of(model).parameters:,} parameters",
        "tensor parallel": layout.tensor_parallel,
        "data parallel": args.gpus // layout.tensor_parallel,
        "micro-batch": f"{layout.micro_batch} pack(s) of {args.length}",
        "memory": f"{(layout.memory or 0) / GB:.1f} GB a GPU predicted, {gpu.usable / GB:.0f} usable",
        "tokens/s": f"{rate:,.0f}, {rate / args.gpus:,.0f} a GPU predicted, in samples of about {SEGMENT} tokens",
        "why": layout.reason,
    }.items():
        print(f"{name:16} {value}")
    return 0


if __name__ == "__main__":
    run_cli(main)
