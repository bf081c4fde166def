"""Every use of every parameter in a backward pass: what went into it, and the gradient of the loss at what came out.

The gradient of a parameter is a sum over its uses and their tokens, so whoever hears all uses can form any linear function of
it, document by document, without the gradient itself:

    linear      y_t = W a_t             grad W = sum_t b_t a_t^T       heard: a [T, din], b [T, dout]
    norm        y_t = w * x_t / rms     grad w = sum_t b_t * x_t/rms   heard: x [T, d],   b [T, d]
    embedding   y_t = E[token_t]        grad E[v] = sum of b_t over token_t = v           tokens [T], b [T, d]

The output head is left to the loss, which never holds its logits as a whole (`ops.linear_loss`); `find_taps` names its parameter.
A parameter that nobody could hear is refused: scores that silently leave out some parameters rank documents differently.

Uses are heard in the backward pass only, so activations that are computed twice (recomputation) count once. Several micro-batches
may be on their way at once (pipelines): each use comes with the ticket of its own. Layouts: summed over the processes of a model
copy every use counts exactly once. Of cut weights each process hears its part; gains of norms that every tensor-parallel process
holds whole are heard by the first, unless the sequence is cut (sequence parallelism), where each hears its own tokens.

Legend: T = s*b tokens of a micro-batch of b rows of s tokens, din/dout width of a layer's input/output here, d hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from megatron_r1.model.build import OutputHead, R1Model
from megatron_r1.model.spec import RMSNorm
from megatron_r1.parallel.context import ParallelContext
from megatron_r1.parallel.ddp import unwrap
from megatron_r1.parallel.mcore import (
    ColumnParallelLinear,
    RowParallelLinear,
    TransformerLayer,
    VocabParallelEmbedding,
    gather_from_sequence_parallel_region,
)
from megatron_r1.utils.errors import DataError

Kind = Literal["linear", "norm", "embedding", "head"]


@dataclass(frozen=True)
class Tap:
    """One use of one parameter. A tied embedding has two taps with one name: as embedding and as head."""

    name: str
    kind: Kind
    module: nn.Module


class Use(NamedTuple):
    """What was heard, position by position of all rows ([s, b]). `first`: place of its first token (above 0 where the sequence is cut)."""

    tap: Tap
    inputs: Tensor  # [T, din], tokens [T] for an embedding
    gradient: Tensor  # [T, dout]
    ticket: Any
    first: int


Weights = Literal["frozen", "trained", "left to hear"]
"""What happens to the gradients of the weights while listening: none are made; autograd makes them as ever; those of linear layers
are `hear`'s to add to `main_grad`, autograd makes the others."""


def parameters_of(chunks: Sequence[nn.Module]) -> dict[str, nn.Parameter]:
    """The parameters of a process by name, with `chunk<i>.` in front when there are several chunks."""
    many = len(chunks) > 1
    return {
        (f"chunk{i}." if many else "") + name: parameter
        for i, chunk in enumerate(chunks)
        for name, parameter in unwrap(chunk).named_parameters()
    }


def find_taps(chunks: Sequence[nn.Module]) -> list[Tap]:
    """The taps of all parameters, in the order of the modules. Raises DataError naming a parameter that has none."""
    names = {id(parameter): name for name, parameter in parameters_of(chunks).items()}
    taps = []
    for chunk in map(unwrap, chunks):
        for module in chunk.modules():
            weight = getattr(module, "weight", None)
            if isinstance(module, OutputHead):
                taps.append(Tap(names[id(chunk.head_weight())], "head", module))
            elif isinstance(weight, nn.Parameter) and (kind := _kind(module)):
                taps.append(Tap(names[id(weight)], kind, module))
    deaf = sorted(set(names.values()) - {tap.name for tap in taps})
    if deaf:
        raise DataError(
            expected="parameters of linear layers without bias, RMSNorm gains, the embedding and the output head",
            found=f"{', '.join(deaf[:4])}{f' and {len(deaf) - 4} more' if len(deaf) > 4 else ''}",
            fix="teach model.taps this kind of parameter, or score with engine: finite_differences, which needs to know no layer",
        )
    return taps


def _kind(module: nn.Module) -> Kind | None:
    if isinstance(module, (ColumnParallelLinear, RowParallelLinear)):
        return "linear"
    if isinstance(module, VocabParallelEmbedding):
        return "embedding"
    return "norm" if isinstance(module, RMSNorm) else None


class Listener:
    """Calls `hear` with every use of the chunks' parameters but the head's while `attached`."""

    def __init__(self, chunks: Sequence[nn.Module], ctx: ParallelContext, hear: Callable[[Use], None]) -> None:
        """Raises DataError as `find_taps`."""
        self.chunks: list[R1Model] = [unwrap(chunk) for chunk in chunks]
        self.ctx, self.hear = ctx, hear
        self.taps = find_taps(chunks)
        self._ticket: Any = None
        self._tickets: dict[int, Any] = {}

    def begin(self, ticket: Any, segment_ids: Tensor) -> None:
        """The forward passes until the next `begin` belong to `ticket`; so do recomputed ones of layers that get `segment_ids`."""
        self._ticket = self._tickets[segment_ids.data_ptr()] = ticket

    def end(self) -> None:
        """Passes from here to the next `begin` belong to nobody and are not heard."""
        self._ticket = None
        self._tickets.clear()

    @contextmanager
    def attached(self, weights: Weights = "frozen") -> Iterator[None]:
        """Hear what begins inside of the block. Settings of the weights are as before afterwards."""
        parameters = [p for chunk in self.chunks for p in chunk.parameters()] if weights == "frozen" else []
        wanted = [p.requires_grad for p in parameters]
        taps = [tap for tap in self.taps if tap.kind != "head"]
        # Before the hook that hears, which must find the weight's setting restored.
        handles = [handle for tap in taps if tap.kind == "linear" for handle in self._spare(tap.module)] if weights == "left to hear" else []
        handles += [tap.module.register_forward_hook(self._hook(tap)) for tap in taps]
        layers = [m for chunk in self.chunks for m in chunk.modules() if isinstance(m, TransformerLayer)]
        handles += [layer.register_forward_pre_hook(self._recall, with_kwargs=True) for layer in layers]
        try:
            for parameter in parameters:
                parameter.requires_grad_(False)
            yield
        finally:
            for handle in handles:
                handle.remove()
            for parameter, flag in zip(parameters, wanted):
                parameter.requires_grad_(flag)
            self.end()

    def _spare(self, module: nn.Module) -> tuple[RemovableHandle, RemovableHandle]:
        """In a heard pass the layer sees a frozen weight and leaves its gradient alone. Only there: others ask for the setting."""

        def freeze(module: nn.Module, _: Any) -> None:
            if self._ticket is not None:
                module.weight.requires_grad_(False)

        def restore(module: nn.Module, _: Any, __: Any) -> None:
            module.weight.requires_grad_(True)

        return module.register_forward_pre_hook(freeze), module.register_forward_hook(restore)

    def _recall(self, _: nn.Module, __: Any, keywords: Mapping[str, Any]) -> None:
        """A layer whose activations are computed again, in the backward pass of one micro-batch after the forward pass of another,
        is told apart by the memory of its documents' numbers: what reaches it then is a copy of the tensor, not of its numbers."""
        documents = keywords.get("attention_mask")
        if documents is not None:
            self._ticket = self._tickets.get(documents.data_ptr(), self._ticket)

    def _hook(self, tap: Tap) -> Callable[..., Tensor | None]:
        cut = self.chunks[0].config.sequence_parallel
        silent = tap.kind == "norm" and not cut and self.ctx.tensor_rank > 0

        def on_forward(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Tensor | None:
            out = output[0] if isinstance(output, tuple) else output
            if self._ticket is None or not torch.is_grad_enabled():
                return None  # nobody's, or a recomputed layer's first forward pass
            if not out.requires_grad:
                out.requires_grad_()  # the embedding's, of frozen weights: nothing before it takes gradients
            if silent:
                return None
            inputs, ticket = arguments[0].detach(), self._ticket

            def on_backward(gradient: Tensor) -> None:
                a, b, first = inputs, gradient.detach(), 0
                if tap.kind == "embedding":
                    # [b, s]; so is what comes out, but for cut sequences.
                    a, b = a.t(), b if cut else b.transpose(0, 1)
                if cut:
                    a, b, first = self._whole(tap, a, b)
                self.hear(Use(tap, a.flatten() if tap.kind == "embedding" else a.flatten(0, -2), b.flatten(0, -2), ticket, first))

            out.register_hook(on_backward)
            return None

        return on_forward

    def _whole(self, tap: Tap, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, int]:
        """Under sequence parallelism: column-parallel layers have a piece of the tokens as input, row-parallel ones and the
        embedding as output."""
        if tap.kind == "norm":
            return a, b, self.ctx.tensor_rank * a.shape[:-1].numel()
        with torch.no_grad():
            if isinstance(tap.module, ColumnParallelLinear):
                return gather_from_sequence_parallel_region(a, tensor_parallel_output_grad=False), b, 0
            return a, gather_from_sequence_parallel_region(b, tensor_parallel_output_grad=False), 0
