"""The keys and values of a model at fixed places, and its blocks compiled once for all of a kind.

transformers' own StaticLayer counts the tokens it holds, in each layer and differently from version to version; here the loop that
fills the cache says where, so a step is the same whatever came before it, and can be replayed.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from transformers.cache_utils import Cache, StaticLayer

from dlpkit.sparse import SparseLinear

VARIANTS = 64  # of a block in one model: kinds of attention times runtime formats and grids of its Linears


class Slots(StaticLayer):
    """Keys and values of one block [B, heads, length, d]. A prompt fills the first slots; a step fills slot `at`, one for all blocks."""

    def __init__(self, length: int, at: torch.Tensor):
        super().__init__(max_cache_len=length)
        self.at = at  # [1] int64
        self.prompt = 0  # tokens of the prompt while one is read

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        """Take the keys and values of new tokens -> those that their queries may look at."""
        if not self.is_initialized:
            B, heads, _, d = keys.shape
            self.keys = keys.new_zeros(B, heads, self.max_cache_len, d)
            self.values = values.new_zeros(B, heads, self.max_cache_len, values.shape[3])
            self.is_initialized = True
        if self.prompt:
            self.keys[:, :, : self.prompt], self.values[:, :, : self.prompt] = keys, values
            return keys, values
        self.keys.index_copy_(2, self.at, keys)
        self.values.index_copy_(2, self.at, values)
        return self.keys, self.values

    def get_seq_length(self, *args) -> int:
        return 0

    def get_mask_sizes(self, *args) -> tuple[int, int]:
        return self.prompt or self.max_cache_len, 0


@contextmanager
def compiled(blocks: Iterable[nn.Module], cache: Cache) -> Iterator[None]:
    """While it is open, every block runs compiled. One compilation serves all blocks that differ in their tensors alone.

    For that a block gets its own layer of the cache in place of the whole: transformers' blocks only ever call its update.
    """
    run = torch.compile(_run, fullgraph=True)
    settings = {
        "force_parameter_static_shapes": False,  # packed weights differ in length
        "force_nn_module_property_static_shapes": False,
        "recompile_limit": VARIANTS,
    }
    with ExitStack() as stack:
        stack.enter_context(torch._dynamo.config.patch(settings))
        for block in blocks:
            _free_lengths(block)
            block.forward = _caller(run, block, cache.layers[_layer(block)], cache)
            stack.callback(delattr, block, "forward")
        yield


def _layer(block: nn.Module) -> int:
    """Which layer of a cache the block's attention fills: not that of its own number where others have no attention (dlpkit.edits)."""
    return next(module.layer_idx for module in block.children() if hasattr(module, "layer_idx"))


def _caller(run, block: nn.Module, layer: Slots, cache: Cache):
    def forward(hidden, *args, **kwargs):
        args = [layer if arg is cache else arg for arg in args]
        return run(block, hidden, args, {name: layer if arg is cache else arg for name, arg in kwargs.items()})

    return forward


def _run(block: nn.Module, hidden: torch.Tensor, args: list, kwargs: dict):
    return type(block).forward(block, hidden, *args, **kwargs)


def _free_lengths(block: nn.Module) -> None:
    """Compile for packed tensors of any length, not first for those of this block."""
    for module in block.modules():
        if isinstance(module, SparseLinear):
            for tensor in (module.weight, *module.buffers(recurse=False)):
                if tensor.ndim == 1:
                    torch._dynamo.maybe_mark_dynamic(tensor, 0)
