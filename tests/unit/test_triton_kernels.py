"""Triton kernels by Triton's interpreter, which has no bfloat16; tests/gpu runs the real thing."""

import json
import os
import subprocess
import sys

import pytest

from tests.support.training_job import ROOT


@pytest.mark.parametrize(("golden", "count"), [("window_golden", 8), ("norm_rope_golden", 12)])
def test_agrees_with_the_reference(golden: str, count: int) -> None:
    """In a separate process: Triton asks for the interpreter when it is imported, which torch has done here."""
    interpreted = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", f"tests.support.{golden}"]
    done = subprocess.run(command, env=interpreted, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    differences = json.loads(done.stdout)
    assert len(differences) == count
    assert all(difference < 2e-6 for difference in differences)  # so is no NaN
