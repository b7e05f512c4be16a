"""dlpkit: prune causal language models, store them smaller, run them faster.

Importing it registers the packed checkpoint format with transformers, so that from_pretrained loads it.
"""

from dlpkit.checkpoint import edit, load, pack, save, unpack
from dlpkit.data import calibration as calibration_windows
from dlpkit.data import evaluation as evaluation_windows
from dlpkit.edits import Drop, Merge, Slice
from dlpkit.evaluate import perplexity
from dlpkit.packing import keep_dense
from dlpkit.patterns import Pattern
from dlpkit.pipeline import run
from dlpkit.pruning import prune
from dlpkit.recipe import make as make_recipe
from dlpkit.recovery import recover
from dlpkit.sparse import SparseLinear

__version__ = "0.1.0"
__all__ = [
    "Drop",
    "Merge",
    "Pattern",
    "Slice",
    "SparseLinear",
    "calibration_windows",
    "edit",
    "evaluation_windows",
    "keep_dense",
    "load",
    "make_recipe",
    "pack",
    "perplexity",
    "prune",
    "recover",
    "run",
    "save",
    "unpack",
]
