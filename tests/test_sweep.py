"""The sweep kernel against the loop over columns."""

import pytest
import torch

from dlpkit.kernels import runtime
from dlpkit.kernels.sweep import sweep_, sweep_ref_

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
fused = pytest.mark.skipif(
    not (torch.cuda.is_available() or runtime.INTERPRET), reason="wants a GPU or Triton's interpreter"
)


def problem(N, C):
    """A block of a wider weight, and the factor of a well-conditioned H^-1."""
    gen = torch.Generator().manual_seed(C)
    mix = torch.randn(C, C, generator=gen) / C**0.5
    factor = torch.linalg.cholesky(torch.eye(C) + mix @ mix.T, upper=True)
    return torch.randn(N, C + 8, generator=gen).to(DEVICE)[:, 4:-4], factor.to(DEVICE)


@fused
@pytest.mark.parametrize(("N", "C"), [(1, 1), (5, 7), (3, 32), (40, 100), (2, 300)])
def test_a_given_mask(N, C):
    block, factor = problem(N, C)
    kept = torch.rand(N, C, generator=torch.Generator().manual_seed(0)).to(DEVICE) < 0.5
    expected = block.clone()
    errors = sweep_ref_(expected, factor, kept)
    torch.testing.assert_close(sweep_(block, factor, kept), errors, rtol=1e-4, atol=1e-5)  # float32
    torch.testing.assert_close(block, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(block != 0, kept)


@fused
@pytest.mark.parametrize(
    ("n", "m", "C"), [(2, 4, 32), (1, 4, 12), (4, 4, 8), (4, 8, 24), (8, 16, 32), (5, 32, 32), (5, 32, 64)]
)
def test_masks_chosen_on_the_way(n, m, C):
    block, factor = problem(5, C)
    expected = block.clone()
    errors = sweep_ref_(expected, factor, None, n, m)
    torch.testing.assert_close(sweep_(block, factor, None, n, m), errors, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(block, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(block != 0, expected != 0)


def test_refusals():
    block, factor = problem(2, 8)
    for wrong in ({}, {"n": 2, "m": 4, "kept": block > 0}, {"n": 2, "m": 5}):
        with pytest.raises(ValueError, match="sweep_ wants a mask or n of every m"):
            sweep_(block, factor, **wrong)
