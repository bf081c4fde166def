"""Which samples a step trains on, and their way to the device. Everything is a pure function of the step.

Step t (first: 0) of a phase takes samples t*B ... t*B + B - 1 of the data order, B = sequences per step. Micro-batch m of data
rank r (of D, b sequences each) is samples t*B + (m*D + r)*b ... + b - 1, so the union over ranks and micro-batches never
depends on the layout.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from megatron_r1.artifacts.base import Artifact, Parent
from megatron_r1.artifacts.checkpoint import CheckpointSet, Leg, SourceCursor, read_view, write_view
from megatron_r1.artifacts.mixture import load_kept, load_mixture
from megatron_r1.data.carry import Continued
from megatron_r1.data.dali import DaliSteps
from megatron_r1.data.dataset import PretrainDataset, SftDataset
from megatron_r1.data.loader import Loader
from megatron_r1.data.mixture_order import MixtureOrder
from megatron_r1.data.prompts import GroupedOrder, PromptDataset
from megatron_r1.data.schedule import Order, ScheduledOrder, interpolated
from megatron_r1.data.shards import ShardSet
from megatron_r1.data.view import TokenStream
from megatron_r1.parallel import device
from megatron_r1.train.config import CONVERSATIONS, TrainConfig
from megatron_r1.train.objectives import TENSORS
from megatron_r1.utils.errors import ConfigError, DataError, ParallelError
from megatron_r1.utils.logging import get_logger
from megatron_r1.utils.seeding import derive_seed

log = get_logger("train.feed")
Batch = dict[str, np.ndarray]


class Dataset(Protocol):
    """What the feed needs of a dataset. `order`: the data order; `source_names`: what `source_ids` index."""

    order: Order | GroupedOrder
    source_names: list[str]

    def batch(self, indices: Any) -> Batch:
        """Samples as arrays [b, s]."""
        ...


@dataclass(frozen=True)
class TrainingData:
    """The data of one phase. `data_seed`: what the data order was keyed by, carried on together with the cursors; `continued`: where the
    sources of this phase go on; `unused`: cursors of the others; `lists`: (source, hash) -> bool[documents], all that the cursors refer to."""

    dataset: Dataset
    data_seed: int
    continued: dict[str, Continued] = field(default_factory=dict)
    unused: dict[str, SourceCursor] = field(default_factory=dict)
    lists: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)

    @property
    def order(self) -> Order | GroupedOrder:
        """Which block every sample is."""
        return self.dataset.order

    @property
    def sources(self) -> list[str]:
        """Names in the order of `source_ids`."""
        return self.dataset.source_names

    @property
    def weights(self) -> dict[str, float]:
        """Share of every source that has one; over the whole phase when they change."""
        return {name: round(weight, 9) for name, weight in self.order.weights.items()}

    @property
    def sequences_per_epoch(self) -> int:
        """Sequences that the sources with a share hold together."""
        return sum(self.order.blocks[name] for name in self.order.weights)

    @property
    def fingerprint(self) -> str:
        """What tells the samples of one phase from another's: order, documents, and what was consumed before."""
        sources = {name: [of.view, of.seq_length, [leg.plain() for leg in of.legs]] for name, of in self.continued.items()}
        return hashlib.sha256(json.dumps([self.order.fingerprint, sources], sort_keys=True).encode()).hexdigest()[:16]

    def cursors(self, samples: int) -> dict[str, SourceCursor]:
        """Where every source stands after `samples` samples of this phase, also those it does not use."""
        counts = self.order.counts(samples)
        return {**self.unused, **{name: of.cursor(self.order.position(name, counts[name])) for name, of in self.continued.items()}}

    def save_lists(self, folder: Path, cursors: Mapping[str, SourceCursor]) -> None:
        """Write the lists of documents that cursors refer to."""
        for name, cursor in cursors.items():
            for view in {leg.view for leg in cursor.legs} - {""}:
                write_view(folder, f"{name}-{view}", self.lists[name, view])

    def epochs(self, samples: int) -> dict[str, float]:
        """Passes over every source in this phase alone."""
        after = self.order.counts(samples)
        return {name: (after[name] - self.order.start[name]) / self.order.blocks[name] for name in self.order.weights}


def shares(config: TrainConfig, shards: ShardSet, mixture: Artifact | None) -> dict[str, float] | None:
    """Share of every source, sum 1; None when the phase states none (conversations only). Raises DataError for unknown sources."""
    if mixture is not None:
        return _shares(load_mixture(mixture).weights, shards)
    return None if config.sources is None else _shares(config.sources, shards)


def _shares(table: Mapping[str, float] | str, shards: ShardSet) -> dict[str, float]:
    if isinstance(table, str):
        tokens = {name: shards.split(name).n_tokens for name in shards.sources}
        table = {name: float(count) if table == "natural" else 1.0 for name, count in tokens.items() if count}
    unknown = sorted(set(table) - set(shards.sources))
    if unknown:
        raise DataError(
            expected=f"shares of sources the shards hold ({', '.join(sorted(shards.sources))})", found=f"shares of {', '.join(unknown)}",
            fix="train on the shards the mixture was made for, or correct the names in `sources`",
        )
    total = math.fsum(table.values())
    return {name: weight / total for name, weight in table.items() if weight > 0}


def kept_documents(shards: ShardSet, artifact: Artifact, mixture: Artifact | None) -> dict[str, np.ndarray]:
    """Numbers of the documents to train on, of the sources a mixture leaves documents out of. Raises DataError for other shards."""
    found = None if mixture is None else load_kept(mixture, load_mixture(mixture))
    if mixture is None or found is None:
        return {}
    parent = mixture.manifest.parents.get("shards")
    if not isinstance(parent, Parent) or parent.fingerprint != artifact.fingerprint:
        raise DataError(
            expected=f"the shards that {mixture.name} chose documents of" + (f" ({parent.name}, {parent.fingerprint[:8]})" if isinstance(parent, Parent) else ""),
            found=f"{artifact.name}, {artifact.fingerprint[:8]}", fix="train on the shards the mixture was made for, or make it without a filter",
        )
    kept = {name: numbers for name, numbers in found.items() if len(numbers) < len(shards.split(name))}
    for name, numbers in kept.items():
        log.info("data: %s is read from %d of its %d documents, those %s kept", name, len(numbers), len(shards.split(name)), mixture.name)
    return kept


def view_hash(numbers: np.ndarray) -> str:
    """What tells one list of documents from another."""
    return hashlib.sha256(np.ascontiguousarray(numbers, "<i8").tobytes()).hexdigest()[:16]


def _carried(config: TrainConfig, shards: ShardSet, artifact: Artifact, parent: CheckpointSet | None, known: Mapping[tuple[str, str], np.ndarray]) -> dict[str, SourceCursor]:
    """Cursors to go on with; a reason in the log when there is nothing to carry."""
    if parent is None or not config.carry_cursors or config.objective in CONVERSATIONS:
        return {}
    manifest = parent.manifest
    if manifest.shards != artifact.fingerprint:
        log.info("data: other shards than the input checkpoint's, every source starts at its beginning")
        return {}
    found = {}
    for name, cursor in manifest.data_cursors.items():
        view = manifest.data_views.get(name, "")
        if isinstance(cursor, SourceCursor):
            found[name] = cursor
        elif view and (name, view) not in known:
            # Older releases kept the hash of the list only.
            log.warning("data: %s was read from a list of documents that the input checkpoint does not hold, so it starts at its beginning", name)
        else:
            blocks = TokenStream(shards.split(name), known.get((name, view))).blocks(manifest.seq_length)
            epoch, taken = divmod(cursor, blocks) if blocks else (0, 0)
            found[name] = SourceCursor(epoch=epoch, legs=[Leg(view=view, seq_length=manifest.seq_length, blocks=blocks, taken=taken)] if taken else [])
    return found


def open_data(config: TrainConfig, shards: ShardSet, artifact: Artifact, mixture: Artifact | None, parent: CheckpointSet | None) -> TrainingData:
    """The dataset of a phase. Raises DataError when a source with a share holds less than one sequence, or when the sources reach their caps
    before the budget is."""
    weights = shares(config, shards, mixture)
    kept = kept_documents(shards, artifact, mixture)
    if config.objective in CONVERSATIONS and kept:
        raise ConfigError(
            expected="a mixture that keeps all conversations, for fine-tuning", found=f"documents left out of {', '.join(kept)}",
            fix="make the mixture without a filter: conversations are taken whole and are not chosen by influence",
        )
    views = {name: view_hash(numbers) for name, numbers in kept.items()}
    lists = {(name, views[name]): _flags(len(shards.split(name)), numbers) for name, numbers in kept.items()}
    carried = _carried(config, shards, artifact, parent, lists)
    seed = parent.manifest.data_seed if carried and parent is not None else derive_seed(config.seed or 0, "data")
    if config.objective == "sft":
        return _open_sft(config, shards, weights, seed)
    if config.objective == "grpo":
        return _open_prompts(config, shards, weights, seed)
    if not weights:
        raise DataError(expected="at least one source with a share above 0", found="none", fix="check the mixture, or set `sources`")
    for name, cursor in carried.items():
        for leg in cursor.legs:
            if leg.view and (name, leg.view) not in lists:
                assert parent is not None
                lists[name, leg.view] = read_view(parent.artifact, f"{name}-{leg.view}", len(shards.split(name)))
    length = int(config.seq_length)
    pieces = _pieces(config, weights, shards)
    names = list(dict.fromkeys(name for _, table in pieces for name in table))
    continued = {
        name: Continued(
            shards.split(name), name, carried.get(name, SourceCursor(epoch=0)), seed, views.get(name, ""), lambda view, name=name: lists[name, view] if view else None, length
        )
        for name in names
    }
    empty = [name for name, of in continued.items() if of.blocks == 0]
    if empty:
        raise DataError(
            expected=f"at least {length + 1} training tokens in every source with a share",
            found=f"less in {len(empty)} of {len(names)}: " + ", ".join(f"{name}: {continued[name].stream.n_tokens}" for name in empty[:8]) + (", ..." if len(empty) > 8 else ""),
            fix="give these sources the share 0, join them into larger sources, add documents, or shorten seq_length",
        )
    for name, of in continued.items():
        if of.rest is not None and of.start == 0:
            log.info(
                "data: %s is read from other documents or in other sequences than before: %d sequences of its epoch %d are left, whole epochs follow", name, of.rest.blocks,
                of.rest.epoch,
            )
    order = _order(config, pieces, continued, seed)
    dataset = PretrainDataset(
        {name: of.stream for name, of in continued.items()}, order, length, config.reset_documents,
        {name: of.rest_stream for name, of in continued.items() if of.rest_stream is not None},
    )
    return TrainingData(dataset, seed, continued, {name: cursor for name, cursor in carried.items() if name not in continued}, lists)


def _flags(documents: int, numbers: np.ndarray) -> np.ndarray:
    flags = np.zeros(documents, bool)
    flags[numbers] = True
    return flags


def _pieces(config: TrainConfig, weights: dict[str, float], shards: ShardSet) -> list[tuple[int, dict[str, float]]]:
    """(first sample, shares) of the phase as its settings state them."""
    length = int(config.seq_length)
    pieces = [(0, weights)]
    for piece in config.schedule:
        first, over = -(-int(piece.start) // length), int(piece.over) // length
        after = _shares(piece.sources, shards)
        pieces += interpolated(pieces[-1][1], after, first, over, piece.jumps) if over else [(first, after)]
    return pieces


def _order(config: TrainConfig, pieces: list[tuple[int, dict[str, float]]], continued: Mapping[str, Continued], seed: int) -> Order:
    blocks, start = ({name: getattr(of, what) for name, of in continued.items()} for what in ("blocks", "start"))
    rest = {name: of.rest for name, of in continued.items() if of.rest is not None}
    if len(pieces) == 1 and config.max_epochs is None:
        return MixtureOrder(blocks, pieces[0][1], seed, start, rest)
    total = (config.steps(sum(blocks.values())) or 1) * config.sequences_per_step
    if pieces[-1][0] >= total:
        raise ConfigError(
            expected=f"a schedule that ends within the budget of {total * int(config.seq_length)} tokens", found=f"shares that hold from token {pieces[-1][0] * int(config.seq_length)} on",
            fix="shorten the schedule or raise the budget",
        )
    caps = config.max_epochs if isinstance(config.max_epochs, dict) else dict.fromkeys(continued, config.max_epochs)
    unknown = sorted(set(caps) - set(continued))
    if unknown:
        raise ConfigError(expected=f"max_epochs of sources with a share ({', '.join(continued)})", found=f"of {', '.join(unknown)}", fix="correct the names in max_epochs")
    limits = {name: continued[name].limit(cap) for name, cap in caps.items() if cap is not None}
    order = ScheduledOrder(blocks, pieces, seed, start, rest, limits, total)
    for sample, name in order.capped:
        log.info(
            "data: %s reaches its %g passes at sample %d (token %d); its share goes to the others in proportion", name, caps[name], sample, sample * int(config.seq_length)
        )
    return order


def _open_sft(config: TrainConfig, shards: ShardSet, weights: dict[str, float] | None, seed: int) -> TrainingData:
    names, length = [name for name in (weights or shards.sources) if len(shards.split(name))], int(config.seq_length)
    if config.sft.too_long == "error":
        longer = {name: count for name in names if (count := int((shards.split(name).lengths > length + 1).sum()))}
        if longer:
            raise DataError(
                expected=f"conversations of at most {length + 1} tokens (seq_length and one), because sft.too_long is error",
                found=f"{sum(longer.values())} longer ones ({', '.join(f'{name} {count}' for name, count in longer.items())}), up to {max(int(shards.split(name).lengths.max()) for name in longer)} tokens",
                fix="raise seq_length, leave them out of the corpus, or set sft.too_long: cut",
            )
    dataset = SftDataset({name: shards.split(name) for name in names}, length, seed, shards.tokenizer.pad_id, weights, config.sft.mask)
    for what, counts in (("cut to seq_length", dataset.truncated), ("left out for having no target", dataset.without_target)):
        if sum(counts.values()):
            log.warning("sft: %d conversations %s (%s)", sum(counts.values()), what, ", ".join(f"{name} {count}" for name, count in counts.items() if count))
    return TrainingData(dataset, seed)


def _open_prompts(config: TrainConfig, shards: ShardSet, weights: dict[str, float] | None, seed: int) -> TrainingData:
    names = [name for name in (weights or shards.sources) if len(shards.split(name))]
    longest = int(config.seq_length) - config.grpo.max_new_tokens
    dataset = PromptDataset({name: shards.split(name) for name in names}, shards.tokenizer, seed, config.grpo.generations, longest, weights)
    log.info("grpo: %s", ", ".join(f"{len(documents)} questions of {name}" for name, documents in dataset.documents.items()))
    for what, counts in (("without an answer behind a mark", dataset.without_answer), (f"whose question is longer than {longest} tokens", dataset.too_long)):
        if sum(counts.values()):
            log.warning("grpo: %d conversations %s left out (%s)", sum(counts.values()), what, ", ".join(f"{name} {count}" for name, count in counts.items() if count))
    return TrainingData(dataset, seed)


class Feed:
    """Micro-batches of this rank for steps 0 ... end - 1, read ahead by threads and on their way to `target` when a step asks for them.

    Its whole state is the number of the next step; what the steps hold is fixed by the data order's fingerprint. An error while
    reading is raised by the step that needs the batch and says what was being read.
    """

    def __init__(self, dataset: Dataset, config: TrainConfig, data_rank: int, data_size: int, end: int, target: torch.device) -> None:
        self.dataset, self.per_step, self.micro_batch = dataset, config.sequences_per_step, int(config.micro_batch)
        self.data_rank, self.data_size = data_rank, data_size
        if self.per_step % (self.micro_batch * data_size):
            fitting = [size for size in range(1, self.per_step + 1) if self.per_step % (size * data_size) == 0]
            raise ParallelError(
                expected=f"{self.per_step} sequences per step (global_batch / seq_length) to be a multiple of micro_batch x data-parallel size",
                found=f"micro_batch {self.micro_batch} x {data_size} data-parallel ranks",
                fix=f"set micro_batch to one of {fitting}" if fitting else f"use a number of data-parallel ranks that divides {self.per_step}, or change global_batch",
            )
        self.num_microbatches = self.per_step // (self.micro_batch * data_size)
        stages = config.layout.pipeline if config.layout.virtual_pipeline else 1
        if self.num_microbatches % stages:
            raise ParallelError(
                expected=f"a number of micro-batches per step and rank that is a multiple of pipeline = {stages}, with virtual_pipeline (chunks take turns in rounds of {stages})",
                found=f"{self.per_step} sequences / (micro_batch {self.micro_batch} x {data_size} data-parallel ranks) = {self.num_microbatches}",
                fix="lower micro_batch, change global_batch, or remove virtual_pipeline",
            )
        settings = config.loader
        dali = settings.backend == "dali"
        self._upload = None if dali else device.uploader(target)
        self._loader = Loader(self._read, end, settings.ahead, settings.workers)
        self._steps: Loader[list[Batch]] | DaliSteps = self._loader
        if dali:
            number = device.gpu_number(target)
            self._steps = DaliSteps(self._loader.get, end, self.num_microbatches, TENSORS, settings.ahead, number, None if number is None else device.adopt)

    def first_samples(self, step: int) -> list[int]:
        """First sample of each of this rank's micro-batches in step `step` (0-based)."""
        return [step * self.per_step + (m * self.data_size + self.data_rank) * self.micro_batch for m in range(self.num_microbatches)]

    def _read(self, step: int) -> list[Batch]:
        # All of the step at once: what reading costs per call and source is shared by its micro-batches, which are views.
        size = self.micro_batch
        firsts = self.first_samples(step)
        whole = self.dataset.batch([sample for first in firsts for sample in range(first, first + size)])
        batches = []
        for m, first in enumerate(firsts):
            batch = {key: value[m * size : (m + 1) * size] for key, value in whole.items()}
            batch["first_sample"] = np.asarray(first, np.int64)
            if self._upload is not None:
                batch["staged"] = self._upload({key: batch[key] for key in TENSORS})
            batches.append(batch)
        return batches

    def step(self, step: int) -> list[Batch]:
        """Micro-batches of step `step` (0-based)."""
        return self._steps.get(step)

    def close(self) -> None:
        """Stop the threads."""
        self._steps.close()
        self._loader.close()
