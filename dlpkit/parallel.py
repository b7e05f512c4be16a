"""Several processes under torchrun, each with a share of the calibration windows. One process alone is the ordinary case.

Every process holds the whole model and takes the same decisions, because all see the same sums; the first one writes.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist


@contextmanager
def processes(device: torch.device) -> Iterator[torch.device]:
    """Join the processes that torchrun started, for as long as the body runs -> this process's device of that kind. Raises ValueError when
    there are not enough for all.
    """
    if not dist.is_torchelastic_launched() or dist.is_initialized():
        yield device
        return
    if device.type == "cuda":
        wanted, there = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if wanted > there:
            raise ValueError(
                f"torchrun started {wanted} processes on a machine with {there} GPU{'s' * (there != 1)}: start one for each GPU, or use --device cpu"
            )
        device = torch.device("cuda", dist.get_node_local_rank())
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def first() -> bool:
    """Whether this process is the one that writes."""
    return not dist.is_initialized() or dist.get_rank() == 0


def share(items: int) -> slice:
    """Which of `items` are this process's. Raises ValueError when there are not enough for all."""
    if items < count():
        raise ValueError(
            f"{items} windows cannot be shared by {count()} processes: use more windows, or fewer processes"
        )
    return slice(dist.get_rank() if dist.is_initialized() else 0, None, count())


def add(tensor: torch.Tensor) -> None:
    """Make a host tensor the sum over all processes, in place."""
    if dist.is_initialized():
        moved = tensor.cuda() if dist.get_backend() == "nccl" else tensor
        dist.all_reduce(moved)
        tensor.copy_(moved)


def told(value: object) -> object:
    """What the first process has for `value`, everywhere."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]
