"""The ring of past keys and values, and who sees which of them."""

import pytest
import torch

import attention
from memory import Memory, Ring, Spans
from model import ModelConfig

CONFIG = ModelConfig(width=16, heads=2, vocab_size=50, document_start=0)


def numbered(first, count):
    """Keys of `count` tokens, each the number of its token: (1, count, 1, 1)."""
    return torch.arange(first, first + count).float().view(1, -1, 1, 1)


@pytest.mark.parametrize("lengths", [[4, 4, 4], [1] * 11, [3, 5, 2, 7], [20, 3], [8, 8]])
def test_the_ring_holds_the_newest_tokens_in_order(lengths):
    memory, position = Memory.empty(1, (1, 8, 1, 1), torch.float32, "cpu"), 0
    buffer = memory.ring.keys[0]
    for length in lengths:
        written = [(numbered(position, length), -numbered(position, length))]
        memory, position = memory.after(written, torch.tensor([99])), position + length
        memory.settle()
        (keys,), (values,) = memory.ring.ordered()
        newest = torch.arange(position - 8, position).clamp(min=0).float()  # what was never written is zero
        assert torch.equal(keys.flatten(), newest) and torch.equal(values, -keys)
        assert memory.ring.keys[0] is buffer and memory.live == 8 and memory.position == position


def test_a_segment_overwrites_only_the_oldest_tokens():
    ring = Ring([torch.zeros(1, 8, 1, 1)], [torch.zeros(1, 8, 1, 1)])
    ring.write([numbered(0, 8)], [numbered(0, 8)], 8)
    ring.write([numbered(8, 3)], [numbered(8, 3)], 11)
    assert ring.keys[0].flatten().tolist() == [8, 9, 10, 3, 4, 5, 6, 7]


def test_the_backward_pass_still_finds_the_oldest_tokens():
    """A new segment enters the ring when the one after it is read."""
    memory = Memory.empty(1, (1, 4, 1, 1), torch.float32, "cpu")
    following = memory.after([(numbered(0, 4), numbered(0, 4))], torch.tensor([4]))
    assert memory.ring.keys[0].abs().max() == 0
    assert memory.settle().ring.keys[0].abs().max() == 0  # it can be read again and again
    following.settle()
    with pytest.raises(RuntimeError, match="has been overwritten"):
        memory.settle()


@pytest.mark.parametrize("length", [0, 3, 8, 12])
def test_resizing_copies_the_newest(length):
    memory = Memory.empty(1, (1, 8, 1, 1), torch.float32, "cpu")
    memory = memory.after([(numbered(0, 11), numbered(0, 11))], torch.tensor([5]))
    copy = memory.resized(length)
    kept = min(length, 8)
    assert copy.ring.ordered()[0][0].flatten()[length - kept :].tolist() == list(range(11 - kept, 11))
    assert copy.live == min(5, length) and copy.position == 11
    copy.after([(numbered(11, 2), numbered(11, 2))], torch.tensor([7])).settle()
    assert memory.settle().ring.ordered()[0][0].flatten().tolist() == list(range(3, 11))  # untouched


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("M", [0, 3, 8])
def test_a_memory_after_the_first_tokens_is_that_of_reading_no_more(M, n):
    """Whatever else is pending: other drafts, or a document that opens behind them."""
    found = []
    for tokens in (5, n):
        memory = Memory.empty(1, (1, M, 1, 1), torch.float32, "cpu")
        memory = memory.after([(numbered(0, 6), -numbered(0, 6))], torch.tensor([2])).settle()
        later = memory.after([(numbered(6, tokens), -numbered(6, tokens))], torch.tensor([2 + tokens]))
        if tokens == 5:
            later.live = torch.tensor([1])
            later = memory.after_first(n, later)
        (keys,), (values,) = later.settle().ring.ordered()
        found.append((keys.flatten().tolist(), values.flatten().tolist(), later.live.tolist(), later.position))
    assert found[0] == found[1] and found[0][2:] == ([min(2 + n, M)], 6 + n)


@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize("M, live", [(0, 0), (3, 3), (8, 2), (8, 8)])
def test_a_segment_can_be_read_as_if_one_by_one(M, live, kernel):
    """Every query sees what it would see if it was read alone, with the M tokens before it as memory."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 20, 2, 8).unbind()
    tokens = torch.tensor([[5, 6, 7, 0, 8, 9]])
    memory = Memory.empty(1, (1, M, 2, 8), torch.float32, "cpu")
    memory = memory.after([(k[:, :14], v[:, :14])], torch.tensor([live])).settle()
    spans = Spans(tokens, memory, CONFIG, torch.device("cpu"), kernel, one_by_one=True)
    if kernel:
        found = attention.reference(q[:, 14:], k[:, 14:], v[:, 14:], memory.past(0), spans.first, spans.offset)
    else:
        found = spans.attend(q[:, 14:], k[:, 14:], v[:, 14:], memory.past(0))
    for n, at in enumerate(range(14, 20)):
        start = max(at - M, 14 - live, 17 if at >= 17 else 0)  # of its document, which opens at 17
        alone = torch.softmax((q[0, at] * k[0, start : at + 1]).sum(-1) * 8**-0.5, 0)
        torch.testing.assert_close(found[0, n], (alone[..., None] * v[0, start : at + 1]).sum(0))


def documents(rows, length):
    tokens = torch.randint(1, 50, (rows, length))
    tokens[torch.rand(rows, length) < 0.15] = 0
    tokens[0, 0], tokens[-1] = 0, tokens[-1].clamp(min=1)
    return tokens


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("M", [0, 7, 16])
def test_intervals_and_mask_say_the_same(M, cross):
    """`first` and `last` of the kernels, and the mask of PyTorch's attention, over a ring that has turned."""
    torch.manual_seed(M)
    config = ModelConfig(width=16, heads=2, vocab_size=50, document_start=0, cross_documents=cross)
    memory = Memory.empty(1, (3, M, 1, 1), torch.float32, "cpu") if M else None
    if memory:
        memory.position = memory.ring.position = 23
        memory.live = torch.tensor([0, 3, M])
    tokens = documents(3, 12)
    intervals, masked = (Spans(tokens, memory, config, torch.device("cpu"), kernel) for kernel in (True, False))
    q, k, v = torch.randn(3, 3, 12, 2, 8).unbind()
    past = (torch.randn(3, M, 2, 8), torch.randn(3, M, 2, 8)) if M else None
    out = masked.attend(q, k, v, past)
    torch.testing.assert_close(out, attention.reference(q, k, v, past, intervals.first, intervals.offset))
    query = torch.arange(12)
    sees = (M + query >= intervals.first[..., None]) & (query <= query[:, None])  # (B, query, key), of the segment
    assert torch.equal(intervals.last, torch.where(sees, query[:, None], -1).amax(1).int())
    assert torch.equal(intervals.live, masked.live) and intervals.context == masked.context
    assert intervals.context == pytest.approx(masked.mask.sum(-1).float().mean().item())
