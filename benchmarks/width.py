"""Perplexity of width-pruned models by method, option and share of parameters removed, before recovery and after.

    python benchmarks/width.py smollm2-135m --text c4.jsonl --eval-text wiki.test.raw --out benchmarks/results/width-h100.jsonl

Options are to be chosen by `held_out_loss`: on windows of the calibration text that neither the method nor the training sees. A method is
written as its name and its options, as in saap:fusion=F1,search=S2.
"""

import argparse
import copy
import json
import time
from dataclasses import asdict
from pathlib import Path

import torch
from quality import environment

from dlpkit import checkpoint, data, models, recipe, recovery, structure, surgery
from dlpkit.evaluate import perplexity
from dlpkit.gradients import terms
from dlpkit.kernels.runtime import default_device
from dlpkit.recovery import Settings

METHODS = (
    "magnitude_sp", "wanda_sp", "flap", "llm_pruner", "llm_pruner:term=vector",
    *(f"saap:fusion={fusion},search={search}" for search in ("S1", "S2") for fusion in ("F1", "F2", "F3")),
)  # fmt: skip


def main() -> None:
    args = parse()
    device, tokenizer = default_device(), models.load_tokenizer(args.model)
    model = models.load_dense(args.model, args.dtype).to(device)
    evaluation = (
        data.evaluation(tokenizer, args.eval_text, args.eval_seqlen, args.eval_windows) if args.eval_text else None
    )
    settings = Settings(
        args.recovery,
        steps=max(args.steps, 1),
        batch_size=args.train_batch_size,
        eval_every=args.eval_every,
        seed=args.seed,
    )
    wanted = max(args.nsamples, args.steps * args.train_batch_size)
    windows, held_out = data.training(tokenizer, args.text, wanted, args.seqlen, args.held_out)
    batches = list(windows[: args.nsamples].split(args.batch_size))
    about = {
        "bench": "width", "model": args.model, "dtype": str(model.dtype).removeprefix("torch."), "seqlen": args.seqlen,
        "nsamples": args.nsamples, "batch_size": args.batch_size, "text": Path(args.text).name,
        "text_tokens": data.fingerprint(windows[: args.nsamples]), "held_out_tokens": data.fingerprint(held_out),
        "parameters": sum(p.numel() for p in model.parameters()),
        "dense_held_out_loss": perplexity(model, held_out, args.eval_batch_size).loss, **environment(args.commit),
    }  # fmt: skip
    if evaluation is not None:
        about |= {
            "eval_text": Path(args.eval_text).name, "eval_tokens": data.fingerprint(evaluation), "eval_windows": len(evaluation),
            "dense_perplexity": perplexity(model, evaluation, args.eval_batch_size).perplexity,
        }  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    found = None
    for target in args.targets:
        for method in args.methods:
            name, _, pairs = method.partition(":")
            options = recipe.options(pairs.split(",")) if pairs else {}
            start = time.perf_counter()
            if hasattr(structure.get(name), "decide"):  # all that read gradients read the same
                found = found or terms(model, batches)
                plan = structure.get(name).decide(model, found, target, **options)
            else:
                plan = structure.get(name).plan(model, batches, target, **options)
            result = {
                "method": name,
                "options": options,
                "target": target,
                "share": plan.shares[-1],
                "plan_seconds": time.perf_counter() - start,
            }
            with surgery.trial(model, plan.edits):
                if evaluation is not None:
                    result["perplexity"] = perplexity(model, evaluation, args.eval_batch_size).perplexity
                result["held_out_loss"] = perplexity(model, held_out, args.eval_batch_size).loss
            if args.steps:
                result |= recovered(model, plan.edits, windows, held_out, evaluation, settings, args)
            with args.out.open("a") as out:
                out.write(json.dumps(about | result) + "\n")
            shown = ("share", "perplexity", "held_out_loss", "perplexity_recovered", "train_seconds")
            print(f"{target} {method:34}", *(f"{result[key]:10.4f}" for key in shown if key in result), flush=True)


def recovered(model, chosen, windows, held_out, evaluation, settings: Settings, args: argparse.Namespace) -> dict:
    small = checkpoint.edit(copy.deepcopy(model), chosen)
    small, done = recovery.recover(small, windows, held_out, settings, model.device)
    return {
        "recovery": asdict(settings), "perplexity_recovered": perplexity(small, evaluation, args.eval_batch_size).perplexity,
        "held_out_loss_recovered": done.merged, "validation": done.validation, "trainable": done.trainable,
        "train_tokens": done.tokens, "train_seconds": done.seconds,
        "peak_gpu": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
    }  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", required=True, help="calibration and training text")
    parser.add_argument("--eval-text", help="text whose perplexity is measured; without it, only the held-out loss is")
    parser.add_argument("--out", type=Path, required=True, help="jsonl file to append to")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--targets", nargs="+", type=float, default=(0.2, 0.35))
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--held-out", type=int, default=64, help="windows kept back")
    parser.add_argument("--recovery", default="masked", help="how to train")
    parser.add_argument("--steps", type=int, default=0, help="of recovery; 0 for none")
    parser.add_argument("--train-batch-size", type=int, default=32)
    parser.add_argument("--eval-every", type=int, default=20)
    parser.add_argument("--eval-seqlen", type=int, default=2048)
    parser.add_argument("--eval-windows", type=int, help="at most so many, from the beginning")
    parser.add_argument("--eval-batch-size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--commit", help="what to record where there is no git checkout")
    return parser.parse_args()


if __name__ == "__main__":
    main()
