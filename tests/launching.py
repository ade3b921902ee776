"""Runs of train.py in processes of their own, and what they leave: shared by test_train.py and test_stages.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import checkpoint
import train

ROOT = Path(train.__file__).parent
TIMINGS = {"tokens_per_second", "seconds_left", "utilisation", "hardware_utilisation"}


def launch(folder, config, *overrides, before="", processes=1):
    """train.py CONFIG in `folder`, after the Python statements `before`."""
    script = folder / "launch.py"
    script.write_text(f"import os, signal, sys\nimport checkpoint, train\n{before}\nsys.exit(train.main())\n")
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, str(script), config, *overrides], cwd=folder, env=environment, capture_output=True, text=True
    )


def curve(run):
    """metrics.jsonl of a run folder without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMINGS} for line in lines]


def assert_same_run(run, reference):
    assert curve(run) == curve(reference)
    path, wanted = checkpoint.find(run), checkpoint.find(reference)
    here, there = (checkpoint.read_tensors(folder, "model") for folder in (path, wanted))
    assert path.name == wanted.name and all(map(bool, (here[key].equal(there[key]) for key in there)))
