"""Several influence tables read as one: what they add up to is what one table of all would say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hand_tables import build_influence
from tiny_shards import build_shards
from toy_tables import at_checkpoints, crossed, toy_table

from megatron_r1.artifacts.base import Artifact, open_workspace
from megatron_r1.artifacts.influence import InfluenceTable, column
from megatron_r1.artifacts.influence_join import join
from megatron_r1.artifacts.mixture import load_mixture
from megatron_r1.mixture.config import MixtureConfig
from megatron_r1.mixture.run import run
from megatron_r1.utils.errors import ArtifactError

MEANS = {"a": 1.0, "b": 0.4, "c": -0.2}


def single(table: InfluenceTable, c: int, step: int, **changes: object) -> InfluenceTable:
    """The table of one capability alone, at a checkpoint that may have another step, its scale c + 2."""
    name, old = table.record.capabilities[c], table.record.checkpoints[0]
    direction = table.record.directions[column(name, old.step)].model_copy(update={"rms": c + 2.0, "self_influence": 0.1 * (c + 1)})
    record = table.record.model_copy(
        update={
            "capabilities": [name],
            "checkpoints": [old.model_copy(update={"step": step})],
            "directions": {column(name, step): direction},
            "fold_weights": {name: table.record.fold_weights[name]},
            **changes,
        }
    )
    other = InfluenceTable(table.path, record)
    for source in table.sources:
        scores = table.scores(source)
        folds = None if scores.folds is None else scores.folds[:, [c]]
        other.keep(source, type(scores)(scores.index, scores.ids, scores.start, scores.n_tokens, scores.raw[:, [c]], folds))
    return other


@pytest.mark.parametrize("steps", [(10, 10, 10), (10, 20, 35)], ids=["equal steps", "other steps"])
def test_a_joined_table_says_what_its_parts_say(steps: tuple[int, ...]) -> None:
    whole = toy_table(crossed(np.random.default_rng(0), MEANS, 12, 4, 0.5, 0.2, 0.1, capabilities=3), by_fold=8)
    parts = [single(whole, c, step) for c, step in enumerate(steps)]
    joined = join(parts)
    assert joined.record.capabilities == ["c0", "c1", "c2"]
    for source in MEANS:
        for normalise in ("none", "rms", "self"):
            apart = [part.benefits(source, normalise) for part in parts]
            assert np.allclose(joined.benefits(source, normalise), np.concatenate(apart, axis=1))
            folds = [part.fold_rates(source, normalise) for part in parts]
            assert np.allclose(joined.fold_rates(source, normalise), np.concatenate(folds))
            apart = [part.resample(source, 50, 3, normalise) for part in parts]
            assert np.allclose(joined.resample(source, 50, 3, normalise), np.concatenate(apart, axis=1))
        assert joined.scores(source).by_fold.tolist() == [True] * 8 + [False] * 4
        assert joined.spread(source, "none").mean == pytest.approx(whole.spread(source, "none").mean)
        assert joined.spread(source, "none").variance == pytest.approx(whole.spread(source, "none").variance)


def test_tables_that_do_not_belong_together_are_refused() -> None:
    whole = toy_table(crossed(np.random.default_rng(0), MEANS, 6, 2, 0.5, 0.2, 0.1, capabilities=2))
    one, two = single(whole, 0, 10), single(whole, 1, 10)
    with pytest.raises(ArtifactError, match=r"different capabilities[\s\S]*c0 in several[\s\S]*`capabilities` of its own"):
        join([one, one])
    with pytest.raises(ArtifactError, match=r"the same preconditioner[\s\S]*adam and datainf"):
        join([one, single(whole, 1, 10, preconditioner="datainf")])
    moved = two.scores("b")
    two.keep("b", type(moved)(moved.index + 1, moved.ids, moved.start, moved.n_tokens, moved.raw, moved.folds))
    with pytest.raises(ArtifactError, match=r"the same documents of b[\s\S]*only checkpoint and capabilities may differ"):
        join([one, two])
    fewer = single(whole, 1, 10, sources={"a": {}})
    with pytest.raises(ArtifactError, match="the same sources"):
        join([one, fewer])


def test_a_mixture_reads_several_tables(tmp_path: Path) -> None:
    """Equal to one table of both capabilities, in the weights, their intervals and the decision."""
    shards = build_shards(tmp_path / "shards", {s: {"train": [np.arange(50)] * 2} for s in "abc"})
    rng = np.random.default_rng(1)
    columns = {s: {f"{c}@10": rng.normal(m, 0.3, 20).tolist() for c in ("code", "math")} for s, m in zip("abc", (1, 0.5, 0.2))}

    def table(*names: str) -> Artifact:
        content = {s: ([10] * 20, {f"{c}@10": own[f"{c}@10"] for c in names}) for s, own in columns.items()}
        return build_influence(tmp_path / "-".join(names), content, list(names), [10])

    def mixed(influence: Artifact | list[Artifact], name: str | list[str]) -> dict:
        config = MixtureConfig.model_validate(
            {"method": "influence", "inputs": {"shards": "s", "influence": name}, "seed": 1, "floor": 0.0, "bootstrap": 200}
        )
        inputs = {"shards": shards, "influence": influence}
        found = run(config, inputs, open_workspace(tmp_path, "mix", "mixture", config, inputs))
        assert found is not None
        return load_mixture(found).plain()

    together, apart = mixed(table("code", "math"), "i"), mixed([table("code"), table("math")], ["i", "j"])
    assert together.pop("influence_sha256") != apart.pop("influence_sha256")
    assert apart == together


def test_models_of_their_own_have_checkpoints_of_their_own() -> None:
    """Intervals over checkpoints of a joined table are those of its parts, and the parts' variances add up."""
    rng = np.random.default_rng(1)
    one, other = (at_checkpoints({"a": rng.normal(size=(12, 1, points))}) for points in (4, 6))
    record = other.record
    renamed = {"capabilities": ["x"], "directions": {name.replace("c0", "x"): d for name, d in record.directions.items()}, "fold_weights": {"x": [1.0]}}
    two = other.with_record(record.model_copy(update=renamed))
    joined = join([one, two])
    assert joined.models() == [([0], [0, 1, 2, 3]), ([1], [4, 5, 6, 7, 8, 9])]
    apart = np.concatenate([part.resample("a", 50, 3) for part in (one, two)], axis=1)
    assert np.allclose(joined.resample("a", 50, 3), apart)
    variances = [part.spread("a").checkpoints_variance for part in (one, two)]
    assert joined.spread("a").checkpoints_variance == pytest.approx(sum(variances) / 4)
    assert joined.with_record(joined.record).models() == joined.models()
