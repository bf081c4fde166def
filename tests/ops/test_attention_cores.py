"""Attention cores: plans against a brute-force mask, kernels against automatic derivatives, the check that GPU kernels must pass, the choice.

The adapters of the GPU kernels run here too, on a CPU, over stand-ins with the signatures that those kernels publish: what they
hand over and how they read the answer is tested, the kernels themselves only where there is a GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import pairwise
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_r1.ops import attention_cores
from megatron_r1.ops.attention import qknorm_attention
from megatron_r1.ops.attention_cores import (
    CORE_VARIABLE,
    Core,
    CpuCore,
    CudnnCore,
    Flash2Core,
    Flash3Core,
    Flash4Core,
    MathCore,
)
from megatron_r1.ops.segments import Cuts, Plan, document_numbers, plan_of
from megatron_r1.utils.errors import DataError, EnvironmentProblem

GPU = pytest.mark.gpu


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def places(length: int, rank: int, pieces: int) -> list[int]:
    """Where in the whole sequence the tokens of a piece stand, by the definition of the order."""
    if pieces == 1:
        return list(range(length))
    size = length // (2 * pieces)
    return [*range(rank * size, (rank + 1) * size), *range((2 * pieces - 1 - rank) * size, (2 * pieces - rank) * size)]


def seen_by_definition(ids: Tensor, rank: int, pieces: int) -> Tensor:
    """[b, s, S]: whether a query here sees a key of the whole sequence."""
    rows, length = ids.shape
    result = torch.zeros(rows, length // pieces, length, dtype=torch.bool)
    for row in range(rows):
        for query, place in enumerate(places(length, rank, pieces)):
            for key in range(place, -1, -1):
                if ids[row, key] != ids[row, place]:
                    break
                result[row, query, key] = True
    return result


def seen_by_plan(plan: Plan) -> Tensor:
    """The same, read off a plan; every query must be somewhere, once."""
    result = torch.zeros(plan.rows, plan.queries, plan.length, dtype=torch.bool)
    times = torch.zeros(plan.rows, plan.queries, dtype=torch.int64)
    for band in plan.bands:
        for document in range(len(band.query_cuts) - 1):
            problem = attention_cores._document(band, document)
            queries, keys = problem.queries.stop - problem.queries.start, problem.keys.stop - problem.keys.start
            assert 0 < queries <= keys
            result[problem.rows, problem.queries, problem.keys] |= torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
            times[problem.rows, problem.queries] += 1
        assert (band.query_cuts[-1], band.key_cuts[-1]) == (band.queries[1] - band.queries[0], band.keys[1] - band.keys[0])
    assert bool((times == 1).all())
    return result


# ---------------------------------------------------------------- plans


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 3), chunk=st.integers(0, 5), pieces=st.sampled_from([1, 2, 3, 4]), share=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    same=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_a_plan_shows_what_the_definition_shows(rows: int, chunk: int, pieces: int, share: float, same: bool, seed: int) -> None:
    length = 2 * pieces * chunk
    change = torch.rand(1 if same else rows, length, generator=torch.Generator().manual_seed(seed)) < share
    ids = change.cumsum(1).remainder(3).expand(rows, length)  # numbers come back: equal ones that are no neighbours are two documents
    for rank in range(pieces):
        plan = plan_of(ids, rows, length, rank, pieces)
        assert torch.equal(seen_by_plan(plan), seen_by_definition(ids, rank, pieces))
        if share == 0:
            assert plan.bands == plan_of(None, rows, length, rank, pieces).bands
        if same or share == 0:
            assert len(plan.bands) <= (1 if pieces == 1 else 2), "rows with the same documents go together"


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(0, 6), max_size=8), wide=st.booleans())
def test_boundaries_give_the_plan_of_ids(lengths: list[int], wide: bool) -> None:
    cu = torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()], dtype=torch.int64 if wide else torch.int32)
    ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths, dtype=torch.int64))[None]
    total = sum(lengths)
    assert plan_of(cu, 1, total).bands == plan_of(ids, 1, total).bands
    numbers = [document_numbers(x, 1, total) for x in (cu, ids)]
    same = [x[:, :, None] == x[:, None] for x in numbers]
    assert torch.equal(*same)


def test_made_once_per_batch() -> None:
    ids = torch.tensor([[0, 0, 1, 1]])
    plan = plan_of(ids, 1, 4)
    assert plan_of(ids, 1, 4) is plan
    assert plan.cuts(0, torch.device("cpu")) is plan.cuts(0, torch.device("cpu"))
    assert plan_of(ids, 1, 4, 0, 2) is not plan
    assert plan.bands[0].query_cuts == (0, 2, 4)
    ids[0, 1] = 1
    assert plan_of(ids, 1, 4).bands[0].query_cuts == (0, 1, 4), "a tensor that is written to gets a new plan"
    assert plan_of(None, 2, 5) is plan_of(None, 2, 5)
    assert plan_of(None, 2, 5).whole
    assert plan_of(torch.zeros(2, 5, dtype=torch.int64), 2, 5).whole, "one document per row goes as plain rows"
    with torch.inference_mode():
        assert plan_of(torch.tensor([[0, 1]]), 1, 2).documents


def test_odd_lengths_can_not_be_cut() -> None:
    for length, pieces in ((5, 2), (6, 2), (8, 3)):
        with pytest.raises(DataError, match=f"divisible by 2 x {pieces}"):
            plan_of(None, 1, length, 0, pieces)


def test_work_grows_with_the_documents_not_with_their_square(monkeypatch: pytest.MonkeyPatch) -> None:
    core = CpuCore()
    shapes: list[tuple[int, int]] = []
    real = core._forward
    monkeypatch.setattr(core, "_forward", lambda q, k, *rest: (shapes.append((q.shape[0], k.shape[0])), real(q, k, *rest))[1])
    length = 256
    for size in (256, 32, 4, 1):
        shapes.clear()
        ids = (torch.arange(length) // size).expand(3, -1)
        core.forward(random(length, 3, 2, 4), random(length, 3, 1, 4), random(length, 3, 1, 4), plan_of(ids, 3, length), 0.5)
        assert shapes == [(size, size)] * (length // size), "one call per document, for all rows at once where they agree"


# ---------------------------------------------------------------- kernels


def exact(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> list[Tensor]:
    """(out, lse, dq, dk, dv) by automatic derivatives in fp64. visible [b, sq, sk]."""
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    repeats = q.shape[2] // k.shape[2]
    wide_q, wide_k, wide_v = (x.permute(1, 2, 0, 3) for x in (leaves[0], *(x.repeat_interleave(repeats, dim=2) for x in leaves[1:])))
    scores = (wide_q @ wide_k.transpose(-1, -2) * scale).masked_fill(~visible[:, None], float("-inf"))
    out = (scores.softmax(-1) @ wide_v).permute(2, 0, 1, 3)
    return [out.detach(), scores.logsumexp(-1).detach(), *torch.autograd.grad(out, leaves, dout.double())]


class VarlenMath(MathCore):
    """`math` that takes boundaries, as the GPU kernels do: one row, all documents in one call."""

    name = "varlen math"
    varlen = True
    calls = 0

    def _each(self, cuts: Cuts) -> Iterator[tuple[slice, slice]]:
        type(self).calls += 1
        queries, keys = cuts.queries.tolist(), cuts.keys.tolist()
        assert (cuts.queries.dtype, cuts.keys.dtype) == (torch.int32, torch.int32)
        assert cuts.longest_query == max(z - a for a, z in pairwise(queries))
        assert cuts.longest_key == max(z - a for a, z in pairwise(keys))
        for (a, z), (c, e) in zip(pairwise(queries), pairwise(keys), strict=True):
            yield slice(a, z), slice(c, e)

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, cuts: Cuts | None, scale: float) -> tuple[Tensor, Tensor]:
        if cuts is None:
            return super()._forward(q, k, v, None, scale)
        assert q.shape[1] == 1, "documents one row at a time"
        parts = [super(VarlenMath, self)._forward(q[a], k[c], v[c], None, scale) for a, c in self._each(cuts)]
        return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts], -1)

    def _backward(self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cuts: Cuts | None, scale: float) -> Any:
        if cuts is None:
            return super()._backward(dout, q, k, v, out, lse, None, scale)
        assert lse.is_contiguous()
        parts = [super(VarlenMath, self)._backward(dout[a], q[a], k[c], v[c], out[a], lse[:, :, a], None, scale) for a, c in self._each(cuts)]
        return tuple(torch.cat([part[i] for part in parts]) for i in range(3))


@settings(max_examples=40, deadline=None)
@given(
    core=st.sampled_from([CpuCore(), MathCore(), VarlenMath()]), rows=st.integers(1, 3), chunk=st.integers(1, 9), pieces=st.sampled_from([1, 2, 3]),
    share=st.sampled_from([0.0, 0.2, 1.0]), groups=st.integers(1, 2), repeats=st.integers(1, 3), h=st.sampled_from([2, 8]), seed=st.integers(0, 99),
    strided=st.booleans(),
)  # fmt: skip
def test_kernels_against_automatic_derivatives(
    core: Core, rows: int, chunk: int, pieces: int, share: float, groups: int, repeats: int, h: int, seed: int, strided: bool
) -> None:
    length = 2 * pieces * chunk
    ids = (torch.rand(rows, length, generator=torch.Generator().manual_seed(seed)) < share).cumsum(1)
    total = torch.zeros(2, length, rows, groups, h, dtype=torch.float64)
    packed = random(length, rows, 2, groups, h, seed=seed)
    k, v = packed.unbind(2) if strided else (x.contiguous() for x in packed.unbind(2))
    for rank in range(pieces):
        plan = plan_of(ids, rows, length, rank, pieces)
        q, dout = random(plan.queries, rows, groups * repeats, h, seed=seed + 1), random(plan.queries, rows, groups * repeats, h, seed=seed + 2)
        right = exact(dout, q, k, v, seen_by_definition(ids, rank, pieces), 0.3)
        out, lse = core.forward(q, k, v, plan, 0.3)
        assert out.is_contiguous()
        assert lse.is_contiguous()
        found = [out, lse, *core.backward(dout, q, k, v, out, lse, plan, 0.3)]
        for mine, its in zip(found, right, strict=True):
            torch.testing.assert_close(mine, its, atol=1e-11, rtol=1e-10)
        total += torch.stack(found[3:])
    assert bool((total[1] != 0).any(-1).all()), "every value has a part in something"


def test_math_in_blocks_of_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, dout = random(23, 2, 4, 8), random(23, 2, 2, 8, seed=1), random(23, 2, 2, 8, seed=2), random(23, 2, 4, 8, seed=3)
    plan, core = plan_of(None, 2, 23), MathCore()
    whole = attention_cores._both(core, dout, q, k, v, plan, 0.3)
    monkeypatch.setattr(attention_cores, "_SCORES", 5 * 2 * 4 * 23)
    assert len(list(core._blocks(q, k))) == 5
    for a, b in zip(attention_cores._both(core, dout, q, k, v, plan, 0.3), whole, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


def test_older_torch_gets_one_key_head_per_query_head(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, dout = random(9, 2, 6, 8), random(9, 2, 2, 8, seed=1), random(9, 2, 2, 8, seed=2), random(9, 2, 6, 8, seed=3)
    plan = plan_of(torch.tensor([0, 0, 0, 1, 1, 1, 1, 1, 2]).expand(2, -1), 2, 9)
    right = attention_cores._both(MathCore(), dout, q, k, v, plan, 0.3)
    for shared in (True, False):
        monkeypatch.setattr(attention_cores, "_GROUPED_CPU_KERNEL", shared)
        for a, b in zip(attention_cores._both(CpuCore(), dout, q, k, v, plan, 0.3), right, strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("core", [CpuCore(), MathCore()], ids=lambda core: core.name)
def test_a_bad_number_shows_in_a_piece(core: Core, dtype: torch.dtype) -> None:
    """Also where a document has few queries here, and few keys in all."""
    for size in (1, 2, 5, 9):
        length = 4 * size
        q, k, v = (random(n, 1, 1, 8, seed=n, dtype=dtype) for n in (2 * size, length, length))
        for ids in (None, (torch.arange(length) >= size - 1).long()[None]):
            plan = plan_of(ids, 1, length, 1, 2)  # its chunks are the second and third of four
            for token in range(2 * size):
                hurt = q.clone()
                hurt[token, 0, 0, 2] = float("nan")
                out, lse = core.forward(hurt, k, v, plan, 0.3)
                assert torch.isnan(out).any(-1).flatten().tolist() == [i == token for i in range(2 * size)]
                assert torch.isnan(lse).flatten().tolist() == [i == token for i in range(2 * size)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("core", [CpuCore(), MathCore()], ids=lambda core: core.name)
def test_an_infinite_score_shows(core: Core, dtype: torch.dtype) -> None:
    for length in (3, 20, 40):
        q, k, v = (random(length, 1, 2, 8, seed=i, dtype=dtype) for i in range(3))
        q[1, 0, 0, 2] = float("inf")
        k[:, 0, 0, 2] = 1.0
        out, _ = core.forward(q, k, v, plan_of(None, 1, length), 0.3)
        assert torch.isnan(out[1, 0, 0]).all()
        assert torch.isfinite(out[[0, *range(2, length)]]).all()
        assert torch.isfinite(out[1, 0, 1]).all()


def test_halves_of_a_sequence_add_up_in_fp32() -> None:
    """Shares of the keys' gradients stay wide until they are summed over the pieces."""
    q, k, v = (random(8, 1, 2, 8, dtype=torch.bfloat16) for _ in range(3))
    for core in (CpuCore(), MathCore()):
        plan = plan_of(None, 1, 16, 0, 2)
        long = torch.cat([k, k]), torch.cat([v, v])
        out, lse = core.forward(q, *long, plan, 0.3)
        dq, dk, dv = core.backward(out, q, *long, out, lse, plan, 0.3)
        assert (dq.dtype, dk.dtype, dv.dtype) == (torch.bfloat16, torch.float32, torch.float32)


# ---------------------------------------------------------------- the check


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("core", [CpuCore(), MathCore(), VarlenMath()], ids=lambda core: core.name)
def test_the_check_passes_what_is_right(core: Core, dtype: torch.dtype) -> None:
    assert attention_cores.self_check(core, "cpu", dtype) is None


class _Wrong(VarlenMath):
    """`math` with one mistake."""

    def __init__(self, mistake: str) -> None:
        self.mistake = mistake

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, cuts: Cuts | None, scale: float) -> tuple[Tensor, Tensor]:
        if self.mistake == "scale":
            scale *= 1.1
        if self.mistake == "heads":
            k = k.flip(2)
        if self.mistake == "no causal edge":
            k, v = k.roll(-1, 0), v.roll(-1, 0)
        if self.mistake == "top left" and cuts is None and q.shape[0] < k.shape[0]:
            k, v = k[: q.shape[0]], v[: q.shape[0]]
        if self.mistake == "one document" and cuts is not None:
            cuts = None
        out, lse = super()._forward(q, k, v, cuts, scale)
        if self.mistake == "base 2":
            lse = lse / 0.6931
        if self.mistake == "shape":
            lse = lse.unsqueeze(-1)
        if self.mistake == "one token":
            out[-1] = out[-2]
        if self.mistake == "nan":
            out[0, 0, 0, 0] = float("nan")
        return out, lse

    def _backward(self, *args: Any) -> Any:
        dq, dk, dv = super()._backward(*args)
        if self.mistake == "dq":
            dq = dq * 1.1
        if self.mistake == "dk":
            dk = dk.flip(2)
        if self.mistake == "dv":
            dv[3] = 0
        if self.mistake == "raises":
            raise RuntimeError("no kernel image")
        return dq, dk, dv


@pytest.mark.parametrize("mistake", ["scale", "heads", "no causal edge", "top left", "one document", "base 2", "one token", "nan", "dq", "dk", "dv"])
def test_the_check_catches(mistake: str) -> None:
    found = attention_cores.self_check(_Wrong(mistake), "cpu", torch.bfloat16)
    assert found is not None
    assert "is off by" in found


# ---------------------------------------------------------------- adapters of the GPU kernels, over stand-ins


def _packed(x: Tensor) -> bool:
    """FlashAttention's condition on its inputs."""
    return x.stride(-1) == 1


def _kernel() -> Any:
    """A FlashAttention-like pair of functions over `math`: [b, s, heads, h] or, with boundaries, [tokens, heads, h]."""
    judge = VarlenMath()

    def cuts_of(cu_q: Tensor | None, cu_k: Tensor | None, longest_q: Any, longest_k: Any) -> Cuts | None:
        if cu_q is None:
            return None
        assert cu_q.is_contiguous()
        assert cu_k is not None
        return Cuts(cu_q, cu_k, longest_q, longest_k)

    def tokens_first(x: Tensor, varlen: bool) -> Tensor:
        assert _packed(x)
        assert x.dim() == (3 if varlen else 4)
        return x.unsqueeze(1) if varlen else x.transpose(0, 1)

    def back(x: Tensor, varlen: bool) -> Tensor:
        return x.squeeze(1) if varlen else x.transpose(0, 1)

    def forward(q: Tensor, k: Tensor, v: Tensor, cu_q: Any, cu_k: Any, longest_q: Any, longest_k: Any, scale: float) -> tuple[Tensor, Tensor]:
        cuts = cuts_of(cu_q, cu_k, longest_q, longest_k)
        varlen = cuts is not None
        out, lse = judge._forward(*(tokens_first(x, varlen) for x in (q, k, v)), cuts, scale)
        return back(out, varlen).contiguous(), lse[0].contiguous() if varlen else lse.contiguous()

    def backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_q: Any, cu_k: Any, longest_q: Any, longest_k: Any, scale: float
    ) -> list[Tensor]:
        cuts = cuts_of(cu_q, cu_k, longest_q, longest_k)
        varlen = cuts is not None
        assert lse.is_contiguous()
        assert lse.dim() == (2 if varlen else 3)
        grads = judge._backward(
            *(tokens_first(x, varlen) for x in (dout, q, k, v, out)), lse.unsqueeze(0) if varlen else lse, cuts, scale
        )
        return [back(x, varlen).contiguous() for x in grads]

    return SimpleNamespace(forward=forward, backward=backward)


@pytest.fixture
def aten() -> Iterator[list[str]]:
    """torch's own GPU functions for attention, on a CPU: their schemas are torch's."""
    kernel, ran = _kernel(), []
    library = torch.library.Library("aten", "IMPL")

    def flash(q, k, v, cu_q, cu_k, longest_q, longest_k, dropout, causal, debug, *, scale=None, **rest):  # type: ignore[no-untyped-def]
        assert (dropout, causal, debug) == (0.0, True, False)
        ran.append("flash varlen" if cu_q is not None else "flash")
        out, lse = kernel.forward(q, k, v, cu_q, cu_k, longest_q, longest_k, scale)
        return out, lse, torch.zeros(2, dtype=torch.uint64), torch.empty(0), torch.empty(0)

    def flash_backward(dout, q, k, v, out, lse, cu_q, cu_k, longest_q, longest_k, dropout, causal, state, unused, *, scale=None, **rest):  # type: ignore[no-untyped-def]
        assert (dropout, causal) == (0.0, True)
        return tuple(kernel.backward(dout, q, k, v, out, lse, cu_q, cu_k, longest_q, longest_k, scale))

    def cudnn(q, k, v, bias, with_lse, dropout, causal, debug=False, *, scale=None):  # type: ignore[no-untyped-def]
        assert (bias, with_lse, dropout, causal, debug) == (None, True, 0.0, True, False)
        assert q.shape[2] == k.shape[2]
        ran.append("cudnn")
        out, lse = kernel.forward(*(x.transpose(1, 2) for x in (q, k, v)), None, None, None, None, scale)
        empty = torch.zeros((), dtype=torch.int64)
        return out.transpose(1, 2), lse, torch.empty(0), torch.empty(0), q.shape[2], k.shape[2], empty, empty, torch.empty(0)

    def cudnn_backward(dout, q, k, v, out, lse, seed, offset, bias, cu_q, cu_k, max_q, max_k, dropout, causal, *, scale=None):  # type: ignore[no-untyped-def]
        assert (bias, cu_q, cu_k, dropout, causal) == (None, None, None, 0.0, True)
        assert (max_q, max_k) == (q.shape[2], k.shape[2])
        found = kernel.backward(*(x.transpose(1, 2) for x in (dout, q, k, v, out)), lse, None, None, None, None, scale)
        return tuple(x.transpose(1, 2) for x in found)

    library.impl("_flash_attention_forward", flash, "CPU")
    library.impl("_flash_attention_backward", flash_backward, "CPU")
    library.impl("_scaled_dot_product_cudnn_attention", cudnn, "CPU")
    library.impl("_scaled_dot_product_cudnn_attention_backward", cudnn_backward, "CPU")
    yield ran
    library._destroy()


def test_flash2_adapter(aten: list[str]) -> None:
    assert attention_cores.self_check(Flash2Core(), "cpu", torch.bfloat16) is None
    assert set(aten) == {"flash", "flash varlen"}


def test_cudnn_adapter(aten: list[str]) -> None:
    assert attention_cores.self_check(CudnnCore(), "cpu", torch.bfloat16) is None
    assert aten == ["cudnn"], "plain rows only"


# As FlashAttention-3 declares them; arguments that are of no use here are left out.
_FLASH3 = {
    "fwd": "(Tensor q, Tensor k, Tensor v, Tensor? k_new=None, Tensor? v_new=None, Tensor? q_v=None, Tensor(out!)? out=None, "
    "Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? cu_seqlens_k_new=None, Tensor? seqused_q=None, Tensor? seqused_k=None, "
    "int? max_seqlen_q=None, int? max_seqlen_k=None, float? softmax_scale=None, bool is_causal=False, int window_size_left=-1, "
    "int window_size_right=-1, int attention_chunk=0, float softcap=0.0, int num_splits=0, bool? pack_gqa=None, int sm_margin=0) "
    "-> (Tensor(out!), Tensor, Tensor, Tensor)",
    "bwd": "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor(dq!)? dq=None, Tensor(dk!)? dk=None, "
    "Tensor(dv!)? dv=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? seqused_q=None, Tensor? seqused_k=None, "
    "int? max_seqlen_q=None, int? max_seqlen_k=None, float? softmax_scale=None, bool is_causal=False, int window_size_left=-1, "
    "int window_size_right=-1, float softcap=0.0, bool deterministic=False, int sm_margin=0) -> (Tensor, Tensor)",
}


def test_flash3_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, ran = _kernel(), []
    library = torch.library.Library("flash_attn_3", "FRAGMENT")

    def fwd(q, k, v, *rest, **options):  # type: ignore[no-untyped-def]
        names = [a.name for a in torch.ops.flash_attn_3.fwd.default._schema.arguments][3:]
        given = dict(zip(names, rest)) | options
        assert given["is_causal"]
        ran.append("varlen" if given.get("cu_seqlens_q") is not None else "dense")
        out, lse = kernel.forward(q, k, v, *(given.get(x) for x in ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")), given["softmax_scale"])
        return out, lse, torch.empty(0), torch.empty(0)

    def bwd(dout, q, k, v, out, lse, *rest, **options):  # type: ignore[no-untyped-def]
        names = [a.name for a in torch.ops.flash_attn_3.bwd.default._schema.arguments][6:]
        given = dict(zip(names, rest)) | options
        grads = kernel.backward(
            dout, q, k, v, out, lse, *(given.get(x) for x in ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")), given["softmax_scale"]
        )
        for place, grad in zip((given["dq"], given["dk"], given["dv"]), grads, strict=True):
            assert _packed(place)
            place.copy_(grad)
        return torch.empty(0), torch.empty(0)

    for name, function in (("fwd", fwd), ("bwd", bwd)):
        library.define(name + _FLASH3[name])
        library.impl(name, function, "CPU")
    monkeypatch.setitem(sys.modules, "flash_attn_interface", ModuleType("flash_attn_interface"))
    try:
        assert Flash3Core()._missing() is None
        assert attention_cores.self_check(Flash3Core(), "cpu", torch.bfloat16) is None
        assert set(ran) == {"dense", "varlen"}
    finally:
        library._destroy()


def test_flash4_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, ran = _kernel(), []

    def _flash_attn_fwd(  # type: ignore[no-untyped-def]
        q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, page_table=None,
        softmax_scale=None, causal=False, softcap=None, return_lse=False,
    ):  # fmt: skip
        assert causal
        ran.append("varlen" if cu_seqlens_q is not None else "dense")
        out, lse = kernel.forward(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale)
        return out, lse if return_lse else None

    def _flash_attn_bwd(  # type: ignore[no-untyped-def]
        q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, m_block_size=64, cu_seqlens_q=None, cu_seqlens_k=None,
        seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None,
    ):  # fmt: skip
        assert causal
        return tuple(kernel.backward(dout, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale))

    modules = {name: ModuleType(name) for name in ("flash_attn", "flash_attn.cute", "flash_attn.cute.interface")}
    interface = modules["flash_attn.cute.interface"]
    modules["flash_attn.cute"].interface = interface  # type: ignore[attr-defined]
    interface._flash_attn_fwd, interface._flash_attn_bwd = _flash_attn_fwd, _flash_attn_bwd  # type: ignore[attr-defined]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    assert Flash4Core()._missing() is None
    assert attention_cores.self_check(Flash4Core(), "cpu", torch.bfloat16) is None
    assert set(ran) == {"dense", "varlen"}
    interface._flash_attn_bwd = lambda q, k, v, out, dout, lse, softmax_scale=None, causal=False: None  # type: ignore[attr-defined]
    assert "_flash_attn_bwd takes no cu_seqlens_q: a newer one does" in str(Flash4Core()._missing())


# ---------------------------------------------------------------- the choice


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(attention_cores, "_log", SimpleNamespace(info=lambda text, *values: lines.append(text % values)))
    monkeypatch.setattr(attention_cores, "_said", set())
    monkeypatch.delenv(CORE_VARIABLE, raising=False)
    return lines


PLAIN = plan_of(None, 1, 8)


def test_the_best_that_is_here_and_said_once(said: list[str]) -> None:
    for _ in range(2):
        assert attention_cores.choose("cpu", torch.float32, 64, PLAIN).name == "sdpa"
    assert attention_cores.choose("mps", torch.float32, 64, PLAIN).name == "math"
    assert said == ["attention core on cpu: sdpa", "attention core on mps: math"]


def test_the_environment_decides(said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CORE_VARIABLE, "math")
    assert attention_cores.choose("cpu", torch.float32, 64, PLAIN).name == "math"
    assert attention_cores.choose("cpu", torch.float32, 64, PLAIN, "sdpa").name == "sdpa"
    monkeypatch.setenv(CORE_VARIABLE, "flash2")
    with pytest.raises(EnvironmentProblem, match=rf"'flash2' on cpu(?s:.*)a kernel for GPUs(?s:.*){CORE_VARIABLE}"):
        attention_cores.choose("cpu", torch.float32, 64, PLAIN)
    monkeypatch.setenv(CORE_VARIABLE, "quick")
    with pytest.raises(EnvironmentProblem, match=rf"auto, flash3(?s:.*)'quick'(?s:.*){CORE_VARIABLE}"):
        attention_cores.choose("cpu", torch.float32, 64, PLAIN)
    monkeypatch.setenv(CORE_VARIABLE, "")
    assert attention_cores.choose("cpu", torch.float32, 64, PLAIN).name == "sdpa"


def test_every_core_has_a_reason_or_none() -> None:
    assert attention_cores.cores("cpu") == {
        "flash3": "a kernel for GPUs", "flash4": "a kernel for GPUs", "cudnn": "a kernel for GPUs", "flash2": "a kernel for GPUs", "sdpa": None, "math": None,
    }  # fmt: skip
    found = attention_cores.cores("cuda")
    assert found["math"] is None
    assert found["sdpa"] == "a kernel for CPUs"
    if not torch.cuda.is_available():
        assert {found[name] for name in ("flash3", "flash4", "cudnn", "flash2")} == {"there is no GPU here"}


def test_what_gpu_kernels_refuse(said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    documents = plan_of(torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]]), 1, 8)
    piece = plan_of(None, 1, 8, 1, 2)
    half = torch.bfloat16
    for core in (Flash2Core(), Flash3Core(), Flash4Core(), CudnnCore()):
        assert core.refuses(half, 64, PLAIN) is None
        assert "not torch.float32" in str(core.refuses(torch.float32, 64, PLAIN))
        assert "not 60" in str(core.refuses(half, 60, PLAIN))
        assert "not 512" in str(core.refuses(half, 512, PLAIN))
        takes = core.name != "cudnn"
        assert (core.refuses(half, 64, documents) is None, core.refuses(half, 64, piece) is None) == (takes, takes)
    # Were they here, cuDNN would do plain rows, FlashAttention documents, and `math` what neither can.
    monkeypatch.setattr(attention_cores._GpuCore, "absent", lambda self, device: None if self.name in ("cudnn", "flash2") else "not built")
    monkeypatch.setattr(attention_cores._GpuCore, "disagrees", lambda self, dtype, head_dim: None)
    for dtype, plan, name in ((half, PLAIN, "cudnn"), (half, documents, "flash2"), (half, piece, "flash2"), (torch.float32, PLAIN, "math")):
        assert attention_cores.choose("cuda", dtype, 64, plan).name == name
    with pytest.raises(EnvironmentProblem, match="it takes no documents"):
        attention_cores.choose("cuda", half, 64, documents, "cudnn")


def test_a_kernel_that_fails_its_check_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    times: list[int] = []

    class Broken(Flash2Core):
        def _missing(self) -> str | None:
            return None

    def check(core: Core, device: str, dtype: torch.dtype, head_dim: int) -> str | None:
        times.append(head_dim)
        if head_dim == 64:
            return None
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(attention_cores, "self_check", check)
    core = Broken()
    for _ in range(2):
        assert core.absent("cuda") is None
        assert core.disagrees(torch.bfloat16, 128) == "its self-check did not run: RuntimeError: no kernel image"
    assert times == [64, 128], "each size of heads once per process"
    monkeypatch.setattr(attention_cores, "CORES", (core, MathCore()))
    assert attention_cores.choose("cuda", torch.bfloat16, 64, PLAIN) is core
    assert attention_cores.choose("cuda", torch.bfloat16, 128, PLAIN).name == "math"
    with pytest.raises(EnvironmentProblem, match="no kernel image"):
        attention_cores.choose("cuda", torch.bfloat16, 128, PLAIN, "flash2")


# ---------------------------------------------------------------- on a GPU


@GPU
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["flash3", "flash4", "cudnn", "flash2"])
def test_gpu_kernels(name: str) -> None:
    core = next(core for core in attention_cores.CORES if core.name == name)
    missing = core._missing()  # type: ignore[attr-defined]
    if missing:
        pytest.skip(missing)
    for dtype in (torch.bfloat16, torch.float16):
        for head_dim in (64, 128):
            assert attention_cores.self_check(core, "cuda", dtype, head_dim) is None


@GPU
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("documents", [False, True])
def test_attention_on_a_gpu(documents: bool) -> None:
    qkv = random(300, 2, 8 * 64, dtype=torch.bfloat16)
    ids = torch.arange(3).repeat_interleave(100).expand(2, -1) if documents else None
    results = {}
    for device, dtype, implementation in (("cpu", torch.float64, "reference"), ("cuda", torch.bfloat16, None), ("cuda", torch.float32, None)):
        x = qkv.to(device, dtype).requires_grad_()
        out = qknorm_attention(
            x, num_kv_heads=2, head_dim=64, rope_theta=1e4, eps=1e-5, segment_ids=None if ids is None else ids.to(device), implementation=implementation
        )
        results[dtype] = [out.detach().cpu().double(), *(g.cpu().double() for g in torch.autograd.grad(out.square().sum(), x))]
    for dtype, bound in ((torch.bfloat16, 0.03), (torch.float32, 1e-3)):
        for mine, right in zip(results[dtype], results[torch.float64], strict=True):
            assert (mine - right).abs().max() <= bound * right.abs().max()
