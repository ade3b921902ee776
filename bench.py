"""Speed, side by side: of training, of the matrix products that it is made of, and of attention over memory.

    python bench.py train                                          the 110M model on one GPU, memory 512 and 4096
    python bench.py train --text data/mix13 --peers bf16,fp8       real tokens, two of the peers
    python bench.py train --memory 512 --documents none            without boundaries of documents
    python bench.py gemm                                           every product alone: bf16, FP8, fast accumulation
    python bench.py attention --memory 512,4096                    attention.py beside PyTorch's own

train: naive (the model as a competent person writes it in eager PyTorch, naive.py), bf16 and fp8 (those of train.py),
stacked (bf16, as many own blocks as the shared one has uses: equal FLOPs, N times the weights). A step is all that
train.py does with a batch except reading its metrics. The limit is the time of a step's matrix products alone.

Peers take turns of a few steps, so that a hot GPU slows all of them; a time is the median over rounds, `spread` half
the range. Memory is full before anything is timed. TFLOP/s count all steps for all tokens. `compile s`: what the first
steps took beyond as many later ones (less if a kernel cache is on disk). `peak GiB`: see `Peer.turn`. naive, bf16 and
fp8 start from the same weights: `first loss` shows it. Progress goes to stderr; the last line of stdout is one JSON
object with every figure.
"""

import argparse
import gc
import json
import math
import re
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple

import torch
from torch import nn

import attention
import config
import data
import fp8
import kernels
import optim
import train
from config import ConfigError
from memory import Memory, Spans
from model import RecurrentTransformer, pick_device, pick_dtype
from naive import Naive

PEERS = ("naive", "bf16", "fp8", "stacked")
KERNELS = {  # a kernel belongs to the first group whose pattern is found in its name
    "fused by torch.compile": r"^triton_",
    "kernels of kernels.py": r"^_(transpose|quantize|swiglu|softmax|log_sum)",
    "attention": r"flash|fmha|attention|^_(query|key|forward|backward|dq|dkv)",
    "GEMMs": r"nvjet|cutlass|gemm|gemv|xmma|cublas|splitK",
    "optimizer and the rest": r"",
}


# ------------------------------------------------------------------------------------------------- the limit


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


def muon_gemms(c, iterations=5):
    """The products of Newton-Schulz: A = X X', A A, (b A + c A A) X, of X (m, n) with m <= n."""
    blocks = c.prelude + c.coda + c.recur * (1 if c.share else c.max_depth)
    for (m, n), matrices in (((c.width, c.width), 4), (sorted((c.width, c.hidden)), 3)):
        calls = iterations * matrices * blocks
        yield from (Gemm("X X'", "forward", m, m, n, calls), Gemm("A A", "input", m, m, m, calls))
        yield Gemm("B X", "input", m, n, m, calls)


def gemm_seconds(gemm, dtype, device, repeats=10, buffers=3):
    """Seconds of one call, as `fp8.matmul` runs it; dtype: of the activations, or E4M3 for FP8. Several operands take
    turns, lest they be found in the L2 cache, where the step would not find them."""
    _, kind, m, n, k, _ = gemm
    low = dtype == kernels.E4M3  # then the summed dimension is contiguous in both operands
    random = lambda *shape: torch.randn(shape, device=device, dtype=torch.bfloat16)  # noqa: E731
    a = [(random(k, m).t() if kind == "weight" and not low else random(m, k)).to(dtype) for _ in range(buffers)]
    b = [(random(n, k) if kind == "forward" or low else random(k, n).t()).to(dtype) for _ in range(buffers)]
    one = torch.ones((), device=device)
    scales = (one, one, torch.float32 if kind == "weight" else torch.bfloat16) if low else ()
    for i in range(buffers + repeats):
        if i == buffers:  # those before were the warm-up
            start = clock(device)
        fp8.matmul(a[i % buffers], b[i % buffers], *scales)
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


# ------------------------------------------------------------------------------------------------- peers


class Peer:
    """One implementation in training. failed: it ran out of memory in this section."""

    def __init__(self, name, cfg, device):
        self.name, self.cfg, self.device, self.config = name, cfg, device, cfg.model
        if name == "stacked":
            own = dict(share=False, halting="fixed", injection="none", memory="per_step")
            self.config = replace(cfg.model, **own)
        if name == "naive":
            with torch.device("meta"):
                Naive(cfg.model)  # raises for a model that it is not made for, before the long work
        self.model = self.first_loss = None
        self.held, self.peak, self.failed = 0, 0, False

    def build(self):
        torch.manual_seed(1)
        rates, dtype = self.cfg.optim, pick_dtype("auto", self.device)
        model = RecurrentTransformer(self.config, dtype).to(self.device)
        for name, p in model.named_parameters():
            if name.endswith(("output.weight", "down.weight")):  # not the zeros of the start: GPUs multiply them faster
                nn.init.normal_(p, std=(2 * self.config.max_depth * p.shape[1]) ** -0.5)
        if self.name == "naive":
            weights, model = model.state_dict(), Naive(self.config, dtype).to(self.device)
            model.load_state_dict(weights)
            settings = dict(lr=rates.adamw_lr, betas=rates.betas, weight_decay=rates.weight_decay)
            self.optimizers = [torch.optim.AdamW(model.parameters(), **settings)]
        else:
            model.recompute = self.cfg.train.recompute
            if self.name == "fp8":
                model.use_fp8()
            on_cuda = self.device.type == "cuda"
            if on_cuda:
                model.compile()
            self.optimizers = optim.build_optimizers(model, rates, compiled=on_cuda).values()
        self.model = model

    def turn(self, action, *arguments):
        """Do something with this peer, unless it has failed. Only the turns of a peer change what it holds on the
        device: the others hold what is there at first, less what this one held; `peak` is the most beyond that."""
        if self.failed:
            return
        gc.collect()
        others = torch.cuda.memory_allocated() - self.held
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        try:
            action(*arguments)
        except torch.OutOfMemoryError:
            self.failed = True
        if self.failed:  # no longer in the except clause, whose traceback would keep the tensors
            note(f"{self.name}: out of memory")
            self.model = self.optimizers = self.memory = None
            gc.collect()
            torch.cuda.empty_cache()
        self.peak = max(self.peak, torch.cuda.max_memory_allocated() - others)
        self.held = torch.cuda.memory_allocated() - others

    def step(self):
        """One training step on the next batch; returns its loss."""
        limit, parameters = self.cfg.optim.grad_clip, list(self.model.parameters())
        if self.name == "naive":
            out = self.model(*next(self.feed), self.memory)
            out.loss.backward()
            nn.utils.clip_grad_norm_(parameters, limit)
        else:
            (tokens, targets), spans = self.batch
            out = self.model(tokens, targets, self.memory, spans=spans)
            out.loss.backward()
            norm = nn.utils.get_total_norm([p.grad for p in parameters])
            known = optim.read_later(norm)
            optim.guard(self.optimizers, norm, norm.isfinite(), limit)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if self.name == "fp8":
            self.model.scales.update()
        if self.name != "naive":
            self.read(out.memory)
            known()
        self.memory = out.memory
        self.context.append(out.context)
        return out.loss.detach()

    def read(self, memory):
        """The next batch, and what its tokens will see: host work beside the backward pass, as train.py does it."""
        tokens, targets = next(self.feed)
        self.batch = (tokens, targets), self.model.spans(tokens, memory)

    def warm_up(self, batches, length, steps):
        """Begin a section with an empty memory, and fill it."""
        if self.model is None:
            self.build()
        self.memory = None  # the old one goes before the new one comes
        self.memory = self.model.new_memory(len(batches[0][0]), length)
        self.feed, self.seconds, self.context = iter(batches), [], []
        if self.name != "naive":
            self.read(self.memory)
        start = clock(self.device)
        for _ in range(steps):
            loss = self.step().item()
            self.first_loss = self.first_loss or loss
        self.warm_up_seconds, self.warm_up_steps, self.context = clock(self.device) - start, steps, []

    def timed(self, steps):
        start = clock(self.device)
        for _ in range(steps):
            self.step()
        self.seconds.append((clock(self.device) - start) / steps)

    def profile(self, steps=2):
        """kernels: {name: (ms, calls)} of one step."""
        clock(self.device)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            for _ in range(steps):
                self.step()
            clock(self.device)
        events = [e for e in profiler.key_averages() if e.device_type.name == "CUDA" and not e.is_user_annotation]
        self.kernels = {e.key: (e.self_device_time_total / 1e3 / steps, e.count / steps) for e in events}

    def report(self, rows, limits):
        if self.failed:
            return {"out_of_memory": True}
        seconds, context = median(self.seconds), mean(float(c) for c in self.context)
        # as a function of the config alone, which the naive peer has too
        flops = 3 * rows * RecurrentTransformer.flops_per_token(self.model, self.config.max_depth, context)
        return {
            "out_of_memory": False,
            "ms": 1e3 * seconds,
            "rounds_ms": [1e3 * s for s in self.seconds],
            "spread": (max(self.seconds) - min(self.seconds)) / 2 / seconds,
            "tokens_per_second": rows / seconds,
            "tflops": flops / seconds / 1e12,
            "share_of_limit": limits["fp8" if self.name == "fp8" else "bf16"]["ms"] / 1e3 / seconds,
            "peak_gib": self.peak / 2**30 if self.device.type == "cuda" else None,
            "compile_seconds": max(0.0, self.warm_up_seconds - self.warm_up_steps * seconds),
            "first_loss": self.first_loss,
            "context": context,
            "parameters": sum(p.numel() for p in self.model.parameters()),
        }


def breakdown(kernels, step_ms):
    """Where the ms of a step go, from {kernel: (ms, calls)}. step_ms is a step's without the profiler, which slows the
    host down; kernels run one after another, so what they leave of it is idle."""
    groups = dict.fromkeys(KERNELS, 0.0)
    for name, (ms, _) in kernels.items():
        groups[next(group for group, pattern in KERNELS.items() if re.search(pattern, name))] += ms
    longest = sorted(kernels.items(), key=lambda kernel: -kernel[1][0])[:15]
    longest = [{"name": name, "ms": ms, "calls": calls} for name, (ms, calls) in longest]
    return {"groups_ms": groups | {"idle": step_ms - sum(groups.values())}, "longest": longest}


# ------------------------------------------------------------------------------------------------- the command


def run_train(args, overrides):
    cfg, device = load(args, [*overrides, f"--train.recompute={args.recompute}"])
    cfg.model = c = replace(cfg.model, cross_documents=cfg.model.cross_documents or args.documents == 0)
    on_cuda, rows = device.type == "cuda", args.batch * args.segment
    if args.profile and not on_cuda:
        raise ConfigError("--profile needs a GPU: it sums the times of kernels")
    if "fp8" in args.peers and on_cuda and torch.cuda.get_device_capability(device) < (8, 9):
        raise ConfigError("this GPU has no FP8; leave it out: --peers naive,bf16,stacked")
    if "fp8" in args.peers and on_cuda and (c.width % 16 or c.hidden % 16 or rows % 16):
        raise ConfigError("FP8 needs a width, a hidden size and batch x segment that are multiples of 16")
    if args.text and c.vocab_size < data.VOCAB_SIZE:
        raise ConfigError(f"--text needs the whole vocabulary, model.vocab_size = {data.VOCAB_SIZE}")
    prepared = data.Prepared.open(args.text) if args.text else None
    torch.set_float32_matmul_precision("high")
    peers = [Peer(name, cfg, device) for name in args.peers]
    low = pick_dtype("auto", device)
    dtypes = {"bf16": low} | ({"fp8": kernels.E4M3} if "fp8" in args.peers else {})
    products = [(name, gemm, dtype) for name, dtype in dtypes.items() for gemm in model_gemms(c, rows)]
    products += [("muon", gemm, low) for gemm in muon_gemms(c)]
    sizes = {key: getattr(args, key) for key in ("batch", "segment", "documents", "recompute", "rounds", "steps")}
    result = {"config": str(args.config), "model": asdict(c), "text": args.text, **sizes, "sections": []}
    for length in args.memory:
        section = measure(peers, products, args, prepared, length, on_cuda and args.profile is not False)
        result["sections"].append(section)
        print(render(section, args))
    return finish("train", device, result)


def measure(peers, products, args, prepared, length, profiling):
    """One section: all peers at one memory length."""
    device, rows = peers[0].device, args.batch * args.segment
    warm_up = -(-length // args.segment) + 2  # the memory is full, and one step more
    batches = make_batches(args, peers[0].config, prepared, warm_up + args.rounds * args.steps + 3)
    samples = lambda: [gemm_seconds(gemm, dtype, device) for _, gemm, dtype in products]  # noqa: E731
    note(f"memory {length}: limit")
    samples()  # also the first to use the GPU's libraries, whose workspaces then count for no peer
    for peer in peers:
        note(f"memory {length}: {peer.name} warms up")
        peer.failed = False
        peer.turn(peer.warm_up, batches, length, warm_up)
        peer.peak = 0  # of the timed steps
    gemms = []
    for i in range(args.rounds):
        note(f"memory {length}: round {i + 1} of {args.rounds}")
        gemms.append(samples())
        for peer in peers:
            peer.turn(peer.timed, args.steps)
    limits = limits_of(products, gemms)
    reports = {peer.name: peer.report(rows, limits) for peer in peers}
    reference = reports.get("bf16", {}).get("ms")
    profiles = {}
    for report in reports.values():
        if reference and "ms" in report:
            report["versus_bf16"] = reference / report["ms"]
    for peer in peers:
        if profiling and peer.name in ("bf16", "fp8"):
            note(f"memory {length}: {peer.name} under the profiler")
            peer.turn(peer.profile)
            if not peer.failed:
                profiles[peer.name] = breakdown(peer.kernels, reports[peer.name]["ms"])
    return {"memory": length, "peers": reports, "limits": limits, "profile": profiles}


def make_batches(args, c, prepared, number):
    """(tokens, targets), each (B, T) on the host: of a prepared folder, or random ones."""
    T = args.segment
    if prepared:
        streams = data.TokenStreams(prepared, args.batch, T, seed=1)
        return [[torch.from_numpy(x) for x in next(streams)[:2]] for _ in range(number)]
    generator, shape = torch.Generator().manual_seed(1), (args.batch, number * T + 1)
    tokens = torch.randint(c.vocab_size - 1, shape, generator=generator)
    tokens += tokens >= c.document_start  # any token but this one
    if args.documents:  # of geometric lengths
        tokens[torch.rand(shape, generator=generator) < 1 / args.documents] = c.document_start
    return [(tokens[:, i : i + T], tokens[:, i + 1 : i + T + 1]) for i in range(0, number * T, T)]


COLUMNS = {
    "ms/step": ("ms", ".2f"), "spread": ("spread", ".1%"), "tokens/s": ("tokens_per_second", ",.0f"),
    "TFLOP/s": ("tflops", ".1f"), "of limit": ("share_of_limit", ".1%"), "vs bf16": ("versus_bf16", ".2f"),
    "peak GiB": ("peak_gib", ".1f"), "compile s": ("compile_seconds", ".1f"), "first loss": ("first_loss", ".3f"),
}  # fmt: skip


def render(section, args):
    """A section as tables."""
    kind = f"text of {args.text}" if args.text else f"random documents of {args.documents} tokens on average"
    context = next((f", {r['context']:.0f} keys visible" for r in section["peers"].values() if "context" in r), "")
    text = f"memory {section['memory']}, {args.batch} x {args.segment} tokens a step, "
    text += f"{kind if args.documents else 'no boundaries of documents'}{context}\n\n"
    lines = [["peer", *COLUMNS]]
    for name, r in section["peers"].items():
        cells = ["-" if r.get(key) is None else format(r[key], form) for key, form in COLUMNS.values()]
        lines.append([name, *(["out of memory"] if r["out_of_memory"] else cells)])
    for name, limit in section["limits"].items():
        lines.append([f"limit {name}", f"{limit['ms']:.2f}", "", "", f"{limit['tflops']:.1f}"])
        if name != "muon":
            lines.append([f"limit {name} with muon", f"{limit['ms_with_muon']:.2f}"])
    text += align(lines)
    for name, profile in section["profile"].items():
        total = sum(profile["groups_ms"].values())
        lines = [[f"a step of {name}", "ms", "share"]]
        lines += [[group, f"{ms:.2f}", f"{ms / total:.1%}"] for group, ms in profile["groups_ms"].items()]
        lines += [[], ["its longest kernels", "ms", "calls"]]
        lines += [[k["name"][:80], f"{k['ms']:.2f}", f"{k['calls']:g}"] for k in profile["longest"]]
        text += align(lines)
    return text


# ------------------------------------------------------------------------------------------------- gemm, attention


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
            for name, (dtype, fp8.FAST_TERMS) in kinds.items():
                sample[name].append(gemm_seconds(gemm, dtype, device))
    lines = [["microseconds (TFLOP/s)", "m x n x k", *kinds]]
    for gemm, sample in zip(gemms, samples):
        rows.append(gemm._asdict() | {name: 1e6 * median(seconds) for name, seconds in sample.items()})
        flops = 2e-6 * gemm.m * gemm.n * gemm.k
        cells = [f"{rows[-1][name]:.0f} ({flops / rows[-1][name]:.0f})" for name in kinds]
        lines.append([f"{gemm.name}, {gemm.kind}", f"{gemm.m} x {gemm.n} x {gemm.k}", *cells])
    print(align(lines))
    return finish("gemm", device, {"gemms": rows})


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


def load(args, overrides):
    """The config and the device. Raises `ConfigError`."""
    if wrong := [o for o in overrides if not o.startswith(("--model.", "--train.recompute="))]:
        raise ConfigError(f"unknown argument '{wrong[0]}'; settings of the model are written --model.key=value")
    # what a depth from the command line could contradict
    cfg = config.load(args.config, train.Config, [*overrides, "eval.depths=[]", "train.target_depth=0"])
    try:
        return cfg, pick_device(args.device)
    except ValueError as error:
        raise ConfigError(f"--device: {error}") from None


def finish(name, device, result):
    """Print the last line: JSON, six digits of every float, and null for what is not finite."""
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    result = {"bench": name, "device": where, "torch": torch.__version__, "commit": commit()} | result
    digits = dict(parse_float=lambda x: float(f"{float(x):.6g}"), parse_constant=lambda _: None)
    print(json.dumps(json.loads(json.dumps(result), **digits)))
    return 0


def align(lines):
    """Rows of cells as text: the first column to the left, the others to the right."""
    columns = range(max(map(len, lines)))
    widths = [max(len(line[i]) for line in lines if i < len(line)) for i in columns]
    rows = [[cell.rjust(w) if i else cell.ljust(w) for i, cell, w in zip(columns, line, widths)] for line in lines]
    return "".join("  ".join(row).rstrip() + "\n" for row in rows) + "\n"


def clock(device):
    """Seconds, once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def note(message):
    print(message, file=sys.stderr, flush=True)


def commit():
    """Of this code, or None outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        return None


def whole(text, least=1):
    """An argument that must be a whole number."""
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"'{text}' must be a whole number, at least {least}")
    return int(text)


def peer(text):
    if text not in PEERS:
        raise argparse.ArgumentTypeError(f"there is no peer '{text}'; known peers: {', '.join(PEERS)}")
    return text


def several(kind):
    return lambda text: list(dict.fromkeys(kind(part) for part in text.split(",")))


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"error: {message}\n")  # one line, without the usage


def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(run, about, rounds, memory=True):
        command = commands.add_parser(
            run.__name__.removeprefix("run_"), help=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            epilog="Any setting of the model can be changed: --model.max_depth=4",
        )  # fmt: skip
        command.set_defaults(run=run)
        add = command.add_argument
        add("config", nargs="?", default="configs/pretrain_110m.toml", help="a TOML file with the model")
        add("--batch", type=whole, default=32, help="rows of a batch")
        add("--segment", type=whole, default=512, help="tokens of a row in a step")
        add("--rounds", type=whole, default=rounds, help="turns of everything that is compared")
        add("--device", default="auto", help="cuda, cuda:1 or cpu")
        if memory:
            add("--memory", type=several(lambda text: whole(text, 0)), default="512,4096", help="lengths, each apart")
            add("--documents", type=lambda text: 0 if text == "none" else whole(text), default=1000, metavar="TOKENS",
                help="mean length of random documents; none: no boundaries, nor in --text")  # fmt: skip
        return add

    add_train = add(run_train, "speed of training", rounds=5)
    add_train("--peers", type=several(peer), default=",".join(PEERS), help="what is measured")
    add_train("--steps", type=whole, default=4, help="steps in a turn")
    add_train("--text", metavar="FOLDER", help="a prepared folder to read; None: random tokens")
    add_train("--recompute", default="none", help="train.recompute of all peers but the naive one: none, mlp or step")
    add_train(
        "--profile", action=argparse.BooleanOptionalAction, help="where the time of bf16 and fp8 goes; None: on GPUs"
    )
    add(run_gemm, "every matrix product of a step alone", rounds=3, memory=False)
    add(run_attention, "attention of one recurrence, beside PyTorch's", rounds=3)
    args, overrides = parser.parse_known_args(argv)
    try:
        return args.run(args, overrides)
    except (ConfigError, data.DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:
        print(f"error: {error}\nLower --batch", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
