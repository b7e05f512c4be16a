"""Which runtime layout a weight gets where it lives, and why."""

import torch


def choose(weight: torch.Tensor) -> tuple[str, str]:
    """[N, K] with zeros -> (format, reason in one sentence). Never a format whose kernel does not win on the weight's device."""
    if weight.device.type != "cuda":
        return (
            "dense",
            f"no sparse kernel runs on {weight.device.type}: packed weights are decoded to dense, smaller on disk only",
        )
    return (
        "dense",
        "no sparse kernel is measured on this GPU yet: packed weights are decoded to dense, smaller on disk only",
    )
