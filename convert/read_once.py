"""Files that are read and digested in one pass."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from convert.memory import PIECE, pieces, read_into
from trainer.checkpoint.state import FileDigest
from trainer.checkpoint.store import DamagedError


class ReadOnce:
    """A file that threads read from its start towards its end, and that is digested while they do.

    What a thread skips is read for the digest alone; what lies before the point that was reached is read without it.
    """

    def __init__(self, path: Path, recorded: FileDigest | None) -> None:
        """`recorded`: None if the checkpoint was made before digests were."""
        self._path, self._recorded = path, recorded
        self._total, self._at, self._lock = xxhash.xxh3_128(), 0, threading.Lock()

    def read(self, begin: int, memory: Tensor) -> None:
        """Fill `memory` [n] uint8 with the bytes from `begin`. Raises DamagedError as `check`, UserError if the file
        ends before.
        """
        with self._opened() as file:
            with self._lock:
                ahead = begin >= self._at
                if ahead:
                    self._digest_up_to(file, begin)
                    self._read_on(file, memory)
            if not ahead:
                read_into(file, begin, memory)

    def check(self) -> None:
        """Digest what is left. Raises DamagedError if the file has not its digest, or cannot be read."""
        if self._recorded is None:
            return
        with self._opened() as file:
            self._digest_up_to(file, self._recorded.size)
        if self._total.hexdigest() != self._recorded.xxh3:
            raise DamagedError(
                f"{self._path} is damaged (its digest is {self._total.hexdigest()}, recorded is "
                f"{self._recorded.xxh3}): use another checkpoint"
            )

    @contextmanager
    def _opened(self) -> Iterator[FileIO]:
        """Open the file each time, as many ranks' files are more than a process may hold open.

        A run that goes on may have deleted it: its newer checkpoint is then as good.
        """
        try:
            with FileIO(self._path) as file:
                yield file
        except OSError as error:
            reason = error.strerror or error
            raise DamagedError(f"{self._path} cannot be read ({reason}): use another checkpoint") from error

    def _read_on(self, file: FileIO, memory: Tensor) -> None:
        for piece in pieces(memory):  # digested while a core's cache holds it
            read_into(file, self._at, piece)
            self._total.update(piece.numpy())
            self._at += len(piece)

    def _digest_up_to(self, file: FileIO, end: int) -> None:
        memory = torch.empty(min(PIECE, end - self._at), dtype=torch.uint8)
        while self._at < end:
            self._read_on(file, memory[: end - self._at])
