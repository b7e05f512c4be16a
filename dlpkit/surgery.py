"""Edits to a model: apply them for good, or try them inside a `with`. Only slices copy the weights that they keep.

What is left is renumbered once. Removed and merged layers leave an ordinary, shorter model, and layers that are all sliced to one size
mostly an ordinary, narrower one. A layer without attention or MLP, or of a size of its own, is one that transformers cannot be told
about: `residue` reads such edits off a model, and a checkpoint carries them.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from dlpkit import archs, units
from dlpkit.absent import NoAttention, NoMLP, Zero
from dlpkit.archs import Arch
from dlpkit.edits import Drop, Edit, Half, Merge, Slice, halves

TABLES = ("_modules", "_parameters", "_buffers")  # where a module keeps what is in it


def apply(model: nn.Module, edits: list[Edit]) -> None:
    """Edit a causal LM in place and renumber its layers. Raises ValueError, before any change, for edits that do not fit it or one another.

    Caches stay dense: they are numbered over the layers that have attention, and the others hold none.
    """
    arch = archs.of(model)
    left = check(present(model, arch), cache_types(model), edits)
    _check_sizes(archs.blocks(model, arch), arch, edits)
    for edit in edits:
        APPLY[type(edit)](archs.blocks(model, arch), arch, edit)
    _renumber(model, arch, sorted({layer for layer, _ in left}))


@contextmanager
def trial(model: nn.Module, edits: list[Edit]) -> Iterator[nn.Module]:
    """The model with `edits` applied while the block runs, and exactly as it was after. Only slices, "sum" and "average" make new weights."""
    arch = archs.of(model)
    config = dict(model.config.__dict__)
    with _restored([model.get_submodule(arch.blocks.rpartition(".")[0]), *archs.blocks(model, arch)]):
        try:
            apply(model, edits)
            yield model
        finally:
            model.config.__dict__.clear()
            model.config.__dict__.update(config)


@contextmanager
def in_place(model: nn.Module, arch: Arch, edit: Edit) -> Iterator[None]:
    """One edit's change to its first block while the body runs, nothing renumbered: for who runs blocks singly and skips what it takes."""
    blocks = archs.blocks(model, arch)
    with _restored([blocks[edit.first]]):
        APPLY[type(edit)](blocks, arch, edit)
        yield


def residue(model: nn.Module) -> list[Edit]:
    """The edits that a model bears and its config cannot tell: those that a checkpoint has to carry, in the model's own numbers."""
    arch = archs.of(model)
    there, blocks = present(model, arch), archs.blocks(model, arch)
    gone = [Drop(layer, part) for layer, part in sorted(halves(range(len(blocks))) - there)]
    sizes = {half: units.count(blocks[half[0]], arch, half[1]) for half in sorted(there)}
    return gone + [
        Slice(*half, size) for half, size in sizes.items() if size != units.told(model.config, arch, half[1])
    ]


def tell(model: nn.Module) -> None:
    """Have the config say the size of the attentions, or of the MLPs, where it is one for all layers and transformers builds such a model."""
    arch = archs.of(model)
    there, blocks = present(model, arch), archs.blocks(model, arch)
    for part in units.PARTS:
        layers = [layer for layer, other in sorted(there) if other == part]
        sizes = {units.count(blocks[layer], arch, part) for layer in layers}
        if sizes and sizes != {units.told(model.config, arch, part)} and len(sizes) == 1:
            values = units.config_values(model.config, blocks[layers[0]], arch, part)
            probe = _built(model.config, values)
            if probe is not None and all(
                units.same_size(block, blocks[layer], arch, part)
                for layer, block in enumerate(archs.blocks(probe, arch))
                if layer in layers
            ):
                for name, value in values.items():
                    setattr(model.config, name, value)


def present(model: nn.Module, arch: Arch) -> set[Half]:
    """The halves of layers that the model has."""
    blocks = archs.blocks(model, arch)
    return {(layer, part) for layer, part in halves(range(len(blocks))) if has(blocks[layer], arch, part)}


def has(block: nn.Module, arch: Arch, part: str) -> bool:
    """Whether a block still has its attention ("attn") or its MLP ("mlp")."""
    return not isinstance(block.get_submodule(arch.attn_out if part == "attn" else arch.mlp_out), Zero)


def parameters(model: nn.Module, arch: Arch) -> dict[Half, int]:
    """How many parameters go with each half of a layer, its norms among them."""
    blocks = archs.blocks(model, arch)
    mlp = (arch.mlp,) if arch.mlp else (*arch.mlp_in, arch.mlp_out)
    paths = {"attn": (arch.attn, *arch.attn_norms), "mlp": (*mlp, *arch.mlp_norms)}
    return {
        (layer, part): sum(p.numel() for path in paths[part] for p in blocks[layer].get_submodule(path).parameters())
        for layer, part in sorted(present(model, arch))
    }


def _drop(blocks: nn.ModuleList, arch: Arch, edit: Drop) -> None:
    block = blocks[edit.layer]
    if edit.part == "layer":
        return  # it is left out of the list as a whole
    if edit.part == "attn":
        _hollow(block, arch.attn, NoAttention(), arch.attn_out)
    elif arch.mlp:
        _hollow(block, arch.mlp, NoMLP(), arch.mlp_out)
    else:
        for name in arch.mlp_in:
            block.set_submodule(name, nn.Identity())
        block.set_submodule(arch.mlp_out, Zero(block.get_submodule(arch.mlp_out)))
    for name in arch.attn_norms if edit.part == "attn" else arch.mlp_norms:
        block.set_submodule(name, nn.Identity())


def _hollow(block: nn.Module, path: str, empty: nn.Module, out: str) -> None:
    """Put `empty` at `path`, with the Zero of the Linear `out` where that was, and the settings that a block may ask for (is_sliding)."""
    plain = (bool, int, float, str, type(None))
    settings = {name: value for name, value in vars(block.get_submodule(path)).items() if isinstance(value, plain)}
    empty.__dict__.update(settings)
    empty.add_module(out.removeprefix(f"{path}."), Zero(block.get_submodule(out)))
    block.set_submodule(path, empty)


def _slice(blocks: nn.ModuleList, arch: Arch, edit: Slice) -> None:
    units.slice_block(blocks[edit.layer], arch, edit.part, list(edit.units))


def _merge(blocks: nn.ModuleList, arch: Arch, edit: Merge) -> None:
    low = blocks[edit.low]
    for name in archs.linears(low, arch):
        linears = [block.get_submodule(name) for block in blocks[edit.low : edit.high + 1]]
        low.set_submodule(name, _merged(linears, edit.rule))


def _merged(linears: list[nn.Linear], rule: str) -> nn.Linear:
    if rule in ("replace", "delete"):
        return linears[-1] if rule == "replace" else linears[0]
    made = nn.Linear(linears[0].in_features, linears[0].out_features, linears[0].bias is not None, device="meta")
    for name, parameter in linears[0].named_parameters():
        base = parameter.detach().float()
        others = [linear.get_parameter(name).detach().float() for linear in linears[1:]]
        total = base + sum(other - base for other in others)
        if rule == "average":
            total = (base + sum(others)) / len(linears)
        setattr(made, name, nn.Parameter(total.to(parameter.dtype), requires_grad=parameter.requires_grad))
    return made


APPLY: dict[type, Callable[[nn.ModuleList, Arch, Edit], None]] = {Drop: _drop, Merge: _merge, Slice: _slice}


def check(there: set[Half], types: list[str], edits: list[Edit]) -> set[Half]:
    """Of a model with the halves `there` and those `types` of attention, the halves that the edits leave.

    Raises ValueError for layers that are not there, edits in one another's way, or a cache that nothing fills.
    """
    for position, edit in enumerate(edits):
        if missing := edit.needs - there:
            raise ValueError(f"{edit} does not fit the model, which has no {_told(missing)}")
        for other in edits[:position]:
            sliced = Slice in (type(edit), type(other)) and edit.needs & other.needs
            if other == edit or edit.needs & other.takes or other.needs & edit.takes or sliced:
                raise ValueError(f"{edit} and {other} are in each other's way")
    if unknown := {layer for edit in edits for layer, _ in edit.takes} - {layer for layer, _ in there}:
        raise ValueError(f"the edits name layers {sorted(unknown)}, which the model does not have")
    left = there - set().union(*(edit.takes for edit in edits))
    with_attention = {types[layer] for layer, part in left if part == "attn"}
    if not with_attention or with_attention < {types[layer] for layer, _ in left}:
        raise ValueError(
            "the edits leave no attention, or none of a kind that the model's cache is laid out for: keep one of each kind"
        )
    return left


def _check_sizes(blocks: nn.ModuleList, arch: Arch, edits: list[Edit]) -> None:
    """Raise ValueError for a slice of more units than there are or of packed weights, and for a merge of layers of different sizes."""
    for edit in edits:
        if isinstance(edit, Slice):
            block = blocks[edit.layer]
            held = units.count(block, arch, edit.part)
            if edit.units[-1] >= held:
                raise ValueError(
                    f"{edit} does not fit the model, whose {edit.part} in layer {edit.layer} has {held} units"
                )
            if any(
                block.get_submodule(member.name).weight.ndim != 2 for member in units.members(block, arch, edit.part)
            ):
                raise ValueError(f"{edit} wants dense weights: unpack the model first, with `dlpkit pack --to dense`")
        elif isinstance(edit, Merge):
            merged = blocks[edit.low : edit.high + 1]
            sizes = [
                [(linear.out_features, linear.in_features) for linear in archs.linears(b, arch).values()]
                for b in merged
            ]
            if any(size != sizes[0] for size in sizes):
                raise ValueError(
                    f"{edit} does not fit the model, whose layers {edit.low} to {edit.high} differ in size"
                )


def _built(config: PretrainedConfig, values: dict[str, int]) -> nn.Module | None:
    """The model that a stock transformers makes of the config with other values, without its weights; None if it refuses."""
    told = copy.deepcopy(config).to_dict() | values
    told.pop("quantization_config", None)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(type(config).from_dict(told))
    except (ValueError, StrictDataclassError):
        return None


def _told(found: set[Half]) -> str:
    return ", ".join(f"{part} in layer {layer}" for layer, part in sorted(found))


def _renumber(model: nn.Module, arch: Arch, kept: list[int]) -> None:
    """Keep those blocks, and number them anew where blocks, attentions and the config say which is which."""
    blocks = archs.blocks(model, arch)
    if len(kept) < len(blocks):
        model.set_submodule(arch.blocks, nn.ModuleList(blocks[index] for index in kept))
        model.config.num_hidden_layers = len(kept)
        if getattr(model.config, "layer_types", None) is not None:
            model.config.layer_types = [model.config.layer_types[index] for index in kept]
    blocks = archs.blocks(model, arch)
    for index, (block, slot) in enumerate(zip(blocks, _cache_slots(model, blocks, arch), strict=True)):
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index if module is block else slot


def _cache_slots(model: nn.Module, blocks: nn.ModuleList, arch: Arch) -> list[int]:
    """Which layer of a cache each block's attention fills.

    A cache asks its first layer, and in models that mix full and sliding attention its first of each kind, how far it is. So of each
    kind the blocks that have attention come first.
    """
    types = cache_types(model)
    slots = [0] * len(blocks)
    for kind in set(types):
        members = [index for index, other in enumerate(types) if other == kind]
        ordered = sorted(members, key=lambda index: not has(blocks[index], arch, "attn"))
        for slot, index in zip(members, ordered, strict=True):
            slots[index] = slot
    return slots


def cache_types(model: nn.Module) -> list[str]:
    """The kind of attention of every layer, as the config tells a cache."""
    return getattr(model.config, "layer_types", None) or ["full_attention"] * model.config.num_hidden_layers


@contextmanager
def _restored(modules: list[nn.Module]) -> Iterator[None]:
    """The modules, and all in them, as they were before the body: their attributes, and which modules and parameters they hold."""
    before = {}
    for module in (inner for outer in modules for inner in outer.modules()):
        before[module] = {name: value.copy() if name in TABLES else value for name, value in vars(module).items()}
    try:
        yield
    finally:
        for module, state in before.items():
            vars(module).clear()
            vars(module).update(state)
