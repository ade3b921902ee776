"""Continuous depth batching: decoding in which every row is at its own text, its own token and its own recurrence.

One shared block makes this natural. A *tick* applies the block once to all rows, whichever step each is at. A row whose
token halts draws its next token in the same tick and is at step 1 of that in the next one, beside others at step 5; a
row whose text ends takes the next prompt. Nobody waits for the slowest.

All state lies on the device in tensors that stay where they are (`State`), and a tick asks the host for nothing. So it
is one CUDA graph, launched many times ahead; the host looks at the results now and then.

    for continuation in Engine(model, rows=64, length=512).run(prompts, limits): ...

The keys and values of a step are written into the cache slots of this step and of all later ones: if the token halts
here, later readers of those slots find what they must see, its frozen keys and values (model.py), and if it does not
halt, the next step overwrites them.

Here is the definition of a tick in PyTorch; engine_kernels.py has it in Triton. Shapes: R rows, D width, H heads,
d = D / H, M tokens of cache, S slots, V vocabulary.
"""

import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import engine_tick
from decoding import Continuation, truncate
from kernels import heads, swiglu
from model import LAST, norm

AHEAD = 32  # ticks between two looks of the host: one CUDA graph


@dataclass
class State:
    """Of R rows, on the device. token: (R,) the one that is read now, at `position`; `first`: the oldest position that
    it sees. step: the index of its next one. h, e, out: (R, D) float32, see model.py; remainder: (R,).
    halted: (R,) whether it ended in this tick. left: tokens that the row may still write; 0: it is idle.
    written: how many it has written; tokens, depths: (R, L) those."""

    token: torch.Tensor
    position: torch.Tensor
    first: torch.Tensor
    step: torch.Tensor
    h: torch.Tensor
    e: torch.Tensor
    out: torch.Tensor
    remainder: torch.Tensor
    halted: torch.Tensor
    left: torch.Tensor
    written: torch.Tensor
    tokens: torch.Tensor
    depths: torch.Tensor

    @staticmethod
    def empty(rows, width, longest, device):
        number = lambda *shape: torch.zeros(rows, *shape, dtype=torch.int64, device=device)  # noqa: E731
        vector = lambda *shape: torch.zeros(rows, *shape, device=device)  # noqa: E731
        return State(
            number(), number(), number(), number(), vector(width), vector(width), vector(width), vector(), number(),
            number(), number(), number(longest), number(longest),
        )  # fmt: skip


def copied(state):
    return State(**{name: x.clone() for name, x in vars(state).items()})


class Weights:
    """The matrices of the block, (steps, m, k) or (1, m, k) where steps share them, and the head, (1, V, D), in
    `dtype`; in float8_e4m3fn with a scale for every row, (steps, m) float32, else None."""

    NAMES = ("qkv", "output", "gate_up", "down", "head")

    def __init__(self, model, dtype):
        model._prepare(False)
        blocks = list(model.recur)
        for name in self.NAMES:
            of = [model] if name == "head" else blocks
            low = torch.stack([getattr(part, f"w_{name}").low for part in of])
            setattr(self, name, quantized(low) if dtype == torch.float8_e4m3fn else (low, None))


def quantized(weight):
    """weight (..., m, k) in E4M3, and the scales (..., m) float32 of its rows."""
    scale = weight.float().abs().amax(-1).clamp(min=1e-12) / 448
    return (weight.float() / scale[..., None]).to(torch.float8_e4m3fn), scale


class Engine:
    """Rows that decode at once. length: tokens of cache a row. depth: None for the model's own rule, or the steps that
    every token takes. longest: the most tokens that a text may be continued by. weights: their dtype, None for that of
    the activations, or torch.float8_e4m3fn. temperature, top_k, top_p: see `decoding.sample_token`.

    Raises ValueError for a model or a depth that it is not made for.
    """

    def __init__(
        self, model, rows, length=512, depth=None, longest=256, weights=None, temperature=0.0, top_k=None, top_p=1.0,
        segment=512,
    ):  # fmt: skip
        reason = unfit(model, rows)
        if weights == torch.float8_e4m3fn and rows > 1:
            reason = "FP8 weights are for one row: several would have them rounded back at every tick"
        if reason is not None:
            raise ValueError(f"Engine: {reason}")
        c, device = model.config, model.embedding.weight.device
        if depth is not None and depth not in c.depths:
            raise ValueError(f"depth must lie in {c.depths[0]}..{c.depths[-1]}, not {depth}")
        self.model, self.rows, self.length, self.segment, self.depth = model, rows, length, segment, depth
        self.adaptive = depth is None and c.halting != "fixed"
        self.steps = (depth or c.max_depth) - c.finish  # at most, before that of `finish`
        self.end = c.max_depth if c.finish else self.steps  # the index behind the last step of a token
        self.sampling = temperature, top_k, top_p
        self.slots = c.max_depth if c.memory == "per_step" else 1
        self.columns = length + 1  # of the ring: this token, and those before it
        shape = self.slots, rows, self.columns, c.heads, c.width // c.heads
        self.keys, self.values = (torch.zeros(shape, dtype=model.compute_dtype, device=device) for _ in "kv")
        self.state = State.empty(rows, c.width, longest, device)
        self.row = torch.arange(rows, device=device)
        self.weights = Weights(model, weights or model.compute_dtype)
        N = c.max_depth
        self.inject = model.inject if c.injection == "gain" else torch.tensor([[1.0, 0.0]], device=device).expand(N, 2)
        self.plain = c.injection == "none"  # the state enters as it is, not normalised
        self.gains = torch.ones(N, 4, c.width, device=device) if model.gains is None else model.gains[:, 0]
        self.inject, self.gains = self.inject.detach().float().contiguous(), self.gains.detach().float().contiguous()
        self.behind = norm if c.sandwich else lambda y: y
        if c.sandwich:  # gains behind the branches become parts of those of the steps
            own = [torch.stack([block.output_gain, block.down_gain]).detach() for block in model.recur]
            before, after = self.gains[:, ::2], self.gains[:, 1::2] * torch.stack(own)
            self.gains = torch.stack([before, after], 2).flatten(1, 2).contiguous()
        d = c.width // c.heads
        self.frequency = c.rope_base ** (-torch.arange(0, d, 2, device=device, dtype=torch.float64) / d)
        self.seed = torch.zeros(rows, dtype=torch.int64, device=device)  # of the kernels' noise
        self.temperature = torch.full((1,), float(temperature), device=device)
        self.fused = engine_tick.available(model)  # attention, and with `kernels` all of a tick
        self.kernels = engine_tick.Tick(self) if has_kernels(model, rows, top_k, top_p) else None
        self.graph, self.checked = None, False

    # ---------------------------------------------------------------------------------------------- one tick

    @torch.no_grad()
    def tick(self):
        """One recurrence of every row; those that halt draw a token."""
        if self.kernels:
            return self.kernels.run()
        s, dtype = self.state, self.model.compute_dtype
        gain = self.gains[s.step].to(dtype).unbind(1)  # four of (R, D)
        before, e = s.h.to(dtype), s.e.to(dtype)
        a, b = self.inject[s.step].to(dtype).unbind(1)
        x = before if self.plain else a[:, None] * norm(before) + b[:, None] * e
        qkv = self.multiply(norm(x) * gain[0], "qkv")
        x = x + gain[1] * self.behind(self.multiply(self.attend(qkv).to(dtype), "output"))
        product = swiglu(self.multiply(norm(x) * gain[2], "gate_up")).to(dtype)
        h = x + gain[3] * self.behind(self.multiply(product, "down"))
        self.halt(h, before)
        self.draw()

    def multiply(self, x, name):
        """x (R, k) through a matrix of `Weights`, (R, m) in the dtype of x; own weights of steps are for one row."""
        matrix, scale = getattr(self.weights, name)
        n = self.state.step[0] if len(matrix) > 1 else 0
        y = F.linear(x, matrix[n].to(x.dtype))
        return y if scale is None else (y * scale[n]).to(x.dtype)

    def attend(self, qkv):
        """What the rows find, (R, D); writes their keys and values, of qkv (R, 3 D), into the cache."""
        if self.fused:
            return engine_tick.attend(self, qkv)
        s, c = self.state, self.model.config
        angle = s.position[:, None, None] * self.frequency
        q, k, v = heads(qkv.unflatten(-1, (3, c.heads, -1)), (angle.cos().float(), angle.sin().float()))
        column, slot = s.position % self.columns, s.step.clamp(max=self.slots - 1)
        later = (torch.arange(self.slots, device=slot.device)[:, None] >= slot)[..., None, None]  # (S, R, 1, 1)
        for cache, new in ((self.keys, k), (self.values, v)):
            cache[:, self.row, column] = torch.where(later, new, cache[:, self.row, column])
        keys, values = self.keys[slot, self.row], self.values[slot, self.row]  # (R, M, H, d)
        behind = (column[:, None] - torch.arange(self.columns, device=slot.device)) % self.columns  # 0: this token
        seen = s.position[:, None] - behind >= s.first[:, None]
        q, keys, values = q[:, :, None], keys.transpose(1, 2), values.transpose(1, 2)
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=seen[:, None, None]).flatten(1)

    def halt(self, h, before):
        """Graves' rule for rows with new states h (R, D), see `halting.ActState.advance`, the state of one token."""
        s, c, model = self.state, self.model.config, self.model
        p = model.halting_probability(h, before, s.step.clamp(max=len(c.depths) - 1))
        forced = s.step + 1 >= self.steps
        reached = 1 - s.remainder + p >= 1 - c.halting_eps if self.adaptive else torch.zeros_like(forced)
        halted = forced | reached
        early = torch.minimum(p, s.remainder) if c.halting == "act" else torch.zeros_like(p)
        weight = torch.where(halted, s.remainder, early)
        s.out += weight[:, None] * h.float()
        s.remainder -= weight
        s.h.copy_(h)
        s.step += 1
        leaves = halted & (s.step < self.end) & c.finish
        if c.finish:
            self.leave(leaves)
        s.halted.copy_(halted & ~leaves & (s.left > 0))

    def leave(self, rows):
        """Rows (R,) bool that have halted: on to the step of `finish`, where their number of steps is not known."""
        s = self.state
        self.log(s.depths, rows & (s.left > 0), s.step + 1)
        s.h.copy_(torch.where(rows[:, None], s.out, s.h))
        s.out.masked_fill_(rows[:, None], 0)
        s.remainder.masked_fill_(rows, 1)
        s.step.masked_fill_(rows, self.end - 1)

    def log(self, log, rows, new):
        """What is `new` (R,) of the token that is to be written next, into a log (R, L), where `rows` (R,)."""
        place = self.state.written.clamp(max=log.shape[1] - 1)
        log[self.row, place] = torch.where(rows, new, log[self.row, place])

    def draw(self):
        """The next token of rows that have halted, and the start of its recurrence."""
        s, dtype, vocabulary = self.state, self.model.compute_dtype, self.model.config.vocab_size
        logits = self.multiply(norm(s.out.to(dtype)), "head") + self.model.padding.to(dtype)
        self.accept(self.sample(logits[:, :vocabulary].float()))

    def sample(self, logits):
        """Token ids (R,) for logits (R, V): the largest plus Gumbel noise, as that needs no host."""
        temperature, top_k, top_p = self.sampling
        if temperature == 0:
            return logits.argmax(-1)
        logits = truncate(logits, temperature, top_k, top_p).log() if top_k or top_p < 1 else logits / temperature
        return (logits - torch.empty_like(logits).exponential_().log()).argmax(-1)

    def accept(self, drawn):
        """Tokens drawn (R,) become those that are read next, in rows that have halted."""
        s, model, halted = self.state, self.model, self.state.halted.bool()
        self.log(s.tokens, halted, drawn)
        if not model.config.finish:  # else `leave` has done it
            self.log(s.depths, halted, s.step)
        ended = halted & (drawn == model.config.document_start)
        s.written += halted
        s.left.copy_(torch.where(ended, 0, s.left - halted.long()))
        s.token.copy_(torch.where(halted, drawn, s.token))
        s.position += halted
        s.first.copy_(torch.maximum(s.first, s.position - self.length))
        fresh = halted | (s.step >= self.end)  # idle rows go round, too
        e = norm(model.embedding(s.token).to(model.compute_dtype)).float()
        self.begin(fresh[:, None], e)

    def begin(self, fresh, e):
        """The state before the first step, where `fresh` (R, 1)."""
        s = self.state
        s.e.copy_(torch.where(fresh, e, s.e))
        s.h.copy_(torch.where(fresh, e, s.h))
        s.out.masked_fill_(fresh, 0)
        s.remainder.masked_fill_(fresh[:, 0], 1)
        s.step.masked_fill_(fresh[:, 0], 0)

    # ---------------------------------------------------------------------------------------------- rows

    @torch.no_grad()
    def join(self, row, prompt, limit):
        """Put a text (a list of ids) into a row, to be continued by up to `limit` tokens. The model itself reads it,
        and the first token is drawn from its logits."""
        model, memory = self.model, self.model.new_memory(1, self.length)
        for part in torch.tensor([prompt]).split(self.segment, 1):
            out = model(part, memory=memory, depth=self.depth, keep=LAST)
            memory = out.memory
        drawn = self.sample(out.logits[:, -1, : model.config.vocab_size].float())[0]
        self.place(row, memory, drawn, out.depth[0, -1], limit)

    @torch.no_grad()
    def place(self, row, memory, drawn, depth, limit):
        """Put a text into a row whose `memory`, of `length` tokens, the model has filled, and after which it has drawn
        a first token; `depth`: the steps that this took. limit: counts that token."""
        s, model, position = self.state, self.model, memory.position
        self.seed[row].random_(2**62)
        ring = memory.resized(self.columns).ring
        for cache, part in ((self.keys, ring.keys), (self.values, ring.values)):
            for slot in range(self.slots):
                cache[slot, row] = part[slot][0]
        e = norm(model.embedding(drawn).to(model.compute_dtype)).float()
        s.tokens[row, 0], s.depths[row, 0] = drawn, depth
        for tensor, value in (
            (s.token, drawn), (s.position, position), (s.first, position - min(int(memory.live[0]), self.length)),
            (s.step, 0), (s.h, e), (s.e, e), (s.out, 0), (s.remainder, 1), (s.halted, 0), (s.written, 1),
            (s.left, torch.where(drawn == model.config.document_start, 0, limit - 1)),
        ):  # fmt: skip
            tensor[row] = value

    def stream(self, row, limit):
        """Yield (token, depth) of a row's text from its second token on, until <|endoftext|> or `limit` tokens."""
        s, done, end = self.state, 1, self.model.config.document_start
        while done < limit:
            self.ticks(AHEAD)
            count = int(s.written[row])
            for token, depth in zip(s.tokens[row, done:count].tolist(), s.depths[row, done:count].tolist()):
                if token == end:
                    return
                yield token, depth
            done = count

    def ticks(self, number):
        """Run `number` ticks. On CUDA that is a multiple of `AHEAD`, and they are launched without waiting."""
        if not self.checked:
            self.check()
        if not self.state.h.is_cuda:
            for _ in range(number):
                self.tick()
            return
        if self.graph is None:
            self.capture()
        for _ in range(number // AHEAD):
            self.graph.replay()

    def try_tick(self, at=None, left=2):
        """The `State` after a tick at which no row halts, unless one step is all there are, or after one that is for
        all, those of no text, too, the step of index `at`; that of the engine is put back. left: 0: none draws."""
        s, kept = self.state, copied(self.state)
        s.left.fill_(left)
        if at is None:
            s.remainder.fill_(2)  # 1 - 2 + p is below the threshold
        else:
            s.step.fill_(at)
        try:
            self.tick()
            return copied(s)
        finally:
            for name, x in vars(kept).items():
                getattr(s, name).copy_(x)

    def try_ticks(self):
        """A token's first step, the last one before that of `finish`, and the last; those that there are. Before these
        of an exit head the first one behind which it may halt, by bars that all rows pass, and none."""
        at = [None] * (self.steps > 1) + [self.steps - 1] * (self.end > self.steps) + [self.end - 1]
        model, n, tried = self.model, self.model.config.first_exit, []
        if self.adaptive and model.config.halting == "exit" and n < self.steps - 1:
            tolerance = model.tolerance.clone()
            states = self.try_tick(n, left=0).h.to(model.compute_dtype)
            value = model.halting_value(states, n)  # in bfloat16 off by 0.01
            for bar in (value.min() - 0.05, value.max() + 0.05):
                model.tolerance.copy_(bar)
                tried.append(self.try_tick(n, left=0))
            model.tolerance.copy_(tolerance)
        return tried + [self.try_tick(n) for n in at]

    @torch.no_grad()
    def check(self):
        """Go on without our kernels, and warn, where a tick by them fails or is not what its definition gives."""
        self.checked = True
        if not self.fused:
            return
        kernels, sampling, reason, logits = self.kernels, self.sampling, None, []
        try:
            self.try_tick()  # as it will run
            self.sampling = 0.0, None, 1.0  # the largest logit can be compared, a draw not
            found = self.try_ticks()
        except Exception as error:  # of Triton, its compiler or the driver
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        self.kernels, self.fused = None, False
        self.sample = lambda of: (logits.append(of), of.argmax(-1))[1]
        expected = self.try_ticks()
        del self.sample
        self.sampling = sampling
        reason = reason or self.difference(found, expected, logits[-1])
        if reason is None:
            self.kernels, self.fused = kernels, True
            return
        device = self.state.h.device
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
        warnings.warn(f"decoding on {where} goes on without the kernels of engine_kernels.py: {reason}", stacklevel=2)

    def difference(self, found, expected, logits):
        """What is wrong with the states after `try_ticks`, or None; bfloat16 is off by 0.01. logits (R, V): of the last
        one, as expected."""
        (*found, last), (*expected, also) = found, expected
        for one, other in zip(found, expected):
            for name in ("h", "out"):
                off = (getattr(one, name) - getattr(other, name)).norm() / other.h.norm().clamp(min=1e-6)
                if not off < 0.05:  # as NaN is not
                    return f"their state is off by {off:.1%}"
            for name in ("remainder", "step", "halted", "depths"):
                if not ((getattr(one, name) - getattr(other, name)).abs() < 0.05).all():
                    return "they halt otherwise"
        same = ("halted", "step", "position", "first", "written", "remainder", "out")  # of these none hangs on rounding
        if any((getattr(last, name) != getattr(also, name)).any() for name in same):
            return "they end a token otherwise"
        best, chosen = logits.amax(-1), logits.gather(1, last.token[:, None])[:, 0]  # in bfloat16 two may be the best
        logged = last.tokens[self.row, last.written - 1]
        if ((best - chosen > 0.05 * best.abs().clamp(min=1)) | (logged != last.token)).any():
            return "they draw another token"
        start = norm(self.model.embedding(last.token).to(self.model.compute_dtype)).float()
        off = (last.h - start).norm() / start.norm().clamp(min=1e-6)
        return None if off < 0.05 else f"their first state is off by {off:.1%}"

    def capture(self):
        """Make ticks one CUDA graph. A tick before that loads the kernels; the state is put back."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.try_tick()
        torch.cuda.current_stream().wait_stream(stream)
        try:
            self.graph = self.captured()
        except Exception:  # of a driver that knows early launches, but not in graphs
            if self.kernels is None or not self.kernels.early:
                raise
            self.kernels.early = False
            self.graph = self.captured()

    def captured(self):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(AHEAD):
                self.tick()
        return graph

    def run(self, prompts, limits, together=False, until=None):
        """A `Continuation` of each prompt by at most limits[i] tokens. Rows that end are given the next prompt, at the
        next look of the host. together: instead wait for all rows, then fill all of them (what a batch without
        continuous batching does). until: see `decoding.generate_batch`. Raises ValueError for a limit beyond `longest`.
        """
        s, made = self.state, [Continuation() for _ in prompts]
        if limits and max(limits) > s.tokens.shape[1]:
            raise ValueError(f"limit {max(limits)} is beyond longest = {s.tokens.shape[1]}")
        waiting = [i for i, limit in enumerate(limits) if limit > 0]
        owner, end = [None] * self.rows, self.model.config.document_start
        while waiting or any(i is not None for i in owner):
            if not together or all(i is None for i in owner):
                for row in range(self.rows):
                    if owner[row] is None and waiting:
                        owner[row] = waiting.pop(0)
                        self.join(row, prompts[owner[row]], limits[owner[row]])
            self.ticks(AHEAD)
            left, written, tokens, depths = (x.tolist() for x in (s.left, s.written, s.tokens, s.depths))
            for row, i in enumerate(owner):
                if i is None:
                    continue
                one, count = made[i], written[row]
                for token, depth in zip(tokens[row][len(one.tokens) : count], depths[row][len(one.tokens) : count]):
                    if token == end:
                        one.ended = True
                        break
                    one.tokens.append(token)
                    one.depths.append(depth)
                    if until and until(i, one.tokens):
                        left[row] = s.left[row] = 0
                        break
                if not left[row]:
                    owner[row] = None
        return made


def has_kernels(model, rows, top_k=None, top_p=1.0):
    """Whether a tick is that of engine_kernels.py."""
    c = model.config
    rule = c.halting in ("fixed", "exit") or c.halting == "act" and not c.finish
    plain = rule and c.injection == "gain" and not c.sandwich and top_k is None and top_p == 1
    return plain and engine_tick.available(model) and unfit(model, rows) is None


def unfit(model, rows):
    """Why an `Engine` cannot run this model, or None."""
    c = model.config
    if c.prelude or c.coda or c.recur > 1:
        return "it is for one recurrent block, without prelude and coda"
    if not c.share and rows > 1:
        return "own blocks at every step cannot be shared by rows at different steps; give it one row"
    if c.injection in ("concat_linear", "hyper"):
        return f"injection = {c.injection} is not built in"
    return None
