"""Ours and its peer, each run in a process of its own, as a table: what train_text.py and train_vision.py share."""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Run = Callable[[argparse.Namespace, Path], dict[str, Any]]  # works in a folder of its own
# Column of the table -> how its value is written.
COLUMNS = {
    "tokens/s": "{:,.0f}",
    "TFLOP/s": "{:.0f}",
    "MFU": "{:.1%}",
    "memory GB": "{:.1f}",
    "predicted GB": "{:.1f}",
    "micro-batch": "{}",
    "again in backward": "{}",
    "first step s": "{:.0f}",
    "data wait": "{:.2%}",
    "useful patches": "{:.1%}",
    "useful tokens": "{:.1%}",
}


def main(parser: argparse.ArgumentParser, what: str, default: list[str], ours: Run, peer: Run) -> None:
    """A row of the table for each of `--whats`, in each precision; a child of this script is told one as `--what`."""
    parser.add_argument("data")
    parser.add_argument(f"--{what}s", nargs="+", default=default)
    parser.add_argument("--precisions", nargs="+", default=["bf16", "fp8"])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--peer-steps", type=int, default=2)
    parser.add_argument("--global-batch", type=int, default=16)
    parser.add_argument("--ours-only", action="store_true")
    parser.add_argument("--profile", action="store_true")
    for name in ("only", "precision", what):  # of a child
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        with tempfile.TemporaryDirectory() as folder:
            result = (ours if args.only == "ours" else peer)(args, Path(folder))
        print("RESULT " + json.dumps(result))
        return
    print(torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU", "torch", torch.__version__)
    lines = [f"| {what} | | {' | '.join(COLUMNS)} | ours / peer |", "|---|---" + "|--:" * (len(COLUMNS) + 1) + "|"]
    for row in getattr(args, f"{what}s"):
        theirs = {} if args.ours_only else _child("--only", "peer", f"--{what}", row)
        if theirs:
            lines.append(_line(row, "peer", theirs, {}))
        for precision in args.precisions:
            mine = _child("--only", "ours", f"--{what}", row, "--precision", precision)
            if mine:
                lines.append(_line(row, f"ours, {precision}", mine, theirs))
    print("\n".join(["", *lines]))


def _line(row: str, who: str, result: dict[str, Any], theirs: dict[str, Any]) -> str:
    cells = [form.format(result[name]) if name in result else "" for name, form in COLUMNS.items()]
    cells.append(f"{result['tokens/s'] / theirs['tokens/s']:.2f}" if theirs else "")
    return f"| {row} | {who} | {' | '.join(cells)} |"


def _child(*options: str) -> dict[str, Any]:
    """The result of this very script with these options; empty if it failed."""
    done = subprocess.run([sys.executable, *sys.argv, *options], stdout=subprocess.PIPE, text=True)
    *said, last = done.stdout.splitlines() or [""]
    if not last.startswith("RESULT "):
        print(f"{options} failed: {done.stdout[-2000:]}", flush=True)
        return {}
    print("\n".join([*said, f"{options[1::2]}: {last.removeprefix('RESULT ')}"]), flush=True)
    result: dict[str, Any] = json.loads(last.removeprefix("RESULT "))
    return result
