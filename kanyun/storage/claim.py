"""One writer an output: a claim is a file that names its process, and whose time is refreshed while that process lives.

A writer makes its own claim first and looks for others then, so that of two which start together at least one sees the
other, and stops. A claim that is not refreshed while others watch belongs to a dead process. Only changes of a file's
time are compared, never the clocks of two machines. A process that slept may be taken for dead wrongly: whoever
publishes checks `is_there` before, so an output is never a mixture.
"""

import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from kanyun.errors import UserError
from kanyun.storage import Folder
from kanyun.storage.waits import scaled

HEARTBEAT = scaled(3)  # seconds between two refreshes of a claim
DEAD_AFTER = scaled(30)  # seconds without one
_LOOKS = 30  # at the claims of others in that time
_PREFIX = "_writer-"


@dataclass(frozen=True)
class Claim:
    """The file `name` in `folder`."""

    folder: Folder
    name: str

    @contextmanager
    def held(self) -> Iterator[None]:
        """Write the claim, refresh it every HEARTBEAT seconds, and delete it at the end of the `with` block.

        Raises FileNotFoundError if the folder is removed at the same time by a process that looks for dead claims.
        """
        since = f"{datetime.now():%Y-%m-%d %H:%M:%S}"
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "since": since, "namespace": _pid_namespace()}
        self.folder.write(self.name, json.dumps(owner).encode())
        ended = threading.Event()
        thread = threading.Thread(target=self._refresh, args=(ended,), name="claim", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            with suppress(UserError):  # where the storage fails, that error is already on its way
                self.delete()

    def is_there(self) -> bool:
        """False once another process has taken this one for dead and removed its claim."""
        return self.folder.exists(self.name)

    def delete(self) -> None:
        self.folder.delete(self.name)

    def is_surely_dead(self) -> bool:
        """Return whether its process ran where this one does, and is gone: nobody need watch it."""
        try:
            owner = json.loads(self.folder.read(self.name))
            if not owner["namespace"] or owner["namespace"] != _pid_namespace():
                return False
            os.kill(owner["pid"], 0)
        except ProcessLookupError:
            return True
        except (FileNotFoundError, ValueError, KeyError, TypeError, PermissionError):
            return False
        return False

    def owner(self) -> str:
        """Name the process that made the claim, for messages."""
        try:
            owner = json.loads(self.folder.read(self.name))
            return f"process {owner['pid']} on {owner['host']}, since {owner['since']}"
        except (FileNotFoundError, ValueError, KeyError):
            return f"the driver of {self.folder.path}"

    def refreshed(self) -> int | None:
        """Return the time of the last refresh, by the clock of the storage or owner; None if the claim is gone."""
        try:
            return self.folder.modified(self.name)
        except FileNotFoundError:
            return None

    def _refresh(self, ended: threading.Event) -> None:
        while not ended.wait(HEARTBEAT):
            try:
                self.folder.touch(self.name)
            except FileNotFoundError:
                return  # published, or taken for dead
            except UserError:
                pass  # `touch` has retried for a minute; nobody else could read the file either


def refuse_living(claims: Sequence[Claim], output: str) -> None:
    """Watch `claims` for DEAD_AFTER seconds. Raises UserError once one is refreshed: its process writes `output`."""
    watched = [claim for claim in claims if not claim.is_surely_dead()]
    first = {claim: refreshed for claim in watched if (refreshed := claim.refreshed())}
    if not first:
        return
    owners = "; ".join(claim.owner() for claim in first)
    print(f"watching for {DEAD_AFTER:g} s whether these still work: {owners}", file=sys.stderr)
    for _ in range(_LOOKS):
        time.sleep(DEAD_AFTER / _LOOKS)
        for claim, before in first.items():
            if claim.refreshed() not in (before, None):
                raise UserError(
                    f"{output} is being written by {claim.owner()}: wait for that run, end it, or choose another output"
                )


@contextmanager
def only_writer(folder: Folder) -> Iterator[Claim]:
    """Claim `folder` itself for the `with` block, for a process that works in it and does not publish by a rename.

    Claims of dead processes are deleted. Raises UserError if a living one holds a claim.
    """
    claim = Claim(folder, f"{_PREFIX}{uuid.uuid4().hex}.json")
    with claim.held():
        others = [Claim(folder, name) for name in folder.names() if name.startswith(_PREFIX) and name != claim.name]
        refuse_living(others, folder.path)
        for other in others:
            other.delete()
        yield claim


def _pid_namespace() -> str:
    """Name the set of processes that this one's pid counts in: a boot of a machine, or a container of it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return ""
