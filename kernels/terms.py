"""What the kernels over scores share: see score.py for what a score is."""

import torch
import triton
import triton.language as tl

from dlpkit.kernels.score import Scores

INFINITE = tl.constexpr(
    0x7F800000
)  # the bits of infinity: a score has smaller ones, as an unsigned number NaN has larger


@triton.jit
def score_bits(w, row, col, mask, scale_ptr, row_ptr, column_ptr, SCALE: tl.constexpr, SHARES: tl.constexpr):
    """The scores of weights w as int32 of the same bits, which order as they do; row and col broadcast to w."""
    score = tl.abs(w.to(tl.float32))
    if SCALE:
        score = score * tl.load(scale_ptr + col, mask=mask, other=0.0)
    if SHARES:
        score = score * (tl.load(row_ptr + row) + tl.load(column_ptr + col, mask=mask, other=0.0))
    return score.to(tl.int32, bitcast=True)


def arguments(scores: Scores) -> tuple[tuple[torch.Tensor, ...], dict[str, bool]]:
    """The pointers and flags of score_bits; where a term is None its pointer is not read."""
    pointers = tuple(scores.weight if term is None else term for term in scores.terms)
    return pointers, {"SCALE": scores.scale is not None, "SHARES": scores.row is not None}
