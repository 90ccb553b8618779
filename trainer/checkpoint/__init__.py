"""Checkpoints: megatron.core's distributed format, asynchronous, digested, whole or not there at all."""

from trainer.checkpoint.metadata import read_metadata
from trainer.checkpoint.parts import Part
from trainer.checkpoint.reader import load, require_digests, require_finite
from trainer.checkpoint.saver import Saver, save, save_parts
from trainer.checkpoint.state import State
from trainer.checkpoint.store import (
    DamagedError,
    checkpoints_of,
    find,
    latest,
    look_up,
    read_state,
    remove_leftovers,
    require_whole,
    resolve,
    set_aside,
    step_name,
    sync_file,
)

__all__ = [
    "DamagedError",
    "Part",
    "Saver",
    "State",
    "checkpoints_of",
    "find",
    "latest",
    "load",
    "look_up",
    "read_metadata",
    "read_state",
    "remove_leftovers",
    "require_digests",
    "require_finite",
    "require_whole",
    "resolve",
    "save",
    "save_parts",
    "set_aside",
    "step_name",
    "sync_file",
]
