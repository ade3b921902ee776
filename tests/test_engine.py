"""The engine against decoding one text after the other, in PyTorch and with its kernels in Triton's interpreter
(test_interpreter.py)."""

import itertools
import os

import pytest
import torch

import engine
import engine_kernels
import engine_tick
from decoding import Session, generate
from engine import Engine

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
PROMPTS = [[0], [0, *range(40, 60)], [0, 7, 7], [0, *range(100, 111)], [0, 5]]
LIMITS = [9, 5, 12, 7, 3]
plain = pytest.mark.skipif(INTERPRETED, reason="has no kernel of its own")
pytestmark = pytest.mark.filterwarnings("error:decoding on")  # without kernels where these should serve


@pytest.fixture(autouse=True)
def few_launches(monkeypatch):
    monkeypatch.setattr(engine, "AHEAD", 3)
    if INTERPRETED:  # programs take turns there, at a cost each: a few of every kernel, the last one of the head ragged
        tiles = dict.fromkeys(engine_tick.TILES, (2, 16)) | {"head": (2, 64), "down": (32, 4), "pick": (32, 4)}
        tiles["attend"] = (16, 4)  # of 65 keys: programs read two or three times
        monkeypatch.setattr(engine_tick, "TILES", tiles)
        monkeypatch.setattr(engine_tick, "FP8_TILES", tiles)
        monkeypatch.setattr(engine_tick, "SPLITS", 2)
        monkeypatch.setattr(engine_tick, "PROGRAMS", 2)  # of three tiles
        monkeypatch.setattr(engine_kernels, "CHUNK", engine_kernels.tl.constexpr(16))
        monkeypatch.setattr(engine_tick, "WIDE", 16)


def one_by_one(model, prompts, limits, **options):
    """By the model alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "has_kernels", lambda *_: False)
        texts = [list(generate(model, prompt, limit, 0, **options)) for prompt, limit in zip(prompts, limits)]
    return [([token for token, _ in text], [depth for _, depth in text]) for text in texts]


def together(model, prompts, limits, rows, memory_length=64, **options):
    made = Engine(model, rows, memory_length, longest=12, **options).run(prompts, limits)
    return [(one.tokens, one.depths) for one in made]


@pytest.fixture
def tiny(tiny_model):
    def build(**changes):
        model = tiny_model(vocab_size=300, document_start=0, **changes)
        for block in model.recur:  # products that the limit of SwiGLU cuts, as small for the rest of the model
            for layer in (block.gate, block.up):
                layer.weight.data[0] *= 200
            block.down.weight.data[:, 0] *= 1e-2
        if model.gains is not None:  # so that rows must know which step they are at
            model.gains.data.uniform_(0.5, 1.5)
        if model.inject is not None:
            model.inject.data.uniform_(0.5, 1.5)
        model.padding[0] = 2.0  # added to the logit of <|endoftext|>, so that some texts end early
        if changes.get("halting") == "exit":
            model.halting.bias.data.normal_()
        return model

    return build


@pytest.mark.parametrize("rows, prompts", [(1, 1), (2, 2)] if INTERPRETED else [(1, 5), (3, 5)])
@pytest.mark.parametrize(
    "changes, depth",
    [({}, None), (dict(halting="fixed", memory="last_step"), 3),
     (dict(halting="exit", exit_by="loss", tolerance=-0.5, min_depth=3, finish=True), None),
     (dict(halting="exit", exit_by="loss", finish=True), 2)] if INTERPRETED else
    [({}, None), (dict(halting="fixed", memory="last_step"), 3), ({}, 2), (dict(halting="fixed"), None),
     (dict(halting="stability", tolerance=1.3), None), (dict(memory="last_step", step_gains=False), None),
     (dict(halting="exit", tolerance=0.5), None), (dict(sandwich=True), None),
     (dict(injection="none"), None), (dict(cross_documents=True), None),
     (dict(halting="exit", exit_by="loss", tolerance=-0.5, min_depth=3, finish=True), None),
     (dict(finish=True), None), (dict(finish=True), 2), (dict(finish=True, halting="fixed", step_gains=False), 4)],
)  # fmt: skip
def test_rows_are_their_texts_one_by_one(tiny, changes, depth, rows, prompts):
    model, prompts = tiny(**changes), PROMPTS[:prompts]
    limits = [5, 4][: len(prompts)] if INTERPRETED else LIMITS
    found = together(model, prompts, limits, rows, depth=depth)
    assert found == one_by_one(model, prompts, limits, depth=depth, memory_length=64)
    varies = depth is None and changes.get("halting") != "fixed"
    assert (len({depth for _, depths in found for depth in depths}) > 1) == varies


@pytest.mark.skipif(not INTERPRETED, reason="is about the kernels")
@pytest.mark.parametrize(
    "changes", [{}, dict(halting="exit", exit_by="loss", tolerance=-0.5, min_depth=3, finish=True)]
)
@pytest.mark.parametrize("rows, scaled", [(4, False), (1, False), (1, True)])
def test_a_tick_is_its_definition(tiny, monkeypatch, changes, rows, scaled):
    """All numbers of the state, of rows that come one after the other: one ends early, and one stays idle. scaled:
    with scales as FP8 weights have them."""
    by_row = lambda weight: weight.float().abs().amax(-1)  # noqa: E731
    monkeypatch.setattr(engine, "quantized", lambda weight: (weight / by_row(weight)[..., None], by_row(weight)))
    told = []
    for kernels in (True, False):
        machine = Engine(tiny(**changes), rows, 64, longest=12, weights=torch.float8_e4m3fn if scaled else None)
        if not kernels:
            machine.kernels, machine.fused = None, False
        told.append([])
        for i, prompt in enumerate([*PROMPTS[1 : min(rows + 1, 4)], None, None, None]):
            if prompt:
                machine.join(i, prompt, 2 if i == 1 else 12)
            machine.tick()
            told[-1] += [(name, x.clone()) for name, x in vars(machine.state).items()]
    for (name, found), (_, expected) in zip(*told):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    assert len({int(step) for name, steps in told[0] if name == "step" for step in steps[:3]}) > 2


@pytest.mark.parametrize("rows", [1] if INTERPRETED else [1, 2])
def test_the_cache_rolls(tiny, rows):
    model, prompts, limits = tiny(max_depth=2), PROMPTS[2:4], [6] if INTERPRETED else [12, 12]
    found = together(model, prompts[: len(limits)], limits, rows, memory_length=6, segment=5)
    assert found == one_by_one(model, prompts, limits, memory_length=6, segment=5)


def test_every_step_may_have_its_own_block(tiny):
    model = tiny(share=False)
    assert together(model, PROMPTS[1:2], [4], 1) == one_by_one(model, PROMPTS[1:2], [4])
    with pytest.raises(ValueError, match="own blocks at every step cannot be shared"):
        Engine(model, 2)


@pytest.mark.skipif(not INTERPRETED, reason="is about the kernels")
def test_a_conversation_goes_on_where_the_engine_ended(tiny, monkeypatch):
    """Three turns, the second left early, with the kernels and without."""
    model, told = tiny(max_depth=2), {}
    model.padding[0] = -torch.inf
    for kernels in (True, False):
        if not kernels:
            monkeypatch.setattr(engine, "has_kernels", lambda *_: False)
        session = Session(model, memory_length=12, segment=8)
        told[kernels] = []
        for prompt, taken in (([0, 5, 6], 4), ([9], 2), ([11, 12], 4)):
            session.feed(prompt)
            told[kernels] += itertools.islice(session.stream(4, temperature=0), taken)
        told[kernels].append(session.text)
    assert told[True] == told[False] and len(told[True]) == 11


@pytest.mark.skipif(not INTERPRETED, reason="is about the kernels")
@pytest.mark.parametrize(
    "rows, kernel",
    [
        (1, "_qkv"),
        (1, "_attend"),
        (1, "_output"),
        (1, "_gate_up"),
        (1, "_down"),
        (1, "_head"),
        (2, "_enter"),
        (2, "_merge"),
        (2, "_halt"),
        (2, "_attend"),
        (2, "_residual"),
        (2, "_pick"),
        (2, "_next"),
    ],
)
@pytest.mark.parametrize("fault", ["wrong", "broken"])
def test_kernels_that_fail_are_left_out(tiny, monkeypatch, rows, kernel, fault):
    """One that writes nothing, or one that does not compile: the text is the same, and a warning says why."""

    class Faulty:
        def __getitem__(self, grid):
            def launch(*arguments, **constants):
                if fault == "broken":
                    raise RuntimeError("ptxas is missing\nand more")

            return launch

    model, prompts, limits = tiny(max_depth=2), PROMPTS[:rows], [3, 2][:rows]
    model.padding[0] = -torch.inf  # what is drawn where nothing is written
    monkeypatch.setattr(engine_kernels, kernel, Faulty())
    with pytest.warns(
        UserWarning, match="ptxas is missing$" if fault == "broken" else "off by|otherwise|another token"
    ):
        found = together(model, prompts, limits, rows)
    assert found == one_by_one(model, prompts, limits, memory_length=64)


@pytest.mark.skipif(not INTERPRETED, reason="is about the kernels")
@pytest.mark.parametrize("rows", [1, 2])
def test_kernels_with_another_exit_head_are_left_out(tiny, rows):
    model = tiny(halting="exit", exit_by="loss", tolerance=-0.5, min_depth=3, finish=True)
    machine = Engine(model, rows, 64, longest=12)
    machine.join(0, PROMPTS[1], 9)
    machine.kernels.head[1].sub_(0.2)
    with pytest.warns(UserWarning, match="they halt otherwise"):
        machine.check()
    assert machine.kernels is None and model.tolerance == -0.5


@plain
def test_waiting_for_all_rows_changes_no_text(tiny):
    model = tiny()
    machine = Engine(model, 2, 64, longest=12)
    assert machine.run(PROMPTS, LIMITS, together=True) == machine.run(PROMPTS, LIMITS)


@plain
def test_until_ends_a_text_and_frees_its_row(tiny):
    model = tiny()
    whole = Engine(model, 2, 64, longest=12).run(PROMPTS, LIMITS)
    made = Engine(model, 2, 64, longest=12).run(PROMPTS, LIMITS, until=lambda i, tokens: i == 2 and len(tokens) == 4)
    assert made[2].tokens == whole[2].tokens[:4] and len(whole[2].tokens) > 4
    assert [one.tokens for i, one in enumerate(made) if i != 2] == [one.tokens for i, one in enumerate(whole) if i != 2]


@pytest.mark.parametrize("rows, n", [(1, 20), (2, 20)] if INTERPRETED else [(4, 400)])
def test_tokens_are_drawn_from_their_distribution(tiny, rows, n):
    """All probability is on three tokens: half, a third, a sixth, whatever was read."""
    model = tiny(halting="fixed", max_depth=1)
    torch.nn.init.zeros_(model.embedding.weight)
    model.padding.fill_(-torch.inf)
    model.padding[torch.tensor([5, 6, 7])] = torch.tensor([3.0, 2.0, 1.0]).log()
    made = Engine(model, rows, 64, longest=n, temperature=1.0).run([[0]] * rows, [n] * rows)
    counts = torch.tensor([token for one in made for token in one.tokens]).bincount(minlength=8)
    assert counts.sum() == rows * n == counts[5:].sum()
    expected = rows * n * torch.tensor([3.0, 2.0, 1.0]) / 6
    assert (((counts[5:] - expected) ** 2 / expected).sum()) < 14, "chi-squared, two degrees of freedom: p = 0.001"


@plain
def test_top_k_1_is_greedy(tiny):
    model = tiny()
    options = dict(prompts=PROMPTS, limits=LIMITS, rows=2)
    assert together(model, **options, temperature=2.0, top_k=1) == together(model, **options)


@plain
def test_rows_of_float8_weights_keep_three_bits(tiny):
    weight = torch.randn(2, 40, 64) * torch.logspace(-3, 3, 40)[:, None]
    rounded, scale = engine.quantized(weight)
    error = (rounded.float() * scale[..., None] - weight).abs()
    assert (
        rounded.dtype == torch.float8_e4m3fn
        and (error <= weight.abs() / 16 + weight.abs().amax(-1, True) / 2**14).all()
    )
    assert together(tiny(), PROMPTS[:1], [4], 1, weights=torch.float8_e4m3fn)[0][0]


@plain
@pytest.mark.parametrize(
    "changes, options, message",
    [(dict(prelude=1), {}, "without prelude and coda"), (dict(injection="hyper"), {}, "not built in"),
     ({}, dict(depth=5), "depth must lie in 1..4, not 5"),
     ({}, dict(rows=2, weights=torch.float8_e4m3fn), "FP8 weights are for one row")],
)  # fmt: skip
def test_what_it_cannot_run_is_refused(tiny, changes, options, message):
    with pytest.raises(ValueError, match=message):
        Engine(tiny(**changes), **dict(rows=1) | options)


@plain
def test_a_limit_beyond_its_room_is_refused(tiny):
    with pytest.raises(ValueError, match="limit 13 is beyond longest = 12"):
        Engine(tiny(), 1, longest=12).run([[0]], [13])


@plain
@pytest.mark.parametrize("weight", ["*bf16", "*fp8e4nv"])
@pytest.mark.parametrize("capability", [89, 90, 120])
def test_kernels_compile(capability, weight):
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    f, low, i, whole, numbers = "*fp32", "*bf16", "*i64", "i32", ["i32"] * 4
    early, scaled = dict(EARLY=capability >= 90), dict(SCALED=weight != "*bf16")
    width, size, own = (
        dict(WIDTH=1280),
        dict(WIDTH=1280, BLOCK=2048),
        dict(GROUPS=2, WARPS=4, OWN=low != weight) | scaled,
    )
    act, exits = (dict(HALTING=name, ADAPTIVE=True) for name in ("act", "exit"))
    last, end, half = dict(LAST=7), dict(END=50256, MANY=1024, LAST=0), dict(HALF=32)
    before, texts = [f, f, f, i, i, f, f, f, whole, f], [f, whole, whole, whole]
    for kernel, types, constants in (
        ("_qkv", [f, f, i, f, f, i, "*fp64", f, weight, f, f, f, f, f, f, f, i, whole], size | half | own),
        ("_attend", [f, f, low, low, i, i, i, f, f, f, *numbers], half | dict(TILE=64, PARTS=4)),
        ("_output", [f, f, f, f, i, f, weight, f, f, whole], width | own | dict(HEAD=64, PARTS=4)),
        ("_gate_up", [f, i, f, weight, f, f, whole], size | own),
        ("_down", [f, f, i, f, weight, f, f, whole],
         width | scaled | dict(TILE=2, OWN=low != weight, HIDDEN=10240, BLOCK=2048)),
        ("_halt", [*before, i, low, i, i, whole], size | act | last),
        ("_halt", [*before, i, low, i, i, whole], size | exits | last),
        ("_enter", [f, f, i, f, f, i, "*fp64", f, f, low], size | half),
        ("_merge", [f, f, f, low], width | dict(HEAD=64, PARTS=1)),
        ("_residual", [f, low, i, f, f, low], size | dict(GAIN=1, NORM=True)),
        ("_pick", [low, i, i, i, f, f, "*i32", whole, whole, f], dict(TILE=4096, RANDOM=True)),
        ("_head", [*before, whole, i, "*i32", f, f, weight, f, whole, i, f, "*i32", *[i] * 4, f, f, f, i, i, i, *texts],
         size | scaled | act | end | dict(GROUPS=2, WARPS=4, RANDOM=True)),
        ("_head", [*before, whole, i, "*i32", f, f, weight, f, whole, i, f, "*i32", *[i] * 4, f, f, f, i, i, i, *texts],
         size | scaled | exits | end | last | dict(GROUPS=2, WARPS=4, RANDOM=True)),
        ("_next", [i, f, "*i32", i, i, i, i, f, f, f, f, i, i, i, i, *texts, whole], size | end),
    ):  # fmt: skip
        kernel, constants = getattr(engine_kernels, kernel), constants | early
        assert len(types) + len(constants) == len(kernel.arg_names)
        types = dict(zip(kernel.arg_names, types + ["constexpr"] * len(constants)))
        assert triton.compile(ASTSource(kernel, types, constants), target=GPUTarget("cuda", capability, 32)).asm[
            "cubin"
        ]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("rows", [1, 3])
def test_an_early_start_changes_nothing_on_cuda(tiny, monkeypatch, rows):
    """Kernels that start beside the one before against the same kernels one by one: the same states to the bit."""
    monkeypatch.undo()  # sizes, of which a GPU's are the real ones
    model, told = tiny(max_depth=4).cuda(), []
    model.padding[0] = -torch.inf
    for early in (True, False):
        machine = Engine(model, rows, 64, longest=300)
        machine.kernels.early &= early
        for row in range(rows):
            torch.manual_seed(row)  # of a row's noise
            machine.join(row, PROMPTS[row], 300)
        machine.ticks(256)
        told.append(vars(machine.state))
    assert all(torch.equal(told[0][name], told[1][name]) for name in told[0])
    assert told[0]["written"].min() > 50
