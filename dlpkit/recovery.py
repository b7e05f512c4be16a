"""Training that wins back what pruning lost, and keeps every zero zero: next-token loss on ordinary text, AdamW, early stop.

Seeded and resumable: the order of windows is a function of the seed and the step, nothing is dropped out, and what a killed run had
reached lies in its journal, so that the resumed run gives the weights of one that was never killed.
"""

import math
import time
from dataclasses import asdict, dataclass, field
from types import ModuleType

import torch
from torch import nn

from dlpkit import archs, checkpoint
from dlpkit.evaluate import perplexity
from dlpkit.journal import Journal
from dlpkit.kernels.runtime import default_device
from dlpkit.packing import sparse_linears
from dlpkit.progress import Progress, silent

METHODS = ("masked", "grouped", "lora", "full")
LEARNING_RATES = {"masked": 1e-3, "grouped": 1e-3, "lora": 1e-3, "full": 1e-4}


@dataclass(frozen=True)
class Settings:
    """method: adapters ("masked", "grouped", "lora": dlpkit.adapters) or all weights that are not zero ("full", in float32, for small models).

    rank, alpha, group: of the adapters. lr: peak learning rate, after `warmup` of the steps, before a cosine to zero; None for the method's own.
    batch_size: windows per step. patience: evaluations without a better validation loss after which training stops.
    """

    method: str = "masked"
    rank: int = 8
    alpha: float = 16.0
    group: int = 32
    lr: float | None = None
    steps: int = 300
    batch_size: int = 8
    warmup: float = 0.05
    weight_decay: float = 0.0
    clip: float = 1.0
    eval_every: int = 50
    patience: int = 3
    seed: int = 0

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"recovery trains by one of {', '.join(METHODS)}, got {self.method!r}")
        for name in ("rank", "group", "steps", "batch_size", "eval_every", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"recovery wants {name} of at least 1, got {getattr(self, name)}")
        if not 0 <= self.warmup < 1 or (self.lr is not None and self.lr <= 0) or self.weight_decay < 0:
            raise ValueError(
                f"recovery wants 0 <= warmup < 1, lr > 0 and weight_decay >= 0, got {self.warmup}, {self.lr} and {self.weight_decay}"
            )

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        peak = LEARNING_RATES[self.method] if self.lr is None else self.lr
        rising = max(1, round(self.warmup * self.steps))
        if step < rising:
            return peak * (step + 1) / rising
        return peak * (1 + math.cos(math.pi * (step - rising) / max(1, self.steps - rising))) / 2


@dataclass
class Training:
    """What a training did. Losses are nats per predicted token."""

    trainable: int = 0  # parameters
    steps: int = 0  # done, fewer than asked for where it stopped early
    tokens: int = 0  # seen
    losses: list[float] = field(default_factory=list)  # of each step's batch
    validation: list[tuple[int, float]] = field(default_factory=list)  # (steps done, loss)
    best: int = 0  # steps after which the weights that are kept were reached; 0 when training only did harm
    merged: float | None = None  # validation loss of the model as it is returned
    seconds: float = 0.0


def recover(
    model: nn.Module, windows: torch.Tensor, held_out: torch.Tensor, settings: Settings | None = None,
    device: torch.device | str | None = None, journal: Journal | None = None, progress: Progress = silent,
) -> tuple[nn.Module, Training]:  # fmt: skip
    """Train a dense, width-pruned or packed causal LM -> it, with the same zeros in the same places, and what was done.

    windows, held_out: [W, T] and [V, T] int64 token ids to train on and to validate by. A packed model trains packed by "lora" and is left
    packed; the other methods unpack it first and leave it dense. Raises ValueError for settings that do not fit the model, RuntimeError for
    a loss that is not finite.
    """
    settings, device = settings or Settings(), default_device(device)
    torch.manual_seed(settings.seed)  # of the adapters' first values
    if settings.method != "lora":
        checkpoint.unpack(model)
    zeros, dtype = zero_counts(model), model.dtype
    adapted = prepare(model.to(device), settings)
    done = train(adapted, windows, held_out, settings, dtype, journal, progress)
    model = finish(adapted, dtype)
    now = zero_counts(model)
    if filled := [name for name in zeros if now[name] < zeros[name]]:
        raise RuntimeError(f"{filled[0]} had {zeros[filled[0]]} zeros and now has {now[filled[0]]}: the merge is wrong")
    done.merged = perplexity(model, held_out, settings.batch_size).loss
    return model, done


def prepare(model: nn.Module, settings: Settings) -> nn.Module:
    """What `train` trains: the model with adapters, or the model itself in float32 with nothing frozen."""
    if settings.method == "full":
        return _cast(model, torch.float32).requires_grad_(True)
    return _adapters().attach(model, settings.method, settings.rank, settings.alpha, settings.group)


def finish(trained: nn.Module, dtype: torch.dtype, format: str = "auto") -> nn.Module:
    """The trained model in `dtype` without adapters, nothing left to train; a packed one runs on in `format`."""
    model = _adapters().merge(trained, format) if hasattr(trained, "peft_config") else _cast(trained, dtype)
    return model.requires_grad_(False)


def train(
    model: nn.Module, windows: torch.Tensor, held_out: torch.Tensor, settings: Settings, dtype: torch.dtype,
    journal: Journal | None = None, progress: Progress = silent,
) -> Training:  # fmt: skip
    """Train what `prepare` has made, in place, and leave it with the weights that had the best validation loss.

    dtype: of the model that was pruned. Trained parameters are float32; by "full", below float32, activations are bfloat16.
    """
    _check_windows(windows, held_out)
    start, device = time.perf_counter(), model.get_input_embeddings().weight.device
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    zeros = _zeros(model) if settings.method == "full" else {}
    optimizer = torch.optim.AdamW(trainable.values(), lr=0.0, weight_decay=settings.weight_decay)
    mixed = torch.autocast(device.type, torch.bfloat16, enabled=settings.method == "full" and dtype != torch.float32)
    run = _Run(trainable, optimizer, Training(sum(p.numel() for p in trainable.values())))
    if not (journal and run.resume(journal)):
        with mixed:
            run.validate(model, held_out, settings)
    while run.done.steps < settings.steps and run.waited < settings.patience:
        step = run.done.steps
        batch = _batch(windows, settings, step).to(device)
        with mixed:
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        run.done.losses.append(loss.item())
        if not math.isfinite(run.done.losses[-1]):
            raise RuntimeError(
                f"the loss of step {step} is not finite: take a smaller lr, here {settings.rate(step):g}"
            )
        loss.backward()
        for parameter, zero in zeros.items():
            parameter.grad.masked_fill_(zero, 0.0)
        nn.utils.clip_grad_norm_(trainable.values(), settings.clip)
        optimizer.param_groups[0]["lr"] = settings.rate(step)
        optimizer.step()
        optimizer.zero_grad()
        run.done.steps, run.done.tokens = step + 1, run.done.tokens + batch[:, 1:].numel()
        if (step + 1) % settings.eval_every == 0 or step + 1 == settings.steps:
            with mixed:
                run.validate(model, held_out, settings)
            if journal:
                run.keep(journal)
        progress("train", step + 1, settings.steps)
    run.take_best()
    run.done.seconds += time.perf_counter() - start
    return run.done


def zero_counts(model: nn.Module) -> dict[str, int]:
    """Zeros in every prunable Linear, packed or not, by name."""
    packed = sparse_linears(model)
    return {
        name: int(((packed[name].dense() if name in packed else linear.weight) == 0).sum())
        for name, linear in archs.model_linears(model, archs.of(model))
    }


class _Run:
    """How far a training has come: parameters, optimizer, the best parameters so far and what there is to report."""

    def __init__(self, trainable: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, done: Training):
        self.trainable, self.optimizer, self.done = trainable, optimizer, done
        self.best: dict[str, torch.Tensor] = {}
        self.waited = 0  # validations since the best one

    def validate(self, model: nn.Module, held_out: torch.Tensor, settings: Settings) -> None:
        loss = perplexity(model, held_out, settings.batch_size).loss
        self.waited += 1
        if not self.done.validation or loss < min(value for _, value in self.done.validation):
            self.waited, self.done.best = 0, self.done.steps
            self.best = {name: p.detach().clone() for name, p in self.trainable.items()}
        self.done.validation.append((self.done.steps, loss))

    @torch.no_grad()
    def take_best(self) -> None:
        for name, parameter in self.trainable.items():
            parameter.copy_(self.best[name])

    def keep(self, journal: Journal) -> None:
        tensors = {f"best.{name}": value for name, value in self.best.items()}
        for name, parameter in self.trainable.items():
            tensors[f"now.{name}"] = parameter
            tensors |= {f"{key}.{name}": value for key, value in self.optimizer.state[parameter].items()}
        journal.keep_state(tensors, {"done": asdict(self.done), "waited": self.waited})

    @torch.no_grad()
    def resume(self, journal: Journal) -> bool:
        """Go on from the journal's state -> whether it held one."""
        found = journal.state()
        if found is None:
            return False
        tensors, facts = found
        self.done, self.waited = Training(**facts["done"]), facts["waited"]
        self.done.validation = [tuple(pair) for pair in self.done.validation]
        for name, parameter in self.trainable.items():
            parameter.copy_(tensors[f"now.{name}"])
            self.best[name] = tensors[f"best.{name}"].to(parameter.device)
            moments = {key: tensors[f"{key}.{name}"].to(parameter.device) for key in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[parameter] = {"step": tensors[f"step.{name}"], **moments}
        return True


def _batch(windows: torch.Tensor, settings: Settings, step: int) -> torch.Tensor:
    """[batch_size, T], those of a step: every pass over the windows has an order of its own."""
    count, size = len(windows), settings.batch_size
    at = range(step * size, (step + 1) * size)
    orders = {turn: _order(count, settings.seed, turn) for turn in {i // count for i in at}}
    return windows[[int(orders[i // count][i % count]) for i in at]]


def _order(count: int, seed: int, turn: int) -> torch.Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + turn))


def _cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Parameters alone: rotary tables stay as exact as they are, and transformers casts no model that a quantizer has loaded."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def _zeros(model: nn.Module) -> dict[nn.Parameter, torch.Tensor]:
    return {linear.weight: linear.weight == 0 for _, linear in archs.model_linears(model, archs.of(model))}


def _check_windows(windows: torch.Tensor, held_out: torch.Tensor) -> None:
    for name, found in (("windows", windows), ("held_out", held_out)):
        if found.ndim != 2 or not len(found) or found.shape[1] < 2:
            raise ValueError(
                f"recovery wants {name} [W, T] with at least one window of two tokens, got {tuple(found.shape)}"
            )


def _adapters() -> ModuleType:
    try:
        from dlpkit import adapters
    except ImportError as error:
        raise ValueError("adapters need the package peft: pip install 'dlpkit[recover]'") from error
    return adapters
