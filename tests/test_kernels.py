"""FP8 kernels against their definitions, on a GPU or in Triton's interpreter (test_interpreter.py)."""

import math
import os

import numpy as np
import pytest
import torch

import attention
import fp8
import kernels

triton = pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
runs_kernels = pytest.mark.skipif(not INTERPRETED and DEVICE == "cpu", reason="needs a GPU")


@pytest.fixture
def both(monkeypatch):
    """Results of a function with the kernels and with their definitions."""

    def run(function, *arguments):
        fast = function(*arguments)
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "on_kernels", lambda x: False)
            return fast, function(*arguments)

    return run


def same(fast, definition):
    """FP8 tensors may differ by one step of the format, in few elements: exponentials round differently."""
    assert fast.dtype == definition.dtype and fast.shape == definition.shape
    fast, definition = fast.float(), definition.float()
    assert (fast != definition).sum() <= max(2, 0.01 * fast.numel())
    torch.testing.assert_close(fast, definition, rtol=0.26, atol=0.01 * definition.abs().max().item())


@runs_kernels
@pytest.mark.parametrize("shape", [(64, 128), (70, 50), (1, 33)])
def test_kernels_equal_their_definitions(both, shape):
    torch.manual_seed(0)
    m, n = shape
    scalar = lambda x: torch.tensor(x, device=DEVICE)  # noqa: E731
    wide = 2 * torch.randn(m, 2 * n, device=DEVICE, dtype=torch.bfloat16)
    wide[0] *= 40  # many products are beyond the limit
    grad = 1e-5 * torch.randn(m, n, device=DEVICE, dtype=torch.bfloat16)
    targets, weights = torch.randint(0, n, (m,), device=DEVICE), torch.rand(m, device=DEVICE)
    lse = torch.logsumexp(wide[:, :n].float(), 1)
    for function, *arguments in (
        (kernels.swiglu_quantize, wide, scalar(20.0)),
        (kernels.swiglu_rounded, wide),
        (kernels.swiglu_gradient_quantize, grad, wide, scalar(20.0), scalar(1e8)),
        (kernels.swiglu_gradient_quantize, grad, wide, scalar(20.0), scalar(1e6), kernels.E4M3),
        (kernels.quantize_transpose, grad, scalar(1e8)),
        (kernels.softmax_gradient_quantize, wide[:, :n].contiguous(), lse, targets, weights, scalar(57344.0)),
    ):
        for fast, definition in zip(*both(function, *arguments)):
            same(fast, definition) if fast.dtype.itemsize == 1 else torch.testing.assert_close(fast, definition)
    torch.testing.assert_close(*both(kernels.log_sum_exp, wide))
    same(*both(kernels.transpose, wide.to(kernels.E4M3)))


@runs_kernels
@pytest.mark.parametrize("freeze", [True, False])
def test_heads_and_their_gradients_equal_their_definition(both, freeze):
    torch.manual_seed(0)
    B, T, H, d = 2, 7, 5, 16
    qkv = torch.randn(B, T, 3, H, d, device=DEVICE, requires_grad=True)
    frozen = tuple(torch.randn(B, T, H, d, device=DEVICE, requires_grad=True) for _ in "kv")
    active = torch.rand(B, T, device=DEVICE) < 0.5
    angle = torch.rand(T, 1, d // 2, device=DEVICE)
    directions = torch.randn(3, B, T, H, d, device=DEVICE)

    def run():
        out = kernels.heads(qkv, (angle.cos(), angle.sin()), *((frozen, active) if freeze else ()))
        inputs = [qkv, *frozen] if freeze else [qkv]
        return *out, *torch.autograd.grad(sum((x * y).sum() for x, y in zip(out, directions)), inputs)

    for fast, definition in zip(*both(run)):
        torch.testing.assert_close(fast, definition, rtol=1e-5, atol=1e-6)


@runs_kernels
def test_every_fp8_number_survives_rounding_by_hand():
    """Over the whole range, subnormal numbers and ties included."""
    for dtype, largest in kernels.LARGEST.items():
        numbers = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(dtype).float()
        numbers = numbers[numbers.abs() <= largest].sort().values
        between = torch.lerp(numbers[:-1], numbers[1:], torch.linspace(0, 1, 9, device=DEVICE)[:, None])
        result = kernels.quantize_transpose(between, torch.ones((), device=DEVICE), dtype)
        assert torch.equal(result[0].float(), between.to(dtype).float())
        assert torch.equal(result[1].float(), result[0].float().t())


FAULTS = {  # the operator of a kernel, and what the self-test calls it
    (fp8, "matmul"): "GEMM",
    (kernels, "_quantize_transpose"): "rounding of gradients",
    (kernels, "_swiglu_quantize"): "SwiGLU",
    (kernels, "_swiglu_gradient_quantize"): "SwiGLU gradient",
    (kernels, "_log_sum_exp"): "log-sum-exp",
    (kernels, "_softmax_gradient_quantize"): "softmax gradient",
    (kernels, "_transpose"): "transposition",
    (kernels, "_swiglu_rounded"): "SwiGLU of evaluation",
    (kernels, "_heads"): "heads",
    (kernels, "_heads_gradient"): "gradient of the heads",
    (attention, "_forward"): "attention",
    (attention, "_backward"): "gradient of the attention",
}


@runs_kernels
def test_the_self_test_names_the_kernel_that_is_wrong(monkeypatch):
    device, dtype = torch.device(DEVICE), torch.float32 if INTERPRETED else torch.bfloat16
    cases = *fp8._rounding_cases(device), *fp8._plain_cases(device, dtype, 16, T=40, M=24, start=17)
    assert fp8._wrong(cases) is None and kernels.enabled
    for (module, operator), name in FAULTS.items():
        case, right = [case for case in cases if case[0] == name], getattr(module, operator)

        def off(*arguments, right=right):
            results = right(*arguments)
            return 1.5 * results.float() if torch.is_tensor(results) else tuple(1.5 * x.float() for x in results)

        with monkeypatch.context() as patch:
            patch.setattr(module, operator, off)
            assert fp8._wrong(case) == f"the {name} is off by 0.5"
            patch.setattr(module, operator, None)
            assert fp8._wrong(case).startswith(f"the {name} raised TypeError: 'NoneType'") and kernels.enabled


def run_ptx(program, *inputs):
    """What straight-line PTX leaves in $0; inputs: $1, $2, ..., arrays of 32-bit registers."""
    registers = {f"${i}": x for i, x in enumerate(inputs, 1)}
    value = lambda name: registers[name] if name in registers else np.uint32(int(name, 0))  # noqa: E731
    halves = lambda f: lambda a, b: f(a.view(np.float16), np.full_like(a, b).view(np.float16)).view(np.uint32)  # noqa: E731

    def permute(a, b, selector):
        picked = np.stack([a, b], -1).view(np.uint8)[:, [selector >> 4 * i & 7 for i in range(4)]]
        return np.ascontiguousarray(picked).view(np.uint32)[:, 0]

    smaller = lambda a, b: np.copysign(np.fmin(abs(a), abs(b)), a)  # noqa: E731
    isnan = lambda a, b: np.where(np.isnan(a) | np.isnan(b), 0xFFFF, 0).astype(np.uint16)  # noqa: E731
    operations = {
        "mov.b32": lambda a: a, "min.xorsign.abs.f16x2": halves(smaller), "set.nan.u32.f16x2": halves(isnan),
        "add.u32": np.add, "and.b32": np.bitwise_and, "or.b32": np.bitwise_or, "shl.b32": np.left_shift,
        "shr.b32": np.right_shift, "prmt.b32": permute,
    }  # fmt: skip
    for statement in program.strip("{} \n").split(";"):
        if statement.strip() and not statement.strip().startswith(".reg"):
            operation, result, *names = statement.replace(",", " ").split()
            registers[result] = operations[operation](*map(value, names))
    return registers["$0"]


def test_an_outlier_of_swiglu_leaves_other_tokens_legible():
    """Unlimited, its amax of 270,000 would leave a scale at which all others round to zero."""
    torch.manual_seed(0)
    wide = torch.randn(64, 2, 32, device=DEVICE)
    wide[0, :, 0] = 520
    exact, one = kernels.swiglu(wide.flatten(1)), torch.ones((), device=DEVICE)
    scale = kernels.LARGEST[kernels.E4M3] / (fp8.Scales.MARGIN * kernels.swiglu_quantize(wide.flatten(1), one)[1])
    rounded = kernels.swiglu_quantize(wide.flatten(1), scale)[0].float() / scale
    assert exact.max() == kernels.SWIGLU_LIMIT
    torch.testing.assert_close(rounded, exact, rtol=0.07, atol=0.005)


def test_the_gradient_of_swiglu_is_that_of_autograd():
    """Zero beyond the limit."""
    torch.manual_seed(0)
    wide = (40 * torch.randn(16, 64)).requires_grad_()
    product, grad = kernels.swiglu(wide), torch.randn(16, 32)
    beyond = product.detach().abs() == kernels.SWIGLU_LIMIT
    assert beyond.any() and not beyond.all()
    result = kernels.swiglu_gradient(grad, wide.detach())
    torch.testing.assert_close(result, torch.autograd.grad(product, wide, grad)[0])
    assert not result.view(16, 2, 32)[beyond[:, None].expand(-1, 2, -1)].any()


@pytest.mark.skipif(INTERPRETED, reason="has no PTX")
@pytest.mark.parametrize("dtype, program", [(kernels.E5M2, "TO_E5M2"), (kernels.E4M3, "TO_E4M3")])
def test_the_ptx_rounds_every_float16(dtype, program):
    numbers = np.arange(2**16, dtype=np.uint16)
    numbers = np.resize(np.random.default_rng(0).permutation(numbers), (-(-len(numbers) // 4), 4))
    rounded = run_ptx(getattr(kernels, program).value, *np.ascontiguousarray(numbers).view(np.uint32).T.copy())
    rounded = torch.from_numpy(rounded.view(np.uint8).copy()).view(dtype).float()
    values = torch.from_numpy(numbers.ravel().view(np.float16)).float() * (256 if dtype == kernels.E4M3 else 1)
    largest = kernels.LARGEST[dtype]
    expected = values.clamp(-largest, largest).to(dtype).float()
    torch.testing.assert_close(rounded, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.skipif(INTERPRETED, reason="compiles nothing")
@pytest.mark.parametrize("capability", [89, 120])
def test_kernels_compile_for_other_gpus(capability):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    low, half, full = "*fp8e4nv", "*bf16", "*fp32"
    heads = dict(FREEZE=True, HALF=32, BLOCK=64)
    for kernel, types, constants in (
        (kernels._swiglu_gradient_kernel, [half, half, full, full, low, low, low, full], dict(BLOCK_M=64, BLOCK_N=64)),
        (kernels._swiglu_kernel, [half, full, low, full], dict(BLOCK_M=4, BLOCK_N=1024)),
        (kernels._swiglu_rounded_kernel, [half, half], dict(BLOCK_M=4, BLOCK_N=1024)),
        (kernels._quantize_transpose_kernel, [half, full, low, low, full], dict(BLOCK=64)),
        (kernels._softmax_gradient_kernel, [half, full, "*i64", full, low, low], dict(BLOCK_M=64, BLOCK_N=64)),
        (kernels._quantize_weight_kernel, [full, full, low, low], dict(BLOCK=64)),
        (kernels._heads_kernel, [half, full, full, half, half, "*i1", *[half] * 3], heads),
        (kernels._heads_gradient_kernel, [half, full, full, "*i1", *[half] * 6], heads),
    ):
        constants |= {"ASSEMBLY": True} if "ASSEMBLY" in kernel.arg_names else {}
        constants |= {"E4M3": True} if "E4M3" in kernel.arg_names else {}
        sizes = len(kernel.arg_names) - len(types) - len(constants)  # which stand between pointers and constants
        types += ["i32"] * sizes + ["constexpr"] * len(constants)
        source = ASTSource(kernel, dict(zip(kernel.arg_names, types)), constants)
        assert triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]


@runs_kernels
def test_values_beyond_the_range_saturate(both):
    x = torch.tensor([[1e6, -1e6, 3.0, 0.0]], device=DEVICE)
    for fast, definition in zip(*both(kernels.quantize_transpose, x, torch.ones((), device=DEVICE))):
        assert torch.equal(fast.float(), definition.float()) and fast.float().abs().max() <= 1e6
    assert fast == 1e6  # amax: of x itself


@runs_kernels
def test_nan_is_kept_and_infinity_saturates(both):
    """Or a step whose gradients are NaN would seem sound. The amax of a kernel is that of all else."""
    torch.manual_seed(0)
    wide, grad = torch.randn(64, 2, 96, device=DEVICE), torch.randn(64, 96, device=DEVICE)
    wide[1, 0, 2] = wide[33, 1, 5] = grad[7, 70] = -math.nan
    wide[2, 0, 3] = wide[34, 1, 6] = grad[8, 71] = math.inf
    grad[9, 72] = math.nan
    wide, one, targets = wide.flatten(1), torch.ones((), device=DEVICE), torch.arange(64, device=DEVICE)
    for function, *arguments in (
        (kernels.swiglu_quantize, wide, one),
        (lambda x: (kernels.swiglu_rounded(x),), wide.bfloat16()),
        *((kernels.swiglu_gradient_quantize, grad, wide, one, one, dtype) for dtype in kernels.LARGEST),
        *((kernels.quantize_transpose, grad, one, dtype) for dtype in kernels.LARGEST),
        (kernels.softmax_gradient_quantize, grad.clamp(-9, 9), torch.ones_like(grad[:, 0]), targets, grad[:, 0], one),
    ):
        for fast, definition in zip(*both(function, *arguments)):
            if fast.dim():
                torch.testing.assert_close(fast.float(), definition.float(), equal_nan=True, rtol=0.26, atol=0.01)
                assert fast.float().isnan().any()
    for dtype in kernels.LARGEST:
        x = torch.tensor([[math.nan, 3.0, math.inf, -math.inf]], device=DEVICE)
        rounded = kernels.quantize_transpose(x, one, dtype)[0][0].tolist()
        assert math.isnan(rounded[0]) and rounded[1:] == [3.0, kernels.LARGEST[dtype], -kernels.LARGEST[dtype]]
    out, out_t = (torch.empty(shape, dtype=kernels.E4M3, device=DEVICE) for shape in ((64, 96), (96, 64)))
    kernels.quantize_weight(grad, one, out, out_t)
    assert torch.equal(out.float().isnan(), grad.isnan()) and torch.equal(out_t.float().isnan(), grad.t().isnan())


@runs_kernels
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("backward", [False, True])
def test_what_is_not_finite_shows_in_gradient_or_amax(backward, bad):
    """Of a layer in FP8; train.py skips such steps. The scales stay finite."""
    torch.manual_seed(0)
    weight = fp8.Weight(torch.nn.Parameter(torch.randn(32, 32, device=DEVICE)))
    weight.prepare(torch.bfloat16, fp8.FP8)
    scales, x = fp8.Scales(1, DEVICE), torch.randn(2, 16, 32, device=DEVICE, dtype=torch.bfloat16)
    x, grad = x.unbind()
    (grad if backward else x)[3, 5] = bad
    y = fp8.linear(x, weight, fp8.FP8, scales.of_uses()[0])
    y.backward(grad)
    assert math.isnan(bad) is not (weight.masters[0].grad.isfinite().all() and y.isfinite().all()).item()
    assert math.isnan(bad) or scales.probe.grad.isinf().any()
    scales.update()
    assert scales.scale.isfinite().all() and (scales.scale > 0).all()
