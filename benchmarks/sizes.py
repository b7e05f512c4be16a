"""Bytes of a pruned model on disk and in each runtime format, as rows of benchmarks/results/sizes.jsonl.

python benchmarks/sizes.py smollm2-135m --patterns 0.5 0.7 2:4
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from commit import commit

from dlpkit import archs, checkpoint, data, models
from dlpkit.kernels import formats
from dlpkit.pruning import prune

RESULTS = Path(__file__).parent / "results" / "sizes.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument(
        "--patterns", nargs="+", default=["0.5", "0.6", "0.7", "0.5@256", "0.6@256", "0.7@256", "2:4", "4:8"]
    )
    parser.add_argument("--criterion", default="wanda")
    parser.add_argument("--nsamples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=512)
    args = parser.parse_args()
    tokenizer = models.load_tokenizer(args.model)
    windows = data.calibration(tokenizer, n=args.nsamples, seqlen=args.seqlen)
    about = {
        "bench": "sizes",
        "model": args.model,
        "criterion": args.criterion,
        "commit": commit(),
        "command": " ".join(["python", *sys.argv]),
    }
    with RESULTS.open("w") as out:
        for pattern in args.patterns:
            out.write(
                json.dumps(
                    {
                        "pattern": pattern,
                        **measure(args.model, args.criterion, pattern, list(windows.split(4))),
                        **about,
                    }
                )
                + "\n"
            )
            out.flush()


def measure(name: str, criterion: str, pattern: str, batches: list[torch.Tensor]) -> dict:
    model = models.load_dense(name)
    prune(model, batches, criterion, pattern, "uniform")
    weights = [linear.weight.detach() for _, linear in archs.model_linears(model, archs.of(model))]
    found = {"dense_linears": sum(w.nbytes for w in weights), "dense_model": sum(p.nbytes for p in model.parameters())}
    memory = {f"memory_{format}": packed_bytes(weights, format) for format in formats.names() if format != "dense"}
    linears = checkpoint.pack(model, "dense")
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.write(linears, Path(folder))
        disk = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    return found | {"disk_linears": disk - (found["dense_model"] - found["dense_linears"]), "disk_model": disk} | memory


def packed_bytes(weights: list[torch.Tensor], format: str) -> int | None:
    """Bytes of all weights in a format, None where it does not take them, or not on this machine."""
    total = 0
    for weight in weights:
        try:
            packed = formats.get(format).pack(weight)
        except ValueError:
            return None
        if formats.name(type(packed)) != format:
            return None
        total += packed.nbytes
    return total


if __name__ == "__main__":
    main()
