"""How a running phase is asked to stop: a signal or the end of its time. All ranks agree on it once per step, together with the loss."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from megatron_r1.utils.errors import REQUEUE_EXIT_CODE
from megatron_r1.utils.logging import duration, get_logger

log = get_logger("train.stop")
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopSignal:
    """Set by SIGTERM, by SIGUSR1, or when `time_limit` seconds have passed since the job began. After that at most one more step is finished."""

    def __init__(self, time_limit: float | None = None) -> None:
        self._asked, self._told = False, False
        self.time_limit, self._began = time_limit, job_began()

    @property
    def requested(self) -> bool:
        """Whether this rank wants to stop."""
        if self.time_limit is not None and not self._asked and time.time() - self._began >= self.time_limit:
            self._ask(f"time_limit of {duration(self.time_limit)}")
        return self._asked

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Signal handler."""
        self._ask(signal.Signals(number).name)

    def _ask(self, why: str) -> None:
        self._asked = True
        if not self._told:
            self._told = True
            log.warning("%s: finishing the step at hand, saving a checkpoint, then exiting with code %d", why, REQUEUE_EXIT_CODE)


def job_began() -> float:
    """Seconds since 1970 at which this job began. Under torchrun that is when torchrun did: workers it starts anew have no more time than the first."""
    import psutil

    if "TORCHELASTIC_RUN_ID" in os.environ:
        return float(psutil.Process(os.getppid()).create_time())
    return float(psutil.Process().create_time())


@contextmanager
def stop_on_request(time_limit: float | None = None) -> Iterator[StopSignal]:
    """Catch SIGTERM and SIGUSR1 inside the block (main thread only; elsewhere Python does not deliver signals)."""
    stop = StopSignal(time_limit)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
