"""Two ranks of a job that do not agree on the run: each prints the sentence that ends it."""

import json
import os
import sys
from dataclasses import replace

from kanyun.errors import UserError
from kanyun.storage import Folder
from trainer.config import TrainConfig
from trainer.run import Run
from trainer.runtime import Runtime
from trainer.trainer import Trainer


def work(config: TrainConfig) -> None:
    """Rank 1 has planned another layout, as on a node with less host memory, or finds a checkpoint that rank 0 does
    not, as when the output is not on a shared disk."""
    run = Run.prepare(config, int(os.environ["WORLD_SIZE"]), cuda=False)
    others = [
        replace(run, layout=replace(run.layout, reason="another layout")),
        replace(run, resume=Folder(config.output) / "step_00000009"),
    ]
    with Runtime.start() as runtime:
        for other in others:
            try:
                Trainer(other if os.environ["RANK"] == "1" else run, runtime)
            except UserError as error:
                os.write(1, f"{error}\n".encode())  # at once: the other rank writes into the same pipe


if __name__ == "__main__":
    work(TrainConfig(**json.loads(sys.argv[1])))
