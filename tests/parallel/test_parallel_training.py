"""One process: the whole step against a plain torch loop, and what the layout, device and version checks say."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from scenarios import LEARNING_RATES, MODEL, Run, microbatches

from megatron_r1.model.build import build_model, transformer_config
from megatron_r1.model.forward import logits
from megatron_r1.parallel import context, device, mcore
from megatron_r1.parallel.config import LayoutConfig
from megatron_r1.parallel.mcore import inner_optimizers
from megatron_r1.parallel.optimizer import adam_step, build_optimizer, local_states, set_lr
from megatron_r1.utils.errors import ConfigError, EnvironmentProblem, ParallelError


@pytest.mark.parametrize("layout", [LayoutConfig(), LayoutConfig(distributed_optimizer=True)], ids=["whole", "sharded"])
def test_training_equals_plain_torch(layout: LayoutConfig) -> None:
    """Same losses, norms and weights as AdamW on the mean over all masked tokens of all micro-batches, clipped to 0.5."""
    run = Run(layout)
    (model,) = build_model(MODEL, run.ctx, seed=5)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    gains = [p for p in model.parameters() if p.ndim == 1]
    adam = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}], betas=(0.9, 0.95), eps=1e-8)
    for step in range(4):
        total, count = torch.zeros(()), 0.0
        for batch in microbatches(step):
            z = torch.log_softmax(logits(model, batch["tokens"], batch["segment_ids"]), -1)
            picked = -z.gather(-1, batch["labels"][..., None])[..., 0]
            total, count = total + (picked * batch["loss_mask"]).sum(), count + float(batch["loss_mask"].sum())
        adam.zero_grad()
        (total / count).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for group in adam.param_groups:
            group["lr"] = LEARNING_RATES[step]
        adam.step()
        loss, grad_norm = run.step()
        assert loss == pytest.approx(total.item() / count, abs=1e-5)
        assert grad_norm == pytest.approx(float(norm), rel=1e-5)
        assert grad_norm > 0.5, "clipping must have work to do"
    for ours, theirs in zip(run.chunks[0].parameters(), model.parameters()):
        # Adam divides by the square root of tiny moments: single elements may differ by a fraction of a step (3e-3).
        difference = (ours - theirs).detach().abs()
        assert difference.max() < 3e-4
        assert difference.mean() < 1e-7


def test_validation_does_not_train() -> None:
    run = Run(LayoutConfig())
    before = [p.detach().clone() for p in run.chunks[0].parameters()]
    first = run.validation()
    assert run.validation() == first
    assert run.step()[0] == pytest.approx(first, abs=1e-6)
    untouched = Run(LayoutConfig())
    assert all(torch.equal(a, b) for a, b in zip(before, untouched.chunks[0].parameters()))


def test_learning_rate_and_decay_reach_the_groups() -> None:
    run = Run(LayoutConfig())
    set_lr(run.optimizer, 0.123)
    assert {group["lr"] for group in run.optimizer.param_groups} == {0.123}
    decays = {bool(p.ndim > 1): group["weight_decay"] for group in run.optimizer.param_groups for p in group["params"]}
    assert decays == {True: 0.1, False: 0.0}
    embedding = dict(run.chunks[0].named_parameters())["module.embedding.word_embeddings.weight"]
    assert any(embedding is p for g in run.optimizer.param_groups if g["weight_decay"] for p in g["params"])


def test_clip_zero_means_no_clipping_but_a_norm() -> None:
    run = Run(LayoutConfig())
    run.optimizer = build_optimizer(run.chunks, lr=0.0, clip=0.0, layout=LayoutConfig())
    _, norm = run.step()
    assert norm > 0.5
    # exp_avg after one step is (1 - beta1) * gradient: its norm shows that nothing was scaled down
    moment = torch.sqrt(sum(t["exp_avg"].double().square().sum() for _, _, t in local_states(run.optimizer)))
    assert float(moment) == pytest.approx(0.1 * norm, rel=1e-4)


class FusedAdam(torch.optim.Optimizer):
    """Stands in for the FusedAdam of Transformer Engine and Apex: t belongs to the group, state appears at the first step."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], eps: float, weight_decay: float, adam_w_mode: bool, capturable: bool = False) -> None:
        assert adam_w_mode
        assert not capturable
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update, by the formula."""
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            (b1, b2), t = group["betas"], group["step"]
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state.update(exp_avg=torch.zeros_like(p, dtype=torch.float32), exp_avg_sq=torch.zeros_like(p, dtype=torch.float32))
                state["exp_avg"].lerp_(p.grad.float(), 1 - b1)
                state["exp_avg_sq"].mul_(b2).addcmul_(p.grad.float(), p.grad.float(), value=1 - b2)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.addcdiv_(state["exp_avg"], (state["exp_avg_sq"] / (1 - b2**t)).sqrt() + group["eps"], value=-group["lr"] / (1 - b1**t))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", [LayoutConfig(), LayoutConfig(distributed_optimizer=True)], ids=["whole", "sharded"])
def test_a_fused_adam_of_another_package(layout: LayoutConfig, precision: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is used when megatron-core found it, does the same, and its checkpoints and torch's go on from each other."""
    from megatron.core import optimizer as core
    from megatron.core.optimizer import distrib_optimizer

    torch_run = Run(layout, precision=precision)
    torch_run.save(tmp_path / "torch-0")
    expected = torch_run.steps(2)
    torch_run.save(tmp_path / "torch-2")
    expected += torch_run.steps(2)
    assert isinstance(inner_optimizers(torch_run.optimizer)[0].optimizer, torch.optim.AdamW)
    assert all(group["fused"] for group in inner_optimizers(torch_run.optimizer)[0].optimizer.param_groups)
    monkeypatch.setattr(core, "Adam", FusedAdam)
    monkeypatch.setattr(core, "USING_PYTORCH_OPTIMIZER", False)
    monkeypatch.setattr(distrib_optimizer, "Adam", FusedAdam)
    run = Run(layout, precision=precision)
    assert isinstance(inner_optimizers(run.optimizer)[0].optimizer, FusedAdam)
    run.save(tmp_path / "other-0")  # before the first step
    assert adam_step(run.optimizer) == 0
    found = run.steps(2)
    assert adam_step(run.optimizer) == 2
    run.save(tmp_path / "other-2")
    found += run.steps(2)
    close = {"fp32": (1e-6, 1e-5), "bf16": (1e-3, 1e-2)}[precision]
    for (loss, norm), (loss_torch, norm_torch) in zip(found, expected, strict=True):
        assert loss == pytest.approx(loss_torch, abs=close[0])
        assert norm == pytest.approx(norm_torch, rel=close[1])
    again = Run(layout, precision=precision, seed=6)
    again.load(tmp_path / "other-2")
    assert again.steps(2) == found[2:]
    again.load(tmp_path / "torch-2")
    assert adam_step(again.optimizer) == 2
    for (loss, norm), (loss_torch, norm_torch) in zip(again.steps(2), expected[2:], strict=True):
        assert loss == pytest.approx(loss_torch, abs=close[0])
        assert norm == pytest.approx(norm_torch, rel=close[1])


# ---------------------------------------------------------------- layouts that can not work


def test_world_size_that_does_not_divide() -> None:
    with pytest.raises(ParallelError) as caught:
        LayoutConfig(tensor=2, pipeline=3).data_size(8)
    assert "6" in caught.value.expected
    assert "8 processes" in caught.value.found
    assert "torchrun" in caught.value.fix
    assert LayoutConfig(tensor=2, pipeline=2).data_size(8) == 2
    with pytest.raises(ParallelError, match="1 process"):
        context.initialize(LayoutConfig(tensor=2))


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"sequence_parallel": True}, "tensor >= 2"),
        ({"virtual_pipeline": 2}, "pipeline >= 2"),
    ],
)
def test_layouts_refused_by_name(fields: dict[str, object], word: str) -> None:
    with pytest.raises(ParallelError, match=word):
        LayoutConfig(**fields).check()
    with pytest.raises(ParallelError, match=word):
        context.initialize(LayoutConfig(**fields))


def test_models_that_do_not_fit() -> None:
    for layout, word in (
        (LayoutConfig(pipeline=8), "at least as many layers"),
        (LayoutConfig(pipeline=3), "num_layers divisible"),
        (LayoutConfig(tensor=4), "num_kv_heads divisible"),
    ):
        with pytest.raises(ParallelError, match=word):
            layout.check_model(MODEL)
    with pytest.raises(ParallelError, match="seq_length"):
        LayoutConfig(tensor=2, sequence_parallel=True).check_model(MODEL, seq_length=33)
    with pytest.raises(ParallelError, match="seq_length divisible by 2 x context = 6"):
        LayoutConfig(context=3).check_model(MODEL, seq_length=32)
    # Divisible by both degrees, but not the pieces of one by the other.
    with pytest.raises(ParallelError, match=r"2 x context x tensor \(sequence_parallel\) = 8"):
        LayoutConfig(context=2, tensor=2, sequence_parallel=True).check_model(MODEL, seq_length=36)
    LayoutConfig(context=2, tensor=2, sequence_parallel=True).check_model(MODEL, seq_length=40)


def test_unknown_layout_field() -> None:
    with pytest.raises(ValidationError):
        LayoutConfig(tensors=2)


def test_batched_exchange_under_an_interleaved_pipeline_is_refused() -> None:
    ctx = context.initialize(LayoutConfig())
    core = transformer_config(MODEL, ctx, "fp32")
    core.virtual_pipeline_model_parallel_size = 2
    with pytest.raises(ParallelError, match="wrong losses"):
        mcore.check_p2p(core)
    for name, value in mcore.p2p_settings(2).items():
        setattr(core, name, value)
    mcore.check_p2p(core)


# ---------------------------------------------------------------- device, version


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
@pytest.mark.parametrize("way", ["recipe", "environment"])
def test_a_gpu_asked_for_by_name(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = LayoutConfig(device="gpu") if way == "recipe" else LayoutConfig()
    if way == "environment":
        monkeypatch.setenv(device.DEVICE_VARIABLE, "cuda")
    with pytest.raises(EnvironmentProblem) as caught:
        context.initialize(layout)
    assert "CUDA device" in caught.value.expected
    assert "none" in caught.value.found
    assert "layout.device" in caught.value.fix
    assert device.device("cpu").type == "cpu", "an explicit choice is not overruled by the environment"


def test_unknown_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(device.DEVICE_VARIABLE, "tpu")
    with pytest.raises(ConfigError, match="auto, cpu or gpu"):
        device.device()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the shim is not installed beside a GPU")
def test_the_shim_is_for_megatron_alone() -> None:
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1, device="cuda")
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1).cuda()
    assert torch.zeros(1).type() == "torch.FloatTensor"
    assert not torch.cuda.is_available()
    inside = {"__name__": "megatron.core.pretend", "x": torch.zeros(1)}
    exec("kind, moved = x.type(), x.cuda()", inside)
    assert inside["kind"] == "torch.cuda.FloatTensor"
    assert inside["moved"] is inside["x"]
    from megatron.core.optimizer import clip_grads

    assert clip_grads.torch.zeros(2, device="cuda").device.type == "cpu"
    assert clip_grads.torch.Tensor is torch.Tensor


@pytest.mark.parametrize(("version", "fine"), [("0.16.0", False), ("0.16.1", True), ("0.19.2", True), ("0.20.0", False), (None, False)])
def test_version_range(version: str | None, fine: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(name: str) -> str:
        if name == "megatron-core" and version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version or "1" if name == "megatron-core" else "1"

    monkeypatch.setattr(importlib.metadata, "version", ask)
    if fine:
        assert str(mcore._checked_version()) == version
    else:
        with pytest.raises(EnvironmentProblem) as caught:
            mcore._checked_version()
        assert "0.16.1" in caught.value.expected
        assert "pip install" in caught.value.fix


@pytest.mark.slow
def test_import_is_quiet_and_config_needs_no_torch() -> None:
    code = "import megatron_r1.parallel.config as c, sys; assert 'torch' not in sys.modules; import megatron_r1.model.build"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout == ""


def test_same_layout_keeps_its_groups() -> None:
    first = context.initialize(LayoutConfig(), seed=1)
    a = torch.rand(3)
    again = context.initialize(LayoutConfig(), seed=1)
    assert again is first
    assert torch.equal(torch.rand(3), a), "the seed restarts the generators"
    assert context.initialize(LayoutConfig(overlap=True), seed=1) is not first
    assert (first.rank, first.world_size, first.data_size, first.is_main, first.is_first_stage, first.is_last_stage) == (0, 1, 1, True, True, True)
    for over in ("data", "replicas", "world", "context", "model", "tensor", "pipeline"):
        assert first.all_reduce_sum(torch.tensor([2.0]), over=over) == 2.0
    assert first.broadcast_object({"a": 1}) == {"a": 1}
    first.barrier()
