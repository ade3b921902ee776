"""Decoding against the full forward and known logits: one text, several at once, conversations, stop strings."""

import itertools
import signal
from types import SimpleNamespace

import pytest
import torch

import chat
import data
from decoding import Session, Stops, cut, generate, generate_batch, penalize, truncate
from model import ModelConfig, RecurrentTransformer

PROMPTS = [[0], [0, *range(40, 60)], [0, 7, 7], [0, *range(100, 111)]]


@pytest.fixture(scope="module")
def model(tiny_model):
    """With a small vocabulary, as no text is decoded, in which 0 is <|endoftext|> and ends every other text early."""
    model = tiny_model(vocab_size=300, document_start=0)
    model.padding[0] = 2.0  # added to its logit
    return model


@pytest.fixture(scope="module")
def endless(tiny_model):
    """The same, but no text ends."""
    model = tiny_model(vocab_size=300, document_start=0)
    model.padding[0] = -torch.inf
    return model


@pytest.fixture
def speaker(tiny_model):
    """A model that writes nothing but signs of one token each, of which no two make another token: what it wrote, and
    encoded again, is the same ids."""
    model = tiny_model()
    signs = data.load_tokenizer().encode_ordinary("§¶©°»«±×€☆♥●")
    assert len(signs) == 12
    model.padding[[i for i in range(data.EOT) if i not in signs]] = -torch.inf
    model.padding[data.EOT :] = -torch.inf
    return model


class Scripted:
    """A model that predicts a fixed sequence of tokens, whatever it reads, at depths 1, 2, 1, 2, ..."""

    def __init__(self, tokens):
        self.tokens, self.read, self.config = tokens, [], ModelConfig(max_depth=4)
        self.embedding = SimpleNamespace(weight=torch.zeros(1))

    def new_memory(self, batch, length):
        return SimpleNamespace(settle=lambda: None, predictions=0)

    def __call__(self, tokens, memory, depth, keep):
        self.read.append(tokens.shape[1])
        logits, nth = torch.zeros(1, tokens.shape[1], data.VOCAB_SIZE), memory.predictions
        logits[0, -1, self.tokens[nth]] = 50.0
        memory = SimpleNamespace(settle=lambda: None, predictions=nth + 1)
        return SimpleNamespace(logits=logits[keep], depth=torch.full(tokens.shape, 1 + nth % 2), memory=memory)


def ids(made):
    return [token for token, _ in made]


# -------------------------------------------------------------------------------------------------- generate


@pytest.mark.parametrize("depth", [None, 2])
@torch.no_grad()
def test_greedy_equals_argmax_of_the_full_forward(endless, depth):
    prompt = [0, *range(40, 60)]
    made = list(generate(endless, prompt, 12, temperature=0, memory_length=64, segment=8, depth=depth))
    out = endless(torch.tensor([prompt + ids(made)]), depth=depth)
    logits, start = out.logits[0, :, :300], len(prompt) - 1
    assert ids(made) == logits.argmax(-1)[start:-1].tolist() and len(made) == 12
    assert [spent for _, spent in made] == out.depth[0, start:-1].tolist()
    assert depth is None or {spent for _, spent in made} == {depth}


def test_top_k_1_is_greedy(endless):
    greedy = list(generate(endless, [0, 5], 20, temperature=0))
    assert list(generate(endless, [0, 5], 20, temperature=5.0, top_k=1)) == greedy


def test_the_same_seed_gives_the_same_text(endless):
    def text(seed):
        return list(generate(endless, [0, 5], 20, generator=torch.Generator().manual_seed(seed)))

    assert text(1) == text(1) != text(2)


def test_memory_rolls_past_its_length(endless):
    made = list(generate(endless, [0, *range(1, 90)], 60, memory_length=8, segment=16))
    assert len(made) == 60
    assert all(token < 300 for token, _ in made)  # the padded rows of the head are never drawn


def test_the_prompt_is_read_once_in_segments():
    scripted = Scripted([7] * 20)
    list(generate(scripted, [data.EOT] + [1] * 19, 1, temperature=0, segment=8))
    assert scripted.read == [8, 8, 4]
    list(generate(scripted, [data.EOT], 3, temperature=0, segment=8))
    assert scripted.read[3:] == [1, 1, 1]


def test_stops_at_end_of_text():
    assert list(generate(Scripted([11, 12, data.EOT, 13]), [data.EOT], 9, temperature=0)) == [(11, 1), (12, 2)]


def test_depth_outside_the_model_is_refused(model):
    with pytest.raises(ValueError, match="1..4"):
        next(generate(model, [0], 1, depth=5))
    with pytest.raises(ValueError, match="1..4"):
        generate_batch(model, [[0]], [1], depth=5)


# -------------------------------------------------------------------------------------------------- truncate


def test_top_p_keeps_the_smallest_set_that_reaches_p():
    logits = torch.tensor([0.1, 0.5, 0.25, 0.15]).log()
    cases = [(0.5, [1]), (0.51, [1, 2]), (0.75, [1, 2]), (0.76, [1, 2, 3]), (1e-9, [1]), (1.0, [0, 1, 2, 3])]
    for p, kept in cases:
        probabilities = truncate(logits, top_p=p - 1e-7 if p in (0.5, 0.75) else p)  # logits are rounded
        assert probabilities.nonzero().flatten().tolist() == kept, p
        assert probabilities.sum().item() == pytest.approx(1)


def test_top_p_is_a_share_of_what_top_k_left():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    assert truncate(logits, top_k=2, top_p=0.5).tolist() == [1, 0, 0, 0]  # 0.4 of 0.7
    assert truncate(logits, top_k=2).tolist() == pytest.approx([4 / 7, 3 / 7, 0, 0])
    assert truncate(logits, top_k=99).tolist() == pytest.approx([0.4, 0.3, 0.2, 0.1])


def test_temperature():
    logits = torch.tensor([1.0, 0.0])
    assert truncate(logits, 0.5)[0].item() == pytest.approx(torch.sigmoid(torch.tensor(2.0)).item())
    assert truncate(logits, 1e-30).tolist() == [1, 0]


@pytest.mark.parametrize("options", [(0.7,), (1.0, 5), (1.3, None, 0.6), (2.0, 20, 0.4)])
def test_rows_are_truncated_as_by_themselves(options):
    logits = torch.randn(3, 4, 50, generator=torch.Generator().manual_seed(1))
    logits *= torch.tensor([0.1, 1, 5])[:, None, None]
    rows = [truncate(row, *options) for row in logits.view(12, 50)]
    assert torch.equal(truncate(logits, *options).view(12, 50), torch.stack(rows))


# -------------------------------------------------------------------------------------------------- penalty


def test_the_penalty_divides_positive_and_multiplies_negative_logits():
    logits, seen = torch.tensor([[3.0, 3.0, -2.0, -2.0, 0.0]]), torch.tensor([[True, False, True, False, True]])
    assert penalize(logits, seen, 1.5).tolist() == [[2.0, 3.0, -3.0, -2.0, 0.0]]
    assert torch.equal(penalize(logits, seen, 1.0), logits)


@torch.no_grad()
def test_what_occurred_is_penalized_but_the_end_of_the_text(endless):
    prompt, penalty = [0, 5, 6, 7], 3.0
    made = ids(generate(endless, prompt, 30, temperature=0, repetition_penalty=penalty))
    logits, text = endless(torch.tensor([prompt + made])).logits[0, :, :300], prompt + made
    for n in range(len(prompt), len(text)):
        seen = torch.zeros(300, dtype=torch.bool)
        seen[text[1:n]] = True  # without the first, which opens it
        assert text[n] == penalize(logits[n - 1], seen, penalty).argmax()
    assert made != ids(generate(endless, prompt, 30, temperature=0))
    assert len(set(ids(generate(endless, prompt, 60, temperature=0, repetition_penalty=1e9)))) == 60
    scripted = lambda: Scripted([9, data.EOT, 9])  # noqa: E731
    assert ids(generate(scripted(), [data.EOT], 5, temperature=0, repetition_penalty=1e9)) == [9]


# -------------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("cross_documents", [False, True])
@pytest.mark.parametrize("segment, depth, penalty", [(512, None, 1.0), (6, None, 2.0), (512, 2, 1.0)])
def test_a_batch_is_its_prompts_one_by_one(tiny_model, segment, depth, penalty, cross_documents):
    model = tiny_model(vocab_size=300, document_start=0, cross_documents=cross_documents)
    model.padding[0] = 2.0
    options = dict(segment=segment, depth=depth, repetition_penalty=penalty)
    limits = [3, 40, 40, 40]
    made = generate_batch(model, PROMPTS, limits, **options)
    for prompt, limit, one in zip(PROMPTS, limits, made):
        alone = list(generate(model, prompt, limit, temperature=0, **options))
        assert list(zip(one.tokens, one.depths)) == alone
        assert one.ended or len(alone) == limit


def test_rows_end_by_themselves(model):
    made = generate_batch(model, PROMPTS, [40] * 4)
    assert {one.ended for one in made} == {True, False}  # by the fixture's choice
    assert all(0 not in one.tokens and one.ended == (len(one.tokens) < 40) for one in made)
    limited = generate_batch(model, PROMPTS, [0, 5, 0, 1])
    assert [len(one.tokens) for one in limited] == [0, min(5, len(made[1].tokens)), 0, min(1, len(made[3].tokens))]
    assert generate_batch(model, [], []) == [] and not generate_batch(model, [[0]], [0])[0].ended


@pytest.mark.parametrize("cross_documents", [False, True])
def test_until_ends_the_prompt_that_it_is_asked_for(tiny_model, cross_documents):
    model = tiny_model(vocab_size=300, document_start=0, cross_documents=cross_documents)
    model.padding[0] = -torch.inf
    made = generate_batch(model, PROMPTS, [9] * 4, until=lambda i, tokens: len(tokens) > 2 * i)
    assert [len(one.tokens) for one in made] == [1, 3, 5, 7] and not any(one.ended for one in made)


def test_one_row_is_drawn_as_by_generate(model):
    for seed in range(3):
        options = dict(temperature=0.9, top_k=40, top_p=0.9)
        one = list(generate(model, PROMPTS[1], 20, generator=torch.Generator().manual_seed(seed), **options))
        generator = torch.Generator().manual_seed(seed)
        assert generate_batch(model, PROMPTS[1:2], [20], generator=generator, **options)[0].tokens == ids(one)


@torch.no_grad()
def test_rows_are_drawn_from_their_own_distributions(model):
    prompts, n, options = [[0, 5], [0, 200, 201, 202]], 3000, (1.0, 6, 0.9)
    generator = torch.Generator().manual_seed(0)
    made = generate_batch(model, prompts * n, [1] * 2 * n, *options, generator=generator)
    for row, prompt in enumerate(prompts):
        wanted = truncate(model(torch.tensor([prompt])).logits[0, -1, :300], *options)
        drawn = torch.tensor([(one.tokens or [0])[0] for one in made[row::2]])
        found = torch.bincount(drawn, minlength=300) / n
        assert found.tolist() == pytest.approx(wanted.tolist(), abs=0.03)
        assert (found[wanted == 0] == 0).all()


def test_a_prompt_that_would_see_padding_is_refused(model):
    for prompt in ([5, 6], []):
        with pytest.raises(ValueError, match="prompt 1 opens with .*<|endoftext|>"):
            generate_batch(model, [[0], prompt], [1, 1])


# -------------------------------------------------------------------------------------------------- sessions


def say(session, text, limit=15):
    """The answer to a user's turn, greedy."""
    turn, _ = chat.encode([{"role": "user", "content": text}], answer=True)
    session.feed(turn.tolist()[1 if session.text else 0 :])
    return ids(session.stream(limit, temperature=0))


@pytest.mark.parametrize("segment", [512, 8])
@pytest.mark.parametrize("depth", [None, 3])
def test_a_session_answers_as_if_it_read_the_whole_conversation(speaker, segment, depth):
    session, conversation = Session(speaker, 512, segment, depth), []
    for question in ("Hello there", "Why is that? 🤖", "", "§ <|user|> done"):
        conversation.append({"role": "user", "content": question})
        prompt = chat.encode(conversation, answer=True)[0].tolist()
        whole = ids(generate(speaker, prompt, 15, temperature=0, depth=depth))
        assert say(session, question) == whole and session.text == prompt + whole and len(whole) == 15
        conversation.append({"role": "assistant", "content": data.load_tokenizer().decode(whole)})


def test_the_history_is_not_read_again_nor_the_end_of_an_answer():
    scripted = Scripted([21, 22, data.EOT, 23, data.EOT])
    session = Session(scripted, 64)
    session.feed([data.EOT, 1, 2])
    assert ids(session.stream(9, temperature=0)) == [21, 22]
    session.feed([3, 4])
    assert ids(session.stream(9, temperature=0)) == [23]
    assert scripted.read == [3, 1, 1, 2, 1] and session.text == [data.EOT, 1, 2, 21, 22, 3, 4, 23]


def test_an_answer_left_early_is_history_as_far_as_it_went(endless):
    session, text = Session(endless, 64), [0, 5, 6]
    session.feed(text)
    text = text + ids(itertools.islice(session.stream(9, temperature=0), 4))
    assert len(text) == 7 and session.text == text
    session.feed([8])
    assert ids(session.stream(5, temperature=0)) == ids(generate(endless, [*text, 8], 5, temperature=0))


@pytest.mark.parametrize("draft", [None, (4, 3)])
@pytest.mark.parametrize("kept", [0, 3, 4, 6, 7, 12])
def test_a_text_that_is_replaced_is_continued_as_if_the_other_had_not_been(endless, draft, kept):
    session, text = Session(endless, 64, segment=4, draft=draft), [0, 5, 6]
    session.feed(text)
    text = text + ids(session.stream(9, temperature=0))
    replaced = [*text[:kept], 0, 7] if kept == 0 else [*text[:kept], 9]
    session.replace(replaced)
    assert session.text == replaced
    session.feed([8])
    wanted = ids(generate(endless, [*replaced, 8], 5, temperature=0, segment=4))
    assert ids(session.stream(5, temperature=0)) == wanted


def test_a_text_is_read_anew_only_where_other_ids_were_read():
    scripted = Scripted([21, 22, 23, data.EOT])
    session = Session(scripted, 64)
    session.feed([data.EOT, 1, 2])
    stream = session.stream(9, temperature=0)
    assert [next(stream)[0], next(stream)[0]] == [21, 22]  # of which the second is not read yet
    session.replace([data.EOT, 1, 2, 21, 3])
    assert ids(session.stream(9, temperature=0)) == [23]
    session.replace([data.EOT, 1, 2, 4])
    assert ids(session.stream(9, temperature=0)) == [21, 22, 23]
    assert scripted.read == [3, 1, 1, 1, 4, 1, 1, 1]


def interrupt(*_):
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("reading", [True, False])
def test_ctrl_c_within_the_model_loses_nothing(tiny_model, reading, monkeypatch):
    model = tiny_model(vocab_size=300, document_start=0)
    model.padding[0] = -torch.inf
    session, text = Session(model, 64, segment=4), [0, 5, 6, 7, 8, 9]
    session.feed(text)
    if not reading:
        text = text + ids(session.stream(3, temperature=0))
        session.feed([8])
        text.append(8)
    with monkeypatch.context() as patch:
        patch.setattr(model.recur[0], "finish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            next(session.stream(1))
    assert session.text == text
    assert ids(session.stream(5, temperature=0)) == ids(generate(model, text, 5, temperature=0, segment=4))


def test_ctrl_c_while_memory_is_written_loses_nothing(endless, monkeypatch):
    session, text = Session(endless, 64, segment=4), [0, 5, 6, 7, 8, 9]
    session.feed(text)
    text = text + ids(session.stream(3, temperature=0))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "_foreach_copy_", interrupt)
        with pytest.raises(KeyboardInterrupt):
            next(session.stream(1))
    assert ids(session.stream(5, temperature=0)) == ids(generate(endless, text, 5, temperature=0))


# -------------------------------------------------------------------------------------------------- drafts


@pytest.fixture
def passes(monkeypatch):
    """The number of tokens of every forward pass, in order."""
    read, forward = [], RecurrentTransformer.forward
    monkeypatch.setattr(
        RecurrentTransformer,
        "forward",
        lambda model, tokens, *args, **named: (read.append(tokens.shape[1]), forward(model, tokens, *args, **named))[1],
    )
    return read


@pytest.mark.parametrize("memory_length", [2, 64])  # shorter than a draft and rolling over, and never full
@pytest.mark.parametrize(
    "changes, depth",
    [
        ({}, None),
        ({}, 3),
        ({"halting": "fixed"}, None),
        ({"halting": "stability", "tolerance": 0.7}, None),
        ({"halting": "fixed", "prelude": 1, "coda": 1, "share": False, "cross_documents": True}, None),
    ],
)
def test_greedy_text_and_depths_are_those_without_drafts(tiny_model, passes, changes, depth, memory_length):
    model = tiny_model(vocab_size=300, document_start=0, **changes)
    model.padding[0] = 1.5
    for prompt, penalty, draft in (([0, 5, 6], 1.0, (1, 3)), ([0], 1.3, (3, 2))):
        options = dict(temperature=0, memory_length=memory_length, depth=depth, repetition_penalty=penalty)
        plain = list(generate(model, prompt, 15, **options))
        passes.clear()
        assert list(generate(model, prompt, 15, draft=draft, **options)) == plain
        assert len(plain) < 5 or passes.count(draft[1] + 1) > 1


def test_drafts_by_the_same_steps_all_pass(endless, passes):
    """One pass reads the prompt, then three drafts and a pass of four tokens make four tokens; the last is no draft."""
    for temperature in (0, 1.0):
        for memory_length in (5, 64):
            passes.clear()
            options = dict(temperature=temperature, memory_length=memory_length, depth=4, repetition_penalty=1.2)
            options |= dict(top_k=50, top_p=0.9, generator=torch.Generator().manual_seed(0))
            assert len(list(generate(endless, [0, 5, 6], 1 + 3 * 4 + 2, draft=(4, 3), **options))) == 15
            assert passes == [3, *[1, 2, 3, 4] * 3, 1, 2]


class Branches:
    """Stands for torch.multinomial and torch.bernoulli: `texts` runs a function once for every outcome of all draws."""

    def choose(self, weights):
        if len(self.taken) == len(self.path):
            self.path.append([i for i, weight in enumerate(weights) if weight > 0])
        choice = self.path[len(self.taken)][0]
        self.taken.append(choice)
        self.probability *= weights[choice] / sum(weights)
        return choice

    def multinomial(self, weights, n, generator=None):
        return torch.tensor([[self.choose(weights[0].tolist())]])

    def bernoulli(self, p, generator=None):
        return torch.tensor(self.choose([1 - p.item(), p.item()]))

    def texts(self, run):
        """{what it returns: the probability of that}"""
        self.path, found = [], {}
        while True:
            self.taken, self.probability = [], 1.0
            text = run()
            found[text] = found.get(text, 0) + self.probability
            while self.path and len(self.path[-1]) == 1:
                self.path.pop()
            if not self.path:
                return found
            del self.path[-1][0]


@pytest.mark.parametrize(
    "draft, options",
    [
        ((2, 2), {}),
        ((1, 2), {"top_k": 2, "temperature": 2.0}),
        ((1, 2), {"temperature": 0.5, "top_p": 0.9}),
        ((1, 1), {"repetition_penalty": 1.5}),
    ],
)
def test_drafts_do_not_change_the_distribution(tiny_model, monkeypatch, draft, options):
    """Proved by running through all that can be drawn, drafts and verdicts, of three ids and texts of up to 3."""
    model, branches = tiny_model(vocab_size=3, document_start=0), Branches()
    monkeypatch.setattr(torch, "multinomial", branches.multinomial)
    monkeypatch.setattr(torch, "bernoulli", branches.bernoulli)

    def texts(**named):
        return branches.texts(lambda: tuple(ids(generate(model, [0, 2], 3, **options, **named))))

    plain = texts()
    assert len(plain) > 4 and sum(plain.values()) == pytest.approx(1)
    assert texts(draft=draft) == pytest.approx(plain, abs=1e-6)
    assert any(abs(p - plain.get(text, 0)) > 0.003 for text, p in texts(depth=draft[0]).items())  # and drafts do differ


@pytest.mark.parametrize("n", range(1, 7))
def test_drafts_left_early_are_history_as_far_as_they_were_taken(endless, n):
    session, text = Session(endless, 64, draft=(4, 3)), [0, 5, 6]
    session.feed(text)
    text = text + ids(itertools.islice(session.stream(9, temperature=0), n))
    assert session.text == text and len(text) == 3 + n
    session.feed([8])
    assert ids(session.stream(5, temperature=0)) == ids(generate(endless, [*text, 8], 5, temperature=0))


@pytest.mark.parametrize("call", range(0, 8, 2))
def test_ctrl_c_within_a_draft_loses_nothing(endless, monkeypatch, call):
    """At the n-th use of the block or the n-th write into memory: of a draft, or of the verifying pass."""
    for where in ((endless.recur[0], "finish"), (torch, "_foreach_copy_")):
        session, made = Session(endless, 64, draft=(2, 2)), []
        session.feed([0, 5, 6])
        made.append(next(session.stream(1, temperature=0))[0])
        original, left = getattr(*where), iter(range(call))

        def once(*args, original=original, left=left, **named):
            return original(*args, **named) if next(left, None) is not None else interrupt()

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(*where, once)
            for token, _ in session.stream(99, temperature=0):
                made.append(token)
        assert session.text == [0, 5, 6, *made]
        more = ids(session.stream(6, temperature=0))
        assert more == ids(generate(endless, session.text[: 3 + len(made)], 6, temperature=0))


def test_a_draft_that_the_model_cannot_make_is_refused(tiny_model):
    model = tiny_model(vocab_size=300, document_start=0)
    for draft in ((0, 2), (5, 2), (2, 0)):
        with pytest.raises(ValueError, match=r"1\.\.4"):
            Session(model, draft=draft)
    with pytest.raises(ValueError, match="last_step"):
        Session(tiny_model(memory="last_step"), draft=(1, 2))


# -------------------------------------------------------------------------------------------------- stop strings


@pytest.mark.parametrize("stops", [["aabaac"], ["aac", "xyz"], ["b"], ["aabaacd", "aabaad"], ["d", ""], []])
def test_stop_strings_are_found_however_the_text_is_split(stops):
    text = "aabaabaacd!"
    expected, found = cut(text, stops)
    for n in range(2 ** (len(text) - 1)):
        ends = [i for i in range(1, len(text)) if n >> (i - 1) & 1]
        stream, out = Stops(stops), ""
        for start, end in zip([0, *ends], [*ends, len(text)]):
            out += "".join(text for text, _ in stream.push(text[start:end]))
            assert expected.startswith(out)
            if stream.found:
                break
        out += "".join(text for text, _ in stream.rest())
        assert (out, stream.found) == (expected, found)


def test_only_what_may_begin_a_stop_string_is_held_back():
    stream = Stops(["\n\n", "END"])
    assert stream.push("one\n", 1) == [("one", 1)]
    assert stream.push("two E", 2) == [("\n", 1), ("two ", 2)]
    assert stream.push("N", 3) == []
    assert stream.push("", 4) == []
    assert stream.push("E", 5) == [("E", 2), ("N", 3)]
    assert stream.rest() == [("E", 5)]
    assert stream.rest() == []
    assert Stops().push("all of it") == [("all of it", None)]
