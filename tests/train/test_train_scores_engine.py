"""Scores taken from training steps against the ghost engine's, and training against itself without them; one process."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scored_steps import DIRECTIONS, MODEL, SOURCES, batches, built, factored, product, rows_of, stepped, units_of

from megatron_r1.influence.ghost import Ghost
from megatron_r1.influence.rows import packed
from megatron_r1.model.scores_in_training import ScoresInTraining
from megatron_r1.ops.low_rank import Factors, factor
from megatron_r1.parallel.config import LayoutConfig
from megatron_r1.parallel.context import initialize
from megatron_r1.parallel.ddp import unwrap
from megatron_r1.parallel.schedule import forward_backward
from megatron_r1.train.objectives import Objective
from megatron_r1.train.scores import ScoredNextToken
from megatron_r1.utils.errors import CheckpointError

CPU = torch.device("cpu")
CASES = {
    "whole": {"rank": None}, "whole, untied": {"rank": None, "tied": False}, "whole, recomputed": {"rank": None, "recompute": True},
    "whole, one row": {"rank": None, "micro_batch": 1}, "whole, rows as units": {"rank": None, "apart": False},
    "rank 4": {"rank": 4}, "rank 4, untied": {"rank": 4, "tied": False}, "rank 4, recomputed": {"rank": 4, "recompute": True},
    "rank 4, rows as units": {"rank": 4, "apart": False},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_equal_to_the_ghost_engine_and_gradients_as_without(case: str) -> None:
    """The factored direction is a direction: along L R^T the ghost engine has the very same scores."""
    options = {"rank": None, "tied": True, "recompute": False, "micro_batch": 2, "apart": True} | CASES[case]
    ctx = initialize(LayoutConfig(), 0)
    chunks, _ = built(ctx, MODEL.replace(tied_embeddings=options["tied"]), LayoutConfig(), options["recompute"], "fp32")
    model = unwrap(chunks[0]).train()
    draw = torch.Generator().manual_seed(1)
    directions = [{name: torch.randn(p.shape, generator=draw) for name, p in model.named_parameters()} for _ in range(DIRECTIONS)]
    lines = factored(directions, options["rank"])
    found, grads = [], []
    every = batches(options["micro_batch"], 3, options["apart"])
    for scored in (True, False):
        engine = ScoresInTraining(chunks, ctx, full=options["rank"] is None)
        objective = ScoredNextToken(SOURCES, CPU, engine, DIRECTIONS) if scored else Objective(SOURCES, CPU)
        engine.aim(lines, DIRECTIONS)
        with engine.attached():
            forward_backward(ctx, chunks, objective.forward_step, iter(every), 3, 24, options["micro_batch"])
            found.append(objective.take(5, 4) if scored else None)
        grads.append({name: p.main_grad.clone() for name, p in model.named_parameters()})
    for name, gradient in grads[0].items():
        if options["rank"] is None:
            torch.testing.assert_close(gradient, grads[1][name], rtol=1e-5, atol=1e-6 * float(grads[1][name].abs().max()))
        else:
            assert torch.equal(gradient, grads[1][name])
    assert all(p.requires_grad for p in model.parameters())
    assert not [hook for module in model.modules() for hook in (*module._forward_hooks, *module._forward_pre_hooks)]
    rows = [row for batch in every for row in rows_of(batch)]
    along = [{name: product(line, k) for name, line in lines.items()} for k in range(DIRECTIONS)]
    expected = Ghost([model.eval()], ctx).scores(along, packed(rows, 96, CPU))
    table = found[0]
    assert [tuple(row) for row in table[["step", "probe_step"]]] == [(5, 4)] * len(rows)
    assert table["tokens"].tolist() == [row.targets for row in rows]
    assert np.linalg.norm(table["scores"] - expected) <= 2e-6 * np.linalg.norm(expected)


def test_numbers_of_units() -> None:
    batch = {"segment_ids": np.array([[0, 0, 1, 2, 2], [0, 1, 1, 1, 1]]), "loss_mask": np.array([[1, 0, 0, 1, 1], [0, 1, 1, 1, 1]])}
    units = units_of(batch)
    assert units.borders.tolist() == [0, 2, 3, 5, 6, 10]
    assert (units.row.tolist(), units.place.tolist(), units.tokens.tolist()) == ([0, 0, 0, 1, 1], [0, 1, 2, 0, 1], [1, 0, 2, 0, 4])


def test_training_is_left_alone() -> None:
    """Low rank: the same bytes after some steps. Whole: another order of the same sums."""
    plain, low, whole = (stepped(LayoutConfig(), scored=scored, rank=rank) for scored, rank in ((False, None), (True, 4), (True, None)))
    assert (low["losses"], low["bytes"]) == (plain["losses"], plain["bytes"])
    assert len(low["scores"]) == len(whole["scores"]) > 20
    assert whole["losses"] == pytest.approx(plain["losses"], rel=1e-6)
    assert whole["weights"] == pytest.approx(plain["weights"], rel=1e-6)


def test_half_precision() -> None:
    """bf16 weights: scores as exact as bf16 gradients are, training as without."""
    exact, half, plain = (stepped(LayoutConfig(), precision=p, scored=s, rank=r) for p, s, r in (("fp32", True, None), ("bf16", True, None), ("bf16", False, None)))
    low = stepped(LayoutConfig(), precision="bf16", rank=10**6)
    names = sorted(exact["scores"])
    a, b, c = (np.array([run["scores"][name] for name in names]) for run in (exact, half, low))
    for other in (b, c):
        assert all(np.corrcoef(a[:, k], other[:, k])[0, 1] >= 0.999 for k in range(DIRECTIONS))
    assert half["weights"] == pytest.approx(plain["weights"], rel=1e-3)
    assert low["bytes"] == plain["bytes"]


def test_factors() -> None:
    draw = torch.Generator().manual_seed(3)
    exact = torch.randn(60, 5, generator=draw) @ torch.randn(5, 40, generator=draw)
    noisy = exact + 0.1 * torch.randn(60, 40, generator=draw)
    for matrix in (noisy, noisy.t().contiguous()):
        values = torch.linalg.svdvals(matrix.double())
        for rank in (1, 5, 12):
            left, right, lost = factor(matrix, rank)
            assert (left.shape, right.shape) == ((matrix.shape[0], rank), (matrix.shape[1], rank))
            assert lost == pytest.approx(float(torch.linalg.vector_norm(matrix - left @ right.t())), rel=1e-5)
            best = float(values[rank:].square().sum().sqrt())
            assert best * (1 - 1e-5) <= lost <= 1.02 * best
    left, right, lost = factor(exact, 5)
    assert lost <= 1e-5 * float(torch.linalg.vector_norm(exact))
    for rank in (40, 10**6):
        left, right, lost = factor(noisy, rank)
        assert lost == 0.0
        assert torch.equal(left @ right.t(), noisy)
    assert factor(torch.zeros(20, 30), 4)[2] == 0.0
    before = torch.get_rng_state()
    factor(noisy, 3)
    assert torch.equal(before, torch.get_rng_state())


def test_the_error_of_a_score_is_within_its_bound() -> None:
    """|s - s_r| <= |g|_F |G - L R^T|_F, and not by a factor of a thousand."""
    draw = torch.Generator().manual_seed(5)
    a, b, g = torch.randn(30, 48, generator=draw), torch.randn(30, 56, generator=draw), torch.randn(56, 48, generator=draw)
    left, right, lost = factor(g, 8)
    exact = float(((b.t() @ a) * g).sum())
    found = float(Factors(left, right, 1).scores(a, b).double().sum())
    bound = float(torch.linalg.vector_norm(b.t() @ a)) * lost
    assert bound * 1e-3 < abs(found - exact) <= bound


def test_a_direction_without_a_parameter_is_refused() -> None:
    ctx = initialize(LayoutConfig(), 0)
    chunks, _ = built(ctx, MODEL, LayoutConfig(), False, "fp32")
    lines = factored([{name: torch.randn(p.shape) for name, p in unwrap(chunks[0]).named_parameters()}], 2)
    lines.pop("decoder.final_layernorm.weight")
    with pytest.raises(CheckpointError, match=r"none for 1, such as decoder.final_layernorm.weight"):
        ScoresInTraining(chunks, ctx, full=False).aim(lines, 1)
