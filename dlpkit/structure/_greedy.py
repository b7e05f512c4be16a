"""Remove one thing at a time: whichever leaves the lowest loss on the calibration text, given all that went before.

The first step asks every candidate. `lazy` asks fewer after that: a candidate's loss at an earlier step, when more of the model was
left, is taken as a floor under its loss now, so candidates are asked from the lowest floor up, until the next floor is no better than
the best answer. The sequence is the exhaustive one as long as removing more never lowers the loss of a candidate that was not asked.
"""

import torch
from torch import nn

from dlpkit import edits, parallel
from dlpkit.edits import Drop
from dlpkit.journal import Journal
from dlpkit.progress import Progress
from dlpkit.structure import Budget, Plan, Target, check_target, reached, windows
from dlpkit.trunk import Trunk

ASKED_AT_ONCE = 4  # candidates of a lazy step that pass the layers together


def greedy(
    model: nn.Module, batches: list[torch.Tensor], target: Target, candidates: list[Drop],
    lazy: bool, journal: Journal | None, progress: Progress,
) -> Plan:  # fmt: skip
    """Search until `target` is reached. Raises ValueError when the candidates do not suffice for it."""
    check_target(target)
    budget, chosen, losses, floor = Budget(model), [], [], {}
    with Trunk(model, windows(batches)) as trunk:
        while not reached(target, len(chosen), budget.share(chosen)):
            left = [edit for edit in candidates if budget.fits([*chosen, edit])]
            if not left:
                raise ValueError(f"target {target} is out of reach: only {len(chosen)} can be removed")
            answers = _kept(journal, len(chosen))
            if answers is None:
                trunk.count_naive([(edit,) for edit in left])
                answers = _ask(trunk, left, floor if lazy else {})
                _keep(journal, len(chosen), answers)
            floor |= answers
            chosen.append(min(answers, key=answers.get))
            losses.append(answers[chosen[-1]])
            trunk.make(chosen[-1])
            progress("search", len(chosen), target if isinstance(target, int) else len(candidates))
    return budget.plan(chosen, losses, "loss", trunk.work)


def _ask(trunk: Trunk, candidates: list[Drop], floor: dict[Drop, float]) -> dict[Drop, float]:
    """The losses of the candidates, or, with floors under them, of enough to know the lowest."""
    if not floor:
        return dict(zip(candidates, trunk.losses([(edit,) for edit in candidates]), strict=True))
    waiting, answers = sorted(candidates, key=floor.get), {}
    while waiting and (not answers or floor[waiting[0]] < min(answers.values())):
        asked, waiting = waiting[:ASKED_AT_ONCE], waiting[ASKED_AT_ONCE:]
        answers |= zip(asked, trunk.losses([(edit,) for edit in asked]), strict=True)
    return {edit: answers[edit] for edit in candidates if edit in answers}


def _kept(journal: Journal | None, step: int) -> dict[Drop, float] | None:
    rows = parallel.told(journal.step(step) if journal else None)
    return rows and {edits.from_dict(edit): loss for edit, loss in rows}


def _keep(journal: Journal | None, step: int, answers: dict[Drop, float]) -> None:
    if journal and parallel.first():
        journal.keep_step(step, [[edits.to_dict(edit), loss] for edit, loss in answers.items()])
