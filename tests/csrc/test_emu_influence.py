"""The influence kernels for GPUs, run by the emulator: wgrad_dot on Hopper (TMA, wgmma) and what follows the plain path's products.

Shapes: T tokens, K probes, a [T, din], b [T, dout], g [K, dout, din]. The oracle is fp64 on the same rounded inputs. The emulated
wgmma decodes the matrix descriptors and runs whenever the seed says, so layout and waiting are tested, not only sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import emulator
import numpy as np
import pytest
import test_machine_code as machine_code
import torch
from torch import Tensor

CODE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
SOURCE, WRAPPERS = "influence/wgrad_dot_sm90.cuh", "include/mr1/sm90.cuh"


@dataclass(frozen=True)
class Case:
    """One call of wgrad_dot. `multiprocessors`: of the GPU that is played; fewer than tiles means several tiles for each block."""

    lengths: tuple[int, ...]
    din: int = 136
    dout: int = 144
    probes: int = 1
    dtype: torch.dtype = torch.bfloat16
    g_dtype: torch.dtype | None = None
    multiprocessors: int = 3
    padding: int = 0  # elements behind each row of a and b
    main_grad: bool = True
    poison: tuple[int, float] | None = None  # a document, all of whose inputs are this
    a: Tensor = field(init=False, compare=False)
    b: Tensor = field(init=False, compare=False)
    g: Tensor = field(init=False, compare=False)
    before: Tensor = field(init=False, compare=False)
    cu: Tensor = field(init=False, compare=False)

    def __post_init__(self) -> None:
        make = torch.Generator().manual_seed(len(self.lengths) * 1000 + sum(self.lengths))
        starts = [0, *np.cumsum(self.lengths)]
        draw = lambda *shape: torch.randn(*shape, generator=make)  # noqa: E731
        # What lies behind a row must not be read into a sum: NaN.
        a, b = (torch.full((sum(self.lengths), width + self.padding), float("nan")) for width in (self.din, self.dout))
        a[:, : self.din], b[:, : self.dout] = draw(len(a), self.din), draw(len(b), self.dout)
        if self.poison:
            document, value = self.poison
            a[starts[document] : starts[document + 1], : self.din] = value
            b[starts[document] : starts[document + 1], : self.dout] = value
        for name, value in (
            ("a", a.to(self.dtype)),
            ("b", b.to(self.dtype)),
            ("g", draw(self.probes, self.dout, self.din).to(self.g_dtype or self.dtype)),
            ("before", draw(self.dout, self.din)),
            ("cu", torch.tensor(starts, dtype=torch.int32)),
        ):
            object.__setattr__(self, name, value)

    def run(self, exe: Path, seed: int = 0) -> tuple[Tensor, Tensor] | str | None:
        """(scores [n, K], main_grad), what was printed where it failed, or None where the kernel does not take these arguments."""
        n = len(self.lengths)
        numbers = [0, len(self.a), self.din, self.dout, self.probes, n, self.din + self.padding, self.dout + self.padding]
        numbers += [CODE[self.dtype], CODE[self.g.dtype], self.multiprocessors, int(self.main_grad)]
        arrays = [np.array(numbers), *(bits(t) for t in (self.a, self.b, self.g, self.cu, self.before))]
        found = emulator.outcome(exe, arrays, seed, [np.int64, np.float32, np.float32])
        if isinstance(found, str):
            return found
        supported, scores, grad = found
        return (torch.from_numpy(scores).view(n, self.probes), torch.from_numpy(grad).view(self.dout, self.din)) if supported[0] else None

    def expected(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Scores and gradient in fp64, and how large an error of each counts as 1."""
        a, b, g = self.a[:, : self.din].double(), self.b[:, : self.dout].double(), self.g.double()
        scores, score_unit = torch.zeros(len(self.lengths), self.probes, dtype=torch.float64), torch.zeros(len(self.lengths), self.probes, dtype=torch.float64)
        grad = self.before.double().clone()
        for d, (start, end) in enumerate(zip(self.cu[:-1].tolist(), self.cu[1:].tolist())):
            part = b[start:end].T @ a[start:end]
            scores[d] = (g * part).sum((1, 2))
            score_unit[d] = g.flatten(1).norm(dim=1) * part.norm()
            grad += part
        if not self.main_grad:
            grad = self.before.double()
        return scores, grad, score_unit, b.abs().T @ a.abs() + self.before.double().abs()

    def wrong(self, exe: Path, seed: int = 0) -> str | None:
        """What is wrong with a run: None, or a sentence. fp32 sums: errors of 1e-6 of what was summed. NaN must meet NaN, and only NaN."""
        found = self.run(exe, seed)
        if not isinstance(found, tuple):
            return found or "not supported"
        scores, grad, score_unit, grad_unit = self.expected()
        for name, got, want, unit in (("scores", found[0], scores, score_unit), ("main_grad", found[1], grad, grad_unit)):
            close = (got.double() - want).abs() <= 1e-6 * unit
            same = close | (got.isnan() & want.isnan()) | (got.double() == want)
            if not same.all():
                return f"{name}: {int((~same).sum())} of {same.numel()} wrong, first at {(~same).nonzero()[0].tolist()}"
        return None


def bits(t: Tensor) -> np.ndarray:
    t = t.contiguous()
    return (t.view(torch.int16) if t.dtype in (torch.bfloat16, torch.float16) else t).numpy()


@pytest.fixture(scope="session")
def exe() -> Path:
    return emulator.build("influence")


# Boundaries around a step of 16 tokens and a stage of 64; documents shorter than a step; empty ones in every place.
CASES = {
    "one stage": Case((64,), 128, 128, multiprocessors=1),
    "one token": Case((1,), 128, 128),
    "around 16": Case((0, 15, 16, 17, 1, 0, 33, 0), 128, 136),
    "around 64": Case((63, 64, 65, 2), 136, 128),
    "round the ring many times": Case((200, 190), 128, 128, multiprocessors=1),
    "edges, two probes": Case((16, 15, 17, 0, 1, 70, 81), 272, 136, probes=2, dtype=torch.float16),
    "probes in fp32": Case((40, 50), 200, 144, g_dtype=torch.float32),
    "probes that do not fit shared memory": Case((70, 20), 144, 136, probes=4),
    "fp32 probes that do not fit": Case((20, 70), 144, 136, probes=2, dtype=torch.float16, g_dtype=torch.float32),
    "rows that are not packed": Case((30, 41), 136, 144, padding=8),
    "narrow": Case((10, 20), 8, 24),
    "two columns more than a tile": Case((10, 20), 130, 130, padding=6),
    # 4 tiles on 13 multiprocessors: all are cut in three parts, two documents lie in two parts each.
    "cut along the tokens": Case((300, 3, 0, 297, 200), 144, 136, multiprocessors=13),
    # 4 tiles on 3: three tiles whole, the last in parts.
    "the last round is cut": Case((300, 3, 0, 297, 200), 144, 136, probes=2, multiprocessors=3),
    "scores only": Case((300, 3, 0, 297, 200), 144, 136, multiprocessors=13, main_grad=False),
    "thirteen rows of tiles": Case((20, 7), 128, 12 * 128 + 16, multiprocessors=5),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", CASES)
def test_scores_and_gradient(exe: Path, name: str, seed: int) -> None:
    assert CASES[name].wrong(exe, seed) is None


def test_random_documents(exe: Path) -> None:
    """Many ways to cut 150 tokens, one tile, any seed."""
    rng = np.random.default_rng(5)
    for seed in range(20):
        cuts = np.sort(rng.integers(0, 151, rng.integers(0, 12)))
        lengths = tuple(np.diff([0, *cuts, 150]).tolist())
        assert Case(lengths, 64, 32).wrong(exe, seed) is None, lengths


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("document", [0, 2, 3])
def test_poison_stays_in_its_document(exe: Path, document: int, value: float) -> None:
    """Neighbours share steps and stages with it, and 0 times NaN is NaN: their scores must be clean."""
    case = Case((21, 3, 18, 40), 136, 136, probes=2, poison=(document, value))
    assert case.wrong(exe, document) is None
    found = case.run(exe)
    assert isinstance(found, tuple)
    assert [bool(row.isfinite().all()) for row in found[0]] == [d != document for d in range(4)]


def test_infinity_outside_the_matrix(exe: Path) -> None:
    """Rows beyond dout arrive as zeros and meet an infinity of a: NaN there, but the score is infinite, not NaN."""
    case = Case((5, 6), 128, 120)
    case.a[2, 7] = float("inf")
    case.g[0, :, 7] = case.b[2].sign().float().to(case.g.dtype)
    case.g[0, :, 7][case.b[2] == 0] = 1
    found = case.run(exe)
    assert isinstance(found, tuple)
    assert found[0][0, 0] == float("inf")
    assert found[0][1, 0].isfinite()


def test_same_bits_in_every_order(exe: Path) -> None:
    case = CASES["the last round is cut"]
    first = case.run(exe, 0)
    assert isinstance(first, tuple)
    for seed in range(1, 5):
        again = case.run(exe, seed)
        assert isinstance(again, tuple)
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])


@pytest.mark.parametrize("lengths", [(0,), (0, 0, 0)])
def test_no_tokens(exe: Path, lengths: tuple[int, ...]) -> None:
    case = Case(lengths, 16, 16, probes=2)
    found = case.run(exe)
    assert isinstance(found, tuple)
    assert torch.equal(found[0], torch.zeros(len(lengths), 2))
    assert torch.equal(found[1], case.before)


@pytest.mark.parametrize(
    "case",
    [
        Case((5,), 129, 128, padding=7),  # an odd width
        Case((5,), 132, 128),  # rows that start at 8 bytes, TMA needs 16
        Case((5,), 128, 132),
        Case((5,), 128, 128, dtype=torch.float32),
        Case((5,), 128, 128, g_dtype=torch.float16),  # neither a's nor fp32
    ],
)
def test_refuses(exe: Path, case: Case) -> None:
    """False from wgrad_dot_sm90_supported, and a call all the same launches nothing."""
    assert case.run(exe) is None


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sanitize", "races"])
@pytest.mark.parametrize("name", ["around 16", "edges, two probes", "fp32 probes that do not fit", "rows that are not packed", "the last round is cut"])
def test_instrumented(kind: str, name: str) -> None:
    """No access outside the arrays, none misaligned, none that another is not ordered with."""
    assert CASES[name].wrong(emulator.build("influence", **{kind: True}), 1) is None


TAILS = Case((70, 17, 30, 81), 64, 64)
NEIGHBOUR = replace(TAILS, poison=(1, float("nan")))
LONG = Case((400, 100), 64, 64)
CUT = CASES["cut along the tokens"]
# name: (old, new, the case that shows it). What each would be on a GPU: see the kernel.
MUTANTS: dict[str, tuple[str, str, Case]] = {
    "tails are not zeroed": ("if (tokens < kStepTokens) {", "if (false) {", TAILS),
    "only one operand's tail is zeroed": ("piece < 2 * (kTile / 64) * pieces", "piece < (kTile / 64) * pieces", NEIGHBOUR),
    "one token too many": ("const int tokens = to - t;", "const int tokens = to - t + 1;", TAILS),
    "one token too few": ("const int tokens = to - t;", "const int tokens = to - t - 1;", Case((17, 30), 64, 64)),
    "zeros without a proxy fence": ("sm90::fence_proxy_async();", "", TAILS),
    "zeros without a barrier": ("bar_sync(1, kConsumerThreads);", "", TAILS),
    "a stage is refilled before it is released": ("sm90::barrier_wait(empty + stage, phase ^ 1);", "", LONG),
    "a stage is released before its product has ended": ("sm90::wgmma_wait<1>(document);", "", LONG),
    "a stage is used before it is full": ("sm90::barrier_wait(full + stage, phase);", "", LONG),
    "accumulators are read before the product has ended": ("sm90::wgmma_wait<0>(document);", "", TAILS),
    "leading offset": ("(kTile / 64) * kChunkBytes, kChunkBytes, 1024)", "(kTile / 64) * kChunkBytes, 1024, 1024)", CASES["one stage"]),
    "stride offset": ("(kTile / 64) * kChunkBytes, kChunkBytes, 1024)", "(kTile / 64) * kChunkBytes, kChunkBytes, 2048)", CASES["one stage"]),
    "stride offset of the other operand": ("group * kChunkBytes, kChunkBytes, 1024)", "group * kChunkBytes, kChunkBytes, 128)", CASES["one stage"]),
    "step along the tokens": ("kTokensStep = (16 * 128) >> 4", "kTokensStep = (8 * 128) >> 4", CASES["one stage"]),
    "columns of a fragment": ("(int thread, int i) { return i / 4 * 8 + thread % 4 * 2", "(int thread, int i) { return i / 4 * 8 + thread % 4", CASES["one stage"]),
    "the total is overwritten": ("total[i] += document[i];", "total[i] = document[i];", TAILS),
    "a document starts from the one before": ("kStageStep, t != from);", "kStageStep, true);", TAILS),
    "the ring's phase never flips": ("stage = 0, phase ^= 1;\n          }\n        }\n      }", "stage = 0;\n          }\n        }\n      }", LONG),
    "probes are used before they have come": ("sm90::copy_wait();\n        for (int k", "\n        for (int k", TAILS),
    "parts after the first are forgotten": ("for (int part = 1;", "for (int part = 2;", CUT),
    "a document across two parts counts once": ("((to - 1) / plan.part_tokens + 1)", "(from / plan.part_tokens + 1)", CUT),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name: str) -> None:
    """Each of these breaks the kernel in one place, and some seed must show it."""
    old, new, case = MUTANTS[name]
    mutant = emulator.build("wgrad_dot", mutate={WRAPPERS if "(int thread" in old else SOURCE: (old, new)})
    assert case.wrong(emulator.build("wgrad_dot")) is None
    assert any(case.wrong(mutant, seed) for seed in range(8))


def plain(exe: Path, numbers: Sequence[int], arrays: Sequence[Tensor], dtypes: Sequence[object]) -> list[Tensor]:
    found = emulator.run(exe, [np.array(numbers), *(bits(t) for t in arrays)], seed=3, dtypes=dtypes)
    assert isinstance(found, list)
    return [torch.from_numpy(x) for x in found]


@pytest.mark.parametrize("main_grad", [True, False])
@pytest.mark.parametrize("g_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("rows", "cols", "probes"), [(1, 1, 1), (33, 128, 2), (7, 1501, 3), (70, 120, 1)])
def test_add_and_dot(exe: Path, rows: int, cols: int, probes: int, g_dtype: torch.dtype, main_grad: bool) -> None:
    """main_grad += block, scores += <block, probe>, in one pass, over several thread blocks, with and without 16-byte accesses."""
    dtype = torch.float64 if g_dtype == torch.float64 else torch.float32
    make = torch.Generator().manual_seed(rows)
    block, before, scores = (torch.randn(*shape, generator=make, dtype=torch.float64).to(dtype) for shape in ((rows, cols), (rows, cols), (probes,)))
    g = torch.randn(probes, rows, cols, generator=make).to(g_dtype)
    wide = np.float64 if dtype == torch.float64 else np.float32
    after, found = plain(exe, [1, rows, cols, probes, CODE[dtype], CODE[g_dtype], int(main_grad)], [block, g, before, scores], [wide, wide])
    expected = scores.double() + (g.double() * block.double()).sum((1, 2))
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    assert torch.equal(after.view(rows, cols), before + block if main_grad else before)
    assert ((found.double() - expected).abs() <= tolerance * (scores.double().abs() + g.double().flatten(1).norm(dim=1) * block.double().norm())).all()


@pytest.mark.parametrize(
    ("x_dtype", "y_dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float16, torch.float16), (torch.float16, torch.float32), (torch.float64, torch.float64)],
)
@pytest.mark.parametrize(("lengths", "width", "stride"), [((3, 0, 1, 300), 40, 1), ((9,), 33, 3), ((0, 0), 8, 1)])
def test_row_dot(exe: Path, lengths: tuple[int, ...], width: int, stride: int, x_dtype: torch.dtype, y_dtype: torch.dtype) -> None:
    """scores[d] = sum over the rows of document d of <x, y>; nothing between the scores is written."""
    tokens, n = sum(lengths), len(lengths)
    make = torch.Generator().manual_seed(tokens)
    x, y = (torch.randn(tokens, width, generator=make, dtype=torch.float64).to(t) for t in (x_dtype, y_dtype))
    out = torch.float64 if x_dtype == torch.float64 else torch.float32
    scores = torch.full((n * stride,), 7.0, dtype=out)
    cu = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    (found,) = plain(exe, [2, tokens, width, n, CODE[x_dtype], CODE[y_dtype], stride], [x, y, cu, scores], [np.float64 if out == torch.float64 else np.float32])
    rows = (x.double() * y.double()).sum(1)
    expected = torch.stack([part.sum() for part in rows.split(lengths)])
    unit = torch.stack([part.abs().sum() for part in (x.double() * y.double()).abs().sum(1).split(lengths)])
    assert ((found[::stride].double() - expected).abs() <= (1e-14 if out == torch.float64 else 1e-6) * unit).all()
    untouched = torch.ones(n * stride, dtype=torch.bool)
    untouched[::stride] = False
    assert (found[untouched] == 7).all()


def test_products_are_not_run_one_by_one() -> None:
    """ptxas may wait after every wgmma (its warnings C7510, C7515) when it sees accumulators touched in between: correct, and slow."""
    kernels = [k for k in machine_code.room("influence") if "wgrad_dot_kernel" in k.name and k.architecture == machine_code.SM90]
    assert kernels
    for kernel in kernels:
        order = [code.split(".")[0 if code.startswith("HGMMA") else 1] for code in kernel.opcodes if code.startswith(("HGMMA", "WARPGROUP"))]
        # One fence, the four products of a stage, the wait for the stage before, the wait at the document's end.
        assert order == ["ARRIVE", *["HGMMA"] * 4, "DEPBAR", "DEPBAR"], kernel.name
