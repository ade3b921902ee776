"""Which graphs a compiled model is made of, and that leaving out tokens in them changes nothing."""

import pytest
import torch

from building import V, build, text
from halting import ExitFit


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that models have been compiled to."""
    found, original = [], torch.compile

    def counted(graph, inputs):
        found.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda f, dynamic: original(f, backend=counted, dynamic=dynamic))
    torch._dynamo.reset()
    yield found
    torch._dynamo.reset()


def test_one_graph_serves_every_step_and_depth_and_a_memory_length_adds_one(graphs):
    """Of training: what differs between the first recurrence and the rest must not make graphs of its own."""
    model = build(halting_bias=-1.0)
    model.compile()
    tokens = torch.randint(1, V, (2, 17), generator=torch.Generator().manual_seed(0))

    def train(length, depth=None):
        memory = model.new_memory(2, length)
        for _ in range(2):
            out = model(tokens[:, :-1], tokens[:, 1:], memory, depth=depth)
            out.loss.backward()
            memory = out.memory
        return len(graphs)

    first = train(8)
    assert train(8, depth=3) == train(8, depth=2) == first
    assert train(24) == first + 1


@pytest.mark.parametrize("finish", [False, True])
def test_an_exit_head_that_is_fitted_and_its_tolerance_add_no_graph(graphs, finish):
    """By gain, or by loss before a last step for all."""
    settings = dict(exit_by="loss", finish=True) if finish else {}
    model, tokens = build(halting="exit", tolerance=1.2, **settings), text(length=21)
    model.compile()
    depth = torch.arange(60).view(3, 20) % 6
    part, depth = (tokens[:, :-1], tokens[:, 1:]), torch.where(depth == 1, 2, depth) if finish else depth
    fit, found, depths = ExitFit(model, target_depth=3), [], []
    for _ in range(3):
        states, gains = fit.examples(*part)
        fit.update(states.flatten(1, 2), gains.flatten(1))
        model(*part, depth=depth).loss.backward()
        with torch.no_grad():
            depths.append(model(*part).depth.float().mean().item())
        found.append(len(graphs))
    assert found[0] == found[2] > 0 and depths[1] == pytest.approx(3, abs=0.75)
    assert finish or depths[0] != depths[1]  # bars are of the batch at once, a tolerance of the one before


def test_a_capacity_is_a_graph(graphs, monkeypatch):
    """Of the second part of a step; the first is one graph for all, and the second one more where nothing is packed."""
    model, tokens = build(), text(2, 33)
    model.capacities = (0.25, 0.5, 0.75)
    model.compile()
    asked, capacity = [], model._capacity
    monkeypatch.setattr(model, "_capacity", lambda *a: asked.append(capacity(*a)) or asked[-1])

    def train(depth, length=8):
        """Of two segments whose tokens take the steps `depth`, each an equal share of them."""
        memory = model.new_memory(2, length)
        depth = torch.tensor(depth).repeat_interleave(32 // len(depth)).expand(2, 32)
        for _ in range(2):
            out = model(tokens[:, :-1], tokens[:, 1:], memory, depth)
            out.loss.backward()
            memory = out.memory
        return len(graphs)

    dense = train([5, 5])
    assert train([1, 5]) == dense + 1 and set(asked) == {None, 32}
    assert train([1, 2, 3, 5]) == dense + 3 and set(asked) == {None, 48, 32, 16}
    assert train([1, 1, 2, 4]) == train([3, 3, 1, 3]) == dense + 3
    assert train([1, 2, 3, 5], length=24) == dense + 4  # only the attention knows of memory


@torch.no_grad()
def test_scoring_by_a_compiled_model_leaves_out_halted_tokens(graphs, monkeypatch):
    """As traced: the results are those of the dense recurrence, and each number of rows is a graph of each half of a
    step, once: other tokens and depths add none."""
    model, dense, used = build(max_depth=8), build(max_depth=8), []
    dense.packing, model.capacities = 0, (0.25, 0.5, 0.75)
    model.compile()
    capacity = model._capacity
    monkeypatch.setattr(model, "_capacity", lambda *a: used.append(capacity(*a)) or used[-1])

    def score(seed, bias):
        tokens, memories = text(2, 64, seed), [m.new_memory(2, 16) for m in (model, dense)]
        for m in (model, dense):
            m.halting.bias.fill_(bias)
        for part in tokens.split(32, 1):
            here, there = (m(part, memory=memory) for m, memory in zip((model, dense), memories))
            assert torch.equal(here.depth, there.depth)
            torch.testing.assert_close(here.logits, there.logits, atol=1e-4, rtol=0)
            torch.testing.assert_close(here.ponder, there.ponder)
            memories = here.memory, there.memory

    for seed, bias in ((1, -1.2), (2, -1.5), (3, -0.8), (4, -1.0)):
        score(seed, bias)
    assert {16, 32, 48} <= set(used)
    found = len(graphs)
    assert found <= 2 * 4  # all tokens, and three capacities
    for seed in range(5, 9):
        score(seed, -1.1)
    assert len(graphs) == found
