"""Small tokenizers and shards for tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron_r1.data.bpe import train_bpe
from megatron_r1.data.shards import Shard, ShardWriter
from megatron_r1.data.tokenizer import Tokenizer

TEXTS = [
    "The quick brown fox jumps over the lazy dog. It costs 12345 dollars.\n\nWell, don't!\n",
    "def add(a, b):\n    return a + b\n\nprint(add(1, 22))\n",
    "Grüße aus Köln — 東京 and наука, naïve café.\n",
] * 5


def toy_tokenizer(folder: Path, vocab_size: int = 400) -> Tokenizer:
    return train_bpe(TEXTS, vocab_size, folder)


def toy_shard(folder: Path, lengths: list[int], vocab_size: int = 1000, masks: bool = False, seed: int = 0, name: str = "train") -> tuple[Shard, list[np.ndarray]]:
    """A shard of random documents, and the documents."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    documents = [rng.integers(0, vocab_size, n) for n in lengths]
    writer = ShardWriter(folder / name, vocab_size, masked=masks)
    for i, tokens in enumerate(documents):
        mask = None
        if masks:
            mask = np.zeros(len(tokens), np.uint8)
            mask[len(tokens) // 2 :] = 1
        writer.add(tokens, 3 * len(tokens), f"doc{i}", f"group{i % 3}", mask)
    return Shard(folder / name, writer.close()), documents
