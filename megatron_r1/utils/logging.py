"""One way to speak: log lines, and progress that is a bar on a terminal and lines elsewhere."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

console = Console(stderr=True, highlight=False, soft_wrap=not sys.stderr.isatty())
LINE_EVERY_SECONDS = 10.0


def is_main_rank() -> bool:
    """True unless a launcher says this process is another rank."""
    return int(os.environ.get("RANK", "0")) == 0


def get_logger(name: str) -> logging.Logger:
    """A logger under `megatron_r1`; ranks other than 0 speak only from WARNING up."""
    root = logging.getLogger("megatron_r1")
    if not root.handlers:
        if console.is_terminal:
            handler: logging.Handler = RichHandler(console=console, show_path=False, log_time_format="%H:%M:%S", omit_repeated_times=False)
        else:
            handler = logging.StreamHandler(sys.stderr)
            prefix = "" if is_main_rank() else f"[rank {os.environ.get('RANK')}] "
            handler.setFormatter(logging.Formatter(f"%(asctime)s {prefix}%(levelname)-7s %(message)s", "%H:%M:%S"))
        root.addHandler(handler)
        root.setLevel(logging.INFO if is_main_rank() else logging.WARNING)
        root.propagate = False
    return logging.getLogger(name if name.startswith("megatron_r1") else f"megatron_r1.{name}")


def human(number: float) -> str:
    """1234567 -> '1.23M'."""
    for limit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit:
            return f"{number / limit:.3g}{suffix}"
    return f"{number:.3g}"


def duration(seconds: float) -> str:
    """75 -> '1m15s'."""
    seconds = round(seconds)
    hours, minutes, rest = seconds // 3600, seconds // 60 % 60, seconds % 60
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


class Bar:
    """Progress of one long step. `advance` is cheap enough to call every step."""

    def __init__(self, label: str, total: int, unit: str, enabled: bool) -> None:
        self.label, self.total, self.unit = label, max(int(total), 1), unit
        self.done, self.began, self.notes = 0, time.monotonic(), ""
        self._spoke = self.began
        self._enabled = enabled and is_main_rank()
        self._live: Progress | None = None
        if self._enabled and console.is_terminal:
            self._live = Progress(
                TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[rate]}"),
                TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[notes]}"), console=console, transient=False,
            )
            self._task = self._live.add_task(label, total=self.total, rate="", notes="")
            self._live.start()

    def rate(self) -> float:
        """Units per second since the start."""
        return self.done / max(time.monotonic() - self.began, 1e-9)

    def note(self, **values: float | str) -> None:
        """Show these values beside the bar."""
        self.notes = "  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in values.items())

    def advance(self, amount: int = 1) -> None:
        """Count `amount` more units as done."""
        self.done += amount
        if not self._enabled:
            return
        now = time.monotonic()
        if self._live is not None:
            self._live.update(self._task, completed=self.done, rate=f"{human(self.rate())} {self.unit}/s", notes=self.notes)
        elif now - self._spoke >= LINE_EVERY_SECONDS:
            self._spoke = now
            left = (self.total - self.done) / max(self.rate(), 1e-9)
            get_logger("progress").info(
                "%s: %3.0f %%  %s/%s %s  %s %s/s  %s left  %s", self.label, 100 * self.done / self.total, human(self.done),
                human(self.total), self.unit, human(self.rate()), self.unit, duration(max(left, 0)), self.notes,
            )

    def close(self) -> None:
        """Stop the bar and say how it went."""
        if self._live is not None:
            self._live.stop()
        elif self._enabled:
            get_logger("progress").info(
                "%s: done, %s %s in %s (%s %s/s)  %s", self.label, human(self.done), self.unit,
                duration(time.monotonic() - self.began), human(self.rate()), self.unit, self.notes,
            )


@contextmanager
def progress(label: str, total: int, unit: str = "tokens", enabled: bool = True) -> Iterator[Bar]:
    """Show progress of a long step: `with progress("pretrain1", tokens) as bar: ... bar.advance(n)`."""
    bar = Bar(label, total, unit, enabled)
    try:
        yield bar
    finally:
        bar.close()
