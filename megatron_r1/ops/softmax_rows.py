"""Statistics of logit rows and derivatives made from them: the two passes over a chunk of logits every row loss consists of.

`row_stats` reads the logits once and returns six numbers per row; `softmax_grad_` turns the logits into the derivative of a loss
in place, in their own type, the row's share of the loss included. What lies between them (logarithms, the label's logit, the
reduction over the pieces of a vocabulary) is done on a few numbers per row by `ops.row_losses`. Implementations: `csrc` (C++ or
CUDA, csrc/row_loss), `plain` (torch, as few passes as it takes), `reference` (torch's own softmax and logsumexp, obvious).

Legend: c rows, V vocabulary, p pieces it is cut into, T temperature; W fp32, or fp64 for fp64 logits.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from megatron_r1.ops import extension
from megatron_r1.ops.dispatch import Op
from megatron_r1.ops.selfcheck import absent_until_checked

# Columns of what `row_stats` returns (csrc/row_loss/args.h says the same).
TOP, SUM, HARD_SUM, TEACHER_TOP, TEACHER_SUM, CROSS = range(6)
# Columns of what `softmax_grad_` is given are those of `numbers` below, in its order.
WIDTH = 6


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums over logits of `dtype` are made and returned in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def row_stats(z: Tensor, teacher: Tensor | None = None, inv_temperature: float = 1.0, hard: bool = False) -> Tensor:
    """Six numbers of every row, W [c, 6]; z [c, V/p] of any float type, `teacher` (optional) of z's shape, any float type.

    TOP m = max z; SUM sum exp((z - m) / T); HARD_SUM sum exp(z - m) if `hard`; TEACHER_TOP u = max t; TEACHER_SUM
    sum exp((t - u) / T); CROSS sum exp((t - u) / T) * (t - z) / T, where a token the teacher gives no probability counts 0.
    What was not asked for is 0. A row of nothing but -inf has sums of 0; NaN comes out in the sums.
    """
    return ROW_STATS(z, teacher, inv_temperature, hard)


def numbers(
    top: Tensor,
    scale: Tensor,
    hard_scale: Tensor | None = None,
    teacher_top: Tensor | None = None,
    teacher_scale: Tensor | None = None,
    pick: Tensor | None = None,
) -> Tensor:
    """The second argument of `softmax_grad_`, W [c, 6], from columns [c]; what is left out is 0."""
    out = top.new_zeros(top.shape[0], WIDTH)
    for column, values in enumerate((top, scale, hard_scale, teacher_top, teacher_scale, pick)):
        if values is not None:
            out[:, column] = values
    return out


def softmax_grad_(
    z: Tensor,
    given: Tensor,
    teacher: Tensor | None = None,
    labels: Tensor | None = None,
    inv_temperature: float = 1.0,
    hard: bool = False,
) -> None:
    """z [c, V/p] becomes, with the columns of `given` (`numbers`),

        scale * exp((z - top) / T) + hard_scale * exp(z - top) - teacher_scale * exp((t - teacher_top) / T)

    minus `pick` in the column `labels` int64 [c] names (any number outside [0, V/p): in none), rounded once to z's type. The
    second term only with `hard`, the third only with `teacher`. top and teacher_top: not below the row's largest entries.
    """
    SOFTMAX_GRAD(z, given, teacher, labels, inv_temperature, hard)


# --- plain torch -----------------------------------------------------------------------------------------------------------


def _shift(top: Tensor) -> Tensor:
    """Any finite number where a row has no maximum, so that exp(-inf - shift) is 0 and not NaN."""
    return top.masked_fill(top == -torch.inf, 0.0)


def _exponentials(x: Tensor, shift: Tensor, inv_temperature: float) -> Tensor:
    y = x - shift
    return (y if inv_temperature == 1.0 else y.mul_(inv_temperature)).exp_()


def _plain_stats(z: Tensor, teacher: Tensor | None, inv_temperature: float, hard: bool) -> Tensor:
    z = z.to(wide_dtype(z.dtype))
    out = z.new_zeros(z.shape[0], WIDTH)
    if z.shape[0] == 0:
        return out
    top = z.amax(-1, keepdim=True)
    shift = _shift(top)
    out[:, TOP] = top.squeeze(-1)
    out[:, SUM] = _exponentials(z, shift, inv_temperature).sum(-1)
    if hard:
        out[:, HARD_SUM] = _exponentials(z, shift, 1.0).sum(-1)
    if teacher is not None:
        t = teacher.to(z.dtype)
        top = t.amax(-1, keepdim=True)
        p = _exponentials(t, _shift(top), inv_temperature)
        out[:, TEACHER_TOP] = top.squeeze(-1)
        out[:, TEACHER_SUM] = p.sum(-1)
        gap = (t - z).mul_(inv_temperature).masked_fill_(p == 0, 0.0)  # not 0 * inf where a token is impossible
        out[:, CROSS] = torch.linalg.vecdot(p, gap)
    return out


def _plain_grad(z: Tensor, given: Tensor, teacher: Tensor | None, labels: Tensor | None, inv_temperature: float, hard: bool) -> None:
    top, scale, hard_scale, teacher_top, teacher_scale, pick = given.unsqueeze(-1).unbind(1)
    wide = z.to(given.dtype)  # z itself when it is wide already
    shift = _shift(top)
    other = _exponentials(wide, shift, 1.0).mul_(hard_scale) if hard else None
    wide.sub_(shift)
    if inv_temperature != 1.0:
        wide.mul_(inv_temperature)
    wide.exp_().mul_(scale)
    if other is not None:
        wide.add_(other)
    if teacher is not None:
        wide.sub_(_exponentials(teacher.to(given.dtype), _shift(teacher_top), inv_temperature).mul_(teacher_scale))
    if labels is not None:
        column = labels.unsqueeze(-1)
        here = (column >= 0) & (column < z.shape[-1])
        wide.scatter_add_(-1, column.where(here, 0), -pick.where(here, 0.0))
    if wide is not z:
        z.copy_(wide)


# --- the definition --------------------------------------------------------------------------------------------------------


def _reference_stats(z: Tensor, teacher: Tensor | None, inv_temperature: float, hard: bool) -> Tensor:
    z = z.to(wide_dtype(z.dtype))
    zero = z.new_zeros(z.shape[0])
    if z.shape[0] == 0:
        return z.new_zeros(0, WIDTH)
    top = z.amax(-1)
    columns = [top, torch.exp(torch.logsumexp(z * inv_temperature, -1) - _shift(top) * inv_temperature)]
    columns.append(torch.exp(torch.logsumexp(z, -1) - _shift(top)) if hard else zero)
    if teacher is None:
        return torch.stack([*columns, zero, zero, zero], -1)
    t = teacher.to(z.dtype)
    top = t.amax(-1)
    total = torch.exp(torch.logsumexp(t * inv_temperature, -1) - _shift(top) * inv_temperature)
    p = torch.softmax(t * inv_temperature, -1)
    mean = torch.where(p == 0, 0.0, p * (t - z) * inv_temperature).sum(-1)
    return torch.stack([*columns, top, total, mean * total], -1)


def _reference_grad(z: Tensor, given: Tensor, teacher: Tensor | None, labels: Tensor | None, inv_temperature: float, hard: bool) -> None:
    top, scale, hard_scale, teacher_top, teacher_scale, pick = given.unsqueeze(-1).unbind(1)
    x = z.to(given.dtype) - _shift(top)
    result = scale * torch.exp(x * inv_temperature)
    if hard:
        result = result + hard_scale * torch.exp(x)
    if teacher is not None:
        result = result - teacher_scale * torch.exp((teacher.to(given.dtype) - _shift(teacher_top)) * inv_temperature)
    if labels is not None:
        result = result - pick * (torch.arange(z.shape[-1], device=z.device) == labels.unsqueeze(-1))
    z.copy_(result)


# --- compiled --------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _describe() -> None:
    """Tell torch.compile what the two ops return. Only once the library is loaded: the ops do not exist before."""

    @torch.library.register_fake("megatron_r1::row_stats")
    def _(z: Tensor, teacher: Tensor | None, inv_temperature: float, hard: bool) -> Tensor:
        return z.new_empty(z.shape[0], WIDTH, dtype=wide_dtype(z.dtype))

    @torch.library.register_fake("megatron_r1::softmax_grad_")
    def _(z: Tensor, numbers: Tensor, teacher: Tensor | None, labels: Tensor | None, inv_temperature: float, hard: bool) -> None:
        return None


def _compiled_stats(z: Tensor, teacher: Tensor | None, inv_temperature: float, hard: bool) -> Tensor:
    return torch.ops.megatron_r1.row_stats(z, teacher, inv_temperature, hard)


def _compiled_grad(z: Tensor, given: Tensor, teacher: Tensor | None, labels: Tensor | None, inv_temperature: float, hard: bool) -> None:
    torch.ops.megatron_r1.softmax_grad_(z, given, teacher, labels, inv_temperature, hard)


def _check_on_gpu() -> str | None:
    """Both CUDA kernels against the definition in fp64: types, widths that 16-byte loads do not divide, T != 1, a label."""
    generator = torch.Generator().manual_seed(0)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        for columns in (50, 8200, 70001):
            z, t = (3 * torch.randn(5, columns, generator=generator)).to(dtype), (3 * torch.randn(5, columns, generator=generator)).to(dtype)
            labels = torch.tensor([0, columns - 1, -1, columns, 7])
            wanted = _reference_stats(z.double(), t.double(), 0.5, True)
            found = _compiled_stats(z.cuda(), t.cuda(), 0.5, True).cpu().double()
            if not torch.allclose(found, wanted, rtol=1e-5, atol=1e-4):
                return f"row_stats of {columns} {dtype} columns differs from fp64 by up to {(found - wanted).abs().max():.2g}"
            one = torch.ones(5, dtype=torch.float64)
            given = numbers(wanted[:, TOP], one / wanted[:, SUM], one / wanted[:, HARD_SUM], wanted[:, TEACHER_TOP], one / wanted[:, TEACHER_SUM], one / 2)
            exact, made = z.double(), z.cuda()
            _reference_grad(exact, given, t.double(), labels, 0.5, True)
            _compiled_grad(made, given.float().cuda(), t.cuda(), labels.cuda(), 0.5, True)
            if not torch.allclose(made.cpu().double(), exact, rtol=tolerance, atol=1e-6):
                return f"softmax_grad_ of {columns} {dtype} columns differs from fp64 by up to {(made.cpu().double() - exact).abs().max():.2g}"
    return None


_checked = absent_until_checked(_check_on_gpu)


def _absent(device: str) -> str | None:
    if (reason := extension.missing()) is not None:
        return reason
    if not hasattr(torch.ops.megatron_r1, "row_stats"):
        return f"{extension.path().name} was built without row_loss; run `python tools/build_csrc.py`"
    _describe()
    return _checked(device)


ROW_STATS = Op("row_stats")
ROW_STATS.register("csrc", _compiled_stats, _absent)
ROW_STATS.register("plain", _plain_stats)
ROW_STATS.register("reference", _reference_stats)
SOFTMAX_GRAD = Op("softmax_grad")
SOFTMAX_GRAD.register("csrc", _compiled_grad, _absent)
SOFTMAX_GRAD.register("plain", _plain_grad)
SOFTMAX_GRAD.register("reference", _reference_grad)
