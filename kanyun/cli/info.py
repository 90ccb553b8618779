"""What `kanyun info` prints: one dataset in lines, or several parts and epochs as a table."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from kanyun.manifest import Manifest
from kanyun.storage import Folder

Datasets = Sequence[tuple[Folder, Manifest]]


def lines(folder: Folder, m: Manifest) -> list[str]:
    """Return all that is known of one dataset."""
    rows = {
        "packs": f"{m.packs:,} x {m.length:,} tokens in {len(m.shards)} shards, {_bytes(m) / 1e6:,.1f} MB",
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
    }
    return [folder.uri, *(f"  {name:18} {value}" for name, value in rows.items())]


def table(datasets: Datasets) -> list[str]:
    """Return a line for each dataset, by length, part and epoch, and their sum."""
    head = ("folder", "length", "part", "epoch", "packs", "fill", "samples", "patches", "MB", "content digest")
    ordered = sorted(datasets, key=lambda one: (one[1].length, one[1].part, one[1].epoch))
    rows = [
        (
            folder.name,
            *(f"{number:,}" for number in (m.length, m.part, m.epoch, m.packs)),
            f"{m.fill:.2%}",
            *(f"{number:,}" for number in (m.counts.packed, m.patches)),
            f"{_bytes(m) / 1e6:,.1f}",
            m.content_digest[:12],
        )
        for folder, m in ordered
    ]
    manifests = [m for _, m in datasets]
    packs, samples, patches = (
        sum(values) for values in zip(*((m.packs, m.counts.packed, m.patches) for m in manifests), strict=True)
    )
    slots = sum(m.packs * m.length for m in manifests)
    fill = sum(m.tokens for m in manifests) / slots if slots else 0.0
    size = sum(map(_bytes, manifests)) / 1e6
    rows.append(
        (
            f"{len(rows)} datasets",
            "",
            "",
            "",
            f"{packs:,}",
            f"{fill:.2%}",
            f"{samples:,}",
            f"{patches:,}",
            f"{size:,.1f}",
            "",
        )
    )
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    return [
        "  ".join(cell.ljust(width) if column == 0 else cell.rjust(width) for column, (cell, width) in cells).rstrip()
        for cells in (list(enumerate(zip(row, widths))) for row in (head, *rows))
    ]


def values(datasets: Datasets) -> list[dict[str, Any]]:
    """Return the manifests for a script, less their lists of files."""
    return [
        {"uri": folder.uri, **{name: value for name, value in asdict(m).items() if name != "shards"}}
        | {"shards": len(m.shards), "bytes": _bytes(m), "fill": m.fill, "content_digest": m.content_digest}
        for folder, m in datasets
    ]


def _bytes(manifest: Manifest) -> int:
    return sum(shard.bytes for shard in manifest.shards)


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
