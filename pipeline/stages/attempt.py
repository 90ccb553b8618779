"""One attempt at making an output: built in a folder beside it, then renamed into place. One driver at a time.

An attempt's folder holds its driver's claim on the output (kanyun/storage/claim.py). Attempts whose driver is dead are
removed. Should a driver be taken for dead wrongly (its machine slept), its attempt is gone when it comes to publish,
and it fails; an output is never a mixture.
"""

import re
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field

from kanyun.errors import UserError
from kanyun.storage import Folder, claim
from kanyun.storage.claim import Claim
from pipeline.reports.report import Report

DRIVER = "_driver.json"
STARTING = "_starting-"  # before the name of an attempt that has no claim yet


@dataclass(frozen=True)
class Attempt:
    """Files are written below `folder`, which becomes `target` when all of them are there."""

    folder: Folder
    target: Folder
    inputs: dict[str, Report]  # data path below the stage's source ("." = the source itself) -> its report
    phases: dict[str, float] = field(default_factory=dict)  # phase -> seconds of wall time

    @property
    def rows_in(self) -> int:
        return sum(report.counts.rows_out for report in self.inputs.values())

    @classmethod
    @contextmanager
    def begin(cls, target: Folder, inputs: dict[str, Report]) -> Iterator["Attempt"]:
        """Yield an attempt, which is removed at the end of the `with` block unless it was published.

        Attempts of dead drivers are removed first. Raises UserError if a living driver works on `target`.
        """
        attempt = cls(_hidden_neighbour(target), target, inputs)
        try:
            with attempt._claimed():
                attempt._clear_others()
                yield attempt
        finally:
            with suppress(UserError):  # storage that refuses now is another error's cause; the next run removes it
                attempt.folder.delete()

    @contextmanager
    def _claimed(self) -> Iterator[None]:
        """Let the attempt appear with a claim in it: a folder without one is taken for a dead driver's and moved away,
        and the claim with it, if that is written meanwhile."""
        starting = self.target.parent / f"{STARTING}{self.folder.name}"
        with ExitStack() as stack:
            try:
                starting.write(DRIVER, b"")
                starting.move_to(self.folder)
                stack.enter_context(Claim(self.folder, DRIVER).held())
            except FileNotFoundError as error:  # another driver, which has its claim, took one of them for a dead one's
                raise UserError(f"another run on {self.target.path} starts right now: start this again") from error
            finally:
                with suppress(UserError):
                    starting.delete()
            yield

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the time of a `with` block to a phase, for the report."""
        started = time.monotonic()
        yield
        self.phases[phase] = round(self.phases.get(phase, 0) + time.monotonic() - started, 2)

    def publish(self) -> None:
        """Rename to the target: at every moment it is old, absent or new, never a mixture."""
        lost = UserError(
            f"another run took this one for dead after {claim.DEAD_AFTER:g} s without a heartbeat, and removed "
            f"{self.folder.path}: see whether that run works on {self.target.path}, or start this again"
        )
        # The folder itself may be there again: tasks that still ran have written into it.
        if not Claim(self.folder, DRIVER).is_there():
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
        parent = self.target.parent
        names = [name for name in parent.names() if is_attempt(name, self.target.name)]
        others = [parent / name for name in names if name != self.folder.name and not name.startswith(STARTING)]
        claim.refuse_living([Claim(other, DRIVER) for other in others], self.target.path)
        for name in names:
            if name.startswith(STARTING):
                (parent / name).delete()
        for other in others:
            # Renamed first: that is atomic, so if its driver lives after all and publishes now, only one of both can.
            dead = _hidden_neighbour(self.target)
            with suppress(FileNotFoundError):
                other.move_to(dead)
            dead.delete()


def is_attempt(name: str, target: str | None = None) -> bool:
    """Whether a folder of this name is an attempt, at making `target` where one is named."""
    made = ".+" if target is None else re.escape(target)
    return re.fullmatch(rf"({STARTING})?_attempt-{made}-[0-9a-f]{{32}}", name, re.DOTALL) is not None


def _hidden_neighbour(target: Folder) -> Folder:
    return target.parent / f"_attempt-{target.name}-{uuid.uuid4().hex}"
