"""How much each block loses, one file each: `summarise` a block to one number, then `sparsities` from all the numbers.

An allocation is its module: NEEDS is what `summarise` reads of the Scores it walks ("scores", "weights" or None for no look at all). The rescaling that
DLP and OWL share, and the exact budget that all share, stand here once.
"""

import inspect
import sys
from types import ModuleType

import torch

from dlpkit.kernels import registry


def names() -> list[str]:
    return registry.names(sys.modules[__name__])


def get(name: str) -> ModuleType:
    return registry.get(sys.modules[__name__], name)


def split_options(allocation: ModuleType, options: dict) -> tuple[dict, dict]:
    """Options by name -> those of `summarise`, those of `sparsities`. Raises ValueError for one that neither takes."""
    known = [_options(allocation, "summarise"), _options(allocation, "sparsities")]
    if unknown := set(options) - set().union(*known):
        name = allocation.__name__.rsplit(".", 1)[-1]
        takes = ", ".join(sorted(set().union(*known))) or "no options"
        raise ValueError(f"allocation {name} does not take {', '.join(sorted(unknown))}: it takes {takes}")
    return tuple({key: value for key, value in options.items() if key in names} for names in known)


def spread(importance: torch.Tensor, sizes: torch.Tensor, target: float, width: float) -> torch.Tensor:
    """[B] importance, larger keeps more -> [B] sparsities, 2 * width apart at most, whose mean weighted by `sizes` is `target`.

    DLP and OWL: d = 2 width (I - min) / (max - min), sparsity = target + mean(d) - d.
    """
    if not 0 <= width <= 1:
        raise ValueError(f"an allocation spreads sparsities by 0 <= width <= 1 around the target, got {width}")
    importance, sizes = importance.double(), sizes.double()
    extent = importance.max() - importance.min()
    d = 2 * width * (importance - importance.min()) / extent if extent > 0 else torch.zeros_like(importance)
    return exact(target + (d * sizes).sum() / sizes.sum() - d, sizes, target)


def exact(wanted: torch.Tensor, sizes: torch.Tensor, target: float) -> torch.Tensor:
    """[B] -> [B] within [0, 1), shifted by one constant until the mean weighted by `sizes` is `target` to 1e-12.

    No block may keep less than a hundredth of the target density, so none is emptied.
    """
    wanted, sizes = wanted.double(), sizes.double()
    ceiling, weight = 1 - (1 - target) / 100, sizes / sizes.sum()
    low, high = -1.0 - wanted.max().item(), 1.0 - wanted.min().item()
    for _ in range(100):
        shift = (low + high) / 2
        if ((wanted + shift).clamp(0, ceiling) * weight).sum() < target:
            low = shift
        else:
            high = shift
    return (wanted + (low + high) / 2).clamp(0, ceiling)


def _options(allocation: ModuleType, function: str) -> set[str]:
    if not hasattr(allocation, function):
        return set()
    return {
        name
        for name, p in inspect.signature(getattr(allocation, function)).parameters.items()
        if p.default is not p.empty
    }
