"""In-training scores are the same under every layout, and training is what it is without them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "train"))
sys.path.insert(0, str(HERE))

from launch import launch  # noqa: E402
from scored_steps import WHOLE_WIDTH, stepped  # noqa: E402

from megatron_r1.parallel.config import LayoutConfig  # noqa: E402

SEQUENCE = {"tensor": 2, "sequence_parallel": True}
INTERLEAVED = {"pipeline": 2, "virtual_pipeline": 2}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor": {"tensor": 2}, "sequence": SEQUENCE, "pipeline": {"pipeline": 2}, "interleaved": INTERLEAVED, "data": {}, "overlap": {"overlap": True},
    "sharded": {"distributed_optimizer": True}, "sharded, overlap": {"distributed_optimizer": True, "overlap": True},
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    f"{name}, {kind}": {"layout": layout, "options": {"rank": rank}} for name, layout in LAYOUTS.items() for kind, rank in (("whole", None), ("factors", WHOLE_WIDTH))
} | {
    "sequence, recomputed": {"layout": SEQUENCE, "options": {"recompute": True}},
    "interleaved, recomputed": {"layout": INTERLEAVED, "options": {"recompute": True}},
    "pipeline, untied": {"layout": {"pipeline": 2}, "options": {"tied": False}},
    "tensor, untied": {"layout": {"tensor": 2}, "options": {"tied": False}},
}
FOUR: dict[str, dict[str, Any]] = {
    "sequence x pipeline": {"layout": SEQUENCE | {"pipeline": 2}},
    "sequence x data, sharded, overlap": {"layout": SEQUENCE | {"distributed_optimizer": True, "overlap": True}},
    "pipeline x data, overlap": {"layout": {"pipeline": 2, "overlap": True}},
    "interleaved x data, overlap": {"layout": INTERLEAVED | {"overlap": True}},
}  # fmt: skip
MICROS = 4


def with_micros(cases: dict[str, dict[str, Any]], world: int) -> dict[str, dict[str, Any]]:
    """The same global batch in all of them."""
    found = {}
    for name, case in cases.items():
        copies = world // LayoutConfig(**case["layout"]).model_parallel()
        found[name] = {"layout": case["layout"], "options": {"micros": MICROS // copies} | case.get("options", {})}
    return found


@pytest.fixture(scope="module")
def alone() -> dict[bool, dict[str, Any]]:
    """Of a tied and an untied model."""
    return {tied: stepped(LayoutConfig(), tied=tied, micros=MICROS) for tied in (True, False)}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return launch(HERE / "scores_worker.py", 2, tmp_path_factory.mktemp("two"), {"cases": with_micros(CASES, 2)}, timeout=500)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return launch(HERE / "scores_worker.py", 4, tmp_path_factory.mktemp("four"), {"cases": with_micros(FOUR, 4)}, timeout=500)


def equal(ranks: list[Any], case: dict[str, Any], name: str, alone: dict[bool, dict[str, Any]]) -> None:
    options = case.get("options", {})
    expected = alone[options.get("tied", True)]
    scores: dict[str, Any] = {}
    for rank in ranks:
        with_scores, without = rank[name]
        # Ranks of one copy know the same rows, those of another copy others.
        for row, values in with_scores["scores"].items():
            assert scores.setdefault(row, values) == pytest.approx(values, rel=1e-6), row
        if options.get("rank") is None:
            assert with_scores["losses"] == pytest.approx(without["losses"], rel=1e-6)
            assert with_scores["weights"] == pytest.approx(without["weights"], rel=1e-6)
        else:
            assert (with_scores["losses"], with_scores["bytes"]) == (without["losses"], without["bytes"])
        assert with_scores["norms"] == pytest.approx(expected["norms"], rel=1e-5)
    assert sorted(scores) == sorted(expected["scores"])
    found, exact = (np.array([table[row] for row in sorted(scores)]) for table in (scores, expected["scores"]))
    assert (np.linalg.norm(found - exact, axis=0) <= 1e-5 * np.linalg.norm(exact, axis=0)).all()
    copies = len(ranks) // LayoutConfig(**case["layout"]).model_parallel()
    assert len(scores) * len(ranks) == sum(len(rank[name][0]["scores"]) for rank in ranks) * copies


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_processes(name: str, two: list[Any], alone: dict[bool, dict[str, Any]]) -> None:
    equal(two, CASES[name], name, alone)


@pytest.mark.slow
@pytest.mark.parametrize("name", FOUR)
def test_four_processes(name: str, four: list[Any], alone: dict[bool, dict[str, Any]]) -> None:
    equal(four, FOUR[name], name, alone)
