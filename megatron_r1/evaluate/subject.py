"""The model under test as tasks see it: a megatron-core model in fp32 on one process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_r1.model.forward import token_losses
from megatron_r1.model.generate import Decoder, decoder_of, generate, whole
from megatron_r1.utils.logging import progress

PADDING_SEGMENT = -1
SHOWN_FROM = 20_000
"""Tokens of one call from which on its progress is shown."""


class CheckpointSubject:
    """`Subject` over a loaded model. `tokens_per_batch` bounds the padded tokens of one scoring batch."""

    def __init__(self, model: Any, *, batch_size: int, tokens_per_batch: int) -> None:
        self._model = model
        self._device = next(whole(model).parameters()).device
        self._decoder: Decoder | None = None
        self._batch_size, self._tokens_per_batch = batch_size, tokens_per_batch

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop_ids: Sequence[int]) -> list[list[int]]:
        """Greedy continuations (model/generate.py)."""
        if self._decoder is None:
            self._decoder = decoder_of(self._model)
        results: list[list[int]] = [[] for _ in prompts]
        by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        total = sum(map(len, prompts)) + len(prompts) * max_new_tokens
        with progress("writing answers", total, enabled=total >= SHOWN_FROM) as bar:
            for start in range(0, len(prompts), self._batch_size):
                indices = by_length[start : start + self._batch_size]
                batch = [prompts[index] for index in indices]
                for index, tokens in zip(indices, generate(self._decoder, batch, max_new_tokens, stop_ids, batch_size=self._batch_size), strict=True):
                    results[index] = tokens
                bar.advance(sum(map(len, batch)) + len(batch) * max_new_tokens)
        return results

    @torch.no_grad()
    def token_nats(self, windows: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Negative log-likelihood of each token after the first (model/forward.py): one float64 array [t - 1] per window of t tokens."""
        results: list[np.ndarray] = [np.empty(0)] * len(windows)
        total = sum(map(len, windows))
        with progress("scoring text", total, enabled=total >= SHOWN_FROM) as bar:
            for indices in batches([len(window) for window in windows], self._tokens_per_batch):
                batch = {name: tensor.to(self._device) for name, tensor in _padded([windows[index] for index in indices]).items()}
                losses = token_losses(self._model, batch).double().cpu().numpy()
                for row, index in enumerate(indices):
                    results[index] = losses[row, : len(windows[index]) - 1].copy()
                    bar.advance(len(windows[index]))
        return results


def batches(lengths: Sequence[int], tokens_per_batch: int) -> Iterator[list[int]]:
    """Indices of windows grouped by length, so that rows x longest stays within `tokens_per_batch` (at least one row each)."""
    batch: list[int] = []
    longest = 0
    for index in sorted(range(len(lengths)), key=lambda index: (lengths[index], index)):
        if batch and (len(batch) + 1) * max(longest, lengths[index]) > tokens_per_batch:
            yield batch
            batch, longest = [], 0
        batch.append(index)
        longest = max(longest, lengths[index])
    if batch:
        yield batch


def _padded(windows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """The trainer's batch dictionary for right-padded windows: each row is one document, the padding none."""
    longest = max(len(window) for window in windows) - 1
    shape = (len(windows), longest)
    tokens, labels = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    segments = torch.full(shape, PADDING_SEGMENT, dtype=torch.int32)
    for row, window in enumerate(windows):
        ids = torch.as_tensor(np.asarray(window, dtype=np.int64))
        tokens[row, : len(ids) - 1], labels[row, : len(ids) - 1], segments[row, : len(ids) - 1] = ids[:-1], ids[1:], 0
    return {
        "tokens": tokens, "labels": labels, "loss_mask": (segments >= 0).float(),
        "position_ids": torch.arange(longest).expand(shape).contiguous(), "segment_ids": segments,
    }
