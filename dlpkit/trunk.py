"""The hidden states in front of every layer, kept, so that trying an edit runs only the layers behind it.

A search that removes one thing at a time asks at every step what each candidate would do. A candidate changes nothing in front of
itself, so it starts from the kept states there; candidates that are under way together pass a layer as one batch. Under torchrun
every process holds a share of the windows and all see the same losses.
"""

from collections.abc import Iterator, Set
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import nn

from dlpkit import archs, edits, parallel, surgery
from dlpkit.calibration import Stream
from dlpkit.edits import Edit, Half
from dlpkit.offload import store

ROW_TOKENS = 32768  # tokens that pass a layer at once
Candidate = tuple[Edit, ...]


@dataclass
class Work:
    """What a search has cost this process: tokens times the parameters that they met, in blocks and head.

    Twice that are its FLOPs, attention scores aside.
    """

    done: int = 0
    naive: int = 0  # what it would have cost to run the whole model for every candidate that is left, at every step
    evaluations: int = 0  # candidates asked, at every step anew


class Trunk:
    """A causal LM on its device, read by fixed windows. Edits are tried, or made until the `with` ends; then the model is as it was."""

    def __init__(self, model: nn.Module, windows: torch.Tensor):
        """windows: [W, T] int64 token ids without padding. Memory: 1 + layers times W * T * hidden, on the GPU while it fits."""
        if windows.ndim != 2 or windows.shape[1] < 2:
            raise ValueError(f"a search wants windows [W, T] of two tokens or more, got {tuple(windows.shape)}")
        self.model, self.arch = model, archs.of(model)
        self.device = model.get_input_embeddings().weight.device
        self.count, self.mine = windows.shape[0], parallel.share(windows.shape[0])
        self.windows, self.rows = windows[self.mine], max(ROW_TOKENS // windows.shape[1], 1)
        self.stream = Stream(model, self.arch, list(self.windows.split(1)), self.device)
        self.layers = len(self.stream.blocks)
        self.made, self.there, self.work = ExitStack(), surgery.present(model, self.arch), Work()
        self.sizes = surgery.parameters(model, self.arch)
        self.head = model.get_output_embeddings().weight.numel()
        first = torch.cat(self.stream.hidden.held())  # [W, T, hidden]
        self.stream.hidden = []
        keep = store([first] * (self.layers + 1), self.device)
        self.front = [first.to(keep)] + [torch.empty_like(first, device=keep) for _ in range(self.layers)]
        self._refill(0)

    def __enter__(self) -> "Trunk":
        return self

    def __exit__(self, *error) -> None:
        self.made.close()

    def make(self, edit: Edit) -> None:
        """Make an edit, on top of those made before."""
        self.made.enter_context(surgery.in_place(self.model, self.arch, edit))
        self.there -= edit.takes
        self._refill(edit.first)

    def losses(self, candidates: list[Candidate], begin: float = 0, end: float = 1) -> torch.Tensor:
        """[C, windows] loss of the model with a candidate's edits made, in nats per predicted token, as float64 on the host.

        Of the windows from one share of all to another, those of all processes: later shares follow on earlier ones.
        """
        total = torch.zeros(len(candidates) + 1, self.count, dtype=torch.float64)  # and a row that says which windows
        count = len(self.windows)
        for rows in self._rows(len(candidates), int(begin * count), int(end * count)):
            total[-1, self.mine][rows] = 1
            for position, hidden in self._behind_blocks(candidates, rows):
                self.work.done += hidden.shape[:2].numel() * self.head
                for row in range(hidden.shape[0]):
                    logits = self.stream.behind(hidden[row : row + 1])[0, :-1].float()  # [T - 1, vocabulary]
                    labels = self.windows[rows][row, 1:].to(logits.device)
                    total[position, self.mine][rows][row] = nn.functional.cross_entropy(logits, labels).item()
        parallel.add(total)
        return total[:-1, total[-1] > 0]

    def similarities(self, candidates: list[Candidate], original: torch.Tensor) -> list[float]:
        """Per candidate, the mean cosine between its last hidden states and `original` [W, T, hidden], a whole window as one vector."""
        total = torch.zeros(len(candidates), self.count, dtype=torch.float64)
        for rows in self._rows(len(candidates)):
            for position, hidden in self._behind_blocks(candidates, rows):
                found = self.stream.behind(hidden, head=False)
                cosine = nn.functional.cosine_similarity(found.flatten(1).float(), original[rows].flatten(1).float())
                total[position, self.mine][rows] = cosine.double().cpu()
        parallel.add(total)
        return total.mean(1).tolist()

    def count_naive(self, candidates: list[Candidate]) -> None:
        """Note what it would have cost to run the whole model for each candidate."""
        for candidate in candidates:
            met = sum(self.sizes[half] for half in self.there - _takes(candidate)) + self.head
            self.work.naive += self.windows.numel() * met

    def last_hidden(self) -> torch.Tensor:
        """[W, T, hidden] of this process, behind the final norm, with the edits made so far."""
        parts = [self.stream.behind(self.front[-1][rows].to(self.device), head=False) for rows in self._rows()]
        return torch.cat(parts)

    def _behind_blocks(self, candidates: list[Candidate], rows: slice) -> Iterator[tuple[int, torch.Tensor]]:
        """(position, [rows, T, hidden] behind the last block) of every candidate, those that meet at a layer through it together."""
        under_way: dict[int, torch.Tensor] = {}
        for layer in range(min(edit.first for candidate in candidates for edit in candidate), self.layers):
            here = {p: [e for e in candidate if e.first == layer] for p, candidate in enumerate(candidates)}
            runs = [p for p, own in here.items() if not own and p in under_way and self._runs(layer, candidates[p])]
            if runs:
                together = self._through(layer, torch.cat([under_way[p] for p in runs]))
                under_way |= zip(runs, together.split(rows.stop - rows.start), strict=True)
            for p in (p for p, own in here.items() if own):
                under_way.setdefault(p, self.front[layer][rows].to(self.device))
                if self._runs(layer, candidates[p]):
                    under_way[p] = self._edited(layer, under_way[p], candidates[p], here[p])
        self.work.evaluations += len(candidates) * (rows.start == 0)
        yield from under_way.items()

    def _runs(self, layer: int, candidate: Candidate) -> bool:
        return bool(edits.halves([layer]) & self.there - _takes(candidate))

    def _edited(self, layer: int, hidden: torch.Tensor, candidate: Candidate, own: list[Edit]) -> torch.Tensor:
        with ExitStack() as tried:
            for edit in own:
                tried.enter_context(surgery.in_place(self.model, self.arch, edit))
            return self._through(layer, hidden, _takes(candidate))

    @torch.no_grad()
    def _through(self, layer: int, hidden: torch.Tensor, gone: Set[Half] = frozenset()) -> torch.Tensor:
        met = sum(self.sizes[half] for half in edits.halves([layer]) & self.there - gone)
        self.work.done += hidden.shape[:2].numel() * met
        return torch.cat([self.stream.through(layer, part) for part in hidden.split(self.rows)])

    def _refill(self, start: int) -> None:
        for layer in range(start, self.layers):
            for rows in self._rows():
                hidden = self.front[layer][rows].to(self.device)
                if edits.halves([layer]) & self.there:
                    hidden = self._through(layer, hidden)
                self.front[layer + 1][rows] = hidden.to(self.front[0].device)

    def _rows(self, candidates: int = 1, begin: int = 0, end: int | None = None) -> list[slice]:
        """This process's windows, or some of them, in parts that, times `candidates`, are a batch."""
        end, step = len(self.windows) if end is None else end, max(self.rows // candidates, 1)
        return [slice(start, min(start + step, end)) for start in range(begin, end, step)]


def _takes(candidate: Candidate) -> set[Half]:
    return set().union(*(edit.takes for edit in candidate))
