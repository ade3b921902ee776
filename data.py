"""Prepared text: the tokenizer, and readers of the shards that `prepare_data.py` writes.

A prepared folder holds one `manifest.json` and uint16 token shards, one set per split and domain:

    data/demo/manifest.json
    data/demo/train/code/00000.bin      <|endoftext|> document <|endoftext|> document ...
    data/demo/val/code/00000.bin

Every document *starts* with `<|endoftext|>`, which text can never produce: a token equal to it is a document
boundary, and no index file is needed. The token after the last one of a document is always `<|endoftext|>`.
"""

import base64
import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import tiktoken

RANKS = Path(__file__).parent / "tokenizer" / "gpt2.tiktoken"
RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""

EOT, USER, ASSISTANT = 50256, 50257, 50258  # the last two are used from instruction tuning on
SPECIAL_TOKENS = {"<|endoftext|>": EOT, "<|user|>": USER, "<|assistant|>": ASSISTANT}
VOCAB_SIZE = 50259  # ids in use; the model pads to 50304 rows, and rows from 50259 up are never a target
MANIFEST_VERSION = 1


class DataError(RuntimeError):
    """Prepared data that is missing, damaged or not what was asked for; the message names the file and the remedy."""


@cache
def load_tokenizer():
    """GPT-2's byte-pair encoding from the bundled ranks, verified by their SHA-256; nothing is downloaded.

    `encode_ordinary` never yields a special token, whatever the text contains. Raises `DataError`.
    """
    try:
        ranks = RANKS.read_bytes()
    except OSError as error:
        raise DataError(f"{RANKS}: {error.strerror}; restore it from the repository") from None
    if hashlib.sha256(ranks).hexdigest() != RANKS_SHA256:
        raise DataError(f"{RANKS}: altered (its SHA-256 is not {RANKS_SHA256[:16]}...); restore it from the repository")
    mergeable = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in ranks.splitlines())}
    return tiktoken.Encoding("gpt2-chat", pat_str=GPT2_PATTERN, mergeable_ranks=mergeable, special_tokens=SPECIAL_TOKENS)


@cache
def token_bytes():
    """UTF-8 bytes of every token id, (VOCAB_SIZE,) uint16; special tokens count 0. The measure of bits per byte."""
    tokenizer = load_tokenizer()
    lengths = [len(tokenizer.decode_single_token_bytes(i)) for i in range(EOT)]
    return np.array(lengths + [0] * (VOCAB_SIZE - EOT), dtype=np.uint16)
