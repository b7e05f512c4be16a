"""Which commit a row was measured on."""

import subprocess
from pathlib import Path


def commit(known: str | None = None) -> str:
    """`known`, for where there is no git checkout, or the short hash of HEAD."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return known or subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
