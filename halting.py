"""Which tokens go on: the state of adaptive computation time, the tokens that a step still computes, the weight by
which depth is steered, depths that are drawn, and the fit of an exit head.

Shapes: B batch, T segment length, D width.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist


@dataclass
class ActState:
    """Adaptive computation time (Graves 2016, arXiv 1603.08983, section 2) of every token; all but `out` are (B, T).

    out: (B, T, D) float32, the weighted sum of states so far. remainder: 1 minus the weights so far. active: not
    halted. depth: N(t), the steps used. remainder_at_halt: R(t), zero until the token halts.
    """

    out: torch.Tensor
    remainder: torch.Tensor
    active: torch.Tensor
    depth: torch.Tensor
    remainder_at_halt: torch.Tensor

    @staticmethod
    def start(tokens, h):
        """Before the first step. In training it requires gradients as it will after: else each step was a new graph."""
        number = partial(torch.full, tokens.shape, device=h.device, requires_grad=h.requires_grad)
        out = torch.zeros_like(h, dtype=torch.float32, requires_grad=h.requires_grad)
        active = torch.ones_like(tokens, dtype=torch.bool)
        return ActState(out, number(fill_value=1.0), active, torch.zeros_like(tokens), number(fill_value=0.0))

    def advance(self, h, p, threshold, weighted=True):
        """The state after a step that gave states h and halting probabilities p (B, T). Returns it and the weights w_n.

        A token halts when its probabilities reach `threshold`, of its own or of all; it then gets the whole remainder
        (equation 6). weighted: before that, p; else nothing, and the output is the newest state."""
        halts = self.active & (1 - self.remainder + p >= threshold)
        before = torch.minimum(p, self.remainder) * self.active if weighted else 0.0
        weight = torch.where(halts, self.remainder, before)
        out = self.out + weight[..., None] * h
        at_halt = self.remainder_at_halt + torch.where(halts, self.remainder, 0.0)
        state = ActState(out, self.remainder - weight, self.active & ~halts, self.depth + self.active, at_halt)
        return state, weight


class Packed(NamedTuple):
    """Some of all tokens, (B, T) or (m,): the active ones, and halted ones up to a fixed number. Taking them out and
    putting them back are gathers, and so are the gradients of both: by PyTorch's own, rows would be added one by one.

    index: (rows,) int64, these tokens, counted through all. rank: (B, T), where a token is among them, or `rows` and
    more where it is not. active: (B, T) bool."""

    index: torch.Tensor
    rank: torch.Tensor
    active: torch.Tensor

    @staticmethod
    def of(active, rows):
        """active: (B, T) bool, at most `rows` of them true."""
        flat = active.flatten()
        token, before = torch.arange(len(flat), device=active.device), flat.cumsum(0)
        rank = torch.where(flat, before - 1, before[-1] + token - before)
        index = torch.empty_like(token).scatter_(0, rank, token)[:rows]
        return Packed(index, rank.view_as(active), active)

    def take(self, x):
        """Of x (B, T, ...), the rows (rows, ...)."""
        return _Take.apply(x, self.index, self.rank)

    def put(self, y, old=None):
        """Rows y (rows, ...) as (B, T, ...), with zeros for the other tokens; or, without gradient, with `old`
        (B, T, ...) for the halted ones."""
        if old is None:
            return _Put.apply(y, self.index, self.rank)
        return torch.where(_as(self.active, y), _spread(y, self.rank), old)


def _as(x, y):
    """x with as many dimensions behind its own as y (rows, ...)."""
    return x[(..., *[None] * (y.dim() - 1))]


def _spread(y, rank):
    """Of every token the row `rank` of y, or the last one. index_select: on a CPU four times as fast as an index."""
    return y.index_select(0, rank.flatten().clamp(max=len(y) - 1)).unflatten(0, rank.shape)


def _put(y, rank):
    return torch.where(_as(rank < len(y), y), _spread(y, rank), 0.0)


def _take(x, index, rank):
    return x.flatten(0, rank.dim() - 1).index_select(0, index)


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, index, rank):
        ctx.save_for_backward(rank)
        return _take(x, index, rank)

    @staticmethod
    def backward(ctx, grad):
        return _put(grad, *ctx.saved_tensors), None, None


class _Put(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, index, rank):
        ctx.save_for_backward(index, rank)
        return _put(y, rank)

    @staticmethod
    def backward(ctx, grad):
        return _take(grad, *ctx.saved_tensors), None, None


class PonderWeight:
    """The weight lambda of the ponder cost, `cross-entropy + lambda * mean(N + R)`, constant or steered to a depth.

    With a target it is the multiplier of the constraint `mean depth = target` (dual ascent): an integral of the error,
    plus a share of the error itself, without which depth swings around its target. It may become negative: the weighted
    mean of states pulls shallow by itself, and a multiplier that could only penalise would not lift it.
    """

    def __init__(self, value, target_depth=0.0, rate=1e-4, limit=1.0):
        self.value = self.integral = value
        self.target_depth, self.rate, self.limit = target_depth, rate, limit

    def update(self, mean_depth):
        """Move after an optimizer step whose tokens took `mean_depth` steps on average."""
        if self.target_depth:
            error = mean_depth - self.target_depth
            self.integral = self._clamp(self.integral + self.rate * error)
            # Depth follows lambda like an integrator: the damping that it needs grows with the root of the rate.
            self.value = self._clamp(self.integral + 0.5 * self.rate**0.5 * error)

    def _clamp(self, value):
        return min(max(value, -self.limit), self.limit)


def draw_depths(train, model, step):
    """The depths that are drawn for a step of training, by a TrainConfig and a ModelConfig: one number, or, of every
    row or token its own, (batch_size, segment) int64, with 0 for those that halt by the model's rule.

    One more than a Poisson variable whose rate is log-normal (Geiping et al. 2025, arXiv 2502.05171, section 3.3),
    cut to the depths that the model's rule can choose; before that the mean is `sampled_depth`."""
    sigma = 0.5
    random = np.random.default_rng([train.seed, step])
    rows, length = train.batch_size, train.segment
    shape = {"step": (), "row": (rows, 1), "token": (rows, length)}[train.sampled_by]
    rate = random.lognormal(math.log(max(train.sampled_depth - 1, 1e-9)) - sigma**2 / 2, sigma, shape)
    drawn = np.clip(1 + random.poisson(rate), model.depths[model.first_exit], model.max_depth)
    if train.sampled_share < 1:
        drawn = np.where(random.random(shape) < train.sampled_share, drawn, 0)
    return np.broadcast_to(drawn, (rows, length)) if shape else int(drawn)


def shares(target, least, most):
    """The shares of all tokens that take steps 1 to `most`, a list: all up to step `least`, then always the same part
    of those before, such that `target` steps are taken on average."""
    low, high = 0.0, 1.0
    for _ in range(50):
        part = (low + high) / 2
        few = least + sum(part**n for n in range(1, most - least + 1)) < target
        low, high = (part, high) if few else (low, part)
    return [part ** max(n - least, 0) for n in range(1, most + 1)]


class ExitFit:
    """The head of `halting = exit`, fitted by least squares: for every step n but the last a linear function of the
    normalised state, which expects one of two things, in nats, by `ModelConfig.exit_by`.

    gain: what the next step wins, nll_n - nll_(n+1). So `tolerance` is the price of a step. With a target depth the
    tolerance follows at which so many steps are taken on average: measured on text before the head is fitted to it.
    loss: the loss that the token has in the end. After every step a fixed share of all tokens goes on (`shares`), those
    of which the most is expected. The bar that they pass is taken off the bias, and the tolerance is 0. Bars are
    averages over some batches, by `bar_decay`, of text that the head is fitted to as well, as one of thirty.

    It is solved for, by normal equations with a ridge, as what a token wins says little (correlations of 0.1) and
    gradient steps learn nothing of it (docs/LOG.md). Older text counts less, `decay` a batch, as the model moves on.
    sums: (N - 1, D + 2, D + 2), all that a checkpoint needs beside the model. N is without the step of `finish`."""

    def __init__(self, model, target_depth=0.0, decay=0.97, ridge=0.5, bar_decay=0.5):
        N, D = len(model.config.depths), model.config.width
        self.model, self.target_depth = model, target_depth
        self.decay, self.ridge, self.bar_decay = decay, ridge, bar_decay
        # features and value are one row: their products are Gram matrix and right side at once
        self.sums = torch.zeros(N - 1, D + 2, D + 2, device=model.embedding.weight.device)

    @torch.no_grad()
    def examples(self, tokens, targets, memory=None, spans=None):
        """What the head is fitted to: the states of every step but the last, as it reads them, (N - 1, B, T, D), and
        what it is to say of them, (N - 1, B, T) nats, both float32. For the arguments see the model's `forward`.
        Tokens halt by the rule, so that the others see frozen keys and values as they will, but all states go on."""
        model, states = self.model, []
        nll = model(tokens, targets, memory, spans=spans, states=states).nll
        features = torch.stack([model.features(h) for h in states[:-1]])
        if model.config.exit_by == "loss":
            return features, nll.expand(len(features), -1, -1)
        targets, zeros = targets.to(nll.device, non_blocking=True), torch.zeros_like(nll)
        nll = torch.stack([model.loss(model.read(h), targets, zeros)[1] for h in states])
        return features, nll[:-1] - nll[1:]

    @torch.no_grad()
    def update(self, states, values):
        """Fit to states (N - 1, n, D) of values (N - 1, n), see `examples`, too; not to what is not finite."""
        rows = torch.cat([states, torch.ones_like(states[..., :1]), values[..., None]], -1)
        by_loss, fitted = self.model.config.exit_by == "loss", bool(self.sums.any())
        before = self.values(states) if by_loss else None
        if by_loss and fitted:  # a state after the one that a token halted with says nothing
            rows[1:] *= (before.cummin(0).values[:-1] >= self.model.tolerance)[..., None]
        products = rows.mT @ rows
        if dist.is_initialized():
            dist.all_reduce(products)
        if not (products.isfinite().all() and products[0, -2, -2]):  # or there is no token at all
            return
        if self.target_depth and fitted and not by_loss:
            self.steer(states)
        self.sums.mul_(self.decay).add_(products)
        self.solve()
        if by_loss:
            self.set_bars(self.values(states), before, 1 - self.bar_decay if fitted else 1.0)

    def solve(self):
        D = self.sums.shape[1] - 2
        count = self.sums[:, D, D, None, None]
        mean = (self.sums / count).double()
        gram, moment = mean[:, :-1, :-1], mean[:, :-1, -1:]
        gram.diagonal(dim1=1, dim2=2)[:, :D] += self.ridge  # features have a mean square of 1; not for the bias
        factor, failed = torch.linalg.cholesky_ex(gram)
        solution = torch.cholesky_solve(moment, factor)[..., 0].float()
        head = self.model.halting
        old = torch.cat([head.weight[:-1], head.bias[:-1, None]], 1)
        good = (failed == 0)[:, None] & solution.isfinite()  # by rounding a matrix may be no Gram matrix
        solution = torch.where(good.all(1, keepdim=True), solution, old)
        head.weight[:-1], head.bias[:-1] = solution[:, :D], solution[:, D]

    def values(self, states):
        """What the head says of states (N - 1, n, D), (N - 1, n) nats; infinity where no token may halt yet.
        A token goes on after n steps where the least of its first n values reaches the tolerance."""
        head = self.model.halting
        values = torch.einsum("snd,sd->sn", states, head.weight[:-1]) + head.bias[:-1, None]
        values[: self.model.config.first_exit] = torch.inf
        return values

    def set_bars(self, values, before, weight):
        """Take bars off a head that has none. values, before: (N - 1, n), what it says of some tokens, and what it said
        when it had the old ones. weight: of bars that let the wanted shares of these tokens pass, beside the old."""
        c, count = self.model.config, values.shape[1]
        active = torch.ones_like(values[0], dtype=torch.bool)
        bars = torch.zeros(len(values) + 1, device=values.device)  # times the tokens, whose number is the last
        bars[-1] = count
        going = shares(self.target_depth - c.finish, c.first_exit + 1, len(c.depths))
        for n, share in enumerate(going[c.first_exit + 1 :], c.first_exit):
            if count:  # another process may have all tokens
                passing = torch.where(active, values[n], -torch.inf).topk(max(round(share * count), 1))
                active = torch.zeros_like(active).index_fill(0, passing.indices, True)
                old = (values[n] - before[n]).mean()  # where the old bar lies to the new head
                bars[n] = count * old.lerp(passing.values[-1], weight)
        if dist.is_initialized():
            dist.all_reduce(bars)
        self.model.halting.bias[:-1] -= bars[:-1] / bars[-1]
        self.model.set_tolerance(0.0)

    def steer(self, states):
        """Set the tolerance at which tokens with these states take `target_depth` steps on average."""
        least = self.values(states).cummin(0).values.flatten()
        further = round((self.target_depth - 1) * states.shape[1])  # steps after the first, of all tokens
        kth = max(least.numel() - further, 1)
        tolerance = least.kthvalue(kth).values if least.numel() else self.model.tolerance.clone()
        if dist.is_initialized():
            dist.all_reduce(tolerance.div_(dist.get_world_size()))
        self.model.set_tolerance(tolerance.item())
