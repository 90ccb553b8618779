"""A check of a checkpoint's every byte and value, without a model or a process group."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import torch
from torch import Tensor

from kanyun.errors import UserError
from kanyun.storage import Folder
from trainer.checkpoint.metadata import read_metadata, refuse_code
from trainer.checkpoint.state import Marker
from trainer.checkpoint.store import DamagedError, require_whole

_THREADS = 4  # files digested at a time


def require_digests(step: Folder, wanted: Callable[[str], bool] = lambda name: True, where: str = "") -> bool:
    """Compare files of a checkpoint with their recorded digests, all of them or those whose name is wanted.

    Return False if none is recorded: checkpoints made before digests were. Raises DamagedError naming the first file
    that differs.
    """
    require_whole(step)
    recorded = Marker.read(step).files
    if recorded is None:
        return False
    with ThreadPoolExecutor(_THREADS) as pool:
        names = [name for name in recorded if wanted(name)]
        for name, digest in zip(names, pool.map(step.digest, names), strict=True):
            if digest != recorded[name].xxh3:
                raise DamagedError(
                    f"{where or step.uri}/{name} is damaged (its digest is {digest}, recorded is "
                    f"{recorded[name].xxh3}): use another checkpoint"
                )
    return True


def faults(step: Folder) -> list[str]:
    """Return a sentence for each thing that is wrong with a checkpoint: files, then values. Memory: one tensor."""
    try:
        require_whole(step)
        recorded = Marker.read(step).files or {}
        with ThreadPoolExecutor(_THREADS) as pool:
            digests = dict(zip(recorded, pool.map(step.digest, recorded), strict=True))
        sentences = [
            f"{step.uri}/{name} is damaged: its digest is {digests[name]}, recorded is {file.xxh3}"
            for name, file in recorded.items()
            if digests[name] != file.xxh3
        ]
        if not sentences:
            refuse_code(step)
            sentences = list(_not_finite(step))
    except UserError as error:
        return [str(error)]
    return sentences


def is_finite(values: Tensor) -> Tensor:
    """Return whether no value is NaN or infinite, as a bool of shape []. A NaN is both the minimum and the maximum.

    torch.isfinite takes a byte for each value: 3.7 s of CPU time for a GB of bfloat16, this 0.3.
    """
    return torch.isfinite(torch.stack(values.aminmax())).all() if values.numel() else torch.tensor(True)


def _not_finite(step: Folder) -> Iterator[str]:
    for record in read_metadata(step):
        if record.shape is None:
            continue
        try:
            data = step.read(record.file, record.offset, record.size)
            tensor = torch.load(BytesIO(data), weights_only=True)
        except Exception as error:
            yield f"{step.uri}: {record.key} cannot be read ({str(error).splitlines()[0]})"
            continue
        if not is_finite(tensor):
            bad = int((~torch.isfinite(tensor)).sum())
            yield f"{step.uri}: {record.key} has {bad:,} values that are NaN or infinite"
