"""Models of the shapes that people run, with random weights made, pruned and packed on the GPU one block at a time.

Nothing is downloaded, and the host never holds the model. What a step costs does not depend on what the weights say, only on how many.
"""

import torch
from accelerate import init_empty_weights
from shapes import sparse
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel, Qwen2Config

from dlpkit import archs
from dlpkit.packing import pack_block

STD = 0.02
CONFIGS = {
    "llama-2-7b": LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32, max_position_embeddings=4096, rms_norm_eps=1e-5,
    ),
    "llama-3-8b": LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=8192, rms_norm_eps=1e-5,
    ),
    "qwen2.5-7b": Qwen2Config(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, max_position_embeddings=32768, rms_norm_eps=1e-6,
    ),
    "smollm2-135m": LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, rms_norm_eps=1e-5, tie_word_embeddings=True,
    ),
}  # fmt: skip


def build(
    config: PretrainedConfig, pattern: str | None = None, format: str = "auto", device: torch.device | str = "cuda"
) -> PreTrainedModel:
    """A causal LM in bfloat16 whose blocks have `pattern`, packed in a format or as the dispatcher picks; without one, dense."""
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    arch = archs.of(model)
    torch.manual_seed(0)
    for index, block in enumerate(archs.blocks(model, arch)):
        for linear in archs.linears(block, arch).values():
            weight = sparse(tuple(linear.weight.shape), pattern or "0.0", seed=index, device=device)
            linear.weight = nn.Parameter(weight.mul_(STD), requires_grad=False)
        _fill(block, device)
        if pattern:
            pack_block(model, arch, index, format)
    _fill(model, device)
    model.tie_weights()
    return model.to(device)


def _fill(module: nn.Module, device: torch.device | str) -> None:
    """Real parameters for those on the meta device: norms are one, biases zero, embeddings random."""
    for parent in module.modules():
        for name, parameter in parent.named_parameters(recurse=False):
            if not parameter.is_meta:
                continue
            made = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
            made = made.normal_(0, STD) if made.ndim > 1 else made.fill_(float(name == "weight"))
            setattr(parent, name, nn.Parameter(made, requires_grad=False))
