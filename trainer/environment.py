"""What a process needs before torch and megatron.core are imported: environment variables, warnings, imports."""

import logging
import os
import sys
import warnings
from importlib.abc import MetaPathFinder
from typing import Any

# Read when CUDA and NCCL start. Without the first, freed blocks of one size do not serve another, and a layout that
# takes 93 % of a GPU runs out of memory. The second is set whatever it was: with 1, as megatron.core's scripts have it,
# all streams share a hardware queue, and the exchange of gradients holds up compute. By the third, NCCL does not
# register buffers of captured collectives: not safe with the first, megatron.core's own graphs refuse to start so. The
# last makes NCCL's watchdog write what its flight recorder has (torch: TORCH_FR_DUMP_TEMP_FILE), should it end a rank.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "8"
os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")
os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")

# What megatron.core says when it is imported (no Apex, no Transformer Engine), builds a GPTModel (deprecated in 0.19,
# but its successor has no mrope), steps its optimizer or loads a checkpoint is known; it hides what people should read.
warnings.filterwarnings("ignore", module=r"megatron\.")
warnings.filterwarnings("ignore", module=r"torch\.distributed\.checkpoint\.")
warnings.filterwarnings("ignore", message=r"The \.grad attribute of a Tensor that is not a leaf")
# Transformer Engine's modules give a weight that is in fp8 already their own quantizer, which is of the same kind.
warnings.filterwarnings("ignore", message="Quantizer is being updated")
logging.getLogger("megatron").setLevel(logging.ERROR)


class _WithoutGpu(MetaPathFinder):
    """On a machine without a GPU: megatron.core is imported without Transformer Engine and without torch's compiler.

    - Transformer Engine counts as absent, even where it is installed: as soon as megatron.core can import it, it takes
      its CUDA kernels for the optimizer.
    - megatron.core passes functions to torch.compile as it is imported, and that imports the compiler: 2.4 of the 6.7 s
      that a process takes to start. On a CPU none of these functions is called.
    """

    def find_spec(self, name: str, path: Any, target: Any = None) -> None:
        if name not in ("transformer_engine", "megatron.core"):
            return
        import torch

        if torch.cuda.is_available():
            return
        if name == "transformer_engine":
            raise ModuleNotFoundError("Transformer Engine needs a GPU", name=name)
        from trainer.cpu_emulation import compile_nothing

        torch.compile = compile_nothing  # type: ignore[assignment]


sys.meta_path.insert(0, _WithoutGpu())
