import dataclasses
import importlib
import itertools
from pathlib import Path

import pytest
import torch

from dlpkit.kernels import crossover, dispatch, formats
from dlpkit.kernels.crossover import Layer, fastest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
BF16 = torch.bfloat16
BIG, SMALL = (14336, 4096), (1024, 4096)
TABLE = {
    "sell": {
        ("walk", *BIG, 0.5, "unstructured"): {1: 1.5, 8: 0.8, 16: 0.4, 24: 0.3},
        ("expand", *BIG, 0.5, "unstructured"): {16: 0.35, 256: 0.4, 2048: 0.9},
        ("walk", *BIG, 0.3, "unstructured"): {1: 2.3, 8: 1.1},
        ("walk", *SMALL, 0.5, "unstructured"): {1: 1.1, 8: 0.7},
    },
    "nm": {("pick", *BIG, 0.5, "2:4"): {1: 1.6, 8: 1.0}},
    "fragment": {("mma", *BIG, 0.5, "2:4"): {1: 1.5, 8: 1.4, 64: 1.3}},
    "tile": {
        ("batch", *BIG, 0.5, "unstructured"): {8: 1.2, 32: 1.1, 64: 0.9},
        ("batch", *BIG, 0.5, "2:4"): {8: 0.8},
    },
}


@pytest.fixture
def measured(monkeypatch):
    """TABLE in place of what was measured, on a machine where every format runs."""
    monkeypatch.setattr(crossover, "SPEED", TABLE)
    monkeypatch.setattr(dispatch, "HAS_GLUON", True)
    crossover._nearest.cache_clear()
    yield
    crossover._nearest.cache_clear()


def test_a_cpu_runs_dense_and_says_why():
    assert dispatch.choose(torch.zeros(8, 8)) == ("dense", dispatch.available("cpu")[1])
    assert "cpu" in dispatch.available("cpu")[1]


@pytest.mark.parametrize(
    ("M", "kernel", "speed"),
    [(1, "walk", 1.5), (5, "walk", 0.8), (8, "walk", 0.8), (9, "walk", 0.4), (17, "expand", 0.4), (300, "expand", 0.9),
     (9000, "expand", 0.9)],
)  # fmt: skip
def test_the_fastest_kernel_at_the_next_measured_number_of_rows(M, kernel, speed, measured):
    assert fastest("sell", *BIG, M, 0.5) == (kernel, speed, Layer(*BIG, 0.5, "unstructured"))


@pytest.mark.parametrize(
    ("format", "shape", "kept", "mask", "layer"),
    [
        ("sell", (28672, 4096), 0.5, "unstructured", Layer(*BIG, 0.5, "unstructured")),
        ("sell", (512, 2048), 0.5, "unstructured", Layer(*SMALL, 0.5, "unstructured")),
        ("sell", (8192, 8192), 0.37, "unstructured", Layer(*BIG, 0.3, "unstructured")),
        ("sell", (0, 0), 0.0, "unstructured", Layer(*SMALL, 0.5, "unstructured")),
        ("tile", BIG, 0.2, "unstructured", Layer(*BIG, 0.5, "unstructured")),
        ("tile", BIG, 0.25, "1:4", Layer(*BIG, 0.5, "2:4")),
    ],
)
def test_the_nearest_layer(format, shape, kept, mask, layer, measured):
    assert fastest(format, *shape, 1, kept, mask).layer == layer


def test_past_what_was_measured_the_weight_is_expanded(measured):
    assert fastest("sell", *SMALL, 9, 0.5)[:2] == ("expand", 0.0)
    assert fastest("tile", *BIG, 65, 0.5)[:2] == ("expand", 0.0)


@pytest.mark.parametrize(
    ("shape", "dtype", "density", "mask", "batch", "format"),
    [
        (BIG, BF16, 0.5, "unstructured", 1, "sell"),
        (BIG, torch.float16, 0.3, "unstructured", 1, "sell"),
        (BIG, BF16, 0.5, "unstructured", 8, "tile"),
        (BIG, BF16, 0.5, "unstructured", 32, "tile"),
        (BIG, BF16, 0.5, "unstructured", 64, "dense"),
        (BIG, BF16, 0.5, "unstructured", 4096, "dense"),
        (BIG, BF16, 0.5, "2:4", 1, "nm"),
        (BIG, BF16, 0.5, "2:4", 8, "fragment"),
        (BIG, BF16, 0.5, "2:4", 64, "fragment"),
        (BIG, BF16, 0.5, "2:4", 65, "dense"),
        (BIG, BF16, 0.5, "4:8", 8, "nm"),  # fragment takes 2:4 alone
        (BIG, BF16, 0.7, "unstructured", 1, "dense"),
        (BIG, BF16, 0.75, "3:4", 1, "dense"),
        (BIG, torch.float32, 0.5, "unstructured", 1, "dense"),
        ((64, 64), BF16, 0.5, "unstructured", 1, "dense"),
    ],
)
def test_a_format_is_chosen_where_it_beats_dense(shape, dtype, density, mask, batch, format, measured):
    assert dispatch.choose_for(shape, dtype, density, mask, batch)[0] == format


def test_the_reason_names_what_was_measured(measured):
    wins = "sell at 1 row of x was measured 1.50 times as fast as cuBLAS (14336 x 4096, 50% sparse, unstructured)"
    assert dispatch.choose_for(BIG, BF16, 0.5, "unstructured") == ("sell", wins)
    assert "0.90 times as fast" in dispatch.choose_for(BIG, BF16, 0.5, "unstructured", 64)[1]
    with pytest.raises(ValueError, match="at least 1, got 0"):
        dispatch.choose(torch.zeros(8, 8), batch=0)


def test_without_gluon_its_formats_are_not_chosen(measured, monkeypatch):
    monkeypatch.setattr(dispatch, "HAS_GLUON", False)
    assert dispatch.choose_for(BIG, BF16, 0.5, "unstructured", 8)[0] == "dense"
    assert dispatch.choose_for(BIG, BF16, 0.5, "2:4", 8)[0] == "nm"


@pytest.mark.parametrize(("pattern", "mask"), [("0.5", "unstructured"), ("2:4", "2:4"), ("8:16", "8:16")])
def test_masks_are_told_apart(pattern, mask):
    gen = torch.Generator().manual_seed(0)
    noise = torch.rand(8, 512, generator=gen)
    if ":" in pattern:
        n, m = map(int, pattern.split(":"))
        keep = noise.view(8, -1, m).argsort(2).argsort(2).view(8, -1) < n
    else:
        keep = noise < 0.5
    weight = keep.float()
    assert dispatch._mask(weight, float(weight.mean())) == mask


def test_off_the_gpu_packed_weights_are_decoded():
    weight = torch.eye(16, dtype=BF16)
    for format in formats.names():
        kernel, reason = dispatch.explain(formats.get(format).pack(weight), 1)
        assert kernel == ("torch" if format == "dense" else "reference")
        assert reason


class OnAGpu(torch.Tensor):
    """Says that it is on a GPU, for what only asks."""

    device = torch.device("cuda")


@pytest.mark.parametrize("wgmma", [True, False])
@pytest.mark.parametrize(
    ("format", "M", "kernel"),
    [("sell", 8, "walk"), ("sell", 25, "expand"), ("nm", 1, "pick"), ("nm", 9, "expand"), ("tile", 1, "batch"),
     ("tile", 65, "expand"), ("fragment", 64, "mma"), ("fragment", 65, "expand")],
)  # fmt: skip
def test_explain_on_the_gpu(format, M, kernel, wgmma, measured, monkeypatch):
    monkeypatch.setattr(dispatch, "use_wgmma", lambda device: wgmma)
    monkeypatch.setattr(dispatch, "HAS_TRITON", True)
    packed = formats.get(format).pack(torch.eye(16, dtype=BF16))
    packed = dataclasses.replace(packed, values=packed.values.as_subclass(OnAGpu))
    found, reason = dispatch.explain(packed, M)
    missing = format in ("tile", "fragment") and not wgmma
    assert found == ("expand" if missing else kernel)
    assert ("Hopper" in reason) == missing


def test_rows_up_to_which_packed_wins(measured, monkeypatch):
    weight = torch.eye(16, dtype=BF16)
    assert all(dispatch.most_rows(formats.get(format).pack(weight)) == 0 for format in formats.names())  # on the CPU
    monkeypatch.setattr(dispatch, "available", lambda device: (True, ""))
    found = {format: dispatch.most_rows(formats.get(format).pack(weight)) for format in ("dense", "sell", "nm")}
    assert found == {"dense": 0, "sell": 1, "nm": 8}


def test_a_weight_without_rows_stays_dense(monkeypatch):
    monkeypatch.setattr(dispatch, "available", lambda device: (True, ""))
    assert dispatch.choose(torch.zeros(0, 8, dtype=BF16)) == ("dense", "the weight has no rows or no columns")


def test_every_measured_format_is_one_that_packs():
    """The table that ships: whole classes, speeds in it, rows of x in order."""
    assert set(crossover.SPEED) <= set(formats.names())
    for classes in crossover.SPEED.values():
        for (kernel, N, K, kept, mask), speeds in classes.items():
            assert N * K > 0
            assert 0 < kept <= dispatch.DENSEST
            assert ":" in mask or mask == "unstructured"
            assert all(a < b for a, b in itertools.pairwise(speeds))
            assert all(speed > 0 for speed in speeds.values())
            # a row of another kernel's time, the expansion's, once stood here: 0.2
            assert kernel not in ("walk", "pick") or speeds[1] > 1


def test_the_table_is_written_from_rows(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    tune = importlib.import_module("tune_paths")
    about = {"gpu": "a GPU", "torch": "2", "triton": "3", "commit": "abc"}
    rows = [
        about | {"format": format, "kernel": kernel, "N": N, "K": K, "pattern": pattern, "M": M, "speedup": speed}
        for format, classes in TABLE.items()
        for (kernel, N, K, kept, mask), speeds in classes.items()
        for M, speed in speeds.items()
        for pattern in [mask if ":" in mask else str(1 - kept)]
    ]
    written: dict = {}
    exec(tune.table([rows[0] | {"speedup": 9.0}, *rows]), written)  # the last row of several counts
    assert written["SPEED"] == TABLE


@pytest.mark.skipif(not (BENCHMARKS / "results" / "paths-h100.jsonl").exists(), reason="not measured yet")
def test_the_table_that_ships_is_what_its_rows_say(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    rows, tune = importlib.import_module("rows"), importlib.import_module("tune_paths")
    assert tune.TABLE.read_text() == tune.table(tune.table_rows(rows.FOLDER / "paths-h100.jsonl"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="wants a GPU")
def test_a_gpu_without_measurements_runs_dense(monkeypatch):
    weight = torch.zeros(4096, 4096, dtype=BF16, device="cuda")
    monkeypatch.setattr(dispatch, "MEASURED", {(9, 9): "a GPU to come"})
    assert dispatch.choose(weight)[0] == "dense"
    monkeypatch.setattr(dispatch, "MEASURED", {torch.cuda.get_device_capability(): "this"})
    assert dispatch.choose(weight)[0] in ("sell", "nm")
