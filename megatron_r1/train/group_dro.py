"""DoReMi's proxy training (arXiv 2305.10429, Algorithm 1): group distributionally robust optimisation over sources.

The proxy is trained on the sources weighted by alpha, and alpha moves to sources on which it is still far behind a reference:

    lambda[i] = mean over the tokens of source i in the batch of max(loss of the proxy - loss of the reference, 0)
    alpha[i] <- (1 - c) * alpha[i] exp(eta * lambda[i]) / sum + c / k
    result    = mean of alpha over the updates

Where this differs from Algorithm 1: a step trains with the weights before its own batch (the paper's code does so too for all
but the last of the micro-batches it accumulates), since alpha needs the whole batch's losses and the backward pass would have
to wait for them. A source without a token in a batch keeps its last lambda, as in the paper's code. Sources may be sampled
with any shares p (the paper: equal ones): each token counts alpha / p, so that the expected loss is sum alpha[i] * mean loss
of i all the same.

Legend: b rows, s tokens, k sources.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from megatron_r1.artifacts.checkpoint import DomainWeights
from megatron_r1.model.forward import token_losses
from megatron_r1.model.loss import masked_sum
from megatron_r1.train.config import GroupDroConfig
from megatron_r1.train.objectives import Arrays, Objective, Tensors
from megatron_r1.train.teacher import TrainedTeacher


class GroupDRO(Objective):
    """Next-token loss with domain weights that follow the excess loss over a reference model.

    Attributes, float64 [k] in the order of the sources: weights (alpha), total (their sum over the updates), excess (the last
    lambda); and updates. All are equal on every rank, because they follow sums over all ranks.
    """

    reports = (*Objective.reports, "source_excess")

    def __init__(
        self, shares: Mapping[str, float], device: torch.device, config: GroupDroConfig, reference: TrainedTeacher | None, reference_name: str
    ) -> None:
        super().__init__(len(shares), device)
        self.names, self.config, self.reference, self.reference_name = list(shares), config, reference, reference_name
        self.shares = np.array(list(shares.values()))
        self.weights, self.updates = np.full(len(shares), 1.0 / len(shares)), 0
        self.total, self.excess = np.zeros(len(shares)), np.zeros(len(shares))

    def _rows(self, batch: Tensors) -> Tensor:
        """alpha / p of the source of every row: fp32 [b, 1]."""
        ratio = torch.from_numpy((self.weights / self.shares).astype(np.float32)).to(self.device)
        return ratio[batch["source_ids"].long()][:, None]

    def output(self, chunk: nn.Module, batch: Tensors, arrays: Arrays) -> Tensor:
        """See Objective. The mask tells the head which sum will be differentiated."""
        return token_losses(chunk, batch | {"loss_mask": batch["loss_mask"] * self._rows(batch)})

    def total_loss(self, losses: Tensor, batch: Tensors) -> tuple[Tensor, Tensor]:
        """See Objective: the weighted sum, over the plain number of targets."""
        weighted, _ = masked_sum(losses * self._rows(batch), batch["loss_mask"])
        return weighted, masked_sum(losses.detach(), batch["loss_mask"])[1]

    def by_source(self, losses: Tensor, batch: Tensors) -> Tensors:
        """See Objective; also the summed excess of every source: fp64 [k]."""
        assert self.reference is not None  # every stage that sees a loss has one
        with torch.no_grad():
            behind = (losses.double() - token_losses(self.reference.chunks, batch).double()).clamp(min=0.0)
        rows = (behind * batch["loss_mask"].double()).sum(dim=1)
        zeros = torch.zeros(self.sources, dtype=torch.float64, device=self.device)
        return super().by_source(losses, batch) | {"source_excess": zeros.index_add(0, batch["source_ids"].long(), rows)}

    def update(self, sums: Mapping[str, Sequence[float]]) -> None:
        """See Objective: Algorithm 1's update of the domain weights."""
        tokens, excess = np.array(sums["source_tokens"]), np.array(sums["source_excess"])
        self.excess = np.where(tokens > 0, excess / np.maximum(tokens, 1.0), self.excess)
        logs = np.log(self.weights) + self.config.step_size * self.excess
        raised = np.exp(logs - logs.max())
        self.weights = (1 - self.config.smoothing) * raised / raised.sum() + self.config.smoothing / len(raised)
        self.total, self.updates = self.total + self.weights, self.updates + 1

    def state(self) -> dict[str, Any]:
        """See Objective."""
        return {"weights": self.weights.tolist(), "total": self.total.tolist(), "excess": self.excess.tolist(), "updates": self.updates}

    def load(self, state: Mapping[str, Any]) -> None:
        """See Objective."""
        self.weights, self.total, self.excess = (np.array(state[key], np.float64) for key in ("weights", "total", "excess"))
        self.updates = int(state["updates"])

    def record(self) -> dict[str, Any]:
        """See Objective: `group_dro` = weights, mean_weights and excess by source."""
        found = self.result()
        return {"group_dro": {"weights": found.last, "mean_weights": found.weights, "excess": found.excess}}

    def result(self) -> DomainWeights:
        """What the training found out so far."""
        mean = self.total / self.updates if self.updates else self.weights
        named = [dict(zip(self.names, values.tolist())) for values in (mean / mean.sum(), self.weights, self.excess)]
        return DomainWeights(
            weights=named[0], last=named[1], excess=named[2], updates=self.updates, step_size=self.config.step_size, smoothing=self.config.smoothing,
            reference=self.reference_name,
        )
