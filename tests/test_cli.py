import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml

from dlpkit import cli

SMALL = ["--nsamples", "2", "--seqlen", "32", "--eval-windows", "2"]


@pytest.fixture
def run(monkeypatch, capsys):
    """The command line in this process -> exit code, stdout, stderr."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["dlpkit", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as exit:
            code = exit.code or 0
        captured = capsys.readouterr()
        return SimpleNamespace(code=code, out=captured.out, err=captured.err)

    return call


@pytest.fixture(scope="module")
def packed(model_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "packed"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "dlpkit",
            "prune",
            model_folder,
            out,
            "--sparsity",
            "2:4",
            "--allocation",
            "uniform",
            *SMALL,
        ],
        check=True,
        capture_output=True,
    )
    return out


def test_prune_reports_and_its_recipe_repeats_it(run, model_folder, tmp_path):
    first = run("prune", model_folder, tmp_path / "a", "--sparsity", 0.6, "--option", "alpha=0.1", *SMALL)
    assert first.code == 0, first.err
    assert "perplexity on builtin" in first.out
    assert "prune 3/3" in first.err
    again = run("prune", "--config", tmp_path / "a" / "recipe.yaml", tmp_path / "b")
    assert again.code == 0, again.err
    assert (tmp_path / "a" / "recipe.yaml").read_text() == (tmp_path / "b" / "recipe.yaml").read_text()
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    changed = run("prune", "-C", tmp_path / "a" / "recipe.yaml", tmp_path / "c", "--sparsity", 0.3)
    assert changed.code == 0
    assert yaml.safe_load((tmp_path / "c" / "recipe.yaml").read_text())["sparsity"] == "0.3"


def test_wandas_spellings(run, model_folder, tmp_path):
    found = run(
        "prune", "--model", model_folder, "--prune_method", "wanda_owl", "--sparsity_ratio", 0.5, "--sparsity_type", "unstructured",
        "--save_model", tmp_path / "out", "--seed", 0, *SMALL,
    )  # fmt: skip
    assert found.code == 0, found.err
    values = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert (values["criterion"], values["allocation"], values["sparsity"]) == ("wanda", "owl", "0.5")
    found = run(
        "prune",
        "--model",
        model_folder,
        "--sparsity_type",
        "2:4",
        "--sparsity_ratio",
        0.5,
        "--save_model",
        tmp_path / "nm",
        *SMALL,
    )
    assert yaml.safe_load((tmp_path / "nm" / "recipe.yaml").read_text())["sparsity"] == "2:4"


def test_pack_eval_generate_inspect(run, packed, tmp_path):
    assert run("pack", packed, tmp_path / "dense", "--to", "dense").code == 0
    assert "before" in run("pack", tmp_path / "dense", tmp_path / "again").out
    results = [
        json.loads(run("eval", folder, "--seqlen", 32, "--windows", 2).out) for folder in (packed, tmp_path / "dense")
    ]
    assert results[0]["perplexity"] == results[1]["perplexity"]
    once = run("generate", packed, "Once", "--tokens", 3, "--temperature", 2, "--top-k", 5, "--top-p", 0.9, "--seed", 1)
    assert once.out.startswith("Once")
    assert ("decoded eager: CUDA graphs want" in once.err) == (not torch.cuda.is_available())
    assert run("generate", packed, "Once", "upon a time", "--tokens", 3).out.count("\n\n") == 1
    assert (
        run("generate", packed, "Once", "--tokens", 3, "--dense-prefill").out
        == run("generate", packed, "Once", "--tokens", 3).out
    )
    assert "temperature above 0" in run("generate", packed, "Once", "--top-k", 5).err
    shown = run("inspect", packed)
    assert "| model.layers.2.mlp.down_proj | 64 x 96 | 0.5000 |" in shown.out
    assert "llama, packed" in shown.out
    everything = json.loads(run("inspect", packed, "--json").out)
    assert len(everything["linears"]) == 21
    assert "not packed" in run("inspect", tmp_path / "dense").out


def test_plan_and_follow_it(run, model_folder, tmp_path):
    small = ["--nsamples", 2, "--seqlen", 32]
    found = run(
        "plan", model_folder, tmp_path / "plan.json", "--structure", "blockpruner", "--remove", 2,
        "--structure-option", "mode=mlp", "--plot", tmp_path / "plan.svg", *small,
    )  # fmt: skip
    assert found.code == 0, found.err
    assert "| 1 | mlp of layer" in found.out
    assert (tmp_path / "plan.svg").read_text().startswith("<?xml")
    found = run("prune", model_folder, tmp_path / "out", "--structure", tmp_path / "plan.json", "--remove", 1, *SMALL)
    assert found.code == 0, found.err
    assert "has no mlp" in run("inspect", tmp_path / "out").out


def test_map_draws(run, model_folder, tmp_path):
    found = run("map", model_folder, tmp_path / "map.svg", "--nsamples", 8, "--seqlen", 32, "--batch-size", 4)
    assert found.code == 0, found.err
    assert (tmp_path / "map.svg").read_text().startswith("<?xml")
    assert run("map", model_folder, tmp_path / "no.svg", "--seqlen", 32, "--batch-size", 2).code == 2


def test_doctor_says_what_will_run(run):
    found = run("doctor")
    assert found.code == 0
    for word in ("torch:", "triton:", "sparse kernels:", "because:"):
        assert word in found.out


def test_doctor_says_which_kernel_each_linear_runs(run, packed):
    found = run("doctor", packed, "--runtime", "nm", "--device", "cpu")
    assert found.code == 0, found.err
    assert "| model.layers.*.self_attn.k_proj | 3 | 128 x 64 | nm | 1 to 8192 | reference | Triton's" in found.out
    assert "| model.layers.*.mlp.down_proj | 3 | 64 x 96 | nm |" in found.out
    assert "| dense | 1 to 8192 | torch |" in run("doctor", packed, "--runtime", "dense", "--device", "cpu").out
    assert run("doctor", packed, "--batch", 0).code == 2


def test_bench_wants_a_gpu_and_a_known_name(run, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for arguments, message in [
        (["kernels"], "want an NVIDIA GPU"),
        (["tokens", "llama-3-8b", "--batches", "1"], "want an NVIDIA GPU"),
        (["everything"], "kernels and tokens, got 'everything'"),
    ]:
        found = run("bench", *arguments)
        assert found.code == 2
        assert message in found.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sparsity", "1.5"], "0 <= sparsity < 1"),
        (["--sparsity", "4:2"], "0 < N <= M"),
        (["--sparsity", "2:5"], "not a multiple of 5"),
        (["--criterion", "magic"], "choose one of magnitude"),
        (["--option", "beta=1"], "does not take beta"),
        (["--text", "nowhere.txt"], "no text file"),
        (["--seqlen", "4096"], "at most 256 tokens"),
        (["--nsamples", "0"], "greater than or equal to 1"),
        (["--config", "nowhere.yaml"], "cannot read the recipe"),
    ],
)
def test_usage_errors_end_with_2_and_leave_nothing(run, arguments, message, model_folder, tmp_path):
    found = run("prune", model_folder, tmp_path / "out", *SMALL, *arguments)
    assert found.code == 2
    assert message in found.err
    assert "Traceback" not in found.err
    assert list(tmp_path.iterdir()) == []


def test_models_that_are_none(run, packed, tmp_path):
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    for model, message in [
        (tmp_path / "none", "no model folder at"),
        (tmp_path / "bert", "is a 'bert' model: dlpkit prunes the causal LMs gemma, gemma2"),
        (packed, "quantized or packed already"),
        ("no-such-org/no-such-model", "cannot load no-such-org/no-such-model"),
    ]:
        found = run("prune", model, tmp_path / "out", *SMALL)
        assert found.code == 2, model
        assert message in found.err
    for command in (
        ["inspect", tmp_path / "none"],
        ["eval", "no-such-org/no-such-model"],
        ["generate", tmp_path / "none", "x"],
    ):
        assert run(*command).code == 2
    assert "at most 256 tokens" in run("eval", packed).err
    assert run("prune", packed).code == 2
    assert not (tmp_path / "out").exists()


def test_an_existing_output_is_kept(run, model_folder, packed):
    found = run("prune", model_folder, packed, *SMALL)
    assert found.code == 2
    assert "--overwrite" in found.err
