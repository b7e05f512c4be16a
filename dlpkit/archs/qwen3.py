"""Qwen 3: Llama's layout, with a norm over each head of q and k."""

from dataclasses import replace

from dlpkit.archs import llama

ARCH = replace(llama.ARCH, norms=(*llama.ARCH.norms, "self_attn.q_norm", "self_attn.k_norm"))
