"""The model as a competent person writes it in eager PyTorch: what `bench.py train` compares with, and a second reading
of model.py in a hundred lines."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from config import ConfigError


class Naive(nn.Module):
    """`RecurrentTransformer` in eager PyTorch: autocast, a mask for SDPA, keys and values concatenated at every step,
    all logits at once. The same function of the same parameters under the same names; ConfigError for other models."""

    def __init__(self, config, dtype=torch.float32):
        super().__init__()
        known = dict(prelude=0, recur=1, coda=0, share=True, finish=False, halting="act", injection="gain",
                     step_gains=True, sandwich=False, memory="per_step")  # fmt: skip
        if wrong := [f"model.{k} = {getattr(config, k)}" for k, v in known.items() if getattr(config, k) != v]:
            raise ConfigError(f"the naive peer does not know {', '.join(wrong)}; leave it out of --peers")
        self.config, self.dtype = config, dtype
        D, F, N = config.width, config.hidden, config.max_depth
        sizes = dict(query=(D, D), key=(D, D), value=(D, D), output=(D, D), gate=(D, F), up=(D, F), down=(F, D))
        block = nn.ModuleDict({name: nn.Linear(*size, bias=False) for name, size in sizes.items()})
        self.embedding, self.recur = nn.Embedding(config.padded_vocab_size, D), nn.ModuleList([block])
        self.gains, self.inject = nn.Parameter(torch.ones(N, 1, 4, D)), nn.Parameter(torch.ones(N, 2))
        self.halting = nn.Linear(D, 1)

    def new_memory(self, batch, length):
        """steps: keys and values of every step, (B, M, H, d); documents: (B, M), the token's document, -1 for none."""
        c, device = self.config, self.embedding.weight.device
        shape = (batch, length, c.heads, c.width // c.heads)
        steps = [[torch.zeros(shape, dtype=self.dtype, device=device) for _ in "kv"] for _ in range(c.max_depth)]
        return SimpleNamespace(steps=steps, documents=torch.full((batch, length), -1, device=device), position=0)

    def block(self, x, gains, rope, mask, past, frozen, active):
        """x: (B, T, D). past: keys and values of the memory; frozen: those of this segment at the step before.
        Returns x and the keys and values of both, (B, M + T, H, d)."""
        layers = self.recur[0]
        y = norm(x) * gains[0]
        q, k, v = (layers[name](y).unflatten(-1, (self.config.heads, -1)) for name in ("query", "key", "value"))
        q, k = (rotate(norm(z), *rope).to(v.dtype) for z in (q, k))
        if frozen is not None:
            k, v = (torch.where(active[..., None, None], new, old) for new, old in zip((k, v), frozen))
        k, v = (torch.cat([old, new], 1) for old, new in zip(past, (k, v)))
        y = F.scaled_dot_product_attention(*(z.transpose(1, 2) for z in (q, k, v)), attn_mask=mask)
        x = x + gains[1] * layers["output"](y.transpose(1, 2).flatten(-2))
        y = norm(x) * gains[2]
        return x + gains[3] * layers["down"](F.silu(layers["gate"](y)) * layers["up"](y)), (k, v)

    def forward(self, tokens, targets, memory):
        """tokens, targets: (B, T). Returns loss, context (mean number of visible keys) and memory."""
        c, device = self.config, self.embedding.weight.device
        tokens, targets = tokens.to(device), targets.to(device)
        (B, T), M = tokens.shape, memory.documents.shape[1]
        starts = (tokens == c.document_start) & (not c.cross_documents)
        current = memory.documents[:, -1:].clamp(min=0) if M else 0
        documents = torch.cat([memory.documents, current + starts.cumsum(1)], 1)
        mask = documents[:, M:, None] == documents[:, None, :]
        mask &= torch.ones(T, M + T, dtype=torch.bool, device=device).tril(M)  # (B, T, M + T)
        d = c.width // c.heads
        frequency = c.rope_base ** (-torch.arange(0, d, 2, device=device) / d)
        angle = (memory.position + torch.arange(T, device=device))[:, None, None] * frequency
        rope = angle.cos(), angle.sin()  # (T, 1, d / 2)

        with torch.autocast(device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            h = e = norm(self.embedding(tokens))
            out, frozen, steps = 0, None, []
            remainder, active = torch.ones(B, T, device=device), torch.ones(B, T, dtype=torch.bool, device=device)
            for n, (past, (a, b)) in enumerate(zip(memory.steps, self.inject)):
                h, kv = self.block(a * norm(h) + b * e, self.gains[n, 0], rope, mask[:, None], past, frozen, active)
                frozen = [z[:, M:] for z in kv]
                steps.append([z[:, T:].detach() for z in kv])
                p = self.halting(norm(h))[..., 0].float().sigmoid()
                halts = active & (1 - remainder + p >= 1 - c.halting_eps) if n < c.max_depth - 1 else active
                weight = torch.where(halts, remainder, torch.minimum(p, remainder) * active)
                out, remainder, active = out + weight[..., None] * h, remainder - weight, active & ~halts
            logits = F.linear(norm(out).flatten(0, 1), self.embedding.weight)[:, : c.vocab_size]
            loss = F.cross_entropy(logits, targets.flatten())
        memory = SimpleNamespace(steps=steps, documents=documents[:, T:], position=memory.position + T)
        return SimpleNamespace(loss=loss, context=mask.sum(-1).float().mean(), memory=memory)


def norm(x):
    return F.rms_norm(x, (x.shape[-1],))


def rotate(x, cos, sin):
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
