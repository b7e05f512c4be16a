"""Mistral: Llama's layout, with sliding-window attention in some sizes."""

from dlpkit.archs.llama import ARCH as ARCH
