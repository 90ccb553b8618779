"""Training on several GPUs of one machine beside one GPU on the same work: whole steps, tokens/s and TFLOP/s a GPU.

usage: python benchmarks/scaling.py DATA [--gpus 1 2] [--rows 1.5B:2 1.5B:8 ...] [--seconds 120]
DATA holds `text` (text_data.py) and `vision` (vision_data.py). A row is a model, and packs a rank a step. Rows that end
in `:slow` exchange over loopback sockets, NCCL without NVLink and shared memory: two nodes on a slow network,
simulated on one machine. A row that takes longer than --seconds is ended, and the next one starts.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

ROWS = ["1.5B:2", "1.5B:8", "3B:2", "3B:8", "7B:4", "VL-3B:8", "1.5B:8:slow"]
SLOW = {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1", "NCCL_SOCKET_IFNAME": "lo"}
HEADER = "| model:packs a rank | GPUs | tokens/s a GPU | TFLOP/s a GPU | of one GPU | ms a step | GB | predicted GB |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rows", nargs="+", default=ROWS)
    parser.add_argument("--precision", choices=["fp8", "bf16"], default="fp8")
    parser.add_argument("--seconds", type=int, default=120)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        _train(args)
        return
    print(HEADER + "\n|---|" + "--:|" * 7, flush=True)
    for row in args.rows:
        one = None
        for gpus in args.gpus:
            result = _launch(row, gpus, args.seconds)
            if result is None:
                print(f"| {row} | {gpus} | did not finish in {args.seconds} s |", flush=True)
                continue
            one = result["tokens/s"] if gpus == 1 else one
            kept = f"{result['tokens/s'] / one:.1%}" if one else ""
            print(
                f"| {row} | {gpus} | {result['tokens/s']:,.0f} | {result['TFLOP/s']:.0f} | {kept} "
                f"| {1e3 * result['step s']:,.0f} | {result['memory GB']:.1f} | {result['predicted GB']:.1f} |",
                flush=True,
            )


def _launch(row: str, gpus: int, seconds: int) -> dict[str, Any] | None:
    """Return the result of a row on `gpus` GPUs; None if it fails or takes too long."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"]
    environment = os.environ | (SLOW if row.endswith(":slow") else {})
    command = [sys.executable, *torchrun, *sys.argv, "--child", row]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True) as child:
        try:
            out, _ = child.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            return None
    lines = out.splitlines()
    results = [line.removeprefix("RESULT ") for line in lines if line.startswith("RESULT ")]
    print("\n".join(line for line in lines if not line.startswith("RESULT ")), end="\n" if len(lines) > 1 else "")
    return json.loads(results[0]) if results else None


def _train(args: argparse.Namespace) -> None:
    """One rank of a row."""
    from benchmarks import train_text, train_vision
    from benchmarks.side_by_side import train

    model, packs, *_ = args.child.split(":")
    args.global_batch = int(packs) * int(os.environ["WORLD_SIZE"])
    with tempfile.TemporaryDirectory() as folder:
        if model.startswith("VL"):
            args.size, args.row, args.data = f"Qwen2.5-{model}", "mix", f"{args.data}/vision"
            config = train_vision.config_of(args, Path(folder))
        else:
            args.model, args.data = model, f"{args.data}/text"
            config = train_text.config_of(args, Path(folder))
        result = train(args, config)
    if os.environ["RANK"] == "0":
        print("RESULT " + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
