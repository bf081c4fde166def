"""The attention core: softmax(q k^T * scale) v, causal and inside documents, by whichever kernel this machine has.

Forward and backward are plain functions: `ops.attention` is the one differentiable operation and keeps only the output and its
log-sum-exp. A core takes its tensors token-major, as the projections make them, and hands strided views to the kernel; it copies
only where a kernel gives back another order.

Cores, best first: on a GPU `flash3` (FlashAttention-3), `flash4` (FlashAttention-4), `cudnn` (documents as long as the rows
only), `flash2` (FlashAttention-2 in torch), on a CPU `sdpa` (torch's blocked kernel); everywhere `math` (plain torch, any float
type, a bounded block of queries at a time). A GPU kernel is used only after it agreed with `math` on this very machine.
Environment: MEGATRON_R1_ATTENTION=<name> forces one.

Packed rows: variable-length kernels want the tokens of all documents behind each other with one stride, and token-major rows
interleave. So a row with several documents is one launch (no copy: the row's stride is just larger), while rows of one document
each go together.

Legend: sq queries, sk keys, b rows, nq query heads, nkv key/value heads (nq a multiple of it), h head size.
q [sq, b, nq, h], k, v [sk, b, nkv, h], out as q, lse [b, nq, sq] fp32 (fp64 for fp64).
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_r1.ops.segments import Band, Cuts, Plan, plan_of
from megatron_r1.utils.errors import EnvironmentProblem
from megatron_r1.utils.logging import get_logger

CORE_VARIABLE = "MEGATRON_R1_ATTENTION"
_log = get_logger(__name__)
_HALF = (torch.bfloat16, torch.float16)
# Scores that `math` holds at a time, over all rows and heads.
_SCORES = 1 << 24


class _Problem(NamedTuple):
    """One call of a kernel: rows, queries and keys it works on, and the documents inside when there are several."""

    rows: slice
    queries: slice
    keys: slice
    cuts: Cuts | None

    def of_queries(self, x: Tensor) -> Tensor:
        """That part of [sq, b, ...]."""
        return x[self.queries, self.rows]

    def of_keys(self, x: Tensor) -> Tensor:
        """That part of [sk, b, ...]."""
        return x[self.keys, self.rows]

    def of_lse(self, x: Tensor) -> Tensor:
        """That part of [b, nq, sq]."""
        return x[self.rows, :, self.queries]


class Core:
    """A kernel and how to cut a plan for it. Subclasses bring `_forward` and `_backward` for one `_Problem`."""

    name: str
    varlen = False  # whether one call can take several documents

    def absent(self, device: str) -> str | None:
        """None when this can run on that kind of device, else why not."""
        raise NotImplementedError

    def refuses(self, dtype: torch.dtype, head_dim: int, plan: Plan) -> str | None:
        """None when this can do such a call, else why not."""
        return None

    def disagrees(self, dtype: torch.dtype, head_dim: int) -> str | None:
        """None when this computes such heads rightly on this machine, else what is wrong; asked after the two above."""
        return None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float) -> tuple[Tensor, Tensor]:
        """(out, lse), both contiguous. k and v have all `plan.length` tokens."""
        if plan.whole:
            out, lse = self._forward(q, k, v, None, scale)
            return out.contiguous(), lse.contiguous()
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = torch.empty(q.shape[1], q.shape[2], q.shape[0], dtype=wide(q.dtype), device=q.device)
        for problem in self._problems(plan, q.device):
            mine, its = self._forward(problem.of_queries(q), problem.of_keys(k), problem.of_keys(v), problem.cuts, scale)
            problem.of_queries(out).copy_(mine)
            problem.of_lse(lse).copy_(its)
        return out, lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: Plan, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dq, dk, dv) of the shapes of q, k, v. Of a piece of a sequence dk and dv are fp32 (fp64) shares, to be summed over pieces."""
        if plan.whole:
            return self._backward(dout, q, k, v, out, lse, None, scale)
        dq = torch.empty_like(q, memory_format=torch.contiguous_format)
        if plan.pieces == 1:  # every key belongs to one document
            dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (k, v))
        else:  # the two chunks here may read the same keys, and need not read all
            dk, dv = (torch.zeros(x.shape, dtype=wide(x.dtype), device=x.device) for x in (k, v))
        for problem in self._problems(plan, q.device):
            mine = self._backward(
                problem.of_queries(dout), problem.of_queries(q), problem.of_keys(k), problem.of_keys(v),
                problem.of_queries(out), problem.of_lse(lse).contiguous(), problem.cuts, scale,
            )  # fmt: skip
            problem.of_queries(dq).copy_(mine[0])
            for whole, part in ((dk, mine[1]), (dv, mine[2])):
                if plan.pieces == 1:
                    problem.of_keys(whole).copy_(part)
                else:
                    problem.of_keys(whole).add_(part)
        return dq, dk, dv

    def _problems(self, plan: Plan, device: torch.device) -> Iterator[_Problem]:
        for index, band in enumerate(plan.bands):
            documents = len(band.query_cuts) - 1
            if documents == 1:
                yield _Problem(slice(*band.rows), slice(*band.queries), slice(*band.keys), None)
            elif self.varlen:
                for row in range(*band.rows):
                    yield _Problem(slice(row, row + 1), slice(*band.queries), slice(*band.keys), plan.cuts(index, device))
            else:
                for document in range(documents):
                    yield _document(band, document)

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, cuts: Cuts | None, scale: float) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cuts: Cuts | None, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        raise NotImplementedError


def wide(dtype: torch.dtype) -> torch.dtype:
    """What is computed in: fp64 for fp64, else fp32."""
    return torch.promote_types(dtype, torch.float32)


def _document(band: Band, index: int) -> _Problem:
    (q0, q1), (k0, k1) = band.query_cuts[index : index + 2], band.key_cuts[index : index + 2]
    a, c = band.queries[0], band.keys[0]
    return _Problem(slice(*band.rows), slice(a + q0, a + q1), slice(c + k0, c + k1), None)


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    """[s, b, heads, h] -> [b, heads, s, h], views."""
    return [x.permute(1, 2, 0, 3) for x in tensors]


def _rows_first(*tensors: Tensor) -> list[Tensor]:
    """[s, b, heads, h] -> [b, s, heads, h], views."""
    return [x.transpose(0, 1) for x in tensors]


class MathCore(Core):
    """Plain torch, in fp32 (fp64 for fp64), a block of queries at a time. What every other core is checked against."""

    name = "math"

    def absent(self, device: str) -> str | None:
        """Never."""
        return None

    @staticmethod
    def _blocks(q: Tensor, k: Tensor) -> Iterator[tuple[int, int, int]]:
        """Queries a to z with the keys up to the last one that query z-1 sees."""
        queries, rows, heads, _ = q.shape
        step = max(1, _SCORES // max(1, rows * heads * k.shape[0]))
        for a in range(0, queries, step):
            z = min(a + step, queries)
            yield a, z, k.shape[0] - queries + z

    @staticmethod
    def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
        """q [b, nkv, r, queries, h], k [b, nkv, 1, keys, h] -> [b, nkv, r, queries, keys], -inf beyond the causal edge."""
        scores = (q @ k.transpose(-1, -2)).mul_(scale)
        queries, keys = scores.shape[-2:]
        hidden = torch.ones(queries, keys, dtype=torch.bool, device=q.device).triu_(keys - queries + 1)
        return scores.masked_fill_(hidden, float("-inf"))

    @staticmethod
    def _grouped(x: Tensor, groups: int) -> Tensor:
        """[s, b, heads, h] -> [b, nkv, heads / nkv, s, h] in fp32."""
        return x.permute(1, 2, 0, 3).unflatten(1, (groups, -1)).to(wide(x.dtype))

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, cuts: Cuts | None, scale: float) -> tuple[Tensor, Tensor]:
        groups = k.shape[2]
        out, lse = torch.empty_like(q), torch.empty(q.shape[1], q.shape[2], q.shape[0], dtype=wide(q.dtype), device=q.device)
        wide_k, wide_v = self._grouped(k, groups), self._grouped(v, groups)
        for a, z, end in self._blocks(q, k):
            scores = self._scores(self._grouped(q[a:z], groups), wide_k[..., :end, :], scale)
            lse[:, :, a:z] = scores.logsumexp(-1).flatten(1, 2)
            out[a:z] = (scores.softmax(-1) @ wide_v[..., :end, :]).flatten(1, 2).permute(2, 0, 1, 3)
        return out, lse

    def _backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cuts: Cuts | None, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        groups = k.shape[2]
        wide_k, wide_v = self._grouped(k, groups), self._grouped(v, groups)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(wide_k), torch.zeros_like(wide_v)
        for a, z, end in self._blocks(q, k):
            block, grad = self._grouped(q[a:z], groups), self._grouped(dout[a:z], groups)
            weights = self._scores(block, wide_k[..., :end, :], scale).sub_(lse[:, :, a:z].unflatten(1, (groups, -1)).unsqueeze(-1)).exp_()
            dv[..., :end, :] += (weights.transpose(-1, -2) @ grad).sum(2, keepdim=True)
            shared = (grad * self._grouped(out[a:z], groups)).sum(-1, keepdim=True)
            slope = (grad @ wide_v[..., :end, :].transpose(-1, -2)).sub_(shared).mul_(weights).mul_(scale)
            dq[a:z] = (slope @ wide_k[..., :end, :]).flatten(1, 2).permute(2, 0, 1, 3)
            dk[..., :end, :] += (slope.transpose(-1, -2) @ block).sum(2, keepdim=True)
        dk, dv = (x.squeeze(2).permute(2, 0, 1, 3).to(k.dtype) for x in (dk, dv))
        return dq, dk, dv


class CpuCore(Core):
    """torch's blocked CPU kernel, a document at a time: on 2 cores it was 1 to 10 times faster than one call with a dense mask,
    and what is not a number in one document can not reach another through a weight of zero."""

    name = "sdpa"
    # With fewer keys than the widest vector has numbers the kernel takes a row of scores that are all NaN for one without keys,
    # and makes it zeros (torch 2.13). So short documents get further tokens behind their last, which the causal edge hides.
    _fewest = 16

    def absent(self, device: str) -> str | None:
        """A kernel for CPUs."""
        return None if device == "cpu" else "a kernel for CPUs"

    @staticmethod
    def _mask(q: Tensor, k: Tensor) -> Tensor | None:
        """None for as many queries as keys, for which the kernel's own causal mask is the right one: it starts at the top left."""
        queries, keys = q.shape[2], k.shape[2]
        if queries == keys:
            return None
        return torch.full((1, 1, queries, keys), float("-inf"), dtype=q.dtype).triu_(keys - queries + 1)

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, cuts: Cuts | None, scale: float) -> tuple[Tensor, Tensor]:
        q, k, v = _heads_first(q, k, v)
        mask, queries, lacks = self._mask(q, k), q.shape[2], self._fewest - k.shape[2]
        k, v = _per_query_head(q, k, v)
        if lacks > 0:
            k, v = F.pad(k, (0, 0, 0, lacks)), F.pad(v, (0, 0, 0, lacks))
            if mask is None:
                q = F.pad(q, (0, 0, 0, lacks))
            else:
                mask = F.pad(mask, (0, lacks), value=float("-inf"))
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(q, k, v, 0.0, mask is None, attn_mask=mask, scale=scale)
        out, lse = out[:, :, :queries], lse[:, :, :queries]
        if not bool(lse.isfinite().all()):  # infinite scores: its exponential in bfloat16 makes 0 of inf - inf
            out.masked_fill_(~lse.isfinite().unsqueeze(-1), float("nan"))
        return out.permute(2, 0, 1, 3), lse

    def _backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cuts: Cuts | None, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        dout, q, k, v, out = _heads_first(dout, q, k, v, out)
        mask, groups = self._mask(q, k), k.shape[1]
        k, v = _per_query_head(q, k, v)
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default(
            dout, q, k, v, out, lse, 0.0, mask is None, attn_mask=mask, scale=scale
        )
        if dk.shape[1] != groups:
            dk, dv = (x.unflatten(1, (groups, -1)).sum(2) for x in (dk, dv))
        return dq.permute(2, 0, 1, 3), dk.permute(2, 0, 1, 3), dv.permute(2, 0, 1, 3)


# torch's CPU kernel shares key/value heads among query heads since this version.
_GROUPED_CPU_KERNEL = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) >= (2, 13)


def _per_query_head(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """k and v [b, nkv, s, h] as the kernel of this torch wants them: as they are, or repeated for every query head."""
    if _GROUPED_CPU_KERNEL or q.shape[1] == k.shape[1]:
        return k, v
    repeats = q.shape[1] // k.shape[1]
    return k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)


class _GpuCore(Core):
    """What the GPU kernels have in common: half precision, heads of a multiple of 8, and no trust before the check."""

    causal_from_the_end = True  # whether a document with more keys than queries is aligned at its last key

    def absent(self, device: str) -> str | None:
        """None when the kernel is there and agreed with `math` on this GPU."""
        if device != "cuda":
            return "a kernel for GPUs"
        if not torch.cuda.is_available():
            return "there is no GPU here"
        return self._missing() or self.disagrees(torch.bfloat16, 64)

    def disagrees(self, dtype: torch.dtype, head_dim: int) -> str | None:
        """Every type and size of heads is another kernel, and is checked at its first use."""
        return _verdict(self, dtype, head_dim)

    def refuses(self, dtype: torch.dtype, head_dim: int, plan: Plan) -> str | None:
        """Other float types, unusual heads, and plans that the kernel can not be told."""
        if dtype not in _HALF:
            return f"it computes in bfloat16 and float16, not {dtype}"
        if head_dim % 8 or head_dim > 256:
            return f"it takes heads of a multiple of 8 up to 256, not {head_dim}"
        if plan.documents and not self.varlen:
            return "it takes no documents"
        if not plan.square and not self.causal_from_the_end:
            return "it takes as many queries as keys"
        return None

    def _missing(self) -> str | None:
        """Why the kernel is not there, or None."""
        raise NotImplementedError


class Flash2Core(_GpuCore):
    """FlashAttention-2 as torch has it, through the functions that take boundaries and fewer key/value heads."""

    name = "flash2"
    varlen = True

    def _missing(self) -> str | None:
        return None if torch.backends.cuda.is_flash_attention_available() else "this torch was built without FlashAttention"

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, cuts: Cuts | None, scale: float) -> tuple[Tensor, Tensor]:
        run = torch.ops.aten._flash_attention_forward.default
        if cuts is None:
            q, k, v = _rows_first(q, k, v)
            out, lse, *_ = run(q, k, v, None, None, q.shape[1], k.shape[1], 0.0, True, False, scale=scale)
            return out.transpose(0, 1), lse
        out, lse, *_ = run(q[:, 0], k[:, 0], v[:, 0], cuts.queries, cuts.keys, cuts.longest_query, cuts.longest_key, 0.0, True, False, scale=scale)
        return out.unsqueeze(1), lse.unsqueeze(0)

    def _backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cuts: Cuts | None, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        run = torch.ops.aten._flash_attention_backward.default
        # The state of a random generator that is asked for nothing: there is no dropout.
        state, unused = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
        if cuts is None:
            dout, q, k, v, out = _rows_first(dout, q, k, v, out)
            dq, dk, dv = run(dout, q, k, v, out, lse, None, None, q.shape[1], k.shape[1], 0.0, True, state, unused, scale=scale)
            return dq.transpose(0, 1), dk.transpose(0, 1), dv.transpose(0, 1)
        dq, dk, dv = run(
            dout[:, 0], q[:, 0], k[:, 0], v[:, 0], out[:, 0], lse[0], cuts.queries, cuts.keys, cuts.longest_query, cuts.longest_key,
            0.0, True, state, unused, scale=scale,
        )  # fmt: skip
        return dq.unsqueeze(1), dk.unsqueeze(1), dv.unsqueeze(1)


class CudnnCore(_GpuCore):
    """cuDNN through torch: rows of one document, all queries of it."""

    name = "cudnn"
    causal_from_the_end = False

    def _missing(self) -> str | None:
        return None if torch.backends.cudnn.is_available() else "this torch has no cuDNN"

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, cuts: Cuts | None, scale: float) -> tuple[Tensor, Tensor]:
        q, k, v = _heads_first(q, k, v)
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention.default(q, k, v, None, True, 0.0, True, False, scale=scale)
        return out.permute(2, 0, 1, 3), lse.view(q.shape[:3])

    def _backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cuts: Cuts | None, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        dout, q, k, v, out = _heads_first(dout, q, k, v, out)
        state = torch.zeros((), dtype=torch.int64, device=q.device)
        dq, dk, dv = torch.ops.aten._scaled_dot_product_cudnn_attention_backward.default(
            dout, q, k, v, out, lse, state, state, None, None, None, q.shape[2], k.shape[2], 0.0, True, scale=scale
        )
        return dq.permute(2, 0, 1, 3), dk.permute(2, 0, 1, 3), dv.permute(2, 0, 1, 3)


class Flash3Core(_GpuCore):
    """FlashAttention-3, through the torch operators that its package registers."""

    name = "flash3"
    varlen = True

    def _missing(self) -> str | None:
        try:
            import flash_attn_interface  # noqa: F401 (registers the operators)
        except Exception as error:  # a package built for another torch fails in its own ways
            return f"flash_attn_interface does not import: {type(error).__name__}: {error}"
        there = torch.ops.flash_attn_3
        return None if hasattr(there, "fwd") and hasattr(there, "bwd") else "this flash_attn_interface has no torch operators: a newer one does"

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, cuts: Cuts | None, scale: float) -> tuple[Tensor, Tensor]:
        run = torch.ops.flash_attn_3.fwd
        if cuts is None:
            out, lse, *_ = run(*_rows_first(q, k, v), softmax_scale=scale, is_causal=True, num_splits=1)
            return out.transpose(0, 1), lse
        out, lse, *_ = run(q[:, 0], k[:, 0], v[:, 0], softmax_scale=scale, is_causal=True, num_splits=1, **_boundaries(cuts))
        return out.unsqueeze(1), lse.unsqueeze(0)

    def _backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cuts: Cuts | None, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        grads = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        options = {"softmax_scale": scale, "is_causal": True, "deterministic": torch.are_deterministic_algorithms_enabled()}
        if cuts is None:
            torch.ops.flash_attn_3.bwd(*_rows_first(dout, q, k, v, out), lse, *_rows_first(*grads), **options)
        else:
            given = (x[:, 0] for x in (dout, q, k, v, out))
            torch.ops.flash_attn_3.bwd(*given, lse[0], *(x[:, 0] for x in grads), **options, **_boundaries(cuts))
        return grads


class Flash4Core(_GpuCore):
    """FlashAttention-4 (flash_attn.cute). Its functions still change: arguments go by name, those it does not know are left out."""

    name = "flash4"
    varlen = True
    _needed = {"_flash_attn_fwd": {"return_lse", "cu_seqlens_q", "softmax_scale", "causal"}, "_flash_attn_bwd": {"cu_seqlens_q", "softmax_scale", "causal"}}

    def _missing(self) -> str | None:
        try:
            from flash_attn.cute import interface
        except Exception as error:
            return f"flash_attn.cute does not import: {type(error).__name__}: {error}"
        for name, needed in self._needed.items():
            if lacks := needed - set(inspect.signature(getattr(interface, name, lambda: None)).parameters):
                return f"flash_attn.cute's {name} takes no {', '.join(sorted(lacks))}: a newer one does"
        return None

    @staticmethod
    def _call(name: str, *tensors: Tensor, **options: Any) -> Any:
        from flash_attn.cute import interface

        function = getattr(interface, name)
        known = inspect.signature(function).parameters
        return function(*tensors, **{key: value for key, value in options.items() if key in known})

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, cuts: Cuts | None, scale: float) -> tuple[Tensor, Tensor]:
        options = {"softmax_scale": scale, "causal": True, "return_lse": True}
        if cuts is None:
            out, lse, *_ = self._call("_flash_attn_fwd", *_rows_first(q, k, v), **options)
            return out.transpose(0, 1), lse
        out, lse, *_ = self._call("_flash_attn_fwd", q[:, 0], k[:, 0], v[:, 0], **options, **_boundaries(cuts))
        return out.unsqueeze(1), lse.unsqueeze(0)

    def _backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cuts: Cuts | None, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        options = {"softmax_scale": scale, "causal": True, "deterministic": torch.are_deterministic_algorithms_enabled()}
        if cuts is None:
            dq, dk, dv, *_ = self._call("_flash_attn_bwd", *_rows_first(q, k, v, out, dout), lse, **options)
            return dq.transpose(0, 1), dk.transpose(0, 1), dv.transpose(0, 1)
        given = (x[:, 0] for x in (q, k, v, out, dout))
        dq, dk, dv, *_ = self._call("_flash_attn_bwd", *given, lse[0], **options, **_boundaries(cuts))
        return dq.unsqueeze(1), dk.unsqueeze(1), dv.unsqueeze(1)


def _boundaries(cuts: Cuts) -> dict[str, Any]:
    return {"cu_seqlens_q": cuts.queries, "cu_seqlens_k": cuts.keys, "max_seqlen_q": cuts.longest_query, "max_seqlen_k": cuts.longest_key}


CORES: tuple[Core, ...] = (Flash3Core(), Flash4Core(), CudnnCore(), Flash2Core(), CpuCore(), MathCore())
_said: set[tuple[str, str]] = set()


def cores(device: str) -> dict[str, str | None]:
    """For every core, best first: None when it can run on this kind of device (`cpu`, `cuda`), else why not."""
    return {core.name: core.absent(device) for core in CORES}


def choose(device: str, dtype: torch.dtype, head_dim: int, plan: Plan, request: str | None = None) -> Core:
    """The best core for such a call, or the one asked for (`request`, else MEGATRON_R1_ATTENTION; `auto` is the best).

    Raises EnvironmentProblem when a core is asked for by name and is unknown, not here, or can not do this call.
    """
    by_name = request is not None
    request = request or os.environ.get(CORE_VARIABLE) or "auto"
    correct = "correct the argument `core`" if by_name else f"correct {CORE_VARIABLE} or unset it"
    for core in CORES:
        if request not in ("auto", core.name):
            continue
        reason = core.absent(device) or core.refuses(dtype, head_dim, plan) or core.disagrees(dtype, head_dim)
        if reason is None:
            if (device, core.name) not in _said:
                _said.add((device, core.name))
                _log.info("attention core on %s: %s", device, core.name)
            return core
        if request == core.name:
            raise EnvironmentProblem(
                expected=f"attention core {request!r} on {device}, because it was asked for by name", found=reason, fix=correct
            )
    raise EnvironmentProblem(expected=f"an attention core among auto, {', '.join(core.name for core in CORES)}", found=repr(request), fix=correct)


@cache
def _verdict(core: _GpuCore, dtype: torch.dtype, head_dim: int) -> str | None:
    """None when the core agrees with `math` on this GPU, else what was wrong. Once per process."""
    try:
        return self_check(core, "cuda", dtype, head_dim)
    except Exception as error:
        return f"its self-check did not run: {type(error).__name__}: {error}"


def self_check(core: Core, device: str, dtype: torch.dtype, head_dim: int = 64) -> str | None:
    """Small random problems of every kind the core takes, against `math` in fp64: rows, documents, pieces of a sequence, with
    gradients. It may be off by twice what `math` in `dtype` is, and 2 % of the largest number.

    Returns None or one sentence with the first disagreement.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    rows, length, heads, groups = 2, 160, 4, 2
    ids = torch.tensor([7, 1, 96, 56]).repeat_interleave(torch.tensor([7, 1, 96, 56])).expand(rows, -1).clone()
    plans = {
        "rows": plan_of(None, rows, length), "documents": plan_of(ids, rows, length),
        "a piece of a sequence": plan_of(ids, rows, length, 1, 2), "a piece of a row": plan_of(None, rows, length, 1, 2),
    }  # fmt: skip
    judge, scale = MathCore(), head_dim**-0.5
    for kind, plan in plans.items():
        if core.refuses(dtype, head_dim, plan):
            continue
        q, dout = random(plan.queries, rows, heads, head_dim), random(plan.queries, rows, heads, head_dim)
        k, v = random(length, rows, 2, groups, head_dim).unbind(2)  # strided, as views of packed tensors are
        exact = _both(judge, dout.double(), q.double(), k.double(), v.double(), plan, scale)
        found, plain = (_both(one, dout, q, k, v, plan, scale) for one in (core, judge))
        for name, right, here, there in zip(("out", "lse", "dq", "dk", "dv"), exact, found, plain, strict=True):
            if here.shape != right.shape:
                return f"{kind}: {name} has shape {list(here.shape)}, not {list(right.shape)}"
            error, allowed = float((here - right).abs().max()), 2 * float((there - right).abs().max()) + 0.02 * float(right.abs().max())
            if not error <= allowed:
                return f"{kind}: {name} is off by {error:.3g}, more than {allowed:.3g}"
    return None


def _both(core: Core, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float) -> list[Tensor]:
    out, lse = core.forward(q, k, v, plan, scale)
    return [x.double() for x in (out, lse, *core.backward(dout, q, k, v, out, lse, plan, scale))]


