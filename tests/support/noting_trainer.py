"""trainer/main.py, which notes the sample ids of every micro-batch it is given: FOLDER/rank-R.txt, a line each."""

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from kanyun.errors import run_cli
from trainer.data.batch import Batch
from trainer.data.loader import Loader, Pick

run = Loader.run


def noting(self: Loader, micro_batches: Iterator[Sequence[Pick]]) -> Iterator[Batch]:
    file = Path(os.environ["NOTES"], f"rank-{os.environ.get('RANK', '0')}.txt")
    with file.open("w") as notes:

        def noted() -> Iterator[Sequence[Pick]]:
            for picks in micro_batches:
                print(*(sample for pick in picks for sample in pick.pack().sample_ids), file=notes, flush=True)
                yield picks

        yield from run(self, noted())


if __name__ == "__main__":
    from trainer.main import once

    Loader.run = noting  # type: ignore[method-assign]
    run_cli(once)
