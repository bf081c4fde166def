"""A thread that reports a step which hangs, and the comparison of the ranks' times that names slow ones."""

from __future__ import annotations

import faulthandler
import statistics
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_r1.train.callbacks.base import Callback
from megatron_r1.train.config import WatchConfig
from megatron_r1.utils.logging import get_logger

if TYPE_CHECKING:
    from megatron_r1.train.loop import Trainer

log = get_logger("train.watch")


class Watchdog:
    """Reports once per step that takes longer than `limit` seconds: rank, step, phase and the Python stacks of this process, in a file and in the log.

    The step itself pays for nothing: the thread looks at the trainer a few times per limit. Should this thread not come to run either,
    because something holds Python's lock, the interpreter's own timer writes the stacks after twice the limit.
    """

    def __init__(self, trainer: Any, limit: float, path: Path) -> None:
        self._trainer, self._limit, self.path = trainer, limit, path
        self._seen: tuple[int, float] = (trainer.step, time.monotonic())
        self._reported = -1
        self._stop = threading.Event()
        self._file: Any = None
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop looking."""
        self._stop.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        if self._file is not None:
            self._file.close()
            if not self.path.stat().st_size:
                self.path.unlink()

    def _watch(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 closed with the thread
        while True:
            faulthandler.dump_traceback_later(2 * self._limit, file=self._file)
            if self._stop.wait(self._limit / 4):
                return
            step, now = self._trainer.step, time.monotonic()
            if step != self._seen[0]:
                self._seen = step, now
            elif now - self._seen[1] > self._limit and self._reported != step:
                self._reported = step
                self._report(step, now - self._seen[1])

    def _report(self, step: int, seconds: float) -> None:
        rank, phase = self._trainer.ctx.rank, self._trainer.phase
        head = f"rank {rank}: step {step + 1} has taken {seconds:.0f} s so far, in phase '{phase}'"
        self._file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {head}\n")
        self._file.flush()
        begin = self._file.tell()
        faulthandler.dump_traceback(file=self._file, all_threads=True)
        with open(self.path, encoding="utf-8") as stream:
            stream.seek(begin)
            stacks = stream.read()
        self._file.seek(0, 2)
        log.warning("%s; stacks, also in %s:\n%s", head, self.path.name, stacks)


class Watch(Callback):
    """Keeps a watchdog while the phase runs, and every so often compares what each rank's own work took."""

    def __init__(self, config: WatchConfig, folder: Path) -> None:
        self.config, self.folder = config, folder
        self._dog: Watchdog | None = None

    def on_start(self, trainer: Trainer) -> None:
        """Begin to watch."""
        trainer.own.clear()
        if self.config.hang_after is not None:
            self._dog = Watchdog(trainer, float(self.config.hang_after), self.folder / f"rank-{trainer.ctx.rank:05d}.txt")

    def on_step(self, trainer: Trainer) -> None:
        """Compare when due. Collective then, and only then."""
        every = int(self.config.stragglers_every)
        if not every or trainer.ctx.world_size == 1:
            trainer.own.clear()
        elif trainer.step and trainer.step % every == 0:
            marks, trainer.own = trainer.own, []
            mine = statistics.fmean(begin.seconds_until(end) for begin, end in marks) if marks else 0.0
            times = trainer.ctx.gather_objects(mine)
            for rank, seconds, ratio in slow_ranks(times, self.config.slow):
                if trainer.ctx.is_main:
                    log.warning(
                        "step %d: rank %d is slow: %.3g s of work per step since the last look, %.2f times the median of %d ranks", trainer.step, rank, seconds, ratio, len(times)
                    )

    def on_close(self, trainer: Trainer) -> None:
        """Stop watching."""
        if self._dog is not None:
            self._dog.close()
            self._dog = None


def slow_ranks(times: list[float], factor: float) -> list[tuple[int, float, float]]:
    """(rank, seconds, multiple of the median) of the ranks above `factor` times the median, the slowest first."""
    usual = statistics.median_low(times)
    found = [(rank, seconds, seconds / usual) for rank, seconds in enumerate(times) if usual > 0 and seconds > factor * usual]
    return sorted(found, key=lambda item: -item[1])
