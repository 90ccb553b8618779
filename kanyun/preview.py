"""A page that shows packs as training sees them: segments, trained tokens, images, padding. One file, no network."""

import base64
from collections.abc import Iterator
from html import escape
from itertools import groupby

from tokenizers import Tokenizer

from kanyun.errors import DatasetError
from kanyun.manifest import Manifest
from kanyun.reader import PackedDataset
from kanyun.schema import Pack
from kanyun.storage import Folder

_STYLE = """
body { font: 14px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #222 }
table { border-collapse: collapse }
td { padding: .1rem 1rem .1rem 0; vertical-align: top }
td:first-child { color: #777 }
.bar { display: flex; height: 1.6rem; border-radius: 4px; overflow: hidden; background: #ddd }
.bar div { border-right: 1px solid #fff; font-size: 10px; color: #fff; padding: .2rem }
.bar div { overflow: hidden; white-space: nowrap }
.bar .tail { color: #777 }
details { margin: .3rem 0; border-left: 5px solid; padding-left: .7rem } summary { cursor: pointer; color: #555 }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: 12px/1.6 ui-monospace, monospace; color: #555 }
mark { background: #d9f2d9; color: #000; border-bottom: 2px solid #2a8a2a }
img { max-height: 9rem; max-width: 100%; margin: .2rem; border: 1px solid #ccc; vertical-align: middle }
"""


def preview(folder: Folder, packs: int) -> str:
    """HTML of the first `packs` packs of a dataset.

    Raises DatasetError if the dataset does not carry its tokenizer.
    """
    dataset = PackedDataset(folder)
    tokenizer_folder = folder / "tokenizer"
    if not tokenizer_folder.exists("tokenizer.json"):
        raise DatasetError(f"{folder.uri} has no tokenizer/tokenizer.json to read its tokens with: pack the data again")
    tokenizer = Tokenizer.from_str(tokenizer_folder.read("tokenizer.json").decode())
    body = "".join(_pack(pack, dataset.manifest, tokenizer) for pack in _first(dataset, packs))
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{escape(folder.name)}</title><style>{_STYLE}</style><h1>{escape(folder.name)}</h1>"
        f"{_facts(dataset.manifest)}<p>Open a segment to read it. <mark>Marked</mark> tokens are trained.</p>{body}"
    )


def _first(dataset: PackedDataset, count: int) -> Iterator[Pack]:
    for number in range(len(dataset)):
        for pack in dataset.read_batch(number):
            if count == 0:
                return
            count -= 1
            yield pack


def _facts(manifest: Manifest) -> str:
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
        colour = f"hsl({(names.index(name) * 137 + 210) % 360} 55% {48 - 12 * (i % 2)}%)"
        trained = int(pack.loss_mask[start:end].sum())
        label = f"{escape(name)}, {end - start} tokens, {trained} trained"
        style = f"width:{(end - start) / manifest.length:.4%};background:{colour}"
        bar.append(f"<div style='{style}' title='{label}'>{label}</div>")
        text = "".join(_text(pack, start, end, manifest, tokenizer, images))
        details.append(
            f"<details style='border-color:{colour}'><summary>{label}, sample {pack.sample_ids[i]}</summary>"
            f"<pre>{text}</pre></details>"
        )
    if pack.tokens < manifest.length:
        bar.append(f"<div class=tail title='{manifest.length - pack.tokens} padding'>padding</div>")
    title = f"pack {pack.pack_id}: {pack.tokens} tokens, {len(pack.images)} images, {pack.patches} patches"
    return f"<h3>{title}</h3><div class=bar>{''.join(bar)}</div>{''.join(details)}"


def _text(
    pack: Pack, start: int, end: int, manifest: Manifest, tokenizer: Tokenizer, images: Iterator[bytes]
) -> Iterator[str]:
    """Decoded runs of tokens; a run of image tokens (which ends with the image) becomes the picture."""

    def kind(i: int) -> str:
        if manifest.image_token_id is not None and pack.input_ids[i] == manifest.image_token_id:
            return "image"
        return "trained" if pack.loss_mask[i] else "given"

    for what, run in groupby(range(start, end), key=kind):
        ids = pack.input_ids[list(run)]
        if what == "image":
            data = base64.b64encode(next(images)).decode()
            yield f"<img src='data:image/png;base64,{data}' alt='image of {len(ids)} tokens'>"
        else:
            text = escape(tokenizer.decode(ids.tolist(), skip_special_tokens=False))
            yield f"<mark>{text}</mark>" if what == "trained" else text
