"""The rows under benchmarks/results, which the README's tables are made from."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks" / "results"


def load(path: Path) -> list[dict]:
    """The rows of a file, in order."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def named(pattern: str, mask: str) -> str:
    """A pattern, and whose mask if that is not random."""
    return pattern if mask == "random" else f"{pattern} {mask}"


def read(file: str) -> list[dict]:
    """The rows of a results file; none if there is no such file."""
    return load(FOLDER / file) if (FOLDER / file).exists() else []
