"""LLM-Pruner (arXiv:2305.11627): remove the heads and channels whose absence the loss would feel least, to first order.

Every layer between the protected ones loses the same share (the paper's "block-wise" mode). The published numbers take one batch of ten
short samples; here every batch has a gradient of its own, and the element-wise terms are averaged over them. The vector-wise one is that of
all the text at once, as there.
"""

import torch
from torch import nn

from dlpkit.edits import Half
from dlpkit.gradients import AGGREGATIONS, Terms, terms
from dlpkit.progress import Progress, silent
from dlpkit.structure import Plan, Target, check_target
from dlpkit.structure._width import MULTIPLE, choose, rooms, shares

TERMS = ("element", "vector")


def plan(
    model: nn.Module, batches: list[torch.Tensor], target: Target, term: str = "element", aggregation: str = "sum",
    first: int | None = None, last: int | None = None, multiple: int = MULTIPLE, journal: None = None, progress: Progress = silent,
) -> Plan:  # fmt: skip
    """term: "element" or "vector". aggregation: over the Linears of a group. first, last: layers left alone. An integer target counts units."""
    check_target(target)
    _check(term, aggregation)
    rooms(model, first, last, multiple)
    return decide(model, terms(model, batches, progress), target, term, aggregation, first, last, multiple)


def decide(
    model: nn.Module, found: dict[Half, Terms], target: Target, term: str = "element", aggregation: str = "sum",
    first: int | None = None, last: int | None = None, multiple: int = MULTIPLE,
) -> Plan:  # fmt: skip
    """`plan` from terms that were measured before."""
    _check(term, aggregation)
    held = rooms(model, first, last, multiple)
    return choose(model, shares({half: found[half].total(term, aggregation) for half in held}), target, held)


def _check(term: str, aggregation: str) -> None:
    for what, value, known in (("term", term, TERMS), ("aggregation", aggregation, AGGREGATIONS)):
        if value not in known:
            raise ValueError(f"llm_pruner's {what} is one of {', '.join(known)}, got {value!r}")
