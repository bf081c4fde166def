"""Reads the artifacts of a run into plain records. Knows the file formats (docs/artifacts.md); draws and judges nothing.

A part that is not among the inputs is simply not in the result. A part that is there but damaged raises ArtifactError.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from megatron_r1.artifacts.base import Artifact, Parent
from megatron_r1.artifacts.checkpoint import CheckpointSet
from megatron_r1.artifacts.influence import Cell as StoredCell
from megatron_r1.artifacts.influence import InfluenceRecord, InfluenceTable, column
from megatron_r1.artifacts.mixture import load_kept, load_mixture
from megatron_r1.artifacts.probe import load_probe
from megatron_r1.data.shards import SOURCES_FILE, SourceRecord
from megatron_r1.data.tokenizer import INFO_FILE
from megatron_r1.model.config import ModelConfig
from megatron_r1.report.records import (
    Cell,
    Change,
    Corpus,
    Documents,
    Evaluated,
    Exported,
    Influence,
    MixtureView,
    Probe,
    Reliable,
    Result,
    Run,
    Source,
    Split,
    Step,
    Trained,
    depths,
)
from megatron_r1.utils.errors import ArtifactError


def collect(artifacts: Iterable[Artifact]) -> Run:
    """Read every artifact. Raises ArtifactError when a payload lacks a field this release writes."""
    by_name = {artifact.name: artifact for artifact in artifacts}  # two steps with equal settings share a fingerprint
    steps = tuple(_step(artifact) for artifact in by_name.values())
    depth = depths(steps)
    order = sorted(by_name.values(), key=lambda a: (depth[a.name], a.manifest.created, a.name))
    place = {artifact.name: i for i, artifact in enumerate(order)}
    ordered = tuple(sorted(steps, key=lambda step: place[step.name]))

    def every(kind: str, read: Callable[[Artifact, Step], Any]) -> tuple[Any, ...]:
        return tuple(_guarded(read, a, ordered[place[a.name]]) for a in order if a.kind == kind)

    known = {"shards", "probe", "influence", "mixture", "checkpoint", "evaluation", "export"}
    return Run(
        steps=ordered,
        corpora=every("shards", _corpus),
        probes=every("probe", _probe),
        influences=every("influence", _influence),
        mixtures=every("mixture", _mixture),
        trained=every("checkpoint", _trained),
        evaluated=every("evaluation", _evaluated),
        exported=every("export", _exported),
        others=tuple(a.name for a in order if a.kind not in known),
    )


def _guarded(read: Callable[[Artifact, Step], Any], artifact: Artifact, step: Step) -> Any:
    """A missing or mistyped field means another release wrote the artifact: say which artifact and which field."""
    try:
        return read(artifact, step)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ArtifactError(
            expected=f"a {artifact.kind} artifact in the format of this release at {artifact.path}",
            found=f"{type(error).__name__}: {error}",
            fix=f"make the step {artifact.name!r} again with this release, or leave it out of the report's inputs",
        ) from error


def _step(artifact: Artifact) -> Step:
    manifest = artifact.manifest
    parents: list[tuple[str, str, str]] = []
    for role, value in manifest.parents.items():
        items: list[Parent] = value if isinstance(value, list) else [value]
        parents += [(role, item.name, item.fingerprint) for item in items]
    return Step(
        name=manifest.name,
        kind=manifest.kind,
        fingerprint=manifest.fingerprint,
        parents=tuple(parents),
        created=manifest.created,
        seconds=manifest.seconds,
        command=manifest.command,
        config=manifest.config,
        machine=manifest.machine,
        versions=manifest.versions,
        files=len(manifest.files),
        bytes=sum(record.bytes for record in manifest.files.values()),
        summary=manifest.summary,
    )


def _corpus(artifact: Artifact, step: Step) -> Corpus:
    content = artifact.json(SOURCES_FILE)
    records = [SourceRecord.model_validate(record) for record in content["sources"].values()]
    sources = tuple(
        Source(
            name=record.name,
            domain=record.domain,
            distractor=record.distractor,
            format=record.format,
            splits={name: Split(split.documents, split.tokens, split.bytes) for name, split in record.splits.items()},
            origin=record.origin,
            dropped=record.dropped,
            quarantined=record.quarantined,
        )
        for record in records
    )
    info = f"tokenizer/{INFO_FILE}"
    return Corpus(
        step=step.name,
        sources=sources,
        tokenizer=artifact.json(info) if info in artifact.manifest.files else {},
        missing=tuple((item["name"], item["reason"]) for item in content.get("missing", [])),
        control_groups=tuple(content.get("control_groups", [])),
    )


def _probe(artifact: Artifact, step: Step) -> Probe:
    found = load_probe(artifact)
    capabilities = found.capabilities
    return Probe(
        step=step.name,
        documents={name: dict(Counter(d.source for d in probe.documents)) for name, probe in capabilities.items()},
        tokens={name: sum(d.n_tokens for d in probe.documents) for name, probe in capabilities.items()},
        sieves={name: tuple(p.sieves) for name, p in capabilities.items()},
        judge=found.judge,
        quality=found.quality,
        notes=tuple(found.notes),
    )


def _mixture(artifact: Artifact, step: Step) -> MixtureView:
    mixture = load_mixture(artifact)
    return MixtureView(
        step=step.name,
        method=mixture.method,
        weights=mixture.weights,
        intervals=mixture.intervals,
        natural=mixture.natural,
        uniform=mixture.uniform,
        clipped=tuple(mixture.clipped),
        harmful=tuple(mixture.harmful),
        capped=tuple(mixture.capped),
        epochs=mixture.epochs,
        floor=mixture.floor,
        confidence=mixture.confidence,
        covers=tuple(mixture.interval_covers),
        rho=mixture.rho,
        rho_intervals=mixture.rho_intervals,
        shrunk=mixture.shrunk,
        shrinkage=mixture.shrinkage,
        kept_out=tuple(mixture.kept_out),
        origin=mixture.origin,
        tau=mixture.tau,
        effective_sources=mixture.effective_sources,
        divergence=mixture.divergence,
        redundancy=mixture.redundancy,
        kept=mixture.kept,
        decision=mixture.decision,
        without=mixture.without,
        base=mixture.base,
        regression=mixture.regression,
        perplexity=mixture.perplexity,
        notes=tuple(mixture.notes),
        influences=tuple(name for role, name, _ in step.parents if role == "influence"),
        numbers=load_kept(artifact, mixture),
    )


def _trained(artifact: Artifact, step: Step) -> Trained:
    checkpoints = CheckpointSet.open(artifact)
    model = ModelConfig.model_validate(checkpoints.model)
    return Trained(
        step=step.name,
        objective=checkpoints.manifest.objective,
        parameters=model.parameters(),
        layers=model.num_layers,
        width=model.hidden_size,
        tokens=checkpoints.manifest.tokens,
        tokens_before=checkpoints.manifest.tokens_before,
        optimizer_steps=checkpoints.manifest.steps,
        metrics=tuple(checkpoints.metrics()),
        mixture=step.parent("mixture"),
        sources=_sources_in_words(step),
        start=step.parent("checkpoint"),
        teacher=step.parent("teacher"),
        reference=step.parent("reference"),
        scores=checkpoints.manifest.scores,
    )


def _sources_in_words(step: Step) -> str:
    sources = step.config.get("sources")
    return sources if isinstance(sources, str) else "stated shares" if sources else "all of its shards"


def _influence(artifact: Artifact, step: Step) -> Influence:
    table = InfluenceTable.open(artifact)
    record, last = table.record, table.record.checkpoints[-1].step
    return Influence(
        step=step.name,
        model=step.parent("checkpoint"),
        capabilities=tuple(record.capabilities),
        checkpoints=tuple((c.step, c.alpha) for c in record.checkpoints),
        cells={source: {name: _cell(cell) for name, cell in row.items()} for source, row in record.sources.items()},
        joint={source: _cell(cell) for source, cell in record.joint.items()},
        normalise=record.normalise,
        preconditioner=record.preconditioner,
        parameters=record.parameters if isinstance(record.parameters, str) else ", ".join(record.parameters),
        shares=_score_shares(record),
        confidence=record.confidence,
        covers=tuple(record.interval_covers),
        reliabilities=_reliabilities(record),
        validity=record.validity,
        notes=tuple(record.notes),
        probe_loss={name: record.directions[column(name, last)].probe_loss for name in record.capabilities},
        documents={source: _documents(table, source) for source in table.sources},
    )


def _documents(table: InfluenceTable, source: str) -> Documents:
    tokens = table.scores(source).n_tokens[:, None]
    return Documents(table.scores(source).index, table.benefits(source, table.record.normalise) / tokens, table.benefits(source, "none") / tokens)


def _score_shares(record: InfluenceRecord) -> dict[str, dict[str, float]]:
    last = record.checkpoints[-1].step
    found = {name: record.directions.get(column(name, last)) for name in record.capabilities}
    return {name: dict(line.score_shares) for name, line in found.items() if line is not None and line.score_shares}


def _reliabilities(record: InfluenceRecord) -> tuple[Reliable, ...]:
    """Those stored; of an earlier release's artifact the split-half ones, without advice."""
    if record.reliabilities:
        return tuple(Reliable(r.of, r.over, r.capability, r.value, r.have, r.needed) for r in record.reliabilities)
    documents = min((cell.documents for cell in record.joint.values()), default=0)
    return tuple(Reliable("sources", "documents", name, value, documents, None) for name, value in record.reliability.items())


def _cell(cell: StoredCell) -> Cell:
    return Cell(cell.mean, *cell.interval, documents=cell.documents, ess=cell.ess, positive=cell.positive)


def _evaluated(artifact: Artifact, step: Step) -> Evaluated:
    content = artifact.json("evaluation.json")
    results = tuple(
        Result(
            task=r["task"],
            group=r["group"],
            metric=r["metric"],
            value=float(r["value"]),
            n=int(r["n"]),
            low=float(r["low"]),
            high=float(r["high"]),
            higher_is_better=bool(r["higher_is_better"]),
            chance=None if r.get("chance") is None else float(r["chance"]),
            note=r.get("note") or "",
        )
        for r in content["results"]
    )
    changes = tuple(
        Change(c["task"], c["metric"], float(c["difference"]), float(c["low"]), float(c["high"]), int(c["n"])) for c in content.get("comparison") or []
    )
    baseline = (content.get("baseline") or {}).get("name")
    dropped = tuple((item["task"], item["reason"]) for item in content.get("dropped") or [])
    return Evaluated(step.name, step.parent("checkpoint"), results, baseline, changes, dropped)


def _exported(artifact: Artifact, step: Step) -> Exported:
    return Exported(step=step.name, model=step.parent("checkpoint"), parity=artifact.json("parity.json"))
