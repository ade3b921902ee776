"""A tick (engine.py) in Triton kernels; engine_tick.py launches them.

Of one row it is six of them, all but attention bound by the weights that they read:

    _qkv        injection, norm, gain -> query, key, value     _gate_up    norm, gain -> SwiGLU product
    _attend     norm, rotation, cache write, attention         _down       SwiGLU product -> state
    _output     sum of the attention's parts -> residual       _head       Graves' rule; logits; the next token

Vectors between them are float32; norms are worked out again by every program that needs them, as a vector of the
model's width is nothing beside a tile of weights. Weights are in any float type; FP8 ones have a scale for every row.
Where the GPU can (`EARLY`), a kernel starts beside the one before it, reads its first weights, and waits.

Of several rows a library's matrix products read the weights, and what lies between two of them is one kernel with a
program for every row: `_enter`, `_attend` and `_merge`, `_residual`, SwiGLU (kernels.py), `_residual`, `_halt`, and
`_pick` and `_next` behind the head. Where the token has not halted, nothing is drawn (of one row there are no logits,
either), so the host is never asked.
"""

from types import SimpleNamespace

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:  # PyTorch for the CPU comes without
    triton, tl, jit = None, SimpleNamespace(constexpr=None), lambda function: function

if triton:
    from kernels import _limited

EPSILON = tl.constexpr(1.1920929e-07) if triton else None  # of F.rms_norm: that of float32
# In static_range its quotient is written out: to the Triton 3.6 of torch 2.11 tl.cdiv is no constant.
CHUNK = tl.constexpr(256) if triton else None  # columns that a warp reads of a row at once, in bf16 16 bytes a lane


@jit
def _wait(EARLY: tl.constexpr):
    """Let the next kernel start, and wait for the end of the one before. Read before this what no kernel writes."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@jit
def _settled(EARLY: tl.constexpr):
    """The other way round, in the first kernel of a tick: the one that follows, `_attend` or a product with it behind,
    starts when all that the last tick wrote is there."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@jit
def _vector(pointer, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    return tl.load(pointer + column, mask=column < SIZE, other=0.0).to(tl.float32)


@jit
def _scale(x, SIZE: tl.constexpr):
    """By which a vector's norm multiplies it."""
    return tl.rsqrt(tl.sum(x * x, 0) / SIZE + EPSILON)


@jit
def _norm(x, SIZE: tl.constexpr):
    return x * _scale(x, SIZE)


@jit
def _part(pointer, i, SIZE: tl.constexpr, WARPS: tl.constexpr):
    """The i-th chunk of a vector, once for every warp (WARPS, CHUNK): read so, it is where the weights are."""
    column = i * CHUNK + tl.arange(0, CHUNK)[None, :] + tl.zeros((WARPS, 1), tl.int32)
    return tl.load(pointer + column, mask=column < SIZE, other=0.0).to(tl.float32)


@jit
def _rows(program, group, GROUPS: tl.constexpr, WARPS: tl.constexpr):
    """One row of a matrix for every warp."""
    return (program * GROUPS + group) * WARPS + tl.arange(0, WARPS)


@jit
def _tile(weight, row, rows, SIZE: tl.constexpr):
    """Rows (WARPS,) of a matrix (rows, SIZE): a tuple of chunks (WARPS, CHUNK)."""
    tile = ()
    for i in tl.static_range((SIZE + CHUNK - 1) // CHUNK):
        column = i * CHUNK + tl.arange(0, CHUNK)
        inside = (row < rows)[:, None] & (column < SIZE)[None, :]
        at = row.to(tl.int64)[:, None] * SIZE + column[None, :]
        tile = tile + (tl.load(weight + at, mask=inside, other=0.0),)
    return tile


@jit
def _tiles(weight, program, rows, SIZE: tl.constexpr, GROUPS: tl.constexpr, WARPS: tl.constexpr):
    """All rows of a program: in registers, as they are read before there is a vector to multiply them with."""
    tiles = ()
    for group in tl.static_range(GROUPS):
        tiles = tiles + (_tile(weight, _rows(program, group, GROUPS, WARPS), rows, SIZE),)
    return tiles


@jit
def _times(tile, y, scale, row, rows, SCALED: tl.constexpr):
    """A `_tile` times a vector, a tuple of chunks (WARPS, CHUNK) or (1, CHUNK)."""
    total = tile[0].to(tl.float32) * y[0]
    for i in tl.static_range(1, len(y)):
        total += tile[i].to(tl.float32) * y[i]
    product = tl.sum(total, 1)
    if SCALED:
        product *= tl.load(scale + row, mask=row < rows, other=0.0)
    return product


@jit
def _of_step(pointer, step, rows, SIZE: tl.constexpr, OWN: tl.constexpr, EARLY: tl.constexpr):
    """Where the weights of the step are, if each has its own: known only behind the wait."""
    if OWN:
        if EARLY:
            tl.extra.cuda.gdc_wait()
        pointer += tl.load(step).to(tl.int64) * rows * SIZE
    return pointer


@jit
def _turn(position, frequency, turn, row, HALF: tl.constexpr):
    """Leave cos and sin (2, HALF) of a row's rotation."""
    lane = tl.arange(0, HALF)
    turns = tl.load(position + row).to(tl.float64) * (tl.load(frequency + lane) * 0.15915494309189535)
    angle = ((turns - tl.floor(turns)) * 6.283185307179586).to(tl.float32)
    tl.store(turn + row * (2 * HALF) + lane, tl.cos(angle))
    tl.store(turn + row * (2 * HALF) + HALF + lane, tl.sin(angle))


@jit
def _enter(
    h, e, step, inject, gains, position, frequency, turn, x, y,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, HALF: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """x: with the injection; y: its norm and gain, what the projection to query, key and value reads."""
    _settled(EARLY)
    _turn(position, frequency, turn, tl.program_id(0), HALF)
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    n, at = tl.load(step + row), row * WIDTH
    u = tl.load(inject + 2 * n) * _norm(_vector(h + at, WIDTH, BLOCK), WIDTH)
    u += tl.load(inject + 2 * n + 1) * _vector(e + at, WIDTH, BLOCK)
    normed = _norm(u, WIDTH) * _vector(gains + 4 * n * WIDTH, WIDTH, BLOCK)
    tl.store(x + at + column, u, mask=column < WIDTH)
    tl.store(y + at + column, normed.to(y.dtype.element_ty), mask=column < WIDTH)


@jit
def _qkv(
    h, e, step, inject, gains, position, frequency, turn, weight, scale, qkv, x, out, remainder, before, rest,
    steps_before, rows,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, HALF: tl.constexpr, GROUPS: tl.constexpr, WARPS: tl.constexpr,
    SCALED: tl.constexpr, OWN: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The last program leaves what others need: x, the state with the injection; the rotation; and for `_head` the
    state before this tick."""
    program = tl.program_id(0)
    tiles = _tiles(_of_step(weight, step, rows, WIDTH, OWN, EARLY), program, rows, WIDTH, GROUPS, WARPS)
    _settled(EARLY)
    n = tl.load(step)
    a, b, gains = tl.load(inject + 2 * n), tl.load(inject + 2 * n + 1), gains + 4 * n * WIDTH
    a *= _scale(_vector(h, WIDTH, BLOCK), WIDTH)
    u = a * _vector(h, WIDTH, BLOCK) + b * _vector(e, WIDTH, BLOCK)
    if program == tl.num_programs(0) - 1:
        _turn(position, frequency, turn, 0, HALF)
        column = tl.arange(0, BLOCK)
        tl.store(x + column, u, mask=column < WIDTH)
        tl.store(before + column, _vector(out, WIDTH, BLOCK), mask=column < WIDTH)
        tl.store(rest, tl.load(remainder))
        tl.store(steps_before, n)
    else:
        by, y = _scale(u, WIDTH), ()
        for i in tl.static_range((WIDTH + CHUNK - 1) // CHUNK):
            part = a * _part(h, i, WIDTH, WARPS) + b * _part(e, i, WIDTH, WARPS)
            y = y + (part * by * _part(gains, i, WIDTH, WARPS),)
        scale = _of_step(scale, step, rows, 1, OWN, EARLY)
        for group in tl.static_range(GROUPS):
            row = _rows(program, group, GROUPS, WARPS)
            tl.store(qkv + row, _times(tiles[group], y, scale, row, rows, SCALED), mask=row < rows)


@jit
def _rotated(pointer, c, s, HALF: tl.constexpr):
    lane = tl.arange(0, HALF)
    a, b = tl.load(pointer + lane).to(tl.float32), tl.load(pointer + HALF + lane).to(tl.float32)
    r = tl.rsqrt((tl.sum(a * a, 0) + tl.sum(b * b, 0)) / (2 * HALF) + EPSILON)
    a, b = a * r, b * r
    return a * c - b * s, a * s + b * c


@jit
def _attend(
    qkv, turn, keys, values, step, position, first, acc, high, total, rows, H, M, slots,
    HALF: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One head of one row, over a PARTS-th of the keys. acc: (R, H, PARTS, d), high and total (R, H, PARTS). Every key
    of a tile has a softmax of its own, with those of the tiles that follow, until the end.

    What is read before the wait, keys too, is of earlier ticks (`_settled`); the L1 cache need not know it yet."""
    row, head, part = tl.program_id(0) // H, tl.program_id(0) % H, tl.program_id(1)
    lane, row_size = tl.arange(0, HALF), H * (2 * HALF)
    p = tl.load(position + row, cache_modifier=".cg")
    n = tl.minimum(tl.load(step + row, cache_modifier=".cg"), slots - 1)
    # tokens before this one; remainders of 64 bits take long
    visible = (p - tl.load(first + row, cache_modifier=".cg")).to(tl.int32)
    column, end = (p % M).to(tl.int32), tl.minimum(p + 1, M).to(tl.int32)  # behind the end nothing has been written
    own = (n * rows + row).to(tl.int64) * M * row_size + head * (2 * HALF)
    j = part * TILE + tl.arange(0, TILE)
    seen = _seen(j, column, visible, end, M)
    k_a, k_b = _halves(keys + own, j, seen, row_size, HALF)
    v_a, v_b = _halves(values + own, j, seen, row_size, HALF)
    _wait(EARLY)
    c, s = tl.load(turn + row * (2 * HALF) + lane), tl.load(turn + row * (2 * HALF) + HALF + lane)
    qkv += (row * 3 * H + head) * (2 * HALF)
    q_a, q_b = _rotated(qkv, c, s, HALF)
    new_a, new_b = _rotated(qkv + row_size, c, s, HALF)
    value_a = tl.load(qkv + 2 * row_size + lane).to(tl.float32)
    value_b = tl.load(qkv + 2 * row_size + HALF + lane).to(tl.float32)
    scale = 1.4426950408889634 / tl.sqrt(2.0 * HALF)  # scores in units of log2
    q_a, q_b = q_a * scale, q_b * scale
    high_, sum_ = tl.full((TILE,), -1e30, tl.float32), tl.zeros((TILE,), tl.float32)
    acc_a, acc_b = tl.zeros((TILE, HALF), tl.float32), tl.zeros((TILE, HALF), tl.float32)
    for _ in range(part * TILE, end, PARTS * TILE):
        score = tl.sum(k_a.to(tl.float32) * q_a[None, :] + k_b.to(tl.float32) * q_b[None, :], 1)
        score = tl.where(seen, score, -1e30)
        higher = tl.maximum(high_, score)
        weight, shrink = tl.where(seen, tl.exp2(score - higher), 0.0), tl.exp2(high_ - higher)
        acc_a = acc_a * shrink[:, None] + weight[:, None] * v_a.to(tl.float32)
        acc_b = acc_b * shrink[:, None] + weight[:, None] * v_b.to(tl.float32)
        sum_, high_ = sum_ * shrink + weight, higher
        j += PARTS * TILE
        seen = _seen(j, column, visible, end, M)
        k_a, k_b = _halves(keys + own, j, seen, row_size, HALF)
        v_a, v_b = _halves(values + own, j, seen, row_size, HALF)
    highest = tl.max(high_, 0)
    if part == 0:
        highest = tl.maximum(highest, tl.sum(q_a * new_a + q_b * new_b, 0))
    share = tl.exp2(high_ - highest)
    sum_ = tl.sum(sum_ * share, 0)
    found_a, found_b = tl.sum(acc_a * share[:, None], 0), tl.sum(acc_b * share[:, None], 0)
    if part == 0:  # this token: read from registers, and written
        weight_ = tl.exp2(tl.sum(q_a * new_a + q_b * new_b, 0) - highest)
        sum_, found_a, found_b = sum_ + weight_, found_a + weight_ * value_a, found_b + weight_ * value_b
        for slot in range(n, slots):
            at = ((slot * rows + row).to(tl.int64) * M + column) * row_size + head * (2 * HALF) + lane
            tl.store(keys + at, new_a.to(keys.dtype.element_ty))
            tl.store(keys + at + HALF, new_b.to(keys.dtype.element_ty))
            tl.store(values + at, value_a.to(values.dtype.element_ty))
            tl.store(values + at + HALF, value_b.to(values.dtype.element_ty))
    index = tl.program_id(0) * PARTS + part
    tl.store(acc + index * (2 * HALF) + lane, found_a)
    tl.store(acc + index * (2 * HALF) + HALF + lane, found_b)
    tl.store(high + index, highest)
    tl.store(total + index, sum_)


@jit
def _seen(j, column, visible, end, M):
    behind = tl.where(j <= column, column - j, column - j + M)
    return (j < end) & (behind > 0) & (behind <= visible)


@jit
def _halves(pointer, j, seen, row_size, HALF: tl.constexpr):
    """Keys or values (TILE, 2 HALF) of a head, as two."""
    at = j.to(tl.int64)[:, None] * row_size + tl.arange(0, HALF)[None, :]
    a = tl.load(pointer + at, mask=seen[:, None], other=0.0, cache_modifier=".cg")
    return a, tl.load(pointer + at + HALF, mask=seen[:, None], other=0.0, cache_modifier=".cg")


@jit
def _merged(acc, high, total, i, WIDTH: tl.constexpr, HEAD: tl.constexpr, PARTS: tl.constexpr):
    """The i-th chunk of what a row's heads found, of the parts that `_attend` leaves."""
    head, lane = i * (CHUNK // HEAD) + tl.arange(0, CHUNK // HEAD), tl.arange(0, HEAD)
    inside = head < WIDTH // HEAD
    highest = tl.load(high + head * PARTS, mask=inside, other=0.0)
    for part in tl.static_range(1, PARTS):
        highest = tl.maximum(highest, tl.load(high + head * PARTS + part, mask=inside, other=0.0))
    found, sum_ = tl.zeros((CHUNK // HEAD, HEAD), tl.float32), tl.zeros((CHUNK // HEAD,), tl.float32)
    for part in tl.static_range(PARTS):
        place = head * PARTS + part
        share = tl.exp2(tl.load(high + place, mask=inside, other=0.0) - highest)
        values = tl.load(acc + (place * HEAD)[:, None] + lane[None, :], mask=inside[:, None], other=0.0)
        found += share[:, None] * values
        sum_ += share * tl.load(total + place, mask=inside, other=1.0)
    return tl.reshape(found / sum_[:, None], (CHUNK,))


@jit
def _merge(acc, high, total, y, WIDTH: tl.constexpr, HEAD: tl.constexpr, PARTS: tl.constexpr, EARLY: tl.constexpr):
    _wait(EARLY)
    row, i = tl.program_id(0), tl.program_id(1)
    first, column = row * (WIDTH // HEAD) * PARTS, i * CHUNK + tl.arange(0, CHUNK)
    found = _merged(acc + first * HEAD, high + first, total + first, i, WIDTH, HEAD, PARTS)
    tl.store(y + row * WIDTH + column, found.to(y.dtype.element_ty), mask=column < WIDTH)


@jit
def _residual(
    x, branch, step, gains, z, y,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, GAIN: tl.constexpr, NORM: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """z = x + a gain of the step times what a branch gave; y: its norm and the next gain, if NORM."""
    _wait(EARLY)
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    inside, at = column < WIDTH, row * WIDTH
    gains += (4 * tl.load(step + row) + GAIN) * WIDTH
    u = _vector(x + at, WIDTH, BLOCK) + _vector(gains, WIDTH, BLOCK) * _vector(branch + at, WIDTH, BLOCK)
    tl.debug_barrier()  # all warps have read what is written now: z may be x
    tl.store(z + at + column, u, mask=inside)
    if NORM:
        normed = _norm(u, WIDTH) * _vector(gains + WIDTH, WIDTH, BLOCK)
        tl.store(y + at + column, normed.to(y.dtype.element_ty), mask=inside)


@jit
def _output(
    acc, high, total, x, step, gains, weight, scale, y, rows,
    WIDTH: tl.constexpr, HEAD: tl.constexpr, PARTS: tl.constexpr, GROUPS: tl.constexpr, WARPS: tl.constexpr,
    SCALED: tl.constexpr, OWN: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    program, found, read = tl.program_id(0), (), ()
    tiles = _tiles(_of_step(weight, step, rows, WIDTH, OWN, EARLY), program, rows, WIDTH, GROUPS, WARPS)
    _wait(EARLY)
    for i in tl.static_range((WIDTH + CHUNK - 1) // CHUNK):
        found = found + (_merged(acc, high, total, i, WIDTH, HEAD, PARTS),)
    for i in tl.static_range((WIDTH + CHUNK - 1) // CHUNK):  # to where the weights are, once all have been read
        read = read + (found[i][None, :],)
    gains, scale = gains + (4 * tl.load(step) + 1) * WIDTH, _of_step(scale, step, rows, 1, OWN, EARLY)
    for group in tl.static_range(GROUPS):
        row = _rows(program, group, GROUPS, WARPS)
        add = tl.load(gains + row, mask=row < rows, other=0.0) * _times(tiles[group], read, scale, row, rows, SCALED)
        tl.store(y + row, tl.load(x + row, mask=row < rows, other=0.0) + add, mask=row < rows)


@jit
def _gate_up(
    x, step, gains, weight, scale, product, rows,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, GROUPS: tl.constexpr, WARPS: tl.constexpr, SCALED: tl.constexpr,
    OWN: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """rows: of gate, and as many of up behind them."""
    program, y = tl.program_id(0), ()
    weight = _of_step(weight, step, 2 * rows, WIDTH, OWN, EARLY)
    gates = _tiles(weight, program, rows, WIDTH, GROUPS, WARPS)
    ups = _tiles(weight + rows.to(tl.int64) * WIDTH, program, rows, WIDTH, GROUPS, WARPS)
    _wait(EARLY)
    gains, scale = gains + (4 * tl.load(step) + 2) * WIDTH, _of_step(scale, step, 2 * rows, 1, OWN, EARLY)
    by = _scale(_vector(x, WIDTH, BLOCK), WIDTH)
    for i in tl.static_range((WIDTH + CHUNK - 1) // CHUNK):
        y = y + (_part(x, i, WIDTH, WARPS) * by * _part(gains, i, WIDTH, WARPS),)
    for group in tl.static_range(GROUPS):
        row = _rows(program, group, GROUPS, WARPS)
        gate = _times(gates[group], y, scale, row, rows, SCALED)
        up = _times(ups[group], y, scale + rows, row, rows, SCALED)
        tl.store(product + row, _limited(gate * tl.sigmoid(gate) * up), mask=row < rows)


@jit
def _down(
    product, x, step, gains, weight, scale, h, rows,
    WIDTH: tl.constexpr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, SCALED: tl.constexpr,
    OWN: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    weight = _of_step(weight, step, rows, HIDDEN, OWN, EARLY)
    weight += row.to(tl.int64)[:, None] * HIDDEN + tl.arange(0, BLOCK)[None, :]
    column, inside, total = tl.arange(0, BLOCK), (row < rows)[:, None], tl.zeros((TILE, BLOCK), tl.float32)
    tile = tl.load(weight, mask=inside & (column < HIDDEN)[None, :], other=0.0)
    _wait(EARLY)
    for start in range(0, HIDDEN, BLOCK):
        following = start + BLOCK + column < HIDDEN
        ahead = tl.load(weight + start + BLOCK, mask=inside & following[None, :], other=0.0)
        part = tl.load(product + start + column, mask=start + column < HIDDEN, other=0.0)
        total += tile.to(tl.float32) * part[None, :]
        tile = ahead
    n, add = tl.load(step), tl.sum(total, 1)
    if SCALED:
        add *= tl.load(_of_step(scale, step, rows, 1, OWN, EARLY) + row, mask=row < rows, other=0.0)
    gain = tl.load(gains + (4 * n + 3) * WIDTH + row, mask=row < rows, other=0.0)
    tl.store(h + row, tl.load(x + row, mask=row < rows, other=0.0) + gain * add, mask=row < rows)


@jit
def _halting(
    row, h, remainder, step, left, head, bias, tolerance, steps, threshold,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, HALTING: tl.constexpr, ADAPTIVE: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """As `Engine.halt`: the weight of this step, what remains, whether a text's token ends here, and whether a token
    leaves for the step of `finish`, whose index is LAST, or 0 where there is none."""
    rest, n, p, early = tl.load(remainder + row), tl.load(step + row), 0.0, 0.0
    if HALTING == "act":
        p = 1 / (1 + tl.exp(-_value(row, h, head, bias, 0, WIDTH, BLOCK)))
        early = tl.minimum(p, rest)
    elif HALTING == "exit":
        p = tl.where(_value(row, h, head, bias, n, WIDTH, BLOCK) < tl.load(tolerance), 1.0, 0.0)
    stops = n + 1 >= steps
    if ADAPTIVE:
        stops = stops | (1 - rest + p >= tl.load(threshold))
    weight, leaves = tl.where(stops, rest, early), stops & (n != LAST) & (LAST > 0)
    return weight, rest - weight, stops & ~leaves & (tl.load(left + row) > 0), leaves


@jit
def _value(row, h, head, bias, n, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """What the n-th row of the halting head makes of a state."""
    state = _norm(_vector(h + row * WIDTH, WIDTH, BLOCK), WIDTH)
    return tl.sum(state * _vector(head + n * WIDTH, WIDTH, BLOCK), 0) + tl.load(bias + n)


@jit
def _log(row, log, written, number, value, longest):
    """Store a value of the token that comes next, where a row's text still goes on."""
    place = row * longest + tl.minimum(tl.load(written + row), longest - 1)
    tl.store(log + place, value, mask=number > 0)


@jit
def _halt(
    h, out, remainder, step, left, head, bias, tolerance, steps, threshold, halted, y, written, depths, longest,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, HALTING: tl.constexpr, ADAPTIVE: tl.constexpr, LAST: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """y: what the head reads. A state that leaves is what it was, as no earlier one counts but for ACT."""
    _wait(EARLY)
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    inside, at, n = column < WIDTH, row * WIDTH, tl.load(step + row)
    weight, remains, halts, leaves = _halting(
        row, h, remainder, step, left, head, bias, tolerance, steps, threshold, WIDTH, BLOCK, HALTING, ADAPTIVE, LAST
    )
    made = _vector(out + at, WIDTH, BLOCK) + weight * _vector(h + at, WIDTH, BLOCK)
    tl.debug_barrier()  # all warps have read what is written now
    tl.store(y + at + column, _norm(made, WIDTH).to(y.dtype.element_ty), mask=inside)
    tl.store(out + at + column, tl.where(leaves, 0.0, made), mask=inside)
    tl.store(remainder + row, tl.where(leaves, 1.0, remains))
    tl.store(step + row, tl.where(leaves, LAST, n + 1))
    tl.store(halted + row, halts.to(tl.int64))
    if leaves:
        _log(row, depths, written, tl.load(left + row), n + 2, longest)


@jit
def _best(logit, token, tokens, padding, random, temperature, RANDOM: tl.constexpr):
    """The largest of some logits, and which `token` it is of, also where all are NaN: it is read as an index."""
    logit += tl.load(padding + token, mask=token < tokens, other=0.0)
    logit = tl.where((token < tokens) & (logit == logit), logit, float("-inf"))
    if RANDOM:  # the largest of logits and Gumbel noise is a draw from their softmax
        logit = logit / tl.load(temperature) - tl.log(-tl.log(tl.maximum(tl.rand(random, token), 1e-20)))
    return tl.max(logit, 0), tl.min(token, 0) + tl.argmax(logit, 0)


@jit
def _pick(
    logits, halted, position, seed, padding, best, which, rows, columns, temperature,
    TILE: tl.constexpr, RANDOM: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The best of every tile of logits (R, columns), of which `rows` are in use."""
    _wait(EARLY)
    row, tile = tl.program_id(0), tl.program_id(1)
    if tl.load(halted + row) == 0:
        return
    column, index = tile * TILE + tl.arange(0, TILE), row * tl.num_programs(1) + tile
    logit = tl.load(logits + row.to(tl.int64) * columns + column, mask=column < rows, other=0.0).to(tl.float32)
    random = tl.load(seed + row) + tl.load(position + row)
    highest, token = _best(logit, column, rows, padding, random, temperature, RANDOM)
    tl.store(best + index, highest)
    tl.store(which + index, token)


@jit
def _accept(
    row, halts, n, best, which, token, position, first, step, h, e, out, remainder, left, written, tokens, depths,
    embedding, many, longest, length,
    END: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, MANY: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """As `Engine.accept` and `begin`, of a token that has taken n steps, unless it left for the LAST. best, which:
    `many` of every row."""
    drawn = tl.load(token + row)
    if halts:
        index = tl.arange(0, MANY)
        value = tl.load(best + row * many + index, mask=index < many, other=float("-inf"))
        of = tl.load(which + row * many + index, mask=index < many, other=2147483647)
        drawn = tl.min(tl.where(value == tl.max(value, 0), of, 2147483647), 0).to(tl.int64)  # the first of equals
        count, p = tl.load(written + row), tl.load(position + row) + 1
        place = row * longest + tl.minimum(count, longest - 1)
        tl.store(tokens + place, drawn)
        if LAST == 0:
            tl.store(depths + place, n)
        tl.store(written + row, count + 1)
        tl.store(left + row, tl.where(drawn == END, 0, tl.load(left + row) - 1))
        tl.store(token + row, drawn)
        tl.store(position + row, p)
        tl.store(first + row, tl.maximum(tl.load(first + row), p - length))
    column, at = tl.arange(0, BLOCK), row * WIDTH
    start = _norm(_vector(embedding + drawn * WIDTH, WIDTH, BLOCK), WIDTH)
    tl.store(e + at + column, start, mask=column < WIDTH)
    tl.store(h + at + column, start, mask=column < WIDTH)
    tl.store(out + at + column, tl.zeros((BLOCK,), tl.float32), mask=column < WIDTH)
    tl.store(remainder + row, 1.0)
    tl.store(step + row, tl.zeros((), tl.int64))


@jit
def _next(
    halted, best, which, token, position, first, step, h, e, out, remainder, left, written, tokens, depths, embedding,
    many, longest, length, end,
    END: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, MANY: tl.constexpr, LAST: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    _wait(EARLY)
    row = tl.program_id(0)
    halts, n = tl.load(halted + row) != 0, tl.load(step + row)
    if halts | (n >= end):
        _accept(
            row, halts, n, best, which, token, position, first, step, h, e, out, remainder, left, written, tokens,
            depths, embedding, many, longest, length, END, WIDTH, BLOCK, MANY, LAST,
        )  # fmt: skip


@jit
def _head(
    h, before, rest, steps_before, left, head, bias, tolerance, steps, threshold, end, seed, arrived, padding,
    temperature,
    weight, scale, rows, halted, best, which, token, position, first, step, e, out, remainder, written, tokens, depths,
    embedding, many, longest, length,
    END: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, MANY: tl.constexpr, GROUPS: tl.constexpr,
    WARPS: tl.constexpr, SCALED: tl.constexpr, RANDOM: tl.constexpr, HALTING: tl.constexpr, ADAPTIVE: tl.constexpr,
    LAST: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The end of a tick of one row. All programs decide whether its token halts; one goes on if not. Else a program
    goes over every so many tiles of logits, and the last one that arrives accepts the best."""
    _wait(EARLY)
    program, n = tl.program_id(0), tl.load(steps_before) + 1
    share, remains, halts, leaves = _halting(
        0, h, rest, steps_before, left, head, bias, tolerance, steps, threshold, WIDTH, BLOCK, HALTING, ADAPTIVE, LAST
    )
    if program == 0:
        tl.store(halted, halts.to(tl.int64))
    if halts | (n >= end):
        if halts:
            by, y = _scale(_vector(before, WIDTH, BLOCK) + share * _vector(h, WIDTH, BLOCK), WIDTH), ()
            for i in tl.static_range((WIDTH + CHUNK - 1) // CHUNK):
                y = y + ((_part(before, i, WIDTH, WARPS) + share * _part(h, i, WIDTH, WARPS)) * by,)
            random, highest, chosen = tl.load(seed) + tl.load(position), float("-inf"), 2147483647
            for i in range(program, tl.cdiv(rows, GROUPS * WARPS), tl.num_programs(0)):
                tiles = _tiles(weight, i, rows, WIDTH, GROUPS, WARPS)
                for group in tl.static_range(GROUPS):
                    row = _rows(i, group, GROUPS, WARPS)
                    logit = _times(tiles[group], y, scale, row, rows, SCALED)
                    logit, id_ = _best(logit, row, rows, padding, random, temperature, RANDOM)
                    better = (logit > highest) | (chosen == 2147483647)
                    highest, chosen = tl.where(better, logit, highest), tl.where(better, id_, chosen)
            tl.store(best + program, highest)
            tl.store(which + program, chosen)
        tl.debug_barrier()  # all warps have read what the last program writes, and written what it reads
        if tl.atomic_add(arrived, 1) == tl.num_programs(0) - 1:
            tl.store(arrived, 0)
            _accept(
                0, halts, n, best, which, token, position, first, step, h, e, out, remainder, left, written, tokens,
                depths, embedding, many, longest, length, END, WIDTH, BLOCK, MANY, LAST,
            )  # fmt: skip
    elif program == 0:
        column = tl.arange(0, BLOCK)
        made = _vector(before, WIDTH, BLOCK) + share * _vector(h, WIDTH, BLOCK)
        tl.store(out + column, tl.where(leaves, 0.0, made), mask=column < WIDTH)
        tl.store(remainder, tl.where(leaves, 1.0, remains))
        tl.store(step, tl.where(leaves, LAST, n))
        if leaves:
            _log(0, depths, written, tl.load(left), n + 1, longest)
