"""What runs here: Triton on a GPU, Triton's interpreter, or the torch references. The only hardware `if` and the only env read."""

import functools
import importlib
import importlib.util
import os

import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None
GLUON = ("3.6", "3.7")  # Triton's experimental language changes: the releases that its kernels here are compiled with
HAS_GLUON = HAS_TRITON and importlib.import_module("triton").__version__.startswith(tuple(f"{of}." for of in GLUON))
INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"  # Triton reads it too, when a kernel is defined


@functools.cache
def use_wgmma(device: torch.device) -> bool:
    """Whether the kernels for Hopper's tensor cores run: written in Gluon, for that GPU alone."""
    return device.type == "cuda" and HAS_GLUON and torch.cuda.get_device_capability(device) == (9, 0)


@functools.cache
def use_cusparselt(device: torch.device) -> bool:
    """Whether torch has NVIDIA's library for 2:4 sparsity and the device has the tensor cores for it."""
    if device.type != "cuda" or not HAS_TRITON or torch.version.cuda is None:
        return False
    return torch.backends.cusparselt.is_available() and torch.cuda.get_device_capability(device) >= (8, 0)


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
