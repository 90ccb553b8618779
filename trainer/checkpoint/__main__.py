"""python -m trainer.checkpoint list RUN | verify RUN"""

import argparse
import json
import sys
from dataclasses import asdict

from kanyun.cli.parser import Parser
from kanyun.errors import run_cli


def _list(args: argparse.Namespace) -> int:
    from trainer.checkpoint.listing import list_steps

    listed = list_steps(args.run)
    if args.json:
        print(json.dumps([asdict(step) for step in listed], indent=2))
        return 0
    for step in listed:
        print(step.line())
    return 0


def _verify(args: argparse.Namespace) -> int:
    from trainer.checkpoint.faults import faults
    from trainer.checkpoint.listing import steps_below

    by_step = {}
    for step in steps_below(args.run):
        by_step[step.name] = faults(step)
        for fault in by_step[step.name]:
            print(f"error: {fault}", file=sys.stderr)
        if not args.json:
            print(f"{step.name}  {'DAMAGED' if by_step[step.name] else 'every file and value is right'}", flush=True)
    if args.json:
        print(json.dumps(by_step, indent=2))
    return 1 if any(by_step.values()) else 0


def parser() -> Parser:
    prog = "python -m trainer.checkpoint"
    top = Parser(prog=prog, description="Look at a run's checkpoints.", example=f"{prog} verify runs/qwen2_5_7b")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    for do, text in (
        (_list, "sizes alone"),
        (_verify, "every byte and value; exit code 1 and the file at fault if one is not right"),
    ):
        name = do.__name__.strip("_")
        command = commands.add_parser(name, help=text, description=text, example=f"{prog} {name} runs/qwen2_5_7b")
        command.add_argument("run", help="a run's output folder, or one step_... folder; local or hdfs://")
        command.add_json()
        command.set_defaults(do=do)
    return top


def main() -> int:
    args = parser().parse_args()
    code: int = args.do(args)
    return code


if __name__ == "__main__":
    run_cli(main)
