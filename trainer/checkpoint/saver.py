"""Saves beside training: the loop waits for a copy in host memory alone, threads write it.

The ranks' writing threads speak over a process group that nobody else uses; together.py says what they do. After a
save that fails the next one tries again.
"""

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.optimizer import ChainedOptimizer

from kanyun.errors import UserError
from kanyun.storage import Folder
from trainer.checkpoint.model_parts import Saved, parts_of
from trainer.checkpoint.parts import HostBuffer, Part, buffer_size
from trainer.checkpoint.state import State
from trainer.checkpoint.store import checkpoints_of, step_name
from trainer.checkpoint.together import JointWriter, Save, amount, disk_of, room_of
from trainer.host_memory import host_room

MOST_FAILURES = 3  # saves that fail in a row end the run
_TIMEOUT = timedelta(hours=6)  # of a save: a slow disk is no fault


class Saver:
    """Writes the checkpoints of one run, at most one at a time. Every rank makes it and makes the same calls."""

    def __init__(
        self,
        output: Folder,
        hf: Folder,
        *,
        keep_last: int = 1,
        local_ranks: int = 1,
        last: str | None = None,
        owns: Callable[[], bool] | None = None,
    ) -> None:
        """`hf`: the folder whose config.json, tokenizer and processor settings are copied. `last`: name of what the run
        resumed. `owns`: on rank 0, whether the output is still this run's.
        """
        self._output, self._keep_last, self._local_ranks = output, keep_last, local_ranks
        group = dist.new_group(backend="gloo", timeout=_TIMEOUT)
        self._writer = JointWriter(output, hf, keep_last, owns=owns, group=group)
        self._buffer: HostBuffer | None = None
        self._thread: threading.Thread | None = None
        self._checked = False
        self._error: str | None = None  # of the last save
        self._told = False
        self._fatal: BaseException | None = None
        self.beside = True  # False: host memory has no room, so that training waits for the disk
        self.failures = 0  # in a row
        self.last = last  # name of the newest one that is whole

    def prepare(self, model: Saved, optimizer: ChainedOptimizer | None, device: torch.device) -> list[str]:
        """Take the host buffer that saves need. Return sentences for people: what there is no room for."""
        parts = self._parts(model, optimizer)
        size = buffer_size(parts)
        rooms: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(rooms, (size, host_room(self._local_ranks), sum(part.size for part in parts)))
        self.beside = all(needed <= room for needed, room, _ in rooms)
        sentences = []
        if self.beside:
            self._buffer = HostBuffer(size, device)
        else:
            needed, room, _ = max(rooms, key=lambda rank: rank[0] - rank[1])
            sentences.append(
                f"host memory has {amount(room)} free a rank, a copy for saves beside training needs "
                f"{amount(needed)}: training waits while a checkpoint is written"
            )
        total = sum(on_disk for _, _, on_disk in rooms)
        return sentences + self._short_of_disk(total)

    def start(self, state: State, model: Saved, optimizer: ChainedOptimizer | None) -> None:
        """Copy model and optimizer, and begin to write them. Waits for the save before.

        Raises UserError if that was the last of MOST_FAILURES in a row that failed.
        """
        self.finish()
        parts = self._parts(model, optimizer)
        if self._buffer is not None:
            parts = self._buffer.copy(parts)
        elif torch.cuda.is_available():
            torch.cuda.synchronize()  # the writing threads read the originals on another stream
        self._thread = threading.Thread(target=self._run, args=(Save(state, parts),), name="checkpoint", daemon=True)
        self._thread.start()
        if self._buffer is None:
            self.finish()

    def finish(self) -> None:
        """Wait until nothing is in flight. Raises UserError as `start`, and whatever ended the writing threads."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._fatal is not None:
            raise self._fatal
        if self.failures >= MOST_FAILURES:
            raise UserError(f"{self.failures} saves in a row failed; the last: {self._error}")

    @property
    def in_flight(self) -> bool:
        """Whether a save is being written now."""
        return self._thread is not None and self._thread.is_alive()

    def news(self) -> str:
        """Return a sentence about a save that failed, once."""
        if self._error is None or self._told or self.in_flight:
            return ""
        self._told = True
        return self._error

    def close(self) -> None:
        """Let what is in flight end, well or not, and free the host buffer."""
        if self._thread is not None:
            self._thread.join()
        if self._buffer is not None:
            self._buffer.close()

    def _parts(self, model: Saved, optimizer: ChainedOptimizer | None) -> list[Part]:
        parts = parts_of(model, optimizer, check=not self._checked)
        self._checked = True
        return parts

    def _short_of_disk(self, total: int) -> list[str]:
        if self._writer.rank != 0 or not self._output.is_local:
            return []
        room, needed = room_of(self._output), (self._keep_last + 1) * total
        if room >= needed:
            return []
        return [
            f"{disk_of(self._output)} has room for {amount(room)} of checkpoints, keep_last {self._keep_last} and the "
            f"one being written need {amount(needed)}: make room, or set keep_last lower"
        ]

    def _run(self, save: Save) -> None:
        """In the writing thread: every rank makes the same calls, whatever fails."""
        try:
            error = self._writer.write(save)
        except BaseException as fatal:
            self._fatal = fatal
            return
        if error is None:
            self.failures, self.last, self._error = 0, save.name, None
            return
        self.failures, self._told = self.failures + 1, False
        kept = f"{self.last} stays the last" if self.last else "there is none before it"
        self._error = f"checkpoint {save.name} was not written ({error}); {kept}, the next save tries again"


def save(
    output: Folder, state: State, model: Saved, optimizer: ChainedOptimizer | None, hf: Folder, keep_last: int = 1
) -> Folder:
    """Write one checkpoint of the run in `output` and wait for it; see Saver. Every rank calls it.

    Raises UserError if it cannot be written.
    """
    parts = parts_of(model, optimizer, check=True)
    writer = JointWriter(output, hf, keep_last, group=dist.group.WORLD)
    if error := writer.write(Save(state, parts)):
        raise UserError(error)
    return checkpoints_of(output) / step_name(state.step)
