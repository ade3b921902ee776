"""A tick (engine.py) in Triton kernels.

Of one row it is eight of them, each bound by the weights that it reads:

    _qkv        injection, norm, gain -> query, key, value     _down    SwiGLU product -> state
    _attend     norm, rotation, cache write, attention         _halt    the halting head, Graves' rule
    _output     sum of the attention's parts -> residual       _head    logits, the largest of each tile
    _gate_up    norm, gain -> SwiGLU product                   _next    the token, and the start of its recurrence

Vectors between them are float32; norms are worked out again by every program that needs them, as a vector of the
model's width is nothing beside a tile of weights. Weights are in any float type; FP8 ones have a scale for every row.

Of several rows a library's matrix products read the weights, and what lies between two of them is one kernel with a
program for every row: `_enter`, `_attend` and `_merge`, `_residual`, SwiGLU (kernels.py), `_residual`, `_halt`, and
`_pick` and `_next` behind the head. The last two return at once where the token has not halted, so the host is never
asked.
"""

from types import SimpleNamespace

import torch

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:  # PyTorch for the CPU comes without
    triton, tl, jit = None, SimpleNamespace(constexpr=None), lambda function: function

from kernels import INTERPRETED, swiglu_rounded

if triton:
    from kernels import _limited

EPSILON = tl.constexpr(1.1920929e-07) if triton else None  # of F.rms_norm: that of float32
# Rows of a matrix that a program has, or logits, and its warps.
TILES = {"qkv": (8, 8), "output": (4, 4), "gate_up": (8, 8), "down": (2, 4), "head": (8, 8), "pick": (2048, 4)}
PROGRAMS = 1024  # of the head
SPLITS, KEYS = 4, 64  # programs that share the keys of a head, and keys that one reads at a time


def available(model):
    """Whether the kernels run where this model is."""
    d = model.config.width // model.config.heads
    on_device = model.embedding.weight.is_cuda and triton is not None or INTERPRETED
    return on_device and d >= 4 and d & (d - 1) == 0


@jit
def _vector(pointer, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    return tl.load(pointer + column, mask=column < SIZE, other=0.0).to(tl.float32)


@jit
def _norm(x, SIZE: tl.constexpr):
    return x * tl.rsqrt(tl.sum(x * x, 0) / SIZE + EPSILON)


@jit
def _times(weight, scale, row, rows, x, SIZE: tl.constexpr, BLOCK: tl.constexpr, SCALED: tl.constexpr):
    """Some rows (TILE,) of a matrix (rows, SIZE) times the vector x."""
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < SIZE)[None, :]
    tile = tl.load(weight + row.to(tl.int64)[:, None] * SIZE + column[None, :], mask=inside, other=0.0)
    y = tl.sum(tile.to(tl.float32) * x[None, :], 1)
    if SCALED:
        y *= tl.load(scale + row, mask=row < rows, other=0.0)
    return y


@jit
def _of_step(pointer, n, rows, SIZE: tl.constexpr, OWN: tl.constexpr):
    """Where the weights of step n are, if each step has its own."""
    if OWN:
        pointer += n.to(tl.int64) * rows * SIZE
    return pointer


@jit
def _injected(h, e, inject, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    return tl.load(inject) * _norm(_vector(h, WIDTH, BLOCK), WIDTH) + tl.load(inject + 1) * _vector(e, WIDTH, BLOCK)


@jit
def _enter(h, e, step, inject, gains, x, y, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """x: with the injection; y: its norm and gain, what the projection to query, key and value reads."""
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    n, at = tl.load(step + row), row * WIDTH
    u = _injected(h + at, e + at, inject + 2 * n, WIDTH, BLOCK)
    normed = _norm(u, WIDTH) * _vector(gains + 4 * n * WIDTH, WIDTH, BLOCK)
    tl.store(x + at + column, u, mask=column < WIDTH)
    tl.store(y + at + column, normed.to(y.dtype.element_ty), mask=column < WIDTH)


@jit
def _qkv(
    h, e, step, inject, gains, weight, scale, qkv, x, rows,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, SCALED: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    n = tl.load(step)
    u = _injected(h, e, inject + 2 * n, WIDTH, BLOCK)
    y = _norm(u, WIDTH) * _vector(gains + 4 * n * WIDTH, WIDTH, BLOCK)
    weight, scale = _of_step(weight, n, rows, WIDTH, OWN), _of_step(scale, n, rows, 1, OWN)
    tl.store(qkv + row, _times(weight, scale, row, rows, y, WIDTH, BLOCK, SCALED), mask=row < rows)
    if tl.program_id(0) == 0:
        column = tl.arange(0, BLOCK)
        tl.store(x + column, u, mask=column < WIDTH)


@jit
def _rotated(pointer, c, s, HALF: tl.constexpr):
    a, b = (
        tl.load(pointer + tl.arange(0, HALF)).to(tl.float32),
        tl.load(pointer + HALF + tl.arange(0, HALF)).to(tl.float32),
    )
    r = tl.rsqrt((tl.sum(a * a, 0) + tl.sum(b * b, 0)) / (2 * HALF) + EPSILON)
    a, b = a * r, b * r
    return a * c - b * s, a * s + b * c


@jit
def _attend(
    qkv, keys, values, step, position, first, frequency, acc, high, total, rows, H, M, slots,
    HALF: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One head of one row, over a PARTS-th of the keys. acc: (R, H, PARTS, d), high and total (R, H, PARTS)."""
    row, head, part = tl.program_id(0) // H, tl.program_id(0) % H, tl.program_id(1)
    lane = tl.arange(0, HALF)
    p, n = tl.load(position + row), tl.minimum(tl.load(step + row), slots - 1)
    visible = (p - tl.load(first + row)).to(tl.int32)  # tokens before this one; remainders of 64 bits take long
    column = (p % M).to(tl.int32)
    angle = p.to(tl.float64) * tl.load(frequency + lane)
    angle = (angle - tl.floor(angle / 6.283185307179586) * 6.283185307179586).to(tl.float32)
    c, s = tl.cos(angle), tl.sin(angle)
    qkv += (row * 3 * H + head) * (2 * HALF)
    q_a, q_b = _rotated(qkv, c, s, HALF)
    scale = 1.4426950408889634 / tl.sqrt(2.0 * HALF)  # scores in units of log2
    q_a, q_b = q_a * scale, q_b * scale
    row_size = H * (2 * HALF)
    high_, sum_ = -1e30, 0.0
    acc_a, acc_b = tl.zeros((HALF,), tl.float32), tl.zeros((HALF,), tl.float32)
    if part == 0:  # this token: written, and read from registers
        k_a, k_b = _rotated(qkv + row_size, c, s, HALF)
        v_a, v_b = (
            tl.load(qkv + 2 * row_size + lane).to(tl.float32),
            tl.load(qkv + 2 * row_size + HALF + lane).to(tl.float32),
        )
        for slot in range(n, slots):
            at = ((slot * rows + row).to(tl.int64) * M + column) * row_size + head * (2 * HALF) + lane
            tl.store(keys + at, k_a.to(keys.dtype.element_ty))
            tl.store(keys + at + HALF, k_b.to(keys.dtype.element_ty))
            tl.store(values + at, v_a.to(values.dtype.element_ty))
            tl.store(values + at + HALF, v_b.to(values.dtype.element_ty))
        high_, sum_, acc_a, acc_b = tl.sum(q_a * k_a + q_b * k_b, 0), 1.0, v_a, v_b
    end = tl.minimum(p + 1, M).to(tl.int32)  # behind it nothing has been written
    for start in range(part * BLOCK, end, PARTS * BLOCK):
        j = start + tl.arange(0, BLOCK)
        behind = tl.where(j <= column, column - j, column - j + M)
        seen = (j < end) & (behind > 0) & (behind <= visible)
        at = (((n * rows + row).to(tl.int64) * M + j) * row_size + head * (2 * HALF))[:, None] + lane[None, :]
        k_a = tl.load(keys + at, mask=seen[:, None], other=0.0).to(tl.float32)
        k_b = tl.load(keys + at + HALF, mask=seen[:, None], other=0.0).to(tl.float32)
        score = tl.where(seen, tl.sum(k_a * q_a[None, :] + k_b * q_b[None, :], 1), -1e30)
        higher = tl.maximum(high_, tl.max(score, 0))
        weight = tl.where(seen, tl.exp2(score - higher), 0.0)
        shrink = tl.exp2(high_ - higher)
        v_a = tl.load(values + at, mask=seen[:, None], other=0.0).to(tl.float32)
        v_b = tl.load(values + at + HALF, mask=seen[:, None], other=0.0).to(tl.float32)
        acc_a = acc_a * shrink + tl.sum(weight[:, None] * v_a, 0)
        acc_b = acc_b * shrink + tl.sum(weight[:, None] * v_b, 0)
        sum_ = sum_ * shrink + tl.sum(weight, 0)
        high_ = higher
    index = tl.program_id(0) * PARTS + part
    tl.store(acc + index * (2 * HALF) + lane, acc_a)
    tl.store(acc + index * (2 * HALF) + HALF + lane, acc_b)
    tl.store(high + index, high_)
    tl.store(total + index, sum_)


@jit
def _merged(acc, high, total, WIDTH: tl.constexpr, BLOCK: tl.constexpr, HEAD: tl.constexpr, PARTS: tl.constexpr):
    """What a row's heads found, of the parts that `_attend` leaves."""
    column = tl.arange(0, BLOCK)
    inside, place = column < WIDTH, (column // HEAD) * PARTS
    highest = tl.load(high + place, mask=inside, other=0.0)
    for part in tl.static_range(1, PARTS):
        highest = tl.maximum(highest, tl.load(high + place + part, mask=inside, other=0.0))
    found, sum_ = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(PARTS):
        share = tl.exp2(tl.load(high + place + part, mask=inside, other=0.0) - highest)
        found += share * tl.load(acc + (place + part) * HEAD + column % HEAD, mask=inside, other=0.0)
        sum_ += share * tl.load(total + place + part, mask=inside, other=1.0)
    return tl.where(inside, found / sum_, 0.0)


@jit
def _merge(acc, high, total, y, WIDTH: tl.constexpr, BLOCK: tl.constexpr, HEAD: tl.constexpr, PARTS: tl.constexpr):
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    first = row * (WIDTH // HEAD) * PARTS
    found = _merged(acc + first * HEAD, high + first, total + first, WIDTH, BLOCK, HEAD, PARTS)
    tl.store(y + row * WIDTH + column, found.to(y.dtype.element_ty), mask=column < WIDTH)


@jit
def _residual(
    x, branch, step, gains, z, y, WIDTH: tl.constexpr, BLOCK: tl.constexpr, GAIN: tl.constexpr, NORM: tl.constexpr
):
    """z = x + a gain of the step times what a branch gave; y: its norm and the next gain, if NORM."""
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    inside, at = column < WIDTH, row * WIDTH
    gains += (4 * tl.load(step + row) + GAIN) * WIDTH
    u = _vector(x + at, WIDTH, BLOCK) + _vector(gains, WIDTH, BLOCK) * _vector(branch + at, WIDTH, BLOCK)
    tl.store(z + at + column, u, mask=inside)
    if NORM:
        normed = _norm(u, WIDTH) * _vector(gains + WIDTH, WIDTH, BLOCK)
        tl.store(y + at + column, normed.to(y.dtype.element_ty), mask=inside)


@jit
def _output(
    acc, high, total, x, step, gains, weight, scale, y, rows,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, HEAD: tl.constexpr, PARTS: tl.constexpr,
    SCALED: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    row, n = tl.program_id(0) * TILE + tl.arange(0, TILE), tl.load(step)
    found = _merged(acc, high, total, WIDTH, BLOCK, HEAD, PARTS)
    weight, scale = _of_step(weight, n, rows, WIDTH, OWN), _of_step(scale, n, rows, 1, OWN)
    add = _times(weight, scale, row, rows, found, WIDTH, BLOCK, SCALED)
    gain = tl.load(gains + (4 * n + 1) * WIDTH + row, mask=row < rows, other=0.0)
    tl.store(y + row, tl.load(x + row, mask=row < rows, other=0.0) + gain * add, mask=row < rows)


@jit
def _gate_up(
    x, step, gains, weight, scale, product, rows,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, SCALED: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """rows: of gate, and as many of up behind them."""
    row, n = tl.program_id(0) * TILE + tl.arange(0, TILE), tl.load(step)
    y = _norm(_vector(x, WIDTH, BLOCK), WIDTH) * _vector(gains + (4 * n + 2) * WIDTH, WIDTH, BLOCK)
    weight, scale = _of_step(weight, n, 2 * rows, WIDTH, OWN), _of_step(scale, n, 2 * rows, 1, OWN)
    gate = _times(weight, scale, row, rows, y, WIDTH, BLOCK, SCALED)
    up = _times(weight + rows.to(tl.int64) * WIDTH, scale + rows, row, rows, y, WIDTH, BLOCK, SCALED)
    tl.store(product + row, _limited(gate * tl.sigmoid(gate) * up), mask=row < rows)


@jit
def _down(
    product, x, step, gains, weight, scale, h, rows,
    WIDTH: tl.constexpr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, SCALED: tl.constexpr,
    OWN: tl.constexpr,
):  # fmt: skip
    row, n = tl.program_id(0) * TILE + tl.arange(0, TILE), tl.load(step)
    weight, scale = _of_step(weight, n, rows, HIDDEN, OWN), _of_step(scale, n, rows, 1, OWN)
    total = tl.zeros((TILE, BLOCK), tl.float32)
    for start in range(0, HIDDEN, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = (row < rows)[:, None] & (column < HIDDEN)[None, :]
        tile = tl.load(weight + row.to(tl.int64)[:, None] * HIDDEN + column[None, :], mask=inside, other=0.0)
        total += tile.to(tl.float32) * tl.load(product + column, mask=column < HIDDEN, other=0.0)[None, :]
    add = tl.sum(total, 1)
    if SCALED:
        add *= tl.load(scale + row, mask=row < rows, other=0.0)
    gain = tl.load(gains + (4 * n + 3) * WIDTH + row, mask=row < rows, other=0.0)
    tl.store(h + row, tl.load(x + row, mask=row < rows, other=0.0) + gain * add, mask=row < rows)


@jit
def _halt(
    h, out, remainder, step, halted, left, head, bias, y, steps, threshold,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ACT: tl.constexpr, ADAPTIVE: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """As `Engine.halt`. y: what the head reads, if NORM."""
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    inside, at = column < WIDTH, row * WIDTH
    state, rest, n = _vector(h + at, WIDTH, BLOCK), tl.load(remainder + row), tl.load(step + row)
    p = 0.0
    if ACT:
        logit = tl.sum(_norm(state, WIDTH) * _vector(head, WIDTH, BLOCK), 0) + tl.load(bias)
        p = 1 / (1 + tl.exp(-logit))
    stops = n + 1 >= steps
    if ADAPTIVE:
        stops = stops | (1 - rest + p >= tl.load(threshold))
    weight = tl.where(stops, rest, tl.minimum(p, rest))
    result = _vector(out + at, WIDTH, BLOCK) + weight * state
    tl.store(out + at + column, result, mask=inside)
    if NORM:
        tl.store(y + at + column, _norm(result, WIDTH).to(y.dtype.element_ty), mask=inside)
    tl.debug_barrier()  # all warps have read what is written now
    tl.store(remainder + row, rest - weight)
    tl.store(step + row, n + 1)
    tl.store(halted + row, tl.where(stops & (tl.load(left + row) > 0), 1, 0))


@jit
def _best(logit, token, tokens, padding, seed, temperature, best, which, RANDOM: tl.constexpr):
    """Leave the largest of some logits and which `token` it is of, also where all are NaN: it is read as an index."""
    inside = (token < tokens) & (logit == logit)
    logit = tl.where(inside, logit + tl.load(padding + token, mask=inside, other=0.0), float("-inf"))
    if RANDOM:  # the largest of logits and Gumbel noise is a draw from their softmax
        logit = logit / tl.load(temperature) - tl.log(-tl.log(tl.maximum(tl.rand(seed, token), 1e-20)))
    tl.store(best, tl.max(logit, 0))
    tl.store(which, tl.min(token, 0) + tl.argmax(logit, 0))


@jit
def _head(
    out, halted, position, seed, weight, scale, padding, best, which, rows, temperature,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, SCALED: tl.constexpr, RANDOM: tl.constexpr,
):  # fmt: skip
    """A program goes over every so many tiles: where nothing halts, few have to start."""
    if tl.load(halted) == 0:
        return
    y = _norm(_vector(out, WIDTH, BLOCK), WIDTH)
    for tile in range(tl.program_id(0), (rows + TILE - 1) // TILE, tl.num_programs(0)):
        row = tile * TILE + tl.arange(0, TILE)
        logit = _times(weight, scale, row, rows, y, WIDTH, BLOCK, SCALED)
        random = tl.load(seed) + tl.load(position)
        _best(logit, row, rows, padding, random, temperature, best + tile, which + tile, RANDOM)


@jit
def _pick(
    logits, halted, position, seed, padding, best, which, rows, columns, temperature,
    TILE: tl.constexpr, RANDOM: tl.constexpr,
):  # fmt: skip
    """What `_head` leaves, of logits (R, columns) of which `rows` are in use."""
    row, tile = tl.program_id(0), tl.program_id(1)
    if tl.load(halted + row) == 0:
        return
    column, index = tile * TILE + tl.arange(0, TILE), row * tl.num_programs(1) + tile
    logit = tl.load(logits + row.to(tl.int64) * columns + column, mask=column < rows, other=0.0).to(tl.float32)
    random = tl.load(seed + row) + tl.load(position + row)
    _best(logit, column, rows, padding, random, temperature, best + index, which + index, RANDOM)


@jit
def _next(
    halted, best, which, token, position, first, step, h, e, out, remainder, left, written, tokens, depths, embedding,
    tiles, steps, longest, length, END: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, MANY: tl.constexpr,
):  # fmt: skip
    """As `Engine.accept` and `begin`."""
    row = tl.program_id(0)
    halts, n = tl.load(halted + row), tl.load(step + row)
    if (halts == 0) & (n < steps):
        return
    drawn = tl.load(token + row)
    if halts != 0:
        index = tl.arange(0, MANY)
        winner = tl.argmax(tl.load(best + row * tiles + index, mask=index < tiles, other=float("-inf")), 0)
        drawn = tl.load(which + row * tiles + winner).to(tl.int64)
        count, p = tl.load(written + row), tl.load(position + row) + 1
        place = row * longest + tl.minimum(count, longest - 1)
        tl.store(tokens + place, drawn)
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


def attend(engine, qkv):
    """`Engine.attend` for rows of qkv (R, 3 D), where the rest of a tick is not by kernels."""
    parts = _parts(engine, len(qkv))
    _launch_attend(engine, qkv, *parts)
    acc, high, total = parts
    share = torch.exp2(high - high.amax(-1, keepdim=True))
    return ((acc * share[..., None]).sum(2) / (total * share).sum(-1)[..., None]).flatten(1)


def _parts(engine, rows):
    c = engine.model.config
    empty = lambda *shape: torch.empty(rows, c.heads, SPLITS, *shape, device=engine.keys.device)  # noqa: E731
    return empty(c.width // c.heads), empty(), empty()


def _launch_attend(engine, qkv, acc, high, total):
    s, c = engine.state, engine.model.config
    _attend[(engine.rows * c.heads, SPLITS)](
        qkv, engine.keys, engine.values, s.step, s.position, s.first, engine.frequency, acc, high, total,
        engine.rows, c.heads, engine.columns, engine.slots, HALF=c.width // c.heads // 2, BLOCK=KEYS, PARTS=SPLITS,
        num_warps=4,
    )  # fmt: skip


class Tick:
    """The launches of a tick of an `Engine`, and the vectors between them."""

    def __init__(self, engine):
        self.engine = engine
        c, device, R = engine.model.config, engine.keys.device, engine.rows
        vector = lambda size, dtype=torch.float32: torch.zeros(R, size, dtype=dtype, device=device)  # noqa: E731
        self.x, self.y, self.qkv, self.product = map(vector, (c.width, c.width, 3 * c.width, c.hidden))
        self.low = vector(c.width, engine.model.compute_dtype)  # what the next product of matrices reads
        self.parts = [x.zero_() for x in _parts(engine, R)]
        self.tiles = -(-c.vocab_size // TILES["head" if R == 1 else "pick"][0])
        self.best, self.which = vector(self.tiles), vector(self.tiles, torch.int32)
        self.threshold = torch.full((1,), 1 - c.halting_eps, device=device)
        self.size = dict(WIDTH=c.width, BLOCK=triton.next_power_of_2(c.width))
        self.merging = dict(HEAD=c.width // c.heads, PARTS=SPLITS)

    def run(self):
        if self.engine.rows == 1:
            self.one()
        else:
            self.many()

    def one(self):
        engine, s, w, size = self.engine, self.engine.state, self.engine.weights, self.size
        model, c = engine.model, engine.model.config
        D, F = c.width, c.hidden
        own, inject, gains = dict(OWN=not c.share), engine.inject, engine.gains

        def launch(kernel, name, rows, *arguments, **constants):
            matrix, scale = getattr(w, name)
            scaled, (before, after), (tile, warps) = scale is not None, arguments, TILES[name]
            kernel[(triton.cdiv(rows, tile),)](
                *before, matrix, scale if scaled else matrix, *after, rows, **size, **constants, TILE=tile,
                SCALED=scaled, num_warps=warps,
            )  # fmt: skip

        launch(_qkv, "qkv", 3 * D, (s.h, s.e, s.step, inject, gains), (self.qkv, self.x), **own)
        _launch_attend(engine, self.qkv, *self.parts)
        launch(_output, "output", D, (*self.parts, self.x, s.step, gains), (self.y,), **own, **self.merging)
        launch(_gate_up, "gate_up", F, (self.y, s.step, gains), (self.product,), **own)
        self._down(own)
        self._halt(False)
        matrix, scale = w.head
        _head[(min(self.tiles, PROGRAMS),)](
            s.out, s.halted, s.position, engine.seed, matrix, matrix if scale is None else scale, model.padding,
            self.best, self.which, c.vocab_size, engine.temperature, **size, TILE=TILES["head"][0],
            SCALED=scale is not None, RANDOM=engine.sampling[0] > 0, num_warps=TILES["head"][1],
        )  # fmt: skip
        self._next()

    def many(self):
        engine, s, size, rows = self.engine, self.engine.state, self.size, (self.engine.rows,)
        c, gains, low = engine.model.config, engine.gains, self.low
        _enter[rows](s.h, s.e, s.step, engine.inject, gains, self.x, low, **size)
        _launch_attend(engine, engine.multiply(low, "qkv"), *self.parts)
        _merge[rows](*self.parts, low, **size, **self.merging)
        branch = engine.multiply(low, "output")
        _residual[rows](self.x, branch, s.step, gains, self.x, low, **size, GAIN=1, NORM=True)
        branch = engine.multiply(swiglu_rounded(engine.multiply(low, "gate_up")), "down")
        _residual[rows](self.x, branch, s.step, gains, s.h, low, **size, GAIN=3, NORM=False)
        self._halt(True)
        logits, (tile, warps) = engine.multiply(low, "head"), TILES["pick"]
        _pick[(*rows, self.tiles)](
            logits, s.halted, s.position, engine.seed, engine.model.padding, self.best, self.which, c.vocab_size,
            logits.shape[1], engine.temperature, TILE=tile, RANDOM=engine.sampling[0] > 0, num_warps=warps,
        )  # fmt: skip
        self._next()

    def _down(self, own):
        engine, s = self.engine, self.engine.state
        c, (matrix, scale), (tile, warps) = engine.model.config, engine.weights.down, TILES["down"]
        _down[(triton.cdiv(c.width, tile),)](
            self.product, self.y, s.step, engine.gains, matrix, matrix if scale is None else scale, s.h, c.width,
            WIDTH=c.width, HIDDEN=c.hidden, BLOCK=min(2048, triton.next_power_of_2(c.hidden)), TILE=tile,
            SCALED=scale is not None, num_warps=warps, **own,
        )  # fmt: skip

    def _halt(self, normed):
        engine, s, halting = self.engine, self.engine.state, self.engine.model.halting
        head = (halting.weight, halting.bias) if halting is not None else (s.h, s.remainder)
        _halt[(engine.rows,)](
            s.h, s.out, s.remainder, s.step, s.halted, s.left, *head, self.low, engine.steps, self.threshold,
            **self.size, ACT=engine.model.config.halting == "act", ADAPTIVE=engine.adaptive, NORM=normed, num_warps=4,
        )  # fmt: skip

    def _next(self):
        engine, s = self.engine, self.engine.state
        _next[(engine.rows,)](
            s.halted, self.best, self.which, s.token, s.position, s.first, s.step, s.h, s.e, s.out, s.remainder, s.left,
            s.written, s.tokens, s.depths, engine.model.embedding.weight, self.tiles, engine.steps, s.tokens.shape[1],
            engine.length, END=engine.model.config.document_start, **self.size,
            MANY=triton.next_power_of_2(self.tiles), num_warps=4,
        )  # fmt: skip
