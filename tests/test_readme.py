"""The README's tables are what the result files say, and the commands it shows exist."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_tables_are_generated_from_results():
    run = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "readme.py", "--check"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr


ROW = {"gpu": "a GPU", "torch": "2", "triton": "3", "commit": "abc", "dtype": "bfloat16", "mask": "random"}
LAYER = {"N": 64, "K": 32, "M": 8, "us": 10.0, "baseline_us": 12.0, "speedup": 1.2, "gbps": 90, "roof_pct": 3.0}
PRUNED = {
    "windows": 4, "seqlen": 8, "hidden_states": "GPU", "seconds": 3.4, "bare_forward_seconds": 2.0, "passes": 3, "times_bare": 1.7, "peak_gb": 1.25,
}  # fmt: skip
FILES = {
    "batch-h100.jsonl": [
        LAYER | {"bench": "batch", "format": "tile", "pattern": "0.5@256", "speedup": 1.9, "us": 5.0},
        LAYER | {"bench": "batch", "format": "tile", "pattern": "0.5@256", "M": 256, "speedup": 0.4, "baseline_us": 14.0},
        LAYER | {"bench": "batch", "format": "sell", "pattern": "0.5", "speedup": 0.7},
        LAYER | {"bench": "batch", "format": "sell", "pattern": "0.5", "speedup": 0.6, "mask": "wanda"},
    ],
    "paths-h100.jsonl": [
        LAYER | {"bench": "paths", "format": "tile", "kernel": "batch", "pattern": "0.5@256"},
        LAYER | {"bench": "paths", "format": "tile", "kernel": "expand", "pattern": "0.5@256", "speedup": 0.5, "us": 24.0},
    ],
    "prune-h100.jsonl": [
        LAYER | {"bench": "select", "pattern": "2:4", "per": "row", "baseline": "torch.sort", "compiled_us": None},
        {**LAYER, "bench": "score", "kernel": "median", "reads": 2, "baseline": "torch", "compiled_us": 25.0, "us": 2e4},
        {"bench": "prune", "model": "small", "criterion": "wanda", "allocation": "dlp", "pattern": "0.5", **PRUNED},
    ],
}  # fmt: skip
LINES = [
    "| 64 x 32 | cuBLAS | us | 12.0 | 14.0 |", "| 64 x 32 | tile | 0.5@256 | **1.20** | 0.40 |", "| 64 x 32 | sell | 0.5 | 0.70 |  |",
    "| 64 x 32 | sell | 0.5 wanda | 0.60 |  |",
    "| 64 x 32 | 0.5 | sell **1.50** | tile **1.20** | dense |",
    "| 64 x 32 | 2:4 | row | 10 us | 90 | 3 % | 1.2 |  |", "| median | 2 | 20.0 ms | 90 | 3 % | 1.2 | 0.0 |",
    "| small | wanda dlp 0.5 | 4 x 8 | GPU | 2 s in 3 passes | 3 s | 1.70 | 1.2 GB |",
]  # fmt: skip


def test_sections_whose_rows_are_there_appear(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    rows, speed_tables = importlib.import_module("rows"), importlib.import_module("speed_tables")
    monkeypatch.setattr(rows, "FOLDER", tmp_path)
    monkeypatch.setattr(speed_tables, "PICKED", (1, 8, 9))
    speeds = {"sell": {("walk", 64, 32, 0.5, "unstructured"): {1: 1.5, 8: 0.7}}}
    speeds["tile"] = {("batch", 64, 32, 0.5, "unstructured"): {8: 1.2}}
    monkeypatch.setattr(importlib.import_module("dlpkit.kernels.crossover"), "SPEED", speeds)
    sections = speed_tables.batches, speed_tables.picks, speed_tables.culling
    assert [make() for make in sections] == ["", "", ""]
    for file, found in FILES.items():
        (tmp_path / file).write_text("\n".join(json.dumps(ROW | row) for row in found))
    made = "\n".join(make() for make in sections)
    assert all(line in made.splitlines() for line in LINES), made
    found = importlib.import_module("plot_batch").batch_rows(*(tmp_path / file for file in list(FILES)[:2]))
    importlib.import_module("plot_batch").draw(found, tmp_path / "plot.svg", (64, 32))
    assert (tmp_path / "plot.svg").read_text().startswith("<?xml")


def test_commands_and_files_exist():
    text = (ROOT / "README.md").read_text()
    commands = set(re.findall(r"^dlpkit (\w+)", text, flags=re.MULTILINE))
    shown = subprocess.run(
        [sys.executable, "-m", "dlpkit", "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert commands
    assert all(command in shown for command in commands)
    targets = re.findall(r"^make (\w+)", text, flags=re.MULTILINE)
    assert {"demo", "test"} <= set(targets)
    assert all(f"\n{target}:" in (ROOT / "Makefile").read_text() for target in targets)
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", text) + re.findall(r"python (benchmarks/\w+\.py)", text):
        assert (ROOT / path).exists(), path
