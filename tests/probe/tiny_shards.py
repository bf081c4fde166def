"""Small real shards for the tests of the probe, influence and mixture stages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from megatron_r1.artifacts.base import Artifact, open_workspace
from megatron_r1.data.bpe import train_bpe
from megatron_r1.data.shards import ShardWriter
from megatron_r1.utils.io import atomic_write_json

VOCAB = 512
Documents = Sequence[np.ndarray]
Sampler = Callable[[np.random.Generator, int], np.ndarray]


def build_shards(folder: Path, sources: Mapping[str, Mapping[str, Documents]], name: str = "corpus") -> Artifact:
    """A complete shards artifact with the given token documents: source -> split -> documents."""
    work = open_workspace(
        folder,
        name,
        "shards",
        {"sources": {s: {k: len(d) for k, d in splits.items()} for s, splits in sources.items()}},
    )
    tokenizer = train_bpe(["a few words to train on", "and some more words"], VOCAB, work.path / "tokenizer")
    records = {}
    for source, splits in sources.items():
        found = {}
        for split, documents in splits.items():
            target = work.path / "sources" / source
            target.mkdir(parents=True, exist_ok=True)
            writer = ShardWriter(target / split, VOCAB)
            for i, tokens in enumerate(documents):
                writer.add(tokens, 4 * len(tokens), f"{source}-{split}-{i}", f"{source}-{split}-{i}")
            found[split] = writer.close().plain()
        records[source] = {"name": source, "domain": "web", "splits": found}
    atomic_write_json(work.path / "sources.json", {"sources": records, "tokenizer": {"sha256": tokenizer.sha256}})
    return work.complete({})


def markov(seed: int, width: int = 8, vocab: int = VOCAB, first: int = 0, noise: float = 0.0) -> Sampler:
    """A sampler of documents from one random Markov chain over `vocab` tokens from `first`.

    Each token has `width` likely successors; with probability `noise` any token follows instead.
    """
    rng = np.random.default_rng(seed)
    successors = rng.integers(0, vocab, (vocab, width))

    def sample(draw: np.random.Generator, length: int) -> np.ndarray:
        tokens = np.empty(length, np.int64)
        tokens[0] = draw.integers(vocab)
        choices = draw.integers(0, width, length)
        strays = np.where(draw.random(length) < noise, draw.integers(0, vocab, length), -1)
        for i in range(1, length):
            tokens[i] = successors[tokens[i - 1], choices[i]] if strays[i] < 0 else strays[i]
        return tokens + first

    return sample


def documents(sample: Sampler, seed: int, count: int, shortest: int = 40, longest: int = 90) -> list[np.ndarray]:
    """`count` documents of random length."""
    draw = np.random.default_rng(seed)
    return [sample(draw, int(draw.integers(shortest, longest))) for _ in range(count)]
