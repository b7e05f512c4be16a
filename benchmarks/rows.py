"""The rows under benchmarks/results, which the README's tables are made from."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks" / "results"


def read(file: str) -> list[dict]:
    """The rows of a results file, in order; none if there is no such file."""
    path = FOLDER / file
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
