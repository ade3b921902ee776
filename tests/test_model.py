"""The invariants of the model: what recurrence, halting and memory may and may not change."""

import math

import pytest
import torch
import torch.nn.functional as F

import config
import train
from building import START, VARIANTS, V, build, run_segments, text, variants
from halting import ExitFit, Packed
from kernels import rotate
from model import LAST, ModelConfig, RecurrentTransformer, norm

# ------------------------------------------------------------------------------------------------ causality, memory


@variants
@torch.no_grad()
def test_a_future_token_changes_nothing_before_it(changes):
    model, tokens = build(**changes), text()
    changed = tokens.clone()
    changed[:, 25] = (tokens[:, 25] + 1).clamp(1, V - 1)
    before, after = model(tokens), model(changed)
    assert torch.equal(before.depth[:, :25], after.depth[:, :25])
    torch.testing.assert_close(before.logits[:, :25], after.logits[:, :25], atol=1e-6, rtol=0)
    assert not torch.allclose(before.logits[:, 25], after.logits[:, 25])


@variants
@torch.no_grad()
def test_segments_with_memory_equal_one_long_forward(changes):
    model, tokens = build(**changes), text()
    whole = model(tokens)
    for lengths in ([10, 10, 10, 10], [7, 30, 3], [40]):
        logits, depth = run_segments(model, tokens, lengths, memory=40)
        assert torch.equal(depth, whole.depth)
        torch.testing.assert_close(logits, whole.logits[..., :V], atol=1e-4, rtol=0)


@variants
@torch.no_grad()
def test_decoding_one_token_at_a_time_equals_one_long_forward(changes):
    model, tokens = build(**changes), text(rows=2, length=24)
    whole = model(tokens)
    logits, depth = run_segments(model, tokens, [1] * 24, memory=24)
    assert torch.equal(depth, whole.depth)
    torch.testing.assert_close(logits, whole.logits[..., :V], atol=1e-4, rtol=0)


@torch.no_grad()
def test_memory_shorter_than_the_past_drops_the_oldest():
    """The second segment sees the last M tokens: as if the row had begun there, at every step of the recurrence."""
    model, tokens = build(halting="fixed", max_depth=1), text(rows=2).clamp(min=1)  # one document
    logits, _ = run_segments(model, tokens, [30, 10], memory=8)
    cut = model(tokens[:, 22:])  # with one step, keys and values depend on their own token alone
    torch.testing.assert_close(logits[:, 30:31], cut.logits[:, 8:9, :V], atol=1e-4, rtol=0)


@torch.no_grad()
def test_documents_do_not_see_each_other_unless_told_to():
    tokens = text(rows=1).clamp(min=1)
    tokens[:, 20] = START
    other = tokens.clone()
    other[:, :20] = text(rows=1, seed=2)[:, :20].clamp(min=1)
    for cross, same in ((False, True), (True, False)):
        model = build(cross_documents=cross)
        for lengths in ([40], [15, 25]):
            a, _ = run_segments(model, tokens, lengths, memory=40)
            b, _ = run_segments(model, other, lengths, memory=40)
            assert torch.allclose(a[:, 20:], b[:, 20:], atol=1e-5) is same


@torch.no_grad()
def test_last_step_memory_is_what_every_step_reads():
    """One slot a block: within one segment nothing changes; across segments all steps read the last step's keys."""
    single, full = build(memory="last_step"), build()
    tokens = text()
    torch.testing.assert_close(single(tokens).logits, full(tokens).logits)
    assert len(single.new_memory(1, 8).ring.keys) * 5 == len(full.new_memory(1, 8).ring.keys)
    a = single(tokens[:, :20], memory=single.new_memory(3, 20)).memory
    b = full(tokens[:, :20], memory=full.new_memory(3, 20)).memory
    torch.testing.assert_close(a.settle().ring.keys[0], b.settle().ring.keys[-1])


def test_no_gradient_reaches_an_earlier_segment():
    model, tokens = build(), text()
    first = model(tokens[:, :20], memory=model.new_memory(3, 20))
    ring = first.memory.settle().ring
    assert not any(x.requires_grad for x in (*ring.keys, *ring.values))
    second = model(tokens[:, 20:], memory=first.memory)
    second.weights.square().sum().backward()  # a loss in which the tied head, and so every embedding, has no part
    gradient, here = model.embedding.weight.grad, tokens[:, 20:].unique()
    before = [t for t in tokens[:, :20].unique().tolist() if t not in here.tolist()]
    assert before and gradient[before].abs().max() == 0 and gradient[here].abs().max() > 0


@torch.no_grad()
def test_resized_memory_keeps_the_newest():
    model, tokens = build(), text()
    memory = model(tokens[:, :20], memory=model.new_memory(3, 16)).memory
    for length in (24, 16, 5, 0):
        resized = memory.resized(length)
        assert resized.length == length and int(resized.live.max()) <= length
        kept = min(length, 16)
        new, old = resized.ring.ordered()[0][1], memory.ring.ordered()[0][1]
        assert torch.equal(new[:, length - kept :], old[:, 16 - kept :])
    longer = model(tokens[:, 20:], memory=memory.resized(24)).logits
    torch.testing.assert_close(longer, model(tokens[:, 20:], memory=memory).logits, atol=1e-5, rtol=0)


@torch.no_grad()
def test_positions_are_exact_after_a_billion_tokens():
    model, tokens = build(), text()
    memory = model.new_memory(3, 40)
    near = model(tokens, memory=memory)
    memory.position = memory.ring.position = 10**9
    torch.testing.assert_close(model(tokens, memory=memory).logits, near.logits, atol=1e-4, rtol=0)


@torch.no_grad()
def test_hyper_connections_lane_by_lane():
    """Of a document's first token, whose attention finds its own value."""
    model, tokens = build(injection="hyper", lanes=3, halting="fixed"), text()[:, :1]
    block, e = model.recur[0], norm(model.embedding(tokens))
    lanes = [e] * 3
    for (alpha, beta, *mix), gains in zip(model.inject, model.gains[:, 0]):
        u = sum(alpha[i] * lanes[i] for i in range(3))
        u = u + gains[1] * block.output(block.value(norm(u) * gains[0]))
        y = norm(u) * gains[2]
        u = u + gains[3] * block.down(F.silu(block.gate(y)) * block.up(y))
        lanes = [sum(mix[i][j] * lanes[j] for j in range(3)) + beta[i] * norm(u) for i in range(3)]
    logits = F.linear(norm(sum(lanes)), model.embedding.weight)[..., :V]
    torch.testing.assert_close(model(tokens).logits[..., :V], logits, atol=1e-5, rtol=1e-4)


# ------------------------------------------------------------------------------------------------ halting


def graves(p, eps, limit):
    """Equations 5 to 8 of Graves 2016 for one token, one step at a time: weights, N and R."""
    total, weights = 0.0, []
    for n in range(1, limit + 1):
        if total + p[n - 1] >= 1 - eps or n == limit:
            remainder = 1 - total
            return [*weights, remainder, *[0.0] * (limit - n)], n, remainder
        weights.append(p[n - 1])
        total += p[n - 1]


def test_act_agrees_with_graves_equations_token_by_token():
    model, tokens = build(max_depth=6), text(rows=4, length=60)
    probabilities = []
    of_states = model.halting_probability
    model.halting_probability = lambda *states: probabilities.append(of_states(*states)) or probabilities[-1]
    out = model(tokens)  # with gradients: evaluation may stop early, training runs every step
    p = torch.stack(probabilities)
    assert len(set(out.depth.flatten().tolist())) >= 4  # the check sees several depths
    for row in range(4):
        for i in range(60):
            weights, steps, remainder = graves(p[:, row, i].tolist(), 0.01, 6)
            assert out.depth[row, i] == steps
            assert math.isclose(out.ponder[row, i].item(), steps + remainder, abs_tol=1e-5)
            torch.testing.assert_close(out.weights[:, row, i], torch.tensor(weights), atol=1e-5, rtol=0)


@pytest.mark.parametrize("depth", [None, 1, 2, 3, 4, 5])
@torch.no_grad()
def test_step_weights_sum_to_one(depth):
    out = build()(text(), depth=depth)
    torch.testing.assert_close(out.weights.sum(0), torch.ones(3, 40), atol=1e-5, rtol=0)
    assert out.weights.min() >= 0


@variants
@torch.no_grad()
def test_every_forced_depth_takes_exactly_that_many_steps(changes):
    model, tokens = build(**changes), text()
    depths = model.config.depths
    logits = {k: model(tokens, depth=k).logits for k in depths}
    for k, here in logits.items():
        assert (model(tokens, depth=k).depth == k).all()
        assert all(other is here or not torch.allclose(here, other) for other in logits.values())
        segments, _ = run_segments(model, tokens, [20, 20], memory=20, depth=k)
        torch.testing.assert_close(segments, here[..., :V], atol=1e-4, rtol=0)
    for wrong in (depths[0] - 1, depths[-1] + 1):
        with pytest.raises(ValueError, match=f"depth must lie in {depths[0]}..{depths[-1]}, not {wrong}"):
            model(tokens, depth=wrong)


@torch.no_grad()
def test_finish_is_the_last_step_behind_fewer_others():
    """Forced to depth k the model is that of the first k - 1 steps and step N."""
    model, tokens = build(finish=True, halting="fixed"), text()
    for k in model.config.depths:
        steps, other = [*range(k - 1), -1], build(halting="fixed", max_depth=k)
        weights = model.state_dict()
        other.load_state_dict(weights | {name: weights[name][steps] for name in ("gains", "inject")})
        found, expected = (run_segments(x, tokens, [20, 20], 20, k)[0] for x in (model, other))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@torch.no_grad()
@variants
def test_tokens_with_one_depth_each_are_frozen_there(changes):
    """All of one depth: as if it was forced. Else a token's state is that of its own depth, and later tokens see the
    keys and values that it had there."""
    model, tokens = build(**changes), text()
    least, N = model.config.depths[0], model.config.max_depth
    for k in (least, N):
        out = model(tokens, depth=torch.full_like(tokens, k))
        torch.testing.assert_close(out.logits, model(tokens, depth=k).logits, atol=1e-5, rtol=0)
    depth = torch.randint(least, N + 1, tokens.shape, generator=torch.Generator().manual_seed(0))
    out = model(tokens, depth=depth)
    assert torch.equal(out.depth, depth)
    if not model.config.coda and model.config.halting != "act":
        first = (depth == depth[:, :1]).int().cumprod(1).bool()  # the tokens of a row before any of another depth
        for k in model.config.depths:
            rows = first & (depth == k)
            forced = model(tokens, depth=k).logits
            torch.testing.assert_close(out.logits[rows], forced[rows], atol=1e-4, rtol=0)
    for wrong, there in ((-1, depth - depth.min() - 1), (N + 1, depth - depth.max() + N + 1)):
        with pytest.raises(ValueError, match=f"depth must lie in {least}..{N}, not {wrong}"):
            model(tokens, depth=there)


@variants
@torch.no_grad()
def test_tokens_without_a_depth_of_their_own_go_by_the_rule(changes):
    """Where the others have the depths of the rule, all is as without them; else it is as if all had theirs from it."""
    model, tokens = build(**changes), text()
    depths, generator, rule = model.config.depths, torch.Generator().manual_seed(0), model(tokens)
    has = torch.rand(tokens.shape, generator=generator) < 0.5
    for own in (rule.depth, torch.randint(depths[0], depths[-1] + 1, tokens.shape, generator=generator)):
        out = model(tokens, depth=torch.where(has, own, 0))
        assert torch.equal(out.depth[has], own[has])
        same = (has <= (own == rule.depth)).int().cumprod(1).bool()  # before any token of another depth
        assert torch.equal(out.depth[same], rule.depth[same])
        torch.testing.assert_close(out.logits[same], rule.logits[same], atol=1e-4, rtol=0)
        torch.testing.assert_close(out.logits, model(tokens, depth=out.depth).logits, atol=1e-4, rtol=0)


@torch.no_grad()
def test_stable_states_halt_with_their_newest_state():
    tokens, fixed = text(), build(halting="fixed")
    for tolerance, depth in ((0.0, 5), (9.0, 1)):
        out = build(halting="stability", tolerance=tolerance)(tokens)
        assert (out.depth == depth).all()
        torch.testing.assert_close(out.logits, fixed(tokens, depth=depth).logits, atol=1e-5, rtol=0)
    out = build(halting="stability", tolerance=0.6)(tokens)
    assert len(out.depth.unique()) > 1  # the check sees several depths
    assert torch.equal(out.weights, torch.nn.functional.one_hot(out.depth - 1, len(out.weights)).movedim(-1, 0).float())


@pytest.mark.parametrize("changes", [{}, {"injection": "hyper", "memory": "last_step"}], ids=["gain", "hyper"])
@torch.no_grad()
def test_an_exit_head_is_fitted_to_what_the_next_step_wins(changes):
    """At full depth by the nll of forced depths; where tokens halt, up to there, by what they come to."""
    model, tokens = build(halting="exit", tolerance=-99.0, **changes), text(length=41)
    tokens, targets, N = tokens[:, :-1], tokens[:, 1:], model.config.max_depth
    forced = torch.stack([model(tokens, targets, depth=n).nll for n in range(1, N + 1)])
    states, gains = ExitFit(model).examples(tokens, targets)
    torch.testing.assert_close(gains, forced[:-1] - forced[1:], atol=1e-5, rtol=0)
    values = (states * model.halting.weight[:-1, None, None]).sum(-1) + model.halting.bias[:-1, None, None]
    model.set_tolerance(values.mean().item())
    out = model(tokens, targets)
    halted = out.depth < N
    assert torch.equal(out.depth == 1, values[0] < model.tolerance) and len(out.depth.unique()) == N
    gains = ExitFit(model).examples(tokens, targets)[1]
    taken = torch.arange(1, N)[:, None, None] < out.depth
    won = (gains * taken).sum(0)  # by the steps after the first
    torch.testing.assert_close(won[halted], (forced[0] - out.nll)[halted], atol=1e-5, rtol=0)


@pytest.mark.parametrize("changes", [{"coda": 1}, {"finish": True, "max_depth": 6}], ids=["coda", "finish"])
@torch.no_grad()
def test_an_exit_head_by_loss_is_fitted_to_that_of_the_whole_model(changes):
    model, tokens = build(halting="exit", exit_by="loss", tolerance=1.2, **changes), text(length=41)
    states, values = ExitFit(model).examples(tokens[:, :-1], tokens[:, 1:])
    out = model(tokens[:, :-1], tokens[:, 1:])
    assert states.shape == (4, *values.shape[1:], 32) and len(out.depth.unique()) > 2
    torch.testing.assert_close(values, out.nll.expand(4, -1, -1), atol=1e-5, rtol=0)


@torch.no_grad()
def test_to_look_at_examples_leaves_the_memory_as_it_is():
    model, tokens = build(halting="exit", tolerance=1.2), text(length=41)
    memory = model(tokens[:, :20], memory=model.new_memory(3, 24)).memory
    part = tokens[:, 20:40], tokens[:, 21:41], memory
    fit = ExitFit(model)
    first, out, again = fit.examples(*part), model(*part), fit.examples(*part)
    assert all(map(torch.equal, first, again))
    whole = model(tokens[:, :40], tokens[:, 1:41]).nll[:, 20:]
    torch.testing.assert_close(out.nll, whole, atol=1e-4, rtol=0)


@pytest.mark.parametrize("rule", ["exit", "stability"])
@torch.no_grad()
def test_no_token_halts_before_the_least_depth(rule):
    for least in (1, 3, 5):
        model = build(halting=rule, tolerance=99.0, min_depth=least)
        for model.packing in (0, 8):
            assert (model(text()).depth == least).all()


@torch.no_grad()
def test_the_exit_head_knows_its_step():
    model, tokens = build(halting="exit"), text()
    torch.nn.init.zeros_(model.halting.weight)
    for k in range(1, 6):
        model.halting.bias.copy_(torch.where(torch.arange(1, 6) == k, 0.0, 1.0))
        for model.packing in (0, 8):
            assert (model(tokens).depth == k).all()


def test_the_ponder_cost_has_gradient_through_the_remainder():
    """dR/db < 0 for the bias of the halting head where tokens take more than one step: halting sooner is cheaper."""
    model = build(noise=0.0, halting_bias=-1.5)
    out = model(text())
    assert (out.depth > 1).all()
    out.ponder.mean().backward()
    assert model.halting.bias.grad < 0


@variants
@pytest.mark.parametrize("slots", ["per_step", "last_step"])
@torch.no_grad()
def test_leaving_out_halted_tokens_changes_nothing(changes, slots, monkeypatch):
    """By multiples or by shares, whether the host knows before a step how many are active or behind its attention."""
    if slots == "last_step" and not changes.get("share", True):
        pytest.skip("one slot for all steps' keys and values")
    model, tokens, packed = build(**changes, memory=slots), text(), []
    of = Packed.of
    monkeypatch.setattr(Packed, "of", lambda active, rows: packed.append((int(active.sum()), rows)) or of(active, rows))
    runs = []
    for packing, capacities, first in ((0, (), True), (1, (), True), (8, (), False), (8, (0.2, 0.6, 0.8), False)):
        model.packing, model.capacities, model.compiled = packing, capacities, bool(capacities)
        monkeypatch.setattr(model, "_asks_first", lambda _, first=first: first)
        memory, outputs = model.new_memory(3, 24), []
        for part in tokens.split(10, 1):
            outputs.append(model(part, memory=memory))
            memory = outputs[-1].memory
        runs.append((outputs, memory.settle().ring))
        assert packing or not packed
    for outputs, ring in runs[1:]:
        for here, dense in zip(outputs, runs[0][0]):
            assert torch.equal(here.depth, dense.depth)
            torch.testing.assert_close(here.logits, dense.logits, atol=1e-4, rtol=0)
            torch.testing.assert_close(here.ponder, dense.ponder)
            torch.testing.assert_close(here.weights, dense.weights)
        for x, y in zip(ring.keys + ring.values, runs[0][1].keys + runs[0][1].values):
            torch.testing.assert_close(x, y, atol=1e-4, rtol=0)
    assert all(count <= rows <= 26 for count, rows in packed)
    assert packed or changes.get("max_depth", 5) == 3 or model.halting is None


@torch.no_grad()
def test_where_all_have_halted_the_steps_left_are_not_run(monkeypatch):
    """Nor are they where the host learns of it with half of the next step begun."""
    model, completed = build(halting_bias=3.0), []
    complete = model.complete
    monkeypatch.setattr(model, "complete", lambda *a: completed.append(1) or complete(*a))
    for first, packing in ((True, 0), (True, 1), (False, 1)):
        completed.clear()
        monkeypatch.setattr(model, "_asks_first", lambda _, first=first: first)
        model.packing = packing
        out = model(text(), memory=model.new_memory(3, 40))
        assert len(completed) == len(out.weights) == out.depth.max() < model.config.max_depth
        assert len(out.memory.settle().ring.keys) == model.config.max_depth


def trained(model, tokens, depth=None, part=20):
    """The outputs of two training segments, the second with the first's memory, and the gradients of their losses."""
    memory, outputs = model.new_memory(len(tokens), 24), []
    for start in (0, part):
        rows = slice(start, start + part)
        own = depth[:, rows] if depth is not None else None
        outputs.append(model(tokens[:, rows], tokens[:, start + 1 : start + part + 1], memory, own))
        (outputs[-1].loss + 0.1 * outputs[-1].ponder.mean()).backward()
        memory = outputs[-1].memory
    return outputs, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


TRAINED = {name: (changes, "none") for name, changes in VARIANTS.items() if changes.get("halting") != "fixed"}
TRAINED |= {"last step": ({"memory": "last_step"}, "none")}
TRAINED |= {f"two blocks, last step, {kept}": ({"recur": 2, "memory": "last_step"}, kept) for kept in ("mlp", "step")}


@pytest.mark.parametrize("least", [None, 1, 0], ids=["", "own depths", "some own depths"])
@pytest.mark.parametrize("changes, recompute", TRAINED.values(), ids=TRAINED.keys())
def test_packing_changes_nothing_in_training(changes, recompute, least, monkeypatch):
    """Loss, depths, memory and all gradients are those of the SwiGLU of all tokens."""
    tokens, packed, runs, changes = text(length=41), [], [], {"halting_bias": 0.0} | changes
    of = Packed.of
    monkeypatch.setattr(Packed, "of", lambda active, rows: packed.append((int(active.sum()), rows)) or of(active, rows))
    for capacities in ((), (0.2, 0.5, 0.8)):
        model = build(**changes)
        model.recompute, model.capacities = recompute, capacities
        depth, generator = None, torch.Generator().manual_seed(0)
        if least is not None:
            depth = torch.randint(least, model.config.max_depth + 1, tokens.shape, generator=generator)
            depth[(depth > 0) & (depth < model.config.depths[0])] = model.config.depths[0]
        runs.append(trained(model, tokens, depth))
        assert bool(packed) == bool(capacities)  # the check sees that some are left out
    assert {rows for _, rows in packed} <= {16, 32, 48} and all(count <= rows for count, rows in packed)
    for here, dense in zip(runs[1][0], runs[0][0]):
        assert torch.equal(here.depth, dense.depth)
        torch.testing.assert_close(here.loss, dense.loss, atol=0, rtol=1e-5)
        torch.testing.assert_close(here.ponder, dense.ponder)
    for x, y in zip(*(run[0][-1].memory.settle().ring.keys for run in reversed(runs))):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)
    assert runs[0][1].keys() == runs[1][1].keys()
    for name, grad in runs[0][1].items():
        assert (runs[1][1][name] - grad).norm() <= 1e-5 * grad.norm(), name


@pytest.mark.parametrize("changes", [{"halting": "fixed"}, {}], ids=["fixed", "forced"])
def test_where_no_token_halts_nothing_is_packed(changes, monkeypatch):
    monkeypatch.setattr(Packed, "of", lambda *_: pytest.fail("packed"))
    model, tokens = build(**changes), text()
    model.capacities = (0.5,)
    model(tokens[:, :-1], tokens[:, 1:], depth=None if changes else 3).loss.backward()


def test_the_host_waits_for_the_number_of_active_tokens_behind_the_attention(monkeypatch):
    """Then the device has something to do meanwhile; before the first step there is nothing to wait for."""
    model, tokens, order = build(halting_bias=0.0), text(), []
    model.capacities = (0.5,)
    for name in ("begin", "_capacity", "complete"):
        part = getattr(model, name)
        monkeypatch.setattr(model, name, lambda *a, name=name, part=part: order.append(name) or part(*a))
    model(tokens[:, :-1], tokens[:, 1:])
    assert order == ["begin", "complete"] + 4 * ["begin", "_capacity", "complete"]


@pytest.mark.parametrize("number, rows", [(1, 16), (16, 16), (17, 48), (48, 48), (49, 80), (81, None), (96, None)])
def test_capacities_are_multiples_of_16_that_hold_what_is_active(number, rows):
    model = build()
    model.capacities = (0.8, 0.5, 0.1)
    assert model._capacity(number, 96) == rows
    with torch.no_grad():
        model.compiled = True
        assert model._capacity(number, 96) == rows
        model.packing = 0
        assert model._capacity(number, 96) is None


@pytest.mark.parametrize("number, rows", [(1, 8), (8, 8), (9, 16), (80, 80), (81, None)])
@torch.no_grad()
def test_without_a_graph_a_multiple_is_taken_where_that_saves_an_eighth(number, rows):
    model = build()
    model.packing = 8
    assert model._capacity(number, 96) == rows


def packed(model, tokens):
    """Scoring as a fast engine would do it, token-packed: at every step only the active tokens are computed, one row of
    the batch at a time; a token that has halted is never touched again. An independent reference for one document."""
    c, (block,) = model.config, model.recur
    logits = []
    for row in tokens:
        T = len(row)
        cos, sin = model._rope(T, None)
        e = norm(model.embedding(row[None]))[0]
        h, out, left = e.clone(), torch.zeros_like(e), torch.ones(T)
        keys, values = torch.zeros(T, c.heads, c.width // c.heads), torch.zeros(T, c.heads, c.width // c.heads)
        active = torch.arange(T)
        for n in range(c.max_depth):
            a, b = model.inject[n]
            x = a * norm(h[active]) + b * e[active]
            attn_in, attn_out, mlp_in, mlp_out = model.gains[n, 0]
            y = norm(x) * attn_in
            q, k, v = (layer(y).unflatten(-1, (c.heads, -1)) for layer in (block.query, block.key, block.value))
            here = cos[active], sin[active]
            q, keys[active], values[active] = rotate(norm(q)[None], here)[0], rotate(norm(k)[None], here)[0], v
            mask = torch.arange(T) <= active[:, None]
            attended = F.scaled_dot_product_attention(*(z.transpose(0, 1) for z in (q, keys, values)), attn_mask=mask)
            x = x + attn_out * block.output(attended.transpose(0, 1).flatten(1))
            y = norm(x) * mlp_in
            h[active] = x = x + mlp_out * block.down(F.silu(block.gate(y)) * block.up(y))
            p = torch.sigmoid(model.halting(norm(x))).squeeze(-1)
            halts = (1 - left[active] + p >= 1 - c.halting_eps) | (n == c.max_depth - 1)
            w = torch.where(halts, left[active], p)
            out[active] += w[:, None] * x
            left[active] -= w
            active = active[~halts]
        logits.append(F.linear(norm(out), model.embedding.weight))
    return torch.stack(logits)[..., :V]


def test_a_halted_token_costs_nothing_later():
    """Dense training, token-packed scoring and cached decoding give the same logits."""
    model, tokens = build(), text(rows=2).clamp(min=1)
    dense = model(tokens)  # with gradients: all steps for all tokens
    assert dense.depth.float().mean() < model.config.max_depth - 0.3  # some do halt
    with torch.no_grad():
        torch.testing.assert_close(packed(model, tokens), dense.logits[..., :V], atol=1e-4, rtol=0)
        decoded, _ = run_segments(model, tokens, [1] * 40, memory=40)
    torch.testing.assert_close(decoded, dense.logits[..., :V], atol=1e-4, rtol=0)


# ------------------------------------------------------------------------------------------------ head, sizes, config


@torch.no_grad()
def test_padded_ids_can_never_be_chosen_and_do_not_enter_the_loss():
    model, tokens = build(), text()
    out = model(tokens)
    assert out.logits.shape[-1] == 128 and out.logits[..., V:].max() == -math.inf
    nll = model(tokens[:, :-1], tokens[:, 1:]).nll
    wanted = F.cross_entropy(out.logits[:, :-1, :V].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    torch.testing.assert_close(nll.flatten(), wanted)


@torch.no_grad()
def test_logits_of_the_tokens_to_keep_are_those_of_all():
    model, tokens = build(), text()
    whole, some = model(tokens), torch.rand(tokens.shape, generator=torch.Generator().manual_seed(2)) < 0.2
    for keep in (LAST, some, (slice(None), slice(99, None))):
        out = model(tokens, keep=keep)
        torch.testing.assert_close(out.logits, whole.logits[keep])
        assert torch.equal(out.depth, whole.depth)


@pytest.mark.parametrize("changes", [{}, {"sandwich": True, "step_gains": False, "prelude": 1}, {"injection": "hyper"}])
def test_an_untrained_model_is_close_to_uniform(changes):
    """And the norm of its gradients is about 1, where it is clipped; through a norm of zeros it were hundreds."""
    torch.manual_seed(0)
    model = RecurrentTransformer(ModelConfig(width=64, heads=2, hidden=64, **changes))
    tokens = torch.randint(0, 50000, (2, 64), generator=torch.Generator().manual_seed(0))
    out = model(tokens[:, :-1], tokens[:, 1:])
    assert abs(out.nll.mean() - math.log(model.config.vocab_size)) < 0.3
    out.loss.backward()
    assert torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]) == pytest.approx(1.1, abs=0.2)


def shapes_only(name):
    with torch.device("meta"):
        return RecurrentTransformer(config.load(f"configs/{name}.toml", train.Config).model)


def test_parameter_counts_of_the_configs():
    for name, rest in (("act_110m", 42_257), ("pretrain_110m", 49_943)):  # a head for every step but one
        counts = shapes_only(name).parameter_counts()
        assert counts == {"embedding": 64_331_520, "blocks": 45_875_200, "rest": rest, "total": 110_206_720 + rest}
    baseline = shapes_only("baseline_6layer")
    assert 104e6 < baseline.parameter_counts()["total"] < 110.3e6
    assert len(baseline.recur) == 6 and baseline.halting is None and baseline.inject is None
    assert len(shapes_only("loop_6x4").recur) == 6


def test_flops_know_shared_weights_and_depth():
    model = shapes_only("pretrain_110m")
    block, attention, head = 2 * 45_875_200, 4 * 1280 * 768, 2 * 50304 * 1280
    assert model.flops_per_token(8, 768) == 8 * (block + attention) + head
    assert model.flops_per_token(4.5, 0) == 4.5 * block + head


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"heads": 5}, "'width' 32 must be 'heads'"),
        ({"recur": 0}, "'recur' at least 1"),
        ({"share": False, "memory": "last_step"}, "one slot for all"),
        ({"finish": True, "max_depth": 1}, "'finish' needs a 'max_depth' of at least 2"),
        ({"halting_eps": 1.5}, "'halting_eps' must lie between 0 and 1"),
        ({"document_start": V}, "not in the vocabulary"),
    ],
)
def test_impossible_models_are_refused_with_the_reason(changes, message):
    with pytest.raises(ValueError, match=message):
        build(**changes)


def pair_loss(nll):
    """As `stages.PairLoss` does it: what it needs of the host goes to where nll is."""
    return (nll * torch.linspace(0, 1, nll.numel()).view(nll.shape).to(nll.device)).sum().tanh()


@pytest.mark.parametrize("weights", [None, torch.full((3, 20), 0.01), pair_loss], ids=["mean", "weights", "function"])
@pytest.mark.parametrize("halting", ["act", "fixed"])
def test_batches_stay_on_the_host(weights, halting):
    """Tokens, targets and weights are handed over there, and the model is elsewhere: on the device without storage,
    which refuses, as a GPU does, what is on another."""
    with torch.device("meta"):
        model = build(halting=halting)
    tokens = text(length=41)
    memory = model.new_memory(3, 16)
    for start in (0, 20):
        out = model(tokens[:, start : start + 20], tokens[:, start + 1 : start + 21], memory, weights=weights)
        out.loss.backward()
        memory = out.memory
    assert out.nll.is_meta and all(p.grad is not None and p.grad.is_meta for p in model.parameters())
