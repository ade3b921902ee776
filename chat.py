"""Conversations: the forms they come in, the one template, and readers of what `prepare_chat.py` writes.

The template. A row is what the model reads, and it opens with the one <|endoftext|> that it holds:

    reads     <|endoftext|> <|user|> Hi there <|assistant|> Hello !             <|user|> Bye <|assistant|> Ciao
    predicts  -             -        -  -     Hello         !     <|endoftext|> -        -   Ciao          <|endoftext|>
    mask      0             0        0  0     1             1     1             0        0   1             1

The model takes every <|endoftext|> that it reads for the start of a document, which sees nothing before it. So an
answer *ends* with a predicted <|endoftext|> that is never read: after it comes the next <|user|>, and the history stays
visible. Targets are therefore not the shifted row, but follow from it (`targets`): markers are never part of a text,
so a trained position that a marker or the end of the row follows is the end of an answer. In sampling likewise: do not
feed the <|endoftext|> that ends an answer, go on with <|user|>.

System text opens the user turn that follows it, with a blank line between. Turns are stripped of white space at both
ends, neighbours of one role are joined by a blank line, and a turn's text follows its marker without a space. Text is
encoded as text whatever it says: "<|user|>" typed by a user is five or so ordinary tokens. One thing is taken off data
that are read: a written-out "<|endoftext|>" behind an answer (Self-Instruct's copy of P3 has one everywhere), which
would teach the model to spell its end before it ends.
"""

import hashlib
import itertools
import json
import re
from copy import copy
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import ASSISTANT, EOT, MANIFEST_VERSION, RANKS_SHA256, USER, DataError, load_tokenizer

# ---------------------------------------------------------------------------------------------------------------------
# forms

ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
FORMS = {
    "sft": "messages; conversations; instruction (input, context) with output or response; "
    "prompt or question (system_prompt) with response, completion or answer",
    "preference": "prompt, chosen and rejected; chosen and rejected, both lists of messages or Anthropic transcripts",
}
ALPACA = re.compile(
    r"Below is an instruction that describes a task.*?### Instruction:\n(.*?)(?:\n\n### Input:\n(.*?))?"
    r"\n\n### Response:\s*",
    re.DOTALL,
)


class FormError(ValueError):
    """A row that is no conversation; the message says what is wrong with it."""


class Pair(NamedTuple):
    """A preference: the conversation so far, and two ways to go on. All are lists of messages."""

    prompt: list
    chosen: list
    rejected: list


def conversation(row):
    """The messages, [{"role": "system", "user" or "assistant", "content": text}, ...], of a row in any of `FORMS`.

    A message may also have a "weight": 0 excludes an answer from the loss. Raises `FormError`."""
    system, answer = pick(row, "system_prompt", "system"), pick(row, "output", "response", "completion", "answer")
    talk = pick(row, "messages", "conversations")
    if talk is None and answer is not None:
        talk = question(row, "instruction", "prompt", "question")
        talk = None if talk is None else talk + messages(answer, "assistant")
    if talk is None:
        hint = "; a preference pair: kind = 'preference' reads it" if {"chosen", "rejected"} <= row.keys() else ""
        raise FormError(f"no conversation in the keys {keys(row)}; known forms: {FORMS['sft']}{hint}")
    if not isinstance(talk, list):
        raise FormError(f"the conversation is {type(talk).__name__}, not a list of messages")
    talk = unmarked(messages(talk))
    if system and all(message["role"] != "system" for message in talk):
        talk = messages(system, "system") + talk
    return talk


def preference(row):
    """The `Pair` of a row in any of `FORMS`. Raises `FormError`."""
    chosen, rejected = pick(row, "chosen"), pick(row, "rejected")
    if chosen is None or rejected is None:
        lacks = " and ".join(f"'{key}'" for key in ("chosen", "rejected") if pick(row, key) is None)
        raise FormError(f"no {lacks} in the keys {keys(row)}; known forms: {FORMS['preference']}")
    prompt = question(row, "prompt", "question", "instruction", "messages", "conversations")
    whole = [isinstance(x, list) and bool(x) and messages(x)[0]["role"] != "assistant" for x in (chosen, rejected)]
    whole = all(whole) or all(isinstance(x, str) and is_transcript(x) for x in (chosen, rejected))
    if not whole and prompt is None:
        wanted = "without 'prompt', chosen and rejected must be lists of messages or start with '\\n\\nHuman:'"
        raise FormError(f"no prompt in the keys {keys(row)}; {wanted}; known forms: {FORMS['preference']}")
    chosen, rejected = messages(chosen, "assistant"), messages(rejected, "assistant")
    if whole:  # both tell the whole conversation: the prompt is what they share
        shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected)))
        if chosen == rejected:
            shared = max(0, shared - 1)
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    system = pick(row, "system_prompt", "system")
    if system and all(message["role"] != "system" for message in prompt):
        prompt = messages(system, "system") + prompt
    return Pair(*map(unmarked, (prompt, chosen, rejected)))


def unmarked(talk):
    """Messages whose answers do not end with a written-out <|endoftext|>."""
    for message in talk:
        if message["role"] == "assistant":
            message["content"] = message["content"].removesuffix("<|endoftext|>").rstrip()
    return talk


def pick(row, *names):
    """The first of the named values that is there; data sets fill up rows with None."""
    for name in names:
        if (value := row.get(name)) is not None:
            return value
    return None


def keys(row):
    return ", ".join(map(str, row)) or "(none)"


def question(row, *names):
    """The messages before the answer, or None."""
    name = next((name for name in names if row.get(name) is not None), None)
    if name is None:
        return None
    value = row[name]
    extra = pick(row, "input", "context") if name == "instruction" else None
    if isinstance(value, str) and (wrapped := ALPACA.fullmatch(value)):  # a template that is not ours
        value, extra = wrapped[1], wrapped[2]
    if extra is not None:
        value = "\n\n".join(message["content"] for message in messages(value) + messages(extra) if message["content"])
    talk = messages(value)
    if talk and talk[-1] == {"role": "assistant", "content": ""}:  # "\n\nAssistant:", waiting for the answer
        talk.pop()
    return talk


def is_transcript(text):
    return text.startswith(("\n\nHuman:", "\n\nAssistant:"))


def messages(value, role="user"):
    """Messages of a list of them, of one, of an Anthropic transcript, or of the plain text of a `role`.

    Texts are stripped and neighbours of one role are joined. Raises `FormError`."""
    if isinstance(value, str) and is_transcript(value):
        _, *parts = re.split(r"\n\n(Human|Assistant):", value)
        value = [
            {"role": who.lower().replace("human", "user"), "content": text} for who, text in zip(*[iter(parts)] * 2)
        ]
    elif isinstance(value, str):
        value = [{"role": role, "content": value}]
    elif isinstance(value, dict):
        value = [value]
    elif not isinstance(value, list):
        raise FormError(f"a {type(value).__name__} where a text or a list of messages should be: {str(value)[:40]!r}")
    talk = []
    for i, message in enumerate(value):
        if not isinstance(message, dict):
            raise FormError(f"message {i} is {type(message).__name__}, not an object with role and content")
        who, text = pick(message, "role", "from"), pick(message, "content", "value")
        if not isinstance(who, str) or who not in ROLES:
            raise FormError(f"message {i} has the role {who!r}; known roles: {', '.join(ROLES)}")
        if not isinstance(text, str):
            raise FormError(f"message {i} has no text: its content is {type(text).__name__}")
        message = {"role": ROLES[who], "content": text.strip()}
        if pick(value[i], "weight") == 0:
            message["weight"] = 0
        if talk and talk[-1]["role"] == message["role"] and talk[-1].get("weight") == message.get("weight"):
            talk[-1]["content"] = "\n\n".join(filter(None, (talk[-1]["content"], message["content"])))
        else:
            talk.append(message)
    return talk


# ---------------------------------------------------------------------------------------------------------------------
# template


@lru_cache(4096)  # preference pairs repeat their prompts, and often their answers
def tokens_of(text):
    """The ids of a text, (n,) uint16. It never yields a special one: markers typed in a text stay text."""
    return load_tokenizer().encode_to_numpy(text, disallowed_special=()).astype(np.uint16)  # = encode_ordinary


def encode(conversation, answer=False):
    """A conversation in the template of this file's docstring: ids (n,) uint16 and mask (n,) bool, true where the
    prediction made at that token is trained on. answer: end with the <|assistant|> that the model goes on from."""
    turns, system = [], []  # (marker, text, trained on)
    for message in conversation:
        role, text = message["role"], message["content"]
        if role == "system":
            system += [text] if text else []
            continue
        if role == "assistant" and system:  # no user turn to open: it is one
            turns.append((USER, "\n\n".join(system), False))
        elif role == "user":
            text = "\n\n".join([*system, text])
        system = []
        turns.append((USER, text, False) if role == "user" else (ASSISTANT, text, message.get("weight") != 0))
    if answer:
        turns.append((ASSISTANT, "", True))
    parts = [tokens_of(text) for _, text, _ in turns]
    ids = np.empty(1 + sum(1 + len(part) for part in parts), np.uint16)
    mask = np.zeros(len(ids), bool)
    ids[0], start = EOT, 1
    for (marker, _, trained), part in zip(turns, parts):
        end = start + 1 + len(part)
        ids[start], ids[start + 1 : end], mask[start:end] = marker, part, trained
        start = end
    return ids, mask


def encode_pair(pair):
    """(ids, mask) of the chosen and of the rejected conversation; the mask is on what follows the prompt."""
    prompt = [{**message, "weight": 0} for message in pair.prompt]
    return encode(prompt + pair.chosen), encode(prompt + pair.rejected)


def targets(ids, mask):
    """What is to be predicted at every token of ids (..., n), of the same type: the next one, and <|endoftext|> at the
    end of an answer."""
    following = np.concatenate([ids[..., 1:], np.full_like(ids[..., :1], EOT)], -1)
    return np.where(mask & (following >= EOT), EOT, following).astype(ids.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# reading


def read_manifest(folder):
    try:
        return json.loads((folder / "manifest.json").read_bytes())
    except OSError:
        raise DataError(f"{folder}: not prepared yet (no manifest.json); run prepare_data.py") from None
    except ValueError as error:
        raise DataError(f"{folder}/manifest.json: damaged ({error}); delete the folder and prepare it again") from None


@dataclass
class Chats:
    """A prepared folder of conversations or pairs: its manifest, and the SHA-256 of it, which stands for all bytes."""

    path: Path
    manifest: dict
    sha256: str

    @staticmethod
    def open(path, kind=None):
        """Check that the folder holds data of `kind` ("sft", "preference") and all its files. Raises `DataError`."""
        path = Path(path)
        manifest = read_manifest(path)
        try:
            found = manifest.get("kind", "pretraining text")
            if kind and found != kind or found not in FORMS:
                raise DataError(f"{path}: holds {found}, not {kind or 'conversations'}; name the right folder")
            if manifest["version"] != MANIFEST_VERSION or manifest["tokenizer_sha256"] != RANKS_SHA256:
                raise DataError(f"{path}: of another version or tokenizer; delete the folder and prepare it again")
            sizes = {path / name: entry["bytes"] for name, entry in manifest["files"].items()}
        except (KeyError, TypeError, AttributeError):
            raise DataError(f"{path}/manifest.json: damaged; delete the folder and prepare it again") from None
        for file, size in sizes.items():
            if not file.exists() or file.stat().st_size != size:
                raise DataError(f"{file}: missing or not of its size; delete the folder and prepare it again")
        return Chats(path, manifest, hashlib.sha256((path / "manifest.json").read_bytes()).hexdigest())

    @property
    def domains(self):
        return list(self.manifest["domains"])

    def split(self, split):
        """The `Rows` of "train" or "val". Raises `DataError` where there is none."""
        if not self.manifest[split]["rows"]:
            raise DataError(f"{self.path}: no {split} rows in it")
        index = np.fromfile(self.path / split / "rows.bin", "<i8").reshape(-1, 3)
        ids, mask = (np.memmap(self.path / split / name, kind, "r") for name, kind in FILES.items())
        return Rows(ids, mask, index)


FILES = {"ids.bin": "<u2", "mask.bin": np.uint8}


class Rows(NamedTuple):
    """A split. ids, mask: of all rows. index: (rows, 3) start, length, domain; of pairs 2i is chosen, 2i + 1 not."""

    ids: np.ndarray
    mask: np.ndarray
    index: np.ndarray

    def row(self, i, start=0, end=None):
        """ids (n,) uint16 and mask (n,) bool of tokens start..end of a row."""
        first, length, _ = self.index[i]
        piece = slice(first + start, first + (length if end is None else min(end, length)))
        return self.ids[piece], self.mask[piece].astype(bool)


class ChatRows:
    """`rows` streams of conversations, one after another, cut into segments of T tokens: what SFT reads.

    Row b of a batch continues row b of the batch before, so a long conversation flows on through Transformer-XL memory.
    A stream that finishes a conversation takes the next of one queue, in which every conversation comes once an epoch,
    shuffled by `seed`. After `epochs` of them (0: never) streams fill up with lone <|endoftext|> of weight 0, then the
    iteration ends. Everything follows from `seed` and `state()`.
    """

    def __init__(self, chats, split, rows, segment, seed, epochs=0):
        """Raises `DataError` where the split is empty or holds pairs."""
        if chats.manifest["kind"] != "sft":
            raise DataError(f"{chats.path}: holds pairs, not conversations; name a folder of kind 'sft'")
        self.data = chats.split(split)
        self.rows, self.segment, self.seed, self.epochs = rows, segment, seed, epochs
        self.queue = Queue(len(self.data.index), seed, epochs)
        self.place = [[-1, 0] for _ in range(rows)]  # conversation (-1: none yet) and position of each stream

    @property
    def epoch(self):
        """The epoch of the conversation to come next."""
        return self.queue.epoch

    def __iter__(self):
        return self

    def __next__(self):
        """tokens and targets (rows, T) int64, and weights (rows, T) float32, 1 where the target is trained on."""
        shape = (self.rows, self.segment)
        tokens, after, weights = np.full(shape, EOT), np.full(shape, EOT), np.zeros(shape, np.float32)
        filled = [self._fill(*part) for part in zip(self.place, tokens, after, weights)]
        if not any(filled):
            raise StopIteration
        return tokens, after, weights

    def _fill(self, place, tokens, after, weights):
        """Fill one stream's segment; returns the number of tokens that are of conversations."""
        filled = 0
        for row, start, end in self._pieces(place):
            ids, mask = self.data.row(row, start, end + 1)  # with one token more, for the last target
            n = end - start
            tokens[filled : filled + n] = ids[:n]
            after[filled : filled + n] = targets(ids, mask)[:n]
            weights[filled : filled + n] = mask[:n]
            filled += n
        return filled

    def _pieces(self, place):
        """(conversation, start, end) of what fills a stream's next segment; moves `place` on."""
        room = self.segment
        while room:
            if place[0] < 0:
                place[:] = self.queue.take(), 0
                if place[0] < 0:  # after the last epoch
                    return
            row, start = place
            length = int(self.data.index[row, 1])
            end = min(start + room, length)
            room -= end - start
            place[:] = (row, end) if end < length else (-1, 0)
            yield row, start, end

    def __len__(self):
        """Batches in all the epochs, from the first on."""
        dry = copy(self)
        dry.queue, dry.place = Queue(self.queue.n, self.seed, self.epochs), [[-1, 0] for _ in range(self.rows)]
        return sum(1 for _ in iter(lambda: any([list(dry._pieces(place)) for place in dry.place]), False))

    def state(self):
        """Where the streams stand after the last batch, as plain lists."""
        return {"epoch": self.queue.epoch, "nth": self.queue.nth, "place": [list(place) for place in self.place]}

    def load_state(self, state):
        self.queue.epoch, self.queue.nth = state["epoch"], state["nth"]
        self.place = [list(place) for place in state["place"]]


class Queue:
    """The numbers 0..n-1 in an order shuffled anew every epoch; -1 after the last epoch (0: there is none)."""

    def __init__(self, n, seed, epochs):
        self.n, self.seed, self.epochs, self.epoch, self.nth, self.order = n, seed, epochs, 0, 0, (None, None)

    def take(self):
        if self.epochs and self.epoch >= self.epochs:
            return -1
        if self.order[0] != self.epoch:
            self.order = self.epoch, np.random.default_rng([self.seed, self.epoch]).permutation(self.n)
        number = int(self.order[1][self.nth])
        self.nth += 1
        if self.nth == self.n:
            self.epoch, self.nth = self.epoch + 1, 0
        return number


class PairBatch(NamedTuple):
    """Preference pairs packed into rows. tokens, targets: (rows, T) int64; what no pair fills is <|endoftext|>.
    sequence: (rows, T) int64, 2i where the target is of the i-th pair's chosen answer, 2i + 1 of its rejected one, -1
    elsewhere. pairs: (n,) int64, which pair of the split the i-th is."""

    tokens: np.ndarray
    targets: np.ndarray
    sequence: np.ndarray
    pairs: np.ndarray


class PreferencePairs:
    """Batches of `parts` `PairBatch`es of `rows` rows of T tokens: what DPO reads.

    Both sides of a pair lie in one `PairBatch`, each whole and within one row. Every pair comes once an epoch, shuffled
    by `seed`; the last batch of an epoch is filled up with empty parts. It ends after `epochs` (0: never)."""

    def __init__(self, chats, split, parts, rows, segment, seed, epochs=0):
        """Raises `DataError` where the folder holds conversations, the split is empty or a pair is too long."""
        if chats.manifest["kind"] != "preference":
            raise DataError(f"{chats.path}: holds conversations, not pairs; name a folder of kind 'preference'")
        self.data = chats.split(split)
        self.lengths = self.data.index[:, 1].reshape(-1, 2)
        if (longest := int(self.lengths.max())) > segment:
            raise DataError(f"{chats.path}: its longest row of {longest} tokens does not fit into {segment}")
        if rows == 1 and (most := int(self.lengths.sum(1).max())) > segment:
            raise DataError(f"{chats.path}: its longest pair of {most} tokens does not fit into one row of {segment}")
        self.parts, self.rows, self.segment, self.seed, self.epochs = parts, rows, segment, seed, epochs
        self.epoch, self.nth, self.plan = 0, 0, (None, None)

    def __len__(self):
        """Batches in all the epochs, from the first on."""
        return sum(len(self._plan(epoch)) for epoch in range(self.epochs))

    def __iter__(self):
        return self

    def __next__(self):
        """The next list of `PairBatch`es."""
        if self.epochs and self.epoch >= self.epochs:
            raise StopIteration
        if self.plan[0] != self.epoch:
            self.plan = self.epoch, self._plan(self.epoch)
        batch = [self._pack(places) for places in self.plan[1][self.nth]]
        self.nth += 1
        if self.nth == len(self.plan[1]):
            self.epoch, self.nth = self.epoch + 1, 0
        return batch

    def _plan(self, epoch):
        """Where the sides of every pair of an epoch go: a list of batches of parts of (pair, [(row, start), ...])."""
        parts, free = [], None
        for pair in np.random.default_rng([self.seed, epoch]).permutation(len(self.lengths)):
            if not free or (places := self._place(pair, free)) is None:
                free = [0] * self.rows  # tokens of every row that are taken
                parts.append([])
                places = self._place(pair, free)
            parts[-1].append((int(pair), places))
        parts += [[] for _ in range(-len(parts) % self.parts)]
        return [parts[i : i + self.parts] for i in range(0, len(parts), self.parts)]

    def _place(self, pair, taken):
        """The first row with room for each side, as [(row, start), (row, start)]; None, and nothing changed, if one
        has no room."""
        before, places = list(taken), []
        for length in self.lengths[pair].tolist():
            row = next((row for row, used in enumerate(taken) if used + length <= self.segment), None)
            if row is None:
                taken[:] = before
                return None
            places.append((row, taken[row]))
            taken[row] += length
        return places

    def _pack(self, places):
        """The `PairBatch` of one part of the plan."""
        tokens = np.full((self.rows, self.segment), EOT)
        after, sequence = tokens.copy(), np.full_like(tokens, -1)
        for i, (pair, sides) in enumerate(places):
            for side, (row, start) in enumerate(sides):
                ids, mask = self.data.row(2 * pair + side)
                span = slice(start, start + len(ids))
                tokens[row, span], after[row, span] = ids, targets(ids, mask)
                sequence[row, span][mask] = 2 * i + side
        return PairBatch(tokens, after, sequence, np.array([pair for pair, _ in places], np.int64))

    def state(self):
        return {"epoch": self.epoch, "nth": self.nth}

    def load_state(self, state):
        self.epoch, self.nth = state["epoch"], state["nth"]
