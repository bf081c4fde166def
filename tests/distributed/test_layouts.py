"""Two, four and eight processes under gloo give the single process's losses and gradient norms: every layout, in one start of processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from launch import launch
from scenarios import STEPS, Run

from megatron_r1.parallel.config import LayoutConfig
from megatron_r1.parallel.optimizer import local_states

TENSOR, PIPELINE = {"tensor": 2}, {"pipeline": 2}
SEQUENCE = {"tensor": 2, "sequence_parallel": True}
SHARDED = {"distributed_optimizer": True}
CONTEXT = {"context": 2}

CASES: dict[str, dict[str, Any]] = {
    "tensor": {"layout": TENSOR, "continue": True},
    "tensor, sequence": {"layout": SEQUENCE},
    "tensor, sequence, recompute": {"layout": SEQUENCE, "options": {"recompute": True}},
    "tensor, untied": {"layout": TENSOR, "options": {"tied": False}},
    "tensor, whole teacher": {"layout": TENSOR, "options": {"objective": "distill whole"}},
    "tensor, sequence, distill": {"layout": SEQUENCE, "options": {"objective": "distill"}},
    "tensor, top k": {"layout": TENSOR, "options": {"objective": "topk"}},
    "pipeline": {"layout": PIPELINE, "validate": True},
    "pipeline, untied": {"layout": PIPELINE, "options": {"tied": False}},
    "pipeline, recompute": {"layout": PIPELINE, "options": {"recompute": True}},
    "pipeline, distill": {"layout": PIPELINE, "options": {"objective": "distill"}},
    "interleaved pipeline": {"layout": {"pipeline": 2, "virtual_pipeline": 2}},
    "interleaved pipeline, distill": {"layout": {"pipeline": 2, "virtual_pipeline": 2}, "options": {"objective": "distill"}},
    "context": {"layout": CONTEXT, "continue": True, "validate": True},
    "context, recompute, untied": {"layout": CONTEXT, "options": {"recompute": True, "tied": False}},
    "context, sharded optimizer, overlap": {"layout": {**CONTEXT, "distributed_optimizer": True, "overlap": True}},
    "context, distill": {"layout": CONTEXT, "options": {"objective": "distill"}},
    "context, top k": {"layout": CONTEXT, "options": {"objective": "topk"}},
    "data": {"layout": {}},
    "data, sharded optimizer": {"layout": SHARDED},
    "data, overlap": {"layout": {"overlap": True}},
    "data, sharded optimizer, overlap": {"layout": {"distributed_optimizer": True, "overlap": True}},
    "data, sharded optimizer, overlap, recompute": {"layout": {"distributed_optimizer": True, "overlap": True}, "options": {"recompute": True}},
    "data, sharded optimizer, overlap, untied": {"layout": {"distributed_optimizer": True, "overlap": True}, "options": {"tied": False}},
}
# In bf16 products are rounded by their parts, so these agree to a few of its digits only.
HALF: dict[str, dict[str, Any]] = {
    f"{name}, bf16": {"layout": layout, "options": {"precision": "bf16"}}
    for name, layout in {"tensor, sequence": SEQUENCE, "pipeline": PIPELINE, "context": CONTEXT, "data, sharded, overlap": {**SHARDED, "overlap": True}}.items()
}
RESUME: dict[str, dict[str, Any]] = {
    "sharded": {"layout": SHARDED},
    "sharded bf16": {"layout": SHARDED, "options": {"precision": "bf16"}},
    "sharded, overlap": {"layout": {**SHARDED, "overlap": True}},
    "sharded, overlap, bf16": {"layout": {**SHARDED, "overlap": True}, "options": {"precision": "bf16"}},
    "pipeline": {"layout": PIPELINE},
    "interleaved pipeline": {"layout": {"pipeline": 2, "virtual_pipeline": 2}},
    "context, sharded bf16": {"layout": {**CONTEXT, **SHARDED}, "options": {"precision": "bf16"}},
}
LOADS = {
    "tensor": TENSOR, "tensor, sequence": SEQUENCE, "pipeline": PIPELINE, "interleaved pipeline": {"pipeline": 2, "virtual_pipeline": 2}, "sharded": SHARDED,
    "sharded, overlap": {**SHARDED, "overlap": True}, "context": {**CONTEXT, **SHARDED},
}


def base(name: str) -> dict[str, Any]:
    """The single process's options for a case: the objective and model, not the way of computing them."""
    options = dict((CASES | COMBINED | TRIPLE)[name].get("options", {}))
    options.pop("recompute", None)
    return options


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Reference runs of this process, and a checkpoint of the first of them after `STEPS` steps."""
    references: dict[str, Any] = {}
    moments: dict[str, Any] = {}
    continued: dict[str, Any] = {}
    path = tmp_path_factory.mktemp("single") / "step"
    for name in CASES:
        key = str(sorted(base(name).items()))
        if key not in references:
            run = Run(LayoutConfig(), **base(name))
            references[key], moments[key] = run.steps(), first_moments(run)
            if key == "[]":
                run.save(path)
            continued[key] = run.steps(2)
    return {"steps": references, "moments": moments, "checkpoint": path, "continued": continued, "validation": Run(LayoutConfig()).validation()}


@pytest.fixture(scope="module")
def ranks(single: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    damaged = folder / "damaged"
    arguments = {
        "cases": CASES | HALF,
        "resume": RESUME,
        "load": {name: {"layout": layout, "path": str(single["checkpoint"])} for name, layout in LOADS.items()},
        "damage": {"layout": TENSOR, "path": str(damaged)},
    }
    results = launch(Path(__file__).with_name("worker.py"), 2, folder, arguments)
    for result in results:
        result["folder"] = str(folder)
    return results


def first_moments(run: Run) -> dict[str, torch.Tensor]:
    """Adam's mean of the clipped gradients of all steps so far, by parameter."""
    names = {id(p): n for n, p in run.chunks[0].named_parameters()}
    return {names[id(p)]: tensors["exp_avg"].clone() for p, _, tensors in local_states(run.optimizer)}


def same_gradients(folder: str, name: str, single: dict[str, Any]) -> None:
    """The gradients of all steps, number by number, as the moments of the checkpoint written under the layout have them; it continues as the single process's.

    Adam divides by the root of tiny second moments, so single weights, and then gradients, differ by more than the losses' rounding;
    a gradient that is left out, counted twice or of other tokens is off by a thousand times the bound.
    """
    key = str(sorted(base(name).items()))
    run, expected = Run(LayoutConfig(), seed=31, **base(name)), single["moments"][key]
    run.load(Path(folder) / name)
    found = first_moments(run)
    assert found.keys() == expected.keys()
    for parameter, moment in expected.items():
        off = float((found[parameter] - moment).norm() / moment.norm())
        assert off <= 1e-4, f"{parameter}: {off:.2g}"
    # The weights' rounding of four updates under another layout is in these losses.
    close(run.steps(2), single["continued"][key], norms=1e-5, losses=3e-6)


def close(found: list[list[float]], expected: list[tuple[float, float]], norms: float = 1e-6, losses: float = 1e-6) -> None:
    assert len(found) == len(expected)
    for (loss, norm), (loss_alone, norm_alone) in zip(found, expected):
        assert loss == pytest.approx(loss_alone, abs=losses, rel=0)
        assert norm == pytest.approx(norm_alone, rel=norms, abs=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_layout_equals_single_process(name: str, single: dict[str, Any], ranks: list[dict[str, Any]]) -> None:
    expected = single["steps"][str(sorted(base(name).items()))]
    assert len(expected) == STEPS
    assert all(norm > 0 for _, norm in expected)
    for rank in ranks:
        # The rest of a vocabulary beside the k likeliest is 1 minus their sum, and its rounding is that of 1.
        # Without compiled kernels the last step with this teacher is 1.2e-6 off.
        close(rank[name], expected, norms=1e-5 if "top k" in name else 2e-6 if "whole" in name else 1e-6)
    same_gradients(ranks[0]["folder"], name, single)


@pytest.mark.slow
def test_layouts_in_bf16(ranks: list[dict[str, Any]]) -> None:
    expected = Run(LayoutConfig(), precision="bf16").steps()
    for name in HALF:
        for rank in ranks:
            assert rank[name] == ranks[0][name]
        for (loss, norm), (loss_alone, norm_alone) in zip(ranks[0][name], expected, strict=True):
            assert loss == pytest.approx(loss_alone, abs=2e-3), name
            assert norm == pytest.approx(norm_alone, rel=1e-2), name


@pytest.mark.slow
def test_the_objectives_differ(single: dict[str, Any]) -> None:
    """Otherwise the comparisons above could all be of one thing."""
    firsts = {tuple(steps[0]) for steps in single["steps"].values()}
    assert len(firsts) == len(single["steps"]) == 5


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
        close(rank[f"load {name}"], single["continued"]["[]"], norms=1e-5)


@pytest.mark.slow
def test_a_tensor_parallel_checkpoint_on_one_process(single: dict[str, Any], ranks: list[dict[str, Any]]) -> None:
    run = Run(LayoutConfig(), seed=31)
    run.load(Path(ranks[0]["folder"]) / "tensor")
    close([list(pair) for pair in run.steps(2)], [tuple(pair) for pair in ranks[0]["tensor continued"]], norms=1e-5)


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
    "pipeline x data, sharded, overlap": {"layout": {"pipeline": 2, "distributed_optimizer": True, "overlap": True}, "continue": True},
    "interleaved pipeline x data, sharded, overlap": {
        "layout": {"pipeline": 2, "virtual_pipeline": 2, "distributed_optimizer": True, "overlap": True}, "validate": True,
    },
    "tensor x data, sequence, sharded, overlap, recompute": {
        "layout": {"tensor": 2, "sequence_parallel": True, "distributed_optimizer": True, "overlap": True}, "options": {"recompute": True},
    },
    "context x data, sharded, overlap": {"layout": {"context": 2, "distributed_optimizer": True, "overlap": True}},
    "context x tensor, sequence, sharded, recompute": {
        "layout": {"context": 2, "tensor": 2, "sequence_parallel": True, "distributed_optimizer": True}, "options": {"recompute": True},
    },
    "context x pipeline": {"layout": {"context": 2, "pipeline": 2}},
    "context x interleaved pipeline": {"layout": {"context": 2, "pipeline": 2, "virtual_pipeline": 2}},
}

# Three degrees at once, as large models are trained.
TRIPLE: dict[str, dict[str, Any]] = {
    "tensor x pipeline x data, sequence, sharded, overlap": {
        "layout": {"tensor": 2, "pipeline": 2, "sequence_parallel": True, "distributed_optimizer": True, "overlap": True},
    },
    "tensor x interleaved pipeline x data, sequence, recompute": {
        "layout": {"tensor": 2, "pipeline": 2, "virtual_pipeline": 2, "sequence_parallel": True}, "options": {"recompute": True},
    },
    "tensor x context x data, sequence, sharded": {"layout": {"tensor": 2, "context": 2, "sequence_parallel": True, "distributed_optimizer": True}},
    "tensor x context x pipeline": {"layout": {"tensor": 2, "context": 2, "pipeline": 2}},
}


# Layout of a checkpoint that two processes wrote (a case of theirs; "": one process) -> layout under which four go on from it.
FROM: dict[str, tuple[str, dict[str, Any]]] = {
    "one process to tensor x pipeline": ("", {"tensor": 2, "pipeline": 2}),
    "sharded, overlap to tensor x pipeline, sharded": ("data, sharded optimizer, overlap", {"tensor": 2, "pipeline": 2, "distributed_optimizer": True}),
    "interleaved pipeline to context x tensor": ("interleaved pipeline", {"context": 2, "tensor": 2, "sequence_parallel": True, "distributed_optimizer": True}),
    "context to interleaved pipeline x data": (
        "context, sharded optimizer, overlap", {"pipeline": 2, "virtual_pipeline": 2, "distributed_optimizer": True, "overlap": True},
    ),
    "tensor to data": ("tensor, sequence", {"distributed_optimizer": True, "overlap": True}),
}


@pytest.fixture(scope="module")
def four(single: dict[str, Any], ranks: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    arguments = {
        "cases": COMBINED,
        "resume": {"all": {"layout": {"tensor": 2, "context": 2, "sequence_parallel": True, "distributed_optimizer": True}}},
        "load": {name: {"layout": layout, "path": str(Path(ranks[0]["folder"]) / case if case else single["checkpoint"])} for name, (case, layout) in FROM.items()},
    }
    folder = tmp_path_factory.mktemp("four")
    results = launch(Path(__file__).with_name("worker.py"), 4, folder, arguments, timeout=480)
    for result in results:
        result["folder"] = str(folder)
    return results


@pytest.mark.slow
@pytest.mark.parametrize("name", COMBINED)
def test_combined_degrees_equal_single_process(name: str, single: dict[str, Any], four: list[dict[str, Any]]) -> None:
    expected = single["steps"][str(sorted(base(name).items()))]
    for rank in four:
        close(rank[name], expected)
    same_gradients(four[0]["folder"], name, single)


@pytest.mark.slow
def test_combined_degrees_load_and_resume(single: dict[str, Any], four: list[dict[str, Any]]) -> None:
    for rank in four:
        assert rank["resume all"] is True
        for name in FROM:
            close(rank[f"load {name}"], single["continued"]["[]"], norms=1e-5, losses=1e-6 if not FROM[name][0] else 3e-6)


@pytest.fixture(scope="module")
def eight(single: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    arguments = {"cases": TRIPLE, "load": {"all": {"layout": TRIPLE["tensor x pipeline x data, sequence, sharded, overlap"]["layout"], "path": str(single["checkpoint"])}}}
    folder = tmp_path_factory.mktemp("eight")
    results = launch(Path(__file__).with_name("worker.py"), 8, folder, arguments, timeout=480)
    for result in results:
        result["folder"] = str(folder)
    return results


@pytest.mark.slow
@pytest.mark.parametrize("name", TRIPLE)
def test_three_degrees_equal_single_process(name: str, single: dict[str, Any], eight: list[dict[str, Any]]) -> None:
    expected = single["steps"][str(sorted(base(name).items()))]
    for rank in eight:
        close(rank[name], expected)
    same_gradients(eight[0]["folder"], name, single)


@pytest.mark.slow
def test_three_degrees_load(single: dict[str, Any], eight: list[dict[str, Any]]) -> None:
    for rank in eight:
        close(rank["load all"], single["continued"]["[]"], norms=1e-5)
