"""What Java prints on stderr when Spark starts it."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_WARNING = b"WARNING: Using incubator modules"


@contextmanager
def incubator_warning_dropped() -> Iterator[None]:
    """Let a JVM that is started in the `with` block print all but one line.

    Spark adds a module that Java warns of, with no option to stop it: else it is the first line of every stage. The JVM
    inherits a pipe as its stderr, whose lines a thread copies.
    """
    read_end, write_end = os.pipe()
    stderr = os.dup(2)
    os.dup2(write_end, 2)
    os.close(write_end)

    def copy() -> None:
        with os.fdopen(read_end, "rb") as lines:
            for line in lines:
                if not line.startswith(_WARNING):
                    os.write(stderr, line)

    threading.Thread(target=copy, name="stderr of the JVM", daemon=True).start()
    try:
        yield
    finally:
        os.dup2(stderr, 2)
