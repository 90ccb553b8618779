"""python -m kanyun info | verify | preview | put | fetch: inspect and copy packed datasets."""

import argparse
import json
import sys

from kanyun.cli.parser import Parser, command_line
from kanyun.errors import UserError, run_cli
from kanyun.manifest import Manifest
from kanyun.naming import discover
from kanyun.storage import Folder


def _info(args: argparse.Namespace) -> int:
    from kanyun.cli import info

    datasets = [(folder, Manifest.load(folder)) for folder in discover(args.dir)]
    if args.json:
        print(json.dumps(info.values(datasets), indent=2, ensure_ascii=False))
    else:
        print("\n".join(info.table(datasets) if len(datasets) > 1 else info.lines(*datasets[0])))
    return 0


def _verify(args: argparse.Namespace) -> int:
    from kanyun.verify import verify

    faults: dict[str, list[str]] = {}
    for folder in discover(args.dir):
        of_folder = faults[folder.uri] = []
        for fault in verify(folder):
            print(f"fault: {fault}", file=sys.stderr)
            of_folder.append(fault)
        if not of_folder and not args.json:
            print(f"{folder.uri}: every checksum and every count is right")
    if args.json:
        print(json.dumps(faults, indent=2, ensure_ascii=False))
    return 1 if any(faults.values()) else 0


def _preview(args: argparse.Namespace) -> int:
    from kanyun.preview import preview

    folders = discover(args.dir)
    if len(folders) > 1:
        raise UserError(f"{args.dir} has {len(folders)} packed datasets: give one, for example {folders[0].uri}")
    out = Folder(args.out)
    out.parent.write(out.name, preview(folders[0], args.packs).encode())
    print(f"{args.packs} packs drawn in {args.out}")
    return 0


def _copy(args: argparse.Namespace) -> int:
    from kanyun.transfer import copy_folder

    copied = copy_folder(Folder(args.source), Folder(args.target), title=args.title)
    print(
        f"{args.target}: {copied.files:,} files, {copied.bytes / 1e6:,.1f} MB, every byte verified "
        f"({copied.skipped:,} were there already)"
    )
    return 0


def parser() -> Parser:
    top = command_line(
        "kanyun",
        "kanyun",
        "Inspect and copy packed datasets.",
        "{prog} info work/packed\n{prog} verify work/packed\n{prog} preview work/packed packs.html",
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    for run, text, example in (
        (_info, "print what a dataset contains; of several below a parent, a table of parts and epochs", "work/packed"),
        (_verify, "check every checksum and count; exit code 1 and the file, batch and offset at fault", "work/packed"),
        (_preview, "draw packs as a page: segments, trained tokens, images", "work/packed packs.html --packs 4"),
    ):
        name = run.__name__.strip("_")
        command = commands.add_parser(name, help=text, description=text, example=f"{top.prog} {name} {example}")
        command.add_argument("dir", help="a packed dataset, or the folder it lies in")
        command.set_defaults(run=run)
        if run is not _preview:
            command.add_json()
    command.add_argument("out", help="the page to write, .html")
    command.add_argument("--packs", type=int, default=12, help="number of packs to draw (12)")
    for title, source, target, example in (
        ("put", "LOCAL", "URI", "raw/charts hdfs://namenode:9820/raw/charts"),
        ("fetch", "URI", "LOCAL", "hdfs://namenode:9820/packed /local/packed"),
    ):
        text = f"copy the files below {source} to below {target}, in parallel and verified; the same command resumes it"
        command = commands.add_parser(title, help=text, description=text, example=f"{top.prog} {title} {example}")
        command.add_argument("source", metavar=source, help="a folder: a packed dataset, a parent of several, or any")
        command.add_argument("target", metavar=target, help="the folder that it becomes")
        command.set_defaults(run=_copy, title=title)
    return top


def main() -> int:
    args = parser().parse_args()
    code: int = args.run(args)
    return code


def entry() -> None:
    """The console script kanyun."""
    run_cli(main)


if __name__ == "__main__":
    entry()
