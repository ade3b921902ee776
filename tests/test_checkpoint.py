"""Checkpoints are whole or not there: what is written, found, refused and deleted."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import checkpoint
from checkpoint import CheckpointError

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b/c": torch.tensor(3, dtype=torch.int64)}
FILES = ["meta.json", "model.safetensors", "optimizer.safetensors"]


def write(folder, step=1):
    """A small checkpoint of `folder`."""
    path = checkpoint.begin(folder, step)
    checkpoint.write_tensors(path, "model", TENSORS)
    checkpoint.write_tensors(path, "optimizer", {"transposed": TENSORS["a"].T})
    return checkpoint.finish(path, {"step": step, "loss": [0.1, None]})


def names(paths):
    return [path.name for path in paths]


# -------------------------------------------------------------------------------------------------- contents


def test_what_is_written_is_read(tmp_path):
    path = write(tmp_path / "checkpoints", 30)
    assert path == tmp_path / "checkpoints" / "step_00000030"
    assert checkpoint.read_meta(path) == {"step": 30, "loss": [0.1, None]}
    read = checkpoint.read_tensors(path, "model")
    assert read.keys() == TENSORS.keys()
    assert all(torch.equal(read[key], TENSORS[key]) and read[key].dtype == TENSORS[key].dtype for key in TENSORS)
    assert torch.equal(checkpoint.read_tensors(path, "optimizer")["transposed"], TENSORS["a"].T)
    with pytest.raises(CheckpointError, match="step_00000030/memory_0.safetensors: "):
        checkpoint.read_tensors(path, "memory_0")


def test_the_same_step_again_replaces_the_first(tmp_path):
    write(tmp_path)
    path = checkpoint.begin(tmp_path, 1)
    checkpoint.write_tensors(path, "model", TENSORS)
    assert checkpoint.read_meta(checkpoint.finish(path, {"again": True})) == {"again": True}


@pytest.mark.skipif(not shutil.which("sha256sum"), reason="needs sha256sum")
def test_checksums_are_those_of_sha256sum(tmp_path):
    path = write(tmp_path)
    assert re.fullmatch(r"([0-9a-f]{64}  [\w.]+\n){3}", (path / "SHA256SUMS").read_text())
    out = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=path, capture_output=True, text=True)
    assert out.returncode == 0 and out.stdout.splitlines() == [f"{name}: OK" for name in FILES]


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_refused_and_named(tmp_path, name):
    path = write(tmp_path)
    whole = (path / name).read_bytes()
    middle = len(whole) // 2
    altered = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    for raw in (b"", whole[:-1], whole + b"\0", altered):
        (path / name).write_bytes(raw)
        with pytest.raises(CheckpointError, match=f"{path}/{name}: truncated or altered .*; delete {path} to go on"):
            checkpoint.read_meta(path)
    (path / name).unlink()
    with pytest.raises(CheckpointError, match=f"{path}/{name}: missing; delete {path} to go on"):
        checkpoint.read_meta(path)


def test_damaged_checksums_are_refused(tmp_path):
    """Cut anywhere before the last line's end, every byte altered, or missing."""
    path = write(tmp_path)
    file = path / "SHA256SUMS"
    whole = file.read_bytes().removesuffix(b"\n")
    cuts = [whole[:size] for size in range(len(whole))]
    flips = [whole[:i] + bytes([whole[i] ^ 0x80]) + whole[i + 1 :] for i in range(len(whole))]
    for raw in [*cuts, *flips]:
        file.write_bytes(raw)
        with pytest.raises(CheckpointError, match=f"{path}/"):
            checkpoint.read_meta(path)
    file.unlink()
    with pytest.raises(CheckpointError, match="SHA256SUMS: .*No such file.*delete"):
        checkpoint.read_meta(path)


# -------------------------------------------------------------------------------------------------- folders


def test_a_killed_run_leaves_the_checkpoint_before(tmp_path):
    write(tmp_path, 1)
    killed = checkpoint.begin(tmp_path, 2)
    checkpoint.write_tensors(killed, "model", TENSORS)
    assert killed.exists()
    assert names(checkpoint.steps(tmp_path)) == ["step_00000001"] == [checkpoint.find(tmp_path).name]
    begun = checkpoint.begin(tmp_path, 3)
    assert not killed.exists() and list(begun.iterdir()) == []


@pytest.mark.parametrize("marked, kept", [([], [3, 4]), ([2, 1], [1, 3, 4]), ([1, 4], [3, 4])])
def test_pruning_keeps_the_newest_and_the_best(tmp_path, marked, kept):
    paths = {step: write(tmp_path, step) for step in (1, 2, 3, 4)}
    for best in marked:
        checkpoint.mark_best(paths[best])
        assert checkpoint.read_meta(tmp_path / "best")["step"] == best
    checkpoint.prune(tmp_path, 2)
    assert checkpoint.steps(tmp_path) == [paths[step] for step in kept]
    assert not marked or checkpoint.read_meta(tmp_path / "best")["step"] == best


def test_find_by_run_checkpoints_or_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = [write(tmp_path / "run" / "checkpoints", step) for step in (9, 10)]
    checkpoint.mark_best(paths[0])
    for where in ("run", tmp_path / "run", "run/checkpoints", paths[1]):
        assert checkpoint.find(where) == paths[1]
    assert checkpoint.find(paths[0]) == paths[0]
    assert checkpoint.find("run/checkpoints/best").resolve() == paths[0]


def test_find_the_newest_of_all_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MODEL", raising=False)
    with pytest.raises(CheckpointError, match="no checkpoint under runs/; train one first"):
        checkpoint.find()
    for time, run, step in ((100, "a", 5), (300, "b", 1), (200, "b", 2)):
        os.utime(write(tmp_path / "runs" / run / "checkpoints", step), (time, time))
    assert checkpoint.find() == tmp_path / "runs" / "b" / "checkpoints" / "step_00000001"


@pytest.mark.parametrize(
    "files, name", [(["sft"], "sft"), (["dpo", "sft"], "dpo"), (["mine"], "mine.safetensors"), (["a", "base"], "a.*")]
)
def test_where_no_run_is_the_exported_models_are_named(tmp_path, monkeypatch, files, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MODEL", raising=False)
    for file in files:
        (tmp_path / f"{file}.safetensors").touch()
    here = ", ".join(f"{file}.safetensors" for file in files)
    with pytest.raises(CheckpointError, match=f"^no checkpoint under runs/, but exported here: {here}; ") as error:
        checkpoint.find()
    (named,) = re.findall("MODEL=(\\S+)", str(error.value))
    assert re.fullmatch(name, named) and str(error.value).endswith(f" --checkpoint {named}")
    monkeypatch.setenv("MODEL", named)
    assert checkpoint.find() == checkpoint.find(named) == Path(f"{files[0]}.safetensors")


def test_find_refuses_what_is_no_checkpoint(tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="run: holds no checkpoint"):
        checkpoint.find(tmp_path / "run")
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        checkpoint.find(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="nowhere.safetensors: no such file"):
        checkpoint.find(tmp_path / "nowhere.safetensors")
    (tmp_path / "model.pt").touch()
    with pytest.raises(CheckpointError, match="model.pt: not a model; name a run folder or a file written by"):
        checkpoint.find(tmp_path / "model.pt")


def test_find_by_stage(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [(100, "old", {}), (200, "a", {"stage": "pretrain"}), (300, "b", {"stage": "sft"}), (400, "c", {})]
    for time, run, config in runs:
        path = checkpoint.begin(tmp_path / "runs" / run / "checkpoints", 1)
        checkpoint.write_tensors(path, "model", TENSORS)
        os.utime(checkpoint.finish(path, {"config": config}), (time, time))
    folder = lambda name: tmp_path / "runs" / name / "checkpoints" / "step_00000001"  # noqa: E731
    assert [checkpoint.find(name) for name in ("base", "sft")] == [folder("c"), folder("b")]
    with pytest.raises(CheckpointError, match="no model 'dpo': neither dpo.safetensors here nor a run of"):
        checkpoint.find("dpo")
    for named, found in (("base", "c"), ("sft", "b"), ("runs/a", "a"), ("", "c")):
        monkeypatch.setenv("MODEL", named)
        assert checkpoint.find() == folder(found)
        assert checkpoint.find("runs/old") == folder("old")  # what is asked for comes first
    (tmp_path / "base.safetensors").touch()
    assert str(checkpoint.find("base")) == "base.safetensors"
    (folder("c") / "meta.json").write_text("{}")
    with pytest.raises(CheckpointError, match="c/checkpoints/step_00000001/meta.json: damaged"):
        checkpoint.find("sft")


# -------------------------------------------------------------------------------------------------- models


def test_a_model_is_read_back(run_folder, tiny_model):
    model, meta = checkpoint.load_model(run_folder)
    assert meta["step"] == 7 and not model.training
    own = tiny_model().state_dict()
    assert all(torch.equal(weight, own[name]) for name, weight in model.state_dict().items())


def test_weights_of_another_architecture_are_refused(run_folder, tiny_model):
    path = checkpoint.find(run_folder)
    with pytest.raises(CheckpointError, match=r"'gains' is \(4, 1, 4, 32\) there and \(3, 1, 4, 32\) here"):
        checkpoint.load_weights(tiny_model(max_depth=3), path)
    with pytest.raises(CheckpointError, match=rf"{path}: another .* 'prelude.0.down.weight' is absent there and \(32,"):
        checkpoint.load_weights(tiny_model(prelude=1), path)
    with pytest.raises(CheckpointError, match=r"'halting.bias' is \(1,\) there and absent here"):
        checkpoint.load_weights(tiny_model(halting="fixed"), path)
    with pytest.raises(CheckpointError, match=r"\(1,\) there and \(4,\) here; it is an exit head of before, .* fit it"):
        checkpoint.load_weights(tiny_model(halting="exit"), path)


def test_an_exit_head_with_a_bias_but_no_weights_for_each_step_is_refused(tmp_path, tiny_model):
    model, path = tiny_model(halting="exit"), checkpoint.begin(tmp_path, 1)
    weights = model.state_dict()
    checkpoint.write_tensors(path, "model", weights | {"halting.weight": weights["halting.weight"][:1]})
    path = checkpoint.finish(path, {})
    with pytest.raises(CheckpointError, match=r"'halting.weight' is \(1, 32\) there and \(4, 32\) .* fit it anew"):
        checkpoint.load_weights(model, path)
    with pytest.raises(CheckpointError, match=r"'gains' is \(4, .* here$"):
        checkpoint.load_weights(tiny_model(halting="exit", max_depth=3), path)


def test_a_model_of_other_code_is_refused(tmp_path, write_run):
    write_run(tmp_path, vocab_size=300, document_start=0)
    with pytest.raises(CheckpointError, match="step_00000007: its vocabulary of 300 is not the bundled tokenizer's"):
        checkpoint.load_model(tmp_path)
    path = checkpoint.begin(tmp_path / "checkpoints", 8)
    checkpoint.write_tensors(path, "model", TENSORS)
    checkpoint.finish(path, {"config": {"model": {"widht": 32}}})
    with pytest.raises(CheckpointError, match="step_00000008: unknown key 'widht' .* another version"):
        checkpoint.load_model(tmp_path)


# -------------------------------------------------------------------------------------------------- exported files


def test_an_exported_model_is_read_back(run_folder, tmp_path):
    file = tmp_path / "base.safetensors"
    for source in (run_folder, file):  # over itself the second time
        kept = checkpoint.export(source, file)
        assert checkpoint.find(file) == file and [path.name for path in tmp_path.iterdir()] == [file.name]
        model, meta = checkpoint.load_model(file)
        own, full = checkpoint.load_model(run_folder)
        assert meta == kept == {key: full[key] for key in ("config", "step", "memory")}
        weights = own.state_dict()
        assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    assert file.stat().st_mode == (checkpoint.find(run_folder) / "model.safetensors").stat().st_mode


def test_an_export_is_whole_or_not_there(run_folder, tmp_path, monkeypatch):
    def broken(tensors, path, metadata):
        path.write_bytes(b"half")
        raise checkpoint.safetensors.SafetensorError("No space left on device")

    file = tmp_path / "base.safetensors"
    file.write_bytes(b"before")
    monkeypatch.setattr(checkpoint, "save_file", broken)
    with pytest.raises(CheckpointError, match="base.safetensors: cannot be written .No space left"):
        checkpoint.export(run_folder, file)
    assert file.read_bytes() == b"before" and list(tmp_path.iterdir()) == [file]
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="no/base.safetensors: cannot be written"):
        checkpoint.export(run_folder, tmp_path / "no" / "base.safetensors")
    with pytest.raises(CheckpointError, match="base.bin: the name of an exported model must end in .safetensors"):
        checkpoint.export(run_folder, tmp_path / "base.bin")


def test_a_damaged_or_foreign_file_is_refused(run_folder, tmp_path):
    file = tmp_path / "base.safetensors"
    checkpoint.export(run_folder, file)
    whole = file.read_bytes()
    for raw in (b"", whole[:7], whole[:500], whole[: len(whole) // 2], whole[:-1], whole + b"\0", b"\xff" + whole[1:]):
        file.write_bytes(raw)
        with pytest.raises(CheckpointError, match="base.safetensors: damaged .*; copy or export it again"):
            checkpoint.load_model(file)
    metas = [None, "", "[]", "{}", '{"config": {}}', '{"config": {"model": {}, "train": {}}}']
    for meta in metas:
        checkpoint.save_file(TENSORS, file, None if meta is None else {"meta": meta})
        with pytest.raises(CheckpointError, match="base.safetensors: not a model of ours"):
            checkpoint.load_model(file)
    checkpoint.save_file(TENSORS, file, {"meta": json.dumps(checkpoint.read_meta(checkpoint.find(run_folder)))})
    with pytest.raises(CheckpointError, match="base.safetensors: another architecture: 'a' is"):
        checkpoint.load_model(file)
