"""Implementations are chosen once, by name when asked, and never silently replaced."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megatron_r1.ops import dispatch
from megatron_r1.ops.dispatch import OPS_VARIABLE, Op
from megatron_r1.utils.errors import EnvironmentProblem


def make(absent: str | None) -> Op:
    op = Op("example")
    op.register("fast", lambda x: x + 1, lambda: absent)
    op.register("plain", lambda x: x + 2)
    return op


def test_best_that_works() -> None:
    assert make(None)(1) == 2
    assert make("no compiler")(1) == 3


def test_environment_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OPS_VARIABLE, "plain")
    assert make(None)(1) == 3
    assert make(None)(1, implementation="fast") == 2


@pytest.mark.parametrize("request_", ["fast", "turbo"])
def test_absent_by_name_is_an_error(request_: str) -> None:
    with pytest.raises(EnvironmentProblem) as caught:
        make("the extension is not built")(1, implementation=request_)
    assert request_ in caught.value.expected + caught.value.found
    assert OPS_VARIABLE in caught.value.fix
    if request_ == "fast":
        assert "the extension is not built" in caught.value.found


def test_the_choice_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(dispatch, "_log", SimpleNamespace(info=lambda text, *values: said.append(text % values)))
    op = make(None)
    op(1)
    op(1)
    assert said == ["op example: fast"]


def test_a_better_one_can_come_later() -> None:
    op = make(None)
    assert op(0) == 1
    op.register("faster", lambda x: x + 10, first=True)
    assert op(0) == 10
    assert op.names() == ["faster", "fast", "plain"]
