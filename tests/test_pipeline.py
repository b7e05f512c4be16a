"""The main job on a tiny model, in this process and in ones that are killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dlpkit import parallel, pipeline, recipe
from dlpkit.recovery import Settings

SMALL = {"nsamples": 4, "seqlen": 32, "eval_windows": 4}


@pytest.fixture
def small(model_folder):
    return recipe.make(model=str(model_folder), sparsity="0.5", **SMALL)


def test_the_main_job(small, model_folder, tmp_path):
    steps = []
    result = pipeline.run(
        small, tmp_path / "out", dense=tmp_path / "dense", progress=lambda stage, done, of: steps.append(stage)
    )
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "recipe.yaml", "report.json", "README.md"} <= files
    assert {path.name for path in tmp_path.iterdir()} == {"out", "dense"}  # no journal, no temporary folder
    assert set(steps) == {"evaluate", "measure", "prune"}
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == json.loads(json.dumps(result))
    assert result["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert result["bytes"]["after"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert result["bytes"]["linears_after"] < 0.65 * result["bytes"]["linears_before"]
    assert result["bytes"]["before"] == pytest.approx((model_folder / "model.safetensors").stat().st_size, rel=0.05)
    assert result["perplexity"]["before"]["tokens"] == result["perplexity"]["after"]["tokens"] == 4 * 31
    assert [block["block"] for block in result["blocks"]] == [0, 1, 2]
    assert all(block["summary"] > 0 for block in result["blocks"])
    assert recipe.make(**recipe.read(tmp_path / "out" / "recipe.yaml")) == small
    card = (tmp_path / "out" / "README.md").read_text()
    assert "import dlpkit" in card
    assert "| prune |" in card
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    prompt = torch.arange(9)[None]
    assert torch.equal(stock(prompt).logits, packed(prompt).logits)


def test_the_same_recipe_gives_the_same_bytes(small, tmp_path):
    for name in ("a", "b"):
        pipeline.run(small, tmp_path / name)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def command(folder: Path, out: Path, *more: str) -> list[str]:
    small = [f"--{key.replace('_', '-')}={value}" for key, value in SMALL.items()]
    return [
        sys.executable,
        "-m",
        "dlpkit",
        "prune",
        str(folder),
        str(out),
        "--criterion",
        "sparsegpt",
        "--sparsity",
        "0.6",
        *small,
        *more,
    ]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_resumes_to_the_identical_result(how, model_folder, tmp_path):
    subprocess.run(command(model_folder, tmp_path / "whole"), check=True, capture_output=True)
    journal = tmp_path / "out.partial"
    # a block of the journal is a moment in the middle: stop there
    slow = (
        "import sys, time; from dlpkit import journal; keep = journal.Journal.keep_block\n"
        "def slow(self, index, weights):\n    keep(self, index, weights)\n    time.sleep(0 if index < 1 else 60)\n"
        "journal.Journal.keep_block = slow\nfrom dlpkit.cli import main; sys.argv = ['dlpkit', *sys.argv[1:]]\n"
        # a shell's background job ignores Ctrl-C, and so would what it starts
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); main()"
    )
    arguments = command(model_folder, tmp_path / "out")[3:]
    process = subprocess.Popen([sys.executable, "-c", slow, *arguments], stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 60
    while len(list(journal.glob("block-*.safetensors"))) < 2 and time.time() < deadline:
        time.sleep(0.05)
    process.send_signal(how)
    _, errors = process.communicate(timeout=30)
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert "the same command goes on" in errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.partial", "whole"]
    other = subprocess.run(
        [*command(model_folder, tmp_path / "out"), "--seed", "5"], capture_output=True, text=True, check=False
    )
    assert other.returncode == 2
    assert "another calibration tokens, seed" in other.stderr
    subprocess.run(command(model_folder, tmp_path / "out"), check=True, capture_output=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_a_full_disk_leaves_no_half_checkpoint(small, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    with pytest.raises(OSError, match="No space"):
        pipeline.run(small, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]  # its finished blocks


def test_input_and_output_are_kept_apart(small, model_folder, tmp_path):
    for target in (model_folder, model_folder.parent):
        with pytest.raises(ValueError, match="holds the input model"):
            pipeline.run(small, target, overwrite=True)
    with pytest.raises(ValueError, match="cannot share"):
        pipeline.run(small, tmp_path / "out", dense=tmp_path / "out")
    assert (model_folder / "model.safetensors").exists()


def test_windows_longer_than_the_model_reads(model_folder, tmp_path):
    with pytest.raises(ValueError, match="at most 256 tokens at once, not windows of 512"):
        pipeline.run(recipe.make(model=str(model_folder), seqlen=512), tmp_path / "out")


def test_convert_there_and_back(small, model_folder, tmp_path):
    pipeline.run(small, tmp_path / "out", dense=tmp_path / "dense")
    before, after = pipeline.convert(tmp_path / "dense", tmp_path / "packed")
    assert after < before
    assert (tmp_path / "packed" / "model.safetensors").read_bytes() == (
        tmp_path / "out" / "model.safetensors"
    ).read_bytes()
    pipeline.convert(tmp_path / "packed", tmp_path / "again", to="dense")
    dense, again = (load_file(tmp_path / name / "model.safetensors") for name in ("dense", "again"))
    assert all(torch.equal(dense[key], again[key]) for key in dense)
    for source, to in (("packed", "packed"), ("dense", "dense")):
        with pytest.raises(ValueError, match=f"is {to} already"):
            pipeline.convert(tmp_path / source, tmp_path / "no", to=to)


def test_generate_continues_the_prompts(small, tmp_path):
    pipeline.run(small, tmp_path / "out")
    said = []
    together = pipeline.generate_text(tmp_path / "out", ["abc", "a longer one"], tokens=5, notice=said.append)
    alone = [
        pipeline.generate_text(tmp_path / "out", [prompt], 5, notice=said.append)[0]
        for prompt in ("abc", "a longer one")
    ]
    assert together == alone
    assert together[0].startswith("abc")
    assert ["model is on cpu" in notice for notice in said] == ([] if torch.cuda.is_available() else [True] * 3)
    with pytest.raises(ValueError, match="prompt is empty"):
        pipeline.generate_text(tmp_path / "out", [""])


def depth(model_folder, **values):
    return recipe.make(model=str(model_folder), batch_size=2, **SMALL, **values)


def test_depth_alone_writes_an_ordinary_model(model_folder, tmp_path):
    result = pipeline.run(depth(model_folder, structure="sleb", remove=1), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["num_hidden_layers"] == 2
    structure = result["structure"]
    assert [step["kind"] for step in structure["steps"]] == ["drop"]
    before, after = structure["before"], structure["after"]
    assert (before["layers"], after["layers"]) == (3, 2)
    assert after["cache_bytes_per_token"] * 3 == before["cache_bytes_per_token"] * 2
    assert 1 - after["parameters"] / before["parameters"] == pytest.approx(structure["steps"][0]["share"])
    assert after["tokens_per_second"] > 0
    assert result["linears"] == []
    assert "search" in [stage["stage"] for stage in result["stages"]]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "sleb removing 1" in card
    assert "| 1 | layer 1 |" in card
    assert recipe.make(**recipe.read(tmp_path / "out" / "recipe.yaml")).remove == 1


def test_depth_then_weights_in_one_recipe(model_folder, tmp_path):
    wanted = depth(model_folder, structure="blockpruner", remove=1, sparsity="0.5")  # half of a layer
    result = pipeline.run(wanted, tmp_path / "out", dense=tmp_path / "dense")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["edits"]
    assert config["modules"]
    assert result["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert result["bytes"]["after"] < 0.7 * result["bytes"]["before"]
    packed, dense = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("out", "dense"))
    assert torch.equal(packed(torch.arange(9)[None]).logits, dense(torch.arange(9)[None]).logits)


def test_depth_then_width_then_weights_in_one_recipe(model_folder, tmp_path):
    wanted = depth(
        model_folder, structure="sleb", remove=1, width="saap", width_remove=0.1, width_options={"first": 0, "last": 0}, sparsity="0.5"
    )  # fmt: skip
    result = pipeline.run(wanted, tmp_path / "out", dense=tmp_path / "dense")
    structure = result["structure"]
    assert {step["kind"] for step in structure["then"]["steps"]} == {"slice"}
    left = (1 - structure["steps"][-1]["share"]) * (1 - structure["then"]["steps"][-1]["share"])
    assert structure["after"]["parameters"] / structure["before"]["parameters"] == pytest.approx(left)
    assert result["sparsity"] == pytest.approx(0.5, abs=0.01)
    packed, dense = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("out", "dense"))
    assert torch.equal(packed(torch.arange(9)[None]).logits, dense(torch.arange(9)[None]).logits)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "sleb removing 1; then saap removing 0.1; then wanda scores" in card
    assert "Then, of what was left" in card
    assert recipe.make(**recipe.read(tmp_path / "out" / "recipe.yaml")) == wanted


def test_a_plan_of_slices_serves_its_own_target_alone(model_folder, tmp_path):
    wanted = {"structure_options": {"first": 0, "last": 0, "multiple": 1}}
    found = pipeline.plan(depth(model_folder, structure="llm_pruner", remove=0.2, **wanted), tmp_path / "plan.json")
    assert found["steps"][-1]["share"] >= 0.2
    with pytest.raises(ValueError, match="no smaller one: plan anew"):
        pipeline.run(depth(model_folder, structure=str(tmp_path / "plan.json"), remove=0.05), tmp_path / "less")
    followed = pipeline.run(depth(model_folder, structure=str(tmp_path / "plan.json")), tmp_path / "followed")
    assert json.dumps(followed["structure"]["steps"]) == json.dumps(found["steps"])


def test_a_plan_serves_smaller_targets(model_folder, tmp_path):
    found = pipeline.plan(depth(model_folder, structure="blockpruner", remove=3), tmp_path / "plan.json")
    assert json.loads((tmp_path / "plan.json").read_text()) == json.loads(json.dumps(found))
    followed = depth(model_folder, structure=str(tmp_path / "plan.json"), remove=2)
    result = pipeline.run(followed, tmp_path / "followed")
    searched = pipeline.run(depth(model_folder, structure="blockpruner", remove=2), tmp_path / "searched")
    assert result["structure"]["steps"] == searched["structure"]["steps"] == found["steps"][:2]
    with pytest.raises(ValueError, match="exists: choose another file"):
        pipeline.plan(depth(model_folder, structure="sleb", remove=1), tmp_path / "plan.json")
    with pytest.raises(ValueError, match="a plan is searched by a structure"):
        pipeline.plan(followed, tmp_path / "other.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["followed", "plan.json", "searched"]


def test_a_killed_search_goes_on_in_the_pipeline(model_folder, tmp_path):
    def killed(stage, done, of):
        if (stage, done) == ("search", 2):
            raise KeyboardInterrupt

    wanted = depth(model_folder, structure="blockpruner", remove=3)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(wanted, tmp_path / "out", progress=killed)
    assert len(list((tmp_path / "out.partial").glob("step-*"))) == 2
    resumed, whole = pipeline.run(wanted, tmp_path / "out"), pipeline.run(wanted, tmp_path / "whole")
    assert resumed["structure"]["steps"] == whole["structure"]["steps"]
    assert resumed["structure"]["work"]["evaluations"] < whole["structure"]["work"]["evaluations"]
    names = ("model.safetensors", "config.json")
    assert all((tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() for name in names)


def test_torchrun_writes_once(model_folder, tmp_path):
    arguments = [
        "--structure",
        "blockpruner",
        "--remove",
        "2",
        "--nsamples",
        "4",
        "--seqlen",
        "32",
        "--eval-windows",
        "2",
    ]
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "dlpkit"]
    for launch, name in [(two, "two"), ([sys.executable, "-m", "dlpkit"], "one")]:
        command = [*launch, "prune", model_folder, tmp_path / name, *arguments]
        subprocess.run(command, check=True, capture_output=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    names = ("model.safetensors", "config.json")
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in names)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_a_process_wants_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr("torch.distributed.is_torchelastic_launched", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with (
        pytest.raises(ValueError, match="2 processes on a machine with 1 GPU"),
        parallel.processes(torch.device("cuda")),
    ):
        pass


def test_stages_report_time_and_memory(small, tmp_path):
    stages = pipeline.run(small, tmp_path / "out")["stages"]
    assert [s["stage"] for s in stages] == [
        "load",
        "evaluate dense",
        "prune",
        "save",
        "load back",
        "evaluate pruned",
        "generate",
    ]
    assert all(s["seconds"] >= 0 and s["peak_host"] > 10**7 for s in stages)


def recovering(folder: Path, out: Path, *more: str) -> list[str]:
    small = [
        "--steps=6",
        "--batch-size=2",
        "--eval-every=2",
        "--seqlen=32",
        "--held-out=2",
        "--eval-windows=0",
        "--lr=1e-3",
    ]
    return [sys.executable, "-m", "dlpkit", "recover", str(folder), str(out), *small, *more]


@pytest.mark.parametrize("method", ["masked", "lora"])
def test_recover_writes_what_it_trained(method, small, tmp_path):
    pipeline.run(small, tmp_path / "pruned")
    settings = Settings(method, steps=6, batch_size=2, eval_every=2, lr=1e-3)
    result = pipeline.recover(
        tmp_path / "pruned", tmp_path / "out", settings, seqlen=32, held_out=2, eval_seqlen=32, eval_windows=4
    )
    assert {path.name for path in tmp_path.iterdir()} == {"pruned", "out"}
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == json.loads(json.dumps(result))
    assert result["perplexity"]["before"]["tokens"] == result["perplexity"]["after"]["tokens"] == 4 * 31
    assert result["training"]["merged"] < result["training"]["validation"][0][1]
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("pruned", "out"))
    assert before.keys() == after.keys()
    kept = [key for key in before if key.endswith(("weight_mask", "weight_offsets"))]
    assert kept
    assert all(torch.equal(before[key], after[key]) for key in kept)
    assert any(not torch.equal(before[key], after[key]) for key in before)
    assert "zeros kept" in (tmp_path / "out" / "README.md").read_text()


def test_a_killed_recovery_resumes_to_the_identical_result(model_folder, tmp_path):
    subprocess.run(recovering(model_folder, tmp_path / "whole"), check=True, capture_output=True)
    die = (
        "import os, sys; from dlpkit import journal; keep = journal.Journal.keep_state\n"
        "def last(self, tensors, facts):\n    keep(self, tensors, facts)\n    os._exit(9) if facts['done']['steps'] == 4 else None\n"
        "journal.Journal.keep_state = last\nfrom dlpkit.cli import main; sys.argv = ['dlpkit', *sys.argv[1:]]; main()"
    )
    arguments = recovering(model_folder, tmp_path / "out")[3:]
    assert subprocess.run([sys.executable, "-c", die, *arguments], capture_output=True, check=False).returncode == 9
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.partial", "whole"]
    other = subprocess.run(
        [*recovering(model_folder, tmp_path / "out"), "--rank", "4"], capture_output=True, text=True, check=False
    )
    assert other.returncode == 2
    assert "another rank" in other.stderr
    done = subprocess.run(recovering(model_folder, tmp_path / "out"), check=True, capture_output=True, text=True)
    assert "as saved, zeros kept" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
