"""FLAP's score (arXiv:2312.11983): a channel whose input hardly fluctuates is missed least, weighed by the weights it meets.

WIFV: the variance of an input feature of the Linear that closes a half, times the energy of its column, averaged over a head. Scores are
standardised within each half, and all layers compete. FLAP's other half, a bias in place of what is removed, is left out: the Linears of most
models have none.
"""

import torch
from torch import nn

from dlpkit.progress import Progress, silent
from dlpkit.structure import Plan, Target, check_target
from dlpkit.structure._width import MULTIPLE, choose, closing, inputs, rooms


def plan(
    model: nn.Module, batches: list[torch.Tensor], target: Target, first: int | None = None, last: int | None = None,
    multiple: int = MULTIPLE, journal: None = None, progress: Progress = silent,
) -> Plan:  # fmt: skip
    """first, last: layers left alone. An integer target counts units."""
    check_target(target)
    held, stats = rooms(model, first, last, multiple), inputs(model, batches, {"sq", "sum"}, progress)
    ranks = {}
    for half in held:
        member, weight = closing(model, half)
        found = stats[half]
        variance = found.sq / found.tokens - (found.sum / found.tokens).square()  # [K]
        score = member.sums(variance * weight.square().sum(0)) / member.sums(torch.ones_like(variance))
        ranks[half] = (score - score.mean()) / score.std().clamp(min=1e-12)
    return choose(model, ranks, target, held)
