"""The least that a training step can take on an H100: each product and each pass over memory, by its FLOPs and bytes.

usage: python benchmarks/floors.py 1.5B [--fp8] [--packs 2]
Needs no GPU. A micro-batch is `--packs` packs of 8192. A product reads its operands once and writes its result;
it takes as long as its FLOPs or its bytes need, whichever is longer; the gradient of a weight is added to float32.
train_text.py --profile says what kernels take.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.profiles import ATTENTION, BANDWIDTH, PRODUCTS
from benchmarks.train_text import LENGTH
from kanyun.cli.parser import Parser
from trainer.models.config import Compute
from trainer.models.qwen2_5.sizes import SIZES
from trainer.models.registry import costs_of
from trainer.planning.gpus import GPUS
from trainer.planning.speed import PRODUCTS_FP8, SEGMENT, UPDATE, SpeedModel

Row = tuple[str, str, float, float, float]  # what, its shape, FLOPs, bytes, seconds


def products(what: str, rows: int, inputs: int, outputs: int, times: int, fp8: bool) -> list[Row]:
    """Of `times` linear layers: forward, gradient of the input, gradient of the weight."""
    flops, size = 2.0 * rows * inputs * outputs * times, 1 if fp8 else 2  # bytes of an operand
    x, y, w = rows * inputs * times, rows * outputs * times, inputs * outputs * times  # numbers
    moved = {
        "": size * (x + w) + 2 * y,
        ", gradient of input": size * (y + w) + 2 * x,
        ", gradient of weight": size * (x + y) + 8 * w,
    }
    rate = PRODUCTS_FP8 if fp8 else PRODUCTS
    shape = f"{times} x {rows} x {inputs} x {outputs}"
    return [(what + part, shape, flops, b, max(flops / rate, b / BANDWIDTH)) for part, b in moved.items()]


def floors(size: str, packs: int, fp8: bool) -> list[Row]:
    """Of one micro-batch; the optimizer's is once a step."""
    model, rows = SIZES[f"Qwen2.5-{size}"], packs * LENGTH
    h, f, layers = model.hidden_size, model.intermediate_size, model.num_layers
    q, kv = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    token = SpeedModel(model, GPUS["H100"]).work(Compute(fp8))
    found = [
        *products("query, key, value", rows, h, q + 2 * kv, layers, fp8),
        *products("attention's output", rows, q, h, layers, fp8),
        *products("gate and up", rows, h, 2 * f, layers, fp8),
        *products("down", rows, f, h, layers, fp8),
        *products("head", rows, h, model.vocab_size, 1, fp8=False),
    ]
    attention = rows * token.attention
    found.append((f"attention, samples of {SEGMENT}", "", attention, 0, attention / ATTENTION))
    passes = {"SwiGLU": token.swiglu, "norms, rope, residuals": token.norms, "cross entropy": token.loss}
    if fp8:
        passes["casts to fp8"] = token.casts
    moved = {what: rows * each for what, each in passes.items()} | {"optimizer": UPDATE * costs_of(model).parameters}
    return found + [(what, "", 0, b, b / BANDWIDTH) for what, b in moved.items()]


def main() -> None:
    parser = Parser(description=__doc__, example="python benchmarks/floors.py 1.5B --fp8")
    parser.add_argument("model", choices=[name.removeprefix("Qwen2.5-") for name in SIZES if "VL" not in name])
    parser.add_argument("--packs", type=int, default=1)
    parser.add_argument("--fp8", action="store_true")
    args = parser.parse_args()
    found = floors(args.model, args.packs, args.fp8)
    print("| | times x rows x inputs x outputs | TFLOP | GB | least, ms |\n|---|---|--:|--:|--:|")
    for what, shape, flops, moved, seconds in found:
        print(f"| {what} | {shape} | {flops / 1e12:.2f} | {moved / 1e9:.2f} | {1e3 * seconds:.2f} |")
    print(f"| all | | {sum(r[2] for r in found) / 1e12:.2f} | | {1e3 * sum(r[4] for r in found):.2f} |")


if __name__ == "__main__":
    main()
