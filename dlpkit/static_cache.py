"""The keys and values of a model at fixed places, and its blocks compiled once for all of a kind.

transformers' own StaticLayer counts the tokens it holds, in each layer and differently from version to version; here the loop that
fills the cache says where, so a step is the same whatever came before it, and can be replayed.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache, StaticLayer

from dlpkit import archs
from dlpkit.kernels.runtime import HAS_TRITON
from dlpkit.sparse import SparseLinear

if HAS_TRITON:
    from dlpkit.kernels.attend import attend

VARIANTS = 64  # of a block in one model: kinds of attention times runtime formats and grids of its Linears
FUSION = {"combo_kernels": True}  # the rotary embeddings of q and k and the update of the cache in one launch


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


def attention(module, query, key, value, attention_mask, scaling=None, **kwargs) -> tuple[torch.Tensor, None]:
    """transformers' attention function for one query per sequence: [B, H, 1, D] over a whole cache -> [B, 1, H, D]."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attend(query[:, :, 0], key, value, attention_mask[:, 0, 0], scale)[:, None], None


AttentionInterface.register("dlpkit_decode", attention)


@contextmanager
def compiled(model: PreTrainedModel, cache: Cache) -> Iterator[Callable]:
    """While it is open, every block runs compiled, and the modules around them -> what compiles a function like them.

    One compilation serves all blocks of a kind. For that a block gets its own layer of the cache in place of the whole: transformers'
    blocks only ever call its update. Attention that torch's scaled_dot_product_attention would do is done by `attend`.
    """
    arch = archs.of(model)
    blocks = archs.blocks(model, arch)
    around = model.get_submodule(arch.blocks.rpartition(".")[0])
    settings = {
        "force_parameter_static_shapes": False,  # packed weights differ in length
        "force_nn_module_property_static_shapes": False,
        "recompile_limit": VARIANTS,
    }
    implementation = model.config._attn_implementation
    compile = partial(torch.compile, fullgraph=True, dynamic=False, options=FUSION)
    run = compile(_run)
    with ExitStack() as stack:
        stack.enter_context(torch._dynamo.config.patch(settings))
        if implementation == "sdpa" and HAS_TRITON:
            model.config._attn_implementation = "dlpkit_decode"
            stack.callback(setattr, model.config, "_attn_implementation", implementation)
        for block in blocks:
            _free_lengths(block)
            own = getattr(block.get_submodule(arch.attn), "layer_idx", None)  # None where the attention was dropped
            block.forward = _caller(run, block, cache, None if own is None else cache.layers[own])
            stack.callback(delattr, block, "forward")
        for module in around.children():
            if module is not blocks:
                module.forward = compile(module.forward)
                stack.callback(delattr, module, "forward")
        yield compile


def _caller(run: Callable, block: nn.Module, cache: Cache, layer: Slots | None) -> Callable:
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
