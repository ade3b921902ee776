"""Continue a prompt with a trained model; the text streams to stdout, everything else goes to stderr.

    python sample.py "Once upon a time"                     the newest checkpoint under runs/
    python sample.py "def main(" --show_depth --seed 1      every token coloured by the steps it took
    cat story.txt | python sample.py --temperature 0        a prompt from a pipe, the most likely continuation
    python sample.py --checkpoint runs/demo                 a prompt loop

stdout gets the continuation alone, without the prompt. Every prompt opens a document of its own.
"""

import argparse
import codecs
import math
import os
import sys
import time
from contextlib import suppress

import torch

import checkpoint
import data
from model import pick_device, pick_dtype

# ANSI 256-colour backgrounds from shallow to deep, light enough for black text.
RAMP = (153, 147, 141, 177, 170, 205, 204, 203)


class InputError(ValueError):
    """Something on the command line or in a named file cannot be used; the message has the value and the remedy."""


# -------------------------------------------------------------------------------------------------- decoding


@torch.no_grad()
def generate(
    model, tokens, max_tokens, temperature=1.0, top_k=None, top_p=1.0, generator=None, memory_length=512, segment=512,
    depth=None,
):  # fmt: skip
    """Continue `tokens`, a list of at least one id; yields (token, depth) until <|endoftext|> or `max_tokens`.

    The prompt is read in segments, then one token at a time; `memory_length` tokens of memory roll along, so that the
    text may grow for ever. depth of a yielded token: the steps its prediction took. The argument `depth` forces it.
    temperature, top_k, top_p, generator: see `sample_token`. Raises ValueError for a depth outside 1..N.
    """
    memory = model.new_memory(1, min(memory_length, len(tokens) + max_tokens))  # more would never be filled
    unread = torch.tensor([tokens]).split(segment, dim=1)
    for _ in range(max_tokens):
        for part in unread:
            out = model(part, memory=memory, depth=depth)
            memory = out.memory
        token = sample_token(out.logits[0, -1, : model.config.vocab_size], temperature, top_k, top_p, generator)
        if token == data.EOT:
            return
        yield token, int(out.depth[0, -1])
        unread = [torch.tensor([[token]])]


def sample_token(logits, temperature=1.0, top_k=None, top_p=1.0, generator=None):
    """Draw a token id from logits (V,); temperature 0 takes the most likely one."""
    if temperature == 0:
        return int(logits.argmax())
    probabilities = truncate(logits, temperature, top_k, top_p)
    return int(torch.multinomial(probabilities, 1, generator=generator))


def truncate(logits, temperature=1.0, top_k=None, top_p=1.0):
    """Probabilities (V,) float64 of logits (V,) / temperature: of the `top_k` most likely tokens, and of these the
    smallest set that holds the share `top_p` of their probability (Holtzman et al. 2020, arXiv 1904.09751)."""
    logits = logits.double()  # float32 sums of 50 000 terms decide wrongly near top_p
    probabilities = ((logits - logits.max()) / temperature).softmax(-1)
    if top_k is None and top_p == 1:
        return probabilities
    ordered, index = probabilities.topk(min(top_k or len(logits), len(logits)))
    if top_p < 1:
        before = ordered.cumsum(-1) - ordered
        ordered[before >= top_p * ordered.sum()] = 0
    return torch.zeros_like(probabilities).scatter_(-1, index, ordered / ordered.sum())


def paint(text, depth, max_depth):
    """`text` on the background colour of `depth`; line breaks stay bare, or the colour would fill the line's rest."""
    colour = RAMP[round((depth - 1) / max(max_depth - 1, 1) * (len(RAMP) - 1))]
    return "\n".join(f"\033[48;5;{colour};38;5;16m{line}\033[0m" if line else "" for line in text.split("\n"))


# -------------------------------------------------------------------------------------------------- command line


def add_model_options(parser):
    """The options that `load_model` and forced depth need, shared with eval_depth.py."""
    group = parser.add_argument_group("model")
    group.add_argument("--checkpoint", metavar="PATH", help="a checkpoint or run folder (default: newest under runs/)")
    group.add_argument("--depth", type=int, metavar="K", help="force K steps a token (default: the model decides)")
    group.add_argument("--memory", type=int, metavar="M", help="tokens of memory (default: as last trained)")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:INDEX (default: auto)")
    group.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"),
                       help="of the activations (default: bfloat16 on cuda, else float32)")  # fmt: skip


def load_model(args):
    """The model, the meta and the path of the checkpoint that the command line asks for; sets `args.memory`.

    Raises `CheckpointError` and `InputError`.
    """
    if args.memory is not None and args.memory < 0:
        raise InputError(f"--memory {args.memory} is negative; give a number of tokens, or 0 for none")
    try:
        device = pick_device(args.device)
    except ValueError as error:
        raise InputError(f"--device: {error}") from None
    path = checkpoint.find(args.checkpoint)
    model, meta = checkpoint.load_model(path, device, pick_dtype(args.dtype, device))
    if args.checkpoint is None:
        print(f"checkpoint {path}", file=sys.stderr)
    if args.depth is not None and not 1 <= args.depth <= model.config.max_depth:
        raise InputError(f"--depth {args.depth} is outside 1..{model.config.max_depth}, the depths of this model")
    if args.memory is None:
        args.memory = meta["memory"]
    return model, meta, path


def check(args):
    """Raises `InputError` for the first sampling option that is out of its range."""
    if not 0 <= args.temperature < math.inf:
        raise InputError(f"--temperature {args.temperature} must be a number from 0 (greedy) up")
    if args.top_k is not None and args.top_k < 1:
        raise InputError(f"--top_k {args.top_k} must be at least 1; leave it out to allow every token")
    if not 0 < args.top_p <= 1:
        raise InputError(f"--top_p {args.top_p} must lie above 0 and at most at 1, which allows every token")
    if args.max_tokens < 1:
        raise InputError(f"--max_tokens {args.max_tokens} must be at least 1")
    if args.seed is not None and not 0 <= args.seed < 2**63:
        raise InputError(f"--seed {args.seed} must be a whole number from 0 to 2**63 - 1")


def answer(model, meta, prompt, args, generator):
    """Stream the continuation of `prompt` to stdout, statistics to stderr. Returns whether Ctrl-C ended it.

    Raises `DataError`.
    """
    tokenizer, depths, interrupted = data.load_tokenizer(), [], False
    N, decoder = model.config.max_depth, codecs.getincrementaldecoder("utf-8")(errors="replace")
    show = lambda text, depth: paint(text, depth, N) if args.show_depth else text  # noqa: E731
    start = time.perf_counter()
    document, segment = [data.EOT, *tokenizer.encode_ordinary(prompt)], meta["config"]["train"]["segment"]
    tokens = generate(
        model, document, args.max_tokens, args.temperature, args.top_k, args.top_p, generator, args.memory, segment,
        args.depth,
    )  # fmt: skip
    try:
        for token, depth in tokens:
            depths.append(depth)
            text = decoder.decode(tokenizer.decode_single_token_bytes(token))
            print(show(text, depth), end="", flush=True)
    except KeyboardInterrupt:
        interrupted = True
    seconds = time.perf_counter() - start
    print(show(decoder.decode(b"", final=True), depths[-1] if depths else 1))
    mean = f"{sum(depths) / len(depths):.2f}" if depths else "n/a"
    print(f"{len(depths)} tokens, {len(depths) / seconds:.1f} tokens/s, mean depth {mean}", file=sys.stderr)
    return interrupted


def run(args):
    """Load the model and answer the prompt, or prompts until an empty line. Returns the exit code."""
    check(args)
    model, meta, _ = load_model(args)
    generator = torch.Generator(model.embedding.weight.device)
    if args.seed is None:
        generator.seed()
    else:
        generator.manual_seed(args.seed)
    if args.show_depth:
        N = model.config.max_depth
        print("depth", *(paint(f" {depth} ", depth, N) for depth in range(1, N + 1)), file=sys.stderr)

    prompt, interactive = args.prompt, args.prompt is None and sys.stdin.isatty()
    if prompt == "-" or (prompt is None and not interactive):
        try:
            prompt = sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")  # the one that `echo` adds
        except UnicodeDecodeError as error:
            raise InputError(f"stdin: byte {error.start} is not UTF-8; convert the prompt to UTF-8") from None
    if not interactive:
        return 130 if answer(model, meta, prompt, args, generator) else 0

    with suppress(ImportError):
        import readline  # noqa: F401  gives `input` line editing and a history; absent on Windows
    print("Ctrl-C stops an answer; an empty line or Ctrl-D quits.", file=sys.stderr)
    while True:
        try:
            prompt = input("\n> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return 0
        if not prompt:
            return 0
        answer(model, meta, prompt, args, generator)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?", help="text to continue; - or a pipe: read stdin; none: a prompt loop")
    parser.add_argument("--max_tokens", type=int, default=256, help="end after so many tokens (default: 256)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the most likely token (default: 0.8)")
    parser.add_argument("--top_k", type=int, help="draw from the K most likely tokens only")
    parser.add_argument("--top_p", type=float, default=1.0,
                        help="draw from the smallest set of this probability (default: 1, every token)")  # fmt: skip
    parser.add_argument("--seed", type=int, help="for the same text every time")
    parser.add_argument("--show_depth", action="store_true", help="colour every token by the steps its prediction took")
    add_model_options(parser)
    args = parser.parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows ? instead of failing
    try:
        return run(args)
    except (InputError, data.DataError, checkpoint.CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of stdout, `head` for example, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the exit would fail to flush it
        return 0


if __name__ == "__main__":
    sys.exit(main())
