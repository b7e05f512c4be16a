"""2:4 weights as fragments of Hopper's sparse tensor cores: the layout thread by thread, and the product against float64."""

import pytest
import torch
from test_matmul import DEVICE, TOLERANCE, check_operator, relative_error, sparse

from dlpkit.kernels import runtime
from dlpkit.kernels.formats import fragment

INTERPRETED = pytest.mark.skipif(
    not (torch.cuda.is_available() or runtime.INTERPRET), reason="wants a GPU or Triton's interpreter"
)
WGMMA = pytest.mark.skipif(not runtime.use_wgmma(torch.device(DEVICE)), reason="wants a Hopper GPU and Gluon")
SHAPES = [(1, 4), (64, 64), (65, 130), (200, 520)]


def two_of_four(N, K, dtype=torch.bfloat16):
    """[N, K] with at most two nonzeros in four, often fewer; some are -0.0."""
    gen = torch.Generator().manual_seed(N)
    keep = torch.rand(N, -(-K // 4), 4, generator=gen).argsort(2).argsort(2) < 2
    keep &= torch.rand(keep.shape, generator=gen) < 0.8
    weight = torch.randn(N, K, generator=gen).to(dtype)
    weight[torch.rand(N, K, generator=gen) < 0.02] = -0.0
    return torch.where(keep.flatten(1)[:, :K], weight, torch.zeros((), dtype=dtype)).to(DEVICE)


def bits(t):
    return t.view(torch.int16) if t.is_floating_point() else t


def test_threads_hold_what_the_instruction_wants():
    """Read as the PTX manual says: register i of a thread has rows g and g + 8 in turn, columns below 16 of 32 first; the positions of a
    quarter of 64 columns are in the word of one thread of four, row g in its low half."""
    weight = two_of_four(128, 192).cpu()
    packed = fragment.pack_ref(weight)
    values, codes = packed.values.view(2, 3, 2, 128, 4, 2), packed.codes.view(2, 3, 128)
    found = torch.zeros_like(weight)
    for thread in range(128):
        g, q = thread % 32 // 4, thread % 4
        for half in range(2):
            for register in range(4):
                row = thread // 32 * 16 + g + 8 * (register % 2)
                quarter = 2 * half + register // 2
                word = codes[:, :, thread - q + quarter].long()
                code = word >> (16 * (register % 2) + 4 * q) & 15
                column = 16 * quarter + 4 * q
                for i in range(2):
                    position = code & 3 if i == 0 else code >> 2
                    for atom in range(2):
                        for step in range(3):
                            at = 64 * atom + row, 64 * step + column + int(position[atom, step])
                            found[at] = values[atom, step, half, thread, register, i]
    assert torch.equal(bits(found), bits(weight))


def test_positions_rise_in_every_group():
    """Two equal positions are undefined to the instruction."""
    packed = fragment.pack_ref(two_of_four(70, 300))
    nibbles = packed.codes.long()[:, None] >> 4 * torch.arange(8, device=packed.codes.device) & 15
    assert ((nibbles & 3) < (nibbles >> 2)).all()


def test_nine_bits_to_a_weight():
    packed = fragment.pack(two_of_four(512, 1024))
    assert packed.nbytes == 512 * 1024 * 9 // 8


@INTERPRETED
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_packing_equals_its_reference(N, K, dtype):
    weight = two_of_four(N, K, dtype)
    packed, want = fragment.pack(weight), fragment.pack_ref(weight)
    for name in ("values", "codes"):
        assert torch.equal(bits(getattr(packed, name)), bits(getattr(want, name))), name
    assert torch.equal(bits(packed.dense()), bits(weight))


@INTERPRETED
def test_where_wgmma_is_missing_the_product_is_right(monkeypatch):
    monkeypatch.setattr("dlpkit.kernels.ops.use_wgmma", lambda device: False)
    weight = two_of_four(65, 257)
    x = torch.randn(3, 257, dtype=weight.dtype, device=DEVICE)
    assert relative_error(fragment.pack(weight).matmul(x), x.double() @ weight.double().t()) < TOLERANCE[weight.dtype]


@INTERPRETED
def test_operators_are_well_formed_and_gradients_those_of_dense():
    weight = two_of_four(24, 40)
    check_operator(torch.ops.dlpkit.fragment_matmul, fragment.pack(weight), weight, 3)


@WGMMA
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kernel", ["mma", "expand"])
@pytest.mark.parametrize(("N", "K"), [*SHAPES, (4096, 1024), (300, 8200), (14336, 1001), (17000, 256)])
def test_products(N, K, kernel, dtype, pinned):
    pinned(kernel)
    weight = two_of_four(N, K, dtype)
    packed = fragment.pack(weight)
    for M in (1, 7, 16, 30, 64, 100, 150) if kernel == "mma" else (300,):
        x, bias = (torch.randn(*shape, dtype=dtype, device=DEVICE) for shape in ((M, K), (N,)))
        y = packed.matmul(x, bias)
        assert relative_error(y, x.double() @ weight.double().t() + bias.double()) < TOLERANCE[dtype]
        assert relative_error(packed.matmul(x), x.double() @ weight.double().t()) < TOLERANCE[dtype]
        assert torch.equal(y, packed.matmul(x, bias))  # the same sum every time


@WGMMA
def test_strides(pinned):
    pinned("mma")
    weight = sparse(192, 136, "2:4")
    packed = fragment.pack(weight)
    wide = torch.randn(16, 200, dtype=weight.dtype, device=DEVICE)
    for x in (wide[:, 3:139], wide[:, 8:144], torch.randn(136, 16, dtype=weight.dtype, device=DEVICE).t()):
        assert torch.equal(packed.matmul(x), packed.matmul(x.clone(memory_format=torch.contiguous_format)))


@WGMMA
@pytest.mark.parametrize("M", [1, 64])
def test_graphs_and_compile(M, pinned):
    """One layer after the other, as kernels begin while those before them end."""
    pinned("mma")
    weights = [sparse(1024, 1024, "2:4") / 32 for _ in range(4)]
    packed, x = [fragment.pack(w) for w in weights], torch.randn(M, 1024, dtype=weights[0].dtype, device=DEVICE)

    def layers(x):
        for p in packed:
            x = p.matmul(x)
        return x

    want = x.double()
    for w in weights:
        want = (want @ w.double().t()).to(x.dtype).double()
    layers(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layers(x)
    for _ in range(3):
        graph.replay()
        assert relative_error(y, want) < 4 * TOLERANCE[x.dtype]
    assert relative_error(torch.compile(layers, fullgraph=True)(x), want) < 4 * TOLERANCE[x.dtype]
