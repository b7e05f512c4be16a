"""Real masks for the kernel benchmarks: what Wanda leaves of the layers that feed a model's MLPs, as bits, one tensor for each sparsity.

    python benchmarks/masks.py smollm2-135m masks.safetensors [--nsamples 32 --seqlen 512]
    cd benchmarks && pytest bench_matmul.py --masks=../masks.safetensors    # without the = pytest takes the file for tests

A layer of another size is tiled from them, so its rows and columns differ in weight as those of the model do.
"""

import argparse

import torch
from safetensors.torch import save_file
from shapes import UNSTRUCTURED

from dlpkit import archs, data, models
from dlpkit.kernels import storage
from dlpkit.pruning import prune


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("--text", default=data.BUILTIN)
    parser.add_argument("--nsamples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    args = parser.parse_args()
    windows = data.calibration(models.load_tokenizer(args.model), args.text, args.nsamples, args.seqlen, seed=0)
    save_file({pattern: masks(args.model, windows, pattern) for pattern in UNSTRUCTURED}, args.out)


def masks(name: str, windows: torch.Tensor, pattern: str) -> torch.Tensor:
    """[rows of all layers that feed the MLP, ceil(K / 8)] uint8."""
    model = models.load_dense(name, "bfloat16")
    prune(model, list(windows.split(4)), "wanda", pattern, "uniform")
    arch = archs.of(model)
    linears = [linear for path, linear in archs.model_linears(model, arch) if path.endswith(arch.mlp_in)]
    return torch.cat([storage.encode(linear.weight).mask for linear in linears])


if __name__ == "__main__":
    main()
