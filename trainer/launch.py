"""torchrun for trainer/main.py.

usage: python trainer/launch.py [torchrun's options] -- CONFIG.yaml [key=value ...]
example: python trainer/launch.py --standalone --nproc-per-node 8 -- jobs/recipes/qwen2_5_7b.yaml output=runs/7b

What it adds: SIGTERM and SIGUSR1 reach the ranks as SIGUSR1 (torchrun itself would kill them after 30 s, in the middle
of a save); the exit code is that of the rank that failed first, and its sentence is the last thing printed; ranks that
were stopped one by one, or died, are started again, up to RESTARTS times (3).
"""

import os
import signal
import sys
import types
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import psutil
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.run import determine_local_world_size, parse_args, run

from kanyun.errors import UserError, run_cli, say_error
from trainer.stopping import HUNG, PREEMPTED

WRONG_INPUT = 2


class Launcher:
    """Runs the ranks of this node until they finish, fail once too often, or the node is told to stop."""

    def __init__(self, options: list[str], arguments: list[str]) -> None:
        main = str(Path(__file__).with_name("main.py"))
        # SIGTERM is ours.
        self._args = ["--signals-to-handle", "SIGINT,SIGHUP,SIGQUIT", *options, main, *arguments]
        self._told = False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._forward)

    def run(self, restarts: int) -> int:
        """Return the exit code. Raises UserError."""
        torchrun = parse_args(self._args)
        check_processes(torchrun.nproc_per_node)
        while True:
            try:
                run(torchrun)
            except ChildFailedError as error:
                _, failure = error.get_first_failure()
                code = failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
                if self._told and code == 128 + signal.SIGUSR1:  # told before it could listen
                    code = PREEMPTED
                again = restarts > 0 and not self._told and code != WRONG_INPUT
                say_error(f"{_sentence(failure)}{'; starting again' if again else ''}")
                if not again:
                    return code
                restarts -= 1
                continue
            except SignalException as error:  # Ctrl-C, or its terminal was closed: torchrun has ended the ranks
                raise KeyboardInterrupt from error
            return 0

    def _forward(self, number: int, frame: types.FrameType | None) -> None:
        self._told = True
        ranks = psutil.Process().children()
        if not ranks:  # none was started yet: nothing is to be saved
            say_error("told to stop before the first step: the same command starts")
            sys.exit(PREEMPTED)
        for rank in ranks:
            rank.send_signal(signal.SIGUSR1)


def _sentence(failure: ProcessFailure) -> str:
    if failure.exitcode == PREEMPTED:
        return "stopped as told, and saved: the same command goes on"
    message = failure.message
    if isinstance(message, dict):
        return str(message["message"])
    if failure.exitcode < 0:
        return f"rank of process {failure.pid} was ended by {failure.signal_name()}"
    return f"a rank hung (exit code {HUNG})" if failure.exitcode == HUNG else f"exit code {failure.exitcode}, see above"


def check_processes(number: str) -> None:
    """Raise UserError unless torchrun takes `number` for the ranks of this node."""
    try:
        ranks = determine_local_world_size(number)
    except ValueError as error:
        raise UserError(f"NPROC (--nproc-per-node) is {number!r}: {error}; give a number, or gpu") from error
    if ranks < 1:
        raise UserError(f"NPROC (--nproc-per-node) is {number!r}: a node has at least one rank")


def this_machine() -> list[str]:
    """Return torchrun's options for one node: a process for each GPU, or one on the CPU; NPROC says otherwise."""
    import torch

    processes = os.environ.get("NPROC") or ("gpu" if torch.cuda.is_available() else "1")
    return ["--standalone", "--nproc-per-node", processes]


def restarts() -> int:
    """Return how often failed ranks are started again. Raises UserError."""
    text = os.environ.get("RESTARTS", "3")
    if not text.isdecimal():
        raise UserError(f"RESTARTS is {text!r}: a number is needed, 0 for none")
    return int(text)


def main() -> int:
    if "--" not in sys.argv:
        asked = sys.argv[1:] in (["-h"], ["--help"])
        print(__doc__, file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    at = sys.argv.index("--")
    return Launcher(sys.argv[1:at], sys.argv[at + 1 :]).run(restarts())


if __name__ == "__main__":
    run_cli(main)
