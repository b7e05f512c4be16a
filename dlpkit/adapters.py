"""Low-rank adapters beside pruned weights, by peft, and the merge that keeps every zero zero.

Plain LoRA (arXiv:2106.09685) learns a dense product B A. Where the weight has zeros, a merge has to drop the part of B A that lies on
them, and the loss rises again. *Masked* adapters are trained as they will be merged: the weight that runs is already the merged one,
zeros kept and rounded to the model's dtype, so that merging changes nothing. *Grouped* ones are masked and share one column of A among
`group` neighbouring inputs: the group-wise fine-tuning of SAAP (arXiv:2412.15127), whose text describes that of QA-LoRA
(arXiv:2309.14717). Its float version stands here; that a merge into 4-bit zero points would be exact is what the sharing is for.
"""

import math

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from torch import nn

from dlpkit import archs
from dlpkit.packing import rewrite, sparse_linears

NAME = "default"  # peft's own name of a model's only adapter
KINDS = ("lora", "masked", "grouped")


def attach(model: nn.Module, kind: str = "masked", rank: int = 8, alpha: float = 16.0, group: int = 32) -> PeftModel:
    """Put one adapter beside every prunable Linear of a causal LM; all other parameters are frozen. Drawn from torch's global seed.

    alpha: the product is scaled by alpha / rank. group: inputs that share a column of A, for "grouped". "lora" takes packed models too.
    Raises ValueError for an unknown kind, and for the others on packed weights.
    """
    if kind not in KINDS:
        raise ValueError(f"adapters are one of {', '.join(KINDS)}, got {kind!r}")
    if kind != "lora" and sparse_linears(model):
        raise ValueError(f"{kind} adapters need the weights unpacked: unpack the model first, or take kind 'lora'")
    linears = dict(archs.model_linears(model, archs.of(model)))
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(linears))
    if kind != "lora":
        config._register_custom_module({nn.Linear: MaskedLora if kind == "masked" else grouped(group)})
    return get_peft_model(model, config).eval()


def merge(adapted: PeftModel, format: str = "auto") -> nn.Module:
    """Add the adapters to the weights they stand beside, zeros kept -> the model without adapters, packed if it was packed.

    format: that of dlpkit.kernels.formats in which a packed model goes on running.
    """
    layers = {name: layer for name, layer in adapted.get_base_model().named_modules() if isinstance(layer, LoraLinear)}
    model = adapted.unload()
    with torch.no_grad():
        if sparse_linears(model):
            rewrite(model, lambda name, weight: _merged(layers[name], weight), format)
        else:
            for layer in layers.values():
                base = layer.get_base_layer()
                base.weight.copy_(_merged(layer, base.weight))
    return model


def keep_zeros(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """[N, K] `new` in the dtype of `old`, zero exactly where `old` is: what would round to zero elsewhere becomes the smallest number."""
    new = new.to(old.dtype)
    smallest = torch.full_like(old, torch.finfo(old.dtype).tiny).copysign(old)
    return torch.where(old == 0, 0, torch.where(new == 0, smallest, new))


class MaskedLora(LoraLinear):
    """peft's LoRA whose forward pass is that of the merged weight."""

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """a [rank, K] and b [N, rank], whose product b a is added to the weight."""
        return self.lora_A[NAME].weight * self.scaling[NAME], self.lora_B[NAME].weight

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        a, b = self.factors()
        return (b @ a).masked_fill(self.get_base_layer().weight == 0, 0.0)

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        base = self.get_base_layer()
        return _MaskedProduct.apply(x, base.weight, base.bias, *self.factors())


def grouped(group: int) -> type[MaskedLora]:
    """MaskedLora with A [rank, K / group] on inputs summed over groups, divided by sqrt(group) to keep their variance.

    Where `group` does not divide K, the last group is smaller.
    """

    class GroupedLora(MaskedLora):
        def update_layer(self, adapter: str, *args, **kwargs) -> None:
            super().update_layer(adapter, *args, **kwargs)
            full = self.lora_A[adapter]
            like = {"device": full.weight.device, "dtype": full.weight.dtype}
            self.lora_A[adapter] = nn.Linear(-(-full.in_features // group), full.out_features, bias=False, **like)

        def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
            a, b = super().factors()
            return a.repeat_interleave(group, 1)[:, : self.in_features] / math.sqrt(group), b

    return GroupedLora


class _MaskedProduct(torch.autograd.Function):
    """y = x (W + b a)^T + bias, b a left out where W is zero. The sum is made anew in the backward pass: kept, it would be a second model."""

    @staticmethod
    def forward(ctx, x, weight, bias, a, b):
        ctx.save_for_backward(x, weight, a, b)
        return nn.functional.linear(x, _masked_sum(weight, a, b), bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight, a, b = ctx.saved_tensors
        grad_x = grad @ _masked_sum(weight, a, b) if ctx.needs_input_grad[0] else None
        grad_sum = (grad.flatten(0, -2).T @ x.flatten(0, -2)).float().masked_fill_(weight == 0, 0.0)  # [N, K]
        return grad_x, None, None, b.T @ grad_sum, grad_sum @ a.T


def _masked_sum(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """[N, K], [rank, K], [N, rank] float32 -> [N, K] in the dtype of `weight`."""
    return torch.addmm(weight.float(), b, a).masked_fill_(weight == 0, 0.0).to(weight.dtype)


def _merged(layer: LoraLinear, weight: torch.Tensor) -> torch.Tensor:
    if isinstance(layer, MaskedLora):
        return keep_zeros(_masked_sum(weight, *layer.factors()), weight)
    return keep_zeros(weight.float() + layer.get_delta_weight(NAME).float(), weight)
