"""Pruning a whole model with random weights and the shapes of Llama 3 8B, beside the bare block forwards that it needs, one row per run.

python benchmarks/bench_prune.py --criterion wanda --allocation dlp --rows benchmarks/results/prune-h100.jsonl
"""

import argparse
import copy
import json
import time
from pathlib import Path

import random_model
import torch
from quality import environment
from transformers import PreTrainedModel

from dlpkit import archs, offload, pruning
from dlpkit.calibration import Stream
from dlpkit.patterns import Pattern


def main() -> None:
    args = parse()
    model = build(args.blocks)
    tokens = torch.randint(
        0, model.config.vocab_size, (args.windows, args.seqlen), generator=torch.Generator().manual_seed(0)
    )
    batches = list(tokens.split(args.batch_size))
    if args.offload:
        offload.RESIDENT_SHARE = 0.0
    passes = (args.allocation != "uniform") + 2  # the dense pass; before and after pruning a block
    bare = passes * forwards(model, batches[: max(1, len(batches) // args.sample)]) * args.sample
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    found = pruning.prune(model, batches, args.criterion, args.pattern, args.allocation, device="cuda")
    total = time.perf_counter() - start
    row = {
        "bench": "prune", "model": f"Llama 3 8B shapes, {args.blocks} blocks", "criterion": args.criterion, "allocation": args.allocation,
        "pattern": str(Pattern.parse(args.pattern)), "dtype": "bfloat16", "windows": args.windows, "seqlen": args.seqlen,
        "hidden_states": "host" if args.offload else "GPU", "weights": sum(linear.weights for linear in found.linears),
        "sparsity": round(found.sparsity, 6), "seconds": round(total, 2), "allocate_seconds": round(found.seconds["allocate"], 2),
        "prune_seconds": round(found.seconds["prune"], 2), "bare_forward_seconds": round(bare, 2), "passes": passes,
        "times_bare": round(total / bare, 3), "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
    }  # fmt: skip
    row |= environment(args.commit)
    print(json.dumps(row, indent=1))
    with args.rows.open("a") as file:
        file.write(json.dumps(row) + "\n")


def build(blocks: int) -> PreTrainedModel:
    """The model on the host: random weights, drawn on the GPU block by block; nothing is downloaded."""
    config = copy.deepcopy(random_model.CONFIGS["llama-3-8b"])
    config.num_hidden_layers = blocks
    model = random_model.build(config).cpu()
    torch.cuda.empty_cache()
    return model


def forwards(model: PreTrainedModel, batches: list[torch.Tensor]) -> float:
    """Seconds of one pass of all batches through all blocks, each on the GPU before the clock starts; nothing else is done."""
    stream = Stream(model, archs.of(model), batches, "cuda")
    seconds = 0.0
    for index in range(len(stream.blocks)):
        with stream.resident.at(index):
            if index == 0:
                stream.advance(index)  # warm
            torch.cuda.synchronize()
            start = time.perf_counter()
            stream.advance(index)
            torch.cuda.synchronize()
            seconds += time.perf_counter() - start
    return seconds


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--criterion", default="wanda")
    parser.add_argument("--allocation", default="dlp")
    parser.add_argument("--pattern", default="0.5")
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--sample", type=int, default=1, help="time the bare forwards of one batch in so many")
    parser.add_argument("--offload", action="store_true", help="keep the hidden states on the host even if they fit")
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--commit", help="what to record where there is no git checkout")
    return parser.parse_args()


if __name__ == "__main__":
    main()
