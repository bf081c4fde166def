"""What the report knows about a run, as plain records: no files, no drawing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_r1.artifacts.mixture import Decision, KeptDocuments, PerplexityRecord, Redundancy, Regression
from megatron_r1.artifacts.probe import JudgeRecord, QualityRecord, SieveRecord
from megatron_r1.artifacts.training_scores import TrainingScores


@dataclass(frozen=True)
class Step:
    """One artifact of the run. `parents`: (input role, step name, fingerprint)."""

    name: str
    kind: str
    fingerprint: str
    parents: tuple[tuple[str, str, str], ...]
    created: str
    seconds: float
    command: str
    config: Mapping[str, Any]
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    files: int
    bytes: int
    summary: Mapping[str, Any]

    @property
    def stage(self) -> str:
        """Stage that made it; the kind when the settings do not say."""
        return str(self.config.get("stage") or self.kind)

    def parent(self, *roles: str) -> str | None:
        """Name of the first parent that has one of these roles."""
        return next((name for wanted in roles for role, name, _ in self.parents if role == wanted), None)


@dataclass(frozen=True)
class Split:
    """Size of one split of a source."""

    documents: int
    tokens: int
    bytes: int


@dataclass(frozen=True)
class Source:
    """One corpus of a shard set. `origin` is free-form provenance: package, version, licence, ..."""

    name: str
    domain: str
    distractor: bool
    format: str
    splits: Mapping[str, Split]
    origin: Mapping[str, Any]
    dropped: Mapping[str, int]
    quarantined: int

    def total(self, what: str) -> int:
        """Sum over splits of "documents", "tokens" or "bytes"."""
        return sum(getattr(split, what) for split in self.splits.values())


def origin_parts(origin: Mapping[str, Any]) -> list[str]:
    """Where a source came from: `package version (licence)` for packages, versions of installed ones, or the files' names."""
    parts = [f"{p['package']} {p['version']} ({p['licence']})" for p in origin.get("packages", ())]
    parts += [f"{name} {version} (as installed)" for name, version in origin.get("installed", {}).items()]
    if "python" in origin:
        parts.append(f"Python {origin['python']}")
    files = origin.get("files", ())
    if files:
        parts.append(files[0]["name"] if len(files) == 1 else f"{len(files)} files, {files[0]['name']} and on")
    return parts


@dataclass(frozen=True)
class Corpus:
    """One shard set. `missing`: (corpus that could not be had, why)."""

    step: str
    sources: tuple[Source, ...]
    tokenizer: Mapping[str, Any]
    missing: tuple[tuple[str, str], ...]
    control_groups: tuple[str, ...]


@dataclass(frozen=True)
class Probe:
    """Held-out probe documents. `documents[capability][source]` counts them; `sieves`: every rule's counts, by capability and source."""

    step: str
    documents: Mapping[str, Mapping[str, int]]
    tokens: Mapping[str, int]
    sieves: Mapping[str, tuple[SieveRecord, ...]]
    judge: JudgeRecord | None
    quality: QualityRecord | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Cell:
    """Mean benefit per token of one source for one capability, with its interval. `positive`: share of documents above 0."""

    mean: float
    low: float
    high: float
    documents: int
    ess: float
    positive: float


@dataclass(frozen=True)
class Reliable:
    """One reliability: ranking `of` sources or documents, halved `over` documents or the probe; `have` units of it."""

    of: str
    over: str
    capability: str
    value: float | None
    have: int
    needed: int | None


@dataclass(frozen=True, eq=False)
class Documents:
    """The scored documents of one source. Legend: n documents, C capabilities of the table."""

    index: np.ndarray  # int64 [n], number in the training split
    benefit: np.ndarray  # float64 [n, C], per token and in the table's scale: the mean over C is the joint benefit (Eq. 5)
    nats: np.ndarray  # float64 [n, C], per token, of probe loss and unit of learning rate: not rescaled


@dataclass(frozen=True)
class Influence:
    """One influence table: `cells[source][capability]` and, over all capabilities, `joint[source]`.

    `checkpoints`: (optimizer step, weight). `reliabilities`: rankings of sources and of documents by disjoint halves of
    the documents and of the probe, with what a reliability of 0.9 would need. `probe_loss`: of each capability at the last
    checkpoint, nats per token. `documents`: by source.
    """

    step: str
    model: str | None
    capabilities: tuple[str, ...]
    checkpoints: tuple[tuple[int, float], ...]
    cells: Mapping[str, Mapping[str, Cell]]
    joint: Mapping[str, Cell]
    normalise: str
    preconditioner: str
    parameters: str  # all, embeddings, or the patterns
    shares: Mapping[str, Mapping[str, float]]  # capability -> kind of parameter -> share of the scores' variance, last checkpoint
    confidence: float
    covers: tuple[str, ...]
    reliabilities: tuple[Reliable, ...]
    validity: Mapping[str, Any] | None
    notes: tuple[str, ...]
    probe_loss: Mapping[str, float]
    documents: Mapping[str, Documents] = field(compare=False)


@dataclass(frozen=True)
class MixtureView:
    """One mixture with what it is compared to. `influences`: the tables it was given. `numbers`: source -> documents trained on,
    where documents are left out."""

    step: str
    method: str
    weights: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]] | None
    natural: Mapping[str, float]
    uniform: Mapping[str, float]
    clipped: tuple[str, ...]
    harmful: tuple[str, ...]
    capped: tuple[str, ...]
    epochs: Mapping[str, float]
    floor: float
    confidence: float | None
    covers: tuple[str, ...] = ()
    rho: Mapping[str, float] = field(default_factory=dict)
    rho_intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    shrunk: Mapping[str, float] = field(default_factory=dict)
    shrinkage: Mapping[str, float] = field(default_factory=dict)
    kept_out: tuple[str, ...] = ()
    origin: str | None = None
    tau: float | None = None
    effective_sources: float | None = None
    divergence: float | None = None
    redundancy: Redundancy | None = None
    kept: KeptDocuments | None = None
    decision: Decision | None = None
    without: str | None = None
    base: Mapping[str, float] | None = None
    regression: Regression | None = None
    perplexity: PerplexityRecord | None = None
    notes: tuple[str, ...] = ()
    influences: tuple[str, ...] = ()
    numbers: Mapping[str, np.ndarray] | None = field(default=None, compare=False)

    @property
    def is_uniform(self) -> bool:
        """True for the baseline that weighs every source alike and leaves no document out."""
        return self.method == "uniform" and self.kept is None

    @property
    def own_intervals(self) -> bool:
        """True for shares whose intervals have nothing to do with an influence table given beside them."""
        return self.regression is not None or self.perplexity is not None

    @property
    def follows_influence(self) -> bool:
        """True for weights that were made from influence scores."""
        return self.method in ("influence", "kl")


@dataclass(frozen=True)
class Trained:
    """One training step. `metrics` are the records of metrics.jsonl in order; `tokens` counts this step's alone,
    `tokens_before` those of the steps it continues. `sources`: what was trained on, in words, without a mixture step."""

    step: str
    objective: str
    parameters: int
    layers: int
    width: int
    tokens: int
    tokens_before: int
    optimizer_steps: int
    metrics: tuple[Mapping[str, Any], ...]
    mixture: str | None
    sources: str
    start: str | None
    teacher: str | None
    reference: str | None = None
    scores: TrainingScores | None = None

    @property
    def tokens_per_second(self) -> float | None:
        """Median speed over the logged steps."""
        speeds = sorted(float(r["tokens_per_second"]) for r in self.metrics if r.get("tokens_per_second"))
        return speeds[len(speeds) // 2] if speeds else None

    def curve(self, key: str) -> list[tuple[int, float]]:
        """(tokens, value) for a top-level metric."""
        return [(int(r["tokens"]), float(r[key])) for r in self.metrics if r.get(key) is not None]

    def probe_curve(self, capability: str) -> list[tuple[int, float]]:
        """(tokens, loss in nats per token) on the held-out probe text of a capability."""
        points = []
        for record in self.metrics:
            value = probe_loss(record.get("validation"), capability)
            if value is not None:
                points.append((int(record["tokens"]), value))
        return points

    @property
    def capabilities(self) -> tuple[str, ...]:
        """Capabilities with a probe loss in this step's metrics, in order of appearance."""
        seen: dict[str, None] = {}
        for record in self.metrics:
            for name in record.get("validation") or {}:
                if name.startswith(PROBE_CURVE):
                    seen.setdefault(name.removeprefix(PROBE_CURVE), None)
        return tuple(seen)


PROBE_CURVE = "probe/"


def probe_loss(validation: Mapping[str, float] | None, capability: str) -> float | None:
    """Loss of one capability in a record's `validation` field, or None."""
    value = (validation or {}).get(PROBE_CURVE + capability)
    return None if value is None else float(value)


@dataclass(frozen=True)
class Result:
    """One line of an evaluation."""

    task: str
    group: str
    metric: str
    value: float
    n: int
    low: float
    high: float
    higher_is_better: bool
    chance: float | None
    note: str

    @property
    def key(self) -> tuple[str, str]:
        """What identifies the same measurement on another model."""
        return (self.task, self.metric)


@dataclass(frozen=True)
class Change:
    """Difference to a baseline's result, items paired, with its 95 % interval."""

    task: str
    metric: str
    difference: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Evaluated:
    """One evaluation of one model. `baseline`: the evaluate step that `changes` compare to. `dropped`: (task, why)."""

    step: str
    model: str | None
    results: tuple[Result, ...]
    baseline: str | None
    changes: tuple[Change, ...]
    dropped: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Exported:
    """One export with its parity proof as stored."""

    step: str
    model: str | None
    parity: Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """Everything the page can show. Every tuple is in the order in which the steps depend on each other."""

    steps: tuple[Step, ...]
    corpora: tuple[Corpus, ...] = ()
    probes: tuple[Probe, ...] = ()
    influences: tuple[Influence, ...] = ()
    mixtures: tuple[MixtureView, ...] = ()
    trained: tuple[Trained, ...] = ()
    evaluated: tuple[Evaluated, ...] = ()
    exported: tuple[Exported, ...] = ()
    others: tuple[str, ...] = field(default=())

    def step(self, name: str) -> Step:
        """The step of that name."""
        return next(step for step in self.steps if step.name == name)

    @property
    def sources(self) -> dict[str, Source]:
        """Every source by name; a later shard set of the same source name does not replace an earlier one."""
        found: dict[str, Source] = {}
        for corpus in self.corpora:
            for source in corpus.sources:
                found.setdefault(source.name, source)
        return found

    @property
    def distractors(self) -> tuple[str, ...]:
        """Names of the planted distractor sources."""
        return tuple(name for name, source in self.sources.items() if source.distractor)

    def training(self, name: str | None) -> Trained | None:
        """The training step of that name."""
        return next((t for t in self.trained if t.step == name), None)

    def mixture(self, name: str | None) -> MixtureView | None:
        """The mixture of that name."""
        return next((m for m in self.mixtures if m.step == name), None)

    def influence(self, name: str) -> Influence | None:
        """The influence table of that name."""
        return next((i for i in self.influences if i.step == name), None)

    def evaluation_of(self, model: str | None) -> Evaluated | None:
        """The evaluation of the model trained in that step."""
        return next((e for e in self.evaluated if e.model == model), None) if model else None


def depths(steps: tuple[Step, ...]) -> dict[str, int]:
    """Length of the longest chain of steps that leads to each step (0 for a step without parents in the list)."""
    by_name = {step.name: step for step in steps}
    found: dict[str, int] = {}

    def depth(name: str) -> int:
        if name not in found:
            found[name] = 0  # a cycle cannot occur between immutable artifacts; this only bounds the recursion
            found[name] = max((depth(parent) + 1 for _, parent, _ in by_name[name].parents if parent in by_name), default=0)
        return found[name]

    return {step.name: depth(step.name) for step in steps}
