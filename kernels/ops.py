"""The kernels as torch.library operators, so that torch.compile and CUDA graphs take a packed layer whole.

`*_matmul` is x [M, K] -> [M, N]: up to WALK_ROWS rows of x by the walking kernels, more by expanding the weight into a dense scratch
and the vendor's matmul. No host synchronisation. Differentiable in x and bias; the weight is data.
"""

import contextlib

import torch

from dlpkit.kernels import expand, pick, walk

WALK_ROWS = 24  # H100, 14336 x 4096: past this, expanding and cuBLAS take no longer than one more launch of the walk

SELL = "Tensor values, Tensor gaps, Tensor bases, Tensor order, Tensor pairs, Tensor steps"
NM = "Tensor values, Tensor codes"
GRID = "int N, int K, int rows, int segments"

torch.library.define("dlpkit::sell_matmul", f"(Tensor x, Tensor? bias, {SELL}, {GRID}) -> Tensor")
torch.library.define("dlpkit::sell_dense", f"({SELL}, {GRID}) -> Tensor")
torch.library.define(
    "dlpkit::nm_matmul", f"(Tensor x, Tensor? bias, {NM}, {GRID}, int n, int m, int step, int steps) -> Tensor"
)
torch.library.define("dlpkit::nm_dense", f"({NM}, {GRID}, int n, int m, int step, int steps) -> Tensor")


def _kernel(name: str):
    """Register an implementation, run with the device of its first tensor current, where Triton launches."""

    def register(function):
        def on_device(tensor, *rest):
            with torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext():
                return function(tensor, *rest)

        torch.library.impl(name, ("cuda", "cpu"))(on_device)
        return function

    return register


@_kernel("dlpkit::sell_dense")
def _sell_dense(values, gaps, bases, order, pairs, steps, N, K, rows, segments):
    return expand.sell(values, gaps, bases, order, pairs, steps, N, K, rows, segments)


@_kernel("dlpkit::nm_dense")
def _nm_dense(values, codes, N, K, rows, segments, n, m, step, steps):
    return expand.nm(values, codes, N, K, n, m, rows, segments, step, steps)


@_kernel("dlpkit::sell_matmul")
def _sell_matmul(x, bias, values, gaps, bases, order, pairs, steps, N, K, rows, segments):
    if x.shape[0] > WALK_ROWS:
        dense = expand.sell(values, gaps, bases, order, pairs, steps, N, K, rows, segments)
        return torch.nn.functional.linear(x, dense, bias)
    bias = None if bias is None else bias.contiguous()
    return walk.walk(x, values, gaps, bases, order, pairs, steps, bias, N, rows, segments)


@_kernel("dlpkit::nm_matmul")
def _nm_matmul(x, bias, values, codes, N, K, rows, segments, n, m, step, steps):
    if x.shape[0] > WALK_ROWS:
        dense = expand.nm(values, codes, N, K, n, m, rows, segments, step, steps)
        return torch.nn.functional.linear(x, dense, bias)
    bias = None if bias is None else bias.contiguous()
    return pick.pick(x, values, codes, bias, N, n, m, rows, segments, step, steps)


@torch.library.register_fake("dlpkit::sell_dense")
def _sell_dense_fake(values, gaps, bases, order, pairs, steps, N, K, rows, segments):
    return values.new_empty(N, K)


@torch.library.register_fake("dlpkit::nm_dense")
def _nm_dense_fake(values, codes, N, K, *grid):
    return values.new_empty(N, K)


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
