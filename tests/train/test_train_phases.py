"""Whole phases: what is carried from one to the next, what is refused, what is written."""

import json

import numpy as np
import pytest
import torch
from train_toys import final_bytes, make_mixture, make_shards, settings, timeless, train

from megatron_r1.artifacts.base import open_workspace
from megatron_r1.artifacts.checkpoint import CheckpointSet
from megatron_r1.artifacts.probe import PROBE_FILE, CapabilityProbe, ProbeDocument, ProbeSet
from megatron_r1.data.shards import ShardSet
from megatron_r1.model.forward import hidden, token_losses
from megatron_r1.model.load import load_model
from megatron_r1.parallel.config import LayoutConfig
from megatron_r1.parallel.context import initialize
from megatron_r1.train import loop
from megatron_r1.train.feed import open_data
from megatron_r1.train.heldout import rankme_documents
from megatron_r1.train.rankme import rankme
from megatron_r1.train.topk_cache import TopKCache
from megatron_r1.utils.errors import CheckpointError, ConfigError, DataError, ParallelError

SECOND = {"model": None, "inputs": {"shards": "corpus", "mixture": "mix", "checkpoint": "train"}, "sources": None}
WEIGHTS = {"alpha": 0.1, "beta": 0.2, "gamma": 0.7}


@pytest.fixture(scope="module")
def first(shards, tmp_path_factory):
    """Phase 1, with validation and two even checkpoints."""
    config = settings(validation={"tokens": "200 tokens"}, rankme={"samples": "12 samples"}, checkpoints={"evenly": 2})
    return train(tmp_path_factory.mktemp("first"), config, shards=shards)


def blocks(data, samples):
    return [tuple(data.order.locate(index)) for index in range(samples)]


def test_a_new_phase_on_a_new_mixture_loses_and_repeats_nothing(tmp_path, shards, first):
    mixture = make_mixture(tmp_path, WEIGHTS)
    config = settings(**SECOND, budget="30 steps", validation={"tokens": "200 tokens"})
    second = train(tmp_path, config, shards=shards, mixture=mixture, checkpoint=first)
    one, two = CheckpointSet.open(first).manifest, CheckpointSet.open(second).manifest
    opened = ShardSet.open(shards)
    sizes = {name: opened.split(name).n_tokens // 32 for name in WEIGHTS}

    def consumed(manifest, name):
        cursor = manifest.data_cursors[name]
        assert {leg.blocks for leg in cursor.legs} <= {sizes[name]}
        return cursor.epoch * sizes[name] + sum(leg.taken for leg in cursor.legs)

    assert sum(consumed(one, name) for name in WEIGHTS) == 6 * 4
    assert sum(consumed(two, name) for name in WEIGHTS) == 36 * 4
    assert two.data_seed == one.data_seed
    assert two.tokens_before == one.tokens == 768
    data = open_data(config, opened, shards, mixture, CheckpointSet.open(first))
    visits = blocks(open_data(settings(), opened, shards, None, None), 24) + blocks(data, 120)
    assert len(set(visits)) == 144
    # gamma goes into its second pass: every block of the first was visited, in whichever phase.
    size = data.order.blocks["gamma"]
    assert two.data_cursors["gamma"].epoch == 1
    assert {block for name, block, epoch in visits if (name, epoch) == ("gamma", 0)} == set(range(size))
    share = {name: (consumed(two, name) - consumed(one, name)) / 120 for name in WEIGHTS}
    assert share == pytest.approx(WEIGHTS, abs=1 / 120)
    # The first record of phase 2 is the model phase 1 ended with, on the same tokens.
    assert CheckpointSet.open(second).metrics()[0]["validation"] == CheckpointSet.open(first).metrics()[-1]["validation"]


def test_another_sequence_length_goes_on_with_what_is_left_and_other_shards_start_over(tmp_path, shards, first, messages):
    parent = CheckpointSet.open(first)
    opened = ShardSet.open(shards)
    continuing = {**SECOND, "sources": {"alpha": 1.0}, "inputs": {"shards": "corpus", "checkpoint": "train"}}
    data = open_data(settings(**continuing, seq_length="64 tokens"), opened, shards, None, parent)
    alpha, taken = data.continued["alpha"], parent.manifest.data_cursors["alpha"].legs[0].taken
    assert [leg.seq_length for leg in alpha.legs] == [32]
    left = opened.split("alpha").n_tokens - 32 * taken
    assert left // 64 <= alpha.rest.blocks + 1 <= (left + taken) // 64 + 1
    assert data.cursors(0)["beta"] == parent.manifest.data_cursors["beta"]
    other = make_shards(tmp_path, documents=30, seed=5)

    def fresh(data):
        return not any(cursor.epoch or cursor.legs for cursor in data.cursors(0).values())

    assert fresh(open_data(settings(), ShardSet.open(other), other, None, parent))
    assert fresh(open_data(settings(carry_cursors=False), opened, shards, None, parent))
    assert open_data(settings(), opened, shards, None, parent).cursors(0) == parent.manifest.data_cursors
    assert any("alpha is read from other documents or in other sequences" in message for message in messages)
    assert any("other shards" in message for message in messages)


def test_shares_that_change_while_a_phase_runs(tmp_path, shards, messages):
    """A schedule and a cap, through a phase and the one after it: nothing twice, and what the log says is what is drawn."""
    schedule = [{"start": "512 tokens", "sources": {"alpha": 1.0}}, {"start": "1k tokens", "sources": {"alpha": 1.0, "beta": 1.0, "gamma": 1.0}, "over": "512 tokens", "jumps": 4}]
    config = settings(schedule=schedule, max_epochs={"alpha": 0.4}, budget="20 steps", sources={"alpha": 0.5, "beta": 0.5})
    opened = ShardSet.open(shards)
    data = open_data(config, opened, shards, None, None)
    names = [data.order.locate(i).source for i in range(80)]
    (capped,) = [event for event in data.order.capped if event.source == "alpha"]
    cap = int(0.4 * data.order.blocks["alpha"])
    assert names.count("alpha") == cap
    assert names.index("gamma") >= 32
    assert set(names[16 : min(32, capped.sample)]) == {"alpha"}
    assert "alpha" not in names[capped.sample :]
    assert any(f"alpha reaches its 0.4 passes at sample {capped.sample} (token {32 * capped.sample})" in message for message in messages)
    first = train(tmp_path, config, "first", shards=shards)
    found = CheckpointSet.open(first)
    drawn = {name: sum(record["sources"].get(name, 0) for record in found.ledger()) for name in WEIGHTS}
    assert drawn == {name: names.count(name) for name in WEIGHTS}
    assert found.manifest.sources == pytest.approx({name: count / 80 for name, count in drawn.items()}, abs=1e-6)
    second = settings(model=None, inputs={"shards": "corpus", "checkpoint": "first"}, max_epochs=1.0, budget="30 steps")
    later = open_data(second, opened, shards, None, found)
    visits = blocks(data, 80) + blocks(later, 120)
    assert len(set(visits)) == 200
    assert {epoch for _, _, epoch in visits} == {0}
    with pytest.raises(DataError, match=r"all of them at their caps(?s:.)*raise max_epochs"):
        open_data(settings(max_epochs=0.5, budget="100 steps"), opened, shards, None, None)
    with pytest.raises(ConfigError, match=r"from token 1000000 on(?s:.)*shorten the schedule"):
        open_data(settings(schedule=[{"start": "1M tokens", "sources": "natural"}]), opened, shards, None, None)
    with pytest.raises(ConfigError, match="max_epochs of sources with a share"):
        open_data(settings(max_epochs={"delta": 1.0}), opened, shards, None, None)


def test_moments_are_fresh_or_carried(tmp_path, shards, first):
    base = {"model": None, "inputs": {"shards": "corpus", "checkpoint": "train"}, "budget": "1 steps", "model_changes": {"rope_theta": 8e6, "max_positions": 4096}}
    fresh = train(tmp_path, settings(**base), "fresh", shards=shards, checkpoint=first)
    carried = train(tmp_path, settings(**base, reset_optimizer=False), "carried", shards=shards, checkpoint=first)
    steps = [json.loads((a.path / "checkpoints/step-00000001/common.json").read_text())["optimizer"]["step"] for a in (fresh, carried)]
    assert steps == [1, 7]
    assert final_bytes(fresh) != final_bytes(carried)
    model = CheckpointSet.open(fresh).model
    assert (model["rope_theta"], model["max_positions"]) == (8e6, 4096)


def test_what_does_not_fit_is_refused_before_the_first_step(tmp_path, shards, first):
    other = make_shards(tmp_path, documents=8, vocab_size=600, seed=1)

    def refused(error, match, config, **inputs):
        with pytest.raises(error, match=match):
            train(tmp_path, config, **{"shards": shards, **inputs})

    continuing = {"model": None, "inputs": {"shards": "corpus", "checkpoint": "train"}}
    refused(DataError, r"use the tokenizer of the shards(?s:.)*do:", settings(**continuing), shards=other, checkpoint=first)
    refused(DataError, r"at least the 600 rows(?s:.)*set model.vocab_size to 600", settings(), shards=other)
    refused(ConfigError, r"set model.max_positions to 4096", settings(seq_length="4096 tokens", global_batch="4096 tokens", micro_batch=1))
    refused(ParallelError, r"set micro_batch to one of \[1, 2, 4\]", settings(micro_batch=3))
    refused(DataError, r"shares of delta(?s:.)*correct the names", settings(sources={"alpha": 1.0, "delta": 1.0}))
    small = make_shards(tmp_path, documents=1, seed=2)
    refused(DataError, r"shorten seq_length", settings(seq_length="1024 tokens", global_batch="1024 tokens", micro_batch=1), shards=small)
    refused(ParallelError, r"divisible by tensor x pipeline", settings(layout={"tensor": 2}))
    assert not list(tmp_path.glob("train-*/manifest.json"))
    with pytest.raises(CheckpointError, match=r"steps \[3, 6\]"):
        CheckpointSet.open(first).at(4)


def test_artifact_and_losses_are_what_a_reader_computes(shards, first):
    """Validation, bits per byte, RankMe and the model, from the artifact alone."""
    found = CheckpointSet.open(first)
    assert [info.step for info in found.checkpoints] == [3, 6]
    assert found.final.tokens == 768
    assert found.at(3).path.is_dir()
    last = found.metrics()[-1]
    ctx = initialize(LayoutConfig(), 0)
    model, opened = load_model(found.final, ctx), ShardSet.open(shards)
    documents, positions = rankme_documents(opened, 12, 32, 7)
    with torch.no_grad():
        states = [hidden(model, torch.from_numpy(d.tokens[:-1].astype(np.int64))[None])[0, p] for d, p in zip(documents, positions)]
    assert all(p >= 1 for p in positions)
    assert last["rankme"] == pytest.approx(rankme(torch.stack(states)), rel=1e-4)
    shard = opened.split("beta", "test")
    texts = {opened.tokenizer.decode(shard.tokens(i)[:-1]): shard.tokens(i) for i in range(len(shard))}
    from megatron_r1.train.heldout import validation_documents

    nats, targets, count = 0.0, 0, 0
    for document in validation_documents(opened, None, 200, 32, 7):
        if document.curve == "test/code":
            ids = torch.from_numpy(document.tokens.astype(np.int64))[None]
            with torch.no_grad():
                nats += float(token_losses(model, {"tokens": ids[:, :-1], "labels": ids[:, 1:]}).sum())
            targets += ids.shape[1] - 1
            body = [t for t in document.tokens[1:] if t != opened.tokenizer.eos_id]
            count += len(opened.tokenizer.decode(body).encode())
    assert targets == 200
    assert texts
    # Every source of the mixture has a curve of its own, over its own held-out documents.
    from megatron_r1.train.heldout import source_documents

    assert {name for name in last["validation"] if name.startswith("source/")} == {"source/alpha", "source/beta", "source/gamma"}
    alpha = source_documents(opened, ["alpha"], 2048, 32, 7)
    held = {tuple(opened.split("alpha", "probe").tokens(i).tolist()[: len(d.tokens)]) for i in range(len(opened.split("alpha", "probe"))) for d in alpha}
    assert {tuple(document.tokens.tolist()) for document in alpha} <= held
    with torch.no_grad():
        losses = [token_losses(model, {"tokens": ids[:, :-1], "labels": ids[:, 1:]}) for ids in (torch.from_numpy(d.tokens.astype(np.int64))[None] for d in alpha)]
    assert last["validation"]["source/alpha"] == pytest.approx(float(torch.cat(losses, 1).mean()), rel=1e-5)
    assert "source/alpha" in last["bits_per_byte"]
    assert last["validation"]["test/code"] == pytest.approx(nats / targets, rel=1e-5)
    assert last["bits_per_byte"]["test/code"] == pytest.approx(nats / np.log(2) / count, rel=1e-5)


def test_probe_documents_are_the_probe_curves(tmp_path, shards):
    opened = ShardSet.open(shards)
    shard = opened.split("gamma", "probe")
    documents = [ProbeDocument(source="gamma", split="probe", index=i, id=shard.ids[i], start=1, n_tokens=8) for i in range(5)]
    probe = ProbeSet(
        capabilities={"math": CapabilityProbe(documents=documents, sieves=[])}, shards=shards.fingerprint, tokenizer=opened.tokenizer.sha256, tokens_per_document=8
    )
    work = open_workspace(tmp_path, "probe", "probe", {})
    probe.save(work.path / PROBE_FILE)
    config = settings(budget="1 steps", validation={"tokens": "1000 tokens"}, inputs={"shards": "corpus", "probe": "probe"})
    artifact = train(tmp_path, config, shards=shards, probe=work.complete({}))
    curves = CheckpointSet.open(artifact).metrics()[-1]["validation"]
    assert {name for name in curves if name.startswith("probe/")} == {"probe/math"}
    assert {name for name in curves if name.startswith("test/")} == {"test/code", "test/knowledge", "test/math", "test/chat"}
    model = load_model(CheckpointSet.open(artifact).final, initialize(LayoutConfig(), 0))
    with torch.no_grad():
        ids = torch.from_numpy(np.stack([document.tokens(opened) for document in documents]).astype(np.int64))
        assert curves["probe/math"] == pytest.approx(float(token_losses(model, {"tokens": ids[:, :-1], "labels": ids[:, 1:]}).mean()), rel=1e-5)


def test_sft_trains_on_packed_conversations_for_epochs(tmp_path, shards, first, messages):
    config = settings(
        objective="sft", model=None, inputs={"shards": "corpus", "checkpoint": "train"}, sources={"chat": 1.0}, seq_length="128 tokens", global_batch="512 tokens",
        budget="2 epochs", lr={"peak": 3e-3, "warmup": 0.03},
    )
    artifact = train(tmp_path, config, shards=shards, checkpoint=first)
    found = CheckpointSet.open(artifact)
    rows = len(open_data(config, ShardSet.open(shards), shards, None, None).dataset)
    assert found.manifest.steps == -(-2 * rows // 4)
    assert artifact.manifest.summary["epochs"]["chat"] == pytest.approx(2, rel=0.15)
    losses = [record["loss"] for record in found.metrics() if "loss" in record]
    assert losses[-1] < losses[0] - 0.3
    assert found.manifest.data_cursors == {}


@pytest.mark.parametrize("top_k", [None, 16])
def test_distillation_from_a_trained_teacher(tmp_path, shards, first, top_k, monkeypatch):
    config = settings(objective="distill", inputs={"shards": "corpus", "teacher": "train"}, distill={"cache_top_k": top_k}, budget="4 steps")
    written = []
    write = TopKCache.write
    monkeypatch.setattr(TopKCache, "write", lambda self, chunk, *tensors: (written.append(chunk), write(self, chunk, *tensors))[1])
    monkeypatch.setattr("megatron_r1.train.teacher_cache.CHUNK_TOKENS", 32 * 6)
    update = loop.Trainer._update

    def failing(self, *arguments):
        if self.step == 2:
            raise KeyboardInterrupt
        return update(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "_update", failing)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, config, shards=shards, teacher=first)
    artifact = train(tmp_path, config, shards=shards, teacher=first)
    assert written == ([] if top_k is None else [0, 1, 2])  # 16 samples in chunks of 6, each computed once
    losses = [record["loss"] for record in CheckpointSet.open(artifact).metrics()]
    assert losses[-1] < losses[0]
    assert not (artifact.path / "tmp").exists()
    live = train(tmp_path, settings(objective="distill", inputs={"shards": "corpus", "teacher": "train"}, budget="4 steps"), "live", shards=shards, teacher=first)
    wanted = [record["loss"] for record in CheckpointSet.open(live).metrics()]
    if top_k is None:
        assert losses == wanted
    else:
        # Merging the tail into one event can only lower a divergence.
        assert all(0 < a <= b + 1e-3 for a, b in zip(losses, wanted))
        assert losses[0] > 0.5 * wanted[0]


def test_non_finite_steps_are_skipped_written_down_and_survived(tmp_path, shards, monkeypatch):
    update = loop.Trainer._update
    weights = {}

    def poisoned(self, loss, lr):
        if self.step + 1 in (3, 4):
            for chunk in self.chunks:
                for parameter in chunk.parameters():
                    parameter.main_grad[:1].fill_(float("inf"))
            before = [p.detach().clone() for p in self.chunks[0].parameters()]
            result = update(self, loss, lr)
            weights[self.step + 1] = all(torch.equal(a, b) for a, b in zip(before, self.chunks[0].parameters()))
            return result
        return update(self, loss, lr)

    monkeypatch.setattr(loop.Trainer, "_update", poisoned)
    artifact = train(tmp_path, settings(), shards=shards)
    found = CheckpointSet.open(artifact)
    assert weights == {3: True, 4: True}
    assert found.manifest.skipped_steps == [3, 4]
    assert [record["applied"] for record in found.ledger()] == [True, True, False, False, True, True]
    assert [record["loss"] is None for record in found.metrics()] == [False, False, True, True, False, False]
    with pytest.raises(DataError, match="no checkpoint before them"):
        train(tmp_path, settings(guard={"skip": 1, "hold": 0}), shards=shards)


def test_the_same_settings_give_the_same_bytes(tmp_path, shards, first):
    config = settings(validation={"tokens": "200 tokens"}, rankme={"samples": "12 samples"}, checkpoints={"evenly": 2})
    again = train(tmp_path, config, shards=shards)
    assert final_bytes(again) == final_bytes(first)
    assert timeless(CheckpointSet.open(again).metrics()) == timeless(CheckpointSet.open(first).metrics())
    other = train(tmp_path, config.model_copy(update={"seed": 8}), shards=shards)
    assert final_bytes(other) != final_bytes(first)


def test_recomputation_changes_no_bit(tmp_path, shards):
    plain, again = (train(tmp_path, settings(recompute=recompute), f"recompute{recompute}", shards=shards) for recompute in (False, True))
    assert final_bytes(plain) == final_bytes(again)


def test_bf16_keeps_fp32_state_across_phases(tmp_path, shards):
    base = {"precision": "bf16", "lr": {"peak": 1e-6}, "optimizer": {"weight_decay": 0.0}}
    one = train(tmp_path, settings(**base), "one", shards=shards)
    two = train(tmp_path, settings(**base, model=None, inputs={"shards": "corpus", "checkpoint": "one"}, budget="1 steps"), "two", shards=shards, checkpoint=one)
    ctx = initialize(LayoutConfig(), 0)
    before, after = (load_model(CheckpointSet.open(artifact).final, ctx)[0] for artifact in (one, two))
    moved = max(float((a - b).abs().max()) for a, b in zip(before.parameters(), after.parameters()))
    # One step moves a weight by at most lr; rounding the weights to bf16 between phases would move them by up to 4e-3 of themselves.
    assert 0 < moved < 1.1e-6
