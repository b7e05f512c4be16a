"""The command line: flags to calls, no logic. Wanda's spellings are accepted beside ours. Usage errors end with exit code 2."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True, add_completion=False,
    pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip

Model = Annotated[str, typer.Argument(help="A folder, a hub id, or smollm2-135m.")]
Out = Annotated[Path, typer.Argument(help="The folder to write.")]
Device = Annotated[str | None, typer.Option(help="cuda, cuda:1, cpu; default the GPU if there is one.")]
Runtime = Annotated[
    str, typer.Option(help="Format that packed weights run in: auto, or one that `dlpkit doctor` names.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output folder that is not empty.")]


Structure = Annotated[
    str | None,
    typer.Option(
        help="What removes layers, halves of layers or units: blockpruner, sleb, shortgpt, shortened, sliding_merge, saap, llm_pruner, ...; or a plan.json."
    ),
]
Remove = Annotated[
    str | None, typer.Option(help="How much of it: a share of all parameters (0.2) or a number of things (12).")
]
StructureOption = Annotated[
    list[str] | None,
    typer.Option("--structure-option", help="The structure's own, as name=value: mode=attn, lazy=true, rule=sum."),
]


@app.command()
def prune(
    model: Annotated[str | None, typer.Argument(help="The dense model: a folder, a hub id, or smollm2-135m.")] = None,
    out: Annotated[Path | None, typer.Argument(help="The folder to write.")] = None,
    config: Annotated[Path | None, typer.Option("--config", "-C", help="A recipe.yaml; flags beside it win.")] = None,
    criterion: Annotated[str | None, typer.Option("--criterion", "--prune_method", help="magnitude, wanda, sparsegpt, ria; wanda_dlp sets both halves.")] = None,
    allocation: Annotated[str | None, typer.Option(help="uniform, dlp, owl, alphapruning: how much each block loses.")] = None,
    sparsity: Annotated[str | None, typer.Option("--sparsity", "--sparsity_ratio", help="Fraction removed: 0.6, 0.6@256 (equal counts per 256 columns) or 2:4.")] = None,
    structure: Structure = None,
    remove: Remove = None,
    structure_option: StructureOption = None,
    width: Annotated[str | None, typer.Option(help="A second structure, for what the first has left: saap, llm_pruner, flap, ...")] = None,
    width_remove: Annotated[str | None, typer.Option("--width-remove", help="How much of it, as for --remove.")] = None,
    width_option: Annotated[list[str] | None, typer.Option("--width-option", help="Its own, as name=value: fusion=F3.")] = None,
    option: Annotated[list[str] | None, typer.Option(help="The allocation's own, as name=value: alpha=0.1, strategy=mean.")] = None,
    granularity: Annotated[str | None, typer.Option(help="One sparsity per block or per linear.")] = None,
    text: Annotated[str | None, typer.Option(help="Calibration text: builtin, wikitext2, c4, ptb, slimpajama, alpaca, or a .txt, .raw, .jsonl, .jsonl.gz file.")] = None,
    nsamples: Annotated[int | None, typer.Option(help="Calibration windows.")] = None,
    seqlen: Annotated[int | None, typer.Option(help="Tokens in a window.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the calibration windows.")] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="Windows per forward pass.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, bfloat16, float16, float32.")] = None,
    eval_text: Annotated[str | None, typer.Option("--eval-text", help="Text for perplexity before and after.")] = None,
    eval_windows: Annotated[int | None, typer.Option("--eval-windows", help="At most so many windows of it; 0 for none.")] = None,
    dense: Annotated[Path | None, typer.Option("--dense", help="Also write the dense model with its zeros to this folder.")] = None,
    device: Device = None, runtime: Runtime = "auto", overwrite: Overwrite = False,
    restart: Annotated[bool, typer.Option("--restart", help="Forget an interrupted run instead of going on with it.")] = False,
    model_flag: Annotated[str | None, typer.Option("--model", hidden=True)] = None,
    sparsity_type: Annotated[str | None, typer.Option("--sparsity_type", hidden=True)] = None,
    save_model: Annotated[Path | None, typer.Option("--save_model", hidden=True)] = None,
):  # fmt: skip
    """Prune MODEL, pack it and write it to OUT, with a report. Interrupted, the same command goes on where it was."""
    from dlpkit import console, pipeline, recipe, report

    values = recipe.read(config) if config else {}
    model, out = model or model_flag, out or save_model
    if config and model and not out:
        model, out = None, Path(model)  # with a recipe that names the model, the one argument is OUT
    if not out or not (model or "model" in values):
        raise typer.BadParameter("wants MODEL and OUT, as in: dlpkit prune smollm2-135m out/pruned --sparsity 0.6")
    if sparsity_type and sparsity_type != "unstructured":
        sparsity = sparsity_type
    flags = {
        "model": model, "criterion": criterion, "allocation": allocation, "sparsity": sparsity, "granularity": granularity,
        "text": text, "nsamples": nsamples, "seqlen": seqlen, "seed": seed, "batch_size": batch_size, "dtype": dtype,
        "eval_text": eval_text, "eval_windows": eval_windows, "structure": structure, "width": width,
    }  # fmt: skip
    values |= recipe.split_method({key: value for key, value in flags.items() if value is not None})
    values |= recipe.removal(remove, structure_option) | recipe.removal(width_remove, width_option, "width")
    if option:
        values["options"] = recipe.options(option)
    try:
        with console.progress() as progress:
            result = pipeline.run(
                recipe.make(**values), out, dense=dense, device=device, runtime=runtime,
                overwrite=overwrite, restart=restart, progress=progress,
            )  # fmt: skip
    except KeyboardInterrupt:
        print("Stopped. Finished blocks are kept: the same command goes on after them.", file=sys.stderr)
        raise typer.Exit(130) from None
    if not result:
        return  # one of several processes, whose part is done
    print(
        f"\n{report.summary_table(result)}\n\n{report.stage_table(result)}\n\nsample: {result['sample']!r}\n\nwritten to {out}, with report.json and README.md"
    )


@app.command()
def plan(
    model: Model,
    out: Annotated[Path, typer.Argument(help="The PLAN.json to write.")],
    structure: Structure = None, remove: Remove = None, structure_option: StructureOption = None,
    text: Annotated[str, typer.Option(help="Calibration text, as for prune.")] = "builtin",
    nsamples: Annotated[int, typer.Option(help="Calibration windows.")] = 128,
    seqlen: Annotated[int, typer.Option(help="Tokens in a window.")] = 2048,
    seed: Annotated[int, typer.Option(help="Of the calibration windows.")] = 0,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Windows per forward pass.")] = 1,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16, float32.")] = "auto",
    plot: Annotated[Path | None, typer.Option(help="Also draw what was measured, to this .svg or .png.")] = None,
    device: Device = None, overwrite: Overwrite = False,
    restart: Annotated[bool, typer.Option("--restart", help="Forget an interrupted search instead of going on with it.")] = False,
):  # fmt: skip
    """Search for what MODEL can do without, and write the plan: `prune --structure PLAN.json --remove LESS` follows it. Runs under torchrun."""
    from dlpkit import console, pipeline, recipe, report

    asked = recipe.make(
        model=model, structure=structure, text=text, nsamples=nsamples, seqlen=seqlen, seed=seed, batch_size=batch_size, dtype=dtype,
        **recipe.removal(remove, structure_option),
    )  # fmt: skip
    with console.progress() as progress:
        found = pipeline.plan(asked, out, device, overwrite, restart, progress)
    if plot:
        report.plot(found, plot)
    print(f"{report.step_table(found)}\n\nwritten to {out}")


@app.command("map")
def map_(
    model: Model,
    out: Annotated[Path, typer.Argument(help="The .svg or .png to write.")],
    text: Annotated[str, typer.Option(help="Calibration text, as for prune.")] = "builtin",
    nsamples: Annotated[int, typer.Option(help="Windows.")] = 32,
    seqlen: Annotated[int, typer.Option(help="Tokens in a window.")] = 256,
    seed: Annotated[int, typer.Option(help="Of the windows.")] = 0,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Windows compared with one another, at least 4.")] = 16,
    device: Device = None,
):  # fmt: skip
    """Draw how alike the outputs of any two layers are (CKA): patches on the diagonal are layers that may be merged."""
    from dlpkit import console, pipeline, report

    with console.progress() as progress:
        found = pipeline.layer_map(model, text, nsamples, seqlen, seed, batch_size, device, progress)
    report.plot_map(found, out)
    print(f"written to {out}")


@app.command()
def pack(
    model: Model, out: Out,
    to: Annotated[str, typer.Option(help="packed, or dense to write the zeros out again.")] = "packed",
    overwrite: Overwrite = False,
):  # fmt: skip
    """Pack a dense model that has zeros, wherever it was pruned, or turn a packed one back."""
    from dlpkit import pipeline, report

    before, after = pipeline.convert(model, out, to, overwrite)
    print(f"weights on disk: {report.megabytes(before)} before, {report.megabytes(after)} in {out}")


@app.command()
def recover(
    model: Model, out: Out,
    method: Annotated[str | None, typer.Option(help="masked, grouped or lora adapters, or full: every weight that is not zero.")] = None,
    rank: Annotated[int | None, typer.Option(help="Of the adapters.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Adapters are scaled by alpha / rank.")] = None,
    group: Annotated[int | None, typer.Option(help="Inputs that share a column, for grouped adapters.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate; default the method's own.")] = None,
    steps: Annotated[int | None, typer.Option(help="At most so many optimizer steps.")] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="Windows per step.")] = None,
    eval_every: Annotated[int | None, typer.Option("--eval-every", help="Steps between validations.")] = None,
    patience: Annotated[int | None, typer.Option(help="Validations without improvement after which it stops.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the adapters and of the order of windows.")] = None,
    text: Annotated[str, typer.Option(help="Text to train on: its calibration part.")] = "builtin",
    seqlen: Annotated[int, typer.Option(help="Tokens in a window to train on.")] = 512,
    held_out: Annotated[int, typer.Option("--held-out", help="Windows of it to validate by.")] = 32,
    eval_text: Annotated[str, typer.Option("--eval-text", help="Text for perplexity before and after.")] = "builtin",
    eval_windows: Annotated[int | None, typer.Option("--eval-windows", help="At most so many windows of it; 0 for none.")] = None,
    device: Device = None, overwrite: Overwrite = False,
    restart: Annotated[bool, typer.Option("--restart", help="Forget an interrupted run instead of going on with it.")] = False,
):  # fmt: skip
    """Train a pruned MODEL, zeros kept, and write it to OUT. Interrupted, the same command goes on where it was."""
    from dlpkit import console, pipeline, report
    from dlpkit.recovery import Settings

    flags = {
        "method": method, "rank": rank, "alpha": alpha, "group": group, "lr": lr, "steps": steps, "batch_size": batch_size,
        "eval_every": eval_every, "patience": patience, "seed": seed,
    }  # fmt: skip
    settings = Settings(**{key: value for key, value in flags.items() if value is not None})
    try:
        with console.progress() as progress:
            result = pipeline.recover(
                model, out, settings, text, seqlen, held_out, eval_text, eval_windows=eval_windows,
                device=device, overwrite=overwrite, restart=restart, progress=progress,
            )  # fmt: skip
    except KeyboardInterrupt:
        print("Stopped. The last validated step is kept: the same command goes on after it.", file=sys.stderr)
        raise typer.Exit(130) from None
    tables = f"{report.recovery_table(result)}\n\n{report.stage_table(result)}"
    print(f"\n{tables}\n\nwritten to {out}, with report.json and README.md")


@app.command("eval")
def evaluate_(
    model: Model,
    text: Annotated[str, typer.Option(help="builtin, wikitext2, c4, ptb, or a file.")] = "builtin",
    seqlen: Annotated[int, typer.Option(help="Tokens in a window.")] = 2048,
    windows: Annotated[int | None, typer.Option(help="At most so many windows.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size")] = 1,
    device: Device = None, runtime: Runtime = "auto",
):  # fmt: skip
    """Perplexity of a dense or packed model, as one JSON line."""
    from dlpkit import console, pipeline

    with console.progress() as progress:
        result = pipeline.evaluate_model(model, text, seqlen, windows, batch_size, device, runtime, progress)
    print(json.dumps({"model": model, **result}))


@app.command()
def generate(
    model: Model,
    prompts: Annotated[list[str], typer.Argument(help="Text to go on from; several are one batch.")],
    tokens: Annotated[int, typer.Option(help="New tokens, at most.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 for greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option("--top-k", help="Draw among so many; 0 for all.")] = 0,
    top_p: Annotated[float, typer.Option("--top-p", help="Draw among the likeliest that have this share.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    compile: Annotated[bool | None, typer.Option(help="Compile the blocks first, on a GPU; by default for many tokens.")] = None,
    dense_prefill: Annotated[bool, typer.Option("--dense-prefill", help="Read the prompt by dense weights, kept beside the packed ones.")] = False,
    device: Device = None, runtime: Runtime = "auto",
):  # fmt: skip
    """Go on from a prompt, printed as it comes, or from several at once."""
    from dlpkit import pipeline
    from dlpkit.generation import Sampling

    sampling, alone = Sampling(temperature, top_k, top_p, seed), len(prompts) == 1
    texts = pipeline.generate_text(
        model, prompts, tokens, sampling, device, runtime, compile, dense_prefill, stream=alone, notice=lambda text: print(text, file=sys.stderr)
    )  # fmt: skip
    if not alone:
        print("\n\n".join(texts))


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(help="A model folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Everything, as one JSON document.")] = False,
):
    """What is in a model folder: per-layer sparsity and bytes."""
    from dlpkit import inspection, report

    found = inspection.inspect(folder)
    if as_json:
        print(json.dumps(found, indent=1))
        return
    if found["packed"]:
        rows = [
            (
                f["name"],
                f"{f['shape'][0]} x {f['shape'][1]}",
                f"{f['sparsity']:.4f}",
                f"{f['bytes']:,}",
                f"{f['bytes'] / f['dense_bytes']:.1%}",
            )
            for f in found["linears"]
        ]
        print(report.table(rows, ("packed Linear", "shape", "sparsity", "bytes", "of dense")))
    for edit in found["edits"]:
        left = f"{edit['keep']} units of its" if edit["kind"] == "slice" else "no"
        print(f"layer {edit['layer']} has {left} {edit['part']}")
    total = sum(found["files"].values())
    print(
        f"{found['model_type']}, {'packed' if found['packed'] else 'not packed'}, {found['tensors']} tensors, {report.megabytes(total)} in {len(found['files'])} file(s)"
    )


@app.command()
def doctor(
    model: Annotated[str | None, typer.Argument(help="A packed folder: also say which kernel each of its Linears runs.")] = None,
    device: Device = None, runtime: Runtime = "auto",
    batch: Annotated[int, typer.Option(help="Sequences decoded together, for which auto picks.")] = 1,
):  # fmt: skip
    """Versions, device, and which kernels packed weights would run here, with the reason."""
    from dlpkit import checkpoint, inspection, report
    from dlpkit.kernels.runtime import default_device

    for key, value in inspection.doctor().items():
        print(f"{key}: {value}")
    if model:
        found = inspection.kernels(checkpoint.load(model, runtime, default_device(device), batch=batch))
        rows = [
            (f["linears"], f["count"], "{} x {}".format(*f["shape"]), f["format"], f"{fewest} to {most}", kernel, why)
            for f in found
            for fewest, most, kernel, why in f["kernels"]
        ]
        print(report.table(rows, ("Linears", "count", "weight", "format", "rows of x", "kernel", "because")))


@app.command(context_settings={"ignore_unknown_options": True})
def bench(
    what: Annotated[str, typer.Argument(help="kernels: sparse matmul and packing, beside cuBLAS. tokens: tokens per second, beside the dense model.")],
    more: Annotated[list[str] | None, typer.Argument(help="kernels: for pytest, such as -k 4096x4096. tokens: the model, such as llama-3-8b, --batches 1 8.")] = None,
    rows: Annotated[Path, typer.Option(help="JSON-lines file that rows are appended to.")] = Path("rows.jsonl"),
):  # fmt: skip
    """Run a benchmark of this checkout on the GPU."""
    from dlpkit import bench as benchmarks

    known = {"kernels": benchmarks.kernels, "tokens": benchmarks.tokens}
    if what not in known:
        raise ValueError(f"the benchmarks to run here are {' and '.join(known)}, got {what!r}")
    known[what](rows, more or [])


@app.callback()
def quiet() -> None:
    """Prune causal language models, store them smaller, run them faster."""
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def main() -> None:
    try:
        app()
    except ValueError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)
    except (OSError, RuntimeError) as error:
        print(f"Error: {error}. Nothing was left half-written.", file=sys.stderr)
        sys.exit(1)
