"""SparseLinear, a drop-in for nn.Linear whose weight is packed.

It is in one of two states. *Stored*: its tensors are those of the one layout on disk, as a checkpoint loads them. *Packed*: they are
those of a runtime format. In both, `weight` holds the values, so dtype and device mean what they mean elsewhere, and a state dict is
always the stored form, bit for bit.
"""

import dataclasses
from itertools import accumulate

import torch
from torch import nn

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
        self.register_buffer("dense_copy", None, persistent=False)  # the weight, if it is kept dense as well
        self.most_rows = 0  # of x that it is then multiplied by packed

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
    def of(cls, linear: nn.Linear, packed: Packed) -> "SparseLinear":
        """In place of `linear`, running on `packed`."""
        made = cls(linear.in_features, linear.out_features, linear.bias)
        made._take(packed)
        return made

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @property
    def packed(self) -> Packed:
        """The runtime value, made of this module's tensors."""
        fields = {
            name[len("packed_") :]: tensor for name, tensor in self._buffers.items() if name.startswith("packed_")
        }
        return self.kind(values=self.weight.detach(), **fields, **self.plain)

    @property
    def whole(self) -> Packed:
        """What is multiplied by."""
        return self.packed

    @property
    def format(self) -> str:
        return formats.name(self.kind) if self.kind else "stored"

    def dense(self) -> torch.Tensor:
        """[out_features, in_features], the weight as an ordinary tensor."""
        return self.packed.dense() if self.kind else storage.decode(self.stored())

    def stored(self) -> Stored:
        if self.kind:
            return storage.encode(self.dense())
        return Stored(self.shape, self.weight.detach(), self.weight_mask, self.weight_offsets)

    def keep_dense(self) -> int:
        """Keep the weight dense as well -> bytes that this takes, 0 if it is dense already."""
        if self.format in ("dense", "stored") or self.dense_copy is not None:
            return 0
        packed = self.packed
        self.dense_copy, self.most_rows = packed.dense(), dispatch.most_rows(packed)
        return self.dense_copy.nbytes

    def nnz(self) -> int:
        """Values that the stored form holds."""
        return storage.count(self.dense())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._product(x, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, format={self.format}"

    def _product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if self.dense_copy is not None and x.shape[:-1].numel() > self.most_rows:
            return nn.functional.linear(x, self.dense_copy, bias)
        return self.packed.matmul(x, bias)

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


class FusedLinear(SparseLinear):
    """One of several SparseLinears that read the same input (q, k, v; gate, up) and share one packed weight, their rows stacked.

    The first to be called multiplies for all, the others return views of the rows that are theirs: at one row of x a launch costs as
    much as a small layer. A call with another input than the last one seen multiplies anew, so the order of calls never matters.
    """

    @classmethod
    def group(cls, linears: list[nn.Linear], packed: Packed) -> "list[FusedLinear]":
        """In place of `linears`, whose weights `packed` holds one below the other. The first of them holds the tensors."""
        members = [cls(linear.in_features, linear.out_features, linear.bias) for linear in linears]
        leader = members[0]
        leader._take(packed)
        for member, stop in zip(members, accumulate(member.out_features for member in members), strict=True):
            member.rows = slice(stop - member.out_features, stop)
            # in a tuple, so that it is not a submodule; none to itself, because a cycle keeps the weight until the garbage collector comes
            member.leaders = () if member is leader else (leader,)
            member.kind, member.weight = leader.kind, leader.weight
        biases = [packed.values.new_zeros(m.out_features) if m.bias is None else m.bias.detach() for m in members]
        has_bias = any(member.bias is not None for member in members)
        leader.register_buffer("stacked_bias", torch.cat(biases) if has_bias else None, persistent=False)
        leader.members, leader.waiting, leader.seen, leader.result = len(members), 0, None, None
        return members

    @property
    def leader(self) -> "FusedLinear":
        return self.leaders[0] if self.leaders else self

    @property
    def whole(self) -> Packed:
        return self.leader.packed

    def dense(self) -> torch.Tensor:
        return self.whole.dense()[self.rows].contiguous()

    def keep_dense(self) -> int:
        return SparseLinear.keep_dense(self.leader)  # all rows, for all members

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.leader.multiply(x)[..., self.rows]

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """[..., K] -> [..., all rows], kept until every member has had its part."""
        if self.seen is not x:
            self.seen, self.result, self.waiting = x, self._product(x, self.stacked_bias), self.members
        result, self.waiting = self.result, self.waiting - 1
        if not self.waiting:
            self.seen = self.result = None
        return result
