"""The adaptive-recurrent transformer: one shared block, applied up to N times per token.

    e = norm(embedding(tokens)), through P prelude blocks          h_0 = e
    for n in 1..N:
        u   = a_n * norm(h_{n-1}) + b_n * e                        the state is renormalised, the input re-injected
        h_n = blocks(u; gains of step n; memory of step n)         R blocks, the same weights at every step
        p_n = sigmoid(halting_head(norm(h_n)))                     ACT: halt once p_1 + ... + p_n >= 1 - eps
        out += w_n * h_n                                           w_n = p_n, or the remainder at the halting step
    with `finish`, all n above are below N, and step N is for all tokens: out = blocks(a_N * norm(out) + b_N * e)
    logits = norm(coda(out)) @ embedding.T                         C coda blocks, tied head

A token that has halted is frozen: at later steps the others see the keys and values of its last active step. So the
same logits come out of dense training, of scoring only the active tokens, and of decoding one token at a time.

Transformer-XL memory and decoding cache are one thing, memory.py's `Memory`: keys and values of the tokens before this
segment, without gradient. Attention never crosses a document boundary.

Shapes: B batch, T segment length, M memory length, N maximum depth, D width, H heads, d = D / H, V vocabulary.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import attention
import data
import fp8
import kernels
from halting import ActState, Packed
from memory import Memory, Spans, read_later

ALL, LAST = ..., (slice(None), slice(-1, None))  # indices into (B, T): tokens whose logits are wanted


@dataclass
class ModelConfig:
    width: int = 1280  # D
    heads: int = 20  # H
    hidden: int = 10240  # SwiGLU
    prelude: int = 0  # P own blocks before the recurrence
    recur: int = 1  # R blocks inside it
    coda: int = 0  # C own blocks after it
    max_depth: int = 8  # N, how often the R blocks are applied
    share: bool = True  # false: N x R own blocks, a stacked transformer
    finish: bool = False  # step N is taken by all tokens, behind the steps that they have chosen: it reads those states
    # Who decides on the depth of a token: nobody (fixed); a head that is trained with the model (act); or, with the
    # newest state as output, a head that is fitted along with training (exit, see halting.ExitFit), once its value is
    # below `tolerance`; or the state itself (stability), once a step changes it, normalised, by less than that (RMS).
    halting: Literal["fixed", "act", "exit", "stability"] = "act"
    halting_eps: float = 0.01  # act: a token halts when its halting probabilities sum to 1 - eps
    halting_bias: float = -3.0  # act: sigmoid(-3) = 0.05: start deep, learn to stop
    # What the head of exit says, in nats: what the next step is expected to win; or the loss that is expected of the
    # token, above a bar that a fixed share of all tokens passes (so the tolerance of training is 0).
    exit_by: Literal["gain", "loss"] = "gain"
    tolerance: float = 0.1  # exit, in nats; stability, RMS
    min_depth: int = 1  # exit, stability: no token halts before
    # What enters a step: the state (none); it, normalised, plus the input (gain); a linear layer of both; or a weighted
    # sum of `lanes` states, which begin as the input, and to all of which a step adds (hyper-connections).
    injection: Literal["none", "gain", "concat_linear", "hyper"] = "gain"
    lanes: int = 2  # hyper: L
    step_gains: bool = True  # own gains on the branches at every step, 4 x D per block and step
    sandwich: bool = False  # a norm behind each branch, too, with a gain: before it is added (arXiv 2502.05171)
    memory: Literal["per_step", "last_step"] = "per_step"  # last_step: one K/V slot for all steps, N times smaller
    cross_documents: bool = False  # true: attention and memory run across document boundaries
    rope_base: float = 10000.0
    vocab_size: int = data.VOCAB_SIZE
    document_start: int = data.EOT  # the token that opens every document

    def __post_init__(self):
        for name in ("width", "heads", "hidden", "max_depth", "lanes", "vocab_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"'{name}' must be at least 1, not {getattr(self, name)}")
        if min(self.prelude, self.coda) < 0 or self.recur < 1:
            raise ValueError("'prelude' and 'coda' must be at least 0 and 'recur' at least 1")
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise ValueError(f"'width' {self.width} must be 'heads' ({self.heads}) times an even number (rotary pairs)")
        if self.rope_base <= 0:
            raise ValueError(f"'rope_base' must be above 0, not {self.rope_base}")
        if not 0 < self.halting_eps < 1:
            raise ValueError(f"'halting_eps' must lie between 0 and 1, not {self.halting_eps}")
        if not 1 <= self.min_depth <= self.max_depth or self.min_depth > 1 and self.halting == "act":
            raise ValueError(f"'min_depth' {self.min_depth} must lie in 1..'max_depth', and be 1 with 'halting = act'")
        if self.exit_by == "loss" and not (self.halting == "exit" and self.first_exit + 1 < len(self.depths)):
            raise ValueError("'exit_by = loss' needs 'halting = exit' and depths to choose from, from 'min_depth' on")
        if self.halting == "exit" and self.exit_by == "gain" and (self.coda or self.finish):
            raise ValueError(
                "'halting = exit' with a 'coda' or 'finish' needs 'exit_by = loss': what a step wins is read from its "
                "state, which these have not seen"
            )
        if self.finish and (self.max_depth < 2 or self.injection == "hyper"):
            raise ValueError("'finish' needs a 'max_depth' of at least 2, and no 'injection = hyper'")
        if self.tolerance < 0 and self.halting != "exit":
            raise ValueError(f"'tolerance' must not be negative, as {self.tolerance} is")
        if not self.share and self.memory == "last_step":
            raise ValueError(
                "'memory = last_step' needs 'share = true': it has one slot for all steps' keys and values"
            )
        if not 0 <= self.document_start < self.vocab_size:
            raise ValueError(f"'document_start' {self.document_start} is not in the vocabulary of {self.vocab_size}")

    @property
    def depths(self):
        """Numbers of steps that a token can take."""
        return range(1 + self.finish, self.max_depth + 1)

    @property
    def first_exit(self):
        """How many steps are before the first one behind which a token may halt."""
        return max(self.min_depth - self.depths[0], 0)

    @property
    def padded_vocab_size(self):
        """Rows of the embedding: a multiple of 128 keeps the head GEMM on the fast path. The extra rows are masked."""
        return -(-self.vocab_size // 128) * 128


@dataclass
class Output:
    """Of one segment. logits: (B, T, padded V), or of the tokens to `keep`; None where `targets` were given; then loss:
    the weighted sum of nll (or a function of it), to differentiate, and nll: (B, T) float32 nats, to report; depth:
    (B, T) int64 steps used, Graves' N(t); ponder: (B, T) float32, N(t) + R(t) of ACT; weights: (steps run, B, T) of the
    states in the output, or None where that is simply the last state; context: mean number of visible keys; memory: for
    the next segment, or None."""

    logits: torch.Tensor | None
    loss: torch.Tensor | None
    nll: torch.Tensor | None
    depth: torch.Tensor
    ponder: torch.Tensor
    weights: torch.Tensor | None
    context: float
    memory: Memory | None


def norm(x):
    return F.rms_norm(x, (x.shape[-1],))


def behind(y, gain):
    """A branch's output y (..., D) through the norm behind it, of `gain` (D,); None: there is none."""
    return y if gain is None else norm(y) * gain.to(y.dtype)


def Linear(fan_in, fan_out):
    """A linear layer without bias: a float32 master weight. It is `fp8.Weight` that GEMMs multiply with."""
    return nn.Linear(fan_in, fan_out, bias=False)


class Block(nn.Module):
    """A pre-norm, or sandwich-norm, transformer block: causal attention with QK-norm and rotary positions (`attend`),
    then SwiGLU (`finish`)."""

    def __init__(self, config):
        super().__init__()
        D, F = config.width, config.hidden
        self.heads = config.heads
        self.query, self.key, self.value, self.output = (Linear(D, D) for _ in range(4))
        self.gate, self.up, self.down = Linear(D, F), Linear(D, F), Linear(F, D)
        gain = lambda: nn.Parameter(torch.empty(D)) if config.sandwich else None  # noqa: E731
        self.output_gain, self.down_gain = gain(), gain()
        # Layers with the same input are one GEMM.
        self.w_qkv = fp8.Weight(self.query.weight, self.key.weight, self.value.weight)
        self.w_output = fp8.Weight(self.output.weight)
        self.w_gate_up = fp8.Weight(self.gate.weight, self.up.weight)
        self.w_down = fp8.Weight(self.down.weight)

    def prepare(self, *how):
        for weight in (self.w_qkv, self.w_output, self.w_gate_up, self.w_down):
            weight.prepare(*how)

    def attend(self, x, gains, rope, spans, past, gemms=(), frozen=None, active=None, packed=None):
        """What the tokens of x (B, T, D) find, (B, T, H, d), and their (keys, values). gains: (4, D), or 1s. past: the
        memory's (keys, values), or None. gemms: (which are in FP8, scales of this use of the block). frozen: this
        segment's (keys, values) at the step before, kept where `active` (B, T) is false. packed: `Packed` tokens, the
        only ones that are projected; there is a query for every token, as the kernels of attention want segments."""
        if packed is None:
            q, k, v = self.project(x, gains, rope, gemms, frozen, active)
        else:
            position = packed.index % x.shape[1]
            found = self.project(packed.take(x), gains, [y[position] for y in rope], gemms)
            q, k, v = (packed.put(new, old) for new, old in zip(found, (None, *frozen)))
        return spans.attend(q, k, v, past), (k, v)

    def project(self, x, gains, rope, gemms=(), frozen=None, active=None):
        """Queries, keys and values (..., T, H, d) of x (..., T, D), see `kernels.heads`."""
        qkv = fp8.linear(norm(x) * gains[0], self.w_qkv, *gemms, site=0)
        return kernels.heads(qkv.unflatten(-1, (3, self.heads, -1)), rope, frozen, active)

    def finish(self, x, attended, gains, gemms=(), recompute=False, packed=None):
        """x (..., D) after the two branches; attended: (..., H, d). recompute: gate and up of the SwiGLU, in the
        backward pass. packed: `Packed` tokens, the only ones that are computed; the others become zero."""
        if packed:
            x, attended = packed.take(x), packed.take(attended)
        x = x + gains[1] * behind(fp8.linear(attended.flatten(-2), self.w_output, *gemms, site=1), self.output_gain)
        mlp = partial(checkpoint, fp8.mlp, use_reentrant=False) if recompute else fp8.mlp
        y = mlp(norm(x) * gains[2], self.w_gate_up, self.w_down, *gemms)
        x = x + gains[3] * behind(y, self.down_gain)
        return packed.put(x) if packed else x


def unit(gains, dtype):
    """gains (4, D) in `dtype`, or 1s where there are none."""
    return (1, 1, 1, 1) if gains is None else gains.to(dtype)


class RecurrentTransformer(nn.Module):
    """The model of this file's docstring. Parameters are float32; `compute_dtype` is the dtype of the activations."""

    def __init__(self, config, compute_dtype=torch.float32):
        super().__init__()
        self.config, self.compute_dtype = config, compute_dtype
        D, N, R = config.width, config.max_depth, config.recur
        self.embedding = nn.Embedding(config.padded_vocab_size, D)
        padding = torch.arange(config.padded_vocab_size) >= config.vocab_size  # masked in the epilogue of the head GEMM
        self.register_buffer("padding", torch.where(padding, -math.inf, 0.0), persistent=False)
        self.prelude = nn.ModuleList(Block(config) for _ in range(config.prelude))
        self.recur = nn.ModuleList(Block(config) for _ in range(R if config.share else N * R))
        self.coda = nn.ModuleList(Block(config) for _ in range(config.coda))
        self.gains = nn.Parameter(torch.empty(N, R, 4, D)) if config.step_gains else None
        self.inject, self.lanes = None, config.lanes if config.injection == "hyper" else 1
        if config.injection == "gain":
            self.inject = nn.Parameter(torch.empty(N, 2))  # a_n, b_n
        elif config.injection == "concat_linear":
            self.inject = Linear(2 * D, D)
        elif config.injection == "hyper":
            self.inject = nn.Parameter(torch.empty(N, self.lanes + 2, self.lanes))  # alpha_n, beta_n, M_n
        self.w_inject = fp8.Weight(self.inject.weight) if config.injection == "concat_linear" else None
        self.w_head = fp8.Weight(self.embedding.weight)
        self.gemms, self.scales = fp8.BF16, None  # of training; without gradients every GEMM is in compute_dtype
        self.weight_format = None  # of `packed.FORMATS`: what a CPU multiplies with, without gradient
        self.compiled, self.recompute = False, "none"
        # Halted tokens are left out: in training, of what comes after the attention, and by a compiled model, where the
        # rest fits one of these shares of all tokens, few, as each is a graph, and set before `compile`;
        self.capacities = ()
        self.packing = 64  # else, without gradient, by multiples of this; 0: without gradient, never
        self.halting = None
        if config.halting == "act":
            self.halting = nn.Linear(D, 1)
        elif config.halting == "exit":
            self.halting = nn.Linear(D, len(config.depths)).requires_grad_(False)  # a row a step; see halting.ExitFit
        # on the device, as training changes it: a number would be a graph of its own
        self.register_buffer("tolerance", torch.tensor(config.tolerance, dtype=torch.float32), persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """embedding            normal, std 5/D: the tied head gives a token its own logit 5; GPT-2's 0.02 would give 26
        query key value gate up normal, std 1/sqrt(fan in)
        output down             zero: every block starts as the identity; sandwich: as those above, as the norm of a
                                small vector has a large gradient, and the gain behind it is small instead: such that
                                all branches of a pass, independent of each other, would add up to a vector of RMS 1
        gains                   1
        a_n, b_n                1, and b_1 = 0 since h_0 is e itself; concat_linear starts as u = e
        alpha_n, beta_n, M_n    one lane, in turn; 1; the identity: u_n is e plus the outputs, normalised, before it
        halting                 weight 0, bias from the config (exit: 1 nat): at first all tokens take as many steps
        """
        nn.init.normal_(self.embedding.weight, std=5 / self.config.width)
        for block in [*self.prelude, *self.recur, *self.coda]:
            for name, layer in block.named_children():
                zero = name in ("output", "down") and not self.config.sandwich
                nn.init.normal_(layer.weight, std=0.0 if zero else layer.in_features**-0.5)
            if self.config.sandwich:
                for gain in (block.output_gain, block.down_gain):
                    gain.fill_((2 * self.uses) ** -0.5)
        if self.gains is not None:
            self.gains.fill_(1)
        if self.config.injection == "gain":
            self.inject.fill_(1)[0, 1] = 0
        elif self.config.injection == "concat_linear":
            self.inject.weight.copy_(torch.eye(self.config.width, 2 * self.config.width))
        elif self.config.injection == "hyper":
            one, N = torch.eye(self.lanes), self.config.max_depth
            self.inject.fill_(1)[:, 0], self.inject[:, 2:] = one.repeat(N, 1)[:N], one
        if self.halting is not None:
            nn.init.zeros_(self.halting.weight)
            nn.init.constant_(self.halting.bias, self.config.halting_bias if self.config.halting == "act" else 1.0)

    def compile(self):
        """Compile one recurrence step and the loss, not the loop: one graph serves every step and depth. With
        `capacities`, they are one up to the attention of the first block (without gradient, one a capacity), and one a
        capacity for the rest."""
        # a graph for each memory length, batch, training and evaluation, and of these one for each capacity
        torch._dynamo.config.recompile_limit = 64 * (1 + len(self.capacities))
        torch._dynamo.config.accumulated_recompile_limit = 256 * (1 + len(self.capacities))
        torch._dynamo.config.optimize_ddp = False  # it would cut these small graphs at the buckets of DDP
        for name in ("begin", "complete") if self.capacities else ("step",):
            setattr(self, name, torch.compile(getattr(self, name), dynamic=False))
        self.run_block = torch.compile(self.run_block, dynamic=False)
        self.compiled = True

    @property
    def uses(self):
        """How often a block is applied at full depth."""
        return self.config.prelude + self.config.max_depth * self.config.recur + self.config.coda

    def use_fp8(self, gemms=fp8.FP8):
        """Train with FP8 GEMMs, those of `gemms`."""
        self.gemms, self.scales = gemms, fp8.Scales(self.uses, self.embedding.weight.device, gemms.gradients)

    def forward(
        self, tokens, targets=None, memory=None, depth=None, weights=None, spans=None, states=None, keep=ALL
    ):  # fmt: skip
        """tokens, targets: (B, T) int64. memory: a `Memory` to read and go on from. depth: None for the model's own
        rule; or k to make every token take exactly k steps (no token halts before), or one k for each, (B, T) int64 on
        the host, 0 for those that go by the rule. weights: (B, T) float32 of the tokens in the loss; None: their mean;
        or a function that makes the loss, a scalar, of nll (B, T). spans: what `spans(tokens, memory)` returned, where
        it was worked out ahead. states: a list to append every step's state to; then no token is left out, and none of
        the steps. keep: an index into (B, T), of the tokens whose logits are wanted where there are no targets: LAST,
        any slices, or a mask on the host, for which logits are (kept, V). Returns `Output`.

        Hand over tokens on the host: where documents start is worked out there, and the transfer overlaps.
        Raises ValueError for a depth that is none of `ModelConfig.depths`.
        """
        R, depths = self.config.recur, self.config.depths
        own = isinstance(depth, torch.Tensor)  # a depth for each token
        ruled = own and bool((depth == 0).any())
        for k in torch.where(depth == 0, depths[0], depth).aminmax() if own else [depth]:
            if k is not None and k not in depths:
                raise ValueError(f"depth must lie in {depths[0]}..{depths[-1]}, not {int(k)}")
        deepest = depths[-1] if depth is None or ruled else int(depth.max()) if own else depth
        steps = deepest - self.config.finish  # of the loop
        adaptive = self.config.halting != "fixed" and depth is None
        device = self.embedding.weight.device
        training = torch.is_grad_enabled() and targets is not None
        recompute = training and self.recompute == "step"
        gemms = self._prepare(training)
        spans = spans or self.spans(tokens, memory)
        if memory:
            memory.settle()
        tokens = tokens.to(device, non_blocking=True)
        h = norm(self.embedding(tokens).to(self.compute_dtype))
        rope = self._rope(tokens.shape[1], memory)
        written = []  # this segment's keys and values, one pair a memory slot

        for block in self.prelude:
            use = len(written)
            h, kv = self.run_block(block, h, rope, spans, self._past(memory, use), gemms[use])
            written.append(kv)

        state = kvs = None
        e, h = h, h.repeat(1, 1, self.lanes)  # not one tensor under two names, which would be a graph of its own
        # no token has halted, and the host knows it: then there is nothing to freeze
        awake = not (torch.is_grad_enabled() or self.compiled or own or states is not None)
        if adaptive or own or self.config.halting == "act":
            state = ActState.start(tokens, e)
            shape = (*e.shape[:-1], self.config.heads, -1)
            none = partial(torch.zeros_like, e, requires_grad=e.requires_grad)  # as later keys and values will
            kvs = [tuple(none().view(shape) for _ in "kv") for _ in range(R)]
        shares = []  # w_n
        rows = number = None  # how many tokens a step computes, None: all; a function that says how many are active
        packs = (adaptive or own) and (len(self.capacities) > 0 if training else not torch.is_grad_enabled())
        packs = packs and states is None
        # the running sum of p at which a token halts: never before the last step if the depth is forced, always there
        thresholds = torch.full((steps,), 1 - self.config.halting_eps if adaptive or ruled else math.inf, device=device)
        thresholds[-1:].fill_(-math.inf)  # a number assigned would wait for the device
        if own:
            drawn = depth.to(device, non_blocking=True)
            step = torch.arange(depths[0], deepest + 1, device=device)[:, None, None]
            by_rule = thresholds[:, None, None] if ruled else math.inf
            thresholds = torch.where(drawn == step, -math.inf, torch.where(drawn == 0, by_rule, math.inf))
        gains = [[None] * R] * depths[-1] if self.gains is None else [g.unbind() for g in self.gains.unbind()]
        inject = self.inject.unbind() if isinstance(self.inject, nn.Parameter) else [None] * depths[-1]

        def run(n, h, *which):
            """`step`, the n-th from 0."""
            blocks = self.recur if self.config.share else self.recur[n * R : (n + 1) * R]
            pasts = [self._past(memory, len(self.prelude) + self._slot(n, r)) for r in range(R)]
            use = len(self.prelude) + n * R
            step = partial(checkpoint, self.step, use_reentrant=False) if recompute else self.step
            return step(blocks, gains[n], inject[n], h, e, rope, spans, pasts, gemms[use : use + R], *which)

        for n in range(steps):
            if number and self._asks_first(training):
                if not (count := number()):
                    break
                awake = awake and count == tokens.numel()
                rows, number = self._capacity(count, tokens.numel()), None
            frozen = None if awake and number is None else kvs
            if (found := run(n, h, frozen, state, thresholds[n], rows, number)) is None:  # all tokens had halted
                break
            h, kvs, state, weight, rows = found
            shares.append(weight)
            if states is not None:
                states.append(h)
            if self.config.memory == "per_step":
                written.extend(kvs)
            if packs and n + 1 < steps:  # own depths are known here, on the host
                number = read_later((depth > depths[n] if own and not ruled else state.active).sum())
        # per_step: the steps that were not run hold what a later reader of this memory must see, the frozen K/V;
        # last_step: that is all there is
        written.extend(kvs * (len(depths) - len(shares) if self.config.memory == "per_step" else 1))
        out = self.read(h) if state is None else state.out.to(h.dtype)

        if self.config.finish:
            out, kvs, *_ = run(depths[-1] - 1, out, None, None, None)
            if self.config.memory == "last_step":
                del written[-R:]  # this is the last step
            written.extend(kvs)

        for i, block in enumerate(self.coda):
            past = self._past(memory, len(written))
            out, kv = self.run_block(block, out, rope, spans, past, gemms[i - len(self.coda)])
            written.append(kv)

        logits = loss = nll = None
        if targets is None:
            logits = fp8.matmul(norm(out[keep]), self.w_head.low, bias=self.padding.to(out.dtype))
        else:
            if weights is None:
                weights = torch.full(tokens.shape, 1 / tokens.numel(), device=device)
            elif not callable(weights):
                weights = weights.to(device, non_blocking=True)
            loss, nll = self.loss(out, targets.to(device, non_blocking=True), weights)
        taken = torch.full_like(tokens, deepest) if state is None else state.depth + self.config.finish
        ponder = taken.float() if state is None else taken + state.remainder_at_halt
        stacked = None if state is None else torch.stack(shares)
        memory = memory.after(written, spans.live) if memory else None
        return Output(logits, loss, nll, taken, ponder, stacked, spans.context, memory)

    def spans(self, tokens, memory=None, one_by_one=False):
        """Which keys the tokens (B, T) will see, see `Spans`. Host work that can be done while the device is busy."""
        device, d = self.embedding.weight.device, self.config.width // self.config.heads
        kernel = self.compute_dtype != torch.float32 and attention.available(device, d)
        return Spans(tokens.cpu(), memory, self.config, device, kernel, one_by_one)

    def _prepare(self, training):
        """Bring the low-precision copies of the weights up to date. Returns for every use of a block which GEMMs are in
        FP8, and their scales."""
        in_fp8 = training and self.scales is not None
        gemms, form = self.gemms if in_fp8 else fp8.BF16, None if torch.is_grad_enabled() else self.weight_format
        for block in [*self.prelude, *self.recur, *self.coda]:
            block.prepare(self.compute_dtype, gemms, form)
        self.w_head.prepare(self.compute_dtype, gemms, form)
        if self.w_inject is not None:
            self.w_inject.prepare(self.compute_dtype, fp8.BF16, form)
        return list(zip([gemms] * self.uses, self.scales.of_uses() if in_fp8 else [None] * self.uses))

    def run_block(self, block, x, rope, spans, past, gemms):
        """One block of prelude or coda, x (B, T, D): its output and (keys, values)."""
        gains = unit(None, x.dtype)
        attended, kv = block.attend(x, gains, rope, spans, past, gemms)
        return block.finish(x, attended, gains, gemms, self.recompute == "mlp" and torch.is_grad_enabled()), kv

    def step(
        self, blocks, gains, inject, h, e, rope, spans, pasts, gemms, frozen, state, threshold, rows=None, number=None
    ):  # fmt: skip
        """One recurrence: injection, the R blocks, halting. The part that `compile` turns into one graph, or into two.

        rows: how many tokens are computed, all active ones among them; None: all. number: None, or a function that
        waits for the device and says how many are active. It is asked when the device has the attention of this step to
        do, and so is never idle; the first half then goes by `rows`, the number of an earlier step, and so by no less.
        Returns the new state h (B, T, D), the R blocks' (keys, values), the `ActState`, this step's output weights, and
        how many tokens were computed; or, without gradient, None where all had halted.
        """
        # with gradient the first half is of all tokens
        early = None if torch.is_grad_enabled() else rows
        begun = self.begin(blocks, gains, inject, h, e, rope, spans, pasts, gemms, frozen, state, early)
        if number is not None:
            count = number()
            if not (count or torch.is_grad_enabled()):
                return None
            rows = self._capacity(count, state.active.numel())
        begun = gains, inject, h, *begun
        return *self.complete(blocks, *begun, rope, spans, pasts, gemms, frozen, state, threshold, rows), rows

    def begin(self, blocks, gains, inject, h, e, rope, spans, pasts, gemms, frozen, state, rows=None):
        """The input of the blocks, what the first one's attention finds, and its (keys, values)."""
        packed = None if rows is None else Packed.of(state.active, rows)
        if packed:
            x = packed.put(self.injected(packed.take(h), packed.take(e), inject))
        else:
            x = self.injected(h, e, inject)
        return x, *self._attend(0, x, blocks, gains, rope, spans, pasts, gemms, frozen, state, packed)

    def complete(
        self, blocks, gains, inject, before, x, attended, kv, rope, spans, pasts, gemms, frozen, state, threshold, rows
    ):  # fmt: skip
        """The rest of a step, after `begin`. before: the state that it began with. rows: as in `step`."""
        packed = None if rows is None else Packed.of(state.active, rows)
        kvs, recompute = [kv], self.recompute == "mlp" and torch.is_grad_enabled()
        for r, block in enumerate(blocks):
            if r:
                early = None if torch.is_grad_enabled() else packed
                attended, kv = self._attend(r, x, blocks, gains, rope, spans, pasts, gemms, frozen, state, early)
                kvs.append(kv)
            x = block.finish(x, attended, unit(gains[r], x.dtype), gemms[r], recompute, packed)
        x = self.connected(before, x, inject)
        if state is None:
            return x, kvs, None, None
        weighted = self.config.halting == "act"
        p = self.halting_probability(x, before, state.depth)
        state, weight = state.advance(self.read(x), p, threshold, weighted)
        return x, kvs, state, weight

    def _attend(self, r, x, blocks, gains, rope, spans, pasts, gemms, frozen, state, packed):
        """Of the r-th block of a step."""
        old, active = (frozen[r], state.active) if state and frozen else (None, None)
        return blocks[r].attend(x, unit(gains[r], x.dtype), rope, spans, pasts[r], gemms[r], old, active, packed)

    def _asks_first(self, training):
        """Whether the host learns the number of active tokens before a step begins, not behind its attention: where
        the device is the host, and where a step is one graph."""
        if training:
            return False
        return not self.capacities if self.compiled else self.embedding.weight.device.type == "cpu"

    def _capacity(self, number, tokens):
        """How many of all `tokens` are computed where `number` of them are active; None: all. The smallest of
        `capacities` that holds them, in multiples of 16 for FP8; or, where a size more is no graph more, a multiple of
        `packing`: few shapes, and such as GEMMs like, unless that saves less than an eighth."""
        if not (self.packing or torch.is_grad_enabled()):
            return None
        if self.compiled or torch.is_grad_enabled():
            sizes = (16 * math.ceil(share * tokens / 16) for share in sorted(self.capacities))
            return next((rows for rows in sizes if number <= rows < tokens), None)
        rows = -(-number // self.packing) * self.packing
        return rows if 8 * rows <= 7 * tokens else None

    def injected(self, h, e, inject):
        """The input of the blocks (..., D), from states h (..., D), or lanes (..., L D), and inputs e (..., D)."""
        if self.config.injection == "gain":
            a, b = inject.to(h.dtype)
            return a * norm(h) + b * e
        if self.config.injection == "concat_linear":
            return fp8.linear(torch.cat([e, h], -1), self.w_inject)
        if self.config.injection == "hyper":
            return (inject[0, :, None].to(h.dtype) * h.unflatten(-1, (self.lanes, -1))).sum(-2)
        return h

    def connected(self, before, x, inject):
        """The state after a step, from that before it and the output x (..., D) of its blocks: x itself, or, with
        hyper-connections (Zhu et al. 2024, arXiv 2409.19606), lanes M_n before + beta_n norm(x), (..., L D): static and
        one for all of a step's blocks, as measured for looped models in arXiv 2604.21106."""
        if self.config.injection != "hyper":
            return x
        beta, mix, lanes = inject[1].to(x.dtype), inject[2:].to(x.dtype), before.unflatten(-1, (self.lanes, 1, -1))
        # a product of a tiny matrix for every token, as a sum that fuses with the norm
        mixed = (mix.t()[..., None] * lanes).sum(-3)
        return (mixed + beta[:, None] * norm(x)[..., None, :]).flatten(-2)

    def read(self, h):
        """The state (..., D) that stands for `lanes` of them, (..., L D): their sum."""
        return h if self.lanes == 1 else h.unflatten(-1, (self.lanes, -1)).sum(-2)

    def halting_probability(self, h, before, step):
        """p_n of states h (B, T, D), of those of the step before, and of n - 1 (B, T), the steps before, as (B, T)
        float32; 0 or 1 but for ACT."""
        if self.config.halting == "fixed":
            return torch.zeros_like(h[..., 0], dtype=torch.float32)
        late = step >= self.config.first_exit
        if self.config.halting == "exit":
            return (late & (self.halting_value(h, step) < self.tolerance)).float()
        if self.config.halting == "stability":
            change = (norm(h.float()) - norm(before.float())).square().mean(-1).sqrt()
            return (late & (change < self.tolerance)).float()
        return torch.sigmoid(self.halting_value(h, step))

    def halting_value(self, h, step):
        """What the halting head makes of states h, (B, T, D) or lanes, as (B, T) float32. step: how many steps were
        before them, a number or (B, T)."""
        weight, bias = self.halting.weight, self.halting.bias
        if self.config.halting == "exit":
            weight, bias = weight[step], bias[step]
        return (self.features(h) * weight).sum(-1) + bias  # this sum fuses with the norm

    def features(self, h):
        """What the halting head reads of states h (..., D), or lanes: (..., D) float32."""
        return norm(self.read(h).float())

    def set_tolerance(self, tolerance):
        """Halt by another `ModelConfig.tolerance`. Raises ValueError for one that it refuses."""
        self.config = replace(self.config, tolerance=tolerance)
        self.tolerance.fill_(tolerance)

    def loss(self, out, targets, weights):
        """The sum of weights * nll, or what the function `weights` makes of nll; and nll (B, T) float32 in nats, which
        has no gradient. out: the states (B, T, D)."""
        gemms = self.gemms if torch.is_grad_enabled() and self.scales is not None else fp8.BF16
        states, targets, shape = norm(out).flatten(0, 1), targets.flatten(), out.shape[:2]

        def head(weights):
            return fp8.cross_entropy(
                states, self.w_head, self.padding, targets, weights.flatten(), gemms, compiled=self.compiled
            )

        if not callable(weights):
            loss, nll = head(weights)
            return loss, nll.view(shape)
        # The head makes its gradient beside the logits, so it must know the weights before: the derivative by nll.
        with torch.no_grad():
            _, nll = head(torch.zeros(shape, device=out.device))
        with torch.enable_grad():
            nll = nll.view(shape).requires_grad_()
            value = weights(nll)
            (derivative,) = torch.autograd.grad(value, nll)
        value, nll = value.detach(), nll.detach()
        if not torch.is_grad_enabled():
            return value, nll
        loss, _ = head(derivative)
        return loss + (value - loss.detach()), nll

    # ---------------------------------------------------------------------------------------------- memory

    def _slot(self, n, r):
        """The memory slot of recurrent block r at step n, counted from the first after the prelude's."""
        return n * self.config.recur + r if self.config.memory == "per_step" else r

    def _past(self, memory, slot):
        return memory.past(slot) if memory else None

    def new_memory(self, batch, length):
        """An empty memory of `length` tokens for `batch` rows; its size is `slots * 2 * batch * length * D` numbers."""
        c = self.config
        slots = c.prelude + c.coda + c.recur * (c.max_depth if c.memory == "per_step" else 1)
        shape = (batch, length, c.heads, c.width // c.heads)
        return Memory.empty(slots, shape, self.compute_dtype, self.embedding.weight.device)

    def _rope(self, length, memory):
        """cos and sin (T, 1, d/2) at the absolute positions of this segment. Angles are taken in float64: a stream runs
        for billions of tokens, and only differences of positions may matter."""
        device, d = self.embedding.weight.device, self.config.width // self.config.heads
        position = torch.arange(length, device=device, dtype=torch.float64) + (memory.position if memory else 0)
        frequency = self.config.rope_base ** (-torch.arange(0, d, 2, device=device, dtype=torch.float64) / d)
        angle = position[:, None, None] * frequency
        return angle.cos().float(), angle.sin().float()

    # ---------------------------------------------------------------------------------------------- accounting

    def parameter_counts(self):
        """Parameters by part: embedding (rows in use, without the padding), block(s), rest, total."""
        embedding = self.config.vocab_size * self.config.width
        blocks = sum(p.numel() for part in (self.prelude, self.recur, self.coda) for p in part.parameters())
        rest = sum(p.numel() for p in self.parameters()) - blocks - self.embedding.weight.numel()
        return {"embedding": embedding, "blocks": blocks, "rest": rest, "total": embedding + blocks + rest}

    def flops_per_token(self, depth, context):
        """Forward FLOPs of one token that takes `depth` steps and sees `context` keys; training costs three times that.
        Counts the work of the weights as often as they are used, and a multiply-add as two."""
        c = self.config
        block = 2 * (4 * c.width**2 + 3 * c.width * c.hidden) + 4 * c.width * context
        inject = 4 * c.width**2 if c.injection == "concat_linear" else 0
        uses = c.prelude + c.coda + depth * c.recur
        return uses * block + depth * inject + 2 * c.padded_vocab_size * c.width
