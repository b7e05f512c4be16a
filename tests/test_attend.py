import pytest
import torch

from dlpkit.kernels import attend as kernels
from dlpkit.kernels.attend import attend, attend_ref
from dlpkit.kernels.runtime import use_triton

TOLERANCE = {
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
}  # one rounding of the weights, one of the output


def case(B, H, heads, L, D, dtype, device, seen=None):
    """Random q, k, v, and a bias under which each row sees a random part of the slots, or the range `seen`."""
    gen = torch.Generator().manual_seed(B * H + L)
    q, k, v = (torch.randn(*shape, generator=gen) for shape in ((B, H, D), (B, heads, L, D), (B, heads, L, D)))
    visible = torch.rand(B, L, generator=gen) < 0.7
    visible[:, 0] = True
    if seen is not None:
        visible = torch.zeros(B, L, dtype=torch.bool)
        visible[:, seen] = True
    bias = torch.where(visible, 0.0, torch.finfo(dtype).min)
    return [t.to(dtype).to(device) for t in (q, k, v, bias)]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("B", "H", "heads", "L", "D"),
    [(1, 1, 1, 1, 16), (2, 8, 2, 65, 16), (1, 6, 6, 130, 24), (3, 4, 1, 200, 32), (1, 34, 2, 64, 64)],
)
def test_matches_ref(B, H, heads, L, D, dtype, device):
    q, k, v, bias = case(B, H, heads, L, D, dtype, device)
    found = attend(q, k, v, bias, D**-0.5)
    expected = attend_ref(*(t.double() for t in (q, k, v)), bias, D**-0.5)
    torch.testing.assert_close(found.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("seen", [slice(0, 1), slice(199, 200), slice(70, 75), slice(0, 200)])
@pytest.mark.parametrize("multiprocessors", [1, 1000])  # one stretch; as many as there are blocks
def test_stretches_that_see_nothing_weigh_nothing(seen, multiprocessors, device, monkeypatch):
    monkeypatch.setattr(kernels, "multiprocessors", lambda device: multiprocessors)
    q, k, v, bias = case(2, 4, 2, 200, 16, torch.float32, device, seen)
    k.masked_fill_((bias < 0)[:, None, :, None], 1e4)  # what is not seen would win
    torch.testing.assert_close(attend(q, k, v, bias, 0.25), attend_ref(q, k, v, bias, 0.25), rtol=1e-5, atol=1e-5)


def test_is_the_attention_of_torch(device):
    q, k, v, bias = case(2, 8, 2, 50, 16, torch.float32, device)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q[:, :, None], k, v, attn_mask=bias[:, None, None], enable_gqa=True
    )
    torch.testing.assert_close(attend(q, k, v, bias, 0.25), expected[:, :, 0], rtol=1e-5, atol=1e-5)


def test_takes_strided_queries_and_caches(device):
    q, k, v, bias = case(2, 4, 2, 70, 16, torch.float32, device)
    expected = attend(q, k, v, bias, 0.25)
    strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    torch.testing.assert_close(attend(*strided, bias, 0.25), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not use_triton(torch.empty(1)) and not torch.cuda.is_available(), reason="wants Triton's kernels")
def test_compiles_in_one_graph(device):
    tensors = case(1, 4, 2, 70, 16, torch.float32, device)
    compiled = torch.compile(attend, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*tensors, 0.25), attend(*tensors, 0.25))


@pytest.mark.parametrize("bad", [{"q": (2, 3, 16)}, {"k": (2, 2, 7, 16)}, {"bias": (1, 8)}])
def test_shapes_that_do_not_fit_are_refused(bad):
    shapes = {"q": (2, 4, 16), "k": (2, 2, 8, 16), "v": (2, 2, 8, 16), "bias": (2, 8)} | bad
    with pytest.raises(ValueError, match="attend wants q"):
        attend(*(torch.zeros(shape) for shape in shapes.values()), 1.0)
