"""Gemma: Llama's layout, with embeddings tied and scaled."""

from dlpkit.archs.llama import ARCH as ARCH
