"""Known answers for the statistics, classes and maps of eval_depth.py, and its tables against evaluate.score."""

import gzip
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
import zstandard

import checkpoint
import data
import depth_map
import eval_depth
import evaluate
from eval_depth import Document
from evaluate import Scores


def encode(text):
    return np.array(data.load_tokenizer().encode_ordinary(text))


def scores(depth, nll=None, text=None):
    tokens = np.full(len(depth), 40) if text is None else encode(text)
    return Scores(tokens, np.array(depth if nll is None else nll, np.float32), np.array(depth))


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, write_run):
    return write_run(tmp_path_factory.mktemp("run"), max_depth=3)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Topics as a sub-folder, as a text file, and as lines of JSON."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "code" / "package").mkdir(parents=True)
    (folder / "code" / "a.py").write_text("def f(x):\n    return x + 1  # one more\n")
    (folder / "code" / "package" / "b.py").write_text("import os\n\nprint(os.getcwd())\n")
    (folder / "code" / "package" / "__init__.py").write_text("")
    (folder / "poem.txt").write_text("Tyger Tyger, burning bright, in the forests of the night\n", encoding="utf-8")
    speeches = ("Who is there?", "Nay, answer me: stand, and unfold yourself.", "")
    lines = "\n".join(json.dumps({"text": speech}) for speech in speeches)
    (folder / "play.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    (folder / ".hidden").write_bytes(b"\xff")
    return folder


def run(run_folder, *argv, device="cpu"):
    return eval_depth.main([*map(str, argv), "--checkpoint", str(run_folder), "--device", device])


# -------------------------------------------------------------------------------------------------- statistics


def test_ranks_share_ties():
    assert eval_depth.ranks(np.array([30, 10, 20, 20, 20])).tolist() == [5, 1, 3, 3, 3]


def test_spearman_by_hand():
    # ranks 1, 2.5, 2.5, 4 and 2, 1, 3, 4: covariance 3, variances 4.5 and 5
    assert eval_depth.spearman(np.array([1, 2, 2, 3]), np.array([5.0, 4.0, 6.0, 7.0])) == pytest.approx(3 / 22.5**0.5)
    assert eval_depth.spearman(np.array([1, 2, 3]), np.array([9.0, 4.0, 1.0])) == pytest.approx(-1)
    assert eval_depth.spearman(np.array([4, 4, 4]), np.array([9.0, 4.0, 1.0])) is None


def test_bootstrap_of_identical_documents_has_no_width():
    draws = eval_depth.bootstrap([scores([1, 2, 3])] * 5, np.random.default_rng(0))
    assert eval_depth.interval(draws) == [2, 2]
    assert eval_depth.bootstrap([scores([1, 2, 3])], np.random.default_rng(0)) is None


def test_bootstrap_weighs_documents_by_their_tokens():
    draws = eval_depth.bootstrap([scores([1] * 30), scores([4] * 10)], np.random.default_rng(0), 4000)
    assert set(draws.tolist()) == {1, 1.75, 4}
    assert np.mean(draws == 1.75) == pytest.approx(0.5, abs=0.05)


def test_row_by_hand():
    row = eval_depth.describe([scores([1, 3], [0.5, 1.5]), scores([3], [2.5])], 4, None)
    assert row["histogram"] == pytest.approx([1 / 3, 0, 2 / 3, 0])
    assert row["depth"] == pytest.approx(7 / 3) and row["documents"] == 2 and row["tokens"] == 3
    assert row["perplexity"] == pytest.approx(np.exp(1.5))
    assert row["interval"] is None and row["spearman"] == pytest.approx(0.75**0.5)


def test_macro_and_all():
    tables = eval_depth.report({"a": [scores([1] * 9)] * 2, "b": [scores([3])] * 2}, 3, seed=1)
    assert tables["macro"]["depth"] == 2 and tables["macro"]["interval"] == [2, 2]
    assert tables["all"]["depth"] == pytest.approx(24 / 20)
    assert tables["macro"]["histogram"] == [0.5, 0, 0.5]
    assert tables["macro"]["spearman"] is None


# -------------------------------------------------------------------------------------------------- token classes


def classes(text, code):
    tokens = encode(text)
    parts = [part.decode() for part in data.load_tokenizer().decode_tokens_bytes(tokens.tolist())]
    return list(zip(parts, (eval_depth.CLASSES[i] for i in eval_depth.classify(tokens, code))))


def test_classes_of_code():
    found = classes("\ndef isinstanceof(x):\n    return x >= 0x1F, 'no def', None  # or so", code=True)
    of = dict(found)
    assert found[0] == ("\n", "whitespace")
    assert of["def"] == of[" return"] == of[" None"] == "keyword"
    assert [kind for part, kind in found if part in (" is", "instance", "of", " x")] == ["identifier"] * 4
    assert of[" >="] == "operator" and of["):"] == "punctuation" and of[" 0"] == of["F"] == "number"
    assert of["no"] == of[" def"] == of[" or"] == of[" so"] == "word start"  # prose: in a string and in a comment
    assert of[" '"] == of[" #"] == "punctuation"


def test_classes_of_prose():
    of = dict(classes("The Jabberwocky of 1,234 don't (really) for\nYou", code=False))
    assert of["The"] == of[" Jab"] == of[" of"] == of["really"] == of[" for"] == of["You"] == "word start"
    assert of["ber"] == of["w"] == of["ock"] == of["y"] == of["'t"] == "word continuation"
    assert of[" 1"] == of[","] == of["234"] == "number"
    assert of[" ("] == of[")"] == "punctuation" and of["\n"] == "whitespace"


def test_classes_of_characters_of_several_tokens():
    tokens = encode("naïve 日本 🤖 x")
    kinds = [eval_depth.CLASSES[i] for i in eval_depth.classify(tokens, code=False)]
    assert len(kinds) == len(tokens) and kinds[-1] == "word start"
    assert kinds.count("punctuation") == len(encode(" 🤖"))
    eval_depth.classify(tokens[:-2], code=True)  # cut inside the emoji


def test_classes_part_the_tokens():
    texts = {"code": "x = 1\n", "prose": "In the night, 3 tygers\n"}
    topics = {name: [Document(np.array([data.EOT, *encode(text)]), name == "code")] for name, text in texts.items()}
    scored = {name: [scores([1] * len(encode(text)), text=text)] for name, text in texts.items()}
    groups = eval_depth.by_class(topics, scored)
    count = sum(len(s.tokens) for group in groups.values() for s in group)
    assert count == sum(len(encode(text)) for text in texts.values())
    assert {"identifier", "operator", "word start"} <= groups.keys() and "keyword" not in groups


# -------------------------------------------------------------------------------------------------- texts


def test_topics_from_folders_and_files(texts):
    topics = eval_depth.read_topics(texts, 1000)
    assert list(topics) == ["code", "play", "poem"]
    assert [len(documents) for documents in topics.values()] == [2, 2, 1]
    assert all(d.code for d in topics["code"]) and not any(d.code for d in topics["play"])
    assert topics["poem"][0].tokens.tolist() == [data.EOT, *encode((texts / "poem.txt").read_text())]


def test_a_py_file_is_code_in_any_topic(tmp_path):
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "a.py").write_text("x = 1")
    (tmp_path / "mixed" / "b.txt").write_text("x = 1")
    assert [document.code for document in eval_depth.read_topics(tmp_path, 99)["mixed"]] == [True, False]


def test_tokens_are_capped_per_topic(texts):
    topics = eval_depth.read_topics(texts, 12)
    first = len(encode("Who is there?"))
    assert [len(d.tokens) - 1 for d in topics["play"]] == [first, 12 - first]
    assert [len(d.tokens) - 1 for d in topics["poem"]] == [12]
    (texts / "poem.md").write_text("One more of the same topic.")
    assert sum(len(d.tokens) - 1 for d in eval_depth.read_topics(texts, 12)["poem"]) == 12


def test_lines_compressed_by_gzip_are_a_topic(tmp_path):
    (tmp_path / "play.jsonl.gz").write_bytes(gzip.compress(b'{"text": "Who is there?"}\n{"text": "Long live!"}\n'))
    topics = eval_depth.read_topics(tmp_path, 100)
    assert [*topics] == ["play"] and [data.load_tokenizer().decode(d.tokens[1:].tolist()) for d in topics["play"]] == [
        "Who is there?", "Long live!"
    ]  # fmt: skip


def test_a_prepared_folder_is_read_to_its_end(tmp_path, write_prepared):
    write_prepared(tmp_path, {"code": (1, [], [[[5, 6, 7], [8], []]])})
    (topic,) = eval_depth.read_topics(tmp_path, 100).values()
    assert [d.tokens.tolist() for d in topic] == [[data.EOT, 5, 6, 7], [data.EOT, 8]] and all(d.code for d in topic)


# -------------------------------------------------------------------------------------------------- the whole table


def test_tables_equal_a_direct_computation(run_folder, texts, tmp_path, capsys):
    file, markdown = tmp_path / "depth.json", tmp_path / "depth.md"
    assert run(run_folder, texts, "--json", file, "--markdown", markdown, "--by_class", "--forced") == 0
    tables, out = json.loads(file.read_text()), capsys.readouterr().out
    model, _ = checkpoint.load_model(run_folder)
    topics = eval_depth.read_topics(texts, 10**5)
    summaries = {}
    for name, documents in topics.items():
        scored = evaluate.score(model, [d.tokens for d in documents], memory=32, segment=32)
        summaries[name] = evaluate.summarize(scored)
        row = tables["topics"][name]
        assert {key: row[key] for key in summaries[name]} == pytest.approx(summaries[name])
        depth = np.concatenate([s.depth for s in scored])
        assert row["histogram"] == pytest.approx([np.mean(depth == k) for k in (1, 2, 3)])
        assert re.search(rf"^{name} .* {row['depth']:.2f} .* {row['perplexity']:.2f} ", out, re.MULTILINE)
        assert f"| {name} | {row['documents']} | {row['tokens']} | {row['depth']:.2f} |" in markdown.read_text()
        forced = evaluate.score(model, [d.tokens for d in documents], memory=32, segment=32, depth=2)
        assert tables["forced"][name][1] == pytest.approx(evaluate.summarize(forced)["perplexity"])
    assert tables["macro"]["perplexity"] == pytest.approx(evaluate.macro(summaries)["perplexity"])
    assert len({len(line) for line in out.split("\n\n")[0].splitlines()}) == 1  # aligned
    assert sum(row["tokens"] for row in tables["classes"].values()) == tables["all"]["tokens"]
    assert tables["step"] == 7 and tables["memory"] == 32 and len(tables["forced"]["macro"]) == 3


def test_fixed_depth_has_no_correlation(tmp_path, write_run, texts, capsys):
    folder = write_run(tmp_path / "fixed", max_depth=3, halting="fixed")
    assert run(folder, texts, "--json", tmp_path / "depth.json") == 0
    rows = json.loads((tmp_path / "depth.json").read_text())
    assert rows["all"]["spearman"] is None and rows["all"]["histogram"] == [0, 0, 1]
    out = capsys.readouterr().out
    assert "nan" not in out and out.count("n/a") >= 5
    assert run(folder, texts / "poem.txt", "--depth", 2) == 0
    assert " 2.00 " in capsys.readouterr().out


def test_tables_name_the_rule_that_made_them(tmp_path, write_run, texts):
    folder, file = write_run(tmp_path / "exit", halting="exit", tolerance=0.7), tmp_path / "depth.json"
    for option in ("tolerance", "stability"):
        assert run(folder, texts / "poem.txt", f"--{option}", 99, "--json", file) == 0
        tables = json.loads(file.read_text())
        assert tables[option] == 99 and [tables["tolerance"], tables["stability"]].count(None) == 1
        assert tables["all"]["depth"] == 1


def test_forced_depths_are_those_that_the_model_has(tmp_path, write_run, texts, capsys):
    folder = write_run(tmp_path / "finish", max_depth=3, finish=True)
    assert run(folder, texts / "poem.txt", "--forced", "--json", tmp_path / "depth.json") == 0
    tables = json.loads((tmp_path / "depth.json").read_text())
    assert tables["forced_depths"] == [2, 3] and len(tables["forced"]["macro"]) == 2
    assert re.search(r"perplexity at depth +2 +3 +as above", capsys.readouterr().out)
    assert run(folder, texts / "poem.txt", "--depth", 1) == 2
    assert "--depth 1 is outside 2..3, the depths of this model" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_bfloat16_on_cuda_agrees(run_folder, texts, tmp_path, capsys):
    for device in ("cpu", "cuda"):
        assert run(run_folder, texts, "--forced", "--json", tmp_path / device, device=device) == 0
    cpu, cuda = (json.loads((tmp_path / device).read_text()) for device in ("cpu", "cuda"))
    assert cuda["macro"]["nats"] == pytest.approx(cpu["macro"]["nats"], rel=0.05)
    assert np.log(cuda["forced"]["macro"]) == pytest.approx(np.log(cpu["forced"]["macro"]), rel=0.05)


# -------------------------------------------------------------------------------------------------- map


class Spans(HTMLParser):
    """The title and the text of every span inside <pre>, and all tags."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.spans, self.inside = set(), [], False
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.inside |= tag == "pre"
        if self.inside and tag == "span":
            self.spans.append([dict(attributes), ""])

    def handle_data(self, text):
        if self.inside and self.spans:
            self.spans[-1][1] += text

    def handle_endtag(self, tag):
        self.inside &= tag != "pre"


def test_html_map_escapes_and_shows_every_token():
    text = "<script>alert('&amp;')</script> 🤖\x1b end"
    tokens = encode(text)
    s = Scores(tokens, np.full(len(tokens), np.log(4), np.float32), np.arange(len(tokens)) % 3 + 1)
    page = depth_map.html_map(s, 3, "<b>.txt")
    spans = Spans(page)
    assert "script" not in spans.tags and "b" not in spans.tags
    assert "".join(shown for _, shown in spans.spans) == text.replace("\x1b", "\ufffd")
    assert spans.spans[0] == [{"class": "d1", "title": "depth 1, loss 1.386 nats, probability 0.25"}, "<"]
    (robot,) = [attributes["title"] for attributes, shown in spans.spans if "🤖" in shown]
    assert f"in {len(encode(' 🤖'))} tokens" in robot
    assert "http" not in page and "mean depth" in page


def test_pieces_survive_a_cut_character():
    tokens = encode("a🤖")[:-1]
    s = Scores(tokens, np.ones(len(tokens), np.float32), np.ones(len(tokens), np.int64))
    found = depth_map.pieces(s)
    assert [piece.text for piece in found] == ["a", "\ufffd"]
    assert sum(piece.tokens for piece in found) == len(tokens)


def test_layout_wraps_without_overlap():
    words = ["def", " f", "\n", "    ", "x" * 25, " 日本", " it", "'s", " end"]
    found = [depth_map.Piece(text, 1, 0.0, 1) for text in words]
    cells, more = depth_map.layout(found, columns=10, lines=50)
    assert not more
    taken = set()
    for text, column, row, _ in cells:
        place = {(row, column + i) for i in range(depth_map.cell_width(text))}
        assert not place & taken and column + depth_map.cell_width(text) <= 10 + 1
        taken |= place
    assert "".join(text for text, *_ in cells).replace("↵", "\n") == "".join(words)
    assert depth_map.layout(found, 10, 2)[1]


def test_map_of_a_text(run_folder, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    text = tmp_path / "a.txt"
    text.write_text("Costs $5 & $6, 日本\n" * 3, encoding="utf-8")
    assert run(run_folder, "--map", tmp_path / "map.html", "--text", text) == 0
    assert capsys.readouterr().out == ""  # no TEXTS: no table
    assert (tmp_path / "map.html").read_text(encoding="utf-8").count(" 日</span>") == 3
    assert (tmp_path / "map.png").read_bytes()[:4] == b"\x89PNG"


def test_map_defaults_to_a_held_out_document(run_folder, texts, tmp_path, monkeypatch):
    monkeypatch.setattr(eval_depth, "png_map", lambda *_: None)
    assert run(run_folder, texts, "--map", tmp_path / "map.html") == 0
    assert "code, document 1" in (tmp_path / "map.html").read_text(encoding="utf-8")  # the longest


# -------------------------------------------------------------------------------------------------- errors


BROKEN = {
    "byte 3 is not UTF-8": ("a.txt", b"caf\xe9"),
    "a.jsonl, line 2: damaged JSON": ("a.jsonl", b'{"text": "fine"}\n{"text": \n'),
    'not an object with a text under "text"': ("a.jsonl", b'{"content": "x"}\n'),
    "truncated": ("a.jsonl.zst", zstandard.compress(b'{"text": "x"}\n' * 99)[:-3]),
    "the topic 'a' has no text": ("a.md", b"  \n"),
}


@pytest.mark.parametrize("message", BROKEN)
def test_bad_texts_are_named(run_folder, tmp_path, capsys, message):
    name, raw = BROKEN[message]
    (tmp_path / name).write_bytes(raw)
    assert run(run_folder, tmp_path) == 2
    err = capsys.readouterr().err
    assert message in err and err.startswith("error: ") and err.count("\n") == 1


@pytest.mark.parametrize(
    "main, argv, option",
    [
        (eval_depth.main, ["--checkpoint"], "the argument TEXTS"),
        (evaluate.main, ["perplexity"], "--data FOLDER"),
        (evaluate.main, ["context"], "--data FOLDER"),
    ],
)
def test_a_run_on_conversations_needs_other_text(run_folder, texts, tmp_path, capsys, main, argv, option):
    path = checkpoint.begin(tmp_path / "checkpoints", 7)
    before = checkpoint.find(run_folder)
    checkpoint.write_tensors(path, "model", checkpoint.read_tensors(before, "model"))
    meta = checkpoint.read_meta(before)
    meta["config"] |= {"stage": "dpo", "data": {"path": "data/demo_dpo"}}
    checkpoint.finish(path, meta)
    assert main([*argv, str(tmp_path), "--device", "cpu"]) == 2
    err = capsys.readouterr().err
    assert err == (
        "error: data/demo_dpo: the data of a run of the stage dpo, which is not text; name a folder of text by "
        f"{option}, or a run of the stage pretrain as the checkpoint\n"
    )
    named = [str(texts)] if main == eval_depth.main else ["--data", str(texts)]
    assert main([*argv, str(tmp_path), *named, "--device", "cpu"]) == 0


def test_bad_arguments_are_named(run_folder, texts, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    cases = [
        ([tmp_path / "missing"], "no such file or folder"),
        ([tmp_path / "empty"], "an empty folder"),
        ([], "prepared: no such file or folder"),  # the checkpoint's own data is gone
        ([texts, "--tokens", 0], "--tokens 0"),
        ([texts, "--depth", 4], "--depth 4 is outside 1..3"),
        ([texts, "--map", "map.png"], "must end in .html"),
        ([texts, "--text", "a.txt"], "add --map"),
        (["--map", tmp_path / "map.html", "--text", texts], "no such file; name one"),
        ([texts, "--json", tmp_path / "no" / "a.json"], "does not exist"),
        ([texts, "--checkpoint", texts], "holds no checkpoint"),
    ]
    for argv, message in cases:
        argv = argv if "--checkpoint" in argv else [*argv, "--checkpoint", run_folder]
        assert eval_depth.main([str(a) for a in argv]) == 2, argv
        err = capsys.readouterr().err
        assert message in err and err.startswith("error: ") and err.count("\n") == 1
