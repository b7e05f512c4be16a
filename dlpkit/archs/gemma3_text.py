"""Gemma 3, text only: Gemma 2's layout, with a norm over each head of q and k."""

from dataclasses import replace

from dlpkit.archs import gemma2

ARCH = replace(gemma2.ARCH, norms=(*gemma2.ARCH.norms, "self_attn.q_norm", "self_attn.k_norm"))
