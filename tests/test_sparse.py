import copy

import pytest
import torch
from conftest import random_sparse, tiny_model
from torch import nn

from dlpkit import archs
from dlpkit.kernels import formats
from dlpkit.sparse import SparseLinear, pack_linears, sparse_linears, unpack_linears

# float32 sums in another order; 16-bit outputs rounded once more
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
every_format = pytest.mark.parametrize("format", formats.names())


def linear_2_4(N=40, K=64, bias=True, dtype=torch.float32):
    """A Linear whose weight is 2:4, so that every format takes it."""
    linear = nn.Linear(K, N, bias=bias, dtype=dtype)
    keep = torch.rand(N, K // 4, 4).argsort(2) < 2
    linear.weight.data.mul_(keep.view(N, K))
    return linear


@every_format
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (2, 0)])
def test_drop_in_for_linear(format, dtype, bias, leading, device):
    linear = linear_2_4(bias=bias, dtype=dtype).to(device)
    sparse = SparseLinear.from_linear(linear, format)
    x = torch.randn(*leading, 64, device=device).to(dtype)
    out = sparse(x)
    assert out.shape == (*leading, 40)
    assert out.dtype == dtype
    torch.testing.assert_close(out, linear(x), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert (sparse.in_features, sparse.out_features, sparse.weight.dtype) == (64, 40, dtype)
    assert isinstance(sparse, nn.Linear)


@every_format
def test_state_dict_is_the_stored_form_whatever_runs(format):
    linear = linear_2_4(dtype=torch.bfloat16)
    sparse = SparseLinear.from_linear(linear, format)
    state = sparse.state_dict()
    assert set(state) == {"weight", "weight_mask", "weight_offsets", "bias"}
    again = SparseLinear.empty(linear, sparse.nnz())
    again.load_state_dict(state)
    again.pack(format)
    assert torch.equal(again.dense(), linear.weight)
    assert all(torch.equal(state[key], value) for key, value in again.state_dict().items())


def test_zeros_lose_their_sign_so_that_a_multiplied_mask_is_sparse():
    linear = nn.Linear(64, 8)
    linear.weight.data.copy_(-torch.ones(8, 64) * (torch.arange(64) % 2))
    sparse = SparseLinear.from_linear(linear, "dense")
    assert sparse.nnz() == 8 * 32
    assert torch.equal(sparse.dense(), linear.weight)


@every_format
def test_moves_and_copies_with_its_module(format):
    sparse = copy.deepcopy(SparseLinear.from_linear(linear_2_4(), format))
    x = torch.randn(3, 64)
    expected = sparse(x)
    meta = copy.deepcopy(sparse).to("meta")
    assert meta.weight.device.type == "meta"
    assert all(buffer.device.type == "meta" for buffer in meta.buffers())
    torch.testing.assert_close(sparse.half()(x.half()).float(), expected, rtol=1e-2, atol=1e-2)  # float16


def test_gradient_reaches_the_input_and_not_the_weight():
    linear = linear_2_4()
    sparse = SparseLinear.from_linear(linear, "dense")
    x = torch.randn(3, 64, requires_grad=True)
    sparse(x).sum().backward()
    torch.testing.assert_close(x.grad, linear.weight.sum(0).expand(3, 64))
    assert sparse.weight.grad is None


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s.weight_mask.bitwise_xor_(1), "disagree"),
        (lambda s: s.weight_offsets.__setitem__(3, 10**6), "disagree"),
        (lambda s: s.weight_offsets.__setitem__(0, -5), "disagree"),
        (lambda s: setattr(s, "weight_offsets", s.weight_offsets[:-1]), "offsets should be"),
        (lambda s: setattr(s, "weight_mask", s.weight_mask[:, :-1]), "mask should be"),
        (lambda s: setattr(s, "weight_mask", s.weight_mask.int()), "mask should be uint8"),
    ],
)
def test_damaged_tensors_are_refused_by_name(damage, message):
    linear = linear_2_4()
    packed = SparseLinear.from_linear(linear, "dense")
    sparse = SparseLinear.empty(linear, packed.nnz())
    sparse.load_state_dict(packed.state_dict())
    damage(sparse)
    with pytest.raises(ValueError, match=f"layers.7.up: .*{message}"):
        sparse.pack("dense", "layers.7.up")


def test_bits_past_the_last_column_are_refused():
    linear = nn.Linear(10, 4)
    sparse = SparseLinear.empty(linear, 40)
    sparse.load_state_dict(SparseLinear.from_linear(linear, "dense").state_dict())
    sparse.weight_mask[1, 1] |= 128
    with pytest.raises(ValueError, match="bits set past column 10"):
        sparse.pack("dense")


@pytest.mark.parametrize("kind", archs.names())
def test_a_packed_model_is_the_model(kind, tokens):
    model = tiny_model(kind)
    for _, linear in archs.model_linears(model, archs.of(model)):
        linear.weight.data.mul_(random_sparse(*linear.weight.shape, 0.5) != 0)
    expected = model(tokens).logits
    packed = pack_linears(model, "sell")
    assert (
        set(packed) == set(sparse_linears(model)) == {name for name, _ in archs.model_linears(model, archs.of(model))}
    )
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-4)  # float32
    unpack_linears(model)
    assert not sparse_linears(model)
    assert torch.equal(model(tokens).logits, expected)


def test_compiles_in_one_graph():
    sparse = SparseLinear.from_linear(linear_2_4(), "dense")
    x = torch.randn(2, 64)
    compiled = torch.compile(sparse, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), sparse(x))
