import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dlpkit.kernels import statistics
from dlpkit.kernels.score import Scores

floats = st.floats(min_value=-(2.0**127), max_value=2.0**127, width=32)


def scores(*rows):
    return [Scores(torch.tensor([row])) for row in rows]


@given(st.lists(st.lists(floats, min_size=1, max_size=30), min_size=1, max_size=4))
def test_median_is_the_lower_median_of_all_parts(parts):
    assert statistics.median(scores(*parts)) == torch.cat([torch.tensor(p).abs() for p in parts]).median().item()


def test_median_with_ties_zeros_and_denormals():
    assert statistics.median(scores([0.0, -0.0, 0.0, 0.0, 0.0], [1e-45, 1e-45, 1.0])) == 0.0
    assert statistics.median(scores([1e-45, 2e-45, 1e-45])) == pytest.approx(1e-45)
    assert statistics.median([Scores(torch.full((4, 4), 2.5))]) == 2.5


def test_mean_and_outliers_of_all_parts_together():
    parts = scores([1.0] * 10, [100.0])
    assert statistics.mean(parts) == pytest.approx(10.0)
    assert statistics.outlier_share(parts, 5.0) == pytest.approx(1 / 11)
    assert statistics.outlier_share(parts, 10.5) == 0.0
