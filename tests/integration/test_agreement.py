"""Ranks that do not agree on what they run end before the first step, with a sentence."""

import json
from pathlib import Path

from tests.support.processes import run_ranks
from tests.support.training_job import write_job


def test_ranks_with_different_layouts_or_checkpoints_end_with_both(tmp_path: Path) -> None:
    values = json.dumps(write_job(tmp_path, images=False))
    said = sorted(run_ranks(2, "-m", "tests.support.disagreeing_ranks", values).splitlines())
    assert len(said) == 4
    for line in said[:2]:
        assert line.startswith("ranks found different checkpoints in ")
        assert "(no checkpoint, step_00000009): give an output on a disk that all nodes share" in line
    for line in said[2:]:
        assert line.startswith("ranks planned different layouts (another layout; or the whole model on each of 2 CPU")
        assert line.endswith("use nodes with the same GPUs and the same host memory")
