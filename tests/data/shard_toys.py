"""Whole shards artifacts for tests: two sources, one of conversations, and a quarantine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from data_toys import toy_tokenizer

from megatron_r1.artifacts.base import Artifact, open_workspace
from megatron_r1.data.shards import SOURCES_FILE, ShardWriter, SourceRecord
from megatron_r1.utils.io import atomic_write_json


def toy_set(folder: Path, name: str = "corpus", prefix: str = "", vocab_size: int = 400, documents: int = 12, domain: str = "web") -> Artifact:
    work = open_workspace(folder, name, "shards", {"name": name, "prefix": prefix})
    tokenizer = toy_tokenizer(work.path / "tokenizer", vocab_size)
    rng = np.random.default_rng(len(name))
    records = {}
    for source, split, masked in (("news", "train", False), ("news", "test", False), ("talks", "train", True)):
        target = work.path / "sources" / source
        target.mkdir(parents=True, exist_ok=True)
        writer = ShardWriter(target / split, tokenizer.vocab_size, masked, tokenizer.sha256)
        for i in range(documents):
            tokens = rng.integers(0, vocab_size, int(rng.integers(0, 40)))
            writer.add(tokens, 3 * len(tokens), f"{prefix}{split}{i}", f"g{i % 5}", np.arange(len(tokens)) % 2 if masked else None, f"{source}.jsonl", 100 * i)
        records.setdefault(source, {})[split] = writer.close()
    (work.path / "quarantine").mkdir()
    (work.path / "quarantine" / "news.jsonl").write_text(f'{{"bad": "{name}"}}\n')
    sources = {source: SourceRecord(name=source, domain=domain, format="chat" if source == "talks" else "text", splits=splits, dropped={"short": 2}, quarantined=1) for source, splits in records.items()}
    content = {"schema_version": 2, "tokenizer": {"sha256": tokenizer.sha256, "vocab_size": vocab_size}, "sources": {k: v.plain() for k, v in sources.items()}, "missing": [], "control_groups": []}
    atomic_write_json(work.path / SOURCES_FILE, content)
    return work.complete({"note": "größe", "n": 1.5})


def content_of(shard) -> list[tuple]:
    """Everything about every document."""
    rows = shard.documents.rows(0, len(shard))
    return [(shard.tokens(i).tolist(), None if shard.mask(i) is None else shard.mask(i).tolist(), row) for i, row in enumerate(rows)]
