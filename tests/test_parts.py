"""Adding what several programs have of a tile, against float64."""

import pytest
import torch
from test_matmul import DEVICE, TOLERANCE, relative_error

from dlpkit.kernels import runtime

if not runtime.HAS_GLUON:
    pytest.skip("wants a Triton whose Gluon is known", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dlpkit.kernels import parts


@pytest.mark.skipif(not (torch.cuda.is_available() or runtime.INTERPRET), reason="wants a GPU or Triton's interpreter")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("N", "rows", "M", "x_rows", "lent", "load"),
    [
        (128, 128, 16, 16, 16, 1),  # a tile of sixteen programs
        (300, 128, 32, 29, 7, 3),  # tiles of three and four, the last of 44 rows
        (70, 64, 16, 1, 5, 4),
        (257, 64, 64, 40, 3, 8),  # more than a tile to a program
    ],
)
def test_parts_of_each_tile_are_added(N, rows, M, x_rows, lent, load, dtype):
    torch.manual_seed(0)
    tiles = -(-N // rows)
    helpers = -(-tiles * lent // load)
    sums = parts.allocate(tiles, helpers, rows, M, torch.device(DEVICE)).fill_(float("nan"))
    of = sums.view(-1, M // 8, rows, 8)
    want = torch.zeros(tiles, rows, M, dtype=torch.float64, device=DEVICE)
    for helper in range(helpers):
        units = range(helper * load, min(helper * load + load, tiles * lent))
        for tile in {unit // lent for unit in units}:
            part = torch.randn(rows, M, device=DEVICE)
            of[helper + tile] = part.view(rows, M // 8, 8).transpose(0, 1)
            want[tile] += part
    want = want.view(-1, M)[:N, :x_rows].t()
    for bias in (None, torch.randn(N, device=DEVICE).to(dtype)):
        y = torch.empty(x_rows, N, dtype=dtype, device=DEVICE)
        parts.add(sums, y, bias, rows, M, lent, load)
        assert relative_error(y, want if bias is None else want + bias) < TOLERANCE[dtype]


@pytest.mark.skipif(runtime.INTERPRET, reason="the interpreter has no compiler")
@pytest.mark.parametrize("capability", [80, 90])
def test_adding_compiles(capability):
    kernel = parts._add_kernel
    constants = {"ROWS": 128, "M": 64, "BIAS": True, "EARLY": capability >= 90}
    kinds = {name: "*bf16" if name.endswith("_ptr") else "i32" for name in kernel.arg_names} | {"parts_ptr": "*fp32"}
    source = ASTSource(kernel, kinds | dict.fromkeys(constants, "constexpr"), constexprs=constants)
    asm = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4}).asm
    assert ("griddepcontrol.wait" in asm["ptx"]) == (capability >= 90)
    assert "cubin" in asm
