"""2:4 weights by cuSPARSELt: on a GPU that has it the product, the decoding and where they run; elsewhere what is refused."""

import math

import pytest
import torch
from test_matmul import DEVICE, TOLERANCE, check_operator, relative_error, sparse

from dlpkit.kernels import algorithms, dispatch, runtime
from dlpkit.kernels.formats import cusparselt, nm

LIBRARY = pytest.mark.skipif(not runtime.use_cusparselt(torch.device(DEVICE)), reason="wants a GPU and cuSPARSELt")
SHAPES = [(64, 128), (576, 1536), (4096, 1024), (6144, 256)]


def test_without_the_library_the_weight_is_nm():
    assert isinstance(cusparselt.pack(torch.eye(16)), nm.NM)


def test_shapes_that_the_library_takes(monkeypatch):
    monkeypatch.setattr(cusparselt, "use_cusparselt", lambda device: True)
    for shape, dtype, takes in [
        ((64, 64), torch.bfloat16, True), ((64, 64), torch.float32, False), ((64, 72), torch.float16, False), ((40, 64), torch.float16, False),
    ]:  # fmt: skip
        assert cusparselt.runs(*shape, dtype, torch.device("cuda")) == takes


def test_a_compressed_weight_stays_where_it_is():
    packed = cusparselt.CuSparseLt(torch.zeros(64 * 36, dtype=torch.float16), 64, 64, dtype=0)
    for call in (packed.dense, lambda: packed.matmul(torch.zeros(1, 64, dtype=torch.float16))):
        with pytest.raises(ValueError, match="unpack the model before"):
            call()


class OnAGpu(torch.Tensor):
    """Says that it is on a GPU, for what only asks."""

    device = torch.device("cuda")


@pytest.mark.parametrize(("M", "says"), [(8, "slower than cuBLAS"), (511, "slower"), (512, "faster than cuBLAS")])
def test_what_multiplies_says_from_how_many_rows_it_pays(M, says, monkeypatch):
    monkeypatch.setattr(dispatch, "HAS_TRITON", True)
    packed = cusparselt.CuSparseLt(torch.zeros(64 * 36, dtype=torch.float16).as_subclass(OnAGpu), 64, 64, dtype=0)
    kernel, reason = dispatch.explain(packed, M)
    assert kernel == "cusparselt"
    assert says in reason


def test_algorithms_are_those_of_one_gpu_and_version():
    layers = [
        (4096, 4096, 128, 15),
        (4096, 14336, 8, 20),
        (4096, 4096, 512, 0),
        (6144, 4096, 512, 20),
        (4096, 4096, 2048, 17),
    ]
    for N, K, M, algorithm in layers:
        assert algorithms.choose(N, K, M, algorithms.WHERE) == algorithm
    capability, version = algorithms.WHERE
    for where in [(capability, version + 1), (capability, None), ((8, 0), version)]:
        assert algorithms.choose(4096, 4096, 8192, where) == algorithms.OWN


@LIBRARY
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_dense_is_exact(N, K, dtype):
    weight = sparse(N, K, "2:4", dtype) * 1e-3
    weight[: N // 2] *= torch.tensor([math.pi, 0, 1e-4, 0], dtype=dtype, device=DEVICE).repeat(
        K // 4
    )  # groups with one, or none
    weight[0, 0], weight[1, 1] = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal / 4
    weight[:2, 2:4] = 0
    packed = cusparselt.pack(weight + 0.0)
    assert torch.equal(packed.dense().view(torch.int16), (weight + 0.0).view(torch.int16))
    assert packed.nbytes == N * K * 9 // 8


@LIBRARY
@pytest.mark.parametrize("bad", [-0.0, math.nan, math.inf])
def test_what_would_not_come_back_is_refused(bad):
    weight = torch.zeros(64, 64, dtype=torch.bfloat16, device=DEVICE)
    weight[3, 5] = bad
    with pytest.raises(ValueError, match="finite weights"):
        cusparselt.pack(weight)


@LIBRARY
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("M", [0, 1, 7, 64, 200, 512, 2048])
@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_products(N, K, M, dtype):
    weight = sparse(N, K, "2:4", dtype)
    packed = cusparselt.pack(weight)
    x, bias = (torch.randn(*shape, dtype=dtype, device=DEVICE) for shape in ((M, K), (N,)))
    y = packed.matmul(x, bias)
    assert y.shape == (M, N)
    assert y.is_contiguous()
    if M:
        assert relative_error(y, x.double() @ weight.double().t() + bias.double()) < TOLERANCE[dtype]
        assert relative_error(packed.matmul(x), x.double() @ weight.double().t()) < TOLERANCE[dtype]
    assert torch.equal(y, packed.matmul(x, bias))  # the same sum every time


@LIBRARY
def test_strides_and_leading_dimensions():
    weight = sparse(64, 128, "2:4")
    packed = cusparselt.pack(weight)
    bias = torch.randn(65, dtype=weight.dtype, device=DEVICE)[1:]  # not aligned
    wide = torch.randn(16, 200, dtype=weight.dtype, device=DEVICE)
    shifted = torch.randn(16 * 128 + 1, dtype=weight.dtype, device=DEVICE)[1:].view(16, 128)
    for x in (wide[:, 3:131], torch.randn(128, 16, dtype=weight.dtype, device=DEVICE).t(), shifted):
        assert torch.equal(
            packed.matmul(x, bias), packed.matmul(x.clone(memory_format=torch.contiguous_format), bias.clone())
        )
    assert torch.equal(packed.matmul(shifted.view(2, 8, 128)), packed.matmul(shifted).view(2, 8, 64))


@LIBRARY
def test_operators_are_well_formed_and_gradients_those_of_dense():
    weight = sparse(64, 128, "2:4")
    check_operator(torch.ops.dlpkit.cusparselt_matmul, cusparselt.pack(weight), weight, 9)


@LIBRARY
@pytest.mark.parametrize("M", [8, 300])
def test_graphs_and_compile(M):
    weight = sparse(512, 1024, "2:4")
    packed, x = cusparselt.pack(weight), torch.randn(M, 1024, dtype=weight.dtype, device=DEVICE)
    graph = torch.cuda.CUDAGraph()
    packed.matmul(x)
    with torch.cuda.graph(graph):
        got = packed.matmul(x)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(got, packed.matmul(x))
    assert torch.equal(torch.compile(packed.matmul, fullgraph=True)(x), got)


@LIBRARY
def test_a_compressed_weight_refuses_another_dtype():
    packed = cusparselt.pack(sparse(64, 128, "2:4"))
    half = cusparselt.CuSparseLt(packed.values.half(), 64, 128, packed.dtype)
    with pytest.raises(ValueError, match=r"stays torch.bfloat16.*is torch.float16"):
        half.dense()
