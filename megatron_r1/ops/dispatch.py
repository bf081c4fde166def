"""Which implementation of an op runs: decided once, said once, refused loudly when asked for by name and absent."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_r1.utils.errors import EnvironmentProblem
from megatron_r1.utils.logging import get_logger

OPS_VARIABLE = "MEGATRON_R1_OPS"
_log = get_logger(__name__)


@dataclass(frozen=True)
class Implementation:
    """`absent()` returns None when the implementation can run here, else the reason why not."""

    name: str
    run: Callable[..., Any]
    absent: Callable[[], str | None]


class Op:
    """An operation with several implementations, best first; the last one always works."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._implementations: list[Implementation] = []
        self._chosen: dict[str, Implementation] = {}

    def register(self, name: str, run: Callable[..., Any], absent: Callable[[], str | None] = lambda: None, *, first: bool = False) -> None:
        """Add an implementation, after the present ones or (`first`) before them. The choice is made anew."""
        self._implementations.insert(0 if first else len(self._implementations), Implementation(name, run, absent))
        self._chosen.clear()

    def names(self) -> list[str]:
        """Names of all implementations, best first."""
        return [implementation.name for implementation in self._implementations]

    def choose(self, request: str | None = None) -> Implementation:
        """The implementation to run.

        `request`: a name, or `auto` for the best that works here; None reads MEGATRON_R1_OPS (default `auto`).
        Raises EnvironmentProblem when a requested implementation does not exist or can not run here.
        """
        request = request or os.environ.get(OPS_VARIABLE, "auto")
        if request not in self._chosen:
            self._chosen[request] = self._decide(request)
            _log.info("op %s: %s", self.name, self._chosen[request].name)
        return self._chosen[request]

    def __call__(self, *args: Any, implementation: str | None = None, **kwargs: Any) -> Any:
        return self.choose(implementation).run(*args, **kwargs)

    def _decide(self, request: str) -> Implementation:
        reasons = {i.name: i.absent() for i in self._implementations}
        if request == "auto":
            return next(i for i in self._implementations if reasons[i.name] is None)
        for implementation in self._implementations:
            if implementation.name == request:
                if reasons[request] is None:
                    return implementation
                raise EnvironmentProblem(
                    expected=f"implementation {request!r} of op {self.name}, because it was asked for by name",
                    found=str(reasons[request]),
                    fix=f"set {OPS_VARIABLE}=auto to take the best that works here",
                )
        raise EnvironmentProblem(
            expected=f"one of auto, {', '.join(self.names())} for op {self.name}",
            found=repr(request),
            fix=f"correct {OPS_VARIABLE} or unset it",
        )
