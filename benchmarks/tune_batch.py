"""Measure what the constants of kernels/batch.py decide, one at a time: times the microseconds that the kernel takes as it is.

    python benchmarks/tune_batch.py --rows out.jsonl [--shapes 14336x4096] [--patterns 0.8@256] [--batches 16 64] [--only share]

`share` is how programs share tiles: what JOIN and LATER choose between. A value below 1 is faster than what is chosen today.
`--warm` only compiles: kernels compile one after the other in a process, so run several of them, of other batches, before measuring.
"""

import argparse
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from bench_matmul import TOLERANCE, pinned
from quality import environment
from shapes import UNSTRUCTURED, sparse
from timing import copies, ring_length
from tune_paths import checked, sweep, timed

from dlpkit.kernels import batch
from dlpkit.kernels.formats import tile

PATTERNS = [f"{sparsity}@256" for sparsity in UNSTRUCTURED]
NEVER = 10**6
CONSTANTS = {
    "registers": [72, 80, 88, 96],
    "depth": [6, 8],
    "chunks": [2, 4],
    "share": {"whole": (NEVER, NEVER), "here": (-NEVER, NEVER), "later": (-NEVER, -1)},  # JOIN and LATER that choose it
}
AS_IS = "as it is"


def main() -> None:
    args = parse()
    where = environment(args.commit)
    for shape in args.shapes:
        for pattern in args.patterns:
            weight = sparse(shape, pattern)
            packed = tile.pack(weight)
            if args.warm:
                warm(packed, args.batches, args.only)
                continue
            ring = copies(packed, ring_length(packed.nbytes))
            for M in args.batches:
                found = list(measure(weight, ring, pattern, M, args.only))
                with args.rows.open("a") as file:
                    file.writelines(json.dumps(row | where) + "\n" for row in found)
                show(found)


def measure(weight: torch.Tensor, ring: list[tile.Tile], pattern: str, M: int, only: list[str]) -> Iterator[dict]:
    """Rows of one layer and M rows of x: as the constants are, then with each changed by itself."""
    for constant, value in settings(M, only):
        with changed(M, constant, value):
            row = timed("batch", weight, ring, pattern, M)
        assert row["error"] < TOLERANCE, f"{constant} {value}: relative error {row['error']}"
        yield {"bench": "tune_batch", "constant": constant, "value": value} | row


def warm(packed: tile.Tile, batches: list[int], only: list[str]) -> None:
    for M in batches:
        for constant, value in settings(M, only):
            with changed(M, constant, value), pinned("batch"):
                packed.matmul(torch.zeros(M, packed.K, device="cuda", dtype=torch.bfloat16))
    torch.cuda.synchronize()


def settings(M: int, only: list[str]) -> Iterator[tuple[str, int | str | None]]:
    yield AS_IS, None
    for constant in only:
        for value in CONSTANTS[constant]:
            if (constant, value, M) != ("chunks", 4, 128):  # more than shared memory holds
                yield constant, value


@contextmanager
def changed(M: int, constant: str, value: int | str | None) -> Iterator[None]:
    """Have the kernel multiply M rows of x, 16 to 128, with one of its constants changed."""
    with ExitStack() as stack:
        if constant == "registers":
            stack.enter_context(patch.dict(batch.REGISTERS, {M: value}))
        elif constant == "depth":
            stack.enter_context(patch.object(batch, "DEPTHS", (value, value)))
        elif constant == "chunks":
            stack.enter_context(patch.dict(batch.CHUNKS, {M: value}))
        elif constant == "share":
            join, later = CONSTANTS["share"][value]
            stack.enter_context(patch.dict(batch.JOIN, {M: join}))
            stack.enter_context(patch.object(batch, "LATER", later))
            batch.shares.cache_clear()
            stack.callback(batch.shares.cache_clear)
        yield


def show(found: list[dict]) -> None:
    first = found[0]
    line = [f"{row['constant']} {row['value']}: {row['us'] / first['us']:.3f}" for row in found[1:]]
    print(f"{first['N']:6} x {first['K']:5} {first['pattern']} {first['M']:4} rows of x, {first['us']:6.2f} us", "  ".join(line), flush=True)  # fmt: skip


def parse() -> argparse.Namespace:
    parser = sweep(__doc__)
    parser.set_defaults(patterns=PATTERNS)
    parser.add_argument("--batches", nargs="+", type=int, choices=batch.REGISTERS, default=list(batch.REGISTERS))
    parser.add_argument("--only", nargs="+", choices=CONSTANTS, default=list(CONSTANTS))
    return checked(parser)


if __name__ == "__main__":
    main()
