"""Where a model keeps its blocks and what a block is made of, as data: one file per Hugging Face `model_type`."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from dlpkit.kernels import registry


@dataclass(frozen=True)
class Arch:
    """Attribute paths. `blocks` from the model, all others from one block. Linears in one tuple read the same input."""

    blocks: str
    attn: str
    mlp: str
    qkv: tuple[str, ...]
    attn_out: str
    mlp_in: tuple[str, ...]
    mlp_out: str
    attn_norms: tuple[str, ...]  # before and after the attention
    mlp_norms: tuple[str, ...]
    interleaved: bool = False  # q, k, v of each head lie together in one Linear
    width: str = "intermediate_size"  # what the config calls the number of MLP channels

    def groups(self) -> tuple[tuple[str, ...], ...]:
        """The Linears of a block in the order they run, those that read the same input together."""
        return self.qkv, (self.attn_out,), self.mlp_in, (self.mlp_out,)

    def linears(self) -> tuple[str, ...]:
        return tuple(name for group in self.groups() for name in group)


def names() -> list[str]:
    return registry.names(sys.modules[__name__])


def of(model: nn.Module) -> Arch:
    """The Arch of a loaded causal LM. Raises ValueError for an unknown model type, or for blocks that do not look as described."""
    kind = model.config.model_type
    if kind not in names():
        raise ValueError(
            f"no description of model_type {kind!r}: dlpkit knows {', '.join(names())}. "
            "A new one is one file of attribute paths in dlpkit/archs/, like llama.py"
        )
    arch = registry.get(sys.modules[__name__], kind).ARCH
    for index, block in enumerate(blocks(model, arch)):
        _check(block, arch, f"{arch.blocks}.{index}")
    return arch


def blocks(model: nn.Module, arch: Arch) -> nn.ModuleList:
    return model.get_submodule(arch.blocks)


def linears(block: nn.Module, arch: Arch) -> dict[str, nn.Linear]:
    """The prunable Linears of a block by their path in it; a block without attention or MLP has fewer."""
    found = dict(block.named_modules())
    return {name: found[name] for name in arch.linears() if isinstance(found.get(name), nn.Linear)}


def model_linears(model: nn.Module, arch: Arch) -> Iterator[tuple[str, nn.Linear]]:
    """(full name, module) of every prunable Linear of the model, block by block."""
    for index, block in enumerate(blocks(model, arch)):
        for name, linear in linears(block, arch).items():
            yield f"{arch.blocks}.{index}.{name}", linear


def _check(block: nn.Module, arch: Arch, where: str) -> None:
    for name, parameter in block.named_parameters():
        if parameter.ndim == 3:
            raise ValueError(
                f"{where}.{name} is one fused tensor {tuple(parameter.shape)} of all experts, not a Linear per expert: mixture-of-experts "
                "models are not supported, because a score needs the inputs that each expert saw"
            )
    present = {name for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    if unknown := present - set(arch.linears()):
        raise ValueError(
            f"{where} holds Linears that its description in dlpkit/archs does not name: {', '.join(sorted(unknown))}"
        )
    if not present:
        raise ValueError(f"{where} holds no Linear to prune")
