"""Decoding against known logits and the full forward; streaming, memory and exit codes of sample.py."""

import io
import re
import sys
from types import SimpleNamespace

import pytest
import torch

import data
import sample
from model import ModelConfig

ON_CPU = ["--device", "cpu"]


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model(vocab_size=300, document_start=0)  # a small vocabulary, where no text is decoded


class Scripted:
    """A model that predicts a fixed sequence of tokens, whatever it reads, at depths 1, 2, 1, 2, ..."""

    def __init__(self, tokens):
        self.tokens, self.read, self.config = tokens, [], ModelConfig(max_depth=4)
        self.embedding = SimpleNamespace(weight=torch.zeros(1))

    def new_memory(self, batch, length):
        return -1  # how many predictions were made

    def __call__(self, tokens, memory, depth):
        self.read.append(tokens.shape[1])
        logits = torch.zeros(1, tokens.shape[1], data.VOCAB_SIZE)
        logits[0, -1, self.tokens[memory + 1]] = 50.0
        depths = torch.full(tokens.shape, 1 + (memory + 1) % 2)
        return SimpleNamespace(logits=logits, depth=depths, memory=memory + 1)


# -------------------------------------------------------------------------------------------------- generate


@pytest.mark.parametrize("depth", [None, 2])
@torch.no_grad()
def test_greedy_equals_argmax_of_the_full_forward(model, depth):
    prompt = [0, *range(40, 60)]
    made = list(sample.generate(model, prompt, 12, temperature=0, memory_length=64, segment=8, depth=depth))
    text = torch.tensor([prompt + [token for token, _ in made]])
    out = model(text, depth=depth)
    logits, start = out.logits[0, :, :300], len(prompt) - 1
    assert [token for token, _ in made] == logits.argmax(-1)[start:-1].tolist()
    assert [spent for _, spent in made] == out.depth[0, start:-1].tolist()
    assert depth is None or {spent for _, spent in made} == {depth}


def test_top_k_1_is_greedy(model):
    greedy = list(sample.generate(model, [0, 5], 20, temperature=0))
    assert list(sample.generate(model, [0, 5], 20, temperature=5.0, top_k=1)) == greedy


def test_the_same_seed_gives_the_same_text(model):
    def text(seed):
        return list(sample.generate(model, [0, 5], 20, generator=torch.Generator().manual_seed(seed)))

    assert text(1) == text(1) != text(2)


def test_memory_rolls_past_its_length(model):
    made = list(sample.generate(model, [0, *range(1, 90)], 60, memory_length=8, segment=16))
    assert len(made) == 60
    assert all(token < 300 for token, _ in made)  # the padded rows of the head are never drawn


def test_the_prompt_is_read_once_in_segments():
    scripted = Scripted([7] * 20)
    list(sample.generate(scripted, [data.EOT] + [1] * 19, 3, temperature=0, segment=8))
    assert scripted.read == [8, 8, 4, 1, 1]


def test_stops_at_end_of_text():
    assert list(sample.generate(Scripted([11, 12, data.EOT, 13]), [data.EOT], 9, temperature=0)) == [(11, 1), (12, 2)]


def test_depth_outside_the_model_is_refused(model):
    with pytest.raises(ValueError, match="1..4"):
        next(sample.generate(model, [0], 1, depth=5))


# -------------------------------------------------------------------------------------------------- truncate


def test_top_p_keeps_the_smallest_set_that_reaches_p():
    logits = torch.tensor([0.1, 0.5, 0.25, 0.15]).log()
    cases = [(0.5, [1]), (0.51, [1, 2]), (0.75, [1, 2]), (0.76, [1, 2, 3]), (1e-9, [1]), (1.0, [0, 1, 2, 3])]
    for p, kept in cases:
        probabilities = sample.truncate(logits, top_p=p - 1e-7 if p in (0.5, 0.75) else p)  # logits are rounded
        assert probabilities.nonzero().flatten().tolist() == kept, p
        assert probabilities.sum().item() == pytest.approx(1)


def test_top_p_is_a_share_of_what_top_k_left():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    assert sample.truncate(logits, top_k=2, top_p=0.5).tolist() == [1, 0, 0, 0]  # 0.4 of 0.7
    assert sample.truncate(logits, top_k=2).tolist() == pytest.approx([4 / 7, 3 / 7, 0, 0])
    assert sample.truncate(logits, top_k=99).tolist() == pytest.approx([0.4, 0.3, 0.2, 0.1])


def test_temperature():
    logits = torch.tensor([1.0, 0.0])
    assert sample.truncate(logits, 0.5)[0].item() == pytest.approx(torch.sigmoid(torch.tensor(2.0)).item())
    assert sample.truncate(logits, 1e-30).tolist() == [1, 0]


# -------------------------------------------------------------------------------------------------- command line


def options(*argv):
    defaults = dict(max_tokens=50, temperature=0, top_k=None, top_p=1.0, memory=8, depth=None, show_depth=False)
    return SimpleNamespace(**defaults | dict(argv))


META = {"config": {"train": {"segment": 8}}}


def test_a_character_of_several_tokens_streams_whole(capsys, monkeypatch):
    tokens = data.load_tokenizer().encode_ordinary("a 🤖 é")
    writes = []
    monkeypatch.setattr("builtins.print", lambda *text, **_: writes.append(text))
    sample.answer(Scripted([*tokens, data.EOT]), META, "", options(), None)
    streamed = [text[0] for text in writes[:-2]]
    assert len(streamed) == len(tokens) > len("a 🤖 é".split())
    assert "".join(streamed) == "a 🤖 é"
    assert any("🤖" in text for text in streamed) and "\ufffd" not in "".join(streamed)


def test_half_a_character_at_the_end_is_replaced(capsys):
    tokens = data.load_tokenizer().encode_ordinary("a🤖")[:-1]
    sample.answer(Scripted([*tokens, data.EOT]), META, "", options(), None)
    out, err = capsys.readouterr()
    assert out == "a\ufffd\n"
    assert re.fullmatch(rf"{len(tokens)} tokens, [\d.]+ tokens/s, mean depth 1\.\d\d\n", err)


def test_show_depth_colours_tokens_but_no_line_breaks(capsys):
    tokens = [data.load_tokenizer().encode_ordinary(text)[0] for text in ("a", "b", "\n")]
    sample.answer(Scripted([*tokens, data.EOT]), META, "", options(("show_depth", True)), None)
    shallow, deeper = sample.paint("a", 1, 4), sample.paint("b", 2, 4)
    assert shallow != deeper.replace("b", "a")
    assert capsys.readouterr().out == shallow + deeper + "\n" + "\n"


def test_ctrl_c_ends_the_answer_only(capsys, monkeypatch):
    def interrupted(*_):
        yield data.load_tokenizer().encode_ordinary("Hi")[0], 3
        raise KeyboardInterrupt

    monkeypatch.setattr(sample, "generate", interrupted)
    assert sample.answer(Scripted([]), META, "", options(), None) is True
    out, err = capsys.readouterr()
    assert out == "Hi\n" and err.startswith("1 tokens") and "mean depth 3.00" in err


def test_main_continues_a_prompt(run_folder, capsys):
    argv = ["Once upon", "--checkpoint", str(run_folder), "--max_tokens", "40", "--seed", "3", *ON_CPU]
    assert sample.main(argv) == 0
    first = capsys.readouterr()
    assert sample.main(argv) == 0
    assert capsys.readouterr().out == first.out != ""
    assert "mean depth" in first.err and "checkpoint" not in first.err


def test_prompt_from_a_pipe(run_folder, capsys, monkeypatch):
    argv = ["--checkpoint", str(run_folder), "--max_tokens", "5", "--temperature", "0", *ON_CPU]
    sample.main(["Straße", *argv])
    expected = capsys.readouterr().out
    for dash in ([], ["-"]):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("Straße\n".encode())))
        assert sample.main([*dash, *argv]) == 0
        assert capsys.readouterr().out == expected
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9")))
    assert sample.main(argv) == 2
    assert "byte 3 is not UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize("last", ["", EOFError, KeyboardInterrupt])
def test_prompt_loop_ends_cleanly(run_folder, capsys, monkeypatch, last):
    lines = iter(["one", "two", last])

    def typed(_):
        line = next(lines)
        if line in (EOFError, KeyboardInterrupt):
            raise line
        return line

    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    assert sample.main(["--checkpoint", str(run_folder), "--max_tokens", "2", *ON_CPU]) == 0
    assert capsys.readouterr().err.count("mean depth") == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_bfloat16_on_cuda_goes_past_its_memory(run_folder, capsys):
    argv = ["Once upon a time " * 9, "--checkpoint", str(run_folder), "--device", "cuda", "--max_tokens", "50"]
    for extra in (["--seed", "3", "--top_p", "0.9"], ["--temperature", "0", "--depth", "2"], ["--memory", "0"]):
        assert sample.main([*argv, *extra]) == 0
        assert "mean depth" in capsys.readouterr().err


def test_newest_checkpoint_is_found_and_named(run_folder, capsys, monkeypatch, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "tiny").symlink_to(run_folder)
    monkeypatch.chdir(tmp_path)
    assert sample.main(["x", "--max_tokens", "1", *ON_CPU]) == 0
    assert "step_00000007" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv, named",
    [
        (["--temperature", "-1"], "--temperature -1.0"),
        (["--temperature", "nan"], "--temperature nan"),
        (["--top_p", "0"], "--top_p 0.0"),
        (["--top_p", "1.5"], "--top_p 1.5"),
        (["--top_k", "0"], "--top_k 0"),
        (["--max_tokens", "0"], "--max_tokens 0"),
        (["--seed", "-1"], "--seed -1"),
        (["--memory", "-1"], "--memory -1"),
        (["--depth", "5"], "--depth 5 is outside 1..4"),
        (["--depth", "0"], "--depth 0 is outside 1..4"),
        (["--device", "abacus"], "the device 'abacus'"),
        (["--device", "cuda:99"], "the device 'cuda:99'"),
        (["--checkpoint", "nowhere"], "nowhere: no such folder"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(run_folder, capsys, argv, named):
    assert sample.main(["x", "--checkpoint", str(run_folder), *ON_CPU, *argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and named in err and err.startswith("error: ") and err.count("\n") == 1


def test_no_checkpoint_at_all(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert sample.main(["x"]) == 2
    assert "no checkpoint under runs/" in capsys.readouterr().err
