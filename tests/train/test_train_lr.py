"""The schedule against its closed form and against what was published."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from train_toys import settings as train_settings

from megatron_r1.config.units import Steps, Tokens
from megatron_r1.train.config import LRConfig
from megatron_r1.train.lr import learning_rate, warmup_steps


def test_published_pretraining():
    """MobileLLM-R1 section 3.2 and Table 2: 500k steps, 2k warm-up, peak 4e-3, linear to 10 %."""
    config = LRConfig(peak=4e-3, schedule="linear", warmup=Steps(2000), final_ratio=0.1)
    rate = lambda step: learning_rate(step, 500_000, 2000, config)  # noqa: E731
    assert rate(0) == pytest.approx(4e-3 / 2000)
    assert rate(999) == pytest.approx(2e-3)
    assert rate(1999) == pytest.approx(4e-3)
    assert rate(2000 + 249_000 - 1) == pytest.approx((4e-3 + 4e-4) / 2)
    assert rate(499_999) == pytest.approx(4e-4)


def test_published_midtraining_goes_to_zero_but_every_step_moves():
    config = LRConfig(peak=3.6e-4, schedule="linear", final_ratio=0.0)
    rates = [learning_rate(step, 50_000, 0, config) for step in (0, 24_999, 49_999)]
    assert rates[0] == pytest.approx(3.6e-4, rel=1e-4)
    assert rates[1] == pytest.approx(1.8e-4, rel=1e-3)
    assert 0 < rates[2] < 1e-8


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["linear", "cosine", "constant", "wsd"]), st.integers(1, 400), st.floats(0, 0.9), st.just(0.0) | st.floats(1e-6, 1), st.floats(0.05, 1.0), st.floats(1e-6, 1.0),
)
def test_shape(schedule, total, warm, ratio, decay, peak):
    config = LRConfig(peak=peak, schedule=schedule, final_ratio=ratio, decay_ratio=decay)
    warmup = int(warm * total)
    rates = [learning_rate(step, total, warmup, config) for step in range(total)]
    assert all(0 < rate <= peak * (1 + 1e-12) for rate in rates)
    assert rates[:warmup] == pytest.approx([peak * (step + 1) / warmup for step in range(warmup)])
    after = rates[warmup:]
    assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(after))
    if schedule != "constant" and ratio > 0:
        assert rates[-1] == pytest.approx(peak * ratio)


def test_cosine_and_wsd_closed_forms():
    cosine = LRConfig(peak=1.0, schedule="cosine", final_ratio=0.2)
    assert learning_rate(54, 100, 10, cosine) == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * 45 / 90)))
    wsd = LRConfig(peak=1.0, schedule="wsd", final_ratio=0.5, decay_ratio=0.2)
    rates = [learning_rate(step, 100, 10, wsd) for step in range(100)]
    assert rates[10:80] == [1.0] * 70
    assert rates[80:] == pytest.approx([1 - 0.5 * k / 20 for k in range(1, 21)])


def test_warmup_in_steps_tokens_and_shares():
    length = {"steps": Steps(3), "tokens": Tokens(384), "share": 0.03}
    found = {name: warmup_steps(train_settings(lr={"peak": 1.0, "warmup": value}), 100) for name, value in length.items()}
    assert found == {"steps": 3, "tokens": 3, "share": 3}
    assert warmup_steps(train_settings(lr={"peak": 1.0, "warmup": Steps(500)}), 100) == 100
