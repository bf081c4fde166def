"""The two row kernels against fp64, every implementation of them: types, strides, infinities, threads, and misuse.

Legend: c rows, V columns.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_r1.ops import extension
from megatron_r1.ops.softmax_rows import (
    CROSS,
    HARD_SUM,
    ROW_STATS,
    SOFTMAX_GRAD,
    SUM,
    TEACHER_SUM,
    TEACHER_TOP,
    TOP,
    numbers,
    row_stats,
    softmax_grad_,
)

IMPLEMENTATIONS = ["csrc", "plain", "reference"]
TYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# One rounding to the type, relative.
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float64: 1e-14}


def need_compiled() -> None:
    if reason := ROW_STATS.reasons("cpu")["csrc"]:
        pytest.skip(reason)


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "csrc":
        need_compiled()
    monkeypatch.setenv("MEGATRON_R1_OPS", f"row_stats={request.param},softmax_grad={request.param}")
    assert ROW_STATS.choose().name == SOFTMAX_GRAD.choose().name == request.param
    return request.param


def rows(c: int, columns: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return (4 * torch.randn(c, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


def exact_stats(z: Tensor, t: Tensor | None, inv_t: float, hard: bool) -> Tensor:
    z = z.double()
    out = torch.zeros(len(z), 6, dtype=torch.float64)
    out[:, TOP] = z.amax(-1)
    out[:, SUM] = ((z - z.amax(-1, True)) * inv_t).exp().sum(-1)
    if hard:
        out[:, HARD_SUM] = (z - z.amax(-1, True)).exp().sum(-1)
    if t is not None:
        t = t.double()
        p = ((t - t.amax(-1, True)) * inv_t).exp()
        out[:, TEACHER_TOP], out[:, TEACHER_SUM], out[:, CROSS] = t.amax(-1), p.sum(-1), (p * (t - z) * inv_t).sum(-1)
    return out


def exact_grad(z: Tensor, given: Tensor, t: Tensor | None, labels: Tensor | None, inv_t: float, hard: bool) -> Tensor:
    z, top, scale, hard_scale, teacher_top, teacher_scale, pick = z.double(), *given.double()[:, :, None].unbind(1)
    d = scale * ((z - top) * inv_t).exp() + hard * hard_scale * (z - top).exp()
    if t is not None:
        d = d - teacher_scale * ((t.double() - teacher_top) * inv_t).exp()
    return d if labels is None else d - pick * (torch.arange(z.shape[1]) == labels[:, None])


def some_numbers(z: Tensor, t: Tensor | None) -> Tensor:
    given = torch.rand(len(z), 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    given[:, 0] = z.double().amax(-1)
    given[:, 3] = 0 if t is None else t.double().amax(-1)
    return given.to(torch.float64 if z.dtype == torch.float64 else torch.float32)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("columns", [1, 2, 15, 16, 17, 50, 1023, 1024, 1025, 5000])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("teacher", "inv_t", "hard"), [(False, 1.0, False), (True, 1.0, False), (True, 0.5, True), (False, 2.0, True)])
def test_against_fp64(columns: int, dtype: torch.dtype, teacher: bool, inv_t: float, hard: bool) -> None:
    z, t = rows(3, columns, dtype), rows(3, columns, dtype, 1) if teacher else None
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    before = z.clone()
    found = row_stats(z, t, inv_t, hard)
    assert found.dtype == wide
    assert torch.equal(z, before)
    torch.testing.assert_close(found.double(), exact_stats(z, t, inv_t, hard), rtol=5 * ROUNDING[wide], atol=20 * ROUNDING[wide])
    given, labels = some_numbers(z, t), torch.tensor([0, columns - 1, columns])
    softmax_grad_(z, given, t, labels, inv_t, hard)
    torch.testing.assert_close(z.double(), exact_grad(before, given, t, labels, inv_t, hard), rtol=2 * ROUNDING[dtype], atol=3 * ROUNDING[wide])


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("dtype", TYPES[:3])
@pytest.mark.parametrize("teacher", TYPES[:3])
def test_teachers_of_another_type(dtype: torch.dtype, teacher: torch.dtype) -> None:
    z, t = rows(4, 333, dtype), rows(4, 333, teacher, 1)
    torch.testing.assert_close(row_stats(z, t).double(), exact_stats(z, t, 1.0, False), rtol=5e-6, atol=2e-5)
    given, before = some_numbers(z, t), z.clone()
    softmax_grad_(z, given, t)
    torch.testing.assert_close(z.double(), exact_grad(before, given, t, None, 1.0, False), rtol=2 * ROUNDING[dtype], atol=3e-6)


@pytest.mark.usefixtures("implementation")
def test_rows_of_a_wider_tensor() -> None:
    wide, wider = rows(5, 80), rows(5, 100, seed=1)
    z, t, copy = wide[:, 7:60], wider[:, 3:56], wide.clone()
    torch.testing.assert_close(row_stats(z, t), row_stats(z.clone(), t.clone()), rtol=0, atol=0)
    given = some_numbers(z, t)
    expected = exact_grad(z, given, t, torch.arange(5), 1.0, False)
    softmax_grad_(z, given, t, torch.arange(5))
    torch.testing.assert_close(z.double(), expected, rtol=1e-5, atol=3e-6)
    assert torch.equal(wide[:, :7], copy[:, :7])
    assert torch.equal(wide[:, 60:], copy[:, 60:])


@pytest.mark.usefixtures("implementation")
def test_no_rows() -> None:
    z = torch.empty(0, 7)
    assert row_stats(z, z.clone(), 0.5, True).shape == (0, 6)
    softmax_grad_(z, torch.empty(0, 6), z.clone(), torch.empty(0, dtype=torch.int64))


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("columns", [5, 40, 3000])
def test_infinities_and_nan(columns: int) -> None:
    z, t = rows(6, columns), rows(6, columns, seed=1)
    z[0, 3:] = t[0, 3:] = -torch.inf
    z[1] = -torch.inf
    z[2, columns - 1] = torch.nan
    t[3, 0] = torch.nan
    t[4, : columns - 1] = z[4, columns - 1] = -torch.inf
    z[5, 1] = torch.inf
    found = row_stats(z, t, 1.0, True)
    torch.testing.assert_close(found[:1, :].double(), exact_stats(z[:1, :3], t[:1, :3], 1.0, True), rtol=1e-5, atol=1e-5)
    assert found[1, TOP] == -torch.inf
    assert found[2, SUM].isnan()
    assert found[2, HARD_SUM].isnan()
    assert found[3, TEACHER_SUM].isnan()
    assert found[3, SUM].isfinite()
    assert found[4, CROSS] == torch.inf
    assert found[5, SUM].isnan()
    given = some_numbers(z.nan_to_num(nan=0.0, posinf=0.0, neginf=-torch.inf), None)
    nan = z.isnan()
    z[5, 1] = 0.0
    softmax_grad_(z, given)
    assert torch.equal(z[1], torch.zeros(columns))
    assert torch.equal(z[0, 3:], torch.zeros(columns - 3))
    assert torch.equal(z.isnan(), nan)


def test_exponentials_are_accurate() -> None:
    """Every step of 1e-5 from 0 to -87 and what lies beyond, one by one through a row of two columns."""
    need_compiled()
    x = torch.cat([-torch.arange(0, 87, 1e-5, dtype=torch.float64).float(), torch.linspace(-2e-4, 0, 5000)])
    z = torch.stack([torch.zeros_like(x), x], 1)
    given = torch.zeros(len(x), 6)
    given[:, 1] = 1.0
    torch.ops.megatron_r1.softmax_grad_(z, given, None, None, 1.0, False)
    exact = x.double().exp()
    assert ((z[:, 1].double() - exact) / exact).abs().max() < 1.2e-7
    assert (z[:, 0] == 1).all()
    beyond = torch.tensor([[0.0, -87.01, -88.0, -100.0, -104.0, -1e4, -3e38, -torch.inf]])
    torch.ops.megatron_r1.softmax_grad_(beyond, given[:1].clone(), None, None, 1.0, False)
    assert torch.equal(beyond, torch.tensor([[1.0] + [0.0] * 7])), "no subnormal numbers"


def test_no_less_accurate_than_plain_torch() -> None:
    need_compiled()
    for columns in (8192, 128256):
        z, t = rows(32, columns), rows(32, columns, seed=1)
        truth = exact_stats(z, t, 1.0, False)
        ours, plain = (((ROW_STATS.choose(name).run(z, t, 1.0, False).double() - truth) ** 2).sum(0) for name in ("csrc", "plain"))
        assert (ours <= 4 * plain).all(), (ours, plain)  # of squares
        given = some_numbers(z, t)
        truth = exact_grad(z, given, t, None, 1.0, False)
        made = []
        for name in ("csrc", "plain"):
            made.append(z.clone())
            SOFTMAX_GRAD.choose(name).run(made[-1], given, t, None, 1.0, False)
        error = [torch.linalg.vector_norm(d.double() - truth) for d in made]
        assert error[0] <= 2 * error[1]


@pytest.mark.parametrize("dtype", TYPES)
def test_the_same_bits_whatever_the_threads(dtype: torch.dtype) -> None:
    need_compiled()
    z, t = rows(40, 3001, dtype), rows(40, 3001, dtype, 1)
    given = some_numbers(z, t)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            made = z.clone()
            torch.ops.megatron_r1.softmax_grad_(made, given, t, torch.arange(40), 0.5, True)
            results.append((torch.ops.megatron_r1.row_stats(z, t, 0.5, True), made))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("teacher", [False, True])
def test_opcheck(dtype: torch.dtype, teacher: bool) -> None:
    need_compiled()
    z, t = rows(3, 20, dtype), rows(3, 20, dtype, 1) if teacher else None
    torch.library.opcheck(torch.ops.megatron_r1.row_stats.default, (z, t, 0.5, True))
    torch.library.opcheck(torch.ops.megatron_r1.softmax_grad_.default, (z, some_numbers(z, t), t, torch.arange(3), 0.5, True))


def test_inside_a_compiled_function() -> None:
    need_compiled()

    def loss_and_derivative(z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        z = z * 2
        stats = torch.ops.megatron_r1.row_stats(z, None, 1.0, False)
        loss = stats[:, SUM].log() + stats[:, TOP] - z.gather(-1, labels[:, None]).squeeze(-1)
        torch.ops.megatron_r1.softmax_grad_(z, numbers(stats[:, TOP], 1 / stats[:, SUM], pick=torch.ones_like(loss)), None, labels, 1.0, False)
        return loss, z + 1

    z, labels = rows(4, 30), torch.arange(4)
    compiled = torch.compile(loss_and_derivative, fullgraph=True, backend="aot_eager")
    for found, expected in zip(compiled(z.clone(), labels), loss_and_derivative(z.clone(), labels)):
        torch.testing.assert_close(found, expected)
    wide = (2 * z.double()).requires_grad_()
    exact = torch.nn.functional.cross_entropy(wide, labels, reduction="none")
    (grad,) = torch.autograd.grad(exact.sum(), wide)
    for found, expected in zip(compiled(z.clone(), labels), (exact.detach(), grad + 1)):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


MISUSE = [
    ("z", lambda z, n, t, y: (z[0], n, t, y)),
    ("teacher", lambda z, n, t, y: (z, n, t[:, 1:], y)),
    ("numbers", lambda z, n, t, y: (z, n[:, :5].contiguous(), t, y)),
    ("labels", lambda z, n, t, y: (z, n, t, y.int())),
    ("z", lambda z, n, t, y: (z.long(), n, t, y)),
    ("z", lambda z, n, t, y: (z.t().contiguous().t(), n, t, y)),
    ("z", lambda z, n, t, y: (z[:1].expand(3, -1), n, t, y)),
    ("z", lambda z, n, t, y: (z[:, :0], n, None, y)),
    ("teacher", lambda z, n, t, y: (z, n, t.double(), y)),
    ("teacher", lambda z, n, t, y: (z, n, t[:2], y)),
    ("teacher", lambda z, n, t, y: (z, n, t.t().contiguous().t(), y)),
    ("numbers", lambda z, n, t, y: (z, n.double(), t, y)),
    ("numbers", lambda z, n, t, y: (z, n[:2], t, y)),
    ("numbers", lambda z, n, t, y: (z, n.t().contiguous().t(), t, y)),
    ("labels", lambda z, n, t, y: (z, n, t, y[:2])),
    ("labels", lambda z, n, t, y: (z, n, t, y[:, None])),
]


@pytest.mark.parametrize(("argument", "spoil"), MISUSE)
def test_misuse_names_the_argument(argument: str, spoil) -> None:
    need_compiled()
    z, t = rows(3, 8), rows(3, 8, seed=1)
    arguments = spoil(z, some_numbers(z, t), t, torch.arange(3))
    with pytest.raises(RuntimeError, match=f"(?s)expected: {argument}: .*found: .*do: "):
        torch.ops.megatron_r1.softmax_grad_(*arguments, 1.0, False)
    if argument in ("z", "teacher") and arguments[0].stride(0) != 0:  # reading overlapping rows is fine
        with pytest.raises(RuntimeError, match=f"(?s)expected: {argument}: .*found: .*do: "):
            torch.ops.megatron_r1.row_stats(arguments[0], arguments[2], 1.0, False)


@pytest.mark.parametrize("inv_temperature", [0.0, -1.0, float("inf"), float("nan")])
def test_temperatures_that_are_none(inv_temperature: float) -> None:
    need_compiled()
    with pytest.raises(RuntimeError, match="inv_temperature"):
        torch.ops.megatron_r1.row_stats(rows(2, 3), None, inv_temperature, False)


def test_a_library_without_these_kernels_is_said_to_be_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "missing", lambda: "it is not there")
    assert ROW_STATS.reasons("cpu")["csrc"] == "it is not there"
    assert ROW_STATS.reasons("cpu")["plain"] is None


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    assert ROW_STATS.reasons("cuda")["csrc"] is None
    for dtype in TYPES:
        z, t = rows(7, 8200, dtype), rows(7, 8200, dtype, 1)
        given, labels, made = some_numbers(z, t), torch.arange(7), z.cuda()
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        torch.testing.assert_close(row_stats(made, t.cuda(), 0.5, True).cpu().double(), exact_stats(z, t, 0.5, True), rtol=5e-6, atol=2e-5)
        softmax_grad_(made, given.cuda(), t.cuda(), labels.cuda(), 0.5, True)
        expected = exact_grad(z, given, t, labels, 0.5, True)
        torch.testing.assert_close(made.cpu().double(), expected, rtol=2 * ROUNDING[dtype], atol=3 * ROUNDING[wide])
