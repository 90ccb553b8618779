"""Checks of a packed dataset from end to end: every checksum, every count, every sample_id."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kanyun.cli.progress import track
from kanyun.errors import DatasetError
from kanyun.manifest import Manifest
from kanyun.naming import lineage_name
from kanyun.reader import PackedDataset
from kanyun.schema import Pack
from kanyun.storage import Folder

PART_SAMPLES = 4_000_000  # samples whose ids are compared at a time: 130 MB
MOST_REPEATED = 20  # ids in the output
_LINEAGE_COLUMNS = ["pack_id", "segment", "sample_id", "dataset", "copy", "piece"]


def verify(folder: Folder) -> Iterator[str]:
    """Yield one sentence a fault: the file, the record batch and its byte offset. No sentence means a sound dataset.

    Raises DatasetError where nothing can be checked at all: no manifest, or an index that is not the manifest's.
    """
    dataset = PackedDataset(folder)
    manifest = dataset.manifest
    manifest.counts.check(folder.uri)
    totals = {"packs": 0, "tokens": 0, "patches": 0, "samples": 0}  # samples: lineage less packs
    lineage_is_sound = True
    for number, shard in enumerate(manifest.shards):
        lineage = lineage_name(number, len(manifest.shards))
        faults = [*_file(folder, shard.name, shard.digest), *_file(folder, lineage, shard.lineage_digest)]
        lineage_is_sound &= not faults
        if not faults:
            totals["samples"] += int(pq.read_metadata(pa.BufferReader(folder.read(lineage))).num_rows)
        yield from faults
    for number in track(range(len(dataset)), f"verify {folder.name}", "batches"):
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
            yield f"{folder.uri}: {totals[key]} {key} in the shards, the manifest says {getattr(manifest, key)}"
    if totals["samples"] != 0:
        yield f"{folder.uri}: {totals['samples']} more samples in the lineage than in the packs"
    if lineage_is_sound:
        yield from islice(_repeated(folder, manifest), MOST_REPEATED)


def _file(folder: Folder, name: str, digest: str) -> Iterator[str]:
    if not folder.exists(name):
        yield f"{folder.uri}/{name} is missing"
    elif (actual := folder.digest(name)) != digest:
        yield f"{folder.uri}/{name} ({folder.size(name)} bytes) has digest {actual}, the manifest says {digest}"


def _repeated(folder: Folder, manifest: Manifest) -> Iterator[str]:
    """Yield a sentence for samples that are in the packs twice, or share a sample_id with one of another data path.

    Reads the lineage once for every PART_SAMPLES samples, and holds as many in memory.
    """
    samples = manifest.counts.packed
    parts = max(1, -(-samples // PART_SAMPLES))
    for part in range(parts):
        tables = []
        for number in range(len(manifest.shards)):
            data = pa.BufferReader(folder.read(lineage_name(number, len(manifest.shards))))
            table = pq.read_table(data, columns=_LINEAGE_COLUMNS, read_dictionary=["dataset"])
            tables.append(table.filter(table["sample_id"].to_numpy() % np.uint64(parts) == part))
        rows = pa.concat_tables(tables).unify_dictionaries().combine_chunks()
        dataset = rows["dataset"].combine_chunks().indices.to_numpy()
        ids, copies, pieces = (rows[name].to_numpy() for name in ("sample_id", "copy", "piece"))
        order = np.lexsort((pieces, copies, dataset, ids))
        same_id = np.diff(ids[order]) == 0
        same_row = (np.diff(copies[order]) == 0) & (np.diff(pieces[order]) == 0)
        for first in np.flatnonzero(same_id & (same_row | (np.diff(dataset[order]) != 0))).tolist():
            one, other = rows.take(pa.array(order[first : first + 2])).to_pylist()
            yield f"{folder.uri}: sample_id {one['sample_id']} is of two rows: {_where(one)} and {_where(other)}"


def _where(row: dict[str, Any]) -> str:
    copy = f"copy {row['copy']}, piece {row['piece']}"
    return f"pack {row['pack_id']}, segment {row['segment']} ({row['dataset']}, {copy})"


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
