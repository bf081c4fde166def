"""The documents an inverse Hessian is estimated from, and their gradients one at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_r1.data.shards import ShardSet
from megatron_r1.influence.config import InfluenceConfig
from megatron_r1.influence.probe_gradient import gradient
from megatron_r1.influence.rows import Row, TokenLosses
from megatron_r1.influence.select import choose
from megatron_r1.model.precondition import Direction
from megatron_r1.utils.errors import DataError

FEWEST = 4
"""Documents below which no curvature is estimated."""


@dataclass(frozen=True)
class Reference:
    """A recorded set of training documents, one row each. Legend: n documents."""

    rows: list[Row]  # [n]
    names: list[str]  # [n], for messages
    sources: dict[str, int]  # source -> documents of it
    sha256: str  # of all tokens in order

    @property
    def tokens(self) -> int:
        """Predicted tokens of all documents."""
        return sum(row.targets for row in self.rows)


def draw(config: InfluenceConfig, shards: ShardSet, sources: Sequence[str]) -> Reference:
    """One random window of `curvature.documents` training documents of every source (all, where there are fewer).

    Keyed apart from the scored documents, so a document is in both sets by chance only. Raises DataError below 4 documents.
    """
    each = config.model_copy(update={"documents": config.curvature.documents, "score_unit": "window", "window": "random"})
    rows: list[Row] = []
    names: list[str] = []
    counts: dict[str, int] = {}
    digest = hashlib.sha256()
    for source in sources:
        chosen = choose(each, source, shards.split(source, "train"), purpose="curvature")
        counts[source] = len(chosen.rows)
        names += [f"{source}, training document {i}" for i in chosen.index.tolist()]
        rows += [Row(len(rows) + row.unit, row.tokens) for row in chosen.rows]
        for row in chosen.rows:
            digest.update(len(row.tokens).to_bytes(8, "little") + row.tokens.astype("<i8").tobytes())
    if len(rows) < FEWEST:
        raise DataError(
            expected=f"at least {FEWEST} documents to estimate the curvature from (preconditioner {config.preconditioner})",
            found=f"{len(rows)} ({', '.join(f'{name}: {count}' for name, count in counts.items())})",
            fix="raise curvature.documents, score more sources, or take preconditioner: adam",
        )
    return Reference(rows, names, counts, digest.hexdigest())


@dataclass(frozen=True)
class DocumentGradients:
    """Gradient of each document's mean token loss, made anew in every pass: one is held at a time."""

    losses: TokenLosses
    parameters: Mapping[str, Tensor]
    reference: Reference
    device: torch.device
    advance: Callable[[int], None] = lambda _: None

    def __len__(self) -> int:
        return len(self.reference.rows)

    def __iter__(self) -> Iterator[Direction]:
        """Raises DataError at a gradient that is not finite, naming the document."""
        for row, name in zip(self.reference.rows, self.reference.names):
            found, loss = gradient(self.losses, self.parameters, [row], [1.0 / row.targets], row.targets, self.device, self.advance)
            bad = [parameter for parameter, part in found.items() if not bool(torch.isfinite(part).all())]
            if bad:
                raise DataError(
                    expected=f"finite gradients of {name}",
                    found=f"some of {bad[0]} that are not (loss {loss})",
                    fix="check that the checkpoint's training did not diverge, or score an earlier checkpoint",
                )
            yield found
