"""What a run did, as report.json and as the Markdown of a model card."""

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

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
    rows = [
        ("weights on disk", megabytes(report["bytes"]["before"]), megabytes(report["bytes"]["after"])),
        (
            "of these, pruned Linears",
            megabytes(report["bytes"]["linears_before"]),
            megabytes(report["bytes"]["linears_after"]),
        ),
        ("zeros in them", "", f"{report['sparsity']:.2%}"),
    ]
    if before:
        where = f"perplexity on {before['text']} ({before['tokens']:,} tokens, windows of {before['seqlen']})"
        rows.append((where, f"{before['perplexity']:.2f}", f"{after['perplexity']:.2f}"))
    return table(rows, ("", "dense", "pruned"))


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
    return f"""---
base_model: {recipe["model"]}
library_name: transformers
pipeline_tag: text-generation
tags: [dlpkit, sparse, pruned]
---
# {folder}

`{recipe["model"]}` pruned by dlpkit: {recipe["criterion"]} scores, {recipe["allocation"]} allocation,
pattern {recipe["sparsity"]}, calibrated on {text["windows"]} windows of {text["seqlen"]} tokens of {text["source"]} (fingerprint {text["fingerprint"]}, seed {recipe["seed"]}).

{summary_table(report)}

```python
import dlpkit  # registers the format; without it the load fails
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
```

`recipe.yaml` repeats the run: `dlpkit prune --config recipe.yaml OUT`.

## Sparsity by block

{block_table(report)}

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
    return f"""---
base_model: {report["model"]}
library_name: transformers
pipeline_tag: text-generation
tags: [dlpkit, sparse, pruned]
---
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
