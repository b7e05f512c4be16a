import copy

import pytest
import torch
from torch import nn

from dlpkit.kernels import formats
from dlpkit.sparse import FusedLinear, SparseLinear

# float32 sums in another order; 16-bit outputs rounded once more
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
every_format = pytest.mark.parametrize("format", formats.names())


def linear_2_4(N=48, K=64, bias=True, dtype=torch.float32):
    """A Linear whose weight is 2:4 with sides in multiples of 16, so that every format takes it."""
    linear = nn.Linear(K, N, bias=bias, dtype=dtype)
    keep = torch.rand(N, K // 4, 4).argsort(2) < 2
    linear.weight.data.mul_(keep.view(N, K))
    return linear


def packed(linear, format="dense"):
    return SparseLinear.of(linear, formats.get(format).pack(linear.weight.detach() + 0.0))


@every_format
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (2, 0)])
def test_drop_in_for_linear(format, dtype, bias, leading, device):
    linear = linear_2_4(bias=bias, dtype=dtype).to(device)
    sparse = packed(linear, format)
    x = torch.randn(*leading, 64, device=device).to(dtype)
    out = sparse(x)
    assert out.shape == (*leading, 48)
    assert out.dtype == dtype
    torch.testing.assert_close(out, linear(x), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert (sparse.in_features, sparse.out_features, sparse.weight.dtype) == (64, 48, dtype)
    assert isinstance(sparse, nn.Linear)


@every_format
def test_state_dict_is_the_stored_form_whatever_runs(format, device):
    linear = linear_2_4(dtype=torch.bfloat16).to(device)
    sparse = packed(linear, format)
    state = sparse.state_dict()
    assert set(state) == {"weight", "weight_mask", "weight_offsets", "bias"}
    again = SparseLinear.empty(linear, sparse.nnz())
    again.load_state_dict(state)
    assert again.format == "stored"
    assert torch.equal(again.dense(), linear.weight)
    assert all(torch.equal(state[key], value) for key, value in again.state_dict().items())


@every_format
def test_moves_and_copies_with_its_module(format):
    sparse = copy.deepcopy(packed(linear_2_4(), format))
    x = torch.randn(3, 64)
    expected = sparse(x)
    meta = copy.deepcopy(sparse).to("meta")
    assert meta.weight.device.type == "meta"
    assert all(buffer.device.type == "meta" for buffer in meta.buffers())
    torch.testing.assert_close(sparse.half()(x.half()).float(), expected, rtol=1e-2, atol=1e-2)  # float16


def test_gradient_reaches_the_input_and_not_the_weight():
    linear = linear_2_4()
    sparse = packed(linear)
    x = torch.randn(3, 64, requires_grad=True)
    sparse(x).sum().backward()
    torch.testing.assert_close(x.grad, linear.weight.sum(0).expand(3, 64))
    assert sparse.weight.grad is None


@pytest.fixture(params=["sell", "nm"])
def fused(request):
    """Three Linears that read the same input, one without bias, and the FusedLinears in their place."""
    linears = [linear_2_4(N, bias=bias) for N, bias in ((40, True), (8, False), (8, True))]
    stacked = torch.cat([linear.weight.detach() for linear in linears]) + 0.0
    return linears, FusedLinear.group(linears, formats.get(request.param).pack(stacked))


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 1, 0, 2, 0)])
def test_fused_members_are_their_linears_in_any_order(fused, order):
    linears, members = fused
    for x in (torch.randn(3, 64), torch.randn(1, 5, 64)):
        for i in order:
            torch.testing.assert_close(members[i](x), linears[i](x), rtol=1e-5, atol=1e-5)  # float32


def test_fused_members_multiply_once_and_keep_nothing(fused, monkeypatch):
    _, members = fused
    calls, matmul = [], members[0].kind.matmul
    monkeypatch.setattr(members[0].kind, "matmul", lambda self, x, bias=None: calls.append(x) or matmul(self, x, bias))
    x = torch.randn(2, 64)
    outputs = [member(x) for member in members]
    assert len(calls) == 1
    assert len({output.untyped_storage().data_ptr() for output in outputs}) == 1
    assert members[0].seen is members[0].result is None


def test_fused_members_store_and_move_each_their_own(fused):
    linears, members = fused
    block = nn.ModuleList(members)
    state = block.state_dict()
    assert {key.split(".")[1] for key in state} == {"weight", "weight_mask", "weight_offsets", "bias"}
    for i, linear in enumerate(linears):
        again = SparseLinear.empty(linear, members[i].nnz())
        again.load_state_dict({key[2:]: value for key, value in state.items() if key.startswith(f"{i}.")})
        assert torch.equal(again.dense(), linear.weight)
    copied = copy.deepcopy(block).double()
    x = torch.randn(2, 64)
    for linear, member in zip(linears, copied, strict=True):
        torch.testing.assert_close(member(x.double()).float(), linear(x), rtol=1e-5, atol=1e-5)
        assert member.weight.dtype == torch.float64
    assert copied[0] is not members[0]
    assert copied[1].leader is copied[0]
    assert len({id(parameter) for parameter in copied.parameters()}) == 3  # one weight, two biases


def test_fused_members_compile_in_one_graph(fused):
    _, members = fused

    def run(x):
        return [member(x) for member in members]

    x = torch.randn(2, 64)
    for expected, found in zip(run(x), torch.compile(run, fullgraph=True, backend="eager")(x), strict=True):
        torch.testing.assert_close(found, expected)


def test_compiles_in_one_graph():
    sparse = packed(linear_2_4())
    x = torch.randn(2, 64)
    compiled = torch.compile(sparse, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), sparse(x))
