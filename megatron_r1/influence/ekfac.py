"""EK-FAC (arXiv 1806.03884) of the probe gradient: an inverse Hessian in the eigenbasis of Kronecker factors.

Applied once to G, so that the scores of any engine are those of EK-FAC influence functions (arXiv 2308.03296).

Legend: o rows and i columns of a weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_r1.influence.fisher import DocumentUses, LinearUse
from megatron_r1.model.precondition import Direction, Preconditioner
from megatron_r1.utils.errors import ConfigError, DataError


class Documents(Protocol):
    """Uses of the parameters document by document, the same in every pass."""

    @property
    def tokens(self) -> int: ...

    def __iter__(self) -> Iterator[DocumentUses]: ...


@dataclass
class _Bases:
    """Eigenvectors in columns; None: the unit vectors."""

    left: Tensor | None  # [o, o]
    right: Tensor | None  # [i, i]

    def into(self, gradient: Tensor) -> Tensor:
        """Q_S^T G Q_A"""
        turned = gradient if self.left is None else self.left.t() @ gradient
        return turned if self.right is None else turned @ self.right

    def back(self, turned: Tensor) -> Tensor:
        """Q_S G Q_A^T"""
        gradient = turned if self.left is None else self.left @ turned
        return gradient if self.right is None else gradient @ self.right.t()

    def use(self, use: LinearUse | Tensor) -> Tensor:
        """A document's gradient in these bases."""
        if isinstance(use, Tensor):
            return self.into(use)
        inputs = use.inputs if self.right is None else use.inputs @ self.right
        outputs = use.outputs if self.left is None else use.outputs @ self.left
        return outputs.t() @ inputs


class EKFAC(Preconditioner):
    """Per parameter tensor, from the uses in N tokens of documents with labels the model drew:

        P G = Q_S [ (Q_S^T G Q_A) / (Lambda + lambda) ] Q_A^T        lambda = damping * mean(Lambda)
        Lambda = (1/N) sum over documents of (Q_S^T g Q_A)^2,  g: gradient of the document's summed loss

    Linear weights: Q_A, Q_S are the eigenvectors of sum_t a_t a_t^T and sum_t b_t b_t^T over all tokens (inputs, and gradients at
    the outputs). Embedding and head: the vocabulary's side is too large, so Q_S is 1 (every token's row for itself) and Q_A are the
    eigenvectors of the sum over documents of g^T g. Gains: both are 1, which leaves the diagonal. So Lambda is, exactly, the
    diagonal of the Fisher information of the mean token loss in the chosen basis: per document, as a document's tokens depend on
    each other. Two passes over the documents. Held: Q_A, Q_S and Lambda.
    """

    RULE = (
        "linear weights: eigenbases of inputs and output gradients over tokens; embedding and head: eigenbasis of the hidden side, "
        "each token's row for itself; gains: diagonal. Eigenvalues per document in these bases"
    )

    def __init__(self, documents: Documents, damping: float) -> None:
        """Parameters that no document uses are set to zero by P.

        Raises ConfigError unless damping > 0, DataError without documents or where a tensor's gradients are all zero.
        """
        if not damping > 0:
            raise ConfigError(expected="damping > 0", found=f"{damping}", fix="set curvature.damping to a positive number, such as 0.1")
        self.bases = _bases(documents)
        self.eigenvalues: dict[str, Tensor] = {}
        for document in documents:
            for name, use in document.items():
                square = self.bases[name].use(use).square() / documents.tokens
                self.eigenvalues[name] = self.eigenvalues[name].add_(square) if name in self.eigenvalues else square
        if not self.eigenvalues:
            raise DataError(expected="gradients of some documents", found="none", fix="raise curvature.documents")
        self.damping = {name: damping * float(values.double().mean()) for name, values in self.eigenvalues.items()}
        for name, value in self.damping.items():
            if not 0 < value < float("inf"):
                raise DataError(
                    expected=f"gradients of {name} that are finite and not all zero",
                    found=f"a mean eigenvalue of {value / damping}",
                    fix="leave that parameter out (influence's `parameters`), or raise curvature.documents",
                )

    def several(self, gradients: Sequence[Mapping[str, Tensor]]) -> list[Direction]:
        """P of each gradient."""
        return [{name: self._apply(name, part) for name, part in gradient.items()} for gradient in gradients]

    def _apply(self, name: str, gradient: Tensor) -> Tensor:
        if name not in self.bases:
            return torch.zeros_like(gradient)
        bases = self.bases[name]
        return bases.back(bases.into(gradient) / (self.eigenvalues[name] + self.damping[name]))


def _bases(documents: Documents) -> dict[str, _Bases]:
    left: dict[str, Tensor] = {}
    right: dict[str, Tensor] = {}
    gains: list[str] = []

    def add(sums: dict[str, Tensor], name: str, rows: Tensor) -> None:
        """rows^T rows"""
        sums[name] = sums[name].addmm_(rows.t(), rows) if name in sums else rows.t() @ rows

    for document in documents:
        for name, use in document.items():
            if isinstance(use, LinearUse):
                add(right, name, use.inputs)
                add(left, name, use.outputs)
            elif use.ndim > 1:
                add(right, name, use)
            else:
                gains.append(name)
    found = {name: _Bases(None, None) for name in gains}
    return found | {name: _Bases(_eigenvectors(left[name]) if name in left else None, _eigenvectors(right[name])) for name in right}


def _eigenvectors(covariance: Tensor) -> Tensor:
    """Of a symmetric matrix, in its type; found in fp64."""
    return torch.linalg.eigh(covariance.double()).eigenvectors.to(covariance.dtype)
