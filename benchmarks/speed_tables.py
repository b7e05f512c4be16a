"""The README's tables of speed: kernels, batches, what the dispatcher picks, pruning, packing, tokens per second."""

from collections.abc import Iterable

import plot
import plot_batch
import plot_tokens
import rows
from shapes import density, mask

from dlpkit.kernels import crossover
from dlpkit.report import table

PICKED = (1, 2, 4, 8, 16, 24, 32, 64, 128, 512, 2048)  # rows of x


def kernels() -> str:
    """Microseconds and speed-ups of every layer and number of rows, with what they were measured on."""
    found = plot.matmul_rows(rows.FOLDER / "h100.jsonl")
    return f"{plot.table(found)}\n\n{_on(found.values())}"


def batches() -> str:
    """Speed-ups over rows of x, by layer, format and pattern, winning ones in bold; a section of its own, if there are rows."""
    found = plot_batch.batch_rows(*(rows.FOLDER / f"{name}-h100.jsonl" for name in ("paths", "batch", "cusparselt")))
    if not found:
        return ""
    sizes, lines = sorted({key[4] for key in found}), []
    for N, K in dict.fromkeys(key[:2] for key in found):
        here = {key[2:]: row for key, row in found.items() if key[:2] == (N, K)}
        dense = {M: row["baseline_us"] for (_, _, M), row in here.items()}
        lines.append((f"{N} x {K}", "cuBLAS", "us", *(f"{dense[M]:.1f}" if M in dense else "" for M in sizes)))
        for format, pattern in dict.fromkeys(key[:2] for key in here):
            cells = [here.get((format, pattern, M)) for M in sizes]
            lines.append((f"{N} x {K}", format, pattern, *(times(row and row["speedup"]) for row in cells)))
    image = "benchmarks/results/h100-batch.svg"
    shown = f"![times cuBLAS by rows of x]({image})\n\n" if (rows.ROOT / image).exists() else ""
    return (
        f"### Batches and prompts\n\nTimes cuBLAS by rows of x, what wins in bold; past what a format has kernels for, the weight is expanded "
        f"to dense at every call. Products by cuSPARSELt are those inside CUDA graphs.\n\n{shown}{table(lines, ('layer', 'format', 'pattern', *sizes))}\n\n{_on(found.values())}"
    )


def picks() -> str:
    """The dispatcher's choice by layer, pattern and rows of x, on what tune_paths.py measured; a section of its own, if there are rows."""
    found = {(r["N"], r["K"], r["pattern"].partition("@")[0]): r for r in rows.read("paths-h100.jsonl")}
    if not found:
        return ""
    lines = []
    for N, K, pattern in found:
        best = [crossover.best(N, K, M, density(pattern), mask(pattern)) for M in PICKED]
        cells = [f"{format} {times(choice.speed)}" if choice.speed >= 1 else "dense" for format, choice in best]
        lines.append((f"{N} x {K}", pattern, *cells))
    return (
        f"### What the dispatcher picks\n\nThe format for a batch, and times cuBLAS as measured there or at the nearest layer; dense where none "
        f"wins (`python benchmarks/tune_paths.py`).\n\n{table(lines, ('layer', 'pattern', *PICKED))}\n\n{_on(found.values())}"
    )


def times(speedup: float | None) -> str:
    return "" if speedup is None else f"**{speedup:.2f}**" if speedup >= 1 else f"{speedup:.2f}"


def culling() -> str:
    """Score, select and zero of a layer, statistics of a block, and whole models; a section of its own, with the tables that have rows."""
    found = rows.read("prune-h100.jsonl")
    tables = [selecting(found), scoring(found), whole_models(found)]
    return "\n\n".join(["### Speed of pruning", *(made for made in tables if made)]) if found else ""


def selecting(found: list[dict]) -> str:
    by = {(r["N"], r["K"], r["pattern"], r["per"]): r for r in found if r["bench"] == "select"}
    lines = [
        (f"{N} x {K}", pattern, per, *speed(r, "torch.sort"))
        for (N, K, pattern, per), r in by.items()
    ]  # fmt: skip
    header = ("layer", "pattern", "per", "time", "GB/s", "of copy bandwidth", "times torch.sort", "times it compiled")
    text = "Score, select and zero of one layer in one kernel, bytes of one read and one write of the weight (`benchmarks/bench_select.py`):"
    return f"{text}\n\n{table(lines, header)}\n\n{_on(by.values())}" if by else ""


def scoring(found: list[dict]) -> str:
    by = {r["kernel"]: r for r in found if r["bench"] == "score"}
    lines = [(statistic, r["reads"], *speed(r, "torch")) for statistic, r in by.items()]
    header = ("statistic", "reads", "time", "GB/s", "of copy bandwidth", "times torch", "times it compiled")
    text = "Statistics of all scores of one block of Llama 3 8B, never stored (`benchmarks/bench_score.py`):"
    return f"{text}\n\n{table(lines, header)}\n\n{_on(by.values())}" if by else ""


def speed(row: dict, baseline: str) -> tuple[str, ...]:
    """Time, GB/s, share of copy bandwidth, and times the baseline, plain and compiled."""
    assert row["baseline"] == baseline
    compiled = row["compiled_us"] and f"{row['compiled_us'] / row['us']:.1f}"
    time = f"{row['us']:.0f} us" if row["us"] < 1e4 else f"{row['us'] / 1e3:.1f} ms"
    return time, str(row["gbps"]), f"{row['roof_pct']:.0f} %", f"{row['speedup']:.1f}", compiled or ""


def whole_models(found: list[dict]) -> str:
    settings = ("model", "criterion", "allocation", "pattern", "windows", "seqlen", "hidden_states")
    by = {tuple(r[key] for key in settings): r for r in found if r["bench"] == "prune"}
    lines = [
        (
            r["model"], f"{r['criterion']} {r['allocation']} {r['pattern']}", f"{r['windows']} x {r['seqlen']}", r["hidden_states"],
            f"{r['bare_forward_seconds']:.0f} s in {r['passes']} passes", f"{r['seconds']:.0f} s", f"{r['times_bare']:.2f}", f"{r['peak_gb']:.1f} GB",
        )
        for r in by.values()
    ]  # fmt: skip
    header = (
        "model",
        "method",
        "tokens",
        "hidden states on",
        "bare forwards",
        "pruned in",
        "times bare",
        "peak on the GPU",
    )
    text = "Whole models with random weights, streamed block by block, beside the bare forwards of their blocks (`benchmarks/bench_prune.py`):"
    return f"{text}\n\n{table(lines, header)}\n\n{_on(by.values())}" if by else ""


def packing() -> str:
    """Time to pack and unpack one layer on the GPU, and the share of copy bandwidth that it is."""
    found = {(r["N"], r["K"], r["kernel"], r["pattern"]): r for r in rows.read("h100.jsonl") if r["bench"] == "pack"}
    lines = [
        (f"{N} x {K}", verb, pattern, f"{r['us'] / 1e3:.2f} ms", f"{r['roof_pct']:.0f} %")
        for (N, K, verb, pattern), r in found.items()
    ]
    return table(lines, ("layer", "what", "pattern", "time", "of copy bandwidth"))


def tokens() -> str:
    """Tokens per second of every model, prompt and batch, beside the dense model in the same loop."""
    found = plot_tokens.token_rows(rows.FOLDER / "tokens-h100.jsonl")
    patterns = sorted({key[3] for key in found} - {"dense"})
    lines = []
    for model, prompt, batch in dict.fromkeys(key[:3] for key in found):
        dense = found[model, prompt, batch, "dense"]
        cells = [found.get((model, prompt, batch, pattern)) for pattern in patterns]
        packed = [f"{r['tokens_per_s']:.0f} **{r['speedup']:.2f}**" if r else "" for r in cells]
        lines.append((model, prompt, batch, f"{dense['tokens_per_s']:.0f}, {dense['roof_pct']:.0f} %", *packed))
    equal = [
        f"Of {r['new']} greedy tokens of {model}, {r['equal_tokens']} equal the dense twin's before the first that differs"
        + (f", which the model prefers by {r['margin']:.2%} of the logit." if r.get("margin") is not None else ".")
        for (model, *_, pattern), r in found.items() if pattern.startswith("packed")
    ]  # fmt: skip
    return "\n\n".join((table(lines, ("model", "prompt", "batch", "dense", *patterns)), *equal, _measured_on(found)))


def first_token() -> str:
    """Time to the first token and memory, beside the dense model."""
    found = plot_tokens.token_rows(rows.FOLDER / "tokens-h100.jsonl")
    lines = [
        (
            model, prompt, pattern, f"{r['ttft_ms']:.1f} ms", f"{r['ttft_of_dense']:.2f}", f"{r['model_bytes'] / 1e9:.2f} GB",
            f"{r['model_bytes'] / found[model, prompt, batch, 'dense']['model_bytes']:.1%}", f"{r['peak_bytes'] / 1e9:.1f} GB",
        )
        for (model, prompt, batch, pattern), r in found.items() if batch == 1
    ]  # fmt: skip
    header = ("shapes", "prompt", "pattern", "first token", "of dense", "model", "of dense", "peak")
    return table(lines, header)


def _on(found: Iterable[dict]) -> str:
    """What rows were measured on."""
    found = list(found)
    commits = ", ".join(sorted({row["commit"] for row in found}))
    first = found[0]
    return f"{first['gpu']}, {first['dtype']}, torch {first['torch']}, Triton {first['triton']}, commit {commits}."


def _measured_on(found: dict) -> str:
    first = next(iter(found.values()))
    commits = ", ".join(sorted({row["commit"] for row in found.values()}))
    return f"{first['gpu']}, {first['dtype']}, torch {first['torch']}, Triton {first['triton']}, transformers {first['transformers']}, commit {commits}."
