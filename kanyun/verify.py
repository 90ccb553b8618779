"""Checking a packed dataset from end to end: every checksum, every identity. Reads each byte once."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from kanyun.errors import DatasetError
from kanyun.naming import lineage_name
from kanyun.reader import PackedDataset
from kanyun.schema import Pack
from kanyun.storage import Folder


def verify(folder: Folder) -> Iterator[str]:
    """Yields one sentence a fault: the file, the record batch and its byte offset. Nothing yielded means sound.

    Raises DatasetError where nothing can be checked at all: no manifest, or an index that is not the manifest's.
    """
    dataset = PackedDataset(folder)
    manifest = dataset.manifest
    manifest.counts.check(folder.uri)
    totals = {"packs": 0, "tokens": 0, "patches": 0, "samples": 0}  # samples: lineage less packs
    for number, shard in enumerate(manifest.shards):
        lineage = lineage_name(number, len(manifest.shards))
        faults = [*_file(folder, shard.name, shard.digest), *_file(folder, lineage, shard.lineage_digest)]
        if not faults:
            totals["samples"] += int(pq.read_metadata(pa.BufferReader(folder.read(lineage))).num_rows)
        yield from faults
    for number in tqdm(range(len(dataset)), desc=f"verify {folder.name}", unit="batch", disable=None):
        try:
            packs = dataset.read_batch(number)
        except (DatasetError, OSError) as error:
            yield str(error)
            continue
        for row, pack in enumerate(packs):
            for fault in _faults(pack, dataset):
                yield f"{dataset.where(number)}, row {row}: {fault}"
            totals["packs"] += 1
            totals["tokens"] += pack.tokens
            totals["patches"] += pack.patches
            totals["samples"] -= len(pack.sample_ids)
    for key in ("packs", "tokens", "patches"):
        if totals[key] != getattr(manifest, key):
            yield f"{folder.uri}: {totals[key]} {key} found, the manifest says {getattr(manifest, key)}"
    if totals["samples"] != 0:
        yield f"{folder.uri}: {totals['samples']} more samples in the lineage than in the packs"


def _file(folder: Folder, name: str, digest: str) -> Iterator[str]:
    if not folder.exists(name):
        yield f"{folder.uri}/{name} is missing"
    elif (found := folder.digest(name)) != digest:
        yield f"{folder.uri}/{name} ({folder.size(name)} bytes) has digest {found}, the manifest says {digest}"


def _faults(pack: Pack, dataset: PackedDataset) -> Iterator[str]:
    manifest = dataset.manifest
    ends, samples = pack.cu_seqlens, len(pack.sample_ids)
    if ends[0] != 0 or ends[-1] != manifest.length or (np.diff(ends) <= 0).any():
        yield f"cu_seqlens {ends.tolist()} do not rise from 0 to {manifest.length}"
    elif len(ends) - 1 - samples != (pack.tokens < manifest.length):
        yield f"{samples} samples, but {len(ends) - 1} segments for {pack.tokens} useful tokens"
    if pack.loss_mask[pack.tokens :].any() or (pack.input_ids[pack.tokens :] != manifest.pad_token_id).any():
        yield f"the tail after {pack.tokens} tokens is not masked padding"
    if len(pack.dataset) != samples:
        yield f"{samples} samples, but {len(pack.dataset)} dataset names"
    if len(pack.images) != len(pack.image_grid_thw):
        yield f"{len(pack.images)} images, but {len(pack.image_grid_thw)} grids"
    if pack.patches > manifest.vision_budget:
        yield f"{pack.patches} patches, over the vision budget of {manifest.vision_budget}"
    if manifest.processor is not None and manifest.image_token_id is not None:
        merged = pack.patches // manifest.processor["merge_size"] ** 2
        tokens = int((pack.input_ids == manifest.image_token_id).sum())
        if tokens != merged:
            yield f"{tokens} image tokens, but the grids make {merged}"
