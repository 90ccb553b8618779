"""Raw data, one small class a kind: every class of every file in this folder is a `--dataset`."""

import importlib
import pkgutil

from kanyun.errors import UserError
from pipeline.datasets.base import Dataset


def dataset(name: str) -> Dataset:
    """Raises UserError naming the known ones."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    if name not in Dataset.known:
        raise UserError(
            f"unknown dataset {name!r}, known are {', '.join(sorted(Dataset.known))}: "
            "choose one, or add a class to pipeline/datasets/"
        )
    return Dataset.known[name]()
