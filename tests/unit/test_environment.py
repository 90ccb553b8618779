"""What the trainer sets for CUDA and NCCL before torch is imported."""

import os
import subprocess
import sys
from pathlib import Path


def test_settings_are_made_before_torch_and_a_users_allocator_is_kept() -> None:
    names = ("PYTORCH_CUDA_ALLOC_CONF", "CUDA_DEVICE_MAX_CONNECTIONS", "NCCL_GRAPH_REGISTER")
    code = f"import trainer, os, sys; print(*[os.environ[name] for name in {names}], 'torch' in sys.modules)"
    clean = {name: value for name, value in os.environ.items() if name not in names}
    for changes, expected in (
        ({}, "expandable_segments:True 8 0 False"),
        ({names[0]: "max_split_size_mb:64", names[1]: "1"}, "max_split_size_mb:64 8 0 False"),
    ):
        command, root = [sys.executable, "-c", code], Path(__file__).parents[2]
        done = subprocess.run(command, cwd=root, env=clean | changes, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == expected
