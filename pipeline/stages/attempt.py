"""One try at making an output: built in a folder beside it, renamed into place. One driver at a time.

An attempt is also its driver's claim on the output: the file DRIVER in it says who that is, and is touched for as long
as the driver lives. Who starts makes a claim first and looks for others then, so that of two drivers which start
together at least one sees the other, and goes. A driver whose file is not touched while others watch is dead, and its
attempt is removed. Clocks of two machines are not compared. Should a driver be taken for dead wrongly (its machine
slept), its attempt is gone when it comes to publish, and it fails; an output is never a mixture.
"""

import json
import os
import re
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime

from kanyun.errors import UserError
from kanyun.storage import Folder
from pipeline.reports.report import Report

DRIVER = "_driver.json"
BEAT = 3.0  # seconds between two touches of the file
DEAD_AFTER = 30  # seconds without one


@dataclass(frozen=True)
class Attempt:
    """Written to `folder`, which becomes `target` when all is there."""

    folder: Folder
    target: Folder
    inputs: dict[str, Report]  # data path below the stage's source ("." = the source itself) -> its report
    phases: dict[str, float] = field(default_factory=dict)  # what is done -> seconds of wall time

    @property
    def rows_in(self) -> int:
        return sum(report.counts.rows_out for report in self.inputs.values())

    @classmethod
    @contextmanager
    def begin(cls, target: Folder, inputs: dict[str, Report]) -> Iterator["Attempt"]:
        """An attempt that is removed at the end of the `with` block, unless it was published.

        What dead drivers left is removed first. Raises UserError if another driver works on `target`.
        """
        attempt = cls(_hidden_neighbour(target), target, inputs)
        me = {"host": socket.gethostname(), "pid": os.getpid(), "since": f"{datetime.now():%Y-%m-%d %H:%M:%S}"}
        try:
            try:
                attempt.folder.write(DRIVER, json.dumps(me).encode())
            except FileNotFoundError as error:  # a folder without a claim is taken for a dead driver's
                raise UserError(f"another run on {target.path} begins at this very moment: start this again") from error
            with _beating(attempt.folder):
                attempt._clear_others()
                yield attempt
        finally:
            with suppress(UserError):  # storage that refuses now is another error's cause; the next run removes it
                attempt.folder.delete()

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Count the time of a `with` block to a phase, for the report."""
        started = time.monotonic()
        yield
        self.phases[phase] = round(self.phases.get(phase, 0) + time.monotonic() - started, 2)

    def publish(self) -> None:
        """Rename to the target: at every moment it is old, absent or new, never a mixture."""
        lost = UserError(
            f"another run took this one for dead, since it gave no sign for {DEAD_AFTER} s, and removed "
            f"{self.folder.path}: see whether that one is at work on {self.target.path}, or run this again"
        )
        if not self.folder.exists(DRIVER):  # the folder itself may be there again: tasks still ran, and wrote into it
            raise lost
        old = _hidden_neighbour(self.target)
        if self.target.exists():
            self.target.move_to(old)
        try:
            self.folder.move_to(self.target)
        except FileNotFoundError as error:
            raise lost from error
        self.target.delete(DRIVER)
        old.delete()

    def _clear_others(self) -> None:
        attempts = re.compile(rf"_attempt-{re.escape(self.target.name)}-[0-9a-f]{{32}}")
        parent = self.target.parent
        others = [parent / name for name in parent.names() if attempts.fullmatch(name) and name != self.folder.name]
        self._refuse_living(others)
        for other in others:
            # Renamed first: that is atomic, so if its driver lives after all and publishes now, only one of both can.
            dead = _hidden_neighbour(self.target)
            with suppress(FileNotFoundError):
                other.move_to(dead)
            dead.delete()

    def _refuse_living(self, others: list[Folder]) -> None:
        """Watch the claims of `others` until one is touched (UserError), or all are dead."""
        first = {other: touched for other in others if (touched := _touched(other))}
        if first:
            drivers = "; ".join(map(_driver, first))
            print(f"watching for {DEAD_AFTER} s whether these still work: {drivers}", file=sys.stderr)
        for _ in range(DEAD_AFTER if first else 0):
            time.sleep(1)
            for other, before in first.items():
                if _touched(other) not in (before, None):
                    raise UserError(
                        f"{self.target.path} is being written by {_driver(other)}: wait for that run, end it, "
                        "or choose another output"
                    )


def _hidden_neighbour(target: Folder) -> Folder:
    return target.parent / f"_attempt-{target.name}-{uuid.uuid4().hex}"


def _touched(folder: Folder) -> float | None:
    """When an attempt's driver gave a sign; None if it has no claim (any more)."""
    try:
        return folder.modified(DRIVER)
    except FileNotFoundError:
        return None


def _driver(folder: Folder) -> str:
    try:
        who = json.loads(folder.read(DRIVER))
        return f"process {who['pid']} on {who['host']}, since {who['since']}"
    except (FileNotFoundError, ValueError, KeyError):
        return f"the driver of {folder.path}"


@contextmanager
def _beating(folder: Folder) -> Iterator[None]:
    """Touch the claim in `folder` every BEAT seconds."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(BEAT):
            try:
                folder.touch(DRIVER)
            except FileNotFoundError:
                return  # published, or taken for dead
            except UserError:
                pass  # `touch` has tried for a minute; nobody else can have read the file either

    thread = threading.Thread(target=beat, name="claim", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
