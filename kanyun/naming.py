"""File names of a packed dataset, and the search for packed datasets below a folder."""

import re

from kanyun.errors import DatasetError
from kanyun.storage import Folder

FORMAT_VERSION = 4
MANIFEST = "manifest.json"
BATCHES = "batches.arrow"
_PACKED = re.compile(r"packed_length_(\d+)_(\d+)_epoch_(\d+)_v(\d+)")


def dataset_name(length: int, part: int, epoch: int) -> str:
    """Return the folder name of a packed dataset. It is never parsed: the manifest has the values."""
    return f"packed_length_{length}_{part}_epoch_{epoch}_v{FORMAT_VERSION}"


def shard_name(index: int, count: int) -> str:
    return f"shard-{index:05d}-of-{count:05d}.arrow"


def lineage_name(index: int, count: int) -> str:
    return f"lineage/lineage-{index:05d}-of-{count:05d}.parquet"


def discover(parent: str) -> list[Folder]:
    """Return the packed datasets directly below `parent` (or `parent` itself), sorted by name.

    Raises DatasetError if there is none, or if a folder with the name of a packed dataset has no manifest.
    """
    root = Folder(parent)
    if root.exists(MANIFEST):
        return [root]
    folders = [root / name for name in sorted(root.names()) if _PACKED.fullmatch(name)]
    if not folders:
        raise DatasetError(
            f"no packed dataset (packed_length_N_PART_epoch_EPOCH_v{FORMAT_VERSION}) below {parent}: "
            "give the parent folder that `python -m pipeline pack` wrote into"
        )
    for folder in folders:
        if not folder.exists(MANIFEST):
            raise DatasetError(
                f"{folder.uri} has no {MANIFEST}, so it is not a finished dataset: run the pack job again, "
                "or move the folder away"
            )
    return folders
