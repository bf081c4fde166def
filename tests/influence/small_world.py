"""A world with known answers: two languages (Markov chains), one source split in two, one with its tokens shuffled,
and a nano model trained on them for seconds with the project's own optimizer and checkpoints.

The languages are noisy and documents hardly repeat, so that the model stays short of what it could learn: an overfitted
model gains from shuffled tokens, because anything that flattens its predictions lowers its held-out loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from tiny_shards import VOCAB, build_shards, documents, markov

from megatron_r1.artifacts.base import Artifact, open_workspace
from megatron_r1.data.shards import ShardSet
from megatron_r1.influence.config import InfluenceConfig
from megatron_r1.influence.rows import Row, collate
from megatron_r1.model.build import build_model
from megatron_r1.model.config import PRESETS
from megatron_r1.model.forward import token_losses
from megatron_r1.parallel import checkpoint as store
from megatron_r1.parallel.config import LayoutConfig
from megatron_r1.parallel.context import initialize
from megatron_r1.parallel.ddp import wrap
from megatron_r1.parallel.optimizer import build_optimizer, set_lr, step
from megatron_r1.parallel.schedule import forward_backward
from megatron_r1.probe.config import ProbeConfig
from megatron_r1.probe.run import run as run_probe
from megatron_r1.utils.io import atomic_write_json

TOKENS = 48  # predicted tokens per row
LEFT, RIGHT, TWIN = (markov(seed, width=4, vocab=64, first=64 * seed, noise=0.4) for seed in (1, 2, 3))
OPTIMIZER = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "clip": 1.0}


def small_shards(folder: Path) -> Artifact:
    """left, right: one language each; twin_a, twin_b: a third language split at random; shuffled: the
    tokens of real documents in random order."""
    born = documents(TWIN, 31, 600)
    side = np.random.default_rng(5).permutation(600) < 300
    draw = np.random.default_rng(7)
    real = documents(LEFT, 41, 40) + documents(RIGHT, 42, 40)
    shuffled = np.split(draw.permutation(np.concatenate(real)), np.cumsum([len(d) for d in real])[:-1])
    held_out = {"left": documents(LEFT, 12, 20), "right": documents(RIGHT, 22, 20)}
    sources = {
        "left": {"train": documents(LEFT, 11, 600), "probe": held_out["left"]},
        "right": {"train": documents(RIGHT, 21, 600), "probe": held_out["right"]},
        "twin_a": {"train": [d for d, s in zip(born, side) if s]},
        "twin_b": {"train": [d for d, s in zip(born, side) if not s]},
        "shuffled": {"train": shuffled},
    }
    return build_shards(folder, sources)


def small_probe(folder: Path, shards: Artifact, sources: Sequence[str] = ("left", "right"), windows: int = 16) -> Artifact:
    """A probe set for each of these sources, which are named after it."""
    config = ProbeConfig.model_validate(
        {
            "inputs": {"shards": "corpus"},
            "documents": windows,
            "tokens_per_document": TOKENS,
            "seed": 1,
            "capabilities": {source: {"sources": {source: 1}} for source in sources},
            # Documents of so small a language share many n-grams: only equal windows are duplicates here.
            "rules": {"min_tokens": 30, "near_duplicate": 1.0, "max_overlap": 1.0},
        }
    )
    parents = {"shards": shards}
    return run_probe(config, parents, open_workspace(folder, "probe", "probe", config, parents))


def small_checkpoint(
    folder: Path, shards: Artifact, steps: int = 240, keep: tuple[int, ...] = (160, 240), rows: int = 16,
    sources: Sequence[str] = ("left", "right", "twin_a", "twin_b"), seed: int = 0,
) -> Artifact:  # fmt: skip
    """A nano model trained for `steps` steps on these sources (all but the shuffled one), checkpoints kept at `keep`."""
    layout = LayoutConfig()
    ctx = initialize(layout, 0)
    chunks = wrap(build_model(PRESETS["nano"], ctx, seed=3 + seed), layout, ctx)
    optimizer = build_optimizer(
        chunks, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, clip=1.0, layout=layout, precision="fp32"
    )
    opened = ShardSet.open(shards)
    pool = [
        np.array(opened.split(s).tokens(i))
        for s in sources
        for i in range(len(opened.split(s)))
    ]
    draw = np.random.default_rng(seed)
    work = open_workspace(folder, "pretrain", "checkpoint", {"steps": steps, "seed": seed}, {"shards": shards})

    def forward_step(batches: Iterator[dict], chunk: torch.nn.Module):
        batch = next(batches)
        losses = token_losses(chunk, batch)
        return losses, lambda out: ((out * batch["loss_mask"]).sum(), batch["loss_mask"].sum().int(), {})

    kept = []
    for number in range(1, steps + 1):
        batch = collate([Row(0, pool[i][: TOKENS + 1]) for i in draw.integers(0, len(pool), rows)], ctx.device)
        forward_backward(ctx, chunks, forward_step, iter([batch]), 1, batch["tokens"].shape[1], rows)
        set_lr(optimizer, 1e-3 * (1 - (number - 1) / steps))
        step(optimizer)
        if number in keep:
            path = f"checkpoints/step-{number:08d}"
            store.save(work.path / path, chunks, optimizer, {"step": number}, ctx)
            kept.append({"step": number, "tokens": number * rows * TOKENS, "path": path})
    atomic_write_json(work.path / "model.json", PRESETS["nano"].plain())
    atomic_write_json(
        work.path / "train.json",
        {
            "objective": "next_token",
            "checkpoints": kept,
            "final": len(kept) - 1,
            "steps": steps,
            "tokens": steps * rows * TOKENS,
            "tokens_before": 0,
            "seq_length": TOKENS,
            "global_batch": rows * TOKENS,
            "optimizer": OPTIMIZER,
            "data_cursors": {},
            "data_seed": 0,
            "shards": shards.fingerprint,
            "tokenizer": opened.tokenizer.sha256,
            "sources": {},
            "skipped_steps": [],
            "layout": layout.plain(),
            "precision": "fp32",
        },
    )
    return work.complete({})


def influence_config(**changes: object) -> InfluenceConfig:
    """Small, but with every part switched on."""
    return InfluenceConfig.model_validate(
        {
            "inputs": {"shards": "corpus", "probe": "probe", "checkpoint": "pretrain"},
            "documents": 40,
            "tokens_per_document": TOKENS,
            "checkpoints": 2,
            "batch": "1024 tokens",
            "partition_documents": 20,
            "seed": 5,
            **changes,
        }
    )


assert PRESETS["nano"].vocab_size == VOCAB
