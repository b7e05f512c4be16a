"""SparseLinear, a drop-in for nn.Linear whose weight is packed, and the walk that packs a whole model.

A SparseLinear is in one of two states. *Stored*: its tensors are those of the one layout on disk, as a checkpoint loads them.
*Packed*: they are those of a runtime format. In both, `weight` holds the values, so dtype and device mean what they mean elsewhere,
and a state dict is always the stored form, bit for bit.
"""

import dataclasses

import torch
from torch import nn

from dlpkit import archs
from dlpkit.kernels import dispatch, formats, storage
from dlpkit.kernels.formats import Packed
from dlpkit.kernels.storage import Stored

COMPANIONS = ("mask", "offsets")  # of the stored values, as weight_mask and weight_offsets


class SparseLinear(nn.Linear):
    """y = x W^T + b with W [out_features, in_features] packed; no gradient for W, one for x where the format's matmul has one."""

    def __init__(self, in_features: int, out_features: int, bias: nn.Parameter | None = None):
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.register_parameter("bias", bias)
        self.kind: type | None = None  # the packed dataclass, None while stored
        self.plain: dict[str, object] = {}  # its fields that are not tensors

    @classmethod
    def empty(cls, linear: nn.Linear, nnz: int) -> "SparseLinear":
        """Room for `nnz` stored values in place of `linear`, on its device and in its dtype (meta, while a checkpoint loads)."""
        made = cls(linear.in_features, linear.out_features, linear.bias)
        N, K, device = linear.out_features, linear.in_features, linear.weight.device
        made.weight = nn.Parameter(torch.empty(nnz, dtype=linear.weight.dtype, device=device), requires_grad=False)
        mask = torch.zeros(N, -(-K // 8), dtype=torch.uint8, device=device)
        offsets = torch.zeros(N + 1, dtype=storage.offset_dtype(nnz), device=device)
        made.register_buffer("weight_mask", mask)
        made.register_buffer("weight_offsets", offsets)
        return made

    @classmethod
    def from_linear(cls, linear: nn.Linear, format: str = "auto") -> "SparseLinear":
        """Pack a Linear. Zeros lose their sign: `weight * mask` leaves -0.0, which would be stored as a value."""
        made = cls(linear.in_features, linear.out_features, linear.bias)
        made._take(_pack(linear.weight.detach() + 0.0, format))
        return made

    @property
    def packed(self) -> Packed:
        """The runtime value, made of this module's tensors."""
        tensors = {
            name[len("packed_") :]: buffer for name, buffer in self._buffers.items() if name.startswith("packed_")
        }
        return self.kind(values=self.weight.detach(), **tensors, **self.plain)

    @property
    def format(self) -> str:
        return self.kind.__module__.rsplit(".", 1)[-1] if self.kind else "stored"

    def pack(self, format: str = "auto", name: str = "weight") -> None:
        """Stored -> packed. Raises ValueError, naming the weight, when what was loaded is not one matrix."""
        stored = self.stored()
        storage.validate(stored, name)
        self.weight_mask = self.weight_offsets = None
        self._take(_pack(storage.decode(stored), format))

    def stored(self) -> Stored:
        if self.kind:
            return storage.encode(self.packed.dense())
        return Stored(
            (self.out_features, self.in_features), self.weight.detach(), self.weight_mask, self.weight_offsets
        )

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def nnz(self) -> int:
        """Values that the stored form holds."""
        dense = self.dense()
        return int(torch.count_nonzero(dense.view(storage.BITS[dense.element_size()])))

    def dense(self) -> torch.Tensor:
        """[out_features, in_features], the weight as an ordinary tensor."""
        return self.packed.dense() if self.kind else storage.decode(self.stored())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.packed.matmul(x, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, format={self.format}"

    def _take(self, packed: Packed) -> None:
        self.kind, self.plain = type(packed), {}
        self.weight = nn.Parameter(packed.values, requires_grad=False)
        for field in dataclasses.fields(packed):
            value = getattr(packed, field.name)
            if isinstance(value, torch.Tensor) and field.name != "values":
                self.register_buffer(f"packed_{field.name}", value, persistent=False)
            elif field.name != "values":
                self.plain[field.name] = value

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        if not self.kind:
            return super()._save_to_state_dict(destination, prefix, keep_vars)
        stored = self.stored()
        destination[f"{prefix}weight"] = stored.values
        for name in COMPANIONS:
            destination[f"{prefix}weight_{name}"] = getattr(stored, name)
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias if keep_vars else self.bias.detach()


def pack_linears(model: nn.Module, format: str = "auto") -> dict[str, SparseLinear]:
    """Replace the prunable Linears of a causal LM by SparseLinears, layer by layer, in place -> them by name.

    format: one of dlpkit.kernels.formats, or "auto" for the one that the dispatcher picks for the weight and its device.
    """
    packed = {}
    for name, linear in archs.model_linears(model, archs.of(model)):
        if not isinstance(linear, SparseLinear):
            linear = SparseLinear.from_linear(linear, format)
            put(model, name, linear)
        packed[name] = linear
    return packed


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


def _pack(weight: torch.Tensor, format: str) -> Packed:
    return formats.get(dispatch.choose(weight)[0] if format == "auto" else format).pack(weight)
