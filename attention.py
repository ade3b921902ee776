"""Attention of one segment over [memory, segment], as FlashAttention (Dao et al. 2022, arXiv 2205.14135) in Triton.

Why not a general kernel? A segment of Transformer-XL with documents has structure that one cannot see from outside:

1. The memory is read where it lies, a ring buffer: nothing is concatenated, copied or rolled.
2. The memory takes no gradient. A backward pass has five matrix products a block; over the memory dk and dv, two of
   them, and the query scores that only they need, are not computed.
3. What a query sees is one interval of keys, from the start of its document up to itself, and its start never moves
   back within a row. So two numbers a block, `first` of its first and of its last query, tell which key blocks no
   query sees (they are not visited: dead memory and earlier documents cost nothing), which ones all queries see
   (they need no mask), and which lie on an edge.

Three kernels: the forward pass and dq go over the keys of a block of queries, dk/dv over the queries of a block of
keys. Nothing is summed by atomics: results repeat bit for bit. Scores are in units of log2 (exp2 is the instruction
that GPUs have) and sums in float32.

Shapes: B batch, T segment length, M memory length, H heads, d head size.
"""

from types import SimpleNamespace

import torch
import torch.nn.functional as F

import kernels
from kernels import NAMESPACE, launch

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:  # PyTorch for the CPU comes without; then only `reference` can be used
    triton, tl, jit = None, SimpleNamespace(constexpr=None), lambda function: function

# Launch configurations (block of queries, block of keys, warps, pipeline stages) by compute capability, (major, minor)
# or major. The default fits into the 100 KB of shared memory of sm_86, sm_89 and sm_120.
DEFAULT = {"forward": (128, 64, 4, 2), "dq": (64, 64, 4, 2), "dkdv": (64, 64, 4, 2)}
LARGE = {"forward": (64, 64, 4, 3), "dq": (64, 64, 4, 3), "dkdv": (32, 64, 4, 3)}  # 160 KB and more
CONFIGS = {(8, 0): LARGE, 9: LARGE, 10: LARGE}


def attention(q, k, v, past, first, last, offset):
    """softmax(q k^T / sqrt(d)) v over the keys that each query sees; differentiable in q, k and v.

    q, k, v: (B, T, H, d) of the segment, views with any strides but 1 in the last dimension. past: (keys, values), each
    (B, M, H, d), or None; without gradient. first: (B, T) int32, the first key of [memory, segment] that each query
    sees, the last being itself, M + t; it never decreases along a row. last: (B, T) int32, the last query that sees
    each key of the segment. offset: (1,) int32, the slot of the oldest entry of the memory: entry i lies in slot
    (i + offset) % M, and 0 <= offset < M. Returns (B, T, H, d), contiguous.
    """
    keys, values = past or (None, None)
    return _forward(q, k, v, keys, values, first, last, offset)[0]


def available(device, d):
    """Whether the kernels run on `device` with a head size of d."""
    capable = triton is not None and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return kernels.enabled and capable and d in (16, 32, 64, 128)


def reference(q, k, v, past, first, offset):
    """The same, as plainly as can be: the definition of `attention`, and its stand-in on other devices."""
    T, M = q.shape[1], past[0].shape[1] if past else 0
    if past:
        slot = (torch.arange(M, device=q.device) + offset) % M
        k, v = (torch.cat([old.detach()[:, slot], new], 1) for old, new in zip(past, (k, v)))
    key, query = torch.arange(M + T, device=q.device), torch.arange(T, device=q.device)
    mask = (key >= first[..., None]) & (key <= M + query[:, None])  # (B, T, M + T)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None]).transpose(1, 2)


# ------------------------------------------------------------------------------------------------- kernels
#
# A range of blocks lo..hi splits into lo..a (edge), a..b (seen in full) and b..hi (edge again). The two edges share one
# loop, so that there are two loops to compile and not three. What a program reads beyond the last row of a block of its
# own is that last row again; it is not stored.


@jit
def _tile(pointer, row, stride, HEAD: tl.constexpr):
    """Pointers to (rows, d)."""
    return pointer + row[:, None] * stride + tl.arange(0, HEAD)[None, :]


@jit
def _add_keys(
    acc, norm, high, q, grad, k_pointer, v_pointer, stride_k, stride_v, start, length, offset, row, first, scale,
    EDGE: tl.constexpr, RING: tl.constexpr, GRADIENT: tl.constexpr, BLOCK_N: tl.constexpr, HEAD: tl.constexpr,
):  # fmt: skip
    """One block of keys for a block of queries. Forward: acc is the output, not yet divided by norm, and high the
    largest score so far. Gradient: acc is dq, norm delta and high the log-sum-exp."""
    key = start + tl.arange(0, BLOCK_N)
    slot = key
    if RING:
        slot = key + offset
        slot = tl.where(slot >= length, slot - length, slot)
    k_tile, v_tile = _tile(k_pointer, slot, stride_k, HEAD), _tile(v_pointer, slot, stride_v, HEAD)
    if EDGE:
        inside = (key >= 0) & (key < length)
        k = tl.load(k_tile, mask=inside[:, None], other=0.0)
        v = tl.load(v_tile, mask=inside[:, None], other=0.0)
    else:
        k, v = tl.load(k_tile), tl.load(v_tile)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if EDGE:
        seen = key[None, :] >= first[:, None]
        if not RING:
            seen &= key[None, :] <= row[:, None]
        scores = tl.where(seen, scores, float("-inf"))
    if GRADIENT:
        p = tl.exp2(scores * scale - high[:, None])
        dp = tl.dot(grad, tl.trans(v), input_precision="ieee")
        ds = p * (dp - norm[:, None])
        acc = tl.dot(ds.to(k.dtype), k, acc, input_precision="ieee")
    else:
        higher = tl.maximum(high, tl.max(scores, 1) * scale)
        p = tl.exp2(scores * scale - higher[:, None])
        shrink = tl.exp2(high - higher)
        norm = norm * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        high = higher
    return acc, norm, high


@jit
def _over_keys(
    acc, norm, high, q, grad, k_pointer, v_pointer, stride_k, stride_v, lo, a, b, hi, length, offset, row, first, scale,
    RING: tl.constexpr, GRADIENT: tl.constexpr, BLOCK_N: tl.constexpr, HEAD: tl.constexpr,
):  # fmt: skip
    for i in range(0, a - lo + hi - b, BLOCK_N):
        start = tl.where(i < a - lo, lo + i, b + i - (a - lo))
        acc, norm, high = _add_keys(
            acc, norm, high, q, grad, k_pointer, v_pointer, stride_k, stride_v, start, length, offset, row, first,
            scale, True, RING, GRADIENT, BLOCK_N, HEAD,
        )  # fmt: skip
    for start in range(a, b, BLOCK_N):
        acc, norm, high = _add_keys(
            acc, norm, high, q, grad, k_pointer, v_pointer, stride_k, stride_v, start, length, offset, row, first,
            scale, False, RING, GRADIENT, BLOCK_N, HEAD,
        )  # fmt: skip
    return acc, norm, high


@jit
def _query_kernel(
    q, k, v, keys, values, first, offset, out, lse, grad, delta, dq, H, T, M,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, keys_b, keys_t, keys_h, values_b, values_t, values_h,
    MEMORY: tl.constexpr, GRADIENT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD: tl.constexpr,
    SCALE: tl.constexpr,  # not a float argument, which torch.compile would pass as float64
):  # fmt: skip
    """A block of queries over all keys: out and lse, or, from these, delta and dq."""
    # Neighbours in time share the keys of one head, and of those the last, longest block of queries starts first.
    blocks = (T + BLOCK_M - 1) // BLOCK_M
    pid = tl.program_id(0)
    begin = (blocks - 1 - pid % blocks) * BLOCK_M
    bh = pid // blocks
    b, h = (bh // H).to(tl.int64), bh % H
    end = tl.minimum(begin + BLOCK_M, T)  # of the queries
    index = begin + tl.arange(0, BLOCK_M)
    row = tl.minimum(index, T - 1)
    here = (b * T * H + h) * HEAD  # in (B, T, H, d)
    line = bh.to(tl.int64) * T  # in (B, H, T)
    first += b * T
    first_lo, first_hi = tl.load(first + begin), tl.load(first + end - 1)
    first_row = tl.load(first + row)
    q_tile = tl.load(_tile(q + b * q_b + h * q_h, row, q_t, HEAD))
    acc = tl.full((BLOCK_M, HEAD), 0.0, tl.float32)
    if GRADIENT:
        g = tl.load(_tile(grad + here, row, H * HEAD, HEAD))
        o = tl.load(_tile(out + here, row, H * HEAD, HEAD))
        norm = tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)
        high = tl.load(lse + line + row)
        tl.store(delta + line + index, norm, mask=index < T)
    else:
        g = q_tile
        norm = tl.full((BLOCK_M,), 0.0, tl.float32)
        high = tl.full((BLOCK_M,), -1e30, tl.float32)  # finite: a row that sees nothing of a block stays at zero
    log2_scale = SCALE * 1.4426950408889634
    if MEMORY:  # in blocks that end at M
        lo = M - (M - tl.minimum(first_lo, M) + BLOCK_N - 1) // BLOCK_N * BLOCK_N
        a = M - (M - tl.minimum(first_hi, M)) // BLOCK_N * BLOCK_N
        acc, norm, high = _over_keys(
            acc, norm, high, q_tile, g, keys + b * keys_b + h * keys_h, values + b * values_b + h * values_h,
            keys_t, values_t, lo, a, M, M, M, tl.load(offset), row, first_row, log2_scale,
            True, GRADIENT, BLOCK_N, HEAD,
        )  # fmt: skip
    lo = tl.maximum(first_lo - M, 0) // BLOCK_N * BLOCK_N
    a = (tl.maximum(first_hi - M, 0) + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    full = tl.maximum(a, (begin + 1) // BLOCK_N * BLOCK_N)  # the diagonal begins
    hi = (end + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    acc, norm, high = _over_keys(
        acc, norm, high, q_tile, g, k + b * k_b + h * k_h, v + b * v_b + h * v_h,
        k_t, v_t, lo, a, full, hi, T, 0, row, first_row - M, log2_scale,
        False, GRADIENT, BLOCK_N, HEAD,
    )  # fmt: skip
    inside = (index < T)[:, None]
    if GRADIENT:
        tl.store(_tile(dq + here, index, H * HEAD, HEAD), (acc * SCALE).to(q_tile.dtype), mask=inside)
    else:
        tl.store(_tile(out + here, index, H * HEAD, HEAD), (acc / norm[:, None]).to(q_tile.dtype), mask=inside)
        tl.store(lse + line + index, high + tl.log2(norm), mask=index < T)


@jit
def _add_queries(
    dk, dv, k, v, q_pointer, grad, lse, delta, stride_q, stride_grad, start, T, key, last, scale,
    EDGE: tl.constexpr, BLOCK_M: tl.constexpr, HEAD: tl.constexpr,
):  # fmt: skip
    """One block of queries for a block of keys. All is transposed: a row of p is a key."""
    row = start + tl.arange(0, BLOCK_M)
    q_tile, g_tile = _tile(q_pointer, row, stride_q, HEAD), _tile(grad, row, stride_grad, HEAD)
    if EDGE:
        q = tl.load(q_tile, mask=(row < T)[:, None], other=0.0)
        g = tl.load(g_tile, mask=(row < T)[:, None], other=0.0)
        high, d = tl.load(lse + row, mask=row < T, other=0.0), tl.load(delta + row, mask=row < T, other=0.0)
    else:
        q, g, high, d = tl.load(q_tile), tl.load(g_tile), tl.load(lse + row), tl.load(delta + row)
    scores = tl.dot(k, tl.trans(q), input_precision="ieee")
    if EDGE:
        seen = (key[:, None] <= row[None, :]) & (row[None, :] <= last[:, None])
    p = tl.exp2(scores * scale - high[None, :])
    if EDGE:
        p = tl.where(seen, p, 0.0)
    dv = tl.dot(p.to(g.dtype), g, dv, input_precision="ieee")
    dp = tl.dot(v, tl.trans(g), input_precision="ieee")
    ds = p * (dp - d[None, :])
    if EDGE:
        ds = tl.where(seen, ds, 0.0)  # zero times what may not be finite: these are other documents' queries
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@jit
def _key_kernel(
    q, k, v, last, lse, grad, delta, dk, dv, H, T,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """A block of keys of the segment over all queries: dk and dv."""
    blocks = (T + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    begin = pid % blocks * BLOCK_N
    bh = pid // blocks
    b, h = (bh // H).to(tl.int64), bh % H
    index = begin + tl.arange(0, BLOCK_N)
    key = tl.minimum(index, T - 1)
    here = (b * T * H + h) * HEAD
    line = bh.to(tl.int64) * T
    last += b * T
    last_lo, last_hi = tl.load(last + begin), tl.load(last + tl.minimum(begin + BLOCK_N, T) - 1)
    last_key = tl.load(last + key)
    k_tile = tl.load(_tile(k + b * k_b + h * k_h, key, k_t, HEAD))
    v_tile = tl.load(_tile(v + b * v_b + h * v_h, key, v_t, HEAD))
    dk_tile, dv_tile = tl.full((BLOCK_N, HEAD), 0.0, tl.float32), tl.full((BLOCK_N, HEAD), 0.0, tl.float32)
    q += b * q_b + h * q_h
    lo = begin // BLOCK_M * BLOCK_M
    hi = (last_hi + BLOCK_M) // BLOCK_M * BLOCK_M
    a = tl.minimum((begin + BLOCK_N + BLOCK_M - 2) // BLOCK_M * BLOCK_M, hi)  # the diagonal ends
    full = tl.maximum((last_lo + 1) // BLOCK_M * BLOCK_M, a)
    for i in range(0, a - lo + hi - full, BLOCK_M):
        start = tl.where(i < a - lo, lo + i, full + i - (a - lo))
        dk_tile, dv_tile = _add_queries(
            dk_tile, dv_tile, k_tile, v_tile, q, grad + here, lse + line, delta + line, q_t, H * HEAD,
            start, T, key, last_key, SCALE * 1.4426950408889634, True, BLOCK_M, HEAD,
        )  # fmt: skip
    for start in range(a, full, BLOCK_M):
        dk_tile, dv_tile = _add_queries(
            dk_tile, dv_tile, k_tile, v_tile, q, grad + here, lse + line, delta + line, q_t, H * HEAD,
            start, T, key, last_key, SCALE * 1.4426950408889634, False, BLOCK_M, HEAD,
        )  # fmt: skip
    inside = (index < T)[:, None]
    tl.store(_tile(dk + here, index, H * HEAD, HEAD), (dk_tile * SCALE).to(k_tile.dtype), mask=inside)
    tl.store(_tile(dv + here, index, H * HEAD, HEAD), dv_tile.to(v_tile.dtype), mask=inside)


# ------------------------------------------------------------------------------------------------- operators


def _config(name, device, d):
    """Keyword arguments of a launch: blocks, warps, stages."""
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    configs = CONFIGS.get((major, minor), CONFIGS.get(major, DEFAULT))
    block_m, block_n, warps, stages = configs[name]
    if d > 64:  # the same shared memory for the tiles that are streamed
        block_m, block_n = (block_m // 2, block_n) if name == "dkdv" else (block_m, block_n // 2)
    return dict(BLOCK_M=block_m, BLOCK_N=block_n, num_warps=warps, num_stages=stages)


def _query_pass(name, q, k, v, keys, values, first, offset, out, lse, grad, delta, dq):
    (B, T, H, d), M = q.shape, 0 if keys is None else keys.shape[1]
    if d not in (16, 32, 64, 128):
        raise ValueError(f"attention: the head size must be 16, 32, 64 or 128, not {d}")
    if not M:
        keys, values = k, v
    inputs = q, k, v, keys, values
    if any(x.stride(-1) != 1 for x in inputs) or not (first.is_contiguous() and out.is_contiguous()):
        raise ValueError("attention: the last dimension of all tensors must be contiguous, and `first` altogether")
    if max(x.shape[1] * x.stride(1) for x in inputs) >= 2**31:  # within a row of the batch, indices are 32 bit
        raise ValueError("attention: one row of the batch has 2^31 numbers or more")
    strides = [s for x in inputs for s in x.stride()[:3]]
    config = _config(name, q.device, d)
    grid = (B * H * -(-T // config["BLOCK_M"]),)
    launch(_query_kernel)[grid](
        *inputs, first, offset, out, lse, grad, delta, dq, H, T, M, *strides,
        MEMORY=M > 0, GRADIENT=name == "dq", HEAD=d, SCALE=d**-0.5, **config,
    )  # fmt: skip


def _key_pass(q, k, v, last, lse, grad, delta, dk, dv):
    B, T, H, d = q.shape
    if not last.is_contiguous():
        raise ValueError("attention: `last` must be contiguous")
    strides = [s for x in (q, k, v) for s in x.stride()[:3]]
    config = _config("dkdv", q.device, d)
    grid = (B * H * -(-T // config["BLOCK_N"]),)
    launch(_key_kernel)[grid](
        q, k, v, last, lse, grad, delta, dk, dv, H, T, *strides, HEAD=d, SCALE=d**-0.5, **config
    )  # fmt: skip


def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keys: torch.Tensor | None, values: torch.Tensor | None,
    first: torch.Tensor, last: torch.Tensor, offset: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The output and the log-sum-exp of the scores, (B, H, T) float32, in units of log2."""
    B, T, H, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(B, H, T, dtype=torch.float32, device=q.device)
    _query_pass("forward", q, k, v, keys, values, first, offset, out, lse, q, q, q)  # q: not used
    return out, lse


def _backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keys: torch.Tensor | None,
    values: torch.Tensor | None, first: torch.Tensor, last: torch.Tensor, offset: torch.Tensor, out: torch.Tensor,
    lse: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    grad = grad.contiguous()
    dq, dk, dv = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(3))
    delta = torch.empty_like(lse)
    _query_pass("dq", q, k, v, keys, values, first, offset, out, lse, grad, delta, dq)
    _key_pass(q, k, v, last, lse, grad, delta, dk, dv)
    return dq, dk, dv


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output)


def _gradient(ctx, grad, _):
    return *_backward(grad, *ctx.saved_tensors), None, None, None, None, None


if triton is not None:
    _forward = torch.library.triton_op(f"{NAMESPACE}::attention", _forward, mutates_args={})
    _backward = torch.library.triton_op(f"{NAMESPACE}::attention_backward", _backward, mutates_args={})
    _forward.register_autograd(_gradient, setup_context=_save)
