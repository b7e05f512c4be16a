"""Perplexity of every criterion, allocation and pattern on one model, as rows of benchmarks/results/quality-<gpu>.jsonl.

    python benchmarks/quality.py smollm2-135m --text c4.jsonl --eval-text wiki.test.raw --out benchmarks/results/quality-h100.jsonl

The model stays on the device; allocations look at the dense model once and share their summaries between patterns and criteria.
"""

import argparse
import itertools
import json
import sys
import time
from pathlib import Path

from commit import commit

from dlpkit import allocation as allocations
from dlpkit import archs, criteria, data, models, pruning, report
from dlpkit.evaluate import perplexity
from dlpkit.kernels.runtime import default_device
from dlpkit.patterns import Pattern

CRITERIA = ("magnitude", "wanda", "sparsegpt")
ALLOCATIONS = ("uniform", "owl", "dlp")
PATTERNS = ("0.5", "0.6", "0.7", "2:4", "4:8", "0.5@256", "0.6@256", "0.7@256")


def main() -> None:
    args = parse()
    device = default_device()
    model, tokenizer = models.load_dense(args.model, args.dtype).to(device), models.load_tokenizer(args.model)
    arch = archs.of(model)
    windows = data.calibration(tokenizer, args.text, args.nsamples, args.seqlen, args.seed)
    held_out = data.evaluation(tokenizer, args.eval_text, args.seqlen)
    batches = list(windows.split(args.batch_size))
    dense = perplexity(model, held_out, args.batch_size).perplexity
    original = {name: linear.weight.detach().clone() for name, linear in archs.model_linears(model, arch)}
    summaries = {}
    for name in args.allocations:
        summaries[name] = pruning.summarise(model, arch, batches, allocations.get(name), device=device)
    about = {
        "bench": "quality", "model": args.model, "dtype": str(model.dtype).removeprefix("torch."), "seqlen": args.seqlen,
        "nsamples": args.nsamples, "seed": args.seed, "text": Path(args.text).name, "text_tokens": data.fingerprint(windows),
        "eval_text": Path(args.eval_text).name, "eval_tokens": data.fingerprint(held_out), "dense_perplexity": dense, **environment(args.commit),
    }  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("a") as out:
        for pattern, criterion, allocation in itertools.product(args.patterns, args.criteria, args.allocations):
            for name, linear in archs.model_linears(model, arch):
                linear.weight.data.copy_(original[name])
            start = time.perf_counter()
            plan = pruning.plan(model, arch, Pattern.parse(pattern), allocations.get(allocation), summaries[allocation])
            linears = pruning.apply(model, arch, batches, criteria.get(criterion), plan, device)
            seconds = time.perf_counter() - start
            zeros = sum(linear.zeros for linear in linears) / sum(linear.weights for linear in linears)
            result = {
                "criterion": criterion, "allocation": allocation, "pattern": pattern, "sparsity": round(zeros, 6),
                "perplexity": perplexity(model, held_out, args.batch_size).perplexity, "prune_seconds": round(seconds, 3),
            }  # fmt: skip
            out.write(json.dumps(about | result) + "\n")
            out.flush()
            print(
                f"{pattern:8} {criterion:10} {allocation:8} {result['perplexity']:12.2f}  {seconds:6.1f} s", flush=True
            )


def environment(known: str | None) -> dict:
    found = report.versions()
    return {key: found[key] for key in ("gpu", "torch", "triton", "transformers")} | {
        "commit": commit(known),
        "command": " ".join(["python", *sys.argv]),
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", required=True, help="calibration text")
    parser.add_argument("--eval-text", required=True, help="text whose perplexity is measured")
    parser.add_argument("--out", type=Path, required=True, help="jsonl file to append to")
    parser.add_argument("--patterns", nargs="+", default=PATTERNS)
    parser.add_argument("--criteria", nargs="+", default=CRITERIA)
    parser.add_argument("--allocations", nargs="+", default=ALLOCATIONS)
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--commit", help="what to record where there is no git checkout")
    return parser.parse_args()


if __name__ == "__main__":
    main()
