"""python -m convert to-megatron | to-hf | verify | resize-vocab: Hugging Face folders and megatron checkpoints."""

import argparse
import gc
import json
import os
import sys

from kanyun.cli.parser import Parser, command_line
from kanyun.errors import run_cli

# Before torch starts: conversion copies bits, verification wants float32, and a model may be larger than a GPU.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["HF_HUB_OFFLINE"] = "1"  # folders only, nothing is downloaded
# A tenth of the CPU time of to-megatron, for a 1.5B, went into looking for cycles among what imports make.
gc.disable()
# transformers is imported beside the reading and writing threads, which wait this long for the interpreter's lock, for
# each MB several times; 5 ms otherwise.
sys.setswitchinterval(1e-4)
# transformers imports scikit-learn where it is installed, for a kind of generation: 1.8 s of CPU time.
sys.modules.setdefault("sklearn", None)  # type: ignore[arg-type]


def _to_megatron(args: argparse.Namespace) -> int:
    from convert.output import local_path
    from convert.to_megatron import to_megatron

    to_megatron(local_path(args.source), local_path(args.out), args.overwrite)
    print(f"{args.out} is a checkpoint of step 0: give it to the trainer as `init: {args.out}`")
    return 0


def _to_hf(args: argparse.Namespace) -> int:
    from convert.output import local_path
    from convert.to_hf import to_hf

    local_path(args.source)
    to_hf(args.source, local_path(args.out), args.overwrite)
    print(f"{args.out} is a Hugging Face folder")
    return 0


def _resize_vocab(args: argparse.Namespace) -> int:
    from convert.output import local_path
    from convert.resize_vocab import resize_vocab

    added = resize_vocab(local_path(args.source), local_path(args.out), args.overwrite)
    print(f"{args.out} is the same model with {added} more embedding rows")
    return 0


def _verify(args: argparse.Namespace) -> int:
    from convert.logits import compare, report, summary
    from convert.output import local_path

    first, second = local_path(args.a), local_path(args.b)
    sample, comparison = compare(first, second)
    if args.json:
        values = summary(comparison, args.tolerance)
        print(json.dumps(values, indent=2))
        return 0 if values["within"] else 1
    return 0 if report(first, second, sample, comparison, tolerance=args.tolerance) else 1


def parser() -> Parser:
    top = command_line(
        "convert",
        "kanyun-convert",
        "Convert models between Hugging Face folders and checkpoints of the trainer.",
        "{prog} to-megatron models/Qwen2.5-7B checkpoints/qwen2_5_7b\n{prog} to-hf runs/qwen2_5_7b runs/qwen2_5_7b_hf",
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    checkpoint = "a run's output folder, its checkpoints folder, or one step_... folder"
    hf = "Hugging Face folder"
    for name, run, source, text, example in (
        (
            "to-megatron",
            _to_megatron,
            hf,
            "make a checkpoint that the trainer takes as `init`",
            "models/Qwen2.5-7B checkpoints/qwen2_5_7b",
        ),
        (
            "to-hf",
            _to_hf,
            checkpoint,
            "make a Hugging Face folder of a checkpoint",
            "runs/qwen2_5_7b hf/qwen2_5_7b",
        ),
        (
            "resize-vocab",
            _resize_vocab,
            hf,
            "add embedding rows for the tokenizer's added tokens",
            "models/Qwen2.5-7B models/Qwen2.5-7B-more",
        ),
    ):
        command = commands.add_parser(name, help=text, description=text, example=f"{top.prog} {name} {example}")
        command.add_argument("source", help=source)
        command.add_argument("out", help="folder to write")
        command.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
        command.set_defaults(run=run)
    text = "run two models on the same input; exit code 1 if their logits differ"
    example = f"{top.prog} verify models/Qwen2.5-7B runs/qwen2_5_7b"
    command = commands.add_parser("verify", help=text, description=text, example=example)
    for name in ("a", "b"):
        command.add_argument(name, help=f"Hugging Face folder, or {checkpoint}")
    command.add_argument("--tolerance", type=float, default=1e-4, help="largest difference of a logit (1e-4)")
    command.add_json()
    command.set_defaults(run=_verify)
    return top


def main() -> int:
    args = parser().parse_args()
    code: int = args.run(args)
    return code


def entry() -> None:
    """The console script kanyun-convert."""
    run_cli(main)


if __name__ == "__main__":
    entry()
