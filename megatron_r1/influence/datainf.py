"""DataInf's closed form of an inverse Hessian (arXiv 2310.00902), which AutoMixer and MobileLLM-R1 score with."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from megatron_r1.model.precondition import Direction, Preconditioner
from megatron_r1.utils.errors import ConfigError, DataError


class DataInf(Preconditioner):
    """Per parameter tensor l, from the gradients g_i of n documents' mean token losses (arXiv 2310.00902, Eq. 5):

        P_l v = (1/n) sum_i (g_i g_i^T + lambda_l)^-1 v = (1/lambda_l) [v - (1/n) sum_i <v, g_i> / (lambda_l + |g_i|^2) g_i]
        lambda_l = damping * (1 / (n d_l)) sum_i |g_i|^2        d_l: entries of the tensor

    The mean of inverses stands for the inverse of the mean (1/n) sum_i g_i g_i^T + lambda_l. With damping 0.1 lambda_l is the
    paper's (arXiv 2310.00902, section 4.1; arXiv 2506.21910): a tenth of the mean squared gradient entry, which is a tenth of
    the mean eigenvalue. Two passes over the documents in all: norms here, products and sums in `several`, for any number of
    gradients at once. Held: one document's gradient, and the result.
    """

    RULE = "DataInf's closed form, every parameter tensor a block of its own"

    def __init__(self, gradients: Collection[Mapping[str, Tensor]], damping: float) -> None:
        """gradients: those of the documents, iterated anew in each pass; parameters absent from them are set to zero by P.

        Raises ConfigError unless damping > 0, DataError without documents or where a tensor's gradients are all zero.
        """
        if not damping > 0:
            raise ConfigError(expected="damping > 0", found=f"{damping}", fix="set curvature.damping to a positive number; 0.1 is the paper's")
        self.gradients = gradients
        squares: dict[str, list[Tensor]] = {}
        sizes: dict[str, int] = {}
        for found in gradients:
            for name, part in found.items():
                squares.setdefault(name, []).append(part.double().pow(2).sum())
                sizes[name] = part.numel()
        if not squares:
            raise DataError(expected="gradients of some documents", found="none", fix="raise curvature.documents")
        self.squares = {name: torch.stack(values) for name, values in squares.items()}  # |g_i|^2, float64 [n]
        self.damping = {name: damping * float(values.mean()) / sizes[name] for name, values in self.squares.items()}
        for name, value in self.damping.items():
            if not 0 < value < float("inf"):
                raise DataError(
                    expected=f"gradients of {name} that are finite and not all zero",
                    found=f"a mean square of {value / damping} over {len(self.gradients)} documents",
                    fix="leave that parameter out (influence's `parameters`), or raise curvature.documents",
                )

    def several(self, gradients: Sequence[Mapping[str, Tensor]]) -> list[Direction]:
        """P of each gradient, in one pass over the documents."""
        n = len(self.gradients)
        sums = [{name: torch.zeros_like(vector[name]) for name in self.damping} for vector in gradients]
        for i, document in enumerate(self.gradients):
            for vector, total in zip(gradients, sums):
                for name, part in document.items():
                    product = (vector[name].double() * part.double()).sum()
                    share = product / (n * (self.damping[name] + self.squares[name][i]))
                    total[name] += part * share.to(part.dtype)
        return [
            {
                name: (part - total[name]) / self.damping[name] if name in total else torch.zeros_like(part)
                for name, part in vector.items()
            }
            for vector, total in zip(gradients, sums)
        ]
