"""Small corpora for tests of the corpus stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_r1.artifacts.base import Artifact, open_workspace
from megatron_r1.corpus.config import CorpusConfig
from megatron_r1.corpus.run import run

WORDS = [
    "alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu",
    "nu", "xi", "omicron", "pi", "rho", "sigma", "tau", "upsilon", "phi", "chi", "psi", "omega",
]


def text(i: int, words: int = 60) -> str:
    """A text nobody else has."""
    return " ".join(WORDS[(i * 7 + j * j + j * (i % 5)) % len(WORDS)] for j in range(words)) + f". Number {i}."


def write_jsonl(path: Path, records: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return path


def config(sources: dict[str, Any], **more: Any) -> CorpusConfig:
    return CorpusConfig.model_validate({
        "seed": 0, "sources": sources, "tokenizer": {"vocab_size": 400}, "decontaminate": None, "workers": 1, "splits": {"control_countries": 0}, **more,
    })


def make(folder: Path, settings: CorpusConfig, name: str = "corpus", inputs: dict[str, Any] | None = None) -> Artifact:
    inputs = inputs or {}
    return run(settings, inputs, open_workspace(folder, name, "shards", settings, inputs))


def contents(folder: Path) -> dict[str, bytes]:
    """Every payload file's bytes."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "manifest.json"}


def line_offsets(path: Path) -> list[int]:
    """Byte every line begins at: what ids by position are made of."""
    lines = path.read_bytes().splitlines(keepends=True)
    return [sum(map(len, lines[:i])) for i in range(len(lines))]
