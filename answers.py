"""What a tuned model writes and prefers, of held-out conversations and pairs (chat.py): measured at the evaluations of
training (stages.py), and for any checkpoint by `python evaluate.py chat`."""

from types import SimpleNamespace

import numpy as np
import torch

import chat
import checkpoint
import data
import decoding
import evaluate

AT_ONCE = 64  # answers: 5 GiB of keys and values at memory 2048, with all 8 steps


def first_of_sources(rows, tokens, sides=1):
    """Which conversations (pairs: `sides` 2) of some `chat.Rows` are the first of their source, up to `tokens` tokens
    of each, (n,), and their sources, (n,)."""
    index, taken, chosen = rows.index.reshape(-1, sides, 3), {}, []
    for i, (source, length) in enumerate(zip(index[:, 0, 2].tolist(), index[:, :, 1].sum(1).tolist())):
        if taken.get(source, 0) < tokens:
            taken[source] = taken.get(source, 0) + length
            chosen.append(i)
    return np.array(chosen), index[chosen, 0, 2]


def marked_rows(rows, chosen):
    """[(ids, targets, mask of the targets in answers), ...] of some rows, int64 and bool."""
    marked = (rows.row(i) for i in chosen)
    return [(ids.astype(np.int64), chat.targets(ids, mask).astype(np.int64), mask) for ids, mask in marked]


def pair_rows(chats, split, pairs=None, end=True):
    """`marked_rows` of some preference pairs (all), chosen and rejected in turn; with `end`, the <|endoftext|> that
    closes an answer is part of it."""
    rows = chats.split(split)
    pairs = range(len(rows.index) // 2) if pairs is None else pairs
    marked = marked_rows(rows, [2 * pair + side for pair in pairs for side in range(2)])
    return marked if end else [(ids, targets, mask & (targets != data.EOT)) for ids, targets, mask in marked]


def answer_logps(model, rows, memory, depth, label, segment=512, batch=16):
    """Log-probabilities of both answers of pairs, (n, 2) float32; rows: see `pair_rows`."""
    pairs = [(ids, targets) for ids, targets, _ in rows]
    longest = max(len(ids) for ids, _ in pairs)  # every token sees its whole row, as in training
    scores = evaluate.score_pairs(model, pairs, max(memory, longest), segment, batch, depth, label)
    return -np.array([s.nll[mask].sum() for s, (*_, mask) in zip(scores, rows)], np.float32).reshape(-1, 2)


def write_answers(model, chats, number, memory, train, limit=256, temperature=0.8):
    """Answers to `number` of the held-out prompts, evenly spaced: mean tokens, share that ended, mean depth, and the
    first two of the (chosen) answers in the data, cut at the same length; None for none. train: has `segment`, `seed`.
    """
    if not number:
        return None
    rows, found = chats.split("val"), {}
    step = 2 if chats.manifest["kind"] == "preference" else 1
    for i in range(0, len(rows.index), step):
        ids, mask = rows.row(i)
        begin = int(np.argmax(mask)) + 1  # behind the first <|assistant|>
        found.setdefault(tuple(ids[:begin].tolist()), int(np.argmin(np.append(mask[begin:], False))))
    chosen = np.linspace(0, len(found) - 1, min(number, len(found))).round().astype(int)
    prompts, lengths = ([list(column)[i] for i in chosen] for column in (found.keys(), found.values()))
    generator = torch.Generator(model.embedding.weight.device).manual_seed(train.seed)
    answers = []
    with torch.compiler.set_stance("force_eager"):  # a graph for every length of prompt would take far longer
        for start in range(0, len(prompts), AT_ONCE):
            batch = [list(prompt) for prompt in prompts[start : start + AT_ONCE]]
            answers += decoding.generate_batch(
                model, batch, [limit] * len(batch), temperature=temperature, generator=generator,
                memory_length=memory, segment=train.segment,
            )  # fmt: skip
    depths = [depth for answer in answers for depth in answer.depths]
    return {
        "answers": len(answers),
        "tokens": float(np.mean([len(answer.tokens) for answer in answers])),
        "ended": float(np.mean([answer.ended for answer in answers])),
        "depth": float(np.mean(depths)) if depths else None,
        "data_tokens": float(np.minimum(lengths, limit).mean()),
        "data_ended": float((np.array(lengths) < limit).mean()),
    }


def summary(written):
    """What `write_answers` found, as a list of a line, or of none."""
    if written is None:
        return []
    data = f"{written['data_tokens']:.0f} tokens and {written['data_ended']:.1%} in the data"
    return [f"answers of {written['tokens']:.0f} tokens, {written['ended']:.1%} ended ({data})"]


def correlation(x, y):
    """Pearson's; 0 where one of them does not vary."""
    return float(np.corrcoef(x, y)[0, 1]) if np.std(x) and np.std(y) else 0.0


# ------------------------------------------------------------------------------------------- python evaluate.py chat


def conversations(model, chats, args, segment):
    """Table and numbers, by source: loss and depth of answers, depth of prompts."""
    rows = chats.split("val")
    chosen, sources = first_of_sources(rows, args.tokens)
    marked = marked_rows(rows, chosen)
    scores = evaluate.score_pairs(
        model, [row[:2] for row in marked], args.memory, segment, args.rows, args.depth, "conversations"
    )
    table, found = [["source", "rows", "tokens", "nats", "perplexity", "depth", "of prompts"]], {}
    for name, of in by_source(chats, sources).items():
        parts = [(score, mask) for score, (*_, mask), taken in zip(scores, marked, of) if taken]
        answers, prompts = (evaluate.summarize([s.where(m == side) for s, m in parts]) for side in (True, False))
        found[name] = {"rows": len(parts), "answers": answers, "prompts": prompts}
        cells = [f"{answers[key]:.{n}f}" for key, n in (("nats", 4), ("perplexity", 2), ("depth", 2))]
        table.append([name, f"{len(parts):,}", f"{answers['tokens']:,}", *cells, f"{prompts['depth']:.2f}"])
    return table, found


def preferences(model, reference, chats, args, config):
    """Table and numbers, by source and by which answer is longer: how often the reward, beta times the log-probability
    beyond that of the model `reference`, is larger for the chosen answer; and how often that is the longer one, a rule
    to be beaten without reading. config: of the run, whose `dpo` says how its answers were compared."""
    dpo = {"beta": 0.1, "depth": 0, "end": True} | config.get("dpo", {})
    chosen, sources = first_of_sources(chats.split("val"), args.tokens, sides=2)
    marked = pair_rows(chats, "val", chosen, dpo["end"])
    depth = args.depth or dpo["depth"] or model.config.max_depth
    policy, before = (
        answer_logps(of, marked, args.memory, depth, label, config["train"]["segment"], args.rows)
        for of, label in ((model, "policy"), (reference, "reference"))
    )
    rewards = dpo["beta"] * (policy - before)
    lengths = np.array([mask.sum() for *_, mask in marked]).reshape(-1, 2)
    margins = rewards[:, 0] - rewards[:, 1]
    right, longer = ((x > 0) + 0.5 * (x == 0) for x in (margins, lengths[:, 0] - lengths[:, 1]))
    near = lengths.max(1) < 1.25 * lengths.min(1)
    kinds = by_source(chats, sources) | {"chosen is longer": longer == 1, "chosen is shorter": longer == 0}
    table, found = [["source", "pairs", "accuracy", "± s.e.", "margin", "the longer"]], {}
    for name, of in (kinds | {"lengths within a quarter": near}).items():
        if not (n := int(of.sum())):
            continue
        accuracy = float(right[of].mean())
        part = {"pairs": n, "accuracy": accuracy, "stderr": (accuracy * (1 - accuracy) / n) ** 0.5}
        found[name] = part | {"margin": float(margins[of].mean()), "longer": float(longer[of].mean())}
        table.append([name, f"{n:,}", *(f"{x:.3f}" for x in list(found[name].values())[1:])])
    found["length_correlation"] = correlation(margins, lengths[:, 0] - lengths[:, 1])
    return [*table, [f"reward and length correlate by {found['length_correlation']:.2f}"]], found


def by_source(chats, sources):
    """{source, and "all": which rows (n,) bool are of it}, of those that have rows."""
    found = {name: sources == i for i, name in enumerate(chats.domains) if (sources == i).any()}
    return found | {"all": np.full(len(sources), True)}


def measure(model, meta, args):
    """Table and numbers of held-out conversations, or pairs, in the folder args.data, and of answers to their prompts.
    Raises `DataError`, `CheckpointError`."""
    chats, config = chat.Chats.open(args.data), meta["config"]
    train = SimpleNamespace(segment=config["train"]["segment"], seed=args.seed)
    if chats.manifest["kind"] == "sft":
        if args.reference:
            raise data.DataError(f"{args.data}: holds conversations, for which --reference has no use; leave it out")
        table, found = conversations(model, chats, args, train.segment)
    elif args.reference:
        device = model.embedding.weight.device
        reference, _ = checkpoint.load_model(args.reference, device, model.compute_dtype)
        table, found = preferences(model, reference, chats, args, config)
    elif args.answers:
        table, found = [], {}
    else:
        raise data.DataError(
            f"{args.data}: holds pairs; name the model before DPO by --reference, or ask for --answers"
        )
    found["written"] = write_answers(model, chats, args.answers, args.memory, train)
    return table + [[line] for line in summary(found["written"])], found
