"""A reference model's loss on a sample of every source's documents: the only part of this stage that runs a model.

Legend: n documents, b rows of a batch, s predicted tokens of its longest row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from megatron_r1.artifacts.checkpoint import CheckpointSet
from megatron_r1.data.shards import ShardSet
from megatron_r1.mixture.config import PerplexityConfig
from megatron_r1.mixture.perplexity import Sample
from megatron_r1.model.forward import token_losses
from megatron_r1.model.load import load_model
from megatron_r1.parallel.config import LayoutConfig
from megatron_r1.parallel.context import ParallelContext, initialize
from megatron_r1.utils.errors import DataError
from megatron_r1.utils.seeding import generator


def read(config: PerplexityConfig, shards: ShardSet, checkpoints: CheckpointSet, sources: Sequence[str], seed: int) -> dict[str, Sample]:
    """Source -> the loss of up to `documents` of its training documents. Collective: every rank reads a part, all get all.

    Raises DataError for another tokenizer, or for a source without a document of two tokens.
    """
    shards.require_tokenizer(checkpoints.manifest.tokenizer, f"the reference model {checkpoints.artifact.name}")
    longest = min(config.tokens_per_document, int(checkpoints.model.get("max_positions", config.tokens_per_document)))
    chosen = {source: _choose(shards.split(source, "train"), config.documents, source, seed) for source in sources}
    windows = [np.asarray(shards.split(source, "train").tokens(int(i)))[: longest + 1] for source, index in chosen.items() for i in index]
    ctx = initialize(LayoutConfig(), seed)
    nats = document_nats(load_model(checkpoints.final, ctx, precision="fp32"), windows, config.batch_tokens, ctx)
    found, start = {}, 0
    for source, index in chosen.items():
        part = slice(start, start + len(index))
        read_tokens = np.array([len(window) - 1 for window in windows[part]])
        found[source] = Sample(nats[part] / read_tokens, np.asarray(shards.split(source, "train").lengths)[index].astype(np.float64), read_tokens)
        start += len(index)
    return found


def _choose(shard: Any, count: int, source: str, seed: int) -> np.ndarray:
    """Numbers of `count` documents of two tokens or more, drawn without replacement."""
    there = np.flatnonzero(np.asarray(shard.lengths) >= 2)
    if len(there) == 0:
        raise DataError(
            expected=f"a training document of {source} with at least two tokens", found="none",
            fix=f"leave {source} out of the mixture's `sources`: nothing of it can be predicted",
        )
    return np.sort(generator(seed, "perplexity documents", source).permutation(there)[:count])


@torch.no_grad()
def document_nats(chunks: Sequence[torch.nn.Module], windows: Sequence[np.ndarray], batch_tokens: int, ctx: ParallelContext) -> np.ndarray:
    """Sum of -log p over the tokens of each window after its first, float64 [n]. Collective."""
    total = torch.zeros(len(windows), dtype=torch.float64, device=ctx.device)
    mine = sorted(range(ctx.data_rank, len(windows), ctx.data_size), key=lambda i: (-len(windows[i]), i))
    while mine:
        rows = max(1, batch_tokens // (len(windows[mine[0]]) - 1))
        group, mine = mine[:rows], mine[rows:]
        batch = _padded([windows[i] for i in group])
        losses = token_losses(chunks, {name: tensor.to(ctx.device) for name, tensor in batch.items()})
        sums = torch.where(batch["loss_mask"].to(losses.device) > 0, losses.double(), 0.0).sum(dim=1)
        total[torch.tensor(group, device=ctx.device)] = sums
    return ctx.all_reduce_sum(total, over="data").cpu().numpy()


def _padded(windows: Sequence[np.ndarray]) -> Mapping[str, torch.Tensor]:
    """tokens, labels int64 [b, s], loss_mask float32 [b, s]; padding comes last, where a causal model's tokens do not see it."""
    shape = (len(windows), max(len(window) for window in windows) - 1)
    tokens, labels, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long), torch.zeros(shape)
    for row, window in enumerate(windows):
        ids = torch.from_numpy(np.asarray(window, np.int64))
        tokens[row, : len(ids) - 1], labels[row, : len(ids) - 1], mask[row, : len(ids) - 1] = ids[:-1], ids[1:], 1.0
    return {"tokens": tokens, "labels": labels, "loss_mask": mask}
