"""Which samples a step trains on, and the thread that reads them ahead. Everything is a pure function of the step.

Step t (first: 0) of a phase takes samples t*B ... t*B + B - 1 of the data order, B = sequences per step. Micro-batch m of data
rank r (of D, b sequences each) is samples t*B + (m*D + r)*b ... + b - 1, so the union over ranks and micro-batches never
depends on the layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from megatron_r1.artifacts.base import Artifact
from megatron_r1.artifacts.checkpoint import TrainManifest
from megatron_r1.artifacts.mixture import load_mixture
from megatron_r1.data.dataset import PretrainDataset, SftDataset
from megatron_r1.data.mixture_order import MixtureOrder
from megatron_r1.data.shards import ShardSet
from megatron_r1.data.view import TokenStream
from megatron_r1.train.config import TrainConfig
from megatron_r1.utils.errors import DataError, ParallelError
from megatron_r1.utils.logging import get_logger
from megatron_r1.utils.seeding import derive_seed

log = get_logger("train.feed")
Batch = dict[str, np.ndarray]


class Dataset(Protocol):
    """What the feed needs of a dataset."""

    def batch(self, indices: Any) -> Batch:
        """Samples as arrays [b, s]."""
        ...


@dataclass
class TrainingData:
    """The data of one phase.

    sources: names in the order of `source_ids`; weights: shares asked for; blocks: sequences of one epoch per source;
    start, order: cursors carried in and the data order (next_token and distill); data_seed: what the order was keyed by.
    """

    dataset: Dataset
    sources: list[str]
    weights: dict[str, float]
    blocks: dict[str, int]
    data_seed: int
    order: MixtureOrder | None = None
    start: dict[str, int] = field(default_factory=dict)

    @property
    def sequences_per_epoch(self) -> int:
        """Sequences that all sources hold together."""
        return sum(self.blocks.values())

    def cursors(self, samples: int) -> dict[str, int]:
        """Blocks of every source consumed after `samples` samples of this phase, carried ones included."""
        return {**self.start, **({} if self.order is None else self.order.counts(samples))}

    def epochs(self, samples: int) -> dict[str, float]:
        """Passes over every source in this phase alone."""
        if self.order is None:
            return {name: samples / max(self.sequences_per_epoch, 1) for name in self.sources}
        after = self.order.counts(samples)
        return {name: (after[name] - self.start.get(name, 0)) / self.blocks[name] for name in self.sources}


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


def open_data(config: TrainConfig, shards: ShardSet, artifact: Artifact, mixture: Artifact | None, parent: TrainManifest | None, pad_id: int) -> TrainingData:
    """The dataset of a phase. Raises DataError when a source with a share holds less than one sequence."""
    weights = shares(config, shards, mixture)
    length, start_seed = int(config.seq_length), _carried(config, artifact, parent)
    seed = derive_seed(config.seed or 0, "data") if start_seed[1] is None else start_seed[1]
    if config.objective == "sft":
        return _open_sft(config, shards, weights, seed, pad_id)
    if not weights:
        raise DataError(expected="at least one source with a share above 0", found="none", fix="check the mixture, or set `sources`")
    streams = {name: TokenStream(shards.split(name)) for name in weights}
    blocks = {name: max(0, (stream.n_tokens - 1) // length) for name, stream in streams.items()}
    empty = [name for name, count in blocks.items() if count == 0]
    if empty:
        raise DataError(
            expected=f"at least {length + 1} training tokens in every source with a share", found=", ".join(f"{name}: {streams[name].n_tokens}" for name in empty),
            fix="give these sources the share 0, add documents, or shorten seq_length",
        )
    start = start_seed[0]
    order = MixtureOrder(blocks, weights, seed, {name: start.get(name, 0) for name in weights})
    dataset = PretrainDataset(streams, order, length, config.reset_documents)
    return TrainingData(dataset, list(weights), weights, blocks, seed, order, start)


def _open_sft(config: TrainConfig, shards: ShardSet, weights: dict[str, float] | None, seed: int, pad_id: int) -> TrainingData:
    names = [name for name in (weights or shards.sources) if len(shards.split(name))]
    if not names:
        raise DataError(expected="conversations in the shards", found="no training documents", fix="point inputs.shards at a corpus step with chat sources")
    dataset = SftDataset({name: shards.split(name) for name in names}, int(config.seq_length), seed, pad_id, weights, config.sft.mask)
    return TrainingData(dataset, names, weights or {}, {"packed": len(dataset)}, seed)


class Feed:
    """Micro-batches of this rank, read one step ahead by a thread (reading is pure, so reading ahead changes nothing)."""

    def __init__(self, dataset: Dataset, config: TrainConfig, data_rank: int, data_size: int) -> None:
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
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="feed")
        self._ahead: tuple[int, Future[list[Batch]]] | None = None

    def first_samples(self, step: int) -> list[int]:
        """First sample of each of this rank's micro-batches in step `step` (0-based)."""
        return [step * self.per_step + (m * self.data_size + self.data_rank) * self.micro_batch for m in range(self.num_microbatches)]

    def _read(self, step: int) -> list[Batch]:
        batches = []
        for first in self.first_samples(step):
            batch = self.dataset.batch(range(first, first + self.micro_batch))
            batch["first_sample"] = np.asarray(first, np.int64)
            batches.append(batch)
        return batches

    def step(self, step: int, *, last: bool = False) -> list[Batch]:
        """Micro-batches of step `step` (0-based); starts reading the next step's unless this is the last."""
        ahead, self._ahead = self._ahead, None
        batches = ahead[1].result() if ahead is not None and ahead[0] == step else self._read(step)
        if not last:
            self._ahead = (step + 1, self._pool.submit(self._read, step + 1))
        return batches

    def close(self) -> None:
        """Stop the thread."""
        self._pool.shutdown(wait=False, cancel_futures=True)
