"""The preference loss against TRL's (1.16.0, with transformers 5.24 and accelerate 1.15): on the same logits of policy
and reference, its value, its gradient with respect to the logits of the policy, and what is logged."""

import socket

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("trl")
import trl

import stages

V, BETA = 40, 0.3
PAIRS = [  # a prompt's length and those of its answers; TRL ends each with an <|endoftext|>
    (3, 5, 2),
    (6, 1, 9),
    (1, 4, 4),
]


@pytest.fixture
def batch_and_trainer(tmp_path, monkeypatch):
    """What TRL makes of the first pairs, and its trainer. The models are of GPT-2 with the identity for a head: what
    their last norm is then made to return are the logits."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    def refuse(*_):
        raise OSError("tests are offline")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # a trainer counts itself, on the internet
    monkeypatch.setattr(socket.socket, "connect", refuse)

    def model():
        shape = dict(vocab_size=V, n_embd=V, n_positions=32, n_layer=1, n_head=1, tie_word_embeddings=False)
        model = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=1, eos_token_id=1))
        torch.nn.init.eye_(model.lm_head.weight)
        return model

    def text(length):
        return "".join(f" <{token}>" for token in torch.randint(2, V, (length,)).tolist())

    def build(pairs, **settings):
        words = Tokenizer(models.WordLevel({f"<{i}>": i for i in range(V)}, "<0>"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<1>", pad_token="<0>")
        rows = [dict(zip(("prompt", "chosen", "rejected"), map(text, lengths))) for lengths in PAIRS[:pairs]]
        args = trl.DPOConfig(
            str(tmp_path), beta=BETA, use_cpu=True, bf16=False, report_to="none", disable_tqdm=True,
            per_device_train_batch_size=pairs, **settings,
        )  # fmt: skip
        trainer = trl.DPOTrainer(model(), model(), args, None, Dataset.from_list(rows), processing_class=tokenizer)
        return next(iter(trainer.get_train_dataloader())), trainer

    return build


@pytest.mark.filterwarnings("ignore:.*_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "ours, pairs, theirs",
    [
        ({"loss": "sigmoid"}, 3, {"loss_type": ["sigmoid"]}),
        ({"loss": "sigmoid_norm"}, 3, {"loss_type": ["sigmoid_norm"]}),
        ({"loss": "sigmoid_norm", "sft": 0.5}, 3, {"loss_type": ["sigmoid_norm", "sft"], "loss_weights": [1, 0.5]}),
        # TRL smooths labels in this way for AOT only, which is DPO of sorted log-ratios, and of one pair just DPO.
        ({"loss": "sigmoid", "label_smoothing": 0.1}, 1, {"loss_type": ["aot"], "label_smoothing": 0.1}),
    ],
    ids=["sigmoid", "sigmoid_norm", "sft", "smoothing"],
)
def test_dpo_loss_gradients_and_rewards_are_those_of_trl(batch_and_trainer, ours, pairs, theirs):
    torch.manual_seed(0)
    batch, trainer = batch_and_trainer(pairs, **theirs)
    tokens, mask = batch["input_ids"], batch["completion_mask"][:, 1:].bool()
    assert len(tokens) == 2 * pairs  # first the chosen answers
    assert sorted(mask.sum(1).tolist()) == sorted(n + 1 for _, *lengths in PAIRS[:pairs] for n in lengths)
    logits, reference = 2 * torch.randn(2, *tokens.shape, V)
    logits.requires_grad_()
    for model, values in ((trainer.model, logits), (trainer.ref_model, reference)):
        model.transformer.ln_f.register_forward_hook(lambda *_, values=values: values)
    expected = trainer.compute_loss(trainer.model, batch)
    (gradient,) = torch.autograd.grad(expected, logits)
    trainer.log(logged := {})

    def nll(logits):
        return F.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")

    answer = torch.cat([2 * torch.arange(pairs), 2 * torch.arange(pairs) + 1])
    compared = torch.where(mask, answer[:, None], -1)
    summed = -(nll(reference) * mask).sum(1).view(2, pairs).T
    chosen = (mask & (answer % 2 == 0)[:, None]).float()
    share = torch.full((pairs,), 1 / pairs)
    dpo = stages.DPOConfig(beta=BETA, **ours)
    loss = stages.PairLoss(dpo, compared, summed.numpy(), share.numpy(), (chosen / chosen.sum()).numpy())
    value = loss(nll(logits))
    (found,) = torch.autograd.grad(value, logits)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-8)
    assert torch.equal(gradient[:, :-1].any(-1), mask)
    means = {name: float(x) / pairs for name, x in zip(stages.DPO.names[2:], loss.sums[2:])}
    assert len(means) == 6 and means == pytest.approx({name: logged[name] for name in means}, rel=1e-4, abs=1e-5)
