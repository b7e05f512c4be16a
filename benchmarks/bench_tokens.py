"""Tokens per second of packed models beside the dense one, in the same loop and the same process -> rows of a JSON-lines file.

    python benchmarks/bench_tokens.py llama-3-8b --rows benchmarks/results/tokens-h100.jsonl
    python benchmarks/bench_tokens.py out/my-packed-model --rows rows.jsonl

MODEL is one of the shapes in random_model.py, whose weights are made on the GPU, or a packed folder, whose dense twin has its zeros
written out. Unless a format is asked for, every weight is packed anew for every batch, as loading for that batch would. A step's bytes are
the weights that it reads: all but the input embedding, of which it reads a row.
"""

import argparse
import gc
import itertools
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import random_model
import timing
import torch
from quality import environment

import dlpkit
from dlpkit.generation import Decoder
from dlpkit.packing import keep_dense, rewrite, sparse_linears

PATTERNS = ("0.5", "0.6", "0.7", "2:4")
BATCHES = (1, 2, 4, 8, 16, 32, 64)
PROMPTS = (128, 2048)
TIMES = 3  # the median of so many runs, after one that compiles and captures


def main() -> None:
    args = parse()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark wants an NVIDIA GPU")
    roof = timing.copy_roof()
    about = {"bench": "tokens", "model": args.model, "dtype": "bfloat16", "new": args.tokens, "roof_gbps": round(roof)}
    about |= environment(args.commit)
    dense: dict[tuple, tuple[dict, torch.Tensor]] = {}
    args.rows.parent.mkdir(parents=True, exist_ok=True)
    for pattern, model in variants(args.model, args.patterns, args.format, args.dense_prefill):
        for batch, prompt in args.pairs:
            torch._dynamo.reset()
            if args.format == "auto":
                rewrite(model, lambda name, weight: weight, batch=batch)
            if args.dense_prefill:
                keep_dense(model)
            try:
                row, made = measure(model, batch, prompt, args.tokens, args.compile)
            except torch.OutOfMemoryError:
                print(f"{pattern:8} batch {batch:3} prompt {prompt:5}: does not fit the GPU's memory", flush=True)
                continue
            if pattern == "dense":
                dense[batch, prompt] = row, made
            if (batch, prompt) in dense:
                baseline, expected = dense[batch, prompt]
                row["speedup"] = round(baseline["ms_per_token"] / row["ms_per_token"], 3)
                row["ttft_of_dense"] = round(row["ttft_ms"] / baseline["ttft_ms"], 3)
                if pattern.startswith(
                    ("dense", "packed")
                ):  # the same weights: tokens before the first that differs in any row
                    row["equal_tokens"] = int((made == expected).all(0).long().cumprod(0).sum())
                    row["margin"] = margin(model, prompts(model, batch, prompt), made, expected)
            row["roof_pct"] = round(100 * row["gbps"] / roof, 1)
            with args.rows.open("a") as file:
                file.write(json.dumps(about | {"pattern": pattern, "batch": batch, "prompt": prompt} | row) + "\n")
            print(
                f"{pattern:8} batch {batch:3} prompt {prompt:5}: {row['ms_per_token']:8.3f} ms, {row['tokens_per_s']:8.1f} tokens/s, "
                f"{row.get('speedup', 0):5.2f} x dense, {row['gbps']:5} GB/s, first token {row['ttft_ms']:7.1f} ms; {row['how']}",
                flush=True,
            )
        del model
        torch._dynamo.reset()  # compiled blocks hold the model's weights
        gc.collect()
        torch.cuda.empty_cache()


def variants(name: str, patterns: list[str], format: str, dense_prefill: bool) -> Iterator[tuple[str, torch.nn.Module]]:
    """("dense", model) and the packed ones, each made when its turn has come; what was asked for is part of the name."""
    suffix = ("" if format == "auto" else f" {format}") + " dense prefill" * dense_prefill
    if name in random_model.CONFIGS:
        config = random_model.CONFIGS[name]
        yield "dense", random_model.build(config)
        for pattern in patterns:
            yield pattern + suffix, random_model.build(config, pattern, format)
    else:
        yield "dense", dlpkit.unpack(dlpkit.load(name, device="cuda"))
        yield "packed" + suffix, dlpkit.load(name, format, device="cuda")


def prompts(model: torch.nn.Module, batch: int, prompt: int) -> torch.Tensor:
    """[batch, prompt] random tokens."""
    return torch.randint(0, model.config.vocab_size, (batch, prompt), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def margin(model: torch.nn.Module, ids: torch.Tensor, made: torch.Tensor, expected: torch.Tensor) -> float | None:
    """How much the model prefers its first token that is not the expected one: the difference of the two logits over the larger one."""
    different = (made != expected).nonzero()
    if not len(different):
        return None
    at = int(different[:, 1].min())
    row = int(different[different[:, 1] == at][0, 0])
    before = torch.cat([ids[row].to(made.device), made[row, :at]])
    logits = model(input_ids=before[None].to(model.device)).logits[0, -1].float()
    own, other = logits[made[row, at]], logits[expected[row, at]]
    return round(float((own - other) / own.abs()), 5)


def measure(model: torch.nn.Module, batch: int, prompt: int, tokens: int, compile: bool) -> tuple[dict, torch.Tensor]:
    """Medians of whole runs of the loop, host included, and the tokens that the last made, greedily."""
    ids = prompts(model, batch, prompt)
    decoder = Decoder(model, batch, prompt + tokens, eos=(), compile=compile)
    start = time.perf_counter()
    list(decoder.stream(ids, tokens=3))
    ready = time.perf_counter() - start
    torch.cuda.reset_peak_memory_stats()
    runs = [run(decoder, ids, tokens) for _ in range(TIMES)]
    ms, ttft = (statistics.median(run[i] for run in runs) for i in (0, 1))
    model_bytes, step_bytes = weigh(model)
    row = {
        "ms_per_token": round(ms, 4), "tokens_per_s": round(1e3 * batch / ms, 1), "ttft_ms": round(ttft, 2),
        "spread": round((max(r[0] for r in runs) - min(r[0] for r in runs)) / ms, 4), "ready_s": round(ready, 1),
        "gbps": round(step_bytes / ms / 1e6), "step_bytes": step_bytes, "model_bytes": model_bytes,
        "peak_bytes": torch.cuda.max_memory_allocated(), "how": decoder.how, "reason": decoder.reason,
        "formats": sorted({sparse.format for sparse in sparse_linears(model).values()}) or ["dense"],
    }  # fmt: skip
    return row, runs[-1][2]


def run(decoder: Decoder, ids: torch.Tensor, tokens: int) -> tuple[float, float, torch.Tensor]:
    """Milliseconds per token after the first, milliseconds to the first, and the tokens [batch, tokens]."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    stream = decoder.stream(ids, tokens=tokens)
    made = [next(stream)]
    first = time.perf_counter()
    made += stream
    stop = time.perf_counter()
    return 1e3 * (stop - first) / (len(made) - 1), 1e3 * (first - start), torch.stack(made, 1)


def weigh(model: torch.nn.Module) -> tuple[int, int]:
    """Bytes of the model, and those that one step reads."""
    tensors = {t.data_ptr(): t.nbytes for t in itertools.chain(model.parameters(), model.buffers())}
    embedding = model.get_input_embeddings().weight
    tied = model.get_output_embeddings().weight is embedding
    total = sum(tensors.values())
    idle = [] if tied else [embedding]
    idle += [sparse.dense_copy for sparse in sparse_linears(model).values() if sparse.dense_copy is not None]
    return total, total - sum(tensor.nbytes for tensor in idle)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help=f"{', '.join(random_model.CONFIGS)}, or a packed folder")
    parser.add_argument("--rows", type=Path, required=True, help="JSON-lines file to append to")
    parser.add_argument(
        "--patterns", nargs="*", default=PATTERNS, help="sparsities of a random model beside the dense one"
    )
    parser.add_argument("--format", default="auto", help="of packed weights; tile is for batches")
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--prompts", nargs="+", type=int, default=PROMPTS)
    parser.add_argument(
        "--pairs", nargs="+", help="batch and prompt, as 8x128, instead of all batches with all prompts"
    )
    parser.add_argument("--tokens", type=int, default=256, help="new tokens")
    parser.add_argument("--dense-prefill", action="store_true", help="keep dense copies, for the prompt")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--commit", help="what to record where there is no git checkout")
    args = parser.parse_args()
    pairs = [map(int, pair.split("x")) for pair in args.pairs or ()]
    args.pairs = [tuple(pair) for pair in pairs or itertools.product(args.batches, args.prompts)]
    return args


if __name__ == "__main__":
    main()
