"""Scoring: checkpoint by checkpoint, partition by partition; what is finished is never computed again.

Under torchrun every model copy (a process, or those of `layout` together) computes all directions; the partitions are shared among
the copies and the receipt is the first one's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_r1.artifacts.checkpoint import CheckpointInfo, CheckpointSet
from megatron_r1.influence import access
from megatron_r1.influence.curvature import preconditioner_of
from megatron_r1.influence.finite_difference import FiniteDifference, sum_by_unit
from megatron_r1.influence.ghost import Ghost
from megatron_r1.influence.groups import FEWEST, by_group, energy_shares, score_shares
from megatron_r1.influence.job import Job, Partition, direction_tokens, scoring_tokens, totals_at
from megatron_r1.influence.probe_gradient import fold_gradient
from megatron_r1.influence.rows import Row, batches
from megatron_r1.influence.space import Space
from megatron_r1.influence.validity import cost, receipt
from megatron_r1.model.precondition import Direction
from megatron_r1.parallel.context import ParallelContext
from megatron_r1.utils import io
from megatron_r1.utils.logging import duration, get_logger, human, progress

ERROR_WARNING = 0.02
log = get_logger(__name__)
Advance = Callable[[int], None]
# (directions, rows, progress, what to call row i in an error) -> float64 [rows, directions]
RowScores = Callable[[Sequence[Direction], Sequence[Row], Advance, Callable[[int], str]], np.ndarray]


def score(job: Job, checkpoints: CheckpointSet, ctx: ParallelContext) -> dict[str, Any] | None:
    """Compute every missing partition and the receipt; returns the receipt, on rank 0. Collective."""
    mine = job.partitions()[ctx.data_rank :: ctx.data_size]
    per_point = direction_tokens(job) + sum(scoring_tokens(job, partition) for partition in mine)
    receipt_tokens = cost(job.config.validity, job.chosen, job.probe, job.seed, job.tokens) if ctx.is_main else 0
    _say_plan(job, per_point, ctx)
    with progress("influence", len(job.points) * per_point + receipt_tokens, "token-forwards") as bar:
        for point in job.points:
            # Rank 0 looks and tells: the others may already be writing what a later look would find.
            todo, directions, receipts = ctx.broadcast_object(_missing(job, point))
            if not (todo or directions or receipts):
                bar.advance(per_point)
                continue
            bar.note(checkpoint=str(point.step))
            loaded = access.load(checkpoints, point, ctx, job.config)
            engine = FiniteDifference(loaded.losses, loaded.parameters, job.config.fd_epsilon, loaded.space) if job.config.moves_weights else None
            if todo or directions:
                _score_checkpoint(job, point.step, engine, loaded, mine, set(todo), ctx, bar.advance)
                if point is job.points[0] and len(todo) == len(job.partitions()):
                    _say_hours(job, bar.rate(), ctx)
            ctx.barrier()
            if receipts and engine is not None and ctx.data_rank == 0:
                _take_receipt(job, point.step, engine, loaded, ctx, bar.advance)
            if engine is not None:
                engine.verify_restored()
            ctx.barrier()
    # From here on rank 0 may complete the artifact, which removes the scratch folder.
    return _read_receipt(job) if ctx.is_main else None


def _say_plan(job: Job, per_point: int, ctx: ParallelContext) -> None:
    documents = sum(len(chosen.index) for chosen in job.chosen.values())
    tokens = sum(int(chosen.n_tokens.sum()) for chosen in job.chosen.values())
    log.info(
        "influence: %s documents of %d sources (%s tokens) at %d checkpoint%s along %d directions, %s of scores; %s token-forwards (a backward counts as "
        "two) for each of %d model cop%s",
        f"{documents:,}", len(job.chosen), human(tokens), len(job.points), "s" * (len(job.points) > 1), job.columns, human(8 * documents * job.columns * len(job.points)) + "B",
        human(len(job.points) * per_point), ctx.data_size, "y" if ctx.data_size == 1 else "ies",
    )  # fmt: skip


def _say_hours(job: Job, rate: float, ctx: ParallelContext) -> None:
    """What all checkpoints take, by the rate just measured: directions are every copy's own work, documents are shared."""
    if len(job.points) < 2:
        return
    own, shared = direction_tokens(job), sum(scoring_tokens(job, partition) for partition in job.partitions())
    found = [(copies, len(job.points) * (own + shared / copies) / rate) for copies in sorted({ctx.data_size, 8, 64})]
    log.info(
        "influence: at the %s token-forwards/s measured all %d checkpoints take %s", human(rate), len(job.points),
        ", ".join(f"{duration(seconds)} on {copies} model cop{'y' if copies == 1 else 'ies'}" for copies, seconds in found),
    )  # fmt: skip


def _missing(job: Job, point: CheckpointInfo) -> tuple[list[Partition], bool, bool]:
    """Partitions, directions and receipt of a checkpoint that are still to be made."""
    finished = job.finished(point.step)
    todo = [partition for partition in job.partitions() if partition not in finished]
    receipts = point is job.points[-1] and job.config.validity.batches > 0 and not job.receipt_file.exists()
    return todo, not job.directions_file(point.step).exists(), receipts


@dataclass(frozen=True)
class Lines:
    """The directions of one capability: of its whole probe and, with folds, of each of them (kept in host memory, so that those of
    one pass lie on the device once)."""

    whole: Direction
    folds: list[Direction]
    weights: np.ndarray  # [F], sum 1


def _score_checkpoint(
    job: Job,
    step: int,
    engine: FiniteDifference | None,
    loaded: access.LoadedCheckpoint,
    mine: list[Partition],
    todo: set[Partition],
    ctx: ParallelContext,
    advance: Advance,
) -> None:
    """Directions of every capability at one checkpoint, then those of this process' partitions that are in `todo`."""
    row_scores = _row_scores(job, engine, loaded, ctx)
    lines = _directions(job, step, engine, row_scores, loaded, ctx, advance)
    for partition in mine:
        if partition not in todo:
            advance(scoring_tokens(job, partition))
            continue
        scores = _score_partition(job, partition, lines, row_scores, advance)
        if ctx.leads_copy:
            job.save(step, partition, scores, ctx.data_rank)


def _row_scores(job: Job, engine: FiniteDifference | None, loaded: access.LoadedCheckpoint, ctx: ParallelContext) -> RowScores:
    """The engine that was asked for."""
    config = job.config
    if config.engine == "finite_differences" and engine is not None:
        moving = engine

        def by_differences(directions: Sequence[Direction], rows: Sequence[Row], advance: Advance, name: Callable[[int], str]) -> np.ndarray:
            made = batches(rows, job.tokens, ctx.device)
            return np.stack([moving.scores(direction, made, advance=advance) for direction in directions], axis=1)

        return by_differences
    ghost = Ghost(loaded.chunks, ctx)

    def by_ghost(directions: Sequence[Direction], rows: Sequence[Row], advance: Advance, name: Callable[[int], str]) -> np.ndarray:
        made = ghost.pack(rows, job.tokens)
        found = []
        for first in range(0, len(directions), config.directions_per_pass):
            some = directions[first : first + config.directions_per_pass]
            forwards = config.scoring_forwards(len(some))
            found.append(ghost.scores(some, made, lambda tokens, forwards=forwards: advance(forwards * tokens), name))
        return np.concatenate(found, axis=1)

    return by_ghost


def _score_partition(job: Job, partition: Partition, lines: list[Lines], row_scores: RowScores, advance: Advance) -> np.ndarray:
    """Scores of a partition's documents, float64 [n, C (1 + F)]: the whole probe's, then its folds' (or NaN).

    A document scored along every fold needs no further direction: the folds' weighted sum is the whole.
    """
    found = np.full((len(partition), len(lines), 1 + job.folds), np.nan)
    split, whole = job.rows_by_fold(partition)
    some = job.by_fold(partition)
    chosen = job.chosen[partition.source]

    def documents(directions: list[Direction], rows: list[Row]) -> np.ndarray:
        """float64 [n, directions]"""

        def name(row: int) -> str:
            return f"document {chosen.ids[partition.first + rows[row].unit]!r} of {partition.source}"

        scores = row_scores(directions, rows, advance, name)
        return np.stack([sum_by_unit(column, rows, len(partition)) for column in scores.T], axis=1)

    if split:
        by_fold = documents([fold for line in lines for fold in line.folds], split)[:some]
        found[:some, :, 1:] = by_fold.reshape(some, len(lines), job.folds)
        found[:some, :, 0] = np.einsum("ncf,cf->nc", found[:some, :, 1:], np.stack([line.weights for line in lines]))
    if whole:
        found[some:, :, 0] = documents([line.whole for line in lines], whole)[some:]
    return found.reshape(len(partition), -1)


def _directions(
    job: Job,
    step: int,
    engine: FiniteDifference | None,
    row_scores: RowScores,
    loaded: access.LoadedCheckpoint,
    ctx: ParallelContext,
    advance: Advance,
) -> list[Lines]:
    """P G of every capability and probe fold; noted in the directions file.

    Fold by fold: at most one fold's gradient and the running sum of them lie on the device at a time.
    """
    config, space = job.config, loaded.space
    lines: list[Lines] = []
    notes: dict[str, dict[str, Any]] = {}
    differences = config.engine == "finite_differences"
    check = batches(job.check_rows(), job.tokens, ctx.device)
    precondition, about = preconditioner_of(config, loaded, job.reference, ctx, advance)
    for capability, rows in job.probe.items():
        folds: list[Direction] = []
        weights: list[float] = []
        total: Direction = {}
        loss, truncations = 0.0, []
        for fold in range(config.probe_folds):
            part = fold_gradient(
                loaded.losses,
                loaded.parameters,
                rows,
                fold,
                config.probe_folds,
                config.probe_weighting,
                job.tokens,
                ctx.device,
                advance,
                loaded.space,
            )
            along = precondition(part.gradient)
            if check and differences and engine is not None:
                truncations.append(engine.truncation(along, check, advance))
            weights.append(part.weight)
            loss += part.weight * part.loss
            if not job.folds:
                total, folds = part.gradient, []
                continue
            total = {n: g * part.weight + (total[n] if total else 0) for n, g in part.gradient.items()}
            folds.append({name: line.cpu() for name, line in along.items()})
        truncation = max(truncations) if truncations else None
        whole = precondition(total) if job.folds else along
        job.keep_gradient(step, capability, total, ctx)
        lines.append(Lines({name: line.cpu() for name, line in whole.items()}, folds, np.array(weights)))
        notes[capability] = {
            "probe_loss": loss,
            "gradient_norm": space.norm(total),
            "direction_norm": space.norm(whole),
            "self_influence": space.inner(total, whole),
            "step": engine.step(whole) if engine is not None else None,
            "truncation": truncation,
            "gradient_sha256": space.digest(total),
            "direction_sha256": space.digest(whole),
            "energy": energy_shares(total, whole, space),
            "weights": weights,
            "eps": loaded.eps,
        }
        if truncation is not None and truncation > ERROR_WARNING:
            log.warning(
                "influence %s at step %d: curvature makes the finite differences wrong by about %.1f %%; lower "
                "fd_epsilon or raise eps",
                capability,
                step,
                100 * truncation,
            )
    if check and engine is not None and not differences:
        exact = row_scores([line.whole for line in lines], job.check_rows(), advance, "checked row {}".format)
        for capability, line, scores in zip(notes, lines, exact.T):
            off = engine.extrapolated(line.whole, check, advance) - scores
            notes[capability]["agreement"] = agreement = float(np.linalg.norm(off) / max(np.linalg.norm(scores), np.finfo(float).tiny))
            if agreement > ERROR_WARNING:
                log.warning(
                    "influence %s at step %d: finite differences are %.1f %% away from the scores. Where the loss bends sharply along the "
                    "direction they can not follow: try a lower fd_epsilon. If the difference stays, do not trust the scores",
                    capability,
                    step,
                    100 * agreement,
                )
    for note, shares in zip(notes.values(), _score_shares(job, lines, row_scores, space, advance)):
        note["score_shares"] = shares
    if ctx.is_main:
        io.atomic_write_json(job.directions_file(step), {"capabilities": notes, "preconditioner": about})
    return lines


def _score_shares(job: Job, lines: list[Lines], row_scores: RowScores, space: Space, advance: Advance) -> list[dict[str, float] | None]:
    """For each capability the share of each kind of parameter in the variance of some documents' scores; None: has no meaning."""
    rows = job.some_rows(job.config.share_documents)
    if len(rows) < FEWEST:
        return [None] * len(lines)
    pieces = [by_group(line.whole, space) for line in lines]
    columns = row_scores([part for piece in pieces for part in piece.values()], rows, advance, "row {} of those for the shares".format).T
    found, first = [], 0
    for piece in pieces:
        rates = columns[first : first + len(piece)] / [row.targets for row in rows]
        found.append(score_shares(dict(zip(piece, rates))))
        first += len(piece)
    return found


def _take_receipt(
    job: Job,
    step: int,
    engine: FiniteDifference,
    loaded: access.LoadedCheckpoint,
    ctx: ParallelContext,
    advance: Advance,
) -> None:
    found = receipt(
        job.config.validity,
        engine,
        loaded.trainer,
        job.chosen,
        totals_at(job, step),
        job.probe,
        job.config.probe_weighting,
        job.tokens,
        ctx.device,
        job.seed,
        advance,
    )
    if ctx.is_main:
        io.atomic_write_json(job.receipt_file, {"checkpoint": step, "optimizer": job.config.receipt_optimizer, **found})


def _read_receipt(job: Job) -> dict[str, Any] | None:
    if not job.config.validity.batches:
        return None
    validity = io.read_json(job.receipt_file)
    for name, entry in validity["capabilities"].items():
        value = "undefined" if entry["spearman"] is None else f"{entry['spearman']:.3f}"
        log.info("influence receipt, %s: Spearman of predicted and real one-step change %s", name, value)
    return validity
