"""Implementations are chosen once for a kind of device, by name when asked, and never silently replaced."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from megatron_r1.ops import dispatch
from megatron_r1.ops.dispatch import OPS, OPS_VARIABLE, Op, load_all
from megatron_r1.utils.errors import EnvironmentProblem

ONE = torch.ones(())


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Toy ops leave no trace in the list of all ops; the caller's setting plays no part."""
    monkeypatch.delenv(OPS_VARIABLE, raising=False)
    before = load_all()  # what is imported once does not register again
    yield
    OPS.clear()
    OPS.update(before)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(dispatch, "_log", SimpleNamespace(info=lambda text, *values: lines.append(text % values)))
    return lines


def make(absent: str | None, name: str = "example") -> Op:
    """`fast` adds 1 and is absent for a reason, `plain` adds 2."""
    op = Op(name)
    op.register("fast", lambda x: x + 1, lambda device: absent)
    op.register("plain", lambda x: x + 2)
    return op


def test_best_that_works() -> None:
    assert make(None)(ONE) == 2
    assert make("no compiler")(ONE) == 3


def test_environment_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    op = make(None)
    assert op(ONE) == 2
    monkeypatch.setenv(OPS_VARIABLE, "plain")
    assert op(ONE) == 3  # also after a choice was made
    assert op(ONE, implementation="fast") == 2


@pytest.mark.parametrize("request_", ["fast", "turbo"])
def test_absent_by_name_is_an_error(request_: str) -> None:
    with pytest.raises(EnvironmentProblem) as caught:
        make("the extension is not built")(ONE, implementation=request_)
    assert request_ in caught.value.expected + caught.value.found
    if request_ == "fast":
        assert "the extension is not built" in caught.value.found
        assert "on cpu" in caught.value.expected
        assert OPS_VARIABLE in caught.value.fix
    else:
        assert "auto, fast, plain" in caught.value.expected
        assert "`implementation`" in caught.value.fix  # the argument is wrong, not the environment


def test_absent_by_environment_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OPS_VARIABLE, "fast")
    with pytest.raises(EnvironmentProblem, match="the extension is not built"):
        make("the extension is not built")(ONE)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("fast", {"first": "fast", "second": "fast"}),
        ("fast,first=plain", {"first": "plain", "second": "fast"}),
        ("first=plain", {"first": "plain", "second": "fast"}),
        (" first = plain , plain ", {"first": "plain", "second": "plain"}),
        ("first=auto,plain", {"first": "fast", "second": "plain"}),
        ("", {"first": "fast", "second": "fast"}),
    ],
)
def test_ops_one_by_one(setting: str, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    ops = [make(None, "first"), make(None, "second")]
    monkeypatch.setenv(OPS_VARIABLE, setting)
    assert {op.name: op.choose().name for op in ops} == expected


def test_a_name_for_all_that_an_op_lacks(monkeypatch: pytest.MonkeyPatch, said: list[str]) -> None:
    op, other = make(None), Op("other")
    other.register("special", lambda x: x)
    monkeypatch.setenv(OPS_VARIABLE, "special")
    assert op.choose().name == "fast"
    assert said == ["op example: fast (cpu; it has no special)"]
    # By its own name it is an error.
    monkeypatch.setenv(OPS_VARIABLE, "example=special")
    with pytest.raises(EnvironmentProblem, match="'special'"):
        op.choose()


@pytest.mark.parametrize(
    ("setting", "words"),
    [("turbo", "'turbo'"), ("nosuch=plain", "'nosuch'"), ("plain,nosuch=plain", "'nosuch'"), ("example=plain,nosuch=plain", "'nosuch'"),
     ("example=turbo", "'turbo'"), ("plain,fast", "'plain,fast'"), ("turbo,example=plain", "'turbo'")],
)  # fmt: skip
def test_unknown_names_are_errors(setting: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op = make(None)
    monkeypatch.setenv(OPS_VARIABLE, setting)
    with pytest.raises(EnvironmentProblem) as caught:
        op.choose()
    assert words in caught.value.found
    assert OPS_VARIABLE in caught.value.fix


@pytest.mark.parametrize("setting", ["swiglu=reference", "analytic", "reference,swiglu=analytic"])
def test_names_of_ops_that_are_not_imported_yet_count(setting: str) -> None:
    code = (
        "from megatron_r1.ops.dispatch import OPS, Op\n"
        "op = Op('toy'); op.register('only', None)\n"
        "assert 'swiglu' not in OPS\n"
        "assert op.choose().name == 'only'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, OPS_VARIABLE: setting})
    assert done.returncode == 0, done.stderr


def test_the_choice_is_made_for_each_kind_of_device(said: list[str]) -> None:
    op = Op("example")
    op.register("fast", lambda x: x, lambda device: None if device == "cuda" else f"not for {device}")
    op.register("plain", lambda x: x)
    assert op.choose(device="cuda").name == "fast"
    assert op.choose(device="cpu").name == "plain"
    assert said == ["op example: fast (cuda)", "op example: not fast on cpu: not for cpu", "op example: plain (cpu)"]
    assert op.reasons("cpu") == {"fast": "not for cpu", "plain": None}
    assert op.reasons("cuda") == {"fast": None, "plain": None}


def test_a_call_runs_on_the_device_of_its_first_argument() -> None:
    op = Op("example")
    op.register("meta only", lambda x: "meta only", lambda device: None if device == "meta" else "no")
    op.register("plain", lambda x: "plain")
    assert op(torch.ones(1, device="meta")) == "meta only"
    assert op(torch.ones(1)) == "plain"


def test_the_choice_is_said_once(said: list[str]) -> None:
    op = make(None)
    op(ONE)
    op(ONE)
    assert said == ["op example: fast (cpu)"]


def test_a_better_one_can_come_later() -> None:
    op = make(None)
    assert op(ONE) == 2
    op.register("faster", lambda x: x + 10, first=True)
    assert op(ONE) == 11
    assert op.names() == ["faster", "fast", "plain"]


def test_load_all_lists_every_op() -> None:
    assert {"rms_norm", "swiglu"} <= dispatch.load_all().keys()


def test_what_is_not_asked_for_is_not_checked() -> None:
    """A kernel whose self-check does harm can be avoided by naming another implementation."""

    def harmful(device: str) -> str | None:
        raise AssertionError("was run")

    op = Op("example")
    op.register("plain", lambda x: x)
    op.register("kernel", lambda x: x, harmful, first=True)
    assert op.choose("plain").name == "plain"
    op.register("better", lambda x: x, first=True)
    assert op.choose().name == "better"


class _Sine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return dy * x.cos()


@pytest.mark.parametrize("chosen_before", [False, True], ids=["first use while compiling", "chosen before"])
def test_compiles_into_one_graph(chosen_before: bool, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice, with a self-check that computes and a log line, happens while tracing and leaves nothing in the graph."""
    seen: list[float] = []

    def self_check(device: str) -> str | None:
        seen.append(torch.randn(3).square().sum().item())  # a fake tensor would refuse item()
        return None

    op = Op("toy")
    op.register("fast", _Sine.apply, self_check)
    op.register("plain", torch.cos)
    torch._dynamo.reset()
    if chosen_before:
        op(ONE)
    state = torch.get_rng_state()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(x: Tensor) -> Tensor:
        return op(op(x)) * 2

    x = torch.linspace(-2, 2, 7, requires_grad=True)
    y = compiled(x)
    y.sum().backward()
    torch.testing.assert_close(y, 2 * x.sin().sin())
    torch.testing.assert_close(x.grad, 2 * x.sin().cos() * x.cos())
    assert len(seen) == 1
    assert said == ["op toy: fast (cpu)"]
    assert torch.equal(state, torch.get_rng_state()), "a self-check must not shift the random numbers of a run"

    # By name, and another one registered later: compiled anew, not answered from the old graph.
    by_name = torch.compile(lambda x: op(x, implementation="plain"), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(by_name(x), x.cos())
    op.register("newer", torch.tanh, first=True)
    torch.testing.assert_close(compiled(x), 2 * x.tanh().tanh())
    torch._dynamo.reset()


def test_self_checks_see_real_tensors_under_a_fake_mode() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    seen: list[type] = []
    op = Op("toy")
    op.register("fast", torch.sin, lambda device: seen.append(type(torch.ones(2))))
    with FakeTensorMode():
        op(torch.ones(3))
    assert seen == [torch.Tensor]
