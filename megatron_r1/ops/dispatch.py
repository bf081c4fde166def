"""Which implementation of an op runs: decided once per kind of device, said once, refused loudly when asked for and absent.

`MEGATRON_R1_OPS` asks by name: `reference` for all ops, `swiglu=reference` for one, `csrc,rms_norm=reference` for all and one.

Under torch.compile the choice is made while tracing and is part of the compiled program: it does not break the graph, and a
later change of the variable has no effect on what is compiled already.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

import megatron_r1.ops
from megatron_r1.utils.errors import EnvironmentProblem
from megatron_r1.utils.logging import get_logger

OPS_VARIABLE = "MEGATRON_R1_OPS"
_log = get_logger(__name__)

# Ops by name, those whose modules are imported so far; `load_all` fills it.
OPS: dict[str, Op] = {}


def load_all() -> dict[str, Op]:
    """Every op there is, by name: what `megatron-r1 doctor` lists, and what a name in MEGATRON_R1_OPS is looked up in."""
    for module in pkgutil.iter_modules(megatron_r1.ops.__path__, "megatron_r1.ops."):
        importlib.import_module(module.name)
    return dict(sorted(OPS.items()))


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
        self._chosen: dict[tuple[str | None, str, str], Implementation] = {}
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
        with _undisturbed(device):
            return {i.name: i.absent(device) for i in self._implementations}

    def choose(self, request: str | None = None, device: str = "cpu") -> Implementation:
        """The implementation to run on a kind of device.

        `request`: a name, or `auto` for the best that works here; None reads MEGATRON_R1_OPS (default `auto`), which may
        name ops one by one: `reference`, or `csrc,rms_norm=reference`. A name that this op does not have, but which
        stands there for all ops, takes the best that works.
        Raises EnvironmentProblem when a requested implementation can not run here, or when no op has one of that name.
        """
        setting = os.environ.get(OPS_VARIABLE, "auto") if request is None else ""
        key = (request, setting, device)
        if key not in self._chosen:
            by_name = request is not None
            wanted = request if request is not None else requested(setting, self.name)
            # A name for all ops that this one has not, but another has, asks nothing of this one.
            lacks = not by_name and wanted not in self.names() and wanted != "auto" and not _asked_alone(setting, self.name)
            self._chosen[key] = self._decide("auto" if lacks else wanted, device, by_name)
            note = f"; it has no {wanted}" if lacks else ""
            _log.info("op %s: %s (%s%s)", self.name, self._chosen[key].name, device, note)
        return self._chosen[key]

    def __call__(self, *args: Any, implementation: str | None = None, **kwargs: Any) -> Any:
        """Run on the device of the first argument, a tensor."""
        return self._implementations[self._index(implementation, args[0].device.type)].run(*args, **kwargs)

    # Dynamo calls this instead of tracing it (environment, cache, log and self-checks would break the graph) and takes the
    # answer for a constant. It is an index, because dynamo can guard on the list it points into: registering compiles anew.
    @torch.compiler.assume_constant_result
    def _index(self, request: str | None, device: str) -> int:
        return self._implementations.index(self.choose(request, device))

    def _decide(self, request: str, device: str, by_name: bool) -> Implementation:
        # Asks only what it must know: a self-check of a kernel that misbehaves can be kept from running by naming another.
        for implementation in self._implementations:
            if request not in ("auto", implementation.name):
                continue
            with _undisturbed(device):
                reason = implementation.absent(device)
            if reason is None:
                return implementation
            if request != "auto":
                raise EnvironmentProblem(
                    expected=f"implementation {request!r} of op {self.name} on {device}, because it was asked for by name",
                    found=reason,
                    fix=f"set {OPS_VARIABLE}=auto to take the best that works here",
                )
            _log.info("op %s: not %s on %s: %s", self.name, implementation.name, device, reason)
        raise EnvironmentProblem(
            expected=f"one of auto, {', '.join(self.names())} for op {self.name}",
            found=repr(request),
            fix="correct the argument `implementation`" if by_name else f"correct {OPS_VARIABLE} or unset it",
        )


def _parts(setting: str) -> tuple[str, dict[str, str]]:
    """(name for all ops, {op: name}) of a value of MEGATRON_R1_OPS. Raises EnvironmentProblem for two names for all ops."""
    general, single = [], {}
    for part in filter(None, (part.strip() for part in setting.split(","))):
        op, equals, name = (text.strip() for text in part.partition("="))
        if equals:
            single[op] = name
        else:
            general.append(part)
    if len(general) > 1:
        raise EnvironmentProblem(
            expected=f"{OPS_VARIABLE} to hold one name for all ops, and further ones as op=name",
            found=repr(setting),
            fix=f"write for example {OPS_VARIABLE}={general[0]},swiglu={general[1]}",
        )
    return (general or ["auto"])[0], single


def _asked_alone(setting: str, op: str) -> bool:
    return op in _parts(setting)[1]


def requested(setting: str, op: str) -> str:
    """What a value of MEGATRON_R1_OPS asks of one op. Raises EnvironmentProblem for an op or a name that there is not at all."""
    general, single = _parts(setting)
    known = {"auto"} | {name for other in OPS.values() for name in other.names()}
    if not (single.keys() <= OPS.keys() and general in known):
        load_all()  # the op, or the only one with an implementation of that name, may stand in a module not imported yet
    if unknown := single.keys() - OPS.keys():
        raise EnvironmentProblem(
            expected=f"{OPS_VARIABLE} to name ops among {', '.join(sorted(OPS))}",
            found=repr(sorted(unknown)[0]),
            fix=f"correct {OPS_VARIABLE} or unset it",
        )
    known = {"auto"} | {name for other in OPS.values() for name in other.names()}
    if general not in known:
        raise EnvironmentProblem(
            expected=f"{OPS_VARIABLE} to be one of {', '.join(sorted(known))} (or op=name)",
            found=repr(general),
            fix=f"correct {OPS_VARIABLE} or unset it",
        )
    return single.get(op, general)


@contextlib.contextmanager
def _undisturbed(device: str) -> Iterator[None]:
    """Around self-checks, which compute: outside of any tracing (there tensors would be fake), without gradients, and
    leaving the random state as it was, so that a run does not depend on when an op was first used."""
    devices = [torch.cuda.current_device()] if device == "cuda" and torch.cuda.is_available() else []
    with _disable_current_modes(), torch.random.fork_rng(devices), torch.no_grad():
        yield
