"""Blocks of a tile weight to dense tiles of shared memory, by threads that walk its lanes: see formats/tile.py for the layout.

A thread walks one lane. It reads 16 bytes of values and one word of gaps per step, four steps ahead, on into the next block and past
the last, and stores every value at its place of a tile [256 columns][64 rows]: one 128-byte line to a column, with the swizzle of 128 bytes that wgmma
reads, 16-byte chunk i of line l at i ^ (l % 8). The 32 rows of a warp lie in 32 different banks of a line, and as all of them stand
at about the same position their lines agree in l % 8: most stores meet no bank twice.

Positions are bytes, four to a word. One product by 0x01010101 sums the distances of four slots, and for position c = p * 32 + q, line 8 q + p,
seven more instructions make the two bytes of all four addresses:

    high    h q q q q q p2 p1     bits 15 to 8; h is 1 in the first of two tiles
    low     p0, chunk ^ p, row % 8, 0     bits 7, 6 to 4, 3 to 1

With h as the sign, addresses count from the end of the first tile. Triton does not see these stores: every barrier around them is
explicit, and the tiles must be the first shared allocation, which they are because they are the largest.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # Triton 3.7, 3.6
COLUMNS = gl.constexpr(256)  # of a block


def _step_ptx() -> str:
    """Eight values and their gaps to eight stores; $0 is the position after them, four times."""
    lines = [
        ".reg .b32 c, e, s, t, u, high, low, at; .reg .b16 v<8>;",
        "mov.b32 {v0, v1}, $1; mov.b32 {v2, v3}, $2; mov.b32 {v4, v5}, $3; mov.b32 {v6, v7}, $4; mov.b32 c, $6;",
    ]
    for half in range(2):
        lines += [
            f"shr.u32 e, $5, {4 * half}; and.b32 e, e, 0x0f0f0f0f; mad.lo.u32 c, e, $7, c;",
            "shl.b32 t, c, 2; shr.u32 s, c, 6; shr.u32 u, c, 1;",
            "and.b32 s, s, 0x03030303; xor.b32 s, s, $9; and.b32 high, t, 0x7c7c7c7c; or.b32 high, high, s;",
            "and.b32 u, u, 0x70707070; xor.b32 u, u, $8; and.b32 low, t, 0x80808080; xor.b32 low, low, u;",
        ]
        for j in range(4):
            bytes = j | (4 + j) << 4 | (12 + j) << 8 | (12 + j) << 12  # low, high, twice the sign of high
            lines.append(f"prmt.b32 at, low, high, {bytes}; add.u32 at, at, $10; st.shared.b16 [at], v{4 * half + j};")
        lines.append("prmt.b32 c, c, c, 0x3333;")
    return "{" + "\n".join([*lines, "mov.b32 $0, c;"]) + "}"


def _read_ptx(ahead: int) -> str:
    """The slots of a lane `ahead` steps on. Not .nc: such loads `_pin` would not hold."""
    return f"""ld.global.L1::no_allocate.v4.b32 {{$0, $1, $2, $3}}, [$5 + {2048 * ahead}];
        ld.global.L1::no_allocate.b32 $4, [$6 + {512 * ahead}];"""


def _zero_ptx(threads: int) -> str:
    """Sixteen times 16 bytes, so that all threads together clear their tiles."""
    stores = "".join(f"st.shared.v4.b32 [$1 + {16 * threads * i}], {{z, z, z, z}};" for i in range(16))
    return f"{{ .reg .b32 z; mov.b32 z, 0; {stores} mov.b32 $0, 0; }}"


def _extra_ptx(round: int) -> str:
    """Extra `round` of a thread and its place, if there is one."""
    return f"""{{ .reg .pred p; setp.gt.s32 p, $4, {128 * round};
        @p ld.global.nc.u16 $0, [$2 + {256 * round}]; @p ld.global.nc.u16 $1, [$3 + {256 * round}]; }}"""


def _put_ptx(round: int) -> str:
    return f"""{{ .reg .pred p; .reg .b16 v; .reg .b32 at; setp.gt.s32 p, $3, {128 * round};
        cvt.u16.u32 v, $1; shl.b32 at, $2, 1; add.u32 at, at, $4; @p st.shared.b16 [at], v; mov.b32 $0, 0; }}"""


STEP = gl.constexpr(_step_ptx())
READ0, READ1, READ2, READ3 = (gl.constexpr(_read_ptx(ahead)) for ahead in range(4))
ZERO4, ZERO8 = gl.constexpr(_zero_ptx(128)), gl.constexpr(_zero_ptx(256))
EXTRA0, EXTRA1, EXTRA2, EXTRA3 = (gl.constexpr(_extra_ptx(round)) for round in range(4))
PUT0, PUT1, PUT2, PUT3 = (gl.constexpr(_put_ptx(round)) for round in range(4))


@gluon.jit
def opaque(value):
    """The same, but the compiler cannot trace it: addresses made of it are computed where they are used and hold no register."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [value], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def walker(thread, TILE: gl.constexpr):
    """Of each thread: its lane, which 64 rows of tile number TILE it serves, and what its stores need.

    That is the position from which it starts, 1 or -1, the low and the high byte of its row, all four times in a word; the address
    from which those count, the first that the thread clears, and that of its 64 rows.
    """
    lane = thread % 128
    half = thread // 128
    row = lane % 32 * 2 + lane % 64 // 32
    up = lane < 64
    tiles = gl.inline_asm_elementwise("mov.u32 $0, global_smem;", "=r", [], dtype=gl.int32, is_pure=True, pack=1)
    tiles += TILE * 65536
    low = ((row // 8 * 16) | (row % 8 * 2)) * 0x01010101
    high = gl.where(half == 0, -0x7F7F7F80, 0)
    begin = gl.where(up, 0, -1)
    direction = gl.where(up, 0x01010101, -0x01010101)
    return lane, half, (begin, direction, low, high, tiles + 32768, tiles + thread * 16, tiles + half * 32768)


@gluon.jit
def find(starts_ptr, extra_starts_ptr, tile, b, atoms, B, half):
    """Where to read block b of a tile of 64 rows: steps and extras; of each lane the first step, the first extra and how many."""
    at = gl.minimum(tile * B + b, atoms * B - 1)
    first = gl.load(starts_ptr + at)
    extra = gl.load(extra_starts_ptr + at)
    more = gl.load(extra_starts_ptr + at + 1) - extra
    return gl.load(starts_ptr + at + 1) - first, more, first + half, extra + half, more + half


@gluon.jit
def _read(stream, AHEAD: gl.constexpr):
    PTX: gl.constexpr = READ0 if AHEAD == 0 else READ1 if AHEAD == 1 else READ2 if AHEAD == 2 else READ3
    return gl.inline_asm_elementwise(
        PTX, "=&r,=&r,=&r,=&r,=&r,l,l", [stream[0], stream[1]],
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32, gl.int32), is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _past(stream, steps):
    return stream[0] + steps * 512, stream[1] + steps * 128


@gluon.jit
def start(values_ptr, gaps_ptr, first, lane):
    """A lane's stream, (values, gaps) past what has been read, and its first four steps."""
    at = first.to(gl.int64) * 128 + lane
    stream = values_ptr + at * 4, gaps_ptr + at
    return _past(stream, 4), (_read(stream, 0), _read(stream, 1), _read(stream, 2), _read(stream, 3))


@gluon.jit
def _read_extra(at, left, PTX: gl.constexpr):
    return gl.inline_asm_elementwise(
        PTX, "=&r,=&r,l,l,r", [at[0], at[1], left], dtype=(gl.int32, gl.int32), is_pure=False, pack=1
    )


@gluon.jit
def read_extras(extras_ptr, places_ptr, extra, more, lane, ROUNDS: gl.constexpr):
    """The first one or four rounds of a block's extras with their places, and how many there are from this thread's first on."""
    at = extras_ptr + extra + lane, places_ptr + extra + lane
    left = more - lane
    if ROUNDS == 1:
        return (_read_extra(at, left, EXTRA0),), left
    else:
        return (
            _read_extra(at, left, EXTRA0), _read_extra(at, left, EXTRA1),
            _read_extra(at, left, EXTRA2), _read_extra(at, left, EXTRA3),
        ), left  # fmt: skip


@gluon.jit
def begin(
    values_ptr, gaps_ptr, extras_ptr, places_ptr, starts_ptr, extra_starts_ptr, unit, atoms, B, half, lane, ROUNDS: gl.constexpr
):  # fmt: skip
    """Of the first unit of a program with tiles of 64 rows: its tile, block and steps, stream and ring, and what `put_extras` wants."""
    tile = unit // B
    b = unit - tile * B
    steps, most, first, extra, more = find(starts_ptr, extra_starts_ptr, tile, b, atoms, B, half)
    stream, ring = start(values_ptr, gaps_ptr, first, lane)
    ahead, mine = read_extras(extras_ptr, places_ptr, extra, more, lane, ROUNDS)
    return tile, b, steps, stream, ring, (extra, most, ahead, mine)


@gluon.jit
def proceed(
    extras_ptr, places_ptr, starts_ptr, extra_starts_ptr, tile, b, live, atoms, B, half, lane, ROUNDS: gl.constexpr
):  # fmt: skip
    """The unit after block b of a tile, if need be of the next tile: tile, block, steps, and, if it is `live`, what `put_extras` wants."""
    b += 1
    tile = gl.where(b == B, tile + 1, tile)
    b = gl.where(b == B, 0, b)
    steps, most, _, extra, more = find(starts_ptr, extra_starts_ptr, tile, b, atoms, B, half)
    ahead, mine = read_extras(extras_ptr, places_ptr, extra, gl.where(live, more, 0), lane, ROUNDS)
    return tile, b, steps, (extra, most, ahead, mine)


@gluon.jit
def clear(me, NUM_WARPS: gl.constexpr):
    """Zeros to the tile, all threads together."""
    PTX: gl.constexpr = ZERO4 if NUM_WARPS == 4 else ZERO8
    gl.inline_asm_elementwise(PTX, "=r,r", [me[5]], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _put(extra, left, to, PTX: gl.constexpr):
    gl.inline_asm_elementwise(PTX, "=r,r,r,r,r", [extra[0], extra[1], left, to], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def put_extras(extras_ptr, places_ptr, extras, lane, me, ROUNDS: gl.constexpr):
    """Store a block's extras, those read ahead and any others. extras: each lane's first, the most of a half, those read ahead, how many
    there are from there on.
    """
    extra, most, ahead, left = extras
    to = me[6]
    _put(ahead[0], left, to, PUT0)
    if ROUNDS == 4:
        _put(ahead[1], left, to, PUT1)
        _put(ahead[2], left, to, PUT2)
        _put(ahead[3], left, to, PUT3)
    # opaque: Triton 3.6 and 3.7 drop what a loop carries if it is only the end of another loop
    for done in range(ROUNDS * 128, opaque(most), 128):
        value = gl.load(extras_ptr + extra + done + lane, mask=done < left, other=0).to(gl.int32)
        place = gl.load(places_ptr + extra + done + lane, mask=done < left, other=0).to(gl.int32)
        _put((value, place), left - done, to, PUT0)


@gluon.jit
def _step(c, slots, me):
    return gl.inline_asm_elementwise(
        STEP, "=&r,r,r,r,r,r,r,r,r,r,r",
        [slots[0], slots[1], slots[2], slots[3], slots[4], c, me[1], me[2], me[3], me[4]],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _pin():
    """Loads after it are issued here: ptxas would move them down to where their values are used, and wait there for memory."""
    gl.inline_asm_elementwise(
        "bar.warp.sync 0xffffffff; mov.b32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _read_four(stream):
    _pin()
    four = _read(stream, 0), _read(stream, 1), _read(stream, 2), _read(stream, 3)
    _pin()
    return four


@gluon.jit
def walk(stream, ring, steps, me):
    """Store all steps of a block, and read the four that follow."""
    c = me[0]
    for _ in range(0, steps // 8):
        for _ in gl.static_range(2):  # between two sets of registers
            # once four are there the next four are asked for: a multiprocessor cannot wait for the older of two loads alone
            c = _step(c, ring[0], me)
            more = _read_four(stream)
            c = _step(c, ring[1], me)
            c = _step(c, ring[2], me)
            c = _step(c, ring[3], me)
            ring = more
            stream = _past(stream, 4)
    if steps % 8 >= 4:
        c = _step(c, ring[0], me)
        r0 = _read(stream, 0)
        c = _step(c, ring[1], me)
        r1 = _read(stream, 1)
        c = _step(c, ring[2], me)
        r2 = _read(stream, 2)
        c = _step(c, ring[3], me)
        ring = r0, r1, r2, _read(stream, 3)
        stream = _past(stream, 4)
    rest = steps % 4
    if rest == 1:
        c = _step(c, ring[0], me)
        ring = ring[1], ring[2], ring[3], _read(stream, 0)
    elif rest == 2:
        c = _step(c, ring[0], me)
        c = _step(c, ring[1], me)
        ring = ring[2], ring[3], _read(stream, 0), _read(stream, 1)
    elif rest == 3:
        c = _step(c, ring[0], me)
        c = _step(c, ring[1], me)
        c = _step(c, ring[2], me)
        ring = ring[3], _read(stream, 0), _read(stream, 1), _read(stream, 2)
    return _past(stream, rest), ring
