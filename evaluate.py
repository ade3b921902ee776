"""Scoring text: negative log-likelihood and depth of every token, with Transformer-XL memory, document by document."""

import heapq
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

import data


@dataclass
class Scores:
    """Of one document of n tokens after its opening <|endoftext|>; all arrays (n,).

    tokens: the tokens that were predicted. nll: their negative log-likelihood in nats, float32. depth: the steps that
    the model took to predict them, int64."""

    tokens: np.ndarray
    nll: np.ndarray
    depth: np.ndarray


@torch.no_grad()
def score(model, documents, memory, segment=512, rows=16, depth=None, progress=None):
    """Score documents, each a (n + 1,) array of tokens that opens with <|endoftext|>; returns a `Scores` for each.

    Every document is read from its start in segments, with `memory` tokens of Transformer-XL memory. Documents are
    packed one after another into `rows` rows of similar length. depth: as in the model's forward. progress: a label for
    a progress bar, or None.
    """
    rows = max(1, min(rows, len(documents)))
    queues, fill = [[] for _ in range(rows)], [(0, row) for row in range(rows)]
    for i in sorted(range(len(documents)), key=lambda i: -len(documents[i])):  # longest first, to the shortest row
        length, row = heapq.heappop(fill)
        queues[row].append(i)
        heapq.heappush(fill, (length + len(documents[i]), row))
    length = -(-max(length for length, _ in fill) // segment) * segment
    packed = np.full((rows, length + 1), model.config.document_start)
    for row, queue in enumerate(queues):
        joined = np.concatenate([documents[i] for i in queue])
        packed[row, : len(joined)] = joined

    state = model.new_memory(rows, memory)
    nll, taken = np.empty((rows, length), np.float32), np.empty((rows, length), np.int64)
    hidden = None if progress else True  # None: shown on a terminal only
    for start in tqdm(range(0, length, segment), desc=progress, disable=hidden, unit="segment", leave=False):
        tokens = torch.from_numpy(packed[:, start : start + segment + 1])
        out = model(tokens[:, :-1], tokens[:, 1:], state, depth)
        state = out.memory
        nll[:, start : start + segment] = out.nll.cpu().numpy()
        taken[:, start : start + segment] = out.depth.cpu().numpy()

    scores = [None] * len(documents)
    for row, queue in enumerate(queues):
        position = 0
        for i in queue:
            span = slice(position, position + len(documents[i]) - 1)
            scores[i] = Scores(documents[i][1:], nll[row, span], taken[row, span])
            position += len(documents[i])
    return scores


def split_documents(tokens):
    """Cut a (n,) array of tokens before every <|endoftext|>."""
    return np.split(tokens, np.flatnonzero(tokens == data.EOT)[1:])


def summarize(scores):
    """Totals of some documents: tokens, bytes, nats per token, perplexity, bits per byte, mean depth."""
    nll = np.concatenate([s.nll for s in scores]).astype(np.float64)
    depth = np.concatenate([s.depth for s in scores])
    size = int(sum(data.token_bytes()[s.tokens].sum(dtype=np.int64) for s in scores))
    nats = nll.mean()
    return {
        "tokens": len(nll),
        "bytes": size,
        "nats": float(nats),
        "perplexity": float(np.exp(nats)),
        "bits_per_byte": float(nll.sum() / np.log(2) / size),
        "depth": float(depth.mean()),
    }


def macro(domains):
    """Means over domains of their summaries: nats (and perplexity, its exponential), bits per byte, depth."""
    mean = {key: float(np.mean([d[key] for d in domains.values()])) for key in ("nats", "bits_per_byte", "depth")}
    return mean | {"perplexity": float(np.exp(mean["nats"]))}
