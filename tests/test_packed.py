"""Weights in formats for a CPU: what their products lose, and that a text is read by the same numbers in any parts."""

import pytest
import torch

import packed
import sample
from fp8 import BF16, Weight
from model import ModelConfig, RecurrentTransformer

pytestmark = pytest.mark.skipif(not packed.supported(), reason="this processor has no such kernels")
# relative errors; without the instructions of VNNI int8 activations have 7 bits
LOST = {"float16": 3e-4, "int8": 2e-2 if torch.cpu._is_vnni_supported() else 4e-2}


@pytest.mark.parametrize("form", packed.FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_lose_what_the_format_rounds_off(form, dtype):
    torch.manual_seed(0)
    matrix, x = torch.randn(96, 64), torch.randn(2, 5, 64).to(dtype)
    product = packed.Packed(matrix, form)(x)
    assert product.dtype == dtype and product.shape == (2, 5, 96)
    exact, lost = x.double() @ matrix.double().t(), LOST[form] + (dtype == torch.bfloat16) * 4e-3
    error = (product - exact).norm() / exact.norm()
    assert 0 < error < lost


@pytest.mark.parametrize("form", packed.FORMATS)
def test_a_token_does_not_depend_on_its_neighbours(form):
    """Though one is a thousand times as large, and one is zero."""
    torch.manual_seed(0)
    multiply, x = packed.Packed(torch.randn(96, 64), form), torch.randn(4, 64)
    x[1] *= 1000
    x[2] = 0
    together = multiply(x)
    for row, token in zip(together, x):
        alone = multiply(token[None])[0]
        assert (row - alone).norm() <= 2 * LOST[form] * alone.norm()
    assert not together[2].any()


@pytest.mark.parametrize("form", packed.FORMATS)
def test_a_weight_is_packed_again_when_it_changes(form):
    master, x = torch.nn.Parameter(torch.randn(32, 16)), torch.randn(1, 16)
    weight = Weight(master)
    weight.prepare(torch.float32, BF16, form)
    first = weight.low
    weight.prepare(torch.float32, BF16, form)
    assert weight.low is first
    with torch.no_grad():
        master.mul_(2)
    weight.prepare(torch.float32, BF16, form)
    torch.testing.assert_close(weight.low(x), 2 * first(x))
    weight.prepare(torch.float32, BF16)
    assert weight.low.data_ptr() == master.data_ptr()  # full precision


@pytest.mark.parametrize("form", packed.FORMATS)
@torch.no_grad()
def test_the_model_reads_a_text_alike_whole_and_token_by_token(form):
    torch.manual_seed(0)
    config = ModelConfig(width=64, heads=4, hidden=96, max_depth=4, halting_bias=-1.0, vocab_size=97, document_start=0)
    model, tokens = RecurrentTransformer(config), torch.randint(97, (2, 24))
    for p in model.parameters():
        p += 0.1 * torch.randn_like(p)
    exact = model(tokens, depth=3)
    model.weight_format = form
    whole, memory, logits = model(tokens, depth=3), model.new_memory(2, 24), []
    for t in range(24):
        out = model(tokens[:, t : t + 1], memory=memory, depth=3)
        logits.append(out.logits)
        memory = out.memory
    for found, wanted, share in ((whole.logits, exact.logits, 3), (torch.cat(logits, 1), whole.logits, 1)):
        difference = (found - wanted)[..., :97]
        assert difference.norm() < share * LOST[form] * wanted[..., :97].norm()
    targets = tokens.roll(-1, 1)
    nll = model(tokens, targets, depth=3).nll
    expected = torch.nn.functional.cross_entropy(whole.logits.flatten(0, 1), targets.flatten(), reduction="none")
    torch.testing.assert_close(nll.flatten(), expected, atol=1e-4, rtol=0)


def test_training_multiplies_in_full_precision():
    torch.manual_seed(0)
    config = ModelConfig(width=32, heads=2, hidden=48, max_depth=2, vocab_size=97, document_start=0)
    model, tokens = RecurrentTransformer(config), torch.randint(97, (2, 9))
    plain = model(tokens[:, :-1], tokens[:, 1:]).loss.item()
    model.weight_format = "int8"
    out = model(tokens[:, :-1], tokens[:, 1:])
    out.loss.backward()
    assert out.loss.item() == plain and model.embedding.weight.grad.any()


def test_the_option_takes_float16_where_that_is_possible(monkeypatch):
    model = RecurrentTransformer(ModelConfig(width=32, heads=2, hidden=48, vocab_size=97, document_start=0))
    assert [sample.weight_format(name, model) for name in ("auto", "full", "int8")] == ["float16", None, "int8"]
    model.compute_dtype = torch.bfloat16
    assert sample.weight_format("auto", model) is None
    monkeypatch.setattr(packed, "supported", lambda: False)
    model.compute_dtype = torch.float32
    assert sample.weight_format("auto", model) is None
    with pytest.raises(sample.InputError, match="int8"):
        sample.weight_format("int8", model)
