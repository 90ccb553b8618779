"""python -m pipeline STAGE IN OUT, or all stages in a row: python -m pipeline run RECIPE.yaml. See --help."""

import argparse
from functools import partial

from kanyun.cli.parser import Parser, command_line
from kanyun.errors import run_cli
from pipeline.stages.table import STAGES, StageEntry, check_settings


def run_stage(stage: StageEntry, args: argparse.Namespace) -> int:
    settings = {name: getattr(args, name) for name in stage.options}
    check_settings(settings, "--")
    stage.load().for_command(args.source, args.output, **settings).run(args.overwrite)
    return 0


def run_recipe(args: argparse.Namespace) -> int:
    from pipeline.recipe import Recipe

    Recipe.load(args.recipe).run(args.overwrite)
    return 0


def run_doctor(args: argparse.Namespace) -> int:
    from kanyun.cli.doctor import report
    from pipeline.doctor import findings

    return report(findings(args.folders), args.json)


def parser() -> Parser:
    top = command_line(
        "pipeline",
        "kanyun-pipeline",
        "Raw samples to packs, in Spark stages.",
        "{prog} doctor\n{prog} run my_recipe.yaml\n{prog} STAGE --help",
    )
    commands = top.add_subparsers(required=True, metavar="STAGE")
    for stage in STAGES:
        example = f"{top.prog} {stage.name} {stage.example}"
        command = commands.add_parser(stage.name, help=stage.text, description=stage.text, example=example)
        command.set_defaults(do=partial(run_stage, stage))
        command.add_argument("source", metavar="IN", help="folder or URI")
        command.add_argument("output", metavar="OUT", help="folder or URI")
        for name, arguments in stage.options.items():
            command.add_argument(f"--{name.replace('_', '-')}", **arguments)
    text = "all stages in a row"
    command = commands.add_parser("run", help=text, description=text, example=f"{top.prog} run my_recipe.yaml")
    command.set_defaults(do=run_recipe)
    command.add_argument("recipe", metavar="RECIPE.yaml", help="pipeline/recipe.py shows one")
    for command in commands.choices.values():
        command.add_argument("--overwrite", action="store_true", help="replace what is in the output")
    text = (
        "say what is missing here: Python, Java, packages, disk, HDFS, and a task of Spark; exit code 1 if something is"
    )
    command = commands.add_parser(
        "doctor", help=text, description=text, example=f"{top.prog} doctor raw/charts hdfs://namenode:9820/raw"
    )
    command.set_defaults(do=run_doctor)
    command.add_argument("folders", metavar="FOLDER", nargs="*", help="folders or URIs that must answer")
    command.add_json()
    return top


def main() -> int:
    args = parser().parse_args()
    code: int = args.do(args)
    return code


def entry() -> None:
    """The console script kanyun-pipeline."""
    run_cli(main)


if __name__ == "__main__":
    entry()
