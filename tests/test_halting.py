"""The parts of halting.py by themselves; what they do to a model is in test_model.py."""

import math
from dataclasses import replace

import pytest
import torch

from building import build
from halting import ExitFit, Packed, PonderWeight, draw_depths, shares
from model import ModelConfig, norm
from settings import TrainConfig


def linear_gains(n, weight, bias):
    """States (N - 1, n, D) and what they win, a linear function of them for every step."""
    states = norm(torch.randn(len(weight), n, weight.shape[1]))
    return states, (states * weight[:, None]).sum(-1) + bias[:, None]


def test_the_exit_head_is_fitted_to_what_steps_win():
    """The linear function of every step is found, and then the tolerance at which tokens take the target depth."""
    model = build(halting="exit")
    weight, bias = 0.3 * torch.randn(4, 32), torch.tensor([1.0, 0.5, 0.2, 0.1])
    fit = ExitFit(model, target_depth=2.5, ridge=1e-6)
    before = model.halting.weight[-1].clone(), model.config.tolerance
    fit.update(*linear_gains(500, weight, bias))
    torch.testing.assert_close(model.halting.weight[:-1], weight, atol=1e-4, rtol=0)
    torch.testing.assert_close(model.halting.bias[:-1], bias, atol=1e-4, rtol=0)
    assert torch.equal(model.halting.weight[-1], before[0])  # the last step has nothing to expect
    assert model.config.tolerance == before[1]  # no head had been fitted that it could be of
    states, gains = linear_gains(500, weight, bias)
    fit.update(states, gains)
    assert model.tolerance.item() == model.config.tolerance != before[1]
    steps = 1 + (gains.cummin(0).values >= model.config.tolerance).sum(0)
    assert steps.float().mean() == pytest.approx(2.5, abs=0.01)
    model.config = replace(model.config, min_depth=2)
    fit.steer(states)
    steps = 2 + (gains[1:].cummin(0).values >= model.config.tolerance).sum(0)
    assert steps.float().mean() == pytest.approx(2.5, abs=0.01)


@pytest.mark.parametrize("target, least", [(4, 2), (2.5, 1), (8, 3), (3, 3)])
def test_the_shares_that_go_on_add_up_to_the_target(target, least):
    found = shares(target, least, 8)
    assert sum(found) == pytest.approx(target) and found[:least] == [1] * least
    ratios = [after / before for before, after in zip(found[least - 1 :], found[least:]) if before > 1e-6]
    assert ratios == pytest.approx([ratios[0]] * len(ratios))


def depths(fit, states):
    return 1 + (fit.values(states).cummin(0).values >= fit.model.tolerance).sum(0)


@pytest.mark.parametrize("tolerance, finish", [(0.1, False), (99.0, False), (99.0, True)])
def test_those_of_which_the_most_loss_is_expected_go_on(tolerance, finish):
    """In the shares of the target, whatever tolerance and head there were; and fewer where it is raised, as a dial.
    A step behind all that tokens choose changes nothing of the choice."""
    settings = dict(tolerance=tolerance, min_depth=2 + finish, max_depth=5 + finish, finish=finish)
    model, target = build(halting="exit", exit_by="loss", **settings), 3.25
    fit = ExitFit(model, target + finish, ridge=1e-6)
    weight, bias = 0.3 * torch.randn(4, 32), torch.tensor([4.0, 3.5, 3.2, 3.1])
    for _ in range(20):
        states, loss = linear_gains(2000, weight, bias)
        fit.update(states, loss)
    torch.testing.assert_close(model.halting.weight[:-1], weight, atol=1e-3, rtol=0)
    assert model.config.tolerance == model.tolerance == 0
    taken = depths(fit, states)
    going = [(taken >= n).float().mean().item() for n in range(1, 6)]
    assert going == pytest.approx(shares(target, 2, 5), abs=0.02)
    assert loss[1, taken == 2].max() < loss[1, taken > 2].min() + 1e-2  # by what is expected after step 2
    model.set_tolerance(0.2)
    assert 2 < depths(fit, states).float().mean() < taken.float().mean() - 0.1


def test_an_exit_head_by_loss_is_not_fitted_to_states_of_halted_tokens():
    """There the values say the opposite, from the second batch on."""
    model = build(halting="exit", exit_by="loss")
    fit, weight, bias = ExitFit(model, target_depth=2, decay=0.5, ridge=1e-6), torch.randn(4, 32), torch.zeros(4)
    for _ in range(30):
        states, loss = linear_gains(500, weight, bias)
        if fit.sums.any():
            steps = torch.arange(1, 5)[:, None]
            loss = torch.where(steps <= depths(fit, states), loss, -loss)
        fit.update(states, loss)
    torch.testing.assert_close(model.halting.weight[:-1], weight, atol=1e-3, rtol=0)


def test_bars_are_averages_and_move_with_the_head():
    fits = [ExitFit(build(halting="exit", exit_by="loss"), 3, bar_decay=decay) for decay in (1.0, 0.75, 0.0)]
    weight, bias = torch.randn(4, 32), torch.zeros(4)
    for shift in (0, 5):
        states, loss = linear_gains(500, weight, bias + shift)
        before = fits[0].values(states)
        for fit in fits:
            fit.update(states, loss)
    still, slow, fast = (fit.model.halting.bias[:-1] for fit in fits)
    assert not torch.allclose(still, fast, atol=0.1)
    torch.testing.assert_close(fits[0].values(states).mean(1), before.mean(1), atol=1e-4, rtol=0)  # though losses rose
    torch.testing.assert_close(slow, still.lerp(fast, 0.25))


def test_a_fitted_exit_head_follows_its_model_and_goes_on_from_its_sums():
    model, again = build(halting="exit"), build(halting="exit")
    weight, bias = torch.randn(4, 32), torch.zeros(4)
    fit, resumed = (ExitFit(x, target_depth=2, decay=0.5, ridge=1e-6) for x in (model, again))
    fit.update(*linear_gains(200, -weight, bias))
    for _ in range(30):
        fit.update(*linear_gains(200, weight, bias))
    torch.testing.assert_close(model.halting.weight[:-1], weight, atol=1e-4, rtol=0)
    again.load_state_dict(model.state_dict())
    resumed.sums.copy_(fit.sums)
    new = linear_gains(200, weight, bias)
    fit.update(*new)
    resumed.update(*new)
    assert torch.equal(again.halting.weight, model.halting.weight) and again.tolerance == model.tolerance


def test_the_exit_head_is_not_fitted_to_what_is_not_finite_or_not_there():
    model = build(halting="exit")
    fit, weight, bias = ExitFit(model, target_depth=2), torch.randn(4, 32), torch.zeros(4)
    fit.update(*linear_gains(200, weight, bias))
    before = model.halting.weight.clone(), model.config.tolerance, fit.sums.clone()
    states, gains = linear_gains(200, weight, bias)
    gains[2, 5] = math.inf
    fit.update(states, gains)
    fit.update(states[:, :0], gains[:, :0])
    assert torch.equal(model.halting.weight, before[0]) and model.config.tolerance == before[1]
    assert torch.equal(fit.sums, before[2])


def test_a_step_whose_sums_are_no_gram_matrix_keeps_its_head():
    model = build(halting="exit")
    fit, weight, bias = ExitFit(model, target_depth=2, decay=0.0), torch.randn(4, 32), torch.zeros(4)
    fit.update(*linear_gains(200, weight, bias))
    old = model.halting.weight.clone()
    fit.update(*linear_gains(200, -weight, bias))
    new = model.halting.weight.clone()
    for broken in (-1e6, math.nan):
        model.halting.weight.copy_(old)
        fit.sums[2, 5, 5] = broken
        fit.solve()
        assert torch.equal(model.halting.weight[2], old[2]) and not torch.equal(old[2], new[2])
        torch.testing.assert_close(model.halting.weight[[0, 1, 3]], new[[0, 1, 3]])


def test_packed_are_the_active_tokens_and_then_others():
    active = torch.tensor([0, 1, 1, 0, 0, 1, 0, 0], dtype=torch.bool)
    packed, x = Packed.of(active, 5), torch.randn(8, 3, dtype=torch.double, requires_grad=True)
    assert packed.index.tolist() == [1, 2, 5, 0, 3] and packed.rank.tolist() == [3, 0, 1, 4, 5, 2, 6, 7]
    put = packed.put(packed.take(x))
    assert torch.equal(put[packed.index], x[packed.index]) and put[[4, 6, 7]].abs().max() == 0
    assert torch.autograd.gradcheck(lambda x: packed.put(packed.take(x).sin()), x)
    new = packed.put(-packed.take(x), x)
    assert torch.equal(new, torch.where(active[:, None], -x, x))
    of_rows = Packed.of(active.view(2, 4), 5)
    assert torch.equal(of_rows.take(x.view(2, 4, 3)), packed.take(x))
    assert torch.equal(of_rows.put(packed.take(x)), put.view(2, 4, 3))
    for rows in (3, 8):
        assert sorted(Packed.of(active, rows).index.tolist()) == ([1, 2, 5] if rows == 3 else list(range(8)))


def test_the_ponder_weight_steers_depth_both_ways():
    steered = PonderWeight(0.0, target_depth=4, rate=0.01, limit=0.1)
    steered.update(5.0)
    assert steered.value == pytest.approx(0.01 + 0.05)  # too deep: steps cost more, by the integral and the error
    steered.update(4.0)
    assert steered.value == pytest.approx(0.01)  # on target: the integral alone is left
    for _ in range(10):
        steered.update(2.0)
    assert steered.value == -0.1  # too shallow: steps are rewarded, within the limit
    constant = PonderWeight(0.003)
    constant.update(8.0)
    assert constant.value == 0.003


def test_drawn_depths_have_their_mean():
    def draw(mean, most=6, step=1, model=None, **settings):
        t = TrainConfig(batch_size=1000, segment=4, sampled_depth=mean, **settings)
        return draw_depths(t, model or ModelConfig(max_depth=most), step)

    drawn = draw(4.0, 100, sampled_by="token")
    assert drawn.min() >= 1 and drawn.mean() == pytest.approx(4, abs=0.15) and drawn.std() > 1.5
    assert {draw(4.0, step=i) for i in range(300)} == set(range(1, 7)) == set(draw(4.0, sampled_by="token").flat)
    assert {draw(1.0, step=i) for i in range(30)} == {1}
    rows = draw(4.0, sampled_by="row", sampled_share=0.3)
    assert (rows == rows[:, :1]).all() and set(rows.flat) == set(range(7))
    assert (rows > 0).mean() == pytest.approx(0.3, abs=0.05)
    model = ModelConfig(halting="exit", exit_by="loss", finish=True, min_depth=3)
    assert set(draw(4.0, model=model, sampled_by="row").flat) == set(range(3, 9))  # no other is the rule's
