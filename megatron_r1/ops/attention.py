"""From packed qkv to attention output in one differentiable operation: QK-norm, RoPE, causal grouped-query attention that stops
at documents.

Three steps: normalise and rotate queries and keys (`ops.qk_norm_rope`), the attention core (`ops.attention_cores`), and for a
sequence cut over processes a gathering of keys and values in between. Kept for the backward: qkv as it came, the output and its
log-sum-exp, one number per head and token. Queries and keys are made again: that costs a pass over qkv and saves as much memory
as qkv takes. The backward writes the gradient of the packed qkv in one go.

Positions count from the start of the row, also when documents are reset: RoPE only ever shows differences of positions,
and within a document these are the same whether or not counting starts anew.

Context parallelism: with p processes a sequence is cut into 2p chunks and process i has chunks i and 2p-1-i, in this order, so
that all have as much to do (megatron-core's order). Keys and values are gathered after norm and rotation; local queries see the
keys up to their own. In the backward keys and values are gathered once more instead of being kept.

Implementations: `csrc` (compiled norm and rotation), `analytic` (the same in plain torch), `reference` (automatic derivatives of
the definition). Which attention core runs below the first two is a choice of its own: see `ops.attention_cores`.

Legend: s tokens here, S tokens of the whole sequence (s without context parallelism), b rows, nq query heads, nkv key/value
heads, h head size, n documents.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_r1.ops import attention_cores, reference
from megatron_r1.ops.dispatch import Op
from megatron_r1.ops.qk_norm_rope import QK_NORM_ROPE, qk_norm_rope, qk_norm_rope_backward, qk_norm_rope_forward
from megatron_r1.ops.rope import cos_sin
from megatron_r1.ops.segments import Plan, check_boundaries, document_numbers, longest, plan_of
from megatron_r1.utils.errors import DataError

cores = attention_cores.cores  # what `megatron-r1 doctor` lists

# Angles are position times frequency in fp32, which knows no odd numbers from here on; and a table of all positions is made.
_POSITIONS = 1 << 24


class ContextPiece(Protocol):
    """This process's share of sequences cut over `size` processes: chunks `rank` and 2*size-1-rank of 2*size equal ones."""

    rank: int
    size: int

    def gather(self, x: Tensor) -> Tensor:
        """[s, ...] of every process -> [S, ...] in the order of the sequence. Not differentiable."""
        ...

    def scatter_sum(self, x: Tensor) -> Tensor:
        """[S, ...] of every process -> the sum over processes of this one's chunks [s, ...]: the adjoint of `gather`."""
        ...


class Call(NamedTuple):
    """Everything about a call that is neither a tensor nor a process group. `prologue`: implementation of norm and rotation."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    norm: str
    eps: float
    interleaved: bool
    grouped: bool
    parity: bool
    max_seqlen: int | None
    core: str | None
    prologue: str


def _positions(qkv: Tensor, positions: Tensor | None, context: ContextPiece | None) -> tuple[Tensor, int]:
    """(positions of the tokens here, length of the table that has them all)."""
    if positions is not None:
        return positions, _highest(positions) + 1
    rank, size = (0, 1) if context is None else (context.rank, context.size)
    return _global_index(qkv.shape[0], rank, size, qkv.device), qkv.shape[0] * size


@lru_cache(maxsize=16)
def _global_index(length: int, rank: int, size: int, device: torch.device) -> Tensor:
    """Place in the whole sequence of each of the `length` tokens here: int64 [s]."""
    with torch.inference_mode(False):
        if size == 1:
            return torch.arange(length, device=device)
        half = length // 2
        starts = (rank * half, (2 * size - 1 - rank) * half)
        return torch.cat([torch.arange(start, start + half, device=device) for start in starts])


def _highest(positions: Tensor) -> int:
    """The largest position, read once per tensor. Raises DataError for what is no position."""
    if positions.dtype != torch.int64:
        raise DataError(expected="positions: int64", found=str(positions.dtype), fix="convert it")
    version = -1 if positions.is_inference() else positions._version
    known, bounds = getattr(positions, "_r1_bounds", (None, (0, -1)))
    if known != version:
        if positions.numel():
            bounds = tuple(int(x) for x in positions.aminmax())
        positions._r1_bounds = (version, bounds)  # type: ignore[attr-defined]
    if bounds[0] < 0:
        raise DataError(expected="positions: none below 0", found=str(bounds[0]), fix="count from the start of the sequence")
    if bounds[1] >= _POSITIONS:
        raise DataError(expected=f"positions: below {_POSITIONS}", found=str(bounds[1]), fix="count from the start of the sequence: only differences show")
    return bounds[1]


def _prologue(
    qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, positions: Tensor | None, call: Call, context: ContextPiece | None
) -> dict[str, Any]:
    """The arguments of `ops.qk_norm_rope` for this call."""
    at, length = _positions(qkv, positions, context)
    cos, sin = cos_sin(max(length, 1), call.head_dim, call.rope_theta, qkv.device)
    if qkv.dtype == torch.float64:
        cos, sin = cos.double(), sin.double()
    return {
        "num_heads": call.num_heads, "num_kv_heads": call.num_kv_heads, "head_dim": call.head_dim, "cos": cos, "sin": sin, "positions": at,
        "norm": call.norm, "q_weight": q_weight, "k_weight": k_weight, "eps": call.eps, "interleaved": call.interleaved,
        "grouped": call.grouped, "parity": call.parity,
    }  # fmt: skip


def _plan(qkv: Tensor, documents: Tensor | None, call: Call, context: ContextPiece | None) -> Plan:
    rank, size = (0, 1) if context is None else (context.rank, context.size)
    plan = plan_of(documents, qkv.shape[1], qkv.shape[0] * size, rank, size)
    if call.max_seqlen is not None and (found := max((longest(band.key_cuts) for band in plan.bands), default=0)) > call.max_seqlen:
        raise DataError(
            expected=f"max_seqlen: at least the longest document of cu_seqlens, {found} tokens", found=str(call.max_seqlen),
            fix="leave it out: it is found from cu_seqlens",
        )  # fmt: skip
    return plan


def _keys_and_values(k: Tensor, v: Tensor, context: ContextPiece | None) -> tuple[Tensor, Tensor]:
    """Of the whole sequence, in one exchange."""
    if context is None:
        return k, v
    k, v = context.gather(torch.stack([k, v], dim=2)).unbind(2)
    return k, v


def _forward(
    qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, documents: Tensor | None, positions: Tensor | None,
    call: Call, context: ContextPiece | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(output [s, b, nq*h], lse [b, nq, s]), both contiguous."""
    plan = _plan(qkv, documents, call, context)
    q, k, v = qk_norm_rope_forward(qkv, **_prologue(qkv, q_weight, k_weight, positions, call, context), implementation=call.prologue)
    k, v = _keys_and_values(k, v, context)
    core = attention_cores.choose(qkv.device.type, qkv.dtype, call.head_dim, plan, call.core)
    out, lse = core.forward(q, k, v, plan, call.head_dim**-0.5)
    return out.flatten(2), lse


def _backward(
    dout: Tensor, qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, documents: Tensor | None, positions: Tensor | None,
    out: Tensor, lse: Tensor, call: Call, context: ContextPiece | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of (qkv, q_weight, k_weight)."""
    plan, prologue = _plan(qkv, documents, call, context), _prologue(qkv, q_weight, k_weight, positions, call, context)
    q, k, v = qk_norm_rope_forward(qkv, **prologue, implementation=call.prologue)
    k, v = _keys_and_values(k, v, context)
    core = attention_cores.choose(qkv.device.type, qkv.dtype, call.head_dim, plan, call.core)
    heads = (call.num_heads, call.head_dim)
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()  # the gradient of a sum has strides of 0
    dq, dk, dv = core.backward(dout.unflatten(-1, heads), q, k, v, out.unflatten(-1, heads), lse, plan, call.head_dim**-0.5)
    if context is not None:
        dk, dv = context.scatter_sum(torch.stack([dk, dv], dim=2)).to(qkv.dtype).unbind(2)
    return qk_norm_rope_backward(dq, dk, dv, qkv, **prologue, implementation=call.prologue)


class _Attention(torch.autograd.Function):
    """Forward and backward above as one differentiable step."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, documents: Tensor | None, positions: Tensor | None,
        call: Call, context: ContextPiece | None,
    ) -> Tensor:  # fmt: skip
        if torch.compiler.is_compiling():
            out, lse = torch.ops.megatron_r1.qknorm_attention_forward(qkv, q_weight, k_weight, documents, positions, *call)
        else:
            out, lse = _forward(qkv, q_weight, k_weight, documents, positions, call, context)
        ctx.save_for_backward(qkv, q_weight, k_weight, documents, positions, out, lse)
        ctx.call, ctx.context = call, context
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        qkv, q_weight, k_weight, documents, positions, out, lse = ctx.saved_tensors
        if torch.compiler.is_compiling():
            dqkv, dqw, dkw = torch.ops.megatron_r1.qknorm_attention_backward(
                dout, qkv, q_weight, k_weight, documents, positions, out, lse, *ctx.call
            )
            dqw, dkw = None if q_weight is None else dqw, None if k_weight is None else dkw
        else:
            dqkv, dqw, dkw = _backward(dout, qkv, q_weight, k_weight, documents, positions, out, lse, ctx.call, ctx.context)
        return dqkv, dqw, dkw, None, None, None, None


# What a compiled graph has in place of the two functions: one node each, so that neither the documents of a batch nor the choice
# of a kernel is part of the graph. Eager calls do not pass here.
_OPTIONS = (
    "int num_heads, int num_kv_heads, int head_dim, float rope_theta, str norm, float eps, bool interleaved, bool grouped, "
    "bool parity, int? max_seqlen, str? core, str prologue"
)


def _forward_node(
    qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, documents: Tensor | None, positions: Tensor | None, *call: Any
) -> tuple[Tensor, Tensor]:
    return _forward(qkv, q_weight, k_weight, documents, positions, Call(*call), None)


def _forward_shapes(qkv: Tensor, q_weight: Any, k_weight: Any, documents: Any, positions: Any, *call: Any) -> tuple[Tensor, Tensor]:
    (s, b, _), options = qkv.shape, Call(*call)
    lse = qkv.new_empty(b, options.num_heads, s, dtype=attention_cores.wide(qkv.dtype))
    return qkv.new_empty(s, b, options.num_heads * options.head_dim), lse


def _backward_node(
    dout: Tensor, qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, documents: Tensor | None, positions: Tensor | None,
    out: Tensor, lse: Tensor, *call: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dqkv, dqw, dkw = _backward(dout, qkv, q_weight, k_weight, documents, positions, out, lse, Call(*call), None)
    return dqkv, qkv.new_empty(0) if dqw is None else dqw, qkv.new_empty(0) if dkw is None else dkw


def _backward_shapes(
    dout: Tensor, qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    gains = (qkv.new_empty(0) if w is None else torch.empty_like(w) for w in (q_weight, k_weight))
    return torch.empty_like(qkv, memory_format=torch.contiguous_format), *gains


for _name, _run, _shapes, _arguments, _results in (
    ("forward", _forward_node, _forward_shapes, "Tensor qkv, Tensor? q_weight, Tensor? k_weight, Tensor? documents, Tensor? positions", "(Tensor, Tensor)"),
    (
        "backward", _backward_node, _backward_shapes,
        "Tensor dout, Tensor qkv, Tensor? q_weight, Tensor? k_weight, Tensor? documents, Tensor? positions, Tensor out, Tensor lse",
        "(Tensor, Tensor, Tensor)",
    ),
):  # fmt: skip
    torch.library.custom_op(
        f"megatron_r1::qknorm_attention_{_name}", _run, mutates_args=(), schema=f"({_arguments}, {_OPTIONS}) -> {_results}"
    ).register_fake(_shapes)


def _fused(
    prologue: str, qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, documents: Tensor | None, positions: Tensor | None,
    call: Call, context: ContextPiece | None,
) -> Tensor:  # fmt: skip
    return _Attention.apply(qkv, q_weight, k_weight, documents, positions, call._replace(prologue=prologue), context)


class _Gather(torch.autograd.Function):
    """`ContextPiece.gather`, differentiable."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, context: ContextPiece) -> Tensor:
        ctx.context = context
        return context.gather(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.context.scatter_sum(grad.contiguous()), None


def _reference(
    qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, documents: Tensor | None, positions: Tensor | None,
    call: Call, context: ContextPiece | None,
) -> Tensor:  # fmt: skip
    _plan(qkv, documents, call, context)  # what it refuses is refused here too
    size = 1 if context is None else context.size
    q, k, v = qk_norm_rope(qkv, **_prologue(qkv, q_weight, k_weight, positions, call, context), implementation="reference")
    if context is not None:
        k, v = _Gather.apply(k, context), _Gather.apply(v, context)
    numbers = None if documents is None else document_numbers(documents, qkv.shape[1], qkv.shape[0] * size)
    index = _global_index(qkv.shape[0], 0 if context is None else context.rank, size, qkv.device)
    return reference.attention(q, k, v, index, numbers).flatten(2)


def _csrc_absent(device: str) -> str | None:
    return QK_NORM_ROPE.reasons(device).get("csrc", "there is no compiled norm and rotation")


ATTENTION = Op("qknorm_attention")
ATTENTION.register("csrc", partial(_fused, "csrc"), _csrc_absent)
ATTENTION.register("analytic", partial(_fused, "analytic"))
ATTENTION.register("reference", _reference)


def describe(device: str, dtype: torch.dtype, head_dim: int) -> str:
    """Which implementation and core calls of this kind run on: `csrc, core sdpa`."""
    plans = {"whole rows": plan_of(None, 1, 2), "documents": plan_of(torch.tensor([0, 1, 2]), 1, 2)}
    names = {kind: attention_cores.choose(device, dtype, head_dim, plan).name for kind, plan in plans.items()}
    same = len(set(names.values())) == 1
    core = names["documents"] if same else ", ".join(f"{name} for {kind}" for kind, name in names.items())
    return f"{ATTENTION.choose(device=device).name}, core {core}"


def qknorm_attention(
    qkv: Tensor,
    *,
    num_kv_heads: int,
    head_dim: int,
    rope_theta: float,
    eps: float,
    num_heads: int | None = None,
    norm: str = "rms",
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    interleaved: bool = True,
    grouped: bool = True,
    parity: bool = False,
    segment_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    context: ContextPiece | None = None,
    positions: Tensor | None = None,
    implementation: str | None = None,
    core: str | None = None,
) -> Tensor:
    """QK-norm (weightless RMS per head unless told otherwise), RoPE, causal grouped-query attention with scale 1/sqrt(h).

    qkv [s, b, (nq + 2 nkv)*h], `grouped`: per key/value head its query heads, its key, its value (megatron-core's layout);
    `num_heads` follows from the size when it is left out. `norm`, the gains, `interleaved`, `grouped`, `parity`: see
    `ops.qk_norm_rope.qk_norm_rope`.
    Documents, either way of the whole sequence: `segment_ids` [b, S], tokens attend only within a run of equal ids; or, for one
    row, `cu_seqlens` int32 or int64 [n+1], boundaries from 0 to S, of which empty and one-token documents are welcome
    (`max_seqlen`, if given, must not be below the longest). None of them is plain causal attention. What they say is read once
    per tensor and kept with it; on a GPU that first reading waits for the device.
    positions int64 [s] or [s, b]; by default the place in the whole sequence.
    context: this process's piece of sequences cut over processes; s is then the tokens here. Breaks a graph of torch.compile.
    Returns [s, b, nq*h], contiguous. Differentiable once, with respect to qkv and the gains.
    `implementation`: see `ops.dispatch.Op.choose`; `core`: see `ops.attention_cores.choose`.
    Raises DataError naming the argument, EnvironmentProblem for an implementation or core that can not run here.
    """
    if qkv.dim() != 3:
        raise DataError(expected="qkv: [s, b, packed heads]", found=f"shape {list(qkv.shape)}", fix="view tokens without rows as qkv[:, None]")
    if head_dim < 2 or head_dim % 2:
        raise DataError(expected="head_dim: a positive even number", found=str(head_dim), fix="pass the size of one head")
    if not rope_theta > 0:
        raise DataError(expected="rope_theta: a positive number", found=str(rope_theta), fix="pass the base of the rotation's frequencies")
    if segment_ids is not None and cu_seqlens is not None:
        raise DataError(expected="segment_ids or cu_seqlens", found="both", fix="leave one out")
    if segment_ids is not None and segment_ids.dim() != 2:
        raise DataError(expected="segment_ids: [b, S]", found=f"shape {list(segment_ids.shape)}", fix="pass boundaries as cu_seqlens")
    if max_seqlen is not None and cu_seqlens is None:
        raise DataError(expected="max_seqlen: only together with cu_seqlens", found="no cu_seqlens", fix="leave it out")
    if cu_seqlens is not None:
        check_boundaries(cu_seqlens, qkv.shape[1], max_seqlen)
    if context is not None and not 0 <= context.rank < context.size:
        raise DataError(expected=f"context: a rank from 0 to {context.size - 1}", found=str(context.rank), fix="correct it")
    heads = qkv.shape[-1] // head_dim - 2 * num_kv_heads if num_heads is None else num_heads
    call = Call(heads, num_kv_heads, head_dim, float(rope_theta), norm, float(eps), interleaved, grouped, parity, max_seqlen, core, "analytic")
    documents = segment_ids if cu_seqlens is None else cu_seqlens
    attend = ATTENTION if context is None else _outside_of_graphs
    return attend(qkv, q_weight, k_weight, documents, positions, call, context, implementation=implementation)


@torch.compiler.disable(reason="a node of a graph has no process group: attention over cut sequences (context=...) runs outside of compiled graphs")
def _outside_of_graphs(*arguments: Any, implementation: str | None) -> Tensor:
    return ATTENTION(*arguments, implementation=implementation)
