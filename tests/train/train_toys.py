"""Tiny shards and training settings, shared by the tests of this folder, by the processes they start, and by tests/distributed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from megatron_r1.artifacts.base import Artifact, open_artifact, open_workspace
from megatron_r1.artifacts.mixture import MIXTURE_FILE, Mixture
from megatron_r1.data.bpe import train_bpe
from megatron_r1.data.chat import render
from megatron_r1.data.shards import SOURCES_FILE, ShardSet, ShardWriter, SourceRecord
from megatron_r1.probe.config import ProbeConfig
from megatron_r1.probe.run import run as run_probe
from megatron_r1.train.config import TrainConfig
from megatron_r1.train.run import run
from megatron_r1.utils.io import atomic_write_json, sha256_file

WORDS = {
    "alpha": ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "the", "dog", "run", "over", "green", "hills"],
    "beta": ["def", "return", "self", "for", "in", "range", "print", "import", "value", "index", "while", "not"],
    "gamma": ["one", "two", "three", "four", "plus", "minus", "equals", "seven", "nine", "twelve", "times", "ten"],
}
DOMAINS = {"alpha": "knowledge", "beta": "code", "gamma": "math", "chat": "chat"}


def text(source: str, rng: np.random.Generator) -> str:
    """A document of one source: its own words in random order."""
    return " ".join(rng.choice(WORDS[source], size=int(rng.integers(8, 60))))


def make_shards(folder: Path, documents: int = 60, vocab_size: int = 512, seed: int = 0, answers: tuple[int, int] | None = None) -> Artifact:
    """Three text sources (splits train, probe, test) and a chat source. `answers`: least and most words of an assistant's turn."""
    rng = np.random.default_rng(seed)
    work = open_workspace(folder, "corpus", "shards", {"documents": documents, "vocab": vocab_size, "seed": seed, "answers": answers})
    sample = [" ".join(words) for words in WORDS.values()]
    tokenizer = train_bpe(sample, vocab_size, work.path / "tokenizer")
    sources = {}
    for name in (*WORDS, "chat"):
        splits = {}
        (work.path / "sources" / name).mkdir(parents=True)
        for split, count in (("train", documents), ("probe", documents // 4), ("test", documents // 4)):
            writer = ShardWriter(work.path / "sources" / name / split, tokenizer.vocab_size, masked=name == "chat")
            for index in range(count):
                if name == "chat":
                    a, b = text("gamma", rng), text("alpha", rng)[: int(rng.integers(10, 80))]
                    b = b if answers is None else " ".join(rng.choice(WORDS["alpha"], size=int(rng.integers(*answers))))
                    ids, mask = render([{"role": "user", "content": a}, {"role": "assistant", "content": b}], tokenizer)
                    writer.add(ids, len((a + b).encode()), f"chat-{split}-{index}", mask=mask)
                else:
                    body = text(name, rng)
                    writer.add([*tokenizer.encode(body), tokenizer.eos_id], len(body.encode()), f"{name}-{split}-{index}")
            splits[split] = writer.close()
        sources[name] = SourceRecord(name=name, domain=DOMAINS[name], format="chat" if name == "chat" else "text", splits=splits).plain()
    atomic_write_json(work.path / SOURCES_FILE, {"sources": sources, "tokenizer": {"sha256": tokenizer.sha256}})
    return work.complete({})


def make_mixture(folder: Path, weights: dict[str, float], name: str = "mix") -> Artifact:
    """A mixture artifact with these weights."""
    work = open_workspace(folder, name, "mixture", {"weights": weights})
    even = {source: 1 / len(weights) for source in weights}
    atomic_write_json(work.path / MIXTURE_FILE, Mixture(method="explicit", weights=weights, natural=even, uniform=even, floor=0.0).plain())
    return work.complete({})


def make_probe(folder: Path, shards: Artifact) -> Artifact:
    """Probe sets of two capabilities."""
    config = ProbeConfig.model_validate({
        "inputs": {"shards": "corpus"}, "documents": 6, "tokens_per_document": 24, "seed": 1,
        "capabilities": {"code": {"sources": {"beta": 1}}, "math": {"sources": {"gamma": 1}}},
        "rules": {"min_tokens": 8, "near_duplicate": 1.0, "max_overlap": 1.0},
    })  # fmt: skip
    return run_probe(config, {"shards": shards}, open_workspace(folder, "probe", "probe", config, {"shards": shards}))


def make_outside_model(path: Path, shards: Artifact, **changes: Any) -> Path:
    """A folder with a random Llama of transformers, the shards' tokenizer and a few vocabulary rows to spare."""
    import torch
    import transformers

    torch.manual_seed(0)
    plain = {
        "vocab_size": 520, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.3,
    }
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**plain, **changes})).save_pretrained(path)
    for file in ShardSet.open(shards).tokenizer.hf_files:
        shutil.copy(file, path)
    return path


SCORED: dict[str, Any] = {"inputs": {"shards": "corpus", "probe": "probe"}, "scores": {"every": "3 steps", "rank": 4}}
"""What `resumable` and `settings` take to score documents; with checkpoints every second step directions outlive one."""
CACHED: dict[str, Any] = {"objective": "distill", "inputs": {"shards": "corpus", "teacher": "teacher"}, "distill": {"cache_top_k": 16}}
"""To distil from the cached top 16."""
CACHE_TOKENS = 32 * 8
"""Tokens of one of its chunks: four for the seven steps of `resumable`."""


def make_questions(folder: Path, right: float = 1.0, count: int = 120, seed: int = 0) -> Artifact:
    """Conversations "copy 3" -> "#### 3", of which the share `right` has the right digit and the others a random one."""
    rng = np.random.default_rng(seed)
    work = open_workspace(folder, "questions", "shards", {"right": right, "count": count, "seed": seed})
    tokenizer = train_bpe(["copy 0 1 2 3 4 5 6 7 8 9 #### user assistant"], 300, work.path / "tokenizer")
    splits = {}
    (work.path / "sources" / "copy").mkdir(parents=True)
    for split, n in (("train", count), ("test", 10)):
        writer = ShardWriter(work.path / "sources" / "copy" / split, tokenizer.vocab_size, masked=True)
        for index in range(n):
            asked = index % 10
            said = asked if rng.random() < right else int(rng.integers(10))
            ids, mask = render([{"role": "user", "content": f"copy {asked}"}, {"role": "assistant", "content": f"#### {said}"}], tokenizer)
            writer.add(ids, 12, f"copy-{split}-{index}", mask=mask)
        splits[split] = writer.close()
    record = SourceRecord(name="copy", domain="math", format="chat", splits=splits).plain()
    atomic_write_json(work.path / SOURCES_FILE, {"sources": {"copy": record}, "tokenizer": {"sha256": tokenizer.sha256}})
    return work.complete({})


def settings(**changes: Any) -> TrainConfig:
    """A run of 6 steps on the nano model; `changes` replace top-level fields."""
    plain: dict[str, Any] = {
        "seed": 7, "inputs": {"shards": "corpus"}, "model": "nano", "budget": "6 steps", "global_batch": "128 tokens", "seq_length": "32 tokens",
        "micro_batch": 2, "lr": {"peak": 3e-3, "warmup": "2 steps", "final_ratio": 0.1}, "sources": {"alpha": 0.5, "beta": 0.3, "gamma": 0.2},
        "validation": {"tokens": "0 tokens"}, "log": {"every": "1 steps", "tensorboard": False},
    }
    return TrainConfig.model_validate({**plain, **changes})


REWARDED: dict[str, Any] = {
    "objective": "grpo", "model": {"preset": "nano", "vocab_size": 384, "num_kv_heads": 2, "init_std": 0.1}, "sources": {"copy": 1.0}, "seq_length": "32 tokens",
    "global_batch": "384 tokens", "micro_batch": 2, "grpo": {"generations": 3, "max_new_tokens": 8, "format_reward": 0.5, "batch_size": 6},
}
"""What `resumable` and `settings` take to train on the rewards of `make_questions`: 4 questions x 3 answers, micro-batches that cut groups."""


def train(folder: Path, config: TrainConfig, name: str = "train", **inputs: Artifact | None) -> Artifact:
    """Run the stage in a workspace under `folder` (the same name and settings go on with the same workspace)."""
    given = {role: artifact for role, artifact in inputs.items() if artifact is not None}
    return run(config, given, open_workspace(folder, name, "checkpoint", config, given))


def reopen(path: Path) -> Artifact:
    """An artifact by path."""
    return open_artifact(path)


def resumable(**changes: Any) -> TrainConfig:
    """Seven steps, a checkpoint after every second one, and everything that writes switched on."""
    return settings(
        budget="7 steps", checkpoints={"every": "2 steps", "keep": 2, "evenly": 1}, log={"every": "3 steps", "tensorboard": True},
        validation={"tokens": "96 tokens", "every": "4 steps"}, rankme={"samples": "8 samples"}, **changes,
    )


def final_bytes(artifact: Artifact) -> dict[str, str]:
    """Name -> SHA-256 of the tensor files of the last checkpoint: weights and both moments."""
    folder = artifact.path / "checkpoints"
    last = sorted(folder.iterdir())[-1]
    return {path.name: sha256_file(path) for path in sorted((last / "weights").glob("*.distcp"))}


def timeless(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Metrics records without clock readings."""
    return [{key: value for key, value in record.items() if key not in ("seconds", "tokens_per_second")} for record in records]
