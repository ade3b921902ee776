"""Depth per topic: on which texts, and on which kinds of token, does the model spend its steps?

    python eval_depth.py                                    the held-out text of the newest checkpoint's data
    python eval_depth.py texts/ --by_class --forced         one sub-folder or file a topic: .txt .py .jsonl ...
    python eval_depth.py --json depth.json --markdown depth.md
    python eval_depth.py --map map.html --text model.py     one text, every token shaded by its depth; and map.png

The depth of a token is the number of steps its *prediction* took, made at the position before it. The columns:

depth          mean over all tokens of the topic
95 % interval  of that mean, by bootstrap over documents (Efron 1979): tokens of one document are not independent
1..N           share of tokens at each depth
perplexity     exp of the mean loss in nats; bits/byte does not depend on the tokenizer
rank corr.     Spearman's, of depth and loss over the tokens: does the model think longer where it predicts badly?
macro          the mean over topics, `all` the mean over their tokens

Token classes (--by_class): that of the token's first character that is not white space. Every `.py` file and every
document of a topic named `code` or `python` is read as Python: identifier, keyword, operator, number, punctuation. Its
comments and strings, and all other text, are prose: word start, word continuation, number, punctuation.
"""

import argparse
import json
import keyword
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import checkpoint
import data
import evaluate
from depth_map import html_map, png_map
from sample import InputError, add_model_options, load_model
from sources import unpacked, unpacked_name

# -------------------------------------------------------------------------------------------------- texts


@dataclass
class Document:
    tokens: np.ndarray  # (n + 1,) int64, opens with <|endoftext|>
    code: bool = False  # which token classes it has


def read_topics(path, limit):
    """{topic: [Document, ...]} of a prepared folder (its held-out split), a folder of texts or one text file.

    The first `limit` tokens of every topic, whole documents in the order of their names; the last one may be cut.
    Raises `DataError`, and `InputError` for a folder or topic without text or a file that cannot be read.
    """
    path, topics = Path(path), {}
    if (path / "manifest.json").exists():
        prepared = data.Prepared.open(path)
        for name in prepared.domains:
            parts = evaluate.split_documents(prepared.tokens("val", name, limit))
            documents = [Document(part, name in ("code", "python")) for part in parts if len(part) > 1]
            if documents:
                topics[name] = documents
            else:
                print(f"{path}: the domain '{name}' has no held-out text; left out", file=sys.stderr)
        if not topics:
            raise InputError(f"{path}: no held-out text at all; prepare it with a larger val_fraction")
    elif not path.exists():
        raise InputError(f"{path}: no such file or folder; name a folder of texts, or one made by prepare_data.py")
    else:
        visible = lambda file: not any(p.startswith(".") for p in file.relative_to(path).parts)  # noqa: E731
        for entry in sorted(filter(visible, path.iterdir())) if path.is_dir() else [path]:
            files = sorted(p for p in entry.rglob("*") if p.is_file() and visible(p)) if entry.is_dir() else [entry]
            name = entry.name if entry.is_dir() else Path(unpacked_name(entry)).stem
            documents = topics.setdefault(name, [])  # a file and a folder may be of one topic
            documents.extend(encode(files, name, limit - sum(len(of.tokens) - 1 for of in documents)))
        if not topics:
            raise InputError(f"{path}: an empty folder; put one sub-folder or one file a topic in it")
    if empty := [name for name, documents in topics.items() if not documents]:
        raise InputError(f"{path}: the topic '{empty[0]}' has no text; add some, or remove it")
    return topics


def own_texts(meta, option):
    """The folder of the text that a model was trained on. option: how the command line names another. Raises
    `InputError` for a model that was trained on conversations."""
    path, stage = meta["config"]["data"]["path"], checkpoint.stage(meta)
    if stage != "pretrain":
        raise InputError(f"{path}: the data of a run of the stage {stage}, which is not text; name a folder of text by "
                         f"{option}, or a run of the stage pretrain as the checkpoint")  # fmt: skip
    return path


def encode(files, topic, limit):
    """The first `limit` tokens of some files, as a list of `Document`."""
    documents = []
    for file in files:
        for text in read_texts(file):
            if limit < 1:
                return documents
            if text.strip():
                tokens = np.array([data.EOT, *data.load_tokenizer().encode_ordinary(text)[:limit]])
                documents.append(Document(tokens, topic in ("code", "python") or file.suffix == ".py"))
                limit -= len(tokens) - 1
    return documents


def read_texts(file):
    """The documents of one file: the "text" of every line of .jsonl (.zst, .gz), any other file as a whole.

    Raises `InputError`.
    """
    where = file
    try:
        if not unpacked_name(file).endswith(".jsonl"):
            yield file.read_bytes().decode("utf-8-sig")
            return
        with unpacked(file) as (lines, _):
            for number, line in enumerate(lines, 1):
                where = f"{file}, line {number}"
                if line.strip():
                    text = json.loads(line.decode("utf-8"))["text"]
                    if not isinstance(text, str):
                        raise TypeError
                    yield text
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: byte {error.start} is not UTF-8; convert the file, or remove it") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: damaged JSON ({error.msg}); mend or remove the line") from None
    except (KeyError, TypeError):
        raise InputError(f'{where}: not an object with a text under "text"; mend or remove the line') from None
    except (OSError, data.DataError) as error:
        raise InputError(f"{where}: {error}; copy the file again, or remove it") from None


# -------------------------------------------------------------------------------------------------- token classes

CLASSES = (
    "word start", "word continuation", "identifier", "keyword", "operator", "number", "punctuation", "whitespace"
)  # fmt: skip
CODE = re.compile(
    r'''(?P<prose> \#[^\n]* | [rbfuRBFU]{0,2} (?: """(?:\\.|[^\\])*?""" | \'\'\'(?:\\.|[^\\])*?\'\'\'
                                              | "(?:\\.|[^"\\\n])*" | '(?:\\.|[^'\\\n])*' ))
      | (?P<identifier> [^\W\d]\w* ) | (?P<number> \.?\d[\w.]* ) | (?P<operator> [-+*/%@&|^~<>=!]+ )
      | (?P<whitespace> \s+ ) | (?P<punctuation> . )''',
    re.VERBOSE | re.DOTALL,
)
PROSE = re.compile(
    r"(?P<word> [^\W\d_]+(?:['’][^\W\d_]+)* ) | (?P<number> \d+(?:[.,:]\d+)* ) | (?P<whitespace> \s+ )"
    r"| (?P<punctuation> . )",
    re.VERBOSE | re.DOTALL,
)


def classify(tokens, code):
    """The class of each of some tokens (n,) that follow one another, as indices into CLASSES, (n,) int64."""
    parts = data.load_tokenizer().decode_tokens_bytes(tokens.tolist())
    text = b"".join(parts).decode("utf-8", "surrogateescape")  # a cut document may end inside a character
    by_character = np.zeros(len(text), np.int64)

    def mark(start, end, code):
        for match in (CODE if code else PROSE).finditer(text, start, end):
            kind, span = match.lastgroup, slice(*match.span())
            if kind == "prose":
                mark(*match.span(), code=False)
            elif kind == "word":
                by_character[span] = CLASSES.index("word continuation")
                by_character[match.start()] = CLASSES.index("word start")
            else:
                kind = "keyword" if kind == "identifier" and keyword.iskeyword(match.group()) else kind
                by_character[span] = CLASSES.index(kind)

    mark(0, len(text), code)
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
    stray = (codes >= 0xDC80) & (codes <= 0xDCFF)  # a byte that is no character
    widths = np.where(stray, 1, 1 + (codes >= 0x80) + (codes >= 0x800) + (codes >= 0x10000))
    by_byte = np.repeat(by_character, widths)

    ends = np.cumsum([len(part) for part in parts])
    starts = ends - [len(part) for part in parts]
    whitespace = CLASSES.index("whitespace")
    inked = np.where(by_byte != whitespace, np.arange(len(by_byte)), len(by_byte))
    first = np.minimum.accumulate(inked[::-1])[::-1][starts]  # the first byte from there on that is not white space
    return np.where(first < ends, by_byte[np.minimum(first, len(by_byte) - 1)], whitespace)


def by_class(topics, scores):
    """{class: scores of its tokens, one `Scores` a document that has any}, in the order of CLASSES."""
    groups = {name: [] for name in CLASSES}
    for topic, documents in topics.items():
        for document, s in zip(documents, scores[topic]):
            classes = classify(s.tokens, document.code)
            for index in np.unique(classes):
                of = classes == index
                groups[CLASSES[index]].append(evaluate.Scores(s.tokens[of], s.nll[of], s.depth[of]))
    return {name: group for name, group in groups.items() if group}


# -------------------------------------------------------------------------------------------------- statistics


def ranks(x):
    """Ranks from 1 of x (n,); equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def spearman(a, b):
    """Spearman's rank correlation of a and b (n,), or None where one of them is constant."""
    a, b = ranks(a) - (len(a) + 1) / 2, ranks(b) - (len(b) + 1) / 2
    spread = math.sqrt((a @ a) * (b @ b))
    return float(a @ b / spread) if spread else None


def bootstrap(scores, rng, resamples=1000):
    """Mean depth of `resamples` draws with replacement of as many documents, (resamples,); None for one document."""
    if len(scores) < 2:
        return None
    depth, tokens = np.array([(s.depth.sum(), len(s.depth)) for s in scores]).T
    drawn = rng.integers(len(scores), size=(resamples, len(scores)), dtype=np.int32)
    return depth[drawn].sum(1) / tokens[drawn].sum(1)


def interval(draws):
    """The central 95 % of some draws as [low, high], or None."""
    return None if draws is None else np.quantile(draws, (0.025, 0.975)).tolist()


def describe(scores, max_depth, draws):
    """The row of some documents: `evaluate.summarize`, documents, interval, histogram and rank correlation."""
    depth, nll = (np.concatenate([getattr(s, name) for s in scores]) for name in ("depth", "nll"))
    return evaluate.summarize(scores) | {
        "documents": len(scores),
        "interval": interval(draws),
        "histogram": (np.bincount(depth, minlength=max_depth + 1)[1:] / len(depth)).tolist(),
        "spearman": spearman(depth, nll),
    }


def report(scores, max_depth, seed, classes=None):
    """The tables of {topic: [Scores, ...]} as plain data: rows `topics`, `macro`, `all`, and `classes` if given."""
    rng = np.random.default_rng(seed)
    draws = {name: bootstrap(group, rng) for name, group in scores.items()}
    topics = {name: describe(group, max_depth, draws[name]) for name, group in scores.items()}
    known = [row["spearman"] for row in topics.values() if row["spearman"] is not None]
    macro = evaluate.macro(topics) | {
        "interval": None if any(d is None for d in draws.values()) else interval(np.mean([*draws.values()], 0)),
        "histogram": np.mean([row["histogram"] for row in topics.values()], 0).tolist(),
        "spearman": float(np.mean(known)) if known else None,
    }
    pooled = [s for group in scores.values() for s in group]
    tables = {"topics": topics, "macro": macro, "all": describe(pooled, max_depth, bootstrap(pooled, rng))}
    if classes:
        rows = {name: describe(group, max_depth, bootstrap(group, rng)) for name, group in classes.items()}
        tables["classes"] = rows
    return tables


# -------------------------------------------------------------------------------------------------- tables


def depth_table(label, rows, max_depth, percent):
    """Header and cells of {name: row}. percent: the histogram as numbers, one column a depth, not as a bar chart."""
    steps = [f"{k} (%)" for k in range(1, max_depth + 1)] if percent else [f"1..{max_depth}"]
    table = [[label, "documents", "tokens", "depth", "95 % interval", *steps, "perplexity", "bits/byte", "rank corr."]]
    for name, row in rows.items():
        shares = row["histogram"]
        bars = "".join("▁▂▃▄▅▆▇█"[round(7 * share / max(shares))] if share else "·" for share in shares)
        counts = [f"{row[key]:,}" if key in row else "" for key in ("documents", "tokens")]
        limits = "n/a" if row["interval"] is None else "{:.2f}-{:.2f}".format(*row["interval"])
        table.append([
            name, *counts, f"{row['depth']:.2f}", limits, *([f"{100 * s:.1f}" for s in shares] if percent else [bars]),
            f"{row['perplexity']:.2f}", f"{row['bits_per_byte']:.3f}",
            "n/a" if row["spearman"] is None else f"{row['spearman']:.2f}",
        ])  # fmt: skip
    return table


def forced_table(tables):
    own = {name: row["perplexity"] for name, row in [*tables["topics"].items(), ("macro", tables["macro"])]}
    table = [["perplexity at depth", *map(str, tables["forced_depths"]), "as above"]]
    return table + [[name, *(f"{p:.2f}" for p in [*row, own[name]])] for name, row in tables["forced"].items()]


def render(tables, max_depth, markdown=False):
    """All tables as aligned text, or as Markdown."""
    parts = [depth_table("topic", tables["topics"] | {k: tables[k] for k in ("macro", "all")}, max_depth, markdown)]
    if "classes" in tables:
        parts.append(depth_table("class", tables["classes"], max_depth, markdown))
    if "forced" in tables:
        parts.append(forced_table(tables))
    return "\n\n".join(map(evaluate.as_markdown if markdown else evaluate.as_text, parts))


# -------------------------------------------------------------------------------------------------- command line


def check(args):
    """Raises `InputError` for the first option that cannot be used, before any text is scored."""
    for name, least in (("tokens", 1), ("rows", 1), ("seed", 0)):
        if getattr(args, name) < least:
            raise InputError(f"--{name} {getattr(args, name)} must be at least {least}")
    if args.map and args.map.suffix != ".html":
        raise InputError(f"--map {args.map} must end in .html; the figure is written next to it as .png")
    if args.text and not args.map:
        raise InputError(f"--text {args.text} is the text of a map; add --map FILE.html")
    if args.text and not args.text.is_file():
        raise InputError(f"--text {args.text}: no such file; name one text file")
    evaluate.check_files(None, args.json, args.markdown, args.map)


def write_map(scores, max_depth, title, file):
    file.write_text(html_map(scores, max_depth, title), encoding="utf-8")
    written = [file]
    try:
        png_map(scores, max_depth, title, file.with_suffix(".png"))
        written.append(file.with_suffix(".png"))
    except ImportError:
        print("no .png: it needs matplotlib; pip install matplotlib", file=sys.stderr)
    print("wrote", *written, file=sys.stderr)


def run(args):
    check(args)
    model, meta, path = load_model(args)
    N, segment = model.config.max_depth, meta["config"]["train"]["segment"]

    def score(documents, label, depth=args.depth):
        tokens = [document.tokens for document in documents]
        return evaluate.score(model, tokens, args.memory, segment, args.rows, depth, label)

    if args.text:  # read before the long work, like everything that can be wrong
        (documents,) = read_topics(args.text, args.tokens).values()
        mapped, title = score(documents[:1], args.text.name)[0], args.text.name
    if args.texts or not args.text:
        texts = args.texts or own_texts(meta, "the argument TEXTS")
        topics = read_topics(texts, args.tokens)
        scores = {name: score(documents, name) for name, documents in topics.items()}
        tables = {"checkpoint": str(path), "step": meta["step"], "texts": str(texts), "max_depth": N}
        tables |= {"forced_depth": args.depth, "tolerance": args.tolerance, "stability": args.stability}
        tables |= {"memory": args.memory, "segment": segment, "seed": args.seed}
        tables |= report(scores, N, args.seed, by_class(topics, scores) if args.by_class else None)
        if args.forced:
            forced = [
                {name: evaluate.summarize(score(docs, f"{name}, depth {k}", k)) for name, docs in topics.items()}
                for k in model.config.depths
            ]
            tables["forced_depths"] = list(model.config.depths)
            tables["forced"] = {name: [row[name]["perplexity"] for row in forced] for name in topics}
            tables["forced"]["macro"] = [evaluate.macro(row)["perplexity"] for row in forced]
        print(render(tables, N))
        if args.markdown:
            args.markdown.write_text(render(tables, N, markdown=True) + "\n", encoding="utf-8")
        if args.json:
            args.json.write_text(json.dumps(tables, indent=1) + "\n", encoding="utf-8")
    if args.map:
        if not args.text:  # the first document long enough to show something, else the longest
            named = [(f"{name}, document {i}", s) for name, group in scores.items() for i, s in enumerate(group, 1)]
            title, mapped = max(named, key=lambda pair: min(len(pair[1].tokens), 400))
        write_map(mapped, N, title, args.map)
    return 0


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="?", type=Path, metavar="TEXTS",
                        help="a prepared folder or a folder of texts (default: the checkpoint's data)")  # fmt: skip
    parser.add_argument("--tokens", type=int, default=100_000, help="at most so many of every topic (default: 100000)")
    parser.add_argument("--by_class", action="store_true", help="add the table by class of the predicted token")
    parser.add_argument("--forced", action="store_true", help="add the perplexity at every forced depth")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers as JSON")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables as Markdown")
    parser.add_argument("--map", type=Path, metavar="FILE.html", help="draw one text by depth, as a page and a .png")
    parser.add_argument("--text", type=Path, metavar="FILE",
                        help="of the map (default: a document of TEXTS); without TEXTS no table")  # fmt: skip
    parser.add_argument("--rows", type=int, default=16, help="rows of a batch (default: 16)")
    parser.add_argument("--seed", type=int, default=1, help="of the bootstrap (default: 1)")
    add_model_options(parser)
    args = parser.parse_args(argv)
    sys.stdout.reconfigure(errors="replace")
    try:
        return run(args)
    except (InputError, data.DataError, checkpoint.CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:
        print(f"error: {error}\nLower --rows or --memory", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
