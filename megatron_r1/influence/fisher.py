"""What EK-FAC is estimated from: the uses of every weight in the backward pass of documents whose labels the model drew itself.

With labels drawn from the model's own distribution at every position, the expected square of a document's gradient is the Fisher
information, which for this loss is the Gauss-Newton matrix; with the documents' own labels it would not be (the "empirical
Fisher"). The draw is keyed by the document's place: every pass sees the same labels.

Legend: T tokens of a document, din/dout width of a linear layer's input/output, V vocabulary, d hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron_r1.influence.reference import Reference
from megatron_r1.influence.rows import Batch, collate
from megatron_r1.model.forward import token_losses
from megatron_r1.model.generate import drawn_labels
from megatron_r1.model.taps import Listener, Use, parameters_of
from megatron_r1.parallel.context import ParallelContext
from megatron_r1.utils.errors import DataError
from megatron_r1.utils.seeding import generator


@dataclass(frozen=True)
class LinearUse:
    """A linear layer's part in a document: its gradient is outputs^T inputs."""

    inputs: Tensor  # a [T, din]
    outputs: Tensor  # b [T, dout], gradient of the document's summed loss at what came out

    def gradient(self) -> Tensor:
        """[dout, din]"""
        return self.outputs.t() @ self.inputs


DocumentUses = dict[str, LinearUse | Tensor]
"""Parameter name -> a linear layer's use, or the gradient itself (embedding and head [V, d], gains [d])."""


class FisherDocuments:
    """The uses of chosen parameters, document by document, made anew in each pass. The model must be whole on this process."""

    def __init__(
        self,
        chunks: Sequence[nn.Module],
        ctx: ParallelContext,
        kept: Sequence[str],
        reference: Reference,
        seed: int,
        advance: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Draws the labels. kept: names of the parameters wanted. Raises DataError as `model.taps.find_taps`."""
        (self.model,) = chunks
        self.reference, self.advance = reference, advance
        self._heard: dict[str, LinearUse] = {}
        self._listener = Listener(chunks, ctx, self._hear)
        linear = {tap.name for tap in self._listener.taps if tap.kind == "linear"}
        self._linear = linear & set(kept)
        # The embedding always: the way to it leads past every layer.
        self._leaves = {n: p for n, p in parameters_of(chunks).items() if n not in linear and (n in kept or "embedding" in n)}
        self._wanted = [name for name in self._leaves if name in kept]
        self._batches = [self._with_drawn_labels(i, ctx.device, seed) for i in range(len(reference.rows))]

    @property
    def tokens(self) -> int:
        """Predicted tokens of all documents."""
        return self.reference.tokens

    def __iter__(self) -> Iterator[DocumentUses]:
        """Raises DataError at a gradient that is not finite, naming the document."""
        for batch, name in zip(self._batches, self.reference.names):
            self._heard = {}
            with torch.enable_grad(), self._listener.attached():
                for leaf in self._leaves.values():
                    leaf.requires_grad_(True)
                self._listener.begin(name, batch["tokens"])
                loss = token_losses(self.model, batch).sum()
                found = dict(zip(self._leaves, torch.autograd.grad(loss, list(self._leaves.values()))))
            # What is not a number in any layer reaches the embedding.
            if not all(bool(torch.isfinite(part).all()) for part in found.values()):
                raise DataError(
                    expected=f"finite gradients of {name}",
                    found=f"some that are not (loss {float(loss.detach())})",
                    fix="check that the checkpoint's training did not diverge, or score an earlier checkpoint",
                )
            self.advance(3 * batch["tokens"].numel())
            heard, self._heard = self._heard, {}
            yield {**heard, **{n: _wide(found[n]) for n in self._wanted}}

    def _hear(self, use: Use) -> None:
        if use.tap.name in self._linear:
            self._heard[use.tap.name] = LinearUse(_wide(use.inputs), _wide(use.gradient))

    def _with_drawn_labels(self, i: int, device: torch.device, seed: int) -> Batch:
        batch = collate([self.reference.rows[i]], device)
        uniform = torch.from_numpy(generator(seed, "drawn labels", i).random((1, batch["tokens"].shape[1])))
        batch["labels"] = drawn_labels(self.model, batch["tokens"], uniform)
        self.advance(batch["tokens"].numel())
        return batch


def _wide(tensor: Tensor) -> Tensor:
    """At least fp32: sums over many documents need the digits."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
