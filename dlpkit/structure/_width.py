"""Which units go: from what each is worth to the slices that remove a share of a model's parameters, or a number of units.

Everything is one walk. Every unit gets a rank, all units stand in one line, and the walk takes from the front what the budget allows.
Ranks that are scores let all layers compete; ranks by place within a half make every half lose its share.
"""

from dataclasses import dataclass

import torch
from torch import nn

from dlpkit import archs, units
from dlpkit.calibration import Stats, Stream
from dlpkit.edits import Half, Slice
from dlpkit.progress import Progress
from dlpkit.structure import Plan, Target, check_target
from dlpkit.surgery import present

TIE = 1e-9  # what a place among the units of all halves counts beside one in its own: less than between two of a million channels
MULTIPLE = 8  # MLPs keep a multiple of so many channels, which kernels want


@dataclass(frozen=True)
class Room:
    """What a half may lose: `units`, each of so many `parameters`, down to `least`, in steps of `step`."""

    units: int
    parameters: int
    least: int
    step: int


def rooms(
    model: nn.Module, first: int | None = None, last: int | None = None, multiple: int = MULTIPLE
) -> dict[Half, Room]:
    """Halves that may be sliced: not those of the `first` and `last` layers, by default as large a part as LLM-Pruner's 4 and 2 of 32."""
    arch, found = archs.of(model), {}
    blocks = archs.blocks(model, arch)
    first = max(1, round(len(blocks) / 8)) if first is None else first
    last = max(1, round(len(blocks) / 16)) if last is None else last
    if first < 0 or last < 0 or first + last >= len(blocks) or multiple < 1:
        raise ValueError(
            f"width pruning wants a multiple of at least 1 and leaves first and last layers alone, fewer than all {len(blocks)}, got {multiple}, {first} and {last}"
        )
    for layer, part in sorted(present(model, arch)):
        if first <= layer < len(blocks) - last:
            held, step = units.count(blocks[layer], arch, part), multiple if part == "mlp" else 1
            found[layer, part] = Room(held, units.parameters(blocks[layer], arch, part), min(step, held), step)
    return found


def shares(scores: dict[Half, torch.Tensor], weights: dict[Half, float] | None = None) -> dict[Half, torch.Tensor]:
    """[units] scores, larger means keep -> [units] ranks by which every half loses the same share of its units, or `weights` times as much.

    The unit that is i-th of n to go stands at (i + 1/2) / n, so that a share r takes the whole number nearest to r n. Units of one place in
    different halves, as where there are few heads, go by their scores.
    """
    found = {}
    for part in units.PARTS:
        halves = [half for half in scores if half[1] == part]
        line = (
            _places(torch.cat([scores[half] for half in halves])).split([len(scores[half]) for half in halves])
            if halves
            else ()
        )
        for half, among_all in zip(halves, line, strict=True):
            found[half] = (_places(scores[half]) + TIE * among_all) / (weights[half] if weights else 1.0)
    return found


def _places(scores: torch.Tensor) -> torch.Tensor:
    """[n] -> [n] (i + 1/2) / n for the i-th smallest, float64 on the CPU."""
    place = torch.empty(len(scores), dtype=torch.float64)
    place[scores.cpu().argsort(stable=True)] = (torch.arange(len(scores), dtype=torch.float64) + 0.5) / len(scores)
    return place


def choose(model: nn.Module, ranks: dict[Half, torch.Tensor], target: Target, held: dict[Half, Room]) -> Plan:
    """[units] ranks of each half in `held`, the smallest go first -> slices that reach the target, less than one step of one MLP beyond it.

    An integer target counts units. Raises ValueError for a target out of reach.
    """
    check_target(target)
    total = sum(parameter.numel() for parameter in model.parameters())
    costs = {half: 1 if type(target) is int else room.parameters for half, room in held.items()}
    budget = target if type(target) is int else target * total
    most = sum((room.units - room.least) * costs[half] for half, room in held.items())
    if budget > most:
        raise ValueError(
            f"target {target} is out of reach: the layers that are not protected can give {most:,}, it wants {budget:,.0f}"
        )
    gone = _in_steps(_walk(ranks, budget, held, costs), budget, held, costs)
    removed, plan = 0, Plan([], [], "share of the units removed", [])
    for (layer, part), count in gone.items():
        if count:
            kept = ranks[layer, part].cpu().argsort(stable=True)[count:]
            removed += count * held[layer, part].parameters
            plan.edits.append(Slice(layer, part, tuple(sorted(kept.tolist()))))
            plan.scores.append(count / held[layer, part].units)
            plan.shares.append(removed / total)
    return plan


def inputs(model: nn.Module, batches: list[torch.Tensor], needs: set[str], progress: Progress) -> dict[Half, Stats]:
    """What the Linear that closes each half is given: one value of it belongs to each channel, head_dim of them to each head."""
    arch, found = archs.of(model), {}
    stream = Stream(model, arch, list(batches), model.get_input_embeddings().weight.device)
    for layer in range(len(stream.blocks)):
        stats = stream.stats(layer, needs, advance=True)
        found |= {
            (layer, part): stats[name]
            for part, name in (("attn", arch.attn_out), ("mlp", arch.mlp_out))
            if name in stats
        }
        progress("measure", layer + 1, len(stream.blocks))
    return found


def closing(model: nn.Module, half: Half) -> tuple[units.Member, torch.Tensor]:
    """The Linear that closes a half, and its weight [N, K] in float32."""
    arch = archs.of(model)
    block = archs.blocks(model, arch)[half[0]]
    member = units.members(block, arch, half[1])[-1]
    return member, block.get_submodule(member.name).weight.detach().float()


def _walk(
    ranks: dict[Half, torch.Tensor], budget: float, held: dict[Half, Room], costs: dict[Half, int]
) -> dict[Half, int]:
    """Units that each half loses. One that no longer fits into the budget is passed by."""
    names = list(held)
    which = torch.cat([torch.full((held[half].units,), i) for i, half in enumerate(names)])
    line = torch.cat([ranks[half].double().cpu() for half in names]).argsort(stable=True)
    gone, left = dict.fromkeys(names, 0), budget
    for index in which[line].tolist():
        half = names[index]
        if gone[half] < held[half].units - held[half].least and costs[half] <= left:
            gone[half] += 1
            left -= costs[half]
    return gone


def _in_steps(gone: dict[Half, int], budget: float, held: dict[Half, Room], costs: dict[Half, int]) -> dict[Half, int]:
    """The same with whole steps, each MLP keeping all or a multiple; what rounding down frees goes to the largest remainders until the budget is met."""
    exact = dict(gone)
    for half, room in held.items():
        gone[half] = max(0, gone[half] - (gone[half] - room.units) % room.step)
    left = budget - sum(gone[half] * costs[half] for half in held)
    waiting = sorted(held, key=lambda half: (half[1] == "attn", gone[half] - exact[half]))
    while left > 0:
        half = next(half for half in waiting if gone[half] < held[half].units - held[half].least)
        waiting.append(waiting.pop(waiting.index(half)))
        more = held[half].step - (gone[half] - held[half].units) % held[half].step  # to the next multiple
        gone[half], left = gone[half] + more, left - more * costs[half]
    return gone
