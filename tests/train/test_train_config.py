"""Settings: published recipes can be said, contradictions cannot."""

import subprocess
import sys

import pytest
from pydantic import ValidationError
from train_toys import settings

from megatron_r1.config.units import Epochs, Steps, Tokens
from megatron_r1.train.callbacks.checkpoint import even_steps
from megatron_r1.train.config import TrainConfig, describe

PRETRAIN = {
    "inputs": {"shards": "corpus", "mixture": "mix"}, "model": "mobilellm_r1_950m", "budget": "500k steps", "global_batch": "4194304 tokens", "micro_batch": 16,
    "seq_length": "2048 tokens", "lr": {"peak": 4e-3, "warmup": "2k steps", "final_ratio": 0.1}, "precision": "bf16", "reset_documents": False,
}
SFT = {
    "inputs": {"shards": "tulu", "checkpoint": "midtrain2"}, "objective": "sft", "budget": "2 epochs", "global_batch": "2097152 tokens", "micro_batch": "4 samples",
    "seq_length": "4096 tokens", "lr": {"peak": 5e-6, "warmup": 0.03}, "optimizer": {"beta2": 0.999, "weight_decay": 0}, "sft": {"mask": "all"},
}
GRPO = {"objective": "grpo", "grpo": {"generations": 2, "max_new_tokens": 8}, "global_batch": "512 tokens", "seq_length": "32 tokens"}


def test_published_pretraining_and_sft():
    pretrain, sft = TrainConfig.model_validate(PRETRAIN), TrainConfig.model_validate(SFT)
    assert (pretrain.sequences_per_step, pretrain.steps()) == (2048, 500_000)
    assert pretrain.steps() * int(pretrain.global_batch) == 2_097_152_000_000
    assert sft.sequences_per_step == 512
    assert sft.steps() is None
    # 866k conversations unpacked, 2 epochs, 512 sequences a step: about 3.4k steps (recipe of the paper's Table 2).
    assert sft.steps(866_000) == 3383
    assert sft.in_steps(sft.lr.warmup, 3383) == 102
    assert TrainConfig.model_validate(pretrain.plain()) == pretrain
    assert TrainConfig.model_validate(sft.plain()) == sft
    assert "950M parameters" in describe(pretrain)
    assert "2.1T tokens" in describe(pretrain)
    assert "from midtrain2, 2 epochs" in describe(sft)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": 500}, "write the unit"),
        ({**GRPO, "global_batch": "480 tokens"}, r"multiple of grpo.generations; found 15 sequences and 2; use 64 tokens for every question"),
        ({**GRPO, "grpo": {"generations": 2, "max_new_tokens": 32}}, "seq_length above grpo.max_new_tokens"),
        *(({**GRPO, "layout": {name: 2}}, f"expected {name}: 1 with objective grpo") for name in ("tensor", "pipeline", "context")),
        ({**GRPO, "grpo": {"kl_weight": 0.1, "max_new_tokens": 8, "generations": 2}}, "with grpo.kl_weight, and only then; found objective grpo without it"),
        ({**GRPO, "inputs": {"shards": "corpus", "reference": "sft"}}, "only then; found objective grpo with it"),
        ({**GRPO, "schedule": [{"start": "1k tokens", "sources": "natural"}]}, "neither schedule nor max_epochs with objective grpo"),
        ({"global_batch": "100 tokens"}, "multiple of seq_length"),
        ({"model": None}, "found neither"),
        ({"inputs": {"shards": "a", "checkpoint": "b"}}, "found both"),
        ({"sources": None}, "sources: natural"),
        ({"sources": {"a": 0.0}}, "sum above 0"),
        ({"inputs": {"shards": "a", "mixture": "m"}}, "keep one"),
        ({"objective": "distill"}, "exactly one"),
        ({"inputs": {"shards": "a", "teacher": "t"}}, "set objective: distill"),
        ({"objective": "distill", "distill": {"teacher": {}}}, "neither"),
        ({"budget": "0 steps"}, "above zero"),
        ({"lr": {"peak": 1.0, "warmup": 2000}}, "write the unit"),
        ({"learning_rate": 1.0}, "Extra inputs"),
        ({"sources": {"a": float("nan"), "b": 1.0}}, "finite number"),
        ({"schedule": [{"start": "1k tokens", "sources": {"a": float("inf")}}]}, "finite number"),
        ({"schedule": [{"start": "1k tokens", "sources": {"a": 0.0}}]}, "sum above 0"),
        ({"schedule": [{"start": "1k tokens", "sources": "natural", "over": "1k tokens"}, {"start": "1500 tokens", "sources": "uniform"}]}, "after 1000 \\+ 1000 tokens"),
        ({"schedule": [{"start": "1k tokens", "sources": "natural"}], "objective": "sft"}, "neither schedule nor max_epochs"),
        ({"max_epochs": 0.0}, "greater than 0"),
        ({"precision": "fp8", "objective": "grpo"}, "precision fp32 or bf16 with objective grpo"),
        ({"precision": "fp4"}, "'fp32', 'bf16' or 'fp8'"),
        ({"precision": "fp8", "inputs": {"shards": "a", "probe": "p"}, "scores": {}}, "precision fp32 or bf16 with scores"),
        ({"layout": {"context": 2}, "inputs": {"shards": "a", "mixture": "m", "probe": "p"}, "scores": {}}, "context: 1 with scores"),
    ],
)
def test_contradictions_are_refused(change, message):
    with pytest.raises(ValidationError, match=message):
        settings(**change)


def test_budgets_and_spans():
    config = settings(budget=Tokens(1000))
    assert config.steps() == 8  # 128 tokens a step: the smallest number that reaches the budget
    assert settings(budget=Epochs(1.5)).steps(10) == 4
    assert config.in_steps(Tokens(640), 100) == 5
    assert config.in_steps(Steps(7), 100) == 7
    assert even_steps(10, 4) == [2, 5, 8, 10]
    assert even_steps(3, 10) == [1, 2, 3]
    assert even_steps(9, 0) == []


def test_settings_need_no_torch():
    code = "import sys, megatron_r1.train.config, megatron_r1.artifacts.checkpoint; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
