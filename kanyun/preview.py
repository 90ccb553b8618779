"""A page that shows packs as training sees them: segments, trained tokens, images, padding. One file, no network."""

import base64
from collections.abc import Iterator
from html import escape
from itertools import groupby

import numpy as np
from tokenizers import Tokenizer

from kanyun.errors import DatasetError
from kanyun.manifest import Manifest
from kanyun.reader import PackedDataset
from kanyun.schema import Pack
from kanyun.storage import Folder

_STYLE = """
:root { --page: #fbfbfa; --ink: #1c1f23; --soft: #5b626b; --line: #e3e4e6; --trained: #d6efd8; --edge: #1f7a4d }
@media (prefers-color-scheme: dark) { :root {
  --page: #14171a; --ink: #e8eaed; --soft: #a0a7b0; --line: #30353b; --trained: #1d4a31; --edge: #5cc492 } }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 76rem; padding: 1.5rem clamp(1rem, 3vw, 2.5rem);
  background: var(--page); color: var(--ink); overflow-wrap: anywhere }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .2rem 0 1rem }
h2 { font-size: 1.05rem; margin: 2.4rem 0 .6rem }
td { padding: .1rem 1rem .1rem 0; vertical-align: top }
td:first-child { color: var(--soft); min-width: 6rem }
.bar { display: flex; gap: 1px; height: 1.5rem; border-radius: 4px; overflow: hidden; background: var(--line) }
.bar div { font-size: 11px; line-height: 1.5rem; color: #fff; text-indent: .3rem; overflow: clip; white-space: nowrap }
details { margin: .3rem 0; border-left: 4px solid; padding-left: .7rem; font-size: 13px }
summary { cursor: pointer; color: var(--soft); display: flex; flex-wrap: wrap; gap: 0 1rem }
summary span { min-width: 16rem }
summary q { color: var(--ink); overflow: hidden; text-overflow: ellipsis; white-space: nowrap; quotes: none }
pre { white-space: pre-wrap; font: 12.5px/1.6 ui-monospace, Menlo, Consolas, monospace; margin: .5rem 0 }
pre, .bar .tail { color: var(--soft) }
mark { background: var(--trained); color: var(--ink); border-bottom: 2px solid var(--edge) }
img { max-height: 9rem; max-width: 100%; margin: .2rem; border: 1px solid var(--line); vertical-align: middle }
"""
_EXCERPT = 80  # characters of the trained tokens, shown before a segment is opened


def preview(folder: Folder, packs: int) -> str:
    """Return the HTML of the first `packs` packs of a dataset.

    Raises DatasetError if the dataset does not carry its tokenizer.
    """
    dataset = PackedDataset(folder)
    tokenizer_folder = folder / "tokenizer"
    if not tokenizer_folder.exists("tokenizer.json"):
        raise DatasetError(f"{folder.uri} has no tokenizer/tokenizer.json to decode its tokens: pack the data again")
    tokenizer = Tokenizer.from_str(tokenizer_folder.read("tokenizer.json").decode())
    body = "".join(_pack(pack, dataset.manifest, tokenizer) for pack in _first(dataset, packs))
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=color-scheme content='light dark'>"
        "<meta name=viewport content='width=device-width, initial-scale=1'>"
        f"<title>{escape(folder.name)}</title><style>{_STYLE}</style><h1>{escape(folder.name)}</h1>"
        f"{_table(dataset.manifest)}<p>Open a segment to read it. <mark>Marked</mark> tokens are trained.</p>{body}"
    )


def _first(dataset: PackedDataset, count: int) -> Iterator[Pack]:
    for number in range(len(dataset)):
        for pack in dataset.read_batch(number):
            if count == 0:
                return
            count -= 1
            yield pack


def _table(manifest: Manifest) -> str:
    rows = {
        "packs": f"{manifest.packs:,} of {manifest.length:,} tokens (lower bound {manifest.packs_lower_bound:,})",
        "fill": f"{manifest.fill:.2%} useful tokens",
        "samples": f"{manifest.counts.packed:,} packed of {manifest.counts.rows_in:,}",
        "patches": f"{manifest.patches:,}, at most {manifest.vision_budget:,} a pack",
        "epoch, part, seed": f"{manifest.epoch}, {manifest.part}, {manifest.seed}",
        "ratios": ", ".join(f"{path}: {ratio}" for path, ratio in manifest.ratios.items()),
        "content digest": manifest.content_digest,
    }
    cells = "".join(f"<tr><td>{name}<td>{escape(value)}" for name, value in rows.items())
    return f"<table>{cells}</table>"


def _pack(pack: Pack, manifest: Manifest, tokenizer: Tokenizer) -> str:
    names = sorted(set(pack.dataset))
    bar, details, images = [], [], iter(pack.images)
    for i, name in enumerate(pack.dataset):
        start, end = int(pack.cu_seqlens[i]), int(pack.cu_seqlens[i + 1])
        colour = f"hsl({(names.index(name) * 137 + 210) % 360} 50% {44 - 9 * (i % 2)}%)"
        trained = int(pack.loss_mask[start:end].sum())
        label = f"{escape(name)}, {end - start} tokens, {trained} trained"
        excerpt = _excerpt(pack.input_ids[start:end], pack.loss_mask[start:end], tokenizer)
        style = f"width:{(end - start) / manifest.length:.4%};background:{colour}"
        bar.append(f"<div style='{style}' title='{label}'>{escape(name)}</div>")
        text = "".join(_text(pack, start, end, manifest, tokenizer, images))
        details.append(
            f"<details style='border-color:{colour}'><summary><span>{label}</span><q>{escape(excerpt)}</q></summary>"
            f"<pre>{text}</pre>sample {pack.sample_ids[i]}</details>"
        )
    if pack.tokens < manifest.length:
        bar.append(f"<div class=tail title='{manifest.length - pack.tokens} padding'>padding</div>")
    images_text = "1 image" if len(pack.images) == 1 else f"{len(pack.images)} images"
    title = f"pack {pack.pack_id}: {pack.tokens:,} tokens, {images_text}, {pack.patches:,} patches"
    return f"<h2>{title}</h2><div class=bar>{''.join(bar)}</div>{''.join(details)}"


def _excerpt(ids: np.ndarray, trained: np.ndarray, tokenizer: Tokenizer) -> str:
    """Return the beginning of the trained tokens: the answers of a conversation."""
    runs = np.split(ids, np.flatnonzero(np.diff(trained)) + 1)[int(not trained[0]) :: 2]
    return " · ".join(tokenizer.decode_batch([run[:_EXCERPT].tolist() for run in runs]))[:_EXCERPT]


def _text(
    pack: Pack, start: int, end: int, manifest: Manifest, tokenizer: Tokenizer, images: Iterator[bytes]
) -> Iterator[str]:
    """Yield decoded runs of tokens; a run of image tokens becomes the picture."""

    def kind(i: int) -> str:
        if manifest.image_token_id is not None and pack.input_ids[i] == manifest.image_token_id:
            return "image"
        return "trained" if pack.loss_mask[i] else "masked"

    for what, run in groupby(range(start, end), key=kind):
        ids = pack.input_ids[list(run)]
        if what == "image":
            data = base64.b64encode(next(images)).decode()
            yield f"<img src='data:image/png;base64,{data}' alt='image of {len(ids)} tokens'>"
        else:
            text = escape(tokenizer.decode(ids.tolist(), skip_special_tokens=False))
            yield f"<mark>{text}</mark>" if what == "trained" else text
