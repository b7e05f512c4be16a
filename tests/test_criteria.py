import numpy as np
import pytest
import torch

from dlpkit import criteria
from dlpkit.calibration import Stats
from dlpkit.criteria import sparsegpt
from dlpkit.patterns import Pattern
from dlpkit.pruning import prune_

every = pytest.mark.parametrize("name", criteria.names())
PATTERNS = ["0.5", "0.3", "0.5@16", "2:4", "1:4", "5:8"]


def problem(N=24, K=64, tokens=400, seed=0):
    """A weight, inputs whose features differ in size and are correlated, and their Stats."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(N, K, generator=generator)
    mix = torch.randn(K, K, generator=generator) / 8 + torch.eye(K)
    x = torch.randn(tokens, K, generator=generator) @ mix * torch.rand(K, generator=generator)
    return weight, x, Stats(tokens, x.square().sum(0), x.T @ x)


def pruned(weight, stats, name, pattern):
    """A pruned copy of the weight."""
    copy = weight.clone()
    prune_(copy, stats, criteria.get(name), Pattern.parse(pattern), "layers.3.up")
    return copy


def error(weight, pruned, x):
    return ((x @ (weight - pruned).T).norm() / (x @ weight.T).norm()).item()


@every
def test_scores_are_finite_deterministic_and_not_negative(name):
    weight, _, stats = problem()
    score = criteria.get(name).scores(weight, stats).dense()
    assert score.shape == weight.shape
    assert torch.isfinite(score).all()
    assert (score >= 0).all()
    assert torch.equal(score, criteria.get(name).scores(weight, stats).dense())


@every
@pytest.mark.parametrize("pattern", PATTERNS)
def test_zeros_follow_the_pattern(name, pattern):
    weight, _, stats = problem()
    pattern = Pattern.parse(pattern)
    zeros = pruned(weight, stats, name, pattern) == 0
    if pattern.m:
        assert (zeros.view(24, -1, pattern.m).sum(2) == pattern.m - pattern.n).all()
    elif pattern.block:
        assert (zeros.view(24, -1, pattern.block).sum(2) == round(pattern.sparsity * pattern.block)).all()
    else:
        assert zeros.float().mean().item() == pytest.approx(pattern.sparsity, abs=0.01)


@every
def test_larger_means_keep(name):
    """Removing the smallest scores hurts the output less than removing the largest."""
    weight, x, stats = problem()
    score = criteria.get(name).scores(weight, stats).dense()
    small, large = (
        weight.masked_fill(score.argsort(1).argsort(1) < 32, 0.0),
        weight.masked_fill(score.argsort(1).argsort(1) >= 32, 0.0),
    )
    assert error(weight, small, x) < error(weight, large, x)


def test_repair_beats_removal():
    weight, x, stats = problem()
    errors = {name: error(weight, pruned(weight, stats, name, "0.5"), x) for name in criteria.names()}
    assert errors["sparsegpt"] < errors["wanda"] < errors["magnitude"]


def test_ria_against_its_formula():
    weight, x, stats = problem(N=3, K=5)
    w, norm = weight.abs().double().numpy(), x.double().norm(dim=0).numpy()
    expected = (w / w.sum(1, keepdims=True) + w / w.sum(0, keepdims=True)) * norm**0.5
    np.testing.assert_allclose(
        criteria.get("ria").scores(weight, stats).dense().numpy(), expected, rtol=1e-5
    )  # float32


@pytest.mark.parametrize("pattern", ["0.5", "2:4", "0.5@16"])
def test_sparsegpt_against_solving_every_row_again(pattern):
    """With its mask given, OBS column by column equals the textbook form: H of the columns to the right inverted anew at every step."""
    weight, _, stats = problem(N=4, K=32)
    pattern = Pattern.parse(pattern)
    pruned = sparsegpt.solve(weight, stats, pattern).double()
    H = stats.hessian.double()
    H += torch.eye(32) * sparsegpt.DAMPING[0] * H.diag().mean()
    for row, found in zip(weight.double(), pruned, strict=True):
        w = row.clone()
        for j in range(32):
            if found[j] == 0:
                inverse = torch.linalg.inv(H[j:, j:])
                w[j:] -= w[j] / inverse[0, 0] * inverse[0]
        torch.testing.assert_close(w, found, rtol=1e-3, atol=1e-4)  # float32 against float64


def test_sparsegpt_removes_inputs_that_were_never_active():
    weight, x, _ = problem()
    x[:, [3, 17]] = 0
    pruned = sparsegpt.solve(weight, Stats(400, x.square().sum(0), x.T @ x), Pattern.parse("0.25"))
    assert (pruned[:, [3, 17]] == 0).all()
    assert torch.isfinite(pruned).all()


def test_sparsegpt_raises_its_damping_before_it_gives_up():
    weight, _, _ = problem(K=8)
    one = torch.ones(8, 8)
    assert torch.isfinite(sparsegpt.solve(weight, Stats(1, one.diag(), one), Pattern.parse("0.5"))).all()
    with pytest.raises(ValueError, match="cannot be factorised"):
        sparsegpt.solve(weight, Stats(1, one.diag(), one - 9 * torch.eye(8)), Pattern.parse("0.5"))


@every
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_weights_name_the_linear(name, bad):
    weight, _, stats = problem()
    weight[1, 1] = bad
    with pytest.raises(ValueError, match=r"layers\.3\.up: .* holds? NaN or Inf"):
        pruned(weight, stats, name, "0.5")
