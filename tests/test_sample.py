"""sample.py as a command: continuations, answers, conversations, streaming, JSON, exports and exit codes."""

import io
import json
import re
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import chat
import checkpoint
import data
import prepare_data
import repl
import sample
from decoding import Session, generate

ON_CPU = ["--device", "cpu"]


@pytest.fixture(autouse=True)
def no_named_model(monkeypatch):
    monkeypatch.delenv("MODEL", raising=False)


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory, write_run):
    """A run of the stage sft, with one checkpoint, of step 8; not to be written to."""
    folder = write_run(tmp_path_factory.mktemp("chat"))
    before = checkpoint.find(folder)
    meta = checkpoint.read_meta(before)
    meta["config"]["stage"], meta["step"], meta["memory"] = "sft", 8, 512
    path = checkpoint.begin(folder / "checkpoints", 8)
    checkpoint.write_tensors(path, "model", checkpoint.read_tensors(before, "model"))
    checkpoint.finish(path, meta)
    return folder


class Spoken:
    """A session that says a fixed sequence of tokens, at depths 1, 2, 1, 2, ..., and records what it was asked for."""

    draft = None

    def __init__(self, tokens):
        self.tokens, self.options = tokens, None

    def stream(self, *options):
        self.options = options
        yield from ((token, 1 + i % 2) for i, token in enumerate(self.tokens))


def options(**changes):
    defaults = dict(max_tokens=50, temperature=0, top_k=None, top_p=1.0, repetition_penalty=1.0, stop=[], json=False)
    return SimpleNamespace(**defaults | dict(show_depth=False) | changes)


def encode(text):
    return data.load_tokenizer().encode_ordinary(text)


def decode(tokens):
    return data.load_tokenizer().decode(tokens)


# -------------------------------------------------------------------------------------------------- streaming


def test_a_character_of_several_tokens_streams_whole(monkeypatch):
    tokens, writes = encode("a 🤖 é"), []
    monkeypatch.setattr("builtins.print", lambda *text, **_: writes.append(text))
    made = sample.answer(options(), None, 4, Spoken(tokens))
    streamed = [text[0] for text in writes[:-2]]
    assert len(tokens) > len("a 🤖 é".split()) and "".join(streamed) == "a 🤖 é" == made.text
    assert any("🤖" in text for text in streamed) and "\ufffd" not in "".join(streamed)
    assert made.stop == "end" and len(made.depths) == len(tokens)


def test_half_a_character_at_the_end_is_replaced(capsys):
    tokens = encode("a🤖")[:-1]
    sample.answer(options(), None, 4, Spoken(tokens))
    out, err = capsys.readouterr()
    assert out == "a\ufffd\n"
    assert re.fullmatch(rf"{len(tokens)} tokens, [\d.]+ tokens/s, mean depth 1\.\d\d\n", err)


def test_show_depth_colours_tokens_but_no_line_breaks(capsys):
    tokens = [encode(text)[0] for text in ("a", "b", "\n")]
    sample.answer(options(show_depth=True), None, 4, Spoken(tokens))
    shallow, deeper = sample.paint("a", 1, 4), sample.paint("b", 2, 4)
    assert shallow != deeper.replace("b", "a")
    assert capsys.readouterr().out == shallow + deeper + "\n" + "\n"


def test_a_stop_string_of_several_tokens_ends_the_text(capsys):
    tokens = encode("One.\nUser: Two")
    assert len(encode("\nUser:")) > 1
    made = sample.answer(options(stop=["never", "\nUser:"]), None, 4, Spoken(tokens))
    assert capsys.readouterr().out == "One.\n" and made.text == "One." and made.stop == "string"
    assert len(made.depths) == len(encode("One.\nUser:"))
    made = sample.answer(options(stop=["Two or"]), None, 4, Spoken(tokens))
    assert capsys.readouterr().out == "One.\nUser: Two\n" and made.stop == "end"  # " Two" was held back to the end


def test_what_ended_the_text_is_told():
    assert sample.answer(options(max_tokens=3), None, 4, Spoken(encode("a b c"))).stop == "length"
    made = sample.answer(options(), None, 4, Spoken([]))
    assert (made.stop, made.text, made.mean_depth) == ("end", "", None)


def test_ctrl_c_ends_the_answer_only(capsys):
    def interrupted(*_):
        yield encode("Hi")[0], 3
        raise KeyboardInterrupt

    made = sample.answer(options(), None, 4, SimpleNamespace(stream=interrupted, draft=None))
    assert made.stop == "interrupted" and made.text == "Hi"
    out, err = capsys.readouterr()
    assert out == "Hi\n" and err.startswith("1 tokens") and "mean depth 3.00" in err


def test_the_options_of_drawing_arrive():
    session, generator = Spoken([]), torch.Generator()
    sample.answer(options(temperature=0.5, top_k=7, top_p=0.9, repetition_penalty=1.2), generator, 4, session)
    assert session.options == (50, 0.5, 7, 0.9, generator, 1.2)


# -------------------------------------------------------------------------------------------------- one prompt


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


def test_a_chat_model_answers_a_prompt_and_continues_it_raw(chat_folder, capsys):
    model, _ = checkpoint.load_model(chat_folder)
    argv = ["--checkpoint", str(chat_folder), "--max_tokens", "9", "--temperature", "0", *ON_CPU]
    turn, system = {"role": "user", "content": "Hi there"}, {"role": "system", "content": "Be brief."}
    for extra, prompt in (
        ([], chat.encode([turn], answer=True)[0].tolist()),
        (["--system", "Be brief. "], chat.encode([system, turn], answer=True)[0].tolist()),
        (["--raw"], [data.EOT, *encode("Hi there ")]),
    ):
        assert sample.main(["Hi there ", *argv, *extra]) == 0
        made = [token for token, _ in generate(model, prompt, 9, temperature=0)]
        assert capsys.readouterr().out == decode(made) + "\n"


def test_json_has_the_text_and_its_depths(run_folder, capsys):
    argv = ["Once", "--checkpoint", str(run_folder), "--max_tokens", "6", "--temperature", "0", *ON_CPU]
    sample.main(argv)
    text = capsys.readouterr().out.removesuffix("\n")
    assert sample.main([*argv, "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert out.count("\n") == 1 and err == "" and found.pop("tokens_per_second") > 0
    made = list(generate(checkpoint.load_model(run_folder)[0], [data.EOT, *encode("Once")], 6, temperature=0))
    depths = [depth for _, depth in made]
    assert found == {
        "prompt": "Once", "text": text, "tokens": 6, "mean_depth": sum(depths) / 6, "depths": depths,
        "stop": "length", "checkpoint": str(checkpoint.find(run_folder)),
    }  # fmt: skip
    assert sample.main([*argv, "--json", "--stop", text[3:5]]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["stop"] == "string" and found["text"] == text[: text.find(text[3:5])]


def test_the_penalty_changes_the_text(run_folder, capsys):
    argv = ["Once", "--checkpoint", str(run_folder), "--max_tokens", "40", "--temperature", "0", *ON_CPU]
    texts = []
    for penalty in ("1", "1.0", "5"):
        sample.main([*argv, "--repetition_penalty", penalty])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_an_exported_model_gives_the_same_text(chat_folder, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    argv = ["Hi", "--max_tokens", "9", "--seed", "4", *ON_CPU]
    assert sample.main([*argv, "--checkpoint", str(chat_folder)]) == 0
    text = capsys.readouterr().out
    assert sample.main(["--checkpoint", str(chat_folder), "--export", "sft.safetensors"]) == 0
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch(r"sft.safetensors: .*step_00000008, stage sft, step 8\n", err)
    monkeypatch.setenv("MODEL", "sft")
    assert sample.main(argv) == 0
    assert capsys.readouterr().out == text
    assert sample.main([*argv, "--system", "x", "--checkpoint", "sft.safetensors"]) == 0
    Path("sft.safetensors").write_bytes(Path("sft.safetensors").read_bytes()[:-1])
    capsys.readouterr()
    assert sample.main(argv) == 2
    assert capsys.readouterr().err.startswith("error: sft.safetensors: damaged (")
    assert sample.main(["--checkpoint", str(chat_folder), "--export", "sft.bin"]) == 2
    assert "must end in .safetensors" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------- conversations


@pytest.fixture
def type_lines(monkeypatch):
    """Types lines at the prompt of sample.py; an exception among them is raised instead of a line."""

    def script(*typed):
        lines = iter(typed)

        def read(_):
            line = next(lines)
            if isinstance(line, str):
                return line
            raise line

        monkeypatch.setattr("builtins.input", read)
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))

    return script


@pytest.mark.parametrize("last", ["", EOFError(), KeyboardInterrupt()])
def test_prompt_loop_ends_cleanly(run_folder, capsys, type_lines, last):
    type_lines("one", "two", last)
    assert sample.main(["--checkpoint", str(run_folder), "--max_tokens", "2", *ON_CPU]) == 0
    assert capsys.readouterr().err.count("mean depth") == 2


@pytest.mark.parametrize("last", ["/quit", EOFError(), KeyboardInterrupt()])
def test_a_conversation_ends_cleanly(chat_folder, capsys, type_lines, last):
    not_utf8 = UnicodeDecodeError("utf-8", b"ab\xff", 2, 3, "invalid start byte")
    type_lines("one", "", "  ", not_utf8, "two", last)
    assert sample.main(["--checkpoint", str(chat_folder), "--max_tokens", "2", *ON_CPU]) == 0
    err = capsys.readouterr().err
    assert err.count("mean depth") == 2 and err.count("error: byte 2 of this line is not UTF-8") == 1


def test_json_needs_a_prompt(chat_folder, capsys, type_lines):
    type_lines()
    assert sample.main(["--checkpoint", str(chat_folder), "--json", *ON_CPU]) == 2
    assert "--json needs a prompt" in capsys.readouterr().err


@pytest.fixture
def talk(chat_folder):
    """A `repl.Chat` of greedy answers of up to 9 tokens."""
    model, _ = checkpoint.load_model(chat_folder)
    args = options(max_tokens=9, memory=512, depth=None, system=None)
    answer = lambda session: sample.answer(args, None, 4, session)  # noqa: E731
    return repl.Chat(args, lambda: Session(model, args.memory, 32, args.depth), answer)


def greedy(talk, prompt, **options):
    return [token for token, _ in generate(talk.session.model, prompt, 9, temperature=0, **options)]


def test_turns_see_the_history(talk, capsys):
    text = []
    for question in ("Hello", "And \udcff then?"):
        turn, _ = chat.encode([{"role": "user", "content": question.replace("\udcff", "?")}], answer=True)
        text += turn.tolist()[1 if text else 0 :]
        wanted = greedy(talk, text)
        assert talk.say(f" {question} ").text == decode(wanted)
        text += wanted
    assert talk.session.text == text
    said = [message["content"] for message in talk.messages if message["role"] == "assistant"]
    assert [line.strip() for line in capsys.readouterr().out.splitlines()] == said


def test_commands(talk, capsys, type_lines, tmp_path):
    def typed(*lines):
        type_lines(*lines, EOFError())
        talk.loop()
        return capsys.readouterr().err.split("\n", 1)[1]  # without the hint

    assert typed("/help").strip() == repl.COMMANDS
    assert typed("/hlep").startswith("no command /hlep; these there are:\n/help")
    assert "/save: nothing has been said yet" in typed("/save x.jsonl")
    first = greedy(talk, chat.encode([{"role": "user", "content": "Hi"}], answer=True)[0].tolist())
    typed("Hi", "Hello", "/reset", "Hi")
    assert talk.messages[1]["content"] == decode(first).strip() and len(talk.messages) == 2
    conversation = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    typed("/system Be brief.", "Hi")
    prompt = chat.encode(conversation, answer=True)[0].tolist()
    assert talk.session.text == prompt + greedy(talk, prompt)
    typed("/reset", "/depth 2", "Hi")
    assert talk.session.text == prompt + greedy(talk, prompt, depth=2)
    assert talk.messages == conversation + talk.messages[-1:]
    typed("/system", "/depth auto", "Hi")
    assert talk.session.depth is None and talk.messages[0] == conversation[1]
    typed("/temperature 0.5")
    assert talk.args.temperature == 0.5
    for value in ("0", "5", "x", ""):
        assert f"error: /depth '{value}' must be a whole number in 1..4, or auto" in typed(f"/depth {value}")
    for value in ("-1", "nan", "x", ""):
        assert f"error: /temperature '{value}' must be a number" in typed(f"/temperature {value}")
    assert talk.session.depth is None and talk.args.temperature == 0.5
    assert "error: /save needs the name" in typed("/save")
    assert "error: [Errno 2]" in typed(f"/save {tmp_path}/no/chat.jsonl")


def test_a_saved_conversation_is_one_for_training(talk, type_lines, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    talk.reset("Be brief.")
    type_lines("Straße?", "And?", "/save talk.jsonl", "/save talk.jsonl", EOFError())
    talk.loop()
    assert "saved to talk.jsonl\nerror: /save: talk.jsonl exists" in capsys.readouterr().err
    (line,) = Path("talk.jsonl").read_text(encoding="utf-8").splitlines()
    assert chat.conversation(json.loads(line)) == talk.messages and "Straße" in line
    source = '[domains.own]\nsources = [{ files = "talk.jsonl" }]'
    Path("own.toml").write_text(f'kind = "sft"\nout = "own"\nval_fraction = 0.0\n{source}')
    assert prepare_data.main(["own.toml"]) == 0
    assert chat.Chats.open("own", "sft").manifest["domains"]["own"]["train"]["rows"] == 1


def test_ctrl_c_keeps_what_was_written(talk, capsys, monkeypatch):
    def print_3(text="", **options):
        original(text, **options)
        if options.get("flush") and (shown.append(text) or len(shown) == 3):
            signal.raise_signal(signal.SIGINT)

    original, shown = print, []
    monkeypatch.setattr("builtins.print", print_3)
    prompt = chat.encode([{"role": "user", "content": "Hello"}], answer=True)[0].tolist()
    whole = greedy(talk, prompt)
    assert talk.say("Hello").stop == "interrupted"
    assert talk.session.text == prompt + whole[:3] and len(whole) == 9
    assert talk.messages[-1] == {"role": "assistant", "content": decode(whole[:3]).strip()}
    turn = chat.encode([{"role": "user", "content": "Go on"}], answer=True)[0].tolist()[1:]
    assert talk.say("Go on").text == decode(greedy(talk, prompt + whole[:3] + turn))


@pytest.mark.parametrize("at", [0, 1])
def test_after_a_stop_string_the_history_is_what_was_shown(talk, capsys, at, tmp_path):
    prompt = chat.encode([{"role": "user", "content": "Hello"}], answer=True)[0].tolist()
    whole = [decode([token]) for token in greedy(talk, prompt)]
    # a stop string of two tokens, cut at the start of the first or inside it
    nth = next(i for i in range(2, 8) if (whole[i] + whole[i + 1]).isascii() and len(whole[i]) > 2)
    shown = "".join(whole[:nth]) + whole[nth][:at]
    talk.args.stop = [whole[nth][at:] + whole[nth + 1]]
    made = talk.say("Hello")
    assert (made.stop, made.text) == ("string", shown) and len(made.depths) == nth + 2
    assert talk.session.text == prompt + encode(shown)
    assert talk.messages[-1] == {"role": "assistant", "content": shown.strip()}
    talk.args.stop = []
    turn = chat.encode([{"role": "user", "content": "Go on"}], answer=True)[0].tolist()[1:]
    wanted = greedy(talk, prompt + encode(shown) + turn)
    assert talk.say("Go on").text == decode(wanted)
    assert talk.session.text == prompt + encode(shown) + turn + wanted
    talk.save(str(tmp_path / "talk.jsonl"))
    assert json.loads((tmp_path / "talk.jsonl").read_text(encoding="utf-8"))["messages"] == talk.messages


def test_ctrl_c_at_a_stop_string_leaves_what_was_shown_too(talk, capsys, monkeypatch):
    def push(stops, *piece, original=sample.Stops.push):
        shown = original(stops, *piece)
        if stops.found:
            signal.raise_signal(signal.SIGINT)
        return shown

    prompt = chat.encode([{"role": "user", "content": "Hello"}], answer=True)[0].tolist()
    whole = greedy(talk, prompt)
    monkeypatch.setattr(sample.Stops, "push", push)
    talk.args.stop = [decode(whole)[-5:]]
    made = talk.say("Hello")
    assert made.stop == "interrupted" and made.text and decode(whole).startswith(made.text)
    assert decode(talk.session.text[len(prompt) :]) == made.text != decode(whole)


def test_an_answer_that_a_stop_string_opens_is_no_message(talk, capsys):
    prompt = chat.encode([{"role": "user", "content": "Hello"}], answer=True)[0].tolist()
    talk.args.stop = [decode(greedy(talk, prompt))[:1]]
    assert talk.say("Hello").text == ""
    assert talk.session.text == prompt and talk.messages == [{"role": "user", "content": "Hello"}]


def test_an_answer_that_did_not_begin_is_no_message(talk, capsys):
    hook = talk.session.model.register_forward_hook(lambda *_: signal.raise_signal(signal.SIGINT))
    assert talk.say("Hello").stop == "interrupted"
    hook.remove()
    assert talk.messages == [{"role": "user", "content": "Hello"}]
    assert talk.say("Are you there?").text and len(talk.messages) == 3


def test_an_outgrown_memory_is_told_once(talk, capsys):
    talk.args.memory = 40
    talk.reset(None)
    for _ in range(4):
        talk.say("Tell me more about it")
    assert capsys.readouterr().err.count("outgrown the memory of 40 tokens") == 1


# -------------------------------------------------------------------------------------------------- errors


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_bfloat16_on_cuda_goes_past_its_memory(run_folder, capsys):
    argv = ["Once upon a time " * 9, "--checkpoint", str(run_folder), "--device", "cuda", "--max_tokens", "50"]
    for extra in (["--seed", "3", "--top_p", "0.9"], ["--temperature", "0", "--depth", "2"], ["--memory", "0"]):
        assert sample.main([*argv, *extra]) == 0
        assert "mean depth" in capsys.readouterr().err


def test_the_checkpoint_is_found_and_named(run_folder, chat_folder, capsys, monkeypatch, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "tiny").symlink_to(run_folder)
    (tmp_path / "runs" / "talk").symlink_to(chat_folder)
    monkeypatch.chdir(tmp_path)
    argv = ["x", "--max_tokens", "1", *ON_CPU]
    for named, step in ((None, 8), ("base", 7), ("sft", 8), (str(run_folder), 7), ("runs/talk", 8)):
        if named:
            monkeypatch.setenv("MODEL", named)
        assert sample.main(argv) == 0
        assert re.match(rf"checkpoint \S+/step_0000000{step}\n", capsys.readouterr().err)
    assert sample.main([*argv, "--checkpoint", "base"]) == 0
    assert "checkpoint" not in capsys.readouterr().err
    monkeypatch.setenv("MODEL", "dpo")
    assert sample.main(argv) == 2
    assert "no model 'dpo'" in capsys.readouterr().err


def test_drafts_leave_the_greedy_text_as_it_is(run_folder, capsys):
    found = []
    for argv in ([], ["--draft", "4x3"]):
        argv += ["--checkpoint", str(run_folder), "--temperature", "0", "--max_tokens", "9", "--weights", "full"]
        assert sample.main(["Once", *argv, *ON_CPU]) == 0
        found.append(capsys.readouterr())
    assert found[0].out == found[1].out
    counts = [re.search(r"mean depth [\d.]+, (\d+) of (\d+) drafts accepted so far\n", err) for _, err in found]
    assert counts[0] is None and 1 <= int(counts[1][1]) <= int(counts[1][2]) <= 8


@pytest.mark.parametrize(
    "argv, named",
    [
        (["--temperature", "-1"], "--temperature -1.0"),
        (["--temperature", "nan"], "--temperature nan"),
        (["--top_p", "0"], "--top_p 0.0"),
        (["--top_p", "1.5"], "--top_p 1.5"),
        (["--top_k", "0"], "--top_k 0"),
        (["--repetition_penalty", "0"], "--repetition_penalty 0.0"),
        (["--repetition_penalty", "inf"], "--repetition_penalty inf"),
        (["--stop", ""], "--stop '' is empty"),
        (["--json", "--show_depth"], "leave --show_depth out"),
        (["--raw", "--system", "Be brief"], "--raw continues a text"),
        (["--system", "Be brief"], "step_00000007 is a base model"),
        (["--export", "x.safetensors"], "--export x.safetensors writes a file and takes no prompt"),
        (["--max_tokens", "0"], "--max_tokens 0"),
        (["--seed", "-1"], "--seed -1"),
        (["--memory", "-1"], "--memory -1"),
        (["--depth", "5"], "--depth 5 is outside 1..4"),
        (["--depth", "0"], "--depth 0 is outside 1..4"),
        (["--draft", "5x2"], "--draft 5x2: steps must lie in 1..4"),
        (["--draft", "2x0"], "--draft 2x0: "),
        (["--draft", "2"], "--draft 2: write steps and tokens as two whole numbers, 2x3"),
        (["--draft", ""], "--draft : write"),
        (["--tolerance", "0.1"], "--tolerance 0.1 is for models without a head for ACT"),
        (["--stability", "0.1"], "--stability 0.1 is for models without a head for ACT"),
        (["--tolerance", "0.1", "--depth", "2"], "--depth and --tolerance are two rules for the steps of a token"),
        (["--tolerance", "0.1", "--stability", "2"], "--tolerance and --stability are two rules for"),
        (["--device", "abacus"], "the device 'abacus'"),
        (["--device", "cuda:99"], "the device 'cuda:99'"),
        (["--checkpoint", "nowhere"], "nowhere: no such folder"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(run_folder, capsys, argv, named):
    assert sample.main(["x", "--checkpoint", str(run_folder), *ON_CPU, *argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and named in err and err.startswith("error: ") and err.count("\n") == 1


@pytest.mark.parametrize("typed", ["", " \n", "-", None])
def test_an_empty_prompt_is_refused(run_folder, capsys, monkeypatch, typed):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n")))
    argv = [] if typed is None else [typed]
    assert sample.main([*argv, "--checkpoint", str(run_folder), *ON_CPU]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err == "error: the prompt is empty; give some text, as an argument or through a pipe\n"


def test_no_checkpoint_at_all(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert sample.main(["x"]) == 2
    assert "no checkpoint under runs/" in capsys.readouterr().err
