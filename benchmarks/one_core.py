"""Runs timed on one core, and their table: what preprocess.py and build_text.py share.

The process tree (Spark's JVM, its Python workers, decoders) is pinned to one core, and its CPU time is what counts:
other programs on the machine change it little, and a process that waits for another one costs nothing twice.
"""

import os
import resource
from collections.abc import Callable, Mapping, Sequence

import psutil

SCALES = (1, 4, 16)


def pin() -> None:
    """This process and all that it starts: one core, Spark with one task at a time."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    os.environ["SPARK_MASTER"] = "local[1]"


def seconds(run: Callable[[], None]) -> float:
    """CPU seconds of the process tree."""
    start = _spent()
    run()
    return _spent() - start


def show(
    what: str, counts: Sequence[int], times: Mapping[str, Sequence[float]], *, scales: Sequence[int] = SCALES
) -> None:
    """A line for each of `times` (seconds by scale); the first is the floor, and the others are shares of it.

    The last column is without a run's fixed cost: what the largest scale has beyond the one before it, over the time
    that it takes beyond that.
    """
    print(f"{list(counts)} {what} a CPU second, and as a share of the floor")
    columns = [*(f"{scale}x" for scale in scales), f"{scales[-1]}x beyond {scales[-2]}x"]
    print(f"{'':24}" + "".join(f"{column:>17}" for column in columns))
    floor: list[float] = []
    for name, taken in times.items():
        rates = [count / one for count, one in zip(counts, taken)]
        rates.append((counts[-1] - counts[-2]) / (taken[-1] - taken[-2]))
        floor = floor or rates
        print(f"{name:24}" + "".join(f"{rate:10,.0f} = {rate / full:4.0%}" for rate, full in zip(rates, floor)))


def _spent() -> float:
    """Of living processes as they stand, and of those that ended and were waited for by this one."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    living = [psutil.Process(), *psutil.Process().children(recursive=True)]
    times = [process.cpu_times() for process in living]
    return ended.ru_utime + ended.ru_stime + sum(time.user + time.system for time in times)
