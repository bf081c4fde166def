"""`megatron-r1 plan`: memory against sums by hand, what does not fit against what would, times and costs against their definitions."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from megatron_r1.cli import main
from megatron_r1.config.units import Bytes
from megatron_r1.model.config import ModelConfig
from megatron_r1.parallel.config import LayoutConfig
from megatron_r1.pipeline.cluster import Cluster, load_cluster, need, print_cluster_plan
from megatron_r1.pipeline.derive import derive
from megatron_r1.pipeline.memory import Shape, largest, parameters_of, stage_memory
from megatron_r1.pipeline.recipe import Recipe, load_recipe
from megatron_r1.utils.errors import ConfigError, ParallelError

TINY = ModelConfig.model_validate("tiny")


@pytest.fixture(scope="module")
def published() -> Recipe:
    return load_recipe("mobilellm_r1_950m")


def printed(recipe: Recipe, cluster: Cluster) -> str:
    text = io.StringIO()
    print_cluster_plan(recipe, cluster, Console(file=text, width=220))
    return text.getvalue()


# ------------------------------------------------------------------ memory


def test_state_by_hand() -> None:
    """fp32: weight, gradient and two moments of 4 bytes each. bf16: 2 + 4, and main weight and moments (12), which are shared out."""
    parameters = TINY.parameters()
    full = largest(Shape(TINY, LayoutConfig(), 4, 1, 64, 1))
    assert full.state == 16 * parameters
    sharded = largest(Shape(TINY, LayoutConfig(distributed_optimizer=True), 4, 1, 64, 1, "bf16"))
    assert sharded.state == 6 * parameters + 12 * (parameters // 4)


def test_a_layer_by_hand() -> None:
    """Two tokens of d 128, q 128, kv 64, f 384, 2 heads in fp32: four streams of d with two scales, qkv and output with two sums, three f."""
    memory = largest(Shape(TINY, LayoutConfig(), 1, 1, 2, 1))
    assert memory.per_layer == 2 * (4 * (4 * 128 + 2) + 4 * (2 * 128 + 2 * 64 + 2) + 4 * 3 * 384)
    assert largest(Shape(TINY, LayoutConfig(), 1, 1, 2, 1, recompute=True)).per_layer == 2 * 4 * 128


@pytest.mark.parametrize(("tensor", "pipeline", "tied"), [(1, 1, True), (2, 2, True), (1, 4, False), (2, 1, False)])
def test_every_parameter_is_somewhere(tensor: int, pipeline: int, tied: bool) -> None:
    model = TINY.replace(num_kv_heads=2, tied_embeddings=tied)
    shape = Shape(model, LayoutConfig(tensor=tensor, pipeline=pipeline), 1, 1, 64, 8)
    held = sum(parameters_of(shape, stage) for stage in range(pipeline)) * tensor
    gains = (tensor - 1) * model.hidden_size * (2 * model.num_layers + 1)  # every tensor-parallel process has them
    copy = model.vocab_size * model.hidden_size if tied and pipeline > 1 else 0
    assert held == model.parameters() + gains + copy


def test_the_first_stage_keeps_most_micro_batches() -> None:
    shape = Shape(TINY, LayoutConfig(pipeline=4), 1, 1, 64, 8)
    assert [stage_memory(shape, stage).in_flight for stage in range(4)] == [4, 3, 2, 1]
    assert stage_memory(Shape(TINY, LayoutConfig(pipeline=4), 1, 1, 64, 2), 0).in_flight == 2


@given(
    micro=st.integers(1, 8), length=st.sampled_from([64, 256, 1024]), tensor=st.sampled_from([1, 2]), bf16=st.booleans(), sharded=st.booleans(),
    copies=st.sampled_from([1, 4, 64]),
)  # fmt: skip
def test_more_work_needs_more_and_what_saves_memory_saves_it(micro: int, length: int, tensor: int, bf16: bool, sharded: bool, copies: int) -> None:
    model = TINY.replace(num_layers=12, num_kv_heads=2)

    def peak(micro: int, tensor: int = tensor, recompute: bool = False, sharded: bool = sharded) -> int:
        layout = LayoutConfig(tensor=tensor, sequence_parallel=tensor > 1, distributed_optimizer=sharded)
        return largest(Shape(model, layout, copies, micro, length, 2, "bf16" if bf16 else "fp32", recompute)).peak

    assert peak(micro) < peak(micro + 1)
    assert peak(micro, recompute=True) <= peak(micro)
    assert peak(micro, sharded=True) <= peak(micro, sharded=False)
    assert peak(micro, tensor=2) < peak(micro, tensor=1)


# ------------------------------------------------------------------ clusters and time


def test_hours_and_costs_follow_from_speed() -> None:
    assert Cluster(gpus=4, per_node=4, tflops=0.5).hours(3600 * 2e12) == 1
    assert Cluster(gpus=8, gpu="h100", mfu=0.5).sustained() == pytest.approx(8 * 494.7e12)
    assert Cluster(gpus=8, gpu="mine", tflops=100.0, memory=Bytes(64 << 30)).usable == 60 << 30


def test_the_plan_adds_up(published: Recipe) -> None:
    cluster = Cluster(gpus=128, tflops=400.0, price=2.0)
    text = printed(published, cluster)
    flops = {plan.step: plan.flops for plan in derive(published)}
    hours = (flops["pretrain1"] or 0) / (128 * 400e12) / 3600
    row = next(line for line in text.splitlines() if line.startswith("│ pretrain1 "))
    assert f"{hours / 24:.3g}" in row
    assert f"{hours * 128:,.0f}" in row
    assert f"{hours * 256:,.0f}" in row
    assert f"{2097152000000 / hours / 3600:,.0f}" in row


def test_what_a_missing_teacher_takes_is_not_hidden(published: Recipe) -> None:
    """Without the teacher's sizes its steps, and all together, take more than what is printed."""
    text = printed(published, Cluster(gpus=128, price=2.0))
    rows = {line.split("│")[1].strip(): line for line in text.partition("memory of one GPU")[0].splitlines() if "│" in line}
    assert [name for name, row in rows.items() if "> " in row] == ["midtrain1", "midtrain2", "together"]
    assert "midtrain1: memory and hours without the teacher" in text
    assert "Llama-3.1-8B-Instruct/config.json is not on this machine" in text


def test_what_fits_stays_as_it_is(published: Recipe) -> None:
    for step in ("pretrain1", "sft_reasoning"):
        assert need(published, step, Cluster(gpus=128)).changes == {}


def test_a_smaller_gpu_gets_the_first_change_that_fits(published: Recipe) -> None:
    cluster = Cluster(gpus=128, gpu="a100-40gb")
    found = need(published, "pretrain1", cluster)
    assert set(found.changes or {}) == {"micro_batch"}
    assert found.memory.peak <= cluster.usable
    again = load_recipe("mobilellm_r1_950m", [f"steps.pretrain1.micro_batch={int(found.config.micro_batch)}"])
    assert need(again, "pretrain1", cluster).changes == {}
    assert "--set steps.pretrain1.micro_batch=" in printed(published, cluster)


def test_nothing_fits(published: Recipe) -> None:
    assert need(published, "pretrain1", Cluster(gpus=128, memory=Bytes(5 << 30))).changes is None
    assert "pretrain1 does not fit" in printed(published, Cluster(gpus=128, memory=Bytes(5 << 30)))


def test_a_batch_that_can_not_be_spread(published: Recipe) -> None:
    with pytest.raises(ParallelError, match="2048 sequences a step to be a multiple of micro_batch x model copies"):
        need(published, "pretrain1", Cluster(gpus=96))
    with pytest.raises(ParallelError, match="set micro_batch to 8"):
        need(published, "pretrain1", Cluster(gpus=256))
    text = printed(published, Cluster(gpus=96))
    assert "pretrain1 can not run like this" in text
    assert "use 64 GPUs" in text
    assert "GPU-hours" not in text  # what can not run has no price


def test_fp32_is_not_planned_at_the_speed_of_bf16_in_silence() -> None:
    assert Cluster(gpus=2, mfu=0.5).hours(3600 * 66.9e12, "fp32") == pytest.approx(1)
    assert "in fp32, so at 35 % of 66.9 TFLOP/s: pretrain1, influence1," in printed(load_recipe("quickstart"), Cluster(gpus=2))
    assert "in fp32" not in printed(load_recipe("quickstart"), Cluster(gpus=2, tflops=10.0))
    assert "in fp32" not in printed(load_recipe("mobilellm_r1_140m"), Cluster(gpus=2))


def test_cluster_files(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("gpus: 16\ngpu: a100\nprice: 1.5\nmemory: 72 GiB\n")
    cluster = load_cluster(path, mfu=0.5)
    assert (cluster.gpus, cluster.memory, cluster.mfu) == (16, 72 << 30, 0.5)
    path.write_text("gpus: 16\ngpuu: a100\n")
    with pytest.raises(ConfigError, match="gpuu"):
        load_cluster(path)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ([], "--cluster FILE or --gpus N"), (["--gpus", "0"], "gpus"), (["--gpus", "12"], "whole machines"), (["--gpus", "8", "--gpu", "voodoo2"], "known ratings: gb200"),
        (["--gpus", "8", "--mfu", "1.5"], "mfu"), (["--gpus", "8", "--memory", "1 GiB"], "smaller reserve"), (["--gpus", "8", "--mfu", "0.4", "--tflops", "300"], "mfu or tflops"), (["--gpus", "8", "--tflops", "nan"], "tflops"), (["--gpus", "8", "--tflops", "0"], "tflops"), (["--cluster", "no.yaml"], "no such file"),
    ],
)  # fmt: skip
def test_impossible_clusters(wrong: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "quickstart", *wrong]) == 2
    assert words in capsys.readouterr().err


def test_steps_are_listed_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["steps", "mobilellm_r1_140m"]) == 0
    listed = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [name for name, *_ in listed] == list(load_recipe("mobilellm_r1_140m").steps)
    assert {("pretrain1", "train", "many"), ("corpus_pretrain", "corpus", "one"), ("eval_final", "evaluate", "one")} <= {tuple(row) for row in listed}


def test_steps_say_whose_work_processes_share(capsys: pytest.CaptureFixture[str]) -> None:
    """A probe step with a language model as judge is shared, one without is not."""
    probes = {}
    for recipe in ("quickstart", "quickstart_judge"):
        assert main(["steps", recipe]) == 0
        probes[recipe] = next(line.split("\t")[2] for line in capsys.readouterr().out.splitlines() if line.split("\t")[1] == "probe")
    assert probes == {"quickstart": "one", "quickstart_judge": "many"}
