"""Errors that a user can act on: one sentence, with the value, the limit and the way out."""

import os
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
    """Run a command line's `main`: a UserError becomes one sentence on stderr and exit code 2, without a traceback.

    So do a library that is not installed, with 2, and Ctrl-C, with 130. Where nobody reads the output any more
    (`| head`), the command ends as by SIGPIPE.
    """
    try:
        code = main()
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name in ("", "kanyun", "pipeline", "trainer", "convert"):  # a fault of ours
            raise
        extras = "pip install -c constraints.txt '.[pipeline]', '.[trainer]' or '.[convert]'"
        print(f"error: the package {name} is not installed: {extras}; `doctor` says what is missing", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("error: interrupted; the same command goes on or starts again", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        code = 141
    sys.exit(code or 0)
