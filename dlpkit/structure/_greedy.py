"""Remove one thing at a time: whichever leaves the lowest loss on the calibration text, given all that went before.

Every step asks every candidate, unless told to ask less. Two ways, which go together, and which give the exhaustive sequence as long as
what they assume holds:

lazy: a candidate's loss at an earlier step, when more of the model was left, is a floor under its loss now. Candidates are asked from the
lowest floor up, until the next floor is no better than the best answer. Assumes that a removal never lowers another candidate's loss.

early: candidates read the windows in parts, and one whose loss on those read so far is more than `early` standard errors above that of the
best reads no more. The error is that of the mean difference per window. Assumes that the windows left are like those read.
"""

from itertools import pairwise

import torch
from torch import nn

from dlpkit import edits, parallel
from dlpkit.edits import Drop
from dlpkit.journal import Journal
from dlpkit.progress import Progress
from dlpkit.structure import Budget, Plan, Target, check_target, reached, windows
from dlpkit.trunk import Trunk

ASKED_AT_ONCE = 4  # candidates of a lazy step that pass the layers together
PARTS = (0, 1 / 4, 1 / 2, 1)  # of the windows, after which candidates are rejected early
FEWEST = 4  # windows from which an error is estimated

Rows = dict[Drop, torch.Tensor]  # a candidate's loss on every window


def greedy(
    model: nn.Module, batches: list[torch.Tensor], target: Target, candidates: list[Drop],
    lazy: bool, early: float, journal: Journal | None, progress: Progress,
) -> Plan:  # fmt: skip
    """Search until `target` is reached. Raises ValueError when the candidates do not suffice for it."""
    check_target(target)
    if early < 0:
        raise ValueError(f"early counts standard errors, 0 for never: it wants a number of at least 0, got {early}")
    budget, chosen, losses, floor = Budget(model), [], [], {}
    with Trunk(model, windows(batches)) as trunk:
        while not reached(target, len(chosen), budget.share(chosen)):
            left = [edit for edit in candidates if budget.fits([*chosen, edit])]
            if not left:
                raise ValueError(f"target {target} is out of reach: only {len(chosen)} can be removed")
            found = _kept(journal, len(chosen))
            if found is None:
                trunk.count_naive([(edit,) for edit in left])
                found = _ask(trunk, left, floor if lazy else {}, early)
                _keep(journal, len(chosen), *found)
            best, answers = found
            floor |= answers
            chosen.append(best)
            losses.append(answers[best])
            trunk.make(best)
            progress("search", len(chosen), target if isinstance(target, int) else len(candidates))
    return budget.plan(chosen, losses, "loss", trunk.work)


def _ask(
    trunk: Trunk, candidates: list[Drop], floor: dict[Drop, float], early: float
) -> tuple[Drop, dict[Drop, float]]:
    """The best candidate, and the mean losses of those asked: of one that was rejected, what its windows so far let expect."""
    waiting = sorted(candidates, key=floor.get) if floor else candidates
    at_once = ASKED_AT_ONCE if floor else len(candidates)
    rows: Rows = {}
    best = None
    while waiting and (best is None or not floor or floor[waiting[0]] < rows[best].mean()):
        asked, waiting = waiting[:at_once], waiting[at_once:]
        rows |= _read(trunk, asked, [rows[best]] if best else [], early)
        whole = max(map(len, rows.values()))
        best = min(
            (edit for edit in candidates if len(rows.get(edit, ())) == whole), key=lambda edit: rows[edit].mean()
        )
    return best, {
        edit: ((row - rows[best][: len(row)]).mean() + rows[best].mean()).item() for edit, row in rows.items()
    }


def _read(trunk: Trunk, candidates: list[Drop], rivals: list[torch.Tensor], early: float) -> Rows:
    """The losses of the candidates on all windows, or on those up to their rejection. rivals: the best row so far, if any."""
    rows: Rows = {}
    alive = candidates
    for begin, end in pairwise(PARTS if early else (0, 1)):
        for edit, part in zip(alive, trunk.losses([(edit,) for edit in alive], begin, end), strict=True):
            rows[edit] = torch.cat([rows[edit], part]) if edit in rows else part
        if early:
            alive = _hopeful({edit: rows[edit] for edit in alive}, rivals, early)
        if not alive:
            break
    return rows


def _hopeful(rows: Rows, rivals: list[torch.Tensor], early: float) -> list[Drop]:
    """The candidates that may still turn out best."""
    read = len(next(iter(rows.values())))
    if read < FEWEST:
        return list(rows)
    best = min([*rows.values(), *(row[:read] for row in rivals)], key=torch.mean)
    behind = {edit: row - best for edit, row in rows.items()}
    return [edit for edit, gap in behind.items() if gap.mean() <= early * gap.std() / read**0.5]


def _kept(journal: Journal | None, step: int) -> tuple[Drop, dict[Drop, float]] | None:
    found = parallel.told(journal.step(step) if journal else None)
    return found and (edits.from_dict(found["best"]), {edits.from_dict(edit): loss for edit, loss in found["losses"]})


def _keep(journal: Journal | None, step: int, best: Drop, answers: dict[Drop, float]) -> None:
    if journal and parallel.first():
        losses = [[edits.to_dict(edit), loss] for edit, loss in answers.items()]
        journal.keep_step(step, {"best": edits.to_dict(best), "losses": losses})
