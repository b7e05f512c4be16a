"""Output folders that appear whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_folder(target: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside `target`; rename it to `target` when the block ends well, remove it when it does not.

    Raises ValueError when `target` exists and is not an empty folder, unless `overwrite`.
    """
    target = Path(target)
    check_free(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(target, "new")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        _replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_free(target: str | Path, overwrite: bool = False) -> None:
    """Raise ValueError when `target` holds something that is not to be overwritten. Call it before the long work, not after."""
    target = Path(target)
    if target.is_file():
        raise ValueError(f"{target} is a file, not a folder to write to")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise ValueError(f"{target} is not empty: choose another output folder, or overwrite it with --overwrite")


def _replace(new: Path, target: Path) -> None:
    old = _beside(target, "old")
    if target.exists():
        os.rename(target, old)
    os.rename(new, target)
    shutil.rmtree(old, ignore_errors=True)


def _beside(target: Path, what: str) -> Path:
    return target.parent / f".{target.name}.{what}-{os.getpid()}"
