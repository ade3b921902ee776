"""Where text comes from: files, installed packages, problems made here, and data sets of the Hugging Face hub.

A source is read as a row of *files* (a package has many, a data set on the hub is one), and a file as a row of
numbered records. So (source, file, record) names a place at which a later run can continue reading.

What the `datasets` library reads well (the hub, Parquet) goes through it; a JSON line that is broken, and a text
file that is not UTF-8, must be named by their line, which needs readers of our own.
"""

import ast
import glob
import importlib
import importlib.util
import io
import json
import os
import random
import re
import sysconfig
import warnings
import zlib
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal, NamedTuple

from data import DataError

MAX_DOCUMENT = 10**8  # bytes; a larger one is nearly always a corpus that lost its line breaks
KINDS = ("files", "package", "mapping", "generated", "hub")
PACKED = (".zst", ".gz")  # the endings of compressed files


@dataclass
class Source:
    """One place that text comes from. Exactly one of the five first keys says which kind it is."""

    # a path or glob: .jsonl and .parquet by rows, for prepare_chat.py .json too, anything else one document a file;
    # .jsonl and .json may be compressed: .jsonl.zst, .jsonl.gz
    files: str = ""
    package: str = ""  # an installed package, found but never imported; "stdlib" is Python's own library
    mapping: str = ""  # "module:attribute", a dict of texts
    generated: str = ""  # one of `GENERATORS`: made here, from the seed
    hub: str = ""  # a Hugging Face data set, streamed
    licence: str = ""
    text: str = "text"  # the column or JSON key that holds the text; "": the whole row (prepare_chat.py)
    glob: list[str] = field(default_factory=lambda: ["**/*.py"])  # package: which of its files
    exclude: list[str] = field(default_factory=list)  # package: patterns of files to leave out
    extract: Literal["text", "docstrings", "conversations", "chats"] = "text"  # what to take from a file
    cut: str = ""  # a regular expression: a new document starts at every line that matches it
    documents: int = 1000  # generated: how many
    config: str = ""  # hub: configuration, split, revision
    split: str = "train"
    revision: str = ""

    def __post_init__(self):
        kinds = [kind for kind in KINDS if getattr(self, kind)]
        if len(kinds) != 1:
            raise ValueError(f"a source has exactly one of the keys {', '.join(KINDS)}; this one has {kinds or 'none'}")
        if self.generated and self.generated not in GENERATORS:
            raise ValueError(f"generated must be one of {', '.join(GENERATORS)}, not {self.generated!r}")
        if self.mapping and not re.fullmatch(r"[\w.]+:\w+", self.mapping):
            raise ValueError(f"mapping must look like 'module:attribute', not {self.mapping!r}")
        if any(not pattern or pattern.startswith(("/", "~")) for pattern in self.glob):
            raise ValueError(f"glob must hold patterns relative to the package, not {self.glob}")
        try:
            re.compile(self.cut)
        except re.error as error:
            raise ValueError(f"cut is not a regular expression: {error}") from None

    @property
    def kind(self):
        return next(kind for kind in KINDS if getattr(self, kind))

    @property
    def name(self):
        return getattr(self, self.kind)

    @property
    def conversational(self):
        """Whether its records are rows for prepare_chat.py, and never text."""
        return self.extract == "chats" or self.generated in ("questions", "preferences")


# ---------------------------------------------------------------------------------------------------------------------
# reading: every reader yields (index, text or Bad, bytes of the file read so far), from the record after `skip` on


class BrokenOff(DataError):
    """A download that broke off part way. It always stops the run, which can continue: skipping would lose the rest."""


class Bad(NamedTuple):
    """A record that cannot be used, and why."""

    reason: str
    line: int | None = None


class Record(NamedTuple):
    text: str | dict | Bad
    source: int
    file: str
    next: tuple[int, int, int]  # (source, file, record) at which reading continues after this one
    read: float  # bytes of input since the record before


def read_sources(sources, start, seed):
    """Yield the `Record`s of `sources` in order from the position `start` on; what cannot be read is a `Bad` record."""
    for s, source in enumerate(sources[start[0] :], start[0]):
        try:
            files = list_files(source)
        except DataError as error:
            yield Record(Bad(str(error)), s, source.name, (s + 1, 0, 0), 0)
            continue
        first, skip = start[1:] if s == start[0] else (0, 0)
        for f, (name, path) in enumerate(files[first:], first):
            done = skip if f == first else 0
            before = None if done else 0  # the part read by an earlier run was counted then
            try:
                for index, text, position in read_file(source, path, done, seed):
                    yield Record(text, s, name, (s, f, index), 0 if before is None else position - before)
                    before = position
            except BrokenOff:
                raise
            except (OSError, DataError) as error:
                yield Record(Bad(getattr(error, "strerror", None) or str(error)), s, name, (s, f + 1, 0), 0)


def list_files(source):
    """The files of a source, sorted, as (name for messages, path or None). Raises `DataError` where there are none."""
    if source.files:
        paths = [path for path in sorted(glob.glob(source.files, recursive=True)) if os.path.isfile(path)]
        if not paths:
            raise DataError("no file there; check the path, which is relative to the folder you start from")
        return [(path, path) for path in paths]
    if source.package:
        folder = package_folder(source.package)
        paths = {p.relative_to(folder).as_posix() for pattern in source.glob for p in folder.glob(pattern)}
        paths = [p for p in sorted(paths) if not any(fnmatch(p, pattern) for pattern in source.exclude)]
        paths = [p for p in paths if (folder / p).is_file() and not p.startswith("site-packages/")]
        if not paths:
            raise DataError(f"no file of the installed package matches {source.glob}")
        return [(f"{source.package}/{p}", folder / p) for p in paths]
    return [(source.name, None)]


def package_folder(package):
    if package == "stdlib":
        return Path(sysconfig.get_path("stdlib"))
    spec = importlib.util.find_spec(package.partition(".")[0])
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"no installed package '{package}'; pip install it, or remove the source")
    return Path(spec.submodule_search_locations[0], *package.split(".")[1:])


def read_file(source, path, skip, seed):
    if path is None:
        return {"mapping": read_mapping, "generated": read_generated, "hub": read_hub}[source.kind](source, skip, seed)
    name = unpacked_name(path)
    if name.endswith(".jsonl"):
        return read_jsonl(source, path, skip)
    if name.endswith(".json") and not source.text:
        return read_json(path, skip)
    if name != Path(path).name:  # an archive, perhaps, of which unpacking alone makes no text
        raise DataError("of compressed files only .jsonl is read, and .json with conversations; unpack it first")
    if name.endswith(".parquet"):
        return read_parquet(source, path, skip)
    return read_text(source, path, skip)


def column(row, name):
    """The text of one row, or why there is none; with no `name` the row."""
    if not isinstance(row, dict):
        return Bad("not a JSON object")
    if not name:
        return row
    if name not in row:
        return Bad(f"no column '{name}' (there are: {', '.join(map(str, row))}); name the right one with text = ...")
    return row[name] if isinstance(row[name], str) else Bad(f"'{name}' is {type(row[name]).__name__}, not text")


def unpacked_name(path):
    """The name of a file, without the ending that says how it is compressed."""
    path = Path(path)
    return path.stem if path.suffix in PACKED else path.name


@contextmanager
def unpacked(path):
    """Open a file: a stream of its bytes, decompressed where its name ends as in `PACKED`, and the open file itself,
    whose `tell` is how far it has been read. Reading raises `DataError` where a compressed file is damaged."""
    suffix = Path(path).suffix
    with open(path, "rb") as raw:
        yield io.BufferedReader(UnpackedFile(raw, suffix), 2**18) if suffix in PACKED else raw, raw


class UnpackedFile(io.RawIOBase):
    """Decompressed bytes of `raw`. The stream reader of zstandard ends a truncated file without a word.

    Reading raises `DataError` where the file is damaged."""

    def __init__(self, raw, suffix):
        self.raw, self.frame, self.ready = raw, None, b""
        if suffix == ".gz":
            self.form, self.error, self.new_frame = "gzip", zlib.error, lambda: zlib.decompressobj(16 + zlib.MAX_WBITS)
        else:
            import zstandard  # here: most sources do not need it, and not every machine that trains has it

            self.form, self.error = "Zstandard", zstandard.ZstdError
            self.new_frame = lambda: zstandard.ZstdDecompressor(max_window_size=2**27).decompressobj()

    def readable(self):
        return True

    def readinto(self, buffer):
        while not self.ready:
            ended = self.frame is not None and self.frame.eof
            chunk = self.frame.unused_data if ended else b""
            if not chunk:
                chunk = self.raw.read(2**16)
            if not chunk and self.frame is not None and not ended:
                raise DataError("the compressed file is truncated; copy it again")
            if not chunk:
                return 0
            if self.frame is None or ended:
                self.frame = self.new_frame()
            try:
                self.ready = memoryview(self.frame.decompress(chunk))
            except self.error as error:
                raise DataError(f"not a {self.form} file, or a damaged one: {error}") from None
        count = min(len(buffer), len(self.ready))
        buffer[:count], self.ready = self.ready[:count], self.ready[count:]
        return count


def read_jsonl(source, path, skip):
    # A reader of our own: `datasets` does not tell the line of a broken record, nor how far into the file it is.
    with unpacked(path) as (lines, raw):
        number = 0
        while line := lines.readline(MAX_DOCUMENT + 1):
            number += 1
            if number <= skip or line.isspace():
                continue
            if len(line) > MAX_DOCUMENT:
                raise DataError(f"line {number} is longer than {MAX_DOCUMENT // 10**6} MB; is it one record a line?")
            try:
                text = column(json.loads(line.decode("utf-8")), source.text)
            except UnicodeDecodeError as error:
                text = Bad(f"not UTF-8 at byte {error.start} of the line")
            except json.JSONDecodeError as error:
                text = Bad(f"broken JSON: {error.msg} at column {error.colno}")
            yield number, Bad(text.reason, number) if isinstance(text, Bad) else text, raw.tell()
        if not number:
            raise DataError("the file is empty")


def read_json(path, skip):
    """The rows of one JSON list, counted from 1."""
    try:
        with unpacked(path) as (file, _):
            rows = json.loads(file.read())
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise DataError(f"broken JSON: {error.msg} at line {error.lineno}; one object a line is .jsonl") from None
    if not isinstance(rows, list) or not rows:
        raise DataError("not a list of rows; one object a line is .jsonl")
    for number, row in enumerate(rows[skip:], skip + 1):
        row = column(row, "")
        yield number, Bad(row.reason, number) if isinstance(row, Bad) else row, 0


def read_parquet(source, path, skip):
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        rows = ParquetFile(path).metadata.num_rows  # only for the progress bar
    except ArrowException as error:
        raise DataError(f"not a Parquet file: {error}") from None
    if not rows:
        raise DataError("the file has no rows")
    size = os.path.getsize(path)
    for number, text, _ in stream(source, skip, "parquet", data_files=str(path), split="train"):
        yield number, text, size * number / rows


def read_hub(source, skip, seed):
    options = {"name": source.config or None, "split": source.split, "revision": source.revision or None}
    return stream(source, skip, source.hub, **options)


def stream(source, skip, *arguments, **options):
    """Rows that `datasets` reads. Its and the network's many exceptions become one `DataError`."""
    number = skip
    try:
        import datasets  # here, because the import takes seconds and most sources do not need it
        from huggingface_hub.utils import logging as hub_logging

        hub_logging.set_verbosity_error()  # its retries would bury the one line that we print
        datasets.logging.set_verbosity_error()
        rows = datasets.load_dataset(*arguments, streaming=True, **options)
        for number, row in enumerate(rows.skip(skip) if skip else rows, skip + 1):
            text = column(row, source.text)
            yield number, Bad(text.reason, number) if isinstance(text, Bad) else text, 0
    except ImportError as error:
        raise DataError(f"{error}; pip install -r requirements.txt") from None
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        if source.hub and number:
            where = f"{source.hub}: broke off after row {number}"
            raise BrokenOff(f"{where}: {reason}; the same command continues where this run was") from error
        raise DataError(f"datasets cannot read it: {reason}; check name and network") from error


def read_text(source, path, skip):
    size = os.path.getsize(path)
    if size > MAX_DOCUMENT:
        raise DataError(f"larger than {MAX_DOCUMENT // 10**6} MB as one document; split the file or use .jsonl")
    raw = Path(path).read_bytes()
    if not raw and source.files:  # in a package an empty __init__.py is no accident
        raise DataError("the file is empty")
    try:
        text = raw.decode("utf-8-sig")
        documents = EXTRACTORS[source.extract](text)
    except UnicodeDecodeError as error:
        documents = [Bad("not UTF-8", raw[: error.start].count(b"\n") + 1)]
    except SyntaxError as error:
        documents = [Bad(f"not Python: {error.msg}", error.lineno)]
    except ValueError as error:
        documents = [Bad(str(error))]
    if source.cut:
        starts = re.compile(f"(?m)^(?={source.cut})")
        documents = [piece for text in documents for piece in (starts.split(text) if isinstance(text, str) else [text])]
    for index, text in enumerate(documents[skip:], skip + 1):
        yield index, text, size


def read_mapping(source, skip, seed):
    module, _, attribute = source.mapping.partition(":")
    try:
        texts = getattr(importlib.import_module(module), attribute)
        items = sorted(texts.items())
    except (ImportError, AttributeError, TypeError) as error:
        raise DataError(f"not a mapping that can be imported: {error}") from None
    for index, (key, text) in enumerate(items[skip:], skip + 1):
        yield index, text if isinstance(text, str) else Bad(f"the entry {key!r} is not text", index), 0


def read_generated(source, skip, seed):
    for index in range(skip + 1, source.documents + 1):  # seeded one by one, so that any of them can come first
        yield index, GENERATORS[source.generated](random.Random(f"{source.generated}/{seed}/{index}")), 0


def extract_docstrings(code):
    """One document: the docstrings of a Python file, each under the signature that it explains."""
    with warnings.catch_warnings(action="ignore"):  # invalid escapes in other people's code
        module = ast.parse(code)
    parts = [ast.get_docstring(module) or ""]
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and ast.get_docstring(node):
            names = getattr(node, "args", None) or node.bases
            names = ast.unparse(names) if isinstance(names, ast.arguments) else ", ".join(map(ast.unparse, names))
            parts.append(f"{node.name}({names})\n\n{ast.get_docstring(node)}")
    return ["\n\n\n".join(part for part in parts if part)]


def read_talks(text):
    """The dialogues of a chatterbot-corpus YAML file, each a list of lines; most are a question and its answer."""
    import yaml

    try:
        talks = yaml.load(text, yaml.BaseLoader)["conversations"]  # the base loader keeps "yes" a text
        return [[str(line) for line in talk] for talk in talks]
    except (yaml.YAMLError, TypeError, KeyError) as error:
        raise ValueError(f"no conversations in it: {' '.join(str(error).split())}") from None


def extract_conversations(text, least=400):
    """Documents of several dialogues each."""
    documents = [""]
    for talk in read_talks(text):
        if len(documents[-1]) >= least:
            documents.append("")
        lines = "\n".join(f"{'AB'[i % 2]}: {line}" for i, line in enumerate(talk))
        documents[-1] += ("\n\n" if documents[-1] else "") + lines
    return documents


def extract_chats(text):
    """Rows with the messages of a dialogue."""
    roles = ("user", "assistant")
    return [
        {"messages": [{"role": roles[i % 2], "content": line} for i, line in enumerate(talk)]}
        for talk in read_talks(text)
    ]


EXTRACTORS = {
    "text": lambda text: [text],
    "docstrings": extract_docstrings,
    "conversations": extract_conversations,
    "chats": extract_chats,
}


# ---------------------------------------------------------------------------------------------------------------------
# generated text: problems with worked solutions

NAMES = "Ada Ben Chloe David Elena Farid Grace Hugo Ines Jamal Keiko Liam Maya Noah Olga Priya Quinn Rosa Sam".split()
THINGS = "apples pencils stamps marbles books tickets candles buttons postcards eggs shells tiles lamps".split()


def arithmetic(r):
    a, b, x = r.randint(100, 9999), r.randint(12, 99), r.randint(-20, 40)
    tens, ones = b // 10 * 10, b % 10
    return r.choice([column_sum(a, r.randint(100, 99999)), long_division(a, b), common_divisor(a, b * 7)] + [
        (f"What is {a} times {b}?",
         f"{a} * {b} = {a} * {tens} + {a} * {ones}\n= {a * tens} + {a * ones}\n= {a * b}"),
        (f"Solve {b}x + {a} = {b * x + a}.",
         f"Subtract {a} from both sides: {b}x = {b * x}.\nDivide by {b}: x = {x}."),
        (f"What is {b} percent of {a}?",
         f"{b} percent is {b} / 100.\n{a} * {b} = {a * b}, and {a * b} / 100 = {a * b / 100:.2f}."),
    ])  # fmt: skip


def column_sum(a, b):
    lines, carry = [], 0
    for place in range(len(str(max(a, b)))):
        x, y = a // 10**place % 10, b // 10**place % 10
        total = x + y + carry
        lines.append(f"{x} + {y} + {carry} = {total}: write {total % 10}, carry {total // 10}.")
        carry = total // 10
    return f"Add {a} and {b}.", "\n".join([*lines, f"The sum is {a + b}."])


def long_division(a, b):
    lines, rest = [], 0
    for digit in str(a):
        value = rest * 10 + int(digit)
        rest = value % b
        lines.append(f"{b} goes into {value} {value // b} times, and leaves {rest}.")
    return f"Divide {a} by {b}.", "\n".join([*lines, f"{a} = {b} * {a // b} + {rest}."])


def common_divisor(a, b):
    lines, x, y = [], a, b
    while y:
        lines.append(f"{x} = {y} * {x // y} + {x % y}")
        x, y = y, x % y
    return f"Find the greatest common divisor of {a} and {b}.", "\n".join([*lines, f"It is {x}."])


def word_problem(r):
    (who, other), what = r.sample(NAMES, 2), r.choice(THINGS)
    a, b, c = r.randint(2, 20), r.randint(3, 30), r.randint(40, 400)
    return r.choice([
        (f"{who} buys {a} {what} at {b} dollars each and pays with {a * b + c} dollars. How much change is due?",
         f"The {what} cost {a} * {b} = {a * b} dollars.\nThe change is {a * b + c} - {a * b} = {c} dollars."),
        (f"{who} has {a * b + c} km to go and travels at {b} km an hour. How far is it still after {a} hours?",
         f"In {a} hours {who} covers {a} * {b} = {a * b} km.\nIt leaves {a * b + c} - {a * b} = {c} km."),
        (f"{who} shares {c} {what} equally among {b} friends and keeps the rest. How many does {who} keep?",
         f"{c} divided by {b} is {c // b}, so the friends get {b} * {c // b} = {c // b * b}.\n"
         f"{who} keeps {c} - {c // b * b} = {c % b}."),
        (f"{who} is {a} years older than {other}. Together they are {2 * b + a} years old. How old is each?",
         f"Let {other} be x. Then x + (x + {a}) = {2 * b + a}, so 2x = {2 * b} and x = {b}.\n"
         f"{other} is {b} and {who} is {a + b}."),
        (f"{who} has {a} dollars and saves {b} more every week. After how many weeks is it at least {c}?",
         f"{c} - {a} = {c - a} dollars are missing.\n{c - a} / {b} rounded up is {-(-(c - a) // b)} weeks."),
    ])  # fmt: skip


def worksheet(problem):
    return lambda r: "\n\n".join("Question: {}\nAnswer: {}".format(*problem(r)) for _ in range(5))


def question(r):
    return dict(zip(("prompt", "response"), word_problem(r)))


def preference(r):
    """The solution of a problem, and that of another one, fluent and wrong."""
    (prompt, chosen), (_, rejected) = word_problem(r), word_problem(r)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


GENERATORS = {
    "arithmetic": worksheet(arithmetic), "word_problems": worksheet(word_problem),
    "questions": question, "preferences": preference,
}  # fmt: skip
