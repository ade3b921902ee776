"""FP8 training: gradients of the layers, weights and scales. On a CPU GEMMs are emulated, and kernels are their
definitions (see test_kernels.py)."""

import itertools
import math

import pytest
import torch

import fp8
import kernels
import optim
from model import ModelConfig, RecurrentTransformer


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_this_gpu_passes_the_self_test():
    assert fp8.self_test(torch.device("cuda", 0)) is None


# -------------------------------------------------------------------------------------------------- layers


def build(width=64, **changes):
    torch.manual_seed(0)
    settings = dict(width=width, heads=4, hidden=96, max_depth=3, vocab_size=97, document_start=0, halting="fixed")
    model = RecurrentTransformer(ModelConfig(**settings | changes))
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model


def gradients(gemms=None, steps=2, recompute="none", capacities=(), **changes):
    """Loss and gradients at the second step, when scales have settled."""
    model = build(**changes)
    model.recompute, model.capacities = recompute, capacities
    if gemms is not None:
        model.use_fp8(gemms)
    tokens = torch.randint(1, 97, (2, 25), generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        model.zero_grad()
        out = model(tokens[:, :-1], tokens[:, 1:], model.new_memory(2, 16))
        out.loss.backward()
        if gemms is not None:
            model.scales.update()
    return out.loss.item(), {name: p.grad for name, p in model.named_parameters()}


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


ARMS = [fp8.Gemms(*arms) for arms in itertools.product((False, True), repeat=3)]


@pytest.mark.parametrize("gemms", ARMS, ids=lambda gemms: " ".join("fp8" if on else "-" for on in gemms[:3]))
def test_each_gemm_can_be_in_fp8_or_not(gemms):
    """What is off is exact; what is on is as far off as FP8 rounds, and no further."""
    loss, exact = gradients()
    fp8_loss, rounded = gradients(gemms)
    assert (fp8_loss == loss) is not gemms.forward and abs(fp8_loss - loss) < 0.02
    for name, g in rounded.items():
        assert distance(g, exact[name]) < 0.25, name
    matrix = "recur.0.down.weight"
    assert (distance(rounded[matrix], exact[matrix]) > 0) is any(gemms[:3])
    # the last step's output gradient meets no FP8 in its way but the head's and this GEMM's
    assert torch.equal(rounded["embedding.weight"], exact["embedding.weight"]) is not any(gemms[:3])


@pytest.mark.parametrize("changes", [{}, {"sandwich": True}], ids=["", "sandwich"])
def test_e4m3_rounds_gradients_less(changes):
    runs = (None, fp8.FP8._replace(gradients=kernels.E5M2), fp8.FP8)
    exact, e5m2, e4m3 = (torch.cat([g.flatten() for g in gradients(gemms, **changes)[1].values()]) for gemms in runs)
    assert distance(e4m3, exact) < distance(e5m2, exact) < 0.12


PACKED = {"halting": "act", "halting_bias": 0.5, "max_depth": 5, "capacities": (0.4, 0.7)}


def test_packed_tokens_are_rounded_as_closely():
    """Only scales differ, where a halted token had the largest value of a site."""
    dense = gradients(fp8.FP8, **PACKED | {"capacities": ()})
    packed, exact = gradients(fp8.FP8, **PACKED), gradients(**PACKED)
    assert packed[0] == pytest.approx(dense[0], abs=2e-3)
    errors = [
        distance(torch.cat([g.flatten() for g in run[1].values()]), torch.cat([g.flatten() for g in exact[1].values()]))
        for run in (dense, packed)
    ]
    assert 0 < errors[1] < 1.1 * errors[0]


@pytest.mark.parametrize("gemms", [None, fp8.FP8], ids=["float32", "fp8"])
@pytest.mark.parametrize("recompute", ["mlp", "step"])
@pytest.mark.parametrize(
    "changes",
    [{"halting": "fixed"}, {"halting": "act"}, PACKED, PACKED | {"sandwich": True}],
    ids=["fixed", "act", "packed", "packed, sandwich"],
)
def test_recomputing_changes_nothing(gemms, recompute, changes):
    loss, kept = gradients(gemms, **changes)
    again, recomputed = gradients(gemms, recompute=recompute, **changes)
    assert loss == again and all(torch.equal(kept[name], g) for name, g in recomputed.items())


@pytest.mark.parametrize(
    "recompute, changes",
    [("none", {"halting": "act"}), ("mlp", {"halting": "act"}), ("step", {"halting": "act"}), ("mlp", PACKED),
     ("step", PACKED), ("none", PACKED | {"sandwich": True, "injection": "hyper"})],
)  # fmt: skip
def test_a_compiled_step_is_one_graph_and_the_same(monkeypatch, recompute, changes):
    """Traced as for a GPU, run by PyTorch: no graph breaks, the same loss and gradients. With packing it is two."""
    compiled, original, packed = [], torch.compile, "capacities" in changes

    def compile(function, **options):
        compiled.append(function.__name__)
        return original(function, backend="aot_eager", fullgraph=True, dynamic=False)

    eager, chunk = gradients(fp8.FP8, recompute=recompute, **changes), compile(fp8._chunk)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", compile)
        patch.setattr(fp8, "_compiled_chunk", lambda: chunk)
        patch.setattr(RecurrentTransformer, "use_fp8", lambda self, gemms, use=RecurrentTransformer.use_fp8: (
            use(self, gemms), self.compile()))  # fmt: skip
        loss, grads = gradients(fp8.FP8, recompute=recompute, **changes)
    assert compiled == ["_chunk", *(["begin", "complete"] if packed else ["step"]), "run_block"]
    assert loss == pytest.approx(eager[0], abs=1e-6)
    for name, g in grads.items():
        torch.testing.assert_close(g, eager[1][name], atol=1e-5, rtol=1e-3)


def test_swiglu_gradient_is_autograds():
    wide, grad = torch.randn(5, 14, requires_grad=True, dtype=torch.double), torch.randn(5, 7)
    kernels.swiglu(wide.float()).backward(grad)
    torch.testing.assert_close(kernels.swiglu_gradient(grad, wide).float(), wide.grad.float())


@pytest.mark.parametrize("chunk", [3, 8, 100])
def test_cross_entropy_in_chunks(chunk):
    """Loss, nll and gradients are those of PyTorch's cross-entropy over all rows at once, with any weights."""
    torch.manual_seed(0)
    x, w = torch.randn(20, 16, requires_grad=True), torch.nn.Parameter(torch.randn(128, 16))
    targets, weights = torch.randint(0, 97, (20,)), torch.rand(20)
    padding = torch.where(torch.arange(128) >= 97, -math.inf, 0.0)
    weight = fp8.Weight(w)
    weight.prepare(torch.float32, fp8.BF16)
    loss, nll = fp8.cross_entropy(x, weight, padding, targets, weights, chunk=chunk)
    expected = torch.nn.functional.cross_entropy((x @ w.t())[:, :97], targets, reduction="none")
    torch.testing.assert_close(nll, expected)
    assert not nll.requires_grad
    got = torch.autograd.grad(3 * loss, (x, w))
    torch.testing.assert_close(got, torch.autograd.grad(3 * (weights * expected).sum(), (x, w)))
    assert got[1][97:].abs().max() == 0


# -------------------------------------------------------------------------------------------------- weights, scales


@pytest.mark.parametrize("gemms", [fp8.BF16, fp8.FP8], ids=["bf16", "fp8"])
def test_copies_of_weights_follow_every_optimizer_step(gemms):
    """Fused and compiled updates do not raise version counters by themselves."""
    model = build(halting="act")
    model.compute_dtype = torch.bfloat16
    model.use_fp8(gemms)
    optimizers = optim.build_optimizers(model, optim.OptimConfig(lr=0.1, adamw_lr=0.1))
    tokens = torch.randint(1, 97, (2, 9))
    for _ in range(2):
        model(tokens[:, :-1], tokens[:, 1:]).loss.backward()
        for optimizer in optimizers.values():
            optimizer.step()
    model._prepare(training=True)
    for weight in (model.w_head, model.recur[0].w_qkv, model.recur[0].w_down):
        now = torch.cat(weight.masters)
        if gemms == fp8.BF16:
            assert torch.equal(weight.low, now.bfloat16())
        else:
            assert distance(weight.rounded.float() * weight.inverse, now) < 0.05
            assert torch.equal(weight.rounded_t.float(), weight.rounded.float().t())


def test_weights_are_rounded_once_per_optimizer_step(monkeypatch):
    model, calls = build(), []
    original = fp8.quantize_weight
    monkeypatch.setattr(fp8, "quantize_weight", lambda *arguments: (calls.append(1), original(*arguments)))
    model.use_fp8()
    tokens = torch.randint(1, 97, (2, 9))
    for _ in range(3):  # micro-batches, of three recurrences each
        model(tokens[:, :-1], tokens[:, 1:]).loss.backward()
    assert len(calls) == 8  # seven matrices and the head


def test_evaluation_is_not_in_fp8():
    model, tokens = build(), torch.randint(1, 97, (2, 9))
    with torch.no_grad():
        exact = model(tokens).logits
        model.use_fp8()
        assert torch.equal(model(tokens).logits, exact)


def scales_after(*seen):
    scales = fp8.Scales(uses=1, window=3)
    for amax in seen:
        scales.probe.grad = torch.full_like(scales.probe, amax)
        scales.update()
    return scales


def test_scales_follow_the_largest_of_the_last_steps():
    assert scales_after(4.0).scale[0, 0].item() == 448 / (2 * 4.0)  # the first amax counts at once
    assert scales_after(4.0, 1.0, 1.0).scale[0, 0].item() == 448 / (2 * 4.0)
    assert scales_after(4.0, 1.0, 1.0, 1.0).scale[0, 0].item() == 448 / (2 * 1.0)
    scale = scales_after(4.0).scale
    assert scale[0, 4].item() == 448 / (2 * 4.0)
    torch.testing.assert_close(scale * scales_after(4.0).unscale, torch.ones(1, 8))


def test_before_a_site_was_seen_its_scale_is_a_guess():
    guess = scales_after().scale
    assert guess[0, 0] == 448 / (2 * 64.0) and torch.equal(scales_after(0.0).scale, guess)


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
def test_steps_that_show_nothing_leave_the_scales_alone(bad):
    assert torch.equal(scales_after(4.0, bad).scale, scales_after(4.0).scale)


def test_scales_see_what_the_layers_see():
    """amax of input and output gradient of a layer, by a hook-free second computation."""
    model = build(max_depth=1, step_gains=False, injection="none")
    model.use_fp8()
    tokens = torch.randint(1, 97, (1, 9))
    model(tokens[:, :-1], tokens[:, 1:]).loss.backward()
    first = torch.nn.functional.rms_norm(model.embedding.weight[tokens[:, :-1]], (64,))
    expected = torch.nn.functional.rms_norm(first, (64,)).abs().max()
    torch.testing.assert_close(model.scales.probe.grad[0, 0], expected)
    assert (model.scales.probe.grad > 0).all()
