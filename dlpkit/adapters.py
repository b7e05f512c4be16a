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
from torch.utils.checkpoint import checkpoint

from dlpkit import archs
from dlpkit.packing import rewrite, sparse_linears

NAME = "default"  # peft's own name of a model's only adapter
KINDS = ("lora", "masked", "grouped")


def attach(model: nn.Module, kind: str = "masked", rank: int = 8, alpha: float = 16.0, group: int = 32) -> PeftModel:
    """Put one adapter beside every prunable Linear of a causal LM; all other parameters are frozen. Drawn from torch's global seed.

    alpha: the product is scaled by alpha / rank. group: inputs that share a column of A, for "grouped". "lora" takes packed models too. Raises
    ValueError for a kind that does not exist or does not fit the model.
    """
    if kind not in KINDS:
        raise ValueError(f"adapters are one of {', '.join(KINDS)}, got {kind!r}")
    if kind != "lora" and sparse_linears(model):
        raise ValueError(f"{kind} adapters need the weights unpacked: unpack the model first, or take kind 'lora'")
    linears = dict(archs.model_linears(model, archs.of(model)))
    if kind == "grouped" and (odd := [name for name, linear in linears.items() if linear.in_features % group]):
        raise ValueError(f"{odd[0]} has {linears[odd[0]].in_features} inputs, not a multiple of the group of {group}")
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
    """peft's LoRA whose forward pass is that of the merged weight. The sum is made anew in the backward pass, not kept."""

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        return super().get_delta_weight(adapter).masked_fill(self.get_base_layer().weight == 0, 0.0)

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        return checkpoint(self._run_merged, x, use_reentrant=False, preserve_rng_state=False)

    def _run_merged(self, x: torch.Tensor) -> torch.Tensor:
        base = self.get_base_layer()
        with torch.autocast(x.device.type, enabled=False):
            return nn.functional.linear(x.to(base.weight.dtype), _merged(self, base.weight), base.bias)


def grouped(group: int) -> type[MaskedLora]:
    """MaskedLora with A [rank, K / group] on inputs summed over groups, divided by sqrt(group) to keep their variance."""

    class GroupedLora(MaskedLora):
        def update_layer(self, adapter: str, *args, **kwargs) -> None:
            super().update_layer(adapter, *args, **kwargs)
            full = self.lora_A[adapter]
            self.lora_A[adapter] = nn.Linear(
                full.in_features // group,
                full.out_features,
                bias=False,
                device=full.weight.device,
                dtype=full.weight.dtype,
            )

        def get_delta_weight(self, adapter: str) -> torch.Tensor:
            a = self.lora_A[adapter].weight.repeat_interleave(group, 1) / math.sqrt(group)  # [rank, K]
            delta = self.lora_B[adapter].weight @ a * self.scaling[adapter]  # [N, K]
            return delta.masked_fill(self.get_base_layer().weight == 0, 0.0)

    return GroupedLora


def _merged(layer: LoraLinear, weight: torch.Tensor) -> torch.Tensor:
    return keep_zeros(weight.float() + layer.get_delta_weight(NAME).float(), weight)
