"""Images are decoded in a child process: one that crashes it, hangs or takes all memory costs its row alone."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from functools import lru_cache

from pipeline.checks import DECODE_SECONDS, Reason, RowError
from pipeline.images.decoding import REPLY, REQUEST, WALL_SECONDS

TRIES = 2  # a process that dies may have been killed for what others did


@dataclass(frozen=True)
class Decoded:
    width: int  # pixels, after EXIF rotation: as transformers sees it
    height: int
    image_hash: int  # 64 bits of a perceptual hash, signed


class Decoder:
    """A child process that decodes one image after the other, restarted after it dies. Not thread-safe."""

    def __init__(self, cpu_seconds: float = DECODE_SECONDS):
        self._cpu_seconds = cpu_seconds
        self._process: subprocess.Popen[bytes] | None = None

    def probe(self, data: bytes, name: str) -> Decoded:
        """Decode an image and return its size and hash. Raises RowError, with `name` in its evidence."""
        try:
            answer = json.loads(self._ask(data, 0))
        except ChildProcessError as error:
            raise RowError(Reason.PROCESSOR_FAILED, f"{name!r} ({len(data)} bytes): {error}") from error
        if "reason" in answer:
            raise RowError(Reason(answer["reason"]), f"{name!r}: {answer['evidence']}")
        return Decoded(**answer)

    def thumbnail(self, data: bytes, side: int) -> bytes | None:
        """A JPEG of at most side x side pixels, None if the image cannot be decoded."""
        try:
            return self._ask(data, side) or None
        except ChildProcessError:
            return None

    def close(self) -> None:
        if self._process is not None:
            self._process.communicate()  # closes the pipe, on which it ends
            self._process = None

    def _ask(self, data: bytes, side: int) -> bytes:
        """Raises ChildProcessError if the process dies of it."""
        for _ in range(TRIES):
            process = self._running()
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                process.stdin.write(REQUEST.pack(len(data), side))
                process.stdin.write(data)
                process.stdin.flush()
                header = process.stdout.read(REPLY.size)
            except BrokenPipeError:
                header = b""
            if header:
                return process.stdout.read(*REPLY.unpack(header))
            process.communicate()  # closes the pipes
            code = process.returncode
            if -code == signal.SIGPROF:
                raise ChildProcessError(f"decoding it takes over {self._cpu_seconds:g} s of CPU time")
            if -code == signal.SIGALRM:
                raise ChildProcessError(f"decoding it takes over {self._cpu_seconds * WALL_SECONDS:g} s")
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        raise ChildProcessError(f"decoding it ended the decoder's process, {TRIES} times ({how})")

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            # Spark puts this code on sys.path
            environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
            command = [sys.executable, "-m", "pipeline.images.decoding", str(self._cpu_seconds)]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
            assert self._process.stdout is not None
            if len(self._process.stdout.read(REPLY.size)) < REPLY.size:
                raise RuntimeError(f"the image decoder does not start: {' '.join(command)}")
        return self._process


@lru_cache(maxsize=1)
def decoder() -> Decoder:
    """Return the decoder of this Python worker, which Spark reuses for task after task."""
    return Decoder()
