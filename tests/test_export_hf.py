"""The exported model in transformers: logits, text, loss, tokenizer and chat template are those of our own code."""

import json
import random
import re
import socket
import sys

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")
from torch._library.custom_ops import OPDEF_TO_LIB
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import chat
import checkpoint
import data
import decoding
import export_hf
import fp8
from modeling_recurrent import CACHE

EOT, V = data.EOT, data.VOCAB_SIZE
PROMPTS = ["The cat sat on the", "def f(x):\n    return x +", "One little bird, two little birds. " * 8]  # > a segment


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    """transformers writes its copies of modules to a temporary folder, and nothing can go online."""

    def refuse(*_):
        raise OSError("tests are offline")

    with pytest.MonkeyPatch.context() as patch:
        cache = str(tmp_path_factory.mktemp("huggingface"))
        for name in ("transformers.utils.hub", "transformers.dynamic_module_utils"):
            patch.setattr(f"{name}.HF_MODULES_CACHE", cache)
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(sys, "path", [*sys.path])
        yield


@pytest.fixture(scope="module")
def exported(run_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "tiny-1.0"
    export_hf.export(run_folder, out)
    return out


@pytest.fixture(scope="module")
def load(offline):
    """Loads a model of transformers from a folder."""
    return lambda folder, **settings: AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **settings)


@pytest.fixture(scope="module")
def model(exported, load):
    return load(exported)


@pytest.fixture(scope="module")
def tokenizer(exported, offline):
    return AutoTokenizer.from_pretrained(exported, trust_remote_code=True)


@pytest.fixture(scope="module")
def ours(run_folder):
    return checkpoint.load_model(run_folder)[0]


@pytest.fixture
def batch(tokenizer):
    return tokenizer(PROMPTS, return_tensors="pt", padding=True)


def logits_of(ours, tokens, depth=None):
    with torch.no_grad():
        return ours(torch.as_tensor(tokens)[None], depth=depth).logits[0, :, :V]


def rows(batch):
    """The ids of every row without its padding."""
    return [ids[mask.bool()] for ids, mask in zip(batch.input_ids, batch.attention_mask)]


def greedy(ours, ids, n, depth=None):
    drawn = decoding.generate(ours, ids.tolist(), n, 0, memory_length=32, segment=32, depth=depth)
    return [token for token, _ in drawn]


# -------------------------------------------------------------------------------------------------- model


def test_configuration(exported, ours):
    config = AutoConfig.from_pretrained(exported, trust_remote_code=True)
    assert (config.hidden_size, config.num_attention_heads, config.num_hidden_layers) == (32, 2, 4)
    assert config.vocab_size == V and config.max_position_embeddings == 64 and config.memory_length == 32
    assert config.bos_token_id == config.eos_token_id == config.pad_token_id == EOT
    assert config.to_model_config() == type(config.to_model_config())(**vars(ours.config))
    assert json.loads((exported / "generation_config.json").read_text())["eos_token_id"] == EOT


def test_parameters(model, ours):
    unused = (ours.config.padded_vocab_size - V) * ours.config.width
    assert model.num_parameters() == ours.parameter_counts()["total"] + unused
    assert model.get_input_embeddings().weight.shape == ours.embedding.weight.shape


@pytest.mark.parametrize("depth", [None, 2])
def test_logits(model, ours, batch, depth):
    for ids in rows(batch):
        found = model(ids[None], depth=depth)
        assert found.logits.shape == (1, len(ids), V) and CACHE not in found and found.loss is None
        torch.testing.assert_close(found.logits[0], logits_of(ours, ids, depth), atol=1e-4, rtol=0)
    together = model(**batch, depth=depth).logits
    for row, ids in zip(together, rows(batch)):
        torch.testing.assert_close(row[-len(ids) :], logits_of(ours, ids, depth), atol=1e-4, rtol=0)
    last = model(**batch, depth=depth, logits_to_keep=3, return_dict=False)[0]
    torch.testing.assert_close(last, together[:, -3:])


@pytest.mark.parametrize("use_cache", [False, True])
def test_padding_is_not_seen(model, ours, use_cache):
    """On either side, whatever tokens it has, and also by text that no <|endoftext|> opens."""
    tokens, mask = torch.randint(V - 3, (4, 20)), torch.ones(4, 20, dtype=torch.int64)
    mask[1, :7] = mask[2, :19] = mask[3, 15:] = 0
    found = model(tokens, mask, use_cache=use_cache)
    for row, ids, real in zip(found.logits, tokens, mask.bool()):
        torch.testing.assert_close(row[real], logits_of(ours, ids[real]), atol=1e-4, rtol=0)
    if use_cache:  # go on, the rows that are not padded on the right
        more, keep = torch.randint(V - 3, (3, 5)), torch.arange(3)
        found[CACHE].reorder_cache(keep)
        after = model(more, torch.cat([mask[:3], torch.ones_like(more)], 1), found[CACHE]).logits
        for i in keep:
            whole = logits_of(ours, torch.cat([tokens[i][mask[i].bool()], more[i]]))
            torch.testing.assert_close(after[i], whole[-5:], atol=1e-4, rtol=0)


def test_masks_that_cannot_be_honoured(model, load, write_run, tmp_path):
    tokens = torch.full((1, 4), 7)
    for mask, message in [([[1, 0, 0, 1]], "gaps"), ([[0, 1, 0, 1]], "gaps"), ([[1, 1, 1]], "must be")]:
        with pytest.raises(ValueError, match=message):
            model(tokens, torch.tensor(mask))
    export_hf.export(write_run(tmp_path / "run", cross_documents=True), tmp_path / "out")
    crossing = load(tmp_path / "out")
    crossing(tokens, torch.ones_like(tokens))
    with pytest.raises(ValueError, match="across documents"):
        crossing(tokens, torch.tensor([[0, 1, 1, 1]]))


# -------------------------------------------------------------------------------------------------- generate


@pytest.mark.parametrize("depth", [None, 1])
def test_greedy_text_is_ours(model, ours, batch, depth):
    T = batch.input_ids.shape[1]
    found = model.generate(**batch, max_new_tokens=12, do_sample=False, depth=depth)
    for row, ids in zip(found, rows(batch)):
        assert row[T:].tolist() == greedy(ours, ids, 12, depth=depth)
        alone = model.generate(ids[None], max_new_tokens=12, do_sample=False, depth=depth)
        assert alone[0, len(ids) :].tolist() == greedy(ours, ids, 12, depth=depth)


def test_cache(model, ours, batch):
    """With a memory for the whole text, with and without cache agree, and a text can go on from a cache."""
    short = {key: x[:2, -12:] for key, x in batch.items()}
    options = dict(max_new_tokens=6, do_sample=False)
    plain = model.generate(**short, **options, use_cache=False)
    cached = model.generate(**short, **options, return_dict_in_generate=True)
    assert torch.equal(plain, cached.sequences) and torch.equal(plain, model.generate(**short, **options))
    assert torch.equal(plain, model.generate(**short, **options, prefill_chunk_size=5))
    assert cached[CACHE].memory.length == 12 + 6 - 1
    mask = F.pad(short["attention_mask"], (0, 6), value=1)
    more = model.generate(cached.sequences, attention_mask=mask, **{CACHE: cached[CACHE]}, **options)
    assert torch.equal(more, model.generate(**short, max_new_tokens=12, do_sample=False))


def test_beams(model, batch):
    short = {key: x[:2, -12:] for key, x in batch.items()}
    beams = [model.generate(**short, max_new_tokens=6, num_beams=3, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*beams)


def test_sampling(model, batch):
    torch.manual_seed(1)
    options = dict(max_new_tokens=5, do_sample=True, top_k=50, top_p=0.9, temperature=0.8, num_return_sequences=2)
    found = model.generate(**batch, **options)
    assert found.shape == (6, batch.input_ids.shape[1] + 5) and found.max() < V
    assert not torch.equal(found[0], found[1])
    torch.manual_seed(1)
    assert torch.equal(found, model.generate(**batch, **options))
    assert model.generate(max_new_tokens=2).shape == (1, 3)  # from <|endoftext|> alone


def test_what_cannot_be_generated(model, batch):
    with pytest.raises(ValueError, match="depth must lie in 1..4"):
        model.generate(**batch, max_new_tokens=1, depth=5)
    with pytest.raises(ValueError, match="assisted"):
        model.generate(batch.input_ids, max_new_tokens=1, prompt_lookup_num_tokens=2)
    with pytest.raises(ValueError, match="cache_implementation"):
        model.generate(**batch, max_new_tokens=1, cache_implementation="static")
    cache = model(batch.input_ids, use_cache=True)[CACHE]
    with pytest.raises(NotImplementedError, match="cannot go back"):
        cache.crop(3)
    for name in ("cache", "past_key_values"):  # of any version
        with pytest.raises(ValueError, match="exclude"):
            model(batch.input_ids, labels=batch.input_ids, **{name: cache})


# -------------------------------------------------------------------------------------------------- loss, files


def test_loss_and_its_gradients(exported, load, tokenizer, ours):
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side="right")
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    labels[0, 2] = -100
    nll = [F.cross_entropy(logits_of(ours, ids)[:-1], ids[1:], reduction="none") for ids in rows(batch)]
    nll[0] = torch.cat([nll[0][:1], nll[0][2:]])
    model = load(exported)
    with torch.no_grad():
        found = model(**batch, labels=labels)
    torch.testing.assert_close(found.loss, torch.cat(nll).mean())
    assert found.logits.shape == (*labels.shape, V)
    out = model(**batch, labels=labels)
    assert out.logits is None and not model(**batch).logits.requires_grad
    torch.testing.assert_close(out.loss, found.loss)
    out.loss.backward()
    model.zero_grad()
    targets = batch.input_ids[:1, 1:]
    model(batch.input_ids[:1], labels=batch.input_ids[:1]).loss.backward()
    ours(batch.input_ids[:1, :-1], targets).loss.backward()
    for (name, mine), theirs in zip(ours.named_parameters(), model.parameters()):
        torch.testing.assert_close(theirs.grad, mine.grad, atol=1e-5, rtol=1e-3, msg=name)
    ours.zero_grad()


def test_saved_again(model, load, batch, tmp_path):
    """What transformers saves is whole: with the code, and with changed weights."""
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert type(again) is not type(model)  # of the copied code
    torch.testing.assert_close(again(**batch).logits, model(**batch).logits)
    with torch.no_grad():
        again.model.recur[0].gate.weight.mul_(2)
    changed = again(**batch).logits
    assert not torch.allclose(changed, model(**batch).logits)
    again.save_pretrained(tmp_path / "changed")
    torch.testing.assert_close(load(tmp_path / "changed")(**batch).logits, changed)


def test_bfloat16(run_folder, model, load, batch, tmp_path):
    assert export_hf.main([str(run_folder), str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    small = load(tmp_path / "out")
    assert small.dtype == torch.bfloat16
    assert {name for name, x in small.named_parameters() if x.dtype == torch.float32} == {
        "model.halting.weight",
        "model.halting.bias",
    }
    assert small(**batch, depth=2).logits.dtype == torch.bfloat16
    cast = load(tmp_path / "out", dtype=torch.float32)
    assert cast(**batch).logits.dtype == torch.float32
    found, expected = small(**batch, depth=2).logits[:, -1].float(), model(**batch, depth=2).logits[:, -1]
    assert (found - expected).norm() < 0.05 * expected.norm()
    assert small.generate(**batch, max_new_tokens=3).shape == (3, batch.input_ids.shape[1] + 3)


def test_the_tolerance_is_not_rounded_to_bfloat16(write_run, load, tmp_path):
    run = write_run(tmp_path / "run", halting="exit", tolerance=0.1)
    export_hf.export(run, tmp_path / "out", torch.bfloat16)
    assert load(tmp_path / "out").model.tolerance.equal(torch.tensor(0.1))


@pytest.mark.parametrize(
    "changes",
    [
        dict(prelude=1, recur=2, coda=1),
        dict(memory="last_step"),
        dict(share=False, injection="concat_linear", step_gains=False),
        dict(halting="fixed", injection="none"),
        dict(sandwich=True, injection="hyper"),
        dict(halting="exit", tolerance=0.7),
        dict(halting="exit", exit_by="loss", tolerance=0.7, finish=True),
    ],
)
def test_other_architectures(changes, write_run, load, tokenizer, tmp_path):
    run = write_run(tmp_path / "run", **changes)
    export_hf.export(run, tmp_path / "out")
    other, ours = load(tmp_path / "out"), checkpoint.load_model(run)[0]
    batch = tokenizer(PROMPTS[:2], return_tensors="pt", padding=True)
    for row, ids in zip(other(**batch).logits, rows(batch)):
        torch.testing.assert_close(row[-len(ids) :], logits_of(ours, ids), atol=1e-4, rtol=0)
    found = other.generate(**batch, max_new_tokens=5, do_sample=False)
    assert [row[-5:].tolist() for row in found] == [greedy(ours, ids, 5) for ids in rows(batch)]


# -------------------------------------------------------------------------------------------------- tokenizer


def texts():
    rng = random.Random(0)
    yield from ("", " ", "Hello world!", "I'll we've he's THEY'RE 'tis 'S", "a\r\n\tb", " " * 40 + "end  \n\n  ")
    yield from ("naïve Straße 東京 Привет שלום नमस्ते", "👩‍👩‍👧‍👦🏳️‍🌈🤖", "1234567 ١٢٣ ½ ²", "\x00\x7f\u200b\ufeff")
    yield from ("x" * 300, "ab" * 70)
    yield from (open(module.__file__, encoding="utf-8").read()[:20_000] for module in (torch, random))
    yield "".join(chr(i) for i in range(0x3200)) + "".join(chr(i) for i in range(0x1F300, 0x1F700))
    for alphabet in (" \t\r\n\x0b\x0c\x1c\x85\xa0\u2003\u2028ab'ls1é🤖中\u0301", "abcdeinorst ", "<|>endoftxusr "):
        yield from ("".join(rng.choices(alphabet, k=rng.randrange(1, 60))) for _ in range(200))


def test_tokenizer_gives_our_ids(tokenizer):
    encode = data.load_tokenizer().encode_ordinary
    for text in texts():
        assert tokenizer(text).input_ids == [EOT, *encode(text)], text
        assert tokenizer(text, add_special_tokens=False).input_ids == encode(text), text
        assert tokenizer.decode(encode(text)) == text
    assert len(tokenizer) == V and tokenizer.padding_side == "left"


def test_spelled_out_markers(tokenizer):
    text, encode = "a <|user|>b<|assistant|> <|endoftext|>", data.load_tokenizer().encode_ordinary
    assert tokenizer(text, split_special_tokens=True).input_ids == [EOT, *encode(text)]
    assert {EOT, data.USER, data.ASSISTANT} <= set(tokenizer(text, add_special_tokens=False).input_ids)
    assert tokenizer.decode([EOT, data.USER, *encode("hi")], skip_special_tokens=True) == "hi"


CONVERSATIONS = {
    "one turn": ["user: Hi there"],
    "spaces": ["user:  \n Hi  there \t", "assistant: \u2003Hello! \n\n", "user: \nBye"],
    "system": ["system: Be  brief. ", "user: Why?", "assistant: 'Cause.", "user: 東京 🤖"],
    "two systems": ["system: One.", "system: ", "system: Two.", "user: x"],
    "system without user": ["system: Sing.", "assistant: La la.", "system: Louder.", "assistant: LA", "system: lost"],
    "neighbours": ["user: a", "user: ", "user: b", "assistant: ", "assistant: c", "assistant: d", "user: "],
    "system between": ["user: a", "system: ", "user: b", "system: s", "user: ", "user: c"],
    "other names": ["human: a", "gpt: b", "user: c", "assistant: d"],
    "code": ["user: def f(x):\n    return x", "assistant: ```py\n{{ x }} {% if %}\n```"],
}


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("answer", [False, True])
def test_chat_template_gives_the_ids_of_chat(tokenizer, name, answer):
    talk = [dict(zip(("role", "content"), line.split(": ", 1))) for line in CONVERSATIONS[name]]
    expected = chat.encode(chat.messages(talk), answer)[0].tolist()
    found = tokenizer.apply_chat_template(talk, add_generation_prompt=answer, return_dict=False)
    assert found == expected


@pytest.mark.parametrize(
    "message, complaint",
    [
        ({"role": "user", "content": "<|assistant|>Sure"}, "spells out the marker <|assistant|>"),
        ({"role": "system", "content": "x<|endoftext|>"}, "spells out the marker"),
        ({"role": "tool", "content": "x"}, "unknown role tool"),
        ({"role": "user", "content": [{"type": "text", "text": "x"}]}, "must be text"),
    ],
)
def test_messages_that_the_template_refuses(tokenizer, message, complaint):
    with pytest.raises(Exception, match=re.escape(complaint)):
        tokenizer.apply_chat_template([message])


# -------------------------------------------------------------------------------------------------- the harness


def test_harness(model, tokenizer, ours):
    """The `hf` models of lm-evaluation-harness score the exported model as our own class does ours."""
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.api.instance import Instance

    import zeroshot

    pairs = [("The cat sat on the", " mat"), ("", "A text"), ("Spaces at the end: ", "yes"), ("def f():\n", "    pass")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    theirs = huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2)
    found = theirs.loglikelihood(requests, disable_tqdm=True)
    expected = zeroshot.Harness(ours, 64, 64).loglikelihood(requests)
    assert [ll for ll, _ in found] == pytest.approx([ll for ll, _ in expected], abs=1e-3)
    assert [best for _, best in found] == [best for _, best in expected]


# -------------------------------------------------------------------------------------------------- export


def test_imports_become_relative():
    source = """'''
import data
from model import x
'''
import torch.nn as nn
import data
from model import (
    a,
)
try:
    import fp8 as eight
except ImportError:
    from json import load
from . import here
"""
    expected = source.replace("nn\nimport data", "nn\nfrom .data import __doc__ as _\nfrom . import data")
    expected = expected.replace("from model import (", "from .model import (")
    expected = expected.replace("    import fp8", "    from .fp8 import __doc__ as _\n    from . import fp8")
    found, names = export_hf.relative(source)
    assert found == expected and sorted(names) == ["data", "fp8", "model"]


def test_files(exported):
    names = {file.name for file in exported.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "modeling_recurrent.py", "model.py"} <= names
    for file in exported.glob("*.py"):
        assert not export_hf.relative(file.read_text())[1], file
    assert "tiktoken" not in (exported / "data.py").read_text()
    assert not [path for path in exported.parent.iterdir() if path != exported]


def test_its_operators_leave_ours_alone(model):
    """An operator that is registered a second time is destroyed, and what held it reads freed memory."""
    copy = sys.modules[f"{type(model).__module__.rpartition('.')[0]}.fp8"]
    names = {module._scaled_matmul._qualname for module in (copy, fp8)}
    assert len(names) == 2 and names <= OPDEF_TO_LIB.keys()


def test_overwriting(run_folder, tmp_path, capsys):
    out = tmp_path / "deep" / "out"
    command = [str(run_folder), str(out)]
    assert export_hf.main(command) == 0
    before = out.stat().st_ino
    assert export_hf.main(command) == 2 and "--overwrite" in capsys.readouterr().err
    assert export_hf.main([*command, "--overwrite"]) == 0 and out.stat().st_ino != before
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_failed_export_leaves_what_was_there(run_folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    out.mkdir()

    def full(folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_hf, "write_modules", full)
    assert export_hf.main([str(run_folder), str(out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "No space left" in error and error.count("\n") == 1
    assert [*tmp_path.iterdir()] == [out] and not [*out.iterdir()]


@pytest.mark.parametrize("case", ["checkpoint", "file", "foreign"])
def test_errors_are_one_line(case, run_folder, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    where = {"checkpoint": tmp_path / "none"}.get(case, run_folder)
    out = {"checkpoint": tmp_path / "out", "file": tmp_path / "file", "foreign": tmp_path}[case]
    assert export_hf.main([str(where), str(out), "--overwrite"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and not captured.out
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_help(capsys):
    with pytest.raises(SystemExit):
        export_hf.main(["--help"])
    assert "trust_remote_code=True" in capsys.readouterr().out
