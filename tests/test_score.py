import pytest
import torch

from dlpkit.kernels.score import Scores


@pytest.mark.parametrize(("N", "K"), [(1, 1), (7, 13), (32, 128), (33, 129)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_scores_are_magnitude_times_terms(N, K, dtype, device):
    weight = torch.randn(N, K, device=device).to(dtype)
    scale, row, column = torch.rand(K, device=device), torch.rand(N, device=device), torch.rand(K, device=device)
    size = weight.double().abs()
    expected = [
        (Scores(weight), size),
        (Scores(weight, scale), size * scale),
        (Scores(weight, scale, row, column), size * scale * (row[:, None] + column)),
    ]
    for scores, value in expected:
        torch.testing.assert_close(scores.dense().double(), value, rtol=1e-6, atol=0)  # float32


def test_scores_want_matching_terms():
    with pytest.raises(ValueError, match=r"scale \[8\] float32, got \(4,\)"):
        Scores(torch.ones(4, 8), torch.ones(4))
    with pytest.raises(ValueError, match=r"row \[4\] float32, got \(4,\) of torch.float64"):
        Scores(torch.ones(4, 8), row=torch.ones(4).double(), column=torch.ones(8))
    with pytest.raises(ValueError, match="row with column"):
        Scores(torch.ones(4, 8), row=torch.ones(4))
    with pytest.raises(ValueError, match=r"weight \[N, K\]"):
        Scores(torch.ones(8))
