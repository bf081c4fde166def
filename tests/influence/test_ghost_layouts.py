"""The same scores in absolute value under every layout: processes under gloo against this one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ghost_worker import rows, scored
from launch import launch

from megatron_r1.parallel.config import LayoutConfig

SEQUENCE = {"tensor": 2, "sequence_parallel": True}
INTERLEAVED = {"pipeline": 2, "virtual_pipeline": 2}
TWO: dict[str, dict[str, Any]] = {
    "tensor": {"layout": {"tensor": 2}},
    "tensor, untied, float64": {"layout": {"tensor": 2}, "options": {"tied": False, "double": True}},
    "sequence": {"layout": SEQUENCE},
    "sequence, float64": {"layout": SEQUENCE, "options": {"double": True}},
    "sequence, recompute": {"layout": SEQUENCE, "options": {"recompute": True}},
    "pipeline": {"layout": {"pipeline": 2}},
    "pipeline, untied": {"layout": {"pipeline": 2}, "options": {"tied": False}},
    "pipeline, recompute": {"layout": {"pipeline": 2}, "options": {"recompute": True}},
    "interleaved pipeline": {"layout": INTERLEAVED},
    "interleaved pipeline, recompute": {"layout": INTERLEAVED, "options": {"recompute": True}},
    "context": {"layout": {"context": 2}},
    "context, untied, float64": {"layout": {"context": 2}, "options": {"tied": False, "double": True}},
    "context, recompute": {"layout": {"context": 2}, "options": {"recompute": True}},
    "data": {"layout": {}},
}
FOUR: dict[str, dict[str, Any]] = {
    "sequence x pipeline, recompute": {"layout": SEQUENCE | {"pipeline": 2}, "options": {"recompute": True}},
    "sequence x data": {"layout": SEQUENCE},
    "context x sequence": {"layout": SEQUENCE | {"context": 2}},
    "context x interleaved pipeline, recompute": {"layout": INTERLEAVED | {"context": 2}, "options": {"recompute": True}},
    "context x data": {"layout": {"context": 2}},
    "context of four, float64": {"layout": {"context": 4}, "options": {"double": True}},
    "interleaved pipeline x data": {"layout": INTERLEAVED},
}


@pytest.fixture(scope="module")
def alone() -> dict[bool, dict[str, Any]]:
    """Of a tied and an untied model, in float64."""
    return {tied: scored(LayoutConfig(), tied=tied, double=True) for tied in (True, False)}


def equal(ranks: list[Any], cases: dict[str, Any], alone: dict[bool, dict[str, Any]], name: str) -> None:
    case = cases[name]
    copies = len(ranks) // LayoutConfig(**case["layout"]).model_parallel()
    found = np.array([rank[name]["ghost"] for rank in ranks])
    # Ranks of one model copy know the same; copies have different rows.
    total = found.sum(axis=0) * copies / len(ranks)
    options = case.get("options", {})
    expected = alone[options.get("tied", True)]
    tolerance = 1e-9 if options.get("double") else 1e-5
    exact = np.array(expected["ghost"])
    assert len(exact) == len(rows())
    assert (np.abs(total - exact).max(axis=0) <= tolerance * np.abs(exact).max(axis=0)).all()
    if copies == 1:
        assert all(np.allclose(one, total, rtol=1e-12) for one in found)
    for rank in ranks:
        assert rank[name]["loss"] == pytest.approx(expected["loss"], rel=1e-6)  # reported in fp32
        assert rank[name]["norm"] == pytest.approx(expected["norm"], rel=tolerance)
        along = np.array(rank[name]["differences"])
        assert np.linalg.norm(along - exact[:, -1]) <= 1e-3 * np.linalg.norm(exact[:, -1])


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return launch(Path(__file__).with_name("ghost_worker.py"), 2, tmp_path_factory.mktemp("two"), {"cases": TWO})


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return launch(Path(__file__).with_name("ghost_worker.py"), 4, tmp_path_factory.mktemp("four"), {"cases": FOUR})


@pytest.mark.slow
@pytest.mark.parametrize("name", TWO)
def test_two_processes(name: str, two: list[Any], alone: dict[bool, dict[str, Any]]) -> None:
    equal(two, TWO, alone, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", FOUR)
def test_four_processes(name: str, four: list[Any], alone: dict[bool, dict[str, Any]]) -> None:
    equal(four, FOUR, alone, name)


def test_tied_and_untied_differ(alone: dict[bool, dict[str, Any]]) -> None:
    """Otherwise the comparisons above could be of one thing."""
    assert alone[True]["norm"] != pytest.approx(alone[False]["norm"], rel=0.01)
