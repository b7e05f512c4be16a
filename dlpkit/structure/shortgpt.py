"""ShortGPT (arXiv:2403.03853, eq. 1): remove the layers that turn the hidden state least, all at once.

Block influence BI = 1 - mean over tokens of the cosine between the hidden states in front of and behind a layer.
"""

import torch
from torch import nn
from torch.nn.functional import cosine_similarity

from dlpkit import archs
from dlpkit.calibration import Stream
from dlpkit.edits import Drop
from dlpkit.progress import Progress, silent
from dlpkit.structure import Plan, Target, cheapest, windows


def plan(
    model: nn.Module, batches: list[torch.Tensor], target: Target, progress: Progress = silent, journal=None
) -> Plan:
    """An integer target counts layers."""
    device = model.get_input_embeddings().weight.device
    stream = Stream(model, archs.of(model), list(windows(batches).split(1)), device)
    influence = {}
    for layer in range(len(stream.blocks)):
        before = [hidden.clone() for hidden in stream.hidden.held()]
        stream.advance(layer)
        cosines = [
            cosine_similarity(a.to(b).float(), b.float(), dim=-1).mean()
            for a, b in zip(before, stream.hidden, strict=True)
        ]
        influence[Drop(layer, "layer")] = 1 - torch.stack(cosines).mean().item()
        progress("measure", layer + 1, len(stream.blocks))
    return cheapest(model, target, influence, "block influence")
