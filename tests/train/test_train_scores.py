"""Scores while training, as a stage: what is written, that it survives interruptions, and that training does not notice."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from train_toys import SCORED, final_bytes, resumable, settings, timeless, train

from megatron_r1.artifacts import training_scores as files
from megatron_r1.artifacts.base import open_artifact, open_workspace
from megatron_r1.artifacts.checkpoint import CheckpointSet
from megatron_r1.artifacts.probe import load_probe
from megatron_r1.artifacts.training_scores import ScoresReader
from megatron_r1.data.shards import ShardSet
from megatron_r1.influence.ghost import Ghost
from megatron_r1.influence.probe_gradient import fold_gradient
from megatron_r1.influence.rows import Row, packed
from megatron_r1.model.forward import token_losses
from megatron_r1.model.load import load_model
from megatron_r1.model.precondition import Adam
from megatron_r1.parallel.checkpoint import load_second_moment
from megatron_r1.parallel.config import LayoutConfig
from megatron_r1.parallel.context import initialize
from megatron_r1.train import loop
from megatron_r1.train.run import open_data
from megatron_r1.utils.errors import ArtifactError

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def scored(shards, probe, tmp_path_factory):
    """The run every interrupted one must equal: directions at steps 3 and 6, checkpoints at 2, 4, 6, 7."""
    return train(tmp_path_factory.mktemp("scored"), resumable(**SCORED), shards=shards, probe=probe)


def scores_bytes(artifact):
    return {path.name: path.read_bytes() for path in sorted((artifact.path / files.SCORES_FOLDER).iterdir())}


def test_training_does_not_notice(scored, shards, probe, tmp_path):
    plain = train(tmp_path, resumable(inputs=SCORED["inputs"]), shards=shards, probe=probe)
    assert final_bytes(scored) == final_bytes(plain)
    mine, theirs = (timeless(CheckpointSet.open(artifact).metrics()) for artifact in (scored, plain))
    logged = [record.pop("scores", None) for record in mine]
    assert [record for record in mine if record["step"] in {r["step"] for r in theirs}] == theirs
    assert [record["step"] for record, scores in zip(mine, logged) if scores] == [6, 7]


def test_every_document_of_every_step_once(scored, shards, probe):
    """Rows against the data order, read anew; the summary against the rows, by hand."""
    config, reader = resumable(**SCORED), ScoresReader(scored.path)
    data = open_data(config, ShardSet.open(shards), shards, None, None)
    expected = []
    for sample in range(3 * 4, 7 * 4):
        arrays = data.dataset.sample(sample)
        for place in range(arrays["segment_ids"][-1] + 1):
            targets = int(arrays["loss_mask"][arrays["segment_ids"] == place].sum())
            if targets:
                step = sample // 4 + 1
                expected.append((sample, step, 3 if step <= 6 else 6, arrays["source_id"], place, targets))
    rows = reader.rows()
    assert [tuple(row)[:6] for row in rows] == expected
    assert np.isfinite(rows["scores"]).all()
    summary = CheckpointSet.open(scored).manifest.scores
    assert (summary.rows, summary.not_numbers, summary.probes) == (len(rows), 0, 2)
    assert summary.layout.documents == {"code": 6, "math": 6}
    assert [record["step"] for record in reader.probes()] == [3, 6]
    metrics = {record["step"]: record for record in CheckpointSet.open(scored).metrics()}
    for number, source in enumerate(reader.layout.sources):
        own = rows[rows["source"] == number]
        for k, capability in enumerate(reader.layout.capabilities):
            s, n = own["scores"][:, k].astype(float), own["tokens"].astype(float)
            mean = s.sum() / n.sum()
            found = summary.sources[source][capability]
            assert (found.mean, found.documents, found.tokens) == (pytest.approx(mean, rel=1e-9), len(own), n.sum())
            assert found.error == pytest.approx(np.sqrt(((s - mean * n) ** 2).sum() * len(own) / (len(own) - 1)) / n.sum(), rel=1e-6)
            late = own[own["step"] == 7]
            if len(late):
                assert metrics[7]["scores"][source][capability] == pytest.approx(late["scores"][:, k].sum(dtype=float) / late["tokens"].sum(), rel=1e-6)
    assert 0 < summary.error["code"] < 1


def test_equal_to_influence_at_the_same_weights(shards, probe, tmp_path, monkeypatch):
    """Step 4 is taken at the weights of the checkpoint of step 3, where the directions were taken too: documents of that step have
    the scores that an influence step's engine finds along the direction that its own code makes of the same probe windows."""
    config = settings(budget="5 steps", checkpoints={"evenly": 5}, inputs=SCORED["inputs"], scores={"every": "3 steps", "rank": None})
    artifact = train(tmp_path, config, shards=shards, probe=probe)
    point = CheckpointSet.open(artifact).at(3)
    ctx = initialize(LayoutConfig(), 0)
    (model,) = load_model(point, ctx)
    parameters, opened = dict(model.named_parameters()), ShardSet.open(shards)
    moment, step = load_second_moment(point.path, [model], ctx)
    precondition = Adam(moment, step, config.optimizer.beta2, config.optimizer.eps)
    directions = []
    for record in load_probe(probe).capabilities.values():
        rows = [Row(i, document.tokens(opened)) for i, document in enumerate(record.documents)]
        directions.append(precondition(fold_gradient(lambda batch: token_losses(model, batch), parameters, rows, 0, 1, "documents", 256, ctx.device).gradient))
    data, table = open_data(config, opened, shards, None, None), ScoresReader(artifact.path).rows()
    table = table[table["step"] == 4]
    rows = []
    for row in table:
        arrays = data.dataset.sample(int(row["sample"]))
        where = np.flatnonzero(arrays["segment_ids"] == row["place"])[: row["tokens"]]
        rows.append(Row(len(rows), np.append(arrays["tokens"][where], arrays["labels"][where[-1]])))
    expected = Ghost([model], ctx).scores(directions, packed(rows, 256, ctx.device))
    assert len(rows) > 4
    assert np.linalg.norm(table["scores"] - expected) <= 1e-5 * np.linalg.norm(expected)


@pytest.mark.slow
def test_killed_and_continued_ends_in_the_same_files(tmp_path, shards, probe, scored):
    def victim(when):
        command = [sys.executable, str(HERE / "train_victim.py"), str(tmp_path), str(shards.path), when, "probe", str(probe.path)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE)]), "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)

    for when in ("step 6", "save 6"):
        killed = victim(when)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    work = open_workspace(tmp_path, "train", "checkpoint", resumable(**SCORED), {"shards": shards, "probe": probe}).path
    last = files.open_part(files.part_file(work, 0), files.row_type(2))
    assert last["step"].max() == 6  # two steps further than the checkpoint that is resumed from
    done = victim("none")
    assert done.returncode == 0, done.stderr
    assert "resuming after step 4 of 7" in done.stderr
    finished = open_artifact(open_workspace(tmp_path, "train", "checkpoint", resumable(**SCORED), {"shards": shards, "probe": probe}).final, verify="full")
    assert scores_bytes(finished) == scores_bytes(scored)
    assert final_bytes(finished) == final_bytes(scored)
    assert timeless(CheckpointSet.open(finished).metrics()) == timeless(CheckpointSet.open(scored).metrics())
    assert not (finished.path / "tmp").exists()


def test_stopped_between_renewals_goes_on_along_the_same_directions(tmp_path, shards, probe, scored, monkeypatch):
    """SIGTERM in step 5: a checkpoint of step 5 that nobody planned."""
    update = loop.Trainer._update

    def asked(self, *arguments):
        if self.step + 1 == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "_update", asked)
        with pytest.raises(SystemExit):
            train(tmp_path, resumable(**SCORED), shards=shards, probe=probe)
    assert scores_bytes(train(tmp_path, resumable(**SCORED), shards=shards, probe=probe)) == scores_bytes(scored)


def test_a_probe_gradient_that_is_no_number_pauses_the_scores(tmp_path, shards, probe, monkeypatch, messages):
    from megatron_r1.train import probe_directions

    original, calls = probe_directions.gradient_of_rows, []

    def sometimes(*arguments):
        gradient, loss = original(*arguments)
        calls.append(1)
        if len(calls) == 2:
            next(iter(gradient.values())).view(-1)[0] = float("nan")
        return gradient, loss

    monkeypatch.setattr(probe_directions, "gradient_of_rows", sometimes)
    artifact = train(tmp_path, resumable(**SCORED), shards=shards, probe=probe)
    assert set(ScoresReader(artifact.path).rows()["step"].tolist()) == {7}
    assert any("step 3 is zero or not a number" in message for message in messages)


def test_plain_gradients_need_no_second_moment(tmp_path, shards, probe):
    config = settings(budget="2 steps", inputs=SCORED["inputs"], scores={"every": "1 steps", "rank": 4, "documents": 3, "preconditioner": "none"})
    reader = ScoresReader(train(tmp_path, config, shards=shards, probe=probe).path)
    assert set(zip(reader.rows()["step"].tolist(), reader.rows()["probe_step"].tolist())) == {(1, 0), (2, 1)}
    assert reader.layout.documents == {"code": 3, "math": 3}


def test_rows_after_a_step_are_cut_off_and_a_torn_one_too(tmp_path):
    kind = files.row_type(2)
    rows = np.zeros(5, kind)
    rows["step"], rows["scores"][:, 1] = [1, 1, 2, 3, 3], np.arange(5)
    path = files.part_file(tmp_path, 0)
    path.parent.mkdir()
    files.append(path, rows)
    with open(path, "ab") as stream:
        stream.write(b"torn")
    files.truncate(path, kind, 2)
    assert files.open_part(path, kind)["scores"][:, 1].tolist() == [0, 1, 2]
    files.truncate(path, kind, 0)
    assert len(files.open_part(path, kind)) == 0
    with pytest.raises(ArtifactError, match="set `scores` in the train step"):
        ScoresReader(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "sft", "sources": {"chat": 1.0}}, "expected objective next_token with scores; found sft"),
        ({"objective": "distill", "inputs": {**SCORED["inputs"], "teacher": "t"}}, "found distill, whose loss is not the one"),
        ({"inputs": {"shards": "corpus"}}, "expected inputs.probe with scores; found none"),
        ({"scores": {"every": "0 steps"}}, "above zero"),
        ({"scores": {"rank": 0}}, "greater than or equal to 1"),
    ],
)
def test_settings_that_do_not_fit(changes, message):
    with pytest.raises(ValidationError, match=message):
        settings(**{**SCORED, **changes})


def test_a_probe_of_other_shards_is_refused(tmp_path, shards, probe):
    copy = tmp_path / "probe"
    shutil.copytree(probe.path, copy)
    text = (copy / "probe.json").read_text()
    (copy / "probe.json").write_text(text.replace(load_probe(probe).shards, "0" * len(load_probe(probe).shards)))
    with pytest.raises(ArtifactError, match="point train and its probe at the same corpus step"):
        train(tmp_path, settings(**SCORED), shards=shards, probe=open_artifact(copy, verify="none"))
    assert torch.is_grad_enabled()
