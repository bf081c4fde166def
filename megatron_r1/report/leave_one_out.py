"""Leave-one-out truth against predicted influence (arXiv 2509.24945 v1, Eq. 1).

Made in the report and not in a stage of its own: it reads finished trainings and computes no new fact about the model, as all
other comparisons of trainings here.

    truth[j, c]     = probe loss of c after training without source j - probe loss after training with it; positive: j helps
    predicted[j, c] = w_j * (rho[j, c] - rho[-j, c]),  rho[-j, c] = sum over k != j of w_k rho[k, c] / (1 - w_j)

The prediction is the first-order change of the loss when j's share w_j goes to the others in proportion, which is what the
truth does; rho is the influence's benefit per token at the checkpoint the trainings start from. Its unit is that of the
influence table, so ranks are compared, not sizes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from megatron_r1.report.records import Influence, MixtureView, Run, Trained
from megatron_r1.report.settings import differences, same_model
from megatron_r1.utils.seeding import generator
from megatron_r1.utils.statistics import interval, spearman

REPLICATES, CONFIDENCE = 2000, 0.95
JOINT, ALL = "joint", "mean of capabilities"
Values = dict[str, dict[str, float]]
"""source -> capability -> number."""


@dataclass(frozen=True)
class Rank:
    """Agreement of truth and prediction over sources, with a bootstrap interval over the sources."""

    capability: str
    spearman: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Prediction:
    """What one influence table foretells."""

    influence: str
    preconditioner: str
    values: Values
    ranks: tuple[Rank, ...]


@dataclass(frozen=True)
class LeaveOneOut:
    """One analysis: trainings without one source each, and the one with all. Capabilities end with the mean over them."""

    full: Trained
    left_out: Mapping[str, Trained]
    capabilities: tuple[str, ...]
    truth: Values
    predictions: tuple[Prediction, ...]


def analyses(run: Run) -> tuple[LeaveOneOut, ...]:
    """Every analysis the run holds: two sources or more left out of one mixture, and a training on that mixture."""
    found: list[LeaveOneOut] = []
    plain_first = sorted(run.trained, key=lambda t: (m := run.mixture(t.mixture)) is None or m.method not in ("uniform", "natural"))
    for full in plain_first:
        mixture = run.mixture(full.mixture)
        if mixture is None or mixture.without is not None:
            continue
        left_out = {m.without: t for t in run.trained if (m := run.mixture(t.mixture)) is not None and _leaves_one_out(run, t, m, full, mixture)}
        known = any({t.step for t in left_out.values()} == {t.step for t in other.left_out.values()} for other in found)
        if len(left_out) >= 2 and not known:  # two mixtures of equal weights are one control
            found.append(_analysis(run, full, mixture, {str(source): trained for source, trained in left_out.items()}))
    return tuple(found)


def _leaves_one_out(run: Run, trained: Trained, mixture: MixtureView, full: Trained, whole: MixtureView) -> bool:
    """Whether a training differs from `full` in nothing but one source of its mixture."""
    if mixture.without is None or mixture.base is None or mixture.capped:
        return False
    same = all(math.isclose(mixture.base.get(name, 0.0), weight, abs_tol=1e-9) for name, weight in whole.weights.items())
    start = trained.start == full.start and trained.teacher == full.teacher and same_model(run, trained, full)
    return same and start and trained.tokens == full.tokens and not differences(run, trained, full)


def _analysis(run: Run, full: Trained, mixture: MixtureView, left_out: dict[str, Trained]) -> LeaveOneOut:
    capabilities = tuple(c for c in full.capabilities if all(c in trained.capabilities for trained in left_out.values()))
    last = {c: full.probe_curve(c)[-1][1] for c in capabilities}
    truth = {source: _with_joint({c: trained.probe_curve(c)[-1][1] - last[c] for c in capabilities}) for source, trained in left_out.items()}
    tables = [i for i in run.influences if i.model is not None and i.model == full.start and set(capabilities) <= set(i.capabilities)]
    predictions = [p for table in tables if (p := _prediction(table, mixture, truth, capabilities)) is not None]
    return LeaveOneOut(full, left_out, (*capabilities, JOINT), truth, tuple(predictions))


def _with_joint(values: dict[str, float]) -> dict[str, float]:
    return {**values, JOINT: float(np.mean(list(values.values()))) if values else math.nan}


def _prediction(table: Influence, mixture: MixtureView, truth: Values, capabilities: tuple[str, ...]) -> Prediction | None:
    """None when the table does not cover every source of the mixture."""
    weights = {name: weight for name, weight in mixture.weights.items() if weight > 0}
    if not set(weights) <= set(table.cells) or not capabilities:
        return None
    values = {source: _with_joint({c: foretold(source, weights, {k: table.cells[k][c].mean for k in weights}) for c in capabilities}) for source in truth}
    return Prediction(table.step, table.preconditioner, values, ranks(truth, values, capabilities))


def foretold(source: str, weights: Mapping[str, float], rho: Mapping[str, float]) -> float:
    """First-order rise of the loss when `source` is left out and the others keep their proportions."""
    share = weights.get(source, 0.0)
    rest = math.fsum(weight * rho[name] for name, weight in weights.items() if name != source)
    return share * (rho.get(source, 0.0) - rest / (1 - share)) if share < 1 else math.nan


def ranks(truth: Values, predicted: Values, capabilities: tuple[str, ...]) -> tuple[Rank, ...]:
    """Spearman over sources for every capability, for the mean of losses, and the mean of the single capabilities' values.

    Intervals: percentile bootstrap over the sources, the same draw for all capabilities. Seeds of training are not in them.
    """
    sources = list(truth)
    columns = [*capabilities, JOINT]
    real = np.array([[truth[s][c] for c in columns] for s in sources])
    guess = np.array([[predicted[s][c] for c in columns] for s in sources])

    def agreement(index: np.ndarray) -> list[float]:
        each = [spearman(guess[index, k], real[index, k]) for k in range(len(columns))]
        known = [math.nan if value is None else value for value in each]
        return [*known, float(np.mean(known[: len(capabilities)]))]

    rng = generator(0, "leave one out")
    point = agreement(np.arange(len(sources)))
    draws = np.array([agreement(rng.integers(0, len(sources), len(sources))) for _ in range(REPLICATES)])
    found = []
    for k, name in enumerate([*columns, ALL]):
        kept = draws[np.isfinite(draws[:, k]), k]
        wide = interval(kept, CONFIDENCE) if len(kept) >= REPLICATES / 2 else (None, None)
        found.append(Rank(name, None if math.isnan(point[k]) else point[k], *wide))
    return tuple(found)


def lines(analysis: LeaveOneOut) -> list[str]:
    """The table in plain text, a line per source, for the log."""
    rows = ["leave-one-out: loss without - loss with, nats per token (positive: the source helps); " + ", ".join(analysis.capabilities)]
    order = sorted(analysis.truth, key=lambda source: -analysis.truth[source][JOINT])
    rows += [f"  {source:<20} " + "  ".join(f"{analysis.truth[source][c]:+.4f}" for c in analysis.capabilities) for source in order]
    for prediction in analysis.predictions:
        said = ", ".join(f"{r.capability} {_rank(r)}" for r in prediction.ranks)
        rows.append(f"  Spearman with the prediction of {prediction.influence} ({prediction.preconditioner}): {said}")
    return rows


def _rank(rank: Rank) -> str:
    if rank.spearman is None:
        return "not defined"
    return f"{rank.spearman:+.2f}" + ("" if rank.low is None else f" [{rank.low:+.2f}, {rank.high:+.2f}]")
