"""Checkpoints: folders of safetensors and JSON that are either whole or not there.

    runs/demo/checkpoints/step_00000300/
        meta.json                 step, configuration, data position, ponder weight
        model.safetensors         float32 weights, named as in the un-compiled module
        optimizer.safetensors     one tensor a parameter and buffer: 'recur.0.up.weight/momentum_buffer'; random state
        memory_0.safetensors      Transformer-XL memory of the rows of rank 0
        SHA256SUMS                of all of them; `sha256sum -c` reads it
    runs/demo/checkpoints/best -> step_00000200

A checkpoint is written under another name, flushed to disk and renamed: a killed run leaves the one before. `export`
makes one file of the weights alone, to keep or to pass on.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file, save_file

import config
import data
from memory import Memory, Ring
from model import ModelConfig, RecurrentTransformer

STAGES = {"base": "pretrain", "sft": "sft", "dpo": "dpo"}  # the name of a model: the stage of training it comes from
SUFFIX = ".safetensors"


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, damaged or of another model; the message names the folder and the remedy."""


def begin(folder, step):
    """Make and return the unfinished folder of a checkpoint; leftovers of killed runs are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob("*.unfinished"):
        shutil.rmtree(leftover)
    path = folder / f"step_{step:08d}.unfinished"
    path.mkdir()
    return path


def write_tensors(path, name, tensors):
    """Write `{name: tensor}` as NAME.safetensors into an unfinished checkpoint. Raises `CheckpointError`."""
    try:
        save_file({key: tensor.detach().contiguous() for key, tensor in tensors.items()}, path / f"{name}.safetensors")
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path}: cannot be written ({error}); the checkpoint before it is whole") from None


def finish(path, meta):
    """Add meta.json and the checksums, flush everything to disk and give the checkpoint its name. Returns its path."""
    (path / "meta.json").write_text(json.dumps(meta, indent=1))
    files = sorted(path.iterdir())
    (path / "SHA256SUMS").write_text("".join(f"{_sha256(file)}  {file.name}\n" for file in files))
    for file in [*files, path / "SHA256SUMS", path]:
        _flush(file)
    done = path.with_suffix("")
    if done.exists():  # the same step again, from a run that was set back
        shutil.rmtree(done)
    path.rename(done)
    _flush(done.parent)
    return done


def mark_best(path):
    """Point the link `best` beside the checkpoint at it."""
    link = path.parent / "best.unfinished_link"
    link.unlink(missing_ok=True)
    link.symlink_to(path.name)
    link.replace(path.parent / "best")


def prune(folder, keep):
    """Delete all but the newest `keep` checkpoints and the best."""
    best = (folder / "best").resolve()
    for path in steps(folder)[:-keep]:
        if path != best:
            shutil.rmtree(path)


def steps(folder):
    """The finished checkpoints of a run, oldest first."""
    return sorted(path for path in folder.resolve().glob("step_*") if not path.suffix)


def stage(meta):
    """The stage of training that a model comes from: "pretrain", "sft" or "dpo"."""
    return meta["config"].get("stage", "pretrain")


def find(where=None):
    """The checkpoint meant by `where`: a checkpoint folder, a run folder (its newest), a file written by `export`, or
    one of `STAGES`: base.safetensors (sft, dpo) in this folder, else the newest of the runs of that stage under runs/.

    None: what the environment variable MODEL says, else the newest of all under runs/. Raises `CheckpointError`.
    """
    where = where or os.environ.get("MODEL") or None
    if where in STAGES and (file := Path(f"{where}.safetensors")).exists():
        return file
    if where is None or where in STAGES:
        found = [step for folder in Path("runs").glob("*/checkpoints") for step in steps(folder)]
        found.sort(key=lambda path: path.stat().st_mtime, reverse=True)
        if newest := next((path for path in found if where is None or _stage(path) == STAGES[where]), None):
            return newest
        if where is None:
            if not (files := sorted(Path().glob(f"*{SUFFIX}"))):
                raise CheckpointError("no checkpoint under runs/; train one first, for example with `make demo`")
            name = files[0].stem if files[0].stem in STAGES else files[0].name
            raise CheckpointError(
                f"no checkpoint under runs/, but exported here: {', '.join(map(str, files))}; choose a model by "
                f"MODEL={name} or --checkpoint {name}"
            )
        raise CheckpointError(
            f"no model '{where}': neither {where}.safetensors here nor a run of the stage {STAGES[where]} under runs/; "
            "train one, or name a checkpoint by its path"
        )
    path = Path(where)
    if (path / "meta.json").exists() or (path.suffix == SUFFIX and path.is_file()):
        return path
    if found := steps(path / "checkpoints") or steps(path):
        return found[-1]
    if path.is_file():
        raise CheckpointError(f"{path}: not a model; name a run folder or a file written by `sample.py --export`")
    missing = "no such file" if path.suffix == SUFFIX else "no such folder"
    raise CheckpointError(f"{path}: {'holds no checkpoint' if path.exists() else missing}")


def read_meta(path):
    """The contents of meta.json after every file of the checkpoint has been checked; of an exported file, what `export`
    kept of them. Raises `CheckpointError`."""
    if path.suffix == SUFFIX:
        return _exported_meta(path)
    remedy = f"delete {path} to go on from the checkpoint before it"
    try:
        lines = (path / "SHA256SUMS").read_text().splitlines()
        sums = {name: digest for digest, name in (line.split(maxsplit=1) for line in lines)}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}/SHA256SUMS: {error}; {remedy}") from None
    written = {file.name for file in path.glob("*.safetensors")}  # also those whose line of SHA256SUMS was lost
    for name in sorted({"meta.json", "model.safetensors"} | set(sums) | written):
        file = path / name
        if not file.exists():
            raise CheckpointError(f"{file}: missing; {remedy}")
        if _sha256(file) != sums.get(name):
            raise CheckpointError(f"{file}: truncated or altered (its SHA-256 is not the recorded one); {remedy}")
    return json.loads((path / "meta.json").read_text())


def read_tensors(path, name, device="cpu"):
    """The tensors of NAME.safetensors. Raises `CheckpointError`."""
    try:
        return load_file(path / f"{name}.safetensors", device=str(device))
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path}/{name}.safetensors: {error}") from None


def load_weights(model, path, device="cpu"):
    """Load model.safetensors, or an exported file, into `model`. Raises `CheckpointError` where names or shapes
    differ."""
    weights, own = read_tensors(*_place(path), device), model.state_dict()
    for name in sorted(weights.keys() | own.keys()):
        there, here = weights.get(name), own.get(name)
        if there is None or here is None or there.shape != here.shape:
            shapes = [tuple(x.shape) if x is not None else "absent" for x in (there, here)]
            old = model.config.halting == "exit" and name.startswith("halting.") and shapes[0][:1] == (1,)
            remedy = "; it is an exit head of before, one for all steps and not for each: fit it anew" if old else ""
            raise CheckpointError(
                f"{path}: another architecture: '{name}' is {shapes[0]} there and {shapes[1]} here{remedy}"
            )
    model.load_state_dict(weights)


def load_model(where=None, device="cpu", compute_dtype=torch.float32):
    """The model of the checkpoint `where` (see `find`), ready to evaluate, and its meta. Raises `CheckpointError`."""
    path = find(where)
    meta = read_meta(path)
    try:
        model_config = config.from_dict(meta["config"]["model"], ModelConfig, str(path))
    except config.ConfigError as error:
        raise CheckpointError(f"{error}; it was written by another version of the code") from None
    model = RecurrentTransformer(model_config, compute_dtype)
    load_weights(model, path)
    if model.config.vocab_size != data.VOCAB_SIZE:
        raise CheckpointError(f"{path}: its vocabulary of {model.config.vocab_size} is not the bundled tokenizer's")
    return model.to(device).eval(), meta


def export(where, file):
    """Write the model of the checkpoint `where` (see `find`) as one safetensors file, with its configuration, step and
    memory as JSON in the file's metadata: `find` and `load_model` read it. Returns them. Raises `CheckpointError`."""
    path, file = find(where), Path(file)
    if file.suffix != SUFFIX:
        raise CheckpointError(f"{file}: the name of an exported model must end in {SUFFIX}")
    meta = {key: value for key, value in read_meta(path).items() if key in ("config", "step", "memory")}
    unfinished = file.with_name(f"{file.name}.unfinished")
    try:
        save_file(read_tensors(*_place(path)), unfinished, {"format": "pt", "meta": json.dumps(meta)})
        _flush(unfinished)
        unfinished.replace(file)
        _flush(file.parent)
    except (OSError, safetensors.SafetensorError) as error:
        unfinished.unlink(missing_ok=True)
        raise CheckpointError(f"{file}: cannot be written ({error})") from None
    return meta


def optimizer_tensors(model, optimizers):
    """The state of `{name: optimizer}` as {'parameter/buffer': tensor}."""
    names = {p: name for name, p in model.named_parameters()}
    states = [item for optimizer in optimizers.values() for item in optimizer.state.items()]
    return {f"{names[p]}/{key}": torch.as_tensor(x) for p, buffers in states for key, x in buffers.items()}


def load_optimizers(model, optimizers, tensors):
    """Give `optimizer_tensors` back to the optimizers of the same model."""
    parameters = dict(model.named_parameters())
    for optimizer in optimizers.values():
        own = {p for group in optimizer.param_groups for p in group["params"]}
        for key, value in tensors.items():
            name, _, buffer = key.rpartition("/")
            if parameters.get(name) in own:
                p = parameters[name]
                optimizer.state[p][buffer] = value.to(p.device)


def memory_tensors(memories):
    """The rows of one process, from the `Memory` of each of its micro-batches, as named tensors."""
    named = {"live": torch.cat([m.live for m in memories])}
    rings = [m.settle().ring for m in memories]
    for kind in ("keys", "values"):
        slots = zip(*(getattr(ring, kind) for ring in rings))
        named |= {f"{kind}.{i}": torch.cat(parts) for i, parts in enumerate(slots)}
    return named


def read_memories(path, position, rows, micro, device):
    """A `Memory` for every `micro` of the global `rows` (a slice), however many processes wrote them."""
    files = sorted(path.glob("memory_*.safetensors"), key=lambda file: int(file.stem.split("_")[1]))
    parts = [read_tensors(path, file.stem) for file in files]
    joined = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    memories = []
    for first in range(rows.start, rows.stop, micro):
        own = {key: x[first : first + micro] for key, x in joined.items()}
        slots = range((len(own) - 1) // 2)
        keys, values = ([own[f"{kind}.{i}"].to(device) for i in slots] for kind in ("keys", "values"))
        memories.append(Memory(Ring(keys, values, position), own["live"], position))
    return memories


def _place(path):
    """Folder and name of the weights of a checkpoint folder or exported file, for `read_tensors`."""
    return (path.parent, path.stem) if path.suffix == SUFFIX else (path, "model")


def _stage(path):
    """The stage of a checkpoint folder, by its meta.json alone: the runs that are only searched are not checked."""
    try:
        return stage(json.loads((path / "meta.json").read_text()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}/meta.json: damaged ({error}); delete {path}, or name another model") from None


def _exported_meta(path):
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path}: damaged ({error}); copy or export it again") from None
    try:
        meta = json.loads(metadata["meta"])
        if not {"model", "train"} <= meta["config"].keys() or not {"step", "memory"} <= meta.keys():
            raise KeyError
    except (KeyError, ValueError, TypeError, AttributeError):
        raise CheckpointError(f"{path}: not a model of ours; `sample.py --export` writes them") from None
    return meta


def _sha256(file):
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _flush(path):
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
