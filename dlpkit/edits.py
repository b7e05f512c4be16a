"""What is cut out of a model, as values.

Every edit of one list names layers by their numbers in the model as it is before any of them. A kind of edit is a frozen dataclass that
says which halves of layers it `needs` and `takes` and which block, the `first`, it changes; an entry in KINDS; and a function in
`surgery.APPLY` that changes that block.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields

from dlpkit import units

PARTS = ("attn", "mlp", "layer")
RULES = ("replace", "sum", "average", "delete")
Half = tuple[int, str]  # (layer, "attn" or "mlp")


def halves(layers: Iterable[int]) -> set[Half]:
    return {(layer, part) for layer in layers for part in ("attn", "mlp")}


@dataclass(frozen=True)
class Drop:
    """Remove the attention, the MLP, or all of a layer, with the norms of what goes: the residual stream passes it by."""

    layer: int
    part: str

    def __post_init__(self):
        _whole(self.layer)
        if self.part not in PARTS:
            raise ValueError(f"a Drop removes {', '.join(PARTS)}, got {self.part!r}")

    @property
    def first(self) -> int:
        return self.layer

    @property
    def takes(self) -> set[Half]:
        return halves([self.layer]) if self.part == "layer" else {(self.layer, self.part)}

    @property
    def needs(self) -> set[Half]:
        return set() if self.part == "layer" else self.takes


@dataclass(frozen=True)
class Merge:
    """Make layers low..high one, in the place of `low` and with its norms (arXiv:2502.19159). Its Linears, by `rule`:

    replace: those of `high`, as the released code does. sum: W_low + sum over k of (W_k - W_low), as published. average: the mean of
    all. delete: those of `low`.
    """

    low: int
    high: int
    rule: str = "replace"

    def __post_init__(self):
        _whole(self.low, self.high)
        if self.low >= self.high or self.rule not in RULES:
            raise ValueError(f"a Merge wants low < high and a rule of {', '.join(RULES)}, got {self}")

    @property
    def first(self) -> int:
        return self.low

    @property
    def takes(self) -> set[Half]:
        return halves(range(self.low + 1, self.high + 1))

    @property
    def needs(self) -> set[Half]:
        return halves(range(self.low, self.high + 1))


@dataclass(frozen=True)
class Slice:
    """Leave a half of a layer some of its units (dlpkit.units): those that `keep` names in order, or so many, the first."""

    layer: int
    part: str
    keep: tuple[int, ...] | int

    def __post_init__(self):
        if isinstance(self.keep, list):
            object.__setattr__(self, "keep", tuple(self.keep))
        _whole(self.layer, *(self.keep if isinstance(self.keep, tuple) else [self.keep]))
        if self.part not in units.PARTS or not self.units or list(self.units) != sorted(set(self.units)):
            raise ValueError(
                f"a Slice keeps at least one unit of {' or '.join(units.PARTS)}, each once and in order, got {self}"
            )

    @property
    def units(self) -> tuple[int, ...] | range:
        return self.keep if isinstance(self.keep, tuple) else range(self.keep)

    @property
    def first(self) -> int:
        return self.layer

    @property
    def takes(self) -> set[Half]:
        return set()

    @property
    def needs(self) -> set[Half]:
        return {(self.layer, self.part)}


Edit = Drop | Merge | Slice
KINDS: dict[str, type] = {"drop": Drop, "merge": Merge, "slice": Slice}


def to_dict(edit: Edit) -> dict:
    """As JSON: {"kind": "drop", "layer": 3, "part": "attn"}."""
    return {"kind": next(name for name, kind in KINDS.items() if kind is type(edit)), **asdict(edit)}


def from_dict(values: object) -> Edit:
    """The inverse of `to_dict`. Raises ValueError for anything that it could not have written."""
    kind = KINDS.get(values.get("kind")) if isinstance(values, dict) else None
    if kind is None or {field.name for field in fields(kind)} != set(values) - {"kind"}:
        raise ValueError(f"an edit is one of {', '.join(KINDS)} with all of its fields, got {values!r}")
    return kind(**{name: value for name, value in values.items() if name != "kind"})


def _whole(*numbers: object) -> None:
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f"layers are counted from 0 in whole numbers, got {', '.join(map(repr, numbers))}")
