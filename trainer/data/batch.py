"""One micro-batch: packs end to end, as the tensors that the model reads."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from kanyun.errors import DatasetError
from kanyun.schema import Pack
from trainer.data.mrope import mrope_positions
from trainer.data.patches import PatchGeometry, layout_of
from trainer.data.pixels import write_patches
from trainer.data.shapes import StaticShape
from trainer.models.config import ModelConfig
from trainer.models.registry import family_of


@dataclass(frozen=True)
class VisionBatch:
    """The images of a micro-batch, as patches in the order in which the family's tower reads them (see ImageLayout).

    P patches of C x 14 x 14 pixels (16 x 16 in Qwen3-VL); 4 neighbouring patches (2 x 2) are merged into one of
    M = P / 4 visual tokens. Reordering is done here, by index, in the loader: the tower itself never permutes.
    """

    patches: Tensor  # [P, C * side * side] uint8, channel major; normalised on the device
    token_index: Tensor  # [M] int64: where visual token j goes in the pack; T (one past the end) for padding
    per_patch: Mapping[str, Tensor]  # [P, ...]: "positions" [P, 2] int32, row and column of the patch in its image; ...
    # [segments + 1] int32, cumulative patches, last entry P: "images" (one entry a grid's temporal step); ...
    segments: Mapping[str, Tensor]

    def map(self, change: Callable[[Tensor], Tensor]) -> "VisionBatch":
        """Return a batch of changed tensors."""
        per_patch, segments = (
            {name: change(tensor) for name, tensor in tensors.items()} for tensors in (self.per_patch, self.segments)
        )
        return VisionBatch(change(self.patches), change(self.token_index), per_patch, segments)

    def tensors(self) -> list[Tensor]:
        """Return every tensor, in a fixed order."""
        return [self.patches, self.token_index, *self.per_patch.values(), *self.segments.values()]

    def empty(self, patches: int) -> "VisionBatch":
        """Return a batch of zeros with room for `patches`, and the segments of this one."""
        unit = len(self.patches) // len(self.token_index)  # patches a visual token
        return VisionBatch(
            patches=self.patches.new_zeros(patches, self.patches.shape[1]),
            token_index=self.token_index.new_zeros(patches // unit),
            per_patch={name: x.new_zeros(patches, *x.shape[1:]) for name, x in self.per_patch.items()},
            segments=self.segments,
        )


@dataclass(frozen=True)
class Batch:
    """T = micro-batch x length token slots, one long sequence; segments never see one another."""

    input_ids: Tensor  # [T] int64
    labels: Tensor  # [T] int64: the next token of the same segment (0 where there is none)
    loss_mask: Tensor  # [T] float32: 1 where the label is a trained token
    # [3, T] int64: temporal, height, width. They restart in each segment; text has three equal rows.
    position_ids: Tensor
    cu_seqlens: Tensor  # [segments + 1] int32: the masked tail of a pack is its own segment; last entry T
    datasets: Tensor  # [T] uint8: number of the sample's dataset in BatchFormat.datasets; one past its end: another
    vision: VisionBatch | None  # None only for a text model

    @property
    def real_patches(self) -> int:
        """Patches of images, without padding, of a batch on the CPU."""
        if self.vision is None:
            return 0
        tokens = int((self.vision.token_index < len(self.input_ids)).sum())
        return tokens * len(self.vision.patches) // len(self.vision.token_index)

    def to(self, device: torch.device) -> "Batch":
        """Return a copy on `device`; from pinned memory it does not block the host."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """Return a batch of changed tensors."""
        changed = {f.name: change(getattr(self, f.name)) for f in fields(Batch) if f.name != "vision"}
        return Batch(**changed, vision=self.vision.map(change) if self.vision else None)


@dataclass(frozen=True)
class BatchFormat:
    """What a batch's tensors depend on besides the packs."""

    geometry: PatchGeometry | None  # None: a text model
    image_token_id: int = -1
    static: StaticShape | None = None  # None: as large as the packs need
    pinned: bool = False  # in page-locked memory, for copies that do not block
    datasets: tuple[str, ...] = ()  # names of those whose loss is reported separately

    @classmethod
    def of(
        cls,
        model: ModelConfig,
        static: StaticShape | None = None,
        pinned: bool = False,
        datasets: tuple[str, ...] = (),
    ) -> "BatchFormat":
        """Return the format of batches for this model."""
        image_token_id = -1 if model.image_token_id is None else model.image_token_id
        return cls(family_of(model).geometry(model), image_token_id, static, pinned, datasets)


def make_batch(packs: Sequence[Pack], batch_format: BatchFormat) -> Batch:
    """Decode images and lay out packs end to end.

    A model with a vision tower always gets some patches, padding if need be, so that the tower runs, and its gradients
    are reduced, on every rank in every step. Raises DatasetError naming the pack (and image) at fault.
    """
    input_ids = np.concatenate([pack.input_ids for pack in packs]).astype(np.int64)
    trained = np.concatenate([pack.loss_mask for pack in packs])
    length = len(packs[0].input_ids)
    cu_seqlens = np.concatenate([[0], *(i * length + pack.cu_seqlens[1:] for i, pack in enumerate(packs))])

    static = batch_format.static
    labels, loss_mask = np.zeros_like(input_ids), np.zeros(len(input_ids), np.float32)
    labels[:-1], loss_mask[:-1] = input_ids[1:], trained[1:]
    last = cu_seqlens[1:] - 1  # nothing follows the last token of a segment
    labels[last], loss_mask[last] = 0, 0

    arrays: dict[str, np.ndarray] = {
        "input_ids": input_ids,
        "labels": labels,
        "loss_mask": loss_mask,
        "position_ids": np.concatenate([_positions(pack, batch_format) for pack in packs], axis=1),
        "cu_seqlens": _cumulative(cu_seqlens, "segments", static.segments if static else None),
        "datasets": np.concatenate([_datasets(pack, batch_format.datasets) for pack in packs]),
    }
    vision = _vision(packs, input_ids, batch_format.geometry, batch_format) if batch_format.geometry else None
    return Batch(**{name: _tensor(array, batch_format) for name, array in arrays.items()}, vision=vision)


def _positions(pack: Pack, batch_format: BatchFormat) -> np.ndarray:
    merge = batch_format.geometry.merge if batch_format.geometry else 1
    try:
        return mrope_positions(
            pack.input_ids, pack.cu_seqlens, pack.image_grid_thw[:, 1:] // merge, batch_format.image_token_id
        )
    except ValueError as error:
        raise DatasetError(
            f"pack {pack.pack_id} does not fit the model ({error}): pack the data with the model's own tokenizer folder"
        ) from error


def _datasets(pack: Pack, names: tuple[str, ...]) -> np.ndarray:
    """Return the number of each slot's dataset, [length] uint8; of the tail any, as nothing is trained there."""
    numbers = [names.index(name) if name in names else len(names) for name in pack.dataset]
    segments = np.diff(pack.cu_seqlens)
    return np.repeat(np.array([*numbers, 0], np.uint8)[: len(segments)], segments)


def _vision(
    packs: Sequence[Pack], input_ids: np.ndarray, geometry: PatchGeometry, batch_format: BatchFormat
) -> VisionBatch:
    unit, static = geometry.merge**2, batch_format.static  # unit: patches a visual token
    used = sum(pack.patches for pack in packs)
    sizes = static.patches if static else (-(-max(used, 1) // geometry.multiple) * geometry.multiple,)
    total = next((size for size in sizes if size >= used), None)
    if total is None:
        raise DatasetError(f"{used} patches in packs {_names(packs)}, but the layout has room for {sizes[-1]}")
    patches = torch.empty(total, geometry.pixels, dtype=torch.uint8, pin_memory=batch_format.pinned)
    patches[used:] = 0
    token_index = np.full(total // unit, len(input_ids), np.int64)
    slots = np.flatnonzero(input_ids == batch_format.image_token_id)  # of visual tokens in the text, images in order
    layouts, start = [], 0
    for pack in packs:
        for number, (data, (_, height, width)) in enumerate(
            zip(pack.images, pack.image_grid_thw.tolist(), strict=True)
        ):
            end = start + height * width
            try:
                layout = write_patches(patches[start:end].numpy(), data, (height, width), geometry)
            except Exception as error:  # Pillow's plugins raise whatever they meet
                raise DatasetError(
                    f"image {number} of pack {pack.pack_id} ({len(data)} bytes) cannot be decoded ({error!r}): find "
                    "its sample in the dataset's lineage/, take it out and pack again"
                ) from error
            token_index[start // unit : end // unit] = slots[start // unit + layout.tokens]
            layouts.append(layout)
            start = end
    per_patch, segments = {}, {}
    for name, nothing in layout_of(geometry, geometry.merge, 0).per_patch.items():  # of an image without patches
        rows = np.concatenate([nothing, *(layout.per_patch[name] for layout in layouts)])
        per_patch[name] = np.pad(rows, ((0, total - used), *[(0, 0)] * (rows.ndim - 1)))
    for name, length in geometry.padding.items():
        of_images = (layout.segments[name] for layout in layouts)
        ends = np.cumsum(np.concatenate([np.zeros(1, np.int32), *of_images, _pieces(total - used, length)]))
        segments[name] = _cumulative(ends, name, static.vision[name] if static else None)
    return VisionBatch(
        patches=patches,
        token_index=_tensor(token_index, batch_format),
        per_patch={name: _tensor(array, batch_format) for name, array in per_patch.items()},
        segments={name: _tensor(array, batch_format) for name, array in segments.items()},
    )


def _pieces(total: int, size: int) -> np.ndarray:
    """Return the sizes of pieces of `size`, and of the rest, that add up to `total`."""
    return np.diff(np.append(np.arange(0, total, size), total)).astype(np.int32) if total else np.empty(0, np.int32)


def _cumulative(ends: np.ndarray, what: str, count: int | None) -> np.ndarray:
    """Return cumulative lengths as int32, padded with the last entry to a static `count` of segments."""
    if count is None:
        return ends.astype(np.int32)
    if len(ends) - 1 > count:
        raise DatasetError(f"{len(ends) - 1} {what} in one micro-batch, but the layout has room for {count}")
    return np.pad(ends, (0, count + 1 - len(ends)), mode="edge").astype(np.int32)


def _tensor(array: np.ndarray, batch_format: BatchFormat) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor.pin_memory() if batch_format.pinned else tensor


def _names(packs: Sequence[Pack]) -> str:
    return ", ".join(str(pack.pack_id) for pack in packs)
