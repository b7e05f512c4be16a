"""Every kernel compiles ahead of time, inline PTX included, for GPUs that this machine does not have."""

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dlpkit.kernels import (
    arrange,
    attend,
    census,
    columns,
    compact,
    cull,
    expand,
    fragments,
    group,
    lanes,
    pick,
    runtime,
    slots,
    walk,
)

pytestmark = pytest.mark.skipif(runtime.INTERPRET, reason="the interpreter has no compiler")

GRID = {"R": 32, "S": 16}
ROWS = {"BIAS": True, "PTX": True}
FLAT = {"LANES": 32, "SLOTS": 64}
PAIR = {"n": 2, "m": 4, "V": 16}
WORDS = ("values_ptr", "gaps_ptr", "codes_ptr", "order_ptr", "pairs_ptr", "steps_ptr")  # int32


def compiled(kernel, capability, dtype, constants):
    """The assembly of a kernel whose x, y and bias have `dtype`."""
    several = constants.get("M", 1) > 2  # then x is planes
    kinds = dict.fromkeys(WORDS, "*i32") | {"bases_ptr": "*i16", "x_ptr": "*i32" if several else dtype}
    if kernel in (expand._sell_kernel, expand._nm_kernel):
        kinds |= {"out_ptr": "*i16", "values_ptr": "*i16"}
    elif kernel is lanes._pair_kernel:
        kinds |= {"out_ptr": "*i32", "x_ptr": dtype}

    def kind(name):
        if name in constants:
            return "constexpr"
        return kinds.get(name, dtype) if name.endswith("_ptr") else "i32"

    source = ASTSource(kernel, {name: kind(name) for name in kernel.arg_names}, constexprs=constants)
    options = lanes.launch(
        448, constants.get("R", 8) * constants.get("S", 16), constants.get("M", 1), 32, 32, torch.device("cpu")
    )
    del options["EARLY"]  # of the machine that tests
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("dtype", "M"), [(tl.bfloat16, 1), (tl.bfloat16, 8), (tl.float16, 2), (tl.float16, 4)])
@pytest.mark.parametrize(
    ("kernel", "more"), [(walk._walk_kernel, {"PLANE": 4096}), (pick._pick_kernel, PAIR | {"PADDED": False})]
)
def test_matmul_kernels(kernel, more, capability, dtype, M):
    asm = compiled(
        kernel, capability, "*bf16" if dtype == tl.bfloat16 else "*fp16",
        GRID | ROWS | more | {"M": M, "DTYPE": dtype, "EARLY": capability >= 90},
    )  # fmt: skip
    assert "ld.global.nc.L1::no_allocate.v4.b32" in asm["ptx"]
    assert ("griddepcontrol.wait" in asm["ptx"]) == (capability >= 90)
    assert "cubin" in asm


@pytest.mark.parametrize(("n", "m", "V"), [(1, 4, 16), (4, 8, 8), (3, 8, 8), (8, 16, 8), (5, 32, 4)])
def test_other_patterns(n, m, V):
    constants = GRID | ROWS | {"n": n, "m": m, "V": V, "PADDED": True, "M": 1, "DTYPE": tl.bfloat16, "EARLY": False}
    assert "cubin" in compiled(pick._pick_kernel, 90, "*bf16", constants)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("kernel", "constants"), [
    (expand._sell_kernel, GRID | FLAT),
    (expand._nm_kernel, GRID | PAIR | FLAT),
    (lanes._pair_kernel, {"BLOCK": 256}),
])  # fmt: skip
def test_other_kernels(kernel, constants, capability):
    if kernel is lanes._pair_kernel:
        constants = constants | {"EARLY": capability >= 90}
    assert "cubin" in compiled(kernel, capability, "*bf16", constants)


LANE = {"R": 32, "S": 16, "LANES": 32, "SLOTS": 64}
INT = (
    "words_ptr",
    "fullest_ptr",
    "codes_ptr",
    "gaps_ptr",
    "spread_ptr",
    "last_ptr",
    "begin_ptr",
    "pairs_ptr",
    "steps_ptr",
)
LONG = ("counts_ptr", "offsets_ptr", "length_ptr", "marks_ptr", "first_ptr")
KINDS = (
    dict.fromkeys(INT, "*i32")
    | dict.fromkeys(LONG, "*i64")
    | {"mask_ptr": "*u8", "bits_ptr": "*u8", "key_ptr": "*fp32"}
)  # the rest is int16


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("kernel", "constants"), [
    (compact._mask_kernel, {"BLOCK": 1024}),
    (compact._values_kernel, {"BLOCK": 1024}),
    (compact._dense_kernel, {"BLOCK": 1024}),
    (group._bits_kernel, {"BLOCK": 1024}),
    (group._slots_kernel, LANE | {"n": 2, "m": 4, "V": 16}),
    (group._slots_kernel, LANE | {"n": 5, "m": 32, "V": 4}),
    (slots._profile_kernel, {"BLOCK": 1024, "MARKS": 16}),
    (slots._spread_kernel, {"TILE_ROWS": 128, "TILE": 32}),
    (slots._columns_kernel, {"BLOCK": 1024}),
    (slots._cut_kernel, {"R": 32, "S": 16}),
    (slots._fill_kernel, LANE),
    (arrange._level_kernel, {"BLOCK": 8, "OTHERS": 256}),
    (arrange._wave_kernel, {"BLOCK": 8, "OTHERS": 256}),
    (fragments._pack_kernel, {}),
    (fragments._dense_kernel, {}),
])  # fmt: skip
def test_packing_kernels(kernel, constants, capability):
    kinds = {name: KINDS.get(name, "*i16") if name.endswith("_ptr") else "i32" for name in kernel.arg_names}
    kinds |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, kinds, constexprs=constants)
    assert "cubin" in triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 1}).asm


TERMS = {"SCALE": True, "SHARES": True}
SEARCH = TERMS | {"MASK": False}
SCORED = dict.fromkeys(("bad_ptr", "threshold_ptr", "equal_ptr", "counts_ptr"), "*i32") | {"top_ptr": "*i64"}
SWEPT = dict.fromkeys(("w_ptr", "errors_ptr", "factor_ptr"), "*fp32") | {"kept_ptr": "*i1"}
SCORED |= dict.fromkeys(("scale_ptr", "row_ptr", "column_ptr"), "*fp32")


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("kernel", "constants", "warps", "more"), [
    (cull._search_kernel, SEARCH | {"SIZE": 4096, "BLOCK": 4096, "R": 1, "FULL": True}, 4, {}),
    (cull._search_kernel, SEARCH | {"SIZE": 14336, "BLOCK": 16384, "R": 1, "FULL": False}, 16, {}),
    (cull._search_kernel, SEARCH | {"SIZE": 256, "BLOCK": 256, "R": 4, "FULL": True}, 1, {}),
    (cull._search_kernel, SEARCH | {"SIZE": 48, "BLOCK": 64, "R": 16, "FULL": False, "MASK": True}, 1, {"out_ptr": "*i1"}),
    (cull._rank_kernel, SEARCH | {"SIZE": 4, "BLOCK": 1024}, 4, {}),
    (cull._rank_kernel, SEARCH | {"SIZE": 8, "BLOCK": 1024, "MASK": True}, 4, {"out_ptr": "*i1"}),
    (cull._rank_kernel, SEARCH | {"SIZE": 32, "BLOCK": 1024}, 4, {}),
    (columns._sweep_kernel, {"R": 16, "BLOCK": 128, "M": 0}, 4, SWEPT),
    (columns._sweep_kernel, {"R": 16, "BLOCK": 128, "M": 16}, 4, SWEPT),
    (cull._threshold_kernel, SEARCH | {"BLOCK": 1024}, 4, {}),
    (census._histogram_kernel, TERMS | {"BLOCK": 2048, "BINS": 1 << 15, "COPIES": 4, "LOWER": False}, 4, {}),
    (census._histogram_kernel, TERMS | {"BLOCK": 2048, "BINS": 1 << 16, "COPIES": 4, "LOWER": True}, 4, {}),
    (census._total_kernel, TERMS | {"BLOCK": 2048, "ABOVE": False}, 4, {"out_ptr": "*fp64", "threshold_ptr": "*fp32"}),
    (census._total_kernel, TERMS | {"BLOCK": 2048, "ABOVE": True}, 4, {"out_ptr": "*fp64", "threshold_ptr": "*fp32"}),
    (census._equal_kernel, TERMS | {"BLOCK": 2048}, 4, {"out_ptr": "*i64"}),
])  # fmt: skip
def test_score_kernels(kernel, constants, warps, more, capability):
    kinds = SCORED | more
    kinds = {name: kinds.get(name, "*bf16") if name.endswith("_ptr") else "i32" for name in kernel.arg_names}
    kinds |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, kinds, constexprs=constants)
    assert "cubin" in triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps}).asm


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("D", [64, 128])
def test_attention_kernel(D, capability):
    constants = {"BLOCK_G": 16, "BLOCK_L": attend.BLOCK_L, "BLOCK_D": D, "DTYPE": tl.bfloat16}
    names = attend._attend_kernel.arg_names
    kinds = {name: "*bf16" if name.endswith("_ptr") else "i32" for name in names} | dict.fromkeys(
        constants, "constexpr"
    )
    kinds |= {"out_ptr": "*fp32", "lse_ptr": "*fp32", "scale": "fp32", "lowest": "fp32"}
    source = ASTSource(attend._attend_kernel, kinds, constexprs=constants)
    options = {"num_warps": attend.NUM_WARPS}
    assert "cubin" in triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm


@pytest.mark.parametrize("capability", [80, 90])
def test_merging_of_attention(capability):
    constants = {"BLOCK_S": 16, "BLOCK_D": 128}
    kinds = {"out_ptr": "*fp32", "lse_ptr": "*fp32", "y_ptr": "*bf16", "splits": "i32", "D": "i32"}
    source = ASTSource(attend._merge_kernel, kinds | dict.fromkeys(constants, "constexpr"), constexprs=constants)
    assert "cubin" in triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4}).asm
