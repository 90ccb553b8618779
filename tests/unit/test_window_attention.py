"""The kernel of attention in windows, by Triton's interpreter, which has no bfloat16; tests/gpu runs the real thing."""

import json
import os
import subprocess
import sys

from tests.support.training_job import ROOT


def test_agrees_with_the_reference() -> None:
    """In a separate process: Triton asks for the interpreter when it is imported, which torch has done here."""
    asked = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "tests.support.window_golden"]
    done = subprocess.run(command, env=asked, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    differences = json.loads(done.stdout)
    assert len(differences) == 8
    assert all(difference < 1e-6 for difference in differences)  # so is no NaN
