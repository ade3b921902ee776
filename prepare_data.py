"""Raw text -> token shards and a manifest: what `data.py` reads.

    python prepare_data.py configs/data/demo.toml
    python prepare_data.py configs/data/shared13.toml --out=data/small --tokens=5e6
    python prepare_data.py configs/data/demo.toml --verify
    python prepare_data.py configs/data/sft_shared.toml            (kind = "sft" or "preference": see prepare_chat.py)

A domain (a topic such as "code") is a weight and a list of sources, read in order. Documents pass through three
steps: read and decoded here, hashed and tokenised in threads (tiktoken releases the GIL), then, in reading order
again, freed of exact duplicates and appended to the open shard of their split.

    OUT/manifest.json                written last: it exists only when everything else is complete
    OUT/train/code/00000.bin         uint16: <|endoftext|> document <|endoftext|> document ...
    OUT/val/code/00000.bin
    OUT/.progress.sqlite             while running: hashes seen, the manifest so far, where to continue

Each full shard is one SQLite transaction: its hashes, its manifest entry and the reading position become
permanent together, so a run that is killed at any moment continues with the same command and gives the same bytes.
"""

import argparse
import errno
import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import platform
import re
import shutil
import sqlite3
import sys
import tempfile
import time
import tomllib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from tqdm import tqdm

import prepare_chat
from config import ConfigError, differences, load
from data import EOT, MANIFEST_VERSION, RANKS_SHA256, DataError, load_tokenizer
from sources import Bad, Record, Source, list_files, read_sources

BATCH = 2**18  # characters a thread encodes at a time: large enough to hide the hand-over, small enough to balance
WINDOW = 2**20 * os.cpu_count()  # characters read ahead of the shard being written: four batches a thread
MAX_SKIPPED = 1000  # skipped records listed one by one in the manifest; further ones are only counted


# ---------------------------------------------------------------------------------------------------------------------
# configuration


@dataclass
class Domain:
    sources: list[Source]
    weight: float = 1.0  # share of the token budget, and of training
    val: list[Source] = field(default_factory=list)  # held-out sources of their own; then val_fraction is not used
    val_fraction: float | None = None  # in place of the common one

    def __post_init__(self):
        if not self.sources:
            raise ValueError("sources is empty")
        if not 0 < self.weight < math.inf:
            raise ValueError(f"weight must be above 0, not {self.weight}")
        if self.val_fraction is not None and not 0 <= self.val_fraction < 1:
            raise ValueError(f"val_fraction must be in [0, 1), not {self.val_fraction}")
        for source in self.sources + self.val:
            if source.conversational:
                raise ValueError(f"{source.kind} '{source.name}' gives conversations, not text; set kind = 'sft'")


@dataclass
class DataConfig:
    out: str
    domains: dict[str, Domain]
    seed: int = 1337
    tokens: int = 0  # training tokens over all domains, split by weight; 0 takes everything
    val_fraction: float = 0.01  # of documents, chosen by a hash of the text
    shard_tokens: int = 16_777_216  # a shard is closed once it holds as many
    min_characters: int = 32  # shorter documents are dropped and counted
    on_error: Literal["stop", "skip"] = "stop"

    def __post_init__(self):
        if not self.domains:
            raise ValueError("there are no [domains]")
        for name in self.domains:
            if not re.fullmatch(r"[\w-]+", name):
                raise ValueError(f"the domain name {name!r} must do as a folder name: letters, digits, '-' and '_'")
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"val_fraction must be in [0, 1), not {self.val_fraction}")
        for key, least in (("tokens", 0), ("shard_tokens", 1), ("min_characters", 1)):
            if getattr(self, key) < least:
                raise ValueError(f"{key} must be at least {least}, not {getattr(self, key)}")


# ---------------------------------------------------------------------------------------------------------------------
# encoding, in threads


class Encoded(NamedTuple):
    record: Record  # without its text, unless that is Bad
    digest: bytes = b""
    bytes: int = 0
    ids: np.ndarray | None = None  # None: too short, or Bad


def encode(batch, seed, min_characters):
    """Hash and tokenise a batch of `Record`s; runs in a thread."""
    encoding, key, done = load_tokenizer(), str(seed).encode(), []
    for record in batch:
        if isinstance(record.text, Bad) or len(record.text.strip()) < min_characters:
            done.append(Encoded(record))
            continue
        try:
            raw = record.text.encode("utf-8")
        except UnicodeEncodeError:
            bad = Bad("half of a surrogate pair, which is not text", record.next[2])
            done.append(Encoded(record._replace(text=bad)))
            continue
        tokens = encoding.encode_to_numpy(record.text, disallowed_special=())  # = encode_ordinary, without a list
        ids = np.empty(len(tokens) + 1, dtype="<u2")
        ids[0], ids[1:] = EOT, tokens
        digest = hashlib.blake2b(raw, digest_size=16, key=key).digest()
        done.append(Encoded(record._replace(text=""), digest, len(raw), ids))
    return done


def encode_all(records, pool, config):
    """Encode `records` in the threads of `pool`, in order, with about WINDOW characters under way."""
    waiting, under_way, batch, size = deque(), 0, [], 0
    try:
        for record in itertools.chain(records, [None]):
            if record is not None:
                batch.append(record)
                size += len(record.text)
            if record is None or size >= BATCH or len(batch) == 1000:
                waiting.append((pool.submit(encode, batch, config.seed, config.min_characters), size))
                under_way += size
                batch, size = [], 0
            while waiting and (record is None or under_way > WINDOW or waiting[0][0].done()):
                future, length = waiting.popleft()
                under_way -= length
                yield from future.result()
    finally:
        for future, _ in waiting:  # read, but beyond the token budget
            future.cancel()


# ---------------------------------------------------------------------------------------------------------------------
# writing


def write_file(path, data):
    """Write `data` so that `path` is either complete and on the disk, or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)  # the new name is on the disk only once its folder is
    os.fsync(folder)
    os.close(folder)


class Output:
    """The folder being written: the open shard of each split, the manifest so far, and the progress database."""

    def __init__(self, config, inputs):
        """Start, or continue after the last commit. Raises `DataError` where the folder is from something else."""
        self.config, self.folder = config, Path(config.out)
        self.database = self.folder / ".progress.sqlite"
        if not self.database.exists() and any((self.folder / split).exists() for split in ("train", "val")):
            raise DataError(f"{self.folder}: has shards but neither manifest nor progress; delete it or change 'out'")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.db = sqlite3.connect(self.database, timeout=1)
        try:
            self.load(inputs)
        except BaseException:
            self.db.close()
            raise

    def load(self, inputs):
        self.db.execute("PRAGMA locking_mode = EXCLUSIVE")
        self.db.execute("PRAGMA journal_mode = WAL")
        self.db.execute("PRAGMA synchronous = NORMAL")
        self.db.execute("PRAGMA cache_size = -65536")  # KiB: what the set of hashes may take of memory
        self.db.execute("CREATE TABLE IF NOT EXISTS seen (digest BLOB PRIMARY KEY) WITHOUT ROWID")
        self.db.execute("CREATE TABLE IF NOT EXISTS state (name TEXT PRIMARY KEY, value)")
        saved = dict(self.db.execute("SELECT name, value FROM state"))
        if saved:
            self.state = json.loads(saved["state"])
            refuse_changes(self.folder, self.state["manifest"], self.config)
            changed = list(differences(self.state["inputs"], inputs))
            if changed:
                changes = f"{changed[0]}{f' and {len(changed) - 1} more' if len(changed) > 1 else ''}"
                raise DataError(f"{self.folder}: input changed since the run began ({changes}); delete the folder")
            self.state["manifest"]["config"] = asdict(self.config)
        else:
            for split in ("train", "val"):  # shards of a run that ended before its first commit
                shutil.rmtree(self.folder / split, ignore_errors=True)
            counts = {split: {"tokens": 0, "documents": 0, "bytes": 0} for split in ("train", "val")}
            self.state = {"phase": 0, "next": (0, 0, 0), "read": 0, "open": counts, "inputs": inputs}
            self.state["manifest"] = new_manifest(self.config)
        self.manifest = self.state["manifest"]
        begun = {split: saved.get(split, b"") for split in ("train", "val")}
        self.open = {split: [np.frombuffer(ids, "<u2")] if ids else [] for split, ids in begun.items()}

    def is_new(self, digest):
        """Whether this text was not seen before, in any domain or split; from now on it was."""
        return self.db.execute("INSERT OR IGNORE INTO seen VALUES (?)", (digest,)).rowcount == 1

    def add(self, split, domain, document):
        """Append a document to the open shard; True where that filled the shard, and closed it."""
        self.open[split].append(document.ids)
        count = self.state["open"][split]
        count["tokens"] += len(document.ids)
        count["documents"] += 1
        count["bytes"] += document.bytes
        return count["tokens"] >= self.config.shard_tokens and self.close_shard(split, domain)

    def close_shard(self, split, domain):
        count, entry = self.state["open"][split], self.manifest["domains"][domain][split]
        if not count["documents"]:
            return False
        name = f"{split}/{domain}/{len(entry['shards']):05d}.bin"
        data = np.concatenate(self.open[split])
        write_file(self.folder / name, data)
        entry["shards"].append({"file": name, **count, "sha256": hashlib.sha256(data).hexdigest()})
        for key in count:
            entry[key] += count[key]
            count[key] = 0
        self.open[split] = []
        return True

    def tokens(self, domain):
        """Training tokens of a domain so far."""
        return self.manifest["domains"][domain]["train"]["tokens"] + self.state["open"]["train"]["tokens"]

    def commit(self, phase, position):
        """Make permanent all that came before `position`: a later run starts from there."""
        self.state.update(phase=phase, next=position)
        rows = [(split, np.concatenate(ids).tobytes() if ids else b"") for split, ids in self.open.items()]
        self.db.executemany("REPLACE INTO state VALUES (?, ?)", [*rows, ("state", json.dumps(self.state))])
        self.db.commit()

    def finish(self):
        write_file(self.folder / "manifest.json", json.dumps(self.manifest, indent=1).encode())
        self.db.close()
        remove_progress(self.folder)


def remove_progress(folder):
    for name in (".progress.sqlite", ".progress.sqlite-wal", ".progress.sqlite-shm"):
        (folder / name).unlink(missing_ok=True)


def new_manifest(config):
    def entry(source, split):
        named = {"split": split, source.kind: source.name, "config": source.config, "revision": source.revision}
        if source.package == "stdlib" or source.mapping:
            named["version"] = platform.python_version()
        elif source.package:
            try:
                named["version"] = importlib.metadata.version(source.package.partition(".")[0])
            except importlib.metadata.PackageNotFoundError:
                pass  # a folder on the path, or a distribution by another name
        named = {key: value for key, value in named.items() if value}
        return {**named, "licence": source.licence, "documents": 0, "duplicates": 0, "short": 0, "skipped": 0}

    def domain(d):
        empty = {"tokens": 0, "documents": 0, "bytes": 0}
        sources = [entry(s, "train") for s in d.sources] + [entry(s, "val") for s in d.val]
        splits = {split: {**empty, "shards": []} for split in ("train", "val")}
        return {"weight": d.weight, **splits, "sources": sources}

    return {
        "version": MANIFEST_VERSION,
        "tokenizer": "gpt2",
        "tokenizer_sha256": RANKS_SHA256,
        "config": asdict(config),
        "domains": {name: domain(d) for name, d in config.domains.items()},
        "skipped_total": 0,
        "skipped": [],
    }


def refuse_changes(folder, manifest, config):
    """Raise `DataError` where `folder` was begun with another configuration."""
    wanted = new_manifest(config)
    keys = ("version", "tokenizer_sha256", "config")
    changed = list(differences({key: manifest.get(key) for key in keys}, {key: wanted[key] for key in keys}))
    if not (folder / "manifest.json").exists():  # what a run read until it stopped is the same either way
        changed = [change for change in changed if change != "config.on_error: 'stop' -> 'skip'"]
    if changed:
        changes = "; ".join(changed)
        raise DataError(f"{folder}: was prepared with another config ({changes}); delete it or set another --out")


# ---------------------------------------------------------------------------------------------------------------------
# the run


def prepare(config, workers=None):
    """Write `config.out`, or continue it; returns the manifest. Raises `DataError`, `OSError`, `sqlite3.Error`."""
    folder = Path(config.out)
    if complete := read_manifest(folder):
        refuse_changes(folder, complete, config)
        remove_progress(folder)
        print(f"{folder}: already prepared")
        return complete
    inputs = input_sizes(config)
    out = Output(config, inputs)
    # Held-out sources come first, so that a training document equal to a held-out one is the one that is dropped.
    phases = [(name, "val") for name, domain in config.domains.items() if domain.val]
    phases += [(name, "train") for name in config.domains]
    total = config.tokens or (None if -1 in inputs.values() else sum(inputs.values()))
    unit = "token" if config.tokens else "B"
    pool = ThreadPoolExecutor(workers or os.cpu_count())
    interval = sys.getswitchinterval()
    sys.setswitchinterval(2e-4)  # a thread that has encoded a short text must not wait 5 ms for the GIL to return it
    try:
        with tqdm(total=total, initial=out.state["read"], unit=unit, unit_scale=True, disable=None) as bar:
            for phase in range(out.state["phase"], len(phases)):
                prepare_phase(out, phase, *phases[phase], pool, bar)
        out.finish()
    finally:
        pool.shutdown(cancel_futures=True)
        sys.setswitchinterval(interval)
        out.db.close()
    print_summary(out.manifest)
    return out.manifest


def prepare_phase(out, phase, name, split, pool, bar):
    """Read one domain's training sources, or its held-out ones, to the end or until its token budget is filled."""
    config, domain = out.config, out.config.domains[name]
    sources = domain.sources if split == "train" else domain.val
    entries = [entry for entry in out.manifest["domains"][name]["sources"] if entry["split"] == split]
    fraction = config.val_fraction if domain.val_fraction is None else domain.val_fraction
    fraction = 1 if split == "val" else 0 if domain.val else fraction
    budget = math.inf
    if config.tokens and split == "train":
        budget = config.tokens * domain.weight / sum(domain.weight for domain in config.domains.values())
    began, text_bytes = time.perf_counter(), 0
    bar.set_description(f"{split}/{name}")

    def advance(tokens, read):
        step = (tokens if split == "train" else 0) if config.tokens else read
        out.state["read"] += step
        bar.update(min(step, bar.total - bar.n) if bar.total else step)  # past its total, tqdm drops the ETA

    for done in encode_all(read_sources(sources, out.state["next"], config.seed), pool, config):
        if out.tokens(name) >= budget:
            break
        record, entry, tokens = done.record, entries[done.record.source], 0
        entry["documents"] += 1
        filled = False
        if isinstance(record.text, Bad):
            skip_or_stop(out, record, entry)
        elif done.ids is None:
            entry["short"] += 1
        elif not out.is_new(done.digest):
            entry["duplicates"] += 1
        else:
            part = "val" if int.from_bytes(done.digest[:8]) < fraction * 2**64 else "train"
            filled = out.add(part, name, done)
            text_bytes += done.bytes
            tokens = len(done.ids) if part == "train" else 0
        advance(tokens, record.read)
        bar.set_postfix_str(f"{text_bytes / 1e6 / (time.perf_counter() - began):.1f} MB/s of text", refresh=False)
        if filled:
            out.commit(phase, record.next)
    for part in ("train", "val"):
        out.close_shard(part, name)
    if split == "train" and not out.tokens(name):
        raise DataError(f"domain '{name}': no training document; its sources are empty, duplicates or skipped")
    if budget < math.inf:
        advance(max(0, budget - out.tokens(name)), 0)  # what the sources fell short of, so that the bar reaches its end
    out.commit(phase + 1, (0, 0, 0))


def skip_or_stop(out, record, entry):
    bad, line = record.text, f":{record.text.line}" if record.text.line else ""
    if out.config.on_error == "stop":
        raise DataError(f"{record.file}{line}: {bad.reason}; repair it, or pass over such input with --on_error=skip")
    entry["skipped"] += 1
    out.manifest["skipped_total"] += 1
    if len(out.manifest["skipped"]) < MAX_SKIPPED:
        out.manifest["skipped"].append({"file": record.file, "line": bad.line, "reason": bad.reason})


def input_sizes(config):
    """Bytes of every input file, -1 for a data set on the hub. A missing one stops the run now, not in an hour."""
    sizes = {}
    for domain in config.domains.values():
        for source in domain.sources + domain.val:
            try:
                for name, path in list_files(source):
                    sizes[name] = os.path.getsize(path) if path else -1 if source.hub else 0
            except DataError as error:
                if config.on_error == "stop":
                    raise DataError(f"{source.name}: {error}") from None
    return sizes


def read_manifest(folder):
    """The manifest of a prepared folder, None where there is none. Raises `DataError`."""
    try:
        return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise DataError(f"{folder}/manifest.json: damaged ({error}); delete the folder and prepare it again") from None


def verify(folder):
    """Compare every shard with the manifest. Raises `DataError` that counts what differs and names the first."""
    manifest = read_manifest(folder)
    if not manifest:
        raise DataError(f"{folder}: not prepared, or not to the end; run the same command without --verify")
    try:
        wrong, listed = compare_shards(folder, manifest)
    except (KeyError, TypeError, AttributeError) as error:
        wrong = [f"manifest.json has no {error}"]
    if wrong:
        raise DataError(f"{folder}: {len(wrong)} differences, first: {wrong[0]}; delete the folder, prepare it again")
    print(f"{folder}: {len(listed)} shards are as the manifest says")


def compare_shards(folder, manifest):
    wrong, listed = [], set()
    for domain, split in itertools.product(manifest["domains"].values(), ("train", "val")):
        for shard in domain[split]["shards"]:
            path = folder / shard["file"]
            listed.add(path)
            data = path.read_bytes() if path.exists() else b""
            ids = np.frombuffer(data, "<u2", len(data) // 2)
            if hashlib.sha256(data).hexdigest() != shard["sha256"]:
                wrong.append(f"{path} is {'altered' if data else 'missing'}")
            elif (len(ids), (ids == EOT).sum()) != (shard["tokens"], shard["documents"]):
                wrong.append(f"{path} has other counts than the manifest")
        for key in ("tokens", "documents", "bytes"):
            if sum(shard[key] for shard in domain[split]["shards"]) != domain[split][key]:
                wrong.append(f"the manifest's {key} do not add up")
    wrong += [f"{path} is not in the manifest" for path in sorted(set(folder.glob("*/*/*.bin*")) - listed)]
    return wrong, listed


def print_summary(manifest):
    columns = "{:12} {:>11} {:>14} {:>10} {:>10} {:>11} {:>8} {:>8}"
    print(columns.format("domain", "documents", "tokens", "MB", "val docs", "duplicates", "short", "skipped"))
    for name, d in manifest["domains"].items():
        lost = [sum(source[key] for source in d["sources"]) for key in ("duplicates", "short", "skipped")]
        counts = [f"{n:,}" for n in (d["train"]["documents"], d["train"]["tokens"])]
        print(columns.format(name, *counts, f"{d['train']['bytes'] / 1e6:.2f}", f"{d['val']['documents']:,}", *lost))
    budget, weights = manifest["config"]["tokens"], sum(d["weight"] for d in manifest["domains"].values())
    for name, d in manifest["domains"].items():
        if d["train"]["tokens"] < budget * d["weight"] / weights:
            print(f"{name}: its sources fall short of its budget of {budget * d['weight'] / weights:,.0f} tokens")
    for skipped in manifest["skipped"][:5]:
        line = f":{skipped['line']}" if skipped["line"] else ""
        print(f"skipped {skipped['file']}{line}: {skipped['reason']}")
    if manifest["skipped_total"] > 5:
        print(f"... {manifest['skipped_total']} records skipped in all; the manifest lists the first {MAX_SKIPPED}")


def benchmark(config, workers):
    """Time the whole of `prepare` against tiktoken's bare batch call on the same texts, in turns; prints JSON."""
    import resource

    workers = workers or os.cpu_count()
    seconds, megabytes, peak = {"prepare": 0, "tiktoken": 0}, {"prepare": 0, "tiktoken": 0}, None
    for _ in range(2):
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            manifest = prepare(replace(config, out=f"{folder}/out"), workers)
            seconds["prepare"] += time.perf_counter() - began
        # the peak of `prepare` alone: the lists of the bare call come after it
        peak = peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)
        for name, domain in config.domains.items():
            left = sum(manifest["domains"][name][split]["bytes"] for split in ("train", "val"))
            megabytes["prepare"] += left / 1e6
            records = read_sources(domain.val + domain.sources, (0, 0, 0), config.seed)
            texts = (record.text for record in records if isinstance(record.text, str))
            while left > 0 and (batch := list(itertools.islice(texts, 500))):
                size = sum(len(text.encode()) for text in batch)
                left, megabytes["tiktoken"] = left - size, megabytes["tiktoken"] + size / 1e6
                began = time.perf_counter()
                load_tokenizer().encode_ordinary_batch(batch, num_threads=workers)
                seconds["tiktoken"] += time.perf_counter() - began
    speed = {f"{name}_mb_per_s": round(megabytes[name] / seconds[name], 2) for name in seconds}
    ratio = round(speed["prepare_mb_per_s"] / speed["tiktoken_mb_per_s"], 3)
    print(json.dumps({**speed, "ratio": ratio, "workers": workers, "peak_rss_gb": round(peak, 3)}))


def main(arguments=None):
    """Run from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description="Raw text -> token shards and a manifest. A stopped run continues with the same command.",
        epilog="Any key of the config can be set as --key=value, for example --out=data/small --tokens=5e6.",
        allow_abbrev=False,
    )
    parser.add_argument("config", help="a TOML file, for example configs/data/demo.toml")
    parser.add_argument("--verify", action="store_true", help="compare an existing output with its manifest, and stop")
    parser.add_argument("--benchmark", action="store_true", help="measure speed against bare tiktoken; writes nothing")
    parser.add_argument("--workers", type=int, metavar="N", help="encoding threads (default: one per core)")
    options, overrides = parser.parse_known_args(arguments)
    unknown = [text for text in overrides if not re.match(r"--[\w.-]+=", text)]
    if unknown or (options.workers is not None and options.workers < 1):
        parser.error(f"what is '{unknown[0]}'? overrides look like --key=value" if unknown else "--workers is below 1")
    try:
        if holds_chats(options.config):
            config = load(options.config, prepare_chat.ChatConfig, overrides)
            if options.benchmark:
                raise ConfigError(f"{options.config}: --benchmark is for pretraining text")
            if options.verify:
                prepare_chat.verify(Path(config.out))
            else:
                prepare_chat.prepare(config, options.workers)
            return 0
        config = load(options.config, DataConfig, overrides)
        if options.verify:
            verify(Path(config.out))
        elif options.benchmark:
            benchmark(config, options.workers)
        else:
            prepare(config, options.workers)
    except KeyboardInterrupt:
        print("\nstopped; the same command continues where this run was (chat data: from the start)", file=sys.stderr)
        return 130
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, sqlite3.Error) as error:
        print(f"error: {explain(error)}", file=sys.stderr)
        return 2
    return 0


def holds_chats(path):
    """Whether a config is of conversations: it has a `kind`. What cannot be read, `load` reports."""
    try:
        return "kind" in tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def explain(error):
    if getattr(error, "errno", None) == errno.ENOSPC or "disk is full" in str(error):
        return "the disk is full; free some space, and the same command continues where this run was"
    if "locked" in str(error):
        return "another run is writing this folder; wait for it, or set another --out"
    return f"{error}; the same command continues once this is repaired"


if __name__ == "__main__":
    sys.exit(main())
