"""Magnitude of structures: the norm of all weights of a unit. The baseline that looks at no text; every half loses the same share."""

import torch
from torch import nn

from dlpkit import archs, units
from dlpkit.progress import Progress, silent
from dlpkit.structure import Plan, Target, check_target
from dlpkit.structure._width import MULTIPLE, choose, rooms, shares


def plan(
    model: nn.Module, batches: list[torch.Tensor], target: Target, first: int | None = None, last: int | None = None,
    multiple: int = MULTIPLE, journal: None = None, progress: Progress = silent,
) -> Plan:  # fmt: skip
    """first, last: layers left alone. An integer target counts units."""
    check_target(target)
    arch, held = archs.of(model), rooms(model, first, last, multiple)
    scores = {}
    for layer, part in held:
        block = archs.blocks(model, arch)[layer]
        table = units.members(block, arch, part)
        squares = [member.across(block.get_submodule(member.name).weight.detach().float().square()) for member in table]
        scores[layer, part] = sum(member.sums(square) for member, square in zip(table, squares, strict=True)).sqrt()
    return choose(model, shares(scores), target, held)
