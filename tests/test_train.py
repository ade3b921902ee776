"""Training: exact resume whatever kills the run, several processes, bad steps, refusals."""

import json
import math
import os
import random
import shutil
import signal
import sys

import numpy as np
import pytest
import torch

import checkpoint
import config
import halting
import prepare_data
import train
from launching import ROOT, assert_same_run, curve, launch, signals_put_back, torchrun
from metrics import peak_tflops
from model import RecurrentTransformer
from optim import OptimConfig
from sources import Source

STEPS = 12
CONFIG = f"""
out = "run"
[model]
width = 16
heads = 2
hidden = 32
max_depth = 3
halting_bias = -1.0
[data]
path = "data"
[train]
tokens = {STEPS * 4 * 16}
batch_size = 4
micro_batch = 2
segment = 16
memory = [[0.0, 16], [0.5, 32]]
ponder_weight = 0.01
target_depth = 2.0
checkpoint_interval = 3
log_interval = 1
[eval]
interval = 6
tokens = 200
rows = 2
depths = [1, 3]
"""


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    domains = {
        name: prepare_data.Domain([Source(generated=name, documents=40)]) for name in ("arithmetic", "word_problems")
    }
    prepare_data.prepare(prepare_data.DataConfig(str(folder / "data"), domains, val_fraction=0.2))
    return folder / "data"


@pytest.fixture
def workplace(tmp_path, prepared, monkeypatch):
    """A folder with prepared data and a config, in which `run` trains."""
    shutil.copytree(prepared, tmp_path / "data")
    (tmp_path / "tiny.toml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    with signals_put_back():
        yield tmp_path


@pytest.fixture(scope="session")
def reference(tmp_path_factory, prepared):
    """The curve of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("reference")
    shutil.copytree(prepared, folder / "data")
    (folder / "tiny.toml").write_text(CONFIG)
    with pytest.MonkeyPatch.context() as monkeypatch, signals_put_back():
        monkeypatch.chdir(folder)
        assert run(monkeypatch) == 0
    return folder


def run(monkeypatch, *overrides):
    """train.py in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["train.py", "tiny.toml", *overrides])
    return train.main()


# ------------------------------------------------------------------------------------------------ resume


def test_killed_at_a_random_step_the_curve_continues_bit_for_bit(workplace, reference, monkeypatch, capsys):
    step = random.SystemRandom().randrange(1, STEPS)
    kill = f"""
train_step = train.Trainer.train_step
def killed(self):
    metrics = train_step(self)
    if self.step == {step}:
        os.kill(os.getpid(), signal.SIGKILL)
    return metrics
train.Trainer.train_step = killed
"""
    assert launch(workplace, "tiny.toml", before=kill).returncode == -signal.SIGKILL, f"step {step}"
    assert run(monkeypatch) == 0
    assert ("going on from" in capsys.readouterr().out) is (step > 3), f"step {step}"
    assert_same_run(workplace / "run", reference / "run")


@pytest.mark.parametrize("during", ["model", "optimizer", "memory_0"])
def test_killed_while_writing_a_checkpoint(workplace, reference, monkeypatch, during):
    """Half a file is on the disk when the process dies; the run goes on from the checkpoint before."""
    kill = f"""
write_tensors = checkpoint.write_tensors
def killed(path, name, tensors):
    write_tensors(path, name, tensors)
    if name == "{during}" and path.name.startswith("step_00000006"):
        file = path / (name + ".safetensors")
        os.truncate(file, file.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)
checkpoint.write_tensors = killed
"""
    assert launch(workplace, "tiny.toml", before=kill).returncode == -signal.SIGKILL
    assert (workplace / "run/checkpoints/step_00000006.unfinished").exists()
    assert checkpoint.find(workplace / "run").name == "step_00000003"
    assert run(monkeypatch) == 0
    assert_same_run(workplace / "run", reference / "run")
    assert not list((workplace / "run/checkpoints").glob("*.unfinished"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_signal_saves_and_exits_with_zero(workplace, reference, monkeypatch, capsys, number):
    train_step = train.Trainer.train_step

    def interrupted(self):
        metrics = train_step(self)
        if self.step == 5:
            os.kill(os.getpid(), number)
        return metrics

    monkeypatch.setattr(train.Trainer, "train_step", interrupted)
    assert run(monkeypatch) == 0
    assert "saved" in capsys.readouterr().out
    assert checkpoint.find("run").name == "step_00000005"
    assert checkpoint.load_model("run")[1]["memory"] == 16  # what sample.py takes: not yet the curriculum's last
    assert run(monkeypatch) == 0
    assert_same_run(workplace / "run", reference / "run")


def test_a_kill_between_saving_and_evaluating_loses_no_evaluation(workplace, reference, monkeypatch):
    report = train.Trainer.report

    def killed(self, log):
        if self.step == 6:
            raise KeyboardInterrupt
        report(self, log)

    monkeypatch.setattr(train.Trainer, "report", killed)
    assert run(monkeypatch) == 130
    monkeypatch.setattr(train.Trainer, "report", report)
    assert run(monkeypatch) == 0
    assert_same_run(workplace / "run", reference / "run")


def test_a_run_from_before_a_knob_goes_on(reference, tmp_path, monkeypatch):
    """Its configuration lacks the knob, which then has its default."""
    monkeypatch.chdir(shutil.copytree(reference, tmp_path / "copy"))
    read_meta = checkpoint.read_meta

    def before(path):
        meta = read_meta(path)
        del meta["config"]["model"]["sandwich"]
        return meta

    monkeypatch.setattr(checkpoint, "read_meta", before)
    assert run(monkeypatch) == 0
    assert run(monkeypatch, "--model.sandwich=true") == 2


def test_a_finished_run_stays_as_it_is(reference, tmp_path, monkeypatch):
    folder = shutil.copytree(reference, tmp_path / "copy")
    monkeypatch.chdir(folder)
    assert run(monkeypatch) == 0
    assert_same_run(folder / "run", reference / "run")


def test_the_random_state_and_the_optimizers_are_restored(reference, tmp_path, monkeypatch):
    folder = shutil.copytree(reference, tmp_path / "copy")
    monkeypatch.chdir(folder)
    trainer = train.Trainer(config.load("tiny.toml", train.Config))
    torch.manual_seed(99)
    trainer.resume()
    saved = checkpoint.read_tensors(checkpoint.find("run"), "optimizer")
    assert torch.equal(torch.get_rng_state(), saved["random/cpu"])
    restored = checkpoint.optimizer_tensors(trainer.model, trainer.optimizers)
    assert restored.keys() == saved.keys() - {"random/cpu"} and len(restored) > 10
    assert all(torch.equal(restored[key], saved[key]) for key in restored)


def test_fp8_training_resumes_bit_for_bit(workplace, monkeypatch):
    """Its scales come from the steps before, and are a part of the checkpoint."""
    fp8 = "--train.dtype=fp8"
    assert run(monkeypatch, fp8, "--out=whole") == 0
    train_step = train.Trainer.train_step

    def interrupted(self):
        metrics = train_step(self)
        if self.step == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return metrics

    monkeypatch.setattr(train.Trainer, "train_step", interrupted)
    assert run(monkeypatch, fp8) == 0 and run(monkeypatch, fp8) == 0
    assert curve(workplace / "run") == curve(workplace / "whole")
    amax = [line["amax"] for line in curve(workplace / "run") if line["event"] == "fp8"]
    assert len(amax) == 3 and [len(x) for x in amax[-1]["gradient"].values()] == [3] * 4  # of every site and step


# ------------------------------------------------------------------------------------------------ what is computed


@pytest.mark.parametrize("gradients", ["e5m2", "e4m3"])
def test_fp8_trains_nearly_as_float32_does(workplace, reference, monkeypatch, gradients):
    assert run(monkeypatch, "--train.dtype=fp8", f"--train.fp8_gradients={gradients}") == 0
    curves = [curve(folder / "run") for folder in (workplace, reference)]
    ours, theirs = ([line["loss"] for line in lines if line["event"] == "train"] for lines in curves)
    assert ours != theirs and ours == pytest.approx(theirs, abs=0.02)


def test_where_fp8_does_not_work_training_says_why_and_goes_on_without(workplace, reference, monkeypatch, capsys):
    monkeypatch.setattr(train.fp8, "self_test", lambda device: "the GEMM is off by 0.5")
    monkeypatch.setattr(train.Trainer, "device_name", lambda self: "Some GPU")
    assert run(monkeypatch, "--train.dtype=fp8") == 0
    assert "FP8 is off, training in bfloat16: Some GPU: the GEMM is off by 0.5" in capsys.readouterr().err
    assert_same_run(workplace / "run", reference / "run")


def test_where_a_kernel_is_wrong_training_says_so_and_goes_on_without_any(workplace, reference, monkeypatch, capsys):
    monkeypatch.setattr(train.kernels, "enabled", True)  # put back afterwards
    monkeypatch.setattr(train.fp8, "self_test_plain", lambda device, dtype, d: f"the attention of {d} is off by 0.5")
    monkeypatch.setattr(train.Trainer, "device_name", lambda self: "Some GPU")
    assert run(monkeypatch) == 0 and not train.kernels.enabled
    assert "without kernels, slower: Some GPU: the attention of 8 is off by 0.5" in capsys.readouterr().err
    assert_same_run(workplace / "run", reference / "run")


@pytest.mark.parametrize("settings", ["recompute=mlp", "recompute=step", "sampled_by=row sampled_share=0.2"])
def test_what_changes_nothing(workplace, reference, monkeypatch, settings):
    """Activations computed again; whose depths are drawn, where none is."""
    assert run(monkeypatch, *(f"--train.{setting}" for setting in settings.split())) == 0
    assert_same_run(workplace / "run", reference / "run")


def test_what_a_run_reports(reference):
    lines = curve(reference / "run")
    assert [line["step"] for line in lines if line["event"] == "train"] == list(range(1, STEPS + 1))
    assert [line["step"] for line in lines if line["event"] == "validation"] == [0, 6, STEPS]
    for line in lines:
        groups = line["groups" if line["event"] == "train" else "domains"]
        assert groups.keys() <= {"arithmetic", "word_problems"}
        if line["event"] == "train":
            number = sum(d["tokens"] for d in groups.values())
            mean = sum(d["loss"] * d["tokens"] for d in groups.values()) / number
            assert number == 4 * 16 and mean == pytest.approx(line["loss"])
        else:
            assert line["forced"].keys() == {"1", "3"} and line["forced"]["3"]["depth"] == 3
    assert [line["memory"] for line in lines if line["event"] == "train"] == [16] * 6 + [32] * 6
    first, _, last = (line["macro"]["bits_per_byte"] for line in lines if line["event"] == "validation")
    assert last < first
    summary = json.loads((reference / "run/summary.json").read_text())
    assert summary["validation"] == [line for line in lines if line["event"] == "validation"][-1]
    assert summary["data"] == "data" and summary["tokens"] == STEPS * 4 * 16
    assert 0 < summary["flops"] <= summary["executed_flops"]
    assert (reference / "run/checkpoints/best").resolve() == checkpoint.find(reference / "run")


def test_micro_batches_change_nothing(workplace, reference, monkeypatch):
    assert run(monkeypatch, "--train.micro_batch=4", "--out=one") == 0
    for a, b in zip(curve(workplace / "one"), curve(reference / "run")):
        assert a.get("loss") == pytest.approx(b.get("loss"), abs=1e-4)


def test_two_processes_give_the_losses_of_one(workplace, reference):
    halves = torchrun(workplace, "tiny.toml", "--train.micro_batch=0", processes=2)
    assert halves.returncode == 0, halves.stderr
    ours, theirs = curve(workplace / "run"), curve(reference / "run")
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        assert a.get("loss") == pytest.approx(b.get("loss"), abs=1e-4)
        assert a.get("depth") == pytest.approx(b.get("depth"), abs=0.02)
    # and what two processes saved, one can go on from
    shutil.rmtree(workplace / "run/checkpoints/step_00000012")
    alone = launch(workplace, "tiny.toml")
    assert alone.returncode == 0 and "step_00000009" in alone.stdout, alone.stderr
    for a, b in zip(curve(workplace / "run"), theirs):
        assert a.get("loss") == pytest.approx(b.get("loss"), abs=1e-4)


def poison(monkeypatch, steps, amax=False):
    """Make the loss of these steps infinite, or what FP8 rounds in its GEMMs."""
    loss, quantize = RecurrentTransformer.loss, train.fp8.quantize

    def poisoned(self, *args):
        factor = float("inf") if self.training and poisoned.step in steps else 1
        return tuple(part * factor for part in loss(self, *args))

    def saturated(x, *args):
        rounded, largest = quantize(x, *args)
        return rounded, torch.full_like(largest, math.inf) if poisoned.step in steps else largest

    train_step = train.Trainer.train_step

    def counted(self):
        poisoned.step = self.step + 1
        before = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        metrics = train_step(self)
        same = all(torch.equal(p, before[name]) for name, p in self.model.named_parameters())
        assert same is (self.step in steps)
        return metrics

    if amax:
        monkeypatch.setattr(train.fp8, "quantize", saturated)
    else:
        monkeypatch.setattr(RecurrentTransformer, "loss", poisoned)
    monkeypatch.setattr(train.Trainer, "train_step", counted)


def test_a_step_with_a_non_finite_loss_is_skipped_and_counted(workplace, monkeypatch):
    poison(monkeypatch, {4, 5})
    assert run(monkeypatch, "--train.max_bad_steps=3") == 0
    lines = [line for line in curve(workplace / "run") if line["event"] == "train"]
    assert [line["bad_steps"] for line in lines] == [0] * 3 + [1] + [2] * 8
    assert [line["loss"] is None for line in lines] == [step in (4, 5) for step in range(1, STEPS + 1)]
    assert all(line["loss"] < 20 for line in lines[5:])  # neither weights nor memory are spoiled


def test_a_step_in_which_fp8_saturated_infinity_is_skipped_and_counted(workplace, monkeypatch):
    poison(monkeypatch, {4, 5}, amax=True)
    assert run(monkeypatch, "--train.dtype=fp8", "--train.max_bad_steps=3") == 0
    lines = [line for line in curve(workplace / "run") if line["event"] == "train"]
    assert [line["bad_steps"] for line in lines] == [0] * 3 + [1] + [2] * 8
    assert [line["grad_norm"] is None for line in lines] == [step in (4, 5) for step in range(1, STEPS + 1)]


def test_too_many_bad_steps_stop_the_run_and_name_the_last_good_checkpoint(workplace, monkeypatch, capsys):
    poison(monkeypatch, set(range(4, STEPS + 1)))
    assert run(monkeypatch, "--train.max_bad_steps=4") == 1
    error = capsys.readouterr().err
    assert "4 steps in a row with a non-finite loss" in error and "step_00000003" in error
    assert [path.name for path in checkpoint.steps(workplace / "run/checkpoints")] == ["step_00000003"]


def test_a_checkpoint_that_cannot_be_written_is_one_clear_line(workplace, monkeypatch, capsys):
    def full(tensors, file):
        raise checkpoint.safetensors.SafetensorError("No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    assert run(monkeypatch) == 2
    assert "No space left on device); the checkpoint before it is whole" in capsys.readouterr().err
    assert checkpoint.steps(workplace / "run/checkpoints") == []


@pytest.mark.parametrize(
    "name, peak",
    [("NVIDIA H200", 989), ("NVIDIA L40S", 362), ("NVIDIA A10G", 0), ("NVIDIA RTX A1000", 0), ("Unknown", 0)],
)
def test_an_unknown_gpu_has_no_peak(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_tflops(torch.device("cuda"), torch.bfloat16, in_fp8=False) == peak
    assert peak_tflops(torch.device("cuda"), torch.bfloat16, in_fp8=True) == 2 * peak
    assert peak_tflops(torch.device("cuda"), torch.float32, in_fp8=False) == 0


def test_learning_rate_and_memory_schedules():
    optim = OptimConfig(warmup=0.1, decay=0.5, final=0.2)
    rates = [train.learning_rate(x, optim) for x in (0.05, 0.1, 0.5, 0.75, 1.0)]
    assert rates == pytest.approx([0.5, 1, 1, 0.6, 0.2])
    assert train.learning_rate(0.75, OptimConfig(decay=0.5, final=0.2, schedule="cosine")) == pytest.approx(0.6)
    assert [train.memory_length(x, [(0.0, 512), (0.5, 1024)]) for x in (0, 0.49, 0.5, 0.99)] == [512, 512, 1024, 1024]


def test_a_drawn_depth_is_that_of_all_tokens(workplace, monkeypatch):
    assert run(monkeypatch, "--train.sampled_depth=2", "--train.target_depth=0", "--model.halting=stability") == 0
    lines = curve(workplace / "run")
    depths = [line["depth"] for line in lines if line["event"] == "train"]
    assert set(depths) <= {1, 2, 3} and len(set(depths)) > 1
    assert 1 <= lines[-1]["macro"]["depth"] <= 3


@pytest.mark.parametrize("by", ["row", "token"])
def test_every_row_or_token_can_draw_a_depth_of_its_own(workplace, monkeypatch, by):
    settings = ["--train.sampled_depth=2", f"--train.sampled_by={by}", "--train.target_depth=0"]
    settings += ["--model.halting=fixed"]
    assert run(monkeypatch, *settings, "--train.micro_batch=4", "--out=whole") == 0
    done = launch(workplace, "tiny.toml", *settings, "--train.micro_batch=1", processes=2)
    assert done.returncode == 0 and f"100% of all {by}s at a drawn depth" in done.stdout, done.stderr
    whole, parts = (curve(workplace / name) for name in ("whole", "run"))
    depths = [line["depth"] for line in whole if line["event"] == "train"]
    assert 1.5 < np.mean(depths) < 2.5 and sum(depth % 1 > 0 for depth in depths) > STEPS / 2  # of different tokens
    assert depths == [line["depth"] for line in parts if line["event"] == "train"]


def test_packing_learns_the_same(workplace, monkeypatch):
    """Loss of every step, as far as sums in another order go, and the same depths."""
    settings = ["--train.sampled_depth=2", "--train.sampled_by=token", "--train.target_depth=0"]
    settings += ["--model.halting=fixed", "--train.micro_batch=4"]
    assert run(monkeypatch, *settings, "--out=dense") == 0
    packed, of = [], halting.Packed.of
    monkeypatch.setattr(halting.Packed, "of", lambda *a: packed.append(a[1]) or of(*a))
    assert run(monkeypatch, *settings, "--train.capacities=[0.5, 0.7]") == 0
    assert set(packed) == {32, 48}  # of 64 tokens
    dense, packed = ([x for x in curve(workplace / name) if x["event"] == "train"] for name in ("dense", "run"))
    assert [line["loss"] for line in packed] == pytest.approx([line["loss"] for line in dense], rel=1e-5)
    assert [line["depth"] for line in packed] == [line["depth"] for line in dense]


EXIT = ["--model.halting=exit", "--train.ponder_weight=0", "--train.exit_interval=2"]
JOINT = [*EXIT, "--train.sampled_depth=2", "--train.sampled_by=token", "--train.sampled_share=0.5"]


def interrupt(monkeypatch, at):
    """Ctrl-C before step `at` + 1, once."""
    step = train.Trainer.train_step

    def interrupted(self):
        if self.step == at:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self)

    monkeypatch.setattr(train.Trainer, "train_step", interrupted)


def curve_of_parts(workplace, monkeypatch, capsys, settings):
    """The training lines of a run, which is the same if it is stopped on its way."""
    assert run(monkeypatch, *settings, "--out=./whole") == 0
    with monkeypatch.context() as patch:
        interrupt(patch, 7)
        assert run(monkeypatch, *settings, "--out=./parts") == 0
    assert run(monkeypatch, *settings, "--out=./parts") == 0 and "going on from" in capsys.readouterr().out
    assert_same_run(workplace / "parts", workplace / "whole")
    return [line for line in curve(workplace / "whole") if line["event"] == "train"]


def test_an_exit_head_is_fitted_along_with_training(workplace, monkeypatch, capsys):
    """Some tokens draw a depth and the others go by the head; the tolerance follows the target, and a stop changes
    neither."""
    lines = curve_of_parts(workplace, monkeypatch, capsys, [*JOINT, "--train.capacities=[0.5, 0.7]"])
    assert lines[0]["tolerance"] == 0.1 and len({line["tolerance"] for line in lines}) > 3  # of every second step
    model, meta = checkpoint.load_model("whole")
    assert model.halting.weight[:-1].any() and not model.halting.weight[-1].any()
    assert model.config.tolerance == lines[-1]["tolerance"] == meta["config"]["model"]["tolerance"]
    assert np.mean([line["depth"] for line in lines[4:]]) == pytest.approx(2, abs=0.3)


@pytest.mark.parametrize(
    "model",
    [
        ["--model.prelude=1", "--model.coda=1"],
        ["--model.finish=true", "--model.max_depth=4", "--train.target_depth=3", "--eval.depths=[2]"]
        + ["--train.sampled_depth=3", "--train.sampled_by=row", "--train.sampled_share=0.2"],
    ],
    ids=["own layers", "finish and drawn rows"],
)
def test_a_head_that_expects_the_loss_holds_the_target_depth(workplace, monkeypatch, capsys, model):
    """Between an own first and last layer, or before a last step for all; a stop changes nothing."""
    settings = [*EXIT, "--train.exit_interval=1", "--model.exit_by=loss", *model]
    lines = curve_of_parts(workplace, monkeypatch, capsys, settings)
    assert {line["tolerance"] for line in lines} == {0.0}  # the bars move in its place
    target = checkpoint.load_model("whole")[1]["config"]["train"]["target_depth"]
    assert np.mean([line["depth"] for line in lines[6:]]) == pytest.approx(target, abs=0.2)


@pytest.mark.parametrize(
    "settings, alike",  # by loss steps after the first are fitted to those that pass a bar, which are not the same
    [
        (["--train.sampled_depth=2", "--train.sampled_by=token", "--train.target_depth=0"], slice(None)),
        (["--model.exit_by=loss"], slice(1)),
    ],
    ids=["gain", "loss"],
)
def test_two_processes_fit_one_exit_head(workplace, monkeypatch, settings, alike):
    settings = [*EXIT, *settings, "--train.micro_batch=0", "--optim.lr=0.03"]
    assert run(monkeypatch, *settings, "--out=one") == 0
    halves = launch(workplace, "tiny.toml", *settings, "--out=two", processes=2)
    assert halves.returncode == 0, halves.stderr
    one, two = (checkpoint.load_model(name)[0].halting for name in ("one", "two"))
    assert (two.weight - one.weight)[alike].norm() < 0.05 * one.weight[alike].norm()
    torch.testing.assert_close(two.bias, one.bias, atol=0.05, rtol=0)
    one, two = (checkpoint.read_tensors(checkpoint.find(name), "optimizer") for name in ("one", "two"))
    assert torch.equal(two["exit/sums"][alike, -2, -2], one["exit/sums"][alike, -2, -2])  # the number of tokens


def test_two_processes_train_own_blocks_at_drawn_depths(workplace):
    """Where a step leaves out blocks, whose gradients no process waits for."""
    settings = ["--model.share=false", "--model.halting=fixed", "--train.sampled_depth=2", "--train.target_depth=0"]
    done = launch(workplace, "tiny.toml", *settings, "--train.ponder_weight=0", "--train.micro_batch=0", processes=2)
    assert done.returncode == 0, done.stderr
    assert len({line["depth"] for line in curve(workplace / "run") if line["event"] == "train"}) > 1


def test_warming_up_takes_one_depth_and_fits_nothing(workplace, monkeypatch):
    settings = [*JOINT, "--train.warm_up=0.5", "--train.warm_depth=2"]
    fits, fit = [], train.Trainer.fit_exit
    monkeypatch.setattr(train.Trainer, "fit_exit", lambda self, *a: fits.append(self.step) or fit(self, *a))
    assert run(monkeypatch, *settings) == 0
    lines = [line for line in curve(workplace / "run") if line["event"] == "train"]
    depths = [line["depth"] for line in lines]
    assert depths[: STEPS // 2] == [2.0] * (STEPS // 2) and all(depth % 1 for depth in depths[STEPS // 2 :])
    assert [line["executed_depth"] for line in lines] == [2] * (STEPS // 2) + [3] * (STEPS // 2)
    assert fits == list(range(STEPS // 2, STEPS, 2))


def test_lambda_rests_while_the_depth_is_forced(workplace, monkeypatch):
    assert run(monkeypatch, "--train.warm_up=0.5", "--train.ponder_rate=0.01") == 0
    values = [line["ponder_weight"] for line in curve(workplace / "run") if line["event"] == "train"]
    assert values[: STEPS // 2 + 1] == [0.01] * (STEPS // 2 + 1) and len(set(values)) > STEPS // 2 - 2


def test_another_halting_rule_goes_with_the_model_in_full(workplace, monkeypatch, capsys):
    """Or with nothing of it; an architecture that differs is refused."""
    assert run(monkeypatch, "--out=./base") == 0
    changes = ["--init=./base", "--model.halting=exit", "--model.exit_by=loss", "--train.ponder_weight=0"]
    assert run(monkeypatch, *changes, "--model.min_depth=2", "--out=./full") == 0
    model, _ = checkpoint.load_model("./full")
    assert (model.config.halting, model.config.exit_by, model.config.min_depth) == ("exit", "loss", 2)
    capsys.readouterr()
    assert "model.hidden: 32 -> 48" in refused(monkeypatch, capsys, *changes, "--model.hidden=48", "--out=./other")


@pytest.mark.parametrize("by", ["gain", "loss"])
def test_an_exit_head_is_fitted_to_a_frozen_model(workplace, monkeypatch, capsys, by):
    """Of a model without one; the same command goes on after a stop, and nothing else changes."""
    base = ["--train.sampled_depth=2", "--train.target_depth=0", "--train.ponder_weight=0", "--model.halting=fixed"]
    assert run(monkeypatch, *base, "--out=./base") == 0
    text = CONFIG.split("[model]")[0] + 'init = "./base"\n[model]\nhalting = "exit"\ntolerance = 0.01\n'
    text += f'exit_by = "{by}"\n'
    text += "[data]" + CONFIG.split("[data]")[1].replace("ponder_weight = 0.01", "frozen = true\nexit_interval = 1")
    (workplace / "tiny.toml").write_text(text)
    with monkeypatch.context() as patch:
        interrupt(patch, 7)
        assert run(monkeypatch) == 0
    assert run(monkeypatch) == 0 and "going on from" in capsys.readouterr().out
    before, after = (checkpoint.load_model(name)[0].state_dict() for name in ("./base", "./run"))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert after.keys() - before.keys() == {"halting.weight", "halting.bias"} and after["halting.weight"].any()
    lines = curve(workplace / "run")
    assert len([line for line in lines if line["event"] == "train"]) == STEPS
    assert 1 < lines[-1]["macro"]["depth"] < 3  # by the head, at the tolerance of the target
    assert run(monkeypatch, "--model.hidden=48", "--out=other") == 2
    assert "is of another architecture" in capsys.readouterr().err


def test_a_head_for_act_is_none_for_exit(workplace, write_run):
    before = checkpoint.load_model(write_run(workplace / "base"))[0].state_dict()
    text = CONFIG.split("[model]")[0] + 'init = "./base"\n[model]\nhalting = "exit"\n'
    text += "[data]" + CONFIG.split("[data]")[1].replace("target_depth = 2.0", "")
    (workplace / "tiny.toml").write_text(text)
    after = train.Trainer(config.load("tiny.toml", train.Config).with_model()).model.state_dict()
    assert before["halting.weight"].any() and not after["halting.weight"].any()
    assert all(torch.equal(before[name], x) for name, x in after.items() if not name.startswith("halting."))


# ------------------------------------------------------------------------------------------------ refusals


def refused(monkeypatch, capsys, *overrides):
    assert run(monkeypatch, *overrides) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def test_what_cannot_be_resumed_is_refused_with_the_reason(reference, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(reference, tmp_path / "copy")
    monkeypatch.chdir(folder)
    assert "another architecture: model.width: 16 -> 32" in refused(monkeypatch, capsys, "--model.width=32")
    assert "'train.batch_size' was 4" in refused(monkeypatch, capsys, "--train.batch_size=8")
    assert run(monkeypatch, "--model.tolerance=0.2") == 0 and "going on from" in capsys.readouterr().out  # a dial
    assert f"is beyond step {STEPS // 2}" in refused(monkeypatch, capsys, f"--train.tokens={STEPS // 2 * 4 * 16}")
    newest = checkpoint.find("run")
    manifest = folder / "data/manifest.json"
    original = manifest.read_text()
    manifest.write_text(original.replace('"weight": 1.0', '"weight": 2.0'))
    assert "the manifest of data is not the one" in refused(monkeypatch, capsys)
    manifest.write_text(original)
    with open(newest / "optimizer.safetensors", "r+b") as file:
        file.seek(-3, os.SEEK_END)
        file.write(b"\x7f")
    assert "optimizer.safetensors: truncated or altered" in refused(monkeypatch, capsys)


@pytest.mark.parametrize(
    "override, message",
    [
        ("--train.batchsize=8", "did you mean 'batch_size'"),
        ("--train.tokens=10", "less than one step"),
        ("--replay={path='data', rows=1}", "[replay] has no use in the stage pretrain"),
        ("--train.memory=[[0.5, 16]]", "'memory' must be"),
        ('--train.fp8_gemms=["forwards"]', "'fp8_gemms' has 'forwards'; known are forward, input_grad, weight_grad"),
        ("--train.micro_batch=3", "must be a multiple of 'train.micro_batch' 3"),
        ("--train.target_depth=9", "must lie in 1..3"),
        ("--train.sampled_depth=2", "needs 'model.halting = exit', or 'act' and no 'train.sampled_depth'"),
        ("--model.halting=fixed", "'train.target_depth' needs 'model.halting = exit', or 'act'"),
        ("--train.sampled_share=2", "'sampled_share' in [0, 1]"),
        ("--train.frozen=true", "'train.frozen' needs 'model.halting = exit' and 'init'"),
        ("--model.exit_by=loss", "'exit_by = loss' needs 'halting = exit' and depths to choose from"),
        ("--model={halting='exit', exit_by='loss', min_depth=3}", "at least 'model.min_depth' (3), not 2.0"),
        ("--model={halting='exit', coda=1, max_depth=3}", "with a 'coda' or 'finish' needs 'exit_by = loss'"),
        ("--model={halting='fixed', finish=true, injection='hyper'}", "and no 'injection = hyper'"),
        ("--train.exit_interval=0", "'exit_interval' must be at least 1"),
        ("--train.warm_up=1", "'warm_up' in [0, 1)"),
        ("--train.warm_depth=4", "'train.warm_depth' 4 must lie in 1..3, or be 0"),
        ("--model.min_depth=2", "'min_depth' 2 must lie in 1..'max_depth', and be 1 with 'halting = act'"),
        ("--train.capacities=[0.5, 1.5]", "'capacities' are shares between 0 and 1, not 1.5"),
        ("--eval.depths=[4]", "depths are 1..3"),
        ("--eval.tokens=1", "'tokens' at least 2"),
        ("--optim.lr=0", "must be above 0"),
        ("--train.ponder_weight=nan", "'train.ponder_weight' must be a number, not nan"),
        ("--model.rope_base=0", "'rope_base' must be above 0"),
        ("--optim.betas=[2, 3]", "must lie in [0, 1)"),
        ("--train.seed=-1", "'seed' must not be negative"),
        ("--model=3", "'model' must be a section"),
        ("--train.device=cuda:77", "cannot be used"),
        ("--data.path=nowhere", "nowhere: not prepared yet"),
        ("--data.weights.poems=1", "no domain 'poems'"),
        ("--stage=sfr", "did you mean 'sft'?"),
    ],
)
def test_bad_settings_are_one_clear_line(workplace, monkeypatch, capsys, override, message):
    assert message in refused(monkeypatch, capsys, override)


def test_a_missing_config_names_the_nearest(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["train.py", "configs/demmo.toml"])
    assert train.main() == 2
    assert "did you mean 'configs/demo.toml'?" in capsys.readouterr().err


RUNS = [path for path in sorted(ROOT.glob("configs/**/*.toml")) if path.parent.name != "data"]


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_every_config_in_the_repository_is_valid(path):
    stage = next((stage for stage in ("sft", "dpo") if stage in path.stem), "pretrain")
    assert config.load(path, train.Config).stage == stage
