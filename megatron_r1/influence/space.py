"""Where the gradients of a model live: all in this process, or in parts on the processes that hold one copy of it together.

Everything else computes with parts by name. What needs to know of the others is here: losses, gradients, inner products.

Legend: b rows, s tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_r1.influence.rows import Batch, TokenLosses
from megatron_r1.model.forward import token_losses
from megatron_r1.model.taps import parameters_of
from megatron_r1.parallel.context import ParallelContext
from megatron_r1.parallel.ddp import complete_gradients, owned, unwrap
from megatron_r1.parallel.schedule import forward_backward


class Space:
    """A whole model in this process."""

    def inner(self, a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
        """<a, b> over all parameters of the model, each once."""
        return self._joined(sum(float((part.double() * b[name].double()).sum()) for name, part in self._counted(a).items()))

    def _counted(self, a: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What counts as this process' of all that it has."""
        return a

    def _joined(self, number: float) -> float:
        """Sum over the processes."""
        return number

    def norm(self, a: Mapping[str, Tensor]) -> float:
        """Euclidean norm over all parameters."""
        return self._joined(sum(float(torch.linalg.vector_norm(part, dtype=torch.float64)) ** 2 for part in self._counted(a).values())) ** 0.5

    def union(self, values: Iterable[str]) -> list[str]:
        """What any process has, in order."""
        return sorted(set(values))

    def digest(self, a: Mapping[str, Tensor]) -> str:
        """SHA-256 of the parts: names, shapes and bytes, in the order of the names. Of a cut model: of its processes' in their order."""
        found = hashlib.sha256()
        for name in sorted(a):
            part = a[name].detach().cpu().contiguous()
            found.update(f"{name} {part.dtype} {list(part.shape)} ".encode())
            found.update(part.view(torch.uint8).numpy().data if part.numel() else b"")
        return found.hexdigest()

    def differentiate(
        self, losses: TokenLosses, parameters: Mapping[str, Tensor], batch: Batch, weights: Sequence[float]
    ) -> tuple[Iterable[Tensor], float]:
        """(gradients of the parameters, value) of sum_i weights[i] * (summed token loss of row i), b weights."""
        with torch.enable_grad():
            loss = _weighted(losses(batch), batch, weights)
            return torch.autograd.grad(loss, list(parameters.values())), float(loss.detach())


WHOLE = Space()


class Sharded(Space):
    """A model cut over tensor- and pipeline-parallel processes. Every call is collective over its copy; results are the same on all."""

    def __init__(self, chunks: Sequence[nn.Module], ctx: ParallelContext) -> None:
        """`chunks`: this process' bare chunks."""
        self.chunks, self.ctx = list(chunks), ctx
        self.parameters = parameters_of(chunks)
        mine = owned(chunks, ctx)
        self._counts = {name for name, parameter in self.parameters.items() if id(parameter) in mine}

    def _counted(self, a: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {name: part for name, part in a.items() if name in self._counts}

    def _joined(self, number: float) -> float:
        return float(self.ctx.all_reduce_sum(torch.tensor(number, dtype=torch.float64, device=self.ctx.device), over="model"))

    def union(self, values: Iterable[str]) -> list[str]:
        return sorted(set().union(*self.ctx.gather_objects(sorted(set(values)))))

    def digest(self, a: Mapping[str, Tensor]) -> str:
        own = (self.ctx.pipeline_rank, self.ctx.tensor_rank, super().digest(a))
        return hashlib.sha256(repr(sorted(set(self.ctx.gather_objects(own)))).encode()).hexdigest()

    def losses(self, batch: Batch) -> Tensor:
        """Token losses [b, s] without gradients."""
        batch, length = self._padded(batch)

        def step(stream: Iterator[Batch], chunk: nn.Module) -> Any:
            nothing = torch.zeros((), dtype=torch.int, device=self.ctx.device)
            return token_losses(chunk, next(stream)), lambda out: (out.sum(), nothing, {"losses": out})

        reports = self._run(step, batch, forward_only=True)
        found = reports[0]["losses"].contiguous() if reports else torch.empty(batch["tokens"].shape, device=self.ctx.device)
        return self.ctx.all_reduce_sum(self.ctx.from_last_stage(found), over="context")[:, :length]

    def differentiate(
        self, losses: TokenLosses, parameters: Mapping[str, Tensor], batch: Batch, weights: Sequence[float]
    ) -> tuple[Iterable[Tensor], float]:
        batch, _ = self._padded(batch)

        def step(stream: Iterator[Batch], chunk: nn.Module) -> Any:
            own = next(stream)
            nothing = torch.zeros((), dtype=torch.int, device=self.ctx.device)
            return token_losses(chunk, own), lambda out: (_weighted(out, own, weights), nothing, {})

        with torch.enable_grad():
            reports = self._run(step, batch, forward_only=False)
        complete_gradients(self.chunks, self.ctx)
        found = [self.parameters[name].grad for name in parameters]
        for parameter in self.parameters.values():
            parameter.grad = None
        value = torch.stack([report["loss_sum"] for report in reports]).sum() if reports else torch.zeros((), device=self.ctx.device)
        return found, float(self.ctx.all_reduce_sum(self.ctx.from_last_stage(value), over="context"))

    def _run(self, step: Any, batch: Batch, forward_only: bool) -> list[dict[str, Tensor]]:
        """One batch through the pipeline. The interleaved schedule wants as many as there are stages: copies in which nothing counts."""
        blank = batch | {"loss_mask": torch.zeros_like(batch["loss_mask"])}
        blanks = self.ctx.pipeline_size - 1 if self.ctx.layout.virtual_pipeline else 0
        b, s = batch["tokens"].shape
        return forward_backward(self.ctx, self.chunks, step, iter([batch] + [blank] * blanks), 1 + blanks, s, b, forward_only)

    def _padded(self, batch: Batch) -> tuple[Batch, int]:
        """Masked tokens at the end, so that sequences can be cut in equal pieces; and the length before."""
        length = batch["tokens"].shape[1]
        missing = -length % self.ctx.layout.sequence_multiple
        return {name: F.pad(tensor, (0, missing)) for name, tensor in batch.items()} if missing else batch, length


def space_of(chunks: Sequence[nn.Module], ctx: ParallelContext) -> Space:
    """Where gradients of these chunks live."""
    return Sharded([unwrap(chunk) for chunk in chunks], ctx) if ctx.layout.model_parallel() > 1 else WHOLE


def _weighted(losses: Tensor, batch: Batch, weights: Sequence[float]) -> Tensor:
    per_row = (losses * batch["loss_mask"]).sum(dim=1)
    return (per_row * per_row.new_tensor(weights)).sum()
