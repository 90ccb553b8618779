"""Checkpoints: megatron.core's distributed format, asynchronous, digested, whole or not there at all.

What looks for checkpoints needs no torch and is here. `faults` checks their content, `reader` loads one, `saver`
writes them.
"""

from trainer.checkpoint.state import State
from trainer.checkpoint.store import (
    DamagedError,
    checkpoints_of,
    find,
    latest,
    look_up,
    read_state,
    require_whole,
    require_writable,
    resolve,
    set_aside,
    step_name,
    steps_of,
    sync_file,
)

__all__ = [
    "DamagedError",
    "State",
    "checkpoints_of",
    "find",
    "latest",
    "look_up",
    "read_state",
    "require_whole",
    "require_writable",
    "resolve",
    "set_aside",
    "step_name",
    "steps_of",
    "sync_file",
]
