"""Tiny models built from configs, a byte tokenizer, the device, and torch.empty that is never zero by luck."""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers reads it: no test may download
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = (
        "1"  # before torch reads it: the workers have the cores, more threads wait for each other
    )

import hypothesis
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from dlpkit.kernels import crossover

hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True)
hypothesis.settings.load_profile("repeatable")

with torch.device("meta"):
    torch.empty(0)  # torch notes now what the context redirects, before `poisoned_empty` puts another function there

VOCABULARY = 260  # 256 bytes, one end-of-text token, and room

TINY = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": VOCABULARY, "max_position_embeddings": 256, "bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 256,
}  # fmt: skip
GEMMA = TINY | {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16}

CONFIGS = {
    "llama": TINY | {"tie_word_embeddings": True},
    "mistral": TINY | {"sliding_window": 8},
    "qwen2": TINY,
    "qwen3": TINY | {"head_dim": 16},
    "gemma": TINY | {"head_dim": 16},
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "phi3": TINY,
    "opt": {
        "hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": VOCABULARY,
        "max_position_embeddings": 256, "word_embed_proj_dim": 64, "bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 256,
    },
    "gpt_neox": {key: value for key, value in TINY.items() if key != "num_key_value_heads"},
}  # fmt: skip


def tiny_model(kind: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0, **changes):
    """A random causal LM of 3 blocks, with weights large enough for its logits to differ between tokens."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **(CONFIGS[kind] | changes))
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.normal_(0, 0.1)
    return model.eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, id of the end-of-text token 256."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")


def random_sparse(N: int, K: int, sparsity: float, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(N, K, generator=generator)
    return weight.masked_fill(torch.rand(N, K, generator=generator) < sparsity, 0.0).to(dtype)


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def pinned(monkeypatch):
    """pinned(kernel): from here on it multiplies, whichever was measured to be fastest."""
    return lambda kernel: monkeypatch.setattr(crossover, "fastest", lambda *of: crossover.Choice(kernel, 0.0, None))


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


@pytest.fixture
def tokens() -> torch.Tensor:
    """[6, 24] token ids."""
    return torch.randint(0, 256, (6, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A tiny dense bfloat16 Llama with its tokenizer, saved as an ordinary Hugging Face folder."""
    folder = tmp_path_factory.mktemp("dense") / "tiny"
    tiny_model("llama", torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch):
    """Memory that dlpkit asks for with torch.empty holds NaN or the largest integer: an element nobody wrote fails the test."""
    real = {name: getattr(torch, name) for name in ("empty", "empty_like")}

    def poisoned(name):
        def make(*args, **kwargs):
            made = real[name](*args, **kwargs)
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if caller.startswith("dlpkit") and made.device.type != "meta":
                made.fill_(
                    float("nan")
                    if made.is_floating_point()
                    else torch.iinfo(made.dtype).max
                    if made.dtype != torch.bool
                    else True
                )
            return made

        return make

    for name in real:
        monkeypatch.setattr(torch, name, poisoned(name))


def folder_bytes(folder: str | Path) -> int:
    """Bytes of all files below `folder`."""
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
