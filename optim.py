"""The optimizers: Muon for the matrices of the blocks, AdamW for embedding, gains, injection and halting head."""

import math
from dataclasses import dataclass
from typing import Literal

import torch

BLOCKS = ("prelude", "recur", "coda")  # the parts of the model whose matrices Muon trains


@dataclass
class OptimConfig:
    """Muon for the matrices of the blocks, AdamW for embedding, gains, injection and halting head."""

    lr: float = 1.5e-3  # of Muon, scaled to AdamW's update size (match_rms_adamw)
    adamw_lr: float = 1.5e-3
    weight_decay: float = 0.1  # of Muon's matrices
    momentum: float = 0.95  # of Muon
    betas: tuple[float, float] = (0.9, 0.95)  # of AdamW
    grad_clip: float = 1.0
    schedule: Literal["linear", "cosine"] = "linear"  # of the decay
    warmup: float = 0.02  # fraction of training in which the rate rises from 0
    decay: float = 0.4  # fraction of training, at the end, in which it falls to `final`; between: constant
    final: float = 0.05  # of the rate

    def __post_init__(self):
        if not (0 < self.lr <= 1 and 0 < self.adamw_lr <= 1 and self.grad_clip > 0):
            raise ValueError("'lr' and 'adamw_lr' must be above 0 and at most 1, 'grad_clip' must be above 0")
        if not all(0 <= x < 1 for x in (self.momentum, *self.betas)) or min(self.weight_decay, self.final) < 0:
            raise ValueError("'momentum' and 'betas' must lie in [0, 1); 'weight_decay' and 'final' must be at least 0")
        if self.warmup < 0 or self.decay < 0 or self.warmup + self.decay > 1:
            raise ValueError(f"'warmup' {self.warmup} and 'decay' {self.decay} must add up to at most 1")


def learning_rate(progress, optim):
    """The factor on the learning rates at `progress` (0..1) of training: warm up, hold, decay."""
    if progress < optim.warmup:
        return progress / optim.warmup
    if progress <= 1 - optim.decay:
        return 1.0
    left = (1 - progress) / optim.decay
    shape = left if optim.schedule == "linear" else 0.5 - 0.5 * math.cos(math.pi * left)
    return optim.final + (1 - optim.final) * shape


def build_optimizers(model, optim, compiled=False):
    """Muon over the matrices of the blocks and AdamW over all else, as {name: optimizer}."""
    matrices = {name: p for name, p in model.named_parameters() if p.ndim == 2 and name.split(".")[0] in BLOCKS}
    others = {name: p for name, p in model.named_parameters() if name not in matrices}
    optimizers = {
        "muon": Muon(matrices.items(), optim.lr, optim.weight_decay, optim.momentum, compiled),
        "adamw": torch.optim.AdamW(others.items(), optim.adamw_lr, optim.betas, weight_decay=0.0, fused=True),
    }
    for optimizer in optimizers.values():
        optimizer.register_step_post_hook(_mark_changed)
    return optimizers


def guard(optimizers, norm, finite, limit):
    """Make the next step of `optimizers` clip gradients of the total `norm` to `limit`, or change nothing at all unless
    `finite`, both 0-d tensors. It is decided on the device, by the protocol of `torch.amp.GradScaler`: a host that had
    to know would wait for the backward pass, and the device then for the host."""
    scale, skip = (norm / limit).clamp(min=1).float(), (~finite).float()
    for optimizer in optimizers:
        optimizer.grad_scale, optimizer.found_inf = scale, skip


def _mark_changed(optimizer, *_):
    """Raise the version counters of the parameters, by which `fp8.Weight` goes: fused and compiled updates do not."""
    for group in optimizer.param_groups:
        torch.autograd.graph.increment_version([p for p in group["params"] if p.grad is not None])


class Muon(torch.optim.Optimizer):
    """`torch.optim.Muon(adjust_lr_fn="match_rms_adamw")` (Jordan et al. 2024; Liu et al. 2025, arXiv 2502.16982), with
    matrices of one shape orthogonalised together and, where `compiled`, in few kernels: one at a time they take 8 % of
    a step of the 110M model in FP8, in which the GPU mostly waits for 250 small launches."""

    grad_scale = found_inf = None  # see `guard`

    def __init__(self, params, lr, weight_decay=0.1, momentum=0.95, compiled=False):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.update = torch.compile(_muon_update, dynamic=False) if compiled else _muon_update

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            alike = {}
            for p in group["params"]:
                if p.grad is not None:
                    alike.setdefault((min(p.shape), max(p.shape)), []).append(p)
            for params in alike.values():
                for p in params:
                    if not self.state[p]:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                buffers = [self.state[p]["momentum_buffer"] for p in params]
                one = torch.ones((), device=params[0].device)
                lr = group["lr"] * one  # a number would compile anew at every step
                scale = one if self.grad_scale is None else self.grad_scale
                skip = one < 0 if self.found_inf is None else self.found_inf > 0
                grads = [p.grad for p in params]
                self.update(params, grads, buffers, lr, group["weight_decay"], group["momentum"], scale, skip)


def _muon_update(params, grads, buffers, lr, weight_decay, momentum, grad_scale, skip):
    # No torch._foreach here: with many matrices the compiler (2.11) then fails in its scheduler.
    grads = [grad / grad_scale for grad in grads]
    moved = [buffer.lerp(grad, 1 - momentum) for buffer, grad in zip(buffers, grads)]
    updates = [grad.lerp(buffer, momentum) for buffer, grad in zip(moved, grads)]  # Nesterov's
    flip = [p.shape[0] > p.shape[1] for p in params]
    # Processors without bfloat16 instructions multiply it 30 times slower than float32.
    dtype = torch.bfloat16 if params[0].is_cuda else torch.float32
    wide = torch.stack([(u.mT if f else u).to(dtype) for u, f in zip(updates, flip)])
    scale = 0.2 * math.sqrt(max(params[0].shape))  # the size of AdamW's updates
    for p, buffer, f, new, update in zip(params, buffers, flip, moved, orthogonalize(wide)):
        p.copy_(torch.where(skip, p, p * (1 - lr * weight_decay) - lr * scale * (update.mT if f else update).float()))
        buffer.copy_(torch.where(skip, buffer, new))


def orthogonalize(x, coefficients=(3.4445, -4.7750, 2.0315)):
    """About the nearest semi-orthogonal matrices to x (n, rows, columns >= rows), by five steps of a quintic
    Newton-Schulz iteration (Bernstein & Newhouse 2024, arXiv 2409.20325), which bring singular values to between 0.7
    and 1.2.

    A step multiplies x by a polynomial of x x'. Where x is wide, three steps and then two are done on x x' alone, which
    is rows x rows, and x is multiplied once by what they come to: 46 instead of 85 products of rows^3 for 8 times as
    many columns. All five at once would be fewer still, but errors of bfloat16 in x x' grow with every step."""
    a, b, c = coefficients
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    if x.shape[2] < 4 * x.shape[1]:
        for _ in range(5):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x
    identity = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    for steps in (3, 2):
        gram, product = x @ x.mT, None
        for step in range(steps):
            factor = a * identity + torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            product = factor if step == 0 else factor @ product
            if step + 1 < steps:
                gram = factor @ gram @ factor
        x = product @ x
    return x
