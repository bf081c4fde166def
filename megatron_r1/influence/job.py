"""What an influence run has to do, fixed before it starts: documents, checkpoints, partitions, cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors.torch import save
from torch import Tensor

from megatron_r1.artifacts.base import Artifact
from megatron_r1.artifacts.checkpoint import CheckpointInfo, CheckpointSet
from megatron_r1.artifacts.probe import ProbeSet
from megatron_r1.data.shards import ShardSet
from megatron_r1.influence.config import InfluenceConfig
from megatron_r1.influence.curvature import ESTIMATED
from megatron_r1.influence.reference import Reference, draw
from megatron_r1.influence.rows import Row, padded_tokens
from megatron_r1.influence.select import Chosen, choose, evenly
from megatron_r1.influence.store import ScoreStore, parts
from megatron_r1.parallel.context import ParallelContext
from megatron_r1.utils import io
from megatron_r1.utils.errors import ArtifactError, ConfigError
from megatron_r1.utils.logging import get_logger

log = get_logger(__name__)


@dataclass(frozen=True)
class Partition:
    """Documents first..last-1 of the chosen ones of a source."""

    source: str
    number: int
    first: int
    last: int

    def __len__(self) -> int:
        return self.last - self.first


@dataclass(frozen=True)
class Job:
    """Everything that stays the same over checkpoints. Legend: C capabilities, F probe folds, n documents."""

    config: InfluenceConfig
    chosen: dict[str, Chosen]
    probe: dict[str, list[Row]]
    points: list[CheckpointInfo]
    store: ScoreStore
    seed: int
    reference: Reference | None = None  # what the curvature is estimated from
    gradients: Path | None = None  # where probe gradients are kept
    candidates: Mapping[int, float] = field(default_factory=dict)  # step -> probe loss the points were chosen by

    @property
    def tokens(self) -> int:
        """Padded tokens per forward."""
        return int(self.config.batch)

    @property
    def folds(self) -> int:
        """Probe folds with a direction of their own; 0 when the whole probe has the only one."""
        return self.config.probe_folds if self.config.probe_folds > 1 else 0

    @property
    def columns(self) -> int:
        """Scores kept per document and checkpoint: C x (1 + folds), the whole probe first."""
        return len(self.probe) * (1 + self.folds)

    def by_fold(self, partition: Partition) -> int:
        """How many documents of a partition, the first ones, are scored along every fold."""
        if not self.folds:
            return 0
        wanted = partition.last if self.config.fold_documents is None else self.config.fold_documents
        return min(max(wanted - partition.first, 0), len(partition))

    def check_rows(self) -> list[Row]:
        """A few rows of several sources, to be scored a second time."""
        return self.some_rows(self.config.fd_check_documents)

    def some_rows(self, wanted: int) -> list[Row]:
        """The first row of every source, then the second ones, and so on."""
        firsts = [chosen.rows[i] for i in range(wanted) for chosen in self.chosen.values() if i < len(chosen.rows)]
        return firsts[:wanted]

    def partitions(self) -> list[Partition]:
        """The units of resumption, the same at every checkpoint."""
        size = self.config.partition_documents
        return [
            Partition(source, number, first, last)
            for source, chosen in self.chosen.items()
            for number, (first, last) in enumerate(parts(len(chosen.index), size))
        ]

    def rows(self, partition: Partition) -> list[Row]:
        """Rows of a partition's documents, units counted from 0."""
        return self.chosen[partition.source].part(partition.first, partition.last)

    def rows_by_fold(self, partition: Partition) -> tuple[list[Row], list[Row]]:
        """Rows of the documents scored along every fold, and of the others, which see the whole probe only."""
        rows, some = self.rows(partition), self.by_fold(partition)
        return [row for row in rows if row.unit < some], [row for row in rows if row.unit >= some]

    def finished(self, step: int) -> dict[Partition, np.ndarray]:
        """The scores of every finished partition, float64 [n, columns] (NaN: not scored by fold)."""
        stored = self.store.finished(step)
        found = {partition: stored.get((partition.source, partition.number)) for partition in self.partitions()}
        # One of another shape was never written by this release.
        return {p: scores for p, scores in found.items() if scores is not None and scores.shape == (len(p), self.columns)}

    def save(self, step: int, partition: Partition, scores: np.ndarray, copy: int = 0) -> None:
        """Keep the scores of a partition, float64 [n, columns], as the model copy number `copy`."""
        self.store.append(step, copy, partition.source, partition.number, scores)

    def keep_gradient(self, step: int, capability: str, gradient: Mapping[str, Tensor], ctx: ParallelContext) -> None:
        """Put this process' part of a probe gradient into the artifact, if they are to be kept."""
        if self.gradients is None or ctx.data_rank or ctx.context_rank:
            return
        parts = {name: part.detach().cpu().contiguous() for name, part in gradient.items()}
        piece = f".stage{ctx.pipeline_rank}.tensor{ctx.tensor_rank}" if ctx.layout.model_parallel() > 1 else ""
        about = {"capability": capability, "step": str(step)}
        io.atomic_write_bytes(self.gradients / f"{capability}@{step}{piece}.safetensors", save(parts, metadata=about))

    def directions_file(self, step: int) -> Path:
        """Where the directions of a checkpoint are noted."""
        return self.store.folder / str(step) / "directions.json"

    @property
    def receipt_file(self) -> Path:
        """Where the receipt is kept."""
        return self.store.folder / "validity.json"


def require_matching(
    config: InfluenceConfig, inputs: Mapping[str, Artifact], shards: ShardSet, probe: ProbeSet, checkpoints: CheckpointSet
) -> None:
    """The probe's documents and the checkpoint's tokens must be those of the shards, and no window longer than the model's context.

    Raises ArtifactError and ConfigError. Windows longer than the sequences the model was trained on are warned about.
    """
    if probe.shards != inputs["shards"].fingerprint:
        raise ArtifactError(
            expected=f"a probe made from the shards {inputs['shards'].fingerprint[:8]}",
            found=f"one made from {probe.shards[:8]}",
            fix="point influence and its probe at the same corpus step",
        )
    if checkpoints.manifest.tokenizer != shards.tokenizer.sha256:
        raise ArtifactError(
            expected=f"a checkpoint trained on the tokenizer {shards.tokenizer.sha256[:8]} of the shards",
            found=f"one trained on {checkpoints.manifest.tokenizer[:8]}",
            fix="score with a checkpoint trained on these shards' tokenizer",
        )
    if probe.digest(shards) != probe.sha256:
        raise ArtifactError(
            expected=f"probe documents with the hash {probe.sha256[:8]}",
            found="other content under the same references",
            fix="delete the probe artifact and make it again",
        )
    windows = [document.n_tokens - 1 for name, found in probe.capabilities.items() if name in (config.capabilities or probe.capabilities) for document in found.documents]
    for what, longest, setting in (("documents", config.tokens_per_document, "tokens_per_document"), ("the probe", max(windows, default=0), "the probe's tokens_per_document")):
        _require_context(what, longest, setting, checkpoints)


def _require_context(what: str, longest: int, setting: str, checkpoints: CheckpointSet) -> None:
    context, trained = int(checkpoints.model["max_positions"]), checkpoints.manifest.seq_length
    if longest > context:
        raise ConfigError(
            expected=f"windows of {what} of at most {context} tokens, the model's max_positions",
            found=f"{longest}",
            fix=f"lower {setting}: longer documents are cut into windows",
        )
    if longest > trained:
        log.warning("influence: windows of %s have up to %d tokens, the model was trained on sequences of %d; later tokens are beyond what it has seen", what, longest, trained)


def prepare(
    config: InfluenceConfig, shards: ShardSet, probe: ProbeSet, checkpoints: CheckpointSet, store: ScoreStore
) -> Job:
    """Choose documents and checkpoints."""
    sources = _named(config.sources, list(shards.sources), "sources", "the shards", "score every source")
    wanted = _named(config.capabilities, list(probe.capabilities), "capabilities", "the probe", "score for all")
    rows = {
        name: [Row(i, document.tokens(shards)) for i, document in enumerate(found.documents)]
        for name, found in probe.capabilities.items()
        if name in wanted
    }
    trained = [point for point in checkpoints.checkpoints if point.step > 0]
    chosen = {source: choose(config, source, shards.split(source, "train")) for source in sources}
    reference = draw(config, shards, sources) if config.preconditioner in ESTIMATED else None
    return Job(config, chosen, rows, evenly(trained, config.checkpoints), store, config.seed or 0, reference)


def _named(wanted: list[str] | None, there: list[str], setting: str, whose: str, purpose: str) -> list[str]:
    """What a setting names, or all there is. Raises ConfigError at a name that is not there."""
    unknown = sorted(set(wanted or []) - set(there))
    if unknown:
        raise ConfigError(
            expected=f"{setting} of {whose} ({', '.join(sorted(there))})",
            found=", ".join(unknown),
            fix=f"correct influence's `{setting}`, or leave it out to {purpose}",
        )
    return there if wanted is None else wanted


def direction_tokens(job: Job) -> int:
    """Token-forwards that the directions of one checkpoint take (a backward counts as two), their check included."""
    folds = job.config.probe_folds
    gradients = sum(
        3 * padded_tokens(rows[fold::folds], job.tokens) for rows in job.probe.values() for fold in range(folds)
    )
    check = job.config.check_forwards(len(job.probe)) * padded_tokens(job.check_rows(), job.tokens)
    shares = job.config.share_forwards(len(job.probe)) * padded_tokens(job.some_rows(job.config.share_documents), job.tokens)
    curvature = job.config.curvature_forwards(len(job.probe) * (job.folds + 1)) * (job.reference.tokens if job.reference else 0)
    return gradients + check + shares + curvature


def scoring_tokens(job: Job, partition: Partition) -> int:
    """Token-forwards that a partition takes at one checkpoint."""
    split, whole = (padded_tokens(rows, job.tokens) for rows in job.rows_by_fold(partition))
    forwards = job.config.scoring_forwards
    return forwards(len(job.probe) * job.folds) * split + forwards(len(job.probe)) * whole


def scores_at(job: Job, step: int) -> dict[str, np.ndarray]:
    """Raw scores of one checkpoint from the finished partitions: source -> float64 [n, C, 1 + folds].

    The first is along the whole probe, the others along its folds (NaN where a document was not scored by fold).
    """
    found: dict[str, list[np.ndarray]] = {source: [] for source in job.chosen}
    finished = job.finished(step)
    for partition in job.partitions():
        if partition not in finished:
            raise ArtifactError(
                expected=f"{partition} of step {step}, finished", found="none", fix="run the same command again"
            )
        found[partition.source].append(finished[partition])
    return {
        source: np.concatenate(all_parts).reshape(-1, len(job.probe), 1 + job.folds)
        for source, all_parts in found.items()
    }


def fold_weights(job: Job, step: int) -> np.ndarray:
    """Weight of every probe fold, [C, F]; equal at every checkpoint."""
    notes = io.read_json(job.directions_file(step))["capabilities"]
    return np.array([notes[capability]["weights"] for capability in job.probe])


def totals_at(job: Job, step: int) -> dict[str, np.ndarray]:
    """Raw scores along the whole probe's direction: source -> float64 [n, C]."""
    return {source: scores[:, :, 0] for source, scores in scores_at(job, step).items()}
