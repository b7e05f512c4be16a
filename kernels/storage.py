"""The one layout on disk: a bitmask, the nonzero values row by row, and where each row starts.

    weight  [N, K]   2 0 0 -1      mask     [N, ceil(K / 8)] uint8, bit j of byte b is column 8 b + j   0b1001
                     0 3 0  0                                                                          0b0010
                                   values   [nnz], row-major                                            2 -1 3
                                   offsets  [N + 1], row n is values[offsets[n] : offsets[n + 1]]       0 2 3

1 + 16 d bits per 16-bit weight of density d: 9.0 / 7.4 / 5.8 / 4.2 at 50 / 60 / 70 / 80 %. Independent of device and of tile
sizes, and cut by rows or by columns without decoding values. A weight is stored when any of its bits is set, so -0.0 survives.
"""

from dataclasses import dataclass

import torch

from dlpkit.kernels.runtime import HAS_TRITON, use_triton

if HAS_TRITON:
    from dlpkit.kernels import compact

CHUNK = 2**22  # weights counted at a time: torch counts through 8 bytes for each
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes per value -> integer of that width


@dataclass(frozen=True)
class Stored:
    shape: tuple[int, int]  # (N, K) of the dense weight
    values: torch.Tensor  # [nnz], dtype of the weight
    mask: torch.Tensor  # [N, ceil(K / 8)] uint8, little-endian bits
    offsets: torch.Tensor  # [N + 1] int32, or int64 past 2**31 - 1 values

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.mask.nbytes + self.offsets.nbytes


def encode(weight: torch.Tensor) -> Stored:
    """[N, K] of any float dtype -> Stored on the same device. Raises ValueError for other ranks."""
    if weight.ndim != 2:
        raise ValueError(f"storage.encode wants a weight [N, K], got shape {tuple(weight.shape)}")
    weight = weight.detach().contiguous()
    if not use_triton(weight) or not weight.numel():
        return encode_ref(weight)
    values, mask, offsets = compact.encode(weight.view(BITS[weight.element_size()]))
    return Stored(tuple(weight.shape), values.view(weight.dtype), mask, offsets.to(offset_dtype(values.numel())))


def encode_ref(weight: torch.Tensor) -> Stored:
    N, K = weight.shape
    keep = held(weight)  # [N, K]
    counts = keep.sum(1)  # [N] int64
    nnz = int(counts.sum())
    offsets = torch.zeros(N + 1, dtype=offset_dtype(nnz), device=weight.device)
    offsets[1:] = counts.cumsum(0)
    padded = torch.nn.functional.pad(keep.to(torch.uint8), (0, -K % 8)).view(N, -(-K // 8), 8)  # [N, ceil(K / 8), 8]
    place = 1 << torch.arange(8, dtype=torch.uint8, device=weight.device)
    return Stored((N, K), weight[keep], (padded * place).sum(2, dtype=torch.uint8), offsets)


def decode(stored: Stored) -> torch.Tensor:
    """Stored -> [N, K], bit for bit what was encoded."""
    parts = [part.contiguous() for part in (stored.values, stored.mask, stored.offsets)]
    if not use_triton(*parts) or not stored.mask.numel():
        return decode_ref(stored)
    values, *where = parts
    return compact.decode(values.view(BITS[values.element_size()]), *where, stored.shape[1]).view(values.dtype)


def decode_ref(stored: Stored) -> torch.Tensor:
    out = torch.zeros(stored.shape, dtype=stored.values.dtype, device=stored.values.device)
    return out.masked_scatter_(unpack_mask(stored.mask, stored.shape[1]), stored.values)


def held(weight: torch.Tensor) -> torch.Tensor:
    """[N, K] contiguous -> bool, whether a weight has any bit set: all but +0.0."""
    return weight.view(BITS[weight.element_size()]) != 0


def count(weight: torch.Tensor) -> int:
    """How many values of [N, K] a Stored would hold."""
    parts = weight.detach().contiguous().view(BITS[weight.element_size()]).flatten().split(CHUNK)
    return int(torch.stack([torch.count_nonzero(part) for part in parts]).sum()) if weight.numel() else 0


def check_matrix(weight: torch.Tensor, format: str) -> None:
    """Raise ValueError unless the weight is [N, K], with rows and columns."""
    if weight.ndim != 2 or not weight.numel():
        raise ValueError(f"{format}.pack wants a weight [N, K] with rows and columns, got shape {tuple(weight.shape)}")


def check_two_of_four(weight: torch.Tensor, format: str) -> None:
    """Raise ValueError if [N, K], contiguous, holds more than two weights in a group of four neighbours of a row."""
    keep = torch.nn.functional.pad(held(weight), (0, -weight.shape[1] % 4))
    most = int(keep.view(-1, 4).sum(1, dtype=torch.uint8).max())
    if most > 2:
        raise ValueError(f"{format}.pack wants a weight that is 2:4 sparse, this one keeps {most} of 4 somewhere")


def unpack_mask(mask: torch.Tensor, K: int) -> torch.Tensor:
    """[N, ceil(K / 8)] uint8 -> [N, K] bool."""
    place = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return ((mask[:, :, None] >> place) & 1).flatten(1)[:, :K].bool()


def stored_bytes(shape: tuple[int, int], nnz: int, itemsize: int) -> int:
    """Bytes of a Stored with `nnz` values of `itemsize` bytes each, without making one."""
    N, K = shape
    return nnz * itemsize + N * -(-K // 8) + (N + 1) * offset_dtype(nnz).itemsize


def offset_dtype(nnz: int) -> torch.dtype:
    return torch.int32 if nnz < 2**31 else torch.int64


def validate(stored: Stored, name: str = "weight") -> None:
    """Raise ValueError, naming the weight, unless mask, values and offsets describe one [N, K] matrix. Call it on anything read."""
    N, K = stored.shape
    values, mask, offsets = stored.values, stored.mask, stored.offsets
    if mask.dtype != torch.uint8 or tuple(mask.shape) != (N, -(-K // 8)):
        raise ValueError(f"{name}: mask should be uint8 {(N, -(-K // 8))}, found {mask.dtype} {tuple(mask.shape)}")
    if values.ndim != 1 or not values.is_floating_point():
        raise ValueError(f"{name}: values should be a float vector, found {values.dtype} {tuple(values.shape)}")
    if offsets.dtype not in (torch.int32, torch.int64) or tuple(offsets.shape) != (N + 1,):
        raise ValueError(
            f"{name}: offsets should be int32 or int64 ({N + 1},), found {offsets.dtype} {tuple(offsets.shape)}"
        )
    if K % 8 and bool((mask[:, -1] >> (K % 8)).any()):
        raise ValueError(f"{name}: mask has bits set past column {K}; the file is damaged")
    counts = _ones(mask).sum(1)
    if int(offsets[0]) != 0 or int(offsets[-1]) != values.numel() or not torch.equal(offsets.diff().long(), counts):
        raise ValueError(f"{name}: mask, offsets and {values.numel()} values disagree; the file is damaged")


def _ones(octets: torch.Tensor) -> torch.Tensor:
    """uint8 -> uint8, the bits that are set in each."""
    pairs = octets - ((octets >> 1) & 0x55)
    fours = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return (fours + (fours >> 4)) & 0x0F
