"""Which implementation of an op runs: decided once per kind of device, said once, refused loudly when asked for and absent."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_r1.utils.errors import EnvironmentProblem
from megatron_r1.utils.logging import get_logger

OPS_VARIABLE = "MEGATRON_R1_OPS"
_log = get_logger(__name__)

# Every op there is, by name: what `megatron-r1 doctor` lists.
OPS: dict[str, Op] = {}


def always(device: str) -> None:
    """`absent` of what runs everywhere."""


@dataclass(frozen=True)
class Implementation:
    """`absent(device)` returns None when this can run on that kind of device (`cpu`, `cuda`), else the reason why not."""

    name: str
    run: Callable[..., Any]
    absent: Callable[[str], str | None]


class Op:
    """An operation with several implementations, best first; the last one always works."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._implementations: list[Implementation] = []
        self._chosen: dict[tuple[str, str], Implementation] = {}
        OPS[name] = self

    def register(self, name: str, run: Callable[..., Any], absent: Callable[[str], str | None] = always, *, first: bool = False) -> None:
        """Add an implementation, after the present ones or (`first`) before them. The choice is made anew."""
        self._implementations.insert(0 if first else len(self._implementations), Implementation(name, run, absent))
        self._chosen.clear()

    def names(self) -> list[str]:
        """Names of all implementations, best first."""
        return [implementation.name for implementation in self._implementations]

    def reasons(self, device: str) -> dict[str, str | None]:
        """For every implementation, best first: None when it can run on this kind of device, else why not."""
        return {i.name: i.absent(device) for i in self._implementations}

    def choose(self, request: str | None = None, device: str = "cpu") -> Implementation:
        """The implementation to run on a kind of device.

        `request`: a name, or `auto` for the best that works here; None reads MEGATRON_R1_OPS (default `auto`), which may
        name ops one by one: `reference`, or `csrc,rms_norm=reference`. A name that this op does not have, but which
        stands there for all ops, takes the best that works.
        Raises EnvironmentProblem when a requested implementation can not run here, or when no op has one of that name.
        """
        key = (request if request is not None else os.environ.get(OPS_VARIABLE, "auto"), device)
        if key not in self._chosen:
            self._chosen[key] = self._decide(request or self._requested(key[0]), device, by_name=request is not None)
            _log.info("op %s: %s (%s)", self.name, self._chosen[key].name, device)
        return self._chosen[key]

    def __call__(self, *args: Any, implementation: str | None = None, **kwargs: Any) -> Any:
        """Run on the device of the first argument, a tensor."""
        return self.choose(implementation, args[0].device.type).run(*args, **kwargs)

    def _requested(self, setting: str) -> str:
        """This op's part of the environment variable."""
        general = "auto"
        for part in filter(None, (part.strip() for part in setting.split(","))):
            op, _, name = part.rpartition("=")
            if op == self.name:
                return name
            if op and op not in OPS:
                raise EnvironmentProblem(
                    expected=f"{OPS_VARIABLE} to name ops among {', '.join(sorted(OPS))}", found=repr(op), fix=f"correct {OPS_VARIABLE} or unset it"
                )
            general = general if op else name
        if general not in self.names() and any(general in op.names() for op in OPS.values()):
            return "auto"
        return general

    def _decide(self, request: str, device: str, by_name: bool) -> Implementation:
        reasons = self.reasons(device)
        if request == "auto":
            for implementation in self._implementations:
                if reasons[implementation.name] is None:
                    return implementation
                _log.info("op %s: not %s on %s: %s", self.name, implementation.name, device, reasons[implementation.name])
        for implementation in self._implementations:
            if implementation.name == request:
                if reasons[request] is None:
                    return implementation
                raise EnvironmentProblem(
                    expected=f"implementation {request!r} of op {self.name} on {device}, because it was asked for by name",
                    found=str(reasons[request]),
                    fix=f"set {OPS_VARIABLE}=auto to take the best that works here",
                )
        raise EnvironmentProblem(
            expected=f"one of auto, {', '.join(self.names())} for op {self.name}",
            found=repr(request),
            fix="correct the argument `implementation`" if by_name else f"correct {OPS_VARIABLE} or unset it",
        )
