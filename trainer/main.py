"""Train: torchrun trainer/main.py CONFIG.yaml [key=value ...]
example: torchrun --nproc-per-node gpu trainer/main.py jobs/recipes/qwen2_5_7b.yaml data=packed output=runs/7b

A run that has a checkpoint in its output folder resumes from there. Without torchrun, one process is the whole job.
Exit codes: 0 finished; 2 wrong input; 85 told to stop (SIGTERM, SIGUSR1) and saved: the same command goes on; 86 a rank
hung.
"""

import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # torchrun puts trainer/ there, not the folder it is a package of

from kanyun.errors import UserError, run_cli


def main() -> int:
    """Raises UserError."""
    if sys.argv[1:2] in (["--help"], ["-h"]):
        print(__doc__.strip())
        return 0
    if len(sys.argv) < 2:
        raise UserError("no config given: torchrun trainer/main.py CONFIG.yaml [key=value ...]")
    from trainer.config import load_config

    config = load_config(sys.argv[1], sys.argv[2:])

    import torch

    from trainer.run import Run, claimed
    from trainer.runtime import Runtime
    from trainer.stopping import PREEMPTED, StopSignals
    from trainer.trainer import Trainer

    stop = StopSignals()
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    with claimed(config.output) if rank == 0 else nullcontext() as claim:
        run = Run.prepare(config, world_size, torch.cuda.is_available())
        with (
            Runtime.start(
                tensor_parallel=run.layout.tensor_parallel,
                weight_shards=run.layout.weight_shards,
                seed=config.seed,
                hang_after=config.hang_after,
                deterministic=config.deterministic,
            ) as runtime,
            Trainer(run, runtime, stop=stop, owns=claim.is_there if claim else None) as trainer,
        ):
            return 0 if trainer.train() else PREEMPTED


def once() -> int:
    """`main`, where of many ranks with the same error one says so: torchrun ends the others as soon as one ends."""
    try:
        return main()
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(10)  # still here after that: the error is of this rank alone
        from trainer.stopping import report_failure

        report_failure(str(error))
        raise


if __name__ == "__main__":
    run_cli(once)
