"""Draw runs: python -m trainer.report RUN [RUN ...]

One run: RUN/report.html. Several, over one another: the file that --out names. A run may still be going on.
"""

import argparse
import sys
from pathlib import Path

from kanyun.errors import UserError, run_cli
from kanyun.storage import Folder
from trainer.report.history import History
from trainer.report.page import PAGE, page


def main() -> int:
    """Raises UserError."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer.report",
        description="Draw a run, or several over one another, as one HTML page that needs no network.",
        epilog="example: python -m trainer.report runs/a runs/b --out a_and_b.html",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output folder of a run, finished or not")
    parser.add_argument("--out", metavar="FILE", help="HTML file to write; for one run RUN/report.html if left out")
    arguments = parser.parse_args()
    if len(arguments.runs) > 1 and arguments.out is None:
        raise UserError("several runs are drawn into one file: name it with --out FILE.html")
    text = page([History.read(run) for run in arguments.runs]).encode()
    if arguments.out:
        Path(arguments.out).write_bytes(text)
    else:
        Folder(arguments.runs[0]).write(PAGE, text)
    print(arguments.out or f"{Folder(arguments.runs[0]).path}/{PAGE}")
    return 0


if __name__ == "__main__":
    sys.argv[0] = "trainer.report"
    run_cli(main)
