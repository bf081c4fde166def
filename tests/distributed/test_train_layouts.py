"""The train stage under two gloo processes equals one process: losses, gradient norms, validation, RankMe, ledger."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "train"))
sys.path.insert(0, str(HERE))

from launch import launch  # noqa: E402
from train_toys import REWARDED, make_outside_model, make_probe, make_questions, make_shards, settings, train  # noqa: E402

from megatron_r1.artifacts.checkpoint import CheckpointSet  # noqa: E402
from megatron_r1.artifacts.training_scores import ScoresReader  # noqa: E402

MODEL = {"preset": "nano", "num_kv_heads": 2}
LAYOUTS = {
    "tp2": {"tensor": 2}, "tp2-sp": {"tensor": 2, "sequence_parallel": True}, "pp2": {"pipeline": 2}, "dp2": {}, "dp2-distopt": {"distributed_optimizer": True},
    "dp2-overlap": {"distributed_optimizer": True, "overlap": True}, "cp2": {"context": 2, "distributed_optimizer": True},
}
TEXT = {
    "model": MODEL, "budget": "4 steps", "validation": {"tokens": "150 tokens", "every": "2 steps"}, "rankme": {"samples": "9 samples"},
    "checkpoints": {"every": "3 steps"},
}
CHAT = {
    "model": MODEL, "objective": "sft", "sources": {"chat": 1.0}, "seq_length": "128 tokens", "global_batch": "512 tokens", "micro_batch": 1, "budget": "4 steps",
}
DRO = {"model": MODEL, "objective": "group_dro", "inputs": {"shards": "corpus", "reference": "teacher"}, "budget": "4 steps", "log": {"every": "1 steps"}}
# `prepared` puts a teacher in place of None.
OUTSIDE = {"model": MODEL, "objective": "distill", "distill": {"teacher": None}, "budget": "3 steps"}
DISTILL = {"model": MODEL, "objective": "distill", "inputs": {"shards": "corpus", "teacher": "teacher"}, "budget": "4 steps"}
GRPO = {**REWARDED, "budget": "4 steps"}
SCORES = {"model": MODEL, "budget": "5 steps", "inputs": {"shards": "corpus", "probe": "probe"}, "scores": {"every": "2 steps", "rank": None}, "optimizer": {"eps": 1e-4}}
SCORED = {"scored-tp2-sp": {"tensor": 2, "sequence_parallel": True}, "scored-pp2": {"pipeline": 2}, "scored-dp2-overlap": LAYOUTS["dp2-overlap"]}
CASES = {
    **{name: (SCORES, layout) for name, layout in SCORED.items()},
    **{name: (TEXT, layout) for name, layout in LAYOUTS.items()},
    "sft-dp2": (CHAT, {}), "sft-pp2": (CHAT, {"pipeline": 2}), "sft-cp2": ({**CHAT, "recompute": True}, {"context": 2}),
    "distill-cp2": (DISTILL, {"context": 2}), "distill-pp2": (DISTILL, {"pipeline": 2}), "outside-tp2-sp": (OUTSIDE, {"tensor": 2, "sequence_parallel": True}),
    "outside-pp2": (OUTSIDE, {"pipeline": 2}), "outside-cp2": (OUTSIDE, {"context": 2}), "dro-cp2": (DRO, {"context": 2}), "dro-pp2": (DRO, {"pipeline": 2}),
    "distill-tp2": (DISTILL, {"tensor": 2}), "distill-odd-tp2": ({**DISTILL, "inputs": {"shards": "corpus", "teacher": "odd"}}, {"tensor": 2}), "distill-cached-dp2": ({**DISTILL, "distill": {"cache_top_k": 32}}, {}),
    "distill-cached-tp2": ({**DISTILL, "distill": {"cache_top_k": 32}}, {"tensor": 2}), "distill-cached-cp2": ({**DISTILL, "distill": {"cache_top_k": 32}}, {"context": 2}),
    "grpo-dp2": (GRPO, {}), "grpo-dp2-overlap": (GRPO, LAYOUTS["dp2-overlap"]),
    "dro-dp2": (DRO, {}), "dro-tp2-sp": (DRO, {"tensor": 2, "sequence_parallel": True}),
}


def prepared(base, artifacts):
    """(settings, inputs) of a case, with the teacher from outside in its place."""
    inputs = {role: artifacts[name] for role, name in base.get("inputs", {}).items()}
    inputs["shards"] = artifacts["questions" if base.get("objective") == "grpo" else "corpus"]
    if base.get("distill", {}).get("teacher", 0) is None:
        base = {**base, "distill": {"teacher": {"hf_folder": str(artifacts["outside"])}}}
    return base, inputs


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Results of both ranks for every case, and what is needed to run the same alone."""
    folder = tmp_path_factory.mktemp("layouts")
    shards = make_shards(folder)
    artifacts = {
        "teacher": train(folder, settings(model={**MODEL, "init_std": 0.2}, budget="1 steps"), "teacher", shards=shards),
        # One key/value head: it can not be cut in two.
        "odd": train(folder, settings(model={**MODEL, "num_kv_heads": 1, "init_std": 0.2}, budget="1 steps"), "odd", shards=shards),
        "probe": make_probe(folder, shards), "outside": make_outside_model(folder / "outside", shards), "corpus": shards, "questions": make_questions(folder),
    }
    cases = {}
    for name, (base, layout) in CASES.items():
        plain, inputs = prepared(base, artifacts)
        cases[name] = {
            "settings": {**plain, "layout": layout}, "shards": str(inputs.pop("shards").path), "inputs": {role: str(artifact.path) for role, artifact in inputs.items()},
        }
    ranks = launch(HERE / "train_layout_worker.py", 2, folder / "ranks", {"cases": cases}, timeout=300)
    return ranks, folder, artifacts


@pytest.fixture(scope="module")
def alone(runs):
    """Single-process results by settings."""
    _, folder, artifacts = runs
    known = {}

    def result(base):
        key = repr(sorted(base.items(), key=str))
        if key not in known:
            plain, inputs = prepared(base, artifacts)
            known[key] = CheckpointSet.open(train(folder, settings(**plain), f"alone{len(known)}", **inputs))
        return known[key]

    return result


@pytest.mark.slow
@pytest.mark.parametrize("name", list(CASES))
def test_equals_one_process(runs, alone, name):
    ranks, *_ = runs
    assert ranks[0][name] == ranks[1][name]
    found, wanted = ranks[0][name], alone(CASES[name][0])
    assert found["ledger"] == wanted.ledger()
    assert found["cursors"] == wanted.manifest.plain()["data_cursors"]
    records = wanted.metrics()
    assert [r["step"] for r in found["metrics"]] == [r["step"] for r in records]
    for mine, theirs in zip(found["metrics"], records):
        assert mine.get("loss", 0.0) == pytest.approx(theirs.get("loss", 0.0), abs=1e-5)
        for name in ("grad_norm", "parameter_norm"):
            assert mine.get(name, 0.0) == pytest.approx(theirs.get(name, 0.0), rel=1e-5), name
        for group in ("source_loss", "validation", "bits_per_byte"):
            assert mine.get(group, {}) == pytest.approx(theirs.get(group, {}), abs=1e-5), group
        for part, weights in theirs.get("group_dro", {}).items():
            assert mine["group_dro"][part] == pytest.approx(weights, abs=1e-5), part
        assert mine.get("grpo", {}).pop("source_reward", {}) == pytest.approx(theirs.get("grpo", {}).pop("source_reward", {}), abs=1e-6)
        assert mine.get("grpo", {}) == pytest.approx(theirs.get("grpo", {}), abs=1e-6)
        assert mine.get("reward", 0.0) == pytest.approx(theirs.get("reward", 0.0), abs=1e-6)
        assert mine.get("rankme", 0.0) == pytest.approx(theirs.get("rankme", 0.0), rel=1e-4)
    assert any("grad_norm" in r for r in records)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(SCORED))
def test_scores_equal_one_process(runs, alone, name):
    """The rows of all model copies together, and what is made of them."""
    ranks, *_ = runs
    mine, wanted = ScoresReader(Path(ranks[0][name]["path"])), ScoresReader(alone(SCORES).artifact.path)
    found, exact = mine.rows(), wanted.rows()
    assert len(found) > 10
    for column in ("sample", "step", "probe_step", "source", "place", "tokens"):
        assert found[column].tolist() == exact[column].tolist()
    assert np.linalg.norm(found["scores"] - exact["scores"]) <= 1e-3 * np.linalg.norm(exact["scores"])
    for record, other in zip(ranks[0][name]["metrics"], alone(SCORES).metrics(), strict=True):
        assert record.get("scores", {}).keys() == other.get("scores", {}).keys()
    assert [record["step"] for record in mine.probes()] == [record["step"] for record in wanted.probes()] == [2, 4]
    for record, other in zip(mine.probes(), wanted.probes()):
        for capability, note in other["capabilities"].items():
            assert record["capabilities"][capability] == pytest.approx(note, rel=1e-3)
