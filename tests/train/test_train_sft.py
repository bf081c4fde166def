"""Fine-tuning: no gradient between packed conversations, the loss of each of them alone, and a row of 32k tokens."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from train_toys import make_shards, settings, train

from megatron_r1.artifacts.checkpoint import CheckpointSet
from megatron_r1.data.dataset import SftDataset
from megatron_r1.data.shards import ShardSet
from megatron_r1.model.build import build_model
from megatron_r1.model.config import ModelConfig
from megatron_r1.model.forward import logits
from megatron_r1.model.load import load_model
from megatron_r1.ops.attention_cores import CORE_VARIABLE
from megatron_r1.parallel.config import LayoutConfig
from megatron_r1.parallel.context import initialize
from megatron_r1.train.objectives import Objective
from megatron_r1.utils.errors import DataError

MODEL = ModelConfig.model_validate("nano").replace(init_std=0.2)


@pytest.fixture
def ctx():
    return initialize(LayoutConfig(), 0)


@pytest.fixture
def chat(shards):
    opened = ShardSet.open(shards)
    return opened.split("chat"), opened.tokenizer


def packed(shard, tokenizer, mask="assistant", rows=3, length=256):
    return SftDataset({"chat": shard}, length, 3, tokenizer.pad_id, mask=mask).batch(range(rows))


def loss_and_gradient(ctx, batch, recompute):
    """Sum of the losses, and its gradient with respect to the embedded inputs: [b, s, d]."""
    chunks = build_model(MODEL, ctx, seed=1, recompute=recompute)
    chunks[0].train()
    kept = []
    chunks[0].embedding.register_forward_hook(lambda module, arguments, output: kept.append(output.requires_grad_()) or output.retain_grad())
    output, loss = Objective(1, ctx.device).forward_step(iter([batch]), chunks[0])
    total = loss(output)[0]
    total.backward()
    return float(total.detach()), kept[0].grad.transpose(0, 1)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("core", ["sdpa", "math"])
def test_a_conversation_has_no_gradient_from_its_neighbours(ctx, chat, core, recompute, monkeypatch):
    """Exactly 0 at every position of every other conversation of the row and in the padding, in either direction."""
    monkeypatch.setenv(CORE_VARIABLE, core)
    batch = packed(*chat)
    ids, whole = batch["segment_ids"], batch["loss_mask"]
    assert all(row.max() >= 2 for row in ids), "rows of at least three conversations, or nothing is shown"
    for number in range(3):
        here = ids == number
        _, gradient = loss_and_gradient(ctx, {**batch, "loss_mask": np.where(here, whole, 0).astype(np.float32)}, recompute)
        sizes = gradient.abs().sum(-1).numpy()
        assert (sizes[~here] == 0.0).all()
        for row in range(len(ids)):
            last = np.flatnonzero(here[row] & (whole[row] > 0)).max()
            assert (sizes[row][here[row]][: last - np.flatnonzero(here[row]).min() + 1] > 0).all()
    one = {**batch, "segment_ids": np.zeros_like(ids), "loss_mask": np.where(ids == 1, whole, 0).astype(np.float32)}
    assert (loss_and_gradient(ctx, one, recompute)[1].abs().sum(-1).numpy()[ids == 0] > 0).any(), "without boundaries there would be one"


@pytest.mark.parametrize("mask", ["assistant", "all"])
def test_the_loss_of_a_packed_row_is_that_of_its_conversations_alone(ctx, chat, mask):
    shard, tokenizer = chat
    batch = packed(shard, tokenizer, mask)
    found, _ = loss_and_gradient(ctx, batch, False)
    model, expected, targets = build_model(MODEL, ctx, seed=1), 0.0, 0
    for document in np.concatenate(batch["document_ids"]):
        ids, learn = (torch.from_numpy(np.asarray(part).astype(np.int64)) for part in (shard.tokens(int(document)), shard.mask(int(document))))
        with torch.no_grad():
            losses = F.cross_entropy(logits(model, ids[None, :-1])[0].double(), ids[1:], reduction="none")
        expected += float(losses[learn[1:] == 1].sum() if mask == "assistant" else losses.sum())
        targets += int(learn[1:].sum()) if mask == "assistant" else len(losses)
    assert batch["loss_mask"].sum() == targets
    assert found == pytest.approx(expected, rel=1e-6)


def test_conversations_longer_than_the_context(tmp_path, shards, messages):
    """Cut and counted, or refused before the first step."""
    short = {"objective": "sft", "sources": {"chat": 1.0}, "seq_length": "32 tokens", "global_batch": "128 tokens", "budget": "1 steps"}
    lengths = ShardSet.open(shards).split("chat").lengths
    over = int((lengths > 33).sum())
    assert over > 0
    with pytest.raises(DataError, match=rf"found: {over} longer ones \(chat {over}\), up to {lengths.max()} tokens(?s:.)*sft.too_long: cut"):
        train(tmp_path, settings(**short, sft={"too_long": "error"}), "refused", shards=shards)
    assert not list(tmp_path.rglob("ledger.jsonl"))
    artifact = train(tmp_path, settings(**short), "cut", shards=shards)
    counted = [sum(artifact.manifest.summary[name].values()) for name in ("conversations_cut", "conversations_without_target")]
    assert all(counted)
    assert sum(counted) == over
    assert any(f"{counted[0]} conversations cut to seq_length" in message for message in messages)
    enough = int(lengths.max()) - 1
    train(tmp_path, settings(**{**short, "seq_length": f"{enough} tokens", "global_batch": f"{enough} tokens", "micro_batch": 1}, sft={"too_long": "error"}), "fits", shards=shards)


@pytest.mark.slow
def test_a_step_at_the_published_context_is_that_of_its_documents_one_by_one(tmp_path, ctx):
    """32k tokens, RoPE base times 8, recomputation, as reasoning SFT: through the stage, against whole logits of one conversation after the other."""
    shards = make_shards(tmp_path, documents=8, answers=(4000, 9000))
    base = train(tmp_path, settings(budget="1 steps", model={"preset": "nano", "init_std": 0.2}), "base", shards=shards)
    length = 32768
    config = settings(
        objective="sft", model=None, inputs={"shards": "corpus", "checkpoint": "base"}, model_changes={"rope_theta": 8e6, "max_positions": length}, recompute=True,
        sources={"chat": 1.0}, seq_length=f"{length} tokens", global_batch=f"{length} tokens", micro_batch=1, budget="1 steps",
    )
    tuned = CheckpointSet.open(train(tmp_path, config, "tuned", shards=shards, checkpoint=base))
    assert (tuned.model["rope_theta"], tuned.model["max_positions"]) == (8e6, length)
    record = tuned.metrics()[0]
    opened = ShardSet.open(shards)
    row = SftDataset({"chat": opened.split("chat")}, length, 7, opened.tokenizer.pad_id, {"chat": 1.0}).sample(0)
    assert (row["segment_ids"] >= 0).sum() > 20_000
    assert row["segment_ids"].max() >= 2
    start = CheckpointSet.open(base)
    models = {theta: load_model(start.final, ctx, config=ModelConfig.model_validate(start.model).replace(rope_theta=theta)) for theta in (1e6, 8e6)}

    def alone(model):
        total, targets = 0.0, row["loss_mask"].sum()
        for number in range(row["segment_ids"].max() + 1):
            here = torch.from_numpy(row["segment_ids"] == number)
            tokens, labels, learn = (torch.from_numpy(np.asarray(row[key]).astype(np.int64))[here] for key in ("tokens", "labels", "loss_mask"))
            losses = F.cross_entropy(logits(model, tokens[None])[0], labels, reduction="none")
            share = (losses * learn).sum() / targets
            if torch.is_grad_enabled():
                share.backward()
            total += float(share.detach())
        return total, [p.grad.norm() for p in model[0].parameters() if p.grad is not None]

    loss, norms = alone(models[8e6])
    assert record["loss"] == pytest.approx(loss, abs=1e-5)
    assert record["grad_norm"] == pytest.approx(float(torch.stack(norms).norm()), rel=1e-4)
    with torch.no_grad():
        assert abs(alone(models[1e6])[0] - loss) > 1e-4, "the base must matter"
