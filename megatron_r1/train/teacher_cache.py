"""Runs the teacher over the whole phase once, before training, and fills the top-k cache."""

from __future__ import annotations

from collections.abc import Callable

import torch

from megatron_r1.parallel.context import ParallelContext
from megatron_r1.parallel.vocab import VocabShard
from megatron_r1.train.config import TrainConfig
from megatron_r1.train.feed import Dataset
from megatron_r1.train.objectives import to_tensors
from megatron_r1.train.teacher import Teacher, top_k
from megatron_r1.train.topk_cache import TopKCache
from megatron_r1.utils.io import require_free_space
from megatron_r1.utils.logging import get_logger, progress

log = get_logger("train.teacher")
CHUNK_TOKENS = 1 << 15
"""Tokens of one chunk: what an interruption can cost."""
_CHECKED = 64
"""Chunks that a rank reads before the ranks tell each other what is missing."""


def fill(cache: TopKCache, dataset: Dataset, open_teacher: Callable[[], Teacher | None], config: TrainConfig, shard: VocabShard, ctx: ParallelContext) -> None:
    """Compute the chunks that are missing or damaged. The teacher is opened only if there are any. Collective.

    Chunks are dealt to data-parallel ranks in turn. Raises EnvironmentProblem when the disk has no room.
    """
    if ctx.is_main:
        cache.prepare()
    ctx.barrier()
    missing = _missing(cache, ctx)
    log.info("teacher cache: top %d of %d samples, %.1f MiB on disk; %d of %d chunks to compute", cache.top_k, cache.samples, cache.nbytes / 2**20, len(missing), cache.chunks)
    if not missing:
        return
    require_free_space(cache.folder, cache.nbytes * len(missing) // cache.chunks)
    teacher = open_teacher()  # none on stages before the last: they wait
    with progress("teacher", sum(len(cache.rows(chunk)) for chunk in missing) * cache.seq_length, enabled=ctx.is_main) as bar:
        for first in range(0, len(missing), ctx.data_size):
            group = missing[first : first + ctx.data_size]
            if teacher is not None and ctx.data_rank < len(group):
                _compute(cache, group[ctx.data_rank], dataset, teacher, config, shard, ctx)
            # Every round: a single barrier at the end would outlast the process group's timeout.
            ctx.barrier()
            bar.advance(sum(len(cache.rows(chunk)) for chunk in group) * cache.seq_length)


def _missing(cache: TopKCache, ctx: ParallelContext) -> list[int]:
    """Numbers of the chunks that are not there or not whole, rising, on every rank. Collective: every rank reads its share."""
    found: list[int] = []
    for first in range(0, cache.chunks, _CHECKED * ctx.world_size):
        mine = range(first + ctx.rank, min(first + _CHECKED * ctx.world_size, cache.chunks), ctx.world_size)
        # Now and then: what a single exchange at the end would wait for can outlast the process group's timeout.
        for part in ctx.everywhere(lambda mine=mine: [chunk for chunk in mine if not cache.complete(chunk)]):
            found += part
    return sorted(found)


def _compute(cache: TopKCache, chunk: int, dataset: Dataset, teacher: Teacher, config: TrainConfig, shard: VocabShard, ctx: ParallelContext) -> None:
    rows, size = cache.rows(chunk), int(config.micro_batch)
    logprobs, indices = [], []
    for first in range(rows.start, rows.stop, size):
        batch = to_tensors(dataset.batch(range(first, min(first + size, rows.stop))), ctx.device)
        values, ids = top_k(teacher, batch, config.reset_documents, shard, cache.top_k, config.distill.temperature)
        logprobs.append(values.float().cpu())
        indices.append(ids.int().cpu())
    if ctx.tensor_rank == 0 and ctx.context_rank == 0:
        cache.write(chunk, torch.cat(logprobs), torch.cat(indices))
