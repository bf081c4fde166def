"""Train artifacts with numbers chosen by a test: no training, no weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_r1.artifacts.base import Artifact, open_workspace
from megatron_r1.artifacts.checkpoint import METRICS_FILE, MODEL_FILE, TRAIN_FILE, CheckpointRecord, TrainManifest
from megatron_r1.utils.io import atomic_write_json, write_jsonl

STEPS = 20


def trained(
    folder: Path, corpus: Artifact, shares: Mapping[str, float], losses: Mapping[str, float] | None, name: str = "proxy", **changes: Any
) -> Artifact:
    """A finished training on these shares that ended with these probe losses. `changes` replace fields of train.json."""
    config = {"stage": "train", "shares": dict(shares), "losses": losses, "name": name, "changes": repr(changes), "validation": {"tokens": "64 tokens"}}
    work = open_workspace(folder, name, "checkpoint", config, {"shards": corpus})
    plain = {
        "objective": "next_token", "checkpoints": [CheckpointRecord(step=STEPS, tokens=STEPS * 128, path="checkpoints/step-00000020").plain()], "final": 0,
        "steps": STEPS, "tokens": STEPS * 128, "tokens_before": 0, "seq_length": 32, "global_batch": 128, "optimizer": {"lr": {"peak": 1e-3}},
        "data_cursors": {}, "data_seed": 1, "shards": corpus.fingerprint, "tokenizer": "t" * 64, "sources": dict(shares), "skipped_steps": [],
        "layout": {}, "precision": "fp32", **changes,
    }  # fmt: skip
    atomic_write_json(work.path / TRAIN_FILE, TrainManifest.model_validate(plain).plain())
    atomic_write_json(work.path / MODEL_FILE, {"hidden_size": 64})
    curves = None if losses is None else {f"probe/{c}": value for c, value in losses.items()}
    records = [{"step": 0, "tokens": 0, "validation": {"probe/code": 9.0, "probe/math": 9.0}}, {"step": STEPS, "tokens": STEPS * 128, "loss": 1.0, "validation": curves}]
    write_jsonl(work.path / METRICS_FILE, records)
    return work.complete({})


def family(
    folder: Path, corpus: Artifact, shares: np.ndarray, sources: Sequence[str], losses: Mapping[str, np.ndarray], **changes: Any
) -> list[Artifact]:
    """One training per row of shares [n, k], with losses capability -> [n]."""
    return [
        trained(folder, corpus, dict(zip(sources, row.tolist())), {c: float(values[i]) for c, values in losses.items()}, f"proxy-{i}", **changes)
        for i, row in enumerate(shares)
    ]
