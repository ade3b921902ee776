"""Matrix products with shared weights: FP8 on the tensor cores, or the dtype of the activations.

A tensorwise FP8 product is  (a * s_a -> FP8) @ (b * s_b -> FP8).T / (s_a * s_b),  summed in float32. Tensor cores do it
twice as fast as in bf16; what the GEMM wins, the casts can lose, so this file is about the casts:

- Weights, and their transposes for the backward pass, are rounded once per optimizer step (`Weight`): all recurrences
  and micro-batches share them.
- Activations and gradients are rounded by the kernel that makes them, with a scale for the largest value (amax) seen
  in the last steps ("delayed scaling", Micikevicius et al. 2022, arXiv 2209.05433): no pass over the tensor to find it.
  Every GEMM of a block at every recurrence has its own scales, for its input and its output's gradient (`Scales`).
- Hopper's FP8 GEMM wants the summed dimension contiguous in both operands, so the weight gradient needs both of its
  operands transposed: one read writes both layouts. kernels.py has these, and SwiGLU and its derivative, the widest
  tensors of the model; the rest is left to torch.compile, which fuses the rounding into norms and residuals.

One scale for a whole tensor stands or falls with its largest value, so that of SwiGLU, which has no other bound, is
limited (`kernels.SWIGLU_LIMIT`).

Values use E4M3 (largest 448, 3 bits of mantissa), gradients too, or E5M2 (57344, 2 bits). Each of the three GEMMs of a
layer (forward, gradient of the input, gradient of the weight) can stay in bf16. On a CPU the same code rounds to FP8
and multiplies in float32. The residual stream, norms, injection, halting head and loss are never FP8.
"""

from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F

import attention
import kernels
import packed
from kernels import (
    E4M3,
    E5M2,
    LARGEST,
    NAMESPACE,
    log_sum_exp,
    quantize,
    quantize_transpose,
    quantize_weight,
    softmax_gradient,
    softmax_gradient_quantize,
    swiglu,
    swiglu_gradient,
    swiglu_gradient_quantize,
    swiglu_quantize,
    swiglu_rounded,
    transpose,
    triton,
)

# Hopper's fast accumulation keeps about 14 bits of a sum: not for sums of more terms than this, where it is hardly
# faster either, and where one large term (of a token's own logit) would swallow thousands of small ones.
FAST_TERMS = 2048
SITES = ("qkv", "output", "gate_up", "down")  # the GEMMs of a block


class Gemms(NamedTuple):
    """Which of a layer's three GEMMs run in FP8, and the FP8 dtype of the gradients of blocks. The head's are E5M2:
    the many small probabilities of a softmax need its range."""

    forward: bool = False
    input_grad: bool = False
    weight_grad: bool = False
    gradients: torch.dtype = E4M3


BF16, FP8 = Gemms(), Gemms(True, True, True)


def matmul(a, b, inverse_a=None, inverse_b=None, dtype=None, bias=None):
    """a (m, k) @ b (n, k).T + bias as (m, n) of `dtype`; FP8 operands come with the inverse of their scales. Without
    these, b may be `packed.Packed`, and a have more dimensions."""
    if isinstance(b, packed.Packed):
        return b(a) if bias is None else b(a) + bias
    if inverse_a is None:
        return F.linear(a, b, bias)
    return _scaled_matmul(a, b, inverse_a, inverse_b, dtype, bias)


@torch.library.custom_op(f"{NAMESPACE}::scaled_matmul", mutates_args=())
def _scaled_matmul(
    a: torch.Tensor, b: torch.Tensor, inverse_a: torch.Tensor, inverse_b: torch.Tensor, dtype: torch.dtype,
    bias: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """An operator of our own: torch.compile's lowering of _scaled_mm refuses scales that are views (torch 2.11)."""
    if a.is_cuda:
        fast = a.shape[1] <= FAST_TERMS
        return torch._scaled_mm(a, b.t(), inverse_a, inverse_b, bias=bias, out_dtype=dtype, use_fast_accum=fast)
    product = a.float() @ b.float().t() * (inverse_a * inverse_b)
    return (product if bias is None else product + bias).to(dtype)


@_scaled_matmul.register_fake
def _(a, b, inverse_a, inverse_b, dtype, bias):
    return a.new_empty(a.shape[0], b.shape[0], dtype=dtype)


# ------------------------------------------------------------------------------------------------- weights, scales


class Weight:
    """The matrices of layers that read the same input, stacked: float32 masters and what the GEMMs multiply with.

    low: (m, k) in the dtype of the activations, or `packed.Packed`. rounded, rounded_t: (m, k) and (k, m) in E4M3,
    inverse: of their scale.
    """

    def __init__(self, *masters):
        self.masters = masters
        self.low = self.rounded = self.rounded_t = self.inverse = self.key = None

    @torch.no_grad()
    def prepare(self, dtype, gemms, form=None):
        """Bring the copies up to date, if the masters have changed since: once per optimizer step. form: of
        `packed.FORMATS`, for a CPU without gradient."""
        key = (dtype, gemms, form, *((w.data_ptr(), w._version) for w in self.masters))
        if key == self.key:
            return
        if self.key is None or self.key[:3] != key[:3]:
            self.low = self.rounded = self.rounded_t = self.inverse = None
        first, shape = self.masters[0], (sum(len(w) for w in self.masters), self.masters[0].shape[1])
        if form:
            self.low = packed.Packed(torch.cat([w.detach() for w in self.masters]), form)
        elif not all(gemms[:3]):
            if len(self.masters) == 1 and dtype == first.dtype:
                self.low = first.detach()
            else:
                if self.low is None or self.low.device != first.device:
                    # columns one after another: so MKL reads them nearly twice as fast where there is one token
                    by_column = first.device.type == "cpu" and dtype == torch.float32
                    self.low = first.new_empty(shape[::-1] if by_column else shape, dtype=dtype)
                    self.low = self.low.t() if by_column else self.low
                for part, master in zip(self.low.split([len(w) for w in self.masters]), self.masters):
                    part.copy_(master)
        if any(gemms[:3]):
            if self.rounded is None or self.rounded.device != first.device:
                self.rounded = torch.empty(shape, dtype=E4M3, device=first.device)
                self.rounded_t = torch.empty(shape[::-1], dtype=E4M3, device=first.device)
                self.inverse = torch.empty((), device=first.device)
            amax = torch.stack(torch._foreach_norm(self.masters, float("inf"))).amax().clamp(min=1e-12)
            scale = LARGEST[E4M3] / amax
            start = 0
            for master in self.masters:
                rows = slice(start, start := start + len(master))
                quantize_weight(master.detach(), scale, self.rounded[rows], self.rounded_t[:, rows])
            self.inverse.copy_(1 / scale)
        self.key = key


class Scales:
    """Delayed scales of every use of a block: `uses` x 8, the inputs of the four `SITES`, then their gradients.

    The amax of a site leaves the compiled graph as the "gradient" of `probe`, a tensor of zeros that enters nowhere:
    so it needs neither an output of its own nor a side effect, and micro-batches add up.
    """

    MARGIN = 2.0  # room above the largest value of the last steps; one bit of range, which floating point has to spare
    START = (64.0, 0.001)  # amax of inputs and gradients before any was seen

    def __init__(self, uses, device="cpu", gradients=E4M3, window=16):
        columns = lambda pair: torch.tensor(pair, device=device).repeat_interleave(len(SITES))  # noqa: E731
        self.start, self.largest = columns(self.START), columns([LARGEST[E4M3], LARGEST[gradients]])
        self.history = torch.zeros(window, uses, 2 * len(SITES), device=device)  # newest first; zero: nothing seen
        self.probe = torch.zeros(uses, 2 * len(SITES), device=device, requires_grad=True)
        self._rescale()

    def _rescale(self):
        amax = self.history.amax(0)
        scale = self.largest / (self.MARGIN * torch.where(amax > 0, amax, self.start))
        # cuBLAS wants the address of a scale to be a multiple of 16 bytes: they lie four floats apart
        spread = lambda x: x[..., None].expand(*x.shape, 4).contiguous()[..., 0]  # noqa: E731
        self.scale, self.unscale = spread(scale), spread(1 / scale)

    def load(self, history):
        """Go on with the `history` of a checkpoint."""
        self.history = history.to(self.history.device)
        self._rescale()

    def amax(self):
        """The newest amax of every use of a block, {input or gradient: {site: [use, ...]}}."""
        newest = self.history[0].unflatten(1, (2, -1)).permute(1, 2, 0).tolist()
        return {kind: dict(zip(SITES, columns)) for kind, columns in zip(("input", "gradient"), newest)}

    def of_uses(self):
        """The (scale, unscale, probe) of every use, each (8,)."""
        return list(zip(self.scale.unbind(), self.unscale.unbind(), self.probe.unbind()))

    @torch.no_grad()
    def update(self, micro_batches=1):
        """Take up the amax that the backward passes of an optimizer step left in `probe`. Zeros (of a layer whose
        weights are still zero) and what is not finite (of a step that is skipped) count as not seen."""
        if self.probe.grad is None:
            return
        seen = self.probe.grad / micro_batches
        seen = torch.where(seen.isfinite(), seen, 0.0)
        self.history = torch.cat([seen[None], self.history[:-1]])
        self.probe.grad = None
        self._rescale()


@torch.no_grad()
def self_test(device):
    """Why FP8 does not work on this device, or None: a GEMM, and every kernel, against their definitions. Where kernels
    are wrong with PTX in them and right without, they go without."""
    if device.type != "cuda":
        return None  # emulated
    if (capability := torch.cuda.get_device_capability(device)) < (8, 9):
        return f"FP8 needs compute capability 8.9, this is {capability[0]}.{capability[1]}"
    if triton is None:
        return "Triton is not installed"
    if not kernels.enabled:
        return "its kernels are off"
    for kernels.assembly in (True, False):
        if (reason := _wrong(_rounding_cases(device))) is None:
            return None
    return reason


def self_test_plain(device, dtype, d):
    """Which kernel that training without FP8 has, too, is wrong on this device with a head size of d, or None."""
    if device.type != "cuda" or triton is None:
        return None
    used = 2 if dtype == torch.float32 else 5 if attention.available(device, d) else 3
    return _wrong(_plain_cases(device, dtype, d)[:used])


def _wrong(cases):
    """Which of the (name, function) is wrong, and by how much, or what it raised; None: all are right. A function
    returns tensors: by the kernels, and, without `kernels.enabled`, by their definitions."""
    for name, function in cases:
        try:
            found, kernels.enabled = function(), False
            for result, expected in zip(found, function()):
                error = ((result.float() - expected.float()).norm() / expected.float().norm()).item()
                if not error < 0.05:
                    return f"the {name} is off by {error:.2g}"
        except Exception as error:  # of the driver, cuBLAS or the compiler: whatever it is, PyTorch's own remains
            return f"the {name} raised {type(error).__name__}: {(str(error) or '?').splitlines()[0]}"
        finally:
            kernels.enabled = True
    return None


def _rounding_cases(device):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 512, generator=generator).to(device) for _ in "ab")
    a8, b8, one, targets = a.to(E4M3), b.to(E4M3), torch.ones((), device=device), torch.arange(256, device=device)
    wide, grad = a.bfloat16(), b[:, :256].bfloat16().contiguous()
    holes, lse, weights = wide.masked_fill(a > 1, torch.nan), a.logsumexp(-1), torch.ones(256, device=device)
    rounded, rounded_t = a8.clone(), a8.t().clone(memory_format=torch.contiguous_format)

    def product():
        return [matmul(a8, b8, one, one, torch.bfloat16) if kernels.enabled else a8.float() @ b8.float().t()]

    def round_weights():
        quantize_weight(b, one, rounded, rounded_t)
        return rounded.clone(), rounded_t.clone()

    return (
        ("GEMM", product),
        ("rounding of weights", round_weights),
        ("rounding of gradients", lambda: quantize_transpose(wide, one)),
        ("rounding of NaN", lambda: [quantize_transpose(holes, one, dtype)[0].float().isnan() for dtype in LARGEST]),
        ("SwiGLU", lambda: swiglu_quantize(wide, one)),
        ("SwiGLU gradient", lambda: swiglu_gradient_quantize(grad, wide, one, one)),
        ("log-sum-exp", lambda: [log_sum_exp(wide)]),
        ("softmax gradient", lambda: softmax_gradient_quantize(wide, lse, targets, weights, one)),
        ("transposition", lambda: [transpose(a8)]),
    )


def _plain_cases(device, dtype, d, B=2, T=150, M=100, H=2, start=70):
    """In the second row a document opens at `start`, and its memory is dead."""
    generator = torch.Generator().manual_seed(0)
    random = lambda *shape: torch.randn(shape, generator=generator).to(device, dtype)  # noqa: E731
    qkv, direction, *past = random(B, T, 3, H, d), random(B, T, H, d), random(B, M, H, d), random(B, M, H, d)
    wide = qkv.bfloat16().flatten(2).flatten(0, 1)
    frozen, active = [random(B, T, H, d) for _ in "kv"], torch.rand(B, T, generator=generator).to(device) < 0.5
    rope = (angle := torch.rand(T, 1, d // 2, generator=generator).to(device)).cos(), angle.sin()
    later, row = torch.arange(T) >= start, torch.tensor([[0], [1]])
    first = (row * (M + start * later)).int().to(device)
    last = (T - 1 - row * (T - start) * ~later).int().to(device)
    offset = torch.tensor([M // 3], dtype=torch.int32, device=device)

    def attend(q, k, v):
        if kernels.enabled:
            return [attention.attention(q, k, v, past, first, last, offset)]
        return [attention.reference(q, k, v, past, first, offset)]

    @torch.enable_grad()
    def gradients(function, *inputs):
        inputs = [x.detach().requires_grad_() for x in inputs]
        results = function(*inputs)
        return torch.autograd.grad(results, inputs, [direction] * len(results))

    heads = lambda qkv, *frozen: kernels.heads(qkv, rope, *((frozen, active) if frozen else ()))  # noqa: E731
    return (
        ("heads", lambda: heads(qkv) + heads(qkv, *frozen)),
        ("gradient of the heads", lambda: gradients(heads, qkv) + gradients(heads, qkv, *frozen)),
        ("SwiGLU of evaluation", lambda: [kernels.swiglu_rounded(wide)]),
        ("attention", lambda: attend(*qkv.unbind(2))),
        ("gradient of the attention", lambda: gradients(attend, *qkv.unbind(2))),
    )


# ------------------------------------------------------------------------------------------------- layers


def linear(x, weight, gemms=BF16, scales=None, site=0):
    """x (..., k) through `weight`, (m, k): (..., m). scales: (scale, unscale, probe) of this use of the block."""
    if gemms == BF16 and not torch.is_grad_enabled():
        return matmul(x, weight.low)
    scales = (s[site :: len(SITES)] for s in scales) if scales else (None,) * 3
    copies = weight.low, weight.rounded, weight.rounded_t, weight.inverse
    y = _Linear.apply(x.flatten(0, -2), *copies, *scales, gemms, *weight.masters)
    return y.unflatten(0, x.shape[:-1])


def mlp(x, gate_up, down, gemms=BF16, scales=None):
    """SwiGLU of x (..., D): down(silu(gate x) * up x), the two matrices of `gate_up` one product (Shazeer 2020, arXiv
    2002.05202). The backward pass keeps gate x and up x and recomputes their product."""
    if gemms == BF16 and not torch.is_grad_enabled():
        wide = matmul(x, gate_up.low)
        return matmul(swiglu_rounded(wide.flatten(0, -2)).unflatten(0, x.shape[:-1]), down.low)
    scales = (s.unflatten(0, (2, -1))[:, 2:] for s in scales) if scales else (None,) * 3
    copies = [c for w in (gate_up, down) for c in (w.low, w.rounded, w.rounded_t, w.inverse)]
    y = _Mlp.apply(x.flatten(0, -2), *copies, *scales, gemms, *gate_up.masters, *down.masters)
    return y.unflatten(0, x.shape[:-1])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, low, rounded, rounded_t, inverse, scale, unscale, probe, gemms, *masters):
        amax = x8 = None
        if gemms.forward or gemms.weight_grad:
            x8, amax = quantize(x, scale[0], E4M3)
        ctx.gemms, ctx.rows = gemms, [len(w) for w in masters]
        kept = x8 if gemms.weight_grad else x
        ctx.save_for_backward(kept, low, rounded_t, inverse, scale, unscale, amax)
        return matmul(x8, rounded, unscale[0], inverse, x.dtype) if gemms.forward else matmul(x, low)

    @staticmethod
    def backward(ctx, grad):
        x, low, rounded_t, inverse, scale, unscale, amax = ctx.saved_tensors
        gemms, seen, g8 = ctx.gemms, None, None
        if gemms.input_grad or gemms.weight_grad:
            g8, g8_t, g_amax = quantize_transpose(grad, scale[1], gemms.gradients)
            seen = torch.stack([g_amax if amax is None else amax, g_amax])
        if gemms.input_grad:
            dx = matmul(g8, rounded_t, unscale[1], inverse, grad.dtype)
        else:
            dx = matmul(grad, low.t())
        if gemms.weight_grad:
            dw = matmul(g8_t, transpose(x), unscale[1], unscale[0], torch.float32)
        else:
            dw = matmul(grad.t(), x.t()).float()
        return dx, *(None,) * 6, seen, None, *dw.split(ctx.rows)


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x, low1, rounded1, rounded1_t, inverse1, low2, rounded2, rounded2_t, inverse2, scale, unscale, probe,
        gemms, *masters,
    ):  # fmt: skip
        """1: gate and up, 2: down; scale[0] of their inputs, scale[1] of their gradients."""
        x8 = amax = None
        if gemms.forward or gemms.weight_grad:
            x8, amax1 = quantize(x, scale[0, 0], E4M3)
        wide = matmul(x8, rounded1, unscale[0, 0], inverse1, x.dtype) if gemms.forward else matmul(x, low1)
        if gemms.forward:
            product, amax2 = swiglu_quantize(wide, scale[0, 1])
            y = matmul(product, rounded2, unscale[0, 1], inverse2, x.dtype)
        else:
            product = swiglu(wide)
            amax2 = product.abs().amax(-1).amax()
            y = matmul(product.to(x.dtype), low2)
        if any(gemms[:3]):
            amax = torch.stack([amax1 if x8 is not None else amax2, amax2])
        ctx.gemms, ctx.rows = gemms, [len(w) for w in masters]
        kept = x8 if gemms.weight_grad else x
        ctx.save_for_backward(kept, wide, low1, rounded1_t, inverse1, low2, rounded2_t, inverse2, scale, unscale, amax)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, wide, low1, rounded1_t, inverse1, low2, rounded2_t, inverse2, scale, unscale, amax = ctx.saved_tensors
        gemms, seen = ctx.gemms, None
        rounding = gemms.input_grad or gemms.weight_grad
        if rounding:
            g8, g8_t, g_amax = quantize_transpose(grad, scale[1, 1], gemms.gradients)
        if gemms.input_grad:
            d_product = matmul(g8, rounded2_t, unscale[1, 1], inverse2, grad.dtype)
        else:
            d_product = matmul(grad, low2.t())
        d_wide = product = None
        if not all(gemms[:3]):
            product = swiglu(wide).to(grad.dtype)
            d_wide = swiglu_gradient(d_product.float(), wide).to(grad.dtype)
        if rounding:
            d8, d8_t, product8_t, d_amax = swiglu_gradient_quantize(
                d_product, wide, scale[0, 1], scale[1, 0], gemms.gradients
            )
            seen = torch.stack([torch.zeros_like(scale[1]) if amax is None else amax, torch.stack([d_amax, g_amax])])
        if gemms.input_grad:
            dx = matmul(d8, rounded1_t, unscale[1, 0], inverse1, grad.dtype)
        else:
            dx = matmul(d_wide, low1.t())
        if gemms.weight_grad:
            dw1 = matmul(d8_t, transpose(x), unscale[1, 0], unscale[0, 0], torch.float32)
            dw2 = matmul(g8_t, product8_t, unscale[1, 1], unscale[0, 1], torch.float32)
        else:
            dw1 = matmul(d_wide.t(), x.t()).float()
            dw2 = matmul(grad.t(), product.t()).float()
        return dx, *(None,) * 10, seen, None, *dw1.split(ctx.rows[:-1]), dw2


# ------------------------------------------------------------------------------------------------- tied head


def cross_entropy(x, weight, padding, targets, weights, gemms=BF16, chunk=4096, compiled=False):
    """sum(weights * nll), and nll (m,) float32 in nats without gradient, of logits = x @ weight.T + padding.

    x: (m, D), normalised, so that no element exceeds sqrt(D). The logits exist for `chunk` rows at a time: the forward
    pass of a chunk also makes its gradients, which the backward pass only scales (as Liger Kernel does, Hsu et al.
    2024, arXiv 2410.10989).
    """
    copies = weight.low, weight.rounded, weight.rounded_t, weight.inverse
    (master,) = weight.masters
    return _CrossEntropy.apply(
        x, *copies, padding.to(x.dtype), targets, weights, gemms, chunk, compiled, torch.is_grad_enabled(), master
    )


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x, low, rounded, rounded_t, inverse, padding, targets, weights, gemms, chunk, compiled, with_grad, master
    ):  # fmt: skip
        nll = x.new_empty(len(x), dtype=torch.float32)
        dx = torch.empty_like(x) if with_grad else None
        dw = torch.zeros_like(master) if with_grad else None
        for start in range(0, len(x), chunk):
            rows = slice(start, start + chunk)
            of_chunk = [None if part is None else part[rows] for part in (x, targets, weights, nll, dx)]
            (_compiled_chunk() if compiled else _chunk)(*of_chunk, dw, low, rounded, rounded_t, inverse, padding, gemms)
        ctx.save_for_backward(dx, dw)
        ctx.mark_non_differentiable(nll)
        return (weights * nll).sum(), nll

    @staticmethod
    def backward(ctx, grad, _):
        dx, dw = ctx.saved_tensors
        return dx * grad.to(dx.dtype), *(None,) * 11, dw.mul_(grad)


def _chunk(x, targets, weights, nll, dx, dw, low, rounded, rounded_t, inverse, padding, gemms):
    """The cross-entropy of some rows, into nll, dx and dw."""
    scale = LARGEST[E4M3] / x.shape[1] ** 0.5  # of a normalised vector: no amax needed
    unscale = torch.full((), 1 / scale, device=x.device)
    x8 = (x.float() * scale).clamp(-448.0, 448.0).to(E4M3) if gemms.forward or gemms.weight_grad else None
    if gemms.forward:
        logits = matmul(x8, rounded, unscale, inverse, x.dtype, padding)
    else:
        logits = matmul(x, low, bias=padding)
    lse = log_sum_exp(logits)
    nll.copy_(lse - logits.gather(1, targets[:, None])[:, 0].float())
    if dx is None:
        return
    if gemms.input_grad or gemms.weight_grad:
        g_scale = LARGEST[E5M2] / weights.abs().amax().clamp(min=1e-30)  # probabilities are at most 1
        g8, g8_t = softmax_gradient_quantize(logits, lse, targets, weights, g_scale)
    if not (gemms.input_grad and gemms.weight_grad):
        grad = softmax_gradient(logits, lse, targets, weights).to(x.dtype)
    if gemms.input_grad:
        dx.copy_(matmul(g8, rounded_t, 1 / g_scale, inverse, x.dtype))
    else:
        dx.copy_(matmul(grad, low.t()))
    if gemms.weight_grad:
        dw.add_(matmul(g8_t, transpose(x8), 1 / g_scale, unscale, x.dtype))
    else:
        dw.add_(matmul(grad.t(), x.t()))


@cache
def _compiled_chunk():
    """`_chunk` compiled, once it is needed: torch.compile loads the compiler, which is half of the start on a CPU."""
    return torch.compile(_chunk, dynamic=False)
