"""Lane grids of the packed formats: how many rows and how many segments of a row one program walks."""


def lanes(N: int, K: int, density: float) -> tuple[int, int]:
    """(rows, segments) of a slice for a weight [N, K]; both powers of two, chosen so that a lane holds at least 32 values."""
    rows, segments = 32, 16
    while segments > 1 and K * density < 32 * segments:
        segments //= 2
    while rows > 1 and rows // 2 >= N:
        rows //= 2
    return rows, segments
