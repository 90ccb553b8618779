"""Two ranks of a job that do not agree on the run: each prints the sentence that ends it."""

import json
import os
import sys
from dataclasses import replace

from kanyun.errors import UserError
from trainer.config import TrainConfig
from trainer.run import Run
from trainer.runtime import Runtime


def work(config: TrainConfig) -> None:
    """Rank 1 has planned another layout, as on a node with less host memory."""
    run = Run.prepare(config, int(os.environ["WORLD_SIZE"]), cuda=False)
    if os.environ["RANK"] == "1":
        run = replace(run, layout=replace(run.layout, reason="another layout"))
    with Runtime.start():
        try:
            run.require_agreement()
        except UserError as error:
            os.write(1, f"{error}\n".encode())  # at once: the other rank writes into the same pipe


if __name__ == "__main__":
    work(TrainConfig(**json.loads(sys.argv[1])))
