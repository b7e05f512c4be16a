"""The main job: load, measure, prune, pack, save, load back, measure again, report. An interrupted run goes on where it was."""

import json
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, TextStreamer

from dlpkit import archs, checkpoint, cka, cutting, data, evaluate, generation, models, parallel, recovery, report
from dlpkit import structure as structures
from dlpkit.folders import check_free, new_folder
from dlpkit.generation import GREEDY, Sampling
from dlpkit.journal import Journal
from dlpkit.kernels.runtime import default_device
from dlpkit.kernels.storage import stored_bytes
from dlpkit.packing import keep_dense, sparse_linears
from dlpkit.progress import Progress, silent
from dlpkit.pruning import PruneReport, check, prune
from dlpkit.recipe import Recipe
from dlpkit.recovery import Settings

SAMPLE_PROMPT = "A computer is a machine that"
SAMPLE_TOKENS = 40


def run(
    recipe: Recipe, out: str | Path,
    dense: str | Path | None = None, device: str | None = None, runtime: str = "auto",
    overwrite: bool = False, restart: bool = False, progress: Progress = silent,
) -> dict:  # fmt: skip
    """Prune by `recipe` and write the packed folder `out` -> the report, also in `out` as report.json and README.md.

    dense: a second folder for the same model with its zeros written out. runtime: format in which the saved model is loaded back and
    measured. overwrite: replace `out` and `dense`. restart: forget an interrupted run; without it, finished blocks wait beside `out`
    and a run with the same recipe goes on after them, to the identical result. Raises ValueError for what cannot be done, before any work.

    Under torchrun all processes search for structure; the first goes on alone, and the others return {}.
    """
    with parallel.processes(default_device(device)) as device:
        return _run(recipe, Path(out), dense, device, runtime, overwrite, restart, progress)


def _run(
    recipe: Recipe, out: Path, dense: str | Path | None, device: torch.device, runtime: str,
    overwrite: bool, restart: bool, progress: Progress,
) -> dict:  # fmt: skip
    _check_targets(recipe.model, [out, *([Path(dense)] if dense else [])], overwrite)
    models.check_length(recipe.model, recipe.seqlen)
    meter = _Meter()
    with meter.stage("load"):
        model, tokenizer = models.load_dense(recipe.model, recipe.dtype), models.load_tokenizer(recipe.model)
        check(model, recipe.sparsity, recipe.allocation, recipe.options, recipe.granularity)
        windows, held_out = _texts(recipe, tokenizer)
    batches, full = list(windows.split(recipe.batch_size)), sum(parameter.nbytes for parameter in model.parameters())
    if not parallel.first():
        if recipe.structure:
            cutting.find(model, recipe.structure, recipe.remove, recipe.structure_options, batches, device)
        return {}
    journal = Journal(out.with_name(f"{out.name}.partial"), _journal_key(recipe, windows, model), restart)
    with meter.stage("evaluate dense"):
        before = _measure(model, recipe, held_out, device, progress)
    structure = None
    if recipe.structure:
        with meter.stage("search"):
            structure = {"before": cutting.facts(model.to(device))}
            model.to("cpu")
            plan = cutting.find(
                model, recipe.structure, recipe.remove, recipe.structure_options, batches, device, journal, progress
            )
            cutting.cut(model, plan)
            structure |= plan.to_dict()
            if recipe.width:
                plan = cutting.find(
                    model, recipe.width, recipe.width_remove, recipe.width_options, batches, device, progress=progress
                )
                cutting.cut(model, plan)
                structure["then"] = plan.to_dict()
    pruned = PruneReport(recipe.criterion, recipe.allocation, recipe.sparsity, recipe.granularity)
    if recipe.prunes_weights:
        with meter.stage("prune"):
            pruned = prune(
                model, batches, recipe.criterion, recipe.sparsity, recipe.allocation,
                recipe.options, recipe.granularity, device, journal, progress,
            )  # fmt: skip
    with ExitStack() as folders:
        new = folders.enter_context(new_folder(out, overwrite))
        with meter.stage("save"):
            if dense:
                checkpoint.write(model, folders.enter_context(new_folder(dense, overwrite)), tokenizer)
            sizes = _write_packed(model, new, tokenizer, recipe.prunes_weights) | {"before": full}
        with meter.stage("load back"):
            again = checkpoint.load(new, runtime if recipe.prunes_weights else "auto", device)
            checkpoint.compare(model.to(device), again)
            del model
            if structure:
                structure["after"] = cutting.facts(again)
        with meter.stage("evaluate pruned"):
            after = _measure(again, recipe, held_out, device, progress)
        with meter.stage("generate"):
            [sample] = generation.generate_text(again, tokenizer, [SAMPLE_PROMPT], SAMPLE_TOKENS)
        result = {
            "recipe": recipe.model_dump(),
            "structure": structure,
            "sparsity": pruned.sparsity,
            "perplexity": {"before": before, "after": after},
            "bytes": sizes | {"in_memory": again.get_memory_footprint()},
            "text": {"calibration": _describe(recipe.text, windows), "evaluation": _describe(recipe.eval_text, held_out)},
            "sample": sample,
            "blocks": _by_block(pruned),
            "linears": [asdict(linear) for linear in pruned.linears],
            "stages": meter.stages,
            "prune_seconds": pruned.seconds,
            "versions": report.versions(),
        }  # fmt: skip
        (new / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
        (new / "report.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
        (new / "README.md").write_text(report.model_card(result, out.name), encoding="utf-8")
    journal.remove()
    return result


def plan(
    recipe: Recipe, out: str | Path, device: str | None = None, overwrite: bool = False, restart: bool = False,
    progress: Progress = silent,
) -> dict:  # fmt: skip
    """Search for a recipe's structure and write the plan alone, as JSON that a recipe can name in place of a structure -> the plan.

    Interrupted, and under torchrun, as `run`.
    """
    out = Path(out)
    if recipe.structure is None or recipe.structure.endswith(structures.PLAN) or out.suffix != structures.PLAN:
        raise ValueError(
            f"a plan is searched by a structure, as in --structure blockpruner, and written to a file PLAN{structures.PLAN}"
        )
    if out.exists() and not overwrite:
        raise ValueError(f"{out} exists: choose another file, or overwrite it with --overwrite")
    models.check_length(recipe.model, recipe.seqlen)
    with parallel.processes(default_device(device)) as device:
        model, tokenizer = models.load_dense(recipe.model, recipe.dtype), models.load_tokenizer(recipe.model)
        windows = data.calibration(tokenizer, recipe.text, recipe.nsamples, recipe.seqlen, recipe.seed)
        journal = None
        if parallel.first():
            journal = Journal(out.with_name(f"{out.name}.partial"), _journal_key(recipe, windows, model), restart)
        batches = list(windows.split(recipe.batch_size))
        found = cutting.find(
            model, recipe.structure, recipe.remove, recipe.structure_options, batches, device, journal, progress
        )
        result = found.to_dict() | {"recipe": recipe.model_dump(), "text": _describe(recipe.text, windows)}
        if journal:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.with_name(f"{out.name}.new").write_text(json.dumps(result, indent=1), encoding="utf-8")
            out.with_name(f"{out.name}.new").replace(out)
            journal.remove()
    return result


def layer_map(
    model: str | Path, text: str = data.BUILTIN, nsamples: int = 32, seqlen: int = 256, seed: int = 0, batch_size: int = 16,
    device: str | None = None, progress: Progress = silent,
) -> list[list[float]]:  # fmt: skip
    """CKA between the outputs of any two layers of a dense or packed model."""
    models.check_length(model, seqlen)
    windows = data.calibration(models.load_tokenizer(model), text, nsamples, seqlen, seed)
    loaded = checkpoint.load(model, device=default_device(device))
    return cka.similarity(loaded, list(windows.split(batch_size)), progress).tolist()


def recover(
    model: str | Path, out: str | Path, settings: Settings,
    text: str = data.BUILTIN, seqlen: int = 512, held_out: int = 32,
    eval_text: str = data.BUILTIN, eval_seqlen: int = 2048, eval_windows: int | None = None,
    device: str | None = None, overwrite: bool = False, restart: bool = False, progress: Progress = silent,
) -> dict:  # fmt: skip
    """Train what pruning has left of a model and write it to `out`, packed if it was packed, its zeros where they were -> the report.

    seqlen, held_out: tokens in a window of `text` to train on, and how many windows validate instead. eval_*: for perplexity before and
    after; no windows leave it out. overwrite, restart, what an interrupted run leaves and what is raised: as in `run`.
    """
    out, device = Path(out), default_device(device)
    _check_targets(str(model), [out], overwrite)
    models.check_length(model, seqlen if eval_windows == 0 else max(seqlen, eval_seqlen))
    meter, tokenizer = _Meter(), models.load_tokenizer(model)
    with meter.stage("load"):
        windows, kept_back = data.training(tokenizer, text, settings.steps * settings.batch_size, seqlen, held_out)
        measured = None if eval_windows == 0 else data.evaluation(tokenizer, eval_text, eval_seqlen, eval_windows)
        loaded = checkpoint.load(model, "auto", device)
        packed = bool(sparse_linears(loaded))
    key = {"model": str(model), "text": text, "training tokens": data.fingerprint(windows), **asdict(settings)}
    journal = Journal(out.with_name(f"{out.name}.partial"), key | {"first weight": _first_weight(loaded)}, restart)
    with meter.stage("evaluate before"):
        before = _perplexity(loaded, eval_text, measured, 1, progress)
    with meter.stage("train"):
        loaded, done = recovery.recover(loaded, windows, kept_back, settings, device, journal, progress)
    with meter.stage("evaluate after"):
        after = _perplexity(loaded, eval_text, measured, 1, progress)
    if packed and not sparse_linears(loaded):
        checkpoint.pack(loaded)
    with new_folder(out, overwrite) as new:
        with meter.stage("save"):
            checkpoint.write(loaded, new, tokenizer)
            checkpoint.compare(loaded, checkpoint.load(new, "dense" if packed else "auto", device))
        result = {
            "model": str(model), "settings": asdict(settings), "training": asdict(done), "perplexity": {"before": before, "after": after},
            "text": {"training": _describe(text, windows), "evaluation": _describe(eval_text, measured)},
            "stages": meter.stages, "versions": report.versions(),
        }  # fmt: skip
        (new / "report.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
        (new / "README.md").write_text(report.recovery_card(result, out.name), encoding="utf-8")
    journal.remove()
    return result


def convert(model: str | Path, out: str | Path, to: str = "packed", overwrite: bool = False) -> tuple[int, int]:
    """Write a dense model with zeros packed, or a packed one dense -> bytes of weights before and after. The input is only read."""
    if to not in ("packed", "dense"):
        raise ValueError(f"a model is turned into packed or dense, got {to!r}")
    _check_targets(str(model), [Path(out)], overwrite)
    source = checkpoint.load(model, "auto")
    before = _file_bytes(Path(models.locate(model))) or source.get_memory_footprint()
    if (to == "packed") == bool(sparse_linears(source)):
        raise ValueError(f"{model} is {to} already")
    converted = checkpoint.pack(source, "dense") if to == "packed" else checkpoint.unpack(source)
    checkpoint.save(converted, out, models.load_tokenizer(model), overwrite=overwrite)
    return before, _file_bytes(Path(out))


def evaluate_model(
    model: str | Path, text: str = data.BUILTIN, seqlen: int = 2048, windows: int | None = None, batch_size: int = 1,
    device: str | None = None, runtime: str = "auto", progress: Progress = silent,
) -> dict:  # fmt: skip
    """Perplexity of a dense or packed model on a text."""
    models.check_length(model, seqlen)
    tokens = data.evaluation(models.load_tokenizer(model), text, seqlen, windows)
    loaded = checkpoint.load(model, runtime, default_device(device))
    return {
        "text": text,
        "fingerprint": data.fingerprint(tokens),
        **asdict(evaluate.perplexity(loaded, tokens, batch_size, progress)),
    }


def generate_text(
    model: str | Path, prompts: list[str], tokens: int = 64, sampling: Sampling = GREEDY, device: str | None = None,
    runtime: str = "auto", compile: bool | None = None, dense_prefill: bool = False, stream: bool = False,
    notice: Callable[[str], None] = print,
) -> list[str]:  # fmt: skip
    """Prompts -> each with up to `tokens` more tokens. dense_prefill: read the prompts by dense weights, kept beside the packed ones.
    stream: print the text of a single prompt as it comes. notice: hears why decoding is slow.
    """
    tokenizer = models.load_tokenizer(model)
    loaded = checkpoint.load(model, runtime, default_device(device), batch=max(1, len(prompts)))
    if dense_prefill:
        keep_dense(loaded)
    streamer = TextStreamer(tokenizer, skip_special_tokens=True) if stream else None
    return generation.generate_text(loaded, tokenizer, prompts, tokens, sampling, compile, streamer, notice)


def _file_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _check_targets(model: str, targets: list[Path], overwrite: bool) -> None:
    source = Path(model).resolve()
    for target in targets:
        check_free(target, overwrite)
        if target.resolve() == source or target.resolve() in source.parents:
            raise ValueError(f"{target} holds the input model {model}: write somewhere else")
    if len({target.resolve() for target in targets}) < len(targets):
        raise ValueError(f"the packed and the dense model cannot share the folder {targets[0]}")


def _texts(recipe: Recipe, tokenizer) -> tuple[torch.Tensor, torch.Tensor | None]:
    windows = data.calibration(tokenizer, recipe.text, recipe.nsamples, recipe.seqlen, recipe.seed)
    if recipe.eval_windows == 0:
        return windows, None
    return windows, data.evaluation(tokenizer, recipe.eval_text, recipe.seqlen, recipe.eval_windows)


def _journal_key(recipe: Recipe, windows: torch.Tensor, model: PreTrainedModel) -> dict:
    """What the pruned weights depend on: where and how perplexity is measured is not among it."""
    key = recipe.model_dump(exclude={"eval_text", "eval_windows"})
    if recipe.structure and recipe.structure.endswith(structures.PLAN):
        key["structure"] = structures.read(recipe.structure).to_dict()
    return {**key, "calibration tokens": data.fingerprint(windows), "first weight": _first_weight(model)}


def _first_weight(model: PreTrainedModel) -> str:
    """What tells the model from another one under the same name."""
    return data.fingerprint(next(archs.model_linears(model, archs.of(model)))[1].weight.detach().float())


@torch.no_grad()
def _measure(
    model: nn.Module, recipe: Recipe, windows: torch.Tensor | None, device: torch.device, progress: Progress
) -> dict | None:
    home = model.get_input_embeddings().weight.device
    result = _perplexity(model.to(device), recipe.eval_text, windows, recipe.batch_size, progress)
    model.to(home)
    return result


def _perplexity(
    model: nn.Module, text: str, windows: torch.Tensor | None, batch_size: int, progress: Progress
) -> dict | None:
    if windows is None:
        return None
    return {"text": text, **asdict(evaluate.perplexity(model, windows, batch_size, progress))}


def _describe(source: str, windows: torch.Tensor | None) -> dict | None:
    if windows is None:
        return None
    return {
        "source": source,
        "windows": windows.shape[0],
        "seqlen": windows.shape[1],
        "fingerprint": data.fingerprint(windows),
    }


def _write_packed(model: PreTrainedModel, folder: Path, tokenizer, packs: bool) -> dict[str, int]:
    """Pack the model, to run as it did, if it has zeros, and write it -> bytes of the file, and of the pruned Linears before and after."""
    linears = sum(linear.weight.nbytes for _, linear in archs.model_linears(model, archs.of(model)))
    if packs:
        checkpoint.pack(model, "dense")
    checkpoint.write(model, folder, tokenizer)
    kept = [(linear.shape, linear.nnz()) for linear in sparse_linears(model).values()]
    packed = sum(stored_bytes(shape, nnz, model.dtype.itemsize) for shape, nnz in kept)
    return {"after": _file_bytes(folder), "linears_before": linears, "linears_after": packed if packs else linears}


def _by_block(pruned: PruneReport) -> list[dict]:
    per_block = pruned.summaries if pruned.granularity == "block" else []
    rows = []
    for index in sorted({linear.block for linear in pruned.linears}):
        linears = [linear for linear in pruned.linears if linear.block == index]
        rows.append(
            {
                "block": index,
                "sparsity": sum(linear.zeros for linear in linears) / sum(linear.weights for linear in linears),
                "patterns": sorted({linear.pattern for linear in linears}),
                "summary": per_block[index] if per_block else None,
            }
        )
    return rows


class _Meter:
    """Seconds and peak memory by stage."""

    def __init__(self):
        self.stages: list[dict] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        yield
        self.stages.append(
            {
                "stage": name,
                "seconds": time.perf_counter() - start,
                "peak_host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                "peak_gpu": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
            }
        )
