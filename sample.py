"""Talk to a trained model, or let it continue a text; the text streams to stdout, everything else goes to stderr.

    python sample.py "What is the capital of France?"       the newest checkpoint under runs/
    python sample.py                                        a conversation, or a prompt loop
    MODEL=base python sample.py "Once upon a time"          base, sft or dpo, or a path
    cat story.txt | python sample.py --temperature 0        a prompt from a pipe, the most likely continuation
    python sample.py "def main(" --show_depth --seed 1      every token coloured by the steps it took
    python sample.py "Hello" --json                         text, depths and speed as one JSON object
    python sample.py --checkpoint runs/sft --export sft.safetensors

A model of the stages sft and dpo answers: the prompt is a user turn (chat.py). A base model continues the prompt, which
opens a document of its own; --raw makes the others do so too. stdout gets the new text alone.
"""

import argparse
import codecs
import json
import math
import os
import sys
import time
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch

import checkpoint
import data
import packed
import repl
from decoding import Session, Stops, parse_draft
from device import pick_device, pick_dtype

# ANSI 256-colour backgrounds from shallow to deep, light enough for black text.
RAMP = (153, 147, 141, 177, 170, 205, 204, 203)


class InputError(ValueError):
    """Something on the command line or in a named file cannot be used; the message has the value and the remedy."""


class Answer(NamedTuple):
    """text: of all tokens up to a stop string. depths: the steps that the prediction of each token took. stop: what
    ended it, "end" (<|endoftext|>), "length", "string" or "interrupted". seconds: the time it took."""

    text: str
    depths: list
    stop: str
    seconds: float

    @property
    def mean_depth(self):
        return sum(self.depths) / len(self.depths) if self.depths else None

    @property
    def speed(self):
        """Tokens a second."""
        return len(self.depths) / self.seconds


def paint(text, depth, max_depth):
    """`text` on the background colour of `depth`; line breaks stay bare, or the colour would fill the line's rest."""
    colour = RAMP[round((depth - 1) / max(max_depth - 1, 1) * (len(RAMP) - 1))]
    return "\n".join(f"\033[48;5;{colour};38;5;16m{line}\033[0m" if line else "" for line in text.split("\n"))


# -------------------------------------------------------------------------------------------------- command line


def add_model_options(parser, weights="full"):
    """The options that `load_model` and forced depth need, shared with eval_depth.py. weights: the default."""
    group = parser.add_argument_group("model")
    group.add_argument("--checkpoint", metavar="PATH",
                       help="a checkpoint or run folder, an exported file, or base, sft, dpo: the newest of that stage "
                       "(default: $MODEL, else the newest under runs/)")  # fmt: skip
    group.add_argument("--depth", type=int, metavar="K", help="force K steps a token (default: the model decides)")
    group.add_argument("--tolerance", type=float, metavar="X",
                       help="a token halts when the exit head says less than X nats: of what the next step wins or, "
                       "by loss, above the bars of training (0 is its depth, 0.2 less, -0.2 more); without that head, "
                       "when a step changes its normalised state by less than X (RMS); say 0.1")  # fmt: skip
    group.add_argument("--stability", type=float, metavar="X",
                       help="also with an exit head, a token halts when a step changes its normalised state by less "
                       "than X (RMS); say 0.3")  # fmt: skip
    group.add_argument("--memory", type=int, metavar="M", help="tokens of memory (default: as last trained)")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:INDEX (default: auto)")
    group.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"),
                       help="of the activations (default: bfloat16 on cuda, else float32)")  # fmt: skip
    group.add_argument("--weights", default=weights, choices=("auto", "full", *packed.FORMATS),
                       help="what a CPU multiplies with; full: as --dtype; auto: float16 where that is possible, with "
                       f"perplexities that differ in the fifth digit (default: {weights})")  # fmt: skip


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
    depths = model.config.depths
    if args.depth is not None and args.depth not in depths:
        raise InputError(f"--depth {args.depth} is outside {depths[0]}..{depths[-1]}, the depths of this model")
    rules = [name for name in ("depth", "tolerance", "stability") if getattr(args, name) is not None]
    if len(rules) > 1:
        raise InputError(f"--{rules[0]} and --{rules[1]} are two rules for the steps of a token; leave one of them out")
    if rules and rules[0] != "depth":
        set_tolerance(model, getattr(args, rules[0]), rules[0])
    model.weight_format = weight_format(args.weights, model)
    if args.memory is None:
        args.memory = meta["memory"]
    return model, meta, path


def weight_format(name, model):
    """The format for `--weights`, or None for full precision. Raises `InputError`."""
    on_cpu = model.embedding.weight.device.type == "cpu"
    if name == "auto":
        return "float16" if on_cpu and packed.supported() and model.compute_dtype == torch.float32 else None
    if name in packed.FORMATS and not (on_cpu and packed.supported()):
        raise InputError(f"--weights {name} is for x86 processors with AVX2; leave it out, or add --device cpu")
    return name if name in packed.FORMATS else None


def set_tolerance(model, tolerance, option="tolerance"):
    """Make tokens halt by this tolerance, see `ModelConfig.halting`: of the model's own rule, or, where it has none or
    `option` is "stability", of that. Raises `InputError`."""
    if model.config.halting == "act":
        raise InputError(f"--{option} {tolerance} is for models without a head for ACT, and this one has one")
    if not math.isfinite(tolerance):
        raise InputError(f"--{option} {tolerance} is not a finite number")
    try:
        if option == "stability" or model.config.halting == "fixed":
            model.config = replace(model.config, halting="stability", exit_by="gain", tolerance=0.0)
        model.set_tolerance(tolerance)
    except ValueError as error:
        raise InputError(f"--{option}: {error}") from None


def check(args):
    """Raises `InputError` for the first option that is out of its range or does not go with another one."""
    if not 0 <= args.temperature < math.inf:
        raise InputError(f"--temperature {args.temperature} must be a number from 0 (greedy) up")
    if args.top_k is not None and args.top_k < 1:
        raise InputError(f"--top_k {args.top_k} must be at least 1; leave it out to allow every token")
    if not 0 < args.top_p <= 1:
        raise InputError(f"--top_p {args.top_p} must lie above 0 and at most at 1, which allows every token")
    if not 0 < args.repetition_penalty < math.inf:
        raise InputError(f"--repetition_penalty {args.repetition_penalty} must be a number above 0; 1 changes nothing")
    if args.max_tokens < 1:
        raise InputError(f"--max_tokens {args.max_tokens} must be at least 1")
    check_seed(args.seed)
    if "" in args.stop:
        raise InputError("--stop '' is empty; every text contains it. Leave it out")
    if args.json and args.show_depth:
        raise InputError("--json has the depth of every token in 'depths'; leave --show_depth out")
    if args.raw and args.system is not None:
        raise InputError("--raw continues a text, which has no --system; leave one of them out")
    if args.export and args.prompt is not None:
        raise InputError(f"--export {args.export} writes a file and takes no prompt; leave one of them out")


def check_seed(seed):
    """Raises `InputError` for a number that cannot start a generator."""
    if seed is not None and not 0 <= seed < 2**63:
        raise InputError(f"--seed {seed} must be a whole number from 0 to 2**63 - 1")


def read_prompt(prompt):
    """The prompt of the command line; for None or "-" that of stdin. Raises `InputError`."""
    if prompt in (None, "-"):
        try:
            prompt = sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")  # the one that `echo` adds
        except UnicodeDecodeError as error:
            raise InputError(f"stdin: byte {error.start} is not UTF-8; convert the prompt to UTF-8") from None
    if not prompt.strip():
        raise InputError("the prompt is empty; give some text, as an argument or through a pipe")
    return prompt


def answer(args, generator, max_depth, session):
    """Stream the continuation of what `session` was fed to stdout, unless it goes into JSON, and statistics to stderr.
    Ctrl-C ends it. Returns the `Answer`. Raises `DataError`."""
    tokenizer, decoder = data.load_tokenizer(), codecs.getincrementaldecoder("utf-8")(errors="replace")
    stops, depths, texts, stop = Stops(args.stop), [], [], None

    def show(pieces):
        for text, depth in pieces:
            texts.append(text)
            if not args.json:
                print(paint(text, depth, max_depth) if args.show_depth else text, end="", flush=True)

    start = time.perf_counter()
    tokens = session.stream(
        args.max_tokens, args.temperature, args.top_k, args.top_p, generator, args.repetition_penalty
    )
    try:
        for token, depth in tokens:
            depths.append(depth)
            show(stops.push(decoder.decode(tokenizer.decode_single_token_bytes(token)), depth))
            if stops.found:
                break
    except KeyboardInterrupt:
        stop = "interrupted"
    seconds = time.perf_counter() - start
    if not stops.found:
        half = decoder.decode(b"", final=True)  # of a character
        show([*stops.push(half, depths[-1] if depths else 1), *stops.rest()])
    stop = stop or ("string" if stops.found else "length" if len(depths) == args.max_tokens else "end")
    made = Answer("".join(texts), depths, stop, seconds)
    if not args.json:
        print()
        mean = "n/a" if made.mean_depth is None else f"{made.mean_depth:.2f}"
        drafts = f", {session.accepted} of {session.verified} drafts accepted so far" if session.draft else ""
        print(f"{len(depths)} tokens, {made.speed:.1f} tokens/s, mean depth {mean}{drafts}", file=sys.stderr)
    return made


def report(prompt, made, path):
    """An `Answer` to a prompt as the one JSON object of --json."""
    return json.dumps({
        "prompt": prompt, "text": made.text, "tokens": len(made.depths), "mean_depth": made.mean_depth,
        "depths": made.depths, "stop": made.stop, "tokens_per_second": made.speed, "checkpoint": str(path),
    })  # fmt: skip


def run(args):
    """Export the model, answer the prompt, or hold a conversation. Returns the exit code."""
    check(args)
    if args.export:
        path = checkpoint.find(args.checkpoint)
        meta = checkpoint.export(path, args.export)
        print(f"{args.export}: {path}, stage {checkpoint.stage(meta)}, step {meta['step']}", file=sys.stderr)
        return 0
    interactive = args.prompt is None and sys.stdin.isatty()
    if args.json and interactive:
        raise InputError("--json needs a prompt: as an argument or through a pipe")
    prompt = None if interactive else read_prompt(args.prompt)
    model, meta, path = load_model(args)
    chats = checkpoint.stage(meta) != "pretrain" and not args.raw
    if args.system is not None and not chats:
        raise InputError(f"--system: {path} is a base model, which only continues text; name one of stage sft or dpo")
    try:
        draft = None if args.draft is None else parse_draft(args.draft, model.config)
    except ValueError as error:
        raise InputError(f"--draft {args.draft}: {error}") from None
    generator = torch.Generator(model.embedding.weight.device)
    if args.seed is None:
        generator.seed()
    else:
        generator.manual_seed(args.seed)
    if args.show_depth:
        N = model.config.max_depth
        print("depth", *(paint(f" {depth} ", depth, N) for depth in model.config.depths), file=sys.stderr)

    def session(room=args.memory):
        return Session(model, min(args.memory, room), meta["config"]["train"]["segment"], args.depth, draft)

    respond = partial(answer, args, generator, model.config.max_depth)
    talk = repl.Chat(args, session, respond) if chats else repl.Texts(session, respond, args.max_tokens)
    if interactive:
        talk.loop()
        return 0
    made = talk.say(prompt)
    if args.json:
        print(report(prompt, made, path))
    return 130 if made.stop == "interrupted" else 0


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?", help="- or a pipe: read stdin; none: a conversation, or a prompt loop")
    parser.add_argument("--system", metavar="TEXT", help="instructions that open the conversation")
    parser.add_argument("--raw", action="store_true", help="continue the prompt, also with a model that answers")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the text")
    parser.add_argument("--export", metavar="FILE", help="write the model as FILE.safetensors, and nothing else")
    parser.add_argument("--max_tokens", type=int, default=256, help="end after so many tokens (default: 256)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the most likely token (default: 0.8)")
    parser.add_argument("--top_k", type=int, help="draw from the K most likely tokens only")
    parser.add_argument("--top_p", type=float, default=1.0,
                        help="draw from the smallest set of this probability (default: 1, every token)")  # fmt: skip
    parser.add_argument("--repetition_penalty", type=float, default=1.0, metavar="X",
                        help="above 1: make tokens that occurred already less likely (default: 1)")  # fmt: skip
    parser.add_argument("--draft", metavar="KxT",
                        help="draft T tokens at K steps each and verify them in one pass, say 2x3: the same "
                        "distribution, and faster on a CPU if the model was trained at drawn depths")  # fmt: skip
    parser.add_argument("--stop", action="append", default=[], metavar="STRING",
                        help="end before this text; may be given several times")  # fmt: skip
    parser.add_argument("--seed", type=int, help="for the same text every time")
    parser.add_argument("--show_depth", action="store_true", help="colour every token by the steps its prediction took")
    add_model_options(parser, weights="auto")
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
