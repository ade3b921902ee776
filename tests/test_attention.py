"""The Triton kernels against the definition: in float32 in Triton's interpreter (test_interpreter.py), in bfloat16 on a
GPU."""

import os

import pytest
import torch

import attention

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE, DTYPE, TOLERANCE = ("cpu", torch.float32, 1e-5) if INTERPRETED else ("cuda", torch.bfloat16, 0.01)
runs_kernels = pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU")
CASES = {  # B, T, M, H, d
    "no memory": (2, 37, 0, 1, 16),
    "aligned": (2, 32, 64, 1, 32),
    "ragged": (2, 45, 24, 2, 16),
    "memory below a block": (2, 33, 8, 1, 16),
    "one query": (2, 1, 40, 1, 16),
    "default head": (1, 40, 72, 1, 64),
}
BLOCKS = {  # of queries and of keys
    "square": {"forward": (16, 16), "dq": (16, 16), "dkdv": (16, 16)},
    "wide": {"forward": (16, 32), "dq": (16, 32), "dkdv": (32, 16)},
    "tall": {"forward": (32, 16), "dq": (32, 16), "dkdv": (16, 32)},
}


@pytest.fixture
def set_blocks(monkeypatch):
    def patch(blocks):
        monkeypatch.setattr(attention, "CONFIGS", {})
        monkeypatch.setattr(attention, "DEFAULT", {name: (*block, 4, 2) for name, block in blocks.items()})

    return patch


def intervals(B, T, M, mean=12):
    """first and last, (B, T) int32, of random documents. Row 0 has a dead memory, the last row nothing but live one."""
    begins = torch.rand(B, T) < 1 / mean
    begins[0, 0] = True
    if B > 1:
        begins[-1] = False
    start = torch.where(begins, torch.arange(T), -1).cummax(1).values
    live = torch.randint(0, M + 1, (B, 1))
    live[-1] = M
    first = torch.where(start >= 0, M + start, M - live)
    last = torch.full((B, T), T - 1)
    for t in range(T - 2, -1, -1):
        last[:, t] = torch.where(begins[:, t + 1], t, last[:, t + 1])
    return first.int().to(DEVICE), last.int().to(DEVICE)


def inputs(B, T, M, H, d):
    """Arguments of `attention`; q, k and v are slices of one tensor, which comes first."""
    randn = lambda *shape: torch.randn(shape).to(DEVICE, DTYPE)  # noqa: E731
    fused = randn(B, T, 3, H, d).requires_grad_()
    past = (randn(B, M, H, d), randn(B, M, H, d)) if M else None
    offset = torch.randint(0, max(M, 1), (1,), dtype=torch.int32).to(DEVICE)
    return fused, (*fused.unbind(2), past, *intervals(B, T, M), offset)


def definition(fused, past, first, offset, grad):
    """Output and gradient by `reference`, in float32."""
    fused = fused.detach().float().requires_grad_()
    past = past and tuple(x.float() for x in past)
    out = attention.reference(*fused.unbind(2), past, first, offset)
    return out, torch.autograd.grad(out, fused, grad.float())[0]


def distance(a, b):
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def check(function, fused, args):
    q, k, v, past, first, last, offset = args
    out = function(*args)
    grad = torch.randn_like(out)
    actual = out, torch.autograd.grad(out, fused, grad)[0]
    assert out.is_contiguous()
    for a, b in zip(actual, definition(fused, past, first, offset, grad)):
        assert distance(a, b) < TOLERANCE


@runs_kernels
@pytest.mark.parametrize("blocks", ["wide", "tall"])
@pytest.mark.parametrize("case", CASES)
def test_the_kernels_compute_the_definition(set_blocks, case, blocks):
    torch.manual_seed(1)
    set_blocks(BLOCKS[blocks])
    check(attention.attention, *inputs(*CASES[case]))


@runs_kernels
@pytest.mark.parametrize("case", [(2, 150, 40, 1, 16), (1, 130, 260, 1, 128)])
def test_the_real_blocks_fit_any_length(case):
    torch.manual_seed(2)
    check(attention.attention, *inputs(*case))


@runs_kernels
@pytest.mark.parametrize("clean, dirty", [(slice(0, 21), slice(21, 40)), (slice(21, 40), slice(0, 21))])
def test_what_is_not_seen_does_not_count(set_blocks, clean, dirty):
    """Huge keys and values in dead memory and in another document change no bit."""
    torch.manual_seed(3)
    set_blocks(BLOCKS["square"])
    B, T, M, live, start = 2, 40, 40, 13, 21
    fused, (*_, past, _, _, offset) = inputs(B, T, M, 1, 16)
    t = torch.arange(T, device=DEVICE).expand(B, T)
    first = torch.where(t < start, M - live, M + start).int()
    last = torch.where(t < start, start - 1, T - 1).int()
    dead = (torch.arange(M - live, device=DEVICE) + offset) % M
    results = []
    for size in (0, 1e15):
        with torch.no_grad():
            fused[:, dirty, 1:] += size
            for x in past:
                x[:, dead] += size
        out = attention.attention(*fused.unbind(2), past, first, last, offset)
        results.append([x[:, clean] for x in (out, torch.autograd.grad(out.sum(), fused)[0])])
        assert results[-1][0].isfinite().all()
    assert all(torch.equal(a, b) for a, b in zip(*results))


@runs_kernels
def test_no_gradient_reaches_the_memory():
    torch.manual_seed(4)
    fused, (q, k, v, past, first, last, offset) = inputs(2, 20, 24, 1, 16)
    past = tuple(x.requires_grad_() for x in past)
    outputs = attention.attention(q, k, v, past, first, last, offset), attention.reference(q, k, v, past, first, offset)
    for out in outputs:
        grads = torch.autograd.grad(out.sum(), (fused, *past), allow_unused=True)
        assert grads[0] is not None and grads[1] is None and grads[2] is None


@runs_kernels
def test_head_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="head size must be 16, 32, 64 or 128, not 24"):
        attention.attention(*inputs(1, 8, 0, 1, 24)[1])


@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", [(2, 200, 0, 3, 64), (2, 300, 333, 2, 64)])
def test_it_compiles_into_one_graph(case):
    torch.manual_seed(5)

    def function(q, k, v, *rest):
        return attention.attention(1.5 * q, k, 2 * v, *rest) / 3

    fused, args = inputs(*case)
    out = torch.compile(function, fullgraph=True, dynamic=False)(*args)
    grad = torch.randn_like(out)
    q, k, v, past, first, _, offset = (x.float() if torch.is_tensor(x) and x.is_floating_point() else x for x in args)
    expected = attention.reference(1.5 * q, k, 2 * v, tuple(x.float() for x in past or ()), first, offset) / 3
    assert distance(out, expected) < TOLERANCE
    gradients = [torch.autograd.grad(o, fused, grad.to(o.dtype))[0] for o in (out, expected)]
    assert distance(*gradients) < TOLERANCE
