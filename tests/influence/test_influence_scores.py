"""The score is what it says: per-sample float64 autograd on the real model is the oracle."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_r1.influence.finite_difference import FiniteDifference, sum_by_unit
from megatron_r1.influence.groups import energy_shares
from megatron_r1.influence.probe_gradient import probe_gradients
from megatron_r1.influence.rows import Row, batches, collate, padded_tokens, plan
from megatron_r1.model.build import R1Model, build_model
from megatron_r1.model.config import PRESETS
from megatron_r1.model.forward import token_losses
from megatron_r1.model.precondition import Adam, Identity, Preconditioner
from megatron_r1.parallel.config import LayoutConfig
from megatron_r1.parallel.context import initialize
from megatron_r1.utils.errors import CheckpointError, DataError
from megatron_r1.utils.statistics import spearman

CPU = torch.device("cpu")
BATCH = 512


def random_rows(seed: int, count: int) -> list[Row]:
    draw = np.random.default_rng(seed)
    return [Row(i, draw.integers(0, 512, int(draw.integers(8, 40)))) for i in range(count)]


@pytest.fixture(scope="module")
def model() -> R1Model:
    """The nano preset: tied embedding, grouped queries, QK-norm."""
    return build_model(PRESETS["nano"], initialize(LayoutConfig(), 0), seed=0)[0]


@pytest.fixture(scope="module")
def exact() -> R1Model:
    """The same weights in float64."""
    return build_model(PRESETS["nano"], initialize(LayoutConfig(), 0), seed=0)[0].double()


def weights_of(model: R1Model) -> dict[str, Tensor]:
    return dict(model.named_parameters())


def engine_of(model: R1Model) -> FiniteDifference:
    return FiniteDifference(lambda batch: token_losses(model, batch), weights_of(model), 3e-4)


def probe_direction(model: R1Model, rows: list[Row], precondition: Preconditioner) -> dict[str, Tensor]:
    (found,) = probe_gradients(lambda b: token_losses(model, b), weights_of(model), rows, 1, "documents", BATCH, CPU)
    return precondition(found.gradient)


def exact_gradient(model: R1Model, rows: list[Row], mean_of_documents: bool) -> dict[str, Tensor]:
    """Written out by hand: one backward per row, no batching, no masks."""
    total = {name: torch.zeros_like(p) for name, p in weights_of(model).items()}
    for row in rows:
        losses = token_losses(
            model, {"tokens": torch.as_tensor(row.tokens[None, :-1]), "labels": torch.as_tensor(row.tokens[None, 1:])}
        )
        loss = losses.double().mean() / len(rows) if mean_of_documents else losses.double().sum()
        for name, part in zip(total, torch.autograd.grad(loss, list(weights_of(model).values()))):
            total[name] += part
    return total


def exact_scores(model: R1Model, rows: list[Row], direction: Mapping[str, Tensor]) -> np.ndarray:
    scores = []
    for row in rows:
        found = exact_gradient(model, [row], mean_of_documents=False)
        scores.append(sum(float((found[name] * direction[name].double()).sum()) for name in found))
    return np.array(scores)


def fake_moment(model: R1Model) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return {name: 1e-6 * torch.rand(p.shape, generator=draw) for name, p in weights_of(model).items()}


@pytest.mark.parametrize("preconditioner", ["none", "adam"])
def test_finite_differences_equal_per_sample_autograd(model: R1Model, exact: R1Model, preconditioner: str) -> None:
    rows, probe = random_rows(1, 32), random_rows(2, 8)
    moment = fake_moment(model)
    precondition = Identity() if preconditioner == "none" else Adam(moment, step=20, beta2=0.95, eps=1e-8)
    scores = engine_of(model).scores(probe_direction(model, probe, precondition), batches(rows, BATCH, CPU))

    direction = exact_gradient(exact, probe, mean_of_documents=True)
    if preconditioner == "adam":
        correction = 1 - 0.95**20
        direction = {
            name: part / ((moment[name].double() / correction).sqrt() + 1e-8) for name, part in direction.items()
        }
    expected = exact_scores(exact, rows, direction)
    assert np.linalg.norm(scores - expected) / np.linalg.norm(expected) <= 1e-3
    assert spearman(scores, expected) >= 0.999


@pytest.mark.parametrize(
    "group", ["embedding.word_embeddings", "layernorm", "linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
)
def test_every_kind_of_parameter_counts(model: R1Model, exact: R1Model, group: str) -> None:
    """The derivative along one group alone, the tied embedding (input and output use together) included."""
    rows, probe = random_rows(3, 12), random_rows(4, 4)
    part = {n: p if group in n else torch.zeros_like(p) for n, p in probe_direction(model, probe, Identity()).items()}
    assert sum(bool(p.any()) for p in part.values()) >= 1
    scores = engine_of(model).scores(part, batches(rows, BATCH, CPU))
    expected = exact_scores(exact, rows, part)
    assert np.linalg.norm(scores - expected) / np.linalg.norm(expected) <= 2e-3


def test_a_row_of_the_probe_itself_has_the_top_influence(model: R1Model) -> None:
    """Sign: training on the probe is the best one can do for it, so its scores are positive and largest."""
    probe = [Row(i, row.tokens) for i, row in enumerate(random_rows(5, 4))]
    others = random_rows(6, 30)
    direction = probe_direction(model, probe, Identity())
    engine = engine_of(model)
    own = engine.scores(direction, batches(probe, BATCH, CPU)) / [row.targets for row in probe]
    other = engine.scores(direction, batches(others, BATCH, CPU)) / [row.targets for row in others]
    assert own.min() > 0
    assert own.mean() > other.max()


def test_a_real_step_does_what_the_sign_says(model: R1Model) -> None:
    """One small gradient step on a document lowers the probe loss exactly when its score is positive."""
    probe, rows = random_rows(7, 4), random_rows(8, 20)
    engine = engine_of(model)
    scores = engine.scores(probe_direction(model, probe, Identity()), batches(rows, BATCH, CPU))
    look = batches(probe, BATCH, CPU)
    share = np.array([1.0 / (len(probe) * row.targets) for row in probe])
    before = engine.row_losses(look) @ share
    drops = []
    for row in rows:
        found = exact_gradient(model, [row], mean_of_documents=False)
        with engine.moved(found, -1e-4):
            drops.append(before - engine.row_losses(look) @ share)
    clear = np.abs(scores) > np.quantile(np.abs(scores), 0.25)
    assert (np.sign(scores) == np.sign(drops))[clear].all()
    assert spearman(scores, np.array(drops)) > 0.98


def test_weights_come_back_bit_for_bit(model: R1Model) -> None:
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    engine = engine_of(model)
    direction = probe_direction(model, random_rows(9, 2), Identity())
    engine.scores(direction, batches(random_rows(10, 4), BATCH, CPU))
    gain = model.decoder.final_layernorm.weight

    def interrupted() -> None:
        with engine.moved(direction, 0.3):
            assert not torch.equal(before["decoder.final_layernorm.weight"], gain)
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        interrupted()
    assert all(
        torch.equal(before[name].view(torch.int32), p.detach().view(torch.int32))
        for name, p in model.named_parameters()
    )
    engine.verify_restored()


def test_verify_restored_sees_a_changed_bit(model: R1Model) -> None:
    engine = engine_of(model)
    gain = model.decoder.final_layernorm.weight
    with torch.no_grad():
        gain[3] = torch.nextafter(gain[3], torch.tensor(2.0))
    with pytest.raises(Exception, match="restored bit for bit"):
        engine.verify_restored()
    engine.restore()
    engine.verify_restored()


def test_padding_and_company_change_nothing(model: R1Model) -> None:
    """A document scored alone equals the document scored among longer ones."""
    rows, direction = random_rows(11, 12), probe_direction(model, random_rows(12, 3), Identity())
    engine = engine_of(model)
    together = engine.scores(direction, batches(rows, 4096, CPU))
    alone = np.array([engine.scores(direction, batches([row], BATCH, CPU))[0] for row in rows])
    assert together == pytest.approx(alone, rel=2e-2, abs=2e-3 * np.abs(alone).max())


def test_truncation_estimate_is_the_error(model: R1Model, exact: R1Model) -> None:
    rows, direction = random_rows(13, 12), probe_direction(model, random_rows(14, 3), Identity())
    engine = FiniteDifference(lambda b: token_losses(model, b), weights_of(model), 1.5e-3)
    packed = batches(rows, BATCH, CPU)
    expected = exact_scores(exact, rows, direction)
    error = np.linalg.norm(engine.scores(direction, packed) - expected) / np.linalg.norm(expected)
    assert engine.truncation(direction, packed) == pytest.approx(error, rel=0.3)
    extrapolated = engine.extrapolated(direction, packed)
    assert np.linalg.norm(extrapolated - expected) / np.linalg.norm(expected) < error / 5


def test_folds_add_up_to_the_whole(model: R1Model) -> None:
    losses = lambda b: token_losses(model, b)  # noqa: E731
    probe = random_rows(15, 9)
    for weighting in ("documents", "tokens"):
        (whole,) = probe_gradients(losses, weights_of(model), probe, 1, weighting, BATCH, CPU)
        parts = probe_gradients(losses, weights_of(model), probe, 3, weighting, BATCH, CPU)
        assert sum(part.weight for part in parts) == pytest.approx(1.0)
        assert sum(part.weight * part.loss for part in parts) == pytest.approx(whole.loss, rel=1e-5)
        for name, gradient in whole.gradient.items():
            joined = sum(part.weight * part.gradient[name] for part in parts)
            assert torch.allclose(joined, gradient, atol=1e-6)


def test_bf16_weights_are_refused(model: R1Model) -> None:
    half = {name: p.detach().bfloat16() for name, p in model.named_parameters()}
    with pytest.raises(CheckpointError, match=r"fp32 weights[\s\S]*bfloat16[\s\S]*master weights"):
        FiniteDifference(lambda b: token_losses(model, b), half, 3e-4)


def test_a_zero_probe_gradient_is_refused(model: R1Model) -> None:
    def flat(batch: dict[str, Tensor]) -> Tensor:
        return 0.0 * sum(p.sum() for p in model.parameters()) + torch.zeros(batch["tokens"].shape)

    with pytest.raises(DataError, match="probe gradient that is not zero"):
        probe_gradients(flat, weights_of(model), random_rows(0, 3), 1, "documents", BATCH, CPU)


@pytest.mark.parametrize(
    ("step", "value", "message"),
    [(0, 1e-6, "step 0"), (5, -1e-6, "negative"), (5, float("nan"), "negative or not-a-number")],
)
def test_a_damaged_second_moment_is_refused(step: int, value: float, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        Adam({"w": torch.full((2,), value)}, step, 0.95, 1e-8)


def test_a_missing_second_moment_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"none for 1, such as other[\s\S]*preconditioner: none"):
        Adam({"w": torch.ones(2)}, 5, 0.95, 1e-8)({"w": torch.ones(2), "other": torch.ones(2)})


def test_rows_are_planned_whole_and_within_the_batch() -> None:
    rows = random_rows(20, 50)
    groups = plan(rows, 200)
    assert sorted(i for group in groups for i in group) == list(range(50))
    assert all(len(group) * max(rows[i].targets for i in group) <= 200 for group in groups)
    assert padded_tokens(rows, 200) == sum(batch.padded_tokens for batch in batches(rows, 200, CPU))


def test_rows_are_collated_by_hand() -> None:
    batch = collate([Row(0, np.array([5, 6, 7])), Row(1, np.array([8, 9]))], CPU)
    assert batch["tokens"].tolist() == [[5, 6], [8, 0]]
    assert batch["labels"].tolist() == [[6, 7], [9, 0]]
    assert batch["loss_mask"].tolist() == [[1, 1], [1, 0]]


def test_rows_of_one_document_are_summed() -> None:
    rows = [Row(0, np.zeros(3)), Row(2, np.zeros(3)), Row(0, np.zeros(3))]
    assert sum_by_unit(np.array([1.0, 2.0, 4.0]), rows, 3).tolist() == [5.0, 0.0, 2.0]


def test_energy_shares_by_hand() -> None:
    gradient = {
        "embedding.word_embeddings.weight": torch.tensor([2.0]),
        "decoder.layers.0.pre_mlp_layernorm.weight": torch.tensor([1.0]),
        "decoder.layers.0.mlp.linear_fc1.weight": torch.tensor([1.0]),
    }
    assert energy_shares(gradient, gradient) == pytest.approx({"embedding": 4 / 6, "norm": 1 / 6, "ffn": 1 / 6})
