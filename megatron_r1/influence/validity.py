"""The receipt: take real steps on a few random batches and see whether the scores foretold what they do.

Each step moves the weights along -P g_batch with the *trainer's* P (its second moment and eps, no momentum), by the
same relative length, and the probe loss is measured before and after. Predicted drop = eta * (scores of the batch / its
tokens).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from megatron_r1.influence.config import ValidityConfig
from megatron_r1.influence.finite_difference import FiniteDifference
from megatron_r1.influence.probe_gradient import gradient, row_weights
from megatron_r1.influence.rows import Row, batches, padded_tokens
from megatron_r1.influence.select import Chosen
from megatron_r1.model.precondition import Preconditioner
from megatron_r1.utils.seeding import generator
from megatron_r1.utils.statistics import spearman

CONCENTRATION = 0.3
Batch = list[tuple[str, int]]
"""(source, place of the document among the chosen ones)."""


def draw_batches(config: ValidityConfig, chosen: Mapping[str, Chosen], seed: int) -> list[Batch]:
    """Random batches of scored documents.

    Each draws its own mix of sources (Dirichlet 0.3), so that batches differ in what they teach.
    """
    names = sorted(chosen)
    drawn = []
    for number in range(config.batches):
        draw = generator(seed, "validity", number)
        sources = draw.choice(len(names), size=config.documents, p=draw.dirichlet(np.full(len(names), CONCENTRATION)))
        batch: Batch = []
        for source in np.unique(sources).tolist():
            there = len(chosen[names[source]].index)
            wanted = min(int((sources == source).sum()), there)
            batch += [(names[source], int(place)) for place in draw.choice(there, size=wanted, replace=False)]
        drawn.append(batch)
    return drawn


def batch_rows(batch: Batch, chosen: Mapping[str, Chosen]) -> list[Row]:
    """The rows of a batch's documents."""
    picked = set(batch)
    return [
        row
        for source in sorted({source for source, _ in batch})
        for row in chosen[source].rows
        if (source, row.unit) in picked
    ]


def look_rows(config: ValidityConfig, rows: Sequence[Row]) -> Sequence[Row]:
    """The probe windows to measure on: all, or every k-th (windows stand source by source, so all sources stay in)."""
    return rows[:: -(-len(rows) // config.probe_documents)]


def cost(
    config: ValidityConfig,
    chosen: Mapping[str, Chosen],
    probe: Mapping[str, Sequence[Row]],
    seed: int,
    batch_tokens: int,
) -> int:
    """Token-forwards the receipt takes (a backward counts as two)."""
    look = sum(padded_tokens(look_rows(config, rows), batch_tokens) for rows in probe.values())
    drawn = draw_batches(config, chosen, seed)
    return sum(3 * padded_tokens(batch_rows(batch, chosen), batch_tokens) + look for batch in drawn) + (
        look if drawn else 0
    )


def receipt(
    config: ValidityConfig,
    engine: FiniteDifference,
    trainer: Preconditioner,
    chosen: Mapping[str, Chosen],
    scores: Mapping[str, np.ndarray],
    probe: Mapping[str, Sequence[Row]],
    weighting: str,
    batch_tokens: int,
    device: torch.device,
    seed: int,
    advance: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """Predicted and real drop of every capability's probe loss after each step, and their rank correlation.

    scores: source -> float64 [n, C] raw scores at this checkpoint, capabilities in the order of `probe`.
    """
    seen = {name: look_rows(config, rows) for name, rows in probe.items()}
    looks = {
        name: (batches(rows, batch_tokens, device), np.array(row_weights(rows, weighting)))
        for name, rows in seen.items()
    }

    def probe_losses() -> np.ndarray:
        return np.array([float(engine.row_losses(found, advance) @ weights) for found, weights in looks.values()])

    before = probe_losses()
    predicted, measured = [], []
    for batch in draw_batches(config, chosen, seed):
        rows = batch_rows(batch, chosen)
        taught = sum(row.targets for row in rows)
        found, _ = gradient(
            engine.losses, engine.parameters, rows, [1.0 / taught] * len(rows), batch_tokens, device, advance, engine.space
        )
        direction = trainer(found)
        eta = config.step * engine.weight_norm / engine.space.norm(direction)
        with engine.moved(direction, -eta):
            measured.append(before - probe_losses())
        predicted.append(eta * sum(scores[source][place] for source, place in batch) / taught)
    predicted_cb, measured_cb = np.array(predicted).T, np.array(measured).T  # [C, batches]
    return {
        "batches": config.batches,
        "documents_per_batch": config.documents,
        "relative_step": config.step,
        "probe_windows": {name: len(rows) for name, rows in seen.items()},
        "capabilities": {
            name: {
                "spearman": spearman(p, m),
                "sign_agreement": float((np.sign(p) == np.sign(m)).mean()),
                "predicted": p.tolist(),
                "measured": m.tolist(),
            }
            for name, p, m in zip(probe, predicted_cb, measured_cb)
        },
    }
