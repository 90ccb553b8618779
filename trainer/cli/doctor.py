"""python -m trainer doctor: whether this machine can train, and what it would train on."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from kanyun.cli import doctor
from kanyun.cli.doctor import Finding, missing, ok, unused
from kanyun.errors import UserError
from trainer.planning.gpus import find_gpu

# What pip brings for `extra="convert"`: tests/unit/test_commands.py compares.
_PACKAGES = (
    "torch",
    "megatron-core",
    "transformers",
    "omegaconf",
    "pydantic",
    "tensorboard",
    "safetensors",
    "torchvision",
    "pillow",
    "jinja2",
    "nvtx",
    "psutil",
)
_LEAST_SHARED = 4e9  # bytes of /dev/shm: NCCL's buffers between eight GPUs, and the workers' batches
_BUSY = 2e9  # bytes of a GPU that is another process's


def findings(folders: Sequence[str]) -> Iterator[Finding]:
    """Yield what was looked at; `folders` (data, model, output) are read, on disk or HDFS."""
    yield doctor.python()
    packages = doctor.packages(_PACKAGES, extra="convert")
    yield packages
    yield doctor.disk("disk", os.getcwd())
    yield doctor.hadoop_conf()
    for folder in folders:
        yield doctor.reachable(folder)
    if packages.state == "ok":
        yield from _gpus()


def _gpus() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        yield _no_gpu()
        return
    for index in range(torch.cuda.device_count()):
        yield _gpu(index)
    yield _transformer_engine()
    yield _cudnn()
    yield ok("NCCL", ".".join(str(part) for part in torch.cuda.nccl.version()))
    yield _shared_memory()
    devices = sorted(os.listdir("/sys/class/infiniband")) if os.path.isdir("/sys/class/infiniband") else []
    if devices:
        yield ok("RDMA", f"{len(devices)} devices ({', '.join(devices[:8])})")
    else:
        yield unused("RDMA", "no InfiniBand or RoCE device is seen: several nodes would exchange over TCP")


def _no_gpu() -> Finding:
    """The driver has GPUs that torch cannot use, or there is none."""
    if shutil.which("nvidia-smi") is None:
        return unused("GPU", "none, the CPU trains: right for tiny models and tests")
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    if listed.returncode != 0:
        said = (listed.stderr or listed.stdout).strip().splitlines() or ["no output"]
        return missing("GPU", f"nvidia-smi fails ({said[0]}): mend the driver, or start the container with its GPUs")
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return unused("GPU", "CUDA_VISIBLE_DEVICES is empty: the CPU trains")
    return missing("GPU", "nvidia-smi lists GPUs that torch cannot use: the driver is older than CUDA 13 needs (580)")


def _gpu(index: int) -> Finding:
    import torch

    name, device = f"GPU {index}", torch.cuda.get_device_name(index)
    try:
        gpu = find_gpu(device)
    except UserError as error:
        return missing(name, str(error))
    free, total = torch.cuda.mem_get_info(index)
    if total - free > _BUSY:
        taken = f"another process holds {(total - free) / 1e9:.1f} GB"
        return missing(name, f"{device}: {taken}; end it (nvidia-smi shows it)")
    return ok(name, f"{device}, {total / 1e9:.0f} GB, {'fp8' if gpu.fp8 else 'bfloat16'}")


def _transformer_engine() -> Finding:
    if find_spec("transformer_engine") is None:
        return missing("Transformer Engine", "not installed: `make setup-gpu` adds it, the trainer's image has it")
    done = subprocess.run(
        [sys.executable, "-c", "import transformer_engine.pytorch as te; print(te.__version__)"],
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["it ended without a word"])[-1]
        return missing("Transformer Engine", f"cannot be imported ({last}): run `make setup-gpu` again with this torch")
    return ok("Transformer Engine", done.stdout.strip().splitlines()[-1])


def _cudnn() -> Finding:
    """Transformer Engine takes cuDNN from CUDA_HOME first; with an older one fused attention is off, without a word."""
    import torch

    loaded = torch.backends.cudnn.version() or 0
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    other = sorted(Path(home).glob("lib*/**/libcudnn.so*")) if home else []
    major, minor, patch, *_ = (int(part) for part in version("nvidia-cudnn-cu13").split("."))
    if loaded != major * 10_000 + minor * 100 + patch:
        return missing(
            "cuDNN", f"torch has loaded {loaded}, not its own {major}.{minor}.{patch}: clear LD_LIBRARY_PATH"
        )
    if other:
        return missing(
            "cuDNN",
            f"{other[0]} is taken before torch's {loaded}, and fused attention may be off: unset CUDA_HOME",
        )
    return ok("cuDNN", str(loaded))


def _shared_memory() -> Finding:
    free = shutil.disk_usage("/dev/shm").free
    if free < _LEAST_SHARED:
        return missing(
            "shared memory",
            f"/dev/shm has {free / 1e9:.2f} GB: docker run --shm-size=16g, emptyDir of medium Memory",
        )
    return ok("shared memory", f"/dev/shm has {free / 1e9:.0f} GB free")
