"""Two processes under gloo give the single process's losses and gradient norms: every layout, in one start of processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from launch import launch
from scenarios import STEPS, Run

from megatron_r1.parallel.config import LayoutConfig

TENSOR, PIPELINE = {"tensor": 2}, {"pipeline": 2}
SEQUENCE = {"tensor": 2, "sequence_parallel": True}
SHARDED = {"distributed_optimizer": True}

CASES: dict[str, dict[str, Any]] = {
    "tensor": {"layout": TENSOR, "save": True},
    "tensor, sequence": {"layout": SEQUENCE},
    "tensor, sequence, recompute": {"layout": SEQUENCE, "options": {"recompute": True}},
    "tensor, untied": {"layout": TENSOR, "options": {"tied": False}},
    "tensor, distill": {"layout": TENSOR, "options": {"objective": "distill"}},
    "tensor, sequence, distill chunked": {"layout": SEQUENCE, "options": {"objective": "distill chunked"}},
    "tensor, top k": {"layout": TENSOR, "options": {"objective": "topk"}},
    "pipeline": {"layout": PIPELINE, "validate": True},
    "pipeline, untied": {"layout": PIPELINE, "options": {"tied": False}},
    "pipeline, distill": {"layout": PIPELINE, "options": {"objective": "distill"}},
    "interleaved pipeline": {"layout": {"pipeline": 2, "virtual_pipeline": 2}},
    "data": {"layout": {}},
    "data, sharded optimizer": {"layout": SHARDED},
    "data, overlap": {"layout": {"overlap": True}},
    "data, sharded optimizer, overlap": {"layout": {"distributed_optimizer": True, "overlap": True}},
    "data, sharded optimizer, overlap, untied": {"layout": {"distributed_optimizer": True, "overlap": True}, "options": {"tied": False}},
}
RESUME: dict[str, dict[str, Any]] = {
    "sharded": {"layout": SHARDED},
    "sharded bf16": {"layout": SHARDED, "options": {"precision": "bf16"}},
    "pipeline": {"layout": PIPELINE},
}
LOADS = {"tensor": TENSOR, "pipeline": PIPELINE, "sharded": SHARDED}


def base(name: str) -> dict[str, Any]:
    """The single process's options for a case: the objective and model, not the way of computing them."""
    options = dict(CASES[name].get("options", {}))
    options.pop("recompute", None)
    if options.get("objective") == "distill chunked":
        options["objective"] = "distill"
    return options


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Reference runs of this process, and a checkpoint of the first of them after `STEPS` steps."""
    references: dict[str, Any] = {}
    for name in CASES:
        key = str(sorted(base(name).items()))
        if key not in references:
            references[key] = Run(LayoutConfig(), **base(name)).steps()
    run = Run(LayoutConfig())
    run.steps()
    path = tmp_path_factory.mktemp("single") / "step"
    run.save(path)
    return {"steps": references, "checkpoint": path, "continued": run.steps(2), "validation": Run(LayoutConfig()).validation()}


@pytest.fixture(scope="module")
def ranks(single: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    damaged = folder / "damaged"
    arguments = {
        "cases": CASES,
        "resume": RESUME,
        "load": {name: {"layout": layout, "path": str(single["checkpoint"])} for name, layout in LOADS.items()},
        "damage": {"layout": TENSOR, "path": str(damaged)},
    }
    results = launch(Path(__file__).with_name("worker.py"), 2, folder, arguments)
    for result in results:
        result["folder"] = str(folder)
    return results


def close(found: list[list[float]], expected: list[tuple[float, float]]) -> None:
    assert len(found) == len(expected)
    for (loss, norm), (loss_alone, norm_alone) in zip(found, expected):
        assert loss == pytest.approx(loss_alone, abs=1e-5, rel=0)
        assert norm == pytest.approx(norm_alone, rel=1e-5, abs=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_layout_equals_single_process(name: str, single: dict[str, Any], ranks: list[dict[str, Any]]) -> None:
    expected = single["steps"][str(sorted(base(name).items()))]
    assert len(expected) == STEPS
    assert all(norm > 0 for _, norm in expected)
    for rank in ranks:
        close(rank[name], expected)


@pytest.mark.slow
def test_the_objectives_differ(single: dict[str, Any]) -> None:
    """Otherwise the comparisons above could all be of one thing."""
    firsts = {tuple(steps[0]) for steps in single["steps"].values()}
    assert len(firsts) == len(single["steps"]) == 4


@pytest.mark.slow
def test_clipping_has_work(single: dict[str, Any]) -> None:
    assert all(norm > 0.5 for _, norm in single["steps"]["[]"])


@pytest.mark.slow
@pytest.mark.parametrize("name", RESUME)
def test_resume_is_bit_for_bit(name: str, ranks: list[dict[str, Any]]) -> None:
    assert [rank[f"resume {name}"] for rank in ranks] == [True, True]


@pytest.mark.slow
@pytest.mark.parametrize("name", LOADS)
def test_a_single_process_checkpoint_under_another_layout(name: str, single: dict[str, Any], ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        close(rank[f"load {name}"], single["continued"])


@pytest.mark.slow
def test_a_tensor_parallel_checkpoint_on_one_process(single: dict[str, Any], ranks: list[dict[str, Any]]) -> None:
    run = Run(LayoutConfig(), seed=31)
    run.load(Path(ranks[0]["folder"]) / "tensor")
    close([list(pair) for pair in run.steps(2)], [tuple(pair) for pair in ranks[0]["tensor continued"]])


@pytest.mark.slow
def test_second_moments_under_another_layout(ranks: list[dict[str, Any]]) -> None:
    # The pipelined model holds the tied embedding on two stages, so only layouts that hold every tensor once can be compared.
    for rank in ranks:
        assert rank["moments tensor"][0] == STEPS
        assert rank["moments tensor"][1] == pytest.approx(rank["moments sharded"][1], rel=1e-6)


@pytest.mark.slow
def test_validation_through_the_pipeline(single: dict[str, Any], ranks: list[dict[str, Any]]) -> None:
    # After STEPS steps of training; the single process's number is from before: they must differ, and be equal on both ranks.
    values = {rank["pipeline validation"] for rank in ranks}
    assert len(values) == 1
    assert abs(values.pop() - single["validation"]) > 1e-4


@pytest.mark.slow
def test_a_missing_checkpoint_is_an_error_on_every_rank(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert "no such folder" in rank["damage"]


# Two degrees at once: what one degree alone can not get wrong.
COMBINED: dict[str, dict[str, Any]] = {
    "tensor x pipeline, sequence": {"layout": {"tensor": 2, "pipeline": 2, "sequence_parallel": True}},
    "tensor x data, sequence, sharded": {"layout": {"tensor": 2, "sequence_parallel": True, "distributed_optimizer": True}, "options": {"objective": "distill"}},
    "pipeline x data, sharded, overlap": {"layout": {"pipeline": 2, "distributed_optimizer": True, "overlap": True}, "save": True},
    "interleaved pipeline x data, sharded, overlap": {
        "layout": {"pipeline": 2, "virtual_pipeline": 2, "distributed_optimizer": True, "overlap": True}, "validate": True,
    },
}


@pytest.fixture(scope="module")
def four(single: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    arguments = {
        "cases": COMBINED,
        "resume": {"all": {"layout": {"tensor": 2, "sequence_parallel": True, "distributed_optimizer": True}}},
        "load": {"all": {"layout": {"tensor": 2, "pipeline": 2}, "path": str(single["checkpoint"])}},
    }
    return launch(Path(__file__).with_name("worker.py"), 4, tmp_path_factory.mktemp("four"), arguments, timeout=480)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMBINED)
def test_combined_degrees_equal_single_process(name: str, single: dict[str, Any], four: list[dict[str, Any]]) -> None:
    expected = single["steps"][str(sorted(COMBINED[name].get("options", {}).items()))]
    for rank in four:
        close(rank[name], expected)


@pytest.mark.slow
def test_combined_degrees_load_and_resume(single: dict[str, Any], four: list[dict[str, Any]]) -> None:
    for rank in four:
        assert rank["resume all"] is True
        close(rank["load all"], single["continued"])
