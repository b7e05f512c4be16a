import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dlpkit.kernels.score import Scores
from dlpkit.kernels.select import all_but, keep, select, share, zero_

# few distinct values: ties are the hard part
scores_nk = st.tuples(st.integers(1, 5), st.integers(1, 20)).flatmap(
    lambda shape: st.lists(
        st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]
    ).map(lambda values: np.array(values, dtype=np.float32).reshape(shape))
)
sparsities = st.floats(0, 0.99)


def keep_reference(rows: np.ndarray, drop: int) -> np.ndarray:
    """Drop the first `drop` of a stable sort of every row, one row at a time."""
    keep = np.ones_like(rows, dtype=bool)
    for row, score in zip(keep, rows, strict=True):
        for column in sorted(range(len(score)), key=lambda k: score[k])[:drop]:
            row[column] = False
    return keep


@given(scores_nk, sparsities)
def test_per_row(score, sparsity):
    expected = keep_reference(score, round(sparsity * score.shape[1]))
    assert np.array_equal(select(torch.from_numpy(score), share(score.shape, sparsity)).numpy(), expected)


@given(scores_nk, sparsities)
def test_per_matrix(score, sparsity):
    expected = keep_reference(score.reshape(1, -1), round(sparsity * score.size)).reshape(score.shape)
    assert np.array_equal(select(torch.from_numpy(score), share(score.shape, sparsity, per="matrix")).numpy(), expected)


@given(scores_nk, sparsities, st.integers(2, 8))
def test_block_balanced(score, sparsity, block):
    parts = [score[:, start : start + block] for start in range(0, score.shape[1], block)]
    expected = np.concatenate([keep_reference(part, round(sparsity * part.shape[1])) for part in parts], axis=1)
    assert np.array_equal(select(torch.from_numpy(score), share(score.shape, sparsity, block=block)).numpy(), expected)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (8, 16), (5, 32), (4, 4)])
def test_nm_keeps_the_n_largest_of_every_m(n, m, device):
    score = torch.rand(6, 64, device=device)
    kept = select(score, all_but(score.shape, n, m)).view(6, -1, m)
    assert (kept.sum(2) == n).all()
    groups = score.view(6, -1, m)
    assert (groups.masked_fill(~kept, 2.0).amin(2) >= groups.masked_fill(kept, -1.0).amax(2)).all()


def test_ties_go_by_index():
    assert select(torch.ones(1, 4), all_but((1, 4), 2, 4)).tolist() == [[False, False, True, True]]


def test_refusals():
    with pytest.raises(ValueError, match="multiple of 4"):
        all_but((2, 6), 2, 4)
    with pytest.raises(ValueError, match="'row' or per 'matrix'"):
        share((2, 6), 0.5, per="column")


def test_keep_is_the_mask_and_zero_writes_it(device):
    weight = torch.randn(6, 64, device=device)
    scores, cut = Scores(weight, torch.rand(64, device=device)), share((6, 64), 0.5)
    kept = select(scores.dense(), cut)
    assert torch.equal(keep(scores, cut), kept)
    expected = weight.masked_fill(~kept, 0.0)
    assert zero_(scores, cut) is weight
    assert torch.equal(weight, expected)
