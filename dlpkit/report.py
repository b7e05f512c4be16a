"""What a run did, as report.json and as the Markdown of a model card."""

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from dlpkit.patterns import Pattern

PACKAGES = ("dlpkit", "torch", "triton", "transformers", "safetensors", "tokenizers")


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "machine": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    found["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return found


def megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def table(rows: list[tuple], header: tuple[str, ...]) -> str:
    """Rows -> a Markdown table."""
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def summary_table(report: dict) -> str:
    """The few numbers a user asks for first."""
    before, after = report["perplexity"]["before"], report["perplexity"]["after"]
    rows = [("weights on disk", megabytes(report["bytes"]["before"]), megabytes(report["bytes"]["after"]))]
    if structure := report["structure"]:
        rows.append(("parameters", *(f"{structure[when]['parameters']:,}" for when in ("before", "after"))))
    if report["linears"]:
        sizes = (megabytes(report["bytes"][f"linears_{when}"]) for when in ("before", "after"))
        rows += [("of these, pruned Linears", *sizes), ("zeros in them", "", f"{report['sparsity']:.2%}")]
    if before:
        where = f"perplexity on {before['text']} ({before['tokens']:,} tokens, windows of {before['seqlen']})"
        rows.append((where, f"{before['perplexity']:.2f}", f"{after['perplexity']:.2f}"))
    return table(rows, ("", "dense", "pruned"))


def structure_table(structure: dict) -> str:
    """What a structure changed, before and after."""
    before, after = structure["before"], structure["after"]
    rows = [
        ("parameters", f"{before['parameters']:,}", f"{after['parameters']:,}"),
        *((what, before[what], after[what]) for what in ("layers", "attentions", "mlps")),
        ("cache per token", f"{before['cache_bytes_per_token']:,} B", f"{after['cache_bytes_per_token']:,} B"),
        ("tokens per second, one at a time", f"{before['tokens_per_second']:.1f}", f"{after['tokens_per_second']:.1f}"),
    ]
    return table(rows, ("", "dense", "pruned"))


def step_table(structure: dict) -> str:
    """What went, in its order, with the share of all parameters that is gone by then."""
    rows = [
        (number, step_name(step), f"{step['score']:.4f}", f"{step['share']:.1%}")
        for number, step in enumerate(structure["steps"], 1)
    ]
    return table(rows, ("", "removed", structure["metric"], "parameters gone"))


def step_name(step: dict) -> str:
    """An edit of a plan in words."""
    if step["kind"] == "merge":
        return f"layers {step['low']} to {step['high']} merged ({step['rule']})"
    if step["kind"] == "slice":
        kept = step["keep"] if isinstance(step["keep"], int) else len(step["keep"])
        return f"{step['part']} of layer {step['layer']}, all but {kept} units"
    return f"layer {step['layer']}" if step["part"] == "layer" else f"{step['part']} of layer {step['layer']}"


def plot(structure: dict, path: str | Path) -> None:
    """Draw what a search measured over the share of parameters that is gone. Raises ValueError where matplotlib is missing."""
    figure, axes = _figure(8, 4.5)
    axes.plot(
        [100 * step["share"] for step in structure["steps"]], [step["score"] for step in structure["steps"]], "o-"
    )
    for step in structure["steps"]:
        axes.annotate(
            step_name(step),
            (100 * step["share"], step["score"]),
            rotation=60,
            fontsize=6,
            xytext=(2, 4),
            textcoords="offset points",
        )
    axes.set(xlabel="% of all parameters removed", ylabel=structure["metric"])
    figure.savefig(path)


def plot_map(similarity: list[list[float]], path: str | Path) -> None:
    """Draw how alike layers are, [layers, layers] values of at most 1. Raises ValueError where matplotlib is missing."""
    figure, axes = _figure(6, 5)
    figure.colorbar(axes.imshow(similarity, vmax=1, origin="lower"), label="CKA")
    axes.set(xlabel="layer", ylabel="layer")
    figure.savefig(path)


def _figure(width: float, height: float):
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("a plot wants matplotlib: pip install 'dlpkit[bench]'") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def block_table(report: dict) -> str:
    rows = [
        (
            block["block"],
            f"{block['sparsity']:.4f}",
            ", ".join(block["patterns"]),
            "" if block["summary"] is None else f"{block['summary']:.4g}",
        )
        for block in report["blocks"]
    ]
    return table(rows, ("block", "zeros", "pattern", f"{report['recipe']['allocation']} summary"))


def stage_table(report: dict) -> str:
    rows = [
        (
            s["stage"],
            f"{s['seconds']:.1f} s",
            megabytes(s["peak_host"]),
            megabytes(s["peak_gpu"]) if s["peak_gpu"] else "",
        )
        for s in report["stages"]
    ]
    return table(rows, ("stage", "time", "peak host memory so far", "peak GPU memory"))


def model_card(report: dict, folder: str) -> str:
    """Markdown with Hugging Face front matter."""
    recipe = report["recipe"]
    text = report["text"]["calibration"]
    return f"""{_front_matter(recipe["model"])}
# {folder}

`{recipe["model"]}` pruned by dlpkit: {_how(recipe)}; calibrated on {text["windows"]} windows of {text["seqlen"]} tokens of {text["source"]} (fingerprint {text["fingerprint"]}, seed {recipe["seed"]}).

{summary_table(report)}

```python
import dlpkit  # registers the format; without it the load fails
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
```

`recipe.yaml` repeats the run: `dlpkit prune --config recipe.yaml OUT`.

{_parts(report)}
## Cost

{stage_table(report)}

## Versions

{table(list(report["versions"].items()), ("what", "version"))}
"""


def recovery_table(report: dict) -> str:
    """The few numbers a user asks for first, of a recovery."""
    training, perplexity = report["training"], report["perplexity"]
    best = min(loss for _, loss in training["validation"])
    rows = [
        ("validation loss before", f"{training['validation'][0][1]:.4f}"),
        (f"best, after {training['best']} of {training['steps']} steps", f"{best:.4f}"),
        ("as saved, zeros kept", f"{training['merged']:.4f}"),
    ]
    for when in ("before", "after"):
        if found := perplexity[when]:
            where = f"perplexity {when} on {found['text']} ({found['tokens']:,} tokens, windows of {found['seqlen']})"
            rows.append((where, f"{found['perplexity']:.2f}"))
    return table(rows, ("", report["settings"]["method"]))


def recovery_card(report: dict, folder: str) -> str:
    """Markdown with Hugging Face front matter, of a model that was trained after it was pruned."""
    text, training = report["text"]["training"], report["training"]
    return f"""{_front_matter(report["model"])}
# {folder}

`{report["model"]}` trained by dlpkit on {training["tokens"]:,} tokens of {text["source"]} (fingerprint {text["fingerprint"]}, seed {report["settings"]["seed"]}),
{training["trainable"]:,} parameters, every zero kept.

{recovery_table(report)}

## Settings

{table(list(report["settings"].items()), ("what", "value"))}

## Cost

{stage_table(report)}

## Versions

{table(list(report["versions"].items()), ("what", "version"))}
"""


def _front_matter(base_model: str) -> str:
    return f"""---
base_model: {base_model}
library_name: transformers
pipeline_tag: text-generation
tags: [dlpkit, sparse, pruned]
---"""


def _how(recipe: dict) -> str:
    """What a recipe did, in words."""
    told = []
    if recipe["structure"]:
        told.append(
            f"{recipe['structure']} removing {'what it plans' if recipe['remove'] is None else recipe['remove']}"
        )
    if recipe["width"]:
        told.append(f"{recipe['width']} removing {recipe['width_remove']}")
    if Pattern.parse(recipe["sparsity"]).sparsity:
        told.append(f"{recipe['criterion']} scores, {recipe['allocation']} allocation, pattern {recipe['sparsity']}")
    return "; then ".join(told)


def _parts(report: dict) -> str:
    """The sections of a card that tell what was removed."""
    found = ""
    if report["structure"]:
        found += f"## Structure\n\n{structure_table(report['structure'])}\n\n{step_table(report['structure'])}\n\n"
        if then := report["structure"].get("then"):
            found += f"Then, of what was left:\n\n{step_table(then)}\n\n"
    if report["blocks"]:
        found += f"## Sparsity by block\n\n{block_table(report)}\n\n"
    return found
