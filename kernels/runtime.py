"""What runs here: Triton on a GPU, Triton's interpreter, or the torch references. The only hardware `if` and the only env read."""

import functools
import importlib.util
import os

import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"  # Triton reads it too, when a kernel is defined


def use_triton(*tensors: torch.Tensor | None) -> bool:
    """Whether the Triton kernels run on these tensors; where they do not, the torch references do."""
    return HAS_TRITON and (INTERPRET or all(t is None or t.is_cuda for t in tensors))


def use_ptx() -> bool:
    """Whether inline PTX runs: on NVIDIA GPUs, not in the interpreter."""
    return not INTERPRET and torch.version.cuda is not None


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def default_device(device: torch.device | str | None = None) -> torch.device:
    """`device`, or the GPU if there is one."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
