import inspect

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dlpkit import allocation as allocations
from dlpkit.allocation import alphapruning, exact, spread
from dlpkit.kernels.score import Scores

# Published keep ratios of DLP for LLaMA2-7B at 70 %, alpha 0.15, blocks 0 to 31 (ratios/ of github.com/ironartisan/DLP)
PUBLISHED_KEEP = [
    0.4652, 0.4497, 0.4235, 0.4038, 0.3947, 0.3845, 0.3723, 0.3639, 0.3583, 0.3511, 0.3458, 0.3391, 0.3327, 0.3249, 0.3166, 0.3085,
    0.2925, 0.2854, 0.2732, 0.2680, 0.2566, 0.2513, 0.2407, 0.2316, 0.2293, 0.2194, 0.2108, 0.1991, 0.1875, 0.1826, 0.1652, 0.1723,
]  # fmt: skip
every = pytest.mark.parametrize("name", allocations.names())
numbers = st.lists(st.floats(0.01, 100), min_size=1, max_size=40)


@every
@given(summaries=numbers, target=st.floats(0, 0.99), data=st.data())
def test_mean_by_parameters_is_the_target(name, summaries, target, data):
    sizes = torch.tensor(data.draw(st.lists(st.integers(1, 10**6), min_size=len(summaries), max_size=len(summaries))))
    found = allocations.get(name).sparsities(torch.tensor(summaries, dtype=torch.float64), sizes, target)
    assert ((found >= 0) & (found < 1)).all()
    assert (found * sizes).sum() / sizes.sum() == pytest.approx(target, abs=1e-9)


@every
def test_permuting_blocks_permutes_sparsities(name):
    allocator, order = allocations.get(name), torch.randperm(12)
    summaries, sizes = torch.rand(12, dtype=torch.float64), torch.randint(1, 100, (12,))
    found = allocator.sparsities(summaries, sizes, 0.6)
    torch.testing.assert_close(allocator.sparsities(summaries[order], sizes[order], 0.6), found[order])


@every
def test_summaries_are_finite_numbers(name):
    allocator = allocations.get(name)
    if allocator.NEEDS:
        parts = [Scores(torch.rand(30, 20)), Scores(torch.rand(8, 20))]
        assert isinstance(allocator.summarise(parts), float)
        assert allocator.summarise(parts) == allocator.summarise(parts)


def test_rescaling_reproduces_the_published_ratios():
    keep = torch.tensor(PUBLISHED_KEEP)
    found = spread(keep, torch.ones(32), 0.7, 0.15)
    assert (1 - found).mean().item() == pytest.approx(0.3, abs=1e-9)
    assert (found.max() - found.min()).item() == pytest.approx(0.3, abs=1e-9)
    torch.testing.assert_close(1 - found, keep.double(), rtol=0, atol=2e-4)  # published to four digits


@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=20), st.floats(0.1, 10), st.floats(0, 10))
def test_dlp_ignores_scale_and_offset_of_its_summaries(values, scale, offset):
    S, sizes, dlp = torch.tensor(values, dtype=torch.float64), torch.ones(len(values)), allocations.get("dlp")
    torch.testing.assert_close(
        dlp.sparsities(S * scale + offset, sizes, 0.7), dlp.sparsities(S, sizes, 0.7), rtol=0, atol=1e-6
    )


def test_dlp_keeps_blocks_of_small_scores_denser_and_owl_blocks_of_many_outliers():
    summaries, sizes = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64), torch.ones(3)
    assert allocations.get("dlp").sparsities(summaries, sizes, 0.5).tolist() == pytest.approx([0.35, 0.5, 0.65])
    assert allocations.get("owl").sparsities(summaries, sizes, 0.5).tolist() == pytest.approx([0.58, 0.5, 0.42])


def test_clamped_values_are_renormalised():
    found = exact(torch.tensor([0.7, 1.2, 0.95]), torch.ones(3), 0.9)
    assert found.max() < 1
    assert found.mean().item() == pytest.approx(0.9, abs=1e-9)


def test_dlp_strategies_are_median_and_mean():
    dlp, parts = allocations.get("dlp"), [Scores(torch.tensor([[1.0, 2.0, 9.0]])), Scores(torch.tensor([[3.0, 5.0]]))]
    assert (dlp.summarise(parts), dlp.summarise(parts, strategy="mean")) == (3.0, 4.0)
    assert inspect.signature(dlp.summarise).parameters["strategy"].default == "median"
    with pytest.raises(ValueError, match="median, mean"):
        dlp.summarise(parts, strategy="mode")


def test_power_law_exponent_is_found():
    quantiles = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    for alpha in (2.5, 4.0):
        sample = (1 - quantiles) ** (-1 / (alpha - 1))  # Pareto from x_min = 1
        assert alphapruning.exponent(sample) == pytest.approx(alpha, rel=0.05)


def test_unknown_options_are_refused():
    with pytest.raises(ValueError, match="dlp does not take lam: it takes alpha, strategy"):
        allocations.split_options(allocations.get("dlp"), {"lam": 1})
    with pytest.raises(ValueError, match="choose one of alphapruning, dlp, owl, uniform"):
        allocations.get("besa")
