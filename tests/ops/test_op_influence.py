"""Per-document scores and weight gradient: against fp64 automatic derivatives of separate documents through a real nn.Linear.

Legend: T tokens, n documents, K probes; a [T, din], b [T, dout], g [K, dout, din], cu [n + 1], main_grad [dout, din].
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_r1.ops import extension, influence, influence_cost
from megatron_r1.ops.dispatch import OPS_VARIABLE, Op
from megatron_r1.ops.influence import GRAD_DOT, GRAD_PROJECT, WGRAD_DOT, grad_dot, grad_project, wgrad_dot
from megatron_r1.utils.errors import DataError, R1Error

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
RAGGED = (5, 0, 1, 14, 0, 0, 37, 23)
NEVER, ALWAYS = 0, influence_cost.ALL  # documents scored by rows


def able(op: Op, name: str) -> str:
    """The implementation's name; skips with the reason where it can not run."""
    if reason := op.reasons("cpu")[name]:
        pytest.skip(f"{op.name}: {name}: {reason}")
    return name


@pytest.fixture(params=WGRAD_DOT.names())
def implementation(request: pytest.FixtureRequest) -> str:
    return able(WGRAD_DOT, request.param)


@pytest.fixture
def kernels() -> None:
    """For tests of the compiled operators themselves."""
    able(WGRAD_DOT, "csrc")


def wide(dtype: torch.dtype) -> torch.dtype:
    return F64 if dtype == F64 else F32


def borders(lengths: tuple[int, ...] | list[int], dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=dtype)


def numbers(lengths: tuple[int, ...] | list[int], din: int, dout: int, probes: int, dtype: torch.dtype = F32, probe_dtype: torch.dtype | None = None, seed: int = 0):
    """(a, b, g, cu) at random."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((sum(lengths), din), (sum(lengths), dout), (probes, dout, din))
    a, b, g = (torch.randn(shape, generator=generator, dtype=F64) for shape in shapes)
    return a.to(dtype), b.to(dtype), g.to(probe_dtype or dtype), borders(lengths)


def exact(a: Tensor, b: Tensor, g: Tensor, cu: Tensor) -> tuple[Tensor, Tensor]:
    """(scores, b^T a) in fp64: a document's gradient is the derivative of sum(b * linear(a)) by the weight of an nn.Linear."""
    layer = torch.nn.Linear(a.shape[1], b.shape[1], bias=False, dtype=F64)
    rows = []
    for start, end in zip(cu.tolist(), cu.tolist()[1:]):
        loss = (layer(a[start:end].double()) * b[start:end].double()).sum()
        (gradient,) = torch.autograd.grad(loss, layer.weight)
        rows.append(gradient)
    gradients = torch.stack(rows) if rows else layer.weight.new_zeros(0, *layer.weight.shape)
    return (gradients[:, None] * g.double()).sum((2, 3)), gradients.sum(0)


def off(x: Tensor, right: Tensor) -> float:
    """Relative error by norm; NaN is infinite."""
    assert x.shape == right.shape
    error = float((x.double() - right).norm() / right.norm().clamp(min=1e-30))
    return error if error == error else float("inf")


@contextmanager
def poisoned() -> Iterator[None]:
    """New memory is full of 0x7f bytes, about 3.4e38 as fp32 and bf16; torch's new tensors are NaN."""
    libc, perturb = ctypes.CDLL(None), -6
    libc.mallopt(perturb, 0x80)
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        libc.mallopt(perturb, 0)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- Right ---------------------------------------------------------------------------------------------------------------------


def test_scores_are_the_losses_own_derivatives(implementation: str) -> None:
    """A layer inside a loss, its inputs and output gradients captured in one backward over all documents."""
    torch.manual_seed(0)
    lengths, din, dout, probes = (7, 1, 0, 12), 24, 40, 3
    cu = borders(lengths)
    layer, head = torch.nn.Linear(din, dout).double(), torch.nn.Linear(dout, 5).double()
    x, targets = torch.randn(sum(lengths), din, dtype=F64), torch.randint(0, 5, (sum(lengths),))
    probe = torch.randn(probes, dout, din, dtype=F64)

    def loss(rows: slice, y: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(head(torch.tanh(y)), targets[rows], reduction="sum")

    right = torch.zeros(len(lengths), probes, dtype=F64)
    for d, (start, end) in enumerate(zip(cu.tolist(), cu.tolist()[1:])):
        (gradient,) = torch.autograd.grad(loss(slice(start, end), layer(x[start:end])), layer.weight)
        right[d] = (probe * gradient).sum((1, 2))
    y = layer(x)
    total = loss(slice(None), y)
    (b,) = torch.autograd.grad(total, y, retain_graph=True)
    (weight_gradient,) = torch.autograd.grad(total, layer.weight)
    main_grad = torch.zeros(dout, din, dtype=F64)
    scores = wgrad_dot(x, b, probe, cu, main_grad, implementation)
    torch.testing.assert_close(scores, right, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(main_grad, weight_gradient, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(grad_dot(x, b, probe, cu, implementation), right, atol=1e-12, rtol=1e-12)


# Sizes around the tile of 256 x 512, and on both sides of din = dout.
@pytest.mark.parametrize(("din", "dout"), [(1, 1), (40, 24), (24, 40), (530, 17), (9, 300), (513, 257)])
@pytest.mark.parametrize("probes", [1, 9])
def test_sizes(implementation: str, din: int, dout: int, probes: int) -> None:
    a, b, g, cu = numbers(RAGGED, din, dout, probes, F64)
    scores, gradient = exact(a, b, g, cu)
    main_grad = torch.ones(dout, din, dtype=F64)
    assert off(wgrad_dot(a, b, g, cu, main_grad, implementation), scores) < 1e-13
    assert off(main_grad - 1, gradient) < 1e-13
    assert off(grad_dot(a, b, g, cu, implementation), scores) < 1e-13


@pytest.mark.parametrize("rows_below", [NEVER, 2, 15, 24, ALWAYS])
@pytest.mark.parametrize("probes", [1, 2, 8])
@pytest.mark.parametrize(("dtype", "probe_dtype"), [(F32, F32), (BF16, BF16), (BF16, F32), (F16, F16), (F16, F32), (F64, F64)])
def test_every_method_in_every_dtype(kernels: None, rows_below: int, probes: int, dtype: torch.dtype, probe_dtype: torch.dtype) -> None:
    """At most twice the error of plain torch in the same precision: the gradient in a's dtype, then the dot in fp32."""
    lengths = (*RAGGED, 300, 2, 290)  # more tokens than are scored at once
    a, b, g, cu = numbers(lengths, 80, 96, probes, dtype, probe_dtype)
    scores, gradient = exact(a, b, g, cu)
    main_grad = torch.zeros(96, 80, dtype=wide(dtype))
    ours = torch.ops.megatron_r1.wgrad_dot_(a, b, g, cu, main_grad, rows_below)
    alone = torch.ops.megatron_r1.grad_dot(a, b, g, cu, rows_below)
    edges = cu.tolist()
    plain = torch.stack([(g.to(wide(dtype)) * (b[s:e].t() @ a[s:e]).to(wide(dtype))).sum((1, 2)) for s, e in itertools.pairwise(edges)])
    # One bf16 or fp16 rounding of a document's gradient is not smaller than this in the sum, whatever luck plain torch had.
    floor = {F32: 2e-7, BF16: 2e-3, F16: 2e-7, F64: 1e-15}[dtype]
    assert off(ours, scores) <= 2 * max(off(plain, scores), floor)
    assert off(alone, scores) <= 2 * max(off(plain, scores), floor)
    assert off(main_grad, gradient) <= 2 * max(off((b.t() @ a).to(main_grad.dtype), gradient), floor)
    assert ours.dtype == alone.dtype == wide(dtype)


def test_long_sums_keep_their_accuracy(kernels: None) -> None:
    """400,000 equal terms: what one fp32 sum would lose (1e-2) must not be lost. The products are BLAS's own."""
    a, b = torch.full((64, 512), 0.1), torch.full((64, 768), 0.3)
    g, cu = torch.full((1, 768, 512), 0.7), borders([40, 24])
    scores, gradient = exact(a, b, g, cu)
    main_grad = torch.zeros(768, 512)
    for rows_below in (NEVER, ALWAYS):
        main_grad.zero_()
        assert off(torch.ops.megatron_r1.wgrad_dot_(a, b, g, cu, main_grad, rows_below), scores) < 1e-5
        assert off(main_grad, gradient) < 1e-5


@pytest.mark.parametrize(("rows_below", "lengths", "din", "probes"), [(NEVER, (1,) * 300, 8704, 900), (ALWAYS, (17,) * 256, 1, 1025)])
def test_more_scores_than_are_kept_per_tile_at_once(kernels: None, rows_below: int, lengths: tuple[int, ...], din: int, probes: int) -> None:
    a, b, g, cu = numbers(lengths, din, 1, probes)
    terms = ((b * a).double() @ g[:, 0].double().t()).unflatten(0, (len(lengths), -1)).sum(1)
    main_grad = torch.zeros(1, din)
    assert off(torch.ops.megatron_r1.wgrad_dot_(a, b, g, cu, main_grad, rows_below), terms) < 1e-6
    assert off(main_grad, b.double().t() @ a.double()) < 1e-5


@pytest.mark.parametrize(("dtype", "probe_dtype"), [(F32, F32), (BF16, BF16), (BF16, F32), (F16, F16), (F64, F64)])
@pytest.mark.parametrize("name", GRAD_PROJECT.names())
def test_grad_project(name: str, dtype: torch.dtype, probe_dtype: torch.dtype) -> None:
    able(GRAD_PROJECT, name)
    a, b, _, cu = numbers((*RAGGED, 300), 70, 50, 1, dtype)
    generator = torch.Generator().manual_seed(1)
    pa, pb = (torch.randn(r, d, generator=generator).to(probe_dtype) for r, d in ((6, 70), (11, 50)))
    edges = cu.tolist()
    right = torch.stack([pb.double() @ b[s:e].double().t() @ a[s:e].double() @ pa.double().t() for s, e in itertools.pairwise(edges)])
    plain = torch.stack([((b[s:e].to(probe_dtype) @ pb.t()).t() @ (a[s:e].to(probe_dtype) @ pa.t())).double() for s, e in itertools.pairwise(edges)])
    ours = grad_project(a, b, pa, pb, cu, name)
    assert ours.shape == (len(edges) - 1, 11, 6)
    assert ours.dtype == wide(dtype)
    assert off(ours, right) <= 2 * max(off(plain, right), 2e-7 if dtype != F64 else 1e-15)
    assert not ours[1].any()  # an empty document


@pytest.mark.parametrize("rows_below", [NEVER, 10, ALWAYS])
def test_slices_of_columns(kernels: None, rows_below: int) -> None:
    """Tensor parallel slices, every argument a part of something larger: the same numbers, and nothing else is written."""
    a, b, g, cu = numbers(RAGGED, 40, 30, 3)
    main_grad = torch.zeros(30, 40)
    right = torch.ops.megatron_r1.wgrad_dot_(a, b, g, cu, main_grad, rows_below)
    big_a, big_b, big_g, big_main = torch.randn(81, 101), torch.randn(81, 77), torch.randn(4, 33, 64), torch.full((31, 99), 5.0)
    views = big_a[1:, 7:47], big_b[:80, 3:33], big_g[1:, 2:32, 9:49], big_main[1:, 50:90]
    for view, whole in zip(views, (a, b, g, torch.zeros(30, 40))):
        view.copy_(whole)
    cu_strided = torch.stack([cu, cu + 100], 1)[:, 0]
    ours = torch.ops.megatron_r1.wgrad_dot_(*views[:3], cu_strided, views[3], rows_below)
    torch.testing.assert_close(ours, right)
    torch.testing.assert_close(views[3], main_grad)
    assert float(big_main.sum() - views[3].sum()) == 5.0 * (31 * 99 - 30 * 40)


@pytest.mark.parametrize("rows_below", [NEVER, ALWAYS])
def test_expanded_rows(kernels: None, rows_below: int) -> None:
    """Autograd hands out expanded gradients: all tokens one row of memory."""
    a, _, g, cu = numbers(RAGGED, 20, 30, 2)
    b = torch.randn(1, 30).expand(a.shape[0], 30)
    scores, gradient = exact(a, b, g, cu)
    main_grad = torch.zeros(30, 20)
    assert off(torch.ops.megatron_r1.wgrad_dot_(a, b, g[:1].expand(2, -1, -1), cu, main_grad, rows_below), scores[:, :1].expand(-1, 2)) < 1e-6
    assert off(main_grad, gradient) < 1e-6


@pytest.mark.parametrize(
    ("lengths", "din", "dout", "probes"),
    [((), 5, 4, 2), ((0,), 5, 4, 2), ((0, 0, 0), 5, 4, 2), ((1,), 5, 4, 1), ((1, 1, 1), 5, 4, 9), ((3, 4), 5, 4, 0), ((3,), 0, 4, 2), ((3,), 5, 0, 2)],
)
def test_nothing_and_almost_nothing(implementation: str, lengths: tuple[int, ...], din: int, dout: int, probes: int) -> None:
    a, b, g, cu = numbers(lengths, din, dout, probes)
    main_grad = torch.ones(dout, din)
    scores = wgrad_dot(a, b, g, cu.int(), main_grad, implementation)
    assert scores.shape == grad_dot(a, b, g, cu, implementation).shape == (len(lengths), probes)
    torch.testing.assert_close(scores, exact(a, b, g, cu)[0].float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(main_grad, 1 + b.t() @ a, atol=1e-5, rtol=1e-5)
    if not sum(lengths):
        assert torch.equal(main_grad, torch.ones(dout, din))
    pa, pb = torch.ones(3, din), torch.ones(2, dout)
    assert grad_project(a, b, pa, pb, cu, implementation if implementation in GRAD_PROJECT.names() else None).shape == (len(lengths), 2, 3)


# --- Algebra -------------------------------------------------------------------------------------------------------------------

cases = st.tuples(st.lists(st.integers(0, 12), min_size=1, max_size=6), st.integers(1, 20), st.integers(1, 20), st.integers(1, 9), st.sampled_from([NEVER, 4, ALWAYS]))


@settings(max_examples=40, deadline=None)
@given(cases, st.randoms(use_true_random=False))
def test_algebra(case: tuple, random) -> None:
    lengths, din, dout, probes, rows_below = case
    able(WGRAD_DOT, "csrc")
    score = torch.ops.megatron_r1.wgrad_dot_
    a, b, g, cu = numbers(lengths, din, dout, probes, F64, seed=random.randrange(1 << 20))
    main_grad = torch.zeros(dout, din, dtype=F64)
    scores = score(a, b, g, cu, main_grad, rows_below)
    near = {"atol": 1e-9, "rtol": 1e-9}
    # The weight gradient, and the whole is the sum of its documents.
    torch.testing.assert_close(main_grad, b.t() @ a, **near)
    torch.testing.assert_close(scores.sum(0), (g * main_grad).sum((1, 2)), **near)
    # Splitting a document adds a border and nothing else.
    d = random.randrange(len(lengths))
    cut = random.randint(0, lengths[d])
    split = score(a, b, g, borders([*lengths[:d], cut, lengths[d] - cut, *lengths[d + 1 :]]), main_grad, rows_below)
    torch.testing.assert_close(torch.cat([split[:d], split[d : d + 2].sum(0, keepdim=True), split[d + 2 :]]), scores, **near)
    # Documents in another order.
    order = random.sample(range(len(lengths)), len(lengths))
    tokens = torch.cat([torch.arange(int(cu[i]), int(cu[i + 1])) for i in order])
    moved = score(a[tokens], b[tokens], g, borders([lengths[i] for i in order]), main_grad, rows_below)
    torch.testing.assert_close(moved, scores[order], **near)
    # Linear in the probe.
    summed = score(a, b, (2 * g - g.flip(0)), cu, main_grad, rows_below)
    torch.testing.assert_close(summed, 2 * scores - scores.flip(1), **near)
    # Four calls added four times.
    torch.testing.assert_close(main_grad, 4 * (b.t() @ a), **near)


# --- The same every time -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("rows_below", [NEVER, 20, ALWAYS])
@pytest.mark.parametrize(("din", "dout", "probes"), [(600, 300, 2), (48, 40, 9)])
def test_same_bits_on_any_number_of_threads(kernels: None, dtype: torch.dtype, rows_below: int, din: int, dout: int, probes: int) -> None:
    a, b, g, cu = numbers((*RAGGED, 300), din, dout, probes, dtype)
    pa, pb = g[0, :20], g[0, :, : dout // 2].t()[:, :dout].contiguous()
    seen = []
    for count in (1, 2, 3, 1):
        with threads(count):
            main_grad = torch.zeros(dout, din)
            scores = torch.ops.megatron_r1.wgrad_dot_(a, b, g, cu, main_grad, rows_below)
            seen.append((scores, main_grad, torch.ops.megatron_r1.grad_dot(a, b, g, cu, rows_below), torch.ops.megatron_r1.grad_project(a, b, pa, pb, cu)))
    for other in seen[1:]:
        assert all(torch.equal(x, y) for x, y in zip(seen[0], other))


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("rows_below", [NEVER, 20, ALWAYS])
@pytest.mark.parametrize("probes", [1, 9])
def test_reads_only_what_it_wrote(kernels: None, dtype: torch.dtype, rows_below: int, probes: int) -> None:
    a, b, g, cu = numbers(RAGGED, 130, 70, probes, dtype)
    pa, pb = g[0, :20], g[0, :, :70].contiguous()
    right = torch.zeros(70, 130)
    expected = (torch.ops.megatron_r1.wgrad_dot_(a, b, g, cu, right, rows_below), right, torch.ops.megatron_r1.grad_project(a, b, pa, pb, cu))
    main_grad = torch.zeros(70, 130)
    with poisoned():
        ours = (torch.ops.megatron_r1.wgrad_dot_(a, b, g, cu, main_grad, rows_below), main_grad, torch.ops.megatron_r1.grad_project(a, b, pa, pb, cu))
    assert all(torch.equal(x, y) for x, y in zip(ours, expected))


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("rows_below", [NEVER, 20, ALWAYS])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("probes", [1, 9])
def test_nan_stays_in_its_document(kernels: None, dtype: torch.dtype, rows_below: int, side: int, probes: int) -> None:
    lengths = (5, 3, 30, 4)
    a, b, g, cu = numbers(lengths, 33, 65, probes, dtype)
    clean = torch.ops.megatron_r1.grad_dot(a, b, g, cu, rows_below)
    for hit in range(len(lengths)):
        ruined = [a.clone(), b.clone()]
        ruined[side][int(cu[hit + 1]) - 1, 7] = float("nan")
        main_grad = torch.zeros(65, 33)
        scores = torch.ops.megatron_r1.wgrad_dot_(*ruined, g, cu, main_grad, rows_below)
        others = [d for d in range(len(lengths)) if d != hit]
        assert scores[hit].isnan().all()
        assert torch.equal(scores[others], clean[others])
        assert main_grad.isnan().any()


# --- Bad arguments -------------------------------------------------------------------------------------------------------------


def good() -> dict[str, Tensor]:
    a, b, g, cu = numbers((3, 4), 6, 5, 2)
    return {"a": a, "b": b, "g": g, "cu_seqlens": cu, "main_grad": torch.zeros(5, 6)}


BAD: dict[str, tuple[str, Callable[[dict[str, Tensor]], Tensor]]] = {
    "a of three dimensions": ("a", lambda x: x["a"][None]),
    "a of integers": ("a", lambda x: x["a"].int()),
    "a in columns": ("a", lambda x: x["a"].t().contiguous().t()),
    "a too large": ("a", lambda x: torch.zeros(1, 1 << 12).expand(1 << 20, 1 << 12)),
    "b of other tokens": ("b", lambda x: x["b"][1:]),
    "b of another dtype": ("b", lambda x: x["b"].bfloat16()),
    "b elsewhere": ("b", lambda x: x["b"].to("meta")),
    "b in columns": ("b", lambda x: x["b"].t().contiguous().t()),
    "b of one dimension": ("b", lambda x: x["b"][:, 0]),
    "g without probes": ("g", lambda x: x["g"][0]),
    "g transposed": ("g", lambda x: x["g"].transpose(1, 2).contiguous()),
    "g too narrow a dtype": ("g", lambda x: x["g"].bfloat16()),
    "g of another precision": ("g", lambda x: x["g"].double()),
    "g elsewhere": ("g", lambda x: x["g"].to("meta")),
    "g in columns": ("g", lambda x: x["g"].transpose(1, 2).contiguous().transpose(1, 2)),
    "g too large": ("g", lambda x: x["g"][:1].expand(1 << 30, 5, 6)),
    "cu_seqlens of floats": ("cu_seqlens", lambda x: x["cu_seqlens"].float()),
    "cu_seqlens of two dimensions": ("cu_seqlens", lambda x: x["cu_seqlens"][None]),
    "cu_seqlens of none": ("cu_seqlens", lambda x: x["cu_seqlens"][:0]),
    "cu_seqlens from 1": ("cu_seqlens", lambda x: torch.tensor([1, 3, 7])),
    "cu_seqlens falling": ("cu_seqlens", lambda x: torch.tensor([0, 5, 3, 7])),
    "cu_seqlens beyond the end and back": ("cu_seqlens", lambda x: torch.tensor([0, 1 << 40, 7])),
    "cu_seqlens negative": ("cu_seqlens", lambda x: torch.tensor([0, -(1 << 40), 7])),
    "cu_seqlens too short": ("cu_seqlens", lambda x: torch.tensor([0, 3, 6], dtype=torch.int32)),
    "cu_seqlens too long": ("cu_seqlens", lambda x: torch.tensor([0, 3, 8])),
    "cu_seqlens of no documents": ("cu_seqlens", lambda x: torch.tensor([0])),
    "main_grad transposed": ("main_grad", lambda x: x["main_grad"].t().contiguous()),
    "main_grad in bf16": ("main_grad", lambda x: x["main_grad"].bfloat16()),
    "main_grad in fp64": ("main_grad", lambda x: x["main_grad"].double()),
    "main_grad elsewhere": ("main_grad", lambda x: x["main_grad"].to("meta")),
    "main_grad in columns": ("main_grad", lambda x: torch.zeros(6, 5).t()),
    "main_grad expanded": ("main_grad", lambda x: torch.zeros(1, 6).expand(5, 6)),
    "main_grad with rows that overlap": ("main_grad", lambda x: torch.zeros(20).as_strided((5, 6), (3, 1))),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(implementation: str, case: str) -> None:
    name, make = BAD[case]
    arguments = good()
    arguments[name] = make(arguments)
    before = arguments["main_grad"].clone()
    with pytest.raises(DataError, match=f"expected: {name}:"):
        wgrad_dot(**arguments, implementation=implementation)
    if name != "main_grad":
        assert torch.equal(arguments["main_grad"], before)
        del arguments["main_grad"]
        with pytest.raises(DataError, match=f"expected: {name}:"):
            grad_dot(**arguments, implementation=implementation)


# Of a tensor on the meta device and others on a CPU torch makes a meta result: the operator is not reached.
@pytest.mark.parametrize("case", [case for case in BAD if "elsewhere" not in case])
def test_the_operator_itself_does_not_trust_its_arguments(kernels: None, case: str) -> None:
    """torch.ops can be called past the checks in Python: an error, never a crash."""
    name, make = BAD[case]
    arguments = good()
    arguments[name] = make(arguments)
    with pytest.raises(RuntimeError, match=f"expected: {name}:"):
        torch.ops.megatron_r1.wgrad_dot_(*arguments.values())
    if name != "main_grad":
        with pytest.raises(RuntimeError, match=f"expected: {name}:"):
            torch.ops.megatron_r1.grad_dot(*list(arguments.values())[:4])


@pytest.mark.parametrize("shared", ["a", "b", "g"])
def test_main_grad_needs_memory_of_its_own(kernels: None, shared: str) -> None:
    arguments = good()
    memory = torch.zeros(100)
    arguments["main_grad"] = memory[:30].view(5, 6)
    arguments[shared] = memory[20:].as_strided(arguments[shared].shape, arguments[shared].stride())
    with pytest.raises(RuntimeError, match=f"memory shared with {shared}"):
        torch.ops.megatron_r1.wgrad_dot_(*arguments.values())


def test_main_grad_is_not_a_parameter(implementation: str) -> None:
    arguments = good()
    arguments["main_grad"].requires_grad_()
    with pytest.raises(DataError, match="main_grad"):
        wgrad_dot(**arguments, implementation=implementation)


@pytest.mark.parametrize(
    ("name", "make"),
    [("pa", lambda p: p[:, 1:]), ("pb", lambda p: p[None]), ("pa", lambda p: p.double()), ("pb", lambda p: p.to("meta")), ("pb", lambda p: p.t().contiguous().t())],
)
def test_bad_projections_are_named(name: str, make: Callable[[Tensor], Tensor]) -> None:
    x = good()
    arguments = {"a": x["a"], "b": x["b"], "pa": torch.ones(2, 6), "pb": torch.ones(3, 5), "cu_seqlens": x["cu_seqlens"]}
    arguments[name] = make(arguments[name])
    with pytest.raises(DataError, match=f"expected: {name}:"):
        grad_project(**arguments)
    if arguments[name].device.type == "meta":
        return
    able(GRAD_PROJECT, "csrc")
    with pytest.raises(RuntimeError, match=f"expected: {name}:"):
        torch.ops.megatron_r1.grad_project(*arguments.values())


def test_rows_below_of_the_operator(kernels: None) -> None:
    with pytest.raises(RuntimeError, match="rows_below"):
        torch.ops.megatron_r1.wgrad_dot_(*good().values(), -1)


# --- In torch ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_opcheck(kernels: None, dtype: torch.dtype) -> None:
    a, b, g, cu = numbers((3, 0, 4), 6, 5, 2, dtype)
    torch.library.opcheck(torch.ops.megatron_r1.wgrad_dot_.default, (a, b, g, cu, torch.zeros(5, 6), 4))
    torch.library.opcheck(torch.ops.megatron_r1.grad_dot.default, (a, b, g, cu))
    torch.library.opcheck(torch.ops.megatron_r1.grad_project.default, (a, b, g[0, :3], g[0, :, :5].contiguous(), cu))


@pytest.mark.parametrize("name", ["csrc"])
def test_compiled_in_one_graph(name: str) -> None:
    able(WGRAD_DOT, name)
    a, b, g, cu = numbers((30, 0, 41), 20, 30, 2)
    pa, pb = torch.randn(4, 20), torch.randn(3, 30)

    def step(a: Tensor, b: Tensor, main_grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scores = wgrad_dot(a * 2, b, g, cu, main_grad, name)
        main_grad.mul_(3)
        return scores + 1, grad_dot(a, b, g, cu, name), grad_project(a, b, pa, pb, cu, name)

    torch._dynamo.reset()
    eager, compiled = torch.ones(30, 20), torch.ones(30, 20)
    for x, y in zip(step(a, b, eager), torch.compile(step, fullgraph=True, backend="aot_eager")(a, b, compiled)):
        torch.testing.assert_close(y, x)
    torch.testing.assert_close(compiled, eager)
    assert off(eager / 3 - 1, 2 * exact(a, b, g, cu)[1]) < 1e-6


def test_nothing_is_differentiated(implementation: str) -> None:
    arguments = good()
    for name in ("a", "b", "g"):
        arguments[name].requires_grad_()
    scores = wgrad_dot(**arguments, implementation=implementation)
    assert not scores.requires_grad
    assert not arguments["main_grad"].requires_grad


def test_which_implementation_runs(kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for op in (WGRAD_DOT, GRAD_DOT, GRAD_PROJECT):
        assert op.choose(None, "cpu").name == "csrc"
        monkeypatch.setenv(OPS_VARIABLE, f"{op.name}=reference")
        assert op.choose(None, "cpu").name == "reference"
        monkeypatch.delenv(OPS_VARIABLE)
    assert "compute capability 9.0" in str(WGRAD_DOT.reasons("cpu")["fused"])
    with pytest.raises(R1Error, match="fused"):
        wgrad_dot(**good(), implementation="fused")


def test_the_plan_is_what_runs(kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, g, cu = numbers((3, 400, 2), 64, 48, 1)
    made = influence.plan(a, b, g, cu)
    assert made.method == "mixed"
    assert 3 < made.rows_below < 400
    seen = []
    real = torch.ops.megatron_r1.wgrad_dot_
    monkeypatch.setattr(torch.ops.megatron_r1, "wgrad_dot_", lambda *x: seen.append(x[5]) or real(*x))
    wgrad_dot(a, b, g, cu, torch.zeros(48, 64))
    assert seen == [made.rows_below]


# --- Self-check ----------------------------------------------------------------------------------------------------------------


def test_the_self_check_passes_and_can_fail(kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert influence._difference(influence._Csrc, "cpu") is None
    right = influence._Reference.wgrad_dot

    def wrong(a: Tensor, b: Tensor, g: Tensor, cu: Tensor, main_grad: Tensor) -> Tensor:
        scores = right(a, b, g, cu, main_grad)
        scores[2] = 0  # the document of one token
        return scores

    monkeypatch.setattr(influence._Reference, "wgrad_dot", wrong)
    # Its share of the norm is small: the check must still see it.
    assert "scores" in str(influence._difference(influence._Csrc, "cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("name", WGRAD_DOT.names())
@pytest.mark.parametrize(("dtype", "probe_dtype"), [(F32, F32), (BF16, BF16), (BF16, F32), (F16, F16)])
def test_on_a_gpu(name: str, dtype: torch.dtype, probe_dtype: torch.dtype) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    if reason := WGRAD_DOT.reasons("cuda")[name]:
        pytest.skip(reason)
    for lengths in ((*RAGGED, 700, 3), (4,) * 60):
        a, b, g, cu = numbers(lengths, 272, 144, 3, dtype, probe_dtype)
        scores, gradient = exact(a, b, g, cu)
        main_grad = torch.zeros(144, 272, device="cuda")
        ours = wgrad_dot(a.cuda(), b.cuda(), g.cuda(), cu.cuda(), main_grad, name)
        tolerance = 1e-3 if dtype == F32 else 1e-2
        assert off(ours.cpu(), scores) < tolerance
        assert off(main_grad.cpu(), gradient) < tolerance
        again = wgrad_dot(a.cuda(), b.cuda(), g.cuda(), cu, torch.zeros_like(main_grad), name)
        assert torch.equal(again, ours)


def test_the_library_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the library plain torch runs, and says why when csrc is asked for by name."""
    monkeypatch.setattr(extension, "missing", lambda: "it was not built")
    op = Op("influence_without_library")
    op.register("csrc", influence._Csrc.wgrad_dot, influence._csrc_absent)
    op.register("reference", influence._Reference.wgrad_dot)
    assert op.choose("auto", "cpu").name == "reference"
    with pytest.raises(R1Error, match="it was not built"):
        op.choose("csrc", "cpu")
