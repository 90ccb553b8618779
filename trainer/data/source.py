"""The packed datasets that a run trains on: listed, checked against model and config, and grouped by epoch."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from kanyun.errors import DatasetError
from kanyun.fingerprint import Fingerprint, difference
from kanyun.manifest import digest_of
from kanyun.naming import discover
from kanyun.reader import PackedDataset
from kanyun.schema import Pack


@dataclass(frozen=True)
class PackCost:
    """A pack's cost beyond what every pack costs alike, in any unit, for example FLOPs."""

    pair: float  # for each unit of the sum of squared segment lengths: causal attention of two tokens
    patch: float  # one vision patch; 0 where patches are padded to a static shape


class Packs:
    """Several packed datasets end to end: record batches and packs are numbered through all of them."""

    def __init__(self, datasets: Sequence[PackedDataset]):
        self.datasets = tuple(datasets)
        self.digest = digest_of("".join(dataset.manifest.content_digest for dataset in self.datasets).encode())
        self.packs_per_batch = np.concatenate([dataset.packs_per_batch for dataset in self.datasets])
        self._first_batch = np.cumsum([0] + [len(dataset) for dataset in self.datasets])

    @property
    def epoch(self) -> int:
        """Sampled epoch of the first dataset."""
        return self.datasets[0].manifest.epoch

    def __len__(self) -> int:
        """Packs."""
        return int(self.packs_per_batch.sum())

    def column(self, name: str) -> np.ndarray:
        """Return a column of PackedDataset, [packs]: pack_attention, _segments, _patches, _images or _windows."""
        return np.concatenate([getattr(dataset, name) for dataset in self.datasets])

    def costs(self, cost: PackCost) -> np.ndarray:
        """Return each pack's cost, [packs] float64."""
        return cost.pair * self.column("pack_attention") + cost.patch * self.column("pack_patches")

    def locate(self, index: int) -> tuple[int, int]:
        """Return (record batch, row in it) of pack `index` in stored order."""
        batch = int(np.searchsorted(self._ends, index, side="right"))
        return batch, index - int(self._ends[batch] - self.packs_per_batch[batch])

    def read_batch(self, number: int) -> list[Pack]:
        """Return the packs of one record batch. Raises DatasetError if it is damaged."""
        part = int(np.searchsorted(self._first_batch, number, side="right")) - 1
        return self.datasets[part].read_batch(number - int(self._first_batch[part]))

    def batch_bytes(self, number: int) -> int:
        """Return the bytes of one record batch, as stored."""
        part = int(np.searchsorted(self._first_batch, number, side="right")) - 1
        return self.datasets[part].batch_bytes(number - int(self._first_batch[part]))

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum(self.packs_per_batch)


class PackedData:
    """The packed datasets below `parent`, each packed to `length` and built with the model's tokenizer and processor.

    Raises DatasetError naming both values where they differ.
    """

    def __init__(self, parent: str, length: int, model: Fingerprint):
        self.parent = parent
        self.length = length
        self.datasets = [PackedDataset(folder) for folder in discover(parent)]
        for dataset in self.datasets:
            self._check(dataset, model)

    @cached_property
    def all(self) -> Packs:
        """Every pack, in stored order."""
        return Packs(self.datasets)

    @cached_property
    def epochs(self) -> list[Packs]:
        """For each sampled epoch its parts, concatenated."""
        numbers = sorted({dataset.manifest.epoch for dataset in self.datasets})
        return [Packs([d for d in self.datasets if d.manifest.epoch == number]) for number in numbers]

    @property
    def digest(self) -> str:
        """Digest of all data."""
        return self.all.digest

    @cached_property
    def names(self) -> set[str]:
        """Names of the datasets that samples come from: the data paths that were sampled."""
        names = set()
        for dataset in self.datasets:
            paths = set(dataset.manifest.ratios)
            # Packed from one output of filter: its samples have the name of their dataset class.
            first = dataset.read_batch(0) if paths == {"."} and len(dataset) else []
            names |= {name for pack in first for name in pack.dataset} if first else paths
        return names

    @property
    def vision_budget(self) -> int:
        """The most patches any pack has; 0 = text only."""
        return int(self.all.column("pack_patches").max(initial=0))

    def _check(self, dataset: PackedDataset, model: Fingerprint) -> None:
        manifest, uri = dataset.manifest, dataset.folder.uri
        if manifest.length != self.length:
            raise DatasetError(
                f"{uri} is packed to length {manifest.length}, but the config has length: {self.length}: "
                f"set length: {manifest.length}, or pack the data with --length {self.length}"
            )
        if not model.is_of(manifest.tokenizer, dataset.folder / "tokenizer"):
            built, own = difference(manifest.processor, model.processor)
            if not built:
                built, own = f"the tokenizer {manifest.tokenizer}", f"the tokenizer {model.digest}"
            raise DatasetError(
                f"{uri} was built for a model with {built}, but the model folder has {own}: build and pack the data "
                "with the model folder as --tokenizer, or train the model that it was built for"
            )
