"""One checkpoint, written by all ranks together.

Each rank writes its own files. Rank 0 makes the hidden folder, all write, rank 0 collects tables and digests, writes
state.json and renames. Every rank learns the outcome. One that fails leaves the checkpoint before as it was.
"""

import shutil
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from errno import EDQUOT, ENOSPC
from typing import Any

import torch.distributed as dist

from kanyun.errors import UserError
from kanyun.fingerprint import copy_tokenizer
from kanyun.storage import Folder
from trainer.checkpoint.metadata import FORMAT, METADATA, Record, encode_metadata
from trainer.checkpoint.parts import Part
from trainer.checkpoint.state import STATE, FileDigest, Marker, State
from trainer.checkpoint.store import (
    attempt_folder,
    begin_attempt,
    checkpoints_of,
    publish,
    require_whole,
    step_name,
    steps_of,
    sync_file,
)
from trainer.checkpoint.writer import write_bytes, write_parts
from trainer.report.history import METRICS


@dataclass(frozen=True)
class Save:
    """One checkpoint on its way."""

    state: State
    parts: Sequence[Part]

    @property
    def name(self) -> str:
        return step_name(self.state.step)


@dataclass(frozen=True)
class JointWriter:
    """Writes checkpoints of a run. Every rank makes it and makes the same calls."""

    output: Folder
    hf: Folder  # whose config.json, tokenizer and processor settings are copied
    keep_last: int = 1
    owns: Callable[[], bool] | None = None  # on rank 0, whether the output is still this run's
    group: dist.ProcessGroup | None = None  # of the ranks that write; None: this process alone

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group) if self.group is not None else 0

    def write(self, save: Save) -> str | None:
        """Write a checkpoint. Return what went wrong on some rank, or None."""
        attempt = attempt_folder(self.output, save.name)
        size = sum(self._gather(sum(part.size for part in save.parts)))
        error = self._from_first(lambda: self._begin(save, size), size)
        if error is None:
            written, failed = self._attempted(lambda: write_parts(attempt, self.rank, save.parts), size)
            outcomes = self._gather((written, failed))
            errors = [failed for _, failed in outcomes if failed is not None]
            ranks = [written for written, _ in outcomes if written is not None]
            error = errors[0] if errors else self._from_first(lambda: self._publish(attempt, save, ranks), size)
        if error is not None and self.rank == 0:
            with suppress(UserError, OSError):
                self._require_claim()  # else it may be the attempt of the run that took this one's place
                attempt.delete()
        return error

    def _begin(self, save: Save, size: int) -> None:
        self._require_claim()
        begin_attempt(self.output, save.name)
        if self.output.is_local:
            require_room(disk_of(self.output), size)

    def _publish(
        self, attempt: Folder, save: Save, ranks: Sequence[tuple[list[Record], dict[str, FileDigest]]]
    ) -> None:
        files: dict[str, FileDigest] = {}
        for _, of_rank in ranks:
            files |= of_rank
        files[METADATA] = write_bytes(attempt, METADATA, encode_metadata(r for records, _ in ranks for r in records))
        files["metadata.json"] = write_bytes(attempt, "metadata.json", FORMAT)
        copy_tokenizer(self.hf, attempt / "hf")
        for name in ("config.json", "generation_config.json"):
            if self.hf.exists(name):
                (attempt / "hf").write(name, self.hf.read(name))
        for name, size in (attempt / "hf").files():
            files[f"hf/{name}"] = FileDigest(size, (attempt / "hf").digest(name))
        self._require_claim()
        if self.output.is_local and self.output.exists(METRICS):  # after a power cut, it has the steps up to this one
            sync_file(f"{self.output.path}/{METRICS}")
        attempt.write(STATE, Marker(save.state, files).encode())
        _wait_until_whole(attempt)
        publish(self.output, attempt, save.name, self.keep_last)

    def _require_claim(self) -> None:
        """Raises UserError if the output is not this run's: nothing is written below the mount point of its disk."""
        if self.owns is not None and not self.owns():
            raise UserError(
                f"{self.output.path} has lost this run's claim: mount its disk again if that is away; if another run "
                "took this one for dead and writes there, end one of them"
            )

    def _gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(values, value, group=self.group)
        return values

    def _from_first(self, action: Any, size: int) -> str | None:
        """Call `action` on rank 0. Return on every rank what went wrong there, or None."""
        outcome: list[Any] = [self._attempted(action, size)[1] if self.rank == 0 else None]
        if self.group is not None:
            dist.broadcast_object_list(outcome, src=0, group=self.group)
        error: str | None = outcome[0]
        return error

    def _attempted(self, action: Any, size: int) -> tuple[Any, str | None]:
        """Call `action`. Return its result and None, or None and its error as a sentence.

        `size`: bytes of the checkpoint, which the sentence names if the disk is full.
        """
        try:
            return action(), None
        except (UserError, OSError) as error:
            cause = error.__cause__ or error
            if self.output.is_local and isinstance(cause, OSError) and cause.errno in (ENOSPC, EDQUOT):
                return None, _full(disk_of(self.output), size, cause)
            return None, str(error)
        except Exception:
            return None, traceback.format_exc()


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


def write_alone(output: Folder, state: State, parts: Sequence[Part], hf: Folder) -> None:
    """Write a checkpoint of these parts, whose values are asked for as they are written. No process group is needed.

    Raises UserError if it cannot be written.
    """
    if error := JointWriter(output, hf).write(Save(state, parts)):
        raise UserError(error)


def disk_of(output: Folder) -> str:
    """Return a path on the disk that a run's checkpoints go to: their folder may be a link to a larger one."""
    root = checkpoints_of(output)
    return root.path if root.exists() else output.path


def room_of(output: Folder) -> int:
    """Return the bytes that a run's checkpoints may take on their local disk: what is free, and what they take now.

    Steps that were moved aside stay, so theirs do not count.
    """
    root, steps = checkpoints_of(output), set(steps_of(output))
    taken = sum(size for name, size in root.files() if name.partition("/")[0] in steps)
    return shutil.disk_usage(disk_of(output)).free + taken


def require_room(path: str, size: int) -> None:
    """Raises UserError if the disk of a local path has less than `size` bytes free."""
    if shutil.disk_usage(path).free < size:
        raise UserError(_no_room(path, size))


def _no_room(path: str, size: int) -> str:
    return f"{path} has {amount(shutil.disk_usage(path).free)} free, {amount(size)} are needed: make room there"


def _full(path: str, size: int, error: OSError) -> str:
    """Return a sentence on a write that was refused for want of room, of which the disk itself may have enough."""
    if shutil.disk_usage(path).free < size:
        return _no_room(path, size)
    return f"{_no_room(path, size).partition(':')[0]} ({error.strerror}): see to your quota, and to inodes (df -i)"


def amount(count: float) -> str:
    """Return a number of bytes as text, in GB or MB."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
