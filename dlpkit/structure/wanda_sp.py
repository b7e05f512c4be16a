"""Wanda for structures ("Wanda-sp" in arXiv:2312.11983): |weight| times the norm of its input, added over the columns of a unit.

Of the Linear that closes a half; every half loses the same share.
"""

import torch
from torch import nn

from dlpkit.progress import Progress, silent
from dlpkit.structure import Plan, Target, check_target
from dlpkit.structure._width import MULTIPLE, choose, closing, inputs, rooms, shares


def plan(
    model: nn.Module, batches: list[torch.Tensor], target: Target, first: int | None = None, last: int | None = None,
    multiple: int = MULTIPLE, journal: None = None, progress: Progress = silent,
) -> Plan:  # fmt: skip
    """first, last: layers left alone. An integer target counts units."""
    check_target(target)
    held, stats = rooms(model, first, last, multiple), inputs(model, batches, {"sq"}, progress)
    scores = {}
    for half in held:
        member, weight = closing(model, half)
        scores[half] = member.sums(weight.abs().sum(0) * stats[half].sq.sqrt())
    return choose(model, shares(scores), target, held)
