"""Speed of parts of a training step, alone: its matrix products and its attention.

python bench.py gemm                                           every product alone: bf16, FP8, fast accumulation;
                                                               weight gradients added or as one product; the head
python bench.py attention --memory 512,4096                    attention.py beside PyTorch's own
"""

import math
from statistics import median
from typing import NamedTuple

import torch
from torch import nn

import attention
import fp8
import kernels
from bench_common import align, clock, finish, load, note
from device import pick_dtype
from memory import Memory, Spans

# ------------------------------------------------------------------------------------------------- matrix products


class Gemm(NamedTuple):
    """A matrix product of the training step, (m, k) @ (k, n), `calls` times. kind: forward, input or weight (gradient);
    they differ in layout."""

    name: str
    kind: str
    m: int
    n: int
    k: int
    calls: int


def model_gemms(c, rows, chunk=4096):
    """The products of blocks and head for `rows` tokens; the head runs in chunks."""
    D, V, uses = c.width, c.padded_vocab_size, c.prelude + c.coda + c.max_depth * c.recur
    layers = [("qkv", rows, D, 3 * D, uses), ("output", rows, D, D, uses)]
    layers += [("gate and up", rows, D, 2 * c.hidden, uses), ("down", rows, c.hidden, D, uses)]
    layers += [("injection", rows, 2 * D, D, c.max_depth)] if c.injection == "concat_linear" else []
    layers += [("head", chunk, D, V, rows // chunk), ("head", rows % chunk, D, V, 1)]
    for name, m, fan_in, fan_out, calls in layers:
        if m and calls:
            yield Gemm(name, "forward", m, fan_out, fan_in, calls)
            yield Gemm(name, "input", m, fan_in, fan_out, calls)
            yield Gemm(name, "weight", fan_out, fan_in, m, calls)


def muon_gemms(c):
    """The products of `optim.orthogonalize` for X (m, n), m <= n: X X', those of (m, m) matrices, (m, m) by X."""
    blocks = c.prelude + c.coda + c.recur * (1 if c.share else c.max_depth)
    for (m, n), matrices in (((c.width, c.width), 4), (sorted((c.width, c.hidden)), 3)):
        matrices *= blocks
        large, small = (5, 5) if n < 4 * m else (2, 14)
        yield Gemm("X X'", "forward", m, m, n, large * matrices)
        yield Gemm("A A", "input", m, m, m, small * matrices)
        yield Gemm("B X", "input", m, n, m, large * matrices)


def operands(gemm, dtype, device):
    """Random arguments of `fp8.matmul`, laid out as the step has them."""
    _, kind, m, n, k, _ = gemm
    low = dtype == kernels.E4M3  # then the summed dimension is contiguous in both operands
    random = lambda *shape: torch.randn(shape, device=device, dtype=torch.bfloat16)  # noqa: E731
    a = random(k, m).t() if kind == "weight" and not low else random(m, k)
    b = random(n, k) if kind == "forward" or low else random(k, n).t()
    one = torch.ones((), device=device)
    scales = (one, one, torch.float32 if kind == "weight" else torch.bfloat16) if low else ()
    return a.to(dtype), b.to(dtype), *scales


def gemm_seconds(gemm, dtype, device, repeats=10, buffers=3):
    """Seconds of one call, as `fp8.matmul` runs it; dtype: of the activations, or E4M3 for FP8. Several operands take
    turns, lest they be found in the L2 cache, where the step would not find them."""
    cases = [operands(gemm, dtype, device) for _ in range(buffers)]
    for i in range(buffers + repeats):
        if i == buffers:  # those before were the warm-up
            start = clock(device)
        fp8.matmul(*cases[i % buffers])
    return (clock(device) - start) / repeats


def limits_of(products, samples):
    """{precision or muon: ms and TFLOP/s of a step, and each of its products} from `samples` of their seconds."""
    limits = {}
    for (name, gemm, _), seconds in zip(products, zip(*samples)):
        limit = limits.setdefault(name, {"ms": 0.0, "flops": 0, "gemms": []})
        ms = 1e3 * median(seconds)
        limit["ms"] += gemm.calls * ms
        limit["flops"] += 2 * gemm.m * gemm.n * gemm.k * gemm.calls
        limit["gemms"].append(gemm._asdict() | {"ms": ms})
    for limit in limits.values():
        limit["tflops"] = limit["flops"] / limit["ms"] / 1e9
        limit["ms_with_muon"] = limit["ms"] + limits["muon"]["ms"] * (limit is not limits["muon"])
    return limits


def run_gemm(args, overrides):
    """Every product of blocks and head alone. FP8 "as used" is what `fp8.matmul` chooses of the other two."""
    cfg, device = load(args, overrides)
    kinds = {"bf16": (pick_dtype("auto", device), fp8.FAST_TERMS)}
    if device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9):
        limits = {"FP8 fast": math.inf, "FP8 slow": 0, "FP8 as used": fp8.FAST_TERMS}
        kinds |= {name: (kernels.E4M3, terms) for name, terms in limits.items()}
    gemms, rows = list(model_gemms(cfg.model, args.batch * args.segment)), []
    samples = [{name: [] for name in kinds} for _ in gemms]
    for _ in range(args.rounds):
        for gemm, sample in zip(gemms, samples):
            for name, (dtype, fp8.FAST_TERMS) in kinds.items():  # the last is as it was
                sample[name].append(gemm_seconds(gemm, dtype, device))
    lines = [["microseconds (TFLOP/s)", "m x n x k", *kinds]]
    for gemm, sample in zip(gemms, samples):
        rows.append(gemm._asdict() | {name: 1e6 * median(seconds) for name, seconds in sample.items()})
        flops = 2e-6 * gemm.m * gemm.n * gemm.k
        cells = [f"{rows[-1][name]:.0f} ({flops / rows[-1][name]:.0f})" for name in kinds]
        lines.append([f"{gemm.name}, {gemm.kind}", f"{gemm.m} x {gemm.n} x {gemm.k}", *cells])
    print(align(lines))
    dtypes = {name: kinds[name][0] for name in ("bf16", "FP8 as used") if name in kinds}
    sums = [weight_sums(gemm, dtypes, device, args.rounds) for gemm in gemms if gemm.kind == "weight"]
    lines = [["weight gradients of all uses, ms: added (as one product)", *dtypes]]
    lines += [[s["name"], *(f"{s[name][0]:.2f} ({s[name][1]:.2f})" for name in dtypes)] for s in sums]
    print(align(lines))
    tokens, low = args.batch * args.segment, {"bf16": fp8.BF16, "FP8 as used": fp8.FP8}
    cases = [(name, chunk) for name in dtypes for chunk in (4096, tokens)]  # as training has it, and all at once
    heads = [{"dtype": n, "chunk": k} | head_cost(cfg.model, tokens, low[n], k, device, args.rounds) for n, k in cases]
    lines = [["tied head and loss, forward and backward", "rows at once", "ms", "peak GiB"]]
    lines += [[h["dtype"], f"{h['chunk']:,}", f"{h['ms']:.2f}", f"{h['peak_gib']:.2f}"] for h in heads]
    print(align(lines))
    return finish("gemm", device, {"gemms": rows, "weight_sums": sums, "heads": heads})


def weight_sums(gemm, dtypes, device, rounds):
    """Milliseconds of the float32 sum of a weight's gradients over its `calls` uses: products added one after another,
    as training does, and one product whose terms are those of all uses, which would have to be kept until the last."""
    found = {"name": gemm.name, "calls": gemm.calls}
    for name, dtype in dtypes.items():
        parts = [operands(gemm, dtype, device) for _ in range(gemm.calls)]
        whole = operands(gemm._replace(k=gemm.k * gemm.calls), dtype, device)

        def added(parts=parts):
            total = fp8.matmul(*parts[0]).float()
            for part in parts[1:]:
                total += fp8.matmul(*part).float()

        together = lambda whole=whole: fp8.matmul(*whole).float()  # noqa: E731
        found[name] = [1e3 * median(seconds_of(f, device) for _ in range(rounds)) for f in (added, together)]
    return found


def head_cost(c, rows, gemms, chunk, device, rounds):
    """Milliseconds and memory, beyond inputs and weights (0 on a CPU), of `fp8.cross_entropy` and its backward pass."""
    dtype, V = pick_dtype("auto", device), c.padded_vocab_size
    weight = fp8.Weight(nn.Parameter(torch.randn(V, c.width, device=device) * 5 / c.width))
    weight.prepare(dtype, gemms)
    x = nn.functional.rms_norm(torch.randn(rows, c.width, device=device, dtype=dtype), (c.width,)).requires_grad_()
    targets, padding = torch.randint(c.vocab_size, (rows,), device=device), torch.zeros(V, device=device)
    weights = torch.full((rows,), 1 / rows, device=device)

    def step():
        x.grad = weight.masters[0].grad = None
        loss, _ = fp8.cross_entropy(x, weight, padding, targets, weights, gemms, chunk, device.type == "cuda")
        loss.backward()

    seconds, peak = median(seconds_of(step, device) for _ in range(rounds)), 0
    if device.type == "cuda":
        x.grad = weight.masters[0].grad = None
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        peak = torch.cuda.max_memory_allocated(device) - before
    return {"ms": 1e3 * seconds, "peak_gib": peak / 2**30}


def seconds_of(function, device, repeats=5):
    """Seconds of one call."""
    function()
    start = clock(device)
    for _ in range(repeats):
        function()
    return (clock(device) - start) / repeats


# ------------------------------------------------------------------------------------------------- attention


def run_attention(args, overrides):
    """One recurrence's attention, forward and with the backward pass; what needs a concatenation includes it."""
    cfg, device = load(args, overrides)
    c, dtype = cfg.model, pick_dtype("auto", device)
    found, lines = [], [["ms: forward + backward (forward)", "visible", *ATTENTION, "error"]]
    for length in args.memory:
        for documents in dict.fromkeys((0, args.documents)):
            spans, qkv, past = case = attention_case(c, args, length, documents, device, dtype)
            row = {"memory": length, "documents": documents, "visible": spans.context, "ms": {}}
            two = lambda tensors: tensors and [x[:2].float() for x in tensors]  # noqa: E731
            exact, ours = masked(two(qkv), two(past), spans), spans.attend(*qkv, past)[:2]
            row["error"] = ((ours.float() - exact).norm() / exact.norm()).item()
            for name, make in ATTENTION.items():
                try:
                    function = make(*case)
                    row["ms"][name] = [1e3 * x for x in attention_seconds(function, qkv, device, args.rounds)]
                except Exception as error:  # of a rival that this device or version does not have
                    note(f"{name}, memory {length}: {type(error).__name__}: {(str(error) or '?').splitlines()[0]}")
            found.append(row)
            cells = ["{1:.3f} ({0:.3f})".format(*row["ms"][name]) if name in row["ms"] else "-" for name in ATTENTION]
            title = f"memory {length}, {f'documents of {documents}' if documents else 'one document'}"
            lines.append([title, f"{spans.context:.0f}", *cells, f"{row['error']:.1e}"])
    print(align(lines))
    return finish("attention", device, {"dtype": str(dtype), "rows": found})


def attention_case(c, args, length, documents, device, dtype):
    """Spans of a segment after a full memory, random (q, k, v) with gradient, and the memory's (keys, values)."""
    generator, batch, segment = torch.Generator().manual_seed(1), args.batch, args.segment
    tokens = torch.randint(1, 50, (batch, length + segment), generator=generator)
    tokens[tokens == c.document_start] = 50
    if documents:
        tokens[torch.rand(tokens.shape, generator=generator) < 1 / documents] = c.document_start
    shape = (batch, length, c.heads, c.width // c.heads)
    memory = Memory.empty(1, shape, dtype, device) if length else None
    if length:
        live = Spans(tokens[:, :length], None, c, device, kernel=False).live
        memory = Memory(memory.ring, live, position=length + length // 3)  # the oldest token lies somewhere inside
    kernel = dtype != torch.float32 and attention.available(device, shape[-1])
    spans = Spans(tokens[:, length:], memory, c, device, kernel)
    random = lambda n: torch.randn(batch, n, *shape[2:], device=device, dtype=dtype)  # noqa: E731
    return spans, [random(segment).requires_grad_() for _ in "qkv"], [random(length) for _ in "kv"] if length else None


def masked(qkv, past, spans):
    """PyTorch's own, with a mask."""
    q, k, v = qkv
    if spans.mask is None:
        return attention.reference(q, k, v, past, spans.first[: len(q)], spans.offset)
    k, v = (torch.cat([old, new], 1) for old, new in zip(past, (k, v))) if past else (k, v)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=spans.mask[: len(q)]).transpose(1, 2)


def varlen(spans, qkv, past):
    """FlashAttention of PyTorch over [memory, segment], a sequence a document; the dead memory has no queries."""
    from torch.nn.attention.varlen import varlen_attn

    first, (B, T, *_), M = spans.first.long().cpu(), qkv[0].shape, past[0].shape[1] if past else 0
    row, column = first.diff(dim=1).nonzero(as_tuple=True)
    rows, column = torch.arange(B), column + 1
    starts = torch.cat([rows * T, rows * T, row * T + column, torch.tensor([B * T])])
    keys = torch.cat([0 * rows, first[:, 0], M + column, torch.tensor([0])])
    keys += torch.cat([rows, rows, row, torch.tensor([B])]) * (M + T)
    starts, keys = (x.sort().values.int().to(qkv[0].device) for x in (starts, keys))

    def function(q, k, v):
        k, v = (torch.cat([old, new], 1) for old, new in zip(past, (k, v))) if past else (k, v)
        flat = (x.flatten(0, 1) for x in (q, k, v))
        return varlen_attn(*flat, starts, keys, T, M + T, window_size=(-1, 0)).view_as(q)

    return function


def flex(spans, qkv, past):
    """FlexAttention, compiled, with a block mask."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    first, (B, T, *_), M = spans.first, qkv[0].shape, past[0].shape[1] if past else 0
    seen = lambda b, h, i, j: (j >= first[b, i]) & (j <= M + i)  # noqa: E731
    mask, attend = create_block_mask(seen, B, None, T, M + T, device=first.device), torch.compile(flex_attention)

    def function(q, k, v):
        k, v = (torch.cat([old, new], 1) for old, new in zip(past, (k, v))) if past else (k, v)
        return attend(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=mask).transpose(1, 2)

    return function


ATTENTION = {
    "attention.py": lambda spans, _, past: lambda *qkv: spans.attend(*qkv, past),
    "varlen_attn": varlen,
    "FlexAttention": flex,
    "masked SDPA": lambda spans, _, past: lambda *qkv: masked(qkv, past, spans),
}


def attention_seconds(function, qkv, device, rounds, repeats=10):
    """Seconds of forward, and of forward and backward: medians over rounds."""
    grad, seconds = torch.randn_like(function(*qkv)), ([], [])
    for _ in range(rounds + 1):  # the first is the warm-up
        for sample, backward in zip(seconds, (False, True)):
            start = clock(device)
            for _ in range(repeats):
                with torch.set_grad_enabled(backward):
                    out = function(*qkv)
                if backward:
                    torch.autograd.grad(out, qkv, grad)
            sample.append((clock(device) - start) / repeats)
    return [median(sample[1:]) for sample in seconds]
