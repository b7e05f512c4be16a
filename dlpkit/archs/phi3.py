"""Phi-3 and Phi-4 mini: q, k, v in one Linear, gate and up in another."""

from dataclasses import replace

from dlpkit.archs import llama

ARCH = replace(llama.ARCH, qkv=("self_attn.qkv_proj",), mlp_in=("mlp.gate_up_proj",))
