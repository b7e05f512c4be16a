"""Qwen 2 and 2.5: Llama's layout, with biases on q, k and v."""

from dlpkit.archs.llama import ARCH as ARCH
