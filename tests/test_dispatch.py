import pytest
import torch

from dlpkit.kernels import dispatch

BF16 = torch.bfloat16


def test_a_cpu_runs_dense_and_says_why():
    assert dispatch.choose(torch.zeros(8, 8)) == ("dense", dispatch.available("cpu")[1])
    assert "cpu" in dispatch.available("cpu")[1]


@pytest.mark.parametrize(
    ("shape", "dtype", "density", "pattern", "format"),
    [
        ((4096, 4096), BF16, 0.5, None, "sell"),
        ((4096, 4096), torch.float16, 0.2, None, "sell"),
        ((4096, 4096), BF16, 0.5, (2, 4), "nm"),
        ((4096, 4096), BF16, 0.3, (20, 32), "sell"),  # so sparse that some N:M holds, but not by nature
        ((4096, 4096), BF16, 0.7, None, "dense"),
        ((4096, 4096), BF16, 0.75, (3, 4), "dense"),
        ((4096, 4096), torch.float32, 0.5, None, "dense"),
        ((64, 64), BF16, 0.5, None, "dense"),
    ],
)
def test_choice(shape, dtype, density, pattern, format):
    assert dispatch.choose_for(shape, dtype, density, pattern)[0] == format


def test_paths_off_the_gpu_decode():
    for format in ("sell", "nm", "tile"):
        assert dispatch.path(format, 4096, 4096, 1, 0.5, "cpu")[0] == "reference"
    assert dispatch.path("dense", 4096, 4096, 1, 0.5, "cpu")[0] == "cublas"
    with pytest.raises(ValueError, match="dense, nm, sell, tile"):
        dispatch.path("csr", 4096, 4096, 1, 0.5, "cpu")


@pytest.mark.parametrize("wgmma", [True, False])
@pytest.mark.parametrize(
    ("format", "M", "kernel"),
    [("sell", 24, "walk"), ("nm", 1, "pick"), ("sell", 25, "expand"), ("tile", 1, "batch"), ("tile", 32, "batch"),
     ("tile", 33, "special"), ("tile", 128, "special"), ("tile", 129, "expand")],
)  # fmt: skip
def test_paths_on_the_gpu(format, M, kernel, wgmma, monkeypatch):
    monkeypatch.setattr(dispatch, "use_wgmma", lambda device: wgmma)
    found, reason = dispatch.path(format, 14336, 4096, M, 0.5, "cuda")
    assert found == (kernel if wgmma or format != "tile" else "expand")
    assert ("191 MB" if found == "expand" else str(M)) in reason


@pytest.mark.skipif(not torch.cuda.is_available(), reason="wants a GPU")
def test_a_gpu_without_measurements_runs_dense(monkeypatch):
    weight = torch.zeros(4096, 4096, dtype=BF16, device="cuda")
    monkeypatch.setattr(dispatch, "MEASURED", {(9, 9): "a GPU to come"})
    assert dispatch.choose(weight)[0] == "dense"
    monkeypatch.setattr(dispatch, "MEASURED", {torch.cuda.get_device_capability(): "this"})
    assert dispatch.choose(weight)[0] in ("sell", "nm")
