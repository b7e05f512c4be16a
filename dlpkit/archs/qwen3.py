"""Qwen 3: Llama's layout, with a norm over each head of q and k."""

from dlpkit.archs.llama import ARCH as ARCH
