"""What the benchmarks of bench.py share: model and device, a clock, tables, the last line, kinds of arguments."""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn

import config
import data
import train
from config import ConfigError
from device import pick_device


class Measured(train.Config):
    """A config whose model is measured, at depths of our own: those that it would be trained at need not fit them."""

    def check_depths(self):
        pass


def load(args, overrides, *settings):
    """The config and the device. overrides: of the command line; settings: ours. Raises `ConfigError`."""
    if wrong := [o for o in overrides if not o.startswith("--model.")]:
        raise ConfigError(f"unknown argument '{wrong[0]}'; settings of the model are written --model.key=value")
    cfg = config.load(args.config, Measured, [*overrides, *settings])
    try:
        return cfg, pick_device(args.device)
    except ValueError as error:
        raise ConfigError(f"--device: {error}") from None


def check_depth(c, depth):
    """Raises `ConfigError` for a mean depth that `aim` cannot give a model of the config c."""
    least = c.depths[c.first_exit]
    if c.halting not in ("act", "exit") or not least < depth < c.max_depth:
        raise ConfigError(
            f"--depth {depth:g} must lie between {least} and {c.max_depth}, of a model with halting = act or exit"
        )


@torch.no_grad()
def aim(model, depth, tokens, targets, spread=0.5, rounds=14):
    """Give `model` a random halting head under which the tokens take `depth` steps on average: logits whose standard
    deviation is about `spread`, which is as wide as tokens of a trained model differ, and a bias found by bisection.
    spread: None to keep the weights of the head, and find only the bias."""
    sign = 1 if model.config.halting == "act" else -1  # what says that a token halts, and that it goes on
    if spread is not None:
        nn.init.normal_(model.halting.weight, std=spread * model.config.width**-0.5)
    low, high = -10.0, 6.0
    for _ in range(rounds):
        model.halting.bias.fill_(sign * (low + high) / 2)
        deep = model(tokens, targets).depth.float().mean() > depth
        low, high = ((low + high) / 2, high) if deep else (low, (low + high) / 2)


def make_batches(args, c, prepared, number):
    """`number` of (tokens, targets), each (B, T) on the host, one after another: of a prepared folder, or random ones.
    args: batch B, segment T and documents, the mean length of random ones, 0 for no boundaries."""
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


def several(kind):
    return lambda text: list(dict.fromkeys(kind(part) for part in text.split(",")))
