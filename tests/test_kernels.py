"""FP8 kernels against their definitions, on a GPU or in Triton's interpreter, in a process of its own."""

import os

import pytest
import torch

import kernels

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
runs_kernels = pytest.mark.skipif(not INTERPRETED and DEVICE == "cpu", reason="needs a GPU")


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_in_the_interpreter(interpret):
    interpret(__file__)


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
    grad = 1e-5 * torch.randn(m, n, device=DEVICE, dtype=torch.bfloat16)
    targets, weights = torch.randint(0, n, (m,), device=DEVICE), torch.rand(m, device=DEVICE)
    lse = torch.logsumexp(wide[:, :n].float(), 1)
    for function, *arguments in (
        (kernels.swiglu_quantize, wide, scalar(20.0)),
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
def test_every_fp8_number_survives_rounding_by_hand():
    """Over the whole range, subnormal numbers and ties included."""
    for dtype, largest in kernels.LARGEST.items():
        numbers = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(dtype).float()
        numbers = numbers[numbers.abs() <= largest].sort().values
        between = torch.lerp(numbers[:-1], numbers[1:], torch.linspace(0, 1, 9, device=DEVICE)[:, None])
        result = kernels.quantize_transpose(between, torch.ones((), device=DEVICE), dtype)
        assert torch.equal(result[0].float(), between.to(dtype).float())
        assert torch.equal(result[1].float(), result[0].float().t())


@runs_kernels
def test_values_beyond_the_range_saturate(both):
    x = torch.tensor([[1e6, -1e6, 3.0, 0.0]], device=DEVICE)
    for fast, definition in zip(*both(kernels.quantize_transpose, x, torch.ones((), device=DEVICE))):
        assert torch.equal(fast.float(), definition.float()) and fast.float().abs().max() <= 1e6
    assert fast == 1e6  # amax: of x itself
