"""Conversations: forms, template and masks, preparing, packing without mixing, pairs, and bad input."""

import gzip
import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import chat
import prepare_chat
import prepare_data
from config import ConfigError, from_dict, load
from data import ASSISTANT, EOT, USER, DataError, Prepared, load_tokenizer

ROOT = Path(chat.__file__).parent
SHARED = ROOT.parent / "shared" / "data"
HI = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
TALK = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant: "


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def system(text):
    return {"role": "system", "content": text}


def shown(ids):
    """A row as text, its special tokens readable."""
    names = {EOT: "[end]", USER: "[user]", ASSISTANT: "[assistant]"}
    return "".join(names.get(i) or load_tokenizer().decode([i]) for i in map(int, ids))


def write(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {"files": str(path)}


def configuration(kind, sources, val=(), out="out", rows=0, **keys):
    domains = {"d": {"sources": sources, "val": list(val), "rows": rows}}
    raw = {"kind": kind, "out": str(out), "domains": domains, "val_fraction": 0.0, **keys}
    return from_dict(raw, prepare_chat.ChatConfig, "test")


def prepare(kind, sources, val=(), **keys):
    config = configuration(kind, sources, val, **keys)
    manifest = prepare_chat.prepare(config, 2)
    return chat.Chats.open(config.out, kind), manifest


def dropped(manifest):
    return {k: v for source in manifest["domains"]["d"]["sources"] for k, v in source["dropped"].items()}


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def conversations(n, seed=0, longest=60):
    """Rows of one to three turns that all differ."""
    r = random.Random(seed)

    def text(i):
        return f"{i} " + " ".join(r.choices("seven rivers cross the quiet plain".split(), k=r.randint(1, longest)))

    return [
        {"messages": [m for _ in range(r.randint(1, 3)) for m in (user(text(i)), assistant(text(i)))]} for i in range(n)
    ]


# forms

SFT = {
    "messages": ({"messages": HI, "source": "x"}, HI),
    "messages with null columns": ({"messages": HI, "prompt": None, "chosen": None}, HI),
    "instruction": ({"instruction": "Add", "input": "1 2", "output": "3"}, [user("Add\n\n1 2"), assistant("3")]),
    "instruction, empty input": ({"instruction": "Add", "input": "", "output": "3"}, [user("Add"), assistant("3")]),
    "dolly": ({"instruction": "Add", "context": "1 2", "response": "3"}, [user("Add\n\n1 2"), assistant("3")]),
    "prompt": ({"prompt": "Hi", "response": " Hello\n"}, HI),
    "an end that is written out": ({"prompt": "Hi", "response": "Hello <|endoftext|>\n"}, HI),
    "not so of a user": ({"messages": [user("Hi<|endoftext|>"), HI[1]]}, [user("Hi<|endoftext|>"), HI[1]]),
    "prompt and completion": ({"prompt": "Hi", "completion": "Hello"}, HI),
    "prompt and completion as messages": ({"prompt": HI[:1], "completion": HI[1:]}, HI),
    "transcript": ({"prompt": "\n\nHuman: Hi\n\nAssistant:", "response": " Hello"}, HI),
    "question": ({"question": "Hi", "answer": "Hello"}, HI),
    "orca": (
        {"id": "f", "system_prompt": "Be brief", "question": "Hi", "response": "Hello"},
        [system("Be brief"), *HI],
    ),
    "orca without": ({"system_prompt": "", "question": "Hi", "response": "Hello"}, HI),
    "hermes": (
        {"conversations": [{"from": f, "value": v} for f, v in (("system", "S"), ("human", "Hi"), ("gpt", "Hello"))]},
        [system("S"), *HI],
    ),
    "neighbours are joined": ({"messages": [user("Hi "), user(" you"), HI[1]]}, [user("Hi\n\nyou"), HI[1]]),
    "alpaca's template is taken off": (
        {
            "prompt": "Below is an instruction that describes a task, paired with an input. Write a response.\n\n"
            "### Instruction:\nAdd\n\n### Input:\n1 2\n\n### Response:\n",
            "response": "3",
        },
        [user("Add\n\n1 2"), assistant("3")],
    ),
}


def test_every_form_of_conversation():
    for name, (row, wanted) in SFT.items():
        assert chat.conversation(row) == wanted, name


PAIRS = {
    "strings": {"prompt": "Hi", "chosen": "yes", "rejected": "no"},
    "ends that are written out": {"prompt": "Hi", "chosen": "yes<|endoftext|>", "rejected": "no<|endoftext|>"},
    "messages": {"prompt": [user("Hi")], "chosen": [assistant("yes")], "rejected": [assistant("no")]},
    "whole messages (UltraFeedback)": {
        "prompt": "Hi",
        "chosen": [user("Hi"), assistant("yes")],
        "rejected": [user("Hi"), assistant("no")],
        "messages": HI,
    },
    "implicit prompt (TRL)": {"chosen": [user("Hi"), assistant("yes")], "rejected": [user("Hi"), assistant("no")]},
    "LLaMA-Factory": {
        "conversations": [{"from": "human", "value": "Hi"}],
        "chosen": {"from": "gpt", "value": "yes"},
        "rejected": {"from": "gpt", "value": "no"},
    },
    "transcripts": {"chosen": "\n\nHuman: Hi\n\nAssistant: yes", "rejected": "\n\nHuman: Hi\n\nAssistant: no"},
    "transcript as prompt": {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " yes", "rejected": " no"},
    "question": {"question": "Hi", "chosen": "yes", "rejected": "no", "system": ""},
}


def test_every_form_of_pair():
    for name, row in PAIRS.items():
        assert chat.preference(row) == ([user("Hi")], [assistant("yes")], [assistant("no")]), name


def test_transcripts_share_the_longest_prompt():
    pair = chat.preference({"chosen": TALK + "A Human: no marker", "rejected": TALK + "B"})
    assert pair == ([*HI, user("Why?")], [assistant("A Human: no marker")], [assistant("B")])
    same = chat.preference({"chosen": TALK + "A", "rejected": TALK + "A"})
    assert same.chosen == same.rejected == [assistant("A")]


WRONG = {
    "unknown keys": ("sft", {"text": "x"}, "no conversation in the keys text; known forms: messages; conversations;"),
    "no answer": ("sft", {"instruction": "x", "input": ""}, "in the keys instruction, input; known forms"),
    "a pair": ("sft", {"prompt": "x", "chosen": "a", "rejected": "b"}, "kind = 'preference'"),
    "role": ("sft", {"messages": [{"role": "tool", "content": "x"}]}, "message 0 has the role 'tool'"),
    "role of no use": ("sft", {"messages": [{"role": ["user"], "content": "x"}]}, "message 0 has the role ['user']"),
    "content": ("sft", {"messages": [{"role": "user", "content": 3}]}, "message 0 has no text: its content is int"),
    "not messages": ("sft", {"messages": "Hi"}, "the conversation is str, not a list"),
    "not a message": ("sft", {"messages": ["Hi"]}, "message 0 is str"),
    "surrogate": ("sft", {"prompt": "\ud800", "response": "x"}, "surrogate"),
    "no rejected": ("preference", {"prompt": "x", "chosen": "y"}, "no 'rejected' in the keys prompt, chosen; known"),
    "no prompt": ("preference", {"chosen": "x", "rejected": "y"}, "no prompt in the keys chosen, rejected"),
}


@pytest.mark.parametrize("kind, row, message", WRONG.values(), ids=WRONG)
def test_wrong_rows_are_one_line_that_names_them(kind, row, message, capsys):
    good = PAIRS["strings"] if kind == "preference" else {"messages": HI}
    lines = f'kind = "{kind}"\nout = "out"\nval_fraction = 0.0\n[domains.d]\nsources = [{{ files = "x.jsonl" }}]\n'
    Path("c.toml").write_text(lines)
    write("x.jsonl", [good, row])
    assert prepare_data.main(["c.toml"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: x.jsonl:2: ") and message in error and error.count("\n") == 1
    assert sorted(p.name for p in Path().iterdir()) == ["c.toml", "x.jsonl"]
    assert prepare_data.main(["c.toml", "--on_error=skip"]) == 0
    manifest = json.loads(Path("out/manifest.json").read_text())
    assert manifest["train"]["rows"] == 1 and dropped(manifest) == {"bad": 1}


# template


def test_template_masks_and_targets():
    ids, mask = chat.encode([user("Hi there"), assistant("Hello!"), user("Bye"), assistant("Ciao")])
    assert ids.dtype == np.uint16 and mask.dtype == bool
    assert shown(ids) == "[end][user]Hi there[assistant]Hello![user]Bye[assistant]Ciao"
    after = chat.targets(ids, mask)
    assert shown(after[mask]) == "Hello![end]Ciao[end]"
    assert shown(ids[mask]) == "[assistant]Hello![assistant]Ciao"
    untrained = ~mask
    untrained[-1] = False
    assert (after[untrained] == np.append(ids[1:], 0)[untrained]).all()
    assert after.dtype == ids.dtype and (chat.targets(np.stack([ids, ids]), np.stack([mask, mask])) == after).all()


def test_the_inputs_of_a_conversation_hold_one_end_of_text_and_user_turns_are_never_trained():
    for row in conversations(50):
        ids, mask = chat.encode(row["messages"])
        assert ids[0] == EOT and (ids[1:] != EOT).all()
        after, answers = chat.targets(ids, mask), [m["content"] for m in row["messages"][1::2]]
        assert shown(after[mask]) == "".join(text + "[end]" for text in answers)
        assert not (after[mask] == USER).any() and not (after[mask] == ASSISTANT).any()
        assert mask.sum() == sum(len(load_tokenizer().encode_ordinary(text)) + 1 for text in answers)


def test_system_text_opens_the_next_user_turn():
    assert shown(chat.encode([system("S"), user("Hi"), assistant("A")])[0]) == "[end][user]S\n\nHi[assistant]A"
    assert shown(chat.encode([system("S"), assistant("A")])[0]) == "[end][user]S[assistant]A"
    ids, mask = chat.encode([system(""), user("Hi")], answer=True)
    assert shown(ids) == "[end][user]Hi[assistant]" and mask.tolist() == [False, False, False, True]


def test_weight_zero_excludes_an_answer():
    ids, mask = chat.encode(
        chat.conversation({"messages": [user("a"), assistant("b", weight=0), user("c"), assistant("d")]})
    )
    assert shown(chat.targets(ids, mask)[mask]) == "d[end]"


def test_markers_in_texts_stay_text():
    r = random.Random(3)
    pieces = [
        "<|user|>",
        "<|assistant|>",
        "<|endoftext|>",
        "<|",
        "|>",
        "<|end",
        "oftext|>",
        " ",
        "\n",
        "é",
        "\u200b",
        "x",
    ]
    for _ in range(300):
        texts = ["".join(r.choices(pieces, k=r.randint(1, 12))).strip() or "x" for _ in range(4)]
        ids, mask = chat.encode([system(texts[0]), user(texts[1]), assistant(texts[2]), user(texts[3])])
        special = [int(i) for i in ids if i >= EOT]
        assert special == [EOT, USER, ASSISTANT, USER]
        plain = load_tokenizer().encode_ordinary(texts[2])
        assert chat.targets(ids, mask)[mask].tolist() == [*plain, EOT]
        parts = [load_tokenizer().decode(part[1:].tolist()) for part in np.split(ids, np.flatnonzero(ids >= EOT)[1:])]
        assert parts[1:] == [f"{texts[0]}\n\n{texts[1]}", *texts[2:]]


# preparing


def test_rows_are_dropped_and_counted_by_reason():
    rows = [
        {"messages": HI},
        {"messages": HI},
        {"messages": [user("Hi"), assistant("  ")]},
        {"prompt": " ", "response": "x"},
        {"messages": []},
        {"messages": [user("Hi")]},
        {"messages": [user("Hi"), assistant("no", weight=0)]},
        {"messages": [user("Hi"), assistant("word " * 50)]},
        {"messages": [user("held"), assistant("another answer")]},
        {"messages": [user("kept"), assistant("yes"), user("thanks")]},
    ]
    val = [{"messages": [user("held"), assistant("out")]}]
    chats, manifest = prepare("sft", [write("x.jsonl", rows)], [write("v.jsonl", val)], max_tokens=30)
    assert dropped(manifest) == {"empty": 3, "masked": 2, "too_long": 1, "duplicate": 1, "held_out": 1}
    assert manifest["domains"]["d"]["sources"][1]["read"] == 10
    data = chats.split("train")
    assert [shown(data.row(i)[0]) for i in range(2)] == [
        "[end][user]Hi[assistant]Hello",
        "[end][user]kept[assistant]yes",
    ]
    ids, mask = data.row(1)
    assert manifest["train"] == {"rows": 2, "tokens": 10, "trained": 4} and mask.tolist() == [False] * 3 + [True] * 2
    assert shown(chats.split("val").row(0)[0]) == "[end][user]held[assistant]out"


def test_pairs_are_dropped_and_masked():
    pair = PAIRS["strings"]
    rows = [
        pair,
        pair,
        pair | {"rejected": " yes"},
        pair | {"chosen": ""},
        pair | {"rejected": "word " * 50},
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: d"},
        {"chosen": TALK + "A", "rejected": TALK + "B"},
    ]
    chats, manifest = prepare("preference", [write("x.jsonl", rows)], max_tokens=30)
    assert dropped(manifest) == {"duplicate": 1, "equal": 1, "empty": 1, "too_long": 1, "no_prompt": 1}
    data = chats.split("train")
    found = [(shown(ids), shown(chat.targets(ids, mask)[mask])) for ids, mask in map(data.row, range(4))]
    history = "[end][user]Hi[assistant]Hello[user]Why?[assistant]"
    assert found == [
        ("[end][user]Hi[assistant]yes", "yes[end]"),
        ("[end][user]Hi[assistant]no", "no[end]"),
        (history + "A", "A[end]"),
        (history + "B", "B[end]"),
    ]


def test_the_split_keeps_equal_prompts_together_and_follows_the_seed():
    rows = [{"prompt": f"question {i // 2}", "response": f"answer {i}"} for i in range(400)]
    chats, _ = prepare("sft", [write("x.jsonl", rows)], val_fraction=0.2)

    def prompts(chats, split):
        data = chats.split(split)
        return {shown(data.row(i)[0]).split("[assistant]")[0] for i in range(len(data.index))}

    held_out, train = prompts(chats, "val"), prompts(chats, "train")
    assert not held_out & train and len(held_out | train) == 200 and 20 < len(held_out) < 60
    again, _ = prepare("sft", [{"files": "x.jsonl"}], val_fraction=0.2, out="again")
    other, _ = prepare("sft", [{"files": "x.jsonl"}], val_fraction=0.2, out="other", seed=1)
    assert prompts(again, "val") == held_out != prompts(other, "val")
    for name in again.manifest["files"]:
        assert Path("again", name).read_bytes() == Path("out", name).read_bytes()


def test_json_lists_limits_and_the_same_command_again(capsys):
    Path("x.json").write_text(json.dumps([row for row in conversations(9)]))
    chats, manifest = prepare("sft", [{"files": "x.json"}], rows=5)
    assert manifest["train"]["rows"] == 5
    Path("x.json").unlink()
    assert prepare("sft", [{"files": "x.json"}], rows=5)[1] == json.loads(json.dumps(manifest))
    assert "already prepared" in capsys.readouterr().out
    with pytest.raises(DataError, match="another config .config.seed: 1337 -> 2"):
        prepare("sft", [{"files": "x.json"}], rows=5, seed=2)


BAD_FILES = {
    "missing": ("y.jsonl", b"x", "x.jsonl: no file there"),
    "empty": ("x.jsonl", b"", "x.jsonl: the file is empty"),
    "broken": ("x.jsonl", json.dumps({"messages": HI}).encode() + b'\n{"messages": [', "x.jsonl:2: broken JSON"),
    "not an object": ("x.jsonl", b"[1]\n", "x.jsonl:1: not a JSON object"),
    "all masked": (
        "x.jsonl",
        b'{"messages": [{"role": "user", "content": "Hi"}]}\n',
        "no training row is left (masked 1)",
    ),
    "all empty": ("x.jsonl", b'{"prompt": "", "response": ""}\n', "domain 'd': no training row is left (empty 1)"),
    "gzip": ("x.jsonl", gzip.compress(b"{}"), "x.jsonl:1: not UTF-8"),
}


@pytest.mark.parametrize("name, content, message", BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files_are_one_line_and_exit_code_2(name, content, message, capsys):
    Path(name).write_bytes(content)
    Path("c.toml").write_text('kind = "sft"\nout = "o"\n[domains.d]\nsources = [{ files = "x.jsonl" }]\n')
    assert prepare_data.main(["c.toml"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(Path().glob("o*"))


def test_bad_configs_and_folders(capsys):
    write("x.jsonl", [{"messages": HI}])
    Path("c.toml").write_text('kind = "stf"\nout = "o"\n[domains.d]\nsources = [{ files = "x.jsonl" }]\n')
    assert prepare_data.main(["c.toml"]) == 2
    assert "did you mean 'sft'" in capsys.readouterr().err
    assert prepare_data.main(["c.toml", "--kind=sft", "--val_fraction=0"]) == 0
    assert prepare_data.main(["c.toml", "--kind=sft", "--val_fraction=0", "--verify"]) == 0
    with pytest.raises(DataError, match="holds sft, not preference"):
        chat.Chats.open("o", "preference")
    with pytest.raises(DataError, match="holds sft data, not pretraining text"):
        Prepared.open("o")
    with pytest.raises(DataError, match="no val rows"):
        chat.ChatRows(chat.Chats.open("o"), "val", 1, 8, 0)
    with pytest.raises(DataError, match="not pairs"):
        chat.PreferencePairs(chat.Chats.open("o"), "train", 1, 2, 64, 0)
    with pytest.raises(DataError, match="not prepared yet"):
        chat.Chats.open("nothing")
    Path("text").mkdir()
    Path("text/manifest.json").write_text('{"version": 1}')
    with pytest.raises(DataError, match="holds pretraining text, not sft"):
        chat.Chats.open("text", "sft")
    ids = Path("o/train/ids.bin")
    ids.write_bytes(b"\1" + ids.read_bytes()[1:])
    assert prepare_data.main(["c.toml", "--kind=sft", "--val_fraction=0", "--verify"]) == 2
    assert "ids.bin: altered" in capsys.readouterr().err
    ids.write_bytes(b"")
    with pytest.raises(DataError, match="ids.bin: missing or not of its size"):
        chat.Chats.open("o")
    Path("full").mkdir()
    Path("full/thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="is no prepared data"):
        prepare("sft", [{"files": "x.jsonl"}], out="full")
    with pytest.raises(ConfigError, match="gives text; a package needs extract"):
        configuration("sft", [{"generated": "arithmetic"}])


# reading


def streams(batches):
    """The (tokens, targets, weights) of every stream, joined along time."""
    return [np.concatenate(parts, 1) for parts in zip(*batches)]


def pieces(tokens, *others):
    """(tokens, ...) of every conversation in one stream; lone padding is left out."""
    cuts = np.flatnonzero(tokens == EOT)
    return [doc for doc in zip(*(np.split(x, cuts)[1:] for x in (tokens, *others))) if len(doc[0]) > 1]


def documents(batches):
    return [doc for row in zip(*streams(batches)) for doc in pieces(*row)]


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chats")
    source = write(folder / "x.jsonl", conversations(40))
    return prepare("sft", [source], out=folder / "out")[0]


def test_every_conversation_comes_once_an_epoch_whole_and_with_its_targets(chats):
    data, wanted = chats.split("train"), {}
    for i in range(len(data.index)):
        ids, mask = data.row(i)
        wanted[tuple(ids.tolist())] = (chat.targets(ids, mask).tolist(), mask.tolist())
    for segment, epochs in ((16, 1), (1000, 1), (37, 2)):
        reader = chat.ChatRows(chats, "train", 3, segment, seed=5, epochs=epochs)
        batches = list(reader)
        assert batches[0][0].dtype == batches[0][1].dtype == np.int64 and batches[0][2].dtype == np.float32
        assert all(x.shape == (3, segment) for batch in batches for x in batch) and reader.epoch == epochs
        found = documents(batches)
        assert sorted(tuple(doc[0].tolist()) for doc in found) == sorted(epochs * list(wanted))
        for tokens, after, weights in found:
            assert (after.tolist(), weights.tolist()) == wanted[tuple(tokens.tolist())]
        assert sum(batch[2].sum() for batch in batches) == epochs * chats.manifest["train"]["trained"]
    padding = sum((batch[0] == EOT).sum() for batch in batches) - 2 * 40
    assert padding < 2 * max(data.index[:, 1]) + 3 * 37, "streams end about together"


def test_epochs_differ_and_follow_the_seed(chats):
    def order(seed, epochs):
        reader = chat.ChatRows(chats, "train", 1, 50, seed, epochs)
        return [tuple(doc[0].tolist()) for doc in documents(reader)]

    twice = order(1, 2)
    assert twice[:40] == order(1, 1) != order(2, 1)
    assert twice[:40] != twice[40:] and sorted(twice[:40]) == sorted(twice[40:])


def test_packing_resumes_exactly(chats):
    reader = chat.ChatRows(chats, "train", 3, 24, seed=1)
    for _ in range(70):
        next(reader)
    state = json.loads(json.dumps(reader.state()))
    assert state["epoch"] >= 1 and any(position for row, position in state["place"] if row >= 0), "inside a row"
    wanted = [next(reader) for _ in range(60)]
    again = chat.ChatRows(chats, "train", 3, 24, seed=1)
    again.load_state(state)
    for batch in wanted:
        for x, y in zip(batch, next(again)):
            assert (x == y).all()


@torch.no_grad()
def test_logits_do_not_depend_on_neighbours_and_long_rows_flow_through_memory(tiny_model):
    chats, _ = prepare("sft", [write("x.jsonl", conversations(16, seed=2))])
    model, longest = tiny_model(), int(chats.split("train").index[:, 1].max())
    memory, parts = model.new_memory(2, longest), []
    assert longest > 3 * 48
    for tokens, after, weights in chat.ChatRows(chats, "train", 2, 48, 0, epochs=1):
        out = model(torch.from_numpy(tokens), torch.from_numpy(after), memory, weights=torch.from_numpy(weights))
        memory = out.memory
        parts.append((tokens, after, out.nll.numpy(), out.depth.numpy()))
    found = [doc for row in zip(*streams(parts)) for doc in pieces(*row)]
    assert len(found) == 16
    for ids, target, packed, depth in found:
        alone = model(torch.from_numpy(ids)[None], torch.from_numpy(target)[None])
        np.testing.assert_allclose(alone.nll[0].numpy(), packed, atol=2e-4)
        assert (alone.depth[0].numpy() == depth).all()


@torch.no_grad()
def test_the_second_answer_sees_the_first_turn(tiny_model):
    model = tiny_model()

    def last(first):
        ids, _ = chat.encode([user(first), assistant("Yes."), user("Why?")], answer=True)
        return model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0, -1, :EOT]

    assert (last("Is it 1?") - last("Is it 2?")).abs().max() > 1e-3


# pairs


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    rows = [
        {"prompt": f"p{i}", "chosen": "good " * (1 + i * 7 % 90), "rejected": "bad " * (1 + i % 50)} for i in range(101)
    ]
    return prepare("preference", [write(folder / "x.jsonl", rows)], out=folder / "out")[0]


def test_every_pair_comes_once_an_epoch_whole_and_packed(pairs):
    data = pairs.split("train")
    reader = chat.PreferencePairs(pairs, "train", parts=2, rows=3, segment=128, seed=3, epochs=1)
    batches = list(reader)
    assert len(batches) == len(reader) and {len(batch) for batch in batches} == {2}
    parts = [part for batch in batches for part in batch]
    assert sorted(pair for part in parts for pair in part.pairs) == list(range(101))
    for part in parts:
        assert part.tokens.shape == part.targets.shape == part.sequence.shape == (3, 128)
        assert set(part.sequence.flatten()) <= {-1, *range(2 * len(part.pairs))}
        for i, pair in enumerate(part.pairs):
            for side in range(2):
                ids, mask = data.row(2 * pair + side)
                answer = part.sequence == 2 * i + side
                (row,) = set(np.nonzero(answer)[0])
                start = int(np.nonzero(answer)[1][0]) - int(np.argmax(mask))
                assert (part.tokens[row, start : start + len(ids)] == ids).all()
                written = shown(part.targets[answer])
                assert re.fullmatch(r"(good ?)+\[end\]" if side == 0 else r"(bad ?)+\[end\]", written)
    full = [part for part in parts[:-2] if len(part.pairs)]
    assert np.mean([(part.tokens != EOT).mean() for part in full]) > 0.7, "rows are packed"


def test_pairs_resume_exactly(pairs):
    reader = chat.PreferencePairs(pairs, "train", 2, 3, 128, seed=3)
    epoch = len(list(chat.PreferencePairs(pairs, "train", 2, 3, 128, seed=3, epochs=1)))
    for _ in range(epoch + 2):
        next(reader)
    state = json.loads(json.dumps(reader.state()))
    assert state == {"epoch": 1, "nth": 2}
    again = chat.PreferencePairs(pairs, "train", 2, 3, 128, seed=3)
    again.load_state(state)
    for _ in range(epoch):
        for here, there in zip(next(reader), next(again)):
            assert all((x == y).all() for x, y in zip(here, there))


def test_pairs_that_do_not_fit_are_refused(pairs):
    longest = int(pairs.split("train").index[:, 1].max())
    with pytest.raises(DataError, match=f"longest row of {longest} tokens does not fit into {longest - 1}"):
        chat.PreferencePairs(pairs, "train", 1, 4, longest - 1, 0)
    with pytest.raises(DataError, match=f"does not fit into one row of {longest}"):
        chat.PreferencePairs(pairs, "train", 1, 1, longest, 0)


@torch.no_grad()
def test_neighbours_do_not_change_a_pair(pairs, tiny_model):
    model, rows = tiny_model(), pairs.split("train")
    (part,) = next(chat.PreferencePairs(pairs, "train", 1, 4, 128, seed=3))
    nll = model(torch.from_numpy(part.tokens), torch.from_numpy(part.targets)).nll.numpy()
    for i, pair in enumerate(part.pairs):
        for side in range(2):
            ids, mask = rows.row(2 * pair + side)
            target = chat.targets(ids, mask).astype(np.int64)
            alone = model(torch.from_numpy(ids.astype(np.int64))[None], torch.from_numpy(target)[None]).nll[0].numpy()
            np.testing.assert_allclose(alone[mask], nll[part.sequence == 2 * i + side], atol=2e-4)


# the configs of the repository


@pytest.mark.parametrize("name, train, val", [("sft_shared", 51_700, 4_390), ("dpo_shared", 26_500, 2_000)])
def test_shared_configs_prepare_fully(name, train, val, monkeypatch, tmp_path):
    if not SHARED.exists():
        pytest.skip("no ../shared/data here")
    monkeypatch.chdir(ROOT)
    config = load(ROOT / f"configs/data/{name}.toml", prepare_chat.ChatConfig, [f"--out={tmp_path}/out"])
    manifest = prepare_chat.prepare(config, 2)
    assert manifest["train"]["rows"] > train and manifest["val"]["rows"] > val
    for domain in manifest["domains"].values():
        for source in domain["sources"]:
            assert sum(source["dropped"].values()) <= 0.15 * source["read"] and "bad" not in source["dropped"]
    chats = chat.Chats.open(tmp_path / "out")
    for split in ("train", "val"):
        data = chats.split(split)
        starts = np.flatnonzero(data.ids[:] == EOT)
        assert (starts == data.index[:, 0]).all(), "every row opens with the one <|endoftext|> that it holds"


@pytest.mark.parametrize("name", ["sft_mix", "dpo_ultrafeedback"])
def test_other_configs_are_valid(name):
    config = load(ROOT / f"configs/data/{name}.toml", prepare_chat.ChatConfig)
    assert all(source.hub and source.licence for domain in config.domains.values() for source in domain.sources)
    assert "NOT RUN HERE" in (ROOT / f"configs/data/{name}.toml").read_text()
