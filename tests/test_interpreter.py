"""The tests of Triton kernels once more, with the kernels interpreted, which needs no GPU.

Whether they are is decided when Triton is imported, so that takes a process of its own: one for all files, as it takes
longer to import what they need than to run most of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

FOLDER = Path(__file__).parent
FILES = [f"{FOLDER.name}/{name}" for name in ("test_attention.py", "test_engine.py", "test_kernels.py")]


def test_kernels_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rp", *FILES]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, env=environment, cwd=FOLDER.parent, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-5000:]
    assert all(f"PASSED {file}::" in result.stdout for file in FILES), result.stdout
