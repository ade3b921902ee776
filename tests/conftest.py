"""What several test files share: one thread, a prepared folder, and runs with a tiny checkpoint."""

import gc
import hashlib
import json
import os
import signal
from dataclasses import asdict

import pytest

# PyTorch is imported in what needs it, as the process that hands out the tests does not: it would wait for that before
# it starts the others.


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tensors this small gain nothing from a second thread, and threads that wait for each other on a busy two-core
    machine make the tests seven times slower."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def imports_are_no_garbage():
    """Half a million objects live as long as the process, and to look through them takes 0.2 s. bench.py
    collects before every turn."""
    gc.freeze()
    yield
    gc.unfreeze()  # or Triton complains of leaks


# Runs are compared bit for bit, which holds on a CPU alone: `make test-gpu` shows the GPU to the tests that are for it.
if not os.environ.get("TEST_GPU"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

# A shell that starts jobs in the background has them ignore Ctrl-C, and they hand that on.
signal.signal(signal.SIGINT, signal.default_int_handler)


if os.environ.get("TRITON_INTERPRET") == "1":
    from triton.runtime import interpreter

    def patch_tensor(tensor, scope, original=interpreter._patch_lang_tensor):
        original(tensor, scope)  # its __index__ takes an array of one number for a scalar, which numpy 2.4 refuses
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_tensor


@pytest.fixture(scope="session")
def write_prepared():
    """Writes a prepared folder as `prepare_data.py` would, from {domain: (weight, train shards, val shards)}.

    A shard is a list of documents, and a document a text or the list of its ids without the opening <|endoftext|>."""
    import numpy as np

    import data

    def write(folder, domains):
        manifest = {"version": data.MANIFEST_VERSION, "tokenizer": "gpt2", "tokenizer_sha256": data.RANKS_SHA256}
        manifest["domains"] = {}
        for name, (weight, *splits) in domains.items():
            entry = manifest["domains"][name] = {"weight": weight}
            for split, shards in zip(("train", "val"), splits):
                written = [write_shard(folder, f"{split}/{name}/{i:05d}.bin", shard) for i, shard in enumerate(shards)]
                totals = {key: sum(shard[key] for shard in written) for key in ("tokens", "documents", "bytes")}
                entry[split] = {**totals, "shards": written}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        return folder

    def write_shard(folder, file, documents):
        encode = data.load_tokenizer().encode_ordinary
        ids = [[data.EOT, *(encode(text) if isinstance(text, str) else text)] for text in documents]
        shard = np.concatenate(ids).astype("<u2")
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shard.tofile(folder / file)
        counts = {"tokens": len(shard), "documents": len(ids), "bytes": int(data.token_bytes()[shard].sum())}
        return {"file": file, **counts, "sha256": hashlib.sha256(shard).hexdigest()}

    return write


@pytest.fixture
def prepared(tmp_path, write_prepared):
    """A prepared folder of three domains, with one, two and three shards of training text."""
    code = [[f"def f{i}(x):\n    return x + {i}\n" * (i + 1) for i in range(5)]]
    prose = [[f"Chapter {i}. It was the {j}th of May. " * i for i in range(1, 4)] for j in range(2)]
    verse = [[f"{i} little birds sat on a tree, " * 2 + f"{j} flew away" for i in range(3)] for j in range(3)]
    domains = {
        "code": (0.5, code, [["import os\n", "print('héllo 🤖')\n"]]),
        "prose": (0.3, prose, [["A held-out chapter.", "Another one, a little longer."]]),
        "verse": (0.2, verse, []),
    }
    return write_prepared(tmp_path / "prepared", domains)


@pytest.fixture(scope="session")
def tiny_model():
    """Builds a tiny model with random weights, in which tokens differ in depth; keywords change its `ModelConfig`."""
    import torch

    from model import ModelConfig, RecurrentTransformer

    def build(**changes):
        torch.manual_seed(0)
        settings = dict(width=32, heads=2, hidden=64, max_depth=4, halting_bias=-1.0)
        model = RecurrentTransformer(ModelConfig(**settings | changes)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.normal_(std=0.3)
        return model

    return build


@pytest.fixture(scope="session")
def write_run(tiny_model):
    """Writes a run folder with one checkpoint, of step 7, of a tiny model; keywords change its `ModelConfig`."""
    import checkpoint

    def write(folder, **changes):
        model = tiny_model(**changes)
        train = {"segment": 32, "memory": [[0.0, 16], [0.5, 32]]}
        config = {"model": asdict(model.config), "train": train, "data": {"path": str(folder / "prepared")}}
        path = checkpoint.begin(folder / "checkpoints", 7)
        checkpoint.write_tensors(path, "model", model.state_dict())
        checkpoint.finish(path, {"memory": 32, "step": 7, "config": config})
        return folder

    return write


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory, write_run):
    """A run with one checkpoint of a tiny model with the real vocabulary; not to be written to."""
    return write_run(tmp_path_factory.mktemp("run"))
