"""The whole stage on a small world with known answers, and what an interruption may not change."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import pytest
from launch import launch
from pydantic import ValidationError
from safetensors.torch import load_file
from small_world import TOKENS, influence_config

from megatron_r1.artifacts.base import Artifact, open_artifact, open_workspace
from megatron_r1.artifacts.checkpoint import CheckpointInfo
from megatron_r1.artifacts.influence import InfluenceTable, column
from megatron_r1.data.shards import ShardSet
from megatron_r1.influence import job as jobs
from megatron_r1.influence.config import InfluenceConfig
from megatron_r1.influence.run import run
from megatron_r1.influence.select import alphas, choose, evenly
from megatron_r1.influence.space import Space
from megatron_r1.utils.errors import ArtifactError, ConfigError, DataError
from megatron_r1.utils.io import atomic_write_json

World = dict[str, Artifact]


def score(config: InfluenceConfig, world: World, folder: Path) -> Artifact:
    found = run(config, world, open_workspace(folder, "influence", "influence", config, world))
    assert found is not None
    return found


def digests(folder: Path) -> dict[str, str]:
    """Checksums of the payload."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "manifest.json"]
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def scored(world: World, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return score(influence_config(), world, tmp_path_factory.mktemp("scored"))


@pytest.fixture(scope="module")
def table(scored: Artifact) -> InfluenceTable:
    return InfluenceTable.open(scored)


def test_each_language_helps_itself_most(table: InfluenceTable) -> None:
    for capability in ("left", "right"):
        others = [
            cells[capability].interval[1] for source, cells in table.record.sources.items() if source != capability
        ]
        assert table.record.sources[capability][capability].interval[0] > max(others)


def test_shuffled_tokens_harm_every_capability(table: InfluenceTable) -> None:
    assert all(cell.interval[1] < 0 for cell in table.record.sources["shuffled"].values())
    assert table.record.joint["shuffled"].interval[1] < 0


def test_a_source_split_in_two_gets_one_influence(table: InfluenceTable) -> None:
    """Clone test: the difference of the halves lies within the interval of a difference."""
    for c in range(2):
        a, b = (table.resample(twin, 2000, 0)[:, c] for twin in ("twin_a", "twin_b"))
        low, high = np.quantile(a - b, [0.005, 0.995])
        assert low < 0 < high


def test_the_receipt_says_the_scores_foretell_real_steps(table: InfluenceTable) -> None:
    validity = table.record.validity
    assert validity is not None
    assert validity["checkpoint"] == 240
    for entry in validity["capabilities"].values():
        assert len(entry["predicted"]) == len(entry["measured"]) == 12
        assert entry["spearman"] >= 0.95
        assert entry["sign_agreement"] >= 0.75


def test_the_record_says_what_it_is(table: InfluenceTable, world: World) -> None:
    record = table.record
    assert [(point.step, point.alpha) for point in record.checkpoints] == [(160, 0.4), (240, 0.6)]
    assert (record.preconditioner, record.eps) == ("adam", 1e-8)
    assert record.probe_sha256 == world["probe"].json("probe.json")["sha256"]
    assert record.interval_covers == ["scored documents"]
    assert any("choice of checkpoints" in note for note in record.notes)
    assert any("probe_folds" in note for note in record.notes)
    assert record.engine == "ghost"
    for direction in record.directions.values():
        assert direction.truncation is None
        assert direction.agreement is not None
        assert direction.agreement < 0.02
        assert sum(direction.energy.values()) == pytest.approx(1)
        assert set(direction.energy) == {"embedding", "norm", "attention", "ffn"}
    assert all(value is not None and value > 0.5 for value in record.reliability.values())


def test_summary_equals_the_table_by_hand(scored: Artifact, table: InfluenceTable) -> None:
    """Eq. 5 and the mean per token, recomputed from the parquet files alone."""
    columns = {s: parquet.read_table(scored.path / f"scores/{s}.parquet").to_pydict() for s in table.sources}
    alpha = {160: 0.4, 240: 0.6}
    joint = dict.fromkeys(table.sources, 0.0)
    for capability in ("left", "right"):
        for source, own in columns.items():
            mean = 0.0
            for step, weight in alpha.items():
                name = f"{capability}@{step}"
                rates = [np.array(c[name]) / np.array(c["n_tokens"]) for c in columns.values()]
                rms = np.sqrt(np.mean(np.concatenate(rates) ** 2))
                mean += weight * np.sum(own[name]) / rms / np.sum(own["n_tokens"])
            assert table.record.sources[source][capability].mean == pytest.approx(mean, rel=1e-9)
            joint[source] += mean / 2
    assert {s: cell.mean for s, cell in table.record.joint.items()} == pytest.approx(joint, rel=1e-9)


def test_rows_name_the_documents_they_score(table: InfluenceTable, world: World) -> None:
    shards = ShardSet.open(world["shards"])
    for source in table.sources:
        scores, shard = table.scores(source), shards.split(source)
        assert len(set(scores.index.tolist())) == 40
        assert scores.ids == [shard.ids[i] for i in scores.index]
        whole = np.array([len(shard.tokens(i)) for i in scores.index])
        assert np.array_equal(scores.n_tokens, np.minimum(whole - 1, TOKENS))
        assert (scores.start + scores.n_tokens + 1 <= whole).all()
    assert (table.scores("left").start > 0).any()


@pytest.mark.parametrize("stop_after", [1, 7, 13])
def test_killed_and_run_again_gives_the_same_bytes(
    scored: Artifact, world: World, tmp_path: Path, monkeypatch: Any, stop_after: int
) -> None:
    """10 partitions per checkpoint: the kill falls in the first, again in the first, and in the second checkpoint."""

    class Killed(BaseException):
        pass

    saved = []
    save = jobs.Job.save

    def dying(self: jobs.Job, step: int, partition: jobs.Partition, scores: np.ndarray, copy: int = 0) -> None:
        if len(saved) == stop_after:
            raise Killed
        saved.append((step, partition))
        save(self, step, partition, scores, copy)

    config = influence_config()
    monkeypatch.setattr(jobs.Job, "save", dying)
    with pytest.raises(Killed):
        score(config, world, tmp_path)
    assert not list(tmp_path.glob("influence-????????"))
    again: list[tuple[int, jobs.Partition]] = []

    def counting(self: jobs.Job, step: int, partition: jobs.Partition, scores: np.ndarray, copy: int = 0) -> None:
        again.append((step, partition))
        save(self, step, partition, scores, copy)

    monkeypatch.setattr(jobs.Job, "save", counting)
    resumed = score(config, world, tmp_path)
    assert not set(again) & set(saved)
    assert len(again) + len(saved) == 20
    assert digests(resumed.path) == digests(scored.path)


def test_a_torn_shard_is_computed_again(scored: Artifact, world: World, tmp_path: Path) -> None:
    config = influence_config()
    work = open_workspace(tmp_path, "influence", "influence", config, world)
    torn = work.tmp / "partitions" / "160" / "copy-00000.scores"
    torn.parent.mkdir(parents=True)
    torn.write_bytes(b"R1SC torn")
    assert digests(score(config, world, tmp_path).path) == digests(scored.path)


def test_two_processes_share_the_work_and_write_the_same_bytes(scored: Artifact, world: World, tmp_path: Path) -> None:
    arguments = {"inputs": {role: str(artifact.path) for role, artifact in world.items()}, "runs": [{}]}
    results = [runs[0] for runs in launch(Path(__file__).parent / "influence_worker.py", 2, tmp_path, arguments)]
    shares = [{tuple(item) for item in result["saved"]} for result in results]
    assert not shares[0] & shares[1]
    assert [len(share) for share in shares] == [10, 10]
    assert results[1]["artifact"] is None
    assert digests(Path(results[0]["artifact"])) == digests(scored.path)


def test_a_model_cut_over_processes_fills_the_same_table(world: World, tmp_path: Path) -> None:
    """Two stages or cut sequences, two copies of the model; receipt, check and shares of kinds included."""
    few = {"documents": 8, "checkpoints": 1, "sources": ["left", "shuffled"], "partition_documents": 4, "validity": {"batches": 3}}
    layouts = [({"pipeline": 2}, "ghost"), ({"pipeline": 2}, "finite_differences"), ({"context": 2}, "ghost")]
    runs = [few | {"layout": layout, "engine": engine} for layout, engine in layouts]
    arguments = {"inputs": {role: str(artifact.path) for role, artifact in world.items()}, "runs": runs}
    results = launch(Path(__file__).parent / "influence_worker.py", 4, tmp_path / "cut", arguments)
    expected = InfluenceTable.open(score(influence_config(**few), world, tmp_path / "whole"))
    for number, tolerance in ((0, 1e-4), (1, 2e-2), (2, 1e-4)):
        assert [len(ranks[number]["saved"]) for ranks in results] in ([2, 2, 0, 0], [2, 0, 2, 0])
        assert [ranks[number]["artifact"] is None for ranks in results] == [False, True, True, True]
        path = Path(results[0][number]["artifact"])
        found = InfluenceTable.open(open_artifact(path))
        for source in few["sources"]:
            a, b = found.scores(source).raw, expected.scores(source).raw
            assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)
        for name, direction in expected.record.directions.items():
            other = found.record.directions[name]
            for field in ("probe_loss", "gradient_norm", "direction_norm", "self_influence", "step"):
                assert getattr(other, field) == pytest.approx(getattr(direction, field), rel=1e-4)
            assert other.energy == pytest.approx(direction.energy, rel=1e-3, abs=1e-5)
            assert other.score_shares == pytest.approx(direction.score_shares, rel=0.05, abs=1e-3)
        validity, own = found.record.validity, expected.record.validity
        assert validity is not None
        assert own is not None
        for capability, entry in own["capabilities"].items():
            assert validity["capabilities"][capability]["measured"] == pytest.approx(entry["measured"], rel=0.05, abs=2e-6)


def test_probe_gradients_are_kept_with_their_hashes(world: World, tmp_path: Path) -> None:
    """Whole and cut over two stages, whose parts are those of the whole."""
    few = {"documents": 2, "checkpoints": 1, "sources": ["left"], "validity": {"batches": 0}, "share_documents": 0, "fd_check_documents": 0, "keep_gradients": True}
    whole = score(influence_config(**few), world, tmp_path / "whole")
    record = InfluenceTable.open(whole).record
    gradients = {path.name: load_file(path) for path in sorted((whole.path / "gradients").iterdir())}
    assert list(gradients) == ["left@240.safetensors", "right@240.safetensors"]
    for name, direction in record.directions.items():
        gradient = gradients[f"{name}.safetensors"]
        assert Space().digest(gradient) == direction.gradient_sha256
        assert Space().norm(gradient) == pytest.approx(direction.gradient_norm, rel=1e-6)
    hashes = [h for direction in record.directions.values() for h in (direction.gradient_sha256, direction.direction_sha256)]
    assert len(set(hashes)) == 4

    arguments = {"inputs": {role: str(artifact.path) for role, artifact in world.items()}, "runs": [few | {"layout": {"pipeline": 2}}]}
    cut = Path(launch(Path(__file__).parent / "influence_worker.py", 2, tmp_path / "cut", arguments)[0][0]["artifact"])
    for name, gradient in gradients.items():
        parts = [load_file(cut / "gradients" / name.replace(".", f".stage{stage}.tensor0.")) for stage in (0, 1)]
        assert sum(len(part) for part in parts) == len(gradient) + 1  # a tied embedding has a copy at both ends
        total = sum(float((part[tensor] ** 2).sum()) for part in parts for tensor in part) - float((parts[0]["embedding.word_embeddings.weight"] ** 2).sum())
        assert total**0.5 == pytest.approx(Space().norm(gradient), rel=1e-5)


def test_bf16_weights_are_scored_close_to_fp32(world: World, tmp_path: Path) -> None:
    few = {"documents": 10, "checkpoints": 1, "sources": ["left", "shuffled"], "fd_check_documents": 0, "validity": {"batches": 0}}
    exact, half = (
        InfluenceTable.open(score(influence_config(**few, precision=precision), world, tmp_path / precision)) for precision in ("fp32", "bf16")
    )
    for source in few["sources"]:
        for a, b in zip(exact.scores(source).raw.T, half.scores(source).raw.T):
            assert np.corrcoef(a.ravel(), b.ravel())[0, 1] >= 0.99
    assert all(direction.step is None for direction in half.record.directions.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": "bf16"}, "differences of bf16 weights are rounding"),
        ({"precision": "bf16", "engine": "finite_differences"}, "differences of bf16 weights are rounding"),
        ({"layout": {"context": 2}, "preconditioner": "ekfac"}, "whole in every process"),
        ({"layout": {"pipeline": 2}, "preconditioner": "datainf"}, "whole in every process"),
        ({"layout": {"tensor": 2}, "parameters": "embeddings"}, "whole in every process"),
        ({"layout": {"overlap": True}}, "for training"),
    ],
)
def test_what_can_not_be_computed_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        influence_config(**changes)


def test_probe_folds_sum_to_the_whole_and_widen_the_intervals(
    table: InfluenceTable, world: World, tmp_path: Path
) -> None:
    few = {"documents": 10, "checkpoints": 1, "validity": {"batches": 0}, "sources": ["left", "right", "twin_a"]}
    whole = InfluenceTable.open(score(influence_config(**few), world, tmp_path / "whole"))
    split = InfluenceTable.open(score(influence_config(**few, probe_folds=4), world, tmp_path / "split"))
    assert split.record.interval_covers == ["scored documents", "probe folds"]
    for source in whole.sources:
        a, b = whole.scores(source), split.scores(source)
        assert b.folds is not None
        assert np.linalg.norm(a.raw - b.raw) / np.linalg.norm(a.raw) < 5e-3
        assert np.allclose(
            np.einsum("nctf,cf->nct", b.folds, [split.record.fold_weights[c] for c in split.record.capabilities]), b.raw
        )
    width = {
        name: np.subtract(*t.record.sources["left"]["left"].interval[::-1])
        for name, t in (("whole", whole), ("split", split))
    }
    assert width["split"] > width["whole"]


def test_both_engines_fill_the_same_table(world: World, tmp_path: Path) -> None:
    few = {"documents": 10, "checkpoints": 1, "validity": {"batches": 0}, "sources": ["left", "shuffled"], "probe_folds": 3, "fold_documents": 4}
    engines = {
        "ghost": {},
        "one at a time": {"directions_per_pass": 1},
        "finite differences": {"engine": "finite_differences"},
    }
    found = {name: InfluenceTable.open(score(influence_config(**few, **changes), world, tmp_path / name)) for name, changes in engines.items()}
    for source in ("left", "shuffled"):
        exact = found["ghost"].scores(source)
        for name, tolerance in (("one at a time", 1e-5), ("finite differences", 5e-3)):
            other = found[name].scores(source)
            assert exact.folds is not None
            assert other.folds is not None
            assert np.linalg.norm(exact.raw - other.raw) <= tolerance * np.linalg.norm(exact.raw)
            assert np.linalg.norm(exact.folds[:4] - other.folds[:4]) <= tolerance * np.linalg.norm(exact.folds[:4])
    directions = {name: list(table.record.directions.values()) for name, table in found.items()}
    assert all(d.truncation is not None and d.truncation < 0.02 and d.agreement is None for d in directions["finite differences"])
    assert all(d.agreement is not None for d in directions["ghost"])


def test_whole_documents_sum_their_windows(world: World, tmp_path: Path) -> None:
    few = {
        "documents": 6,
        "checkpoints": 1,
        "validity": {"batches": 0},
        "sources": ["left", "right"],
        "tokens_per_document": 32,
    }
    found = InfluenceTable.open(score(influence_config(**few, score_unit="document"), world, tmp_path))
    shard = ShardSet.open(world["shards"]).split("left")
    scores = found.scores("left")
    assert scores.n_tokens.tolist() == [len(shard.tokens(i)) - 1 for i in scores.index]
    assert (scores.n_tokens > 32).any()


def test_without_preconditioner_no_optimizer_state_is_needed(world: World, tmp_path: Path) -> None:
    few = {
        "documents": 6,
        "checkpoints": 1,
        "sources": ["left", "shuffled"],
        "preconditioner": "none",
        "validity": {"batches": 4},
    }
    record = InfluenceTable.open(score(influence_config(**few), world, tmp_path)).record
    assert (record.preconditioner, record.eps) == ("none", None)
    assert record.reliability["joint"] is None
    assert record.sources["left"]["left"].mean > 0


@pytest.mark.parametrize("preconditioner", ["datainf", "ekfac"])
def test_estimated_curvature_is_recorded_and_repeats_byte_for_byte(world: World, tmp_path: Path, preconditioner: str) -> None:
    few = {
        "documents": 8,
        "checkpoints": 1,
        "sources": ["left", "right", "shuffled"],
        "preconditioner": preconditioner,
        "curvature": {"documents": 6},
        "validity": {"batches": 4},
        "normalise": "self",
    }
    artifact = score(influence_config(**few), world, tmp_path / "one")
    assert digests(score(influence_config(**few), world, tmp_path / "two").path) == digests(artifact.path)
    record = InfluenceTable.open(artifact).record
    curvature = record.curvature
    assert curvature is not None
    assert curvature.documents == {"left": 6, "right": 6, "shuffled": 6}
    (damping,) = curvature.damping.values()
    assert all(value > 0 for value in damping.values())
    assert len(damping) == 14
    assert record.eps is None
    assert record.validity is not None
    assert record.validity["optimizer"] == "trainer"
    for name in ("left", "right"):
        assert record.sources[name][name].mean > 0 > record.sources["shuffled"][name].mean
        shares = record.directions[f"{name}@240"].score_shares
        assert shares is not None
        assert sum(shares.values()) == pytest.approx(1.0)
        assert set(shares) == {"embedding", "norm", "attention", "ffn"}


def test_embeddings_alone_can_be_scored(world: World, tmp_path: Path) -> None:
    few = {"documents": 4, "checkpoints": 1, "sources": ["left", "right"], "validity": {"batches": 0}}
    found = score(influence_config(**few, parameters="embeddings"), world, tmp_path)
    record = InfluenceTable.open(found).record
    assert record.scored_parameters == ["embedding.word_embeddings.weight"]
    assert "1 tensors" in record.notes[-1]
    assert {k for d in record.directions.values() for k, v in d.energy.items() if v} == {"embedding"}
    with pytest.raises(ConfigError, match=r"linear_fc2[\s\S]*matches none of 14"):
        score(influence_config(**few, parameters=["*linear_fc3*"]), world, tmp_path)


def test_one_capability_alone_scores_as_among_others(world: World, tmp_path: Path) -> None:
    """What a model specialised on a capability is scored with; its mixture joins such tables."""
    few = {"documents": 4, "checkpoints": 1, "sources": ["left", "shuffled"], "validity": {"batches": 0}}
    both, alone = (
        InfluenceTable.open(score(influence_config(**few, capabilities=wanted), world, tmp_path / str(i))) for i, wanted in enumerate((None, ["right"]))
    )
    assert alone.record.capabilities == ["right"]
    for source in few["sources"]:
        assert np.allclose(alone.scores(source).raw[:, 0], both.scores(source).raw[:, 1], rtol=1e-4, atol=1e-9)
    with pytest.raises(ConfigError, match=r"\(left, right\)[\s\S]*found: up"):
        score(influence_config(**few, capabilities=["left", "up"]), world, tmp_path / "no")


def test_checkpoints_can_be_chosen_by_probe_loss(world: World, tmp_path: Path) -> None:
    """The losses they are chosen by are those of the directions; a relaunch takes the stored ones."""
    few = {"documents": 2, "checkpoints": 1, "sources": ["left", "shuffled"], "validity": {"batches": 0}, "share_documents": 0}
    chosen = influence_config(**few, checkpoint_choice="probe_loss")
    record = InfluenceTable.open(score(chosen, world, tmp_path / "a")).record
    assert set(record.candidate_losses) == {"160", "240"}
    best = min(record.candidate_losses, key=lambda step: record.candidate_losses[step])
    assert [str(point.step) for point in record.checkpoints] == [best]
    assert np.mean([d.probe_loss for d in record.directions.values()]) == pytest.approx(record.candidate_losses[best], rel=1e-5)
    work = open_workspace(tmp_path / "b", "influence", "influence", chosen, world)
    atomic_write_json(work.tmp / "partitions" / "checkpoint_losses.json", {"160": 1.0, "240": 2.0})
    stored = InfluenceTable.open(score(chosen, world, tmp_path / "b")).record
    assert [(point.step, point.alpha) for point in stored.checkpoints] == [(160, 1.0)]


@pytest.mark.parametrize("preconditioner", ["datainf", "ekfac"])
def test_curvature_of_bf16_weights_is_close(world: World, tmp_path: Path, preconditioner: str) -> None:
    few = {"documents": 12, "checkpoints": 1, "sources": ["left", "shuffled"], "fd_check_documents": 0, "validity": {"batches": 0}}
    few |= {"preconditioner": preconditioner, "curvature": {"documents": 8}}
    exact, half = (
        InfluenceTable.open(score(influence_config(**few, precision=precision), world, tmp_path / precision)) for precision in ("fp32", "bf16")
    )
    for source in few["sources"]:
        for a, b in zip(exact.scores(source).raw.T, half.scores(source).raw.T):
            assert np.corrcoef(a.ravel(), b.ravel())[0, 1] >= 0.95


def test_the_receipt_can_take_another_optimizers_step(world: World, tmp_path: Path) -> None:
    few = {"documents": 6, "checkpoints": 1, "sources": ["left", "right"]}
    found = score(influence_config(**few, validity={"batches": 3, "optimizer": "sgd"}), world, tmp_path)
    validity = InfluenceTable.open(found).record.validity
    assert validity is not None
    assert validity["optimizer"] == "sgd"


def test_refusals(world: World, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"at least 3 trained checkpoints[\s\S]*found: 2"):
        score(influence_config(checkpoints=3), world, tmp_path)
    with pytest.raises(ConfigError, match=r"twin_a[\s\S]*found: nobody"):
        score(influence_config(sources=["left", "nobody"]), world, tmp_path)
    with pytest.raises(DataError, match=r"at least 1000 tokens[\s\S]*min_tokens"):
        score(influence_config(min_tokens=1000), world, tmp_path)


def test_a_probe_of_other_shards_is_refused(world: World, tmp_path: Path) -> None:
    folder = tmp_path / "probe"
    shutil.copytree(world["probe"].path, folder)
    text = (folder / "probe.json").read_text().replace(world["shards"].fingerprint, "0" * 64)
    (folder / "probe.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"a probe made from the shards[\s\S]*same corpus step"):
        score(influence_config(), {**world, "probe": Artifact(folder, world["probe"].manifest)}, tmp_path)


def test_a_checkpoint_of_another_tokenizer_is_refused(world: World, tmp_path: Path) -> None:
    changed = changed_checkpoint(world, tmp_path, "train.json", tokenizer="0" * 64)
    with pytest.raises(ArtifactError, match=r"a checkpoint trained on the tokenizer[\s\S]*found: one trained on 00000000"):
        score(influence_config(), changed, tmp_path)


def test_windows_longer_than_the_context_are_refused(world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    short = changed_checkpoint(world, tmp_path, "model.json", max_positions=TOKENS - 1)
    with pytest.raises(ConfigError, match=rf"documents of at most {TOKENS - 1} tokens[\s\S]*lower tokens_per_document"):
        score(influence_config(), short, tmp_path)
    with pytest.raises(ConfigError, match=rf"the probe of at most {TOKENS - 1} tokens[\s\S]*the probe's tokens_per_document"):
        score(influence_config(tokens_per_document=16), short, tmp_path)
    few = {"documents": 2, "checkpoints": 1, "sources": ["left"], "validity": {"batches": 0}, "share_documents": 0, "fd_check_documents": 0}
    score(influence_config(**few, tokens_per_document=TOKENS + 8), world, tmp_path)
    assert f"have up to {TOKENS + 8} tokens, the model was trained on sequences of {TOKENS}" in caplog.text


def changed_checkpoint(world: World, folder: Path, file: str, **changes: Any) -> World:
    """The world with another fact in a file of its checkpoint."""
    copied = folder / "checkpoint"
    shutil.copytree(world["checkpoint"].path, copied)
    (copied / file).write_text(json.dumps(json.loads((copied / file).read_text()) | changes))
    return {**world, "checkpoint": Artifact(copied, world["checkpoint"].manifest)}


def test_a_changed_probe_document_is_refused(world: World, tmp_path: Path) -> None:
    folder = tmp_path / "probe"
    shutil.copytree(world["probe"].path, folder)
    content = json.loads((folder / "probe.json").read_text())
    moved = next(d for d in content["capabilities"]["left"]["documents"] if d["start"] > 0)
    moved["start"] -= 1
    (folder / "probe.json").write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match=r"probe documents with the hash"):
        score(influence_config(), {**world, "probe": Artifact(folder, world["probe"].manifest)}, tmp_path)


def test_checkpoints_are_evenly_spaced_and_end_at_the_last() -> None:
    def steps(available: list[int], count: int) -> list[int]:
        return [point.step for point in evenly([CheckpointInfo(s, s, Path()) for s in available], count)]

    assert steps([1, 2, 3, 4, 5, 6], 3) == [2, 4, 6]
    assert steps([50, 98, 100, 150, 195], 2) == [98, 195]
    assert steps([7], 1) == [7]
    assert steps([10, 190, 195], 3) == [10, 190, 195]
    for n in range(1, 20):
        for k in range(1, n + 1):
            found = steps(list(range(1, n + 1)), k)
            assert len(set(found)) == k
            assert found[-1] == n
    assert alphas([10, 20, 30]) == pytest.approx([1 / 6, 2 / 6, 3 / 6])


def test_asking_for_more_documents_keeps_those_drawn(world: World) -> None:
    shard = ShardSet.open(world["shards"]).split("left")
    few, many = (choose(influence_config(documents=n), "left", shard) for n in (5, 25))
    assert np.array_equal(few.index, many.index[:5])
    assert np.array_equal(few.start, many.start[:5])


def test_column_names() -> None:
    assert column("code", 500) == "code@500"
    assert column("code", 500, 2) == "code@500#2"
