"""The Triton kernels that pack and unpack, bit for bit and field for field what the references give."""

import dataclasses

import pytest
import torch

from dlpkit.kernels import arrange, runtime, storage
from dlpkit.kernels.formats import nm, sell

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() or runtime.INTERPRET), reason="wants a GPU or Triton's interpreter"
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(1, 1), (1, 70), (9, 1), (5, 33), (12, 100), (3, 1300), (2, 2048)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def sparse(N, K, density, dtype=torch.bfloat16, seed=0):
    """Random columns crowd to the left; some weights are -0.0, a row is empty and one is full."""
    gen = torch.Generator().manual_seed(seed)
    weight, noise = torch.randn(N, K, generator=gen), torch.rand(N, K, generator=gen)
    weight[torch.rand(N, K, generator=gen) < 0.1] = -0.0
    keep = noise < density * torch.linspace(1.5, 0.5, K)
    keep[N // 2], keep[N // 3] = N == 1, True
    return torch.where(keep, weight, 0.0).to(dtype).to(DEVICE)


def grouped(N, K, n, m, dtype=torch.bfloat16, seed=0):
    """At most n in every m, fewer in many groups."""
    gen = torch.Generator().manual_seed(seed)
    weight, noise = torch.randn(N, K, generator=gen), torch.rand(N, K, generator=gen)
    weight[noise > 0.9] = -0.0
    padded = torch.nn.functional.pad(noise, (0, -K % m), value=2.0).view(N, -1, m)
    keep = (padded.argsort(2).argsort(2) < n).view(N, -1)[:, :K] & (torch.rand(N, K, generator=gen) < 0.8)
    return torch.where(keep, weight, 0.0).to(dtype).to(DEVICE)


def bits(value):
    return value.view(storage.BITS[value.element_size()]) if isinstance(value, torch.Tensor) else value


def assert_same(got, want):
    for field in dataclasses.fields(want):
        ours, theirs = getattr(got, field.name), getattr(want, field.name)
        if isinstance(theirs, torch.Tensor):
            assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), field.name
            assert torch.equal(bits(ours), bits(theirs)), field.name
        else:
            assert ours == theirs, field.name


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_storage(N, K, dtype):
    weight = sparse(N, K, 0.4, dtype)
    stored = storage.encode(weight)
    assert_same(stored, storage.encode_ref(weight))
    assert torch.equal(bits(storage.decode(stored)), bits(weight))
    long = dataclasses.replace(stored, offsets=stored.offsets.long())
    assert torch.equal(bits(storage.decode(long)), bits(weight))


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_storage_of_nothing_and_of_everything(density):
    weight = (torch.randn(9, 50) + 9).mul(density).bfloat16().to(DEVICE)
    assert_same(storage.encode(weight), storage.encode_ref(weight))
    assert torch.equal(bits(storage.decode(storage.encode(weight))), bits(weight))
    assert storage.decode(storage.encode(weight[:, :0])).shape == (9, 0)
    assert storage.decode(storage.encode(weight[:0])).shape == (0, 50)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (4, 8), (3, 8), (8, 16), (5, 32), (1, 32), (20, 32)])
@pytest.mark.parametrize("K", [32, 100, 1300])
def test_nm(n, m, K):
    weight = grouped(7, K, n, m)
    assert_same(nm.pack(weight), nm.pack_ref(weight, *nm.infer_ref(weight)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "segments"), [(1, 1), (16, 4), (0, 0)])
@pytest.mark.parametrize(("N", "K"), [(1, 1), (5, 33), (12, 100)])
def test_nm_grids(N, K, rows, segments, dtype):
    weight = grouped(N, K, 1, 4, dtype)
    assert nm.infer(weight) == nm.infer_ref(weight)
    assert_same(nm.pack(weight, rows, segments), nm.pack_ref(weight, *nm.infer_ref(weight), rows, segments))


@pytest.mark.parametrize(("density", "dtype"), [(0.03, torch.float32), (0.4, torch.bfloat16), (0.4, torch.float16)])
@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_sell(N, K, density, dtype):
    weight = sparse(N, K, density, dtype)
    assert_same(sell.pack(weight), sell.pack_ref(weight))


@pytest.mark.parametrize(
    ("rows", "segments", "slack"), [(1, 1, 0.0), (2, 2, 0.5), (16, 4, 0.1), (4, 32, 0.0), (64, 8, 0.03)]
)
def test_sell_grids(rows, segments, slack, monkeypatch):
    monkeypatch.setattr(sell, "CHUNK", 2000)  # some chunks have several slices, some less than a tile of rows
    weight = sparse(24, 200, 0.2)
    assert_same(sell.pack(weight, rows, segments, slack), sell.pack_ref(weight, rows, segments, slack))


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_sell_of_nothing_and_of_everything(density):
    weight = (torch.randn(9, 50) + 9).mul(density).bfloat16().to(DEVICE)
    assert_same(sell.pack(weight), sell.pack_ref(weight))


def test_sell_of_many_columns():
    weight = sparse(2, 2**15 + 40, 0.01)
    assert_same(sell.pack(weight), sell.pack_ref(weight))


@pytest.mark.parametrize("N", [1, 40, 300])
def test_order_of_rows(N):
    gen = torch.Generator().manual_seed(N)
    pairs = torch.randint(3, 6, (N,), generator=gen).to(DEVICE)
    marks = torch.randint(0, 4, (N, sell.MARKS), generator=gen).cumsum(1).to(DEVICE)  # many are equal
    assert torch.equal(
        arrange.arrange(pairs, sell._components(marks), sell.SPLITS).long(), sell.arrange_ref(pairs, marks)
    )
