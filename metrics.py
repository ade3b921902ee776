"""The log of a training run: metrics.jsonl, a line an event, and Weights & Biases; and what a GPU could do at most."""

import dataclasses
import json
import math
import re
from pathlib import Path

import torch

from config import ConfigError


class Log:
    """metrics.jsonl, and Weights & Biases if asked for. On resume, lines after the checkpoint's step are dropped: they
    are about to be written again."""

    def __init__(self, file, step, project, cfg):
        try:
            lines = [json.loads(line) for line in _whole_lines(file)]
        except ValueError as error:
            raise ConfigError(f"{file}: damaged ({error}); move it away, and a new one is begun") from None
        self.lines = [line for line in lines if line["step"] <= step] if step else []
        rewritten = file.with_suffix(".unfinished")
        rewritten.write_text("".join(json.dumps(line) + "\n" for line in self.lines))
        rewritten.replace(file)
        self.file = file.open("a", buffering=1)
        self.wandb = None
        if project:
            try:
                import wandb
            except ImportError:
                raise ConfigError("'train.wandb' is set but wandb is not installed: pip install wandb") from None
            name = Path(cfg.out).name  # also the id: a resumed run goes on in the same place
            self.wandb = wandb.init(project=project, name=name, id=name, resume="allow", config=dataclasses.asdict(cfg))

    def evaluations(self):
        return [line for line in self.lines if line["event"] == "validation" and line["loss"] is not None]

    def write(self, event, step, values):
        self.lines.append({"event": event, "step": step} | _finite(values))
        self.file.write(json.dumps(self.lines[-1]) + "\n")
        if self.wandb:
            self.wandb.log({event: values}, step=step)


def _finite(value):
    """JSON has no NaN and no infinity: a bad step logs null."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _whole_lines(file):
    """The lines of a file that end in a newline: a killed run can leave half a line."""
    text = file.read_text() if file.exists() else ""
    return text[: text.rfind("\n") + 1].splitlines()


# Dense bfloat16 tensor-core TFLOP/s with float32 accumulation, from the vendor's data sheets; the first match counts.
PEAK_TFLOPS = {
    "B200": 2250, "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "A100": 312, "L40S": 362,
    "RTX PRO 6000 Blackwell Max-Q": 438.9, "RTX PRO 6000 Blackwell": 503.8, "RTX 6000 Ada": 364,
    "RTX 5090": 209.5, "RTX 4090": 165.2, "RTX 3090": 71, "A10": 125, "L4": 121,
}  # fmt: skip


def peak_tflops(device, dtype, in_fp8):
    """Of the accelerator by its name, or 0 where it is unknown. FP8 is twice as fast as bfloat16."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return 0
    name = torch.cuda.get_device_name(device)
    peak = next((peak for known, peak in PEAK_TFLOPS.items() if re.search(rf"\b{known}\b", name)), 0)
    return 2 * peak if in_fp8 else peak
