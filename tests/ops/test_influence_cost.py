"""The cost model of document scores: it picks what was measured to be fastest, and behaves as costs do."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r1.ops import influence_cost
from megatron_r1.ops.influence_cost import ALL, CPU, gpu_method, measure_cpu, plan, rows_below
from megatron_r1.utils.errors import DataError

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

# Time over that of the plain weight gradient, one thread of an AVX-512 core (noisy, +-5 %): (lengths, width, probes, dtype,
# probe dtype, with the weight gradient) -> (stream, rows).
MEASURED = {
    ((1024,) * 4, 1536, 1, F32, F32, True): (1.08, 2.10),
    ((1024,) * 4, 1536, 4, F32, F32, True): (1.13, 5.24),
    ((1024,) * 4, 1536, 16, F32, F32, True): (1.26, 18.00),
    ((256,) * 16, 768, 1, F32, F32, True): (1.13, 2.11),
    ((64,) * 64, 768, 1, F32, F32, True): (1.19, 2.06),
    ((16,) * 256, 768, 1, F32, F32, True): (1.61, 2.08),
    ((64,) * 64, 768, 4, F32, F32, True): (1.37, 5.18),
    ((64,) * 64, 768, 16, F32, F32, True): (1.96, 17.67),
    ((1024,) * 4, 1536, 1, BF16, BF16, True): (1.12, 1.95),
    ((1024,) * 4, 1536, 4, BF16, BF16, True): (1.22, 4.71),
    ((1024,) * 4, 1536, 1, F32, F32, False): (1.06, 1.03),
    ((1024,) * 4, 1536, 4, F32, F32, False): (1.13, 4.20),
    ((16,) * 256, 768, 1, F32, F32, False): (1.43, 1.05),
    ((1024,) * 4, 1536, 1, BF16, BF16, False): (1.07, 0.91),
    ((1024,) * 4, 1536, 1, BF16, F32, False): (1.11, 4.04),
}


@pytest.mark.parametrize("case", MEASURED, ids=str)
def test_it_picks_what_was_measured_to_be_fastest(case: tuple) -> None:
    lengths, width, probes, dtype, probe_dtype, gradient = case
    made = plan(lengths, width, width, probes, "cpu", gradient, dtype=dtype, probe_dtype=probe_dtype)
    stream, rows = MEASURED[case]
    assert made.method == ("stream" if stream < rows else "rows")
    base = 2.0 * sum(lengths) * width**2 / CPU.flops[dtype]
    for estimate in made.estimates:
        assert estimate.seconds / base == pytest.approx({"stream": stream, "rows": rows}[estimate.method], rel=0.25)


# What a step of a 950M model was estimated to spend on the linear layers' scores (H200, bf16, one probe gradient).
@pytest.mark.parametrize(
    ("length", "probes", "fused", "method"),
    [(2048, 1, True, "fused"), (8192, 1, True, "fused"), (512, 1, True, "fused"), (2048, 4, True, "fused"), (16, 1, True, "rows"),
     (512, 1, False, "rows"), (64, 4, False, "rows"), (2048, 4, False, "stream"), (32768, 4, False, "stream"), (32768, 1, False, "stream")],
)  # fmt: skip
def test_on_a_gpu(length: int, probes: int, fused: bool, method: str) -> None:
    documents = max(32768 // length, 1)
    made = plan([length] * documents, 1536, 1536, probes, "cuda", dtype=BF16, fused=fused)
    assert made.method == method
    assert gpu_method(length * documents, documents, 1536, 1536, probes, BF16, BF16, True, fused) == method
    assert made.rows_below == (ALL if method == "rows" else 0)


def test_the_fused_kernel_costs_what_it_was_designed_to() -> None:
    """A quarter more than cuBLAS's product at long documents, and one eighth of a document of 512 tokens for its end."""
    base = 2.0 * 32768 * 1536**2 / influence_cost.GPU.flops[BF16]

    def ratio(length: int) -> float:
        made = plan([length] * (32768 // length), 1536, 1536, 1, "cuda", dtype=BF16, fused=True)
        return next(e.seconds for e in made.estimates if e.method == "fused") / base

    assert ratio(32768) == pytest.approx(1.25, abs=0.05)
    assert ratio(512) - ratio(32768) == pytest.approx(1 / 8, abs=0.02)


def test_fp32_has_no_fused_kernel() -> None:
    assert "fused" not in {e.method for e in plan([2048] * 16, 1536, 1536, 1, "cuda", dtype=F32, fused=True).estimates}


def test_short_documents_among_long_ones_go_by_rows() -> None:
    border = rows_below(1536, 1536, 1, "cpu", F32)
    assert 1 < border < 64
    made = plan([border - 1, 3, 2048], 1536, 1536, 1)
    assert (made.method, made.rows_below) == ("mixed", border)
    assert [e.method for e in made.estimates] == ["mixed", "stream", "rows"]
    assert plan([border, 2048], 1536, 1536, 1).method == "stream"
    assert plan([border - 1] * 5, 1536, 1536, 1).method == "rows"


def test_why_says_what_was_weighed() -> None:
    made = plan([2048, 0, 2048], 1536, 768, 2)
    for word in ("stream", "rows", "2 documents of 2048 tokens", "2 probes", "[768, 1536]", "with the weight gradient", "cpu"):
        assert word in made.why
    assert "estimates for an H200" in plan([2048], 8, 8, 1, "cuda").why


layers = st.tuples(st.lists(st.integers(0, 3000), min_size=1, max_size=8), st.integers(64, 4096), st.integers(64, 4096), st.integers(1, 32), st.booleans(), st.sampled_from([F32, BF16, F16]))


@settings(max_examples=60, deadline=None)
@given(layers)
def test_costs_are_monotone(layer: tuple) -> None:
    lengths, din, dout, probes, gradient, dtype = layer

    def cost(lengths: list[int], din: int, dout: int, probes: int, gradient: bool, device: str) -> dict[str, float]:
        return {e.method: e.seconds for e in plan(lengths, din, dout, probes, device, gradient, dtype=dtype, fused=True).estimates if e.method != "mixed"}

    for device in ("cpu", "cuda"):
        base = cost(lengths, din, dout, probes, gradient, device)
        more = (
            ([*lengths, 100], din, dout, probes, gradient), ([lengths[0] + 1, *lengths[1:]], din, dout, probes, gradient), (lengths, din + 64, dout, probes, gradient),
            (lengths, din, dout + 64, probes, gradient), (lengths, din, dout, probes + 1, gradient), (lengths, din, dout, probes, True),
        )  # fmt: skip
        for other in more:
            for method, seconds in cost(*other, device).items():
                assert seconds >= base[method] * (1 - 1e-12), method
        made = plan(lengths, din, dout, probes, device, gradient, dtype=dtype, fused=True)
        assert made.seconds == min(e.seconds for e in made.estimates)


@settings(max_examples=60, deadline=None)
@given(layers)
def test_more_probes_never_favour_rows(layer: tuple) -> None:
    lengths, din, dout, probes, gradient, dtype = layer
    del lengths
    assert rows_below(din, dout, probes + 1, "cpu", dtype, None, gradient) <= rows_below(din, dout, probes, "cpu", dtype, None, gradient)
    # One document on its own: longer ones never go back to rows.
    methods = [plan([length], din, dout, probes, "cpu", gradient, dtype=dtype).method for length in (1, 4, 16, 64, 256, 1024)]
    assert methods == sorted(methods)  # "rows" before "stream"


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("lengths", ([3, -1], 8, 8, 1)), ("din", ([3], 0, 8, 1)), ("dout", ([3], 8, 0, 1)), ("probes", ([3], 8, 8, -1)), ("device", ([3], 8, 8, 1, "tpu"))],
)
def test_bad_arguments_are_named(name: str, arguments: tuple) -> None:
    with pytest.raises(DataError, match=f"expected: {name}"):
        plan(*arguments)
    with pytest.raises(DataError, match="expected: dtype"):
        plan([3], 8, 8, 1, dtype=torch.int32)


def test_a_machine_can_be_measured_and_given() -> None:
    machine = measure_cpu()
    assert all(speed > 1e8 for speed in machine.flops.values())
    assert machine.near > 1e8
    assert machine.far > 1e8
    made = plan([2048] * 2, 1536, 1536, 4, machine=machine)
    assert made.method == "stream"
    assert "measured here" in made.why
