"""The tokenizer, what a prepared folder must hold, and the token streams that training reads."""

import json

import numpy as np
import pytest

import data
import prepare_data
from data import ASSISTANT, EOT, USER, VOCAB_SIZE, DataError, Prepared, TokenStreams

# -------------------------------------------------------------------------------------------------- tokenizer


def test_tokenizer_gives_the_ids_of_gpt2():
    encode = data.load_tokenizer().encode_ordinary
    assert encode("Hello world") == [15496, 995]
    assert encode("Hello, world!\n\n the") == [15496, 11, 995, 0, 628, 262]


@pytest.mark.parametrize("text", ["", " ", "\n\n\t x  \n", "naïve 日本 🤖 e\u0301", "\x00\x7f", "a <|endoftext|>"])
def test_tokenizer_round_trips(text):
    ids = data.load_tokenizer().encode_ordinary(text)
    assert data.load_tokenizer().decode(ids) == text
    assert data.token_bytes()[ids].sum() == len(text.encode())


@pytest.mark.parametrize("special", data.SPECIAL_TOKENS)
def test_no_text_gives_a_special_token(special):
    assert max(data.load_tokenizer().encode_ordinary(f"{special}a{special}{special} {special}")) < EOT


def test_token_bytes_are_none_for_special_tokens_only():
    assert data.token_bytes().shape == (VOCAB_SIZE,)
    assert data.token_bytes()[:EOT].min() == 1
    assert data.token_bytes()[[EOT, USER, ASSISTANT]].tolist() == [0, 0, 0]


def test_altered_or_missing_ranks_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "RANKS", tmp_path / "gpt2.tiktoken")
    with pytest.raises(DataError, match="gpt2.tiktoken: No such file.*restore it"):
        data.load_tokenizer.__wrapped__()
    (tmp_path / "gpt2.tiktoken").write_bytes(b"IQ== 0\n")
    with pytest.raises(DataError, match="gpt2.tiktoken: altered.*restore it"):
        data.load_tokenizer.__wrapped__()


# -------------------------------------------------------------------------------------------------- prepared folders


def edit(folder, change):
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_prepared_folder_opens(prepared):
    prepare_data.verify(prepared)  # the fixture is what the writer would write
    opened = Prepared.open(prepared)
    assert opened.domains == ["code", "prose", "verse"]
    assert [len(opened.shards("train", name)) for name in opened.domains] == [1, 2, 3]
    edit(prepared, lambda manifest: manifest["domains"]["code"].update(weight=0.6))
    assert Prepared.open(prepared).sha256 != opened.sha256


def test_first_tokens_of_a_domain(prepared):
    opened = Prepared.open(prepared)
    whole = np.concatenate(opened.shards("train", "verse"))
    for limit in (1, 50, len(whole) - 1, len(whole), len(whole) + 9):
        assert opened.tokens("train", "verse", limit).tolist() == whole[:limit].tolist()
    assert opened.tokens("val", "verse", 9).tolist() == []


def test_a_missing_or_half_prepared_folder_is_refused(prepared):
    with pytest.raises(DataError, match="nowhere: not prepared yet .*run prepare_data.py"):
        Prepared.open(prepared / "nowhere")
    (prepared / "manifest.json").unlink()
    with pytest.raises(DataError, match="prepared: not finished preparing .*run prepare_data.py"):
        Prepared.open(prepared)


def test_a_missing_or_truncated_shard_is_refused(prepared):
    shard = prepared / "train" / "prose" / "00001.bin"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(DataError, match=f"prose/00001.bin: {len(whole) - 1} bytes .* {len(whole)}; prepare .* again"):
        Prepared.open(prepared)
    shard.unlink()
    with pytest.raises(DataError, match="prose/00001.bin: missing; prepare the data again"):
        Prepared.open(prepared)


def test_a_truncated_manifest_is_refused(prepared):
    raw = (prepared / "manifest.json").read_bytes()
    for size in (0, 1, len(raw) // 2, len(raw) - 1):
        (prepared / "manifest.json").write_bytes(raw[:size])
        with pytest.raises(DataError, match="manifest.json: damaged; prepare the data again"):
            Prepared.open(prepared)


DAMAGES = {
    "no version": lambda manifest: manifest.pop("version"),
    "no tokenizer": lambda manifest: manifest.pop("tokenizer_sha256"),
    "no domains": lambda manifest: manifest.pop("domains"),
    "a list of domains": lambda manifest: manifest.update(domains=[]),
    "a domain without held-out entry": lambda manifest: manifest["domains"]["code"].pop("val"),
    "a shard without size": lambda manifest: manifest["domains"]["code"]["train"]["shards"][0].pop("tokens"),
    "a shard without name": lambda manifest: manifest["domains"]["code"]["train"]["shards"][0].pop("file"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_manifest_is_refused(prepared, damage):
    edit(prepared, damage)
    with pytest.raises(DataError, match="manifest.json: damaged; prepare the data again"):
        Prepared.open(prepared)


def test_another_version_or_tokenizer_is_refused(prepared):
    edit(prepared, lambda manifest: manifest.update(tokenizer_sha256="0" * 64))
    with pytest.raises(DataError, match="manifest.json: made with another tokenizer; prepare it again"):
        Prepared.open(prepared)
    edit(prepared, lambda manifest: manifest.update(version=99, domains="of another layout"))
    with pytest.raises(DataError, match="manifest.json: version 99, expected 1; prepare it again"):
        Prepared.open(prepared)


# -------------------------------------------------------------------------------------------------- streams


def batches(streams, n):
    return [next(streams) for _ in range(n)]


def assert_same(some, others):
    for a, b in zip(some, others):
        assert all(np.array_equal(x, y) for x, y in zip(a[:3], b[:3])) and a[3] == b[3]


def joined(batches, part=0):
    """Tokens, or another part, of every row of successive batches, (rows, n)."""
    return np.concatenate([batch[part] for batch in batches], axis=1)


def cut(row):
    """A row's documents, as tuples."""
    return [tuple(part.tolist()) for part in np.split(row, np.flatnonzero(row == EOT)[1:])]


def documents(opened, name):
    return {document for shard in opened.shards("train", name) for document in cut(shard)}


@pytest.mark.parametrize("segment", [1, 7, 64])
def test_rows_continue_from_batch_to_batch(prepared, segment):
    read = batches(TokenStreams(Prepared.open(prepared), rows=3, segment=segment, seed=1), 30)
    assert read[0][0].shape == (3, segment)
    tokens, targets = joined(read), joined(read, 1)
    assert np.array_equal(targets[:, :-1], tokens[:, 1:])  # also from the last of one batch to the first of the next


@pytest.mark.parametrize("segment", [1, 7, 64])
def test_documents_are_read_whole_in_one_row(prepared, segment):
    opened = Prepared.open(prepared)
    read = batches(TokenStreams(opened, rows=3, segment=segment, seed=1), 2000 // segment)
    seen = set()
    for row, domains in zip(joined(read), joined(read, 2)):
        *whole, last = cut(row)
        position = 0
        for document in whole:
            (domain,) = set(domains[position : position + len(document)])  # all of one
            assert document in documents(opened, opened.domains[domain])
            position += len(document)
            seen.add(document)
        name = opened.domains[domains[-1]]
        assert any(document[: len(last)] == last for document in documents(opened, name))
    assert seen == set.union(*(documents(opened, name) for name in opened.domains))


@pytest.mark.parametrize("rows", [1, 3])
def test_every_document_comes_once_an_epoch(tmp_path, write_prepared, rows):
    """Documents of one segment each, so that the rows of a batch are the order in which documents are taken."""
    shards = [[[n * 10 + i] * 7 for i in range(size)] for n, size in enumerate((5, 4, 3), 1)]
    streams = TokenStreams(Prepared.open(write_prepared(tmp_path, {"only": (1, shards, [])})), rows, 8, seed=3)
    order = np.concatenate([tokens[:, 1] for tokens, *_ in batches(streams, 12 * 4 // rows)]).reshape(4, 12)
    everything = sorted(document[0] for shard in shards for document in shard)
    assert all(sorted(epoch) == everything for epoch in order.tolist())
    # Shuffled anew every time: the shards, and the documents within each
    assert len({tuple(epoch // 10) for epoch in order}) > 1
    assert all(len({tuple(epoch[epoch // 10 == shard]) for epoch in order}) > 1 for shard in (1, 2, 3))


@pytest.mark.parametrize("rows", [1, 6])
def test_shares_of_tokens_follow_the_weights(tmp_path, write_prepared, rows):
    """Documents of 3, 60 and 3000 tokens."""
    domains = {
        name: (weight, [[[n] * (length - 1)] * 3], [])
        for n, (name, weight, length) in enumerate([("short", 5, 3), ("middle", 3, 60), ("long", 2, 3000)])
    }
    streams = TokenStreams(Prepared.open(write_prepared(tmp_path, domains)), rows, 60, seed=0)
    counts, off = np.zeros(3), []
    for _ in range(60_000 // (60 * rows)):
        counts += np.bincount(next(streams)[2].ravel(), minlength=3)
        off.append(np.abs(counts - counts.sum() * np.array([0.5, 0.3, 0.2])).max())
    assert max(off) <= 3000  # at any time within one longest document
    assert off[-1] / counts.sum() < 0.01


def test_streams_follow_the_seed(prepared):
    opened = Prepared.open(prepared)
    first, again, other = (batches(TokenStreams(opened, 3, 16, seed), 20) for seed in (1, 1, 2))
    assert_same(first, again)
    assert not np.array_equal(joined(first), joined(other))


def test_streams_go_on_from_any_state(prepared):
    """Over several epochs of every domain, in a fresh object and in one that has read on and prefetched."""
    opened = Prepared.open(prepared)
    used = TokenStreams(opened, 3, 16, seed=1)
    reference = batches(TokenStreams(opened, 3, 16, seed=1), 60)
    assert min(epoch for epoch, *_ in reference[-1][3]["cursors"]) >= 2
    for i in range(0, 50, 3):
        state = json.loads(json.dumps(reference[i][3]))
        fresh = TokenStreams(opened, 3, 16, seed=1)
        fresh.load_state(state)
        used.load_state(state)
        assert fresh.state() == state
        assert_same(batches(fresh, 8), reference[i + 1 :])
        assert_same(batches(used, 8), reference[i + 1 :])


def test_weights_can_be_replaced(prepared):
    opened = Prepared.open(prepared)
    assert set(joined(batches(TokenStreams(opened, 3, 16, 1, {"prose": 7}), 20), 2).flat) == {1}
    read = joined(batches(TokenStreams(opened, 3, 16, 1, {"code": 1, "prose": 0, "verse": 3}), 300), 2)
    assert np.bincount(read.flat) / read.size == pytest.approx([0.25, 0, 0.75], abs=0.02)


def test_wrong_weights_are_refused(tmp_path, prepared, write_prepared):
    opened = Prepared.open(prepared)
    with pytest.raises(DataError, match="prepared: no domain 'poetry'; it has code, prose, verse"):
        TokenStreams(opened, 1, 8, 0, {"code": 1, "poetry": 1})
    for weights in ({"code": 0}, {"code": 2, "prose": -1}, {"code": float("nan")}):
        with pytest.raises(DataError, match="weights .* must be at least 0, and one above"):
            TokenStreams(opened, 1, 8, 0, weights)
    empty = Prepared.open(write_prepared(tmp_path / "empty", {"a": (1, [["text"]], []), "b": (1, [], [["text"]])}))
    with pytest.raises(DataError, match="empty: the domain 'b' has no training text"):
        TokenStreams(empty, 1, 8, 0)
    batches(TokenStreams(empty, 1, 8, 0, {"a": 1}), 2)
