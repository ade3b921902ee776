"""Train a model: `python train.py CONFIG [--section.key=value ...]`.

One process, or several under torchrun. The same command after Ctrl-C, SIGTERM, kill -9 or a crash goes on from the
newest checkpoint; on a CPU the loss curve continues bit for bit. Results go to `out`: checkpoints/, metrics.jsonl.
"""

import argparse
import dataclasses
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import checkpoint
import config
import data
import fp8
import kernels
from config import ConfigError
from device import pick_device, pick_dtype
from halting import ExitFit, PonderWeight, draw_depths
from memory import read_later
from metrics import Log, peak_tflops
from model import ModelConfig, RecurrentTransformer
from optim import build_optimizers, guard, learning_rate
from settings import FP8_GEMMS, Config
from stages import STAGES


def memory_length(progress, curriculum):
    """The Transformer-XL memory at `progress` (0..1) of training."""
    return [length for start, length in curriculum if start <= progress][-1]


class Trainer:
    """Everything that a run is made of and that a checkpoint must hold."""

    def __init__(self, cfg):
        self.cfg, self.t = cfg, cfg.train
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.main = self.rank == 0
        try:
            self.device = pick_device(self.t.device, int(os.environ.get("LOCAL_RANK", 0)))
        except ValueError as error:
            raise ConfigError(f"'train.device': {error}") from None
        on_cuda = self.device.type == "cuda"
        dtype = pick_dtype(self.t.dtype, self.device)
        rows = self.t.batch_size // self.world
        self.micro = self.t.micro_batch or rows
        if self.t.batch_size % self.world or rows % self.micro:
            raise ConfigError(
                f"'train.batch_size' {self.t.batch_size} must be a multiple of 'train.micro_batch' {self.micro} "
                f"times {self.world} processes"
            )
        torch.manual_seed(self.t.seed)
        torch.set_float32_matmul_precision("high")

        self.model = RecurrentTransformer(cfg.model, dtype).to(self.device)
        # else no token halts before the others
        if cfg.model.halting != "fixed" or self.t.sampled_depth and self.t.sampled_by != "step":
            self.model.capacities = self.t.capacities
        compiled = self.t.compile == "on" or self.t.compile == "auto" and on_cuda
        if compiled:
            self.model.packing = 0  # a graph for each capacity takes longer than evaluation would be faster
            self.model.compile()
        self.model.recompute = self.t.recompute
        if reason := fp8.self_test_plain(self.device, dtype, cfg.model.width // cfg.model.heads):
            kernels.enabled = False
            if self.main:
                print(f"training goes on without kernels, slower: {self.device_name()}: {reason}", file=sys.stderr)
        if self.t.dtype == "fp8":
            self._use_fp8()
        if cfg.init:
            before = checkpoint.load_model(cfg.init)[0]
            weights, same = before.state_dict(), before.config.halting == cfg.model.halting
            if not same:  # a head for ACT is none for exit, and one of them may have no head
                weights = {name: x for name, x in weights.items() if not name.startswith("halting.")}
            self.model.load_state_dict(weights, strict=same)
        self.optimizers = build_optimizers(self.model, cfg.optim, compiled)
        exits, target = cfg.model.halting == "exit", self.t.target_depth
        self.ponder = PonderWeight(self.t.ponder_weight, 0 if exits else target, self.t.ponder_rate)
        self.exit = ExitFit(self.model, target) if exits and len(cfg.model.depths) > 1 else None

        self.stage = STAGES[cfg.stage](cfg, self.model, self.rank, self.world, self.micro)
        self.data_state = self.stage.state()
        self.batch = None  # read ahead
        self.memories = self._empty_memories(memory_length(0, self.t.memory))
        self.steps = self.stage.steps
        self.step = self.bad_steps = self.bad_in_a_row = 0

        self.out = Path(cfg.out)
        self.folder = self.out / "checkpoints"
        self.metrics_file = self.out / "metrics.jsonl"
        self.peak = (self.t.peak_tflops or peak_tflops(self.device, dtype, self.model.scales is not None)) * 1e12
        self.wrapped = self.model
        if self.world > 1:
            unused = not cfg.model.share  # a forced depth leaves out blocks
            self.wrapped = DistributedDataParallel(self.model, broadcast_buffers=False, find_unused_parameters=unused)

    def _use_fp8(self):
        """FP8 if this device can; else say why not, and train in bfloat16."""
        reason = fp8.self_test(self.device)
        sizes = {"model.width": self.cfg.model.width, "model.hidden": self.cfg.model.hidden}
        sizes["micro_batch x segment"] = self.micro * self.t.segment
        if self.device.type == "cuda" and (odd := [f"{name} = {n}" for name, n in sizes.items() if n % 16]):
            reason = f"{odd[0]} must be a multiple of 16"
        if reason is None:
            on = {name: name in self.t.fp8_gemms for name in FP8_GEMMS}
            self.model.use_fp8(
                fp8.Gemms(**on, gradients=kernels.E4M3 if self.t.fp8_gradients == "e4m3" else kernels.E5M2)
            )
        elif self.main:
            print(f"FP8 is off, training in bfloat16: {self.device_name()}: {reason}", file=sys.stderr)

    def _empty_memories(self, length):
        """One memory a micro-batch."""
        return [self.model.new_memory(self.micro, length) for _ in range(self.stage.parts)]

    # ---------------------------------------------------------------------------------------------- one step

    def _read(self):
        """The parts of the next batch, where the reader then stands, and which keys their tokens will see: work for the
        host that fits beside the backward pass of the batch before."""
        parts, state = self.stage.read()
        return parts, state, [self.model.spans(part.tokens, memory) for part, memory in zip(parts, self.memories)]

    def fit_exit(self, part, memory, spans):
        """Fit the head of `halting = exit` to tokens that the model has not been trained on yet."""
        self.model.eval()
        states, values = self.exit.examples(part.tokens, part.targets, memory, spans)
        self.model.train()
        counts = (part.groups >= 0).to(values.device)
        self.exit.update(states[:, counts], values[:, counts])
        self.cfg.model = self.model.config  # its tolerance

    def train_step(self):
        """Read a batch, accumulate gradients over its micro-batches, update. Returns the metrics of the step."""
        length = memory_length(self.step / self.steps, self.t.memory)
        parts, self.data_state, spans = self.batch or self._read()
        if self.memories[0].length != length:
            self.memories = [memory.resized(length) for memory in self.memories]
            spans = [None] * len(spans)

        # Loss, depth and number of tokens of every group; then of those that count nowhere, and the objective.
        stage, groups = self.stage, len(self.stage.groups)
        sums = torch.zeros(groups + 2, 3, device=self.device, dtype=torch.float64)
        own = torch.zeros(len(stage.names), device=self.device, dtype=torch.float64)
        context, depths = 0.0, [stage.depths] * len(parts)
        warming = self.step < self.t.warm_up * self.steps
        if warming:
            depths = [self.t.warm_depth or self.cfg.model.max_depth] * len(parts)
        elif self.t.sampled_depth:
            drawn = draw_depths(self.t, self.cfg.model, self.step)
            one = isinstance(drawn, int)
            depths = [drawn] * len(parts) if one else torch.tensor(drawn[stage.rows]).split(self.micro)
        if self.exit and not warming and stage.depth is None and self.step % self.t.exit_interval == 0:
            self.fit_exit(parts[0], self.memories[0], spans[0])
        for i, part in enumerate(parts):
            synced = i == len(parts) - 1 or self.world == 1
            with nullcontext() if synced else self.wrapped.no_sync(), torch.set_grad_enabled(not self.t.frozen):
                out = self.wrapped(part.tokens, part.targets, self.memories[i], depths[i], part.weights, spans[i])
                objective = out.loss
                if self.ponder.value:
                    objective = objective + self.ponder.value * out.ponder.mean()
                if not self.t.frozen:
                    (objective / len(parts)).backward()
            self.memories[i] = out.memory
            each = torch.stack([out.nll, out.depth.float(), torch.ones_like(out.nll)], -1).flatten(0, 1)
            group = part.groups.flatten().to(self.device, non_blocking=True) % (groups + 1)
            sums.index_add_(0, group, each.double())
            sums[-1] += objective.detach() / (len(parts) * self.world)
            if len(own):
                own += part.weights.sums
            context += out.context / len(parts)
        sums = torch.cat([sums.flatten(), own])
        if self.world > 1:
            dist.all_reduce(sums)
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        grad_norm = torch.nn.utils.get_total_norm(grads).to(self.device)
        if self.model.scales is not None and (seen := self.model.scales.probe.grad) is not None:
            if self.world > 1:
                dist.all_reduce(seen, dist.ReduceOp.MAX)
            grad_norm = grad_norm + 0 * seen.sum()  # FP8 saturates what is infinite, but its amax tells
        finite = sums[-len(own) - 3].isfinite() & grad_norm.isfinite()
        metrics = read_later(torch.cat([sums, grad_norm[None]]))
        factor = learning_rate((self.step + 1) / self.steps, self.cfg.optim)
        guard(self.optimizers.values(), grad_norm, finite, self.cfg.optim.grad_clip)
        for name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = factor * (self.cfg.optim.lr if name == "muon" else self.cfg.optim.adamw_lr)
            optimizer.step()
            optimizer.zero_grad()
        if self.model.scales is not None:
            self.model.scales.update(len(parts))
        last = self.step + 1 == self.steps
        self.batch = None if last else self._read()
        # The host waits for the backward pass here. The device then has the optimizers to do: time for what follows.
        *sums, grad_norm = metrics()
        of_groups, own = sums[: 3 * groups + 6], sums[3 * groups + 6 :]
        *of_groups, _, (objective, _, _) = zip(*[iter(of_groups)] * 3)
        _, depth, number = map(sum, zip(*of_groups))
        if math.isfinite(objective) and math.isfinite(grad_norm):
            self.bad_in_a_row = 0
        else:
            # What the step wrote into the memory is as bad as its loss: start these rows afresh.
            self.memories = self._empty_memories(length)
            if self.batch:
                self.batch = (*self.batch[:-1], [None] * len(parts))
            self.bad_steps += 1
            self.bad_in_a_row += 1
        metrics = stage.metrics(dict(zip(stage.groups, of_groups)), own) | {
            "objective": objective,
            "depth": depth / number,
            "executed_depth": depths[0] if isinstance(depths[0], int) else self.cfg.model.max_depth,
            "context": context,
            "ponder_weight": self.ponder.value,
            "tolerance": self.cfg.model.tolerance,
            "grad_norm": grad_norm,
            "lr": factor * self.cfg.optim.lr,
            "memory": length,
        }
        if not (self.bad_in_a_row or warming):  # no lambda moves a depth that is forced
            self.ponder.update(metrics["depth"])
        self.step += 1
        return metrics | {"bad_steps": self.bad_steps}

    # ---------------------------------------------------------------------------------------------- checkpoints

    def save(self):
        """Write a checkpoint; every process adds its memory. Returns its folder (on rank 0)."""
        path = checkpoint.begin(self.folder, self.step) if self.main else None
        if self.world > 1:
            dist.barrier()
            path = self.folder / f"step_{self.step:08d}.unfinished"
        checkpoint.write_tensors(path, f"memory_{self.rank}", checkpoint.memory_tensors(self.memories))
        if self.world > 1:
            dist.barrier()
        if not self.main:
            return None
        checkpoint.write_tensors(path, "model", self.model.state_dict())
        state = checkpoint.optimizer_tensors(self.model, self.optimizers)
        state["random/cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            state["random/cuda"] = torch.cuda.get_rng_state(self.device)
        if self.model.scales is not None:
            state["fp8/history"] = self.model.scales.history
        if self.exit:
            state["exit/sums"] = self.exit.sums
        checkpoint.write_tensors(path, "optimizer", state)
        meta = {
            "step": self.step,
            "tokens": self.step * self.t.batch_size * self.t.segment,
            "config": dataclasses.asdict(self.cfg),
            "data_sha256": self.stage.data_sha256,
            "data_state": self.data_state,
            "position": self.memories[0].position,
            "memory": self.memories[0].length,
            "ponder_weight": [self.ponder.value, self.ponder.integral],
            "bad_steps": [self.bad_steps, self.bad_in_a_row],
            "torch": torch.__version__,
        }
        path = checkpoint.finish(path, meta)
        checkpoint.prune(self.folder, self.t.keep)
        return path

    def resume(self):
        """Go on from the newest checkpoint, if there is one. Raises `CheckpointError`, `DataError`, `ConfigError`."""
        found = checkpoint.steps(self.folder)
        if not found:
            return
        path = found[-1]
        meta = checkpoint.read_meta(path)
        old, new = meta["config"], json.loads(config.to_json(self.cfg))
        old["model"] = dataclasses.asdict(ModelConfig()) | old["model"]  # of before a knob: with its default
        if self.exit and self.t.target_depth:  # it has moved
            new["model"]["tolerance"] = old["model"]["tolerance"]
        else:  # a dial: no weight depends on it
            old["model"]["tolerance"] = new["model"]["tolerance"]
        if changed := list(config.differences(old["model"], new["model"], "model.")):
            raise checkpoint.CheckpointError(
                f"{path} is of another architecture: {'; '.join(changed)}. Choose another `out`, or delete {self.out}"
            )
        # The data position depends on these, and so does which row of the memory is whose.
        settings = [("train", key) for key in ("batch_size", "segment", "seed")] + [("replay", "rows")]
        if self.cfg.stage == "dpo" or self.cfg.replay.rows:
            settings.append(("train", "micro_batch"))
        for section, key in settings:
            was, now = old.get(section, {}).get(key, 0), new[section][key]  # there was no [replay] once
            if was != now:
                raise ConfigError(
                    f"'{section}.{key}' was {was} when {path} was written and is {now} now; the data position depends "
                    f"on it. Set it back, or choose another `out`"
                )
        if meta["data_sha256"] != self.stage.data_sha256:
            raise data.DataError(
                f"{' or '.join(self.stage.digests)} is not the one that {path} was trained on. Prepare it as it was, "
                f"or choose another `out`"
            )
        if meta["step"] > self.steps:
            raise ConfigError(
                f"{path} is beyond step {self.steps}, the last of this configuration. Train longer, or choose another "
                "`out`"
            )
        checkpoint.load_weights(self.model, path, self.device)
        state = checkpoint.read_tensors(path, "optimizer")
        torch.set_rng_state(state.pop("random/cpu"))
        if "random/cuda" in state and self.device.type == "cuda":
            torch.cuda.set_rng_state(state.pop("random/cuda"), self.device)
        if "fp8/history" in state and self.model.scales is not None:
            self.model.scales.load(state["fp8/history"])
        if self.exit:
            self.exit.sums.copy_(state.pop("exit/sums"))
            self.model.set_tolerance(new["model"]["tolerance"])
            self.cfg.model = self.model.config
        checkpoint.load_optimizers(self.model, self.optimizers, state)
        self.memories = checkpoint.read_memories(path, meta["position"], self.stage.rows, self.micro, self.device)
        self.data_state = meta["data_state"]
        self.stage.load_state(self.data_state)
        self.step, (self.ponder.value, self.ponder.integral) = meta["step"], meta["ponder_weight"]
        self.bad_steps, self.bad_in_a_row = meta["bad_steps"]
        if self.main:
            print(f"going on from {path}, step {self.step} of {self.steps}")
            for line in config.differences(old, new):
                print(f"  changed since: {line}")

    # ---------------------------------------------------------------------------------------------- the run

    def run(self):
        """Train to the end or to a stop signal; returns the exit code."""
        self.out.mkdir(parents=True, exist_ok=True)
        self.resume()
        log = Log(self.metrics_file, self.step, self.t.wandb, self.cfg) if self.main else None
        if self.main:
            self.describe()
        stop = StopSignal()
        if self.main and (self.step % self.cfg.eval.interval == 0 or self.step == self.steps):
            if not any(line["step"] == self.step for line in log.evaluations()):
                self.report(log)  # before the first step, or where a run was stopped between saving and evaluating
        bar = tqdm(total=self.steps, initial=self.step, desc="training", unit="step", disable=not self.main,
                   mininterval=0.5 if sys.stderr.isatty() else 10, dynamic_ncols=True)  # fmt: skip
        clock, clock_step = time.perf_counter(), self.step
        saved = None
        while self.step < self.steps:
            metrics = self.train_step()
            bar.update()
            done = self.step == self.steps
            if self.main and (self.step % self.t.log_interval == 0 or done):
                now = time.perf_counter()
                seconds, clock = now - clock, now
                rate = (self.step - clock_step) * self.t.batch_size * self.t.segment / seconds
                clock_step = self.step
                metrics |= self.speed(rate, metrics)
                log.write("train", self.step, metrics)
                bar.set_postfix_str(
                    f"loss {metrics['loss']:.3f}, depth {metrics['depth']:.2f}, {rate:,.0f} tokens/s", refresh=False
                )
            if self.bad_in_a_row >= self.t.max_bad_steps:
                bar.close()
                good = checkpoint.steps(self.folder)
                if self.main:
                    print(
                        f"error: {self.bad_in_a_row} steps in a row with a non-finite loss or gradient; "
                        f"the last good checkpoint is {good[-1] if good else 'none'}. Lower optim.lr",
                        file=sys.stderr,
                    )
                return 1
            stopping = stop.asked(self.device if self.world > 1 else None)
            well = not self.bad_in_a_row
            evaluating = well and self.step % self.cfg.eval.interval == 0 or done
            if well and self.step % self.t.checkpoint_interval == 0 or evaluating or stopping:
                saved = self.save()  # before evaluating: an evaluation that fails loses nothing
            if stopping and not done:
                bar.close()
                if self.main:
                    print(f"stopped; saved {saved}. The same command goes on from there")
                return 0
            if evaluating and self.main:
                bar.clear()
                self.report(log)
                clock, clock_step = time.perf_counter(), self.step
        bar.close()
        if self.main:
            self.conclude(log)
        return 0

    def speed(self, rate, metrics):
        """Tokens/s, seconds left, model FLOPs utilisation and memory. Utilisation counts the FLOPs of the steps that
        tokens took; `hardware_utilisation` those of every step for every token, which is what is run without
        `capacities`."""
        flops = {
            key: 3 * rate * self.model.flops_per_token(metrics[depth], metrics["context"])
            for key, depth in (("utilisation", "depth"), ("hardware_utilisation", "executed_depth"))
        }
        peak = self.peak * self.world
        result = {key: round(value / peak, 4) if peak else "n/a" for key, value in flops.items()}
        if self.device.type == "cuda":
            result["peak_memory_gib"] = round(torch.cuda.max_memory_allocated(self.device) / 2**30, 2)
        left = (self.steps - self.step) * self.t.batch_size * self.t.segment / rate
        return {"tokens_per_second": round(rate, 1), "seconds_left": round(left)} | result

    def describe(self):
        counts, model, t = self.model.parameter_counts(), self.cfg.model, self.t
        dtype = str(self.model.compute_dtype).removeprefix("torch.")
        if self.model.scales is not None:
            dtype += f" and FP8 ({', '.join(self.t.fp8_gemms)}; gradients {self.t.fp8_gradients})"
        drawn = f", {t.sampled_share:.0%} of all {t.sampled_by}s at a drawn depth" if t.sampled_depth else ""
        print(
            f"{counts['total'] / 1e6:.1f}M parameters (embedding {counts['embedding'] / 1e6:.1f}M, "
            f"blocks {counts['blocks'] / 1e6:.1f}M), depth up to {model.max_depth}, halting {model.halting}{drawn}\n"
            f"{self.steps} steps of {t.batch_size} x {t.segment} tokens, "
            f"memory {', '.join(str(length) for _, length in t.memory)}, {dtype} on {self.world} x {self.device_name()}"
        )

    def report(self, log):
        """Evaluate, log and print it, and mark the checkpoint of this step if it is the best so far."""
        self.model.eval()
        result = self.stage.evaluate(memory_length(self.step / self.steps, self.t.memory))
        self.model.train()
        if result is None:
            return
        best = min((line["loss"] for line in log.evaluations()), default=math.inf)
        if self.step and result["loss"] < best:
            checkpoint.mark_best(checkpoint.steps(self.folder)[-1])
        log.write("validation", self.step, result)
        if self.model.scales is not None:
            log.write("fp8", self.step, {"amax": self.model.scales.amax()})
        tqdm.write(f"step {self.step}: validation {self.stage.summary(result)}")

    def conclude(self, log):
        if evaluations := log.evaluations():
            first, last = evaluations[0], evaluations[-1]
            start = "before training" if first["step"] == 0 else f"at step {first['step']}"
            print(f"validation loss: {first['loss']:.4f} {start}, {last['loss']:.4f} trained")
        newest = checkpoint.steps(self.folder)[-1]
        print(f"finished at step {self.step}: {newest}\nmetrics: {self.metrics_file}")
        if any(line["event"] == "train" for line in log.lines):  # else they were deleted
            summary = self.out / "summary.json"
            summary.write_text(json.dumps(self.summarize(log), indent=1) + "\n")
            print(f"summary: {summary}")

    def summarize(self, log):
        """What the run was and what came of it, to compare runs by: a row of a table. FLOPs are those of the steps that
        tokens took, `executed` those of all steps (fewer run with `capacities`); seconds are of training alone, at the
        median speed."""
        lines = [line for line in log.lines if line["event"] == "train"]
        most = self.cfg.model.max_depth  # of lines from before `executed_depth`
        keys = "depth", "executed_depth", "context"
        mean = {key: statistics.fmean(line.get(key, most) for line in lines) for key in keys}
        tokens = self.steps * self.t.batch_size * self.t.segment
        speed = statistics.median(line["tokens_per_second"] for line in lines)
        count = lambda depth: 3 * tokens * self.model.flops_per_token(depth, mean["context"])  # noqa: E731
        command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
        return {
            "name": self.out.name, "stage": self.cfg.stage, "commit": commit or None, "seed": self.t.seed,
            "parameters": self.model.parameter_counts()["total"], "tokens": tokens,
            "flops": count(mean["depth"]), "executed_flops": count(mean["executed_depth"]),
            "tokens_per_second": speed, "seconds": round(tokens / speed, 1), "device": self.device_name(),
            "torch": torch.__version__, "data": self.cfg.data.path,
            "validation": next(reversed(log.evaluations()), None),
        }  # fmt: skip

    def device_name(self):
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"


class StopSignal:
    """The first SIGINT or SIGTERM asks for a checkpoint and an orderly end; a second SIGINT interrupts at once."""

    def __init__(self):
        self.received = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._receive)

    def _receive(self, number, frame):
        self.received = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def asked(self, device):
        """Whether any process received a signal; `device` is where they can meet, None for a single process."""
        if device is None:
            return self.received
        flag = torch.tensor(float(self.received), device=device)
        dist.all_reduce(flag)
        return flag.item() > 0


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Any key of the config can be set, for example:\n"
        "  python train.py configs/demo.toml --train.tokens=2e5 --model.width=256\n"
        "  torchrun --nproc_per_node=2 train.py configs/pretrain_110m.toml",
    )  # fmt: skip
    parser.add_argument("config", help="a TOML file, see configs/")
    arguments, overrides = parser.parse_known_args()
    if wrong := [o for o in overrides if not o.startswith("--")]:
        parser.error(f"unknown argument '{wrong[0]}'; settings are written --section.key=value")
    distributed = "WORLD_SIZE" in os.environ and int(os.environ["WORLD_SIZE"]) > 1
    try:
        cfg = config.load(arguments.config, Config, overrides)
        if distributed:
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        return Trainer(cfg.with_model()).run()
    except (ConfigError, data.DataError, checkpoint.CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:
        print(f"error: {error}\nLower train.micro_batch, then train.memory and train.batch_size", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # the second one: the first asks for a checkpoint
        return 130
    finally:
        if distributed and dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
