"""Kernels around the GEMMs of training: rounding, transposing, SwiGLU, softmax, and the heads that attention reads.

A GEMM in FP8 is so fast that what surrounds it decides, and that is bound by memory: each kernel reads its input once
and writes FP8 in every layout that a GEMM will want, with the largest value seen (amax) on the side. Beside each kernel
stands its definition in PyTorch, which is what runs without a GPU, and what tests and `fp8.self_test` compare with.
"""

import re

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:  # PyTorch for the CPU comes without
    triton = None

# Of our operators. Exported models bring a copy of this module, under a longer name, into one process with it; an
# operator registered a second time would leave the first without its memory.
NAMESPACE = re.sub(r"\W", "_", f"recurrent.{__name__}")

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LARGEST = {E4M3: 448.0, E5M2: 57344.0}
# Sizes, and warps: the best of ten on an H200.
TILES = {"swiglu gradient": (32, 64, 4), "heads": (128, 2), "heads gradient": (32, 4)}

# Largest SwiGLU product, of either sign. Gate and up tend to align, and then their product grows quadratically (Fishman
# et al. 2024, arXiv 2409.12517): one of 270,000 leaves a tensorwise E4M3 scale nothing below 1.2 to tell from zero.
# Healthy runs reach 400 to 4,000. It is part of the model, in every dtype, so that training and inference agree.
SWIGLU_LIMIT = 1024.0

INTERPRETED = triton is not None and triton.knobs.runtime.interpret  # in tests
assembly = not INTERPRETED  # whether kernels may use PTX; `fp8.self_test` turns it off where that goes wrong
enabled = True  # train.py turns all off, attention.py's too, where one that is not for FP8 goes wrong


def on_kernels(x):
    """Whether Triton runs on the device of x, or interprets its kernels."""
    return enabled and (triton is not None and x.is_cuda or INTERPRETED)


def launch(kernel):
    """The kernel, visible to torch.compile; the interpreter's kernels cannot be."""
    return torch.library.wrap_triton(kernel) if isinstance(kernel, triton.JITFunction) else kernel


def quantize(x, scale, dtype):
    """x * scale in FP8, saturated but for NaN, and the amax of x, float32. torch.compile fuses it into what makes x.
    With NaN in x its amax here is NaN, and by the kernels that of all else: either leaves `fp8.Scales` finite."""
    largest = LARGEST[dtype]
    return (x.float() * scale).clamp(-largest, largest).to(dtype), x.abs().amax(-1).amax().float()


def transpose(x):
    """x (m, n) FP8 as (n, m), contiguous."""
    if not on_kernels(x):
        return x.t().contiguous()
    return _transpose(x)


def swiglu(gate_up):
    """silu(gate) * up of gate_up (..., 2 F), within `SWIGLU_LIMIT`, float32."""
    gate, up = gate_up.float().chunk(2, -1)
    return (F.silu(gate) * up).clamp(-SWIGLU_LIMIT, SWIGLU_LIMIT)


def swiglu_rounded(gate_up):
    """`swiglu` in the dtype of gate_up (m, 2 F), without gradient. By PyTorch alone it is four times the traffic."""
    if gate_up.dtype == torch.float32 or torch.compiler.is_compiling() or not on_kernels(gate_up):
        return swiglu(gate_up).to(gate_up.dtype)
    return _swiglu_rounded(gate_up.contiguous())


def swiglu_gradient(grad, gate_up):
    """The gradient of `swiglu` with respect to gate_up (m, 2 F), float32; grad: (m, F)."""
    gate, up = gate_up.float().chunk(2, -1)
    sigmoid = gate.sigmoid()
    silu = gate * sigmoid
    grad = torch.where((silu * up).abs() > SWIGLU_LIMIT, 0, grad)
    return torch.cat([grad * up * (sigmoid + silu * (1 - sigmoid)), grad * silu], -1)


def swiglu_quantize(gate_up, scale):
    """`swiglu` in E4M3 (m, F), and its amax."""
    if not on_kernels(gate_up):
        return quantize(swiglu(gate_up), scale, E4M3)
    product, amax = _swiglu_quantize(gate_up, scale)
    return product, amax.amax()


def swiglu_gradient_quantize(grad, gate_up, scale, grad_scale, dtype=E4M3):
    """What the backward pass needs, in one read: the gradient of gate_up in `dtype`, as (m, 2 F) and transposed; the
    product of the forward pass in E4M3, transposed, (F, m), recomputed; and the amax of the gradient."""
    if not on_kernels(gate_up):
        wide, amax = quantize(swiglu_gradient(grad.float(), gate_up), grad_scale, dtype)
        return wide, transpose(wide), transpose(quantize(swiglu(gate_up), scale, E4M3)[0]), amax
    wide, wide_t, product_t, amax = _swiglu_gradient_quantize(grad, gate_up, scale, grad_scale, dtype)
    return wide, wide_t, product_t, amax.amax()


def log_sum_exp(logits):
    """Of every row of logits (m, V), float32."""
    if not on_kernels(logits):
        return logits.float().logsumexp(-1)
    return _log_sum_exp(logits)


def softmax_gradient_quantize(logits, lse, targets, weights, scale):
    """weights * (softmax(logits) - onehot(targets)) * scale in E5M2, (m, V) and transposed; all but logits are (m,)."""
    if not on_kernels(logits):
        grad = softmax_gradient(logits, lse, targets, weights * scale).to(E5M2)
        return grad, transpose(grad)
    return _softmax_gradient_quantize(logits, lse, targets, weights * scale)


def softmax_gradient(logits, lse, targets, weights):
    """The gradient of sum(weights * cross-entropy) with respect to logits (m, V), float32; all others are (m,)."""
    onehot = targets[:, None] == torch.arange(logits.shape[1], device=logits.device)
    return weights[:, None] * ((logits.float() - lse[:, None]).exp() - onehot.float())


def quantize_transpose(x, scale, dtype=E4M3):
    """`quantize` of x (m, n) to `dtype`, as (m, n) and transposed, in one read; and its amax."""
    if not on_kernels(x):
        rounded, amax = quantize(x, scale, dtype)
        return rounded, transpose(rounded), amax
    rounded, rounded_t, amax = _quantize_transpose(x.contiguous(), scale, dtype)
    return rounded, rounded_t, amax.amax()


def rotate(x, rope):
    """Rotary positions (Su et al. 2021, arXiv 2104.09864) of x (..., T, H, d); rope: cos and sin, (T, 1, d/2)."""
    cos, sin = rope
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(x.dtype)


def heads(qkv, rope, frozen=None, active=None):
    """Queries, keys and values (..., T, H, d) of qkv (..., T, 3, H, d): the first two normalised (RMS) and rotated, see
    `rotate`. frozen: (keys, values) to keep where `active` (..., T) is false. Differentiable in qkv and frozen."""
    d = qkv.shape[-1]
    if on_kernels(qkv) and d & (d - 1) == 0:
        keys, values = frozen or (None, None)
        return _heads(qkv.contiguous(), *rope, keys, values, active)
    qk, v = qkv[..., :2, :, :], qkv[..., 2, :, :]
    q, k = rotate(F.rms_norm(qk, (d,)), [x[:, None] for x in rope]).unbind(-3)
    if frozen is not None:
        k, v = (torch.where(active[..., None, None], new, old) for new, old in zip((k, v), frozen))
    return q, k, v


def quantize_weight(weight, scale, out, out_t):
    """Round weight (m, n) float32 into out (m, n) and out_t (n, m), views of E4M3, in one read."""
    if not on_kernels(weight):
        out.copy_((weight * scale).clamp(-448.0, 448.0).to(E4M3))
        out_t.copy_(out.t())
        return
    (m, n), block = weight.shape, 64
    grid = (triton.cdiv(m, block), triton.cdiv(n, block))
    _quantize_weight_kernel[grid](weight, scale, out, out_t, m, n, out_t.stride(0), BLOCK=block, ASSEMBLY=assembly)


if triton is not None:

    @triton.jit
    def _tile(m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
        """Row and column numbers of this program's tile of an (m, n) matrix, and which lie inside."""
        row = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        column = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
        return row, column, (row < m)[:, None] & (column < n)[None, :]

    # Rounding is by hand, to bytes: after the FP8 instruction of sm_90, ptxas 12.8 reads some bytes of a tile that is
    # transposed before they are computed (Triton 3.6; `self_test` found it). It goes by way of float16: E5M2 is its
    # upper byte; E4M3 is float16(x / 2^8), sign apart, from bit 7 on, its exponents being 8 larger. Half to even,
    # subnormal numbers too.

    @triton.jit
    def _scale(pointer, E4M3: tl.constexpr):
        """The factor there, and for E4M3 the 2^-8 that `_round` wants."""
        scale = tl.load(pointer)
        if E4M3:
            scale *= 0.00390625
        return scale

    @triton.jit
    def _round(x, E4M3: tl.constexpr, ASSEMBLY: tl.constexpr):
        """To E4M3 (of x * 2^8) or E5M2, saturated but for NaN, as bytes."""
        if ASSEMBLY:
            return tl.inline_asm_elementwise(
                TO_E4M3 if E4M3 else TO_E5M2, "=r,r,r", [x.to(tl.float16)], dtype=tl.uint8, is_pure=True, pack=4
            )
        if E4M3:
            bits = tl.clamp(x, -1.75, 1.75).to(tl.float16).to(tl.uint16, bitcast=True)
            magnitude = bits & 0x7FFF
            rounded = ((magnitude + 0x3F + ((magnitude >> 7) & 1)) >> 7) | ((bits >> 8) & 0x80)
        else:
            bits = tl.clamp(x, -57344.0, 57344.0).to(tl.float16).to(tl.uint16, bitcast=True)
            rounded = (bits + 0x7F + ((bits >> 8) & 1)) >> 8
        return tl.where(x == x, rounded, 0x7F).to(tl.uint8)  # else `clamp` would make a number of NaN

    def _rounding(largest, last, tail=""):
        """The same in PTX, four numbers at a time, two in a register: $1 and $2 in float16, $0 the four bytes. largest:
        the bits of the largest number; last: the last bit that is kept; tail: what brings bytes to the upper half.
        `min` takes the smaller magnitude, with the sign of $1, and has numbers for NaN, which m and n then cover."""
        twice = lambda bits: f"0x{bits << 16 | bits:08X}"  # noqa: E731
        text = f"""{{
            .reg .b32 a, b, s, t, m, n, high;
            mov.b32 high, {twice(largest)};
            min.xorsign.abs.f16x2 a, $1, high;
            min.xorsign.abs.f16x2 b, $2, high;
            set.nan.u32.f16x2 m, $1, $1;
            set.nan.u32.f16x2 n, $2, $2;
            shr.b32 s, a, {last};
            shr.b32 t, b, {last};
            and.b32 s, s, {twice(1)};
            and.b32 t, t, {twice(1)};
            add.u32 s, s, {twice((1 << last - 1) - 1)};
            add.u32 t, t, {twice((1 << last - 1) - 1)};
            add.u32 s, s, a;
            add.u32 t, t, b;
            {tail}
            or.b32 s, s, m;
            or.b32 t, t, n;
            prmt.b32 $0, s, t, 0x7531;
        }}"""
        return tl.constexpr(" ".join(text.split()))  # one line: torch.compile writes it into a file as a string

    TO_E5M2 = _rounding(0x7B00, 8)
    TO_E4M3 = _rounding(0x3F00, 7, """
            shl.b32 s, s, 1;
            shl.b32 t, t, 1;
            and.b32 a, a, 0x80008000;
            and.b32 b, b, 0x80008000;
            or.b32 s, s, a;
            or.b32 t, t, b;""")  # fmt: skip

    # Of float32, without the code for results that are too small for a normal number: those are 0.

    @triton.jit
    def _exp(x, ASSEMBLY: tl.constexpr):
        if ASSEMBLY:
            x *= 1.44269504  # log2(e)
            return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
        return tl.exp(x)

    @triton.jit
    def _sigmoid(x, ASSEMBLY: tl.constexpr):
        if ASSEMBLY:
            x = 1 + _exp(-x, ASSEMBLY)
            return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
        return tl.sigmoid(x)

    @triton.jit
    def _store_bytes(pointer, x, mask):
        tl.store(pointer.to(tl.pointer_type(tl.uint8), bitcast=True), x, mask=mask)

    @triton.jit
    def _store_transposed(pointer, x, row, column, stride, m, n):
        """Bytes x[i, j] to pointer[column[j], row[i]], along rows of the result."""
        inside = (column < n)[:, None] & (row < m)[None, :]
        _store_bytes(pointer + column[:, None] * stride + row[None, :], tl.trans(x), inside)

    @triton.jit
    def _transpose_kernel(x, out, m, n, BLOCK: tl.constexpr):
        row, column, inside = _tile(m, n, BLOCK, BLOCK)
        x = x.to(tl.pointer_type(tl.uint8), bitcast=True)
        tile = tl.load(x + row[:, None] * n + column[None, :], mask=inside, other=0)
        _store_transposed(out, tile, row, column, m, m, n)

    @triton.jit
    def _quantize_transpose_kernel(
        x, scale, out, out_t, amax, m, n, E4M3: tl.constexpr, BLOCK: tl.constexpr, ASSEMBLY: tl.constexpr
    ):
        row, column, inside = _tile(m, n, BLOCK, BLOCK)
        at = row[:, None] * n + column[None, :]
        tile = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(amax + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), tl.max(tl.abs(tile)))
        tile = _round(tile * _scale(scale, E4M3), E4M3, ASSEMBLY)
        _store_bytes(out + at, tile, inside)
        _store_transposed(out_t, tile, row, column, m, m, n)

    @triton.jit
    def _quantize_weight_kernel(x, scale, out, out_t, m, n, stride_t, BLOCK: tl.constexpr, ASSEMBLY: tl.constexpr):
        row, column, inside = _tile(m, n, BLOCK, BLOCK)
        at = row[:, None] * n + column[None, :]
        tile = _round(tl.load(x + at, mask=inside, other=0.0) * _scale(scale, True), True, ASSEMBLY)
        _store_bytes(out + at, tile, inside)
        _store_transposed(out_t, tile, row, column, stride_t, m, n)

    LIMIT = tl.constexpr(SWIGLU_LIMIT)

    @triton.jit
    def _limited(product):
        return tl.clamp(product, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)

    @triton.jit
    def _swiglu_kernel(
        gate_up, scale, out, amax, m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ASSEMBLY: tl.constexpr
    ):
        row, column, inside = _tile(m, n, BLOCK_M, BLOCK_N)
        at = row[:, None] * (2 * n) + column[None, :]
        gate = tl.load(gate_up + at, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gate_up + at + n, mask=inside, other=0.0).to(tl.float32)
        product = _limited(gate * _sigmoid(gate, ASSEMBLY) * up)
        scaled = _round(product * _scale(scale, True), True, ASSEMBLY)
        _store_bytes(out + row[:, None] * n + column[None, :], scaled, inside)
        tl.store(amax + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), tl.max(tl.abs(product)))

    @triton.jit
    def _swiglu_rounded_kernel(gate_up, out, m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
        row, column, inside = _tile(m, n, BLOCK_M, BLOCK_N)
        at = row[:, None] * (2 * n) + column[None, :]
        gate = tl.load(gate_up + at, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gate_up + at + n, mask=inside, other=0.0).to(tl.float32)
        product = _limited(gate * tl.sigmoid(gate) * up)
        tl.store(out + row[:, None] * n + column[None, :], product.to(out.dtype.element_ty), mask=inside)

    @triton.jit
    def _swiglu_gradient_kernel(
        grad, gate_up, scale, grad_scale, wide, wide_t, product_t, amax, m, n,
        E4M3: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ASSEMBLY: tl.constexpr,
    ):  # fmt: skip
        row, column, inside = _tile(m, n, BLOCK_M, BLOCK_N)
        at = row[:, None] * (2 * n) + column[None, :]
        gate = tl.load(gate_up + at, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gate_up + at + n, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(grad + row[:, None] * n + column[None, :], mask=inside, other=0.0).to(tl.float32)
        sigmoid = _sigmoid(gate, ASSEMBLY)
        silu = gate * sigmoid
        product = silu * up
        s = _scale(grad_scale, E4M3)
        g = tl.where(tl.abs(product) > LIMIT, 0.0, g * s)
        product = _round(_limited(product) * _scale(scale, True), True, ASSEMBLY)
        _store_transposed(product_t, product, row, column, m, m, n)
        d_gate = g * up * (sigmoid + silu * (1 - sigmoid))
        d_up = g * silu
        largest = tl.maximum(tl.max(tl.abs(d_gate)), tl.max(tl.abs(d_up))) / s
        tl.store(amax + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), largest)
        d_gate, d_up = _round(d_gate, E4M3, ASSEMBLY), _round(d_up, E4M3, ASSEMBLY)
        _store_bytes(wide + at, d_gate, inside)
        _store_bytes(wide + at + n, d_up, inside)
        _store_transposed(wide_t, d_gate, row, column, m, m, n)
        _store_transposed(wide_t, d_up, row, column + n, m, m, 2 * n)

    @triton.jit
    def _log_sum_exp_kernel(logits, out, n, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        high = tl.full((BLOCK,), -1e30, tl.float32)  # of every lane: lanes meet once, at the end
        total = tl.full((BLOCK,), 0.0, tl.float32)
        for start in range(0, n, BLOCK):
            column = start + tl.arange(0, BLOCK)
            z = tl.load(logits + row * n + column, mask=column < n, other=float("-inf")).to(tl.float32)
            higher = tl.maximum(high, z)
            total = total * tl.exp(high - higher) + tl.exp(z - higher)
            high = higher
        highest = tl.max(high)
        tl.store(out + row, highest + tl.log(tl.sum(total * tl.exp(high - highest))))

    @triton.jit
    def _softmax_gradient_kernel(
        logits, lse, targets, weights, out, out_t, m, n,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ASSEMBLY: tl.constexpr,
    ):  # fmt: skip
        row, column, inside = _tile(m, n, BLOCK_M, BLOCK_N)
        at = row[:, None] * n + column[None, :]
        z = tl.load(logits + at, mask=inside, other=float("-inf")).to(tl.float32)
        shift = tl.load(lse + row, mask=row < m, other=0.0)
        target = tl.load(targets + row, mask=row < m, other=-1).to(tl.int32)
        weight = tl.load(weights + row, mask=row < m, other=0.0)
        probability = _exp(z - shift[:, None], ASSEMBLY)
        onehot = column.to(tl.int32)[None, :] == target[:, None]
        grad = _round(weight[:, None] * (probability - tl.where(onehot, 1.0, 0.0)), False, ASSEMBLY)
        _store_bytes(out + at, grad, inside)
        _store_transposed(out_t, grad, row, column, m, m, n)

    # One program has some heads of q, k and v, counted through the tokens; rotary pairs are (x[i], x[i + HALF]).

    @triton.jit
    def _pair(pointer, at, inside, HALF: tl.constexpr):
        first = tl.load(pointer + at, mask=inside, other=0.0).to(tl.float32)
        return first, tl.load(pointer + at + HALF, mask=inside, other=0.0).to(tl.float32)

    @triton.jit
    def _store_pair(pointer, at, first, second, inside, HALF: tl.constexpr):
        tl.store(pointer + at, first, mask=inside)
        tl.store(pointer + at + HALF, second, mask=inside)

    @triton.jit
    def _inverse_rms(a, b, HALF: tl.constexpr):
        mean = (tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * HALF)
        return tl.rsqrt(mean + 1.1920929e-07)[:, None]  # as F.rms_norm: the epsilon of float32

    @triton.jit
    def _places(cos, sin, active, pairs, T, H, FREEZE: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr):
        """Where this program's heads lie in qkv and in q; which exist; their cos and sin; which tokens are active."""
        head = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = (head < pairs)[:, None]
        token, column = head // H, tl.arange(0, HALF)
        source = ((token * 3 * H + head % H).to(tl.int64) * (2 * HALF))[:, None] + column[None, :]
        target = (head.to(tl.int64) * (2 * HALF))[:, None] + column[None, :]
        angle = ((token % T) * HALF)[:, None] + column[None, :]
        c, s = tl.load(cos + angle, mask=inside, other=0.0), tl.load(sin + angle, mask=inside, other=0.0)
        moves = inside
        if FREEZE:
            moves = (tl.load(active + token, mask=head < pairs, other=0) != 0)[:, None]
        return source, target, inside, c, s, moves

    @triton.jit
    def _heads_kernel(
        qkv, cos, sin, keys, values, active, q, k, v, pairs, T, H,
        FREEZE: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        source, target, inside, c, s, moves = _places(cos, sin, active, pairs, T, H, FREEZE, HALF, BLOCK)
        for part in tl.static_range(3):
            a, b = _pair(qkv, source + part * H * (2 * HALF), inside, HALF)
            if part < 2:
                r = _inverse_rms(a, b, HALF)
                a, b = a * r, b * r
                a, b = a * c - b * s, a * s + b * c
            if part > 0 and FREEZE:
                old_a, old_b = _pair(keys if part == 1 else values, target, inside & ~moves, HALF)
                a, b = tl.where(moves, a, old_a), tl.where(moves, b, old_b)
            _store_pair(q if part == 0 else k if part == 1 else v, target, a, b, inside, HALF)

    @triton.jit
    def _heads_gradient_kernel(
        qkv, cos, sin, active, dq, dk, dv, d_qkv, d_keys, d_values, pairs, T, H,
        FREEZE: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        source, target, inside, c, s, moves = _places(cos, sin, active, pairs, T, H, FREEZE, HALF, BLOCK)
        for part in tl.static_range(3):
            a, b = _pair(dq if part == 0 else dk if part == 1 else dv, target, inside, HALF)
            if part > 0 and FREEZE:
                old_a, old_b = tl.where(moves, 0.0, a), tl.where(moves, 0.0, b)
                _store_pair(d_keys if part == 1 else d_values, target, old_a, old_b, inside, HALF)
                a, b = tl.where(moves, a, 0.0), tl.where(moves, b, 0.0)
            at = source + part * H * (2 * HALF)
            if part < 2:
                x, y = _pair(qkv, at, inside, HALF)
                r = _inverse_rms(x, y, HALF)
                x, y = x * r, y * r
                a, b = a * c + b * s, b * c - a * s
                along = ((tl.sum(a * x, 1) + tl.sum(b * y, 1)) / (2 * HALF))[:, None]
                a, b = r * (a - along * x), r * (b - along * y)
            _store_pair(d_qkv, at, a, b, inside, HALF)

    def _grid(m, n, block_m, block_n):
        return triton.cdiv(m, block_m), triton.cdiv(n, block_n)

    def operator(function):
        """`function` as an operator that torch.compile sees into: it owns the kernel launches, and no gradient."""
        name = function.__name__.strip("_")
        return torch.library.triton_op(f"{NAMESPACE}::{name}", function, mutates_args={})

    def _transpose(x: torch.Tensor) -> torch.Tensor:
        (m, n), block = x.shape, 64
        out = x.new_empty(n, m)
        kernel = launch(_transpose_kernel)
        kernel[_grid(m, n, block, block)](x, out, m, n, BLOCK=block, num_warps=4)
        return out

    def _quantize_transpose(
        x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        (m, n), block = x.shape, 64
        grid = _grid(m, n, block, block)
        out = torch.empty(m, n, dtype=dtype, device=x.device)
        out_t = torch.empty(n, m, dtype=dtype, device=x.device)
        amax = torch.empty(grid[0] * grid[1], dtype=torch.float32, device=x.device)
        kernel = launch(_quantize_transpose_kernel)
        kernel[grid](x, scale, out, out_t, amax, m, n, E4M3=dtype == E4M3, BLOCK=block, ASSEMBLY=assembly, num_warps=4)
        return out, out_t, amax

    def _swiglu_quantize(gate_up: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        m, n = gate_up.shape[0], gate_up.shape[1] // 2
        block = (4, 1024)
        grid = _grid(m, n, *block)
        out = torch.empty(m, n, dtype=E4M3, device=gate_up.device)
        amax = torch.empty(grid[0] * grid[1], dtype=torch.float32, device=gate_up.device)
        kernel = launch(_swiglu_kernel)
        kernel[grid](
            gate_up, scale, out, amax, m, n, BLOCK_M=block[0], BLOCK_N=block[1], ASSEMBLY=assembly, num_warps=4
        )
        return out, amax

    def _swiglu_rounded(gate_up: torch.Tensor) -> torch.Tensor:
        m, n, block = gate_up.shape[0], gate_up.shape[1] // 2, (4, 1024)
        out = gate_up.new_empty(m, n)
        kernel = launch(_swiglu_rounded_kernel)
        kernel[_grid(m, n, *block)](gate_up, out, m, n, BLOCK_M=block[0], BLOCK_N=block[1], num_warps=4)
        return out

    def _swiglu_gradient_quantize(
        grad: torch.Tensor, gate_up: torch.Tensor, scale: torch.Tensor, grad_scale: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        (m, n), (*block, warps) = grad.shape, TILES["swiglu gradient"]
        grid = _grid(m, n, *block)
        wide = torch.empty(m, 2 * n, dtype=dtype, device=grad.device)
        wide_t = torch.empty(2 * n, m, dtype=dtype, device=grad.device)
        product_t = torch.empty(n, m, dtype=E4M3, device=grad.device)
        amax = torch.empty(grid[0] * grid[1], dtype=torch.float32, device=grad.device)
        kernel = launch(_swiglu_gradient_kernel)
        kernel[grid](
            grad, gate_up, scale, grad_scale, wide, wide_t, product_t, amax, m, n,
            E4M3=dtype == E4M3, BLOCK_M=block[0], BLOCK_N=block[1], ASSEMBLY=assembly, num_warps=warps,
        )  # fmt: skip
        return wide, wide_t, product_t, amax

    def _log_sum_exp(logits: torch.Tensor) -> torch.Tensor:
        out = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
        kernel = launch(_log_sum_exp_kernel)
        kernel[(len(logits),)](logits, out, logits.shape[1], BLOCK=4096, num_warps=8)
        return out

    def _softmax_gradient_quantize(
        logits: torch.Tensor, lse: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        (m, n), block = logits.shape, (64, 64)
        out = torch.empty(m, n, dtype=E5M2, device=logits.device)
        out_t = torch.empty(n, m, dtype=E5M2, device=logits.device)
        kernel = launch(_softmax_gradient_kernel)
        kernel[_grid(m, n, *block)](
            logits, lse, targets, weights, out, out_t, m, n,
            BLOCK_M=block[0], BLOCK_N=block[1], ASSEMBLY=assembly, num_warps=4,
        )  # fmt: skip
        return out, out_t

    def _heads(
        qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, keys: torch.Tensor | None,
        values: torch.Tensor | None, active: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
        (T, _, H, d), (block, warps) = qkv.shape[-4:], TILES["heads"]
        q, k, v = (torch.empty_like(qkv[..., 0, :, :], memory_format=torch.contiguous_format) for _ in "qkv")
        freeze = keys is not None
        frozen = [x.contiguous() for x in (keys, values, active)] if freeze else [qkv] * 3  # not used
        launch(_heads_kernel)[(triton.cdiv(q.numel(), block * d),)](
            qkv, cos.contiguous(), sin.contiguous(), *frozen, q, k, v, q.numel() // d, T, H,
            FREEZE=freeze, HALF=d // 2, BLOCK=block, num_warps=warps,
        )  # fmt: skip
        return q, k, v

    def _heads_gradient(
        dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
        active: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
        """Of qkv, and of the frozen keys and values, where there are any."""
        (T, _, H, d), (block, warps) = qkv.shape[-4:], TILES["heads gradient"]
        dq, dk, dv, d_qkv = dq.contiguous(), dk.contiguous(), dv.contiguous(), torch.empty_like(qkv)
        freeze = active is not None
        d_keys, d_values = (torch.empty_like(dk) if freeze else dk.new_empty(0) for _ in "kv")
        launch(_heads_gradient_kernel)[(triton.cdiv(dq.numel(), block * d),)](
            qkv, cos.contiguous(), sin.contiguous(), active.contiguous() if freeze else dq, dq, dk, dv, d_qkv, d_keys,
            d_values, dq.numel() // d, T, H, FREEZE=freeze, HALF=d // 2, BLOCK=block, num_warps=warps,
        )  # fmt: skip
        return d_qkv, d_keys, d_values

    def _save_heads(ctx, inputs, output):
        qkv, cos, sin, _, _, active = inputs
        ctx.save_for_backward(qkv, cos, sin, active)

    def _of_heads(ctx, dq, dk, dv):
        *saved, active = ctx.saved_tensors
        d_qkv, d_keys, d_values = _heads_gradient(dq, dk, dv, *saved, active)
        return d_qkv, None, None, *((None, None) if active is None else (d_keys, d_values)), None

    _heads, _heads_gradient = operator(_heads), operator(_heads_gradient)
    _heads.register_autograd(_of_heads, setup_context=_save_heads)
    _transpose, _quantize_transpose = operator(_transpose), operator(_quantize_transpose)
    _swiglu_quantize, _swiglu_rounded = operator(_swiglu_quantize), operator(_swiglu_rounded)
    _swiglu_gradient_quantize = operator(_swiglu_gradient_quantize)
    _log_sum_exp = operator(_log_sum_exp)
    _softmax_gradient_quantize = operator(_softmax_gradient_quantize)
