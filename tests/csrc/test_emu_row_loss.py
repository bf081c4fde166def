"""The row-loss kernels in the emulator against fp64, in several thread orders, under sanitizers, and broken on purpose.

Legend: n rows, V columns.
"""

from __future__ import annotations

import pytest
import torch
from emulator import EmulatorFailed, build, run
from torch import Tensor

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float64: 1e-13}
SIZES = [1, 2, 31, 33, 50, 300, 1029, 2056]  # less than a warp, tails, one warp, several


def inputs(n: int, columns: int, dtype: torch.dtype, teacher: torch.dtype | None, seed: int = 0) -> tuple[Tensor, Tensor | None, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z = (4 * torch.randn(n, columns, generator=generator, dtype=torch.float64)).to(dtype)
    # Rising, so that the running maximum keeps changing.
    z = (z + torch.linspace(-9, 9, columns, dtype=torch.float64)).to(dtype)
    t = None if teacher is None else (4 * torch.randn(n, columns, generator=generator, dtype=torch.float64)).to(teacher)
    return z, t, torch.randint(-1, columns + 1, (n,), generator=generator)


def expected_stats(z: Tensor, t: Tensor | None, inv_t: float, hard: bool) -> Tensor:
    z = z.double()
    top = z.amax(-1, keepdim=True)
    columns = [top[:, 0], ((z - top) * inv_t).exp().sum(-1), (z - top).exp().sum(-1) * hard]
    if t is None:
        return torch.stack([*columns, *[torch.zeros(len(z), dtype=torch.float64)] * 3], -1)
    t = t.double()
    top = t.amax(-1, keepdim=True)
    p = ((t - top) * inv_t).exp()
    return torch.stack([*columns, top[:, 0], p.sum(-1), (p * (t - z) * inv_t).sum(-1)], -1)


def expected_grad(z: Tensor, t: Tensor | None, labels: Tensor | None, numbers: Tensor, inv_t: float, hard: bool) -> Tensor:
    z, top, scale, hard_scale, teacher_top, teacher_scale, pick = z.double(), *numbers.double()[:, :, None].unbind(1)
    d = scale * ((z - top) * inv_t).exp() + hard * hard_scale * (z - top).exp()
    if t is not None:
        d = d - teacher_scale * ((t.double() - teacher_top) * inv_t).exp()
    return d if labels is None else d - pick * (torch.arange(z.shape[1]) == labels[:, None])


def laid_out(x: Tensor, stride: int, offset: int = 0) -> Tensor:
    """x's rows `stride` elements apart, `offset` from the start; NaN between them; nothing behind the last."""
    room = torch.full((offset + (len(x) - 1) * stride + x.shape[1],), torch.nan, dtype=x.dtype)
    room.as_strided(x.shape, (stride, 1), offset).copy_(x)
    return room


def meta(what: int, z: Tensor, t: Tensor | None, hard: bool, labels: bool, z_stride: int, t_stride: int, offset: int) -> list[Tensor]:
    numbers = [what, *z.shape, z_stride, t_stride, TYPES[z.dtype], -1 if t is None else TYPES[t.dtype], int(hard), int(labels), offset]
    return [torch.tensor(numbers)]


def stats(exe, z: Tensor, t: Tensor | None, inv_t: float, hard: bool, gap: int = 0, offset: int = 0, seed: int = 0) -> Tensor:
    stride = z.shape[1] + gap
    arrays = [*meta(0, z, t, hard, False, stride, stride, offset), torch.tensor([inv_t], dtype=torch.float64), laid_out(z, stride, offset)]
    (out,) = run(exe, arrays + ([] if t is None else [laid_out(t, stride)]), seed)
    wide = torch.float64 if z.dtype == torch.float64 else torch.float32
    return torch.frombuffer(out, dtype=wide).view(-1, 6).double()


def grad(exe, z, t, labels, numbers, inv_t: float, hard: bool, gap: int = 0, offset: int = 0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(derivative, everything that was in z's memory)."""
    stride = z.shape[1] + gap
    wide = torch.float64 if z.dtype == torch.float64 else torch.float32
    arrays = [*meta(1, z, t, hard, labels is not None, stride, stride, offset), torch.tensor([inv_t], dtype=torch.float64), laid_out(z, stride, offset)]
    arrays += [x for x in (None if t is None else laid_out(t, stride), labels, numbers.to(wide)) if x is not None]
    (out,) = run(exe, arrays, seed)
    room = torch.frombuffer(out, dtype=z.dtype)
    return room.as_strided(z.shape, (stride, 1), offset).double(), room


def some_numbers(z: Tensor, t: Tensor | None) -> Tensor:
    n = len(z)
    columns = torch.rand(n, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    columns[:, 0] = z.double().amax(-1)
    columns[:, 3] = 0 if t is None else t.double().amax(-1)
    return columns.to(torch.float64 if z.dtype == torch.float64 else torch.float32)


def check_both(exe, columns: int, dtype: torch.dtype, teacher: torch.dtype | None, hard: bool, gap: int = 0, offset: int = 0, seed: int = 0) -> None:
    z, t, labels = inputs(3, columns, dtype, teacher)
    inv_t = 0.5 if hard else 1.0
    exact = ROUNDING[torch.float64 if dtype == torch.float64 else torch.float32]
    torch.testing.assert_close(stats(exe, z, t, inv_t, hard, gap, offset, seed), expected_stats(z, t, inv_t, hard), rtol=5 * exact, atol=5 * exact)
    numbers = some_numbers(z, t)
    made, room = grad(exe, z, t, labels, numbers, inv_t, hard, gap, offset, seed)
    torch.testing.assert_close(made, expected_grad(z, t, labels, numbers, inv_t, hard), rtol=ROUNDING[dtype], atol=4 * exact)
    if gap:  # what lies between the rows is nobody's
        kept = torch.ones(room.shape, dtype=torch.bool)
        kept.as_strided(z.shape, (z.shape[1] + gap, 1), offset).fill_(False)
        assert torch.isnan(room[kept]).all()


@pytest.fixture(scope="module")
def exe():
    return build("row_loss")


@pytest.fixture(scope="module")
def sanitized():
    return build("row_loss", sanitize=True)


@pytest.mark.parametrize("columns", SIZES)
@pytest.mark.parametrize("teacher", [None, torch.float32])
def test_every_width(exe, columns: int, teacher: torch.dtype | None) -> None:
    check_both(exe, columns, torch.float32, teacher, hard=True, seed=columns)
    check_both(exe, columns, torch.float32, teacher, hard=True, gap=-columns % 8 + 8, seed=columns)  # every row at 16 bytes: vector loads


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("teacher", [None, torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_pair_of_types(exe, dtype: torch.dtype, teacher: torch.dtype | None) -> None:
    if teacher is not None and (teacher == torch.float64) != (dtype == torch.float64):
        pytest.skip("fp64 goes with fp64 only; the binding says so")
    check_both(exe, 1032, dtype, teacher, hard=False)


@pytest.mark.parametrize(("gap", "offset"), [(0, 0), (8, 0), (3, 0), (8, 1)], ids=["dense", "aligned", "odd stride", "odd start"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clean_under_sanitizers(sanitized, dtype: torch.dtype, gap: int, offset: int) -> None:
    for columns in (7, 136, 300):
        check_both(sanitized, columns, dtype, torch.bfloat16, hard=True, gap=gap, offset=offset)


def test_no_race() -> None:
    check_both(build("row_loss", races=True), 1029, torch.float32, torch.float32, hard=True, gap=3)


def test_the_same_bits_in_any_thread_order(exe) -> None:
    z, t, _ = inputs(3, 1029, torch.float32, torch.float32)
    first = stats(exe, z, t, 0.5, True, seed=1)
    assert all(torch.equal(first, stats(exe, z, t, 0.5, True, seed=seed)) for seed in (2, 3))


@pytest.mark.parametrize("columns", [40, 1029])
def test_infinities_and_nan(exe, columns: int) -> None:
    z, t, _ = inputs(5, columns, torch.float32, torch.float32)
    z[0, 3:] = -torch.inf  # a few tokens are possible
    t[0, 3:] = -torch.inf
    z[1] = -torch.inf  # none is
    z[2, columns // 2] = torch.nan
    t[3, columns - 1] = torch.nan
    t[4, : columns - 1] = -torch.inf  # certain of the last, which the student holds to be impossible
    z[4, columns - 1] = -torch.inf
    found = stats(exe, z, t, 1.0, True)
    p = torch.softmax(t[0, :3].double(), -1)
    torch.testing.assert_close(found[0, 1], (z[0, :3].double() - z[0].max()).exp().sum())
    torch.testing.assert_close(found[0, 5] / found[0, 4], (p * (t[0, :3] - z[0, :3])).sum())
    assert found[1, 0] == -torch.inf
    assert found[1, 1] == found[1, 2] == 0
    assert torch.isnan(found[2, 1:3]).all()
    assert torch.isnan(found[3, 4])
    assert not torch.isnan(found[3, 1])
    assert found[4, 5] == torch.inf
    numbers = torch.tensor([[0.0, 1, 1, 0, 1, 1]]).repeat(5, 1)
    numbers[:, 0] = z.nan_to_num(nan=-torch.inf).amax(-1)
    numbers[:, 3] = t.nan_to_num(nan=-torch.inf).amax(-1)
    made, _ = grad(exe, z, None, None, numbers, 1.0, False)
    assert torch.equal(made[1], torch.zeros(columns, dtype=torch.float64))
    assert torch.equal(torch.isnan(made), torch.isnan(z))


MUTANTS = {
    "removed barrier": ("  __syncthreads();\n", ""),
    "off-by-one load": ("x[1] = {to_float(z[i])}", "x[1] = {to_float(z[i + 1])}"),
    "no rescaling of the running sum": ("    seen.sum *= exponential((seen.top - most) * inv_t);\n", ""),
    "no rescaling of the teacher's": ("      seen.teacher *= factor;\n", ""),
    "no rescaling when threads join": ("a.sum = a.sum * fall(a.top, top, inv_t) +", "a.sum = a.sum +"),
    "half a warp": ("int step = 16;", "int step = 8;"),
    "the label's neighbour": ("i + j == label", "i + j == label + 1"),
    "one warp too few": ("if (lane < threads / 32)", "if (lane < threads / 32 - 1)"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str) -> None:
    mutant = build("row_loss", sanitize=name == "off-by-one load", mutate={"row_loss/kernel.cuh": MUTANTS[name]})
    caught = 0
    for seed in range(4):
        try:
            check_both(mutant, 1029, torch.float32, torch.float32, hard=True, gap=3, seed=seed)
        except (EmulatorFailed, AssertionError):
            caught += 1
    assert caught > 0
