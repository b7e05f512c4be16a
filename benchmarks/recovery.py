"""Perplexity of a weight-pruned model before recovery, as trained and as saved with its zeros kept, by method and learning rate.

    python benchmarks/recovery.py smollm2-135m --text c4.jsonl --eval-text wiki.test.raw --out benchmarks/results/recovery-h100.jsonl

Learning rates are to be compared by validation loss, on windows of the training text that are not trained on.
"""

import argparse
import json
from pathlib import Path

import torch
from quality import environment

from dlpkit import archs, data, models, pruning, recovery
from dlpkit.evaluate import perplexity
from dlpkit.kernels.runtime import default_device
from dlpkit.recovery import LEARNING_RATES, METHODS, Settings


def main() -> None:
    args = parse()
    device, tokenizer = default_device(), models.load_tokenizer(args.model)
    model = models.load_dense(args.model, args.dtype).to(device)
    windows = data.calibration(tokenizer, args.text, args.nsamples, args.eval_seqlen, args.seed)
    evaluation = data.evaluation(tokenizer, args.eval_text, args.eval_seqlen, args.eval_windows)
    training, held_out = data.training(tokenizer, args.text, args.steps * args.batch_size, args.seqlen)
    dense = perplexity(model, evaluation, args.eval_batch_size).perplexity
    pruning.prune(
        model, list(windows.split(args.eval_batch_size)), args.criterion, args.sparsity, args.allocation, device=device
    )
    pruned = {name: value.clone() for name, value in model.state_dict().items()}
    before = perplexity(model, evaluation, args.eval_batch_size).perplexity
    about = {
        "bench": "recovery", "model": args.model, "dtype": str(model.dtype).removeprefix("torch."), "criterion": args.criterion,
        "allocation": args.allocation, "pattern": args.sparsity, "text": Path(args.text).name, "eval_text": Path(args.eval_text).name,
        "eval_tokens": data.fingerprint(evaluation), "eval_windows": len(evaluation), "training_tokens": data.fingerprint(training), "seqlen": args.seqlen,
        "batch_size": args.batch_size, "steps": args.steps, "seed": args.seed, "dense_perplexity": dense, "perplexity_before": before,
        **environment(args.commit),
    }  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for method, lr in [(name, rate) for name in args.methods for rate in args.lr or [LEARNING_RATES[name]]]:
        model.load_state_dict(pruned)
        result = {"method": method, "lr": lr, **measure(model, training, held_out, evaluation, method, lr, args)}
        with args.out.open("a") as out:
            out.write(json.dumps(about | result) + "\n")
        print(json.dumps(result), flush=True)


def measure(model, training, held_out, evaluation, method: str, lr: float, args: argparse.Namespace) -> dict:
    settings = Settings(
        method, lr=lr, steps=args.steps, batch_size=args.batch_size, eval_every=args.eval_every, seed=args.seed
    )
    torch.manual_seed(args.seed)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    zeros, dtype = sum(recovery.zero_counts(model).values()), model.dtype
    weights = sum(linear.weight.numel() for _, linear in archs.model_linears(model, archs.of(model)))
    adapted = recovery.prepare(model, settings)
    done = recovery.train(adapted, training, held_out, settings, dtype)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=method == "full" and dtype != torch.float32):
        trained = perplexity(adapted, evaluation, args.eval_batch_size).perplexity
    merged = recovery.finish(adapted, dtype)
    return {
        "perplexity_trained": trained, "perplexity_merged": perplexity(merged, evaluation, args.eval_batch_size).perplexity,
        "sparsity_before": zeros / weights, "sparsity_after": sum(recovery.zero_counts(merged).values()) / weights,
        "validation": done.validation, "best": done.best, "trainable": done.trainable, "tokens": done.tokens, "train_seconds": done.seconds,
        "peak_gpu": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
    }  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", required=True, help="calibration and training text")
    parser.add_argument("--eval-text", required=True, help="text whose perplexity is measured")
    parser.add_argument("--out", type=Path, required=True, help="jsonl file to append to")
    parser.add_argument("--criterion", default="wanda")
    parser.add_argument("--allocation", default="dlp")
    parser.add_argument("--sparsity", default="0.7")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--lr", nargs="+", type=float, help="default: the method's own")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--eval-every", type=int, default=50)
    parser.add_argument("--eval-seqlen", type=int, default=2048)
    parser.add_argument("--eval-windows", type=int, help="at most so many, from the beginning")
    parser.add_argument("--eval-batch-size", type=int, default=8)
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--commit", help="what to record where there is no git checkout")
    return parser.parse_args()


if __name__ == "__main__":
    main()
