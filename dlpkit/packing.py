"""The walk that packs a model's Linears, those that read the same input together, and the one that unpacks them."""

import torch
from torch import nn

from dlpkit import archs
from dlpkit.kernels import dispatch, formats, storage
from dlpkit.sparse import FusedLinear, SparseLinear


def pack_linears(model: nn.Module, format: str = "auto") -> dict[str, SparseLinear]:
    """Replace the prunable Linears of a causal LM by packed SparseLinears, in place -> them by name.

    format: one of dlpkit.kernels.formats, or "auto" for the one that the dispatcher picks for the weight and its device. Linears that
    read the same input are packed as one unless the dense kernel runs them. Zeros lose their sign: `weight * mask` leaves -0.0, which
    has a bit set and would be stored as a value.
    """
    for group in _groups(model, archs.of(model)):
        _pack(
            model,
            {name: linear.weight.detach() + 0.0 for name, linear in group.items() if not _is_packed(linear)},
            format,
        )
    return sparse_linears(model)


def pack_stored(model: nn.Module, format: str = "auto") -> None:
    """The same for the SparseLinears that a checkpoint has just filled; other Linears stay as they are.

    Group by group: beside the model there is never more than one group's dense weights. Raises ValueError, naming the weight, when what
    was loaded does not describe one matrix.
    """
    for group in _groups(model, archs.of(model)):
        weights = {}
        for name, linear in group.items():
            if isinstance(linear, SparseLinear) and not linear.kind:
                stored = linear.stored()
                storage.validate(stored, name)
                weights[name] = storage.decode(stored)
        _pack(model, weights, format)


def unpack_linears(model: nn.Module) -> None:
    """Replace every SparseLinear by an ordinary Linear that holds the same weight, zeros written out, in place."""
    for name, sparse in sparse_linears(model).items():
        linear = nn.Linear(sparse.in_features, sparse.out_features, bias=False, device="meta")
        linear.weight, linear.bias = nn.Parameter(sparse.dense(), requires_grad=False), sparse.bias
        put(model, name, linear)


def sparse_linears(model: nn.Module) -> dict[str, SparseLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseLinear)}


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _groups(model: nn.Module, arch: archs.Arch) -> list[dict[str, nn.Linear]]:
    """The prunable Linears by full name, those that read the same input together."""
    found = []
    for index, block in enumerate(archs.blocks(model, arch)):
        linears = archs.linears(block, arch)
        for group in arch.groups():
            found.append({f"{arch.blocks}.{index}.{name}": linears[name] for name in group if name in linears})
    return found


def _is_packed(linear: nn.Linear) -> bool:
    return isinstance(linear, SparseLinear) and linear.kind is not None


def _pack(model: nn.Module, weights: dict[str, torch.Tensor], format: str) -> None:
    """Pack the weights of one group: stacked where a sparse kernel runs them, else one by one."""
    linears = [model.get_submodule(name) for name in weights]
    if len(weights) > 1:
        stacked = torch.cat(list(weights.values()))
        chosen = _choose(stacked, format)
        if chosen != "dense":
            members = FusedLinear.group(linears, formats.get(chosen).pack(stacked))
            for name, member in zip(weights, members, strict=True):
                put(model, name, member)
            return
    for (name, weight), linear in zip(weights.items(), linears, strict=True):
        put(model, name, SparseLinear.of(linear, formats.get(_choose(weight, format)).pack(weight)))


def _choose(weight: torch.Tensor, format: str) -> str:
    return dispatch.choose(weight)[0] if format == "auto" else format
