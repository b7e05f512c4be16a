"""What depth pruning costs, as rows of benchmarks/results/depth-<gpu>.jsonl: perplexity, search time, and tokens per second.

    python benchmarks/depth.py quality smollm2-135m --text c4.jsonl --eval-text wiki.test.raw --out rows.jsonl
    python benchmarks/depth.py search smollm2-135m --text c4.jsonl --out rows.jsonl     # from the trunk, asking less, naive loop
    python benchmarks/depth.py shapes --out rows.jsonl                                   # random weights of Llama-2-7B and -3-8B; width too

Sliding merging reads its paper's ten windows of 128 tokens (--sliding), all others --nsamples windows of --seqlen.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import random_model
import torch
from quality import environment
from rows import load

from dlpkit import archs, data, models, structure, surgery
from dlpkit.edits import RULES, Drop
from dlpkit.evaluate import cache_bytes, perplexity
from dlpkit.generation import Decoder
from dlpkit.journal import Journal
from dlpkit.kernels.runtime import default_device

METHODS = {
    "blockpruner": {}, "sleb": {}, "shortgpt": {}, "shortened": {"order": "ppl"}, "shortened taylor": {"order": "taylor"},
    **{f"sliding_merge {rule}": {"rule": rule} for rule in RULES},
}  # fmt: skip
HOW = {"trunk": {}, "lazy": {"lazy": True}, "early": {"early": 4.0}, "lazy early": {"lazy": True, "early": 4.0}}
TARGETS = (0.1, 0.2, 0.3)
PROMPT, NEW_TOKENS = 128, 256


def quality(args: argparse.Namespace, out: "Rows") -> None:
    """Perplexity of every method at every target. A nested search goes once, to the largest; --replay takes what other rows removed."""
    device = default_device()
    model, tokenizer = models.load_dense(args.model, args.dtype).to(device), models.load_tokenizer(args.model)
    held_out = data.evaluation(tokenizer, args.eval_text, args.eval_seqlen, args.eval_windows)
    dense = perplexity(model, held_out, args.batch_size).perplexity
    about = {
        "bench": "depth-quality", "model": args.model, "dtype": str(model.dtype).removeprefix("torch."), "text": Path(args.text).name,
        "dense_perplexity": dense, "eval_text": Path(args.eval_text).name, "eval_tokens": data.fingerprint(held_out),
        "eval_windows": len(held_out), "eval_seqlen": args.eval_seqlen,
    }  # fmt: skip
    for row in plans(args, model, tokenizer):
        with surgery.trial(model, row.pop("edits")):
            after = perplexity(model, held_out, args.batch_size).perplexity
        out.write(**about, **row, perplexity=after)


def plans(args: argparse.Namespace, model, tokenizer) -> Iterator[dict]:
    """Method by method and target by target, the edits and how they were found."""
    for row in load(args.replay) if args.replay else []:
        kept = ("method", "target", "share", "removed", "nsamples", "seqlen", "text_tokens")
        yield {key: row[key] for key in kept} | {"edits": read(row["removed"])}
    for name in [] if args.replay else args.methods:
        method, plan = name.split()[0], None
        sliding = method == "sliding_merge"
        nsamples, seqlen = args.sliding if sliding else (args.nsamples, args.seqlen)
        windows = data.calibration(tokenizer, args.text, nsamples, seqlen, args.seed)
        with tempfile.TemporaryDirectory() as folder:
            asked = (
                {"journal": Journal(Path(folder) / "journal", {})} if sliding else {}
            )  # targets share what was measured
            for target in sorted(TARGETS, reverse=True):
                if sliding or plan is None:
                    start = time.perf_counter()
                    plan = structure.get(method).plan(model, [windows], target, **METHODS[name], **asked)
                    seconds = time.perf_counter() - start
                found = plan.to(target)
                yield {
                    "method": name, "target": target, "share": found.shares[-1], "removed": told(found.edits), "nsamples": nsamples,
                    "seqlen": seqlen, "text_tokens": data.fingerprint(windows), "edits": found.edits, "search_seconds": seconds,
                    "metric": found.metric, "scores": [round(score, 4) for score in found.scores],
                }  # fmt: skip


def search(args: argparse.Namespace, out: "Rows") -> None:
    """BlockPruner to a third of the blocks: the whole model per candidate, from the trunk, and asking less."""
    device = default_device()
    model, tokenizer = models.load_dense(args.model, args.dtype).to(device), models.load_tokenizer(args.model)
    windows = data.calibration(tokenizer, args.text, args.nsamples, args.seqlen, args.seed)
    count = args.blocks or 2 * model.config.num_hidden_layers // 3
    for how in args.how:
        start, row = time.perf_counter(), {}
        if how == "naive":
            chosen, evaluations = naive(model, windows, count, args.batch_size)
        else:
            plan = structure.get("blockpruner").plan(model, [windows], count, **HOW[how])
            chosen, evaluations = plan.edits, plan.work.evaluations
            row = {"tflop": plan.work.done * 2 / 1e12, "naive_tflop": plan.work.naive * 2 / 1e12, "losses": plan.scores}
        out.write(
            bench="depth-search", model=args.model, how=how, blocks=count, seconds=time.perf_counter() - start, evaluations=evaluations,
            removed=told(chosen), nsamples=args.nsamples, seqlen=args.seqlen, text=Path(args.text).name,
            dtype=str(model.dtype).removeprefix("torch."), **row,
        )  # fmt: skip


def naive(model, windows: torch.Tensor, count: int, batch_size: int) -> tuple[list[Drop], int]:
    """Algorithm 1 of BlockPruner as it is written."""
    chosen, evaluations = [], 0
    candidates = [Drop(*half) for half in sorted(surgery.present(model, archs.of(model)))]
    budget = structure.Budget(model)
    for _ in range(count):
        losses = {}
        for candidate in candidates:
            if budget.fits([*chosen, candidate]):
                with surgery.trial(model, [*chosen, candidate]):
                    losses[candidate] = perplexity(model, windows, batch_size).loss
        evaluations += len(losses)
        chosen.append(min(losses, key=losses.get))
    return chosen, evaluations


def shapes(args: argparse.Namespace, out: "Rows") -> None:
    """Seconds per removed block on Llama-2-7B shapes, and tokens per second of Llama-3-8B shapes before and after cuts; random weights."""
    model = random_model.build(random_model.CONFIGS["llama-2-7b"])
    windows = torch.randint(0, 32000, (4, 2048), generator=torch.Generator().manual_seed(args.seed))
    for lazy in (False, True):
        times = []
        start = time.perf_counter()
        plan = structure.get("blockpruner").plan(
            model, [windows], 2, lazy=lazy, progress=lambda *_, times=times: times.append(time.perf_counter())
        )
        each = [later - earlier for earlier, later in zip([start, *times], times, strict=False)]
        out.write(
            bench="depth-7b", shapes="llama-2-7b", lazy=lazy, nsamples=4, seqlen=2048, seconds_per_block=each,
            evaluations=plan.work.evaluations, tflop=plan.work.done * 2 / 1e12, naive_tflop=plan.work.naive * 2 / 1e12,
        )  # fmt: skip
    del model
    torch.cuda.empty_cache()
    model = random_model.build(random_model.CONFIGS["llama-3-8b"])
    some = {
        "dense": [], "25 % of layers": [Drop(layer, "layer") for layer in range(22, 30)],
        "16 attentions, 11 MLPs": [Drop(i, "attn") for i in range(0, 32, 2)] + [Drop(i, "mlp") for i in range(1, 32, 3)],
    }  # fmt: skip
    budget, full = structure.Budget(model), cache_bytes(model)

    def write(name: str, share: float) -> None:
        seconds, how = decode(model)
        out.write(
            bench="depth-tokens", shapes="llama-3-8b", what=name, share=share, tokens_per_second=NEW_TOKENS / seconds,
            decoded=how, prompt=PROMPT, kv_bytes_per_token=cache_bytes(model), dense_kv_bytes_per_token=full,
        )  # fmt: skip

    for name, chosen in some.items():
        with surgery.trial(model, chosen):
            write(name, budget.share(chosen))
    # of weights that are all alike any method cuts as much of every layer
    narrow = structure.get("magnitude_sp").plan(model, [], 0.2)
    surgery.apply(model, narrow.edits)
    write("20 % by width", narrow.shares[-1])


@torch.no_grad()
def decode(model) -> tuple[float, str]:
    """Median seconds of NEW_TOKENS tokens after the first call, which compiles and captures."""
    decoder = Decoder(model, 1, PROMPT + NEW_TOKENS + 16, eos=[])
    ids, took = torch.arange(PROMPT)[None], []
    for _ in range(4):
        stream = decoder.stream(ids, tokens=NEW_TOKENS + 1)
        next(stream)
        torch.cuda.synchronize()
        start = time.perf_counter()
        list(stream)
        took.append(time.perf_counter() - start)
    return sorted(took[1:])[1], decoder.how


def told(chosen: list) -> str:
    """A5 M7 (halves), L21 (layers), 20-24 (merged)."""
    letters = {"attn": "A", "mlp": "M", "layer": "L"}
    return " ".join(
        f"{letters[edit.part]}{edit.layer}" if isinstance(edit, Drop) else f"{edit.low}-{edit.high}" for edit in chosen
    )


def read(removed: str) -> list[Drop]:
    """The inverse of `told` for what is not merged."""
    parts = {"A": "attn", "M": "mlp", "L": "layer"}
    return [Drop(int(name[1:]), parts[name[0]]) for name in removed.split()]


class Rows:
    def __init__(self, args: argparse.Namespace):
        args.out.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.about = args.out, environment(args.commit)

    def write(self, **row) -> None:
        with self.path.open("a") as out:
            out.write(json.dumps(row | self.about) + "\n")
        print({key: value for key, value in row.items() if key not in ("scores", "losses")}, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("quality", "search", "shapes"))
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--text", help="calibration text")
    parser.add_argument("--eval-text", help="text whose perplexity is measured")
    parser.add_argument("--out", type=Path, required=True, help="jsonl file to append to")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--replay", type=Path, help="rows of an earlier run whose edits are measured again")
    parser.add_argument(
        "--sliding", nargs=2, type=int, default=(10, 128), help="windows and tokens in them, for sliding merging"
    )
    parser.add_argument("--eval-windows", type=int, help="at most so many")
    parser.add_argument("--eval-seqlen", type=int, default=2048)
    parser.add_argument("--how", nargs="+", choices=[*HOW, "naive"], default=[*HOW, "naive"])
    parser.add_argument("--blocks", type=int, help="to remove; default a third of all")
    parser.add_argument("--nsamples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--commit", help="what to record where there is no git checkout")
    args = parser.parse_args()
    {"quality": quality, "search": search, "shapes": shapes}[args.part](args, Rows(args))


if __name__ == "__main__":
    main()
