"""Speed of decoding on a CPU, token by token, beside peers in the same process.

    python bench.py decode_cpu                                     the 110M model, all 8 steps and 5 on average
    python bench.py decode_cpu --depth 3 --context 64
    python bench.py decode_cpu --draft 1x3 --tokens 13             also with 3 tokens drafted at 1 step (decoding.py)

    gpt2                   GPT-2 under `generate` of transformers: float32, with N layers so wide that a token costs
                           the FLOPs of N steps of ours, head included: N times the weights of our block
    ours in transformers   our exported model (export_hf.py) under the same `generate`, float32, all steps
    uncached               our model, which reads the whole text again for every token
    float32, bfloat16      decoding.py at these activations; float16, int8: float32 with these weights (`--weights`)

All continue one prompt of random tokens at temperature 1, by models with random weights: by random tokens, therefore;
greedily they would repeat themselves, at one depth. The end of a text is never drawn. `accepted`: the share of the
drafts that passed; random weights say all but the same at every depth: no forecast for a trained model.
Times are of a token after the first, so that none has the prompt in it. Peers take turns, and every turn of a peer does
the same: the time is that of its fastest turn, as other work on the machine can only add, and what it adds is not
fair: threads wait for each other thirty times a token, and that weighs most where a token is short. `median` shows it.
`MB read`: the weights that a token uses, each as often as it is used; `of copy`: the share of the bandwidth of a large
copy (bytes read and written) that this is. More than 1: weights stay in a cache.
"""

import copy
import time
from dataclasses import asdict
from functools import partial
from statistics import mean, median

import torch

import packed
from bench_common import aim, align, check_depth, finish, load, note
from bench_decode import bandwidth
from config import ConfigError
from decoding import Session, parse_draft
from model import RecurrentTransformer

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}


class Stamps:
    """A streamer of transformers that notes when tokens come. The first call has the prompt."""

    def __init__(self):
        self.times = []

    def put(self, _):
        self.times.append(time.perf_counter())

    def end(self):
        self.times = self.times[1:]


def gpt2(c, length):
    """A GPT-2 of as many FLOPs a token as N steps of a model with one block of three MLP matrices."""
    from transformers import GPT2Config, GPT2LMHeadModel

    blocks = c.prelude + c.coda + c.max_depth * c.recur
    torch.manual_seed(1)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=c.padded_vocab_size,
            n_positions=length,
            n_embd=c.width,
            n_layer=blocks,
            n_head=c.heads,
            n_inner=3 * c.hidden // 2,
            bos_token_id=None,
            eos_token_id=None,
        )  # fmt: skip
    ).eval()


def exported(model, length, segment):
    """Our model as export_hf.py writes it."""
    from modeling_recurrent import RecurrentConfig, RecurrentForCausalLM

    twin = RecurrentForCausalLM(RecurrentConfig(length, segment, **asdict(model.config)))
    twin.model.load_state_dict(model.state_dict())
    twin.model.padding.copy_(model.padding)
    return twin.eval()


def under_transformers(model, prompt, tokens, **options):
    """Seconds of a token, and None for its depth."""
    stamps, ids = Stamps(), torch.tensor([prompt])
    options |= {"max_new_tokens": tokens, "do_sample": True, "top_k": 0, "streamer": stamps}
    torch.manual_seed(0)
    model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options)
    return (stamps.times[-1] - stamps.times[0]) / (len(stamps.times) - 1), None


def ours(model, prompt, tokens, depth, draft=None):
    """Seconds of a token, mean depth, and the share of drafts that were accepted."""
    times, depths, session = [], [], Session(model, len(prompt) + tokens, depth=depth, draft=draft)
    session.feed(prompt)
    generator = torch.Generator().manual_seed(0)  # the same tokens, and depths, in every turn
    for _, taken in session.stream(tokens, generator=generator):
        times.append(time.perf_counter())
        depths.append(taken)
    return (times[-1] - times[0]) / (len(times) - 1), mean(depths[1:]), session.accepted / max(session.verified, 1)


@torch.no_grad()
def uncached(model, prompt, depth):
    """The same of one token; it takes long enough."""
    start = time.perf_counter()
    model(torch.tensor([prompt]), depth=depth).logits[0, -1].argmax().item()
    return time.perf_counter() - start, depth


def weight_bytes(model, depth, size):
    """What a token of `depth` steps reads of the weights of matrices, at `size` bytes a number."""
    c = model.config
    uses = c.prelude + c.coda + depth * c.recur
    return size * (uses * (4 * c.width**2 + 3 * c.width * c.hidden) + c.padded_vocab_size * c.width)


def make_peers(c, args, prompt, draft):
    """{name: a function that returns the seconds and the depth of a token}, and for ours what weights they read."""
    N, length = c.max_depth, len(prompt) + args.tokens
    torch.manual_seed(1)
    model = RecurrentTransformer(c).eval()
    for name, p in model.named_parameters():
        if name.endswith(("output.weight", "down.weight")):  # zero at first: every step would be the identity
            torch.nn.init.normal_(p, std=(2 * N * p.shape[1]) ** -0.5)
    model.padding[c.document_start] = -torch.inf  # a text has no end here
    peers, formats = {}, {}
    forms = ["float32", "bfloat16", *(packed.FORMATS if packed.supported() else ())]
    generator, batch = torch.Generator().manual_seed(2), (2, 64)
    text = torch.randint(1, c.vocab_size - 1, batch, generator=generator)
    for depth in (None, args.depth):
        one = copy.deepcopy(model)
        if depth:
            note(f"aiming at depth {depth:g}")
            aim(one, depth, text, text)
        for form in forms:
            twin = copy.deepcopy(one)
            twin.compute_dtype = torch.bfloat16 if form == "bfloat16" else torch.float32
            twin.weight_format = form if form in packed.FORMATS else None
            name = f"{form}, {f'about {depth:g}' if depth else f'all {N}'} steps"
            peers[name] = partial(ours, twin, prompt, args.tokens, None if depth else N)
            formats[name] = form
            if draft and not depth:
                peers[f"{name}, drafts of {args.draft}"] = partial(ours, twin, prompt, args.tokens, N, draft)
    peers["uncached, float32"] = partial(uncached, model, prompt, N)
    try:
        rival = gpt2(c, length)
        peers["gpt2"] = partial(under_transformers, rival, prompt, args.tokens, eos_token_id=None)
        twin = exported(model, length, args.context)
        peers["ours in transformers"] = partial(under_transformers, twin, prompt, args.tokens, depth=N)
    except ImportError as error:
        note(f"without the peers of transformers: {error}")
    return model, peers, formats


def run_decode_cpu(args, overrides):
    args.device = "cpu"
    cfg, device = load(args, overrides)
    c = cfg.model
    check_depth(c, args.depth)
    if args.tokens < 3:
        raise ConfigError(f"--tokens must be 3 at least, not {args.tokens}")
    try:
        draft = args.draft and parse_draft(args.draft, c)
    except ValueError as error:
        raise ConfigError(f"--draft {args.draft}: {error}") from None
    torch.set_num_threads(args.threads)
    generator = torch.Generator().manual_seed(3)
    prompt = torch.randint(1, c.vocab_size - 1, (args.context,), generator=generator).tolist()
    prompt = [token + (token >= c.document_start) for token in prompt]
    model, peers, formats = make_peers(c, args, prompt, draft)
    found, errors, copies = {name: [] for name in peers}, {}, []
    for i in range(args.rounds + 1):  # the first is the warm-up, when weights are packed
        note(f"round {i} of {args.rounds}")
        copies.append(bandwidth(device))
        for name, run in peers.items():
            if name in errors:
                continue
            try:
                found[name].append(run())
            except Exception as error:  # the others are still worth their time
                errors[name] = f"{type(error).__name__}: {error}"[:500]
                note(f"{name}: {errors[name]}")
    copied, rows = max(copies), {}
    for name, samples in found.items():
        if name in errors:
            rows[name] = {"error": errors[name]}
            continue
        seconds, depths, *accepted = zip(*samples[1:])
        row = rows[name] = {"ms": 1e3 * min(seconds), "median_ms": 1e3 * median(seconds)}
        row["depth"] = depths[0] and mean(depths)
        row["rounds_ms"] = [1e3 * s for s in seconds]
        if "drafts" in name:
            row["accepted"] = mean(accepted[0])
        if name in formats:
            row["bytes"] = weight_bytes(model, row["depth"], BYTES[formats[name]])
            row["of_copy"] = row["bytes"] / min(seconds) / 1e9 / copied
    for row in rows.values():
        if "ms" in row and "ms" in rows.get("gpt2", {}):
            row["versus_gpt2"] = rows["gpt2"]["ms"] / row["ms"]
            row["median_versus_gpt2"] = rows["gpt2"]["median_ms"] / row["median_ms"]
    print(render(rows, copied, args))
    sizes = {key: getattr(args, key) for key in ("context", "tokens", "threads", "rounds")}
    sizes["flops_ours"] = model.flops_per_token(c.max_depth, args.context)
    result = {"config": str(args.config), "model": asdict(c), **sizes, "copy_gb_per_second": copied}
    return finish("decode_cpu", device, result | {"peers": rows})


def render(rows, copied, args):
    lines = [["a token", "ms", "median", "depth", "MB read", "of copy", "versus GPT-2", "of medians", "accepted"]]
    for name, row in rows.items():
        if "error" in row:
            lines.append([name, row["error"][:60]])
            continue
        optional = lambda key, form, row=row: format(row[key], form) if row.get(key) else ""  # noqa: E731
        cells = [f"{row['ms']:.1f}", f"{row['median_ms']:.1f}", optional("depth", ".2f")]
        cells += [f"{row['bytes'] / 1e6:.0f}" if "bytes" in row else "", optional("of_copy", ".0%")]
        cells += [optional("versus_gpt2", ".2f"), optional("median_versus_gpt2", ".2f")]
        cells += [optional("accepted", ".0%")]
        lines.append([name, *cells])
    title = f"{args.context} tokens before, {args.threads} threads; a copy of 64 MiB: {copied:.1f} GB/s\n\n"
    return title + align(lines)
