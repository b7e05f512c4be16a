"""Gemma 2: Llama's layout, with norms before and after both halves and attention masks that alternate between layers."""

from dataclasses import replace

from dlpkit.archs import llama

ARCH = replace(
    llama.ARCH,
    norms=("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
)
