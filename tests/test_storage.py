import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dlpkit.kernels import storage


def sparse(N, K, density, dtype, seed=0):
    gen = torch.Generator().manual_seed(seed)
    weight = torch.randn(N, K, generator=gen).to(dtype)
    weight[torch.rand(N, K, generator=gen) < 0.1] = -0.0
    return torch.where(torch.rand(N, K, generator=gen) < density, weight, torch.zeros((), dtype=dtype))


def bits(t):
    return t.view(storage.BITS[t.element_size()])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_roundtrip_of_every_dtype(dtype):
    weight = sparse(9, 21, 0.5, torch.float32).to(dtype)
    assert torch.equal(bits(storage.decode(storage.encode(weight))), bits(weight))


@settings(max_examples=40, deadline=None)
@given(
    N=st.integers(1, 40), K=st.integers(1, 90), density=st.sampled_from([0.0, 0.1, 0.5, 1.0]), seed=st.integers(0, 9),
)  # fmt: skip
def test_roundtrip_of_anything(N, K, density, seed):
    weight = sparse(N, K, density, torch.bfloat16, seed)
    stored = storage.encode(weight)
    storage.validate(stored)
    assert torch.equal(bits(storage.decode(stored)), bits(weight))
    assert stored.nbytes == 2 * int((bits(weight) != 0).sum()) + N * (-(-K // 8)) + 4 * (N + 1)
    assert stored.nbytes == storage.stored_bytes((N, K), stored.values.numel(), 2)


def test_layout_of_the_example():
    stored = storage.encode(torch.tensor([[2.0, 0.0, 0.0, -1.0], [0.0, 3.0, 0.0, 0.0]]))
    assert stored.mask.tolist() == [[0b1001], [0b0010]]
    assert stored.values.tolist() == [2.0, -1.0, 3.0]
    assert stored.offsets.tolist() == [0, 2, 3]


def damaged(stored):
    """One Stored for each way a file can lie, by name."""
    replace = dataclasses.replace
    extra = stored.mask.clone()
    extra[0, -1] |= 0b1000_0000
    flipped = stored.mask.clone()
    flipped[0, 0] ^= 1
    return {
        "mask should be": replace(stored, mask=stored.mask[:, :1]),
        "values should be": replace(stored, values=stored.values.int()),
        "offsets should be": replace(stored, offsets=stored.offsets[1:]),
        "bits set past column 21": replace(stored, mask=extra),
        "disagree": replace(stored, mask=flipped),
        "values disagree": replace(stored, values=stored.values[1:]),
    }


@pytest.mark.parametrize("message", damaged(storage.encode(sparse(9, 21, 0.5, torch.float32))))
def test_validate_finds_damage(message):
    stored = storage.encode(sparse(9, 21, 0.5, torch.float32))
    with pytest.raises(ValueError, match=f"q_proj.*{message}"):
        storage.validate(damaged(stored)[message], "q_proj")
