"""The rehearsal is the published recipe but for what its file says: steps, inputs, mixtures, schedules and constants are compared."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_r1.config.units import Bytes
from megatron_r1.pipeline.cluster import Cluster, need
from megatron_r1.pipeline.derive import derive, model_of
from megatron_r1.pipeline.recipe import Recipe, load_recipe

SHORTER = {"budget", "seq_length", "micro_batch", "global_batch", "precision", "checkpoints", "validation", "rankme", "log"}
"""Fields of a train step that may differ; of `lr` only the warm-up."""


@pytest.fixture(scope="module")
def both() -> tuple[Recipe, Recipe]:
    return load_recipe("rehearsal_140m"), load_recipe("mobilellm_r1_140m")


def test_every_step_and_every_input(both: tuple[Recipe, Recipe]) -> None:
    ours, published = both
    assert set(ours.steps) - set(published.steps) == {"teacher"}
    for name in published.steps:
        inputs = {role: value for role, value in ours.inputs(name).items() if role != "teacher"}
        if name == "report":
            assert set(inputs.pop("artifacts")) == set(ours.steps) - {"report"}
            continue
        assert inputs == published.inputs(name), name


def test_the_real_model(both: tuple[Recipe, Recipe]) -> None:
    ours, published = both
    for name in (name for name, config in published.steps.items() if config.stage == "train"):
        assert model_of(ours, name) == model_of(published, name)
    assert model_of(ours, "pretrain1").parameters() == 140_248_512
    assert model_of(ours, "teacher").vocab_size == ours.steps["corpus_pretrain"].tokenizer.vocab_size == 128_256  # type: ignore[attr-defined]


def test_training_differs_in_size_only(both: tuple[Recipe, Recipe]) -> None:
    ours, published = (recipe.plain()["steps"] for recipe in both)
    for name, settings in published.items():
        if settings["stage"] != "train":
            continue
        mine: dict[str, Any] = ours[name]
        differing = {key for key in settings if mine[key] != settings[key]}
        if settings["objective"] == "distill":
            differing -= {"inputs", "distill"}
            assert mine["distill"] | {"teacher": None} == settings["distill"] | {"teacher": None}
        if "lr" in differing:
            assert mine["lr"] | {"warmup": None} == settings["lr"] | {"warmup": None}
        assert differing <= SHORTER | {"lr"}, name


def test_mixtures_are_the_published_ones(both: tuple[Recipe, Recipe]) -> None:
    ours, published = (recipe.plain()["steps"] for recipe in both)
    for name, settings in published.items():
        if settings["stage"] == "mixture":
            assert {key for key in settings if ours[name][key] != settings[key]} == {"budget"}, name
        if settings["stage"] == "corpus":
            assert set(ours[name]["sources"]) == set(settings["sources"])
            assert all(source["kind"] == "embedded" and source["domain"] == settings["sources"][key]["domain"] for key, source in ours[name]["sources"].items())


def test_an_hour_on_two_cores(both: tuple[Recipe, Recipe]) -> None:
    """At 50 GFLOP/s, which two cores with AVX2 sustain in fp32; and in the memory of a small machine."""
    ours, _ = both
    cluster = Cluster(gpus=1, gpu="cpu", tflops=0.05, memory=Bytes(16 << 30))
    assert cluster.hours(sum(plan.flops or 0 for plan in derive(ours))) < 0.75
    for name, config in ours.steps.items():
        if config.stage == "train":
            found = need(ours, name, cluster)
            assert found.changes == {}, name
            assert found.memory.peak < 6 << 30, name
