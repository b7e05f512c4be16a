"""The walk that packs a model's Linears, those that read the same input together, and the one that unpacks them."""

from collections.abc import Callable

import torch
from torch import nn

from dlpkit import archs
from dlpkit.kernels import dispatch, formats, storage
from dlpkit.sparse import FusedLinear, SparseLinear


def pack_linears(model: nn.Module, format: str = "auto", batch: int = 1) -> dict[str, SparseLinear]:
    """Replace the prunable Linears of a causal LM by packed SparseLinears, in place -> them by name.

    format: one of dlpkit.kernels.formats, or "auto" for the one that the dispatcher picks for the weight, its device and the batch, the
    sequences decoded together, which is the rows of x that it mostly multiplies. Linears that read the same input are packed as one
    unless the dense kernel runs them. Zeros lose their sign: `weight * mask` leaves -0.0, which has a bit set and would be stored as a value.
    """
    arch = archs.of(model)
    for index in range(len(archs.blocks(model, arch))):
        pack_block(model, arch, index, format, batch)
    return sparse_linears(model)


def pack_block(model: nn.Module, arch: archs.Arch, index: int, format: str = "auto", batch: int = 1) -> None:
    """The same for one block; the others may still be on the meta device."""
    for names in _block_groups(model, arch, index):
        unpacked = [name for name in names if not _is_packed(model.get_submodule(name))]
        _pack(model, {name: _unsigned(model.get_submodule(name)) for name in unpacked}, format, batch)


def pack_stored(model: nn.Module, format: str = "auto", batch: int = 1) -> None:
    """The same for the SparseLinears that a checkpoint has just filled; other Linears stay as they are.

    Group by group: beside the model there are never more than one group's dense weights, twice. Raises ValueError, naming the weight, when what
    was loaded does not describe one matrix.
    """
    for names in _groups(model, archs.of(model)):
        weights = {}
        for name in names:
            linear = model.get_submodule(name)
            if isinstance(linear, SparseLinear) and not linear.kind:
                stored = linear.stored()
                storage.validate(stored, name)
                weights[name] = storage.decode(stored)
        _pack(model, weights, format, batch)


def rewrite(
    model: nn.Module, change: Callable[[str, torch.Tensor], torch.Tensor], format: str = "auto", batch: int = 1
) -> None:
    """Give every packed Linear the weight that `change` makes of its name and its dense weight, and pack it again, group by group."""
    for names in _groups(model, archs.of(model)):
        linears = {name: model.get_submodule(name) for name in names}
        weights = {name: change(name, linear.dense()) for name, linear in linears.items() if _is_packed(linear)}
        _pack(model, weights, format, batch)


def unpack_linears(model: nn.Module) -> None:
    """Replace every SparseLinear by an ordinary Linear that holds the same weight, zeros written out, in place."""
    for name, sparse in sparse_linears(model).items():
        linear = nn.Linear(sparse.in_features, sparse.out_features, bias=False, device="meta")
        linear.weight, linear.bias = nn.Parameter(sparse.dense(), requires_grad=False), sparse.bias
        put(model, name, linear)


def keep_dense(model: nn.Module) -> int:
    """Keep every packed weight dense as well, for prompts and batches at which packed loses -> the bytes that takes.

    A prompt then costs what it costs the dense model, and memory is that of both. Weights that run dense anyway have no copy.
    """
    return sum(sparse.keep_dense() for sparse in sparse_linears(model).values())


def sparse_linears(model: nn.Module) -> dict[str, SparseLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseLinear)}


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _groups(model: nn.Module, arch: archs.Arch) -> list[list[str]]:
    return [names for i in range(len(archs.blocks(model, arch))) for names in _block_groups(model, arch, i)]


def _block_groups(model: nn.Module, arch: archs.Arch, index: int) -> list[list[str]]:
    """Full names of a block's Linears, those that read the same input together. Names: holding modules would keep their weights."""
    linears = archs.linears(archs.blocks(model, arch)[index], arch)
    return [[f"{arch.blocks}.{index}.{name}" for name in group if name in linears] for group in arch.groups()]


def _unsigned(linear: nn.Linear) -> torch.Tensor:
    """The weight itself, -0.0 made +0.0."""
    return linear.weight.detach().add_(0.0)


def _is_packed(linear: nn.Linear) -> bool:
    return isinstance(linear, SparseLinear) and linear.kind is not None


def _pack(model: nn.Module, weights: dict[str, torch.Tensor], format: str, batch: int) -> None:
    """Pack the weights of one group, taking them out of `weights`: stacked where a sparse kernel runs them, else one by one."""
    names = list(weights)
    linears = [model.get_submodule(name) for name in names]
    if len(names) > 1 and _may_run_sparse(weights[names[0]], format):
        stacked = torch.cat([weights.pop(name) for name in names])
        chosen = _choose(stacked, format, batch)
        if chosen != "dense":
            for name, member in zip(names, FusedLinear.group(linears, _packed(stacked, chosen, names)), strict=True):
                put(model, name, member)
            return
        parts = stacked.split([linear.out_features for linear in linears])
        weights = {name: part.clone() for name, part in zip(names, parts, strict=True)}
    for name, linear in zip(names, linears, strict=True):
        weight = weights.pop(name)
        put(model, name, SparseLinear.of(linear, _packed(weight, _choose(weight, format, batch), [name])))


def _packed(weight: torch.Tensor, format: str, names: list[str]) -> formats.Packed:
    try:
        return formats.get(format).pack(weight)
    except ValueError as error:
        raise ValueError(f"{' and '.join(names)}: {error}") from error


def _may_run_sparse(weight: torch.Tensor, format: str) -> bool:
    return dispatch.available(weight.device)[0] if format == "auto" else format != "dense"


def _choose(weight: torch.Tensor, format: str, batch: int) -> str:
    return dispatch.choose(weight, batch)[0] if format == "auto" else format
