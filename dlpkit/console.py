"""Progress on a terminal: bars with the time left on a TTY, plain lines elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from dlpkit.progress import Progress

LINES_PER_STAGE = 10  # of plain output


@contextmanager
def progress() -> Iterator[Progress]:
    """A Progress that draws on stderr while the block runs."""
    if not sys.stderr.isatty():
        yield _plain()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, int] = {}

        def advance(stage: str, done: int, of: int) -> None:
            if stage not in tasks or bars.tasks[tasks[stage]].finished:
                tasks[stage] = bars.add_task(stage, total=of)
            bars.update(tasks[stage], completed=done, total=of)

        yield advance


def _plain() -> Progress:
    started: dict[str, float] = {}

    def advance(stage: str, done: int, of: int) -> None:
        now = time.perf_counter()
        if done == 1 or stage not in started:
            started[stage] = now
        if done == of or done % max(of // LINES_PER_STAGE, 1) == 0:
            spent = now - started[stage]
            left = f", about {spent / (done - 1) * (of - done):.0f} s left" if 1 < done < of else ""
            print(f"{stage} {done}/{of}{left}", file=sys.stderr, flush=True)

    return advance
