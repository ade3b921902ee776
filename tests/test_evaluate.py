"""Scoring: packing, segments and memory change no result; totals by hand."""

import math

import numpy as np
import pytest
import torch

import data
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
