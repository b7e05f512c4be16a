"""Gemma 2: Llama's layout, with norms before and after both halves and attention masks that alternate between layers."""

from dataclasses import replace

from dlpkit.archs import llama

ARCH = replace(
    llama.ARCH,
    attn_norms=("input_layernorm", "post_attention_layernorm"),
    mlp_norms=("pre_feedforward_layernorm", "post_feedforward_layernorm"),
)
