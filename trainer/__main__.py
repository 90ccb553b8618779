"""python -m trainer run CONFIG.yaml [key=value ...] | report RUN ... | doctor: train, draw runs, say what is amiss."""

import argparse

from kanyun.cli.parser import Parser, command_line
from kanyun.errors import run_cli


def _train(args: argparse.Namespace) -> int:
    from trainer.launch import Launcher, restarts, this_machine

    return Launcher(this_machine(), [args.config, *args.changes]).run(restarts())


def _report(args: argparse.Namespace) -> int:
    from trainer.report.page import write_report

    print(write_report(args.runs, args.out))
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from kanyun.cli.doctor import report
    from trainer.cli.doctor import findings

    return report(findings(args.folders), args.json)


def parser() -> Parser:
    top = command_line(
        "trainer",
        "kanyun-train",
        "Train on packs, with a process for each GPU of this machine, or on its CPU. For several nodes see jobs/.",
        "{prog} run jobs/recipes/qwen2_5_vl_3b.yaml data=work/packed output=runs/vl\n{prog} report runs/vl",
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    text = "train; the same command, given again, resumes. Exit code 85: told to stop, and saved"
    command = commands.add_parser(
        "run", help=text, description=text, example=f"{top.prog} run jobs/recipes/qwen2_5_7b.yaml global_batch=256"
    )
    command.add_argument("config", metavar="CONFIG.yaml", help="trainer/config.py has its keys")
    command.add_argument("changes", metavar="key=value", nargs="*", help="on top of the config")
    command.set_defaults(do=_train)
    text = "draw a run, or several over one another, as one HTML page; a run may still be going on"
    command = commands.add_parser(
        "report", help=text, description=text, example=f"{top.prog} report runs/a runs/b --out a_and_b.html"
    )
    command.add_argument("runs", metavar="RUN", nargs="+", help="output folder of a run")
    command.add_argument("--out", metavar="FILE", help="HTML file to write; for one run RUN/report.html if left out")
    command.set_defaults(do=_report)
    text = "say what is missing: Python, GPUs, Transformer Engine, cuDNN, NCCL, disk; exit code 1 if something is"
    command = commands.add_parser("doctor", help=text, description=text, example=f"{top.prog} doctor work/packed")
    command.add_argument("folders", metavar="FOLDER", nargs="*", help="folders or URIs that must answer")
    command.add_json()
    command.set_defaults(do=_doctor)
    return top


def main() -> int:
    args = parser().parse_args()
    code: int = args.do(args)
    return code


def entry() -> None:
    """The console script kanyun-train."""
    run_cli(main)


if __name__ == "__main__":
    entry()
