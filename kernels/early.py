"""A kernel that begins while the one before it ends: programmatic dependent launch, on NVIDIA GPUs from Hopper on.

A decoding step is a row of short kernels, each with a time at both ends in which memory idles. Launched this way, a
kernel starts once every program of the one before has called `let_next_start` or ended, reads what that one cannot have written, its
weight, and waits with `inputs_ready` before it reads anything else or writes at all.

The signal comes when a program's own reading is done, not before: programs of the next kernel that are there earlier take whichever
multiprocessors are free, unevenly, and the walk at two rows of x got slower. `batch`, whose programs have one each, signals at once.

A packed weight must therefore not be written by the kernel right before a matmul. Packing ends with `settle`.
"""

import functools
import importlib.util

import torch
import triton
import triton.language as tl

from dlpkit.kernels.runtime import use_ptx


@functools.cache
def early_start(device: torch.device) -> dict[str, bool]:
    """Launch options of a kernel with an EARLY parameter. Triton before 3.4 cannot launch this way."""
    able = use_ptx() and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    if able and importlib.util.find_spec("triton.language.extra.cuda.gdc"):
        return {"EARLY": True, "launch_pdl": True}
    return {"EARLY": False}


def settle(device: torch.device) -> None:
    """Wait for what was launched on the device's current stream."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


@triton.jit
def let_next_start(EARLY: tl.constexpr):
    if EARLY:
        tl.inline_asm_elementwise(
            "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def inputs_ready(EARLY: tl.constexpr):
    if EARLY:
        tl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def first_words(p, PTX: tl.constexpr):
    """`lanes.stream_words` for what comes before `inputs_ready`: neither Triton nor ptxas moves these loads past it."""
    if PTX:
        return tl.inline_asm_elementwise(
            "ld.global.L1::no_allocate.v4.b32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,l", [p],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=False, pack=1,
        )  # fmt: skip
    else:
        return tl.load(p), tl.load(p + 1), tl.load(p + 2), tl.load(p + 3)
