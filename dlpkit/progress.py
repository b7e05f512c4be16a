"""How long work reports back: a callable told (stage, done, of)."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]


def silent(stage: str, done: int, of: int) -> None:
    pass
