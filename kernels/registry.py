"""A package folder as a name -> module table: adding a file adds an entry."""

import importlib
import pkgutil
from types import ModuleType


def names(package: ModuleType) -> list[str]:
    """Names of the public modules in `package`, sorted."""
    return sorted(info.name for info in pkgutil.iter_modules(package.__path__) if not info.name.startswith("_"))


def get(package: ModuleType, name: str) -> ModuleType:
    """The module `name` of `package`. Raises ValueError, listing what there is, when there is none."""
    known = names(package)
    if name not in known:
        kind = package.__name__.rsplit(".", 1)[-1]
        raise ValueError(f"unknown name {name!r} in {kind}: choose one of {', '.join(known)}")
    return importlib.import_module(f"{package.__name__}.{name}")
