"""Runs of train.py in processes of their own, and what they leave: shared by test_train.py and test_stages.py."""

import contextlib
import functools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from multiprocessing import connection, forkserver
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.distributed import TCPStore

import checkpoint
import train

ROOT = Path(train.__file__).parent
TIMINGS = {"tokens_per_second", "seconds_left", "utilisation", "hardware_utilisation"}


@functools.cache
def forks():
    """Starts processes as forks of one that has imported train.py and run nothing, as importing it takes longer than
    a tiny run. Forks of this one would not do: it has threads, and perhaps a GPU."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train"])
    with contextlib.chdir(ROOT):  # where that process looks for train.py
        forkserver.ensure_running()
    return context


def launch(folder, config, *overrides, before="", processes=1):
    """train.py CONFIG in `folder`, after the Python statements `before`, in one process or several as of torchrun."""
    files = [folder / name for name in ("launch.out", "launch.err")]
    for file in files:
        file.write_text("")
    store, variables = None, {}
    if processes > 1:
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "WORLD_SIZE": processes}
        variables["TORCHELASTIC_USE_AGENT_STORE"] = True  # this one
    ranks = [{"RANK": rank, "LOCAL_RANK": rank} | variables if processes > 1 else {} for rank in range(processes)]
    started = [forks().Process(target=_train, args=(files, [config, *overrides], before, rank)) for rank in ranks]
    for process in started:
        process.start()
    while alive := [process for process in started if process.is_alive()]:
        connection.wait([process.sentinel for process in alive])
        if any(process.exitcode for process in started):  # the others would wait for it
            [process.kill() for process in alive]
    codes = [process.exitcode for process in started]
    out, err = (file.read_text() for file in files)
    return SimpleNamespace(returncode=next(filter(None, codes), 0), stdout=out, stderr=err)


def _train(files, arguments, before, variables):
    os.chdir(files[0].parent)
    for stream, file in zip((1, 2), files):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), stream)
    os.environ |= {name: str(value) for name, value in variables.items()}
    torch.set_num_threads(1)
    sys.argv = ["train.py", *arguments]
    exec(before, {"os": os, "signal": signal, "checkpoint": checkpoint, "train": train})
    sys.exit(train.main())


def torchrun(folder, config, *overrides, processes):
    """train.py CONFIG in `folder` as on the command line."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.run(
        [*command, ROOT / "train.py", config, *overrides],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


@contextlib.contextmanager
def signals_put_back():
    """train.main leaves its handlers behind."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def curve(run):
    """metrics.jsonl of a run folder without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMINGS} for line in lines]


def assert_same_run(run, reference):
    assert curve(run) == curve(reference)
    path, wanted = checkpoint.find(run), checkpoint.find(reference)
    here, there = (checkpoint.read_tensors(folder, "model") for folder in (path, wanted))
    assert path.name == wanted.name and all(map(bool, (here[key].equal(there[key]) for key in there)))
