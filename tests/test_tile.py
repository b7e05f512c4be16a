"""The kernels of the tile format: packing against its reference, the product against float64, and what has to hold of the layout."""

import pytest
import torch
from test_matmul import DEVICE, TOLERANCE, check_operator, relative_error, sparse

from dlpkit.kernels import runtime
from dlpkit.kernels.formats import tile

INTERPRETED = pytest.mark.skipif(
    not (torch.cuda.is_available() or runtime.INTERPRET), reason="wants a GPU or Triton's interpreter"
)
WGMMA = pytest.mark.skipif(not runtime.use_wgmma(torch.device(DEVICE)), reason="wants a Hopper GPU and Gluon")


def balanced(N, K, n, dtype=torch.bfloat16):
    """[N, K] with n nonzeros in every row of every 256 columns."""
    gen = torch.Generator().manual_seed(0)
    keep = torch.rand(N, K // 256, 256, generator=gen).argsort(2).argsort(2) < n
    return torch.where(keep.view(N, K), torch.randn(N, K, generator=gen) + 9, 0.0).to(dtype).to(DEVICE)


def bits(t):
    return t.view(torch.int16) if t.is_floating_point() else t


@pytest.mark.parametrize(("n", "waste"), [(128, 1.04), (102, 1.06), (80, 1.06), (77, 1.08), (51, 1.11)])
def test_balanced_masks_waste_little(n, waste):
    weight = balanced(512, 4096, n)
    assert tile.pack_ref(weight).nbytes < waste * 2.5 * int(weight.count_nonzero())


@pytest.mark.parametrize(("sparsity", "waste"), [(0.5, 1.06), (0.6, 1.08), (0.7, 1.1), (0.8, 1.13)])
def test_other_masks_fit_too(sparsity, waste):
    weight = torch.where(
        torch.rand(512, 4096, generator=torch.Generator().manual_seed(0)) < sparsity, 0.0, 1.0
    ).bfloat16()
    assert tile.pack_ref(weight).nbytes < waste * 2.5 * int(weight.count_nonzero())


@INTERPRETED
@pytest.mark.parametrize(("N", "K", "pattern"), [(1, 1, "0.0"), (70, 300, "0.5"), (130, 513, "0.8"), (65, 256, "0.95")])
def test_packing_equals_its_reference(N, K, pattern):
    weight = sparse(N, K, pattern, torch.float16)
    packed, want = tile.pack(weight), tile.pack_ref(weight)
    for name in ("values", "gaps", "extras", "places", "starts", "extra_starts"):
        assert torch.equal(bits(getattr(packed, name)), bits(getattr(want, name))), name
    assert torch.equal(bits(packed.dense()), bits(weight))


@INTERPRETED
def test_where_wgmma_is_missing_the_product_is_right(monkeypatch):
    monkeypatch.setattr("dlpkit.kernels.ops.use_wgmma", lambda device: False)
    weight = sparse(65, 257, "0.5")
    x = torch.randn(3, 257, dtype=weight.dtype, device=DEVICE)
    assert relative_error(tile.pack(weight).matmul(x), x.double() @ weight.double().t()) < TOLERANCE[weight.dtype]


@INTERPRETED
def test_operators_are_well_formed_and_gradients_those_of_dense():
    weight = sparse(24, 40, "0.5")
    check_operator(torch.ops.dlpkit.tile_matmul, tile.pack(weight), weight, 3)


@WGMMA
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("kernel", "rows"), [("batch", [1, 8, 17, 40, 64, 100, 150, 300]), ("expand", [300])])
@pytest.mark.parametrize(("N", "K"), [(1, 8), (64, 256), (200, 520), (200, 2100), (1000, 1001), (4096, 1024)])
def test_batches(N, K, kernel, rows, dtype, pinned):
    pinned(kernel)
    weight = sparse(N, K, "0.6", dtype)
    packed = tile.pack(weight)
    for M in rows:
        x, bias = (torch.randn(*shape, dtype=dtype, device=DEVICE) for shape in ((M, K), (N,)))
        y = packed.matmul(x, bias)
        assert relative_error(y, x.double() @ weight.double().t() + bias.double()) < TOLERANCE[dtype]
        assert torch.equal(y, packed.matmul(x, bias))  # the same sum every time
        assert not packed.arrived.any()


@WGMMA
@pytest.mark.parametrize(("kernel", "M"), [("batch", 16), ("batch", 128), ("expand", 300)])
def test_more_extras_than_are_read_ahead(kernel, M, pinned):
    """A few rows are dense from column 512 on: later blocks have more extras than the first."""
    pinned(kernel)
    weight = sparse(256, 2048, "0.99")
    weight[::8, 512:] = torch.randn(32, 1536, device=DEVICE).to(weight.dtype)
    packed = tile.pack(weight)
    more = packed.extra_starts.diff().view(4, 8)
    assert more[:, 2:].max() > 512 > more[:, :2].max()
    x = torch.randn(M, 2048, dtype=weight.dtype, device=DEVICE)
    assert relative_error(packed.matmul(x), x.double() @ weight.double().t()) < TOLERANCE[weight.dtype]


@WGMMA
@pytest.mark.parametrize("M", [16, 64])
@pytest.mark.parametrize(
    "share",
    [
        ("whole", 8, 0, 1, 0, 1),
        ("whole", 3, 0, 3, 0, 1),  # three tiles to an owner, two to the last
        ("here", 8, 4, 1, 3, 6),
        ("here", 4, 5, 2, 4, 7),  # helpers of two tiles and tiles of two helpers
        ("here", 8, 8, 1, 8, 8),  # an owner of one block
        ("here", 8, 8, 1, 1, 1),
        ("later", 0, 11, 1, 9, 7),
        ("later", 0, 72, 1, 9, 1),
    ],
)
def test_batches_however_they_are_shared(share, M, pinned, monkeypatch):
    from dlpkit.kernels import batch  # wants Gluon

    pinned("batch")
    monkeypatch.setattr(batch, "shares", lambda *of: batch.Shares(*share))
    weight = sparse(1000, 2100, "0.6")
    packed = tile.pack(weight)
    x = torch.randn(M, 2100, dtype=weight.dtype, device=DEVICE)
    assert relative_error(packed.matmul(x), x.double() @ weight.double().t()) < TOLERANCE[weight.dtype]
    assert not packed.arrived.any()


@WGMMA
@pytest.mark.parametrize("blocks", [62, 63, 64, 65, 129])
def test_a_program_with_many_blocks(blocks, pinned, monkeypatch):
    from dlpkit.kernels import batch  # wants Gluon

    pinned("batch")
    monkeypatch.setattr(batch, "shares", lambda *of: batch.Shares("whole", 1, 0, 1, 0, 1))
    weight = sparse(128, 256 * blocks, "0.6")
    x = torch.randn(8, 256 * blocks, dtype=weight.dtype, device=DEVICE)
    assert relative_error(tile.pack(weight).matmul(x), x.double() @ weight.double().t()) < TOLERANCE[weight.dtype]


@WGMMA
@pytest.mark.parametrize(("kernel", "M"), [("batch", 4), ("batch", 64)])
def test_strided_rows(kernel, M, pinned):
    pinned(kernel)
    weight = balanced(256, 512, 128)
    packed = tile.pack(weight)
    wide = torch.randn(M, 704, dtype=weight.dtype, device=DEVICE)
    shifted = torch.randn(M * 512 + 1, dtype=weight.dtype, device=DEVICE)[1:].view(M, 512)  # contiguous, not aligned
    turned, repeated = torch.randn(512, M, dtype=weight.dtype, device=DEVICE).t(), wide[:1, 8:520].expand(M, 512)
    for x in (wide[:, 3:515], wide[:, 8:520], turned, shifted, repeated):
        assert torch.equal(packed.matmul(x), packed.matmul(x.clone(memory_format=torch.contiguous_format)))


@WGMMA
def test_what_stands_beside_x_is_not_read(pinned):
    pinned("batch")
    weight = sparse(64, 520, "0.6")
    wide = torch.full((24, 1024), torch.nan, dtype=weight.dtype, device=DEVICE)
    x = wide[4:20, :520].normal_()
    assert relative_error(tile.pack(weight).matmul(x), x.double() @ weight.double().t()) < TOLERANCE[weight.dtype]


@WGMMA
@pytest.mark.parametrize(("kernel", "M"), [("batch", 16), ("batch", 100), ("expand", 300)])
def test_graphs_and_compile(kernel, M, pinned):
    pinned(kernel)
    weight = balanced(512, 1024, 77)
    packed, x = tile.pack(weight), torch.randn(M, 1024, dtype=weight.dtype, device=DEVICE)
    want = packed.matmul(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = packed.matmul(x)
    graph.replay()
    assert torch.equal(got, want)
    assert torch.equal(torch.compile(packed.matmul, fullgraph=True)(x), want)
