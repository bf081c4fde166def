"""Attention: packed implementation against the definition, gradients, documents, and an fp64 calculation by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r1.ops import reference
from megatron_r1.ops import segments as segments_module
from megatron_r1.ops.attention import ATTENTION, qknorm_rope_attention
from megatron_r1.ops.rope import rope_table, rotate
from megatron_r1.ops.segments import SegmentPlan, plan_of


def make(s: int, b: int, g: int, r: int, h: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(s, b, g * (r + 2) * h, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def run(qkv: torch.Tensor, g: int, h: int, ids: torch.Tensor | None, implementation: str) -> torch.Tensor:
    return qknorm_rope_attention(
        qkv, num_kv_heads=g, head_dim=h, rope_theta=1e4, eps=1e-5, segment_ids=ids, implementation=implementation
    )


def by_hand(qkv: torch.Tensor, g: int, r: int, h: int, ids: torch.Tensor, theta: float, eps: float) -> torch.Tensor:
    """fp64, one query at a time: rotation by cosine and sine of each pair, softmax over the visible keys."""
    x = qkv.detach().double()
    s, b, _ = x.shape
    x = x.view(s, b, g, r + 2, h)
    out = torch.zeros(s, b, g, r, h, dtype=torch.float64)

    def turn(v: torch.Tensor, position: int) -> torch.Tensor:
        v = v / math.sqrt(float((v * v).mean()) + eps)
        y = v.clone()
        for i in range(h // 2):
            angle = position * theta ** (-2 * i / h)
            c, n = math.cos(angle), math.sin(angle)
            y[2 * i], y[2 * i + 1] = v[2 * i] * c - v[2 * i + 1] * n, v[2 * i] * n + v[2 * i + 1] * c
        return y

    for row in range(b):
        for group in range(g):
            keys = torch.stack([turn(x[j, row, group, r], j) for j in range(s)])
            for head in range(r):
                for i in range(s):
                    seen = [j for j in range(i + 1) if bool((ids[row, j : i + 1] == ids[row, i]).all())]
                    scores = keys[seen] @ turn(x[i, row, group, head], i) / math.sqrt(h)
                    out[i, row, group, head] = scores.softmax(0) @ x[seen, row, group, r + 1]
    return out.view(s, b, -1)


@pytest.mark.parametrize("implementation", ATTENTION.names())
def test_against_fp64_by_hand(implementation: str) -> None:
    qkv = make(9, 2, 2, 3, 8)
    ids = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2], [5, 5, 5, 5, 5, 5, 5, 5, -1]])
    out = run(qkv, 2, 8, ids, implementation)
    assert (out.double() - by_hand(qkv, 2, 3, 8, ids, 1e4, 1e-5)).abs().max() < 2e-6


@settings(max_examples=15, deadline=None)
@given(
    s=st.integers(1, 33), b=st.integers(1, 3), g=st.integers(1, 3), r=st.integers(1, 3), h=st.sampled_from([2, 8, 64]),
    cut=st.sampled_from(["none", "one", "random"]), seed=st.integers(0, 99),
)  # fmt: skip
def test_analytic_equals_reference_with_gradients(s: int, b: int, g: int, r: int, h: int, cut: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids = {
        "none": None,
        "one": torch.full((b, s), 3),
        "random": (torch.rand(b, s, generator=generator) < 0.3).long().cumsum(1),
    }[cut]
    qkv = make(s, b, g, r, h, seed=seed)
    grad = torch.randn(s, b, g * r * h, generator=generator)
    results = []
    for implementation in ("analytic", "reference"):
        out = run(qkv, g, h, ids, implementation)
        results.append((out.detach(), *torch.autograd.grad(out, qkv, grad)))
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-4)


def test_bf16_is_close_to_fp32() -> None:
    qkv = make(40, 2, 2, 2, 64)
    half = qkv.detach().bfloat16().requires_grad_()
    out, exact = run(half, 2, 64, None, "analytic"), run(half.detach().float(), 2, 64, None, "reference")
    assert out.dtype == torch.bfloat16
    assert (out.float() - exact).abs().max() < 0.03
    out.float().sum().backward()
    assert half.grad is not None
    assert torch.isfinite(half.grad).all()


@pytest.mark.parametrize("limit", [1 << 24, 0], ids=["mask", "loop over documents"])
def test_documents_equal_documents_run_alone(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments_module, "_DENSE_LIMIT", limit)
    qkv = make(24, 2, 1, 2, 16)
    lengths = [[7, 1, 16], [24]]
    ids = torch.stack([torch.repeat_interleave(torch.tensor([4, 9, 4])[: len(row)], torch.tensor(row)) for row in lengths])
    out = run(qkv, 1, 16, ids, "analytic")
    for row, parts in enumerate(lengths):
        start = 0
        for length in parts:
            alone = run(qkv[start : start + length, row : row + 1].detach(), 1, 16, None, "analytic")
            torch.testing.assert_close(out[start : start + length, row : row + 1], alone, atol=2e-6, rtol=1e-5)
            start += length


def test_mask_is_made_once_per_batch() -> None:
    ids = torch.tensor([[0, 0, 1, 1]])
    plan = plan_of(ids)
    assert plan is not None
    assert plan_of(ids) is plan
    assert plan.mask(torch.float32) is plan.mask(torch.float32)
    ids[0, 1] = 1
    assert plan_of(ids).spans == [[(0, 1), (1, 4)]], "a tensor that is written to gets a new plan"
    assert plan_of(torch.zeros(2, 5)) is None, "one document per row takes the fast causal path"


@settings(max_examples=30, deadline=None)
@given(rows=st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=6), min_size=1, max_size=4), seed=st.integers(0, 9))
def test_spans_are_the_documents(rows: list[list[int]], seed: int) -> None:
    length = max(sum(row) for row in rows)
    rows = [[*row, length - sum(row)] if sum(row) < length else row for row in rows]
    ids = torch.stack([torch.repeat_interleave(torch.arange(len(row)) % 2 + seed, torch.tensor(row)) for row in rows])
    expected = [[(sum(row[:i]), sum(row[: i + 1])) for i in range(len(row))] for row in rows]
    assert SegmentPlan(ids).spans == expected


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
