"""The Gluon kernels without a GPU: they compile for Hopper, and their inline PTX, run here lane by lane, rebuilds a dense tile."""

import operator
import re

import numpy as np
import pytest
import torch

from dlpkit.kernels import runtime
from dlpkit.kernels.formats import tile

if not runtime.HAS_GLUON or runtime.INTERPRET:
    pytest.skip("wants the compiler of a Triton whose Gluon is known", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from dlpkit.kernels import batch, blocks, mma, product, scatter, spread

KINDS = dict.fromkeys(("values_ptr", "gaps_ptr", "codes_ptr", "starts_ptr", "extra_starts_ptr", "arrived_ptr"), "*i32")
KINDS |= {"extras_ptr": "*i16", "places_ptr": "*i16", "parts_ptr": "*fp32"}


def compiled(kernel, dtype, registers=None, warps=4, **constants):
    constants["DTYPE"] = dtype
    kinds = {name: KINDS.get(name, f"*{dtype}") if name.endswith("_ptr") else "i32" for name in kernel.arg_names}
    if "x_desc" in kinds:
        kinds["x_desc"] = f"tensordesc<{dtype}[{constants['M']}, 64],{batch.SHARED.value!r}>"
    kinds |= dict.fromkeys(constants, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name.endswith("_ptr")}
    source = GluonASTSource(kernel, kinds, constexprs=constants, attrs=aligned)
    options = {"num_warps": warps} | ({"maxnreg": registers} if registers else {})
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm


def check_tiles_come_first(asm, size, known=()):
    """The stores count from the start of shared memory: whatever else Triton put there lies behind the tiles."""
    others = {int(offset) for offset in re.findall(r"@global_smem, i\d+ (\d+)", asm["llir"])} - set(known)
    assert not others or min(others) >= size


@pytest.mark.parametrize("depth", batch.DEPTHS)
@pytest.mark.parametrize(
    ("dtype", "M", "bias", "sum"),
    [
        (gl.bfloat16, 16, True, "here"),
        (gl.float16, 32, True, "later"),
        (gl.bfloat16, 64, True, "here"),
        (gl.float16, 64, True, "whole"),
        (gl.float16, 128, True, "whole"),
        (gl.float16, 128, False, "whole"),
        (gl.bfloat16, 128, True, "later"),
    ],
)
def test_batch_compiles(dtype, M, bias, sum, depth):
    options = {"CHUNKS": batch.CHUNKS[M], "REGISTERS": batch.REGISTERS[M], "DEPTH": depth}
    asm = compiled(batch._batch_kernel, dtype, M=M, BIAS=bias, SUM=sum, EARLY=True, **options)
    if not (bias and sum == "whole" and (M == 128 or (M, depth) == (64, 8))):  # which spill, so far
        assert "STL" not in asm["sass"]
    assert f"wgmma.mma_async.sync.aligned.m64n{M}k16.f32.{'bf16' if dtype == gl.bfloat16 else 'f16'}" in asm["ptx"]
    assert "setmaxnreg" in asm["ptx"]
    assert "griddepcontrol.wait" in asm["ptx"]
    check_tiles_come_first(asm, 2**17)
    # the most extras of two halves, for both groups, beside two others: Triton has not dropped what ends the loop over them
    assert len(re.findall(r"max\.s32", asm["ptx"])) >= 4


SHAPES = [(14336, 4096), (4096, 14336), (4096, 4096), (1024, 4096), (28672, 8192), (128256, 4096), (576, 1536), (1, 8)]


@pytest.mark.parametrize("M", [16, 64, 128])
@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_every_unit_is_some_programs(N, K, M):
    """By loops over programs and their units, as the kernels have them."""
    tiles, B = -(-N // 128), -(-K // 256)
    share = batch.shares(tiles, B, M, sms=132)
    takers, parts, most = {}, {}, 0
    for program in range(share.helpers + share.owners):
        helps = program < share.helpers
        width, count = (share.lent, share.load) if helps else (B - share.lent, share.owned * (B - share.lent))
        first = (program if helps else program - share.helpers) * count
        units = range(first, min(first + count, tiles * width))
        assert units
        most = max(most, len(units))
        for of, block in (divmod(unit, width) for unit in units):
            takers.setdefault((of, block + (B - share.lent) * helps), []).append(program)
            if helps:
                parts.setdefault(of, set()).add(program)
    assert sorted(takers) == [(of, block) for of in range(tiles) for block in range(B)]
    assert all(len(programs) == 1 for programs in takers.values())
    for of, helpers in parts.items():
        first, last = of * share.lent // share.load, (of * share.lent + share.lent - 1) // share.load
        assert helpers == set(range(first, last + 1))
    assert most <= B * -(-tiles // 132)  # never more than with whole tiles


@pytest.mark.parametrize("M", [16, 32, 64])
def test_multiprocessors_without_a_tile_help(M):
    """14336 x 4096: 112 tiles of 16 blocks. 14 units to every owner and 12 to every helper, instead of 16 and none."""
    assert batch.shares(112, 16, M, sms=132) == ("here", 112, 19, 1, 2, 12)


@pytest.mark.parametrize(
    ("dtype", "M", "warps"), [(torch.bfloat16, 16, 4), (torch.float16, 32, 4), (torch.bfloat16, 128, 8)]
)
def test_mma_compiles(dtype, M, warps):
    options = {"STAGES": mma.STAGES[warps][M], "EARLY": True, **mma.instructions(M, dtype)}
    asm = compiled(mma._mma_kernel, mma.DTYPES[dtype], warps=warps, M=M, BIAS=True, SPLIT=True, **options)
    kind = "bf16" if dtype == torch.bfloat16 else "f16"
    assert f"wgmma.mma_async.sp.sync.aligned.m64n{M}k32.f32.{kind}" in asm["ptx"]
    assert "griddepcontrol.wait" in asm["ptx"]
    x = range(0, mma.STAGES[warps][M] * M * 128, M * 128)  # the stages of x
    check_tiles_come_first(asm, x.stop + mma.STAGES[warps][M] * warps // 4 * mma.STEP.value, x)


def test_x_as_the_kernels_read_it():
    wide = torch.randn(4, 208).bfloat16()
    for x, columns in (
        (wide[:, :5], 8),
        (wide[:, :40], 64),
        (wide[:, 3:139], 64),
        (wide[:1, :64].expand(4, 64), 64),
        (wide.t(), 64),
    ):
        read = product.aligned(x, columns)
        rows, K = x.shape
        assert read.shape == (rows, max(columns, K + -K % 8))
        assert torch.equal(read[:, :K], x)
        assert not read[:, K:].any()
        assert read.stride(1) == 1
        assert read.stride(0) % 8 == 0
        assert read.stride(0) >= read.shape[1]
    assert product.aligned(wide[:, 8:136], 64).data_ptr() == wide[:, 8:136].data_ptr()  # as it is


@pytest.mark.parametrize(("N", "K", "M", "warps", "units"), [
    (14336, 4096, 128, 8, 64), (14336, 4096, 16, 4, 64), (4096, 4096, 64, 4, 16), (1, 8, 16, 4, 1), (28672, 8192, 16, 4, 128),
])  # fmt: skip
def test_shares_of_mma(N, K, M, warps, units):
    assert mma.share(N, K, M, sms=132) == (warps, units)


def test_spread_compiles():
    asm = compiled(spread._spread_kernel, gl.bfloat16, spread.REGISTERS)
    check_tiles_come_first(asm, 2**15)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("kernel", "constants"), [(blocks._steps_kernel, {"RUNS": 8}), (blocks._fill_kernel, {"RUNS": 8}), (blocks._dense_kernel, {})]
)  # fmt: skip
def test_packing_compiles(kernel, constants, capability):
    words = ("steps_ptr", "more_ptr", "gaps_ptr", "starts_ptr", "extra_starts_ptr")
    kinds = {n: "*i32" if n in words else "*i16" if n.endswith("_ptr") else "i32" for n in kernel.arg_names}
    source = ASTSource(kernel, kinds | dict.fromkeys(constants, "constexpr"), constexprs=constants)
    assert "cubin" in triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4}).asm


OPERATIONS = {
    "mov.b32": lambda a: a,
    "and.b32": operator.and_,
    "or.b32": operator.or_,
    "xor.b32": operator.xor,
    "shl.b32": operator.lshift,
    "shr.u32": operator.rshift,
    "add.u32": operator.add,
    "mad.lo.u32": lambda a, b, c: a * b + c,
    "mad.wide.u16": lambda a, b, c: a * b + c,
    "dp4a.u32.u32": lambda a, b, c: sum((a >> 8 * i & 0xFF) * (b >> 8 * i & 0xFF) for i in range(4)) + c,
    "setp.ge.s16": lambda a, b: a.astype(np.int16) >= b.astype(np.int16),
}


def run(ptx: str, operands: list, memory: np.ndarray, stored: list | None = None):
    """The straight-line PTX of scatter.py on arrays of lanes; `operands` are $0, $1, ..., and $0 is returned. The addresses of every
    store go to `stored`.
    """
    names = {f"${i}": operand for i, operand in enumerate(operands)}

    def value(text):
        return names[text] if text in names else np.uint32(int(text, 0) & 0xFFFFFFFF)

    for line in ptx.strip("{} \n").split(";"):
        line = line.strip()
        if not line or line.startswith(".reg"):
            continue
        there = np.ones(len(operands[1]), bool)
        if line.startswith("@p "):
            line, there = line[3:], names["p"]
        op, rest = line.split(" ", 1)
        to, *others = re.findall(r"\{[^}]*\}|\[\w+\]|[$\w-]+", rest)
        a = [value(other) for other in others]
        if op == "st.shared.b16":
            at = names[to.strip("[]")][there]
            memory[at], memory[at + 1] = a[0][there] & 0xFF, a[0][there] >> 8 & 0xFF
            if stored is not None:
                stored.append(at)
        elif to.startswith("{"):
            low, high = re.findall(r"\w+", to)
            names[low], names[high] = a[0] & 0xFFFF, a[0] >> 16
        elif op == "prmt.b32":
            octets = [(word >> 8 * i) & 0xFF for word in a[:2] for i in range(4)]
            picked = np.zeros_like(a[0])
            for i in range(4):
                select = int(a[2]) >> 4 * i & 15
                octet = octets[select & 7]
                picked |= (np.where(octet & 0x80, 0xFF, 0).astype(np.uint32) if select & 8 else octet) << np.uint32(
                    8 * i
                )
            names[to] = picked
        else:
            names[to] = OPERATIONS[op](*a)
    return names["$0"]


@pytest.mark.parametrize("density", [0.02, 0.3, 0.5, 1.0])
def test_no_store_of_a_warp_meets_a_bank_twice(density):
    stored = []
    rebuild(density, 0, stored)
    assert all(len(set(warp // 4 % 32)) == 32 for at in stored for warp in at.reshape(4, 32))


@pytest.mark.parametrize("density", [0.02, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("half", [0, 1])
def test_the_ptx_rebuilds_a_tile(density, half):
    rebuild(density, half)


def rebuild(density, half, stored=None):
    gen = torch.Generator().manual_seed(0)
    weight = torch.where(torch.rand(64, 256, generator=gen) < density, torch.randn(64, 256, generator=gen), 0.0)
    packed = tile.pack_ref(weight.bfloat16())
    bits = packed.values.view(torch.int16).numpy().view(np.uint32).reshape(-1, 128, 4)  # pairs of values
    gaps = packed.gaps.numpy().view(np.uint32).reshape(-1, 128)
    base, memory = 1024, np.zeros(2**17, np.uint8)

    lane = np.arange(128, dtype=np.uint32)  # what walker() gives them
    up = lane < 64
    direction = np.where(up, 0x01010101, 2**32 - 0x01010101).astype(np.uint32)
    place = np.uint32(base + half * 2**15) + (lane % 32 * 2 + lane % 64 // 32) * 2
    c = np.where(up, 0, 2**32 - 1).astype(np.uint32)
    assert density < 0.1 or packed.starts[-1] > 0
    for values, word in zip(bits[: packed.starts[-1]], gaps, strict=False):
        c = run(scatter.STEP.value, [None, c, *values.T, word, direction, place], memory, stored)

    extras, places = (
        t.view(torch.int16).numpy().view(np.uint32).reshape(-1, 2) for t in (packed.extras, packed.places)
    )
    if len(extras):
        run(scatter.PUT.value, [None, *extras.T, *places.T, np.uint32(base + half * 2**15)], memory)

    k, r = np.arange(256)[:, None], np.arange(64)[None, :]
    at = base + half * 2**15 + k * 128 + ((r // 8) ^ (k % 8)) * 16 + r % 8 * 2
    found = memory[at].astype(np.uint16) | memory[at + 1].astype(np.uint16) << 8
    assert np.array_equal(found.T, weight.bfloat16().view(torch.int16).numpy().view(np.uint16))
    memory[at], memory[at + 1] = 0, 0
    assert not memory.any()
