"""Errors that a user can act on: one sentence, with the value, the limit and the way out."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """The input or the storage is at fault. Command lines print one sentence and exit with code 2."""


class UnavailableError(UserError):
    """A transient error of the storage: the same call may succeed later."""


class AccessDeniedError(UserError):
    """The storage does not permit it."""


class InvalidPathError(UserError):
    """The storage cannot have a file of that name."""


class DatasetError(UserError):
    """A packed dataset is missing, unfinished, damaged or does not fit."""


def run_cli(main: Callable[[], int | None]) -> None:
    """Run a command line's `main`: a UserError becomes one sentence on stderr and exit code 2, without a traceback."""
    try:
        code = main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    sys.exit(code or 0)
