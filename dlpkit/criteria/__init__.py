"""What a weight is worth, one file each: `scores(weight, stats)` as terms, larger means keep, and for some `solve`, which also
repairs what stays.

A criterion is its module: NEEDS names the statistics it reads ("sq", "hessian"), PER what its scores are compared within.
"""

import sys
from types import ModuleType

from dlpkit.kernels import registry


def names() -> list[str]:
    return registry.names(sys.modules[__name__])


def get(name: str) -> ModuleType:
    return registry.get(sys.modules[__name__], name)
