"""Proof from artifacts alone: a chain of phases with other weights, documents and sequence lengths reads every token once."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from test_train_kept import kept_mixture, on
from train_toys import make_shards, settings, train

from megatron_r1.artifacts.checkpoint import CheckpointSet
from megatron_r1.data.shards import ShardSet
from megatron_r1.train.ledger import check_journal, documents_of_step, open_chain, open_phase, passages, prove
from megatron_r1.utils.errors import DataError

spec = importlib.util.spec_from_file_location("ledger_tool", Path(__file__).parents[2] / "tools" / "ledger.py")
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """Four phases: all documents; a list and other weights; longer sequences and all documents; another list. alpha passes an epoch on the way."""
    folder = tmp_path_factory.mktemp("chain")
    shards = make_shards(folder, documents=40)
    every = np.arange(len(ShardSet.open(shards).split("beta")))
    one, two = (kept_mixture(folder, shards, {"alpha": found, "beta": every}, name) for name, found in (("one", np.arange(0, 40, 2)), ("two", np.arange(0, 40, 3))))
    short = {"log": {"every": "20 steps", "tensorboard": False}}
    first = train(folder, settings(**short, budget="9 steps"), "first", shards=shards)
    second = train(folder, settings(**on("one", checkpoint="first"), **short, model=None, budget="9 steps"), "second", shards=shards, mixture=one, checkpoint=first)
    longer = {"seq_length": "64 tokens", "micro_batch": 1, "sources": {"alpha": 0.8, "gamma": 0.2}, "schedule": [{"start": "640 tokens", "sources": {"alpha": 0.5, "gamma": 0.5}}]}
    third = train(folder, settings(**longer, **short, model=None, inputs={"shards": "corpus", "checkpoint": "second"}, budget="15 steps"), "third", shards=shards, checkpoint=second)
    last = train(folder, settings(**on("two", checkpoint="third"), **short, model=None, budget="40 steps"), "last", shards=shards, mixture=two, checkpoint=third)
    return [first, second, third, last]


def test_a_chain_of_phases_is_proved_from_its_last_artifact(chain, capsys):
    phases = open_chain(chain[-1])
    assert [phase.found.artifact.name for phase in phases] == ["first", "second", "third", "last"]
    found = {(passage.source, passage.epoch): passage for passage in prove(chain[-1].path)}
    assert found["alpha", 0].finished
    assert all(passage.repeated == 0 for passage in found.values())
    read = sum(passage.tokens for passage in found.values())
    targets = sum(int(phase.found.manifest.tokens) for phase in phases)
    # Every label is counted, but those there as context only; the first token of a leg is counted though it is no label.
    assert targets - 400 < read <= targets + 20
    assert tool.main([str(chain[-1].path)]) == 0
    assert f"alpha\t0\t{found['alpha', 0].tokens}\t0\t{found['alpha', 0].left}\tfinished" in capsys.readouterr().out


def test_documents_of_a_step_are_what_its_batch_was_made_of(chain, capsys):
    for artifact in chain:
        phase = open_phase(artifact)
        per_step = phase.config.sequences_per_step
        for step in (0, 5):
            readings = documents_of_step(phase.data, per_step, step)
            batch = phase.data.dataset.batch(range(step * per_step, (step + 1) * per_step))
            wanted: dict[str, list[int]] = {}
            for row in range(per_step):
                wanted.setdefault(phase.data.sources[batch["source_ids"][row]], []).extend(batch["labels"][row].tolist())
            for source, labels in wanted.items():
                shard = phase.shards.split(source)
                tokens = np.concatenate([shard.tokens(r.document)[r.first : r.first + r.tokens] for r in readings if r.source == source])
                # Labels that are context only are not among the readings, and at most one token a row (the stream's first) is no label.
                common = sum((np.minimum(np.bincount(labels, minlength=600), np.bincount(tokens, minlength=600))).tolist())
                assert len(tokens) - len(labels) <= 1
                assert common >= len(tokens) - 1
    assert tool.main([str(chain[0].path), "--step", "6"]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    readings = documents_of_step(open_phase(chain[0]).data, 4, 5)
    assert len(lines) == len(readings)
    assert lines[0].split("\t")[3] == f"{readings[0].source}-train-{readings[0].document}"
    assert tool.main([str(chain[0].path), "--step", "99"]) == 1


def test_a_sample_read_twice_and_one_left_out_are_found(chain):
    """The proof is no tautology: a phase that is counted twice repeats, one that is left out loses."""
    phases = [(phase.data, phase.samples) for phase in open_chain(chain[-1])]
    shards = open_phase(chain[0]).shards
    twice = passages([phases[0], *phases], shards)
    assert sum(passage.repeated for passage in twice) >= 9 * 4 * 32
    without = {(p.source, p.epoch): p for p in passages(phases[1:], shards)}
    assert without["alpha", 0].left > without["alpha", 0].allowed


def test_an_edited_ledger_and_another_order_are_found(chain, monkeypatch):
    phase = open_phase(chain[0])
    records = CheckpointSet.open(chain[0]).ledger()
    for change in ({"first": 5}, {"sources": {"alpha": 4}}, {"step": 9}):
        monkeypatch.setattr(CheckpointSet, "ledger", lambda self, change=change: [*records[:2], {**records[2], **change}, *records[3:]])
        with pytest.raises(DataError, match="line 3 of the ledger of first"):
            check_journal(phase)
    monkeypatch.setattr(CheckpointSet, "ledger", lambda self: records[:-1])
    with pytest.raises(DataError, match="9 lines"):
        check_journal(phase)
    manifest = chain[0].path / "train.json"
    content = manifest.read_text()
    try:
        manifest.write_text(json.dumps({**json.loads(content), "data_order": "0123456789abcdef"}))
        with pytest.raises(DataError, match="the data order 0123456789abcdef of first"):
            open_phase(chain[0])
    finally:
        manifest.write_text(content)
