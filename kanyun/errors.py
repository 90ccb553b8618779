"""Errors that a user can act on: one sentence, with the value, the limit and the way out."""

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from errno import EDQUOT, ENOSPC


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

    So do a library that is not installed, and a full disk under the output, with 2, and Ctrl-C, with 130. Where nobody
    reads the output any more (`| head`), the command ends as by SIGPIPE.
    """
    try:
        code = main()
        sys.stdout.flush()
    except UserError as error:
        say_error(str(error))
        code = 2
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name in ("", "kanyun", "pipeline", "trainer", "convert"):  # a fault of ours
            raise
        extras = "pip install -c constraints.txt '.[pipeline]', '.[trainer]' or '.[convert]'"
        say_error(f"the package {name} is not installed: {extras}; `doctor` says what is missing")
        code = 2
    except KeyboardInterrupt:
        say_error("interrupted; the same command goes on or starts again")
        code = 130
    except BrokenPipeError:
        code = 141
    except OSError as error:
        if error.errno not in (ENOSPC, EDQUOT):
            raise
        say_error(f"a disk is full, perhaps that of the output ({error}): make room there")
        code = 2
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # what it cannot take is dropped: Python would try once more, and end with its own exit code
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code or 0)


def say_error(sentence: str) -> None:
    """Print an error as one line on stderr, line breaks in file names escaped. A full disk under stderr is ignored."""
    line = "".join(char if char.isprintable() else repr(char)[1:-1] for char in sentence)
    with suppress(OSError):
        print(f"error: {line}", file=sys.stderr, flush=True)
