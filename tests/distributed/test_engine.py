"""precision: fp8 without a GPU: the wiring by a stand-in for Transformer Engine under megatron-core's own wrappers, and what is refused."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import launch
from scenarios import MODEL, Run

from megatron_r1.model.config import PRESETS
from megatron_r1.parallel import device
from megatron_r1.parallel.config import LayoutConfig
from megatron_r1.utils.errors import EnvironmentProblem, ParallelError

WORKER = Path(__file__).with_name("engine_worker.py")


@pytest.mark.parametrize("layout", [{}, {"tensor": 2, "sequence_parallel": True}], ids=["one process", "tensor and sequence parallel"])
def test_the_layers_are_ours_with_other_linears(layout: dict[str, Any], tmp_path: Path) -> None:
    """Same weights, names, places in checkpoints, gradients and updates; all products of the layers in FP8, by scales that leave no state; a
    checkpoint of either goes on in the other, to the same bits."""
    for found in launch(WORKER, layout.get("tensor", 1), tmp_path, {"layout": layout}):
        assert found.pop("classes") == ["TEColumnParallelLinear", "TERowParallelLinear"] * 2
        assert found.pop("recipe") == ["Float8CurrentScaling hybrid None"]
        assert "compute capability 8.9" in (said := found.pop("on a CPU"))
        assert "precision: bf16" in said
        assert "found: 2.2.0" in (said := found.pop("too old"))
        assert "pip install" in said
        assert "linear_qkv.weight" in found.pop("not heard")
        assert found == dict.fromkeys(["built equal", "keys equal", "steps equal", "calls", "ours to fp8", "fp8 to ours", "recomputed"], True)


def test_fp8_needs_the_package_and_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EnvironmentProblem, match="found: a CPU"):
        Run(LayoutConfig(), precision="fp8")
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda target: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda target: (8, 0))
    with pytest.raises(EnvironmentProblem, match=r"A100-SXM4-80GB with 8\.0"):
        device.require_fp8(gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda target: (8, 9))
    device.require_fp8(gpu)
    monkeypatch.setattr(device, "require_fp8", lambda target: None)
    with pytest.raises(EnvironmentProblem, match="transformer-engine") as refusal:
        Run(LayoutConfig(), precision="fp8")
    assert "precision: bf16" in str(refusal.value)


def test_shapes_that_fp8_does_not_take() -> None:
    """Every size of a product, in each process, is a multiple of 16."""
    for size, degrees in {"140m": (1,), "360m": (1, 2, 4), "950m": (1, 2, 3, 6)}.items():
        model = PRESETS[f"mobilellm_r1_{size}"]
        for degree in degrees:
            LayoutConfig(tensor=degree).check_model(model, 2048)
            LayoutConfig(tensor=degree).check_fp8(model, 2048)
    LayoutConfig(tensor=2, sequence_parallel=True).check_fp8(MODEL, 64)
    shape = {"hidden_size": 128, "query_size": 128, "kv_size": 64, "ffn_size": 192}
    for layout, changes, tokens, name in [
        ({}, {"ffn_size": 200}, 64, "ffn_size"), ({"tensor": 2}, {"ffn_size": 208}, 64, "ffn_size"), ({}, {"hidden_size": 136}, 64, "hidden_size"),
        ({}, {"kv_size": 4}, 64, "query, key and value"), ({"tensor": 2}, {"query_size": 144, "kv_size": 8}, 64, "attention's output"), ({}, {}, 40, "micro_batch x seq_length"),
        ({"context": 2}, {}, 48, "micro_batch x seq_length"), ({"tensor": 2, "sequence_parallel": True}, {}, 48, "micro_batch x seq_length"),
    ]:  # fmt: skip
        with pytest.raises(ParallelError, match=name):
            LayoutConfig(**layout).check_fp8(types.SimpleNamespace(**{**shape, **changes}), tokens)
