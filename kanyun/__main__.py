"""python -m kanyun info | verify | preview | put | fetch: inspect and copy packed datasets."""

import argparse
import sys

from kanyun.errors import UserError, run_cli
from kanyun.manifest import Manifest
from kanyun.naming import discover
from kanyun.storage import Folder


def _info(args: argparse.Namespace) -> int:
    for folder in discover(args.dir):
        m = Manifest.load(folder)
        size = sum(shard.bytes for shard in m.shards)
        print(folder.uri)
        for name, value in {
            "packs": f"{m.packs:,} x {m.length:,} tokens in {len(m.shards)} shards, {size / 1e6:,.1f} MB",
            "fill": f"{m.fill:.2%} ({m.tokens:,} useful tokens; lower bound {m.packs_lower_bound:,} packs)",
            "samples": f"{m.counts.rows_in:,} in + {m.counts.added:,} added = {m.counts.packed:,} packed + "
            f"{m.counts.quarantined:,} quarantined + {m.counts.dropped:,} dropped",
            "vision": f"{m.patches:,} patches, at most {m.vision_budget:,} a pack" if m.vision_budget else "none",
            "processor": _processor(m),
            "part, epoch, seed": f"{m.part}, {m.epoch}, {m.seed}",
            "ratios": ", ".join(f"{path}: {ratio}" for path, ratio in m.ratios.items()),
            "tokenizer": m.tokenizer,
            "content digest": m.content_digest,
            "code version": m.code_version,
        }.items():
            print(f"  {name:18} {value}")
    return 0


def _processor(manifest: Manifest) -> str:
    """For which models' images the packs are."""
    p = manifest.processor
    if p is None:
        return "none: for a text model"
    patch, merge = p["patch_size"], p["merge_size"]
    return (
        f"patches of {patch} x {patch} pixels, {merge} x {merge} of them a token; images of {p['min_pixels']:,} to "
        f"{p['max_pixels']:,} pixels"
    )


def _verify(args: argparse.Namespace) -> int:
    from kanyun.verify import verify

    faults = 0
    for folder in discover(args.dir):
        before = faults
        for fault in verify(folder):
            print(f"fault: {fault}", file=sys.stderr)
            faults += 1
        if faults == before:
            print(f"{folder.uri}: every checksum and every count is right")
    return 1 if faults else 0


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


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m kanyun", description="Inspect and copy packed datasets.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for run, text in (
        (_info, "print what a dataset contains"),
        (_verify, "check every checksum and count; exit code 1 and the file, batch and offset at fault"),
        (_preview, "draw packs as a page: segments, trained tokens, images"),
    ):
        command = commands.add_parser(run.__name__.strip("_"), help=text, description=text)
        command.add_argument("dir", help="a packed dataset, or the folder it lies in")
        command.set_defaults(run=run)
    command.add_argument("out", help="the page to write, .html")
    command.add_argument("--packs", type=int, default=12, help="number of packs to draw (12)")
    for title, source, target in (("put", "LOCAL", "URI"), ("fetch", "URI", "LOCAL")):
        text = f"copy the files below {source} to below {target}, in parallel and verified; the same command resumes it"
        command = commands.add_parser(title, help=text, description=text)
        command.add_argument("source", metavar=source, help="a folder: a packed dataset, a parent of several, or any")
        command.add_argument("target", metavar=target, help="the folder that it becomes")
        command.set_defaults(run=_copy, title=title)
    args = parser.parse_args()
    code: int = args.run(args)
    return code


if __name__ == "__main__":
    run_cli(main)
