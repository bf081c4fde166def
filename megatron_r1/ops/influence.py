"""Per-document gradient scores of one linear layer, and its weight gradient, in one pass over the layer's inputs and output gradients.

    gradient of document d   W_d = sum over its tokens t of b_t a_t^T           [dout, din]
    score of d, probe k      s[d, k] = <g_k, W_d> = sum over o, i of g[k, o, i] W_d[o, i]
    weight gradient          main_grad += sum over d of W_d = b^T a

The scores are exact for the loss of each document as long as no gradient crosses a document's border (attention that stays inside).
g may be anything linear in a probe's gradient: preconditioned, for one, by Adam's second moments.

Legend: T tokens, n documents, K probes, din/dout width of the layer's input/output, ra/rb projected widths.
    a [T, din]        layer inputs
    b [T, dout]       gradients of the loss at the layer's output; a's dtype
    g [K, dout, din]  probe gradients; a's dtype or fp32
    cu_seqlens [n+1]  int32 or int64: first token of each document, then T; documents may be empty (score 0)
    main_grad         [dout, din] fp32 (fp64 for fp64), changed in place
Rows of a, b, g and main_grad have neighbouring elements side by side; how far rows are apart is free (a tensor-parallel slice of
columns is not copied). cu_seqlens is read on the host: on a CPU, where it costs nothing; from a GPU it is copied once, and kept with
the tensor until that is changed.

Nothing here is differentiable: a, b, g count as constants. What is summed is summed in fp32 or wider. bf16 on a CPU with bf16
instructions: a document's gradient is rounded to bf16 once (as `b.T @ a` is) before it is scored and added; everywhere else it is not.
On a CPU the result has the same bits on any number of threads. A NaN in one document stays in its own scores (and in main_grad).

Implementations: `fused` (one kernel, wgmma, GPUs of compute capability 9.0), `csrc` (C++ over BLAS; on a GPU over cuBLAS),
`reference` (plain torch, makes every document's gradient). Which method csrc uses is `ops.influence_cost`'s choice; inside
torch.compile, where lengths are not known, each document is scored by its gradient.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from megatron_r1.ops import extension, influence_cost
from megatron_r1.ops.dispatch import Op
from megatron_r1.ops.selfcheck import absent_until_checked
from megatron_r1.utils.errors import DataError
from megatron_r1.utils.logging import get_logger

_log = get_logger(__name__)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_INDEX = (torch.int32, torch.int64)
_COUNTABLE = 2**31


# --- Arguments ---------------------------------------------------------------------------------------------------------------


def _expect(condition: bool, expected: str, found: Callable[[], str], fix: str) -> None:
    if not condition:
        raise DataError(expected=expected, found=found(), fix=fix)


def _matrix(name: str, t: Tensor, legend: str, shape: tuple[int | None, ...], dtypes: tuple[torch.dtype, ...], like: Tensor) -> None:
    """A tensor of this shape (None: any size), of one of these dtypes, on like's device, with side by side elements in its last dimension."""
    sizes = t.dim() == len(shape) and all(want is None or have == want for have, want in zip(t.shape, shape))
    wanted = ", ".join("any" if size is None else str(size) for size in shape)
    _expect(sizes, f"{name}: {legend}, here [{wanted}]", lambda: f"shape {list(t.shape)}", "make it fit the other arguments")
    _expect(
        t.dtype in dtypes, f"{name}: {' or '.join(str(d).removeprefix('torch.') for d in dtypes)}", lambda: str(t.dtype).removeprefix("torch."), "convert it",
    )  # fmt: skip
    _expect(t.device == like.device, f"{name}: on {like.device} like a", lambda: f"on {t.device}", "move one of them")
    _expect(
        t.shape[-1] <= 1 or t.stride(-1) == 1, f"{name}: elements of the last dimension side by side", lambda: f"stride {t.stride(-1)}",
        "call .contiguous() first",
    )  # fmt: skip
    _expect(t.numel() < _COUNTABLE, f"{name}: at most 2^31 - 1 elements", lambda: f"{t.numel()} elements", "process fewer tokens or probes at a time")


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What sums are made in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _with_wider(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    return (dtype,) if dtype == _wide(dtype) else (dtype, _wide(dtype))


def _borders(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """cu_seqlens on the host, checked. Raises DataError. Inside torch.compile its numbers are left to the operator."""
    _expect(cu_seqlens.dim() == 1 and cu_seqlens.shape[0] >= 1, "cu_seqlens: [n + 1]", lambda: f"shape {list(cu_seqlens.shape)}", "pass [0] for no documents")
    _expect(cu_seqlens.dtype in _INDEX, "cu_seqlens: int32 or int64", lambda: str(cu_seqlens.dtype).removeprefix("torch."), "convert it")
    if torch.compiler.is_compiling():
        return cu_seqlens
    host = _on_host(cu_seqlens)
    fix = "pass the first token of each document, then the number of tokens"
    _expect(int(host[0]) == 0, "cu_seqlens: to start at 0", lambda: str(int(host[0])), fix)
    _expect(bool((host[1:] >= host[:-1]).all()), "cu_seqlens: numbers that never decrease", lambda: f"a step of {int(host.diff().min())}", fix)
    _expect(int(host[-1]) == tokens, f"cu_seqlens: to end at the number of tokens, {tokens}", lambda: str(int(host[-1])), fix)
    return host


def _on_host(cu_seqlens: Tensor) -> Tensor:
    """On the CPU; a copy from a GPU waits for it once and is kept with the tensor."""
    if cu_seqlens.device.type == "cpu":
        return cu_seqlens
    version = -1 if cu_seqlens.is_inference() else cu_seqlens._version
    kept, host = getattr(cu_seqlens, "_r1_host", (None, None))
    if host is None or kept != version:
        host = cu_seqlens.cpu()
        cu_seqlens._r1_host = (version, host)  # type: ignore[attr-defined]
    return host


def _tokens(a: Tensor, b: Tensor) -> None:
    _matrix("a", a, "[T, din]", (None, None), _DTYPES, a)
    _matrix("b", b, "[T, dout]", (a.shape[0], None), (a.dtype,), a)


def _probes(a: Tensor, b: Tensor, g: Tensor) -> None:
    _matrix("g", g, "[K, dout, din]", (None, b.shape[1], a.shape[1]), _with_wider(a.dtype), a)


def _main_grad(a: Tensor, b: Tensor, main_grad: Tensor) -> None:
    _matrix("main_grad", main_grad, "[dout, din]", (b.shape[1], a.shape[1]), (_wide(a.dtype),), a)
    _expect(
        main_grad.shape[0] <= 1 or main_grad.stride(0) >= main_grad.shape[1], "main_grad: rows that do not share memory",
        lambda: f"stride {main_grad.stride(0)} for rows of {main_grad.shape[1]}", "pass a tensor that was not expanded",
    )  # fmt: skip
    _expect(not main_grad.requires_grad, "main_grad: a buffer without derivatives", lambda: "requires_grad=True", "detach it")


# --- Implementations -------------------------------------------------------------------------------------------------------------


def _document_gradients(a: Tensor, b: Tensor, borders: Tensor) -> Tensor:
    """[n, dout, din]: every document's weight gradient."""
    wide, edges = _wide(a.dtype), borders.tolist()
    gradients = [b[s:e].to(wide).t() @ a[s:e].to(wide) for s, e in itertools.pairwise(edges)]
    return torch.stack(gradients) if gradients else a.new_zeros((0, b.shape[1], a.shape[1]), dtype=wide)


class _Reference:
    """The definition."""

    @staticmethod
    def wgrad_dot(a: Tensor, b: Tensor, g: Tensor, borders: Tensor, main_grad: Tensor) -> Tensor:
        gradients = _document_gradients(a, b, borders)
        main_grad += gradients.sum(0)
        return torch.einsum("doi,koi->dk", gradients, g.to(gradients.dtype))

    @staticmethod
    def grad_dot(a: Tensor, b: Tensor, g: Tensor, borders: Tensor) -> Tensor:
        gradients = _document_gradients(a, b, borders)
        return torch.einsum("doi,koi->dk", gradients, g.to(gradients.dtype))

    @staticmethod
    def grad_project(a: Tensor, b: Tensor, pa: Tensor, pb: Tensor, borders: Tensor) -> Tensor:
        gradients = _document_gradients(a, b, borders)
        return pb.to(gradients.dtype) @ gradients @ pa.to(gradients.dtype).t()


class _Csrc:
    """The compiled library: C++ over BLAS on a CPU, cuBLAS and small kernels on a GPU."""

    fused = False

    @classmethod
    def wgrad_dot(cls, a: Tensor, b: Tensor, g: Tensor, borders: Tensor, main_grad: Tensor) -> Tensor:
        return torch.ops.megatron_r1.wgrad_dot_(a, b, g, borders, main_grad, *cls._method(a, b, g, borders, main_grad))

    @classmethod
    def grad_dot(cls, a: Tensor, b: Tensor, g: Tensor, borders: Tensor) -> Tensor:
        return torch.ops.megatron_r1.grad_dot(a, b, g, borders, *cls._method(a, b, g, borders, None))

    @classmethod
    def grad_project(cls, a: Tensor, b: Tensor, pa: Tensor, pb: Tensor, borders: Tensor) -> Tensor:
        return torch.ops.megatron_r1.grad_project(a, b, pa, pb, borders)

    @classmethod
    def _method(cls, a: Tensor, b: Tensor, g: Tensor, borders: Tensor, main_grad: Tensor | None) -> tuple[int, bool]:
        """(rows_below, fused) of the operators."""
        if torch.compiler.is_compiling() or not a.shape[1] or not b.shape[1]:
            return 0, cls.fused
        layer = a.shape[1], b.shape[1], g.shape[0]
        if a.device.type == "cpu":
            return influence_cost.rows_below(*layer, "cpu", a.dtype, g.dtype, main_grad is not None), False
        fused = cls.fused and torch.ops.megatron_r1.wgrad_dot_takes_fused(a, b, g, borders, main_grad)
        if cls.fused and not fused:
            _say_not_fused(a.dtype, g.dtype, a.shape[1], b.shape[1], a.stride(0), b.stride(0))
        documents = int((borders[1:] > borders[:-1]).sum())
        method = influence_cost.gpu_method(a.shape[0], documents, *layer, a.dtype, g.dtype, main_grad is not None, fused)
        return influence_cost.ALL if method == "rows" else 0, method == "fused"


class _Fused(_Csrc):
    """The same with the one-pass kernel."""

    fused = True


@lru_cache(maxsize=64)
def _say_not_fused(*arguments: Any) -> None:
    """Once per kind of argument."""
    _log.info("op wgrad_dot: fused does not take dtypes %s, %s, din %d, dout %d, strides %d, %d; csrc runs", *arguments)


@lru_cache(maxsize=1)
def _describe() -> None:
    """Tell torch the shapes of the operators' results. Once, when the library is loaded."""

    def scores(a: Tensor, b: Tensor, g: Tensor, cu_seqlens: Tensor, *rest: Any) -> Tensor:
        return a.new_empty((cu_seqlens.shape[0] - 1, g.shape[0]), dtype=_wide(a.dtype))

    def projections(a: Tensor, b: Tensor, pa: Tensor, pb: Tensor, cu_seqlens: Tensor) -> Tensor:
        return a.new_empty((cu_seqlens.shape[0] - 1, pb.shape[0], pa.shape[0]), dtype=_wide(a.dtype))

    def with_gradient(a: Tensor, b: Tensor, g: Tensor, cu_seqlens: Tensor, main_grad: Tensor, rows_below: int = 0, fused: bool = False) -> Tensor:
        return scores(a, b, g, cu_seqlens)

    torch.library.register_fake("megatron_r1::wgrad_dot_", with_gradient)
    torch.library.register_fake("megatron_r1::grad_dot", scores)
    torch.library.register_fake("megatron_r1::grad_project", projections)


def _difference(run: type[_Csrc], device: str) -> str | None:
    """All three ops against the definition in fp64, with ragged, empty and one-token documents: None, or what was wrong."""
    generator = torch.Generator().manual_seed(0)
    for dtype, probe_dtype, tolerance in ((torch.bfloat16, torch.bfloat16, 1e-2), (torch.float16, torch.float32, 2e-3), (torch.float32, torch.float32, 1e-3)):
        for tokens, borders in ((700, [0, 300, 300, 301, 640, 700]), (192, [0, 64, 130, 192])):
            a, b, g, pa, pb = (
                torch.randn(shape, generator=generator).to(t)
                for shape, t in (
                    ((tokens, 272), dtype), ((tokens, 144), dtype), ((3, 144, 272), probe_dtype), ((8, 272), probe_dtype), ((16, 144), probe_dtype),
                )
            )  # fmt: skip
            cu, start = torch.tensor(borders), torch.randn(144, 272, generator=generator)
            exact, total = [t.double() for t in (a, b, g, pa, pb)], start.double()
            right = (_Reference.wgrad_dot(*exact[:3], cu, total), total, _Reference.grad_project(*exact[:2], *exact[3:], cu))
            a, b, g, pa, pb = (t.to(device) for t in (a, b, g, pa, pb))
            for rows_below in (0, influence_cost.ALL):
                main_grad = start.to(device, copy=True)
                if run.fused and dtype != torch.float32 and not torch.ops.megatron_r1.wgrad_dot_takes_fused(a, b, g, cu, main_grad):
                    return "its self-check failed: the kernel does not take the check's arguments on this GPU"
                scores = torch.ops.megatron_r1.wgrad_dot_(a, b, g, cu, main_grad, rows_below, run.fused)
                alone = torch.ops.megatron_r1.grad_dot(a, b, g, cu, rows_below, run.fused)
                projected = torch.ops.megatron_r1.grad_project(a, b, pa, pb, cu)
                for name, x, y in (
                    ("wgrad_dot's scores", scores, right[0]), ("grad_dot's scores", alone, right[0]), ("main_grad", main_grad, right[1]),
                    ("grad_project", projected, right[2]),
                ):  # fmt: skip
                    error = float((x.cpu().double() - y).norm() / y.norm())
                    if not error <= tolerance:
                        return f"its self-check failed: {name} of {dtype}, {tokens} tokens, off by {error:.1e} (at most {tolerance:.0e})"
    return None


def _check_fused() -> str | None:
    capability = torch.cuda.get_device_capability()
    if capability != (9, 0):
        return f"it is for GPUs of compute capability 9.0; this is {capability[0]}.{capability[1]}"
    return _difference(_Fused, "cuda")


_absent_csrc = absent_until_checked(lambda: _difference(_Csrc, "cuda"))
_absent_fused = absent_until_checked(_check_fused)


def _csrc_absent(device: str) -> str | None:
    if extension.missing() is None:
        _describe()
    return _absent_csrc(device)


def _fused_absent(device: str) -> str | None:
    # After csrc: it is what runs where the one-pass kernel does not take the arguments.
    return _csrc_absent(device) or _absent_fused(device) if device == "cuda" else "it is for GPUs of compute capability 9.0"


WGRAD_DOT, GRAD_DOT, GRAD_PROJECT = Op("wgrad_dot"), Op("grad_dot"), Op("grad_project")
for _op in (WGRAD_DOT, GRAD_DOT):
    _op.register("fused", getattr(_Fused, _op.name), _fused_absent)
for _op in (WGRAD_DOT, GRAD_DOT, GRAD_PROJECT):
    _op.register("csrc", getattr(_Csrc, _op.name), _csrc_absent)
    _op.register("reference", getattr(_Reference, _op.name))


# --- The ops ---------------------------------------------------------------------------------------------------------------------


def wgrad_dot(a: Tensor, b: Tensor, g: Tensor, cu_seqlens: Tensor, main_grad: Tensor, implementation: str | None = None) -> Tensor:
    """Scores [n, K], fp32 (fp64 for fp64), of every document and probe; adds b^T a to main_grad IN PLACE.

    Shapes and dtypes: see the module's text. Raises DataError naming the argument that is wrong, before main_grad is touched.
    `implementation`: see `ops.dispatch.Op.choose`.
    """
    _tokens(a, b)
    _probes(a, b, g)
    _main_grad(a, b, main_grad)
    borders = _borders(cu_seqlens, a.shape[0])
    with torch.no_grad():
        return WGRAD_DOT(a, b, g, borders, main_grad, implementation=implementation)


def grad_dot(a: Tensor, b: Tensor, g: Tensor, cu_seqlens: Tensor, implementation: str | None = None) -> Tensor:
    """Scores [n, K] as `wgrad_dot`, for frozen weights: no weight gradient is kept. Raises as `wgrad_dot`."""
    _tokens(a, b)
    _probes(a, b, g)
    borders = _borders(cu_seqlens, a.shape[0])
    with torch.no_grad():
        return GRAD_DOT(a, b, g, borders, implementation=implementation)


def grad_project(a: Tensor, b: Tensor, pa: Tensor, pb: Tensor, cu_seqlens: Tensor, implementation: str | None = None) -> Tensor:
    """Every document's weight gradient seen through two projections: pb W_d pa^T = (b pb^T)^T (a pa^T), [n, rb, ra], fp32 (fp64 for fp64).

    pa [ra, din], pb [rb, dout]: a's dtype or fp32. 2 T (din ra + dout rb + ra rb) FLOP; no [dout, din] matrix is made.
    Where all are bf16 and the CPU has bf16 instructions, b pb^T and a pa^T are rounded to bf16 once. Raises as `wgrad_dot`.
    """
    _tokens(a, b)
    _matrix("pa", pa, "[ra, din]", (None, a.shape[1]), _with_wider(a.dtype), a)
    _matrix("pb", pb, "[rb, dout]", (None, b.shape[1]), _with_wider(a.dtype), a)
    borders = _borders(cu_seqlens, a.shape[0])
    with torch.no_grad():
        return GRAD_PROJECT(a, b, pa, pb, borders, implementation=implementation)


def plan(
    a: Tensor, b: Tensor, g: Tensor, cu_seqlens: Tensor, want_weight_gradient: bool = True, implementation: str | None = None
) -> influence_cost.Plan:
    """What `wgrad_dot` (or `grad_dot`) with these arguments would do, what it would cost and why: see `influence_cost.plan`."""
    _tokens(a, b)
    _probes(a, b, g)
    lengths = _borders(cu_seqlens, a.shape[0]).diff().tolist()
    chosen = (WGRAD_DOT if want_weight_gradient else GRAD_DOT).choose(implementation, a.device.type).name
    return influence_cost.plan(
        lengths, a.shape[1], b.shape[1], g.shape[0], a.device.type, want_weight_gradient, dtype=a.dtype, probe_dtype=g.dtype, fused=chosen == "fused"
    )
