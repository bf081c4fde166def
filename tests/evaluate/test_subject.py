"""The real subject: its costs are those of the model's own logits, whatever the batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r1.evaluate.subject import CheckpointSubject, batches
from megatron_r1.evaluate.task import continuation_nats
from megatron_r1.model.build import build_model
from megatron_r1.model.config import PRESETS
from megatron_r1.model.forward import logits
from megatron_r1.model.generate import generate
from megatron_r1.parallel.config import LayoutConfig
from megatron_r1.parallel.context import initialize

CONFIG = PRESETS["nano"].replace(vocab_size=96, hidden_size=64, head_dim=32, ffn_size=64, max_positions=64)


@pytest.fixture(scope="module")
def model():
    chunks = build_model(CONFIG, initialize(LayoutConfig(), 0), seed=1)
    with torch.no_grad():
        for parameter in chunks[0].parameters():
            parameter.mul_(8 if parameter.ndim > 1 else 1)
    return [chunks[0].eval()]


def windows(seed, count=9, longest=40):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 96, size=rng.integers(2, longest)).tolist() for _ in range(count)]


@pytest.mark.parametrize("tokens_per_batch", [1, 60, 10_000])
def test_costs_are_those_of_the_logits(model, tokens_per_batch):
    subject = CheckpointSubject(model, batch_size=4, tokens_per_batch=tokens_per_batch)
    asked = windows(0)
    for window, found in zip(asked, subject.token_nats(asked), strict=True):
        with torch.no_grad():
            table = logits(model[0], torch.tensor([window]))[0].double().log_softmax(-1)
        expected = [-float(table[i, window[i + 1]]) for i in range(len(window) - 1)]
        np.testing.assert_allclose(found, expected, atol=2e-5)


def test_continuations_sum_their_own_tokens_only(model):
    subject = CheckpointSubject(model, batch_size=4, tokens_per_batch=100)
    asked = windows(1)
    pairs = [(window[: len(window) // 2], window[len(window) // 2 :]) for window in asked]
    whole = subject.token_nats(asked)
    for (context, continuation), total, nats in zip(pairs, continuation_nats(subject, pairs), whole, strict=True):
        assert total == pytest.approx(nats[len(context) - 1 :].sum(), abs=1e-4)
        assert len(nats[len(context) - 1 :]) == len(continuation)


def test_generation(model):
    subject = CheckpointSubject(model, batch_size=3, tokens_per_batch=100)
    asked = windows(2)
    assert subject.generate(asked, 5, []) == generate(model, asked, 5)
    assert subject.generate(asked, 5, list(range(96))) == [[]] * len(asked)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 200))
def test_batches_hold_everything_once_and_stay_small(lengths, limit):
    found = list(batches(lengths, limit))
    assert sorted(index for batch in found for index in batch) == list(range(len(lengths)))
    for batch in found:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= limit
