"""The kernels as torch.library operators, so that torch.compile and CUDA graphs take a packed layer whole.

`*_matmul` is x [M, K] -> [M, N]. Which kernel multiplies how many rows of x, `crossover.fastest` says; where it says so, the weight is expanded
into a dense scratch and the vendor's matmul takes over. The scratch is the caching allocator's: layers that run one after the other share
it. No host synchronisation. Differentiable in x and bias; the weight is data.
"""

import contextlib

import torch

from dlpkit.kernels import blocks, crossover, expand, fragments, pick, vendor, walk
from dlpkit.kernels.runtime import HAS_GLUON, use_wgmma

if HAS_GLUON:
    from dlpkit.kernels import batch, mma, spread

SELL = "Tensor values, Tensor gaps, Tensor bases, Tensor order, Tensor pairs, Tensor steps"
NM = "Tensor values, Tensor codes"
TILE = "Tensor values, Tensor gaps, Tensor extras, Tensor places, Tensor starts, Tensor extra_starts, Tensor arrived"
FRAGMENT = "Tensor values, Tensor codes"
GRID = "int N, int K, int rows, int segments"

torch.library.define("dlpkit::sell_matmul", f"(Tensor x, Tensor? bias, {SELL}, {GRID}) -> Tensor")
torch.library.define("dlpkit::sell_dense", f"({SELL}, {GRID}) -> Tensor")
torch.library.define(
    "dlpkit::nm_matmul", f"(Tensor x, Tensor? bias, {NM}, {GRID}, int n, int m, int step, int steps) -> Tensor"
)
torch.library.define("dlpkit::nm_dense", f"({NM}, {GRID}, int n, int m, int step, int steps) -> Tensor")
torch.library.define("dlpkit::tile_matmul", f"(Tensor x, Tensor? bias, {TILE}, int N, int K) -> Tensor")
torch.library.define("dlpkit::tile_dense", f"({TILE}, int N, int K) -> Tensor")
torch.library.define("dlpkit::fragment_matmul", f"(Tensor x, Tensor? bias, {FRAGMENT}, int N, int K) -> Tensor")
torch.library.define("dlpkit::fragment_dense", f"({FRAGMENT}, int N, int K) -> Tensor")
torch.library.define("dlpkit::cusparselt_matmul", "(Tensor x, Tensor? bias, Tensor values, int N, int K) -> Tensor")
torch.library.define("dlpkit::cusparselt_dense", "(Tensor values, int N, int K) -> Tensor")


def _kernel(name: str):
    """Register an implementation, run with the device of its first tensor current, where Triton launches."""

    def register(function):
        def on_device(tensor, *rest):
            with torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext():
                return function(tensor, *rest)

        torch.library.impl(name, ("cuda", "cpu"))(on_device)
        return function

    return register


def _kernel_for(format: str, x: torch.Tensor, values: torch.Tensor, N: int, K: int) -> str:
    return crossover.fastest(format, N, K, x.shape[0], values.numel() / (N * K)).kernel


@_kernel("dlpkit::sell_dense")
def _sell_dense(values, gaps, bases, order, pairs, steps, N, K, rows, segments):
    return expand.sell(values, gaps, bases, order, pairs, steps, N, K, rows, segments)


@_kernel("dlpkit::nm_dense")
def _nm_dense(values, codes, N, K, rows, segments, n, m, step, steps):
    return expand.nm(values, codes, N, K, n, m, rows, segments, step, steps)


@_kernel("dlpkit::sell_matmul")
def _sell_matmul(x, bias, values, gaps, bases, order, pairs, steps, N, K, rows, segments):
    if _kernel_for("sell", x, values, N, K) == crossover.EXPAND:
        dense = expand.sell(values, gaps, bases, order, pairs, steps, N, K, rows, segments)
        return torch.nn.functional.linear(x, dense, bias)
    bias = None if bias is None else bias.contiguous()
    return walk.walk(x, values, gaps, bases, order, pairs, steps, bias, N, rows, segments)


@_kernel("dlpkit::nm_matmul")
def _nm_matmul(x, bias, values, codes, N, K, rows, segments, n, m, step, steps):
    if _kernel_for("nm", x, values, N, K) == crossover.EXPAND:
        dense = expand.nm(values, codes, N, K, n, m, rows, segments, step, steps)
        return torch.nn.functional.linear(x, dense, bias)
    bias = None if bias is None else bias.contiguous()
    return pick.pick(x, values, codes, bias, N, n, m, rows, segments, step, steps)


@_kernel("dlpkit::tile_dense")
def _tile_dense(values, gaps, extras, places, starts, extra_starts, arrived, N, K):
    bits = values.view(torch.int16), gaps, extras.view(torch.int16)
    return blocks.dense(*bits, places, starts, extra_starts, N, K).view(values.dtype)


@_kernel("dlpkit::tile_matmul")
def _tile_matmul(x, bias, values, gaps, extras, places, starts, extra_starts, arrived, N, K):
    weight = values, gaps, extras, places, starts, extra_starts, arrived
    if not use_wgmma(x.device):
        return torch.nn.functional.linear(x, _tile_dense(*weight, N, K), bias)
    if _kernel_for("tile", x, values, N, K) != crossover.EXPAND:
        return batch.multiply(x, *weight, None if bias is None else bias.contiguous(), N, K)
    dense = spread.spread(*weight[:-1], N, K)  # [K, N]
    return x @ dense if bias is None else torch.addmm(bias, x, dense)


@_kernel("dlpkit::fragment_dense")
def _fragment_dense(values, codes, N, K):
    return fragments.dense(values.view(torch.int16), codes, N, K).view(values.dtype)


@_kernel("dlpkit::fragment_matmul")
def _fragment_matmul(x, bias, values, codes, N, K):
    if not use_wgmma(x.device) or _kernel_for("fragment", x, values, N, K) == crossover.EXPAND:
        return torch.nn.functional.linear(x, _fragment_dense(values, codes, N, K), bias)
    return mma.multiply(x, values, codes, None if bias is None else bias.contiguous(), N, K)


@_kernel("dlpkit::cusparselt_dense")
def _cusparselt_dense(values, N, K):
    return vendor.dense(values, N, K)


@_kernel("dlpkit::cusparselt_matmul")
def _cusparselt_matmul(x, bias, values, N, K):
    return vendor.multiply(x, values, bias, N, K)


@torch.library.register_fake("dlpkit::sell_dense")
def _sell_dense_fake(values, gaps, bases, order, pairs, steps, N, K, rows, segments):
    return values.new_empty(N, K)


@torch.library.register_fake("dlpkit::nm_dense")
def _nm_dense_fake(values, codes, N, K, *grid):
    return values.new_empty(N, K)


@torch.library.register_fake("dlpkit::tile_dense")
def _tile_dense_fake(values, gaps, extras, places, starts, extra_starts, arrived, N, K):
    return values.new_empty(N, K)


@torch.library.register_fake("dlpkit::fragment_dense")
def _fragment_dense_fake(values, codes, N, K):
    return values.new_empty(N, K)


@torch.library.register_fake("dlpkit::fragment_matmul")
def _fragment_matmul_fake(x, bias, values, codes, N, K):
    return x.new_empty(x.shape[0], N)


@torch.library.register_fake("dlpkit::cusparselt_dense")
def _cusparselt_dense_fake(values, N, K):
    return values.new_empty(N, K)


@torch.library.register_fake("dlpkit::cusparselt_matmul")
def _cusparselt_matmul_fake(x, bias, values, N, K):
    return x.new_empty(x.shape[0], N)


@torch.library.register_fake("dlpkit::tile_matmul")
def _tile_matmul_fake(x, bias, values, gaps, extras, places, starts, extra_starts, arrived, N, K):
    return x.new_empty(x.shape[0], N)


@torch.library.register_fake("dlpkit::sell_matmul")
def _sell_matmul_fake(x, bias, values, gaps, bases, order, pairs, steps, N, *grid):
    return x.new_empty(x.shape[0], N)


@torch.library.register_fake("dlpkit::nm_matmul")
def _nm_matmul_fake(x, bias, values, codes, N, *grid):
    return x.new_empty(x.shape[0], N)


def _keep(ctx, inputs, output) -> None:
    tensors = [t for t in inputs[2:] if isinstance(t, torch.Tensor)]
    ctx.save_for_backward(*tensors)
    ctx.grid = inputs[2 + len(tensors) :]


def _backward(dense):
    def backward(ctx, grad):
        grad_x = grad @ dense(*ctx.saved_tensors, *ctx.grid) if ctx.needs_input_grad[0] else None
        grad_bias = grad.sum(0) if ctx.needs_input_grad[1] else None
        return grad_x, grad_bias, *(None for _ in (*ctx.saved_tensors, *ctx.grid))

    return backward


torch.library.register_autograd("dlpkit::sell_matmul", _backward(torch.ops.dlpkit.sell_dense), setup_context=_keep)
torch.library.register_autograd("dlpkit::nm_matmul", _backward(torch.ops.dlpkit.nm_dense), setup_context=_keep)
torch.library.register_autograd("dlpkit::tile_matmul", _backward(torch.ops.dlpkit.tile_dense), setup_context=_keep)
torch.library.register_autograd(
    "dlpkit::fragment_matmul", _backward(torch.ops.dlpkit.fragment_dense), setup_context=_keep
)
torch.library.register_autograd(
    "dlpkit::cusparselt_matmul", _backward(torch.ops.dlpkit.cusparselt_dense), setup_context=_keep
)
