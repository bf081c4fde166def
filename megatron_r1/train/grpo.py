"""Training on rewards: group relative policy optimisation (GRPO, arXiv 2402.03300), one update per batch of generations.

A step asks B/G questions G times each, judges the answers (data/answers.py), and makes those likelier that did better than the others
of their group:

    r    = 1 if the result is right, + format_reward if the answer ends by itself and marks its result
    A[i] = (r[i] - mean of its group) / (standard deviation of its group + 1e-4)
    loss = 1/B sum over answers i of c[i] sum over their tokens t of (-A[i] p/p' + kl_weight (q/p - log q/p - 1))

p is the model's probability of the token, p' the same number as a constant, q the reference's probability. c is 1/length of the answer
(variant grpo), B/tokens of all answers (dapo), or 1/max_new_tokens with A not divided by the deviation (dr_grpo). Deviations are those of
samples (G - 1), as in TRL. There is one update per batch, so p/p' is 1 whenever the gradient is taken, and the clipping of the ratio
that GRPO has for further updates would never act: it is not there.

An answer is drawn from the model's own distribution (temperature 1) with random numbers that depend on the seed and the sample's number only:
a step stays a pure function of weights, optimizer state and step number, and a sample is the same whichever process draws it
(up to the rounding of matrix products, which may move a draw that falls between two tokens).

Legend: B answers of a step, G of a group, b rows of a micro-batch, s tokens, n sources.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from megatron_r1.data.answers import verify
from megatron_r1.data.chat import stop_ids
from megatron_r1.model.forward import token_losses
from megatron_r1.model.generate import decoder_of, generate
from megatron_r1.parallel.context import ParallelContext
from megatron_r1.parallel.ddp import gather_weights, unwrap
from megatron_r1.parallel.schedule import LossFunction
from megatron_r1.train.config import TrainConfig
from megatron_r1.train.objectives import Arrays, Objective, Tensors, to_tensors
from megatron_r1.train.teacher import TrainedTeacher
from megatron_r1.utils.seeding import derive_seed

DEVIATION_FLOOR = 1e-4
"""Added to the deviation of a group's rewards."""
OF_ANSWERS = ("reward", "correct", "marked", "ended", "tied")
"""What is known of an answer before the loss; tied: all of its group earned the same, so nothing is learnt from it."""
OF_TOKENS = ("length", "nats", "kl")
"""Sums over an answer's tokens."""


class GRPO(Objective):
    """Answers of the model's own, by their rewards. The number the loss is divided by counts answers, not tokens."""

    reports = (*Objective.reports, *OF_ANSWERS, *OF_TOKENS)

    def __init__(self, config: TrainConfig, ctx: ParallelContext, sources: Sequence[str], tokenizer: Any, reference: TrainedTeacher | None = None) -> None:
        super().__init__(len(sources), ctx.device)
        self.config, self.ctx, self.names, self.tokenizer, self.reference = config.grpo, ctx, list(sources), tokenizer, reference
        self.per_step, self.seed, self.stops = config.sequences_per_step, derive_seed(config.seed or 0, "grpo"), stop_ids(tokenizer)
        self.seconds = 0.0
        self.load({"sums": {}, "steps": 0, "seconds": 0.0})

    # ---------------------------------------------------------------- answers

    def prepare(self, chunks: Sequence[nn.Module], batches: list[dict[str, Any]], step: int) -> list[dict[str, Any]]:
        """See Objective: questions in, questions with answers out, in micro-batches as long as their longest row."""
        began = time.perf_counter()
        numbers = [int(batch["first_sample"]) + row for batch in batches for row in range(len(batch["tokens"]))]
        prompts = [ids[: int((segments >= 0).sum())].tolist() for batch in batches for ids, segments in zip(batch["tokens"], batch["segment_ids"])]
        gather_weights(chunks)
        written = generate(
            decoder_of(unwrap(chunks[0])), prompts, self.config.max_new_tokens, self.stops, greedy=False, seed=self.seed, numbers=numbers, keep_stop=True,
            batch_size=self.config.batch_size,
        )
        found = [self.judge(answer, truth) for answer, truth in zip(written, (truth for batch in batches for truth in batch["answers"]), strict=True)]
        places = np.asarray(numbers) - step * self.per_step
        everyone = torch.zeros(2, self.per_step, dtype=torch.float64)
        everyone[:, places] = torch.tensor([[of["reward"] for of in found], [float(len(answer)) for answer in written]], dtype=torch.float64)
        # A group may lie on two processes; the sum puts the rewards of all together.
        rewards, lengths = self.ctx.all_reduce_sum(everyone.to(self.device), over="data").cpu().numpy()
        for of, advantage, scale, tied in zip(found, *(values[places].tolist() for values in self.advantages(rewards, lengths)), strict=True):
            of |= {"advantage": advantage, "scale": scale, "tied": tied}
        made, first = [], 0
        for batch in batches:
            rows = slice(first, first + len(batch["tokens"]))
            made.append({**answered(prompts[rows], written[rows], found[rows]), "source_ids": batch["source_ids"]})
            first = rows.stop
        self.seconds = time.perf_counter() - began
        return made

    def judge(self, answer: Sequence[int], truth: str) -> dict[str, float]:
        """Reward of an answer's tokens, and what it is made of."""
        ended = answer[-1] in self.stops
        ids = [token for token in answer if token < self.tokenizer.vocab_size]  # the model may have rows that no token uses
        verdict = verify(self.tokenizer.decode(ids[:-1] if ended else ids), truth)
        reward = float(verdict.correct) + self.config.format_reward * (ended and verdict.marked)
        return {"reward": reward, "correct": float(verdict.correct), "marked": float(verdict.marked), "ended": float(ended)}

    def advantages(self, rewards: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A, c (see the module) and whether the group is tied, of all answers of a step: float64 [B] each."""
        groups = rewards.reshape(-1, self.config.generations)
        centred = groups - groups.mean(axis=1, keepdims=True)
        tied = np.broadcast_to(groups.max(axis=1, keepdims=True) == groups.min(axis=1, keepdims=True), groups.shape)
        if self.config.variant == "dr_grpo":
            return centred.reshape(-1), np.full(rewards.shape, 1 / self.config.max_new_tokens), tied.reshape(-1).astype(float)
        advantage = centred / (groups.std(axis=1, ddof=1, keepdims=True) + DEVIATION_FLOOR)
        scale = 1 / lengths if self.config.variant == "grpo" else np.full(rewards.shape, len(rewards) / lengths.sum())
        return advantage.reshape(-1), scale, tied.reshape(-1).astype(float)

    # ---------------------------------------------------------------- loss

    def forward_step(self, batches: Iterator[Arrays], chunk: nn.Module) -> tuple[Tensor, LossFunction]:
        """See Objective."""
        arrays = next(batches)
        batch = to_tensors(arrays, self.device) | {name: torch.from_numpy(arrays[name]).to(self.device) for name in (*OF_ANSWERS, "advantage", "scale")}

        def loss(losses: Tensor) -> tuple[Tensor, Tensor, Tensors]:
            divergence = self.divergence(losses, batch)
            ratio = (losses.detach() - losses).exp()
            rows = ((divergence * self.config.kl_weight - batch["advantage"][:, None] * ratio) * batch["loss_mask"]).sum(dim=1) * batch["scale"]
            return rows.sum(), torch.tensor(len(rows), dtype=torch.int32, device=self.device), self.sums(rows, losses, divergence, batch)

        # What the gradient of each position's -log p will be, as long as there is no divergence: the head needs it beforehand to compute once.
        expected = batch["loss_mask"] * (batch["advantage"] * batch["scale"])[:, None]
        return token_losses(chunk, batch | {"loss_mask": expected}), loss

    def divergence(self, losses: Tensor, batch: Tensors) -> Tensor:
        """q/p - log q/p - 1 of every position [b, s], whose mean over draws from p is KL(p || q); 0 without a reference."""
        if self.reference is None:
            return torch.zeros_like(losses)
        with torch.no_grad():
            reference = token_losses(self.reference.chunks, batch)
        log_ratio = losses - reference
        return log_ratio.exp() - log_ratio - 1

    def sums(self, rows: Tensor, losses: Tensor, divergence: Tensor, batch: Tensors) -> Tensors:
        """`reports`, summed over the answers of every source: fp64 [n] each."""
        mask = batch["loss_mask"].double()
        of_tokens = {"length": mask, "nats": losses.detach().double() * mask, "kl": divergence.detach().double() * mask}
        per_row = {"source_loss": rows.detach(), "source_tokens": torch.ones_like(rows), **{name: values.sum(dim=1) for name, values in of_tokens.items()}}
        per_row |= {name: batch[name] for name in OF_ANSWERS}
        zeros, ids = torch.zeros(self.sources, dtype=torch.float64, device=self.device), batch["source_ids"].long()
        return {name: zeros.index_add(0, ids, values.double()) for name, values in per_row.items()}

    # ---------------------------------------------------------------- what is shown

    def update(self, sums: Mapping[str, Sequence[float]]) -> None:
        """See Objective: add up what `record` shows. Nothing of it reaches the training."""
        for name in self.reports:
            before = self.window["sums"].get(name, [0.0] * self.sources)
            self.window["sums"][name] = [a + float(b) for a, b in zip(before, sums[name], strict=True)]
        self.window["steps"] += 1
        self.window["seconds"] += self.seconds

    def state(self) -> dict[str, Any]:
        """See Objective."""
        return self.window

    def load(self, state: Mapping[str, Any]) -> None:
        """See Objective."""
        self.window = {"sums": {name: list(values) for name, values in state["sums"].items()}, "steps": int(state["steps"]), "seconds": float(state["seconds"])}

    def record(self) -> dict[str, Any]:
        """See Objective: means over the answers since the last record.

        `reward`; `grpo` = correct, marked, ended: shares of answers; tied: share of answers whose group earned the same; length (tokens);
        entropy: nats per token, estimated by -log p of the tokens drawn; kl per token (with a reference); source_reward: reward by source.
        generation_seconds: this process's time per step for writing and judging.
        """
        sums, steps, seconds = self.window["sums"], self.window["steps"], self.window["seconds"]
        self.load({"sums": {}, "steps": 0, "seconds": 0.0})
        if not steps:
            return {}
        answers, tokens = sum(sums["source_tokens"]), sum(sums["length"])
        shown: dict[str, Any] = {name: sum(sums[name]) / answers for name in (*OF_ANSWERS[1:], "length")}
        shown["entropy"] = sum(sums["nats"]) / tokens
        if self.reference is not None:
            shown["kl"] = sum(sums["kl"]) / tokens
        shown["source_reward"] = {name: reward / count for name, reward, count in zip(self.names, sums["reward"], sums["source_tokens"]) if count}
        return {"reward": sum(sums["reward"]) / answers, "grpo": shown, "generation_seconds": seconds / steps}


def answered(prompts: Sequence[Sequence[int]], written: Sequence[Sequence[int]], found: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Rows of a micro-batch (data/dataset.py), each a question and its answer, targets the answer's tokens; and `found` as fp32 [b] by name."""
    shape = (len(prompts), max(len(prompt) + len(answer) for prompt, answer in zip(prompts, written, strict=True)) - 1)
    batch: dict[str, Any] = {
        "tokens": np.zeros(shape, np.int32), "labels": np.zeros(shape, np.int32), "loss_mask": np.zeros(shape, np.float32),
        "position_ids": np.zeros(shape, np.int32), "segment_ids": np.full(shape, -1, np.int32),
    }
    for row, (prompt, answer) in enumerate(zip(prompts, written)):
        ids, n = [*prompt, *answer], len(prompt) + len(answer) - 1
        batch["tokens"][row, :n], batch["labels"][row, :n], batch["segment_ids"][row, :n], batch["position_ids"][row, :n] = ids[:-1], ids[1:], 0, np.arange(n)
        batch["loss_mask"][row, len(prompt) - 1 : n] = 1
    return batch | {name: np.asarray([of[name] for of in found], np.float32) for name in found[0]}
