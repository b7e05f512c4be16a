"""Shortened LLaMA (arXiv:2402.02834): remove layers all at once, by the loss without each alone, or by Taylor+.

Taylor+ is a layer's sum of |weight * gradient of the calibration loss|; the first four and the last two layers are kept.
"""

import torch
from torch import nn

from dlpkit import archs
from dlpkit.edits import Drop
from dlpkit.progress import Progress, silent
from dlpkit.structure import Plan, Target, cheapest, windows
from dlpkit.trunk import Trunk

ORDERS = ("ppl", "taylor")
KEPT_FIRST, KEPT_LAST = 4, 2  # layers that Taylor+ never removes


def plan(
    model: nn.Module, batches: list[torch.Tensor], target: Target, order: str = "ppl",
    journal: None = None, progress: Progress = silent,
) -> Plan:  # fmt: skip
    """order: "ppl" or "taylor". An integer target counts layers."""
    if order not in ORDERS:
        raise ValueError(f"shortened's order is {' or '.join(ORDERS)}, got {order!r}")
    if order == "taylor":
        return cheapest(model, target, _taylor(model, windows(batches), progress), "sum of |weight * gradient|")
    layers = [Drop(layer, "layer") for layer in range(model.config.num_hidden_layers)]
    with Trunk(model, windows(batches)) as trunk:
        losses = dict(zip(layers, trunk.losses([(edit,) for edit in layers]).mean(1).tolist(), strict=True))
    return cheapest(model, target, losses, "loss")


def _taylor(model: nn.Module, windows: torch.Tensor, progress: Progress) -> dict[Drop, float]:
    blocks = archs.blocks(model, archs.of(model))
    device, arch = model.get_input_embeddings().weight.device, archs.of(model)
    layers = range(KEPT_FIRST, len(blocks) - KEPT_LAST)
    weights = [linear.weight for layer in layers for linear in archs.linears(blocks[layer], arch).values()]
    total = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
    for done, window in enumerate(windows.split(1)):
        ids = window.to(device)
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        loss = nn.functional.cross_entropy(logits, ids[0, 1:])
        for sum_, gradient in zip(total, torch.autograd.grad(loss, weights), strict=True):
            sum_ += gradient
        progress("gradients", done + 1, len(windows))
    scores = iter((w.detach().float() * g).abs().sum().item() for w, g in zip(weights, total, strict=True))
    return {Drop(layer, "layer"): sum(next(scores) for _ in archs.linears(blocks[layer], arch)) for layer in layers}
