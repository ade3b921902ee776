"""`python bench.py score`: log-likelihoods of text, and what leaving halted tokens out of the recurrence wins there.

    python bench.py score                                      32 x 1024 random tokens at mean depths 3, 5 and 6.5
    python bench.py score --data data/mix13                    the same of real text
    python bench.py score --checkpoint base --data data/mix13  a trained model at its own depth; --depth moves its bias
    python bench.py score --dtype float32 --batch 2            are the log-likelihoods the same?

    all steps   every token takes all N steps (forced depth)
    own rule    tokens halt by the model's own rule, and every step still computes all of them
    packed      the same rule; a step computes the tokens that are still active
    head        the vocabulary alone, which every token needs at any depth

each eager and, on a GPU or with --compile, compiled. All score the same tokens and take turns in one process; a time is
the median over rounds, `spread` half the range. `speed-up` is over the faster of the two that take all steps; its bar
is 0.85 x N / mean depth. `by FLOPs` is what it would be if time went by FLOPs, the head's included; `recurrence` is the
speed-up without the time of the head. `difference`: of a token's log-likelihood, at most, from the peer that does the
same densely (of a dense one: from the eager one, which is what rounding does); `other depths`: tokens that halt at
another step than there. In float32 a packed peer that differs by more than 1e-3 makes the exit status 1, and so does a
peer that fails. Weights are random, with a random halting head of the depth asked for, unless there is a --checkpoint.
"""

import copy
import gc
from dataclasses import asdict, replace
from functools import partial
from statistics import median

import torch

import checkpoint
import data
from bench_common import aim, align, check_depth, clock, finish, load, make_batches, note
from config import ConfigError
from device import pick_dtype
from model import RecurrentTransformer

BAR, TOLERANCE = 0.85, 1e-3
AS_IT_IS = 0.0  # the depth of a checkpoint that is not asked for another
DENSE = {"own rule, compiled": "own rule", "packed": "own rule", "packed, compiled": "own rule, compiled",
         "all steps, compiled": "all steps"}  # {peer: the one whose log-likelihoods it should have}  # fmt: skip


class Peer:
    """One way to score. run: a function that does it and returns nll and depth, (B, T), depth None where there is none.
    failed: why there are no figures, or None."""

    def __init__(self, run, device):
        self.run, self.device, self.seconds, self.failed, self.peak = run, device, [], None, 0

    def warm_up(self):
        start = clock(self.device)
        nll, depth = self.run()
        self.nll, self.depth = nll.cpu(), None if depth is None else depth.cpu()
        self.first_seconds = clock(self.device) - start

    def timed(self, steps):
        start = clock(self.device)
        for _ in range(steps):
            self.run()
        self.seconds.append((clock(self.device) - start) / steps)

    def turn(self, action, *arguments):
        """Do something with this peer, unless it has failed. `peak`: the most that it took beyond what is held."""
        if self.failed:
            return
        on_cuda, before = self.device.type == "cuda", 0
        if on_cuda:
            gc.collect()
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
        try:
            action(*arguments)
        except Exception as error:  # of memory, or of a compiler: the others are still worth their time
            if not on_cuda:
                raise
            self.failed = f"{type(error).__name__}: {error}"[:300]
            note(self.failed)
        if on_cuda:
            self.peak = max(self.peak, torch.cuda.max_memory_allocated(self.device) - before)

    def report(self):
        if self.failed:
            return {"failed": self.failed}
        seconds = median(self.seconds)
        return {
            "ms": 1e3 * seconds,
            "rounds_ms": [1e3 * s for s in self.seconds],
            "spread": (max(self.seconds) - min(self.seconds)) / 2 / seconds,
            "tokens_per_second": self.nll.numel() / seconds,
            "depth": None if self.depth is None else self.depth.float().mean().item(),
            "nats": None if self.depth is None else self.nll.mean().item(),
            "peak_gib": self.peak / 2**30 if self.device.type == "cuda" else None,
            "first_seconds": self.first_seconds,
        }


# ------------------------------------------------------------------------------------------------- the command


def run_score(args, overrides):
    if args.checkpoint and overrides:
        raise ConfigError(f"'{overrides[0]}': a --checkpoint has its own model; leave one of them out")
    cfg, device = load(args, overrides)
    dtype = pick_dtype(args.dtype, device)
    model = trained(args.checkpoint, device, dtype) if args.checkpoint else drawn(cfg.model, device, dtype)
    model.config = c = replace(model.config, cross_documents=model.config.cross_documents or args.documents == 0)
    depths = args.depth or ([AS_IT_IS] if args.checkpoint else [3.0, 5.0, 6.5])
    if c.halting == "fixed":
        raise ConfigError("with halting = fixed no token halts, and there is nothing to leave out")
    for depth in depths:
        if depth != AS_IT_IS:
            check_depth(c, depth)
    if wrong := [share for share in args.capacities if not 0 < share < 1]:
        raise ConfigError(f"--capacities are shares between 0 and 1, not {wrong[0]:g}")
    if args.data and c.vocab_size < data.VOCAB_SIZE:
        raise ConfigError(f"--data needs the whole vocabulary, model.vocab_size = {data.VOCAB_SIZE}")
    prepared = data.Prepared.open(args.data) if args.data else None
    models = Models(model, args.capacities, device.type == "cuda" if args.compile is None else args.compile)
    sections = []
    for length in args.memory:
        *past, batch = make_batches(args, c, prepared, -(-length // args.segment) + 1)
        for depth in depths:
            note(f"memory {length}, mean depth {depth or 'of the checkpoint'}")
            if depth != AS_IT_IS:
                aim(model, depth, *batch, spread=None if args.checkpoint else 0.5)
            models.halt_alike()
            sections.append({"memory": length, "asked": depth or None} | measure(models, args, length, past, batch))
            print(render(sections[-1], args))
    sizes = {key: getattr(args, key) for key in ("batch", "segment", "capacities", "checkpoint", "data", "documents")}
    sizes |= {"dtype": str(dtype).removeprefix("torch."), "rounds": args.rounds, "steps": args.steps}
    finish("score", device, {"model": asdict(c), **sizes, "sections": sections})
    peers = [(name, peer) for section in sections for name, peer in section["peers"].items()]
    wrong = [name for name, peer in peers if "failed" in peer]
    if dtype == torch.float32:
        wrong += [n for n, peer in peers if n.startswith("packed") and not peer.get("difference", 0.0) <= TOLERANCE]
    if wrong:
        note(f"error: '{wrong[0]}' failed, or its log-likelihoods are not those of the dense recurrence")
    return 1 if wrong else 0


def trained(where, device, dtype):
    try:
        return checkpoint.load_model(where, device, dtype)[0]
    except checkpoint.CheckpointError as error:
        raise ConfigError(f"--checkpoint: {error}") from None


@torch.no_grad()
def drawn(c, device, dtype):
    """A random model whose steps change the state, which those of an untrained one do not, each in its own way: else it
    converges, and it would hardly show if a token was computed once too often."""
    torch.manual_seed(1)
    with torch.device(device):
        model = RecurrentTransformer(c, dtype).eval()
    for name, p in model.named_parameters():
        if name.endswith(("output.weight", "down.weight")):
            torch.nn.init.normal_(p, std=p.shape[1] ** -0.5)
        elif name in ("gains", "inject"):
            p.add_(0.5 * torch.randn_like(p))
    return model


class Models:
    """One model in three forms. eager; whole: compiled, a step as one graph; split: compiled to leave tokens out. The
    last two are None without compilation."""

    def __init__(self, model, capacities, compiling):
        self.eager, self.whole, self.split = model, *((copy.deepcopy(model) if compiling else None) for _ in "ws")
        if compiling:
            self.split.capacities = capacities
            self.whole.compile(), self.split.compile()

    def halt_alike(self):
        for twin in filter(None, (self.whole, self.split)):
            if twin.halting is not None:
                twin.halting.load_state_dict(self.eager.halting.state_dict())

    def peers(self, batch, memory):
        """{name: Peer} of a batch (tokens, targets)."""
        N, device = self.eager.config.max_depth, self.eager.embedding.weight.device

        def score(model, depth, packing):
            model.packing = packing
            out = model(*batch, memory, depth)
            return out.nll, out.depth

        kinds = {"all steps": (self.whole, N, 0), "own rule": (self.whole, None, 0), "packed": (self.split, None, 64)}
        peers = {}
        for name, (compiled, *how) in kinds.items():
            peers[name] = Peer(partial(score, self.eager, *how), device)
            if compiled:
                peers[f"{name}, compiled"] = Peer(partial(score, compiled, *how), device)
        return peers | {"head": Peer(self.head(batch[1].to(device)), device)}

    def head(self, targets):
        model = self.whole or self.eager
        states = torch.randn(*targets.shape, model.config.width, device=targets.device, dtype=model.compute_dtype)
        weights = torch.zeros(targets.shape, device=targets.device)
        return lambda: (model.loss(states, targets, weights)[1], None)


@torch.no_grad()
def measure(models, args, length, past, batch):
    """One section. past: the segments that fill a memory of `length`, and batch, the one that is scored."""
    memory = models.eager.new_memory(args.batch, length) if length else None
    for segment in past:
        memory = models.eager(*segment, memory).memory
    peers = models.peers(batch, memory and memory.settle())
    for name, peer in peers.items():
        note(f"{name} warms up")
        peer.turn(peer.warm_up)
        peer.peak = 0  # of the timed turns
    for i in range(args.rounds):
        note(f"round {i + 1} of {args.rounds}")
        for peer in peers.values():
            peer.turn(peer.timed, args.steps)
    return summarize(models.eager, peers, models.eager.spans(batch[0], memory).context)


def summarize(model, peers, context):
    reports, N, own = {name: peer.report() for name, peer in peers.items()}, model.config.max_depth, peers["own rule"]
    baseline = min((r["ms"] for name, r in reports.items() if name.startswith("all") and "ms" in r), default=None)
    if own.failed or baseline is None:
        return {"peers": reports}
    depth, head = reports["own rule"]["depth"], reports["head"].get("ms", 0.0)
    bar = BAR * N / depth
    for name, report in reports.items():
        if name == "head" or "failed" in report:
            continue
        report["speed_up"] = baseline / report["ms"]
        report["of_recurrence"] = (baseline - head) / (report["ms"] - head)
        if name.startswith("packed"):
            report["reaches_the_bar"] = report["speed_up"] >= bar
        dense = peers.get(DENSE.get(name))
        if dense and not dense.failed:
            difference = (peers[name].nll - dense.nll).abs()
            report["difference"], report["mean_difference"] = difference.max().item(), difference.mean().item()
            report["other_depths"] = (peers[name].depth != dense.depth).sum().item()
    active = [(own.depth >= n).float().mean().item() for n in range(1, N + 1)]
    by_flops = model.flops_per_token(N, context) / model.flops_per_token(depth, context)
    figures = {"depth": depth, "active": active, "context": context, "bar": bar, "by_flops": by_flops}
    return figures | {"peers": reports}


COLUMNS = {
    "ms": ("ms", ".1f"), "spread": ("spread", ".1%"), "tokens/s": ("tokens_per_second", ",.0f"),
    "speed-up": ("speed_up", ".2f"), "recurrence": ("of_recurrence", ".2f"), "depth": ("depth", ".2f"),
    "nats": ("nats", ".4f"), "difference": ("difference", ".1e"), "other depths": ("other_depths", "d"),
    "peak GiB": ("peak_gib", ".1f"), "first s": ("first_seconds", ".1f"),
}  # fmt: skip


def render(section, args):
    text = f"memory {section['memory']}, {args.batch} x {args.segment} tokens of {args.data or 'random documents'}"
    if "bar" in section:
        shares = ", ".join(f"{share:.0%}" for share in section["active"])
        text += f", mean depth {section['depth']:.2f}; still active at each step: {shares}\nspeed-up: the bar "
        text += f"{section['bar']:.2f}, by FLOPs {section['by_flops']:.2f}"
    lines = [["peer", *COLUMNS]]
    for name, r in section["peers"].items():
        cells = ["-" if r.get(key) is None else format(r[key], form) for key, form in COLUMNS.values()]
        lines.append([name, *([r["failed"][:80]] if "failed" in r else cells)])
    return f"{text}\n\n{align(lines)}"
