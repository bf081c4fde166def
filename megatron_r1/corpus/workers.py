"""Processes that do the tasks of a job. One worker is this process itself."""

from __future__ import annotations

import os
import signal
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from types import FrameType
from typing import Any

from megatron_r1.corpus.phases import Desk, Task, phases
from megatron_r1.corpus.plan import Job
from megatron_r1.corpus.tokenise import use_threads
from megatron_r1.utils.errors import EnvironmentProblem
from megatron_r1.utils.logging import Bar, get_logger

log = get_logger("corpus.workers")
DEATHS = 3
"""Processes one task may cost before it is given up."""


@dataclass
class _Worker:
    process: Any
    pipe: Connection
    task: Task | None = None


class Workers:
    """Use as a context manager; `run` does the tasks of one phase after the other. Processes start when first needed."""

    def __init__(self, job: Job, desk: Desk, count: int) -> None:
        self.job, self.desk, self.count = job, desk, count
        self._workers: list[_Worker] = []
        self._context = get_context("spawn")

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()
            worker.pipe.close()
        self._workers.clear()

    def run(self, tasks: Sequence[Task], bar: Bar) -> None:
        """Do all tasks that are not done, the largest first. Raises the first task's error; EnvironmentProblem when processes keep dying."""
        todo = deque(sorted((task for task in tasks if not self.desk.done(task)), key=lambda task: -task.bytes))
        bar.advance(sum(task.bytes for task in tasks) - sum(task.bytes for task in todo))
        with _terminable():
            if self.count == 1 or len(todo) < 2:
                for task in todo:
                    bar.note(task=task.name)
                    self.desk.perform(task)
                    bar.advance(task.bytes)
                return
            self._share(todo, bar)

    def _share(self, todo: deque[Task], bar: Bar) -> None:
        deaths: Counter[str] = Counter()
        while len(self._workers) < min(self.count, len(todo)):
            self._workers.append(self._start())
        while todo or any(worker.task for worker in self._workers):
            for worker in self._workers:
                if worker.task is None and todo:
                    worker.task = todo.popleft()
                    # One that died while it waited is noticed below, like one that died at work.
                    with suppress(OSError):
                        worker.pipe.send((worker.task.phase, worker.task.name))
            ready = wait([worker.pipe for worker in self._workers if worker.task])
            for number, worker in enumerate(self._workers):
                if worker.task is None or worker.pipe not in ready:
                    continue
                task, worker.task = worker.task, None
                try:
                    error = worker.pipe.recv()
                except (EOFError, OSError):
                    worker.process.join()
                    deaths[task.name] += 1
                    self._died(task, worker.process.exitcode, deaths[task.name])
                    todo.appendleft(task)
                    self._workers[number] = self._start()
                    continue
                if error is not None:
                    raise error
                bar.note(task=task.name)
                bar.advance(task.bytes)

    def _died(self, task: Task, code: int, times: int) -> None:
        how = f"signal {-code}, {signal.strsignal(-code)}" if code < 0 else f"exit code {code}"
        if code == -signal.SIGKILL:
            how += ": the system kills the largest process when memory is short"
        if times < DEATHS:
            log.warning("a worker died at %s %s (%s); the task is done again, attempt %d of %d", task.phase, task.name, how, times + 1, DEATHS)
            return
        raise EnvironmentProblem(
            expected=f"a process that finishes {task.phase} {task.name}", found=f"{times} died there, the last by {how}",
            fix="set `workers` of the corpus step lower (each needs about 0.3 GB and three times the longest document), then run the same command again; what is done stays done",
        )

    def _start(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_work, args=(theirs, self.job, os.getpid()), daemon=True)
        process.start()
        theirs.close()
        return _Worker(process, ours)


def require_done(desk: Desk, phase: str) -> None:
    """Raise EnvironmentProblem unless every task of the phase is done (a source that could not be had is)."""
    left = [task.name for task in desk.tasks(phase) if not task.record.is_file()]
    if left:
        raise EnvironmentProblem(
            expected=f"every task of the phase {phase} done", found=f"{len(left)} are not, such as {left[0]}",
            fix="look into the logs of that phase, then submit the same command again; what is done stays done",
        )


@dataclass(frozen=True)
class Share:
    """One phase of a job as a step of a datatrove pipeline, on any number of machines: rank r of n does the tasks r, r + n, ...

    Nothing is handed from rank to rank but files in the job's folder. Raises EnvironmentProblem when the phase before is not done.
    """

    job: Job
    phase: str

    def __call__(self, data: Any, rank: int = 0, world_size: int = 1) -> None:
        use_threads(1)
        desk, order = Desk(self.job), phases(self.job.config)
        if at := order.index(self.phase):
            require_done(desk, order[at - 1])
        for task in desk.tasks(self.phase)[rank::world_size]:
            desk.perform(task)


def _work(pipe: Connection, job: Job, parent: int) -> None:
    """What a worker does until it is told no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=end_with, args=(parent,), daemon=True).start()
    os.environ["RAYON_NUM_THREADS"] = "1"
    use_threads(1)
    desk, at, tasks = Desk(job), "", dict[str, Task]()
    while True:
        try:
            phase, name = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            if phase != at:
                desk.turn()
                at, tasks = phase, {task.name: task for task in desk.tasks(phase)}
            # Unknown here: the input has changed meanwhile, which `perform` says.
            desk.perform(tasks.get(name) or Task(phase, name, job.folder / "none", 0))
            error = None
        except Exception as problem:
            error = _portable(problem)
        try:
            pipe.send(error)
        except OSError:
            return


def _portable(error: Exception) -> Exception:
    """The error itself where it can be sent, else one that says the same."""
    import pickle

    said = "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(said)
    error.add_note(said)
    return error


def end_with(parent: int) -> None:
    """End this process, a worker, soon after the one it works for: another run may already do its task. For a thread of its own."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the run as an interrupt does: workers are stopped first."""
    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
