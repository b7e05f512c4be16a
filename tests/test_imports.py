"""The direction of imports: dlpkit.kernels knows nothing above it, and each module of dlpkit only those above it in the list."""

import ast
import importlib.util
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = [
    "progress", "parallel", "folders", "journal", "patterns", "archs", "units", "absent", "edits", "surgery", "models", "data", "offload", "calibration",
    "gradients", "trunk", "structure", "cka", "evaluate", "criteria", "allocation", "pruning", "recipe", "sparse", "packing", "static_cache", "generation", "checkpoint", "adapters", "recovery",
    "report", "cutting", "pipeline", "inspection", "bench", "console",
    "cli", "__main__", "__init__",
]  # fmt: skip


def imported(path: Path) -> set[str]:
    """Names of the dlpkit modules, one level deep, that a file imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return {name.split(".")[1] for name in found if name.startswith("dlpkit.")}


def room(path: Path) -> str:
    return path.relative_to(ROOT / "dlpkit").parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").rglob("*.py")), ids=lambda p: p.stem)
def test_kernels_import_only_kernels(path):
    assert imported(path) <= {"kernels"}
    assert "transformers" not in path.read_text()


@pytest.mark.parametrize("path", sorted((ROOT / "dlpkit").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_dlpkit_imports_point_up_the_list(path):
    above = ORDER[: ORDER.index(room(path)) + 1]
    assert imported(path) & set(ORDER) <= set(above)


def test_every_module_is_in_the_list():
    assert {room(path) for path in (ROOT / "dlpkit").rglob("*.py")} == set(ORDER)


def test_every_benchmark_imports():
    """They run on a GPU only; what they name has to exist everywhere."""
    modules = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py") if path.stem != "conftest")
    run = subprocess.run(
        [sys.executable, "-c", f"import {', '.join(modules)}"],
        cwd=ROOT / "benchmarks",
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr


def test_the_installed_top_level_is_dlpkit_alone():
    """`kernels` is Hugging Face's import name: the folder is installed as dlpkit.kernels only."""
    try:
        installed = distribution("dlpkit")
    except PackageNotFoundError:
        pytest.skip("dlpkit is on the path but not installed")
    assert installed.read_text("top_level.txt").split() == ["dlpkit"]
    assert importlib.util.find_spec("dlpkit.kernels") is not None
