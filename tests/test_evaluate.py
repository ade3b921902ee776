"""Scoring: packing, segments and memory change no result; totals by hand; the commands against direct scoring."""

import json
import math
import sys

import numpy as np
import pytest
import torch

import checkpoint
import data
import eval_depth
import evaluate
from evaluate import Scores

V = 300  # a small vocabulary, in which 0 opens a document


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model(vocab_size=V, document_start=0)


@pytest.fixture(scope="module")
def documents():
    generator = np.random.default_rng(0)
    lengths = [5, 1, 40, 2, 17, 64, 3, 33, 16, 9]  # in tokens after the opening one
    return [np.append(0, generator.integers(1, V, length)) for length in lengths]


@pytest.fixture(scope="module", params=[None, 2], ids=["own depth", "depth 2"])
def case(request, model, documents):
    """A forced depth or None, and the documents' scores by one forward pass each, without memory or packing."""
    depth, alone = request.param, []
    for document in documents:
        row = torch.from_numpy(document)[None]
        with torch.no_grad():
            out = model(row[:, :-1], row[:, 1:], depth=depth)
        alone.append(Scores(document[1:], out.nll[0].numpy(), out.depth[0].numpy()))
    return depth, alone


def assert_same(scores, expected):
    assert len(scores) == len(expected)
    for ours, theirs in zip(scores, expected):
        assert np.array_equal(ours.tokens, theirs.tokens) and np.array_equal(ours.depth, theirs.depth)
        np.testing.assert_allclose(ours.nll, theirs.nll, atol=1e-4, rtol=0)


# -------------------------------------------------------------------------------------------------- score


@pytest.mark.parametrize("rows, segment", [(1, 16), (3, 16), (16, 16), (4, 1), (3, 7), (2, 512)])
def test_packing_and_segments_change_nothing(model, documents, case, rows, segment):
    depth, alone = case
    assert_same(evaluate.score(model, documents, memory=64, segment=segment, rows=rows, depth=depth), alone)


def test_documents_scored_alone_are_the_same(model, documents, case):
    depth, alone = case
    assert_same([evaluate.score(model, [d], memory=64, segment=9, rows=1, depth=depth)[0] for d in documents], alone)


def test_a_forced_depth_is_taken_by_every_token(case):
    depth, alone = case
    taken = {int(d) for scores in alone for d in scores.depth}
    assert taken == {depth} if depth else len(taken) >= 3  # with its own depth, the checks above see several


def test_every_token_but_the_opening_one_is_scored_in_order(model, documents):
    scores = evaluate.score(model, documents, memory=8, segment=16, rows=3)
    for document, s in zip(documents, scores):
        assert s.tokens.tolist() == document[1:].tolist()
        assert len(s.nll) == len(s.depth) == len(document) - 1 and np.isfinite(s.nll).all()
        assert s.nll.dtype == np.float32 and s.depth.dtype == np.int64


def test_memory_shorter_than_a_document_forgets(model, documents, case):
    depth, alone = case
    longest = evaluate.score(model, documents, memory=4, segment=16, rows=3, depth=depth)[5]
    np.testing.assert_allclose(longest.nll[:16], alone[5].nll[:16], atol=1e-4)
    assert np.abs(longest.nll[16:] - alone[5].nll[16:]).max() > 0.01


def test_a_document_without_tokens_has_no_scores(model, documents, case):
    depth, alone = case
    scores = evaluate.score(model, [np.array([0]), *documents, np.array([0])], memory=64, segment=16, depth=depth)
    assert_same(scores[1:-1], alone)
    assert [len(s.nll) for s in (scores[0], scores[-1])] == [0, 0]


def test_documents_are_cut_before_every_opening_token():
    tokens = np.array([data.EOT, 5, 6, data.EOT, data.EOT, 7])
    assert [document.tolist() for document in evaluate.split_documents(tokens)] == [
        [data.EOT, 5, 6],
        [data.EOT],
        [data.EOT, 7],
    ]


# -------------------------------------------------------------------------------------------------- totals


def scores(tokens, nll, depth):
    return Scores(np.array(tokens), np.array(nll, np.float32), np.array(depth))


def test_summary_by_hand():
    found = evaluate.summarize([scores([15496, 995], [1, 2], [1, 4]), scores([198], [4.5], [2])])  # "Hello world", "\n"
    bits = 7.5 / math.log(2)
    expected = {"tokens": 3, "bytes": 12, "nats": 2.5, "perplexity": math.exp(2.5), "bits_per_byte": bits / 12}
    assert found == pytest.approx(expected | {"depth": 7 / 3})


def test_special_tokens_have_no_bytes():
    found = evaluate.summarize([scores([data.USER, 15496, data.ASSISTANT, 995], [0, 1, 0, 1], [1] * 4)])
    assert found["bytes"] == len("Hello world")
    assert found["bits_per_byte"] == pytest.approx(2 / math.log(2) / 11)


def test_bytes_of_many_tokens_do_not_overflow():
    assert evaluate.summarize([scores([15496] * 20_000, [1] * 20_000, [1] * 20_000)])["bytes"] == 100_000


def test_macro_by_hand():
    domains = {
        "a": {"tokens": 9, "nats": 1.0, "perplexity": math.e, "bits_per_byte": 0.5, "depth": 2.0},
        "b": {"tokens": 1, "nats": 3.0, "perplexity": math.e**3, "bits_per_byte": 1.0, "depth": 5.0},
    }
    expected = {"nats": 2, "perplexity": math.e**2, "bits_per_byte": 0.75, "depth": 3.5}
    assert evaluate.macro(domains) == pytest.approx(expected)


# -------------------------------------------------------------------------------------------------- sliding windows


def test_a_window_as_long_as_the_documents_changes_nothing(model, documents, case):
    depth, alone = case
    assert_same(evaluate.score_sliding(model, documents, window=64, stride=64, rows=3, depth=depth), alone)
    assert_same(evaluate.score_sliding(model, documents, window=64, stride=7, rows=16, depth=depth), alone)


def test_every_token_sees_its_window(model, documents):
    window, stride = 12, 5
    found = evaluate.score_sliding(model, documents, window, stride, rows=4)
    for document, s in zip(documents, found):
        for i in range(1, len(document)):  # the target
            end = min(1 + (i - 1) // stride * stride + stride, len(document))
            row = torch.from_numpy(document[max(0, end - 1 - window) : i + 1])[None]
            with torch.no_grad():
                out = model(row[:, :-1], row[:, 1:])
            assert row.shape[1] - 1 > min(i, window) - stride
            assert s.nll[i - 1] == pytest.approx(float(out.nll[0, -1]), abs=1e-4)
            assert s.depth[i - 1] == int(out.depth[0, -1])


# -------------------------------------------------------------------------------------------------- positions


def test_positions_by_hand():
    assert evaluate.bucket_edges(1) == evaluate.bucket_edges(1024) == [0, 128, 512, 1024]
    assert evaluate.bucket_edges(2049) == [0, 128, 512, 1024, 2048, 4096]
    long, short = scores([40] * 600, np.arange(600), [1] * 600), scores([40] * 2, [7, 9], [1, 1])
    sums, counts = evaluate.by_position([long, short], [0, 128, 512, 1024])
    assert counts.tolist() == [130, 384, 88]
    assert sums.tolist() == [sum(range(128)) + 16, sum(range(128, 512)), sum(range(512, 600))]


def test_comparison_by_hand():
    ours, best = [scores([1, 2], [3, 3], [1, 1]), scores([1], [2], [1])], [scores([1, 2], [1, 3], [1, 1])]
    mean, error = evaluate.compare(ours, [*best, scores([1], [2], [1])])
    assert mean == pytest.approx(2 / 3)  # residuals of the documents: 2 - 2 * 2/3 and 0 - 2/3
    assert error == pytest.approx(math.sqrt(2 * ((2 / 3) ** 2 + (2 / 3) ** 2)) / 3)
    assert evaluate.compare(ours[:1], best) == (1, None)


# -------------------------------------------------------------------------------------------------- commands


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    (folder / "tale.txt").write_text("It was the age of wisdom, it was the age of foolishness. " * 12)
    lines = [json.dumps({"text": f"{i} little birds sat on a tree. " * i}) for i in (3, 9)]
    (folder / "verse.jsonl").write_text("\n".join(lines))
    return folder


def run(capsys, *argv):
    code = evaluate.main([*map(str, argv)])
    return code, *capsys.readouterr()


def test_perplexity_command(run_folder, texts, tmp_path, capsys):
    file = tmp_path / "p.json"
    options = ["--data", texts, "--depth", 2, 4, "--sliding", 16, "--json", file, "--device", "cpu"]
    code, out, _ = run(capsys, "perplexity", run_folder, *options)
    found = json.loads(file.read_text())
    assert code == 0 and found["step"] == 7 and found["window"] == 64
    assert [(row["depth"], row["sliding"]) for row in found["rows"]] == [
        (None, None), (2, None), (4, None), (None, 16), (2, 16), (4, 16)
    ]  # fmt: skip
    model, _ = checkpoint.load_model(checkpoint.find(run_folder), torch.device("cpu"), torch.float32)
    documents = {name: [d.tokens for d in group] for name, group in eval_depth.read_topics(texts, 10**5).items()}
    for row in found["rows"]:
        score = evaluate.score_sliding if row["sliding"] else evaluate.score
        sizes = (64, 16) if row["sliding"] else (32, 32)
        expected = {d: evaluate.summarize(score(model, of, *sizes, depth=row["depth"])) for d, of in documents.items()}
        assert row["domains"]["tale"] == pytest.approx(expected["tale"], rel=1e-4)
        assert row["macro"] == pytest.approx(evaluate.macro(expected), rel=1e-4)
        assert f"{row['macro']['bits_per_byte']:.4f}" in out
        assert row["depth"] is None or row["macro"]["depth"] == row["depth"]


def test_perplexity_of_the_runs_own_data(tmp_path, write_run, write_prepared, capsys):
    write_run(tmp_path)
    write_prepared(tmp_path / "prepared", {"prose": (1.0, [["Some text."]], [["A held-out chapter.", "Another."]])})
    code, out, _ = run(capsys, "perplexity", tmp_path, "--memory", 0, "--device", "cpu")
    assert code == 0 and "memory 0" in out and "prose" in out and "macro" in out


def test_memory_that_no_text_fills_is_no_wall(run_folder, texts, tmp_path, capsys):
    json_file = tmp_path / "c.json"
    assert run(capsys, "context", run_folder, "--data", texts, "--memory", 5000, 9000, "--json", json_file)[0] == 0
    found = json.loads(json_file.read_text())
    assert found["macro"]["nats"][0] == found["macro"]["nats"][1] and found["macro"]["wall"] is None


def test_context_command(run_folder, texts, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    json_file, figure = tmp_path / "c.json", tmp_path / "c.png"
    argv = ["context", run_folder, "--data", texts, "--memory", 64, 0, "--json", json_file, "--figure", figure]
    code, out, _ = run(capsys, *argv, "--device", "cpu")
    found = json.loads(json_file.read_text())
    assert code == 0 and found["memory"] == [0, 64] and figure.read_bytes()[:4] == b"\x89PNG"
    model, _ = checkpoint.load_model(checkpoint.find(run_folder), torch.device("cpu"), torch.float32)
    documents = [d.tokens for d in eval_depth.read_topics(texts, 10**5)["verse"]]
    for memory, nats in zip(found["memory"], found["domains"]["verse"]["nats"]):
        expected = evaluate.summarize(evaluate.score(model, documents, memory, 32))["nats"]
        assert nats == pytest.approx(expected, rel=1e-5)
    assert sum(found["domains"]["verse"]["tokens"]) == sum(len(d) - 1 for d in documents)
    assert "context wall, verse" in out


@pytest.mark.parametrize("loss, wall", [({0: 3, 32: 2, 64: 2.5}, 32), ({0: 3, 32: 2.5, 64: 2}, None)])
def test_the_wall_is_the_best_memory_with_a_longer_one(loss, wall, run_folder, texts, tmp_path, capsys, monkeypatch):
    def score(model, documents, memory, *_):
        return [scores(d[1:], np.full(len(d) - 1, loss[memory]), np.ones(len(d) - 1, int)) for d in documents]

    monkeypatch.setattr(evaluate, "score", score)
    argv = ["--data", texts, "--domains", "tale", "--memory", *loss, "--json", tmp_path / "c.json", "--device", "cpu"]
    code, out, _ = run(capsys, "context", run_folder, *argv)
    found = json.loads((tmp_path / "c.json").read_text())
    assert code == 0 and found["macro"]["wall"] == found["domains"]["tale"]["wall"] == wall
    assert ("none up to 64" if wall is None else "wall, tale: 32") in out


def test_a_tolerance_makes_tokens_of_a_fixed_model_halt(tmp_path, write_run, texts, capsys):
    write_run(tmp_path, halting="fixed")
    argv = ["--data", texts, "--tolerance", 0, 0.7, 9, "--depth", 2, "--json", tmp_path / "t.json", "--device", "cpu"]
    code, out, _ = run(capsys, "perplexity", tmp_path, *argv)
    rows = json.loads((tmp_path / "t.json").read_text())["rows"]
    assert code == 0 and [row["tolerance"] for row in rows] == [None, 0, 0.7, 9, None] and "tolerance 0.7" in out
    depths = [row["macro"]["depth"] for row in rows]
    assert depths[0] == depths[1] == 4 > depths[2] > depths[3] == 1 and depths[4] == 2
    assert rows[0]["macro"]["nats"] == pytest.approx(rows[1]["macro"]["nats"])


def test_an_exit_head_has_a_tolerance_of_its_own(tmp_path, write_run, texts, capsys):
    """It is the one that it goes by where no other is named, whichever were named before."""
    write_run(tmp_path, halting="exit", tolerance=0.7)
    argv = ["--data", texts, "--tolerance", -99, 0.7, 99, "--sliding", 64, "--json", tmp_path / "t.json"]
    assert run(capsys, "perplexity", tmp_path, *argv, "--device", "cpu")[0] == 0
    assert run(capsys, "perplexity", tmp_path, "--data", texts, "--tolerance", "nan")[0] == 2
    rows = json.loads((tmp_path / "t.json").read_text())["rows"]
    for part in (rows[:4], rows[4:]):
        depths = [row["macro"]["depth"] for row in part]
        assert depths[1] == 4 > depths[0] == depths[2] > depths[3] == 1


def test_tokens_of_an_exit_head_can_halt_by_stability(tmp_path, write_run, texts, capsys):
    """With the tolerance 0 none does, and between other rules each counts by itself."""
    write_run(tmp_path, halting="exit", exit_by="loss", tolerance=-0.5, finish=True)
    argv = ["--data", texts, "--tolerance", 99, "--stability", 0, 1.1, 9, "--depth", 4, "--json", tmp_path / "s.json"]
    code, out, _ = run(capsys, "perplexity", tmp_path, *argv, "--device", "cpu")
    rows = json.loads((tmp_path / "s.json").read_text())["rows"]
    assert code == 0 and [row["stability"] for row in rows] == [None, None, 0, 1.1, 9, None] and "stability 1.1" in out
    depths = [row["macro"]["depth"] for row in rows]
    assert depths[2] == depths[5] == 4 > depths[3] > depths[4] == depths[1] == 2
    assert rows[2]["macro"]["nats"] == pytest.approx(rows[5]["macro"]["nats"])
    for value, message in (("nan", "not a finite number"), (-1, "must not be negative")):
        code, _, err = run(capsys, "perplexity", tmp_path, "--data", texts, "--stability", value, "--device", "cpu")
        assert code == 2 and message in err


def test_bad_input_is_one_line(run_folder, texts, tmp_path, capsys, monkeypatch):
    cases = [
        (["perplexity", tmp_path / "no"], "no such folder"),
        (["perplexity", run_folder], "prepared: no such file or folder"),  # the checkpoint's own data is gone
        (["perplexity", run_folder, "--data", tmp_path / "no"], "no such file or folder"),
        (["perplexity", run_folder, "--data", texts, "--depth", 2, 9], "--depth 9 is outside 1..4"),
        (["perplexity", run_folder, "--data", texts, "--tolerance", 0.1], "--tolerance 0.1 is for models without"),
        (["perplexity", run_folder, "--data", texts, "--sliding", 65], "--sliding 65 must lie in 1..64"),
        (["perplexity", run_folder, "--data", texts, "--domains", "song"], "no domain 'song'; it has tale, verse"),
        (["perplexity", run_folder, "--data", texts, "--tokens", 0], "--tokens 0"),
        (["context", run_folder, "--data", texts, "--memory", 8, -1], "--memory -1 is negative"),
        (["context", run_folder, "--data", texts, "--figure", tmp_path / "no" / "c.png"], "does not exist"),
        (["context", run_folder, "--data", texts, "--figure", tmp_path / "c.foo"], "ends in .png, .pdf or .svg"),
        (["zeroshot", run_folder], "pip install lm-eval"),
    ]
    monkeypatch.delitem(sys.modules, "zeroshot", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)  # as if it were not installed
    for argv, message in cases:
        code, out, err = run(capsys, *argv, "--device", "cpu")
        assert code == 2 and out == "", argv
        assert message in err and err.startswith("error: ") and err.count("\n") == 1, err
