"""Questions with known answers, for training on rewards: what the user asks in conversations, and the answer at their end.

A conversation is used when its last answer has one behind a mark (data/answers.py) and its question is short enough. Sample n of the
run is generation n mod G of prompt n div G, where prompts come in the order of a mixture and G is the number of generations: the G of
a prompt are neighbours, every prompt comes once per epoch, and what a step asks depends on nothing but its number.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from megatron_r1.data.answers import marked
from megatron_r1.data.chat import asked, require_chat
from megatron_r1.data.dataset import reading
from megatron_r1.data.mixture_order import Located, MixtureOrder, Rest
from megatron_r1.data.shards import Shard
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.utils.errors import DataError
from megatron_r1.utils.seeding import derive_seed


class GroupedOrder:
    """Every sample of a mixture's order `group` times in a row, with the interface of one; blocks and counts are those of samples."""

    def __init__(self, order: MixtureOrder, group: int) -> None:
        self._order, self.group = order, int(group)
        self.weights, self.names = order.weights, order.names
        self.blocks = {name: count * self.group for name, count in order.blocks.items()}
        self.start = {name: count * self.group for name, count in order.start.items()}
        self.rest: dict[str, Rest] = {}
        self.max_error = order.max_error * self.group

    @property
    def fingerprint(self) -> str:
        """As MixtureOrder's."""
        return f"{self._order.fingerprint}x{self.group}"

    def counts(self, n_samples: int) -> dict[str, int]:
        """As MixtureOrder's."""
        whole, part = divmod(int(n_samples), self.group)
        before, after = self._order.counts(whole), self._order.counts(whole + 1)
        return {name: count * self.group + part * (after[name] - count) for name, count in before.items()}

    def locate(self, sample_index: int) -> Located:
        """As MixtureOrder's; the block is the prompt's."""
        return self._order.locate(sample_index // self.group)

    def locate_many(self, indices: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As MixtureOrder's; blocks are those of prompts."""
        return self._order.locate_many(np.asarray(indices, np.int64) // self.group)

    def position(self, source: str, count: int) -> tuple[int, int, int]:
        """As MixtureOrder's, in prompts."""
        return self._order.position(source, count // self.group)


class PromptDataset:
    """Prompts of at most `longest` tokens with their answers, each `generations` times in a row.

    weights: share of prompts per source; None takes every prompt once per epoch. without_answer, too_long: conversations left out, by source.
    Every conversation is read once, when the dataset is made. Raises DataError without chat tokens, or when nothing is left.
    """

    def __init__(
        self, shards: Mapping[str, Shard], tokenizer: Tokenizer, seed: int, generations: int, longest: int, weights: Mapping[str, float] | None = None
    ) -> None:
        require_chat(tokenizer)
        self.shards, self.tokenizer, self.longest = dict(shards), tokenizer, int(longest)
        self.source_names = list(self.shards)
        self._source_id = {name: i for i, name in enumerate(self.source_names)}
        self.without_answer, self.too_long = dict.fromkeys(self.source_names, 0), dict.fromkeys(self.source_names, 0)
        self.documents = {name: self._usable(name) for name in self.source_names}
        blocks = {name: len(documents) for name, documents in self.documents.items()}
        if not any(blocks.values()):
            raise DataError(
                expected=f"conversations with a question of at most {self.longest} tokens and an answer behind a mark (\\boxed{{...}}, #### ..., the answer is ...)",
                found=f"none in {', '.join(self.source_names) or 'no source'} ({sum(self.without_answer.values())} without such an answer, {sum(self.too_long.values())} too long)",
                fix="take chat sources whose answers can be checked, or raise seq_length",
            )
        shares: Mapping[str, float] = {name: count for name, count in blocks.items() if count} if weights is None else weights
        self.order = GroupedOrder(MixtureOrder(blocks, shares, derive_seed(seed, "prompts")), generations)

    def _usable(self, name: str) -> np.ndarray:
        found = []
        for document in range(len(self.shards[name])):
            prompt, answer = self.prompt(name, document)
            if not answer:
                self.without_answer[name] += 1
            elif len(prompt) > self.longest:
                self.too_long[name] += 1
            else:
                found.append(document)
        return np.asarray(found, np.int64)

    def prompt(self, source: str, document: int) -> tuple[list[int], str]:
        """Tokens up to where the last answer begins, and what is right; "" when nothing is known to be."""
        shard = self.shards[source]
        with reading(f"conversation {document} of {source}"):
            mask = shard.mask(document)
            if mask is None:
                return [], ""
            ids, answer = asked(shard.tokens(document).tolist(), mask.tolist(), self.tokenizer)
        return ids, marked(self.tokenizer.decode(answer), numeric=False) or ""

    def batch(self, indices: Iterable[int]) -> dict[str, Any]:
        """As the other datasets' (data/dataset.py), with rows as long as the longest prompt and no targets; and `answers`, a list of b texts."""
        located = [self.order.locate(int(index)) for index in indices]
        documents = [int(self.documents[found.source][found.block]) for found in located]
        prompts = [self.prompt(found.source, document) for found, document in zip(located, documents)]
        shape = (len(prompts), max((len(ids) for ids, _ in prompts), default=0))
        batch: dict[str, Any] = {
            "tokens": np.full(shape, self.tokenizer.pad_id or 0, np.int32), "labels": np.full(shape, self.tokenizer.pad_id or 0, np.int32),
            "loss_mask": np.zeros(shape, np.float32), "position_ids": np.zeros(shape, np.int32), "segment_ids": np.full(shape, -1, np.int32),
            "source_ids": np.asarray([self._source_id[found.source] for found in located], np.int32),
            "document_ids": [np.asarray([document], np.int64) for document in documents], "answers": [answer for _, answer in prompts],
        }
        for row, (ids, _) in enumerate(prompts):
            batch["tokens"][row, : len(ids)], batch["position_ids"][row, : len(ids)] = ids, np.arange(len(ids))
            batch["segment_ids"][row, : len(ids)] = 0
        return batch
