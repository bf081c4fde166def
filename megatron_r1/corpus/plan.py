"""What a corpus step has to do, from its settings and the names and sizes of its files alone: the same in every process."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megatron_r1.corpus import decontaminate, embedded
from megatron_r1.corpus.config import CorpusConfig, SourceConfig
from megatron_r1.corpus.control import Control
from megatron_r1.corpus.embedded import Context
from megatron_r1.corpus.files import InputFile, find_files
from megatron_r1.corpus.filters import MIN_CHARS
from megatron_r1.corpus.partitions import Partition, plan_partitions
from megatron_r1.corpus.splits import Splitter
from megatron_r1.utils.errors import ConfigError, DataError, EnvironmentProblem
from megatron_r1.utils.io import read_json
from megatron_r1.utils.logging import get_logger

log = get_logger("corpus")
FORMAT = 1
"""Of the scratch files; another number makes everything again."""


@dataclass(frozen=True)
class Sizes:
    """How the work is cut. Other sizes, the same documents in the same order."""

    partition: int = 64 << 20
    """Bytes of an input file that one extraction reads."""
    part: int = 32 << 20
    """Bytes of input, or of text, after which a part is committed: what a kill can cost at most."""
    bucket: int = 1 << 21
    """Keys among which one task looks for duplicates."""
    range: int = 1 << 25
    """Tokens that one task writes into a shard: a multiple of a block of the checksums, so that files of masks are cut between blocks too."""
    segment: int = 1 << 24
    """Tokens of a stretch of the shuffled order: what a task holds."""


SIZES = Sizes()


@dataclass(frozen=True)
class Plan:
    """One source with every default filled in."""

    name: str
    number: int
    source: SourceConfig
    domain: str
    format: str
    distractor: bool
    min_chars: int
    max_bytes: int | None
    corpus: embedded.Corpus | None


def plan(name: str, source: SourceConfig, number: int = 0) -> Plan:
    """Fill in what the source leaves to its corpus. Raises ConfigError for an unknown embedded corpus or one of another format."""
    known = embedded.corpus(source.corpus or name) if source.kind == "embedded" else None
    form = source.format or (known.format if known else "text")
    if known and form != known.format:
        raise ConfigError(expected=f"format {known.format} for the embedded corpus {known.name}", found=form, fix=f"remove sources.{name}.format")
    limit = source.max_bytes if source.max_bytes is not None else known.max_bytes if known else None
    least = source.min_chars if source.min_chars is not None else known.min_chars if known and known.min_chars is not None else MIN_CHARS[form]
    noise = source.distractor if source.distractor is not None else bool(known and known.distractor)
    return Plan(name, number, source, source.domain or (known.domain if known else "web"), form, noise, least, None if limit is None else int(limit), known)


@dataclass(frozen=True)
class Rules:
    """What applies to every source, and what was loaded for it; what can not be had is recorded, never silently left out."""

    splitter: Splitter
    overlap: decontaminate.Overlap
    control: Control | None
    loaded: list[dict[str, Any]]
    missing: list[dict[str, str]]

    @property
    def identity(self) -> list[Any]:
        """Equal for rules that treat every document alike."""
        return [self.overlap.digest(), sorted(self.splitter.control)]


def rules(config: CorpusConfig, plans: dict[str, Plan]) -> Rules:
    """Load what the settings ask for."""
    missing: list[dict[str, str]] = []
    control = None
    if config.splits.control_countries and any(item.corpus and item.domain in ("knowledge", "web") for item in plans.values()):
        try:
            control = Control(config.splits.control_countries)
        except EnvironmentProblem as problem:
            missing.append(lacking("control countries", problem))
    wanted = config.decontaminate
    overlap, loaded = decontaminate.Overlap(wanted.ngram if wanted else 13), []
    for name in wanted.against if wanted else ():
        try:
            loaded.append(decontaminate.load(name, overlap))
        except EnvironmentProblem as problem:
            missing.append(lacking(name, problem))
    return Rules(Splitter(config.splits, control.groups if control else ()), overlap, control, loaded, missing)


def lacking(name: str, problem: EnvironmentProblem) -> dict[str, str]:
    """A record of what could not be had, said aloud."""
    log.warning("MISSING %s, going on without it\n%s", name, problem)
    return {"name": name, "reason": problem.found, "fix": problem.fix}


@dataclass(frozen=True)
class Unit:
    """What one extraction reads: a partition, or a whole source where every document depends on those before it (embedded
    corpora, and a source with max_bytes: how much is left depends on what was kept)."""

    plan: Plan
    number: int
    partitions: tuple[Partition, ...]
    files: tuple[InputFile, ...]
    digest: str
    bytes: int

    @property
    def folder(self) -> Path:
        """Where its parts are, below the job's folder."""
        return Path("extract", self.plan.name, f"{self.number:06d}-{self.digest}")


@dataclass(frozen=True)
class Part:
    """A stretch of kept documents, committed at once. start: number of its first document, counted over all parts of all sources."""

    source: str
    number: int
    path: Path
    start: int
    record: dict[str, Any]

    @property
    def documents(self) -> int:
        """Documents in it, before duplicates are dropped."""
        return self.record["documents"]

    def file(self, ending: str) -> Path:
        """One of its files."""
        return self.path.with_name(f"{self.path.name}.{ending}")


class Job:
    """A corpus step in one process. Everything but its arguments is worked out again wherever it is sent.

    folder: scratch, on a file system that every process of the job sees; given: tokenizer folder of an earlier step.
    """

    def __init__(self, config: CorpusConfig, folder: Path, given: Path | None = None, sizes: Sizes | None = None) -> None:
        self.config, self.folder, self.given, self.sizes = config, Path(folder), given, sizes or SIZES

    def __reduce__(self) -> tuple[Any, ...]:
        return Job, (self.config, self.folder, self.given, self.sizes)

    @cached_property
    def plans(self) -> dict[str, Plan]:
        """Every source of the recipe."""
        return {name: plan(name, source, number) for number, (name, source) in enumerate(self.config.sources.items())}

    @cached_property
    def rules(self) -> Rules:
        """What applies to every source."""
        return rules(self.config, self.plans)

    @cached_property
    def context(self) -> Context:
        """What embedded corpora may depend on; keeps those that others are made of."""
        derived = {base for item in self.plans.values() if item.corpus for base in item.corpus.derived_from}
        return Context(self.config.seed or 0, self.rules.splitter, frozenset(derived))

    @cached_property
    def units(self) -> list[Unit]:
        """Extractions, in the order their documents come."""
        return [unit for item in self.plans.values() for unit in self._units(item)]

    def _units(self, item: Plan) -> list[Unit]:
        if item.corpus:
            return [self._unit(item, 0, (), ())]
        files = tuple(find_files(item.name, item.source))
        partitions = tuple(plan_partitions(item.name, item.source, files, self.sizes.partition))
        if item.max_bytes is not None:
            return [self._unit(item, 0, partitions, files)]
        named = {file.name: file for file in files}
        return [self._unit(item, number, (partition,), (named[partition.file],)) for number, partition in enumerate(partitions)]

    def _unit(self, item: Plan, number: int, partitions: tuple[Partition, ...], files: tuple[InputFile, ...]) -> Unit:
        identity = [
            FORMAT, self.rules.identity, [partition.plain() for partition in partitions], [file.plain() for file in files],
            item.corpus.origin() if item.corpus else None, self.sizes.part,
        ]
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode("utf-8")).hexdigest()[:12]
        size = sum(partition.end - partition.start for partition in partitions) if partitions else item.max_bytes or self.sizes.part
        return Unit(item, number, partitions, files, digest, size)

    @cached_property
    def extracted(self) -> dict[str, list[dict[str, Any]]]:
        """Records of all extractions, by source; those of a source that could not be had say so. Raises DataError when none could."""
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in self.plans}
        for unit in self.units:
            found[unit.plan.name].append(read_json(self.folder / unit.folder / "done.json"))
        if all(records[0]["missing"] for records in found.values()):
            last = found[list(found)[-1]][0]["missing"]
            raise DataError(
                expected="at least one source that can be had", found=f"none of {', '.join(found)} ({last['reason']})", fix="check the network or fill the cache, or add files of your own"
            )
        return found

    @property
    def missing(self) -> list[dict[str, str]]:
        """What could not be had."""
        return [*self.rules.missing, *(records[0]["missing"] for records in self.extracted.values() if records[0]["missing"])]

    @cached_property
    def parts(self) -> list[Part]:
        """Every part of every source that could be had, in order."""
        found: list[Part] = []
        start, numbers = 0, dict.fromkeys(self.plans, 0)
        for unit in self.units:
            done = self.extracted[unit.plan.name][unit.number]
            for number, record in enumerate(done["parts"]):
                part = Part(unit.plan.name, numbers[unit.plan.name], self.folder / unit.folder / f"part-{number:05d}", start, record)
                numbers[part.source] += 1
                start += part.documents
                found.append(part)
        return found

    @cached_property
    def starts(self) -> np.ndarray:
        """Number of the first document of every part, int64[parts]."""
        return np.array([part.start for part in self.parts], np.int64)

    @property
    def documents(self) -> int:
        """Documents extracted, before duplicates are dropped."""
        return self.parts[-1].start + self.parts[-1].documents if self.parts else 0

    @cached_property
    def _by_source(self) -> dict[str, list[Part]]:
        found: dict[str, list[Part]] = {name: [] for name in self.plans}
        for part in self.parts:
            found[part.source].append(part)
        return found

    def parts_of(self, source: str) -> list[Part]:
        """The parts of one source."""
        return self._by_source[source]

    @cached_property
    def present(self) -> list[str]:
        """Sources that could be had."""
        return [name for name, records in self.extracted.items() if not records[0]["missing"]]

    @cached_property
    def made(self) -> Path:
        """Where everything that comes after extraction is made: another folder for other input."""
        identity = [[unit.plan.name, unit.digest] for unit in self.units if unit.plan.name in self.present]
        return self.folder / f"made-{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]}"

    @property
    def quarantine(self) -> Path:
        """Where bad input is listed, for users."""
        return self.folder.parent / "quarantine"

    def forget(self) -> None:
        """Look at the records again."""
        for name in ("extracted", "parts", "starts", "_by_source", "present", "made"):
            self.__dict__.pop(name, None)
