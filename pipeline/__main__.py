"""python -m pipeline STAGE IN OUT, or the five stages in a row: python -m pipeline run RECIPE.yaml. See --help."""

import argparse
from collections.abc import Callable

from kanyun.errors import run_cli


# Stages are imported when they run: --help and a mistyped option answer at once.
def preprocess(args: argparse.Namespace) -> None:
    from pipeline.stages.preprocess import PreprocessStage

    PreprocessStage(args.source, args.output, args.dataset).run(args.overwrite)


def filter_(args: argparse.Namespace) -> None:
    from pipeline.stages.filter import FilterStage

    FilterStage(args.source, args.output, args.near_duplicates).run(args.overwrite)


def sample(args: argparse.Namespace) -> None:
    from pipeline.stages.sample import SampleStage

    SampleStage(args.source, args.output, args.epoch, args.seed, args.ratios).run(args.overwrite)


def build(args: argparse.Namespace) -> None:
    from pipeline.stages.build import BuildStage

    BuildStage(args.source, args.output, args.tokenizer, args.length, args.overflow).run(args.overwrite)


def pack(args: argparse.Namespace) -> None:
    from pipeline.stages.pack import PackStage

    stage = PackStage.below(args.source, args.output, args.length, args.part, args.epoch, args.vision_budget)
    stage.run(args.overwrite)


def run(args: argparse.Namespace) -> None:
    from pipeline.recipe import Recipe

    Recipe.load(args.recipe).run(args.overwrite)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m pipeline", description="Raw samples to packs, in five Spark stages.")
    commands = top.add_subparsers(required=True, metavar="STAGE")

    def command(name: str, do: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(do=do)
        if name != "run":
            added.add_argument("source", metavar="IN", help="folder or URI")
            added.add_argument("output", metavar="OUT", help="folder or URI")
        added.add_argument("--overwrite", action="store_true", help="replace what is in the output")
        return added

    one = command("preprocess", preprocess, "raw rows to checked samples, images to blobs")
    one.add_argument("--dataset", required=True, metavar="NAME", help="messages, llava, text, or one you added")
    one = command("filter", filter_, "clean rows to data/, bad ones and duplicates to quarantine/")
    one.add_argument("--near-duplicates", choices=["keep", "drop"], default="keep", help="images that look alike")
    one = command("sample", sample, "how many copies of each sample an epoch has")
    one.add_argument("--ratios", metavar="YAML", help="data path: ratio; default: pipeline/constants.py")
    one.add_argument("--epoch", type=int, default=0, metavar="N")
    one.add_argument("--seed", type=int, default=0, metavar="N")
    one = command("build", build, "chat template, tokens, loss mask")
    one.add_argument("--tokenizer", required=True, metavar="DIR", help="Hugging Face folder")
    one.add_argument("--length", required=True, type=int, metavar="N", help="token slots a pack")
    one.add_argument("--overflow", choices=["drop", "split"], default="drop", help="over-long text documents")
    one = command("pack", pack, "samples to packs: OUT/packed_length_N_PART_epoch_EPOCH_v4")
    one.add_argument("--length", required=True, type=int, metavar="N", help="token slots a pack, as in build")
    one.add_argument("--part", type=int, default=0, metavar="N", help="tells several packed folders apart")
    one.add_argument("--epoch", type=int, metavar="N", help="as in sample; default: what was sampled")
    one.add_argument("--vision-budget", type=int, metavar="N", help="patches a pack; default: 1.3 x mean demand")
    one = command("run", run, "the five stages in a row")
    one.add_argument("recipe", metavar="RECIPE.yaml")
    return top


def main() -> None:
    args = parser().parse_args()
    args.do(args)


if __name__ == "__main__":
    run_cli(main)
