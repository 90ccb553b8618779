"""What the scripts of jobs/ would run, without running it."""

import shlex
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
PYTHON = "/venv/bin/python"


def dry(command: str, environment: dict[str, str] | None = None, code: int = 0) -> str:
    """Return what a script prints with DRY_RUN=1, in an environment of these variables alone."""
    fixed = {"PATH": "/usr/bin:/bin", "DRY_RUN": "1", "PYTHON": PYTHON, "LC_ALL": "C.UTF-8"}
    done = subprocess.run(
        shlex.split(command), env=fixed | (environment or {}), cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr
    return (done.stdout if code == 0 else done.stderr).strip()


def nodes(count: int, rank: int, first: str, port: int = 29500) -> str:
    return f"--nnodes {count} --node-rank {rank} --master-addr {first} --master-port {port}"
