"""Attention as one operation: against an fp64 calculation by hand and the definition, gradients, documents, what is kept, what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_r1.ops import attention_cores, reference, segments
from megatron_r1.ops.attention import ATTENTION, describe, qknorm_attention
from megatron_r1.ops.dispatch import OPS_VARIABLE
from megatron_r1.ops.rope import cos_sin, rope_table, rotate
from megatron_r1.utils.errors import DataError, EnvironmentProblem

# Those that can run here: `csrc` only where the library is built.
HERE = [name for name, reason in ATTENTION.reasons("cpu").items() if reason is None]
FUSED = [name for name in HERE if name != "reference"]
CORES = [name for name, reason in attention_cores.cores("cpu").items() if reason is None]


def make(s: int, b: int, nq: int, nkv: int, h: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(s, b, (nq + 2 * nkv) * h, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype).requires_grad_()


def gains(h: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: (torch.rand(h, generator=generator, dtype=torch.float64) + 0.5).to(dtype).requires_grad_() for name in ("q_weight", "k_weight")}


def run(qkv: Tensor, nkv: int, h: int, ids: Tensor | None = None, implementation: str = "analytic", **options: Any) -> Tensor:
    settings_ = {"num_kv_heads": nkv, "head_dim": h, "rope_theta": 1e4, "eps": 1e-5, "segment_ids": ids} | options
    return qknorm_attention(qkv, **settings_, implementation=implementation)


def with_gradients(out: Tensor, inputs: list[Tensor], seed: int = 7) -> list[Tensor]:
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def by_hand(
    qkv: Tensor, nq: int, nkv: int, h: int, ids: Tensor, *, norm: str, interleaved: bool, grouped: bool, q_weight: Tensor | None, k_weight: Tensor | None
) -> Tensor:
    """fp64, one query at a time: rotation by cosine and sine of each pair, softmax over the visible keys."""
    x = qkv.detach().double()
    s, b, _ = x.shape
    r = nq // nkv
    parts = x.view(s, b, -1, h)
    place = {  # where head number i of each kind stands in the packed row
        "q": lambda i: i // r * (r + 2) + i % r if grouped else i,
        "k": lambda i: i * (r + 2) + r if grouped else nq + i,
        "v": lambda i: i * (r + 2) + r + 1 if grouped else nq + nkv + i,
    }
    out = torch.zeros(s, b, nq, h, dtype=torch.float64)

    def turn(v: Tensor, position: int, weight: Tensor | None) -> Tensor:
        squares = float((v * v).sum())
        v = v / {"none": 1.0, "rms": math.sqrt(squares / h + 1e-5), "l2": math.sqrt(squares + 1e-5)}[norm]
        v = v if weight is None else v * weight.detach().double()
        y = v.clone()
        for i in range(h // 2):
            first, second = (2 * i, 2 * i + 1) if interleaved else (i, i + h // 2)
            angle = position * 1e4 ** (-2 * i / h)
            c, n = math.cos(angle), math.sin(angle)
            y[first], y[second] = v[first] * c - v[second] * n, v[first] * n + v[second] * c
        return y

    for row in range(b):
        for group in range(nkv):
            keys = torch.stack([turn(parts[j, row, place["k"](group)], j, k_weight) for j in range(s)])
            for head in range(group * r, group * r + r):
                for i in range(s):
                    seen = [j for j in range(i + 1) if bool((ids[row, j : i + 1] == ids[row, i]).all())]
                    scores = keys[seen] @ turn(parts[i, row, place["q"](head)], i, q_weight) / math.sqrt(h)
                    out[i, row, head] = scores.softmax(0) @ parts[seen, row, place["v"](group)]
    return out.view(s, b, -1)


KINDS: dict[str, dict[str, Any]] = {
    "llama 4": {"norm": "rms", "interleaved": True, "grouped": True},
    "qwen 3": {"norm": "rms", "interleaved": False, "grouped": False, **gains(8)},
    "l2": {"norm": "l2", "interleaved": True, "grouped": False},
    "l2, gain of the keys": {"norm": "l2", "interleaved": False, "grouped": True, "k_weight": gains(8)["k_weight"]},
    "no norm": {"norm": "none", "interleaved": True, "grouped": True},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("implementation", HERE)
def test_against_fp64_by_hand(implementation: str, kind: str) -> None:
    qkv = make(9, 2, 6, 2, 8)
    ids = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2], [5, 5, 5, 5, 5, 5, 5, 5, -1]])
    options = {"q_weight": None, "k_weight": None} | KINDS[kind]
    exact = by_hand(qkv, 6, 2, 8, ids, **options)
    assert (run(qkv, 2, 8, ids, implementation, **options).double() - exact).abs().max() < 2e-6
    # The same in fp64; what is left comes from the angles, which are made in fp32.
    wide = {name: value.detach().double() if isinstance(value, Tensor) else value for name, value in options.items()}
    assert (run(qkv.detach().double(), 2, 8, ids, implementation, **wide) - exact).abs().max() < 1e-6


@settings(max_examples=25, deadline=None)
@given(
    s=st.integers(1, 33), b=st.integers(1, 3), nkv=st.integers(1, 3), r=st.integers(1, 3), h=st.sampled_from([2, 8, 64]),
    cut=st.sampled_from(["none", "one", "random", "same in all rows"]), seed=st.integers(0, 99), norm=st.sampled_from(["rms", "l2", "none"]),
    weighted=st.booleans(), interleaved=st.booleans(), grouped=st.booleans(), core=st.sampled_from(CORES), implementation=st.sampled_from(FUSED),
)  # fmt: skip
def test_fused_equals_reference_with_gradients(
    s: int, b: int, nkv: int, r: int, h: int, cut: str, seed: int, norm: str, weighted: bool, interleaved: bool, grouped: bool, core: str,
    implementation: str,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    ids = {
        "none": None,
        "one": torch.full((b, s), 3),
        "random": (torch.rand(b, s, generator=generator) < 0.3).long().cumsum(1),
        "same in all rows": (torch.rand(1, s, generator=generator) < 0.3).long().cumsum(1).expand(b, s),
    }[cut]
    qkv = make(s, b, nkv * r, nkv, h, torch.float64, seed)
    weights = gains(h, seed, torch.float64) if weighted and norm != "none" else {}
    options = {"norm": norm, "interleaved": interleaved, "grouped": grouped, "num_heads": nkv * r, **weights}
    leaves = [qkv, *weights.values()]
    ours = with_gradients(run(qkv, nkv, h, ids, implementation, core=core, **options), leaves)
    theirs = with_gradients(run(qkv, nkv, h, ids, "reference", **options), leaves)
    for mine, its in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, its, atol=1e-10, rtol=1e-9)


def plain_torch(qkv: Tensor, nkv: int, h: int, ids: Tensor) -> Tensor:
    """The usual way of the same precision: norm and rotation by torch's operations, its attention with a mask, automatic derivatives."""
    s, _, width = qkv.shape
    at = torch.arange(s)
    cos, sin = cos_sin(s, h, 1e4, qkv.device)
    q, k, v = reference.qk_norm_rope(
        qkv, None, None, cos.to(qkv.dtype) if qkv.dtype == torch.float64 else cos, sin.to(qkv.dtype) if qkv.dtype == torch.float64 else sin, at,
        num_heads=width // h - 2 * nkv, num_kv_heads=nkv, head_dim=h, norm="rms", eps=1e-5, interleaved=True, grouped=True, parity=False,
    )  # fmt: skip
    visible = (ids[:, :, None] == ids[:, None, :]) & torch.ones(s, s, dtype=torch.bool).tril()
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible[:, None], enable_gqa=True).permute(2, 0, 1, 3).flatten(2)


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("implementation", FUSED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_is_at_most_twice_that_of_plain_torch(dtype: torch.dtype, implementation: str, core: str) -> None:
    qkv = make(96, 2, 8, 2, 64, dtype)
    ids = torch.arange(3).repeat_interleave(32).expand(2, -1)
    wide = qkv.detach().double().requires_grad_()
    exact = with_gradients(plain_torch(wide, 2, 64, ids), [wide])
    ours = with_gradients(run(qkv, 2, 64, ids, implementation, core=core), [qkv])
    plain = with_gradients(plain_torch(qkv, 2, 64, ids), [qkv])
    for name, mine, its, right in zip(("out", "dqkv"), ours, plain, exact, strict=True):
        assert mine.dtype == dtype
        error, allowed = (float((x.double() - right).pow(2).mean().sqrt()) for x in (mine, its))
        assert 0 < error <= 2 * allowed, f"{name}: {error:.3g} against {allowed:.3g}"
        error, allowed = (float((x.double() - right).abs().max()) for x in (mine, its))
        assert error <= 2 * allowed, f"{name}, largest: {error:.3g} against {allowed:.3g}"


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("implementation", FUSED)
def test_derivatives_by_differences(implementation: str, core: str) -> None:
    qkv, weights = make(5, 2, 2, 1, 4, torch.float64), gains(4, dtype=torch.float64)
    ids = torch.tensor([[0, 0, 1, 1, 1], [2, 2, 2, 2, 3]])

    def op(x: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return run(x, 1, 4, ids, implementation, core=core, q_weight=q, k_weight=k)

    assert torch.autograd.gradcheck(op, (qkv, weights["q_weight"], weights["k_weight"]))


def test_documents_equal_documents_run_alone() -> None:
    qkv = make(24, 2, 2, 1, 16)
    lengths = [[7, 1, 16], [24]]
    ids = torch.stack([torch.repeat_interleave(torch.tensor([4, 9, 4])[: len(row)], torch.tensor(row)) for row in lengths])
    for core in CORES:
        out = run(qkv, 1, 16, ids, core=core)
        for row, parts in enumerate(lengths):
            start = 0
            for length in parts:
                alone = run(qkv[start : start + length, row : row + 1].detach(), 1, 16, core=core)
                torch.testing.assert_close(out[start : start + length, row : row + 1], alone, atol=2e-6, rtol=1e-5)
                start += length


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("implementation", HERE)
def test_boundaries_equal_ids(implementation: str, dtype: torch.dtype) -> None:
    lengths = [0, 3, 0, 0, 1, 1, 12, 0]
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=dtype)
    ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None]
    qkv = make(17, 1, 4, 2, 8)
    expected = with_gradients(run(qkv, 2, 8, ids, implementation), [qkv])
    for limit in (None, 12, 100):
        found = with_gradients(run(qkv, 2, 8, implementation=implementation, cu_seqlens=cu, max_seqlen=limit), [qkv])
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("implementation", FUSED)
@pytest.mark.parametrize(("s", "b"), [(0, 1), (0, 3), (4, 0), (1, 1), (1, 4), (5, 1)])
def test_few_tokens(s: int, b: int, implementation: str, core: str) -> None:
    qkv, weights = make(s, b, 2, 1, 8), gains(8)
    for documents in ({}, {"ids": torch.zeros(b, s, dtype=torch.int64)}, {"cu_seqlens": torch.tensor([0, 0, s])} if b == 1 else {}):
        out = run(qkv, 1, 8, implementation=implementation, core=core, **documents, **weights)
        assert out.shape == (s, b, 16)
        out.sum().backward()
        assert qkv.grad is not None
        assert qkv.grad.shape == qkv.shape
        assert all(bool(torch.isfinite(x.grad).all()) for x in (qkv, *weights.values()))
    if s == 0 or b == 0:
        assert not any(bool(w.grad.any()) for w in weights.values())


@pytest.mark.parametrize("implementation", FUSED)
def test_strided_input_and_gradient(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = make(11, 2, 4, 2, 8)
    expected = with_gradients(run(packed, 2, 8, implementation=implementation), [packed])
    rows_first = packed.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    part_of_more = torch.cat([packed.detach(), torch.full((11, 2, 5), float("nan"))], -1)[..., :64].requires_grad_()
    every_other = torch.stack([packed.detach(), torch.full_like(packed, float("nan"))], 1).flatten(0, 1)[::2].requires_grad_()
    for qkv in (rows_first, part_of_more, every_other):
        assert not qkv.is_contiguous()
        found = with_gradients(run(qkv, 2, 8, implementation=implementation), [qkv])
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert found[0].is_contiguous()
    grad = torch.randn(2, 32, 11, generator=torch.Generator().manual_seed(3)).permute(2, 0, 1)
    pairs = [torch.autograd.grad(run(packed, 2, 8, implementation=implementation), packed, g)[0] for g in (grad, grad.contiguous())]
    assert torch.equal(*pairs)
    ones = [torch.autograd.grad(run(packed, 2, 8, implementation=implementation), packed, g)[0] for g in (torch.ones(()).expand(11, 2, 32), torch.ones(11, 2, 32))]
    assert torch.equal(*ones)
    # GPU kernels require elements of a head side by side, which the gradient of a sum has not.
    strides: list[int] = []
    core = attention_cores.choose("cpu", torch.float32, 8, segments.plan_of(None, 2, 11))
    real = core._backward
    monkeypatch.setattr(core, "_backward", lambda *args: (strides.extend(x.stride(-1) for x in args[:5]), real(*args))[1])
    run(packed, 2, 8, implementation=implementation).sum().backward()
    assert strides == [1] * 5


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("implementation", FUSED)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_number_stays_in_its_document(bad: float, implementation: str, core: str) -> None:
    qkv = make(20, 2, 2, 1, 8)
    ids = torch.tensor([0, 1, 2]).repeat_interleave(torch.tensor([6, 8, 6])).expand(2, -1)
    good = with_gradients(run(qkv, 1, 8, ids, implementation, core=core), [qkv])
    for part in range(4):  # each query head, the key, the value
        hurt = qkv.detach().clone()
        hurt[9, 1, part * 8 + 3] = bad
        hurt.requires_grad_()
        found = with_gradients(run(hurt, 1, 8, ids, implementation, core=core), [hurt])
        outside = torch.ones(20, 2, dtype=torch.bool)
        outside[6:14, 1] = False
        for mine, right in zip(found, good, strict=True):
            assert torch.equal(mine[outside], right[outside])
        assert not torch.isfinite(found[0][9, 1]).all(), "it must not vanish"
        assert not torch.isfinite(found[1][9, 1]).all()
        if part >= 2:
            assert not torch.isfinite(found[0][9:14, 1]).all(-1).any(), "every later query of the document sees it"
    grad = torch.zeros(20, 2, 16)
    grad[9, 1, 3] = bad
    (found_grad,) = torch.autograd.grad(run(qkv, 1, 8, ids, implementation, core=core), qkv, grad)
    assert not found_grad[outside].any()
    assert not torch.isfinite(found_grad[9, 1]).all()


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("part", [0, 1, 2], ids=["query", "key", "value"])
def test_a_bad_number_shows_however_short_the_document(part: int, dtype: torch.dtype, core: str) -> None:
    for length in (1, 2, 7, 15, 16, 17, 31, 33):
        for at in {0, length // 2, length - 1}:
            for bad, norm in ((float("nan"), "rms"), (float("inf"), "none")):
                qkv = make(length, 1, 1, 1, 8, dtype, seed=length).detach()
                qkv[at, 0, 8 * part + 2] = bad
                out = run(qkv, 1, 8, core=core, norm=norm)
                assert not torch.isfinite(out[at]).all() or (bad > 0 and part == 1), (length, at, bad)
                if bad != bad and part:
                    assert torch.isnan(out[at:]).any(-1).all(), (length, at)


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("implementation", FUSED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_twice(dtype: torch.dtype, implementation: str, core: str) -> None:
    qkv, weights = make(70, 2, 4, 2, 16, dtype), gains(16)
    ids = (torch.rand(2, 70, generator=torch.Generator().manual_seed(0)) < 0.1).cumsum(1)
    one, two = (with_gradients(run(qkv, 2, 16, ids, implementation, core=core, **weights), [qkv, *weights.values()]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


# ---------------------------------------------------------------- what is kept


@pytest.mark.parametrize("implementation", FUSED)
def test_keeps_the_input_the_output_and_one_number_per_head_and_token(implementation: str) -> None:
    s, b, nq, h = 64, 2, 4, 16
    qkv, weights = make(s, b, nq, 2, h), gains(h)
    ids = (torch.rand(b, s, generator=torch.Generator().manual_seed(0)) < 0.1).cumsum(1)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        out = run(qkv, 2, h, ids, implementation, **weights)
    inputs = {x.data_ptr() for x in (qkv, ids, *weights.values(), out)}
    new = [x for x in kept if x.data_ptr() not in inputs]
    assert [(x.numel(), x.dtype) for x in new] == [(b * nq * s, torch.float32)], "the log-sum-exp and nothing else"
    assert any(x.data_ptr() == out.data_ptr() for x in kept)
    assert any(x.data_ptr() == qkv.data_ptr() for x in kept)
    # Nor is a tensor hidden beside them, on the node or in what hangs on it.
    node = out.grad_fn
    assert {name for name in vars(node) if not name.startswith("_")} == {"call", "context"}
    assert not any(isinstance(x, Tensor) for x in (*node.call, node.context))


def test_documents_are_read_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU each reading waits for the device; forward and backward of every layer share the first."""
    made: list[int] = []
    real = segments._plan
    monkeypatch.setattr(segments, "_plan", lambda *args: (made.append(1), real(*args))[1])
    ids = torch.tensor([[0, 0, 1, 1, 1]])
    x = make(5, 1, 2, 1, 4)
    for _ in range(3):
        x = x * run(x, 1, 4, ids).sum(-1, keepdim=True)
    x.sum().backward()
    assert made == [1]


@pytest.mark.parametrize("implementation", FUSED)
def test_gradients_of_gradients_are_refused(implementation: str) -> None:
    qkv = make(4, 1, 2, 1, 4)
    (grad,) = torch.autograd.grad(run(qkv, 1, 4, implementation=implementation).square().sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_without_gradients_nothing_is_kept() -> None:
    qkv = make(6, 1, 2, 1, 4)
    with torch.no_grad():
        assert run(qkv, 1, 4).grad_fn is None
    with torch.inference_mode():
        inferred = run(qkv, 1, 4)
    assert torch.equal(inferred, run(qkv, 1, 4))
    run(qkv, 1, 4).sum().backward()  # what inference left in caches does not get in the way


# ---------------------------------------------------------------- positions


def test_only_differences_of_positions_show() -> None:
    qkv = make(12, 2, 2, 1, 8, torch.float64)
    at = torch.arange(12)
    expected = run(qkv, 1, 8)
    assert torch.equal(run(qkv, 1, 8, positions=at), expected)
    assert torch.equal(run(qkv, 1, 8, positions=at[:, None].expand(12, 2)), expected)
    torch.testing.assert_close(run(qkv, 1, 8, positions=at + 40), expected, atol=1e-5, rtol=1e-5)
    assert (run(qkv, 1, 8, positions=2 * at) - expected).abs().max() > 1e-2
    each = torch.stack([at, at.flip(0)], 1)
    for row in range(2):
        alone = run(qkv[:, row : row + 1], 1, 8, positions=each[:, row])
        torch.testing.assert_close(run(qkv, 1, 8, positions=each)[:, row : row + 1], alone)


def test_positions_are_read_anew_when_written_to() -> None:
    qkv, at = make(3, 1, 2, 1, 4), torch.tensor([0, 1, 2])
    run(qkv, 1, 4, positions=at)
    at[2] = 1000
    assert torch.isfinite(run(qkv, 1, 4, positions=at)).all()
    at[2] = -1
    with pytest.raises(DataError, match="positions"):
        run(qkv, 1, 4, positions=at)


# ---------------------------------------------------------------- what runs


def test_which_implementation_and_core_run(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def watch(core: attention_cores.Core, step: str) -> None:
        real = getattr(core, step)
        monkeypatch.setattr(core, step, lambda *args: (ran.append(core.name + step), real(*args))[1])

    for one in attention_cores.CORES:
        watch(one, "_forward")
        watch(one, "_backward")
    qkv = make(4, 1, 2, 1, 4)
    monkeypatch.delenv(attention_cores.CORE_VARIABLE, raising=False)
    run(qkv, 1, 4).sum().backward()
    assert ran == ["sdpa_forward", "sdpa_backward"]
    monkeypatch.setenv(attention_cores.CORE_VARIABLE, "math")
    ran.clear()
    run(qkv, 1, 4).sum().backward()
    assert ran == ["math_forward", "math_backward"]
    ran.clear()
    run(qkv, 1, 4, core="sdpa")
    assert ran == ["sdpa_forward"], "the argument goes before the environment"
    ran.clear()
    run(qkv, 1, 4, implementation="reference").sum().backward()
    assert ran == []


def test_prologue_is_the_one_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_r1.ops import attention

    asked: list[str] = []

    def watch(step: str) -> None:
        real = getattr(attention, step)
        monkeypatch.setattr(attention, step, lambda *args, **options: (asked.append(options["implementation"]), real(*args, **options))[1])

    watch("qk_norm_rope_forward")
    watch("qk_norm_rope_backward")
    for name in FUSED:
        asked.clear()
        run(make(4, 1, 2, 1, 4), 1, 4, implementation=name).sum().backward()
        assert asked == [name] * 3, "forward, recomputed in the backward, backward"


def test_description(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OPS_VARIABLE, "qknorm_attention=analytic")
    monkeypatch.delenv(attention_cores.CORE_VARIABLE, raising=False)
    assert describe("cpu", torch.float32, 64) == "analytic, core sdpa"
    monkeypatch.setenv(attention_cores.CORE_VARIABLE, "math")
    assert describe("cpu", torch.bfloat16, 64) == "analytic, core math"


# ---------------------------------------------------------------- torch.compile


@pytest.mark.parametrize("implementation", FUSED)
def test_one_graph_for_all_documents(implementation: str) -> None:
    torch._dynamo.reset()
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        from torch._dynamo.backends.debugging import aot_eager

        graphs.append(1)
        return aot_eager(graph, inputs)

    def step(x: Tensor, w: Tensor, ids: Tensor | None) -> Tensor:
        return run(x * 1.5, 2, 8, ids, implementation, q_weight=w) * 2

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    qkv, w = make(19, 2, 4, 2, 8), gains(8)["q_weight"]
    first, second = ((torch.rand(2, 19, generator=torch.Generator().manual_seed(i)) < 0.2).cumsum(1) for i in range(2))
    for ids in (None, first, second):
        expected, found = (with_gradients(f(qkv, w, ids), [qkv, w]) for f in (step, compiled))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert len(graphs) == 2, "without documents, and with any"
    cu = torch.tensor([0, 4, 4, 19], dtype=torch.int32)
    one_row = torch.compile(lambda x: run(x, 2, 8, implementation=implementation, cu_seqlens=cu, max_seqlen=15), fullgraph=True, backend="aot_eager")
    row = qkv[:, :1].detach().requires_grad_()
    expected = with_gradients(run(row, 2, 8, implementation=implementation, cu_seqlens=cu), [row])
    assert all(torch.equal(a, b) for a, b in zip(with_gradients(one_row(row), [row]), expected, strict=True))


@pytest.mark.slow
def test_compiled_to_machine_code() -> None:
    torch._dynamo.reset()
    qkv, w = make(19, 2, 4, 2, 8), gains(8)["q_weight"]

    def step(x: Tensor, w: Tensor) -> Tensor:
        return run(x * 1.5, 2, 8, q_weight=w) * 2

    expected, found = (with_gradients(f(qkv, w), [qkv, w]) for f in (step, torch.compile(step, fullgraph=True)))
    for mine, its in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, its, atol=1e-6, rtol=1e-6)


def test_the_nodes_of_a_compiled_graph() -> None:
    """Their stated shapes, strides and dtypes are those of their results, and they change nothing they are given."""
    from megatron_r1.ops.attention import Call

    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        qkv, w = make(7, 2, 4, 2, 8, dtype).detach(), gains(8, dtype=dtype)["q_weight"].detach()
        for ids in (None, torch.tensor([[0, 0, 0, 1, 1, 1, 2]] * 2)):
            call = Call(4, 2, 8, 1e4, "rms", 1e-5, True, True, False, None, None, "analytic")
            given = (qkv, w, None, ids, None)
            checks = ("test_schema", "test_faketensor")
            torch.library.opcheck(torch.ops.megatron_r1.qknorm_attention_forward.default, (*given, *call), test_utils=checks)
            out, lse = torch.ops.megatron_r1.qknorm_attention_forward(*given, *call)
            backward = torch.ops.megatron_r1.qknorm_attention_backward.default
            torch.library.opcheck(backward, (torch.ones_like(out), *given, out, lse, *call), test_utils=checks)


class Alone:
    """A context piece of one process: everything."""

    rank, size = 0, 1

    def gather(self, x: Tensor) -> Tensor:
        return x

    scatter_sum = gather


def test_a_cut_sequence_is_no_part_of_a_graph() -> None:
    """A graph's node has no process group: the call runs outside of it, and where that is forbidden torch says why."""
    torch._dynamo.reset()
    qkv = make(7, 2, 4, 2, 8).detach()

    def step(x: Tensor) -> Tensor:
        return run(x * 1.5, 2, 8, context=Alone()) * 2

    with pytest.raises(torch._dynamo.exc.Unsupported, match="cut sequences"):
        torch.compile(step, fullgraph=True, backend="eager")(qkv)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(step, backend="eager")(qkv), step(qkv))


# ---------------------------------------------------------------- what is refused

ROW = make(6, 1, 2, 1, 4).detach()
IDS = torch.zeros(1, 6, dtype=torch.int64)


class Piece:
    """A context piece of nobody's."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def gather(self, x: Tensor) -> Tensor:
        raise AssertionError("not reached")

    scatter_sum = gather


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"cu_seqlens": torch.tensor([1, 6])}, "cu_seqlens: a first value of 0, found 1"),
        ({"cu_seqlens": torch.tensor([-1, 6])}, "cu_seqlens: a first value of 0, found -1"),
        ({"cu_seqlens": torch.tensor([0, 4, 3, 6])}, "never decrease, found 4, then 3 at 2"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens: a last value of 6.*found: 5"),
        ({"cu_seqlens": torch.tensor([0, 3, 2**40])}, "cu_seqlens: a last value of 6"),
        ({"cu_seqlens": torch.tensor([0, 9, 6])}, "never decrease, found 9, then 6"),
        ({"cu_seqlens": torch.tensor([0])}, "cu_seqlens: a last value of 6.*found: 0"),
        ({"cu_seqlens": torch.tensor([], dtype=torch.int64)}, "cu_seqlens: int32 or int64 .documents . 1.*found: torch.int64 .0."),
        ({"cu_seqlens": torch.tensor(6)}, "cu_seqlens: int32 or int64"),
        ({"cu_seqlens": torch.tensor([0.0, 6.0])}, "cu_seqlens: int32 or int64.*found: torch.float32"),
        ({"cu_seqlens": torch.tensor([0, 6], dtype=torch.int16)}, "cu_seqlens: int32 or int64.*found: torch.int16"),
        ({"cu_seqlens": torch.tensor([[0, 6]])}, "cu_seqlens: int32 or int64"),
        ({"cu_seqlens": torch.tensor([0, 6]), "qkv": ROW.expand(6, 2, 16)}, "one row .*cu_seqlens, found 2 rows"),
        ({"cu_seqlens": torch.tensor([0, 2, 6]), "max_seqlen": 3}, "max_seqlen: at least the longest document of cu_seqlens, 4 tokens, found 3"),
        ({"cu_seqlens": torch.tensor([0, 6]), "max_seqlen": -1}, "max_seqlen"),
        ({"max_seqlen": 6}, "max_seqlen: only together with cu_seqlens"),
        ({"cu_seqlens": torch.tensor([0, 6]), "ids": IDS}, "segment_ids or cu_seqlens, found both"),
        ({"ids": IDS[:, :5]}, "segment_ids: integers .1, 6.*found: torch.int64 .1, 5."),
        ({"ids": IDS[0]}, "segment_ids: .b, S., found shape .6."),
        ({"ids": IDS.float()}, "segment_ids: integers.*found: torch.float32"),
        ({"qkv": ROW[:, 0]}, "qkv: .s, b, packed heads., found shape .6, 16."),
        ({"qkv": ROW[..., :15]}, "qkv: a last dimension"),
        ({"qkv": ROW.int()}, "qkv: float32, bfloat16"),
        ({"h": 0}, "head_dim: a positive even number, found 0"),
        ({"h": 3}, "head_dim: a positive even number, found 3"),
        ({"nkv": 0}, "num_kv_heads"),
        ({"nkv": 2}, "num_heads"),
        ({"num_heads": 3}, "qkv: a last dimension"),
        ({"norm": "layer"}, "norm: one of none, rms, l2, found 'layer'"),
        ({"eps": float("nan")}, "eps"),
        ({"rope_theta": 0.0}, "rope_theta"),
        ({"q_weight": torch.ones(5)}, "q_weight: shape .4."),
        ({"positions": torch.arange(5)}, "positions: .6. or .6, 1., found shape .5."),
        ({"positions": torch.arange(6).int()}, "positions: int64"),
        ({"positions": torch.arange(6) - 1}, "positions: none below 0, found -1"),
        ({"positions": torch.arange(6) + 2**40}, "positions: below 16777216, found 1099511627781"),
        ({"context": Piece(2, 2)}, "context: a rank from 0 to 1, found 2"),
        ({"context": Piece(0, 2), "qkv": ROW[:5]}, "twice the number of context-parallel pieces, found 10 tokens"),
        ({"context": Piece(0, 2), "ids": IDS}, "segment_ids: integers .1, 12., one per token of the whole sequence"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
@pytest.mark.parametrize("implementation", HERE)
def test_wrong_arguments(options: dict[str, Any], found: str, implementation: str) -> None:
    given = {"qkv": ROW, "nkv": 1, "h": 4, "ids": None, "implementation": implementation} | options
    with pytest.raises(DataError, match=f"(?s){found.replace(', found ', '.*found: ')}"):
        run(**given)


def test_wrong_names() -> None:
    with pytest.raises(EnvironmentProblem, match="one of auto, csrc, analytic, reference"):
        run(ROW, 1, 4, implementation="fast")
    with pytest.raises(EnvironmentProblem, match="a kernel for GPUs"):
        run(ROW, 1, 4, core="flash3")
    with pytest.raises(EnvironmentProblem, match="among auto, flash3, flash4, cudnn, flash2, sdpa, math"):
        run(ROW, 1, 4, core="flash5")


# ---------------------------------------------------------------- the rotation


def test_rope_keeps_norms_and_shows_only_distances() -> None:
    table = rope_table(64, 16, 1e4, torch.device("cpu"))
    x, y = torch.randn(2, 16, generator=torch.Generator().manual_seed(1))
    turned = rotate(x.expand(64, 16), table), rotate(y.expand(64, 16), table)
    torch.testing.assert_close(turned[0].norm(dim=-1), x.norm().expand(64))
    torch.testing.assert_close((turned[0][5:] * turned[1][:-5]).sum(-1), (turned[0][5] * turned[1][0]).sum().expand(59), atol=1e-4, rtol=1e-4)


def test_norm_before_rope_equals_norm_after() -> None:
    x = torch.randn(10, 16, generator=torch.Generator().manual_seed(2))
    table = rope_table(10, 16, 1e4, torch.device("cpu"))
    torch.testing.assert_close(rotate(reference.rms_norm(x, None, 1e-5), table), reference.rms_norm(rotate(x, table), None, 1e-5))
