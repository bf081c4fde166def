"""Fused QK-norm and RoPE, every implementation: against fp64 written with complex numbers, against Hugging Face's models, and misuse.

Legend: s tokens, b rows, nq query heads, nkv key/value heads, h head size, rot rotated elements of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_r1.ops import extension
from megatron_r1.ops import qk_norm_rope as module
from megatron_r1.ops.qk_norm_rope import QK_NORM_ROPE, qk_norm_rope, qk_norm_rope_backward, qk_norm_rope_forward
from megatron_r1.ops.rope import cos_sin, rope_table
from megatron_r1.utils.errors import DataError

IMPLEMENTATIONS = ["csrc", "analytic", "reference"]
ROWS = 50  # of the table of angles
# Relative to the largest entry. One rounding for the 16-bit types, sums in another order for the others.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float64: 1e-13}


def need_compiled() -> None:
    if reason := QK_NORM_ROPE.reasons("cpu")["csrc"]:
        pytest.skip(reason)


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest) -> str:
    if request.param == "csrc":
        need_compiled()
    return request.param


@dataclass(frozen=True)
class Case:
    """Sizes and settings of one call; `call` makes its tensors."""

    s: int = 5
    b: int = 2
    nq: int = 4
    nkv: int = 2
    h: int = 64
    rot: int | None = None
    dtype: torch.dtype = torch.float32
    norm: str = "rms"
    interleaved: bool = True
    grouped: bool = True
    weights: bool = False
    weight_dtype: torch.dtype | None = None
    broadcast: bool = False
    eps: float = 1e-3
    seed: int = 0

    @property
    def wide(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def call(self) -> dict[str, Any]:
        """Arguments of `qk_norm_rope`, all leaves that have a gradient requiring it."""
        g = torch.Generator().manual_seed(self.seed)
        rot = self.h if self.rot is None else self.rot
        angles = 6 * torch.rand(ROWS, rot // 2, generator=g, dtype=torch.float64)
        qkv = torch.randn(self.s, self.b, (self.nq + 2 * self.nkv) * self.h, generator=g, dtype=torch.float64)
        weights = torch.randn(2, self.h, generator=g, dtype=torch.float64).to(self.weight_dtype or self.dtype)
        return {
            "qkv": qkv.to(self.dtype).requires_grad_(),
            "num_heads": self.nq,
            "num_kv_heads": self.nkv,
            "head_dim": self.h,
            "cos": angles.cos().to(self.wide),
            "sin": angles.sin().to(self.wide),
            "positions": torch.randint(0, ROWS, (self.s,) if self.broadcast else (self.s, self.b), generator=g),
            "norm": self.norm,
            "q_weight": weights[0].clone().requires_grad_() if self.weights else None,
            "k_weight": weights[1].clone().requires_grad_() if self.weights else None,
            "eps": self.eps,
            "interleaved": self.interleaved,
            "grouped": self.grouped,
        }


def output_gradients(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(99)
    return tuple(torch.randn(case.s, case.b, n, case.h, generator=g, dtype=torch.float64).to(case.dtype) for n in (case.nq, case.nkv, case.nkv))


def everything(call: dict[str, Any], grads: tuple[Tensor, ...], function: Callable[..., tuple[Tensor, ...]] = qk_norm_rope, **more: Any) -> list[Tensor]:
    """q, k, v, dqkv and, if there are gains, dq_weight, dk_weight."""
    out = function(**call, **more)
    leaves = [call[name] for name in ("qkv", "q_weight", "k_weight") if call[name] is not None]
    return [*(t.detach() for t in out), *torch.autograd.grad(out, leaves, grads)]


def exact(
    qkv: Tensor, num_heads: int, num_kv_heads: int, head_dim: int, cos: Tensor, sin: Tensor, positions: Tensor, norm: str,
    q_weight: Tensor | None, k_weight: Tensor | None, eps: float, interleaved: bool, grouped: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """One head after another, as complex numbers."""
    s, b, _ = qkv.shape
    turns = torch.complex(cos, sin)[positions if positions.dim() == 2 else positions[:, None].expand(s, b)]
    pairs = turns.shape[-1]
    heads = [qkv[..., i * head_dim : (i + 1) * head_dim] for i in range(num_heads + 2 * num_kv_heads)]
    if grouped:
        per = num_heads // num_kv_heads
        order = [("q" if i % (per + 2) < per else "k" if i % (per + 2) == per else "v") for i in range(len(heads))]
    else:
        order = ["q"] * num_heads + ["k"] * num_kv_heads + ["v"] * num_kv_heads
    out: dict[str, list[Tensor]] = {"q": [], "k": [], "v": []}
    for kind, x in zip(order, heads):
        if kind == "v":
            out["v"].append(x)
            continue
        length = torch.linalg.vecdot(x, x).unsqueeze(-1)
        x = {"rms": lambda x, n: x / (n / head_dim + eps).sqrt(), "l2": lambda x, n: x / (n + eps).sqrt(), "none": lambda x, n: x}[norm](x, length)
        weight = q_weight if kind == "q" else k_weight
        x = x if weight is None else x * weight
        if interleaved:
            z = torch.complex(x[..., 0 : 2 * pairs : 2], x[..., 1 : 2 * pairs : 2]) * turns
            turned = torch.stack([z.real, z.imag], -1).flatten(-2)
        else:
            z = torch.complex(x[..., :pairs], x[..., pairs : 2 * pairs]) * turns
            turned = torch.cat([z.real, z.imag], -1)
        out[kind].append(torch.cat([turned, x[..., 2 * pairs :]], -1))
    return tuple(torch.stack(out[kind], 2) for kind in "qkv")


def in_fp64(call: dict[str, Any], grads: tuple[Tensor, ...]) -> list[Tensor]:
    call = {name: t.detach().double().requires_grad_(t.requires_grad) if isinstance(t, Tensor) and t.is_floating_point() else t for name, t in call.items()}
    return everything(call, tuple(g.double() for g in grads), exact)


NAMES = ("q", "k", "v", "dqkv", "dq_weight", "dk_weight")


def off(ours: Tensor, right: Tensor) -> float:
    assert ours.shape == right.shape
    return 0.0 if not right.numel() else float((ours.double() - right).abs().max() / right.abs().max().clamp_min(1e-30))


def agree(case: Case, call: dict[str, Any], implementation: str) -> None:
    grads = output_gradients(case)
    ours = everything(call, grads, implementation=implementation)
    for name, x, y in zip(NAMES, ours, in_fp64(call, grads)):
        assert x.dtype == (call[name[1:]].dtype if "weight" in name else case.dtype)
        # The 16-bit plain-torch backward of the definition rounds more than once; that it is the worst is tested below.
        room = 8 if implementation == "reference" and case.dtype in (torch.bfloat16, torch.float16) else 2
        assert off(x, y) <= room * TOLERANCE[x.dtype], f"{name} of {implementation} is off by {off(x, y):.1e}"


# ------------------------------------------------------------------------------------------------------- right results


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("h", [64, 128, 32, 256, 6])
@pytest.mark.parametrize("interleaved", [True, False], ids=["pairs", "split"])
def test_against_fp64(implementation: str, dtype: torch.dtype, h: int, interleaved: bool) -> None:
    for norm, grouped, weights in (("rms", True, False), ("rms", False, True), ("l2", True, True), ("none", False, False)):
        case = Case(h=h, dtype=dtype, interleaved=interleaved, norm=norm, grouped=grouped, weights=weights, nq=6, b=3 if weights else 1)
        agree(case, case.call(), implementation)


@settings(max_examples=60, deadline=None)
@given(
    s=st.integers(0, 41), b=st.integers(0, 3), nkv=st.integers(1, 3), r=st.integers(1, 3), h=st.sampled_from([2, 6, 64, 66, 128]),
    rot=st.sampled_from([0.0, 0.3, 1.0, 1.0]), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    norm=st.sampled_from(["rms", "l2"]), weights=st.booleans(), interleaved=st.booleans(), grouped=st.booleans(), broadcast=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_any_sizes(s: int, b: int, nkv: int, r: int, h: int, rot: float, **more: Any) -> None:
    case = Case(s=s, b=b, nkv=nkv, nq=r * nkv, h=h, rot=2 * int(rot * h / 2), **more)
    for implementation, reason in QK_NORM_ROPE.reasons("cpu").items():
        if reason is None:
            agree(case, case.call(), implementation)


@pytest.mark.parametrize("sizes", [{"s": 1, "b": 1}, {"s": 0}, {"b": 0}, {"nq": 3, "nkv": 3}, {"nq": 1, "nkv": 1, "s": 33}, {"s": 77, "b": 3}])
def test_odd_sizes(implementation: str, sizes: dict[str, int]) -> None:
    case = Case(weights=True, **sizes)
    agree(case, case.call(), implementation)
    if not case.s * case.b:
        ours = everything(case.call(), output_gradients(case), implementation=implementation)
        assert all(torch.equal(dw, torch.zeros(64)) for dw in ours[4:])


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_gains_in_fp32_beside_bf16(implementation: str, weight_dtype: torch.dtype) -> None:
    case = Case(dtype=torch.bfloat16, weights=True, weight_dtype=weight_dtype)
    agree(case, case.call(), implementation)


@pytest.mark.parametrize("which", ["q_weight", "k_weight"])
def test_one_gain_alone(implementation: str, which: str) -> None:
    case = Case(weights=True)
    call, grads = case.call(), output_gradients(case)
    call[which] = None
    for x, y in zip(everything(call, grads, implementation=implementation), in_fp64(call, grads)):
        assert off(x, y) <= 4e-6


@pytest.mark.parametrize("h", [64, 66])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_strides(implementation: str, h: int, dtype: torch.dtype) -> None:
    case = Case(h=h, dtype=dtype, weights=True, s=9)
    call, grads = case.call(), output_gradients(case)
    expected = everything(call, grads, implementation=implementation)
    x = call["qkv"].detach()
    wide = torch.full((9, 2, x.shape[-1] + 7), float("nan"), dtype=dtype)
    wide[..., 3:-4] = x
    swapped = x.transpose(0, 1).contiguous().transpose(0, 1)
    for other in (wide[..., 3:-4], swapped):
        assert not other.is_contiguous()
        # Gradients as attention hands them out, and positions that are every second one of a longer list.
        laid_out = tuple(g.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3) for g in grads)
        positions = call["positions"].repeat_interleave(2, 1)[:, ::2]
        again = everything({**call, "qkv": other.detach().requires_grad_(), "positions": positions}, laid_out, implementation=implementation)
        for name, x, y in zip(NAMES, again, expected):
            # Sums over tokens by torch follow the layout in memory.
            assert torch.equal(x, y) or (implementation != "csrc" and "weight" in name and off(x, y.double()) < 1e-5), name


def test_broadcast_positions(implementation: str) -> None:
    case = Case(s=7, b=3)
    call = case.call()
    line = call["positions"][:, 0].contiguous()
    results = [
        everything({**call, "positions": p}, output_gradients(case), implementation=implementation)
        for p in (line, line[:, None].expand(7, 3), line[:, None].repeat(1, 3))
    ]
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other))


def test_expanded_gradients(implementation: str) -> None:
    """Those of a sum: stride 0 everywhere."""
    call = Case().call()
    q, k, v = qk_norm_rope(**call, implementation=implementation)
    (got,) = torch.autograd.grad(q.sum() + k.sum() + v.sum(), call["qkv"])
    (right,) = torch.autograd.grad(sum(t.sum() for t in exact(**call)), call["qkv"])
    assert off(got, right.double()) < 1e-5


def test_values_are_a_view_and_the_rest_is_not(implementation: str) -> None:
    call = Case().call()
    qkv = call["qkv"].detach()
    q, k, v = qk_norm_rope_forward(**{**call, "qkv": qkv}, implementation=implementation)
    v.fill_(7)
    assert int((qkv == 7).sum()) == v.numel()
    assert q.is_contiguous()
    assert k.is_contiguous()
    assert q.untyped_storage().data_ptr() != qkv.untyped_storage().data_ptr() != k.untyped_storage().data_ptr()


def test_only_some_outputs_used(implementation: str) -> None:
    call = Case(weights=True).call()
    _, k, _ = qk_norm_rope(**call, implementation=implementation)
    got = torch.autograd.grad(k.square().sum(), [call["qkv"], call["k_weight"]])
    right = torch.autograd.grad(exact(**call)[1].square().sum(), [call["qkv"], call["k_weight"]])
    assert all(off(x, y.double()) < 1e-5 for x, y in zip(got, right))


def test_the_functions_without_derivatives(implementation: str) -> None:
    case = Case(weights=True, dtype=torch.bfloat16, weight_dtype=torch.float32)
    call, grads = case.call(), output_gradients(case)
    expected = everything(call, grads, implementation=implementation)
    out = qk_norm_rope_forward(**call, implementation=implementation)
    assert not any(t.requires_grad for t in out)
    back = qk_norm_rope_backward(*grads, **call, implementation=implementation)
    for x, y in zip((*out, *back), expected):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)
    assert qk_norm_rope_backward(*grads, **{**call, "q_weight": None, "k_weight": None}, implementation=implementation)[1:] == (None, None)


def test_a_second_derivative_is_refused() -> None:
    call = Case().call()
    (g,) = torch.autograd.grad(qk_norm_rope(**call)[0].square().sum(), call["qkv"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()


def test_table_of_angles() -> None:
    for length in (1, 9, 300):
        cos, sin = cos_sin(length, 64, 1e4, torch.device("cpu"))
        table = rope_table(length, 64, 1e4, torch.device("cpu"))
        assert cos.is_contiguous()
        assert sin.is_contiguous()
        assert torch.equal(torch.complex(cos, sin), table)


# ------------------------------------------------------------------------------------------------------------ accuracy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("h", [64, 96])
def test_error_at_most_twice_that_of_plain_torch(dtype: torch.dtype, h: int) -> None:
    for implementation in ("csrc", "analytic"):
        if QK_NORM_ROPE.reasons("cpu")[implementation]:
            continue
        for interleaved in (True, False):
            case = Case(s=301, b=2, nq=6, h=h, dtype=dtype, weights=True, interleaved=interleaved, eps=1e-5)
            call, grads = case.call(), output_gradients(case)
            right = in_fp64(call, grads)
            results = [everything(call, grads, implementation=i) for i in (implementation, "reference")]
            for name, ours, plain, y in zip(NAMES, *results, right):
                errors = [float((x.double() - y).norm()) for x in (ours, plain)]
                assert errors[0] <= 2 * errors[1], f"{implementation} {name}: error {errors[0]:.2e}, plain torch has {errors[1]:.2e}"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("interleaved", [True, False])
def test_every_16_bit_number_is_read_and_rounded_as_torch_does(implementation: str, dtype: torch.dtype, interleaved: bool) -> None:
    """Angles of (c, 0) and no norm: y = round(c * x). Among the c: ties, overflow, subnormal numbers."""
    numbers = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    x = numbers[numbers.isfinite()]
    x = torch.cat([x, x.new_zeros(-len(x) % (3 * 64))]).view(-1, 1, 3 * 64)
    for c in (1.0, 0.5, 2.0**-9, 1 + 2.0**-11, 1 + 2.0**-8, 1.4142135, 3.1e-5, 700.0, 1e-30, 1e30):
        cos = torch.full((1, 32), c)
        q, k, _ = qk_norm_rope_forward(
            x, num_heads=1, num_kv_heads=1, head_dim=64, cos=cos, sin=torch.zeros_like(cos), positions=torch.zeros(len(x), dtype=torch.int64),
            norm="none", interleaved=interleaved, implementation=implementation,
        )  # fmt: skip
        right = (x.float() * c).to(dtype)
        got = torch.cat([q, k, right[..., 128:].unsqueeze(2)], 2).flatten(2)
        assert torch.equal(got, right), f"{int((got != right).sum())} numbers times {c}"


@pytest.mark.parametrize("scale", [1e-18, 1e17])
def test_very_small_and_very_large_numbers(implementation: str, scale: float) -> None:
    """Sums of squares near the ends of fp32's range."""
    if implementation == "reference":
        pytest.skip("automatic derivatives form 1 / norm^3, which leaves fp32's range")
    case = Case(eps=1e-37 if scale < 1 else 0.0)
    call = case.call()
    call["qkv"] = (call["qkv"].detach() * scale).requires_grad_()
    grads = output_gradients(case)
    for name, x, y in zip(NAMES, everything(call, grads, implementation=implementation), in_fp64(call, grads)):
        assert off(x, y) < 1e-4, name


def test_a_head_of_zeros(implementation: str) -> None:
    call = Case().call()
    call["qkv"] = torch.zeros_like(call["qkv"]).requires_grad_()
    ours = everything(call, output_gradients(Case()), implementation=implementation)
    assert not ours[0].any()
    assert torch.isfinite(ours[3]).all()


# ------------------------------------------------------------------------------------------------- Hugging Face's models


def captured(attention: torch.nn.Module, hidden: Tensor, embeddings: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Packed qkv [s, b, X] (flat) of a model's attention, and the q and k [s, b, heads, h] it gives to its core."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    seen: list[Tensor] = []

    def core(layer: Any, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **more: Any) -> tuple[Tensor, None]:
        seen.extend([q, k])
        return q.transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS.register("capture", core)
    attention.config._attn_implementation = "capture"
    with torch.no_grad():
        attention(hidden, embeddings, None)
        qkv = torch.cat([project(hidden) for project in (attention.q_proj, attention.k_proj, attention.v_proj)], -1)
    q, k = (t.permute(2, 0, 1, 3) for t in seen)
    return qkv.transpose(0, 1), q, k


SIZES = {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2, "num_hidden_layers": 1, "vocab_size": 8, "intermediate_size": 8}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("h", [64, 128, 48])
def test_parity_with_llama4(implementation: str, dtype: torch.dtype, h: int) -> None:
    llama4 = pytest.importorskip("transformers.models.llama4.modeling_llama4")
    config = llama4.Llama4TextConfig(**SIZES, head_dim=h, use_qk_norm=True, rms_norm_eps=1e-5, intermediate_size_mlp=8, num_local_experts=1)
    torch.manual_seed(3)
    attention = llama4.Llama4TextAttention(config, 0).to(dtype)
    hidden, positions = torch.randn(2, 61, 96).to(dtype), torch.arange(61).repeat(2, 1)
    positions[1] += 1000
    table = llama4.Llama4TextRotaryEmbedding(config)(hidden, positions)
    qkv, *theirs = captured(attention, hidden, table)
    # A row of the table for every token of every row: theirs, so that not even an angle differs.
    cos, sin = (t.reshape(122, -1).contiguous() for t in (table.real, table.imag))
    ours = qk_norm_rope_forward(
        qkv, num_heads=6, num_kv_heads=2, head_dim=h, cos=cos, sin=sin, positions=torch.arange(122).view(2, 61).T, eps=1e-5,
        interleaved=True, grouped=False, parity=True, implementation=implementation,
    )  # fmt: skip
    for x, y in zip(ours, theirs):
        assert torch.equal(x, y), f"{int((x != y).sum())} of {x.numel()} differ"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("h", [64, 128, 48])
def test_parity_with_qwen3(implementation: str, dtype: torch.dtype, h: int) -> None:
    qwen3 = pytest.importorskip("transformers.models.qwen3.modeling_qwen3")
    config = qwen3.Qwen3Config(**SIZES, head_dim=h, rms_norm_eps=1e-6)
    torch.manual_seed(3)
    attention = qwen3.Qwen3Attention(config, 0)
    with torch.no_grad():
        attention.q_norm.weight.normal_(1, 0.3)
        attention.k_norm.weight.normal_(1, 0.3)
    attention = attention.to(dtype)
    hidden, positions = torch.randn(2, 61, 96).to(dtype), torch.arange(61).repeat(2, 1)
    positions[1] += 1000
    rotary = qwen3.Qwen3RotaryEmbedding(config)
    qkv, *theirs = captured(attention, hidden, rotary(hidden, positions))
    cos, sin = (t[..., : h // 2].reshape(122, -1).contiguous() for t in rotary(hidden.float(), positions))
    ours = qk_norm_rope_forward(
        qkv, num_heads=6, num_kv_heads=2, head_dim=h, cos=cos, sin=sin, positions=torch.arange(122).view(2, 61).T, eps=1e-6,
        q_weight=attention.q_norm.weight, k_weight=attention.k_norm.weight,
        interleaved=False, grouped=False, parity=True, implementation=implementation,
    )  # fmt: skip
    for x, y in zip(ours, theirs):
        assert torch.equal(x, y), f"{int((x != y).sum())} of {x.numel()} differ"


@pytest.mark.parametrize("interleaved", [True, False])
def test_gradients_with_parity_are_those_of_the_function(implementation: str, interleaved: bool) -> None:
    case = Case(s=30, dtype=torch.bfloat16, interleaved=interleaved, weights=not interleaved)
    call, grads = case.call(), output_gradients(case)
    ours = everything(call, grads, implementation=implementation, parity=True)
    if not interleaved:  # its cosines and sines are rounded ones, in the backward too
        call.update({name: call[name].bfloat16().float() for name in ("cos", "sin")})
    for name, x, y in zip(NAMES, ours, in_fp64(call, grads)):
        assert off(x, y) < (0.03 if implementation == "reference" or name in "qk" else 2 * TOLERANCE[torch.bfloat16]), name


# ------------------------------------------------------------------------------------------------------ torch's machinery


def operator_arguments(case: Case) -> tuple[Any, ...]:
    c = case.call()
    tensors = [c[name] for name in ("qkv", "q_weight", "k_weight", "cos", "sin", "positions")]
    return (*tensors, case.nq, case.nkv, case.h, ("none", "rms", "l2").index(case.norm), case.eps, case.interleaved, case.grouped, False)


MIXED = Case(weights=True, dtype=torch.bfloat16, weight_dtype=torch.float32, grouped=False, interleaved=False)


@pytest.mark.parametrize("case", [Case(), MIXED, Case(s=0, weights=True)])
def test_opcheck(case: Case) -> None:
    need_compiled()
    arguments = operator_arguments(case)
    torch.library.opcheck(torch.ops.megatron_r1.qk_norm_rope_fwd.default, arguments)
    detached = [t.detach() if isinstance(t, Tensor) else t for t in arguments]
    torch.library.opcheck(torch.ops.megatron_r1.qk_norm_rope_bwd.default, (*output_gradients(case), *detached))


def test_the_operator_has_a_derivative() -> None:
    need_compiled()
    case = Case(weights=True)
    call, grads = case.call(), output_gradients(case)
    leaves = [call[name] for name in ("qkv", "q_weight", "k_weight")]
    out = torch.ops.megatron_r1.qk_norm_rope_fwd(*leaves, call["cos"], call["sin"], call["positions"], 4, 2, 64, 1, case.eps, True, True, False)
    got = torch.autograd.grad(out, leaves, grads[:2])
    right = torch.autograd.grad(exact(**call)[:2], leaves, grads[:2])
    assert all(off(x, y.double()) < 1e-5 for x, y in zip(got, right))


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("norm", ["rms", "l2", "none"])
def test_gradcheck(implementation: str, interleaved: bool, norm: str) -> None:
    for rot, grouped in ((8, True), (6, False)):
        case = Case(s=2, b=2, nq=2, nkv=1, h=8, rot=rot, dtype=torch.float64, norm=norm, interleaved=interleaved, grouped=grouped, weights=norm != "none")
        call = case.call()
        names = [name for name in ("qkv", "q_weight", "k_weight") if call[name] is not None]

        def run(*leaves: Tensor, call: dict = call, names: list = names) -> tuple[Tensor, ...]:
            return qk_norm_rope(**{**call, **dict(zip(names, leaves))}, implementation=implementation)

        assert torch.autograd.gradcheck(run, [call[name] for name in names])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compile(implementation: str, dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    case = Case(dtype=dtype, weights=True, weight_dtype=torch.float32)
    call, grads = case.call(), output_gradients(case)

    def function(qkv: Tensor, q_weight: Tensor, k_weight: Tensor) -> tuple[Tensor, ...]:
        given = {**call, "qkv": qkv * 1.0, "q_weight": q_weight, "k_weight": k_weight}
        return tuple(t + 0 for t in qk_norm_rope(**given, implementation=implementation))

    leaves = [call[name] for name in ("qkv", "q_weight", "k_weight")]
    results = []
    for f in (torch.compile(function, fullgraph=True, backend="aot_eager"), function):
        out = f(*leaves)
        results.append([*out, *torch.autograd.grad(out, leaves, grads)])
    for x, y in zip(*results):
        torch.testing.assert_close(x, y, atol=0.02 if dtype == torch.bfloat16 else 2e-6, rtol=0)
        assert implementation != "csrc" or torch.equal(x, y)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_compile_by_inductor() -> None:
    need_compiled()
    torch._dynamo.reset()
    case = Case(weights=True)
    call, grads = case.call(), output_gradients(case)
    leaves = [call[name] for name in ("qkv", "q_weight", "k_weight")]
    eager = everything(call, grads, implementation="csrc")

    def function(qkv: Tensor, q_weight: Tensor, k_weight: Tensor) -> tuple[Tensor, ...]:
        return qk_norm_rope(**{**call, "qkv": qkv, "q_weight": q_weight, "k_weight": k_weight}, implementation="csrc")

    out = torch.compile(function, fullgraph=True)(*leaves)
    for x, y in zip([*out, *torch.autograd.grad(out, leaves, grads)], eager):
        assert torch.equal(x, y)


class Calls(TorchDispatchMode):
    """Names of the operators that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.names.append(str(func))
        return func(*args, **kwargs or {})


def test_which_implementation_ran(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGATRON_R1_OPS", f"qk_norm_rope={implementation}")
    call, grads = Case().call(), output_gradients(Case())
    with Calls() as calls:
        everything(call, grads)
    ours = [name for name in calls.names if name.startswith("megatron_r1.")]
    assert ours == (["megatron_r1.qk_norm_rope_fwd.default", "megatron_r1.qk_norm_rope_bwd.default"] if implementation == "csrc" else [])


def test_the_best_there_is_runs_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEGATRON_R1_OPS", raising=False)
    reasons = QK_NORM_ROPE.reasons("cpu")
    assert QK_NORM_ROPE.choose(None, "cpu").name == ("csrc" if reasons["csrc"] is None else "analytic")


def test_a_library_that_is_missing_or_lacks_this_op(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "missing", lambda: "it is not there")
    assert QK_NORM_ROPE.reasons("cpu")["csrc"] == "it is not there"
    monkeypatch.setattr(extension, "missing", lambda: None)

    class Nothing:
        pass

    monkeypatch.setattr(torch.ops, "megatron_r1", Nothing())
    assert "without qk_norm_rope" in QK_NORM_ROPE.reasons("cpu")["csrc"]


def test_the_check_before_first_use_on_a_gpu_finds_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    need_compiled()
    assert module._disagreement("cpu") is None
    right = module._Csrc.backward

    def wrong(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        dqkv, *dw = right(*arguments)
        dqkv[3, 1, 5] += 0.1 * dqkv.abs().max()
        return dqkv, *dw

    monkeypatch.setattr(module._Csrc, "backward", staticmethod(wrong))
    assert "dqkv of torch.float32" in module._disagreement("cpu")
    monkeypatch.setattr(module._Csrc, "backward", staticmethod(lambda *a: [t * float("nan") for t in right(*a)]))
    assert "off by nan" in module._disagreement("cpu")


# ------------------------------------------------------------------------------------------------------------ promises


@pytest.mark.parametrize("h", [64, 66])
@pytest.mark.parametrize("norm", ["rms", "none"])
def test_every_element_is_written(h: int, norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    need_compiled()
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all(), "new memory is not poisoned: this test would see nothing"
        for case in (Case(h=h, norm=norm, weights=norm == "rms"), Case(h=h, norm=norm, s=0, weights=norm == "rms"), Case(h=h, norm=norm, rot=0, grouped=False)):
            for t in everything(case.call(), output_gradients(case), implementation="csrc"):
                assert torch.isfinite(t).all()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("h", [64, 66])
def test_same_bits_twice_and_for_any_number_of_threads(h: int) -> None:
    need_compiled()
    case = Case(s=333, b=3, h=h, weights=True, dtype=torch.bfloat16, weight_dtype=torch.float32)
    call, grads = case.call(), output_gradients(case)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3, 2):
            torch.set_num_threads(n)
            results.append(everything(call, grads, implementation="csrc"))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for name, x, y in zip(NAMES, results[0], other):
            assert torch.equal(x, y), name


@pytest.mark.parametrize("h", [64, 66])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_shows_in_its_head_and_nowhere_else(implementation: str, h: int, bad: float) -> None:
    case = Case(s=4, h=h, nq=4, nkv=2)
    call, grads = case.call(), output_gradients(case)
    qkv = call["qkv"].detach().clone()
    qkv.view(4, 2, 2, 4, h)[2, 1, 1, 0, 5] = bad  # query 2
    q, k, v, dqkv = everything({**call, "qkv": qkv.requires_grad_()}, grads, implementation=implementation)
    spoilt = ~torch.isfinite(q).all(-1)
    assert spoilt[2, 1, 2]
    assert spoilt.sum() == 1
    assert torch.isfinite(k).all()
    assert torch.isfinite(v).all()
    spoilt = ~torch.isfinite(dqkv.view(4, 2, 2, 4, h)).all(-1)
    assert spoilt[2, 1, 1, 0]
    assert spoilt.sum() == 1


# -------------------------------------------------------------------------------------------------------------- misuse

BAD: list[tuple[str, dict[str, Any]]] = [
    ("qkv", {"qkv": torch.zeros(5, 512)}),
    ("qkv", {"qkv": torch.zeros(5, 2, 513)}),
    ("qkv", {"qkv": torch.zeros(5, 2, 512, dtype=torch.int32)}),
    ("qkv", {"qkv": torch.zeros(5, 512, 2).transpose(1, 2)}),
    ("head_dim", {"head_dim": 0}),
    ("head_dim", {"head_dim": 63}),
    ("head_dim", {"head_dim": -64}),
    ("head_dim", {"head_dim": 1026, "qkv": torch.zeros(5, 2, 8 * 1026)}),
    ("num_heads", {"num_heads": 3}),
    ("num_heads", {"num_heads": 0}),
    ("num_heads", {"num_kv_heads": 0}),
    ("num_heads", {"num_heads": -4, "num_kv_heads": -2}),
    ("eps", {"eps": float("nan")}),
    ("eps", {"eps": -1.0}),
    ("cos", {"cos": torch.zeros(50, 33), "sin": torch.zeros(50, 33)}),
    ("cos", {"cos": torch.zeros(50 * 32)}),
    ("cos", {"cos": torch.zeros(50, 32, dtype=torch.float64)}),
    ("cos", {"cos": torch.zeros(32, 50).T}),
    ("sin", {"sin": torch.zeros(49, 32)}),
    ("sin", {"sin": torch.zeros(50, 31)}),
    ("sin", {"sin": torch.zeros(50, 32, dtype=torch.bfloat16)}),
    ("positions", {"positions": torch.zeros(5, 2)}),
    ("positions", {"positions": torch.zeros(5, 2, dtype=torch.int32)}),
    ("positions", {"positions": torch.zeros(4, 2, dtype=torch.int64)}),
    ("positions", {"positions": torch.zeros(5, 3, dtype=torch.int64)}),
    ("positions", {"positions": torch.zeros(5, 2, 1, dtype=torch.int64)}),
    ("positions", {"positions": torch.full((5,), 50)}),
    ("positions", {"positions": torch.tensor([0, 0, -1, 0, 0])}),
    ("q_weight", {"q_weight": torch.ones(63)}),
    ("q_weight", {"q_weight": torch.ones(1, 64)}),
    ("k_weight", {"k_weight": torch.ones(64, dtype=torch.bfloat16)}),
    ("k_weight", {"k_weight": torch.ones(128)[::2]}),
    ("q_weight", {"q_weight": torch.ones(64), "norm": "none"}),
    ("q_weight", {"q_weight": torch.ones(64), "parity": True}),
    ("norm", {"norm": "l2", "parity": True}),
    ("qkv", {"qkv": torch.zeros(1, 1, 512).expand(2**23, 1, 512), "positions": torch.zeros(1, dtype=torch.int64).expand(2**23)}),
]  # fmt: skip


@pytest.mark.parametrize(("argument", "change"), BAD, ids=[f"{i}-{name}" for i, (name, _) in enumerate(BAD)])
def test_wrong_arguments_are_named(argument: str, change: dict[str, Any]) -> None:
    call = {**Case().call(), **change}
    with pytest.raises(DataError, match=f"expected: {argument}: "):
        qk_norm_rope(**call)
    need_compiled()
    # The operator itself, without Python's checks, says the same and never crashes.
    tensors = [call[name] for name in ("qkv", "q_weight", "k_weight", "cos", "sin", "positions")]
    numbers = (call["num_heads"], call["num_kv_heads"], call["head_dim"], ("none", "rms", "l2").index(call["norm"]), call["eps"])
    with pytest.raises(RuntimeError, match=f"expected: {argument}: "):
        torch.ops.megatron_r1.qk_norm_rope_fwd(*tensors, *numbers, True, True, call.get("parity", False))


def test_wrong_norm_and_angles_with_a_gradient() -> None:
    with pytest.raises(DataError, match="norm: one of none, rms, l2"):
        qk_norm_rope(**{**Case().call(), "norm": "layer"})
    call = Case().call()
    with pytest.raises(DataError, match="cos: a constant"):
        qk_norm_rope(**{**call, "cos": call["cos"].requires_grad_()})


@pytest.mark.parametrize("name", ["dq", "dk", "dv"])
def test_wrong_gradients_are_named(name: str) -> None:
    case = Case()
    call = {key: t.detach() if isinstance(t, Tensor) else t for key, t in case.call().items()}
    for change in (lambda t: t[:, :1], lambda t: t[..., :-1], lambda t: t.double(), lambda t: t[:, :, :1]):
        grads = dict(zip(("dq", "dk", "dv"), output_gradients(case)))
        grads[name] = change(grads[name])
        with pytest.raises(DataError, match=f"expected: {name}: "):
            qk_norm_rope_backward(**grads, **call)
        need_compiled()
        with pytest.raises(RuntimeError, match=f"expected: {name}: "):
            torch.ops.megatron_r1.qk_norm_rope_bwd(*grads.values(), *[t.detach() if isinstance(t, Tensor) else t for t in operator_arguments(case)])


@pytest.mark.parametrize("name", ["cos", "sin", "positions", "q_weight", "k_weight"])
def test_another_device_is_named(name: str) -> None:
    call = Case(weights=True).call()
    call[name] = call[name].detach().to("meta")
    with pytest.raises(DataError, match=f"expected: {name}: on cpu"):
        qk_norm_rope(**call)


@pytest.mark.parametrize("position", [-1, ROWS, 2**40])
def test_positions_inside_compiled_code_are_checked_by_the_kernel(position: int) -> None:
    need_compiled()
    torch._dynamo.reset()
    call = Case().call()
    call["positions"][3, 1] = position
    with pytest.raises(RuntimeError, match=f"expected: positions: each from 0 to {ROWS - 1}"):
        torch.compile(lambda: qk_norm_rope(**call, implementation="csrc"), fullgraph=True, backend="eager")()


# ----------------------------------------------------------------------------------------------------------------- GPU


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    assert QK_NORM_ROPE.reasons("cuda")["csrc"] is None

    def there(call: dict[str, Any]) -> dict[str, Any]:
        return {k: t.detach().cuda().requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t for k, t in call.items()}

    base = Case(s=517, b=3, nq=6)
    for dtype in TOLERANCE:
        for h, rot in ((64, None), (128, None), (256, None), (96, 40)):
            for interleaved, grouped, weights in ((True, True, False), (False, False, True)):
                case = replace(base, dtype=dtype, h=h, rot=rot, interleaved=interleaved, grouped=grouped, weights=weights)
                call, grads = case.call(), output_gradients(case)
                results = [everything(there(call), tuple(g.cuda() for g in grads), implementation="csrc") for _ in range(2)]
                for name, x, again, y in zip(NAMES, *results, in_fp64(call, grads)):
                    assert torch.equal(x, again), name
                    assert off(x.cpu(), y) <= 4 * TOLERANCE[x.dtype], f"{name} {case}"
    call = there(base.call())
    call["positions"][2, 1] = ROWS
    q, _, _ = qk_norm_rope(**call, implementation="csrc")
    assert q[2, 1].isnan().all()
    assert int(q.isnan().sum()) == q[2, 1].numel()
