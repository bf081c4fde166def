"""Steps read ahead by threads. Reading a step is a pure function of its number, so reading ahead changes nothing but the time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from megatron_r1.utils.logging import get_logger

log = get_logger("data.loader")
T = TypeVar("T")
PATIENCE = 60.0
"""Seconds after which waiting for a step is worth a line in the log."""


class Loader(Generic[T]):
    """`read(step)` for the steps asked for, in order, with up to `ahead` steps read before they are needed by `workers` threads.

    Nothing from `end` on is read. An error in a thread is raised by the `get` of the step it belongs to, and only there; a step
    that is not the next one starts the reading anew at that step. The threads are daemons: a read that hangs holds up neither
    `close` nor the end of the process.
    """

    def __init__(self, read: Callable[[int], T], end: int, ahead: int = 2, workers: int = 1) -> None:
        self._read, self._end, self._ahead = read, end, max(1, ahead)
        self._state = threading.Condition()
        self._done: dict[int, tuple[T | None, BaseException | None]] = {}
        self._wanted, self._next, self._course = -1, end, 0  # nothing is begun before the first `get`
        self._closed = False
        self._threads = [threading.Thread(target=self._work, name=f"loader-{i}", daemon=True) for i in range(workers)]
        for thread in self._threads:
            thread.start()

    def get(self, step: int) -> T:
        """What `read(step)` returns or raises."""
        began = time.monotonic()
        with self._state:
            if step != self._wanted:
                self._done.clear()
                self._next, self._course = step, self._course + 1
            self._wanted = step
            self._state.notify_all()
            while step not in self._done:
                if self._closed or step >= self._end:
                    raise RuntimeError(f"step {step} asked of a loader that {'is closed' if self._closed else f'ends before step {self._end}'}")
                if not self._state.wait(PATIENCE):
                    log.warning("data: step %d has been read for %.0f s: the disk or file system is slow, or hangs", step, time.monotonic() - began)
            value, error = self._done.pop(step)
            self._wanted = step + 1
            self._state.notify_all()
        if error is not None:
            raise error
        return value  # type: ignore[return-value]

    def _work(self) -> None:
        while True:
            with self._state:
                self._state.wait_for(lambda: self._closed or self._next < min(self._end, self._wanted + self._ahead))
                if self._closed:
                    return
                step, course = self._next, self._course
                self._next += 1
            value: T | None = None
            error: BaseException | None = None
            try:
                value = self._read(step)
            except BaseException as caught:
                error = caught
            with self._state:
                if course == self._course and not self._closed:
                    self._done[step] = value, error
                    self._state.notify_all()

    def close(self) -> None:
        """Stop reading ahead. Waits at most a second for what is being read."""
        with self._state:
            self._closed = True
            self._done.clear()
            self._state.notify_all()
        until = time.monotonic() + 1.0
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
