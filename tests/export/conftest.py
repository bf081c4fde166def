"""A small trained-like model as a checkpoint artifact: random weights, a tokenizer trained on a few sentences."""

from __future__ import annotations

import pytest
import torch

from megatron_r1.artifacts.base import open_workspace
from megatron_r1.artifacts.checkpoint import CheckpointRecord, TrainManifest, checkpoint_folder
from megatron_r1.model.config import PRESETS
from megatron_r1.utils import io

CONFIG = PRESETS["nano"].replace(vocab_size=384, num_heads=4, num_kv_heads=2, hidden_size=64, head_dim=16, ffn_size=96, max_positions=256)
TEXT = ["The capital of France is Paris.", "def add(a, b):\n    return a + b\n", "12 + 30 = 42", "Ünïcode — naïve café ✓ 日本"] * 20


def make_checkpoint(folder, config=CONFIG, seed=5, name="sft"):
    from megatron_r1.data.bpe import train_bpe
    from megatron_r1.model.build import build_model
    from megatron_r1.parallel import checkpoint as store
    from megatron_r1.parallel.config import LayoutConfig
    from megatron_r1.parallel.context import initialize

    work = open_workspace(folder, name, "checkpoint", {"stage": "train", "seed": seed}, command="a test")
    tokenizer = train_bpe(TEXT, config.vocab_size, work.path / "tokenizer")
    ctx = initialize(LayoutConfig(), 0)
    chunks = build_model(config, ctx, seed=seed)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in chunks[0].parameters():  # larger than init, so that a wrong layer or head shows in the logits; norms off 1
            parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.1)
    target = checkpoint_folder(work.path, 7)
    store.save(target, chunks, None, {"step": 7, "tokens": 700}, ctx)
    manifest = TrainManifest(
        objective="sft", checkpoints=[CheckpointRecord(step=7, tokens=700, path=f"checkpoints/{target.name}")], final=0, steps=7, tokens=700, tokens_before=300,
        seq_length=128, global_batch=100, optimizer={}, data_cursors={}, data_seed=0, shards="", tokenizer=tokenizer.sha256, sources={"web": 1.0}, skipped_steps=[],
        layout={}, precision="fp32",
    )
    io.atomic_write_json(work.path / "model.json", config.plain())
    io.atomic_write_json(work.path / "train.json", manifest.plain())
    for journal in ("metrics.jsonl", "ledger.jsonl"):
        io.atomic_write_text(work.path / journal, "")
    return work.complete({})


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("run"))
