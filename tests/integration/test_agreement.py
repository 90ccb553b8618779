"""Ranks that do not agree on what they run end before the first step, with a sentence."""

import json
from pathlib import Path

from tests.support.processes import run_ranks
from tests.support.training_job import write_job


def test_ranks_with_different_layouts_end_with_both(tmp_path: Path) -> None:
    values = json.dumps(write_job(tmp_path, images=False))
    said = run_ranks(2, "-m", "tests.support.disagreeing_ranks", values).splitlines()
    assert len(said) == 2
    for line in said:
        assert line.startswith("ranks planned different layouts (another layout; or the whole model on each of 2 CPU")
        assert line.endswith("use nodes with the same GPUs and the same host memory")
