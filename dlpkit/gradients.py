"""What the loss would lose with each unit, to first order, from backward passes over the calibration text (arXiv:2305.11627, Eq. 3-5).

The gradient of one Linear's weight exists only until it has been multiplied by the weight and summed by unit, so memory holds the model, the
activations of one batch and one gradient. Products and sums are float32 whatever the model is in.
"""

from dataclasses import dataclass

import torch
from torch import nn

from dlpkit import archs, units
from dlpkit.edits import Half, present
from dlpkit.progress import Progress, silent
from dlpkit.units import Member

FLOAT16_SCALE = 2.0**12  # of the loss, for gradients that float16 would round to zero
AGGREGATIONS = ("sum", "prod", "max", "last")


@dataclass(frozen=True)
class Terms:
    """Importance of the units of one half, by the batch whose gradient it is from, for each of its Linears: [members, batches, units]."""

    vector: torch.Tensor  # |sum of g w over a row or column|, summed over those of a unit
    element: torch.Tensor  # sum of |g w - (g w)^2 / 2| over the weights of a unit

    def of(self, kind: str, aggregation: str = "sum") -> torch.Tensor:
        """[batches, units] float32, over the Linears of the half as LLM-Pruner does; "last" is the one that closes it."""
        values = getattr(self, kind)
        if aggregation == "max":
            return values.amax(0)
        return values[-1] if aggregation == "last" else getattr(values, aggregation)(0)


def terms(model: nn.Module, batches: list[torch.Tensor], progress: Progress = silent) -> dict[Half, Terms]:
    """[B, T] int64 token ids each -> Terms of every half of a dense causal LM, computed where the model is.

    The gradient is that of a batch's mean loss; its squares stand for the diagonal of the Fisher information. Raises ValueError, naming the
    Linear, for a gradient that is not finite.
    """
    arch = archs.of(model)
    found: dict[Half, list[list[tuple]]] = {}
    wanted = [p.requires_grad for p in model.parameters()]
    scale = FLOAT16_SCALE if model.dtype == torch.float16 else 1.0
    model.requires_grad_(False)
    handles = []
    try:
        for half in sorted(present(model, arch)):
            block = archs.blocks(model, arch)[half[0]]
            table = units.members(block, arch, half[1])
            found[half] = [[] for _ in table]
            for member, kept in zip(table, found[half], strict=True):
                weight = block.get_submodule(member.name).weight.requires_grad_(True)
                name = f"{arch.blocks}.{half[0]}.{member.name}"
                handles.append(weight.register_post_accumulate_grad_hook(_take(member, kept, scale, name)))
        for index, batch in enumerate(batches):
            batch = batch.to(model.get_input_embeddings().weight.device)
            (model(input_ids=batch, labels=batch, use_cache=False).loss * scale).backward()
            progress("gradients", index + 1, len(batches))
    finally:
        for handle in handles:
            handle.remove()
        for parameter, before in zip(model.parameters(), wanted, strict=True):
            parameter.requires_grad_(before)
    return {half: _stack(kept) for half, kept in found.items()}


def _take(member: Member, kept: list[tuple], scale: float, name: str):
    """Turn the gradient of a weight into sums by unit and let it go."""

    def hook(weight: nn.Parameter) -> None:
        product = weight.grad.float().mul_(weight.detach()).div_(scale)  # [N, K], g w
        weight.grad = None
        vector = member.sums(member.across(product).abs())
        element = member.sums(member.across((product - product.square() / 2).abs_()))
        if not torch.isfinite(element).all():
            raise ValueError(
                f"the gradient of {name} is not finite: the model is damaged, or overflows in its dtype; try another"
            )
        kept.append((vector, element))

    return hook


def _stack(kept: list[list[tuple]]) -> Terms:
    vector, element = (torch.stack([torch.stack([pair[i] for pair in member]) for member in kept]) for i in (0, 1))
    return Terms(vector, element)
