"""QK-norm and RoPE in one pass over packed qkv: per head normalise, times gain, rotate; queries and keys come out unpacked.

    y = R(position) (w * n),   n = x / sqrt(mean(x^2) + eps)   (`rms`; `l2` has the sum in place of the mean)

Everything is computed in fp32 (fp64 for fp64) and rounded once, at the end. Nothing but qkv is kept for the backward, which
recomputes what it needs. With u = R^T dy and d = w * u:  dw = sum n * u,  dx = (d - n * mean(n * d)) / sqrt(mean(x^2) + eps)
(`l2`: the sum in place of the outer mean).

`parity=True` rounds where Hugging Face's model code rounds, for bit-equal comparison with it in the forward: interleaved pairs
as Llama4TextAttention (rotate, round, normalise, round), half split as Qwen3Attention (normalise, round, times gain, round,
rotate with rounded cosine and sine, every product and sum rounded). Its backward is the one above, with the same cosines and
sines as the forward, and one rounding: the derivative of the function, not of its roundings.

Legend: s tokens, b rows, nq query heads, nkv key/value heads, h head size, rot = 2 * cos.shape[1] rotated elements of a head.
Implementations: `csrc` (C++ and CUDA), `analytic` (plain torch with the backward written out), `reference`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_r1.ops import extension, reference
from megatron_r1.ops.dispatch import Op
from megatron_r1.ops.selfcheck import absent_until_checked
from megatron_r1.utils.errors import DataError

NORMS = ("none", "rms", "l2")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Plan(NamedTuple):
    """Everything about a call that is not a tensor."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm: str
    eps: float
    interleaved: bool
    grouped: bool
    parity: bool


def _packed(qkv: Tensor, plan: Plan) -> tuple[Tensor, int, int]:
    """View [s, b, G, R, h] of qkv with all that is normalised first in R, how many of R that is, and how many of those are keys.

    Grouped: one G per key/value head. Flat: G = 1.
    """
    groups = plan.num_kv_heads if plan.grouped else 1
    keys = plan.num_kv_heads // groups
    return qkv.unflatten(-1, (groups, -1, plan.head_dim)), plan.num_heads // groups + keys, keys


def values(qkv: Tensor, plan: Plan) -> Tensor:
    """The values inside packed qkv, a view [s, b, nkv, h]."""
    packed, turned, _ = _packed(qkv, plan)
    return packed[..., turned:, :].flatten(2, 3)


class _Analytic:
    """Plain torch: queries and keys together, in place in one fp32 copy."""

    @staticmethod
    def _gain(q_weight: Tensor | None, k_weight: Tensor | None, heads: int, keys: int, like: Tensor) -> Tensor | None:
        """[R, h]: the gain of every head."""
        if q_weight is None and k_weight is None:
            return None
        one = torch.ones(like.shape[-1], dtype=like.dtype, device=like.device)
        q, k = (one if w is None else w.to(like.dtype) for w in (q_weight, k_weight))
        return torch.cat([q.expand(heads - keys, -1), k.expand(keys, -1)])

    @staticmethod
    def _scale(x: Tensor, plan: Plan) -> Tensor | None:
        """1 / the norm, [..., 1]."""
        if plan.norm == "none":
            return None
        squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        return (squares.div_(plan.head_dim) if plan.norm == "rms" else squares).add_(plan.eps).rsqrt_()

    @staticmethod
    def _turn_(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> None:
        """Rotate x [s, b, G, R, h] in place; cos, sin [s, 1 or b, 1, 1, rot/2]."""
        half = cos.shape[-1]
        if not half or not x.numel():
            return
        if interleaved:
            torch.view_as_complex(x[..., : 2 * half].unflatten(-1, (-1, 2))).mul_(torch.complex(cos, sin))
            return
        a, b = x[..., :half], x[..., half : 2 * half]
        turned = a * cos - b * sin
        b.mul_(cos).addcmul_(a, sin)
        a.copy_(turned)

    @staticmethod
    def _at(cos: Tensor, sin: Tensor, positions: Tensor, like: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
        """cos and sin per token [s, 1 or b, 1, 1, rot/2]."""
        at = positions if positions.dim() == 2 else positions[:, None]
        cos, sin = cos[at][:, :, None, None], sin[at][:, :, None, None]
        if plan.parity and not plan.interleaved:
            cos, sin = cos.to(like.dtype).to(cos.dtype), sin.to(like.dtype).to(sin.dtype)
        return cos, sin

    @classmethod
    def forward(
        cls, qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor, sin: Tensor, positions: Tensor, plan: Plan
    ) -> tuple[Tensor, Tensor]:
        if plan.parity:  # roundings between the steps leave nothing to gain here
            with torch.no_grad():
                q, k, _ = reference.qk_norm_rope(qkv, q_weight, k_weight, cos, sin, positions, **plan._asdict())
            return q.contiguous(), k.contiguous()
        packed, heads, keys = _packed(qkv, plan)
        x = packed[..., :heads, :].to(cos.dtype, copy=True, memory_format=torch.contiguous_format)
        scale, gain = cls._scale(x, plan), cls._gain(q_weight, k_weight, heads, keys, x)
        x = x if scale is None else x.mul_(scale)
        x = x if gain is None else x.mul_(gain)
        cls._turn_(x, *cls._at(cos, sin, positions, qkv, plan), plan.interleaved)
        x = x.to(qkv.dtype)
        # Copied, then flattened: where flattening makes the copy, torch 2.11 loses the queries' gradient of a compiled graph.
        q, k = (part.clone(memory_format=torch.contiguous_format).flatten(2, 3) for part in (x[..., : heads - keys, :], x[..., heads - keys :, :]))
        return q, k

    @classmethod
    def backward(
        cls, dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor,
        q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor, sin: Tensor, positions: Tensor, plan: Plan,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        packed, heads, keys = _packed(qkv, plan)
        groups = packed.shape[2]
        out = torch.empty(packed.shape, dtype=qkv.dtype, device=qkv.device)
        u = torch.empty(*packed.shape[:3], heads, plan.head_dim, dtype=cos.dtype, device=qkv.device)
        u[..., : heads - keys, :] = dq.unflatten(2, (groups, -1))
        u[..., heads - keys :, :] = dk.unflatten(2, (groups, -1))
        cos, sin = cls._at(cos, sin, positions, qkv, plan)
        cls._turn_(u, cos, -sin, plan.interleaved)
        x = packed[..., :heads, :].to(cos.dtype)
        scale, gain = cls._scale(x, plan), cls._gain(q_weight, k_weight, heads, keys, x)
        n = x if scale is None else x * scale
        none = torch.empty(0, dtype=cos.dtype, device=qkv.device)
        dqw, dkw = none, none
        if gain is not None:
            sums = (n * u).sum((0, 1, 2))
            dqw = none if q_weight is None else sums[: heads - keys].sum(0)
            dkw = none if k_weight is None else sums[heads - keys :].sum(0)
            u.mul_(gain)
        if scale is not None:
            shared = torch.linalg.vecdot(n, u).unsqueeze(-1)
            u.addcmul_(n, shared.div_(plan.head_dim) if plan.norm == "rms" else shared, value=-1).mul_(scale)
        out[..., :heads, :] = u
        out[..., heads:, :] = dv.unflatten(2, (groups, -1))
        return out.view(qkv.shape), dqw, dkw


class _Reference:
    """The definition, with automatic derivatives."""

    @staticmethod
    def forward(
        qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor, sin: Tensor, positions: Tensor, plan: Plan
    ) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            q, k, _ = reference.qk_norm_rope(qkv, q_weight, k_weight, cos, sin, positions, **plan._asdict())
        return q.contiguous(), k.contiguous()

    @staticmethod
    def backward(
        dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor,
        q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor, sin: Tensor, positions: Tensor, plan: Plan,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        with torch.enable_grad():
            leaves = [None if t is None else t.detach().requires_grad_() for t in (qkv, q_weight, k_weight)]
            out = reference.qk_norm_rope(*leaves, cos, sin, positions, **plan._asdict())
        grads = iter(torch.autograd.grad(out, [leaf for leaf in leaves if leaf is not None], (dq, dk, dv)))
        none = torch.empty(0, dtype=cos.dtype, device=qkv.device)
        dqkv, dqw, dkw = (none if leaf is None else next(grads) for leaf in leaves)
        return dqkv.contiguous(), dqw.to(cos.dtype), dkw.to(cos.dtype)


class _Csrc:
    """The compiled library: C++ on a CPU, CUDA on a GPU."""

    @staticmethod
    def forward(
        qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor, sin: Tensor, positions: Tensor, plan: Plan
    ) -> tuple[Tensor, Tensor]:
        return torch.ops.megatron_r1.qk_norm_rope_fwd(qkv, q_weight, k_weight, cos, sin, positions, *_numbers(plan))

    @staticmethod
    def backward(
        dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor,
        q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor, sin: Tensor, positions: Tensor, plan: Plan,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        dq, dk, dv = (_side_by_side(t) for t in (dq, dk, dv))
        return torch.ops.megatron_r1.qk_norm_rope_bwd(dq, dk, dv, qkv, q_weight, k_weight, cos, sin, positions, *_numbers(plan))


def _numbers(plan: Plan) -> tuple[Any, ...]:
    """`plan` in the order of the operators' schemas."""
    return (*plan[:3], NORMS.index(plan.norm), *plan[4:])


def _side_by_side(t: Tensor) -> Tensor:
    """Autograd hands out expanded gradients (of a sum): the kernels want neighbouring elements side by side."""
    return t if t.stride(-1) == 1 else t.contiguous()


@lru_cache(maxsize=1)
def _describe() -> None:
    """Tell torch the shapes of the two operators' results, and the derivative of the first.

    Once, when the library is loaded. The derivative serves torch.compile and those who call the operator themselves.
    """

    def empty(qkv: Tensor, heads: int, h: int) -> Tensor:
        return qkv.new_empty((*qkv.shape[:2], heads, h))

    def forward_shapes(
        qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor, sin: Tensor, positions: Tensor, nq: int, nkv: int, h: int, *rest: Any
    ) -> tuple[Tensor, Tensor]:
        return empty(qkv, nq, h), empty(qkv, nkv, h)

    def backward_shapes(
        dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor,
        q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor, sin: Tensor, positions: Tensor, nq: int, nkv: int, h: int, *rest: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        return qkv.new_empty(qkv.shape), *(cos.new_empty(0 if weight is None else h) for weight in (q_weight, k_weight))

    def save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[:6])
        ctx.numbers = inputs[6:]

    def derivative(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        dv = torch.zeros_like(dk)
        dqkv, *dw = torch.ops.megatron_r1.qk_norm_rope_bwd(_side_by_side(dq), _side_by_side(dk), dv, *saved, *ctx.numbers)
        return dqkv, _like(dw[0], saved[1]), _like(dw[1], saved[2]), *([None] * 11)

    torch.library.register_fake("megatron_r1::qk_norm_rope_fwd", forward_shapes)
    torch.library.register_fake("megatron_r1::qk_norm_rope_bwd", backward_shapes)
    torch.library.register_autograd("megatron_r1::qk_norm_rope_fwd", derivative, setup_context=save)


class _QKNormRope(torch.autograd.Function):
    """An implementation's forward and backward as one differentiable step; saves qkv only."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor, sin: Tensor, positions: Tensor, plan: Plan, run: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k = run.forward(qkv, q_weight, k_weight, cos, sin, positions, plan)
        ctx.save_for_backward(qkv, q_weight, k_weight, cos, sin, positions)
        ctx.plan, ctx.run = plan, run
        return q, k, values(qkv, plan)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        dqkv, dqw, dkw = ctx.run.backward(dq, dk, dv, *saved, ctx.plan)
        _, q_weight, k_weight, *_ = saved
        return dqkv, _like(dqw, q_weight), _like(dkw, k_weight), None, None, None, None, None


def _like(gradient: Tensor, weight: Tensor | None) -> Tensor | None:
    return None if weight is None else gradient.to(weight.dtype)


def _disagreement(device: str) -> str | None:
    """Forward and backward of the kernels on `device` against the definition in fp64: None, or what was wrong."""
    generator = torch.Generator().manual_seed(0)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        for interleaved, grouped, head_dim, norm, gain in ((True, True, 64, "rms", False), (False, False, 128, "rms", True), (True, False, 64, "l2", True)):
            plan = Plan(6, 2, head_dim, norm, 1e-5, interleaved, grouped, False)
            angles = torch.randn(40, head_dim // 2, generator=generator)
            positions = torch.randint(0, 40, (37, 3), generator=generator)
            random = [
                torch.randn(shape, generator=generator).to(dtype)
                for shape in ((37, 3, 6, head_dim), (37, 3, 2, head_dim), (37, 3, 2, head_dim), (37, 3, 10 * head_dim))
            ]
            gains = [torch.rand(head_dim, generator=generator) + 0.5 if gain else None for _ in range(2)]
            there = [None if t is None else t.to(device) for t in (*random, *gains, angles.cos(), angles.sin(), positions)]
            exact = [t if t is None or t is positions else t.double() for t in (*random, *gains, angles.cos(), angles.sin(), positions)]
            ours = (*_Csrc.forward(*there[3:], plan), *_Csrc.backward(*there, plan))
            right = (*_Reference.forward(*exact[3:], plan), *_Reference.backward(*exact, plan))
            for name, x, y in zip(("q", "k", "dqkv", "dq_weight", "dk_weight"), ours, right):
                error = 0.0 if not y.numel() else float((x.cpu().double() - y).abs().max() / y.abs().max())
                if not error <= tolerance:
                    return f"its self-check failed: {name} of {dtype}, head size {head_dim}, is off by {error:.1e} (at most {tolerance:.0e})"
    return None


_checked_absent = absent_until_checked(lambda: _disagreement("cuda"))


def _absent(device: str) -> str | None:
    if (reason := extension.missing()) is not None:
        return reason
    if not hasattr(torch.ops.megatron_r1, "qk_norm_rope_fwd"):
        return f"{extension.path().name} was built without qk_norm_rope; run `python tools/build_csrc.py`"
    _describe()
    return _checked_absent(device)


# What is registered gives a pair of functions, forward and backward: attention's own backward calls them one by one.
QK_NORM_ROPE = Op("qk_norm_rope")
QK_NORM_ROPE.register("csrc", lambda qkv: _Csrc, _absent)
QK_NORM_ROPE.register("analytic", lambda qkv: _Analytic)
QK_NORM_ROPE.register("reference", lambda qkv: _Reference)


def _expect(condition: bool, expected: str, found: Callable[[], str], fix: str) -> None:
    if not condition:
        raise DataError(expected=expected, found=found(), fix=fix)


def _checked(qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor, sin: Tensor, positions: Tensor, plan: Plan) -> None:
    """Raises DataError naming the argument that is wrong."""
    h, heads = plan.head_dim, plan.num_heads + 2 * plan.num_kv_heads
    _expect(qkv.dim() == 3, "qkv: [s, b, packed heads]", lambda: f"shape {list(qkv.shape)}", "view tokens without rows as qkv[:, None]")
    _expect(qkv.dtype in _DTYPES, "qkv: float32, bfloat16, float16 or float64", lambda: str(qkv.dtype), "convert it first")
    _expect(0 < h <= 1024 and h % 2 == 0, "head_dim: an even number from 2 to 1024", lambda: str(h), "pass the size of one head")
    _expect(
        plan.num_kv_heads > 0 and plan.num_heads > 0 and plan.num_heads % plan.num_kv_heads == 0,
        "num_heads: a multiple of num_kv_heads, both positive", lambda: f"{plan.num_heads} and {plan.num_kv_heads}", "correct them",
    )  # fmt: skip
    _expect(
        qkv.shape[-1] == heads * h, f"qkv: a last dimension of (num_heads + 2 num_kv_heads) * head_dim = {heads * h}",
        lambda: f"shape {list(qkv.shape)}", "correct the sizes",
    )  # fmt: skip
    _expect(qkv.stride(-1) == 1 or not qkv.numel(), "qkv: elements of the last dimension side by side", lambda: f"stride {qkv.stride(-1)}", "call .contiguous() first")
    _expect(qkv.numel() < 2**31, "qkv: at most 2^31 - 1 elements", lambda: f"{qkv.numel()} elements", "process fewer tokens at a time")
    _expect(plan.norm in NORMS, f"norm: one of {', '.join(NORMS)}", lambda: repr(plan.norm), "correct it")
    _expect(math.isfinite(plan.eps) and plan.eps >= 0, "eps: a finite number, not negative", lambda: str(plan.eps), "correct it")
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None:
            _expect(plan.norm != "none", f"{name}: None, because there is no norm", lambda: "a tensor", 'pass norm="rms" or no gain')
            _expect(
                not (plan.parity and plan.interleaved), f"{name}: None, because Llama 4's norm has no gain (parity, interleaved)",
                lambda: "a tensor", "pass parity=False or no gain",
            )  # fmt: skip
            _expect(weight.shape == (h,), f"{name}: shape [{h}]", lambda weight=weight: f"shape {list(weight.shape)}", "pass one gain per element of a head")
            _expect(
                weight.dtype == qkv.dtype or (weight.dtype == torch.float32 and qkv.dtype != torch.float64),
                f"{name}: {qkv.dtype} like qkv, or float32", lambda weight=weight: str(weight.dtype), "convert it",
            )  # fmt: skip
            _expect(weight.device == qkv.device, f"{name}: on {qkv.device} like qkv", lambda weight=weight: str(weight.device), "move it")
            _expect(weight.is_contiguous(), f"{name}: contiguous", lambda weight=weight: f"stride {weight.stride()}", "call .contiguous() first")
    _expect(not (plan.parity and plan.norm == "l2"), 'norm: "rms" or "none" with parity', lambda: "l2", "no model of Hugging Face has it: pass parity=False")
    table = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    for name, t in (("cos", cos), ("sin", sin)):
        _expect(
            t.dim() == 2 and 2 * t.shape[1] <= h, f"{name}: [positions, rotated elements / 2] with at most {h // 2} columns",
            lambda t=t: f"shape {list(t.shape)}", "see ops.rope.cos_sin",
        )  # fmt: skip
        _expect(t.dtype == table, f"{name}: {table} for qkv of {qkv.dtype}", lambda t=t: str(t.dtype), "convert it")
        _expect(t.device == qkv.device, f"{name}: on {qkv.device} like qkv", lambda t=t: str(t.device), "move it")
        _expect(t.is_contiguous(), f"{name}: contiguous", lambda t=t: f"stride {t.stride()}", "call .contiguous() first")
        _expect(not t.requires_grad, f"{name}: a constant", lambda: "requires_grad=True", "detach it: there is no gradient for it")
    _expect(sin.shape == cos.shape, f"sin: shape {list(cos.shape)} like cos", lambda: f"shape {list(sin.shape)}", "see ops.rope.cos_sin")
    _expect(positions.dtype == torch.int64, "positions: int64", lambda: str(positions.dtype), "convert it")
    _expect(
        positions.shape == qkv.shape[:1] or positions.shape == qkv.shape[:2],
        f"positions: [{qkv.shape[0]}] or [{qkv.shape[0]}, {qkv.shape[1]}]", lambda: f"shape {list(positions.shape)}", "one position per token",
    )  # fmt: skip
    _expect(positions.device == qkv.device, f"positions: on {qkv.device} like qkv", lambda: str(positions.device), "move it")
    if positions.device.type == "cpu" and positions.numel() and not torch.compiler.is_compiling():
        low, high = (int(x) for x in positions.aminmax())
        _expect(
            low >= 0 and high < cos.shape[0], f"positions: each from 0 to {cos.shape[0] - 1}, the rows of cos",
            lambda: f"{low} to {high}", "make a longer table (ops.rope.cos_sin) or correct them",
        )  # fmt: skip


def _prepared(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    plan: Plan,
    implementation: str | None,
) -> Any:
    _checked(qkv, q_weight, k_weight, cos, sin, positions, plan)
    return QK_NORM_ROPE(qkv, implementation=implementation)


def qk_norm_rope(
    qkv: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    norm: str = "rms",
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-5,
    interleaved: bool = True,
    grouped: bool = True,
    parity: bool = False,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised and rotated queries and keys, and the values: q [s, b, nq, h], k [s, b, nkv, h], v a view of qkv [s, b, nkv, h].

    qkv [s, b, (nq + 2 nkv) * h] with neighbouring elements side by side, other strides free. `grouped`: per key/value head its
    nq/nkv query heads, its key, its value (megatron-core's layout); else all queries, all keys, all values.
    cos, sin [P, rot/2], fp32 (fp64 for fp64), from `ops.rope.cos_sin`; rot <= h elements of a head are rotated, the rest is only
    normalised. positions int64 [s] or [s, b], each in [0, P): checked on a CPU (not inside torch.compile, where the kernel
    checks); on a GPU a check would wait for the device, so there a token whose position is outside gets NaN.
    `interleaved`: pairs (2i, 2i+1), else (i, i + rot/2). norm: `rms`, `l2` or `none`. q_weight, k_weight [h]: gains, fp32 or
    qkv's dtype. parity: see the module's text.

    Differentiable (once) with respect to qkv and the gains; the gains' gradients are summed in a fixed order.
    Raises DataError naming the argument. `implementation`: see `ops.dispatch.Op.choose`.
    """
    plan = Plan(num_heads, num_kv_heads, head_dim, norm, float(eps), interleaved, grouped, parity)
    run = _prepared(qkv, q_weight, k_weight, cos, sin, positions, plan, implementation)
    if run is _Reference:  # automatic derivatives, without a detour
        return reference.qk_norm_rope(qkv, q_weight, k_weight, cos, sin, positions, **plan._asdict())
    return _QKNormRope.apply(qkv, q_weight, k_weight, cos, sin, positions, plan, run)


def qk_norm_rope_forward(
    qkv: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    norm: str = "rms",
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-5,
    interleaved: bool = True,
    grouped: bool = True,
    parity: bool = False,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`qk_norm_rope` without derivatives, for an op that has its own backward: records nothing."""
    plan = Plan(num_heads, num_kv_heads, head_dim, norm, float(eps), interleaved, grouped, parity)
    run = _prepared(qkv, q_weight, k_weight, cos, sin, positions, plan, implementation)
    with torch.no_grad():
        q, k = run.forward(qkv, q_weight, k_weight, cos, sin, positions, plan)
        return q, k, values(qkv.detach(), plan)  # a view made here would still ask for a gradient


def qk_norm_rope_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    qkv: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    norm: str = "rms",
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-5,
    interleaved: bool = True,
    grouped: bool = True,
    parity: bool = False,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Derivatives of `qk_norm_rope_forward`: (dqkv contiguous, dq_weight, dk_weight), the last two in their weight's dtype or None.

    dq [s, b, nq, h], dk, dv [s, b, nkv, h], any strides, qkv's dtype; the other arguments as in the forward.
    """
    plan = Plan(num_heads, num_kv_heads, head_dim, norm, float(eps), interleaved, grouped, parity)
    run = _prepared(qkv, q_weight, k_weight, cos, sin, positions, plan, implementation)
    for name, t, heads in (("dq", dq, num_heads), ("dk", dk, num_kv_heads), ("dv", dv, num_kv_heads)):
        shape = (*qkv.shape[:2], heads, head_dim)
        _expect(t.shape == shape, f"{name}: shape {list(shape)}", lambda t=t: f"shape {list(t.shape)}", "pass the gradient of what the forward gave")
        _expect(t.dtype == qkv.dtype, f"{name}: {qkv.dtype} like qkv", lambda t=t: str(t.dtype), "convert it")
        _expect(t.device == qkv.device, f"{name}: on {qkv.device} like qkv", lambda t=t: str(t.device), "move it")
    with torch.no_grad():
        dqkv, dqw, dkw = run.backward(dq, dk, dv, qkv, q_weight, k_weight, cos, sin, positions, plan)
    return dqkv, _like(dqw, q_weight), _like(dkw, k_weight)
