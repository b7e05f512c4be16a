"""What does not fit the device waits on the host, and travels while the device computes.

Copies run on a stream of their own beside the current one. Memory that one stream allocates and another uses is recorded with it, so
the allocator hands it out again only when both are done. The device copies from and to pinned memory only without keeping the host waiting,
so what lies elsewhere passes through some.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

RESIDENT_SHARE = 0.25  # hidden states stay on the GPU up to this share of its free memory


class Copies:
    """Copies to and from one device, in order; those of a GPU run beside what it computes."""

    def __init__(self, device: torch.device):
        self.device = torch.empty(0, device=device).device  # with its index
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.landing: list[
            tuple[torch.Tensor, torch.Tensor]
        ] = []  # homes, and the pinned memory that is on the way to them

    def fetch(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy on the device, under way: `arrived` before it is used. A tensor that is there already is itself."""
        if self.stream is None or tensor.device == self.device:
            return tensor.to(self.device)
        with torch.cuda.stream(self.stream):
            return tensor.pin_memory().to(self.device, non_blocking=True)

    def arrived(self, *tensors: torch.Tensor) -> None:
        """Let the current stream wait for what was fetched so far."""
        if self.stream is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self.stream)
            for tensor in tensors:
                tensor.record_stream(current)

    def now(self) -> torch.cuda.Event | None:
        """What the current stream has been given up to here."""
        return torch.cuda.current_stream(self.device).record_event() if self.stream is not None else None

    def store(self, tensor: torch.Tensor, home: torch.Tensor, after: torch.cuda.Event | None) -> None:
        """Copy what `tensor` holds after `after` to its home on the host, where it is complete once `finish` returns."""
        if self.stream is None:
            home.copy_(tensor)
            return
        pinned = home if home.is_pinned() else torch.empty_like(home, pin_memory=True)
        self.stream.wait_event(after)
        with torch.cuda.stream(self.stream):
            pinned.copy_(tensor, non_blocking=True)
        tensor.record_stream(self.stream)
        if pinned is not home:
            self.landing.append((home, pinned))

    def finish(self) -> None:
        if self.stream is not None:
            self.stream.synchronize()
        for home, pinned in self.landing:
            home.copy_(pinned)
        self.landing = []


class Resident:
    """The blocks of a model, one at a time on the device; the next one is fetched while the device still computes.

    What is on the device already stays as it is.
    """

    def __init__(self, blocks: nn.ModuleList, device: torch.device):
        self.blocks, self.copies = blocks, Copies(device)
        self.ahead: dict[int, list[torch.Tensor]] = {}
        self.inside, self.written, self.when = False, set(), None

    @contextmanager
    def at(self, index: int) -> Iterator[None]:
        """Block `index` on the device; on leaving it is back home, with the weights that `changed` named as they are now.

        Within itself, for the same block, it does nothing. Nobody else writes to the blocks between one and the next.
        """
        tensors = self._away(index)
        if self.inside or not tensors:
            yield
            return
        homes = [tensor.data for tensor in tensors]
        here = self.ahead.pop(index, None) or self._fetch(index)
        self.copies.arrived(*here)
        self.inside, self.written = True, set()
        for tensor, data in zip(tensors, here, strict=True):
            tensor.data = data
        try:
            yield
        finally:
            self.inside = False
            for tensor, home in zip(tensors, homes, strict=True):
                if id(tensor) in self.written:
                    self.copies.store(tensor.data, home, self.when)
                tensor.data = home
        if index + 1 < len(self.blocks):
            self.ahead = {index + 1: self._fetch(index + 1)}
        self.copies.finish()

    def changed(self, tensors: Iterable[torch.Tensor]) -> None:
        """These were written to, for good; what the block does on the device from here on may run beside their way home."""
        self.written, self.when = {id(tensor) for tensor in tensors}, self.copies.now()

    def _away(self, index: int) -> list[torch.Tensor]:
        block = self.blocks[index]
        return [tensor for tensor in (*block.parameters(), *block.buffers()) if tensor.device != self.copies.device]

    def _fetch(self, index: int) -> list[torch.Tensor]:
        return [self.copies.fetch(tensor.data) for tensor in self._away(index)]


class Hidden:
    """One tensor for every batch, where `store` says; on the host in pinned memory, which is written over."""

    def __init__(self, tensors: list[torch.Tensor], device: torch.device):
        self.copies, place = Copies(device), store(tensors, device)
        self.tensors = [tensor.to(place) for tensor in tensors]
        if place != device:
            self.tensors = [tensor.pin_memory() for tensor in self.tensors]

    def __len__(self) -> int:
        return len(self.tensors)

    def held(self) -> list[torch.Tensor]:
        """Each where it waits, complete."""
        self.copies.finish()
        return self.tensors

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Each on the device, in order, the next one on its way."""
        ahead = self.copies.fetch(self.tensors[0])
        for index in range(len(self)):
            here = ahead
            self.copies.arrived(here)
            if index + 1 < len(self):
                ahead = self.copies.fetch(self.tensors[index + 1])
            yield here

    def __setitem__(self, index: int, value: torch.Tensor) -> None:
        if self.tensors[index].device == value.device:
            self.tensors[index] = value
        else:
            self.copies.store(value, self.tensors[index], self.copies.now())


def store(hidden: list[torch.Tensor], device: torch.device) -> torch.device:
    """Where such hidden states wait: on the device while they fit beside what runs there, else on the host."""
    if device.type != "cuda":
        return torch.device("cpu")
    free, _ = torch.cuda.mem_get_info(device)
    return device if sum(h.nbytes for h in hidden) <= RESIDENT_SHARE * free else torch.device("cpu")
