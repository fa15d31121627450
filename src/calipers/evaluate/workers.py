"""Worker processes: tasks handed out one at a time, answers as they come, and a worker that dies costs its task only.

Workers are spawned, so each starts from nothing but what it is sent. They ignore Ctrl-C, which is for the process that
started them, and end when that process does, however it ends.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from typing import Any, ClassVar, NamedTuple, TypeVar

from calipers.errors import WorkerError

T = TypeVar("T")
Handle = Callable[[Any], Any]
START = 120.0  # seconds that a worker may take to start
TRIES = 3  # starts in a row that may fail
LONGEST = 3600.0  # seconds that one wait may take
READY = "ready"


class Lost(NamedTuple):
    """A task's worker died (``code``: its exit code, ``cause`` if that says nothing), or was ended because it was late
    (None)."""

    code: int | None
    cause: str = ""

    @property
    def late(self) -> bool:
        return self.code is None

    @property
    def reason(self) -> str:
        if self.late:
            return "no answer in time, so the worker was ended"
        return self.cause or f"the worker died (exit code {self.code}), out of memory perhaps"


class Raised(NamedTuple):
    """An exception that handling a task, or starting, raised."""

    error: Exception


class _Plain(ForkingPickler):
    """Sends tensors by value. torch would move them, the caller's own too, to memory that processes share, which needs
    a large /dev/shm and a thread of the sender."""

    _extra_reducers: ClassVar[dict[type, Any]] = {}


class Worker:
    """Handles one task at a time.

    Args:
        task: what it works on.
        ready: whether it has started.
        until: when it is given up, on the clock of ``time.monotonic()``.
    """

    def __init__(self) -> None:
        self.task: Any = None
        self.ready = False
        self.until = time.monotonic() + START

    def give(self, task: Any, sent: Any, seconds: float) -> None:
        """Hand over a task, as ``sent``; without an answer in ``seconds`` it is lost."""
        raise NotImplementedError

    def heard(self) -> Any:
        """What the worker said; `Lost` if it died instead."""
        raise NotImplementedError

    def end(self) -> None:
        raise NotImplementedError


class Process(Worker):
    """A worker that is a process of this machine."""

    def __init__(self, prepare: Callable[..., Handle], settings: Any) -> None:
        super().__init__()
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other,), daemon=True)
        self.process.start()
        other.close()
        try:
            with suppress(OSError):  # it died: noticed when it is listened to
                self.connection.send_bytes(_Plain.dumps((prepare, settings)))
        except Exception as error:  # noqa: BLE001 - whatever an object's own pickling raises
            self.end()
            raise WorkerError(
                f"workers: what is measured cannot be sent to other processes ({error}); define models and "
                "methods at the top of a module, or measure in one process"
            ) from None

    def give(self, task: Any, sent: Any, seconds: float) -> None:
        self.task, self.until = task, time.monotonic() + seconds
        with suppress(BrokenPipeError):
            self.connection.send(sent)

    def heard(self) -> Any:
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            self.process.join(1.0)
            return Lost(self.process.exitcode or 0)

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


class Team:
    """``count`` workers, started when there is something to do. Whatever happens, none survives the block.

    Args:
        prepare: called in each new worker with ``settings``; returns the function that handles its tasks.
    """

    def __init__(self, count: int, prepare: Callable[..., Handle], settings: Any) -> None:
        self.count, self.prepare, self.settings = count, prepare, settings
        self.workers: list[Worker] = []
        self.failed = 0  # starts in a row
        self.notes: tuple[str, ...] = ()

    def __enter__(self) -> Team:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers:
            worker.end()
        self.workers.clear()

    def _new(self) -> Worker:
        return Process(self.prepare, self.settings)

    def _talking(self, workers: Sequence[Worker], seconds: float) -> list[Worker]:
        """Those of ``workers`` that have something to say, once one has, or none after ``seconds``."""
        spoken = {w.connection: w for w in workers if isinstance(w, Process)}
        return [spoken[c] for c in wait(list(spoken), seconds) if isinstance(c, Connection)]

    def answers(
        self,
        take: Callable[[], tuple[T, float] | None],
        send: Callable[[T], Any] = lambda task: task,
        deadline: float = math.inf,
    ) -> Iterator[tuple[T, Any]]:
        """(task, answer) in the order of the answers: what handling returned, `Raised` or `Lost`.

        Args:
            take: the next task and its seconds, or None when there is none now; it is asked when a worker is free, so
                that tasks may depend on earlier answers. The end is when no worker is busy and there is none.
            send: a task as the workers get it.
            deadline: of ``time.monotonic()``, after which a task is lost that waits for a worker to start.

        Raises:
            WorkerError: workers do not start.
        """
        held: tuple[T, float] | None = None
        try:
            while True:
                free = [w for w in self.workers if w.ready and w.task is None]
                if free or not self.workers:
                    held = held or take()
                if held is None and not any(w.task is not None for w in self.workers):
                    if free or not self.workers:
                        return
                elif held is not None:
                    self.workers += [self._new() for _ in range(self.count - len(self.workers))]
                    if free:
                        task, seconds = held
                        free[0].give(task, send(task), seconds)
                        held = None
                        continue
                    if time.monotonic() >= deadline:
                        yield held[0], Lost(None)
                        held = None
                        continue
                yield from self._listen(deadline if held else math.inf)
        finally:
            left = [w for w in self.workers if w.task is not None]
            self.workers = [w for w in self.workers if w.task is None]
            for worker in left:  # nobody waits for their answers any more
                worker.end()

    def _listen(self, deadline: float) -> Iterator[tuple[Any, Any]]:
        """Wait for the first answers, or until ``deadline``."""
        watched = [w for w in self.workers if w.task is not None or not w.ready]
        pause = max(0.0, min(deadline, *(w.until for w in watched)) - time.monotonic())
        talking = self._talking(watched, min(pause, LONGEST))
        for worker in watched:
            if worker in talking:
                answer = worker.heard()
            elif time.monotonic() >= worker.until:
                answer = Lost(None)
            else:
                continue
            task, started = worker.task, worker.ready
            worker.task, worker.until = None, math.inf
            if isinstance(answer, Lost):
                worker.end()
                self.workers.remove(worker)
            if started:
                yield task, answer
            else:
                self._started(worker, answer)

    def _started(self, worker: Worker, answer: Any) -> None:
        if answer == READY:
            worker.ready, self.failed = True, 0
            return
        self.failed += 1
        if isinstance(answer, Raised):
            raise WorkerError(f"workers: cannot start: {answer.error}")
        if self.failed >= TRIES:
            raise WorkerError(
                f"workers: cannot start: {answer.reason}; a script that starts workers needs its calls below "
                'if __name__ == "__main__", and each worker needs the memory to load torch'
            )


def _serve(connection: Connection) -> None:
    """Handle tasks until the other end closes."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_follow, daemon=True).start()
    with suppress(EOFError, OSError):
        try:
            prepare, settings = connection.recv()
            handle = prepare(settings)
        except Exception as error:  # noqa: BLE001 - whatever it is, the other end should know
            connection.send(sendable(error))
            return
        connection.send(READY)
        while True:
            task = connection.recv()
            try:
                answer = handle(task)
            except Exception as error:  # noqa: BLE001 - the other end decides
                answer = sendable(error)
            connection.send(answer)


def sendable(error: Exception) -> Raised:
    """The exception as one that can be sent: those of other packages often cannot be put together again."""
    import traceback

    if type(error).__module__.startswith(("calipers.", "builtins")):
        error.add_note("".join(traceback.format_exception(error)))
        return Raised(error)
    return Raised(RuntimeError(f"{type(error).__name__}: {error}"))


def _follow() -> None:
    """End with the process that started this one, in the midst of whatever is computed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
