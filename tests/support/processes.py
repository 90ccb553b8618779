"""Processes of Python for tests, forked from one that has imported the trainer: a start takes 0.1 s of CPU time, not 4.

Each has its own pid, environment, output, signals and exit code, as if it had been executed; so do the ranks of a
torchrun that is started in this way. On a machine with a GPU all are executed, because CUDA does not outlive a fork.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import SubprocessHandler

ROOT = Path(__file__).parents[2]
_FORKS = not torch.cuda.is_available()
_CONTEXT: Any = multiprocessing.get_context("forkserver" if _FORKS else "spawn")
_CONTEXT.set_forkserver_preload(
    ["trainer.trainer", "trainer.run", "trainer.launch", "convert.logits", "pytest", "tests.support.processes"]
)


class Python:
    """`python ARGUMENTS...` in the project's root, started; a part of what subprocess.Popen offers.

    `arguments`: a script, or `-m` and a module, and what follows. `environment`: all of it; None: this process's.
    """

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        self._output = tempfile.TemporaryDirectory()
        for name in ("stdout", "stderr"):
            Path(self._output.name, name).touch()
        all_of_it = dict(os.environ if environment is None else environment)
        self._process = _CONTEXT.Process(target=_start, args=(list(arguments), all_of_it, self._output.name))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code. Raises subprocess.TimeoutExpired after `timeout` seconds."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("python", timeout or 0)
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the end; return stdout and stderr."""
        self.wait(timeout)
        out, err = (Path(self._output.name, name).read_text() for name in ("stdout", "stderr"))
        return out, err

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.kill()
        self.wait()
        self._output.cleanup()


def run_python(
    arguments: Sequence[str], environment: Mapping[str, str] | None = None, *, timeout: float = 300
) -> "subprocess.CompletedProcess[str]":
    """Run `python ARGUMENTS...` to its end."""
    with Python(arguments, environment) as process:
        out, err = process.communicate(timeout)
        return subprocess.CompletedProcess(list(arguments), process.wait(), out, err)


def run_ranks(count: int, *arguments: str) -> str:
    """Run `torchrun ARGUMENTS...` with `count` ranks on this machine; return its stdout. It must end well."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    done = run_python([*torchrun, *arguments])
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def _start(arguments: list[str], environment: dict[str, str], output: str) -> None:
    """Run the program in this process, which has just been forked."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(Path(output, name), os.O_WRONLY | os.O_APPEND), number)
    if _FORKS:
        setattr(SubprocessHandler, "_popen", lambda handler, args, env: _ForkedRank(args, env))  # noqa: B010
    _become(arguments, environment)


class _ForkedRank(subprocess.Popen[str]):
    """What torchrun starts by subprocess.Popen, forked from torchrun itself."""

    def __init__(self, args: tuple[str, ...], environment: dict[str, str]) -> None:
        self.args, self.returncode = args, None
        self.stdin = self.stdout = self.stderr = None
        self._waitpid_lock, self._child_created = threading.Lock(), True  # type: ignore[attr-defined]
        self.pid = os.fork()
        if self.pid:
            return
        code = 1
        try:
            os.setsid()
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
                signal.signal(number, signal.SIG_DFL)
            os.closerange(3, 4096)  # the sockets of torchrun's store
            _become(list(args[2:]), environment)  # behind `python -u`
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


def _become(arguments: list[str], environment: Mapping[str, str]) -> None:
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")
