"""`pytest benchmarks` on a GPU: every bench appends rows to a JSON-lines file, --rows, by default results/<gpu>.jsonl."""

import json
import sys
from pathlib import Path

import pytest
import timing
import torch
import triton
from commit import commit

RESULTS = Path(__file__).parent / "results"


def pytest_addoption(parser):
    parser.addoption("--rows", help="file to append result rows to")
    parser.addoption("--masks", help="masks of a real model, made by masks.py, to run beside the random ones")
    parser.addoption("--commit", help="what to record where there is no git checkout")


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            item.add_marker(pytest.mark.skip(reason="a benchmark wants a GPU"))


@pytest.fixture
def masks(mask, request) -> str | None:
    """The file that a bench takes its `mask` from, none if it is random."""
    if mask == "random":
        return None
    return request.config.getoption("--masks") or pytest.skip("--masks says whose: see masks.py")


@pytest.fixture(scope="session")
def roof() -> float:
    return timing.copy_roof()


@pytest.fixture(scope="session")
def timed(request, roof):
    """timed(calls, nbytes, baseline_us, **columns) measures `calls`, a ring of one operation, and appends a row -> us."""
    gpu = torch.cuda.get_device_name()
    path = Path(request.config.getoption("--rows") or RESULTS / f"{gpu.split()[1].lower()}.jsonl")
    where = {
        "gpu": gpu, "torch": torch.__version__, "triton": triton.__version__, "commit": commit(request.config.getoption("--commit")),
        "command": " ".join(["pytest", *sys.argv[1:]]),
    }  # fmt: skip

    def measure(calls, nbytes: int, baseline_us: float, watch=timing.clock, **columns) -> float:
        us, spread = watch(calls)
        gbps = nbytes / us / 1e3
        row = columns | {
            "us": round(us, 2), "spread": round(spread, 3), "baseline_us": round(baseline_us, 2),
            "speedup": round(baseline_us / us, 3), "gbps": round(gbps), "roof_pct": round(100 * gbps / roof, 1),
        }  # fmt: skip
        with open(path, "a") as file:
            file.write(json.dumps(row | where) + "\n")
        return us

    return measure
