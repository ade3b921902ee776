"""Our model in lm-evaluation-harness: the same numbers as a direct forward pass, and exact scores of known logits."""

import gzip
import importlib
import json
import math
import socket
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

import data
import decoding
import evaluate
import sample
import zeroshot
from model import ALL

EOT = data.EOT
V = data.VOCAB_SIZE


def encode(text):
    return data.load_tokenizer().encode_ordinary(text)


def instances(kind, *arguments):
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model()


# -------------------------------------------------------------------------------------------------- requests

PAIRS = [
    ("The cat sat on the", " mat"),
    ("", "A text without any context"),
    ("Trailing spaces belong to the answer:  ", "yes, they do"),
    ("One little bird, two little birds. " * 9, " three little birds, four"),
    ("Question: 1 + 1?\nAnswer:", " 2"),
    ("def f(x):\n", "    return x\n" * 7),
]


def direct(model, context, continuation, depth=None):
    """The continuation's log-likelihood, whether it is greedy, and its depths, by one forward pass."""
    n = len(encode(context + continuation)) - len(encode(context.rstrip()))
    tokens = torch.tensor([[EOT, *encode(context + continuation)]])
    with torch.no_grad():
        out = model(tokens[:, :-1], depth=depth)
    logits, targets = out.logits[0, -n:].double(), tokens[0, -n:]
    ll = logits.log_softmax(-1).gather(-1, targets[:, None]).sum()
    return float(ll), bool((logits.argmax(-1) == targets).all()), out.depth[0, -n:].tolist()


@pytest.mark.parametrize("batch_tokens, segment", [(1, 512), (2048, 512), (300, 512), (2048, 32), (70, 7)])
@pytest.mark.parametrize("depth", [None, 2])
def test_loglikelihood_is_that_of_a_direct_forward(model, batch_tokens, segment, depth):
    harness = zeroshot.Harness(model, 512, segment, depth, batch_tokens)
    requests = instances("loglikelihood", *PAIRS)
    requests[0].task_name = "one"
    found, expected = harness.loglikelihood(requests), [direct(model, *pair, depth) for pair in PAIRS]
    assert [ll for ll, _ in found] == pytest.approx([ll for ll, _, _ in expected], rel=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy, _ in expected]
    assert harness.depths["one"] == [sum(expected[0][2]), len(expected[0][2])]
    assert harness.depths[None] == [sum(sum(d) for *_, d in expected[1:]), sum(len(d) for *_, d in expected[1:])]


def test_greedy_is_seen(model):
    text, answer = "The cat sat on the", next(decoding.generate(model, [EOT, *encode("The cat")], 1, temperature=0))[0]
    word = data.load_tokenizer().decode([answer])
    harness = zeroshot.Harness(model, 64, 64)
    ((_, yes),) = harness.loglikelihood(instances("loglikelihood", ("The cat", word)))
    ((_, no),) = harness.loglikelihood(instances("loglikelihood", (text, word + word)))
    assert encode("The cat" + word)[-1] == answer and yes and not no


def test_rolling_scores_the_whole_text(model):
    texts = [context + continuation for context, continuation in PAIRS]
    found = zeroshot.Harness(model, 512, 32).loglikelihood_rolling(
        instances("loglikelihood_rolling", *[(t,) for t in texts])
    )
    assert found == pytest.approx([direct(model, "", text)[0] for text in texts], rel=1e-4)


@pytest.mark.parametrize("segment, batch_tokens", [(512, 4096), (16, 4096), (512, 1)])
def test_answers_are_those_of_sample(model, segment, batch_tokens):
    contexts = [context for context, _ in PAIRS if context]
    until = {"until": ["zzz"], "max_gen_toks": 12, "do_sample": False}
    harness = zeroshot.Harness(model, 512, segment, batch_tokens=batch_tokens)
    found = harness.generate_until(instances("generate_until", *[(context, until) for context in contexts]))
    steps = []
    for context, answer in zip(contexts, found):
        drawn = [*decoding.generate(model, [EOT, *encode(context)], 12, temperature=0)]
        assert answer == data.load_tokenizer().decode([token for token, _ in drawn])
        steps += [depth for _, depth in drawn]
    assert harness.depths[None] == [sum(steps), len(steps)]


def test_answers_end_at_stop_strings_and_limits(model):
    harness = zeroshot.Harness(model, 64, 64)
    ask = lambda **settings: harness.generate_until(instances("generate_until", ("The cat", settings)))[0]  # noqa: E731
    whole = ask(until=[], max_gen_toks=8)
    drawn = [token for token, _ in decoding.generate(model, [EOT, *encode("The cat")], 8, temperature=0)]
    assert whole == data.load_tokenizer().decode(drawn)
    assert ask(until=[], max_gen_toks=3) == data.load_tokenizer().decode(drawn[:3])
    middle = whole[len(whole) // 2 :]
    assert ask(until=["never", middle], max_gen_toks=8) == whole[: whole.find(middle)]
    assert ask(until=middle, max_gen_toks=8) == whole[: whole.find(middle)]
    with pytest.raises(sample.InputError, match="sampled"):
        ask(until=[], do_sample=True, temperature=0.8)


# -------------------------------------------------------------------------------------------------- known logits


class Known:
    """A model that after a token gives another one the probability of `rules`, and all the rest the same."""

    def __init__(self, **rules):
        self.config = SimpleNamespace(document_start=EOT, cross_documents=False, vocab_size=V)
        self.embedding = SimpleNamespace(weight=torch.zeros(1))
        self.rules = {encode(a)[-1]: (encode(b)[0], p) for a, (b, p) in rules.items()}

    def new_memory(self, batch, length):
        return None

    def __call__(self, tokens, targets=None, memory=None, depth=None, keep=ALL):
        logits = torch.zeros(*tokens.shape, V)
        for token, (following, p) in self.rules.items():
            logits[tokens == token, following] = math.log(p / (1 - p) * (V - 1))
        return SimpleNamespace(logits=logits[keep], depth=torch.where(tokens == EOT, 1, 3), memory=None)


def write(folder, name, *rows):
    file = folder / zeroshot.LOCAL[name][0]
    (gzip.open if file.suffix == ".gz" else open)(file, "wt").write("\n".join(map(json.dumps, rows)))


def test_known_logits_score_exactly_what_they_must(tmp_path):
    write(tmp_path, "lambada", {"text": "There the cat sat"}, {"text": "And then a dog ran"})
    international = {"query": "Question: Which?\nAnswer:", "choices": ["yes", "international"], "gold": 0}
    write(tmp_path, "arc_easy", international, international | {"gold": 1})
    write(tmp_path, "arc_challenge", *[international] * 3)
    row = {"activity_label": "Sit", "ctx_a": "A cat.", "ctx_b": "the cat", "label": 1}
    write(tmp_path, "hellaswag", row | {"endings": ["ran", "sat", "ate", "was"]})
    harness = zeroshot.Harness(Known(**{" cat": (" sat", 0.9), " dog": (" ate", 0.8), ":": (" yes", 0.01)}), 64, 64)
    table = zeroshot.evaluate_tasks(harness, list(zeroshot.CARD), tmp_path)
    rest = 0.2 / (V - 1)
    assert table["lambada"]["acc"] == pytest.approx([0.5, 0.5])  # the error of 0 and 1: sqrt(0.5 / 2)
    # 50,257 equal terms all round alike in a float32 sum, more or less by the width of the processor's registers
    assert table["lambada"]["perplexity"][0] == pytest.approx(math.exp(-(math.log(0.9) + math.log(rest)) / 2), rel=1e-3)
    # " yes" is likelier than " international", but not by the character
    assert table["arc_easy"]["acc"] == table["arc_easy"]["acc_norm"] == pytest.approx([0.5, 0.5])
    assert table["arc_challenge"]["acc"] == [1, 0] and table["arc_challenge"]["acc_norm"] == [0, 0]
    assert table["hellaswag"]["acc"][0] == 1 and table["hellaswag"]["documents"] == 1
    assert [table[name]["depth"] for name in zeroshot.CARD] == [3] * 4
    assert table["macro"]["acc"][0] == pytest.approx((0.5 + 1 + 0.5 + 1) / 4)
    assert table["macro"]["acc_norm"][0] == pytest.approx((0.5 + 1 + 0.5 + 0) / 4)
    assert zeroshot.as_table(table)[-2][:3] == ["macro", "8", "acc"]


def test_other_tasks_of_known_logits(tmp_path):
    write(tmp_path, "winogrande", {"sentence": "The cat and the dog: _ ate.", "option1": "cat", "option2": "dog",
                                   "answer": "2"})  # fmt: skip
    write(tmp_path, "piqa", {"query": "Question: Which?\n", "choices": ["no", "yes"], "gold": 1})
    write(tmp_path, "openbookqa", {"query": "A cat", "choices": ["ran", "sat"], "gold": 0})
    write(tmp_path, "mmlu", {"subject": "high_school_x", "question": "Which?", "choices": list("wxyz"), "answer": 2})
    write(tmp_path, "gsm8k", {"question": "What is 40 + 2?", "answer": "It is 42.\n#### 42"})
    rules = {" dog": (" ate", 0.8), " cat": (" sat", 0.9), ":": (" yes", 0.3)}
    found = zeroshot.evaluate_tasks(zeroshot.Harness(Known(**rules), 64, 64),
                                    ["winogrande", "piqa", "openbookqa"], tmp_path)  # fmt: skip
    assert [found[name]["acc"][0] for name in ("winogrande", "piqa", "openbookqa")] == [1, 1, 0]
    rules = {"Answer:": (" C", 0.3)}
    found = zeroshot.evaluate_tasks(zeroshot.Harness(Known(**rules), 64, 64), ["mmlu"], tmp_path)
    assert found["mmlu"]["acc"][0] == 1
    rules = {"Answer:": ("####", 0.9), "####": (" 42", 0.9), " 42": ("<", 0.9), "<": ("Question", 0.9)}
    rules["Question"] = (":", 0.9)
    harness = zeroshot.Harness(Known(**rules), 64, 64)
    harness.model.rules[encode(":")[0]] = (encode("####")[0], 0.9)
    found = zeroshot.evaluate_tasks(harness, ["gsm8k"], tmp_path)
    assert found["gsm8k"]["exact_match (strict-match)"][0] == found["gsm8k"]["exact_match (flexible-extract)"][0] == 1


def test_prompts_are_those_of_the_harness():
    hellaswag = importlib.import_module("lm_eval.tasks.hellaswag.utils")
    winogrande = importlib.import_module("lm_eval.tasks.winogrande.preprocess_winogrande")
    row = {"activity_label": "Removing ice", "ctx_a": "Then [header] a man [title] Sits.", "ctx_b": "he  now",
           "endings": ["is [step] off. [title] On", " runs"], "label": 1}  # fmt: skip
    rows = SimpleNamespace(map=lambda process: process(row))
    assert zeroshot.hellaswag(row) == hellaswag.process_docs(rows)
    row = {"sentence": "Sam beat Ann so _ got 1.", "option1": "Sam", "option2": "Ann", "answer": "1"}
    found = zeroshot.winogrande(row)
    assert found["gold"] == winogrande.doc_to_text(row) and found["target"] == winogrande.doc_to_target(row)
    assert found["choices"] == winogrande.doc_to_choice(row)
    assert zeroshot.lambada({"text": "Two words.\nOr three"}) == {"query": "Two words.\nOr", "target": " three"}


# -------------------------------------------------------------------------------------------------- HumanEval


@pytest.fixture
def programs_run(monkeypatch):
    """Our own programs do no harm with a network, where it cannot be cut off."""
    try:
        zeroshot.namespace()
    except sample.InputError:
        monkeypatch.setattr(zeroshot, "namespace", lambda: [])


@pytest.mark.parametrize(
    "program, passed",
    [
        ("assert 1 + 1 == 2", True),
        ("assert 1 + 1 == 3", False),
        ("import sys; sys.exit(0)", False),  # before its end
        ("while True: pass", False),
        ("x = bytearray(2**31)", False),
        ("open('big', 'wb').write(bytes(2**21))", False),
        ("import os; assert not os.environ.get('HOME') and not [f for f in os.listdir() if f != 'program.py']", True),
    ],
)
def test_programs_run_within_limits(programs_run, program, passed):
    assert zeroshot.passes(program, seconds=2) == passed


@pytest.mark.parametrize("user", [True, False])
def test_programs_have_no_network(monkeypatch, user):
    original = subprocess.run
    refused = SimpleNamespace(returncode=1)
    run = lambda command, **named: original(command, **named) if user == ("--user" in command) else refused  # noqa: E731
    zeroshot.namespace.cache_clear()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(subprocess, "run", run)
            found = zeroshot.namespace()
    except sample.InputError:
        pytest.skip("no network namespaces here" if user else "not root")
    finally:
        zeroshot.namespace.cache_clear()
    monkeypatch.setattr(zeroshot, "namespace", lambda: found)
    with socket.create_server(("127.0.0.1", 0)) as server:
        program = f"import socket; socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 1)"
        assert not zeroshot.passes(program)
        monkeypatch.setattr(zeroshot, "namespace", lambda: [])
        assert zeroshot.passes(program)


@pytest.mark.parametrize("lacking", ["program", "permission"])
def test_humaneval_is_refused_where_the_network_cannot_be_cut_off(run_folder, tmp_path, capsys, monkeypatch, lacking):
    write(tmp_path, "humaneval", {"prompt": "def f():", "entry_point": "f", "test": "def check(f):\n    pass\n"})
    if lacking == "program":
        monkeypatch.setattr(zeroshot.shutil, "which", lambda _: None)
    else:
        monkeypatch.setattr(zeroshot.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1))
    monkeypatch.setattr(zeroshot.subprocess, "Popen", lambda *_, **__: pytest.fail("a program was run"))
    monkeypatch.setattr(zeroshot.Harness, "generate_until", lambda *_: pytest.fail("an answer was generated"))
    zeroshot.namespace.cache_clear()
    argv = ["zeroshot", str(run_folder), "--tasks", "humaneval", "--benchmarks", str(tmp_path), "--execute_code"]
    assert evaluate.main([*argv, "--device", "cpu"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: the task 'humaneval' runs code") and err.count("\n") == 1
    assert "the network cannot be cut off" in err and "user namespaces are allowed, or as root" in err
    with pytest.raises(sample.InputError, match="cannot be cut off"):
        zeroshot.passes("pass")


def test_humaneval_of_known_logits(programs_run, tmp_path):
    rules = {" :": (" return", 0.9), " return": (" 42", 0.9), " 42": ("\n", 0.9)}
    model = Known(**rules)
    model.rules[encode("\n")[0]] = (encode("class")[0], 0.9)
    row = {"prompt": "def f() :", "entry_point": "f", "test": "def check(f):\n    assert f() == 42\n"}
    write(tmp_path, "humaneval", row, row | {"test": "def check(f):\n    assert f() == 43\n"})
    found = zeroshot.evaluate_tasks(zeroshot.Harness(model, 64, 64), ["humaneval"], tmp_path, execute=True)
    assert found["humaneval"]["pass@1"] == pytest.approx([0.5, 0.5])


# -------------------------------------------------------------------------------------------------- command


def test_command(run_folder, tmp_path, capsys):
    write(tmp_path, "openbookqa", *[{"query": "A cat", "choices": ["ran", "sat"], "gold": i % 2} for i in range(4)])
    file = tmp_path / "z.json"
    argv = ["zeroshot", str(run_folder), "--tasks", "openbookqa", "--benchmarks", str(tmp_path), "--json", str(file)]
    assert evaluate.main([*argv, "--limit", "2", "--depth", "2", "--device", "cpu"]) == 0
    out, found = capsys.readouterr().out, json.loads(file.read_text())
    assert out.startswith("task") and "openbookqa          2  acc" in out
    assert found["tasks"]["openbookqa"]["acc"] == [0.5, 0.5] and found["tasks"]["openbookqa"]["depth"] == 2
    assert found["limit"] == 2 and found["step"] == 7
    assert found["forced_depth"] == 2 and found["tolerance"] is found["stability"] is None


def test_bad_input_is_one_line(programs_run, run_folder, tmp_path, capsys, monkeypatch):
    none = TaskManager(include_defaults=False)  # to know the harness's own tasks it reads files for 15 seconds
    monkeypatch.setattr(zeroshot, "all_tasks", lambda: none)
    write(tmp_path, "piqa", {"query": "Question: Which?\n", "choices": ["no", "yes"], "gold": 1}, {"query": "x"})
    (tmp_path / zeroshot.LOCAL["mmlu"][0]).write_text("")
    (tmp_path / zeroshot.LOCAL["humaneval"][0]).write_bytes(b"not gzip")
    cases = [
        (["--tasks", "lambada", "--benchmarks", tmp_path], "lambada_test.jsonl: no such file"),
        (["--tasks", "lambada", "--benchmarks", tmp_path / "no"], "no such folder"),
        (["--tasks", "piqa", "--benchmarks", tmp_path], "llmfoundry_piqa.jsonl, line 2: not a row of 'piqa'"),
        (["--tasks", "mmlu", "--benchmarks", tmp_path], "no rows"),
        (["--tasks", "humaneval", "--benchmarks", tmp_path], "add --execute_code"),
        (["--tasks", "humaneval", "--benchmarks", tmp_path, "--execute_code"], "HumanEval.jsonl.gz: "),
        (["--tasks", "no_such_task", "--benchmarks", tmp_path], "no task 'no_such_task'"),
        (["--tasks", ",", "--benchmarks", tmp_path], "names no task"),
        (["--limit", 0], "--limit 0"),
    ]
    for argv, message in cases:
        assert evaluate.main(["zeroshot", str(run_folder), *map(str, argv), "--device", "cpu"]) == 2, argv
        out, err = capsys.readouterr()
        assert out == "" and message in err and err.startswith("error: ") and err.count("\n") == 1, err


def test_shared_benchmarks_are_read():
    folder = Path(__file__).parents[2] / "shared" / "data" / "benchmarks"
    if not folder.is_dir():
        pytest.skip("no shared data here")
    for name in zeroshot.LOCAL:
        assert len(zeroshot.local_task(name, folder, 5).test_docs()) == 5
