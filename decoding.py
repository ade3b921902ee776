"""Decoding: drawing tokens from a model, one text as a stream or several at once.

    generate(model, tokens, 50)             one text, token by token
    generate_batch(model, prompts, limits)  several texts at once, whole
    Session(model)                          a text that is fed and continued in turns: a conversation
    Stops(["\\n\\n"])                         cuts streamed text at stop strings

A text ends where the model predicts <|endoftext|>, which is never part of it.
Shapes: B texts, V ids in use.
"""

import copy
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from model import ALL, LAST

ENGINE_ROWS = 64  # of texts that decode at once on a GPU

# -------------------------------------------------------------------------------------------------- one token


def sample_token(logits, temperature=1.0, top_k=None, top_p=1.0, generator=None):
    """Token ids (B,) int64 drawn from logits (B, V); temperature 0 takes the most likely ones."""
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = truncate(logits, temperature, top_k, top_p)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


def truncate(logits, temperature=1.0, top_k=None, top_p=1.0):
    """Probabilities (..., V) float64 of logits (..., V) / temperature: of the `top_k` most likely tokens, and of these
    the smallest set that holds the share `top_p` of their probability (Holtzman et al. 2020, arXiv 1904.09751).
    Temperature 0 leaves the most likely token alone."""
    if temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).double()
    logits = logits.double()  # float32 sums of 50 000 terms decide wrongly near top_p
    probabilities = ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1)
    if top_k is None and top_p == 1:
        return probabilities
    V = logits.shape[-1]
    ordered, index = probabilities.topk(min(top_k or V, V))
    if top_p < 1:
        before = ordered.cumsum(-1) - ordered
        ordered = ordered.masked_fill(before >= top_p * ordered.sum(-1, keepdim=True), 0)
    return torch.zeros_like(probabilities).scatter_(-1, index, ordered / ordered.sum(-1, keepdim=True))


def penalize(logits, seen, penalty):
    """Logits (..., V) in which the tokens `seen`, (..., V) bool, are less likely: positive ones are divided by the
    penalty, negative ones multiplied with it (Keskar et al. 2019, arXiv 1909.05858, section 4.1)."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


class Sampler:
    """Draws the next token of each of several texts. tokens: (B, T) int64, the texts so far. The penalty is on all the
    ids in them but <|endoftext|>, which opens every text: a penalty would only put off the end. Options: see
    `sample_token` and `penalize`."""

    def __init__(self, config, tokens, temperature, top_k, top_p, repetition_penalty, generator):
        self.config, self.penalty = config, repetition_penalty
        self.options, self.generator = (temperature, top_k, top_p), generator
        self.seen = torch.zeros(len(tokens), config.vocab_size, dtype=torch.bool).scatter_(1, tokens, True)

    def draw(self, logits):
        """The tokens (B,) int64, on the host, for logits (B, padded V)."""
        return self._saw(sample_token(self._penalized(logits), *self.options, self.generator))

    def draft(self, logits):
        """`draw`, and the probabilities (B, V) that the tokens were drawn from."""
        q = truncate(self._penalized(logits), *self.options)
        return self._saw(torch.multinomial(q, 1, generator=self.generator)[:, 0]), q

    def verify(self, logits, drafted, q):
        """`draw`, of one text, given what `draft` made of other logits: that token again with probability
        min(1, p / q), else one from the positive part of p - q. Such tokens are distributed as p, from which `draw`
        draws (speculative sampling, Leviathan et al. 2023, arXiv 2211.17192, appendix A.1)."""
        p = truncate(self._penalized(logits), *self.options)
        drafted = drafted.to(p.device)
        if torch.bernoulli((p / q)[0, drafted].clamp(max=1), generator=self.generator):
            return self._saw(drafted)
        return self._saw(torch.multinomial((p - q).clamp(min=0), 1, generator=self.generator)[:, 0])

    def fork(self):
        """A sampler that goes on from here by itself."""
        other = copy.copy(self)
        other.seen = self.seen.clone()
        return other

    def _penalized(self, logits):
        logits = logits[:, : self.config.vocab_size]
        if self.penalty == 1:
            return logits
        self.seen = self.seen.to(logits.device)
        self.seen[:, self.config.document_start] = False
        return penalize(logits, self.seen, self.penalty)

    def _saw(self, drawn):
        if self.penalty != 1:
            self.seen.scatter_(1, drawn[:, None], True)
        return drawn.cpu()


# -------------------------------------------------------------------------------------------------- one text


class Session:
    """A text that is fed and continued in turns. What the model has read stays in its memory and is not read again.

    memory_length: tokens of memory. segment: at most so many are read at once. depth: None for the model's own rule, or
    the steps that every token takes; it may be changed between two tokens. draft: None, or (K, tokens): guess so many
    tokens at K steps each and verify them at `depth` in one pass, see `_speculate`. text: the ids so far, fed and
    drawn. verified, accepted: the numbers of drafts so far. Raises ValueError for a draft that the model cannot make.
    """

    def __init__(self, model, memory_length=512, segment=512, depth=None, draft=None):
        self.model, self.memory_length, self.segment, self.depth = model, memory_length, segment, depth
        self.draft, self.verified, self.accepted = draft, 0, 0
        if draft:
            check_draft(model.config, *draft)
        self.memory = model.new_memory(1, memory_length)
        self.text, self.unread = [], []
        self.engine = None  # and what it was made for

    def feed(self, tokens):
        """Add ids to the text; they are read when the next token is drawn."""
        self.text += tokens
        self.unread += tokens

    def replace(self, text):
        """Make the text these ids. Where the model has read others, it forgets everything and reads the text anew."""
        read = len(self.text) - len(self.unread)
        if text[:read] == self.text[:read]:
            self.unread = text[read:]
        else:
            self._forget(text)
        self.text = list(text)

    @torch.no_grad()
    def stream(self, max_tokens, temperature=1.0, top_k=None, top_p=1.0, generator=None, repetition_penalty=1.0):
        """Continue the text; yields (token, depth) until <|endoftext|>, which does not become a part of it, or
        `max_tokens`. Left early, also by Ctrl-C, it leaves a text that ends with the last token yielded.

        depth of a yielded token: the steps its prediction took. Feed something first. Options: see `sample_token` and
        `penalize`. Raises ValueError for a depth that the model has not.
        """
        config, text = self.model.config, torch.tensor([self.text])
        sampler = Sampler(config, text, temperature, top_k, top_p, repetition_penalty, generator)
        engine = None if self.draft else self._engine(max_tokens, temperature, top_k, top_p, repetition_penalty)
        if engine:
            yield from self._by(engine, sampler, max_tokens, generator)
            return
        left = max_tokens
        while left > 0:
            speculates = self.draft and len(self.unread) == 1 and self.unread != [config.document_start]
            for token, depth in self._speculate(sampler, left) if speculates else self._next(sampler):
                if token == config.document_start:
                    return
                self.feed([token])
                left -= 1
                yield token, depth

    def _next(self, sampler):
        """The next token and its depth, as the only item."""
        out = self._read()
        yield int(sampler.draw(out.logits[:, -1])), int(out.depth[0, -1])

    def _speculate(self, sampler, most):
        """The next tokens, 1 to `most`, and their depths, after the one that is unread.

        Tokens are drafted at few steps, and one pass at `depth` reads them all: a few tokens take little longer than
        one where that is the time of reading the weights. Those that `Sampler.verify` lets pass, and one more, are
        distributed as if each had been drawn by itself (speculative decoding, Leviathan et al. 2023, arXiv 2211.17192;
        by fewer steps of the same model, Zhang et al. 2023, arXiv 2309.08168). All passes read the same memory, which
        a segment enters only when the next one is read: so nothing has to be taken back.
        """
        self._settle()
        memory, text, drafts, drafter = self.memory, self.unread, [], sampler.fork()
        steps, tokens = self.draft

        def read(depth, keep=ALL):
            part = torch.tensor([text])
            spans = self.model.spans(part, memory, one_by_one=True)
            return self.model(part, memory=memory, depth=depth, spans=spans, keep=keep)

        while len(drafts) < min(tokens, most - 1) and text[-1] != self.model.config.document_start:
            drafts.append(drafter.draft(read(steps, LAST).logits[:, -1]))
            text = [*text, int(drafts[-1][0])]
        out = read(self.depth)
        for n in range(len(text)):
            logits = out.logits[:, n]
            token = int(sampler.verify(logits, *drafts[n]) if n < len(drafts) else sampler.draw(logits))
            accepted = [token] == text[n + 1 : n + 2]
            self.verified += n < len(drafts)
            self.accepted += accepted
            self.memory, self.unread = memory.after_first(n + 1, out.memory), []
            yield token, int(out.depth[0, n])
            if not accepted:
                return

    def _engine(self, max_tokens, temperature, top_k, top_p, repetition_penalty):
        """The `engine.Engine` for this text, or None where its kernels are not made for it."""
        from engine import Engine, has_kernels

        if repetition_penalty != 1 or max_tokens < 2 or not has_kernels(self.model, 1, top_k, top_p):
            return None
        key = temperature, max_tokens, self.depth
        if self.engine is None or self.engine[0] != key:
            self.engine = key, Engine(self.model, 1, self.memory_length, self.depth, max_tokens, None, temperature)
        return self.engine[1]

    def _by(self, engine, sampler, max_tokens, generator):
        """`stream`, whose tokens after the first come from the engine. Those are unread to the model, which reads them
        in one go when the conversation goes on."""
        out = self._read()
        token, depth = sampler.draw(out.logits[:, -1]), int(out.depth[0, -1])
        if int(token) == self.model.config.document_start:
            return
        self.feed([int(token)])
        yield int(token), depth
        device = self.model.embedding.weight.device
        engine.place(0, self.memory, token[0].to(device), depth, max_tokens)
        engine.seed.random_(2**62, generator=generator)
        for token, depth in engine.stream(0, max_tokens):
            self.feed([token])
            yield token, depth

    def _read(self):
        """The model's `Output` for the last segment of what is unread."""
        while self.unread:
            self._settle()
            part, rest = self.unread[: self.segment], self.unread[self.segment :]
            out = self.model(torch.tensor([part]), memory=self.memory, depth=self.depth, keep=LAST)
            self.memory, self.unread = out.memory, rest
        return out

    def _settle(self):
        """Do the one thing of a forward pass that changes what is already there."""
        try:
            self.memory.settle()
        except BaseException:  # Ctrl-C half-way through: what was written cannot be known
            self._forget(self.text)
            raise

    def _forget(self, text):
        """Begin with an empty memory, and all of `text` to read."""
        self.memory, self.unread = self.model.new_memory(1, self.memory_length), list(text)


def parse_draft(text, config):
    """The (steps, tokens) of a draft written as "2x3". Raises ValueError for one that this model cannot make."""
    steps, _, tokens = text.partition("x")
    if not (steps.isdecimal() and tokens.isdecimal()):
        raise ValueError("write steps and tokens as two whole numbers, 2x3")
    check_draft(config, int(steps), int(tokens))
    return int(steps), int(tokens)


def check_draft(config, steps, tokens):
    """Raises ValueError where a model of this config cannot draft `tokens` tokens at `steps` steps each."""
    if steps not in config.depths or tokens < 1:
        raise ValueError(f"steps must lie in {config.depths[0]}..{config.depths[-1]} and tokens be at least 1")
    if config.memory == "last_step":
        raise ValueError("a model with 'memory = last_step' does not read several tokens at once as it does one by one")


def generate(
    model, tokens, max_tokens, temperature=1.0, top_k=None, top_p=1.0, generator=None, memory_length=512, segment=512,
    depth=None, repetition_penalty=1.0, draft=None,
):  # fmt: skip
    """Continue `tokens`, a list of at least one id; yields (token, depth) until <|endoftext|> or `max_tokens`.

    The prompt is read in segments, then one token at a time; `memory_length` tokens of memory roll along, so that the
    text may grow for ever. The rest is as in `Session`. Raises ValueError for a depth that the model has not, or a
    draft that the model cannot make.
    """
    length = min(memory_length, len(tokens) + max_tokens)  # more is never filled
    session = Session(model, length, segment, depth, draft)
    session.feed(tokens)
    yield from session.stream(max_tokens, temperature, top_k, top_p, generator, repetition_penalty)


# -------------------------------------------------------------------------------------------------- several texts


@dataclass
class Continuation:
    """tokens: the ids after a prompt. depths: the steps that the prediction of each took. ended: whether the model
    ended it with <|endoftext|>."""

    tokens: list = field(default_factory=list)
    depths: list = field(default_factory=list)
    ended: bool = False


@torch.no_grad()
def generate_batch(
    model, prompts, limits, temperature=0, top_k=None, top_p=1.0, repetition_penalty=1.0, generator=None,
    memory_length=512, segment=512, depth=None, until=None,
):  # fmt: skip
    """A `Continuation` of each prompt, a list of ids that opens with <|endoftext|>, by at most `limits[i]` tokens.

    until(i, tokens): asked after every token whether the i-th continuation, `tokens`, is complete. The rest is as in
    `generate`. Raises ValueError for a prompt without <|endoftext|> in front or a depth that the model has not.

    Texts of a batch end together: each is padded on the left, with <|endoftext|>s, which are documents of their own
    that the text cannot see. A model with `cross_documents` would see them, and gets one text at a time.
    """
    from engine import Engine, unfit

    config = model.config
    eot, made = config.document_start, [Continuation() for _ in prompts]
    for i, prompt in enumerate(prompts):
        if prompt[:1] != [eot]:
            raise ValueError(f"prompt {i} opens with {prompt[:1]}, not with <|endoftext|>, {eot}: it would see padding")
    asked = [i for i, limit in enumerate(limits) if limit > 0]
    drawn_alike = repetition_penalty == 1 and (temperature == 0 or generator is None)
    if asked and model.embedding.weight.is_cuda and drawn_alike and unfit(model, ENGINE_ROWS) is None:
        longest = max(limits)
        length = min(memory_length, max(map(len, prompts)) + longest)
        rows = min(ENGINE_ROWS, len(asked))
        engine = Engine(model, rows, length, depth, longest, None, temperature, top_k, top_p, segment)
        return engine.run(prompts, limits, until=until)
    for batch in [[i] for i in asked] if config.cross_documents else filter(None, [asked]):
        T, limit = max(len(prompts[i]) for i in batch), max(limits[i] for i in batch)
        tokens = torch.tensor([[eot] * (T - len(prompts[i])) + prompts[i] for i in batch])
        sampler = Sampler(config, tokens, temperature, top_k, top_p, repetition_penalty, generator)
        memory = model.new_memory(len(batch), min(memory_length, T + limit))
        unread, going = tokens.split(segment, 1), set(batch)
        for _ in range(limit):
            for part in unread:
                out = model(part, memory=memory, depth=depth, keep=LAST)
                memory = out.memory
            drawn, taken = sampler.draw(out.logits[:, -1]), out.depth[:, -1].tolist()
            for i, token, steps in zip(batch, drawn.tolist(), taken):
                if i not in going:
                    continue
                one = made[i]
                one.ended = token == eot
                if not one.ended:
                    one.tokens.append(token)
                    one.depths.append(steps)
                if one.ended or len(one.tokens) == limits[i] or (until and until(i, one.tokens)):
                    going.remove(i)
            if not going:
                break
            unread = [drawn[:, None]]
    return made


# -------------------------------------------------------------------------------------------------- stop strings


def cut(text, stops):
    """`text` up to the first stop string, and whether there is one."""
    found = [at for at in (text.find(stop) for stop in stops if stop) if at >= 0]
    return (text[: min(found)], True) if found else (text, False)


class Stops:
    """Cuts text that comes in pieces at a stop string. What may be the beginning of one is held back until it is
    decided. found: whether one has come."""

    def __init__(self, stops=()):
        self.stops, self.held, self.found = stops, [], False

    def push(self, text, label=None):
        """Add a piece of text; returns the list of (text, label) that is now certain to come before a stop string."""
        self.held += [(text, label)] if text else []
        whole = "".join(text for text, _ in self.held)
        before, self.found = cut(whole, self.stops)
        if self.found:
            return self._release(len(before))
        begun = (n for stop in self.stops for n in range(1, len(stop)) if whole.endswith(stop[:n]))
        return self._release(len(whole) - max(begun, default=0))

    def rest(self):
        """The (text, label) still held back, at the end of a text in which no stop string came."""
        return [] if self.found else self._release(sum(len(text) for text, _ in self.held))

    def _release(self, n):
        """The first `n` characters of what is held back; pieces keep their labels."""
        out = []
        while n:
            text, label = self.held.pop(0)
            out.append((text[:n], label))
            if text[n:]:
                self.held.insert(0, (text[n:], label))
            n -= len(text[:n])
        return out
