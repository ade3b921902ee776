"""What the three stages of training differ in: which tokens a step reads, what it minimises, and what is measured on
held-out data. train.py has the rest, which is the same for all.

    pretrain    text of a mixture of domains; the mean cross-entropy of all tokens
    sft         conversations (chat.py); the mean cross-entropy of the answers, with the <|endoftext|> that ends each
    dpo         preference pairs; direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290)

A stage has `groups`, the names of the kinds of token whose loss and depth are logged apart; `steps`; `digests` of what
it reads; `depths`, the steps of every token in training, or None; `names` of its own sums; and these methods:

    read()                  the next step's `Part`s of this process, one a micro-batch, and where the reader then is
    metrics(groups, sums)   what the log gets of a step
    evaluate(memory)        the same of held-out data; its "loss" decides which checkpoint is the best
    summary(result)         of an evaluation, one line
"""

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import safetensors
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import answers
import chat
import checkpoint
import data
import evaluate
from config import ConfigError


@dataclass
class DataConfig:
    path: str  # a folder made by prepare_data.py
    weights: dict[str, float] = field(default_factory=dict)  # pretrain: of domains; empty: those of the manifest


@dataclass
class EvalConfig:
    interval: int = 1000  # in steps; also before the first and after the last
    tokens: int = 32768  # of every domain's held-out data
    rows: int = 16
    depths: list[int] = field(default_factory=list)  # forced depths to report beside the model's own
    answers: int = 0  # sft, dpo: so many held-out prompts are answered, at temperature 0.8 and up to 256 tokens

    def __post_init__(self):
        if min(self.interval, self.tokens - 1, self.rows) < 1:
            raise ValueError("'interval' and 'rows' must be at least 1, 'tokens' at least 2")
        if self.answers < 0:
            raise ValueError(f"'answers' must not be negative, as {self.answers} is")


@dataclass
class ReplayConfig:
    """Pretraining text among the conversations or pairs, against forgetting (the PPO-ptx of Ouyang et al. 2022, arXiv
    2203.02155): `rows` of every micro-batch are streams of it, whose mean cross-entropy per token is added to the loss,
    times `weight`."""

    path: str = ""  # a folder made by prepare_data.py
    rows: int = 0
    weight: float = 1.0

    def __post_init__(self):
        if self.rows < 0:
            raise ValueError(f"'rows' must not be negative, as {self.rows} is")
        if self.weight <= 0:
            raise ValueError(f"'weight' must be above 0, not {self.weight}")
        if bool(self.path) != bool(self.rows):
            raise ValueError("'path' and 'rows' go together: a folder of text, and its rows of every micro-batch")


@dataclass
class DPOConfig:
    beta: float = 0.1  # how far the policy may move from the reference: the smaller, the farther
    loss: Literal["sigmoid", "sigmoid_norm"] = "sigmoid"  # sigmoid_norm: of log-probabilities per token of the answer
    label_smoothing: float = 0.0  # share of the pairs that are expected to be the wrong way round
    end: bool = True  # whether the <|endoftext|> that closes an answer is compared, too; the `sft` term has it always
    # A pair weighs n^-prompt_power, of n pairs of its prompt. 0: all pairs weigh the same; 1: all prompts. Pairs that
    # share prompt and answers are learned by heart in one epoch (Ouyang et al. 2022, arXiv 2203.02155, section 3.5).
    prompt_power: float = 0.0
    length: float = 0.0  # what every token by which the chosen answer is longer adds to the margin in the loss
    sft: float = 0.0  # weight of the chosen answers' cross-entropy per token, added to the loss
    depth: int = 0  # steps of every token, in policy and reference; 0: the model's maximum

    def __post_init__(self):
        if self.beta <= 0:
            raise ValueError(f"'beta' must be above 0, not {self.beta}")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"'label_smoothing' must lie in [0, 0.5), not {self.label_smoothing}")
        if min(self.sft, self.depth, self.prompt_power, self.length) < 0:
            raise ValueError("'sft', 'depth', 'prompt_power' and 'length' must not be negative")


class Part(NamedTuple):
    """A micro-batch. tokens, targets, groups: (B, T) int64; a group of -1 is counted nowhere. weights: as in the
    model's forward, such that the mean over the micro-batches of all processes is the loss of the step."""

    tokens: torch.Tensor
    targets: torch.Tensor
    groups: torch.Tensor
    weights: object = None

    def beside(self, tokens, targets, stage):
        """With rows of text (rows, T) behind these, for their weight in the loss of `stage`."""
        share = torch.full(tokens.shape, stage.cfg.replay.weight / tokens.numel())
        weights = self.weights.beside(share) if callable(self.weights) else torch.cat([self.weights, share])
        groups = torch.full_like(tokens, len(stage.groups) - 1)
        joined = (torch.cat(pair) for pair in zip(self[:3], (tokens, targets, groups)))
        return Part(*joined, weights)


class Stage:
    """What they have in common. cfg: train.Config. rank, world, micro: of the processes, and the rows of a part. Raises
    `ConfigError` where `replay` leaves it no rows."""

    depth, names = None, ()

    def __init__(self, cfg, model, rank, world, micro):
        self.cfg, self.model, self.rank, self.world = cfg, model, rank, world
        rows = cfg.train.batch_size // world
        self.parts = rows // micro  # of this process
        self.rows = slice(rank * rows, (rank + 1) * rows)  # of the global batch
        self.micro, self.text = micro - cfg.replay.rows, None  # the rows of a part that are the stage's own
        self.digests = {}
        if self.micro < 1:
            raise ConfigError(f"'replay.rows' {cfg.replay.rows} must be fewer than the {micro} rows of a micro-batch")
        if cfg.replay.rows:
            try:
                replayed, self.groups = data.Prepared.open(cfg.replay.path), [*self.groups, "text"]
            except data.DataError as error:
                raise data.DataError(f"[replay] {error}. Without text: --replay.path= --replay.rows=0") from None
            self.digests[f"the manifest of {cfg.replay.path}"] = replayed.sha256
            streams = self.parts * world * cfg.replay.rows
            self.text = data.TokenStreams(replayed, streams, cfg.train.segment, cfg.train.seed)

    def split(self, rows, *arrays):
        """Arrays of the rows of all parts of all processes, `rows` each, as one tuple of tensors a part of this one."""
        own = slice(self.rank * self.parts * rows, (self.rank + 1) * self.parts * rows)
        return zip(*(torch.from_numpy(array[own]).split(rows) for array in arrays))

    def with_text(self, parts):
        """`parts` with the rows of `replay` behind the others, and where the readers then stand."""
        if self.text is None:
            return parts, self.state()
        *arrays, _, text = next(self.text)
        mixed = [part.beside(*rows, self) for part, rows in zip(parts, self.split(self.cfg.replay.rows, *arrays))]
        return mixed, {"own": self.reader.state(), "text": text}

    @property
    def depths(self):
        """Steps of the tokens of a part, as in the model's forward. Where a stage forces them, text still goes by the
        model's own rule."""
        if self.depth is None or self.text is None:
            return self.depth
        depths = torch.full((self.micro + self.cfg.replay.rows, self.cfg.train.segment), self.depth)
        depths[self.micro :] = 0
        return depths

    def state(self):
        """Where the readers stand."""
        own = self.reader.state()
        return own if self.text is None else {"own": own, "text": self.text.state()}

    def load_state(self, state):
        self.reader.load_state(state if self.text is None else state["own"])
        if self.text is not None:
            self.text.load_state(state["text"])

    def written(self, memory):
        """Of the answers to `eval.answers` held-out prompts, see `answers.write_answers`."""
        return answers.write_answers(self.model, self.chats, self.cfg.eval.answers, memory, self.cfg.train)

    @property
    def data_sha256(self):
        """Of all that is read: what a run that goes on must find as it was."""
        first, *others = self.digests.values()
        return hashlib.sha256("".join([first, *others]).encode()).hexdigest() if others else first

    def metrics(self, groups, sums):
        """groups: {name: [sum of nats, sum of steps, tokens]}. sums: those of `names`."""
        found = {name: {"loss": n / k, "depth": d / k, "tokens": int(k)} for name, (n, d, k) in groups.items() if k}
        return {"groups": found}


class Pretrain(Stage):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        cfg = self.cfg
        self.prepared = data.Prepared.open(cfg.data.path)
        self.groups = self.prepared.domains
        self.digests[f"the manifest of {cfg.data.path}"] = self.prepared.sha256
        self.reader = data.TokenStreams(
            self.prepared, cfg.train.batch_size, cfg.train.segment, cfg.train.seed, cfg.data.weights or None
        )
        self.steps = cfg.train.tokens // (cfg.train.batch_size * cfg.train.segment)

    def read(self):
        *arrays, state = next(self.reader)
        return [Part(*part) for part in self.split(self.micro, *arrays)], state

    def metrics(self, groups, sums):
        nats, _, tokens = map(sum, zip(*groups.values()))
        return {"loss": nats / tokens} | super().metrics(groups, sums)

    def evaluate(self, memory):
        """Loss and depth of every domain, at the model's own depth and at the forced ones."""
        held_out = {
            name: evaluate.split_documents(self.prepared.tokens("val", name, self.cfg.eval.tokens))
            for name in self.groups
            if self.prepared.manifest["domains"][name]["val"]["tokens"] > 1
        }
        if not held_out:
            return None
        rows = {name: [(d[:-1], d[1:], ...) for d in documents] for name, documents in held_out.items()}
        result, _ = at_depths(self.model, rows, self.cfg, memory)
        return result | {"loss": result["macro"]["nats"]}

    def summary(self, result):
        forced = "".join(f", {part['bits_per_byte']:.3f} at depth {k}" for k, part in result.get("forced", {}).items())
        domains = ", ".join(f"{name} {part['bits_per_byte']:.2f}" for name, part in result["domains"].items())
        macro = result["macro"]
        return f"{macro['bits_per_byte']:.3f} bits per byte at depth {macro['depth']:.2f}{forced} ({domains})"


class SFT(Stage):
    groups = ["prompt", "answer"]

    def __init__(self, *arguments):
        super().__init__(*arguments)
        cfg = self.cfg
        self.chats = chat.Chats.open(cfg.data.path, "sft")
        self.digests[f"the manifest of {cfg.data.path}"] = self.chats.sha256
        rows = self.parts * self.world * self.micro
        self.reader = chat.ChatRows(self.chats, "train", rows, cfg.train.segment, cfg.train.seed, cfg.train.epochs)
        self.steps = len(self.reader)

    def read(self):
        tokens, targets, weights = next(self.reader)
        filling = (tokens == data.EOT) & (targets == data.EOT)  # after the last conversation
        groups = np.where(filling, -1, weights.astype(np.int64))
        # A part's share of the answers varies, and with it its share in the loss.
        weights *= self.parts * self.world / max(weights.sum(), 1)
        return self.with_text([Part(*part) for part in self.split(self.micro, tokens, targets, groups, weights)])

    def metrics(self, groups, sums):
        nats, _, tokens = groups["answer"]
        return {"loss": nats / max(tokens, 1)} | super().metrics(groups, sums)

    @cached_property
    def held_out(self):
        """{source: [(ids, targets, mask), ...]}, `eval.tokens` of each."""
        rows, found = self.chats.split("val"), {}
        chosen, sources = answers.first_of_sources(rows, self.cfg.eval.tokens)
        for row, source in zip(answers.marked_rows(rows, chosen), sources):
            found.setdefault(self.chats.domains[source], []).append(row)
        return found

    def evaluate(self, memory):
        """Loss and depth of answers, by source, and of all prompts and answers."""
        if not self.chats.manifest["val"]["rows"]:
            return None
        result, scores = at_depths(self.model, self.held_out, self.cfg, memory)
        masks = [mask for rows in self.held_out.values() for *_, mask in rows]
        result["prompts"] = evaluate.summarize([s.where(~mask) for s, mask in zip(scores, masks)])
        result["answers"] = evaluate.summarize([s.where(mask) for s, mask in zip(scores, masks)])
        result["written"] = self.written(memory)
        return result | {"loss": result["answers"]["nats"]}

    def summary(self, result):
        found, prompts = result["answers"], result["prompts"]
        line = f"{found['nats']:.4f} nats on answers, depth {found['depth']:.2f}, {prompts['depth']:.2f} on prompts"
        return "; ".join([line, *answers.summary(result["written"])])


class DPO(Stage):
    groups = ["prompt", "chosen", "rejected"]
    names = ("pairs", "loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies",
             "logps/chosen", "logps/rejected")  # fmt: skip

    def __init__(self, *arguments):
        super().__init__(*arguments)
        cfg = self.cfg
        self.chats = chat.Chats.open(cfg.data.path, "preference")
        self.digests[f"the manifest of {cfg.data.path}"] = self.chats.sha256
        self.depth, self.batch = cfg.dpo.depth or cfg.model.max_depth, (cfg.train.segment, cfg.eval.rows)
        self.reader = chat.PreferencePairs(
            self.chats, "train", self.parts * self.world, self.micro, cfg.train.segment, cfg.train.seed,
            cfg.train.epochs,
        )  # fmt: skip
        self.steps = len(self.reader)
        self.reference = self._reference()
        self.weights = pairs_of_prompt(self.chats, "train") ** -cfg.dpo.prompt_power

    def _reference(self):
        """{split: (pairs, 2) float32}, the log-probabilities of both answers under the model at `init`. They are
        worked out once and kept in `out`/reference.safetensors. Raises `CheckpointError`."""
        file = Path(self.cfg.out) / "reference.safetensors"
        device, dtype = self.model.embedding.weight.device, self.model.compute_dtype
        model, meta = checkpoint.load_model(self.cfg.init, device, dtype)
        key = {"data": self.chats.sha256, "model": fingerprint(model), "depth": str(self.depth), "dtype": str(dtype)}
        key["end"] = str(self.cfg.dpo.end)
        self.digests["the model at `init`"] = key["model"]
        if file.exists():
            try:
                with safetensors.safe_open(file, "pt") as stored:
                    if stored.metadata() == key:
                        return {name: stored.get_tensor(name).numpy() for name in stored.keys()}
            except safetensors.SafetensorError as error:
                raise checkpoint.CheckpointError(f"{file}: damaged ({error}); delete it, to make it anew") from None
        found = {
            split: answers.answer_logps(
                model,
                answers.pair_rows(self.chats, split, end=self.cfg.dpo.end),
                meta["memory"],
                self.depth,
                "reference",
                *self.batch,
            )  # fmt: skip
            for split in ("train", "val")
            if self.chats.manifest[split]["rows"]
        }
        if self.rank == 0:
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(".unfinished")
            save_file({name: torch.from_numpy(x) for name, x in found.items()}, partial, key)
            partial.replace(file)
        return found

    def read(self):
        batch = next(self.reader)
        weights = [self.weights[part.pairs] for part in batch]
        # of no answer, -1, is the 0 at the end
        chosen = [(x.sequence % 2 == 0) * np.append(w, 0)[x.sequence // 2] for x, w in zip(batch, weights)]
        # The loss is a weighted mean over the whole batch: of pairs, and of the tokens of chosen answers.
        scale = self.parts * self.world
        of_pairs, of_tokens = (scale / sum(float(array.sum()) for array in arrays) for arrays in (weights, chosen))
        parts = []
        for i in range(self.rank * self.parts, (self.rank + 1) * self.parts):
            tokens, targets, sequence = map(torch.from_numpy, batch[i][:3])
            groups = torch.where(sequence < 0, 0, 1 + sequence % 2)
            groups[(tokens == data.EOT) & (targets == data.EOT)] = -1  # what no pair fills
            compared = torch.where(self.left_out(targets), -1, sequence)
            reference = self.reference["train"][batch[i].pairs]
            loss = PairLoss(self.cfg.dpo, compared, reference, weights[i] * of_pairs, chosen[i] * of_tokens)
            parts.append(Part(tokens, targets, groups, loss))
        return self.with_text(parts)

    def metrics(self, groups, sums):
        pairs = sums[0] or 1
        return {name: x / pairs for name, x in zip(self.names[1:], sums[1:])} | super().metrics(groups, sums)

    def left_out(self, targets):
        """Which targets of answers are not compared."""
        return (targets == data.EOT) & (not self.cfg.dpo.end)

    @cached_property
    def held_out(self):
        """`pair_rows` of the first eval.tokens tokens of every source, and which pairs they are."""
        chosen, _ = answers.first_of_sources(self.chats.split("val"), self.cfg.eval.tokens, sides=2)
        return answers.pair_rows(self.chats, "val", chosen, self.cfg.dpo.end), chosen

    def evaluate(self, memory):
        """Rewards of held-out pairs, how they go with the length of answers, and answers to some of their prompts."""
        if not self.chats.manifest["val"]["rows"]:
            return None
        (rows, pairs), beta = self.held_out, self.cfg.dpo.beta
        logps = answers.answer_logps(self.model, rows, memory, self.depth, "validation", *self.batch)
        lengths = np.array([mask.sum() for *_, mask in rows]).reshape(-1, 2)
        loss = PairLoss(self.cfg.dpo, None, self.reference["val"][pairs], np.full(len(pairs), 1 / len(pairs)))
        sums = loss.of_logps(torch.from_numpy(logps), torch.from_numpy(lengths))[1]
        result = {name: float(x) / len(pairs) for name, x in zip(self.names[1:], sums[1:])}
        rewards = beta * (logps - self.reference["val"][pairs])
        result["length_correlation"] = answers.correlation(rewards[:, 0] - rewards[:, 1], lengths[:, 0] - lengths[:, 1])
        return result | {"pairs": len(pairs), "written": self.written(memory)}

    def summary(self, result):
        line = f"DPO loss {result['loss']:.4f}, accuracy {result['rewards/accuracies']:.3f}, "
        line += f"margin {result['rewards/margins']:.3f}, correlation with length {result['length_correlation']:.2f}"
        return "; ".join([line, *answers.summary(result["written"])])


STAGES = {"pretrain": Pretrain, "sft": SFT, "dpo": DPO}


def fingerprint(model):
    """The SHA-256 of a model's weights."""
    digest = hashlib.sha256()
    for name, x in sorted(model.state_dict().items()):
        digest.update(name.encode() + x.cpu().numpy().tobytes())
    return digest.hexdigest()


class PairLoss:
    """The loss of preference pairs as a function of nll (B, T), which also leaves its `sums` (see `DPO.names`).

    With pi the log-probability of an answer minus that under the reference, it is for a pair

        -log sigmoid(beta * (pi(chosen) - pi(rejected)))            equation 7 of Rafailov et al.

    or with label smoothing s (Mitchell 2023, conservative DPO), (1 - s) of that and s of the same with the sides
    exchanged. sigmoid_norm: pi per token of the answer (Lambert et al. 2024, arXiv 2411.15124, section 5.1.2). length:
    a longer chosen answer starts with a margin and has less to teach, a shorter one more (R-DPO, Park et al. 2024,
    arXiv 2403.19159): what is left does not reward length as such.
    compared: (B, T) int64, of which answer a target is, as `chat.PairBatch.sequence`. reference: (n, 2). share: (n,),
    what the pairs weigh in the result. chosen: (B, T), what targets weigh in the `sft` term.
    """

    def __init__(self, dpo, compared, reference, share, chosen=None):
        self.dpo, self.compared = dpo, compared
        self.reference, self.share = (torch.from_numpy(np.ascontiguousarray(x)) for x in (reference, share))
        self.chosen = None if chosen is None else torch.from_numpy(chosen).float()
        self.text = self.sums = None

    def beside(self, weights):
        """The same with rows of text behind, whose tokens weigh `weights` (rows, T) in the loss."""
        self.text = weights
        return self

    def __call__(self, nll):
        n, device = len(self.reference), nll.device
        nll, text = nll[: len(self.compared)], nll[len(self.compared) :]
        compared = self.compared.to(device, non_blocking=True).flatten() + 1
        zeros = nll.new_zeros(2 * n + 1)  # the first is of all tokens outside of answers
        logps = zeros.index_add(0, compared, -nll.flatten())[1:].view(n, 2)
        lengths = zeros.index_add(0, compared, torch.ones_like(nll).flatten())[1:].view(n, 2)
        value, self.sums = self.of_logps(logps, lengths)
        if self.dpo.sft:
            value = value + self.dpo.sft * (self.chosen.to(device, non_blocking=True) * nll).sum()
        if self.text is not None:
            value = value + (self.text.to(device, non_blocking=True) * text).sum()
        return value

    def of_logps(self, logps, lengths):
        """The loss of answers' log-probabilities and lengths (n, 2), without the `sft` term, and the sums."""
        dpo, reference = self.dpo, self.reference.to(logps.device, non_blocking=True)
        rewards = dpo.beta * (logps - reference)  # of the sum whichever the loss, as TRL logs them
        margins = rewards[:, 0] - rewards[:, 1]
        compared = rewards / lengths.clamp(min=1) if dpo.loss == "sigmoid_norm" else rewards
        shifted = compared[:, 0] - compared[:, 1] + dpo.length * (lengths[:, 0] - lengths[:, 1])
        losses = -(1 - dpo.label_smoothing) * F.logsigmoid(shifted) - dpo.label_smoothing * F.logsigmoid(-shifted)
        with torch.no_grad():
            right = (margins > 0) + 0.5 * (margins == 0)  # a policy that is still the reference decides nothing
            sums = [losses, rewards[:, 0], rewards[:, 1], margins, right, logps[:, 0], logps[:, 1]]
            sums = torch.stack([torch.ones_like(margins), *sums]).sum(1)
        return (self.share.to(losses) * losses).sum(), sums


# ---------------------------------------------------------------------------------------------------------------------
# held-out data


def at_depths(model, domains, cfg, memory):
    """{"macro", "domains"} of {name: [(tokens, targets, mask of those that count), ...]} at the model's own depth, and
    "forced", the macro at each of eval.depths; and all `Scores` at its own depth."""
    flat, result, own = [row for rows in domains.values() for row in rows], {}, None
    for depth in [None, *cfg.eval.depths]:
        label = "validation" if depth is None else f"validation at depth {depth}"
        pairs = [row[:2] for row in flat]
        scores = evaluate.score_pairs(model, pairs, memory, cfg.train.segment, cfg.eval.rows, depth, label)
        counted = iter([score.where(mask) for score, (*_, mask) in zip(scores, flat)])
        parts = {name: evaluate.summarize([next(counted) for _ in rows]) for name, rows in domains.items()}
        summary = {"macro": evaluate.macro(parts), "domains": parts}
        if depth is None:
            result, own = summary, scores
        else:
            result.setdefault("forced", {})[str(depth)] = summary["macro"]
    return result, own


def pairs_of_prompt(chats, split):
    """Of every pair how many have its prompt, (n,) float64."""
    rows = chats.split(split)
    marked = (rows.row(i) for i in range(0, len(rows.index), 2))
    prompts = [bytes(ids[: np.argmax(mask)]) for ids, mask in marked]
    counts = Counter(prompts)
    return np.array([counts[prompt] for prompt in prompts], float)
