"""The influence artifact: what each scored document does for each capability.

`influence.json` holds the settings, the scales and the per-source summary; `scores/<source>.parquet` holds one row per
scored document with the columns

    index, id, start, n_tokens, and one float64 column per capability and checkpoint, named `<capability>@<step>`

A score is the raw sum over the document's predicted tokens of the directional derivative of their loss along the
preconditioned probe gradient; **positive = benefit** (a step on the document lowers the probe loss). With probe folds
the scores along each fold stand beside it as `<capability>@<step>#<fold>`, empty for documents not scored by fold.

This reader also holds Eq. 5 (the joint influence of arXiv 2509.24945 v1), because the influence stage reports it and
the mixture stage weights by it. pyarrow is imported only when a table is read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, ValidationError

from megatron_r1.artifacts.base import Artifact
from megatron_r1.config.base import Frozen
from megatron_r1.utils import io
from megatron_r1.utils.errors import ArtifactError
from megatron_r1.utils.seeding import generator
from megatron_r1.utils.statistics import stretch

INFLUENCE_FILE = "influence.json"
FEW_CHECKPOINTS = 3
"""From this many on, intervals cover the choice of checkpoints. A checkpoint's state moves the scores of all documents together (its word
frequencies overshoot one way or the other), so two checkpoints cannot say how much."""
Normalise = Literal["none", "rms", "self"]


class ScoredCheckpoint(Frozen):
    """A checkpoint the documents were scored at."""

    step: int = Field(ge=1, description="optimizer step")
    tokens: int = Field(ge=0, description="training tokens seen")
    alpha: float = Field(gt=0, description="weight in Eq. 5, proportional to the step; sums to 1 over checkpoints")


class Direction(Frozen):
    """The preconditioned probe gradient of one capability at one checkpoint."""

    probe_loss: float = Field(description="probe loss, nats per token (mean over documents or tokens as configured)")
    gradient_norm: float = Field(description="Euclidean norm of the probe gradient G")
    direction_norm: float = Field(description="Euclidean norm of P G")
    self_influence: float = Field(description="<G, P G>: what a step on the probe itself would give, per unit step")
    step: float | None = Field(description="finite-difference step h along P G; null where no weights were moved")
    truncation: float | None = Field(
        default=None, description="engine finite_differences: estimated relative error from curvature, on the checked rows"
    )
    agreement: float | None = Field(
        default=None, description="engine ghost: relative difference (L2) of finite differences (extrapolated from two steps) from it, on the checked rows"
    )
    gradient_sha256: str = Field(
        default="", description="SHA-256 of the probe gradient's tensors (names, shapes, bytes) in the order of their names; of a cut model, of its processes'"
    )
    direction_sha256: str = Field(default="", description="the same of P G, along which documents were scored")
    energy: dict[str, float] = Field(description="share of <G, P G> by parameter group")
    score_shares: dict[str, float] | None = Field(
        default=None,
        description="share of the variance of the scores per token of some documents by parameter group, cov(group's score, "
        "score) / var(score); negative: the group pulls against the others; null: not measured",
    )
    rms: float = Field(default=0.0, description="root mean square over documents of all sources of the score per token")


class Curvature(Frozen):
    """What an estimated inverse Hessian (preconditioner datainf or ekfac) was made from."""

    documents: dict[str, int] = Field(description="source -> training documents, one window each")
    tokens: int = Field(description="predicted tokens of all of them")
    sha256: str = Field(description="hash of their tokens, in order")
    labels: Literal["true", "sampled"] = Field(
        description="what the losses are taken of: the documents' own next tokens, or tokens drawn from the model at every "
        "position (the Fisher information)"
    )
    rule: str = Field(description="in words: how each kind of parameter is treated")
    damping: dict[str, dict[str, float]] = Field(description="step -> parameter -> lambda, absolute")


class Cell(Frozen):
    """One source against one capability (or against all of them jointly)."""

    mean: float = Field(description="benefit per token, in the table's normalised scale; positive = benefit")
    interval: tuple[float, float] = Field(description="bootstrap interval of the mean")
    documents: int = Field(description="documents scored")
    tokens: int = Field(description="predicted tokens scored")
    ess: float = Field(
        description="effective number of documents, (sum |s|)^2 / sum s^2: low = few documents carry the score"
    )
    positive: float = Field(description="share of documents with a positive score")


class Reliability(Frozen):
    """Would another sample of the same size rank alike? Halves that share nothing, their rank correlation, stepped up."""

    of: Literal["sources", "documents"] = Field(description="what is ranked, by benefit per token")
    over: Literal["documents", "probe"] = Field(
        description="what was halved: the scored documents of every source, or the probe folds"
    )
    capability: str = Field(description="capability, or `joint`")
    halves: float | None = Field(
        description="mean Spearman correlation of the rankings by disjoint halves; null where it is undefined"
    )
    value: float | None = Field(
        description="reliability with all units: `halves` stepped up by Spearman-Brown; null where that has no meaning"
    )
    have: int = Field(
        ge=1, description="units it holds for: scored documents per source (the fewest), or probe windows"
    )
    needed: int | None = Field(
        description="units a reliability of 0.9 would need (Spearman-Brown prophecy); null when the halves do not "
        "agree at all, so that nothing can be foretold"
    )


class InfluenceRecord(Frozen):
    """Content of `influence.json`."""

    capabilities: list[str] = Field(min_length=1, description="capabilities, in column order")
    checkpoints: list[ScoredCheckpoint] = Field(min_length=1, description="checkpoints, ascending")
    checkpoint_choice: Literal["evenly", "probe_loss"] = Field(default="evenly", description="how the checkpoints were chosen")
    candidate_losses: dict[str, float] = Field(
        default={}, description="step -> probe loss (mean over capabilities) of every checkpoint that could have been chosen; empty for evenly"
    )
    preconditioner: Literal["none", "adam", "datainf", "ekfac"] = Field(description="P in <g, P G>")
    eps: float | None = Field(description="epsilon in P; null but for adam")
    curvature: Curvature | None = Field(default=None, description="of datainf and ekfac; null for the others")
    parameters: Literal["all", "embeddings"] | list[str] = Field(
        default="all", description="which parameters' gradients are compared, as asked for"
    )
    scored_parameters: list[str] = Field(default=[], description="their names, where they are not all")
    engine: str = Field(default="finite_differences", description="what made the scores: ghost or finite_differences")
    fd_epsilon: float = Field(description="finite-difference step relative to the norm of the weights")
    score_unit: str = Field(description="window: one window per document; document: all of its windows")
    tokens_per_document: int = Field(description="largest number of predicted tokens in a row")
    folds: int = Field(ge=1, description="probe folds with their own direction")
    fold_documents: int | None = Field(
        default=None, description="documents per source scored along every fold; null: all of them"
    )
    probe_sha256: str = Field(description="hash of the probe set")
    normalise: Normalise = Field(description="scale of the summary: see `InfluenceTable.benefits`")
    confidence: float = Field(description="nominal coverage of the intervals")
    interval_covers: list[str] = Field(
        description="what was resampled for the intervals; what is not named is not covered"
    )
    directions: dict[str, Direction] = Field(description="`<capability>@<step>` -> the direction scored along")
    fold_weights: dict[str, list[float]] = Field(
        default={}, description="capability -> weight of each probe fold; sums to 1"
    )
    sources: dict[str, dict[str, Cell]] = Field(description="source -> capability -> summary")
    joint: dict[str, Cell] = Field(description="source -> summary over all capabilities (Eq. 5)")
    reliability: dict[str, float | None] = Field(
        default={},
        description="capability and `joint` -> split-half reliability of the ranking of sources (Spearman-Brown); "
        "null below 3 sources",
    )
    reliabilities: list[Reliability] = Field(
        default=[], description="the same over documents and over probe folds, with what 0.9 would need"
    )
    validity: dict[str, Any] | None = Field(
        default=None, description="receipt: predicted against real one-step change of the probe loss"
    )
    notes: list[str] = Field(default=[], description="remarks a reader must know")


def column(capability: str, step: int, fold: int | None = None) -> str:
    """Name of a score column."""
    return f"{capability}@{step}" if fold is None else f"{capability}@{step}#{fold}"


@dataclass(frozen=True)
class DocumentScores:
    """Scores of one source's documents. Legend: n documents, C capabilities, T checkpoints, F probe folds."""

    index: np.ndarray  # int64 [n], position in the training split
    ids: list[str]
    start: np.ndarray  # int64 [n]
    n_tokens: np.ndarray  # int64 [n], predicted tokens
    raw: np.ndarray  # float64 [n, C, T]
    folds: np.ndarray | None  # float64 [n, C, T, F]; NaN in the rows of documents not scored by fold
    unit: np.ndarray | None = None  # int [n], rows that are drawn together in a bootstrap; None: those of one document

    @property
    def by_fold(self) -> np.ndarray:
        """Which rows were scored along every fold, bool [n]."""
        if self.folds is None:
            return np.zeros(len(self.index), bool)
        return np.isfinite(self.folds).all(axis=(1, 2, 3))

    def units(self) -> tuple[np.ndarray, int]:
        """Number of the unit each row belongs to, and how many units there are."""
        unit = np.unique(self.index if self.unit is None else self.unit, return_inverse=True)[1]
        return unit, int(unit.max()) + 1


@dataclass(frozen=True)
class Spread:
    """A source's joint benefit per token and the variance of that mean, in closed form, by where it comes from."""

    mean: float
    documents_variance: float  # of choosing other documents; infinite for a single one
    probe_variance: float  # of choosing other probe windows; 0 where it is not measured (one fold)
    documents: int
    folds: int
    checkpoints_variance: float = 0.0  # of choosing other checkpoints; 0 where it is not measured (fewer than FEW_CHECKPOINTS)
    checkpoints: int = 1

    @property
    def variance(self) -> float:
        """Of all together."""
        return self.documents_variance + self.probe_variance + self.checkpoints_variance

    @property
    def freedom(self) -> int:
        """Degrees of freedom of the variance (Welch and Satterthwaite), rounded down."""
        parts = [
            (self.documents_variance, self.documents - 1), (self.probe_variance, self.folds - 1), (self.checkpoints_variance, self.checkpoints - 1),
        ]
        total = sum(v * v / df for v, df in parts if df > 0 and v > 0)
        if not math.isfinite(self.variance) or total == 0:
            return max(self.documents - 1, 1)
        return max(int(self.variance**2 / total), 1)


class InfluenceTable:
    """An influence artifact opened for reading."""

    def __init__(self, path: Path, record: InfluenceRecord) -> None:
        self.path, self.record = path, record
        self.scored: np.ndarray | None = None
        """Which checkpoints each capability was scored at, bool [C, T]; None: all. A joined table has others for each."""
        self._cache: dict[str, DocumentScores] = {}

    @classmethod
    def open(cls, artifact: Artifact) -> InfluenceTable:
        """Read an influence artifact. Raises ArtifactError when it is of another kind or does not parse."""
        if artifact.kind != "influence":
            raise ArtifactError(
                expected="an influence artifact",
                found=f"{artifact.path.name} of kind {artifact.kind}",
                fix="point `inputs.influence` at an influence step",
            )
        try:
            record = InfluenceRecord.model_validate(artifact.json(INFLUENCE_FILE))
        except ValidationError as error:
            raise ArtifactError(
                expected=f"an influence record in {artifact.path / INFLUENCE_FILE}",
                found=f"{error.error_count()} wrong or missing fields",
                fix="delete the folder and run the same command again",
            ) from error
        for source in record.sources:
            artifact.file(f"scores/{source}.parquet")
        return cls(artifact.path, record)

    def with_record(self, record: InfluenceRecord) -> InfluenceTable:
        """The same scores under another record (tables already read are kept)."""
        other = InfluenceTable(self.path, record)
        other._cache, other.scored = self._cache, self.scored
        return other

    def keep(self, source: str, scores: DocumentScores) -> None:
        """Take these scores of a source instead of reading them."""
        self._cache[source] = scores

    @property
    def sources(self) -> list[str]:
        """Scored sources, in the record's order."""
        return list(self.record.sources)

    @property
    def alpha(self) -> np.ndarray:
        """Checkpoint weights of Eq. 5, [T]."""
        return np.array([checkpoint.alpha for checkpoint in self.record.checkpoints])

    def scores(self, source: str) -> DocumentScores:
        """Per-document scores of one source.

        Raises ArtifactError when a column is missing or a score is not a number.
        """
        if source not in self._cache:
            self._cache[source] = read_scores(self.path / "scores" / f"{source}.parquet", self.record)
        return self._cache[source]

    def benefits(self, source: str, normalise: Normalise = "rms") -> np.ndarray:
        """Benefit summed over each document's tokens, [n, C]: sum_t alpha_t s[., c, t] / scale[c, t].

        `normalise` brings capabilities and checkpoints to one scale. Scores along P G grow with the probe gradient where P
        is fixed (none, adam); with datainf (the paper's) and ekfac P shrinks as gradients grow, and the scale that all
        losses have in common drops out, but that of a capability does not. So either way they are not comparable as they are:
        "rms" divides by the root mean square of the per-token scores over all scored documents; "self" by <G, P G>, so
        that 1 means "as good as training on the probe itself"; "none" leaves nats per unit step.
        """
        return np.einsum("nct,t,ct->nc", self.scores(source).raw, self.alpha, 1.0 / self.scales(normalise))

    def scales(self, normalise: Normalise) -> np.ndarray:
        """Divisor of each capability and checkpoint, [C, T]. Raises ArtifactError when a scale is not positive."""
        record = self.record
        if normalise == "none":
            return np.ones((len(record.capabilities), len(record.checkpoints)))
        names = [[column(capability, point.step) for point in record.checkpoints] for capability in record.capabilities]
        directions = [[record.directions[name] for name in row] for row in names]
        scales = np.array([[d.rms if normalise == "rms" else d.self_influence for d in row] for row in directions])
        if not (np.isfinite(scales).all() and (scales > 0).all()):
            bad = [name for row, line in zip(names, scales) for name, scale in zip(row, line) if not scale > 0]
            raise ArtifactError(
                expected=f"a positive scale ({normalise}) for every capability and checkpoint",
                found=f"none for {', '.join(bad)}",
                fix="score more documents, or choose `normalise: none`",
            )
        return scales

    def checkpoint_rates(self, source: str, normalise: Normalise = "rms") -> np.ndarray:
        """Benefit per token at each checkpoint, [C, T]; weighted with `alpha` they sum to that of all."""
        scores = self.scores(source)
        return scores.raw.sum(axis=0) / scores.n_tokens.sum() / self.scales(normalise)

    def models(self) -> list[tuple[list[int], list[int]]]:
        """(capabilities, checkpoints) that belong together, as numbers: one pair, but for a joined table, with a model for each."""
        capabilities, points = range(len(self.record.capabilities)), range(len(self.record.checkpoints))
        scored = self.scored
        owned = [tuple(t for t in points if scored is None or scored[c, t]) for c in capabilities]
        return [([c for c in capabilities if owned[c] == own], list(own)) for own in dict.fromkeys(owned)]

    def resample(
        self,
        source: str,
        replicates: int,
        seed: int,
        normalise: Normalise = "rms",
        confidence: float | None = 0.95,
    ) -> np.ndarray:
        """Bootstrap of the benefit per token over documents, over checkpoints where there are FEW_CHECKPOINTS or more, and, with
        probe folds, over the probe: [replicates, C].

        Documents are drawn with replacement, several rows of one document together. Folds and checkpoints are drawn with
        replacement too, the same draw for every source of a replicate (and every capability of the same model), since they share
        them. The deviations of all are added, each stretched for the small number of its units (`utils.statistics.stretch`): to an unbiased
        variance and, with a confidence, to the width Student's t would give that interval. Drawing both at once instead
        would count the noise of single document-fold pairs three times; added it counts twice, still on the safe side.
        """
        scores = self.scores(source)
        unit, count = scores.units()
        tokens = np.bincount(unit, weights=scores.n_tokens, minlength=count)
        draws = generator(seed, "bootstrap", source).multinomial(
            count, np.full(count, 1.0 / count), size=replicates
        )  # [R, n]
        sums = group_sum(self.benefits(source, normalise), unit, count)
        point = sums.sum(axis=0) / tokens.sum()
        found = point + stretch(count, confidence) * ((draws @ sums) / (draws @ tokens)[:, None] - point)
        rates = self.checkpoint_rates(source, normalise)
        for capabilities, points in self.models():
            shift = self._checkpoint_draws(capabilities, points, replicates, seed, confidence)
            found[:, capabilities] += shift @ rates[np.ix_(capabilities, points)].T
        if scores.folds is None:
            return found
        return found + np.einsum("rcf,cf->rc", self._share_draws(replicates, seed, confidence), self.fold_rates(source, normalise))

    def _checkpoint_draws(
        self, capabilities: Sequence[int], points: Sequence[int], replicates: int, seed: int, confidence: float | None
    ) -> np.ndarray:
        """What a draw of checkpoints changes in the weight of each, [R, len(points)]; the rows sum to 0. Zeros for few checkpoints."""
        count, alpha = len(points), self.alpha[list(points)]
        if count < FEW_CHECKPOINTS:
            return np.zeros((replicates, count))
        names = [self.record.capabilities[c] for c in capabilities]
        drawn = generator(seed, "bootstrap checkpoints", *names).multinomial(count, np.full(count, 1.0 / count), size=replicates)
        share = drawn * alpha
        return stretch(count, confidence) * (share * (alpha.sum() / share.sum(axis=1, keepdims=True)) - alpha)

    def _share_draws(self, replicates: int, seed: int, confidence: float | None) -> np.ndarray:
        """What a draw of folds changes in the weight of each fold, [R, C, F]; the rows sum to 0."""
        folds = self.record.folds
        drawn = generator(seed, "bootstrap probe folds").multinomial(folds, np.full(folds, 1.0 / folds), size=replicates)
        base = np.array([self.record.fold_weights[capability] for capability in self.record.capabilities])  # [C, F]
        share = drawn[:, None, :] * base[None]
        share /= share.sum(axis=-1, keepdims=True)
        return stretch(folds, confidence) * (share - base)

    def fold_benefits(self, source: str, normalise: Normalise = "rms") -> np.ndarray:
        """As `benefits`, along each probe fold: [n, C, F]; NaN for documents not scored by fold.

        Raises ArtifactError for a table without folds.
        """
        folds = self.scores(source).folds
        if folds is None:
            raise ArtifactError(
                expected="scores along several probe folds",
                found=f"one direction per capability in {self.path.name}",
                fix="score again with influence's `probe_folds` above 1",
            )
        return np.einsum("nctf,ct->ncf", folds, self.alpha / self.scales(normalise))

    def fold_rates(self, source: str, normalise: Normalise = "rms") -> np.ndarray:
        """Benefit per token along each fold over the documents scored by fold, [C, F]."""
        scores, there = self.scores(source), self.scores(source).by_fold
        return self.fold_benefits(source, normalise)[there].sum(axis=0) / scores.n_tokens[there].sum()

    def spread(self, source: str, normalise: Normalise = "rms") -> Spread:
        """The joint benefit per token (Eq. 5 and 6) with the variances the bootstrap of `resample` estimates."""
        scores = self.scores(source)
        unit, count = scores.units()
        tokens = np.bincount(unit, weights=scores.n_tokens, minlength=count)
        sums = group_sum(self.benefits(source, normalise).mean(axis=1, keepdims=True), unit, count)[:, 0]
        mean = float(sums.sum() / tokens.sum())
        squares = float(((sums - mean * tokens) ** 2).sum()) / float(tokens.sum()) ** 2
        documents = squares * count / (count - 1) if count > 1 else math.inf
        folds, probe = self.record.folds, 0.0
        if scores.folds is not None:
            base = np.array([self.record.fold_weights[capability] for capability in self.record.capabilities])
            probe = float((folds * base * self.fold_rates(source, normalise)).mean(axis=0).var(ddof=1)) / folds
        rates, among, fewest = self.checkpoint_rates(source, normalise), 0.0, 1
        for capabilities, points in self.models():
            if len(points) >= FEW_CHECKPOINTS:
                # Variance of a weighted mean (ratio estimate); models of their own are independent of each other.
                joint, alpha = rates[np.ix_(capabilities, points)].sum(axis=0) / len(rates), self.alpha[points]
                share, n = alpha / alpha.sum(), len(points)
                among += float(((share * (joint - share @ joint)) ** 2).sum()) * n / (n - 1)
                fewest = n if fewest == 1 else min(fewest, n)
        return Spread(mean, documents, probe, count, folds, among, fewest)

    def counted(self, shares: Mapping[str, np.ndarray], units: Mapping[str, np.ndarray]) -> InfluenceTable:
        """The same table with every row's score multiplied by `shares` (its tokens stay) and rows drawn by `units`."""
        other = InfluenceTable(self.path, self.record)
        for source in self.sources:
            scores = self.scores(source)
            share = shares[source][:, None, None]
            folds = None if scores.folds is None else scores.folds * share[..., None]
            other._cache[source] = replace(scores, raw=scores.raw * share, folds=folds, unit=units[source])
        return other


def group_sum(values: np.ndarray, unit: np.ndarray, count: int) -> np.ndarray:
    """Sum the rows of `values` [n, k] that share a unit number: [count, k]."""
    total = np.zeros((count, values.shape[1]))
    np.add.at(total, unit, values)
    return total


def read_scores(path: Path, record: InfluenceRecord) -> DocumentScores:
    """Read one `scores/<source>.parquet`."""
    import pyarrow.parquet as parquet

    with io.disk_errors(path):
        table = parquet.read_table(path)
    steps = [point.step for point in record.checkpoints]
    wanted = [column(capability, step) for capability in record.capabilities for step in steps]
    absent = [name for name in ("index", "id", "start", "n_tokens", *wanted) if name not in table.column_names]
    if absent or table.num_rows == 0:
        raise ArtifactError(
            expected=f"rows with the columns {', '.join(wanted)} in {path}",
            found=f"{table.num_rows} rows without {', '.join(absent)}" if absent else "no rows",
            fix="delete the artifact folder and run the same command again",
        )

    def read(name: str) -> np.ndarray:
        return table.column(name).to_numpy()

    shape = (table.num_rows, len(record.capabilities), len(steps))
    raw = np.stack([read(name) for name in wanted], axis=1).astype(np.float64).reshape(shape)
    folds = None
    if record.folds > 1:
        names = [
            column(capability, step, fold)
            for capability in record.capabilities
            for step in steps
            for fold in range(record.folds)
        ]
        folds = np.stack([read(name) for name in names], axis=1).astype(np.float64).reshape(*shape, record.folds)
        whole = np.isfinite(folds).all(axis=(1, 2, 3))
        if not (whole | np.isnan(folds).all(axis=(1, 2, 3))).all() or not whole.any():
            raise ArtifactError(
                expected=f"documents scored along every probe fold or along none in {path}, and some along every",
                found=f"{int(whole.sum())} of {len(whole)} scored along every one, others in part or not at all",
                fix="delete the artifact folder and score again; if it happens again, lower fd_epsilon or raise eps",
            )
    if not np.isfinite(raw).all():
        raise ArtifactError(
            expected=f"finite scores in {path}",
            found=f"{int((~np.isfinite(raw)).sum())} that are not numbers",
            fix="delete the artifact folder and score again; if it happens again, lower fd_epsilon or raise eps",
        )
    return DocumentScores(
        read("index").astype(np.int64),
        table.column("id").to_pylist(),
        read("start").astype(np.int64),
        read("n_tokens").astype(np.int64),
        raw,
        folds,
    )
