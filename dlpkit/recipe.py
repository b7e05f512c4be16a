"""Everything a pruning run depends on, as one checked value that round-trips through recipe.yaml and the command line."""

from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from dlpkit import allocation as allocations
from dlpkit import criteria, data
from dlpkit import structure as structures
from dlpkit.models import DTYPES
from dlpkit.patterns import Pattern
from dlpkit.pruning import GRANULARITIES


class Recipe(BaseModel):
    """Unknown keys are errors. `sparsity` takes a pattern too: 0.6, "0.6@256" (equal counts per 256 columns) or "2:4".

    structure: a method of dlpkit.structure, or a plan.json, that first removes `remove`: a share of all parameters or a number of things.
    width: a second method, that removes `width_remove` of what the first has left: depth, then width. Weights are then pruned only if
    `sparsity` is given.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    structure: str | None = None
    remove: Annotated[int, Field(strict=True)] | Annotated[float, Field(strict=True)] | None = None
    structure_options: dict[str, bool | int | float | str] = {}  # of the structure: mode, rule, ...
    width: str | None = None
    width_remove: Annotated[int, Field(strict=True)] | Annotated[float, Field(strict=True)] | None = None
    width_options: dict[str, bool | int | float | str] = {}
    criterion: str = "wanda"
    sparsity: str = "0.5"
    allocation: str = "dlp"
    options: dict[str, float | str] = {}  # of the allocation: alpha, strategy, ...
    granularity: str = "block"
    text: str = data.BUILTIN
    nsamples: int = Field(128, ge=1)
    seqlen: int = Field(2048, ge=2)
    seed: int = 0
    batch_size: int = Field(1, ge=1)
    dtype: str = "auto"
    eval_text: str = data.BUILTIN
    eval_windows: int | None = Field(None, ge=0)  # at most so many windows of seqlen tokens; 0 leaves perplexity out

    @field_validator("sparsity", mode="before")
    @classmethod
    def _pattern(cls, value: object) -> str:
        return str(Pattern.parse(value))

    @field_validator("criterion", "allocation", "granularity", "dtype")
    @classmethod
    def _known(cls, value: str, info) -> str:
        known = {
            "criterion": criteria.names(),
            "allocation": allocations.names(),
            "granularity": GRANULARITIES,
            "dtype": DTYPES,
        }
        if value not in known[info.field_name]:
            raise ValueError(f"unknown name {value!r}: choose one of {', '.join(known[info.field_name])}")
        return value

    @model_validator(mode="before")
    @classmethod
    def _weights_stay(cls, values: dict) -> dict:
        return {"sparsity": "0", **values} if values.get("structure") else values

    @model_validator(mode="after")
    def _structure_fits(self) -> "Recipe":
        if self.structure is None:
            if self.remove is not None or self.structure_options:
                raise ValueError("what to remove needs a structure that says how, as in structure: blockpruner")
            return self
        if self.remove is not None:
            structures.check_target(self.remove)
        if self.structure.endswith(structures.PLAN):
            if self.structure_options:
                raise ValueError("a plan has been searched for already and takes no options")
            structures.read(self.structure)
        else:
            structures.check_options(self.structure, self.structure_options)
            if self.remove is None and "threshold" not in self.structure_options:
                raise ValueError(
                    "how much is to be removed? Give a share of all parameters such as 0.2, or a number such as 12"
                )
        return self

    @model_validator(mode="after")
    def _width_fits(self) -> "Recipe":
        if self.width is None:
            if self.width_remove is not None or self.width_options:
                raise ValueError("what width is to remove needs a width that says how, as in width: saap")
        elif self.structure is None or self.width_remove is None:
            raise ValueError(
                "width comes after a structure and wants a width_remove; for width alone, give it as the structure"
            )
        else:
            structures.check_target(self.width_remove)
            structures.check_options(self.width, self.width_options)
        return self

    @property
    def prunes_weights(self) -> bool:
        return Pattern.parse(self.sparsity).sparsity > 0

    @model_validator(mode="after")
    def _options_fit(self) -> "Recipe":
        allocations.split_options(allocations.get(self.allocation), self.options)
        return self

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(), sort_keys=False)


def make(**values) -> Recipe:
    """A Recipe from keyword arguments. Raises ValueError with one line per wrong value."""
    try:
        return Recipe(**values)
    except ValidationError as error:
        lines = [
            f"{'.'.join(map(str, e['loc'])) or 'recipe'}: {e['msg'].removeprefix('Value error, ')}"
            for e in error.errors()
        ]
        raise ValueError("; ".join(lines)) from None


def read(path: str | Path) -> dict:
    """The values that a recipe.yaml sets. Raises ValueError when it is not a mapping of known keys."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read the recipe {path}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} should be a YAML mapping such as 'criterion: wanda', found {type(values).__name__}")
    if unknown := sorted(set(values) - set(Recipe.model_fields)):
        raise ValueError(f"{path} has unknown keys {', '.join(unknown)}: a recipe has {', '.join(Recipe.model_fields)}")
    return values


def split_method(values: dict) -> dict:
    """Wanda's way to name both halves at once: criterion "wanda_dlp" -> criterion "wanda", allocation "dlp"."""
    criterion, _, allocation = values.get("criterion", "").partition("_")
    if allocation and "allocation" not in values:
        return {**values, "criterion": criterion, "allocation": allocation}
    return values


def removal(remove: str | None, pairs: list[str] | None, of: str = "structure") -> dict:
    """What the flags of a structure say: ("0.2", ["mode=attn"]) -> {"remove": 0.2, "structure_options": {"mode": "attn"}}. of: or "width"."""
    target = "remove" if of == "structure" else f"{of}_remove"
    found = {} if remove is None else {target: yaml.safe_load(remove)}
    return found | ({f"{of}_options": options(pairs)} if pairs else {})


def options(pairs: list[str]) -> dict[str, float | str]:
    """["alpha=0.1", "strategy=mean"] -> {"alpha": 0.1, "strategy": "mean"}."""
    found: dict[str, float | str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not (name and equals and value):
            raise ValueError(f"an option is name=value, as in alpha=0.1, got {pair!r}")
        found[name] = yaml.safe_load(value)
    return found
