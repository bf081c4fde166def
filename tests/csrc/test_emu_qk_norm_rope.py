"""The CUDA kernels of qk_norm_rope, run on a CPU by the emulator: forward and backward against fp64, and mutants."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from emulator import CSRC, build, outcome, run

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
# Of the largest entry: fp32 sums in another order; one rounding to the type (2^-9, 2^-12) with room for a step beside it.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float64: 1e-13}
P = 23  # rows of the table


@dataclass(frozen=True)
class Case:
    """One call. `gap`: unused elements between tokens; `at`: element qkv begins at; `blocks`: how many run at once."""

    dtype: torch.dtype = torch.bfloat16
    s: int = 5
    b: int = 2
    nq: int = 4
    nkv: int = 2
    h: int = 64
    half: int | None = None
    norm: int = 1
    interleaved: bool = True
    grouped: bool = True
    parity: bool = False
    weights: str = ""  # "q", "k", "qk"; with "32" behind: fp32 whatever the type
    gap: int = 0
    at: int = 0
    blocks: int = 2
    broadcast: bool = False
    vectors: bool = True  # expected: the kernel of 16-byte accesses
    eps: float = 1e-3


def tensors(c: Case) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(5)
    half = c.h // 2 if c.half is None else c.half
    wide = torch.float64 if c.dtype == torch.float64 else torch.float32
    weight_type = wide if "32" in c.weights else c.dtype
    angle = torch.rand(P, half, generator=g, dtype=torch.float64) * 6
    return {
        "buffer": torch.randn(c.at + c.s * c.b * ((c.nq + 2 * c.nkv) * c.h + c.gap), generator=g).to(c.dtype),
        "q_weight": (torch.rand(c.h, generator=g) + 0.5).to(weight_type),
        "k_weight": (torch.randn(c.h, generator=g)).to(weight_type),
        "cos": angle.cos().to(wide),
        "sin": angle.sin().to(wide),
        "positions": torch.randint(0, P, (c.s,) if c.broadcast else (c.s, c.b), generator=g),
        "dq": torch.randn(c.s, c.b, c.nq, c.h, generator=g).to(c.dtype),
        # As attention hands them out: heads before tokens.
        "dk": torch.randn(c.b, c.nkv, c.s, c.h, generator=g).to(c.dtype).permute(2, 0, 1, 3),
        "dv": torch.randn(c.b, c.nkv, c.s, c.h, generator=g).to(c.dtype).permute(2, 0, 1, 3),
    }


def arrays(c: Case, t: dict[str, torch.Tensor], backward: bool) -> list[object]:
    row = (c.nq + 2 * c.nkv) * c.h + c.gap
    groups = c.nkv if c.grouped else 1
    strides = [x for name in ("dq", "dk", "dv") for x in t[name].stride()[:3]]
    numbers = [
        TYPES[c.dtype], c.s, c.b, groups, c.nq // groups, c.nkv // groups, c.h, c.b * row, row, P, t["cos"].shape[1],
        *((1, 0) if c.broadcast else (c.b, 1)), c.norm, c.interleaved, c.parity, backward, c.blocks, c.at,
        "q" in c.weights, "k" in c.weights, "32" in c.weights and c.dtype != torch.float64, *strides,
    ]  # fmt: skip
    flat = {name: x.permute(1, 2, 0, 3) if name in ("dk", "dv") else x for name, x in t.items()}
    out = [np.array(numbers, np.int64), np.array([c.eps]), flat["buffer"], flat["q_weight"], flat["k_weight"], flat["cos"], flat["sin"], flat["positions"]]
    return out + [flat[name] for name in ("dq", "dk", "dv")] * backward


def expected(c: Case, t: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """fp64 and automatic derivatives."""
    x = t["buffer"][c.at :].double().view(c.s, c.b, (c.nq + 2 * c.nkv) * c.h + c.gap)[..., : (c.nq + 2 * c.nkv) * c.h].clone().requires_grad_()
    weights = {name: t[name].double().requires_grad_() for name in ("q_weight", "k_weight")}
    if c.grouped:
        heads = x.view(c.s, c.b, c.nkv, c.nq // c.nkv + 2, c.h)
        q, k, v = heads[..., :-2, :].reshape(c.s, c.b, c.nq, c.h), heads[..., -2, :], heads[..., -1, :]
    else:
        q, k, v = x.view(c.s, c.b, c.nq + 2 * c.nkv, c.h).split([c.nq, c.nkv, c.nkv], 2)
    at = t["positions"][:, None] if c.broadcast else t["positions"]
    cos, sin = t["cos"].double()[at][:, :, None], t["sin"].double()[at][:, :, None]
    rot = 2 * cos.shape[-1]

    def one(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        if c.norm:
            x = x / torch.sqrt((x * x).sum(-1, keepdim=True) / (c.h if c.norm == 1 else 1) + c.eps)
        if weight is not None:
            x = x * weight
        first, second = (slice(0, rot, 2), slice(1, rot, 2)) if c.interleaved else (slice(0, rot // 2), slice(rot // 2, rot))
        y = x.clone()
        y[..., first] = x[..., first] * cos - x[..., second] * sin
        y[..., second] = x[..., first] * sin + x[..., second] * cos
        return y

    q, k = one(q, weights["q_weight"] if "q" in c.weights else None), one(k, weights["k_weight"] if "k" in c.weights else None)
    torch.autograd.backward([q, k, v], [t[name].double() for name in ("dq", "dk", "dv")])
    return {"q": q.detach(), "k": k.detach(), "dqkv": x.grad, "dq_weight": weights["q_weight"].grad, "dk_weight": weights["k_weight"].grad}


def to_torch(raw: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(raw).view(dtype) if len(raw) else torch.empty(0, dtype=dtype)


def check(c: Case, exe: Path, seeds: tuple[int, ...]) -> None:
    t = tensors(c)
    right = expected(c, t)
    wide = torch.float64 if c.dtype == torch.float64 else torch.float32
    for backward in (False, True):
        results = [run(exe, arrays(c, t, backward), seed=seed) for seed in seeds]
        for other in results[1:]:
            assert all(np.array_equal(x, y) for x, y in zip(results[0], other)), "other bits in another thread order"
        which, *rest = results[0]
        assert bool(which.view(np.int64)[0]) == c.vectors
        names = ("dqkv", "dq_weight", "dk_weight") if backward else ("q", "k")
        for name, raw in zip(names, rest):
            given = "weight" not in name or name[1] in c.weights
            y = to_torch(raw, wide if "weight" in name else c.dtype).double()
            assert y.numel() == (right[name].numel() if given else 0)
            if given and y.numel():
                error = (y.view(right[name].shape) - right[name]).abs().max() / right[name].abs().max().clamp_min(1e-30)
                assert error <= (4 * TOLERANCE[wide] if "weight" in name else TOLERANCE[c.dtype]), f"{name} is off by {error}"


CASES = {
    f"{str(dtype)[6:]} {h} {'pairs' if interleaved else 'split'} {'grouped' if grouped else 'flat'}": Case(
        dtype=dtype, h=h, interleaved=interleaved, grouped=grouped, weights=weights, norm=norm, broadcast=not grouped
    )
    for dtype, h, interleaved, grouped, weights, norm in [
        (torch.bfloat16, 64, True, True, "", 1),
        (torch.bfloat16, 64, False, True, "qk32", 1),
        (torch.bfloat16, 128, True, False, "qk", 2),
        (torch.bfloat16, 128, False, False, "", 0),
        (torch.float16, 64, False, False, "k", 1),
        (torch.float16, 128, True, True, "q32", 1),
        (torch.float32, 64, True, False, "qk", 1),
        (torch.float32, 128, False, True, "qk", 1),
        (torch.float32, 64, False, True, "", 2),
        (torch.float32, 128, True, True, "", 1),
    ]
} | {
    "one token": Case(s=1, b=1, weights="qk"),
    "no token": Case(s=0, weights="qk"),
    "no row": Case(b=0),
    "ragged, many blocks": Case(s=13, b=3, weights="qk32", blocks=7),
    "ragged, one block": Case(s=29, b=1, h=64, blocks=1, weights="q", dtype=torch.float32),
    "one head each": Case(nq=3, nkv=3, s=3),
    "gap between tokens": Case(gap=16, weights="qk"),
    "gap that breaks alignment": Case(gap=3, vectors=False, weights="qk"),
    "misaligned": Case(at=1, vectors=False),
    "misaligned fp32": Case(at=2, vectors=False, dtype=torch.float32, weights="qk", interleaved=False),
    "partial rotation, pairs": Case(half=20, vectors=False, weights="qk32"),
    "partial rotation, split": Case(half=15, vectors=False, interleaved=False, norm=2, dtype=torch.float16),
    "nothing rotated": Case(half=0, vectors=False),
    "head of 6": Case(h=6, vectors=False, dtype=torch.float32, weights="qk", blocks=3),
    "head of 256": Case(h=256, vectors=False, interleaved=False),
    "head of 1024, fp64": Case(h=1024, s=2, b=1, vectors=False, dtype=torch.float64, weights="qk"),
    "fp64": Case(vectors=False, dtype=torch.float64, norm=0),
}  # fmt: skip


@pytest.fixture(scope="module")
def exe() -> Path:
    return build("qk_norm_rope")


@pytest.mark.parametrize("name", CASES)
def test_against_fp64(name: str, exe: Path) -> None:
    check(CASES[name], exe, (0, 1))


def test_parity_rounds_where_hugging_face_does(exe: Path) -> None:
    """The definition in plain torch rounds at the same places; only the sum of squares is made in another order."""
    from megatron_r1.ops import reference

    for interleaved, weights in ((True, ""), (False, "qk")):
        c = Case(parity=True, interleaved=interleaved, weights=weights, vectors=False)
        t = tensors(c)
        given = [t[name] if name[0] in weights else None for name in ("q_weight", "k_weight")]
        q, k, _ = reference.qk_norm_rope(
            t["buffer"].view(c.s, c.b, -1), *given, t["cos"], t["sin"], t["positions"], num_heads=c.nq, num_kv_heads=c.nkv, head_dim=c.h,
            norm="rms", eps=c.eps, interleaved=interleaved, grouped=True, parity=True,
        )  # fmt: skip
        _, *ours = run(exe, arrays(c, t, False))
        for x, y in zip(ours, (q, k)):
            assert (to_torch(x, c.dtype) != y.flatten()).float().mean() < 1e-3


@pytest.mark.parametrize("vectors", [True, False])
def test_position_outside_the_table_is_nan(vectors: bool, exe: Path) -> None:
    c = Case(vectors=vectors, at=0 if vectors else 1)
    for wrong in (-1, P, 2**40):
        t = tensors(c)
        t["positions"][2, 1] = wrong
        _, q, k = run(exe, arrays(c, t, False))
        for raw, heads in ((q, c.nq), (k, c.nkv)):
            nan = to_torch(raw, c.dtype).view(c.s, c.b, heads, c.h).isnan()
            assert nan[2, 1].all()
            assert nan.sum() == heads * c.h
        _, dqkv, *_ = run(exe, arrays(c, t, True))
        nan = to_torch(dqkv, c.dtype).view(c.s, c.b, c.nkv, -1, c.h).isnan()
        assert nan[2, 1, :, :-1].all()
        assert nan.sum() == (c.nq + c.nkv) * c.h


@pytest.mark.parametrize("vectors", [True, False])
def test_nan_stays_in_its_head(vectors: bool, exe: Path) -> None:
    c = Case(vectors=vectors, at=0 if vectors else 1)
    t = tensors(c)
    t["buffer"][c.at :].view(c.s, c.b, c.nkv, -1, c.h)[3, 0, 1, 1, 7] = float("nan")  # query 3 of token (3, 0)
    _, q, k = run(exe, arrays(c, t, False))
    nan = to_torch(q, c.dtype).view(c.s, c.b, c.nq, c.h).isnan()
    assert nan[3, 0, 3].all()
    assert nan.sum() == c.h
    assert not to_torch(k, c.dtype).isnan().any()
    _, dqkv, *_ = run(exe, arrays(c, t, True))
    nan = to_torch(dqkv, c.dtype).view(c.s, c.b, c.nkv, -1, c.h).isnan()
    assert nan[3, 0, 1, 1].all()
    assert nan.sum() == c.h


# Mutants: {name: (text, what stands in its place, the case that shows it)}. All are compiled into one program, each behind a switch that is read when
# it starts (a build for each would take minutes); the text must occur once.
KERNEL, DISPATCH = "qk_norm_rope/kernel.cuh", "qk_norm_rope/dispatch.cuh"
RAGGED = Case(s=7, b=3, nq=3, nkv=1, weights="qk32")
GROUPED = replace(RAGGED, nq=4, nkv=2)
MUTANTS = {
    "no barrier before the gains' sum": ("__syncthreads();\n    for (int i = threadIdx.x; i < 2 * H", "{M} || (__syncthreads(), 0);\n    for (int i = threadIdx.x; i < 2 * H", RAGGED),
    "no barrier in the sum of blocks": ("= sum;\n  __syncthreads();", "= sum;\n  {M} || (__syncthreads(), 0);", RAGGED),
    "one item too many": ("there(number < of.items)", "there({M} ? number <= of.items : number < of.items)", RAGGED),
    "one item too few": ("token(0), first(0) {", "token(0), first(0) {\n    if ({M}) there = number + 1 < of.items;", RAGGED),
    "one head too many": ("const int last = min(item.first + of.heads_per_item, heads);\n    for (int n = 0; n < of.heads_per_item; n += InFlight) {\n      typename L::Raw raw[", "const int last = min(item.first + of.heads_per_item, heads) + {M};\n    for (int n = 0; n < of.heads_per_item; n += InFlight) {\n      typename L::Raw raw[", GROUPED),
    "values forgotten in the offset": ("(a.group_queries + 2 * a.group_keys) + index)", "(a.group_queries + (2 - {M}) * a.group_keys) + index)", GROUPED),
    "keys numbered from the queries": ("group * a.group_keys + index - a.group_queries -", "group * a.group_keys + index - ({M} ? 0 : a.group_queries) -", RAGGED),
    "no eps": ("static_cast<W>(a.eps)", "({M} ? W(0) : static_cast<W>(a.eps))", replace(RAGGED, eps=0.1)),
    "a sum over too few lanes": ("group_sum<L::kCount>(product)", "({M} ? group_sum<L::kCount / 2>(product) : group_sum<L::kCount>(product))", RAGGED),
    "rotated forwards in the backward": ("L::template turn<true>(d, angles);", "{M} ? L::template turn<false>(d, angles) : L::template turn<true>(d, angles);", RAGGED),
    "lanes of a warp not added": ("for (int step = 16; step >= L::kCount", "for (int step = {M} ? 8 : 16; step >= L::kCount", RAGGED),
    "a partial forgotten": ("for (int64_t p = slice; p < count;", "for (int64_t p = slice; p < count - {M};", replace(RAGGED, blocks=3)),
    "warps of a block not all added": ("warp < kWarps; ++warp)", "warp < kWarps - {M}; ++warp)", replace(RAGGED, blocks=1)),
    "a position outside is read": ("p < a.table_rows ?", "p < a.table_rows + {M} ?", RAGGED),
    "alignment is not looked at": ("reinterpret_cast<uintptr_t>(p) % 16 == 0", "({M} || reinterpret_cast<uintptr_t>(p) % 16 == 0)", replace(RAGGED, at=1, vectors=False)),
    "plain: a pair too many": ("W squares = 0, product = 0;\n    for (int p = lane; p < h / 2;", "W squares = 0, product = 0;\n    for (int p = lane; p < h / 2 + {M};", replace(RAGGED, h=66, vectors=False)),
    "plain: no barrier": ("__syncthreads();\n    for (int i = threadIdx.x; i < 2 * h", "{M} || (__syncthreads(), 0);\n    for (int i = threadIdx.x; i < 2 * h", replace(RAGGED, h=66, vectors=False)),
}  # fmt: skip
SWITCH = "MR1_MUTANT"


def switched(file: str) -> tuple[str, str]:
    """(text of the file, the same with every mutant behind its switch)."""
    text = (CSRC / file).read_text()
    other = text.replace("namespace qknr {", f'namespace qknr {{\ninline const int mutant_{Path(file).stem} = std::getenv("{SWITCH}") ? std::atoi(std::getenv("{SWITCH}")) : 0;', 1)
    for number, (name, (old, new, _)) in enumerate(MUTANTS.items(), 1):
        if (DISPATCH if name == "alignment is not looked at" else KERNEL) == file:
            assert text.count(old) == 1, f"{name}: the text to replace must occur once, it occurs {text.count(old)} times"
            other = other.replace(old, new.replace("{M}", f"(mutant_{Path(file).stem} == {number})"))
    return text, other


@pytest.fixture(scope="module")
def sanitized() -> Path:
    """One instance of each kernel, under the address and undefined-behaviour sanitizers, with switches for the mutants."""
    return build("qk_norm_rope_one", sanitize=True, mutate={file: switched(file) for file in (KERNEL, DISPATCH)})


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, sanitized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = MUTANTS[name][-1]
    outside = name == "a position outside is read"
    t = tensors(case)
    if outside:
        t["positions"][-1, -1] = P
        run(sanitized, arrays(case, t, False))
    else:
        check(case, sanitized, (0,))
    monkeypatch.setenv(SWITCH, str(list(MUTANTS).index(name) + 1))
    if outside:
        assert "heap-buffer-overflow" in outcome(sanitized, arrays(case, t, False), 0, [np.int64, np.uint8, np.uint8])
        return
    for seed in range(6):
        try:
            check(case, sanitized, (seed,))
        except AssertionError:
            return
    pytest.fail("the mutant passed")


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.dtype == torch.bfloat16])
def test_under_sanitizers(name: str, sanitized: Path) -> None:
    case = CASES[name]
    check(replace(case, vectors=case.vectors and case.h == 64 and case.interleaved), sanitized, (2,))


@pytest.fixture(scope="module")
def watched() -> Path:
    """The same program, with every access to shared and global memory watched for another that it is not ordered with."""
    return build("qk_norm_rope_one", races=True, mutate={file: switched(file) for file in (KERNEL, DISPATCH)})


BARRIERS = ("no barrier before the gains' sum", "no barrier in the sum of blocks", "plain: no barrier")


@pytest.mark.parametrize("case", [RAGGED, GROUPED, replace(RAGGED, h=66, vectors=False)], ids=["one group", "two groups", "plain"])
def test_no_races(case: Case, watched: Path) -> None:
    check(case, watched, (1,))


@pytest.mark.parametrize("name", BARRIERS)
def test_a_removed_barrier_is_a_race(name: str, watched: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one order of threads: the detector needs no lucky one."""
    monkeypatch.setenv(SWITCH, str(list(MUTANTS).index(name) + 1))
    with pytest.raises(AssertionError, match="race"):
        check(MUTANTS[name][-1], watched, (1,))
