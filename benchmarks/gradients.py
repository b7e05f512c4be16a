"""Seconds and memory of the importance of all units of a Llama-2-7B, with random weights, as a row of benchmarks/results/width-<gpu>.jsonl.

python benchmarks/gradients.py --out benchmarks/results/width-h100.jsonl
"""

import argparse
import json
import time
from pathlib import Path

import torch
from quality import environment
from transformers import AutoModelForCausalLM, LlamaConfig

from dlpkit.gradients import terms
from dlpkit.structure import _width, saap


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="jsonl file to append to")
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--commit", help="what to record where there is no git checkout")
    args = parser.parse_args()
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(
            LlamaConfig(num_hidden_layers=args.layers), dtype=torch.bfloat16
        ).eval()
    tokens = torch.randint(0, model.config.vocab_size, (args.batches * args.batch_size, args.seqlen))
    held = sum(p.nbytes for p in model.parameters())
    terms(model, [tokens[:1]])
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    found = terms(model, list(tokens.split(args.batch_size)))
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    rooms = _width.rooms(model)
    start = time.perf_counter()
    plan = _width.choose(
        model,
        _width.shares(
            {half: score.mean(0) for half, score in saap.fuse({half: found[half] for half in rooms}, "F1").items()}
        ),
        0.2,
        rooms,
    )
    row = {
        "bench": "gradients", "model": "Llama-2-7B shapes, random weights", "dtype": "bfloat16", "layers": args.layers, "batches": args.batches,
        "batch_size": args.batch_size, "seqlen": args.seqlen, "seconds": seconds, "plan_seconds": time.perf_counter() - start,
        "share": plan.shares[-1], "model_bytes": held, "peak_gpu": torch.cuda.max_memory_allocated(), **environment(args.commit),
    }  # fmt: skip
    with args.out.open("a") as out:
        out.write(json.dumps(row) + "\n")
    print(json.dumps(row))


if __name__ == "__main__":
    main()
