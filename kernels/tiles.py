"""Lane grids of the packed formats: rows and segments of a slice, by shape and density. Read off benchmarks/tune.py on an H100.

A program walks one slice, rows * segments lanes, and 132 SMs want 128 programs or more. Beyond that the wider slice wins, because
the rows of a warp share the lines of x, until lanes get so short that their ends cost more than they hide.
"""

SMALLEST = 2**22  # weights; smaller layers are bound by latency, not by bytes


def lanes(N: int, K: int, density: float) -> tuple[int, int]:
    """(rows, segments) for a weight [N, K], powers of two."""
    rows = 32 if N > 8192 else 16 if N > 2048 else 8
    segments = 512 // rows if K <= 8192 or rows == 32 else 1024 // rows
    # values in a lane; a layer too small to win runs in sell when asked to, for its bytes: no short lanes, which pad more
    shortest = 64 if rows == 32 else 8 if N * K >= SMALLEST else 32
    while segments > 1 and K * density < shortest * segments:
        segments //= 2
    while rows > 1 and rows // 2 >= N:
        rows //= 2
    return rows, segments


def slack(K: int) -> float:
    """Room in the lanes of sell beyond even lengths, which packing spends on keeping the rows of a warp at the same columns."""
    return 0.03 if K > 8192 else 0.0


def nm_lanes(N: int, K: int, n: int, m: int, step: int) -> tuple[int, int]:
    """(rows, segments) for an N:M weight: every lane has the same number of whole steps, so fewer lanes where those would pad."""
    rows, segments = lanes(N, min(K, 8192), n / m)
    stored = -(-K // m) * n
    while segments > 1 and -(-stored // (segments * step)) * segments * step > 1.01 * stored:
        segments //= 2
    return rows, segments
