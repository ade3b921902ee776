"""Transformer-XL memory (Dai et al. 2019, arXiv 1901.02860): where past keys and values lie, and who sees them.

The same thing is the cache of decoding. `Memory` holds what the next segment may read, `Spans` says which of these
keys, and of the segment's own, each query sees.

Shapes: B batch, T segment length, M memory length, H heads, d head size.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from attention import attention


@dataclass
class Ring:
    """keys, values: lists of (B, M, H, d), one entry a slot of the model, rotated at their absolute positions. The
    token at position p lies in column p % M: a segment overwrites the oldest tokens, and nothing else moves. position:
    the number of tokens written so far."""

    keys: list
    values: list
    position: int = 0

    @property
    def length(self):
        return self.keys[0].shape[1]

    def write(self, keys, values, position):
        """Make the newest of keys, values (lists of (B, T, H, d)), the tokens before `position`, part of the ring."""
        n = min(keys[0].shape[1], self.length)
        self.position = position
        if not n:
            return
        start = (position - n) % self.length
        first = min(n, self.length - start)  # columns until the ring wraps
        old, new = [], []
        for ring, source in zip(self.keys + self.values, keys + values):
            source = source[:, source.shape[1] - n :]
            old += [ring[:, start : start + first], ring[:, : n - first]]
            new += [source[:, :first], source[:, first:]]
        old, new = ([x for x in part if x.numel()] for part in (old, new))
        torch._foreach_copy_(old, new)

    def ordered(self):
        """Copies of keys and values, the oldest token first."""
        column = (torch.arange(self.length, device=self.keys[0].device) + self.position) % max(self.length, 1)
        return [x[:, column] for x in self.keys], [x[:, column] for x in self.values]


@dataclass
class Memory:
    """What the next segment can read. live: (B,) int64 on the host, how many of the newest tokens it may see: those of
    the document it continues. position: how many tokens each row has read. pending: the (keys, values) of the newest
    segment, which enter the ring when the next one is read, as the backward pass of this one still needs the oldest.

    A memory can be read again and again, until the one after it has been."""

    ring: Ring
    live: torch.Tensor
    position: int = 0
    pending: list = field(default_factory=list)

    @staticmethod
    def empty(slots, shape, dtype, device):
        """Of `slots` times keys and values of `shape` (B, M, H, d)."""
        keys, values = ([torch.zeros(shape, dtype=dtype, device=device) for _ in range(slots)] for _ in "kv")
        return Memory(Ring(keys, values), torch.zeros(shape[0], dtype=torch.int64))

    @property
    def length(self):
        return self.ring.length

    @torch.no_grad()
    def settle(self):
        """Move what is pending into the ring. Raises RuntimeError where a later segment has been written over it."""
        if self.pending and self.ring.position == self.position - self.pending[0][0].shape[1]:
            self.ring.write(*map(list, zip(*self.pending)), self.position)
        elif self.ring.position != self.position:
            raise RuntimeError("this memory has been overwritten: the memory after it was read. Copy it with `resized`")
        self.pending = []
        return self

    def past(self, slot):
        """The (keys, values) of a slot, or None where the memory holds no token."""
        return (self.ring.keys[slot], self.ring.values[slot]) if self.length else None

    def after(self, written, live):
        """The memory after a segment that wrote the (keys, values) `written`. No gradient goes through it."""
        pending = [(k.detach(), v.detach()) for k, v in written]
        return Memory(self.ring, live.clamp(max=self.length), self.position + written[0][0].shape[1], pending)

    def after_first(self, n, later):
        """The memory after only the first `n` tokens of the segment that is pending in `later`, the memory after this
        one. None of them may open a document."""
        return self.after([(k[:, :n], v[:, :n]) for k, v in later.pending], self.live + n)

    @torch.no_grad()
    def resized(self, length):
        """A copy that holds `length` tokens: the oldest are dropped, or there is room for more."""
        keys, values = self.settle().ring.ordered()
        B, _, *rest = keys[0].shape
        ring = Memory.empty(len(keys), (B, length, *rest), keys[0].dtype, keys[0].device).ring
        ring.write(keys, values, self.position)
        return Memory(ring, self.live.clamp(max=length), self.position)


class Spans:
    """Which keys each query sees: of [memory, segment] the interval from the start of its document up to itself.

    All of it is worked out on the host, so that the device never waits for it. one_by_one: a query sees the M tokens
    before it, as if the segment was read token by token, and not all of the memory (without gradient). kernel: for
    `attention.attention`, with interval bounds; else as a mask for PyTorch's own attention. context: the mean number of
    visible keys. live: of the next memory.
    """

    def __init__(self, tokens, memory, config, device, kernel, one_by_one=False):
        B, T = tokens.shape
        M = memory.length if memory else 0
        live = memory.live if memory else torch.zeros(B, dtype=torch.int64)
        offset = memory.position % M if M else 0  # the column of the oldest token
        index = torch.arange(T)
        opens = (tokens == config.document_start) & (not config.cross_documents)
        start = torch.where(opens, index, -1).cummax(1).values  # of the query's document; -1: before this segment
        first = torch.where(start >= 0, M + start, M - live[:, None])  # (B, T), the first visible key of every query
        if one_by_one:
            first = torch.maximum(first, index)
        self.context = (M + index - first + 1).float().mean().item()
        self.live = torch.where(start[:, -1] >= 0, T - start[:, -1], live + T)
        self.mask = self.first = self.last = self.offset = self.columns = None
        if kernel:
            # the last query that sees a key: the one before the next document opens
            following = torch.where(opens, index, T).flip(1).cummin(1).values.flip(1)
            last = F.pad(following[:, 1:], (0, 1), value=T) - 1
            bounds = torch.stack([first, last]).int()
            self.first, self.last = _to(bounds, device).unbind()
            self.offset = _to(torch.tensor([offset], dtype=torch.int32), device)
        else:
            key = torch.cat([(torch.arange(M) - offset) % max(M, 1), M + index])
            mask = (key >= first[..., None]) & (key <= M + index[:, None])
            self.mask = mask[:, None].to(device)  # (B, 1, T, M + T)
            if T == 1 and M and device.type == "cpu":
                self.columns = _columns(mask[:, :, :M])

    def attend(self, q, k, v, past):
        """Attention of q (B, T, H, d) over past (keys, values), each (B, M, H, d), and over k and v (B, T, H, d)."""
        if self.mask is None:
            return attention(q, k, v, past, self.first, self.last, self.offset)
        if self.columns and not torch.is_grad_enabled():
            return self._attend_one(q, k, v, *past)
        if past is not None:
            k, v = (torch.cat([old, new], 1) for old, new in zip(past, (k, v)))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask).transpose(1, 2)

    def _attend_one(self, q, k, v, keys, values):
        """`attend` of one token a row on a CPU: what is visible is read where it lies, and no copy is made. The token's
        own value joins by its share of the softmax, for which the log-sum-exp of the other scores is enough."""
        columns, hidden = self.columns
        past = (x[:, columns].transpose(1, 2) for x in (keys, values))
        hidden = None if hidden is None else hidden.to(q.dtype)
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        found, lse = kernel(q.transpose(1, 2), *past, attn_mask=hidden)
        own = (q * k).sum(-1, keepdim=True, dtype=lse.dtype) * q.shape[-1] ** -0.5
        share = torch.sigmoid(own - lse.transpose(1, 2)[..., None])
        return torch.lerp(found.transpose(1, 2), v, share.to(v.dtype))


def _columns(seen):
    """The columns that any row sees, as a slice, and an additive mask for these, (B, 1, 1, columns), or None where all
    rows see them all. seen: (B, 1, M) bool. None where nobody sees anything."""
    column = seen.any(0)[0].nonzero()[:, 0].tolist()
    if not column:
        return None
    columns = slice(column[0], column[-1] + 1)
    seen = seen[:, None, :, columns]
    # a finite number: a row that sees none of them then gives them a share of zero
    return columns, None if seen.all() else torch.where(seen, 0.0, -1e30)


def _to(x, device):
    """To the device without waiting for it."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def read_later(tensor):
    """A function that returns `tensor` as a list. It waits for the device to have made the tensor, not for what the
    device is given meanwhile."""
    copy, made = tensor.to("cpu", non_blocking=True), torch.cuda.Event() if tensor.is_cuda else None
    if made:
        made.record()

    def read():
        if made:
            made.synchronize()
        return copy.tolist()

    return read
