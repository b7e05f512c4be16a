"""Loss and perplexity of a causal LM on token windows."""

import math
from dataclasses import dataclass

import torch
from torch import nn
from transformers import DynamicCache

from dlpkit.progress import Progress, silent


@dataclass(frozen=True)
class Perplexity:
    perplexity: float
    loss: float  # nats per predicted token
    tokens: int  # predicted tokens: seqlen - 1 per window
    seqlen: int


@torch.no_grad()
def cache_bytes(model: nn.Module) -> int:
    """Bytes that the model's cache of keys and values grows by with each token: what a cache holds after one."""
    cache = DynamicCache(config=model.config)
    model(
        input_ids=torch.zeros(1, 1, dtype=torch.int64, device=model.get_input_embeddings().weight.device),
        past_key_values=cache,
    )
    held = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in held)


@torch.no_grad()
def perplexity(model: nn.Module, windows: torch.Tensor, batch_size: int = 1, progress: Progress = silent) -> Perplexity:
    """[W, T] int64 token windows, each read on its own -> exp of the mean loss over the T - 1 predicted tokens of all windows."""
    device = model.get_input_embeddings().weight.device
    total, count = 0.0, 0
    for index, batch in enumerate(chunks := windows.split(batch_size)):
        batch = batch.to(device)
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()  # [B, T - 1, vocabulary]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum")
        total, count = total + loss.item(), count + batch[:, 1:].numel()
        progress("evaluate", index + 1, len(chunks))
    loss = total / count
    return Perplexity(math.exp(loss) if loss < 700 else math.inf, loss, count, windows.shape[1])
