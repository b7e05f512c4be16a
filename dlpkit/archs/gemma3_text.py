"""Gemma 3, text only: Gemma 2's layout, with a norm over each head of q and k."""

from dlpkit.archs.gemma2 import ARCH as ARCH
