"""Tiny models and texts: shared by the tests of the model, of its parts and of its graphs."""

import pytest
import torch

from model import ModelConfig, RecurrentTransformer

V, START = 97, 0  # a small vocabulary; token 0 opens a document


def build(noise=0.15, **changes):
    """A tiny model with every weight disturbed, so that steps, gains and halting all matter."""
    torch.manual_seed(0)
    settings = dict(width=32, heads=4, hidden=48, max_depth=5, halting_bias=-1.2, vocab_size=V, document_start=START)
    model = RecurrentTransformer(ModelConfig(**settings | changes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += noise * torch.randn_like(p)
    return model


def text(rows=3, length=40, seed=1):
    """Random tokens, with a few documents in every row."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, V, (rows, length), generator=generator)
    tokens[torch.rand(rows, length, generator=generator) < 0.06] = START
    return tokens


def run_segments(model, tokens, lengths, memory, depth=None):
    """Outputs of one segment after another, joined."""
    state, outputs, start = model.new_memory(len(tokens), memory), [], 0
    for length in lengths:
        outputs.append(model(tokens[:, start : start + length], memory=state, depth=depth))
        state, start = outputs[-1].memory, start + length
    assert start == tokens.shape[1]
    return torch.cat([o.logits for o in outputs], 1)[..., :V], torch.cat([o.depth for o in outputs], 1)


VARIANTS = {
    "act": {},
    "fixed": {"halting": "fixed"},
    "prelude and coda": {"prelude": 1, "recur": 2, "coda": 1, "max_depth": 3},
    "stacked": {"share": False, "halting": "fixed", "injection": "none"},
    "stacked act": {"share": False, "max_depth": 3},
    "concat": {"injection": "concat_linear"},
    "plain": {"injection": "none", "step_gains": False},
    "hyper": {"injection": "hyper", "lanes": 3},
    "hyper, fixed": {"injection": "hyper", "halting": "fixed", "recur": 2, "max_depth": 3},
    "hyper, exit": {"injection": "hyper", "halting": "exit", "tolerance": 1.2, "sandwich": True},
    "across documents": {"cross_documents": True},
    "stability": {"halting": "stability", "tolerance": 0.6},
    "exit": {"halting": "exit", "tolerance": 1.2},
    "sandwich": {"sandwich": True},
    "finish": {"finish": True, "recur": 2},
    "exit, finish": {"halting": "exit", "exit_by": "loss", "tolerance": 1.2, "finish": True},
    "exit, prelude and coda": {"halting": "exit", "exit_by": "loss", "tolerance": 1.2, "prelude": 1, "coda": 1}
    | {"sandwich": True, "max_depth": 3, "step_gains": False},
}
variants = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
