"""python -m pipeline STAGE IN OUT, or the five stages in a row: python -m pipeline run RECIPE.yaml. See --help."""

import argparse
from functools import partial

from kanyun.errors import run_cli
from pipeline.stages.table import STAGES, StageEntry, check_settings


def run_stage(stage: StageEntry, args: argparse.Namespace) -> None:
    settings = {name: getattr(args, name) for name in stage.options}
    check_settings(settings, "--")
    stage.load().for_command(args.source, args.output, **settings).run(args.overwrite)


def run_recipe(args: argparse.Namespace) -> None:
    from pipeline.recipe import Recipe

    Recipe.load(args.recipe).run(args.overwrite)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m pipeline", description="Raw samples to packs, in five Spark stages.")
    commands = top.add_subparsers(required=True, metavar="STAGE")
    for stage in STAGES:
        command = commands.add_parser(stage.name, help=stage.text, description=stage.text)
        command.set_defaults(do=partial(run_stage, stage))
        command.add_argument("source", metavar="IN", help="folder or URI")
        command.add_argument("output", metavar="OUT", help="folder or URI")
        for name, arguments in stage.options.items():
            command.add_argument(f"--{name.replace('_', '-')}", **arguments)
    text = "the five stages in a row"
    command = commands.add_parser("run", help=text, description=text)
    command.set_defaults(do=run_recipe)
    command.add_argument("recipe", metavar="RECIPE.yaml")
    for command in commands.choices.values():
        command.add_argument("--overwrite", action="store_true", help="replace what is in the output")
    return top


def main() -> None:
    args = parser().parse_args()
    args.do(args)


if __name__ == "__main__":
    run_cli(main)
