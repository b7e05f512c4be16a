"""Pruning a whole model with random weights and the shapes of Llama 3 8B, beside the bare block forwards that it needs, one row per run.

python benchmarks/bench_prune.py --criterion wanda --allocation dlp --rows benchmarks/results/prune-h100.jsonl
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from commit import commit
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from dlpkit import archs, offload, pruning, report
from dlpkit.calibration import Stream
from dlpkit.patterns import Pattern

CONFIG = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 8192, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}  # fmt: skip
SPREAD = 0.02  # of the random weights


def main() -> None:
    args = parse()
    model = build(args.blocks)
    tokens = torch.randint(
        0, CONFIG["vocab_size"], (args.windows, args.seqlen), generator=torch.Generator().manual_seed(0)
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
    versions = report.versions()
    row |= {key: versions[key] for key in ("gpu", "torch", "triton", "transformers")}
    row |= {"commit": commit(args.commit), "command": " ".join(["python", *sys.argv])}
    print(json.dumps(row, indent=1))
    with args.rows.open("a") as file:
        file.write(json.dumps(row) + "\n")


def build(blocks: int) -> LlamaForCausalLM:
    """The model on the host: normal weights, drawn on the GPU block by block; nothing is downloaded."""
    config = LlamaConfig(num_hidden_layers=blocks, **CONFIG)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    gen = torch.Generator("cuda").manual_seed(0)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            value = torch.ones(parameter.shape, dtype=torch.bfloat16)
            if parameter.ndim == 2:
                value = (
                    torch.randn(parameter.shape, generator=gen, device="cuda", dtype=torch.bfloat16).mul_(SPREAD).cpu()
                )
            setattr(module, name, nn.Parameter(value, requires_grad=False))
    model.model.rotary_emb = LlamaRotaryEmbedding(config)
    torch.cuda.empty_cache()
    return model.eval()


def forwards(model: LlamaForCausalLM, batches: list[torch.Tensor]) -> float:
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
