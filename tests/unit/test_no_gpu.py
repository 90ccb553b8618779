"""A machine whose image has Transformer Engine, but no GPU."""

import os
import subprocess
import sys
from pathlib import Path


def test_transformer_engine_is_left_alone(tmp_path: Path) -> None:
    package = tmp_path / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('libcuda.so.1 is not there')")
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    env = os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    code = "import trainer.trainer, sys; print('transformer_engine' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr
