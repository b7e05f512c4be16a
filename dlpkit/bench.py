"""Run the benchmarks that ship with a source checkout, from the command line."""

import subprocess
import sys
from pathlib import Path

import torch

FOLDER = Path(__file__).parents[1] / "benchmarks"
KERNELS = ("bench_matmul.py", "bench_pack.py")


def kernels(rows: str | Path, more: list[str]) -> None:
    """Time the sparse kernels beside cuBLAS and a dense Triton GEMV, append rows to `rows` and print them as a table.

    more: further arguments for pytest, such as -k 4096x4096. Raises ValueError without a GPU or outside a source checkout, and
    RuntimeError when a product is wrong or a benchmark fails.
    """
    rows = _ready(rows)
    _run(["-m", "pytest", *KERNELS, "--rows", str(rows), *more], rows)
    subprocess.run([sys.executable, "plot.py", str(rows)], cwd=FOLDER, check=True)


def tokens(rows: str | Path, more: list[str]) -> None:
    """Tokens per second of packed models beside the dense one; raises as `kernels` does.

    more: a model of benchmarks/random_model.py or a packed folder, and further arguments of benchmarks/bench_tokens.py.
    """
    rows = _ready(rows)
    models = [str(Path(word).resolve()) if Path(word).is_dir() else word for word in more]
    _run(["bench_tokens.py", "--rows", str(rows), *models], rows)


def _ready(rows: str | Path) -> Path:
    if not FOLDER.is_dir():
        raise ValueError(
            f"the benchmarks come with the source checkout, and there is none around {FOLDER.parent}: git clone and pip install -e ."
        )
    if not torch.cuda.is_available():
        raise ValueError("the benchmarks want an NVIDIA GPU, and torch finds none here")
    return Path(rows).resolve()


def _run(command: list[str], rows: Path) -> None:
    run = subprocess.run([sys.executable, *command], cwd=FOLDER, check=False)
    if run.returncode:
        raise RuntimeError(f"the benchmark ended with code {run.returncode}; rows up to then are in {rows}")
