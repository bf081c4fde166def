"""Which samples a step trains on, and their way to the device. Everything is a pure function of the step.

Step t (first: 0) of a phase takes samples t*B ... t*B + B - 1 of the data order, B = sequences per step. Micro-batch m of data
rank r (of D, b sequences each) is samples t*B + (m*D + r)*b ... + b - 1, so the union over ranks and micro-batches never
depends on the layout.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from megatron_r1.artifacts.base import Artifact, Parent
from megatron_r1.artifacts.checkpoint import TrainManifest
from megatron_r1.artifacts.mixture import load_kept, load_mixture
from megatron_r1.data.dali import DaliSteps
from megatron_r1.data.dataset import PretrainDataset, SftDataset
from megatron_r1.data.loader import Loader
from megatron_r1.data.mixture_order import MixtureOrder
from megatron_r1.data.shards import ShardSet
from megatron_r1.data.view import TokenStream
from megatron_r1.parallel import device
from megatron_r1.train.config import TrainConfig
from megatron_r1.train.objectives import TENSORS
from megatron_r1.utils.errors import ConfigError, DataError, ParallelError
from megatron_r1.utils.logging import get_logger
from megatron_r1.utils.seeding import derive_seed

log = get_logger("train.feed")
Batch = dict[str, np.ndarray]


class Dataset(Protocol):
    """What the feed needs of a dataset. `order`: the data order; `source_names`: what `source_ids` index."""

    order: MixtureOrder
    source_names: list[str]

    def batch(self, indices: Any) -> Batch:
        """Samples as arrays [b, s]."""
        ...


@dataclass(frozen=True)
class TrainingData:
    """The data of one phase. `start`: cursors carried in from earlier phases, also of sources this one does not use;
    `data_seed`: what the data order was keyed by, carried on together with the cursors."""

    dataset: Dataset
    data_seed: int
    start: dict[str, int] = field(default_factory=dict)
    views: dict[str, str] = field(default_factory=dict)
    """source -> hash of the list of documents its cursor counts blocks of; all documents where there is none."""

    @property
    def order(self) -> MixtureOrder:
        """Which block every sample is."""
        return self.dataset.order

    @property
    def sources(self) -> list[str]:
        """Names in the order of `source_ids`."""
        return self.dataset.source_names

    @property
    def weights(self) -> dict[str, float]:
        """Share of every source that has one."""
        return {name: round(weight, 9) for name, weight in self.order.weights.items()}

    @property
    def sequences_per_epoch(self) -> int:
        """Sequences that the sources with a share hold together."""
        return sum(self.order.blocks[name] for name in self.order.weights)

    def cursors(self, samples: int) -> dict[str, int]:
        """Blocks of every source consumed after `samples` samples of this phase, carried ones included."""
        return {**self.start, **self.order.counts(samples)}

    def epochs(self, samples: int) -> dict[str, float]:
        """Passes over every source in this phase alone."""
        after = self.order.counts(samples)
        return {name: (after[name] - self.order.start[name]) / self.order.blocks[name] for name in self.order.weights}


def shares(config: TrainConfig, shards: ShardSet, mixture: Artifact | None) -> dict[str, float] | None:
    """Share of every source, sum 1; None when the phase states none (sft only). Raises DataError for unknown sources."""
    if mixture is not None:
        weights: Mapping[str, float] = load_mixture(mixture).weights
    elif config.sources is None:
        return None
    elif isinstance(config.sources, str):
        tokens = {name: shards.split(name).n_tokens for name in shards.sources}
        weights = {name: float(count) if config.sources == "natural" else 1.0 for name, count in tokens.items() if count}
    else:
        weights = config.sources
    unknown = sorted(set(weights) - set(shards.sources))
    if unknown:
        raise DataError(
            expected=f"shares of sources the shards hold ({', '.join(sorted(shards.sources))})", found=f"shares of {', '.join(unknown)}",
            fix="train on the shards the mixture was made for, or correct the names in `sources`",
        )
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items() if weight > 0}


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


def _carried(config: TrainConfig, shards: Artifact, parent: TrainManifest | None) -> tuple[dict[str, int], int | None]:
    """Cursors and data seed to go on with; a reason in the log when there is nothing to carry."""
    if parent is None or not config.carry_cursors or config.objective == "sft":
        return {}, None
    if parent.shards != shards.fingerprint:
        log.info("data: other shards than the input checkpoint's, every source starts at its beginning")
    elif parent.seq_length != int(config.seq_length):
        log.info("data: sequences of %d tokens after %d, so every source starts at its beginning", int(config.seq_length), parent.seq_length)
    elif parent.data_cursors:
        return dict(parent.data_cursors), parent.data_seed
    return {}, None


def open_data(config: TrainConfig, shards: ShardSet, artifact: Artifact, mixture: Artifact | None, parent: TrainManifest | None) -> TrainingData:
    """The dataset of a phase. Raises DataError when a source with a share holds less than one sequence."""
    weights = shares(config, shards, mixture)
    start, carried_seed = _carried(config, artifact, parent)
    seed = derive_seed(config.seed or 0, "data") if carried_seed is None else carried_seed
    kept = kept_documents(shards, artifact, mixture)
    if config.objective == "sft" and kept:
        raise ConfigError(
            expected="a mixture that keeps all conversations, for fine-tuning", found=f"documents left out of {', '.join(kept)}",
            fix="make the mixture without a filter: conversations are packed whole and are not chosen by influence",
        )
    if config.objective == "sft":
        return _open_sft(config, shards, weights, seed)
    if not weights:
        raise DataError(expected="at least one source with a share above 0", found="none", fix="check the mixture, or set `sources`")
    length = int(config.seq_length)
    streams = {name: TokenStream(shards.split(name), kept.get(name)) for name in weights}
    blocks = {name: stream.blocks(length) for name, stream in streams.items()}
    empty = [name for name, count in blocks.items() if count == 0]
    if empty:
        raise DataError(
            expected=f"at least {length + 1} training tokens in every source with a share", found=", ".join(f"{name}: {streams[name].n_tokens}" for name in empty),
            fix="give these sources the share 0, add documents, or shorten seq_length",
        )
    views = {name: view_hash(numbers) for name, numbers in kept.items()}
    before = parent.data_views if start and parent is not None else {}
    changed = [name for name in weights if start.get(name) and views.get(name) != before.get(name)]
    if changed:
        log.info("data: other documents of %s than before are read, so these sources start at their beginning", ", ".join(changed))
        start = {name: 0 if name in changed else count for name, count in start.items()}
    order = MixtureOrder(blocks, weights, seed, {name: start.get(name, 0) for name in weights})
    unused = {name: view for name, view in before.items() if name not in weights}
    return TrainingData(PretrainDataset(streams, order, length, config.reset_documents), seed, start, {**unused, **{n: v for n, v in views.items() if n in weights}})


def _open_sft(config: TrainConfig, shards: ShardSet, weights: dict[str, float] | None, seed: int) -> TrainingData:
    names = [name for name in (weights or shards.sources) if len(shards.split(name))]
    dataset = SftDataset({name: shards.split(name) for name in names}, int(config.seq_length), seed, shards.tokenizer.pad_id, weights, config.sft.mask)
    for what, counts in (("cut to seq_length", dataset.truncated), ("left out for having no target", dataset.without_target)):
        if sum(counts.values()):
            log.warning("sft: %d conversations %s (%s)", sum(counts.values()), what, ", ".join(f"{name} {count}" for name, count in counts.items() if count))
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
        batches = []
        for first in self.first_samples(step):
            batch = self.dataset.batch(range(first, first + self.micro_batch))
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
