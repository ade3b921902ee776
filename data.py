"""Prepared text: the tokenizer, and readers of the shards that `prepare_data.py` writes.

A prepared folder holds one `manifest.json` and uint16 token shards, one set per split and domain:

    data/demo/manifest.json
    data/demo/train/code/00000.bin      <|endoftext|> document <|endoftext|> document ...
    data/demo/val/code/00000.bin

Every document *starts* with `<|endoftext|>`, which text can never produce: a token equal to it is a document
boundary, and no index file is needed. The token after the last one of a document is always `<|endoftext|>`.
"""

import base64
import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import tiktoken

RANKS = Path(__file__).parent / "tokenizer" / "gpt2.tiktoken"
RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""

EOT, USER, ASSISTANT = 50256, 50257, 50258  # the last two are used from instruction tuning on
SPECIAL_TOKENS = {"<|endoftext|>": EOT, "<|user|>": USER, "<|assistant|>": ASSISTANT}
VOCAB_SIZE = 50259  # ids in use; the model pads to 50304 rows, and rows from 50259 up are never a target
MANIFEST_VERSION = 1


class DataError(RuntimeError):
    """Prepared data that is missing, damaged or not what was asked for; the message names the file and the remedy."""


@cache
def load_tokenizer():
    """GPT-2's byte-pair encoding from the bundled ranks, verified by their SHA-256; nothing is downloaded.

    `encode_ordinary` never yields a special token, whatever the text contains. Raises `DataError`.
    """
    try:
        ranks = RANKS.read_bytes()
    except OSError as error:
        raise DataError(f"{RANKS}: {error.strerror}; restore it from the repository") from None
    if hashlib.sha256(ranks).hexdigest() != RANKS_SHA256:
        raise DataError(f"{RANKS}: altered (its SHA-256 is not {RANKS_SHA256[:16]}...); restore it from the repository")
    mergeable = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in ranks.splitlines())}
    return tiktoken.Encoding("gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=mergeable, special_tokens=SPECIAL_TOKENS)


@cache
def token_bytes():
    """UTF-8 bytes of every token id, (VOCAB_SIZE,) uint16; special tokens count 0. The measure of bits per byte."""
    tokenizer = load_tokenizer()
    lengths = [len(tokenizer.decode_single_token_bytes(i)) for i in range(EOT)]
    return np.array(lengths + [0] * (VOCAB_SIZE - EOT), dtype=np.uint16)


# -------------------------------------------------------------------------------------------------- prepared folders


@dataclass
class Prepared:
    """A prepared folder: its path, its manifest, and the SHA-256 of the manifest, which stands for all its bytes."""

    path: Path
    manifest: dict
    sha256: str

    @staticmethod
    def open(path):
        """Read the manifest and check that every shard is there at its size. Raises `DataError`."""
        path = Path(path)
        file = path / "manifest.json"
        try:
            raw = file.read_bytes()
        except OSError:
            state = "not finished preparing" if path.is_dir() else "not prepared yet"
            raise DataError(f"{path}: {state} (no manifest.json); run prepare_data.py with its data config") from None
        try:
            manifest = json.loads(raw)
            if kind := manifest.get("kind"):
                raise DataError(f"{path}: holds {kind} data, not pretraining text; name the right folder")
            if (version := manifest["version"]) != MANIFEST_VERSION:
                raise DataError(f"{file}: version {version}, expected {MANIFEST_VERSION}; prepare it again")
            if manifest["tokenizer_sha256"] != RANKS_SHA256:
                raise DataError(f"{file}: made with another tokenizer; prepare it again")
            parts = [domain[split] for domain in manifest["domains"].values() for split in ("train", "val")]
            sizes = {path / shard["file"]: 2 * shard["tokens"] for part in parts for shard in part["shards"]}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise DataError(f"{file}: damaged; prepare the data again") from None
        for shard, expected in sizes.items():
            size = shard.stat().st_size if shard.exists() else None
            if size != expected:
                found = "missing" if size is None else f"{size} bytes instead of {expected}"
                raise DataError(f"{shard}: {found}; prepare the data again")
        return Prepared(path, manifest, hashlib.sha256(raw).hexdigest())

    @property
    def domains(self):
        return list(self.manifest["domains"])

    def shards(self, split, domain):
        """Memory maps of the shards of one domain, uint16."""
        entries = self.manifest["domains"][domain][split]["shards"]
        return [np.memmap(self.path / shard["file"], dtype="<u2", mode="r") for shard in entries]

    def tokens(self, split, domain, limit):
        """The first `limit` tokens of one domain, (n,) int64: documents in a row, the last one perhaps cut."""
        parts = []
        for shard in self.shards(split, domain):
            parts.append(shard[: limit - sum(map(len, parts))].astype(np.int64))
            if sum(map(len, parts)) >= limit:
                break
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)


# -------------------------------------------------------------------------------------------------- pretraining


class TokenStreams:
    """`rows` endless streams of whole documents over a mixture of domains, cut into segments of T tokens.

    Row b of one batch continues row b of the batch before, so that Transformer-XL memory sees true continuations. A
    stream that finishes a document takes the next one of the domain that is furthest behind its share of tokens; the
    documents of a domain come in an order shuffled anew every epoch. Everything follows from `seed` and `state()`, a
    few integers per row, so a resumed run reads on where it stopped.
    """

    def __init__(self, prepared, rows, segment, seed, weights=None):
        """weights: {domain: weight} to replace those of the manifest. Raises `DataError` for wrong ones, and for a
        domain without text."""
        self.rows, self.segment, self.seed = rows, segment, seed
        self.names = prepared.domains
        shares = weights or {name: prepared.manifest["domains"][name]["weight"] for name in self.names}
        if unknown := set(shares) - set(self.names):
            raise DataError(f"{prepared.path}: no domain '{min(unknown)}'; it has {', '.join(self.names)}")
        self.shares = np.array([shares.get(name, 0.0) for name in self.names], dtype=np.float64)
        if not (self.shares.min() >= 0 and 0 < self.shares.sum() < np.inf):
            raise DataError(f"{prepared.path}: the weights {shares} must be at least 0, and one above")
        self.shares /= self.shares.sum()
        self.shards = [prepared.shards("train", name) for name in self.names]
        for name, share, shards in zip(self.names, self.shares, self.shards):
            if share > 0 and not shards:
                raise DataError(f"{prepared.path}: the domain '{name}' has no training text")
        self.orders = [None] * len(self.names)  # ((epoch, nth shard), shard, shuffled document starts and ends)
        self.cursors = np.zeros((len(self.names), 3), np.int64)  # epoch, nth shard in it, nth document in that
        self.read = np.zeros(len(self.names), np.int64)  # tokens given out of each domain
        self.place = np.full((rows, 4), -1)  # domain, shard, position and end of the document that each row reads
        for row in range(rows):
            self._next_document(row)
        self.executor, self.pending = ThreadPoolExecutor(1), None

    def __next__(self):
        """Tokens and targets (rows, T) int64, the index of each token's domain (rows, T), and the `state()` after them.

        The next batch is read in the background meanwhile."""
        batch = self.pending.result() if self.pending else self._read()
        self.pending = self.executor.submit(self._read)
        return batch

    def load_state(self, state):
        """Go on from the state that came with a batch."""
        if self.pending:
            self.pending.result()
        self.pending = None
        self.cursors, self.read, self.place = (np.array(state[key], np.int64) for key in ("cursors", "read", "place"))

    def state(self):
        """Where the streams stand, as plain lists."""
        return {"cursors": self.cursors.tolist(), "read": self.read.tolist(), "place": self.place.tolist()}

    def _read(self):
        T = self.segment
        tokens = np.empty((self.rows, T + 1), np.int64)
        domains = np.empty((self.rows, T), np.int64)
        for row in range(self.rows):
            filled = 0
            while filled < T:
                domain, shard, position, end = self.place[row]
                n = min(T - filled, end - position)
                tokens[row, filled : filled + n] = self.shards[domain][shard][position : position + n]
                domains[row, filled : filled + n] = domain
                self.place[row, 2] += n
                self.read[domain] += n
                filled += n
                if position + n == end:
                    self._next_document(row)
            domain, shard, position, _ = self.place[row]
            tokens[row, T] = self.shards[domain][shard][position]  # a document's first token is always EOT
        return tokens[:, :-1], tokens[:, 1:], domains, self.state()

    def _next_document(self, row):
        self.place[row, 0] = -1
        # Shares of the tokens read so far, looking a little ahead: documents differ in length by a factor of 1000, and
        # a domain whose long documents occupy its share of the rows should not be given another row.
        ahead = 8 * self.segment
        reading = np.bincount(self.place[:, 0][self.place[:, 0] >= 0], minlength=len(self.names))
        due = self.shares * (self.read.sum() + self.rows * ahead) - (self.read + reading * ahead)
        domain = int(np.argmax(np.where(self.shares > 0, due, -np.inf)))
        self.place[row] = (domain, *self._take(domain))

    def _take(self, domain):
        """The shard, start and end of the domain's next document."""
        epoch, nth, document = self.cursors[domain]
        shards = self.shards[domain]
        if self.orders[domain] is None or self.orders[domain][0] != (epoch, nth):
            shard = int(np.random.default_rng([self.seed, domain, epoch]).permutation(len(shards))[nth])
            starts = np.flatnonzero(shards[shard] == EOT)
            ends = np.append(starts[1:], len(shards[shard]))
            order = np.random.default_rng([self.seed, domain, epoch, shard]).permutation(len(starts))
            self.orders[domain] = ((epoch, nth), shard, starts[order], ends[order])
        _, shard, starts, ends = self.orders[domain]
        document += 1
        if document == len(starts):
            document, nth = 0, nth + 1
            if nth == len(shards):
                epoch, nth = epoch + 1, 0
        here = self.cursors[domain][2]
        self.cursors[domain] = (epoch, nth, document)
        return shard, int(starts[here]), int(ends[here])
