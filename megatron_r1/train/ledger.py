"""What was read: the documents of any step, and the proof over a chain of phases that nothing was lost or repeated.

ledger.jsonl holds one line for every step: sample numbers and sequences per source. Together with the data order, which is opened again from
the settings and inputs of the artifact and compared with the fingerprint in train.json, that says which tokens were targets, so
no list of documents has to be written while training.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatron_r1.artifacts.base import Artifact, Parent, artifact_path, open_artifact
from megatron_r1.artifacts.checkpoint import CheckpointSet
from megatron_r1.data.shards import ShardSet
from megatron_r1.data.view import Ranges, TokenStream, document_numbers, union
from megatron_r1.train.config import CONVERSATIONS, TrainConfig
from megatron_r1.train.feed import TrainingData, open_data
from megatron_r1.utils.errors import DataError

CHUNK = 1 << 18
"""Samples that are looked up together."""


class Reading(NamedTuple):
    """Tokens `first` ... `first + tokens - 1` of a document (of the training split) that were targets of a step."""

    source: str
    epoch: int
    document: int
    first: int
    tokens: int


class Passage(NamedTuple):
    """One epoch of one source, over all phases. finished: whether training went beyond it; tokens: targets; repeated: of these, tokens that had been
    targets before; left: tokens of the documents kept at its end that were none (0 while it runs); allowed: as many may be left."""

    source: str
    epoch: int
    finished: bool
    tokens: int
    repeated: int
    left: int
    allowed: int


@dataclass(frozen=True)
class Phase:
    """A train artifact with its data opened again."""

    found: CheckpointSet
    config: TrainConfig
    shards: ShardSet
    data: TrainingData

    @property
    def samples(self) -> int:
        """Samples trained on."""
        return self.found.manifest.steps * self.config.sequences_per_step


def documents_of_step(data: TrainingData, per_step: int, step: int) -> list[Reading]:
    """What step `step` (0-based) of a phase read, in the order of sources and documents. Pre-training only."""
    found = []
    for (source, epoch), ranges in _targets(data, range(step * per_step, (step + 1) * per_step)):
        offsets = data.continued[source].shard.offsets
        starts, ends = ranges
        cuts = np.unique(np.concatenate([starts, ends, offsets]))
        begins = cuts[:-1][np.searchsorted(starts, cuts[:-1], side="right") > np.searchsorted(ends, cuts[:-1], side="right")]
        lengths = cuts[np.searchsorted(cuts, begins) + 1] - begins
        documents = np.searchsorted(offsets, begins, side="right") - 1
        found += [Reading(source, epoch, *numbers) for numbers in zip(documents.tolist(), (begins - offsets[documents]).tolist(), lengths.tolist())]
    return sorted(found)


def _targets(data: TrainingData, samples: range) -> Iterator[tuple[tuple[str, int], Ranges]]:
    """((source, epoch), tokens of its shard that were targets) of some samples."""
    sources, blocks, epochs = data.order.locate_many(samples)
    for number, epoch in np.unique(np.stack([sources, epochs]), axis=1).T.tolist():
        source = data.order.names[number]
        rest, of = data.order.rest.get(source), data.continued[source]
        stream: TokenStream | None = of.rest_stream if rest is not None and rest.epoch == epoch else of.stream
        assert stream is not None  # a rest has a stream
        yield (source, epoch), stream.ranges_of(blocks[(sources == number) & (epochs == epoch)], of.seq_length)


def open_phase(artifact: Artifact) -> Phase:
    """A train artifact's data, from the artifacts beside it. Raises DataError when they give another order than it was trained in."""
    found = CheckpointSet.open(artifact)
    config = TrainConfig.model_validate(artifact.manifest.config)
    if config.objective in CONVERSATIONS:
        raise DataError(expected="a phase of pre-training or mid-training", found=f"{artifact.name}, which takes whole conversations", fix="look at an earlier phase")

    def beside(role: str) -> Artifact | None:
        parent = artifact.manifest.parents.get(role)
        return open_artifact(artifact_path(artifact.path.parent, parent.name, parent.fingerprint)) if isinstance(parent, Parent) else None

    shards, before = beside("shards"), beside("checkpoint")
    assert shards is not None  # every train step has some
    opened = ShardSet.open(shards)
    data = open_data(config, opened, shards, beside("mixture"), None if before is None else CheckpointSet.open(before))
    if data.fingerprint != found.manifest.data_order:
        raise DataError(
            expected=f"the data order {found.manifest.data_order or 'that older releases did not write down'} of {artifact.name}", found=data.fingerprint,
            fix="look at it with the release it was trained with",
        )
    return Phase(found, config, opened, data)


def open_chain(artifact: Artifact) -> list[Phase]:
    """A phase and those before it whose cursors it carries on, oldest first."""
    chain = [open_phase(artifact)]
    while True:
        first = chain[0]
        parent = first.found.artifact.manifest.parents.get("checkpoint")
        if not isinstance(parent, Parent) or not first.config.carry_cursors:
            return chain
        before = open_artifact(artifact_path(first.found.artifact.path.parent, parent.name, parent.fingerprint))
        manifest = CheckpointSet.open(before).manifest
        if manifest.shards != first.found.manifest.shards or not manifest.data_cursors:
            return chain
        chain.insert(0, open_phase(before))


def check_journal(phase: Phase) -> None:
    """Raise DataError unless ledger.jsonl holds every step once and says what the data order says."""
    per_step, after = phase.config.sequences_per_step, phase.data.order.counts(0)
    records = phase.found.ledger()
    for number, record in enumerate(records):
        before, after = after, phase.data.order.counts((number + 1) * per_step)
        wanted = {
            "step": number + 1, "first": number * per_step, "last": (number + 1) * per_step - 1,
            "sources": {name: after[name] - before[name] for name in after if after[name] > before[name]},
        }
        found = {key: record.get(key) for key in wanted}
        if found != wanted:
            raise DataError(expected=f"{wanted} in line {number + 1} of the ledger of {phase.found.artifact.name}", found=str(found), fix="the ledger was edited: restore the artifact")
    if len(records) != phase.found.manifest.steps:
        raise DataError(
            expected=f"{phase.found.manifest.steps} lines in the ledger of {phase.found.artifact.name}", found=str(len(records)), fix="the ledger was edited: restore the artifact"
        )


def passages(phases: Sequence[tuple[TrainingData, int]], shards: ShardSet) -> list[Passage]:
    """Every epoch of every source over a chain of (data, samples), token by token. Memory: the ranges read in the epochs of the chain."""
    read: dict[tuple[str, int], list[Ranges]] = {}
    ended: dict[tuple[str, int], tuple[int, int]] = {}
    legs: dict[tuple[str, int], int] = {}
    stands: dict[str, int] = {}
    for data, samples in phases:
        for at in range(0, samples, CHUNK):
            for key, ranges in _targets(data, range(at, min(samples, at + CHUNK))):
                read.setdefault(key, []).append(ranges)
        for name, cursor in data.cursors(samples).items():
            if name in data.continued:
                for epoch in range(stands.get(name, 0), cursor.epoch + 1):
                    legs[name, epoch] = legs.get((name, epoch), 0) + 1
                of, shard = data.continued[name], shards.split(name)
                for epoch in range(stands.get(name, 0), cursor.epoch):
                    kept = np.arange(len(shard)) if of.view == "" else document_numbers(shard, data.lists[name, of.view])
                    known = union(*read[name, epoch]) if (name, epoch) in read else (np.zeros(0, np.int64), np.zeros(0, np.int64))
                    ended[name, epoch] = TokenStream(shard, kept, known).n_fresh, of.seq_length
            stands[name] = cursor.epoch
    found = []
    for (name, epoch), parts in sorted(read.items()):
        tokens = sum(int((ends - starts).sum()) for starts, ends in parts)
        starts, ends = union(*parts)
        left, length = ended.get((name, epoch), (0, 0))
        found.append(Passage(name, epoch, (name, epoch) in ended, tokens, tokens - int((ends - starts).sum()), left, length + legs[name, epoch] if length else 0))
    return found


def prove(path: Path) -> list[Passage]:
    """Check the chain of phases that ends in the train artifact at `path`. Raises DataError naming the first source and epoch with a token that
    was lost or repeated, or the first line of a ledger that is not what the order says."""
    chain = open_chain(open_artifact(path))
    for phase in chain:
        check_journal(phase)
    found = passages([(phase.data, phase.samples) for phase in chain], chain[-1].shards)
    for passage in found:
        if passage.repeated or passage.left > passage.allowed:
            raise DataError(
                expected=f"every token of epoch {passage.epoch} of {passage.source} a target once (at most {passage.allowed} left at its end)",
                found=f"{passage.repeated} repeated, {passage.left} left", fix="this is a defect of the data order: please report it with the settings of all phases",
            )
    return found
