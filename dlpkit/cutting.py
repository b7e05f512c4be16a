"""The structural part of a pruning run: find what goes or read it from a plan, cut it out, and tell what the model was and is."""

import time

import torch
from torch import nn
from transformers import PreTrainedModel

from dlpkit import archs, checkpoint, evaluate, surgery
from dlpkit import structure as structures
from dlpkit.generation import Decoder
from dlpkit.journal import Journal
from dlpkit.progress import Progress, silent
from dlpkit.structure import Plan, Target

PROMPT, TOKENS = 8, 32  # of the generation that is timed


def find(
    model: nn.Module, structure: str, remove: Target | None, options: dict, batches: list[torch.Tensor],
    device: torch.device | str, journal: Journal | None = None, progress: Progress = silent,
) -> Plan:  # fmt: skip
    """A plan by the structure of that name, computed on `device`, or from the file of that name."""
    if structure.endswith(structures.PLAN):
        plan = structures.read(structure)
        return plan if remove is None else plan.to(remove)
    home = model.get_input_embeddings().weight.device
    plan = structures.get(structure).plan(
        model.to(device), batches, remove, **options, journal=journal, progress=progress
    )
    model.to(home)
    return plan


def cut(model: PreTrainedModel, plan: Plan) -> None:
    """Make a plan's edits, for good. Raises ValueError, naming the plan, when they do not fit the model."""
    try:
        checkpoint.edit(model, plan.edits)
    except ValueError as error:
        raise ValueError(f"the plan is not for this model: {error}") from error


def facts(model: PreTrainedModel) -> dict:
    """What of a model a structure changes, measured where the model is."""
    halves = surgery.present(model, archs.of(model))
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "layers": model.config.num_hidden_layers,
        "attentions": sum(part == "attn" for _, part in halves),
        "mlps": sum(part == "mlp" for _, part in halves),
        "cache_bytes_per_token": evaluate.cache_bytes(model),
        "tokens_per_second": _speed(model),
    }


def _speed(model: PreTrainedModel) -> float:
    """Greedy tokens per second behind one short prompt, the second time round: the first may capture a CUDA graph."""
    decoder = Decoder(model, 1, PROMPT + TOKENS + 1, eos=[], compile=False)
    for _ in range(2):
        stream = decoder.stream(torch.arange(PROMPT)[None], tokens=TOKENS + 1)
        next(stream)
        start = time.perf_counter()
        list(stream)
    return TOKENS / (time.perf_counter() - start)
