import pytest
import torch
from conftest import tiny_model

from dlpkit import cka

WINDOWS = torch.randint(0, 256, (12, 16), generator=torch.Generator().manual_seed(3))


def test_the_map_is_symmetric_with_ones_on_the_diagonal():
    found = cka.similarity(tiny_model(num_hidden_layers=5), list(WINDOWS.split(6)))
    assert found.shape == (5, 5)
    torch.testing.assert_close(found.diagonal(), torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(found, found.T)
    assert found[0, 1] > found[0, 4]  # neighbours are more alike


def gram(rows):
    return (rows @ rows.T).fill_diagonal_(0)


def test_cka_does_not_see_rotation_and_scale_but_independence():
    x, y = torch.randn(2, 40, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    turned = 3 * x @ torch.linalg.qr(y[:6]).Q
    own = (cka.hsic(gram(x), gram(x)) * cka.hsic(gram(turned), gram(turned))) ** 0.5
    assert cka.hsic(gram(x), gram(turned)) / own == pytest.approx(1)
    assert abs(cka.hsic(gram(x), gram(y)) / cka.hsic(gram(x), gram(x))) < 0.1


def test_the_estimate_is_unbiased():
    """Over many draws of independent samples its mean is zero, which that of the plain estimate tr(KHLH) is not."""
    draw = torch.Generator().manual_seed(1)
    found = [
        cka.hsic(*(gram(torch.randn(8, 3, dtype=torch.float64, generator=draw)) for _ in range(2))) for _ in range(3000)
    ]
    found = torch.tensor(found, dtype=torch.float64)
    mean, error = found.mean(), found.std() / 3000**0.5
    assert abs(mean) < 4 * error


def test_small_batches_are_refused():
    with pytest.raises(ValueError, match="at least 4 windows, got \\[3, 3, 3, 3\\]"):
        cka.similarity(tiny_model(), list(WINDOWS.split(3)))
