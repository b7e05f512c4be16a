import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dlpkit.kernels import score as scores

floats = st.floats(min_value=0, max_value=2.0**127, width=32)


@pytest.mark.parametrize(("N", "K"), [(1, 1), (7, 13), (32, 128), (33, 129)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_score_is_magnitude_times_norm(N, K, dtype, device):
    w, sq = torch.randn(N, K, device=device).to(dtype), torch.rand(K, device=device)
    expected = w.double().abs() * sq.double().sqrt()
    torch.testing.assert_close(scores.score(w, sq).double(), expected, rtol=1e-6, atol=0)  # float32


def test_score_wants_matching_shapes():
    with pytest.raises(ValueError, match=r"got \(4, 8\) and \(4,\)"):
        scores.score(torch.ones(4, 8), torch.ones(4))


@given(st.lists(st.lists(floats, min_size=1, max_size=30), min_size=1, max_size=4))
def test_median_is_the_lower_median_of_all_parts(parts):
    tensors = [torch.tensor(part) for part in parts]
    assert scores.median(tensors) == torch.cat(tensors).median().item()


def test_median_with_ties_zeros_and_denormals():
    assert scores.median([torch.zeros(5), torch.tensor([1e-45, 1e-45, 1.0])]) == 0.0
    assert scores.median([torch.tensor([1e-45, 2e-45, 1e-45])]) == pytest.approx(1e-45)
    assert scores.median([torch.full((4, 4), 2.5)]) == 2.5


def test_mean_and_outliers_of_all_parts_together():
    parts = [torch.full((10,), 1.0), torch.tensor([100.0])]
    assert scores.mean(parts) == pytest.approx(10.0)
    assert scores.outlier_share(parts, 5) == pytest.approx(1 / 11)
