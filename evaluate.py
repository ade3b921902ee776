"""Scoring text: negative log-likelihood and depth of every token, with Transformer-XL memory, document by document.

    python evaluate.py perplexity runs/demo                 held-out text of the run's data: nats, bits per byte, ...
    python evaluate.py perplexity runs/demo --data heldout --depth 2 4 --sliding 128
    python evaluate.py context runs/demo --memory 0 512 1024 2048 --domains books arxiv edu --figure context.png
    python evaluate.py zeroshot runs/demo --tasks lambada,hellaswag,arc_easy,arc_challenge \\
        --benchmarks folder                                through lm-evaluation-harness: zeroshot.py
    python evaluate.py chat runs/sft --data data/sft --answers 384               what a tuned model makes of held-out
    python evaluate.py chat runs/dpo --data data/dpo --reference runs/sft        conversations and pairs: answers.py

perplexity  of each domain, and of the model: the mean over domains. At the depth that every token chooses, and at the
            depths of --depth; with memory, and with --sliding windows instead of it
context     loss by position in the document and by memory length, and the context wall: the memory length from which
            on every longer one is worse, if there is one. The same tokens are compared, in the same segments
zeroshot    accuracy with standard errors, and the mean depth of the tokens scored; all zero-shot with --benchmarks
chat        of conversations the loss and depth of answers, by source; of preference pairs how often the better answer
            has the larger reward, and how often it is the longer one; of both the length and end of the model's own
"""

import argparse
import heapq
import importlib.util
import json
import sys
import time
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import checkpoint
import data
from sample import InputError, add_model_options, check_seed, load_model, set_tolerance


@dataclass
class Scores:
    """Of one document of n tokens after its opening <|endoftext|>; all arrays (n,).

    tokens: the tokens that were predicted. nll: their negative log-likelihood in nats, float32. depth: the steps that
    the model took to predict them, int64."""

    tokens: np.ndarray
    nll: np.ndarray
    depth: np.ndarray

    def where(self, mask):
        """The part of it where mask (n,) is true."""
        return Scores(self.tokens[mask], self.nll[mask], self.depth[mask])


def score(model, documents, memory, segment=512, rows=16, depth=None, progress=None):
    """`score_pairs` of documents, each a (n + 1,) array of tokens that opens with <|endoftext|>."""
    return score_pairs(model, [(d[:-1], d[1:]) for d in documents], memory, segment, rows, depth, progress)


@torch.no_grad()
def score_pairs(model, pairs, memory, segment=512, rows=16, depth=None, progress=None):
    """A `Scores` for each (tokens, targets), both (n,) int64, of which the tokens open with <|endoftext|>.

    Every document is read from its start in segments, with `memory` tokens of Transformer-XL memory. Documents are
    packed one after another into `rows` rows of similar length. depth: as in the model's forward. progress: a label for
    a progress bar, or None.
    """
    rows = max(1, min(rows, len(pairs)))
    queues, fill = [[] for _ in range(rows)], [(0, row) for row in range(rows)]
    for i in sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0])):  # longest first, to the shortest row
        length, row = heapq.heappop(fill)
        queues[row].append(i)
        heapq.heappush(fill, (length + len(pairs[i][0]), row))
    length = -(-max(length for length, _ in fill) // segment) * segment
    packed = np.full((2, rows, length), model.config.document_start)
    for row, queue in enumerate(queues):
        for start, i in zip(accumulate((len(pairs[i][0]) for i in queue), initial=0), queue):
            packed[:, row, start : start + len(pairs[i][0])] = pairs[i]

    state = model.new_memory(rows, min(memory, max((len(text) for text, _ in pairs), default=0)))  # no more is filled
    nll, taken = np.empty((rows, length), np.float32), np.empty((rows, length), np.int64)
    hidden = None if progress else True  # None: shown on a terminal only
    for start in tqdm(range(0, length, segment), desc=progress, disable=hidden, unit="segment", leave=False):
        part = slice(start, start + segment)
        out = model(*torch.from_numpy(packed[:, :, part]), state, depth)
        state = out.memory
        nll[:, part] = out.nll.cpu().numpy()
        taken[:, part] = out.depth.cpu().numpy()

    scores = [None] * len(pairs)
    for row, queue in enumerate(queues):
        position = 0
        for i in queue:
            span = slice(position, position + len(pairs[i][0]))
            scores[i] = Scores(pairs[i][1], nll[row, span], taken[row, span])
            position = span.stop
    return scores


@torch.no_grad()
def score_sliding(model, documents, window, stride, rows=16, depth=None, progress=None):
    """As `score`, but without memory: of windows of `window` tokens every `stride`, each scores its last ones. So a
    token sees at least window - stride tokens before it, or all there are, at a cost of window / stride."""
    spans = []  # document, first token of the window, first and last + 1 of its targets
    for i, document in enumerate(documents):
        for first in range(1, len(document), stride):
            end = min(first + stride, len(document))
            spans.append((i, max(0, end - 1 - window), first, end))
    spans.sort(key=lambda span: span[1] - span[3])
    scores = [Scores(d[1:], np.empty(len(d) - 1, np.float32), np.empty(len(d) - 1, np.int64)) for d in documents]
    hidden = None if progress else True
    for at in tqdm(range(0, len(spans), rows), desc=progress, disable=hidden, unit="batch", leave=False):
        batch = spans[at : at + rows]
        length = max(end - start for _, start, _, end in batch)
        tokens = torch.full((len(batch), length), model.config.document_start)  # padded on the right: nothing sees it
        for row, (i, start, _, end) in enumerate(batch):
            tokens[row, : end - start] = torch.from_numpy(documents[i][start:end])
        out = model(tokens[:, :-1], tokens[:, 1:], None, depth)
        nll, taken = out.nll.cpu().numpy(), out.depth.cpu().numpy()
        for row, (i, start, first, end) in enumerate(batch):
            scores[i].nll[first - 1 : end - 1] = nll[row, first - 1 - start : end - 1 - start]
            scores[i].depth[first - 1 : end - 1] = taken[row, first - 1 - start : end - 1 - start]
    return scores


def split_documents(tokens):
    """Cut a (n,) array of tokens before every <|endoftext|>."""
    return np.split(tokens, np.flatnonzero(tokens == data.EOT)[1:])


def summarize(scores):
    """Totals of some documents: tokens, bytes, nats per token, perplexity, bits per byte, mean depth."""
    nll = np.concatenate([s.nll for s in scores]).astype(np.float64)
    depth = np.concatenate([s.depth for s in scores])
    size = int(sum(data.token_bytes()[s.tokens].sum(dtype=np.int64) for s in scores))
    nats = nll.mean()
    return {
        "tokens": len(nll),
        "bytes": size,
        "nats": float(nats),
        "perplexity": float(np.exp(nats)),
        "bits_per_byte": float(nll.sum() / np.log(2) / size),
        "depth": float(depth.mean()),
    }


def macro(domains):
    """Means over domains of their summaries: nats (and perplexity, its exponential), bits per byte, depth."""
    mean = {key: float(np.mean([d[key] for d in domains.values()])) for key in ("nats", "bits_per_byte", "depth")}
    return mean | {"perplexity": float(np.exp(mean["nats"]))}


# -------------------------------------------------------------------------------------------------- perplexity


def read_domains(args, meta):
    """{domain: [tokens of a document, ...]}: --tokens of each, of --data or the run's, those of --domains."""
    from eval_depth import own_texts, read_topics  # it imports this file

    path = args.data or own_texts(meta, "--data FOLDER")
    domains = {name: [d.tokens for d in documents] for name, documents in read_topics(path, args.tokens).items()}
    if unknown := [name for name in args.domains or [] if name not in domains]:
        raise InputError(f"{path}: no domain '{unknown[0]}'; it has {', '.join(domains)}")
    return {name: domains[name] for name in args.domains or domains}


def perplexity(args):
    model, meta, path = load_model(args)
    depths, segment = model.config.depths, meta["config"]["train"]["segment"]
    if wrong := [k for k in args.depths or [] if k not in depths]:
        raise InputError(f"--depth {wrong[0]} is outside {depths[0]}..{depths[-1]}, the depths of this model")
    own, window = model.config, segment + args.memory
    rules = [("tolerance", x) for x in args.tolerances or []] + [("stability", x) for x in args.stabilities or []]
    for rule, value in rules:
        set_tolerance(model, value, rule)  # wrong ones are refused before the long work
        model.config = own
    if args.sliding is not None and not 1 <= args.sliding <= window:
        raise InputError(f"--sliding {args.sliding} must lie in 1..{window}, the window (segment + memory)")
    domains, table = read_domains(args, meta), [["", "domain", "nats", "bits/byte", "perplexity", "depth", "tokens"]]
    rules = [(None, None), *rules, *(("depth", k) for k in args.depths or [])]
    rows = []
    for sliding in (None, args.sliding) if args.sliding else (None,):
        for rule, value in rules:
            model.config = own
            model.set_tolerance(own.tolerance)
            label = f"sliding {sliding} of {window}" if sliding else f"memory {args.memory}"
            label += f", {rule} {value:g}" if rule else ""
            depth = value if rule == "depth" else None
            if rule in ("tolerance", "stability"):
                set_tolerance(model, value, rule)
            found = {}
            for name, documents in domains.items():
                if sliding:
                    scores = score_sliding(model, documents, window, sliding, args.rows, depth, f"{name}, {label}")
                else:
                    scores = score(model, documents, args.memory, segment, args.rows, depth, f"{name}, {label}")
                found[name] = summarize(scores)
            row = {name: value if name == rule else None for name in ("depth", "tolerance", "stability")}
            row |= {"memory": None if sliding else args.memory, "sliding": sliding}
            rows.append(row | {"domains": found, "macro": macro(found)})
            for i, (name, of) in enumerate([*found.items(), ("macro", rows[-1]["macro"])]):
                cells = [f"{of[key]:.{n}f}" for key, n in
                         (("nats", 4), ("bits_per_byte", 4), ("perplexity", 2), ("depth", 2))]  # fmt: skip
                table.append(["" if i else label, name, *cells, f"{of['tokens']:,}" if "tokens" in of else ""])
    return table, {"checkpoint": str(path), "step": meta["step"], "segment": segment, "window": window, "rows": rows}


# -------------------------------------------------------------------------------------------------- context


def bucket_edges(longest):
    """0, 128, 512, 1024, 2048, ... until every position of a document of `longest` tokens has a bucket."""
    edges = [0, 128, 512, 1024]
    while edges[-1] < longest:
        edges.append(2 * edges[-1])
    return edges


def by_position(scores, edges):
    """Sums of nats and numbers of tokens of some documents by position in the document, (buckets,) each."""
    position = np.concatenate([np.arange(len(s.nll)) for s in scores])
    nll = np.concatenate([s.nll for s in scores]).astype(np.float64)
    return np.histogram(position, edges, weights=nll)[0], np.histogram(position, edges)[0]


def compare(scores, best):
    """Mean nats per token of `scores` minus `best`, of the same documents, and its standard error over documents."""
    change = np.array([s.nll.sum(dtype=np.float64) - b.nll.sum(dtype=np.float64) for s, b in zip(scores, best)])
    tokens = np.array([len(s.nll) for s in scores])
    mean, n = change.sum() / tokens.sum(), len(tokens)
    error = np.sqrt(np.square(change - mean * tokens).sum() * n / (n - 1)) / tokens.sum() if n > 1 else None
    return float(mean), None if error is None else float(error)


def context(args):
    memories = sorted(set(args.memories))
    if memories[0] < 0:
        raise InputError(f"--memory {memories[0]} is negative; give numbers of tokens, 0 for none")
    model, meta, path = load_model(args)
    segment = args.segment or meta["config"]["train"]["segment"]
    domains = read_domains(args, meta)
    edges = bucket_edges(max(len(d) - 1 for documents in domains.values() for d in documents))
    names = [f"{a}-{b - 1}" for a, b in zip(edges, edges[1:])]
    found = {"checkpoint": str(path), "step": meta["step"], "segment": segment, "trained_memory": meta["memory"],
             "memory": memories, "buckets": names, "domains": {}}  # fmt: skip
    table = [["domain", "memory", *names, "nats", "- best", "± s.e."]]
    for name, documents in domains.items():
        scores = [score(model, documents, m, segment, args.rows, args.depth, f"{name}, memory {m}") for m in memories]
        sums, counts = (np.array(part) for part in zip(*(by_position(s, edges) for s in scores)))
        nats = sums.sum(1) / counts.sum(1)
        best = len(nats) - 1 - int(nats[::-1].argmin())  # the last of equals: more memory than text is no wall
        changes = [compare(s, scores[best]) for s in scores]
        loss = [[float(a / b) if b else None for a, b in zip(*row)] for row in zip(sums, counts)]
        wall = memories[best] if best + 1 < len(memories) else None
        found["domains"][name] = {"documents": len(documents), "tokens": counts[0].tolist(), "nats": nats.tolist(),
                                  "by_position": loss, "minus_best": changes, "wall": wall}  # fmt: skip
        for i, memory in enumerate(memories):
            cells = ["-" if x is None else f"{x:.3f}" for x in loss[i]]
            error = "n/a" if changes[i][1] is None else f"{changes[i][1]:.4f}"
            table.append(["" if i else name, str(memory), *cells, f"{nats[i]:.4f}", f"{changes[i][0]:+.4f}", error])
        table.append(["", "tokens", *(f"{n:,}" for n in counts[0]), f"{counts[0].sum():,}", "", ""])
    mean = np.mean([of["nats"] for of in found["domains"].values()], 0)
    best = len(mean) - 1 - int(mean[::-1].argmin())
    found["macro"] = {"nats": mean.tolist(), "wall": memories[best] if best + 1 < len(memories) else None}
    for i, memory in enumerate(memories):
        blank = [""] * len(names)
        table.append(["" if i else "macro", str(memory), *blank, f"{mean[i]:.4f}", f"{mean[i] - mean[best]:+.4f}", ""])
    table.append([])
    for name, of in [*found["domains"].items(), ("macro", found["macro"])]:
        known = f"none up to {memories[-1]}" if of["wall"] is None else str(of["wall"])
        table.append([f"context wall, {name}: {known}"])
    if args.figure:
        draw(found, args.figure)
    return table, found


def draw(found, file):
    """Loss by position, a line a memory length, one panel a domain, and loss by memory length."""
    from matplotlib import pyplot

    pyplot.switch_backend("Agg")
    panels = len(found["domains"]) + 1
    figure, axes = pyplot.subplots(1, panels, figsize=(4 * panels + 1, 3.6), squeeze=False, layout="constrained")
    for axis, (name, of) in zip(axes[0], found["domains"].items()):
        for memory, losses in zip(found["memory"], of["by_position"]):
            axis.plot(found["buckets"], [np.nan if x is None else x for x in losses], "o-", label=f"memory {memory}")
        axis.set(title=name, xlabel="position in the document", ylabel="nats per token")
        axis.tick_params("x", rotation=45)
        axes[0, -1].plot([*map(str, found["memory"])], np.subtract(of["nats"], min(of["nats"])), "o-", label=name)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right")
    axes[0, -1].set(title="all positions", xlabel="memory (tokens)", ylabel="nats above the best")
    axes[0, -1].legend()
    pyplot.savefig(file, dpi=150)
    pyplot.close()


# -------------------------------------------------------------------------------------------------- zero-shot


def zeroshot(args):
    try:
        import zeroshot as tasks
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "lm_eval":
            raise
        raise InputError("zeroshot needs lm-evaluation-harness; pip install lm-eval") from None
    names = list(dict.fromkeys(name.strip() for name in args.tasks.split(",") if name.strip()))
    if not names:
        raise InputError(f"--tasks '{args.tasks}' names no task; for example --tasks lambada,hellaswag")
    if args.benchmarks and not args.benchmarks.is_dir():
        raise InputError(f"--benchmarks {args.benchmarks}: no such folder; name one with lambada_test.jsonl and so on")
    model, meta, path = load_model(args)
    segment, started = meta["config"]["train"]["segment"], time.perf_counter()
    batch_tokens = args.batch_tokens or (16384 if model.embedding.weight.is_cuda else 2048)
    harness = tasks.Harness(model, args.memory, segment, args.depth, batch_tokens)
    table = tasks.evaluate_tasks(harness, names, args.benchmarks, args.limit, args.execute_code)
    seconds = time.perf_counter() - started
    print(f"{seconds:.1f} s", file=sys.stderr)
    found = {"checkpoint": str(path), "step": meta["step"], "limit": args.limit, "forced_depth": args.depth}
    found |= {"tolerance": args.tolerance, "stability": args.stability}
    return tasks.as_table(table), found | {"seconds": seconds, "tasks": table}


# -------------------------------------------------------------------------------------------------- tuned models


def chat(args):
    import answers  # it imports this file

    if args.answers < 0:
        raise InputError(f"--answers {args.answers} must not be negative")
    model, meta, path = load_model(args)
    table, found = answers.measure(model, meta, args)
    return table, {"checkpoint": str(path), "step": meta["step"], "data": str(args.data)} | found


# -------------------------------------------------------------------------------------------------- command line


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def add(run, about):
        command = commands.add_parser(run.__name__, help=about, description=about, conflict_handler="resolve")
        command.set_defaults(run=run, depths=None, figure=None)
        add_model_options(command)
        command.add_argument("--checkpoint", dest="named", help=argparse.SUPPRESS)  # as the other programs have it
        command.add_argument("checkpoint", nargs="?", help="a checkpoint or run folder (default: newest under runs/)")
        command.add_argument("--json", type=Path, metavar="FILE", help="write all numbers as JSON")
        return command

    def add_text_options(command):
        command.add_argument("--data", type=Path, metavar="FOLDER",
                             help="a prepared folder or a folder of texts (default: the run's data)")  # fmt: skip
        command.add_argument("--domains", nargs="+", metavar="NAME", help="only these (default: all)")
        command.add_argument("--tokens", type=int, default=100_000, help="at most so many a domain (default: 100000)")
        command.add_argument("--rows", type=int, default=16, help="rows of a batch (default: 16)")

    command = add(perplexity, "loss, bits per byte and perplexity of every domain, and their macro")
    add_text_options(command)
    command.add_argument("--depth", dest="depths", type=int, nargs="+", metavar="K", help="also at these forced depths")
    command.add_argument("--sliding", type=int, metavar="STRIDE",
                         help="also with windows of segment + memory tokens every STRIDE, without memory")  # fmt: skip
    command.add_argument("--tolerance", dest="tolerances", type=float, nargs="+", metavar="X",
                         help="also where tokens halt by these tolerances: see sample.py --help")  # fmt: skip
    command.add_argument("--stability", dest="stabilities", type=float, nargs="+", metavar="X",
                         help="also where they halt by stability: see sample.py --help")  # fmt: skip
    command.set_defaults(depth=None, tolerance=None, stability=None)
    command = add(context, "loss by position in the document and by memory length; the context wall")
    add_text_options(command)
    command.add_argument("--memory", dest="memories", type=int, nargs="+", metavar="M", default=[0, 512, 1024, 2048],
                         help="lengths to compare (default: 0 512 1024 2048)")  # fmt: skip
    command.add_argument("--segment", type=int, metavar="T", help="tokens of a segment (default: as trained)")
    command.add_argument("--figure", type=Path, metavar="FILE.png", help="draw the losses")
    command.set_defaults(memory=None)
    command = add(zeroshot, "zero-shot tasks through lm-evaluation-harness")
    command.add_argument("--tasks", default="lambada,hellaswag,arc_easy,arc_challenge", metavar="A,B,...",
                         help="also winogrande, piqa, openbookqa, mmlu, gsm8k, humaneval, or any of the harness "
                         "(default: %(default)s)")  # fmt: skip
    command.add_argument("--benchmarks", type=Path, metavar="FOLDER", help="local jsonl files, instead of the hub")
    command.add_argument("--limit", type=int, metavar="N", help="only the first N documents of each task")
    command.add_argument("--batch_tokens", type=int, metavar="N", help="of a batch (default: 16384, on a CPU 2048)")
    command.add_argument("--execute_code", action="store_true", help="let humaneval run what the model wrote")
    command = add(chat, "what a tuned model writes and prefers, of held-out conversations and pairs")
    command.add_argument("--data", type=Path, metavar="FOLDER", required=True, help="prepared conversations or pairs")
    command.add_argument("--reference", metavar="PATH", help="pairs: the checkpoint or run that DPO started from")
    command.add_argument("--answers", type=int, metavar="N", default=0,
                         help="also answer N held-out prompts, at temperature 0.8, up to 256 tokens")  # fmt: skip
    command.add_argument("--tokens", type=int, default=131_072, help="at most so many a source (default: 131072)")
    command.add_argument("--rows", type=int, default=16, help="rows of a batch (default: 16)")
    command.add_argument("--seed", type=int, default=1, help="of the answers (default: 1)")
    args = parser.parse_args(argv)
    args.checkpoint = args.checkpoint or args.named
    return args


def check(args):
    """Raises `InputError` for the first option that cannot be used, before any text is scored."""
    for name in ("tokens", "rows", "segment", "limit", "batch_tokens"):
        if (value := getattr(args, name, None)) is not None and value < 1:
            raise InputError(f"--{name} {value} must be at least 1")
    check_seed(getattr(args, "seed", None))
    check_files(args.figure, args.json)


def check_files(figure, *others):
    """Raises `InputError` for a file that cannot be written, or a figure that cannot be drawn; None: there is none."""
    for file in filter(None, (figure, *others)):
        if file.is_dir():
            raise InputError(f"{file} is a folder; name a file")
        if not file.parent.is_dir():
            raise InputError(f"{file}: the folder {file.parent} does not exist; make it first")
    if figure and figure.suffix not in (".png", ".pdf", ".svg"):
        raise InputError(f"--figure {figure}: name a file that ends in .png, .pdf or .svg")
    if figure and not importlib.util.find_spec("matplotlib"):
        raise InputError("--figure needs matplotlib; pip install matplotlib")


def as_text(table):
    """Rows of cells, aligned: the first column and some others on the left. A row of one cell is a line."""
    widths = [max(map(len, column)) for column in zip(*(row for row in table if len(row) == len(table[0])))]
    left = [not i or title in ("", "metric", "source") for i, title in enumerate(table[0])]
    cells = lambda row: (c.ljust(w) if to_left else c.rjust(w) for c, w, to_left in zip(row, widths, left))  # noqa: E731
    return "\n".join("  ".join(cells(row)).rstrip() if len(row) > 1 else "".join(row) for row in table)


def as_markdown(table):
    """Rows of cells as a table of Markdown, the first column on the left."""
    rule = [":--"] + ["--:"] * (len(table[0]) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in [table[0], rule, *table[1:]])


def main(argv=None):
    args = parse(argv)
    sys.stdout.reconfigure(errors="replace")
    try:
        check(args)
        table, found = args.run(args)
        print(as_text(table))
        if args.json:
            args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        return 0
    except (InputError, data.DataError, checkpoint.CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:
        print(f"error: {error}\nLower --rows, --memory or --batch_tokens", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
