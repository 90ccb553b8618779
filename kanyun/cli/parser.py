"""The parser of every command: an example in its help, its version, shell completion.

Exit codes: 0 done; 1 the command found something wrong (a damaged file, models that differ); 2 a wrong command line, or
input or storage at fault; 130 interrupted. Results go to stdout, progress and errors to stderr.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import shtab


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose help ends with an example. Subcommands are of this class, too."""

    def __init__(self, *, example: str, **kwargs: Any) -> None:
        epilog = "\n".join(["example:", *(f"  {line}" for line in example.splitlines())])
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, epilog=epilog, **kwargs)

    def add_argument(self, *names: Any, **kwargs: Any) -> argparse.Action:
        action = super().add_argument(*names, **kwargs)
        if action.nargs != 0 and action.choices is None and action.type is None:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
        return action

    def add_json(self) -> None:
        """Add --json, for commands whose answer a script reads."""
        self.add_argument("--json", action="store_true", help="print one JSON value, for scripts")


class _Completion(argparse.Action):
    """Prints a completion script for the console script, whichever way the command was started."""

    def __init__(self, *args: Any, script: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._script = script

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        parser.prog = self._script
        print(shtab.complete(parser, str(values)))
        parser.exit()


def _release() -> str:
    try:
        return version("kanyun")
    except PackageNotFoundError:  # a copy of the code on PYTHONPATH
        return "unknown"


def command_line(module: str, script: str, description: str, example: str) -> Parser:
    """Return the parser of `python -m MODULE`, which pip installs as the command `script`.

    `example` is written with the command's name as `{prog}`, so that help shows what the user can type.
    """
    prog = script if Path(sys.argv[0]).name == script else f"python -m {module}"
    parser = Parser(prog=prog, description=description, example=example.format(prog=prog))
    parser.add_argument("--version", action="version", version=f"{script} {_release()}")
    parser.add_argument(
        "--print-completion",
        action=_Completion,
        script=script,
        choices=shtab.SUPPORTED_SHELLS,
        help=f"print a completion script: source <({script} --print-completion bash)",
    )
    return parser
