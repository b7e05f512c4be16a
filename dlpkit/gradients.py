"""What the loss would lose with each unit, to first order, from backward passes over the calibration text (arXiv:2305.11627, Eq. 3-5).

The gradient of one Linear's weight exists only until it has been multiplied by the weight and summed by unit, so memory holds the model, the
activations of one batch and one gradient. Products and sums are float32 whatever the model is in.
"""

from dataclasses import dataclass

import torch
from torch import nn

from dlpkit import archs, units
from dlpkit.edits import Half
from dlpkit.progress import Progress, silent
from dlpkit.surgery import present
from dlpkit.units import Member

FLOAT16_SCALE = 2.0**12  # of the loss, for gradients that float16 would round to zero
AGGREGATIONS = ("sum", "prod", "max", "last")


@dataclass(frozen=True)
class Terms:
    """Importance of the units of one half, from each of its Linears."""

    vector: torch.Tensor  # [members, batches, units], |sum of g w over a row or column|, summed over those of a unit
    element: torch.Tensor  # [members, batches, units], sum of |g w - (g w)^2 / 2| over the weights of a unit
    pooled: torch.Tensor  # [members, units], `vector` of the gradient of all batches together

    def each(self, kind: str, aggregation: str = "sum") -> torch.Tensor:
        """[batches, units] "vector" or "element" importance by each batch's own gradient."""
        return _over_members(getattr(self, kind), aggregation)

    def total(self, kind: str, aggregation: str = "sum") -> torch.Tensor:
        """[units] over all the text: "vector" by its one gradient, "element" as the mean over batches."""
        return _over_members(self.pooled if kind == "vector" else self.element.mean(1), aggregation)


def terms(model: nn.Module, batches: list[torch.Tensor], progress: Progress = silent) -> dict[Half, Terms]:
    """[B, T] int64 token ids each -> Terms of every half of a dense causal LM, computed where the model is.

    The gradient is that of a batch's mean loss; its squares stand for the diagonal of the Fisher information. Raises ValueError, naming the
    Linear, for a gradient that is not finite.
    """
    arch = archs.of(model)
    found: dict[Half, list[_Sums]] = {}
    wanted = [p.requires_grad for p in model.parameters()]
    scale = FLOAT16_SCALE if model.dtype == torch.float16 else 1.0
    model.requires_grad_(False)
    handles = []
    try:
        for half in sorted(present(model, arch)):
            block = archs.blocks(model, arch)[half[0]]
            found[half] = []
            for member in units.members(block, arch, half[1]):
                found[half].append(_Sums(member, scale, f"{arch.blocks}.{half[0]}.{member.name}"))
                weight = block.get_submodule(member.name).weight.requires_grad_(True)
                handles.append(weight.register_post_accumulate_grad_hook(found[half][-1].take))
        for index, batch in enumerate(batches):
            batch = batch.to(model.get_input_embeddings().weight.device)
            (model(input_ids=batch, labels=batch, use_cache=False).loss * scale).backward()
            progress("gradients", index + 1, len(batches))
    finally:
        for handle in handles:
            handle.remove()
        for parameter, before in zip(model.parameters(), wanted, strict=True):
            parameter.requires_grad_(before)
    return {half: _terms(sums) for half, sums in found.items()}


def _over_members(values: torch.Tensor, aggregation: str) -> torch.Tensor:
    """[members, ...] -> [...], as LLM-Pruner adds a group up; "last" is the Linear that closes the half."""
    if aggregation == "max":
        return values.amax(0)
    return values[-1] if aggregation == "last" else getattr(values, aggregation)(0)


class _Sums:
    """What the gradients of one Linear's weight have come to."""

    def __init__(self, member: Member, scale: float, name: str):
        self.member, self.scale, self.name = member, scale, name
        self.vector: list[torch.Tensor] = []
        self.element: list[torch.Tensor] = []
        self.signed: torch.Tensor | float = 0.0

    def take(self, weight: nn.Parameter) -> None:
        """Turn the gradient that has just been made into sums by unit, and let it go."""
        product = weight.grad.float().mul_(weight.detach()).div_(self.scale)  # [N, K], g w
        weight.grad = None
        signed = self.member.across(product)  # [N] or [K]
        self.signed = self.signed + signed
        self.vector.append(self.member.sums(signed.abs()))
        self.element.append(self.member.sums(self.member.across((product - product.square() / 2).abs_())))
        if not torch.isfinite(self.element[-1]).all():
            raise ValueError(
                f"the gradient of {self.name} is not finite: the model is damaged, or overflows in its dtype; try another"
            )


def _terms(sums: list[_Sums]) -> Terms:
    vector, element = (
        torch.stack([torch.stack(getattr(each, kind)) for each in sums]) for kind in ("vector", "element")
    )
    pooled = torch.stack([each.member.sums(each.signed.abs()) / len(each.vector) for each in sums])
    return Terms(vector, element, pooled)
