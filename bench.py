"""Speed, side by side: of training, of its matrix products, of attention over memory, of scoring, and of decoding.

    python bench.py train                                          the 110M model on one GPU, memory 512 and 4096
    python bench.py train --text data/mix13 --peers bf16,fp8       real tokens, two of the peers
    python bench.py train --memory 512 --documents none            without boundaries of documents
    python bench.py train --depth 5 --peers bf16,fp8,fp8_packed    tokens that take 5 steps on average
    python bench.py gemm                                           every product alone: bf16, FP8, fast accumulation
    python bench.py attention --memory 512,4096                    attention.py beside PyTorch's own
    python bench.py score                                          log-likelihoods, with halted tokens left out
    python bench.py decode                                         tokens a second of one text and of many
    python bench.py decode_cpu                                     the same of one text on a CPU, beside transformers

train: naive (the model as a competent person writes it in eager PyTorch, naive.py), bf16 and fp8 (those of train.py),
stacked (bf16, as many own blocks as the shared one has uses: equal FLOPs, N times the weights), bf16_packed and
fp8_packed (with `train.capacities`: the SwiGLU leaves out halted tokens). A step is all that train.py does with a batch
except reading its metrics. The limit is the time of a step's matrix products alone, for all tokens at all steps.

Of an untrained model every token takes all steps. --depth gives it a random halting head, of which tokens take so many
on average; `depth` is what they took. Learning rates are then 0, as depth would move from there.

Peers take turns of a few steps, so that a hot GPU slows all of them; a time is the median over rounds, `spread` half
the range. Memory is full before anything is timed. TFLOP/s count all steps for all tokens. `compile s`: what the first
steps took beyond as many later ones (less if a kernel cache is on disk). `peak GiB`: see `Peer.turn`. naive, bf16 and
fp8 start from the same weights: `first loss` shows it. Progress goes to stderr; the last line of stdout is one JSON
object with every figure.
"""

import argparse
import gc
import re
import sys
from dataclasses import asdict, replace
from statistics import mean, median

import torch
from torch import nn

import data
import kernels
import optim
from bench_common import aim, align, check_depth, clock, finish, load, make_batches, note, several, whole
from bench_decode import SECTIONS, run_decode
from bench_decode_cpu import run_decode_cpu
from bench_kernels import gemm_seconds, limits_of, model_gemms, muon_gemms, run_attention, run_gemm
from bench_score import run_score
from config import ConfigError
from device import pick_dtype
from memory import read_later
from model import RecurrentTransformer
from naive import Naive

PEERS = ("naive", "bf16", "fp8", "stacked", "bf16_packed", "fp8_packed")
IN_FP8, PACKED = ("fp8", "fp8_packed"), ("bf16_packed", "fp8_packed")
KERNELS = {  # a kernel belongs to the first group whose pattern is found in its name
    "fused by torch.compile": r"^triton_",
    "kernels of kernels.py": r"^_(transpose|quantize|swiglu|softmax|log_sum|heads)",
    "attention": r"flash|fmha|attention|^_(query|key|forward|backward|dq|dkv)",
    "GEMMs": r"nvjet|cutlass|gemm|gemv|xmma|cublas|splitK",
    "optimizer and the rest": r"",
}


# ------------------------------------------------------------------------------------------------- peers


class Peer:
    """One implementation in training. failed: it ran out of memory in this section."""

    def __init__(self, name, cfg, device, depth=0):
        self.name, self.cfg, self.device, self.config, self.depth = name, cfg, device, cfg.model, depth
        if name == "stacked":
            own = dict(share=False, halting="fixed", injection="none", memory="per_step")
            self.config = replace(cfg.model, **own)
        if name == "naive":
            with torch.device("meta"):
                Naive(cfg.model)  # raises for a model that it is not made for, before the long work
        self.model = self.first_loss = None
        self.held, self.peak, self.failed = 0, 0, False

    def build(self, batch):
        """batch: (tokens, targets), on which depth is aimed at."""
        torch.manual_seed(1)
        rates, dtype = self.cfg.optim, pick_dtype("auto", self.device)
        model = RecurrentTransformer(self.config, dtype).to(self.device)
        for name, p in model.named_parameters():
            if name.endswith(("output.weight", "down.weight")):  # not the zeros of the start: GPUs multiply them faster
                nn.init.normal_(p, std=(2 * self.config.max_depth * p.shape[1]) ** -0.5)
        if self.depth and self.config.halting != "fixed":
            aim(model, self.depth, *batch)
        if self.name == "naive":
            weights, model = model.state_dict(), Naive(self.config, dtype).to(self.device)
            model.load_state_dict(weights)
            settings = dict(lr=rates.adamw_lr, betas=rates.betas, weight_decay=rates.weight_decay)
            self.optimizers = [torch.optim.AdamW(model.parameters(), **settings)]
        else:
            model.recompute = self.cfg.train.recompute
            if self.name in PACKED:
                model.capacities = self.cfg.train.capacities
            if self.name in IN_FP8:
                model.use_fp8()
            on_cuda = self.device.type == "cuda"
            if on_cuda:
                model.compile()
            self.optimizers = optim.build_optimizers(model, rates, compiled=on_cuda).values()
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups if self.depth):
            group["lr"] = 0.0
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
            norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            known = read_later(norm)
            optim.guard(self.optimizers, norm, norm.isfinite(), limit)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if self.name in IN_FP8:
            self.model.scales.update()
        if self.name != "naive":
            self.taken.append(out.depth)
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
            self.build(batches[0])
        self.memory = None  # the old one goes before the new one comes
        self.memory = self.model.new_memory(len(batches[0][0]), length)
        self.feed, self.seconds, self.context, self.taken = iter(batches), [], [], []
        if self.name != "naive":
            self.read(self.memory)
        start = clock(self.device)
        for _ in range(steps):
            loss = self.step().item()
            self.first_loss = self.first_loss or loss
        self.warm_up_seconds, self.warm_up_steps = clock(self.device) - start, steps
        self.context, self.taken = [], []

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
        taken = torch.stack(self.taken) if self.taken else None
        steps = range(1, self.config.max_depth + 1)
        # as a function of the config alone, which the naive peer has too
        flops = 3 * rows * RecurrentTransformer.flops_per_token(self.model, self.config.max_depth, context)
        return {
            "out_of_memory": False,
            "ms": 1e3 * seconds,
            "rounds_ms": [1e3 * s for s in self.seconds],
            "spread": (max(self.seconds) - min(self.seconds)) / 2 / seconds,
            "tokens_per_second": rows / seconds,
            "tflops": flops / seconds / 1e12,
            "share_of_limit": limits["fp8" if self.name in IN_FP8 else "bf16"]["ms"] / 1e3 / seconds,
            "peak_gib": self.peak / 2**30 if self.device.type == "cuda" else None,
            "compile_seconds": max(0.0, self.warm_up_seconds - self.warm_up_steps * seconds),
            "first_loss": self.first_loss,
            "depth": None if taken is None else taken.float().mean().item(),
            "active": None if taken is None else [(taken >= n).float().mean().item() for n in steps],
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
    cfg, device = load(args, overrides, f"train.recompute={args.recompute}", f"train.capacities={args.capacities}")
    cfg.model = c = replace(cfg.model, cross_documents=cfg.model.cross_documents or args.documents == 0)
    on_cuda, rows = device.type == "cuda", args.batch * args.segment
    if args.profile and not on_cuda:
        raise ConfigError("--profile needs a GPU: it sums the times of kernels")
    in_fp8 = any(name in IN_FP8 for name in args.peers)
    if args.depth:
        check_depth(c, args.depth)
    if in_fp8 and on_cuda and torch.cuda.get_device_capability(device) < (8, 9):
        raise ConfigError("this GPU has no FP8; leave it out: --peers naive,bf16,stacked")
    if in_fp8 and on_cuda and (c.width % 16 or c.hidden % 16 or rows % 16):
        raise ConfigError("FP8 needs a width, a hidden size and batch x segment that are multiples of 16")
    if args.text and c.vocab_size < data.VOCAB_SIZE:
        raise ConfigError(f"--text needs the whole vocabulary, model.vocab_size = {data.VOCAB_SIZE}")
    prepared = data.Prepared.open(args.text) if args.text else None
    torch.set_float32_matmul_precision("high")
    peers = [Peer(name, cfg, device, args.depth) for name in args.peers]
    low = pick_dtype("auto", device)
    dtypes = {"bf16": low} | ({"fp8": kernels.E4M3} if in_fp8 else {})
    products = [(name, gemm, dtype) for name, dtype in dtypes.items() for gemm in model_gemms(c, rows)]
    products += [("muon", gemm, low) for gemm in muon_gemms(c)]
    keys = ("batch", "segment", "documents", "depth", "capacities", "recompute", "rounds", "steps")
    sizes = {key: getattr(args, key) for key in keys}
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
        if profiling and peer.name in ("bf16", *IN_FP8, *PACKED):
            note(f"memory {length}: {peer.name} under the profiler")
            peer.turn(peer.profile)
            if not peer.failed:
                profiles[peer.name] = breakdown(peer.kernels, reports[peer.name]["ms"])
    return {"memory": length, "peers": reports, "limits": limits, "profile": profiles}


COLUMNS = {
    "ms/step": ("ms", ".2f"), "spread": ("spread", ".1%"), "tokens/s": ("tokens_per_second", ",.0f"),
    "TFLOP/s": ("tflops", ".1f"), "of limit": ("share_of_limit", ".1%"), "vs bf16": ("versus_bf16", ".2f"),
    "peak GiB": ("peak_gib", ".1f"), "compile s": ("compile_seconds", ".1f"), "first loss": ("first_loss", ".3f"),
    "depth": ("depth", ".2f"),
}  # fmt: skip


def render(section, args):
    """A section as tables."""
    kind = f"text of {args.text}" if args.text else f"random documents of {args.documents} tokens on average"
    context = next((f", {r['context']:.0f} keys visible" for r in section["peers"].values() if "context" in r), "")
    text = f"memory {section['memory']}, {args.batch} x {args.segment} tokens a step, "
    text += f"{kind if args.documents else 'no boundaries of documents'}{context}\n\n"
    if shares := next((r["active"] for r in section["peers"].values() if args.depth and r.get("active")), None):
        text = f"still active at each step: {', '.join(f'{share:.0%}' for share in shares)}\n{text}"
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


# ------------------------------------------------------------------------------------------------- arguments


def peer(text):
    if text not in PEERS:
        raise argparse.ArgumentTypeError(f"there is no peer '{text}'; known peers: {', '.join(PEERS)}")
    return text


def section(text):
    if text not in SECTIONS:
        raise argparse.ArgumentTypeError(f"there is no section '{text}'; known sections: {', '.join(SECTIONS)}")
    return text


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"error: {message}\n")  # one line, without the usage


def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(run, about, rounds, memory="512,4096", segment=512):
        command = commands.add_parser(
            run.__name__.removeprefix("run_"), help=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            epilog="Any setting of the model can be changed: --model.max_depth=4",
        )  # fmt: skip
        command.set_defaults(run=run)
        add = command.add_argument
        add("config", nargs="?", default="configs/act_110m.toml", help="a TOML file with the model")
        add("--batch", type=whole, default=32, help="rows of a batch")
        add("--segment", "--length", type=whole, default=segment, help="tokens of a row in a step")
        add("--rounds", type=whole, default=rounds, help="turns of everything that is compared")
        add("--device", default="auto", help="cuda, cuda:1 or cpu")
        if memory:
            add("--memory", type=several(lambda text: whole(text, 0)), default=memory, help="lengths, each apart")
            add("--documents", type=lambda text: 0 if text == "none" else whole(text), default=1000, metavar="TOKENS",
                help="mean length of random documents; none: no boundaries, nor in real text")  # fmt: skip
        return add

    add_train = add(run_train, "speed of training", rounds=5)
    add_train("--peers", type=several(peer), default=",".join(PEERS[:4]), help="what is measured")
    add_train("--steps", type=whole, default=4, help="steps in a turn")
    add_train("--depth", type=float, default=0.0, help="mean steps of a token; 0: of an untrained model, all")
    add_train("--capacities", type=several(float), default="0.25,0.5,0.75", help="train.capacities of packed peers")
    add_train("--text", metavar="FOLDER", help="a prepared folder to read; None: random tokens")
    add_train("--recompute", default="none", help="train.recompute of all peers but the naive one: none, mlp or step")
    add_train(
        "--profile", action=argparse.BooleanOptionalAction, help="where the time of bf16 and FP8 goes; None: on GPUs"
    )
    add(run_gemm, "every matrix product of a step alone", rounds=3, memory=None)
    add(run_attention, "attention of one recurrence, beside PyTorch's", rounds=3)
    add_score = add(run_score, "log-likelihoods of text, with halted tokens left out", 5, memory="0", segment=1024)
    add_score("--depth", type=several(float), help="mean steps of a token, each apart; None: 3,5,6.5, or as trained")
    add_score("--checkpoint", metavar="PATH", help="a trained model: a path, base, sft or dpo; None: random weights")
    add_score("--data", metavar="FOLDER", help="a prepared folder to score; None: random tokens")
    add_score("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="of the activations")
    add_score("--compile", action=argparse.BooleanOptionalAction, help="also compiled models; None: on GPUs")
    shares = ",".join(f"{n / 16:g}" for n in range(1, 16))
    about = "of all tokens; a compiled step takes the smallest that holds the active ones"
    add_score("--capacities", type=several(float), default=shares, metavar="SHARES", help=about)
    add_score("--steps", type=whole, default=3, help="times that a turn scores")
    add_decode = add(run_decode, "tokens a second of one text and of many", rounds=3, memory=None)
    add_decode("--context", type=whole, default=512, help="tokens of the prompt")
    add_decode("--tokens", type=whole, default=128, help="tokens that a turn draws at least")
    add_decode("--depth", type=float, default=5.0, help="mean depth where it is adaptive")
    add_decode("--rows", type=whole, default=64, help="texts at once")
    add_decode("--sections", type=several(section), default=",".join(SECTIONS), help="what is measured")
    add_cpu = add(run_decode_cpu, "tokens a second on a CPU, beside peers", rounds=3, memory=None)
    add_cpu("--context", type=whole, default=256, help="tokens of the prompt")
    add_cpu("--tokens", type=whole, default=8, help="new tokens in a turn")
    add_cpu("--depth", type=float, default=5.0, help="mean depth where it is adaptive")
    add_cpu("--draft", help="KxT: also with T tokens drafted at K steps and verified in one pass")
    add_cpu("--threads", type=whole, default=2, help="of PyTorch")
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
