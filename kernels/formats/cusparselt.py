"""2:4 sparsity for NVIDIA's cuSPARSELt: at most two of every four neighbours in a row are kept. For 512 rows of x or more.

    values  what the library makes of the weight: the kept values and 2 bits of position for each, in an order of its own

9 bits per weight. The bytes mean nothing to any other code, to another GPU or in another dtype, so the value stays where it was packed.
Where the library does not run (no NVIDIA GPU from Ampere on, not a 16-bit dtype, N or K no multiple of 16) a weight is packed as `nm`,
which holds the same in as many bytes and runs anywhere.

For scoring and long prompts: at few rows of x the library is mostly slower than cuBLAS on the dense weight (`algorithms.FEWEST`), and torch has
it plan every product anew, which takes the host half a millisecond to one. Outside CUDA graphs that is longer than most products up
to some thousands of rows of x, and what one waits for.
"""

from dataclasses import dataclass

import torch

from dlpkit.kernels.formats import Packed, nm
from dlpkit.kernels.formats._operator import ByOperator
from dlpkit.kernels.runtime import HAS_TRITON, use_cusparselt
from dlpkit.kernels.storage import check_matrix, check_two_of_four

if HAS_TRITON:
    from dlpkit.kernels import ops  # noqa: F401 (registers torch.ops.dlpkit)

DTYPES = torch.float16, torch.bfloat16
SIDE = 16  # N and K are multiples of


@dataclass(frozen=True)
class CuSparseLt(ByOperator):
    values: torch.Tensor  # N * K * 9 / 16 elements, dtype of the weight
    N: int
    K: int
    dtype: int  # of the values when they were packed, as an index of DTYPES: another one would misread them

    def _runs(self) -> bool:
        return True  # or `pack` made another format

    def _fields(self) -> tuple:
        packed, now = DTYPES[self.dtype], self.values.dtype
        if now != packed or not self.values.is_cuda:
            raise ValueError(
                f"a weight compressed by cuSPARSELt stays {packed} on its GPU, this one is {now} on {self.values.device}: "
                "unpack the model before you move or convert it"
            )
        return self.values, self.N, self.K


def pack(weight: torch.Tensor) -> Packed:
    """[N, K] -> CuSparseLt, or NM where the library does not run. Raises ValueError unless the weight is 2:4 sparse, and for one
    that the library would not give back bit for bit: with NaN, infinities or -0.0.
    """
    check_matrix(weight, "cusparselt")
    weight = weight.detach().contiguous()
    check_two_of_four(weight, "cusparselt")
    if not runs(*weight.shape, weight.dtype, weight.device):
        return nm.pack(weight)
    if not bool(weight.isfinite().all()) or bool((weight.view(torch.int16) == -(2**15)).any()):
        raise ValueError("cusparselt.pack wants finite weights without -0.0: add 0.0 to make -0.0 a plain zero")
    return CuSparseLt(torch._cslt_compress(weight), *weight.shape, DTYPES.index(weight.dtype))


def runs(N: int, K: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether cuSPARSELt multiplies by a weight [N, K]."""
    return dtype in DTYPES and N * K > 0 and N % SIDE == K % SIDE == 0 and use_cusparselt(device)
