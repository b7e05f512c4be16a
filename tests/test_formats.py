"""The contract of every runtime layout: exact inverse, honest size, the same product as dense."""

import dataclasses
import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from dlpkit.kernels import formats

SHAPES = [(1, 1), (1, 40), (40, 1), (3, 5), (7, 100), (33, 129), (64, 256), (65, 600)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def random_sparse(N, K, density, dtype=torch.float32, seed=0, nm=None):
    """[N, K] with about `density` kept, or exactly n of every m; some of the kept are -0.0, one row is empty and one full."""
    gen = torch.Generator().manual_seed(seed)
    weight = torch.randn(N, K, generator=gen).to(dtype)
    weight[torch.rand(N, K, generator=gen) < 0.05] = -0.0
    noise = torch.rand(N, K, generator=gen)
    if nm is None:
        keep = noise < density
        keep[N // 2] = N == 1
        keep[N // 3] = True
    else:
        n, m = nm
        padded = torch.nn.functional.pad(noise, (0, -K % m), value=2.0).view(N, -1, m)
        keep = (padded.argsort(2).argsort(2) < n).view(N, -1)[:, :K]
    return torch.where(keep, weight, torch.zeros((), dtype=dtype))


def suited(format, N, K, density, dtype=torch.float32, seed=0):
    return random_sparse(N, K, density, dtype, seed, nm=(2, 4) if format in ("nm", "fragment", "cusparselt") else None)


def bits(t):
    return t.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


@pytest.mark.parametrize("format", formats.names())
@pytest.mark.parametrize(("N", "K"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_roundtrip_is_exact(format, N, K, dtype):
    weight = suited(format, N, K, 0.3, dtype)
    packed = formats.get(format).pack(weight)
    assert packed.shape == (N, K)
    assert torch.equal(bits(packed.dense()), bits(weight))


@pytest.mark.parametrize("format", formats.names())
@settings(max_examples=25, deadline=None)
@given(
    N=st.integers(1, 70), K=st.integers(1, 300), density=st.sampled_from([0.0, 0.02, 0.2, 0.5, 0.9, 1.0]), seed=st.integers(0, 9),
)  # fmt: skip
def test_roundtrip_of_anything(format, N, K, density, seed):
    weight = suited(format, N, K, density, torch.bfloat16, seed)
    assert torch.equal(bits(formats.get(format).pack(weight).dense()), bits(weight))


@pytest.mark.parametrize("format", ["fragment", "cusparselt"])
def test_only_two_of_four_are_taken(format):
    weight = torch.zeros(8, 30)
    weight[3, 8:11] = 1
    with pytest.raises(ValueError, match="keeps 3 of 4"):
        formats.get(format).pack(weight)
    weight[3, 8] = 0
    assert torch.equal(formats.get(format).pack(weight).dense(), weight)


@pytest.mark.parametrize("format", formats.names())
def test_roundtrip_of_zeros(format):
    assert not formats.get(format).pack(torch.zeros(4, 48)).dense().any()


@pytest.mark.parametrize("format", formats.names())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lead", [(), (1,), (5,), (2, 3)])
def test_matmul_matches_float64(format, dtype, lead):
    weight = suited(format, 33, 129, 0.4, dtype)
    x, bias = torch.randn(*lead, 129).to(dtype), torch.randn(33).to(dtype)
    packed = formats.get(format).pack(weight)
    want = x.double() @ weight.double().t()
    close = {"rtol": TOLERANCE[dtype], "atol": 10 * TOLERANCE[dtype]}
    assert_close(packed.matmul(x).double(), want, **close)
    assert_close(packed.matmul(x, bias).double(), want + bias.double(), **close)


@pytest.mark.parametrize("format", formats.names())
def test_nbytes_is_the_truth_and_fields_rebuild(format):
    weight = suited(format, 65, 600, 0.4, torch.bfloat16)
    packed = formats.get(format).pack(weight)
    fields = {f.name: getattr(packed, f.name) for f in dataclasses.fields(packed)}
    assert packed.nbytes == sum(v.nbytes for v in fields.values() if isinstance(v, torch.Tensor))
    assert all(isinstance(v, torch.Tensor | int) for v in fields.values())
    assert packed.values.dtype == weight.dtype
    assert torch.equal(type(packed)(**fields).dense(), weight)


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4), (0, 16), (16, 0)])
@pytest.mark.parametrize("format", formats.names())
def test_pack_wants_rows_and_columns(format, shape):
    if format == "dense" and len(shape) == 2:
        assert formats.get(format).pack(torch.zeros(shape)).shape == shape  # what no kernel is for stays as it is
        return
    with pytest.raises(ValueError, match=r"pack wants a weight \[N, K\]"):
        formats.get(format).pack(torch.zeros(shape))


@pytest.mark.parametrize("sparsity", [0.5, 0.6, 0.7, 0.8])
def test_sell_wastes_little(sparsity):
    N, K, kept = 128, 4096, round(4096 * (1 - sparsity))
    weight = torch.zeros(N, K, dtype=torch.bfloat16)
    weight.scatter_(1, torch.rand(N, K).argsort(1)[:, :kept], 1.0)
    fillers = (1 - (1 - sparsity)) ** 15  # of the values, have a gap above 15
    assert formats.get("sell").pack(weight, rows=32, segments=16).nbytes / (2.5 * N * kept) < 1.05 + 1.1 * fillers


@pytest.mark.parametrize(("rows", "segments"), [(1, 1), (8, 4), (64, 2)])
def test_sell_of_any_lane_grid(rows, segments):
    weight = random_sparse(70, 333, 0.2)
    assert torch.equal(formats.get("sell").pack(weight, rows, segments).dense(), weight)


def test_sell_packs_in_chunks_of_rows(monkeypatch):
    sell, weight = formats.get("sell"), random_sparse(150, 100, 0.3)
    whole = sell.pack(weight)
    monkeypatch.setattr(sell, "CHUNK", 2000)
    assert torch.equal(sell.pack(weight).dense(), weight)
    assert sell.pack(weight).nbytes < 1.01 * whole.nbytes


def test_sell_sorts_rows_of_unequal_length():
    weight = (torch.rand(256, 1024) < torch.rand(256, 1)).to(torch.bfloat16)
    pack = functools.partial(formats.get("sell").pack, rows=32, segments=16)
    mixed = weight.view(8, 32, 1024).transpose(0, 1).reshape(256, 1024)
    assert pack(weight).nbytes == pack(mixed).nbytes  # any order packs alike
    assert pack(weight).nbytes < 1.25 * 2.5 * weight.count_nonzero()


@pytest.mark.parametrize("nm", [(2, 4), (1, 4), (3, 4), (4, 8), (3, 8), (8, 16), (5, 32), (1, 32)])
@pytest.mark.parametrize("K", [32, 100, 513])
def test_nm_infers_the_pattern(nm, K):
    weight = random_sparse(40, K, 0.0, torch.bfloat16, nm=nm)
    packed = formats.get("nm").pack(weight)
    assert packed.n <= nm[0] or packed.m > nm[1]  # another (n, m) only if it is smaller
    assert torch.equal(bits(packed.dense()), bits(weight))


def test_nm_refuses_unstructured():
    with pytest.raises(ValueError, match="no sparser than 4:4, 8:8"):
        formats.get("nm").pack(torch.ones(4, 64))


def test_unknown_format_lists_the_known():
    with pytest.raises(ValueError, match="cusparselt, dense, fragment, nm, sell, tile"):
        formats.get("csr")
