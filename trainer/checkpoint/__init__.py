"""Checkpoints: megatron.core's distributed format, asynchronous, digested, whole or not there at all.

What looks for checkpoints and checks them needs no megatron.core and is here; `reader` loads one, `saver` writes them.
"""

from trainer.checkpoint.metadata import read_metadata
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
from trainer.checkpoint.verify import is_finite, require_digests

__all__ = [
    "DamagedError",
    "State",
    "checkpoints_of",
    "find",
    "is_finite",
    "latest",
    "look_up",
    "read_metadata",
    "read_state",
    "remove_leftovers",
    "require_digests",
    "require_whole",
    "resolve",
    "set_aside",
    "step_name",
    "sync_file",
]
