"""The README's tables are what the result files say, and the commands it shows exist."""

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
