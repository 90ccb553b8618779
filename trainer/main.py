"""Train: torchrun trainer/main.py CONFIG.yaml [key=value ...]

A run that has a checkpoint in its output folder goes on from there. Without torchrun, one process is the whole job.
"""

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # torchrun puts trainer/ there, not the folder it is a package of

from kanyun.errors import UserError, run_cli


def main() -> None:
    """Raises UserError."""
    if len(sys.argv) < 2:
        raise UserError("no config given: torchrun trainer/main.py CONFIG.yaml [key=value ...]")
    from trainer.config import load_config

    config = load_config(sys.argv[1], sys.argv[2:])

    import torch

    from trainer.runtime import Runtime
    from trainer.trainer import Run, Trainer

    run = Run.prepare(config, int(os.environ.get("WORLD_SIZE", "1")), torch.cuda.is_available())
    with (
        Runtime.start(tensor_parallel=run.layout.tensor_parallel, seed=config.seed) as runtime,
        Trainer(run, runtime) as trainer,
    ):
        trainer.train()


def once() -> None:
    """`main`, where of many processes with the same error one says so: torchrun ends the others as soon as one ends."""
    try:
        main()
    except UserError:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(10)  # still here after that: the error is of this process alone
        raise


if __name__ == "__main__":
    run_cli(once)
