"""Which layers, halves of layers, or units of halves, a model can do without, one file each: `plan(model, batches, target, ...)` -> Plan.

A structure is its module: `plan` takes a causal LM on its device, calibration windows [B, T] of one length, and a target: a share of all
parameters (0.2: at least so many are to go) or a number of things to remove (12). Its keyword arguments with a default are its options,
but for `journal` (what a killed search has found) and `progress`. The model is as it was when `plan` returns.
"""

import inspect
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from dlpkit import archs, edits, surgery
from dlpkit.edits import Drop, Edit, Slice
from dlpkit.kernels import registry
from dlpkit.trunk import Work

Target = int | float
NOT_OPTIONS = ("journal", "progress")
PLAN = ".json"  # how the name of a plan that waits in a file ends


@dataclass
class Plan:
    """Edits in the order in which they were chosen: in a search that removes one at a time, every beginning is a plan for less."""

    edits: list[Edit]
    scores: list[float]  # of each edit, or of the model after it, as `metric` says
    metric: str
    shares: list[float]  # of all parameters, gone after each edit
    work: Work = field(default_factory=Work)

    def to_dict(self) -> dict:
        """As JSON."""
        return {
            "metric": self.metric,
            "steps": [
                {**edits.to_dict(edit), "score": score, "share": share}
                for edit, score, share in zip(self.edits, self.scores, self.shares, strict=True)
            ],
            "work": asdict(self.work),
        }

    def to(self, target: Target) -> "Plan":
        """The beginning that reaches a smaller target. Raises ValueError for one that this plan does not reach."""
        shares = [0.0, *self.shares]
        size = next((n for n, share in enumerate(shares) if reached(target, n, share)), None)
        if size is None:
            raise ValueError(
                f"target {target} is out of reach: {len(self.edits)} removals take {shares[-1]:.1%} of the parameters"
            )
        if size < len(self.edits) and any(isinstance(edit, Slice) for edit in self.edits):
            raise ValueError("a plan of slices serves the target that it was made for, no smaller one: plan anew")
        return Plan(self.edits[:size], self.scores[:size], self.metric, self.shares[:size], self.work)


def read(path: str | Path) -> Plan:
    """A plan that was written as JSON. Raises ValueError when it is none."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        steps = [(step.pop("score"), step.pop("share"), edits.from_dict(step)) for step in found["steps"]]
        scores, shares, chosen = map(list, zip(*steps, strict=True))
        return Plan(chosen, scores, found["metric"], shares, Work(**found["work"]))
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is not a plan that `dlpkit plan` wrote: {error}") from error


def names() -> list[str]:
    return registry.names(sys.modules[__name__])


def get(name: str) -> ModuleType:
    return registry.get(sys.modules[__name__], name)


def check_options(name: str, options: dict) -> None:
    """Raise ValueError for options that the structure does not take."""
    known = {
        option
        for option, p in inspect.signature(get(name).plan).parameters.items()
        if p.default is not p.empty and option not in NOT_OPTIONS
    }
    if unknown := set(options) - known:
        raise ValueError(
            f"structure {name} does not take {', '.join(sorted(unknown))}: it takes {', '.join(sorted(known)) or 'no options'}"
        )


def check_target(target: Target) -> None:
    """Raise ValueError for a target that is neither a number of things nor a share of the parameters."""
    if isinstance(target, bool) or not (
        (type(target) is int and target >= 1) or (type(target) is float and 0 < target < 1)
    ):
        raise ValueError(
            f"what is to be removed is a share of all parameters such as 0.2, or a whole number such as 12, got {target!r}"
        )


def reached(target: Target, removed: int, share: float) -> bool:
    return removed >= target if type(target) is int else share >= target


def windows(batches: Iterable[torch.Tensor]) -> torch.Tensor:
    """Batches of token windows -> [W, T]. Raises ValueError unless all are of one length."""
    batches = list(batches)
    if not batches or len({batch.shape[1:] for batch in batches}) > 1:
        raise ValueError(f"a structure wants windows of one length, got {[tuple(batch.shape) for batch in batches]}")
    return torch.cat(batches)


class Budget:
    """What a model consists of before any edit, and so what edits cost it."""

    def __init__(self, model: nn.Module):
        self.sizes, self.types = surgery.parameters(model, archs.of(model)), surgery.cache_types(model)
        self.total = sum(parameter.numel() for parameter in model.parameters())

    def share(self, chosen: list[Edit]) -> float:
        """What share of all parameters, embeddings and head among them, is gone after those edits."""
        gone = set().union(*(edit.takes for edit in chosen)) & self.sizes.keys()
        return sum(self.sizes[half] for half in gone) / self.total

    def fits(self, chosen: list[Edit]) -> bool:
        """Whether those edits can be made together."""
        try:
            surgery.check(set(self.sizes), self.types, chosen)
        except ValueError:
            return False
        return True

    def plan(self, chosen: list[Edit], scores: list[float], metric: str, work: Work | None = None) -> Plan:
        shares = [self.share(chosen[: n + 1]) for n in range(len(chosen))]
        return Plan(chosen, scores, metric, shares, work or Work())


def cheapest(model: nn.Module, target: Target, scores: dict[Drop, float], metric: str) -> Plan:
    """All at once: the edits of the lowest scores, until the target is reached."""
    check_target(target)
    budget, chosen = Budget(model), []
    for edit in sorted(scores, key=scores.get):
        if budget.fits([*chosen, edit]):
            chosen.append(edit)
    return budget.plan(chosen, [scores[edit] for edit in chosen], metric).to(target)
