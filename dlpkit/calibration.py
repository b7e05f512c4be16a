"""Token batches -> what each Linear saw, one block at a time. The only forward hooks in the package, and the only place that
touches a transformers block's signature.

A block's arguments (masks, rotary tables, positions) differ between versions, models and even layers. So the body of the model is
run once with every block replaced by a stub that records what it is given and passes the hidden states on; the recorded arguments
are replayed as they came. One block at a time is on the device.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import torch
from torch import nn

from dlpkit import archs
from dlpkit.archs import Arch
from dlpkit.offload import Hidden, Resident

KEPT_PER_SHAPE = 8  # distinct block arguments of one shape that are looked for among those already kept


@dataclass
class Stats:
    """What the input of one Linear, or of several that read the same, looked like over all calibration tokens."""

    tokens: int
    sq: torch.Tensor  # [K] float32, sum of squares per input feature
    hessian: torch.Tensor | None = None  # [K, K] float32, sum of x x^T
    sum: torch.Tensor | None = None  # [K] float32, sum per input feature
    made: dict = field(default_factory=dict, repr=False)

    def once(self, make: Callable) -> object:
        """make(self), the first time; what it gave, for the other Linears that read the same input."""
        if make not in self.made:
            self.made[make] = make(self)
        return self.made[make]


class Stream:
    """The hidden states of every batch in front of one block, and the means to carry them through it, block by block in order."""

    def __init__(self, model: nn.Module, arch: Arch, batches: list[torch.Tensor], device: torch.device | str):
        """batches: [B, T] int64 token ids each, without padding."""
        self.model, self.blocks, self.arch = model, archs.blocks(model, arch), arch
        self.device = torch.device(device)
        self.as_tuple = _returns_tuple(model, self.blocks, batches[0][:1, :8])
        hidden, self.calls = _record(model, self.blocks, batches, self.device, self.as_tuple)
        self.hidden, self.resident = Hidden(hidden, self.device), Resident(self.blocks, self.device)

    def stats(self, index: int, needs: set[str], advance: bool = False) -> dict[str, Stats]:
        """Run every batch through block `index` -> Stats by Linear; Linears that read the same input share one.

        advance: replace the hidden states by those behind the block on the way.
        Raises ValueError, naming the Linear, when an input holds NaN or Inf.
        """
        block, collected = self.blocks[index], {}
        with _watching(block, self.arch, needs, collected):
            self._run(index, advance)
        for name, stats in collected.items():
            if not torch.isfinite(stats.sq).all():
                raise ValueError(
                    f"the inputs of {self.arch.blocks}.{index}.{name} hold NaN or Inf: the model is damaged, "
                    "or overflows in its dtype; try another dtype"
                )
        return _share(collected, block, self.arch)

    def advance(self, index: int) -> None:
        """Replace the hidden states in front of block `index` by those behind it."""
        self._run(index, True)

    def through(self, index: int, hidden: torch.Tensor, batch: int = 0) -> torch.Tensor:
        """Any [B, T, hidden] on the device through block `index` as it stands now, with the arguments that it had for `batch`.

        With those of a batch of one window, which broadcast, B may be any.
        """
        args, kwargs = self.calls[index][batch]
        out = self.blocks[index](hidden, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    @torch.no_grad()
    def behind(self, hidden: torch.Tensor, head: bool = True) -> torch.Tensor:
        """[B, T, hidden] behind the last block -> logits [B, T, vocabulary], or the last hidden state [B, T, hidden] without `head`."""
        body = self.model if head else _body(self.model)
        ids = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=self.model.get_input_embeddings().weight.device)
        forwards = [self._stub(hidden)] + [self._stub(None)] * (len(self.blocks) - 1)
        with _stubbed(self.blocks, forwards):
            out = body(input_ids=ids, use_cache=False)
        return out.logits if head else out.last_hidden_state

    def _stub(self, answer: torch.Tensor | None) -> Callable:
        """A block's forward that gives `answer`, or what it was given."""

        def forward(hidden_states: torch.Tensor, *args, **kwargs):
            found = hidden_states if answer is None else answer
            return (found,) if self.as_tuple else found

        return forward

    @torch.no_grad()
    def _run(self, index: int, advance: bool) -> None:
        with self.resident.at(index):
            for batch, hidden in enumerate(self.hidden):
                out = self.through(index, hidden, batch)
                if advance:
                    self.hidden[batch] = out


class _Enough(Exception):
    """The body has run as far as it has to."""


@contextmanager
def _watching(block: nn.Module, arch: Arch, needs: set[str], collected: dict[str, Stats]) -> Iterator[None]:
    """Accumulate Stats of the first Linear of every group that shares an input."""

    def watch(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple) -> None:
            x = args[0].detach().flatten(0, -2)  # [tokens, K]
            K = x.shape[1]
            if name not in collected:
                hessian = torch.zeros(K, K, device=x.device) if "hessian" in needs else None
                total = torch.zeros(K, device=x.device) if "sum" in needs else None
                collected[name] = Stats(0, torch.zeros(K, device=x.device), hessian, total)
            stats = collected[name]
            stats.tokens += x.shape[0]
            norm = torch.linalg.vector_norm(x, dim=0, dtype=torch.float32)  # one read of x, no float32 copy of it
            stats.sq += norm.square()
            if stats.sum is not None:
                stats.sum += x.sum(0, dtype=torch.float32)
            if stats.hessian is not None:
                _add_products(stats.hessian, x)

        return hook

    linears = archs.linears(block, arch)
    handles = [linears[group[0]].register_forward_pre_hook(watch(group[0])) for group in _groups(linears, arch)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _add_products(hessian: torch.Tensor, x: torch.Tensor) -> None:
    """hessian [K, K] += x^T x for x [tokens, K]. 16-bit x is exact in TensorFloat-32, so its products are; sums are float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest" if x.dtype == torch.float32 else "high")
    try:
        x = x.float()
        hessian.addmm_(x.T, x)
    finally:
        torch.set_float32_matmul_precision(before)


def _share(collected: dict[str, Stats], block: nn.Module, arch: Arch) -> dict[str, Stats]:
    return {name: collected[group[0]] for group in _groups(archs.linears(block, arch), arch) for name in group}


def _groups(linears: dict[str, nn.Linear], arch: Arch) -> list[list[str]]:
    present = [[name for name in group if name in linears] for group in arch.groups()]
    return [group for group in present if group]


def _record(
    model: nn.Module, blocks: nn.ModuleList, batches: list[torch.Tensor], device: torch.device, as_tuple: bool
) -> tuple[list[torch.Tensor], list[list[tuple]]]:
    """Hidden states in front of block 0, and the other arguments of every block and batch, these on `device`."""
    hidden: list[torch.Tensor] = []
    calls: list[list[tuple]] = [[] for _ in blocks]
    kept: dict[tuple, list[torch.Tensor]] = {}
    seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # of one batch: blocks are given the same tensors

    def stub(index: int) -> Callable:
        def forward(hidden_states: torch.Tensor, *args, **kwargs):
            if index == 0:
                hidden.append(hidden_states)
            calls[index].append(_keep((args, kwargs), kept, seen, device))
            if index == len(blocks) - 1:
                raise _Enough  # what comes after, the final norm, would keep the host busy for nothing
            return (hidden_states,) if as_tuple else hidden_states

        return forward

    with _stubbed(blocks, [stub(index) for index in range(len(blocks))]):
        for batch in batches:
            seen.clear()
            _run_body(model, batch)
    return hidden, calls


@contextmanager
def _stubbed(blocks: nn.ModuleList, forwards: list[Callable]) -> Iterator[None]:
    """Every block with another forward while the body runs."""
    before = [block.__dict__.get("forward") for block in blocks]
    try:
        for block, forward in zip(blocks, forwards, strict=True):
            block.forward = forward
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            del block.forward
            if forward is not None:  # accelerate had put its own there
                block.forward = forward


def _returns_tuple(model: nn.Module, blocks: nn.ModuleList, batch: torch.Tensor) -> bool:
    """Whether a block answers with a tuple, as in transformers 4 for some models: asked of block 0 itself."""
    answer = []

    def hook(module: nn.Module, args: tuple, output: object) -> None:
        answer.append(isinstance(output, tuple))
        raise _Enough

    handle = blocks[0].register_forward_hook(hook)
    try:
        _run_body(model, batch)
    finally:
        handle.remove()
    return answer[0]


def _body(model: nn.Module) -> nn.Module:
    """The model without its head. In transformers 4, Gemma 3 does not name it, and GPT-NeoX does not know its decoder."""
    return model.base_model if model.base_model is not model else model.get_decoder()


def _run_body(model: nn.Module, batch: torch.Tensor) -> None:
    with torch.no_grad(), suppress(_Enough):
        _body(model)(input_ids=batch.to(model.get_input_embeddings().weight.device), use_cache=False)


def _keep(value: object, kept: dict, seen: dict, device: torch.device) -> object:
    """`value` with its tensors on `device`, equal tensors kept once: windows of one shape have the same masks and tables."""
    if isinstance(value, torch.Tensor):
        if id(value) not in seen:
            seen[id(value)] = value, _kept_once(value.to(device), kept.setdefault((value.shape, value.dtype), []))
        return seen[id(value)][1]
    if isinstance(value, (tuple, list)):
        return type(value)(_keep(item, kept, seen, device) for item in value)
    if isinstance(value, dict):
        return {key: _keep(item, kept, seen, device) for key, item in value.items()}
    return value


def _kept_once(value: torch.Tensor, same: list[torch.Tensor]) -> torch.Tensor:
    for other in same[:KEPT_PER_SHAPE]:
        if other is value or torch.equal(other, value):
            return other
    same.append(value)
    return value
