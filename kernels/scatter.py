"""Blocks of a tile weight to dense tiles of shared memory, by threads that walk its lanes: see formats/tile.py for the layout.

A thread walks one lane. It reads 16 bytes of values and one word of gaps per step, as many steps ahead as its ring holds, on into the
next block, and stores every value at its place of a tile [256 columns][64 rows]: one 128-byte line to a column, with the swizzle of 128
bytes that wgmma reads, 16-byte chunk i of line l at i ^ (l % 8). A lane stays in one place of all lines and so in one bank, and the 32 of
a warp have one each: however far they have come, no store waits for another.

Positions are lines, in bytes, four to a word. One product by 0x01010101 sums the distances of four slots, and a dot product takes each
of the four to its address. Triton does not see these stores: every barrier around them is explicit, and the tiles must be the first
shared allocation, which they are because they are the largest.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # Triton 3.7, 3.6
COLUMNS = gl.constexpr(256)  # of a block


def _step_ptx() -> str:
    """Eight values and their gaps to eight stores; $1 is the position before them, $0 that after them, four times."""
    lines = [
        ".reg .b32 c, e, at; .reg .b16 v<8>;",
        "mov.b32 {v0, v1}, $2; mov.b32 {v2, v3}, $3; mov.b32 {v4, v5}, $4; mov.b32 {v6, v7}, $5; mov.b32 c, $1;",
    ]
    for half in range(2):
        lines += [
            f"shr.u32 e, $6, {4 * half}; and.b32 e, e, 0x0f0f0f0f; mad.lo.u32 c, e, $7, c;",
        ]
        for j in range(4):
            lines.append(f"dp4a.u32.u32 at, c, {128 << 8 * j}, $8; st.shared.b16 [at], v{4 * half + j};")
        lines.append("prmt.b32 c, c, c, 0x3333;")
    return "{" + "\n".join([*lines, "mov.b32 $0, c;"]) + "}"


def _read_ptx() -> str:
    """A step of a lane into the registers where it stays, if $13 is positive; $12 is 128 times its number, plus the lane. Not .nc: such
    loads `_pin` would not hold.
    """
    return """{ .reg .pred p; .reg .b64 values, gaps; setp.gt.s32 p, $13, 0;
        mad.wide.s32 values, $12, 16, $10; mad.wide.s32 gaps, $12, 4, $11;
        @p ld.global.L1::no_allocate.v4.b32 {$0, $1, $2, $3}, [values];
        @p ld.global.L1::no_allocate.b32 $4, [gaps]; }"""


def _zero_ptx(threads: int) -> str:
    """Eight times 16 bytes, so that all threads together clear half of their tiles' columns."""
    at = [tile * 32768 + i for tile in range(threads // 128) for i in range(0, 16384, 16 * threads)]
    stores = "".join(f"st.shared.v4.b32 [$1 + {i}], {{z, z, z, z}};" for i in at)
    return f"{{ .reg .b32 z; mov.b32 z, 0; {stores} mov.b32 $0, 0; }}"


def _extras_ptx() -> str:
    """Four extras of a thread and their places, which are negative where there is none."""
    return """{ .reg .pred p; setp.gt.s32 p, $6, 0; mov.b32 $2, -1; mov.b32 $3, -1;
        @p ld.global.nc.L1::no_allocate.v2.b32 {$0, $1}, [$4]; @p ld.global.nc.L1::no_allocate.v2.b32 {$2, $3}, [$5]; }"""


def _put_ptx() -> str:
    lines = [".reg .pred p; .reg .b32 at; .reg .b16 v<4>, k<4>;"]
    for i in range(2):
        lines.append(f"mov.b32 {{v{2 * i}, v{2 * i + 1}}}, ${1 + i}; mov.b32 {{k{2 * i}, k{2 * i + 1}}}, ${3 + i};")
    for i in range(4):
        lines.append(f"setp.ge.s16 p, k{i}, 0; mad.wide.u16 at, k{i}, 2, $5; @p st.shared.b16 [at], v{i};")
    return "{" + "\n".join([*lines, "mov.b32 $0, 0;"]) + "}"


STEP = gl.constexpr(_step_ptx())
READ = gl.constexpr(_read_ptx())
ZERO4, ZERO8 = gl.constexpr(_zero_ptx(128)), gl.constexpr(_zero_ptx(256))
EXTRAS, PUT = gl.constexpr(_extras_ptx()), gl.constexpr(_put_ptx())
MORE = gl.constexpr(512)  # extras of 64 rows that their threads read at a time
TABLE = gl.constexpr("""{ .reg .b32 l; .reg .b64 at; mov.u32 l, %laneid; min.s32 l, l, $2; mul.wide.s32 at, l, 4; add.s64 at, at, $1;
    ld.global.b32 $0, [at]; }""")
OF_LANE = gl.constexpr("""{ .reg .pred p; .reg .b32 v; mov.u32 v, %laneid; setp.eq.u32 p, v, $2; selp.b32 v, $1, 0, p;
    redux.sync.max.u32 $0, v, 0xffffffff; }""")
ZERO_NOW = gl.constexpr("""{ .reg .pred p; .reg .b32 lanes; mov.u32 lanes, %laneid; setp.eq.u32 p, lanes, 0;
    vote.sync.ballot.b32 lanes, p, 0xffffffff; shr.u32 $0, lanes, 1; }""")


@gluon.jit
def opaque(value):
    """The same, but the compiler cannot trace it: addresses made of it are computed where they are used and hold no register."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [value], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def walker(thread, TILE: gl.constexpr):
    """Of each thread: its lane, which 64 rows of tile number TILE it serves, and what its stores need.

    That is the position from which it starts and 1 or -1, both four times in a word; the addresses of its place in line 0, of what it
    clears first, and of its 64 rows.
    """
    lane = thread % 128
    half = thread // 128
    place = lane % 32 * 2 + lane % 64 // 32
    up = lane < 64
    tiles = gl.inline_asm_elementwise("mov.u32 $0, global_smem;", "=r", [], dtype=gl.int32, is_pure=True, pack=1)
    tiles += TILE * 65536
    begin = gl.where(up, 0, -1)
    direction = gl.where(up, 0x01010101, -0x01010101)
    rows = tiles + half * 32768
    return lane, half, (begin, direction, rows + place * 2, tiles + thread * 16, rows)


@gluon.jit
def load_table(p, last):
    """The words p[0] to p[last], at most 32, one to a lane: a word that all lanes load, ptxas would wait for at once."""
    return gl.inline_asm_elementwise(TABLE, "=r,l,r", [p, last], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def of_lane(table, i):
    """Word i of a table, not negative, in a register that all lanes share."""
    return gl.inline_asm_elementwise(OF_LANE, "=r,r,r", [table, i], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def zero_now():
    """0, and ptxas does not know it: what needs it is not moved up to where it would wait for memory."""
    return gl.inline_asm_elementwise(ZERO_NOW, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def read_extras(extras_ptr, places_ptr, extra, more, lane):
    """Four of a block's extras for each of its threads, of `more` that begin with `extra`, with their places."""
    extra += lane * 4
    return gl.inline_asm_elementwise(
        EXTRAS, "=&r,=&r,=&r,=&r,l,l,r", [extras_ptr + extra, places_ptr + extra, more - lane * 4],
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _put(extras, me):
    gl.inline_asm_elementwise(
        PUT, "=r,r,r,r,r,r", [extras[0], extras[1], extras[2], extras[3], me[4]], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def clear(me, PART: gl.constexpr, NUM_WARPS: gl.constexpr):
    """Clear the first (0) or the last (1) 128 columns of the tile, all threads together."""
    PTX: gl.constexpr = ZERO4 if NUM_WARPS == 4 else ZERO8
    gl.inline_asm_elementwise(PTX, "=r,r", [me[3] + PART * 16384], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def put_first(extras, most, me):
    """Store what `read_extras` read of the next block. most: extras of the half that has more."""
    if most > 0:  # else ptxas computes the addresses, and so waits for memory, before the tile is cleared
        _put(extras, me)


@gluon.jit
def put_rest(extras_ptr, places_ptr, extra, more, most, lane, me):
    """Read and store a block's extras past the first MORE. most: those of the half that has more."""
    # opaque: Triton 3.6 and 3.7 drop what a loop carries if it is only the end of another loop
    for done in range(MORE, opaque(most), MORE):
        _put(read_extras(extras_ptr, places_ptr, extra + done, more - done, lane), me)


@gluon.jit
def _pin():
    """Loads are issued on their side of it. ptxas would move them down to where their values are used, and wait there for memory, or up
    before a step, whose own slots are then waited for with theirs.
    """
    gl.inline_asm_elementwise(
        "bar.warp.sync 0xffffffff; mov.b32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _read(slots, weight, at, there):
    """A step, if `there` is positive, into the registers of one that has been stored. weight: values and gaps."""
    _pin()
    slots = gl.inline_asm_elementwise(
        READ, "=r,=r,=r,=r,=r,0,1,2,3,4,l,l,r,r", slots + weight + (at, there),
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32, gl.int32), is_pure=False, pack=1,
    )  # fmt: skip
    _pin()
    return slots


@gluon.jit
def _step(c, slots, me):
    return gl.inline_asm_elementwise(
        STEP, "=&r,r,r,r,r,r,r,r,r", (c,) + slots + me[1:3], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def start(weight, at, steps, DEPTH: gl.constexpr):
    """A ring, which holds the first DEPTH steps of a block, or as many as it has. at: 128 times the first step, plus the lane."""
    ring = ()
    for i in gl.static_range(DEPTH):
        none = gl.zeros_like(at)
        ring = ring + (_read((none, none, none, none, none), weight, at + 128 * i, steps - i),)
    return ring


@gluon.jit
def walk(weight, at, ring, steps, next_at, next_steps, me):
    """Store all steps of a block, and read in their stead those that come after, at last the first of the next block. None moves up in
    the ring: to move what is on its way would be to wait for it.
    """
    DEPTH: gl.constexpr = len(ring)
    c = me[0]
    for done in range(0, gl.maximum(steps, 1), DEPTH):
        left = steps - done
        at += 128 * DEPTH
        more = left > DEPTH
        then, behind = gl.where(more, at, next_at), gl.where(more, left - DEPTH, next_steps)
        after = ()
        for i in gl.static_range(DEPTH):
            if left > i:
                c = _step(c, ring[i], me)
            after = after + (_read(ring[i], weight, then + 128 * i, behind - i),)
        ring = after
    return ring
