"""The fused kernels against a stable sort of the dense scores: masks bit for bit, and what is written in place."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from dlpkit.kernels import cull, runtime, statistics
from dlpkit.kernels.score import Scores
from dlpkit.kernels.select import Cut, all_but, keep, select, share, zero_

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() or runtime.INTERPRET), reason="wants a GPU or Triton's interpreter"
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TERMS = ["none", "scale", "shares", "both"]

# few values, so that ties abound: both zeros, denormals, and sizes that are not powers of two
VALUES = [0.0, -0.0, 1e-45, -3e-45, 1.1e-38, 0.5, -0.5, 1.0, 2.0, 3.0e38]
SIZES = [1, 2, 3, 7, 8, 31, 32, 33, 64, 100]
matrices = st.tuples(st.integers(1, 5), st.sampled_from(SIZES)).flatmap(
    lambda shape: arrays.arrays(np.float32, shape, elements=st.sampled_from(VALUES) | st.floats(-2.0, 2.0, width=32))
)


def scored(weight, terms="none", seed=0):
    gen = torch.Generator().manual_seed(seed)
    N, K = weight.shape
    scale = torch.randn(K, generator=gen).exp().to(DEVICE)
    shares = torch.rand(N, generator=gen).to(DEVICE), torch.rand(K, generator=gen).to(DEVICE)
    weight = weight.to(DEVICE)
    return Scores(
        weight,
        scale if terms in ("scale", "both") else None,
        *(shares if terms in ("shares", "both") else (None, None)),
    )


def check(scores, cut):
    """The mask is the reference's, and zero_ writes +0.0 where it is False and nothing else."""
    expected = select(scores.dense(), cut)
    assert torch.equal(keep(scores, cut), expected)
    before = scores.weight.clone()
    zero_(scores, cut)
    assert torch.equal(scores.weight.view(torch.uint8), before.masked_fill(~expected, 0.0).view(torch.uint8))


@settings(max_examples=25)
@given(matrices, st.floats(0, 0.99), st.sampled_from(TERMS[:2]))
def test_per_row(weight, sparsity, terms):
    check(scored(torch.from_numpy(weight) / 1e3, terms), share(weight.shape, sparsity))


@settings(max_examples=25)
@given(matrices, st.floats(0, 0.99), st.integers(2, 40))
def test_block_balanced(weight, sparsity, block):
    check(scored(torch.from_numpy(weight)), share(weight.shape, sparsity, block=block))


@settings(max_examples=25)
@given(matrices, st.floats(0, 1), st.sampled_from(TERMS[:2]))
def test_per_matrix(weight, sparsity, terms):
    check(scored(torch.from_numpy(weight) / 1e3, terms), share(weight.shape, sparsity, per="matrix"))


@pytest.mark.parametrize(
    ("n", "m", "K"),
    [(2, 4, 1120), (1, 4, 160), (4, 4, 160), (1, 2, 160), (3, 8, 160), (8, 16, 160), (5, 32, 160), (3, 5, 160)],
)
def test_nm(n, m, K):
    weight = torch.randint(-3, 4, (3, K), generator=torch.Generator().manual_seed(K)).bfloat16()
    check(scored(weight), all_but(weight.shape, n, m))


@pytest.mark.parametrize(
    ("dtype", "terms"),
    [
        *((torch.bfloat16, terms) for terms in TERMS),
        *((dtype, "both") for dtype in (torch.float16, torch.float32, torch.float64)),
    ],
)
@pytest.mark.parametrize(("N", "K"), [(1, 1), (3, 70), (2, 1500), (1, 5000)])
def test_every_dtype_and_term(N, K, terms, dtype):
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(N)).to(dtype)
    for cut in (share((N, K), 0.6), share((N, K), 0.6, "matrix"), share((N, K), 0.7, block=256)):
        check(scored(weight, terms), cut)


@pytest.mark.parametrize("cut", [Cut(64, 0), Cut(64, 64), Cut(0, 0), Cut(0, 192), Cut(4, 0), Cut(4, 4), Cut(40, 40, 0)])
def test_nothing_and_everything(cut):
    check(scored(torch.randn(3, 64)), cut)


def test_columns_of_a_wider_matrix():
    weight = torch.randn(6, 256)
    for cut in (share((6, 128), 0.5), share((6, 128), 0.5, "matrix"), all_but((6, 128), 2, 4)):
        wide = weight.clone().to(DEVICE)
        zero_(Scores(wide[:, 64:192]), cut)
        assert torch.equal(wide[:, 64:192] != 0, select(weight[:, 64:192].abs(), cut).to(DEVICE))
        assert torch.equal(wide[:, :64].cpu(), weight[:, :64])
        assert torch.equal(wide[:, 192:].cpu(), weight[:, 192:])


def test_one_program_after_another(monkeypatch):
    """Every row starts its search from the last one's threshold, whatever that was."""
    monkeypatch.setattr(cull, "multiprocessors", lambda device: 1)
    monkeypatch.setattr(cull, "WARP_REGISTERS", 1)
    sizes = torch.tensor([1.0, 1e-30, 1e30, 0.0, 1e-42, 5.0])[:, None]
    check(scored(torch.randn(6, 300) * sizes), share((6, 300), 0.5))
    check(scored(torch.randn(6, 300) * sizes), share((6, 300), 0.7, block=48))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("nan")])
@pytest.mark.parametrize("cut", [share((5, 64), 0.5), share((5, 64), 0.5, "matrix"), all_but((5, 64), 2, 4)])
def test_bad_scores_are_refused(bad, cut):
    weight = torch.randn(5, 64)
    weight[3, 17] = bad
    with pytest.raises(ValueError, match="hold NaN or Inf"):
        zero_(scored(weight, "scale"), cut)


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize(("N", "K"), [(1, 1), (3, 70), (2, 3000)])
def test_block_statistics(N, K, terms):
    gen = torch.Generator().manual_seed(K)
    parts = [scored(torch.randn(n, K, generator=gen).bfloat16(), terms, n) for n in (N, N + 2)]
    scores = torch.cat([part.dense().flatten() for part in parts])
    assert statistics.median(parts) == scores.median().item()
    assert statistics.mean(parts) == pytest.approx(scores.double().mean().item(), rel=1e-12)
    threshold = torch.tensor(2.0 * statistics.mean(parts), dtype=torch.float32).to(DEVICE)
    assert statistics.outlier_share(parts, 2.0) == int((scores > threshold).sum()) / scores.numel()
