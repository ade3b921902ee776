"""The configuration of a run of train.py: every setting of training, and which of them contradict each other.

The other sections are beside what they configure: model.ModelConfig, optim.OptimConfig, and the rest in stages.py.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

import checkpoint
import config
from config import ConfigError
from model import ModelConfig
from optim import OptimConfig
from stages import DataConfig, DPOConfig, EvalConfig, ReplayConfig

FP8_GEMMS = ("forward", "input_grad", "weight_grad")


@dataclass
class TrainConfig:
    batch_size: int  # rows of all processes and micro-batches; each is a stream with a memory of its own
    tokens: int = 0  # pretrain: in all
    epochs: int = 0  # sft, dpo: how often all rows are read
    micro_batch: int = 0  # rows in one forward pass; 0: all rows of the process
    segment: int = 512  # tokens of a row in one step
    # Memory curriculum: from this fraction of training on, that many tokens of Transformer-XL memory.
    memory: list[tuple[float, int]] = field(default_factory=lambda: [(0.0, 512)])
    ponder_weight: float = 0.0  # lambda in `cross-entropy + lambda * (steps + remainder)`; its start with target_depth
    # Mean steps of tokens that go by the rule (the logged depth has drawn ones, too), to which lambda is steered; with
    # exit the tolerance or, by loss, the bars. 0: they stay.
    target_depth: float = 0.0
    ponder_rate: float = 1e-4  # how fast it is steered, per step of training and step of depth
    # Mean of a depth that is drawn, before it is cut to those of the rule; 0: none is, whatever the next two say.
    sampled_depth: float = 0.0
    sampled_by: Literal["step", "row", "token"] = "step"  # one for all tokens of a step, of a row, or each its own
    sampled_share: float = 1.0  # exit, by row or token: so many of them draw a depth, the others halt by the rule
    warm_up: float = 0.0  # for this fraction of training every token takes `warm_depth` steps, and no depth is drawn
    warm_depth: int = 0  # 0: the model's maximum
    exit_interval: int = 10  # exit: steps between fits of the head
    frozen: bool = False  # exit: of a trained model, the head alone is fitted
    max_bad_steps: int = 20  # stop after so many steps in a row with a non-finite loss or gradient
    checkpoint_interval: int = 1000  # in steps
    keep: int = 2  # newest checkpoints kept, beside the best
    log_interval: int = 10
    seed: int = 1
    device: str = "auto"
    # Of activations; auto: bfloat16 on CUDA. fp8: bfloat16 there, and FP8 in the GEMMs of blocks and head (see fp8.py).
    dtype: Literal["auto", "float32", "bfloat16", "fp8"] = "auto"
    fp8_gemms: list[str] = field(default_factory=lambda: list(FP8_GEMMS))  # those of every layer that are in FP8
    fp8_gradients: Literal["e4m3", "e5m2"] = "e4m3"  # more precision, or more range
    # What the backward pass computes again instead of keeping: nothing more than norms and the SwiGLU product; gate and
    # up of the SwiGLU too, half of all memory; or everything inside a recurrence.
    recompute: Literal["none", "mlp", "step"] = "none"
    # Once enough tokens have halted, all after the attention is of the others alone, in the smallest of these shares of
    # all tokens that holds them, such as [0.25, 0.5, 0.75]; each is a graph to compile. Empty: of all tokens, always.
    capacities: list[float] = field(default_factory=list)
    compile: Literal["auto", "on", "off"] = "auto"  # auto: on for CUDA
    peak_tflops: float = 0.0  # of the accelerator in dtype, for the utilisation; 0: look it up by its name
    wandb: str = ""  # a Weights & Biases project to log to; empty: none

    def __post_init__(self):
        for name in ("batch_size", "segment", "checkpoint_interval", "keep", "log_interval", "max_bad_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"'{name}' must be at least 1, not {getattr(self, name)}")
        for name in ("micro_batch", "seed", "ponder_rate", "peak_tflops"):
            if getattr(self, name) < 0:
                raise ValueError(f"'{name}' must not be negative, as {getattr(self, name)} is")
        if self.exit_interval < 1 or not 0 <= self.sampled_share <= 1 or not 0 <= self.warm_up < 1:
            raise ValueError("'exit_interval' must be at least 1, 'sampled_share' in [0, 1] and 'warm_up' in [0, 1)")
        starts = [start for start, _ in self.memory]
        if not starts or starts[0] != 0 or starts != sorted(set(starts)) or starts[-1] >= 1:
            raise ValueError(f"'memory' must be [[0.0, length], [fraction, length], ...] in rising order, not {starts}")
        if min(length for _, length in self.memory) < 0:
            raise ValueError("'memory' lengths must not be negative")
        if wrong := [share for share in self.capacities if not 0 < share < 1]:
            raise ValueError(f"'capacities' are shares between 0 and 1, not {wrong[0]}")
        if unknown := [name for name in self.fp8_gemms if name not in FP8_GEMMS]:
            raise ValueError(f"'fp8_gemms' has '{unknown[0]}'; known are {', '.join(FP8_GEMMS)}")


@dataclass
class Config:
    out: str
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    optim: OptimConfig
    eval: EvalConfig
    replay: ReplayConfig
    dpo: DPOConfig
    stage: Literal["pretrain", "sft", "dpo"] = "pretrain"
    # The model to go on from, with its architecture, as `checkpoint.find` reads it: a run folder, a checkpoint or an
    # exported file. sft needs a pretrained one, dpo an instruction-tuned one.
    init: str = ""

    def __post_init__(self):
        t, pretraining = self.train, self.stage == "pretrain"
        if pretraining and t.tokens < t.batch_size * t.segment:
            raise ValueError(f"'train.tokens' = {t.tokens} is less than one step of batch_size x segment tokens")
        if not pretraining and t.epochs < 1:
            raise ValueError(f"'train.epochs' must be at least 1 in the stage {self.stage}, not {t.epochs}")
        for name, used in (("epochs", not pretraining), ("tokens", pretraining)):
            if getattr(t, name) and not used:
                raise ValueError(f"'train.{name}' is not used in the stage {self.stage}; leave it out")
        if self.data.weights and not pretraining:
            raise ValueError(f"'data.weights' is not used in the stage {self.stage}; leave it out")
        if not pretraining and not self.init:
            raise ValueError(f"'init' is missing: the stage {self.stage} goes on from a model; name its run folder")
        for name in ("target_depth", "sampled_depth", "warm_up", "frozen"):
            if self.stage == "dpo" and getattr(t, name):
                raise ValueError(f"'train.{name}' has no use in the stage dpo: every token takes 'dpo.depth' steps")
        if self.stage == "dpo" and t.dtype == "fp8":
            raise ValueError("'train.dtype = fp8' has no use in the stage dpo: its error would be taken for a reward")
        if self.stage != "dpo" and self.dpo != DPOConfig():
            raise ValueError(f"[dpo] has no use in the stage {self.stage}; leave it out")
        if pretraining and self.replay.rows:
            raise ValueError("[replay] has no use in the stage pretrain, which reads text anyway; leave it out")
        if not self.init or self.model != ModelConfig():  # else `with_model` does, which knows the model
            self.check_depths()

    def check_depths(self):
        """Raises ValueError for depths and a halting rule that do not go together."""
        least, most = self.model.depths[0], self.model.depths[-1]
        if wrong := [k for k in self.eval.depths if not least <= k <= most]:
            raise ValueError(f"'eval.depths' has {wrong[0]}; this model's depths are {least}..{most}")
        halting, t = self.model.halting, self.train
        if t.target_depth and not (halting == "exit" or halting == "act" and not t.sampled_depth):
            raise ValueError("'train.target_depth' needs 'model.halting = exit', or 'act' and no 'train.sampled_depth'")
        if t.sampled_depth and t.sampled_share < 1 and (halting != "exit" or t.sampled_by == "step"):
            raise ValueError(
                f"'train.sampled_share' {t.sampled_share} needs 'model.halting = exit' and 'train.sampled_by' row or "
                "token; without: 'train.sampled_share' 1, or 'train.sampled_depth' 0"
            )
        if t.frozen and (halting != "exit" or not self.init or t.sampled_depth):
            raise ValueError("'train.frozen' needs 'model.halting = exit' and 'init', and no 'train.sampled_depth'")
        fits = halting == "exit" and self.stage != "dpo" and (t.target_depth or self.model.exit_by == "loss")
        if fits and t.target_depth < self.model.min_depth:
            raise ValueError(
                f"'train.target_depth' must be at least 'model.min_depth' ({self.model.min_depth}), not "
                f"{t.target_depth}; 'model.exit_by = loss' needs one"
            )
        depths = {f"train.{name}": getattr(t, name) for name in ("sampled_depth", "target_depth", "warm_depth")}
        for name, value in (depths | {"dpo.depth": self.dpo.depth}).items():
            low = self.model.depths[self.model.first_exit] if name == "train.sampled_depth" else least
            if value and not low <= value <= most:
                raise ValueError(f"'{name}' {value} must lie in {low}..{most}, or be 0")

    def with_model(self):
        """This configuration with the architecture of the model at `init`. Raises `CheckpointError`, `ConfigError`."""
        if not self.init:
            return self
        meta = checkpoint.read_meta(checkpoint.find(self.init))
        stage, before = checkpoint.stage(meta), {"sft": "pretrain", "dpo": "sft"}
        if stage not in (self.stage, before.get(self.stage)):
            raise ConfigError(
                f"'init' {self.init} is of the stage {stage}; the stage {self.stage} goes on from a model of the stage "
                f"{before.get(self.stage, self.stage)}"
            )
        model = config.from_dict(meta["config"]["model"], ModelConfig, self.init)
        # [model] may be left out, or say by which other rule to halt, beside all else or nothing
        rule = {key: getattr(self.model, key) for key in ("halting", "exit_by", "tolerance", "min_depth")}
        if self.model == ModelConfig():
            rule = {}
        if self.stage == "dpo" and rule.get("halting") == "exit" != model.halting:
            raise ConfigError(f"'init' {self.init} has no head for 'model.halting = exit', and the stage dpo fits none")
        try:
            if rule and self.model not in (dataclasses.replace(x, **rule) for x in (model, ModelConfig())):
                old, new = (dataclasses.asdict(x) for x in (model, self.model))
                changes = "; ".join(config.differences(old, new, "model."))
                raise ConfigError(
                    f"'init' {self.init} is of another architecture: {changes}. Leave [model] out, but for its rule: "
                    f"{', '.join(rule)}"
                )
            cfg = dataclasses.replace(self, model=dataclasses.replace(model, **rule))
            cfg.check_depths()
            return cfg
        except ValueError as error:
            raise ConfigError(str(error)) from None
