"""Muon against PyTorch's, and the schedule."""

import copy

import pytest
import torch

import optim
from model import ModelConfig, RecurrentTransformer


def test_muon_is_pytorchs(monkeypatch):
    """Which is in bfloat16 on every device."""
    orthogonalize = optim.orthogonalize
    monkeypatch.setattr(optim, "orthogonalize", lambda x: orthogonalize(x.bfloat16()))
    torch.manual_seed(0)
    shapes = ((32, 32), (96, 32), (32, 96), (32, 32), (96, 32))
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    settings = dict(lr=0.02, weight_decay=0.1, momentum=0.9)
    muon = optim.Muon(ours, **settings)
    reference = torch.optim.Muon(theirs, **settings, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for p, q in zip(ours, theirs):
            p.grad = q.grad = torch.randn_like(p)
        muon.step()
        reference.step()
        for p, q in zip(ours, theirs):
            torch.testing.assert_close(p, q, atol=1e-6, rtol=0)


@pytest.mark.parametrize("columns", [60, 240])
def test_orthogonalized_matrices_have_singular_values_near_one(columns):
    x = torch.randn(3, 24, columns, generator=torch.Generator().manual_seed(0)).bfloat16()
    values = torch.linalg.svdvals(optim.orthogonalize(x).float())
    assert values.min() > 0.6 and values.max() < 1.3


@pytest.mark.parametrize("decades", [1, 2, 4])
def test_a_wide_matrix_is_orthogonalized_by_its_gram_matrix(decades):
    """Singular values over some decades: exactly what five steps on the matrix give, and in bfloat16 nearly that."""
    torch.manual_seed(0)
    left, right = torch.linalg.qr(torch.randn(48, 48))[0], torch.linalg.qr(torch.randn(384, 48))[0]
    x, (a, b, c) = ((left * torch.logspace(0, -decades, 48)) @ right.mT)[None], (3.4445, -4.7750, 2.0315)

    def by_the_matrix(x):
        x = x / x.norm()
        for _ in range(5):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x

    expected = by_the_matrix(x.double())
    torch.testing.assert_close(optim.orthogonalize(x.double()), expected)
    off, allowed = ((f(x.bfloat16()) - expected).norm() for f in (optim.orthogonalize, by_the_matrix))
    assert off < allowed + 0.05 * expected.norm()


@pytest.mark.parametrize("share", [True, False])
def test_every_parameter_has_one_optimizer(share):
    model = RecurrentTransformer(
        ModelConfig(width=16, heads=2, hidden=24, max_depth=2, share=share, vocab_size=50, document_start=0)
    )
    optimizers = optim.build_optimizers(model, optim.OptimConfig())
    trained = {name: [p for group in o.param_groups for p in group["params"]] for name, o in optimizers.items()}
    assert sorted(map(id, trained["muon"] + trained["adamw"])) == sorted(map(id, model.parameters()))
    assert {id(p) for p in trained["muon"]} == {id(p) for p in model.recur.parameters()}


@pytest.mark.parametrize("sandwich", [False, True])
def test_muon_gets_the_matrices_of_the_blocks_and_adamw_the_rest(sandwich):
    model = RecurrentTransformer(
        ModelConfig(width=16, heads=2, hidden=24, sandwich=sandwich, vocab_size=50, document_start=0)
    )
    optimizers = optim.build_optimizers(model, optim.OptimConfig())
    names = {p: name for name, p in model.named_parameters()}
    held = {key: {names[p] for group in o.param_groups for p in group["params"]} for key, o in optimizers.items()}
    layers = ("query", "key", "value", "output", "gate", "up", "down")
    assert held["muon"] == {f"recur.0.{layer}.weight" for layer in layers}
    others = {"embedding.weight", "gains", "inject", "halting.weight", "halting.bias"}
    assert held["adamw"] == others | ({"recur.0.output_gain", "recur.0.down_gain"} if sandwich else set())


def test_every_step_leaves_its_mark_on_the_version_counters():
    """AdamW's fused step does not by itself, and copies of the weights would grow stale."""
    model = RecurrentTransformer(
        ModelConfig(width=16, heads=2, hidden=24, max_depth=2, vocab_size=50, document_start=0)
    )
    for optimizer in optim.build_optimizers(model, optim.OptimConfig()).values():
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for p in parameters:
            p.grad = torch.ones_like(p)
        before = [p._version for p in parameters]
        optimizer.step()
        assert all(p._version > version for p, version in zip(parameters, before))


@pytest.mark.parametrize("limit, clipped", [(1e-2, True), (1e6, False)])
def test_a_guarded_step_is_one_of_clipped_gradients(limit, clipped):
    def built():
        torch.manual_seed(0)
        config = ModelConfig(width=16, heads=2, hidden=24, max_depth=2, vocab_size=50, document_start=0)
        model = RecurrentTransformer(config)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        return model, optim.build_optimizers(model, optim.OptimConfig()).values()

    (ours, guarded), (theirs, plain) = built(), built()
    norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), limit)
    assert (norm > limit) == clipped
    optim.guard(guarded, norm, norm.isfinite(), limit)
    for optimizer in [*guarded, *plain]:
        optimizer.step()
    for p, q in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-4)

    # and a step that is not finite changes neither weights nor what the optimizers remember
    for p in ours.parameters():
        p.grad = torch.full_like(p, torch.nan)
    weights = [p.detach().clone() for p in ours.parameters()]
    states = copy.deepcopy([o.state_dict() for o in guarded])
    optim.guard(guarded, torch.tensor(torch.nan), torch.tensor(False), limit)
    for optimizer in guarded:
        optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(ours.parameters(), weights))
    for optimizer, before in zip(guarded, states):
        after = optimizer.state_dict()["state"]
        assert after.keys() == before["state"].keys()
        for p in after:
            assert all(torch.equal(after[p][name], before["state"][p][name]) for name in after[p])
