"""The whole Trainer on a GPU."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from tests.training_job import train, write_job

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_trainer_follows_the_cpu(tmp_path: Any) -> None:
    """The same config on GPU and CPU: graph, Transformer Engine and bfloat16 against the reference in float32."""
    values = write_job(tmp_path, images=True)
    cuda = train(values)
    script = "import json, sys; from tests.training_job import train; print(json.dumps(train(json.loads(sys.argv[1]))))"
    values["output"] = str(tmp_path / "cpu")
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", script, json.dumps(values)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    cpu = json.loads(done.stdout.splitlines()[-1])
    for ours, reference in zip(cuda, cpu, strict=True):
        assert ours["loss"] == pytest.approx(reference["loss"], rel=0.01)
        assert ours["trained_tokens"] == reference["trained_tokens"]
    assert cuda[-1]["validation_loss"] == pytest.approx(cpu[-1]["validation_loss"], rel=0.01)
