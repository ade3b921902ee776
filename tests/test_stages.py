"""Instruction and preference tuning: losses against slow references, exact resume, and doors that stay shut."""

import functools
import json
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.numpy
import torch
import torch.nn.functional as F

import answers
import checkpoint
import config
import data
import decoding
import evaluate
import prepare_chat
import stages
import train
from launching import assert_same_run, curve, launch, signals_put_back

CONFIGS = {
    "sft": """
out = "sft"
stage = "sft"
init = "./base"
[data]
path = "chats"
[train]
epochs = 1
batch_size = 4
micro_batch = 2
segment = 32
memory = [[0.0, 64]]
checkpoint_interval = 3
log_interval = 1
[eval]
interval = 100
rows = 4
tokens = 300
depths = [2]
[optim]
lr = 1e-2
adamw_lr = 1e-2
""",
    "dpo": """
out = "dpo"
stage = "dpo"
init = "./sft"
[data]
path = "pairs"
[train]
epochs = 1
batch_size = 4
micro_batch = 2
segment = 64
memory = [[0.0, 64]]
checkpoint_interval = 3
log_interval = 1
[eval]
interval = 100
rows = 4
tokens = 600
answers = 3
[optim]
lr = 3e-3
adamw_lr = 3e-3
""",
}


# A random model hardly ever ends its answers, and 256 tokens take longer than all the rest of a run.
SHORT = "import answers, functools\nanswers.write_answers = functools.partial(answers.write_answers, limit=16)\n"


def rows_of_chats(n):
    for i in range(n):
        turns = [{"role": "user", "content": f"What comes after {i}?"}, {"role": "assistant", "content": f"{i + 1}"}]
        if i % 3 == 0:
            turns += [{"role": "user", "content": "And then? " * (i % 7)}, {"role": "assistant", "content": f"{i + 2}"}]
        yield {"messages": turns}


def rows_of_pairs(n):
    for i in range(n):
        good, bad = f"yes, {i}" * (1 + i % 2), "no, never " * (1 + i % 3)
        yield {"prompt": f"Is {i} a number?", "chosen": good, "rejected": bad}


@pytest.fixture(scope="session")
def finished(tmp_path_factory, write_run):
    """A folder with prepared data, a base model and finished runs of both stages."""
    folder = tmp_path_factory.mktemp("stages")
    for kind, name, rows in (("sft", "chats", rows_of_chats(60)), ("preference", "pairs", rows_of_pairs(40))):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        raw = {"kind": kind, "out": str(folder / name), "val_fraction": 0.2}
        raw["domains"] = {"ours": {"sources": [{"files": str(folder / f"{name}.jsonl")}]}}
        prepare_chat.prepare(config.from_dict(raw, prepare_chat.ChatConfig, "test"), workers=1)
    write_run(folder / "base")
    with pytest.MonkeyPatch.context() as monkeypatch, signals_put_back():
        monkeypatch.chdir(folder)
        shorten_answers(monkeypatch)
        for stage, text in CONFIGS.items():
            (folder / f"{stage}.toml").write_text(text)
            assert run(monkeypatch, stage) == 0
    return folder


@pytest.fixture
def workplace(tmp_path, finished, monkeypatch):
    """A copy of that folder to train in again, without the DPO run."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "dpo")
    monkeypatch.chdir(tmp_path)
    shorten_answers(monkeypatch)
    with signals_put_back():
        yield tmp_path


def shorten_answers(monkeypatch):
    """As `SHORT` does it in processes of their own."""
    monkeypatch.setattr(answers, "write_answers", functools.partial(answers.write_answers, limit=16))


def run(monkeypatch, stage, *overrides):
    """train.py in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["train.py", f"{stage}.toml", *overrides])
    return train.main()


# ------------------------------------------------------------------------------------------------ losses


def slow_dpo(logits, tokens, mask, reference, weights, beta, loss, smoothing, sft, length):
    """DPO as in its paper and in TRL (per-sequence sums of log-probabilities of shifted labels), pair by pair.

    logits (2n, T, V), tokens and mask (2n, T): chosen and rejected in turn; mask is of answer tokens as labels."""
    logps = torch.gather(logits[:, :-1].log_softmax(-1), 2, tokens[:, 1:, None])[..., 0] * mask[:, 1:]
    total = nll = answers = 0
    for i in range(len(tokens) // 2):
        (chosen, rejected), (ref_chosen, ref_rejected) = logps[2 * i : 2 * i + 2].sum(1), reference[i]
        ratio, other = chosen - ref_chosen, rejected - ref_rejected
        if loss == "sigmoid_norm":
            ratio, other = ratio / mask[2 * i].sum(), other / mask[2 * i + 1].sum()
        delta = beta * (ratio - other) + length * (mask[2 * i].sum() - mask[2 * i + 1].sum())
        total = total - weights[i] * ((1 - smoothing) * F.logsigmoid(delta) + smoothing * F.logsigmoid(-delta))
        nll, answers = nll - weights[i] * chosen, answers + weights[i] * mask[2 * i].sum()
    return total / weights.sum() + sft * nll / answers


@pytest.mark.parametrize(
    "loss, smoothing, sft, length",
    [("sigmoid", 0, 0, 0), ("sigmoid", 0.1, 0.5, 0.2), ("sigmoid_norm", 0, 0.2, 0), ("sigmoid_norm", 0, 0, 0.1)],
)
def test_dpo_loss_and_gradients_are_those_of_the_slow_reference(loss, smoothing, sft, length):
    torch.manual_seed(0)
    n, T, V = 3, 12, 17
    logits = torch.randn(2 * n, T, V, dtype=torch.float64, requires_grad=True)
    tokens, reference = torch.randint(V, (2 * n, T)), -10 * torch.rand(n, 2).double()
    mask = torch.zeros(2 * n, T)
    for row in range(2 * n):
        mask[row, 4 + row % 3 : 8 + row % 4] = 1
    weights = torch.tensor([1.0, 0.5, 0.25], dtype=torch.float64)
    slow = slow_dpo(logits, tokens, mask, reference, weights, 0.3, loss, smoothing, sft, length)
    (expected,) = torch.autograd.grad(slow, logits)

    nll = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(2 * n, -1)
    sequence = torch.where(mask[:, 1:] > 0, torch.arange(2 * n)[:, None], -1)
    dpo = stages.DPOConfig(beta=0.3, loss=loss, label_smoothing=smoothing, sft=sft, length=length)
    chosen = torch.where((sequence >= 0) & (sequence % 2 == 0), weights[sequence // 2], 0)
    share, chosen = (x / x.sum() for x in (weights, chosen))
    ours = stages.PairLoss(dpo, sequence, reference.numpy(), share.numpy(), chosen.numpy())
    value = ours(nll)
    (found,) = torch.autograd.grad(value, logits)
    torch.testing.assert_close(value, slow)
    torch.testing.assert_close(found, expected)
    sums = dict(zip(stages.DPO.names, ours.sums.tolist()))
    rewards = [sums[f"rewards/{side}"] for side in ("chosen", "rejected")]
    assert sums["pairs"] == n and sums["rewards/margins"] == pytest.approx(rewards[0] - rewards[1])
    logps = -(nll * (sequence >= 0)).sum(1).view(n, 2)  # rewards are of sums with either loss
    assert rewards == pytest.approx((0.3 * (logps - reference)).sum(0).tolist())


def test_answers_are_to_prompts_of_all_sources(tiny_model, monkeypatch):
    """Rows lie source by source; prompts that occur twice are asked once."""
    rows = [([*range(1, 3 + i // 2), data.ASSISTANT, *[7] * (i + 1)], i + 1) for i in range(12)]
    marks = [(np.array(ids), np.arange(len(ids)) >= len(ids) - n - 1) for ids, n in rows]
    split = SimpleNamespace(index=rows, row=lambda i: marks[i])
    chats = SimpleNamespace(split=lambda name: split, manifest={"kind": "sft"})
    asked = []

    def generate_batch(model, prompts, limits, **options):
        asked.extend(prompts)
        assert len(prompts) == len(limits) <= 2
        return [decoding.Continuation([5] * 2, [3] * 2, True), decoding.Continuation([5] * 8, [4] * 8)][-len(prompts) :]

    monkeypatch.setattr(decoding, "generate_batch", generate_batch)
    monkeypatch.setattr(answers, "AT_ONCE", 2)
    written = answers.write_answers(tiny_model(), chats, 3, 8, SimpleNamespace(seed=0, segment=8), limit=8)
    assert [prompt[:-1] for prompt in asked] == [[*range(1, n)] for n in (3, 5, 8)]
    assert written["tokens"] == 6 and written["ended"] == pytest.approx(1 / 3)
    assert written["depth"] == pytest.approx((2 * 3 + 16 * 4) / 18)
    assert written["data_tokens"] == pytest.approx((1 + 5 + 8) / 3) and written["data_ended"] == pytest.approx(2 / 3)


def test_a_loss_of_nll_is_differentiated_through_it(tiny_model):
    """(sum of nll)^2 of a row has the derivative 2 * sum by each nll: weights that can also be given."""
    model, tokens = tiny_model(vocab_size=61, document_start=60), torch.randint(60, (2, 2, 9))
    out = model(*tokens, weights=lambda nll: (nll.sum(1) ** 2).mean())
    out.loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    sums = out.nll.sum(1, keepdim=True)
    model(*tokens, weights=(2 * sums / 2).expand_as(out.nll).contiguous()).loss.backward()
    assert out.loss.item() == pytest.approx(float((sums**2).mean()), rel=1e-6)
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad, msg=name)
    with torch.no_grad():
        assert float(model(*tokens, weights=lambda nll: nll.sum()).loss) == pytest.approx(float(sums.sum()), rel=1e-6)


# ------------------------------------------------------------------------------------------------ runs


def test_sft_learns_answers(finished):
    lines = curve(finished / "sft")
    first, last = [line for line in lines if line["event"] == "validation"]
    assert last["loss"] < first["loss"] - 1 and last["loss"] == last["answers"]["nats"]
    assert first["forced"]["2"]["depth"] == 2 and list(last["domains"]) == ["ours"]
    steps = [line for line in lines if line["event"] == "train"]
    trained = json.loads((finished / "chats/manifest.json").read_text())["train"]
    assert sum(line["groups"]["answer"]["tokens"] for line in steps) == trained["trained"]
    groups = [group for line in steps for group in line["groups"].values()]
    assert sum(group["tokens"] for group in groups) == trained["tokens"], "all rows once, and no padding"


def test_prompts_have_no_loss(workplace, monkeypatch):
    """Only where the mask is 1 do targets matter: with all others exchanged, training is the same."""
    read = stages.SFT.read

    def exchanged(self):
        parts, state = read(self)
        for part in parts:
            part.targets[part.weights == 0] = 11
        return parts, state

    monkeypatch.setattr(stages.SFT, "read", exchanged)
    assert run(monkeypatch, "sft", "--out=again") == 0
    here, there = (checkpoint.read_tensors(checkpoint.find(run), "model") for run in ("again", "./sft"))
    assert all(torch.equal(here[name], there[name]) for name in there)


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_micro_batches_and_processes_change_nothing(workplace, finished, monkeypatch, stage):
    """An answer weighs the same in whichever micro-batch and process it is."""
    reference = [line for line in curve(finished / stage) if line["event"] == "train"]
    if stage == "sft":
        assert run(monkeypatch, stage, "--out=again", "--train.micro_batch=4") == 0
    else:  # the packing of pairs depends on the micro-batch, so compare processes
        result = launch(workplace, f"{stage}.toml", "--out=again", before=SHORT, processes=2)
        assert result.returncode == 0, result.stderr
    found = [line for line in curve(workplace / "again") if line["event"] == "train"]
    assert len(found) == len(reference)
    for here, there in zip(found, reference):
        assert here["loss"] == pytest.approx(there["loss"], rel=2e-3)
        assert here["grad_norm"] == pytest.approx(there["grad_norm"], rel=2e-2)


def test_dpo_starts_at_the_reference_and_learns(finished):
    lines = curve(finished / "dpo")
    first, last = [line for line in lines if line["event"] == "validation"]
    assert first["rewards/accuracies"] == 0.5 and first["rewards/margins"] == 0
    assert first["loss"] == pytest.approx(np.log(2)) and first["length_correlation"] == 0
    assert last["rewards/accuracies"] > 0.8 and last["rewards/margins"] > 0 and last["loss"] < first["loss"] - 0.1
    assert last["written"]["answers"] == 3 and 0 <= last["written"]["ended"] <= 1 <= last["written"]["depth"] <= 4
    step = next(line for line in lines if line["event"] == "train")
    assert step["loss"] == pytest.approx(np.log(2), abs=1e-4) and step["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert step["depth"] == 4, "every token takes the maximum"
    assert step["logps/chosen"] < 0 and step["groups"].keys() == {"prompt", "chosen", "rejected"}


def test_sft_in_fp8_is_nearly_the_same(workplace, finished, monkeypatch):
    assert run(monkeypatch, "sft", "--out=again", "--train.dtype=fp8") == 0
    ours, theirs = (
        [line["loss"] for line in curve(folder) if line["event"] == "train"]
        for folder in (workplace / "again", finished / "sft")
    )
    assert ours != theirs and ours == pytest.approx(theirs, rel=0.05)  # a random model, which rounding changes most


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_killed_it_goes_on_bit_for_bit(workplace, finished, monkeypatch, capsys, stage):
    shutil.rmtree(workplace / stage, ignore_errors=True)
    kill = """
train_step = train.Trainer.train_step
def killed(self):
    metrics = train_step(self)
    if self.step == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return metrics
train.Trainer.train_step = killed
"""
    assert launch(workplace, f"{stage}.toml", before=SHORT + kill).returncode == -signal.SIGKILL
    assert run(monkeypatch, stage) == 0 and "going on from" in capsys.readouterr().out
    assert_same_run(workplace / stage, finished / stage)


def test_the_reference_is_worked_out_once_and_belongs_to_its_model(workplace, finished, monkeypatch, capsys):
    shutil.copytree(finished / "dpo", "dpo")
    answer_logps, calls = answers.answer_logps, []
    monkeypatch.setattr(answers, "answer_logps", lambda *a: calls.append(a[4]) or answer_logps(*a))
    assert run(monkeypatch, "dpo", "--out=dpo") == 0
    assert "reference" not in calls
    assert run(monkeypatch, "dpo", "--out=dpo", "--dpo.depth=2") == 0
    assert calls.count("reference") == 2, "at another depth the reference is another"
    file = checkpoint.find("./sft")
    tensors = checkpoint.read_tensors(file, "model")
    tensors["halting.bias"] += 1
    meta = json.loads((file / "meta.json").read_text())
    unfinished = checkpoint.begin(Path("sft/checkpoints"), meta["step"])
    checkpoint.write_tensors(unfinished, "model", tensors)
    checkpoint.finish(unfinished, meta)
    capsys.readouterr()
    assert run(monkeypatch, "dpo", "--out=dpo") == 2
    assert "the model at `init` is not the one that" in capsys.readouterr().err
    Path("dpo/reference.safetensors").write_bytes(b"half")
    assert run(monkeypatch, "dpo", "--out=dpo") == 2
    assert "reference.safetensors: damaged" in capsys.readouterr().err


def test_reference_log_probabilities_are_those_of_a_direct_forward(finished):
    model, meta = checkpoint.load_model(finished / "sft")
    chats = stages.chat.Chats.open(finished / "pairs")
    rows = answers.pair_rows(chats, "val")
    found = answers.answer_logps(model, rows, 8, 3, None, segment=8, batch=3)  # memory grows to the longest row
    for i, (ids, targets, mask) in enumerate(rows):
        with torch.no_grad():
            out = model(torch.from_numpy(ids)[None], torch.from_numpy(targets)[None], depth=3)
        assert found[i // 2, i % 2] == pytest.approx(-float(out.nll[0, torch.from_numpy(mask)].sum()), abs=1e-3)


def test_any_checkpoint_is_measured_as_in_training(finished, monkeypatch):
    monkeypatch.chdir(finished)
    found = {}
    for name, *options in (("sft", "--data=chats", "--answers=3"), ("dpo", "--data=pairs", "--reference=./sft")):
        file = finished / f"{name}.json"
        assert evaluate.main(["chat", f"./{name}", *options, "--tokens=600", f"--json={file}"]) == 0
        found[name] = json.loads(file.read_text())
    trained = {name: curve(finished / name)[-1] for name in found}
    for side in ("prompts", "answers"):
        assert found["sft"]["all"][side] == pytest.approx(trained["sft"][side], rel=1e-5)
    assert found["sft"]["ours"] == found["sft"]["all"] and found["sft"]["written"]["answers"] == 3
    ours, theirs = found["dpo"]["all"], trained["dpo"]
    assert ours["pairs"] == theirs["pairs"] and ours["accuracy"] == pytest.approx(theirs["rewards/accuracies"])
    assert ours["margin"] == pytest.approx(theirs["rewards/margins"], rel=1e-3)
    assert found["dpo"]["length_correlation"] == pytest.approx(theirs["length_correlation"], rel=1e-3)
    longer, shorter = (found["dpo"][f"chosen is {kind}"] for kind in ("longer", "shorter"))
    assert longer["longer"] == 1 and shorter["longer"] == 0
    assert ours["longer"] >= longer["pairs"] / ours["pairs"]


@pytest.mark.parametrize(
    "options, message",
    [(["--data=chats", "--reference=./sft"], "for which --reference has no use"),
     (["--data=pairs"], "name the model before DPO by --reference"), (["--data=nowhere"], "nowhere"),
     (["--data=pairs", "--reference=nowhere"], "nowhere"), (["--data=pairs", "--answers=-1"], "--answers -1"),
     (["--data=pairs", "--answers=1", "--seed=-1"], "--seed -1")],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused(finished, monkeypatch, capsys, options, message):
    monkeypatch.chdir(finished)
    assert evaluate.main(["chat", "./dpo", *options]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_the_end_of_an_answer_can_be_left_out_of_the_comparison(workplace, finished, monkeypatch):
    assert run(monkeypatch, "dpo", "--out=open", "--dpo.end=false") == 0
    files = [folder / "reference.safetensors" for folder in (finished / "dpo", workplace / "open")]
    whole, opened = (safetensors.numpy.load_file(file)["val"] for file in files)
    model, _ = checkpoint.load_model(finished / "sft")
    rows = answers.pair_rows(stages.chat.Chats.open("pairs"), "val")
    for i, (ids, targets, mask) in enumerate(rows):
        with torch.no_grad():
            out = model(*(torch.from_numpy(x)[None] for x in (ids, targets)), depth=model.config.max_depth)
        assert targets[mask][-1] == stages.data.EOT
        assert whole[i // 2, i % 2] - opened[i // 2, i % 2] == pytest.approx(-float(out.nll[0, mask][-1]), abs=1e-3)
    assert (
        evaluate.main(["chat", "./open", "--data=pairs", "--reference=./sft", "--tokens=600", "--json=open.json"]) == 0
    )
    found, trained = json.loads(Path("open.json").read_text())["all"], curve(workplace / "open")[-1]
    assert found["margin"] == pytest.approx(trained["rewards/margins"], rel=1e-3), "measured as it was trained"

    closing = torch.tensor([[False, False, True, False, True]])
    sequence = torch.tensor([[-1, 0, 0, 1, 1]])
    nll = torch.ones(1, 5, requires_grad=True)
    for sft, moved in ((0.0, [False, True, False, True, False]), (0.5, [False, True, True, True, False])):
        dpo, compared = stages.DPOConfig(end=False, sft=sft), torch.where(closing, -1, sequence)
        loss = stages.PairLoss(dpo, compared, np.zeros((1, 2), np.float32), np.ones(1), (sequence == 0).numpy() / 2)
        (gradient,) = torch.autograd.grad(loss(nll), nll)
        assert (gradient != 0).tolist() == [moved]


def test_prompts_can_weigh_alike(workplace):
    """However many pairs they have, and however many tokens their answers."""
    rows = [*rows_of_pairs(9), {"prompt": "Is 7 a number?", "chosen": "Of course.", "rejected": "no"}]
    Path("more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    raw = {"kind": "preference", "out": "more", "domains": {"ours": {"sources": [{"files": "more.jsonl"}]}}}
    prepare_chat.prepare(config.from_dict(raw, prepare_chat.ChatConfig, "test"), workers=1)
    chats = stages.chat.Chats.open("more")
    assert sorted(stages.pairs_of_prompt(chats, "train")) == [1] * 8 + [2] * 2

    Path("more.toml").write_text(CONFIGS["dpo"].replace('"pairs"', '"more"'))
    cfg = config.load("more.toml", train.Config, ["--dpo.prompt_power=1", "--dpo.sft=1"]).with_model()
    stage = stages.DPO(cfg, checkpoint.load_model("./sft")[0], 0, 1, 2)
    relative = []
    for _ in range(stage.steps):
        losses = [part.weights for part in stage.read()[0]]
        shares, chosen = (torch.cat([getattr(x, name).flatten() for x in losses]) for name in ("share", "chosen"))
        assert float(shares.sum()) == pytest.approx(len(losses)) == pytest.approx(float(chosen.sum()))
        for loss in losses:
            for pair, share in enumerate((loss.share / shares.max()).tolist()):
                of_tokens = loss.chosen[loss.compared == 2 * pair] / chosen.max()
                assert of_tokens.tolist() == pytest.approx([share] * len(of_tokens)) and len(of_tokens)
                relative.append(share)
    assert sorted(relative) == [0.5] * 2 + [1] * 8


# ------------------------------------------------------------------------------------------------ replay

REPLAY = ["--replay.path=prepared", "--replay.rows=1", "--replay.weight=0.5"]


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_text_among_the_rows_adds_its_mean_to_the_loss(workplace, prepared, monkeypatch, stage):
    """At the first step, which the same model takes; `text` is of the data at replay.path, and goes by the own rule."""
    runs = {}
    for name, overrides in (("text", REPLAY), ("more", [*REPLAY[:2], "--replay.weight=2"])):
        assert run(monkeypatch, stage, f"--out={name}", *overrides) == 0
        runs[name] = [line for line in curve(workplace / name) if line["event"] == "train"]
    first, more = runs["text"][0], runs["more"][0]
    text, others = first["groups"].pop("text"), first["groups"]
    assert text["tokens"] == 2 * (32 if stage == "sft" else 64) and text["loss"] == more["groups"]["text"]["loss"]
    assert first["loss"] == more["loss"]
    assert more["objective"] - first["objective"] == pytest.approx(1.5 * text["loss"], rel=1e-4)
    if stage == "dpo":
        assert {group["depth"] for group in others.values()} == {4} and text["depth"] < 4
    texts = [line["groups"]["text"]["loss"] for line in runs["more"]]
    assert np.mean(texts[-3:]) < np.mean(texts[:3])


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_with_text_a_stopped_run_goes_on_bit_for_bit(workplace, prepared, monkeypatch, capsys, stage):
    assert run(monkeypatch, stage, "--out=whole", *REPLAY) == 0
    step = train.Trainer.train_step

    def stopped(self):
        if self.step == 4:
            raise KeyboardInterrupt
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "train_step", stopped)
        run(patch, stage, "--out=parts", *REPLAY)
    capsys.readouterr()
    for changed, reason in (
        ("--train.batch_size=8", "'train.batch_size' was 4"),
        ("--train.micro_batch=4", "'train.micro_batch' was 2"),
    ):
        assert run(monkeypatch, stage, "--out=parts", *REPLAY, changed) == 2
        assert reason in capsys.readouterr().err
    assert run(monkeypatch, stage, "--out=parts", *REPLAY) == 0 and "going on from" in capsys.readouterr().out
    assert_same_run(workplace / "parts", workplace / "whole")


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    "stage, override, message",
    [
        ("sft", "--init=nowhere", "nowhere: no such folder"),
        ("sft", "--init=", "'init' is missing: the stage sft goes on from a model"),
        ("dpo", "--init=./base", "base is of the stage pretrain; the stage dpo goes on from a model of the stage sft"),
        ("sft", "--data.path=pairs", "pairs: holds preference, not sft"),
        ("dpo", "--data.path=chats", "chats: holds sft, not preference"),
        ("sft", "--train.tokens=1000", "'train.tokens' is not used in the stage sft"),
        ("sft", "--train.epochs=0", "'train.epochs' must be at least 1"),
        ("sft", "--dpo.beta=0.2", "[dpo] has no use in the stage sft"),
        ("sft", "--model.max_depth=6", "model.max_depth: 4 -> 6"),
        ("dpo", "--model.halting=exit", "has no head for 'model.halting = exit', and the stage dpo fits none"),
        ("dpo", "--train.frozen=true", "'train.frozen' has no use in the stage dpo"),
        ("dpo", "--train.warm_up=0.5", "'train.warm_up' has no use in the stage dpo"),
        ("sft", "--eval.depths=[5]", "'eval.depths' has 5; this model's depths are 1..4"),
        ("dpo", "--dpo.depth=5", "'dpo.depth' 5 must lie in 1..4"),
        ("dpo", "--dpo.loss=hinge", "'dpo.loss' must be one of 'sigmoid', 'sigmoid_norm', not 'hinge'"),
        ("dpo", "--dpo.label_smoothing=0.5", "'label_smoothing' must lie in [0, 0.5), not 0.5"),
        ("dpo", "--dpo.length=-1", "'sft', 'depth', 'prompt_power' and 'length' must not be negative"),
        ("dpo", "--train.target_depth=2", "'train.target_depth' has no use in the stage dpo"),
        ("dpo", "--train.dtype=fp8", "'train.dtype = fp8' has no use in the stage dpo"),
        ("dpo", "--train.segment=16", "does not fit into 16"),
        ("sft", "--replay.rows=1", "'path' and 'rows' go together"),
        ("sft", "--replay.path=text", "'path' and 'rows' go together"),
        ("sft", "--replay.rows=-1", "'rows' must not be negative, as -1 is"),
        ("sft", "--replay.weight=0", "'weight' must be above 0, not 0"),
        ("dpo", "--dpo.prompt_power=-1", "'sft', 'depth', 'prompt_power' and 'length' must not be negative"),
        ("dpo", "--replay={path='chats', rows=2}", "'replay.rows' 2 must be fewer than the 2 rows of a micro-batch"),
        ("dpo", "--replay={path='nowhere', rows=1}", "data config. Without text: --replay.path= --replay.rows=0"),
    ],
)  # fmt: skip
def test_bad_settings_are_one_clear_line(workplace, monkeypatch, capsys, stage, override, message):
    assert run(monkeypatch, stage, "--out=other", override) == 2
    err = capsys.readouterr().err
    assert message in err and err.startswith("error: ") and err.count("\n") == 1, err


@pytest.mark.parametrize("by", ["gain", "loss"])
def test_a_model_with_an_exit_head_keeps_it(workplace, write_run, monkeypatch, by):
    """SFT trains the model and fits the head anew, at a tolerance for the target depth; DPO trains the model alone."""
    write_run(workplace / "exit", halting="exit", exit_by=by)
    changes = ["--init=./exit", "--out=./tuned", "--train.target_depth=2", "--train.exit_interval=1"]
    assert run(monkeypatch, "sft", *changes) == 0
    assert run(monkeypatch, "dpo", "--init=./tuned", "--out=./preferring", "--eval.answers=0") == 0
    first, tuned, preferring = (checkpoint.load_model(name)[0] for name in ("./exit", "./tuned", "./preferring"))
    assert all(not torch.equal(x, y) for x, y in zip(first.parameters(), tuned.parameters()))
    steps = [line for line in curve(workplace / "tuned") if line["event"] == "train"]
    assert steps[-1]["loss"] < steps[0]["loss"] and steps[-1]["tolerance"] == tuned.config.tolerance
    same = [name for name, x in tuned.state_dict().items() if torch.equal(x, preferring.state_dict()[name])]
    assert same == ["halting.weight", "halting.bias"] and preferring.config == tuned.config
    assert tuned.config.halting == "exit"


def test_what_an_exit_head_can_do_needs_no_model_in_the_config(workplace, write_run, monkeypatch, capsys):
    """It is the one of `init`, tolerance and all."""
    write_run(workplace / "exit", halting="exit", tolerance=0.7)
    mixed = ["--train.sampled_depth=3", "--train.sampled_by=token", "--train.sampled_share=0.5", "--out=./mixed"]
    assert run(monkeypatch, "sft", "--init=./exit", *mixed) == 0
    assert checkpoint.load_model("./mixed")[0].config.tolerance == 0.7
    assert run(monkeypatch, "sft", "--init=./mixed", "--out=./frozen", "--train.frozen=true") == 0
    capsys.readouterr()
    assert run(monkeypatch, "sft", *mixed[:3], "--out=./other") == 2
    assert "'train.sampled_share' 0.5 needs 'model.halting = exit'" in capsys.readouterr().err


def test_an_exit_head_can_be_left_behind_or_made_by_sft(workplace, write_run, monkeypatch):
    write_run(workplace / "with_head", halting="exit")
    for init, halting in (("./with_head", "fixed"), ("./base", "exit")):
        assert run(monkeypatch, "sft", f"--init={init}", f"--out=./{halting}", f"--model.halting={halting}") == 0
        assert checkpoint.load_model(f"./{halting}")[0].config.halting == halting


def test_pretraining_data_are_no_chats(workplace, prepared, monkeypatch, capsys):
    assert run(monkeypatch, "sft", "--out=other", f"--data.path={prepared}") == 2
    assert "holds pretraining text, not sft" in capsys.readouterr().err
