"""Saves beside training: the loop waits for a copy in host memory alone, threads write it.

Each rank writes its own files. The ranks' writing threads speak over a process group that nobody else uses: rank 0's
makes the hidden folder, all write, rank 0's collects tables and digests, writes state.json and renames. Every rank
learns the outcome. A save that fails leaves the checkpoint before as it was, and the next one tries again.
"""

import shutil
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.optimizer import ChainedOptimizer

from kanyun.errors import UserError
from kanyun.fingerprint import copy_tokenizer
from kanyun.storage import Folder
from trainer.checkpoint.metadata import FORMAT, METADATA, Record, encode_metadata
from trainer.checkpoint.parts import HostBuffer, Part, Saved, buffer_size, parts_of
from trainer.checkpoint.state import STATE, FileDigest, Marker, State
from trainer.checkpoint.store import (
    attempt_folder,
    begin_attempt,
    checkpoints_of,
    publish,
    require_whole,
    step_name,
)
from trainer.checkpoint.writer import write_bytes, write_parts
from trainer.runtime import host_room

MOST_FAILURES = 3  # saves that fail in a row end the run
_TIMEOUT = timedelta(hours=6)  # of a save: a slow disk is no fault


@dataclass(frozen=True)
class Save:
    """One checkpoint on its way."""

    state: State
    parts: Sequence[Part]

    @property
    def name(self) -> str:
        return step_name(self.state.step)


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
        self._owns = owns
        self._output, self._hf, self._keep_last, self._local_ranks = output, hf, keep_last, local_ranks
        self._group = dist.new_group(backend="gloo", timeout=_TIMEOUT)
        self._rank = dist.get_rank()
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
                f"host memory has {_bytes(room)} free a rank, a copy for saves beside training needs "
                f"{_bytes(needed)}: training waits while a checkpoint is written"
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
        if self._rank != 0 or not self._output.is_local:
            return []
        kept = sum(size for _, size in checkpoints_of(self._output).files())
        room, needed = shutil.disk_usage(self._output.path).free + kept, (self._keep_last + 1) * total
        if room >= needed:
            return []
        return [
            f"{self._output.path} has room for {_bytes(room)} of checkpoints, keep_last {self._keep_last} and the "
            f"one being written need {_bytes(needed)}: make room, or set keep_last lower"
        ]

    def _run(self, save: Save) -> None:
        """In the writing thread: every rank makes the same calls, whatever fails."""
        try:
            error = self.write(save)
        except BaseException as fatal:
            self._fatal = fatal
            return
        if error is None:
            self.failures, self.last, self._error = 0, save.name, None
            return
        self.failures, self._told = self.failures + 1, False
        kept = f"{self.last} stays the last" if self.last else "there is none before it"
        self._error = f"checkpoint {save.name} was not written ({error}); {kept}, the next save tries again"

    def write(self, save: Save) -> str | None:
        """Write a checkpoint. Return what went wrong on some rank, or None."""
        attempt = attempt_folder(self._output, save.name)
        sizes = self._gather(sum(part.size for part in save.parts))
        error = self._from_first(lambda: self._begin(save, sum(sizes)))
        if error is None:
            written, failed = _attempted(lambda: write_parts(attempt, self._rank, save.parts))
            outcomes = self._gather((written, failed))
            errors = [failed for _, failed in outcomes if failed is not None]
            ranks = [written for written, _ in outcomes if written is not None]
            error = errors[0] if errors else self._from_first(lambda: self._publish(attempt, save, ranks))
        if error is not None and self._rank == 0:
            with suppress(UserError, OSError):
                attempt.delete()
        return error

    def _begin(self, save: Save, size: int) -> None:
        begin_attempt(self._output, save.name)
        if self._output.is_local and (free := shutil.disk_usage(self._output.path).free) < size:
            raise UserError(f"{self._output.path} has {_bytes(free)} free, {_bytes(size)} are needed: make room there")

    def _publish(
        self, attempt: Folder, save: Save, ranks: Sequence[tuple[list[Record], dict[str, FileDigest]]]
    ) -> None:
        files: dict[str, FileDigest] = {}
        for _, of_rank in ranks:
            files |= of_rank
        files[METADATA] = write_bytes(attempt, METADATA, encode_metadata(r for records, _ in ranks for r in records))
        files["metadata.json"] = write_bytes(attempt, "metadata.json", FORMAT)
        copy_tokenizer(self._hf, attempt / "hf")
        for name in ("config.json", "generation_config.json"):
            if self._hf.exists(name):
                (attempt / "hf").write(name, self._hf.read(name))
        for name, size in (attempt / "hf").files():
            files[f"hf/{name}"] = FileDigest(size, (attempt / "hf").digest(name))
        if self._owns is not None and not self._owns():
            raise UserError(f"another run took this one for dead and writes {self._output.path}: end one of them")
        attempt.write(STATE, Marker(save.state, files).encode())
        _wait_until_whole(attempt)
        publish(self._output, attempt, save.name, self._keep_last)

    def _gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks on rank 0, and the outcome-relevant ones everywhere."""
        values: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(values, value, group=self._group)
        return values

    def _from_first(self, action: Any) -> str | None:
        """Let rank 0 do it. Return on every rank what went wrong, or None."""
        outcome: list[Any] = [_attempted(action)[1] if self._rank == 0 else None]
        dist.broadcast_object_list(outcome, src=0, group=self._group)
        error: str | None = outcome[0]
        return error


def _wait_until_whole(attempt: Folder) -> None:
    """Raises UserError if a file is missing or short for 30 s: that long, NFS may not show what other nodes wrote."""
    end = time.monotonic() + 30
    while True:
        try:
            require_whole(attempt)
            return
        except UserError:
            if time.monotonic() > end:
                raise
        time.sleep(3)


def _bytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _attempted(action: Any) -> tuple[Any, str | None]:
    """Return the result and None, or None and the error for people."""
    try:
        return action(), None
    except (UserError, OSError) as error:
        return None, str(error)
    except Exception:
        return None, traceback.format_exc()


def save(
    output: Folder, state: State, model: Saved, optimizer: ChainedOptimizer | None, hf: Folder, keep_last: int = 1
) -> Folder:
    """Write one checkpoint of the run in `output` and wait for it; see Saver. Every rank calls it.

    Raises UserError if it cannot be written.
    """
    return save_parts(output, state, parts_of(model, optimizer, check=True), hf, keep_last)


def save_parts(output: Folder, state: State, parts: Sequence[Part], hf: Folder, keep_last: int = 1) -> Folder:
    """Write one checkpoint of these parts, whose values are asked for as they are written. Every rank calls it.

    Raises UserError if it cannot be written.
    """
    if error := Saver(output, hf, keep_last=keep_last).write(Save(state, parts)):
        raise UserError(error)
    return checkpoints_of(output) / step_name(state.step)
