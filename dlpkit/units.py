"""What a layer can lose and still be one: units, which are channels of its MLP and whole key-value groups of its attention heads.

A unit is some rows of the Linears that open a half of a layer (q, k, v; gate, up) and the columns that meet them in the Linear that closes
it. `members` says of each Linear to which unit its rows or columns belong; slicing, scoring and counting all read that one table.
"""

import copy
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PretrainedConfig

from dlpkit.archs import Arch

PARTS = ("attn", "mlp")
HEADS = ("num_heads", "num_attention_heads")  # what attentions and configs call their number of query heads
KEY_VALUE_HEADS = "num_key_value_heads"


@dataclass(frozen=True)
class Member:
    """One Linear of a half, by its path in the block. unit: [out_features] for dim 0, [in_features] for dim 1, int64."""

    name: str
    dim: int
    unit: torch.Tensor

    def sums(self, values: torch.Tensor) -> torch.Tensor:
        """One value per row or column -> [units], those of each unit added."""
        count = int(self.unit[-1]) + 1
        return values.new_zeros(count).index_add_(0, self.unit.to(values.device), values)

    def across(self, weight: torch.Tensor) -> torch.Tensor:
        """[N, K] -> [N] or [K], each row or column added up."""
        return weight.sum(1 - self.dim)


def members(block: nn.Module, arch: Arch, part: str) -> list[Member]:
    """The Linears of the attention ("attn") or the MLP ("mlp") of a block. A fused Linear is one member.

    The tables are on the CPU, also while a checkpoint loads and the default device is meta.
    """
    if part == "mlp":
        closing = block.get_submodule(arch.mlp_out)
        channel = torch.arange(closing.in_features, device="cpu")
        opening = [Member(name, 0, channel.repeat(_fused(block, name, len(channel)))) for name in arch.mlp_in]
        return [*opening, Member(arch.mlp_out, 1, channel)]
    size, queries = _head(block, arch)
    closing = block.get_submodule(arch.attn_out)
    q = torch.arange(closing.in_features // (size * queries), device="cpu").repeat_interleave(size * queries)
    k = q[::queries]
    if len(arch.qkv) == 3:
        rows = (q, k, k)
    elif arch.interleaved:
        rows = (q.repeat_interleave(3),)
    else:
        rows = (torch.cat([q, k, k]),)
    return [*(Member(name, 0, unit) for name, unit in zip(arch.qkv, rows, strict=True)), Member(arch.attn_out, 1, q)]


def count(block: nn.Module, arch: Arch, part: str) -> int:
    """Units of a half."""
    return int(members(block, arch, part)[-1].unit[-1]) + 1


def parameters(block: nn.Module, arch: Arch, part: str) -> int:
    """Parameters of one unit: those of a half are all alike."""
    total = 0
    for member in members(block, arch, part):
        linear = block.get_submodule(member.name)
        each = int((member.unit == 0).sum())
        total += each * (linear.out_features if member.dim else linear.in_features + (linear.bias is not None))
    return total


def told(config: PretrainedConfig, arch: Arch, part: str) -> int:
    """Units that the config gives each half."""
    if part == "mlp":
        return getattr(config, arch.width)
    return getattr(config, KEY_VALUE_HEADS, None) or config.num_attention_heads


def config_values(config: PretrainedConfig, block: nn.Module, arch: Arch, part: str) -> dict[str, int]:
    """What a config would have to say for every layer to have the half of this one."""
    held = count(block, arch, part)
    if part == "mlp":
        return {arch.width: held}
    size, queries = _head(block, arch)
    grouped = {KEY_VALUE_HEADS: held} if hasattr(config, KEY_VALUE_HEADS) else {}
    return {"num_attention_heads": held * queries, "head_dim": size, **grouped}


def same_size(block: nn.Module, other: nn.Module, arch: Arch, part: str) -> bool:
    """Whether a half has the same shapes in both blocks, heads included."""
    names = [member.name for member in members(other, arch, part)]
    shapes = [[tuple(b.get_submodule(name).weight.shape) for name in names] for b in (block, other)]
    return shapes[0] == shapes[1] and (part == "mlp" or _head(block, arch) == _head(other, arch))


def slice_block(block: nn.Module, arch: Arch, part: str, keep: list[int]) -> None:
    """Leave a half those of its units that `keep` names, in their order."""
    table = members(block, arch, part)
    for member in table:
        chosen = torch.isin(member.unit, torch.tensor(keep, device="cpu")).nonzero().flatten()
        block.set_submodule(member.name, _sliced(block.get_submodule(member.name), member.dim, chosen))
    if part == "attn":
        _, queries = _head(block, arch)
        _tell(block.get_submodule(arch.attn), len(keep), queries, by_config=len(arch.qkv) == 1 and not arch.interleaved)


def _sliced(linear: nn.Linear, dim: int, chosen: torch.Tensor) -> nn.Linear:
    made = nn.Linear(1, 1, bias=False, device="meta")
    weight = linear.weight.detach().index_select(dim, chosen.to(linear.weight.device))
    bias = linear.bias
    if dim == 0 and bias is not None:
        bias = nn.Parameter(bias.detach()[chosen.to(bias.device)], requires_grad=bias.requires_grad)
    made.weight, made.bias = nn.Parameter(weight, requires_grad=linear.weight.requires_grad), bias
    made.out_features, made.in_features = weight.shape
    return made


def _tell(attention: nn.Module, groups: int, queries: int, by_config: bool) -> None:
    """Correct the numbers of heads that an attention goes by: most go by shapes, OPT by an attribute, Phi-3 by its config as well."""
    if by_config:
        attention.config = copy.copy(attention.config)  # one of its own, for layers may differ
    told = dict.fromkeys(HEADS, groups * queries) | {KEY_VALUE_HEADS: groups}
    for owner in (attention, attention.config) if by_config else (attention,):
        for name, value in told.items():
            if hasattr(owner, name):
                setattr(owner, name, value)


def _head(block: nn.Module, arch: Arch) -> tuple[int, int]:
    """Dimension of a head, and query heads per key-value group, as the attention itself has them."""
    attention = block.get_submodule(arch.attn)
    size = attention.head_dim if hasattr(attention, "head_dim") else attention.head_size
    return size, getattr(attention, "num_key_value_groups", 1)


def _fused(block: nn.Module, name: str, channels: int) -> int:
    """1 for gate or up alone, 2 for both in one Linear."""
    return block.get_submodule(name).out_features // channels
