"""Conversations and preference pairs -> the folders that `chat.py` reads. `prepare_data.py` calls it for a config with
`kind = "sft"` or `"preference"`.

    OUT/manifest.json          kind, counts, rows dropped by reason, SHA-256 of the files
    OUT/train/ids.bin          uint16, row after row; a preference pair is two rows, the chosen one first
    OUT/train/mask.bin         uint8, 1 where the prediction made at this token is trained on
    OUT/train/rows.bin         int64 (rows, 3): start, length, domain
    OUT/val/...

Held-out rows come first; a later row is dropped where it repeats one, or the prompt of a held-out one. The data are
small beside pretraining text: the folder is written under another name, and appears when it is complete.
"""

import hashlib
import itertools
import json
import os
import shutil
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from tqdm import tqdm

from chat import Chats, FormError, conversation, encode, encode_pair, preference, read_manifest
from config import differences
from data import MANIFEST_VERSION, RANKS_SHA256, DataError
from sources import Bad, Source, list_files, read_sources


@dataclass
class ChatDomain:
    sources: list[Source]
    val: list[Source] = field(default_factory=list)  # held-out sources of their own; then val_fraction is not used
    rows: int = 0  # at most as many training rows, the first ones; 0 takes all

    def __post_init__(self):
        if not self.sources:
            raise ValueError("sources is empty")
        for source in self.sources + self.val:
            if source.kind not in ("files", "hub") and not source.conversational:
                raise ValueError(f"{source.kind} '{source.name}' gives text; a package needs extract = 'chats'")


@dataclass
class ChatConfig:
    kind: Literal["sft", "preference"]
    out: str
    domains: dict[str, ChatDomain]
    seed: int = 1337
    val_fraction: float = 0.02  # of prompts, chosen by a hash: rows with the same prompt stay together
    max_tokens: int = 4096  # longer rows are dropped; either side of a pair counts
    on_error: Literal["stop", "skip"] = "stop"

    def __post_init__(self):
        if not self.domains:
            raise ValueError("there are no [domains]")
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"val_fraction must be in [0, 1), not {self.val_fraction}")
        if self.max_tokens < 4:
            raise ValueError(f"max_tokens must be at least 4, not {self.max_tokens}")


REASONS = {
    "empty": "a turn, or the whole conversation, without text",
    "equal": "chosen is rejected",
    "no_prompt": "chosen and rejected part before an answer",
    "masked": "nothing to train on",
    "too_long": "more than max_tokens",
    "duplicate": "an equal row came before",
    "held_out": "the prompt of a held-out row",
    "bad": "passed over with on_error = 'skip'",
}


class Encoded(NamedTuple):
    where: str  # file:line
    drop: str | Bad = ""  # one of `REASONS`, or what is wrong with the row
    rows: tuple = ()  # (ids, mask), once or for both sides of a pair
    digest: bytes = b""  # of the whole
    prompt: bytes = b""  # of what comes before the first trained answer


def encode_row(record, config):
    """The `Encoded` of one `Record`, whose text is the whole row."""
    where, row = f"{record.file}:{record.next[2]}", record.text
    if isinstance(row, Bad):
        return Encoded(f"{record.file}{f':{row.line}' if row.line else ''}", row)
    try:
        if config.kind == "sft":
            parts = (conversation(row),)
            encoded = (encode(parts[0]),)
        else:
            parts = preference(row)
            encoded = encode_pair(parts)
    except FormError as error:
        return Encoded(where, Bad(str(error)))
    except UnicodeEncodeError:
        return Encoded(where, Bad("half of a surrogate pair, which is not text"))
    if not all(parts[-2:]) or any(not m["content"] for part in parts for m in part if m["role"] != "system"):
        return Encoded(where, "empty")
    if config.kind == "preference":
        if parts.chosen == parts.rejected:
            return Encoded(where, "equal")
        if not parts.prompt or {parts.chosen[0]["role"], parts.rejected[0]["role"]} != {"assistant"}:
            return Encoded(where, "no_prompt")
    if not all(mask.any() for _, mask in encoded):
        return Encoded(where, "masked")
    ends = [int(np.flatnonzero(mask)[-1]) + 1 for _, mask in encoded]  # nothing is learnt after the last answer
    encoded = tuple((ids[:end], mask[:end]) for (ids, mask), end in zip(encoded, ends))
    if max(ends) > config.max_tokens:
        return Encoded(where, "too_long")
    ids, mask = encoded[0]
    key = str(config.seed).encode()
    digest = hashlib.blake2b(b"".join(x.tobytes() for row in encoded for x in row), digest_size=16, key=key).digest()
    prompt = hashlib.blake2b(ids[: np.argmax(mask)].tobytes(), digest_size=16, key=key).digest()
    return Encoded(where, "", encoded, digest, prompt)


def encode_all(records, config, workers):
    """The `Encoded` rows in order, worked out in threads (tiktoken releases the GIL)."""
    waiting, records = deque(), iter(records)
    with ThreadPoolExecutor(workers) as pool:
        try:
            while batch := list(itertools.islice(records, 128)):
                waiting.append(pool.submit(lambda batch: [encode_row(record, config) for record in batch], batch))
                if len(waiting) > 2 * workers:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


class Writer:
    """The three files of a split."""

    def __init__(self, folder):
        folder.mkdir(parents=True)
        self.folder, self.tokens, self.trained, self.index = folder, 0, 0, []
        self.files = {name: open(folder / name, "wb") for name in ("ids.bin", "mask.bin", "rows.bin")}
        self.hashes = {name: hashlib.sha256() for name in self.files}

    def add(self, ids, mask, domain):
        self.index.append((self.tokens, len(ids), domain))
        self.tokens, self.trained = self.tokens + len(ids), self.trained + int(mask.sum())
        self.write("ids.bin", ids.astype("<u2").tobytes())
        self.write("mask.bin", mask.astype(np.uint8).tobytes())

    def write(self, name, data):
        self.files[name].write(data)
        self.hashes[name].update(data)

    def finish(self):
        """Close the files; returns their entries in the manifest."""
        self.write("rows.bin", np.array(self.index, "<i8").tobytes())
        entries = {}
        for name, file in self.files.items():
            file.flush()
            os.fsync(file.fileno())
            entry = {"bytes": file.tell(), "sha256": self.hashes[name].hexdigest()}
            entries[f"{self.folder.name}/{name}"] = entry
            file.close()
        return entries


def prepare(config, workers=None):
    """Write the folder `config.out`, all or nothing; returns the manifest. Raises `DataError`, `OSError`."""
    folder = Path(config.out)
    manifest = {"version": MANIFEST_VERSION, "kind": config.kind, "tokenizer_sha256": RANKS_SHA256}
    manifest["config"] = asdict(config)
    if folder.exists() and any(folder.iterdir()):
        if not (folder / "manifest.json").exists():
            raise DataError(f"{folder}: exists, and is no prepared data; delete it or set another --out")
        old = read_manifest(folder)
        changed = list(differences({key: old.get(key) for key in manifest}, json.loads(json.dumps(manifest))))
        if changed:
            changes = "; ".join(changed[:3])
            raise DataError(f"{folder}: was prepared with another config ({changes}); delete it or set another --out")
        print(f"{folder}: already prepared")
        return old
    for domain in config.domains.values():  # a missing file stops the run now, not in an hour
        for source in domain.sources + domain.val:
            try:
                list_files(source)
            except DataError as error:
                raise DataError(f"{source.name}: {error}") from None
    partial = folder.with_name(folder.name + ".partial")  # small data: a run that was stopped starts again
    shutil.rmtree(partial, ignore_errors=True)
    try:
        splits = {split: Writer(partial / split) for split in ("train", "val")}
        manifest["domains"] = write_rows(config, splits, workers or os.cpu_count())
        manifest["files"] = {}
        for split, writer in splits.items():
            manifest["files"] |= writer.finish()
            units = len(writer.index) // (2 if config.kind == "preference" else 1)
            manifest[split] = {"rows": units, "tokens": writer.tokens, "trained": writer.trained}
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        os.replace(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    print_summary(manifest)
    return manifest


def write_rows(config, splits, workers):
    """Read all sources into the two `Writer`s; returns the manifest's domains. Held-out sources come first, so that a
    training row equal to a held-out one, or with its prompt, is the one that is dropped."""
    empty = {"rows": 0, "tokens": 0, "trained": 0}
    domains = {name: {"train": {**empty}, "val": {**empty}, "sources": []} for name in config.domains}
    seen, held_out = set(), set()
    for part, (number, (name, domain)) in itertools.product(("val", "train"), enumerate(config.domains.items())):
        fraction = 1 if part == "val" else 0 if domain.val else config.val_fraction
        for source in domain.val if part == "val" else domain.sources:
            entry = {"split": part, source.kind: source.name, "licence": source.licence, "read": 0}
            dropped = Counter()
            records = read_sources([replace(source, text="")], (0, 0, 0), config.seed)
            for done in tqdm(encode_all(records, config, workers), f"{part}/{name}", unit=" rows", disable=None):
                if part == "train" and domain.rows and domains[name]["train"]["rows"] >= domain.rows:
                    break
                entry["read"] += 1
                split = "val" if int.from_bytes(done.prompt[:8]) < fraction * 2**64 else "train"
                reason = done.drop
                if isinstance(reason, Bad):
                    if config.on_error == "stop":
                        remedy = "repair it, or pass over such rows with --on_error=skip"
                        raise DataError(f"{done.where}: {reason.reason}; {remedy}")
                    reason = "bad"
                elif not reason and done.digest in seen:
                    reason = "duplicate"
                elif not reason and split == "train" and done.prompt in held_out:
                    reason = "held_out"
                if reason:
                    dropped[reason] += 1
                    continue
                seen.add(done.digest)
                if split == "val":
                    held_out.add(done.prompt)
                count = domains[name][split]
                count["rows"] += 1
                for ids, mask in done.rows:
                    splits[split].add(ids, mask, number)
                    count["tokens"] += len(ids)
                    count["trained"] += int(mask.sum())
            entry["dropped"] = {reason: dropped[reason] for reason in REASONS if dropped[reason]}
            domains[name]["sources"].append(entry)
        if part == "train" and not domains[name]["train"]["rows"]:
            raise DataError(f"domain '{name}': no training row is left ({dropped_rows(domains[name])})")
    return domains


def dropped_rows(domain):
    """Why rows of a domain were dropped, as a text."""
    total = sum((Counter(source["dropped"]) for source in domain["sources"]), Counter())
    return ", ".join(f"{reason} {total[reason]:,}" for reason in REASONS if total[reason]) or "none dropped"


def print_summary(manifest):
    columns = "{:24} {:>10} {:>12} {:>12} {:>9}  {}"
    print(columns.format("domain", "rows", "tokens", "trained", "val rows", "dropped"))
    for name, domain in manifest["domains"].items():
        counts = [f"{domain['train'][key]:,}" for key in ("rows", "tokens", "trained")]
        print(columns.format(name, *counts, f"{domain['val']['rows']:,}", dropped_rows(domain)))
    counts = [f"{manifest['train'][key]:,}" for key in ("rows", "tokens", "trained")]
    print(columns.format("total", *counts, f"{manifest['val']['rows']:,}", ""))


def verify(folder):
    """Compare the files with the manifest. Raises `DataError`."""
    manifest = Chats.open(folder).manifest
    for name, entry in manifest["files"].items():
        with open(folder / name, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                raise DataError(f"{folder / name}: altered; delete the folder and prepare it again")
    print(f"{folder}: {len(manifest['files'])} files are as the manifest says")
