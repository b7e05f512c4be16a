"""The Triton kernels of the packed formats against their references: on the GPU, or interpreted on a CPU when TRITON_INTERPRET=1."""

import pytest
import torch

from dlpkit.kernels import formats, runtime
from dlpkit.kernels.formats import nm, sell

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() or runtime.INTERPRET), reason="wants a GPU or Triton's interpreter"
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# relative error of the whole product; the interpreter rounds bfloat16 towards zero
TOLERANCE = {torch.float16: 5e-4, torch.bfloat16: 3e-3 if DEVICE == "cuda" else 6e-3}
PATTERNS = ["0.5", "0.8", "2:4", "1:4", "4:8", "8:16", "3:4", "5:8", "4:32"]


def sparse(N, K, pattern, dtype=torch.bfloat16, seed=0):
    gen = torch.Generator().manual_seed(seed)
    weight, noise = torch.randn(N, K, generator=gen), torch.rand(N, K, generator=gen)
    if ":" in pattern:
        n, m = map(int, pattern.split(":"))
        padded = torch.nn.functional.pad(noise, (0, -K % m), value=2.0).view(N, -1, m)
        keep = (padded.argsort(2).argsort(2) < n).view(N, -1)[:, :K]
    else:
        keep = noise < 1 - float(pattern)
        keep[N // 2], keep[N // 3] = N == 1, True  # an empty row and a full one
    return torch.where(keep, weight, 0.0).to(dtype).to(DEVICE)


def pack(weight, pattern, **grid):
    """By the kernels on a GPU, by the references where those would be interpreted: test_pack_kernels.py compares the two."""
    if DEVICE == "cuda":
        return (nm if ":" in pattern else sell).pack(weight, **grid)
    return nm.pack_ref(weight, *nm.infer_ref(weight), **grid) if ":" in pattern else sell.pack_ref(weight, **grid)


def relative_error(got, want):
    assert got.isfinite().all()
    return float((got.double() - want).norm() / want.norm())


def check(packed, weight, M, bias=True, roundings=1):
    torch.manual_seed(0)
    x = torch.randn(M, weight.shape[1], dtype=weight.dtype, device=DEVICE)
    b = torch.randn(weight.shape[0], dtype=weight.dtype, device=DEVICE) if bias else None
    want = x.double() @ weight.double().t() + (b.double() if bias else 0)
    assert relative_error(packed.matmul(x, b), want) < TOLERANCE[weight.dtype] * roundings**0.5


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_matmul(pattern, dtype):
    weight = sparse(40, 100, pattern, dtype)
    check(pack(weight, pattern), weight, M=1)


@pytest.mark.parametrize("pattern", ["0.5", "2:4", "8:16"])
@pytest.mark.parametrize(("M", "expands"), [*((M, False) for M in (2, 3, 5, 8, 9, 17)), (1, True), (25, True)])
def test_rows_of_x(pattern, M, expands, pinned):
    pinned("expand" if expands else "pick" if ":" in pattern else "walk")
    weight = sparse(33, 100, pattern)
    roundings = 2 if expands and DEVICE == "cuda" else 1  # cuBLAS may round before it adds the bias
    check(pack(weight, pattern), weight, M, roundings=roundings)


@pytest.mark.parametrize("pattern", ["0.5", "2:4"])
@pytest.mark.parametrize(("N", "K"), [(1, 1), (1, 70), (70, 1), (5, 3), (65, 33)])
def test_tails(pattern, N, K):
    weight = sparse(N, K, pattern, torch.float16)
    if weight.any():
        check(pack(weight, pattern), weight, M=1, bias=False)
        check(pack(weight, pattern), weight, M=3)


@pytest.mark.parametrize("pattern", ["0.8", "4:8"])
@pytest.mark.parametrize(("rows", "segments"), [(2, 2), (8, 4), (16, 8)])
def test_lane_grids(pattern, rows, segments):
    weight = sparse(21, 100, pattern)
    check(pack(weight, pattern, rows=rows, segments=segments), weight, M=4)


def test_all_zero_weight_gives_the_bias():
    packed, bias = (
        sell.pack(torch.zeros(40, 64, dtype=torch.bfloat16, device=DEVICE)),
        torch.randn(40).bfloat16().to(DEVICE),
    )
    assert torch.equal(packed.matmul(torch.randn(2, 64, device=DEVICE).bfloat16(), bias), bias.expand(2, 40))


@pytest.mark.parametrize("pattern", ["0.5", "2:4"])
@pytest.mark.parametrize("M", [1, 2, 4])
def test_strided_rows_and_leading_dimensions(pattern, M):
    weight = sparse(40, 64, pattern)
    packed = pack(weight, pattern)
    wide = torch.randn(M, 200, dtype=torch.bfloat16, device=DEVICE)
    tall = torch.randn(64, M, dtype=torch.bfloat16, device=DEVICE)
    for x in (wide[:, 9:73], tall.t()):
        assert torch.equal(packed.matmul(x), packed.matmul(x.contiguous()))
    x = wide[:, :64].reshape(1, M, 64)
    assert torch.equal(packed.matmul(x)[0], packed.matmul(x[0]))


@pytest.mark.parametrize("pattern", ["0.5", "2:4"])
def test_strided_bias(pattern):
    weight = sparse(40, 64, pattern)
    packed, x = pack(weight, pattern), torch.randn(1, 64, dtype=torch.bfloat16, device=DEVICE)
    bias = torch.randn(40, 2, dtype=torch.bfloat16, device=DEVICE)[:, 0]
    assert torch.equal(packed.matmul(x, bias), packed.matmul(x, bias.clone()))


def test_columns_past_16_bits():
    weight = sparse(3, 70000, "0.8")
    check(pack(weight, "0.5", rows=2, segments=64), weight, M=1)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("N", "K"), [(1, 1), (40, 200), (65, 33)])
def test_dense_is_exact(pattern, N, K):
    weight = sparse(N, K, pattern)
    weight = torch.where((weight != 0) & (weight.abs() < 0.1), -0.0, weight)
    assert torch.equal(pack(weight, pattern).dense().view(torch.int16), weight.view(torch.int16))


@pytest.mark.parametrize("pattern", ["0.5", "2:4"])
def test_same_bits_every_time(pattern):
    weight = sparse(40, 100, pattern)
    packed, x = pack(weight, pattern), torch.randn(4, 100, dtype=torch.bfloat16, device=DEVICE)
    assert torch.equal(packed.matmul(x), packed.matmul(x))


@pytest.mark.parametrize("pattern", ["0.5", "2:4"])
def test_operators_are_well_formed(pattern):
    weight = sparse(9, 32, pattern, torch.float16)
    packed = pack(weight, pattern)
    op = torch.ops.dlpkit.nm_matmul if ":" in pattern else torch.ops.dlpkit.sell_matmul
    x = torch.randn(2, 32, dtype=torch.float16, device=DEVICE, requires_grad=True)
    torch.library.opcheck(op, (x, None, *packed._fields()), test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(op, (x, None, *packed._fields()), test_utils="test_autograd_registration")


def check_operator(op, packed, weight, rows):
    """The operator is well formed, for x and bias that want gradients, and those are dense's."""
    x, bias = (torch.randn(*s, dtype=weight.dtype, device=DEVICE, requires_grad=True) for s in shapes(weight, rows))
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(op, (x, bias, *packed._fields()), test_utils=checks)
    check_gradients(packed, weight, rows)


def check_gradients(packed, weight, rows):
    x, bias = (torch.randn(*s, dtype=weight.dtype, device=DEVICE, requires_grad=True) for s in shapes(weight, rows))
    grad = torch.randn(rows, weight.shape[0], dtype=weight.dtype, device=DEVICE)
    got = torch.autograd.grad(packed.matmul(x, bias), (x, bias), grad)
    want = torch.autograd.grad(torch.nn.functional.linear(x, weight, bias), (x, bias), grad)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


def shapes(weight, rows):
    """Of x and of the bias."""
    return (rows, weight.shape[1]), (weight.shape[0],)


@pytest.mark.parametrize("pattern", ["0.5", "2:4"])
def test_gradients_are_those_of_dense(pattern):
    weight = sparse(24, 40, pattern)
    check_gradients(pack(weight, pattern), weight, 3)


@pytest.mark.skipif(DEVICE == "cpu", reason="the compiler and graphs want a GPU")
@pytest.mark.parametrize("pattern", ["0.5", "2:4"])
def test_compiles_whole_and_replays(pattern):
    weight = sparse(64, 256, pattern)
    packed, x = pack(weight, pattern), torch.randn(1, 256, dtype=torch.bfloat16, device=DEVICE)
    compiled = torch.compile(lambda x: packed.matmul(x) + 1, fullgraph=True)
    torch.testing.assert_close(compiled(x), packed.matmul(x) + 1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = packed.matmul(x)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(y, packed.matmul(x))


@pytest.mark.parametrize("format", ["sell", "nm"])
def test_matmul_refuses_other_shapes_and_dtypes(format):
    packed = formats.get(format).pack(sparse(8, 32, "2:4"))
    for x in (torch.zeros(1, 31, dtype=torch.bfloat16), torch.zeros(1, 32)):
        with pytest.raises(ValueError, match=f"{format}.matmul wants x"):
            packed.matmul(x.to(DEVICE))


@pytest.mark.skipif(DEVICE == "cpu", reason="kernels overlap on a GPU only")
@pytest.mark.parametrize("pattern", ["0.6", "2:4"])
@pytest.mark.parametrize("M", [1, 2, 4])
def test_layers_in_a_row_wait_for_each_other(pattern, M):
    """A kernel starts before the one ahead has ended, but reads x only after: the same bits as with a pause after each layer."""
    layers = [pack(sparse(2048, 2048, pattern, torch.float16, seed) / 32, pattern) for seed in range(6)]
    x = torch.randn(M, 2048, dtype=torch.float16, device=DEVICE)

    def run(pause):
        y = x
        for layer in layers:
            y = layer.matmul(y)
            if pause:
                torch.cuda.synchronize()
        return y

    want = run(pause=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run(pause=False)
    for _ in range(100):
        graph.replay()
        assert torch.equal(got, want)
