"""Workers of a Ray cluster: tasks and answers as in `calipers.evaluate.workers`, on as many machines as there are.

Each worker is an actor that handles one task at a time, so nothing piles up; answers come to the process that drives
the audit, the only one that writes. A worker whose machine is lost costs its task only, which another one repeats.

A cluster that is started here listens on this machine's loopback address alone, asks for a token, and has no dashboard.
Whoever may use a cluster may run programs on its machines and on those that join it: join only clusters that you trust.
"""

from __future__ import annotations

import os
import re
import secrets
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

from calipers.errors import WorkerError
from calipers.evaluate.limits import TimeIsUp, alarm
from calipers.evaluate.workers import READY, Handle, Lost, Team, Worker, sendable

OLDEST = (2, 54)  # older ones let anybody delete jobs (CVE-2026-27482), or have no tokens
KNOCK = 5.0  # seconds until an address that does not answer is given up
JOIN = 120.0  # seconds that joining or starting a cluster may take
LOOPBACK = "127.0.0.1"
LOST = "the worker or its machine was lost, out of memory perhaps"
OPEN = (
    "the Ray cluster asks for no token, so whoever reaches its ports can run programs on its machines; start it with "
    "RAY_AUTH_MODE=token"
)
SETTINGS = {  # Ray reads the last one when it is imported
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # what it does there: listen on the loopback address
}


class Handler:
    """The actor: prepare once, then handle tasks. Errors come back as values."""

    work: Handle

    def start(self, prepare: Callable[..., Handle], settings: Any) -> Any:
        try:
            self.work = prepare(settings)
        except Exception as error:  # noqa: BLE001 - whatever it is, the other end should know
            return sendable(error)
        return READY

    def handle(self, task: Any) -> Any:
        try:
            return self.work(task)
        except Exception as error:  # noqa: BLE001 - the other end decides
            return sendable(error)


class Remote(Worker):
    """A worker that is an actor of the cluster; ``answer`` is what it works on now."""

    def __init__(self, ray: Any, actor: Any, answer: Any) -> None:
        super().__init__()
        self.ray, self.actor, self.answer = ray, actor, answer

    def give(self, task: Any, sent: Any, seconds: float) -> None:
        self.task, self.until = task, time.monotonic() + seconds
        self.answer = self.actor.handle.remote(sent)

    def heard(self) -> Any:
        try:
            return self.ray.get(self.answer)
        except self.ray.exceptions.RayError:
            return Lost(0, LOST)

    def end(self) -> None:
        self.ray.kill(self.actor)


class Cluster(Team):
    """Workers of a Ray cluster, which is joined on entry and left at the end; one that was started here ends then.

    Args:
        count: of workers; None is as many as the cluster has room for.
        address: ``auto``: the cluster that RAY_ADDRESS names or, without it, a new one on this machine; or HOST:PORT
            of the head of one that this machine belongs to. A cluster that this process has joined already is used.
        threads: processors that each worker reserves; and a GPU, or its share of one, if there are any.

    `notes` says what weakens the cluster.

    Raises:
        WorkerError: on entry: no Ray, or an old one; nothing answers, in time, at the address.
    """

    def __init__(
        self,
        count: int | None,
        prepare: Callable[..., Handle],
        settings: Any,
        *,
        address: str = "auto",
        threads: int = 1,
    ) -> None:
        super().__init__(count or 1, prepare, settings)
        self.wanted, self.address, self.threads = count, address, threads
        self.ray: Any = None
        self.joined: Any = None
        self.sent: Any = None
        self.gpus = 0

    def __enter__(self) -> Cluster:
        self.joined = joined(self.address, (self.wanted or 0) * self.threads or None)
        self.ray, self.notes = self.joined.__enter__()
        try:
            here = self.ray.cluster_resources()
            self.gpus = int(here.get("GPU", 0))
            room = int(here.get("CPU", 1)) // self.threads
            room = min(room, self.gpus) if self.gpus else room
            self.count = max(1, room) if self.wanted is None else self.wanted
            self.sent = self.ray.put(self.settings)
        except BaseException:
            self.joined.__exit__(*sys.exc_info())
            raise
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self.sent = None
        self.joined.__exit__(None, None, None)

    def _new(self) -> Worker:
        options = {"num_cpus": self.threads, "num_gpus": min(1.0, self.gpus / self.count)}
        actor = self.ray.remote(Handler).options(**options).remote()
        return Remote(self.ray, actor, actor.start.remote(self.prepare, self.sent))

    def _talking(self, workers: Sequence[Worker], seconds: float) -> list[Worker]:
        asked = {w.answer: w for w in workers if isinstance(w, Remote)}
        done, _ = self.ray.wait(list(asked), timeout=seconds)
        return [asked[answer] for answer in done]

    def _started(self, worker: Worker, answer: Any) -> None:
        """Where machines were lost there may be no room for another worker; those that are left go on."""
        left = sum(w.ready for w in self.workers)
        if isinstance(answer, Lost) and left:
            self.count = left
        else:
            super()._started(worker, answer)


@contextmanager
def joined(address: str, processors: int | None = None) -> Iterator[tuple[Any, tuple[str, ...]]]:
    """Ray, connected to a cluster, and what weakens that; see `Cluster`."""
    known = sys.modules.get("ray")
    if known is not None and known.is_initialized():
        yield known, _weakness()
        return
    place = os.environ.get("RAY_ADDRESS", "") if address == "auto" else address or "''"
    with _settings({} if place else SETTINGS | {"RAY_AUTH_TOKEN": _token()}):
        ray = _imported()
        try:
            _connect(ray, place, processors)
            yield ray, _weakness()
        finally:
            ray.shutdown()


def _connect(ray: Any, place: str, processors: int | None) -> None:
    """Join the cluster at ``place``, or start one here."""
    given: dict[str, Any] = {"num_cpus": processors, "include_dashboard": False}
    if place:
        _knock(place)
        given = {"address": place}
    try:
        with alarm(time.perf_counter() + JOIN), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Ray about itself
            context = ray.init(
                **given, log_to_driver=False, logging_level="ERROR", configure_logging=False
            )
    except TimeIsUp:
        raise WorkerError(
            f"ray: {place or 'a cluster here'} was not ready in {JOIN:.0f} s"
        ) from None
    except Exception as error:  # Ray raises many kinds; each means the same here
        remedy = (
            "is this a Ray cluster, of the same version, and if it asks for a token, are RAY_AUTH_MODE and "
            "RAY_AUTH_TOKEN set?"
        )
        raise WorkerError(
            f"ray: cannot use {place or 'a cluster here'} ({error}); {remedy if place else ''}"
        ) from error
    if not place and context.address_info["node_ip_address"] != LOOPBACK:
        raise WorkerError(
            "ray: was imported before the audit, so that a cluster started now would listen to the network; import it "
            "later, or start a cluster yourself and give its address"
        )


@cache
def _token() -> str:
    """The token of clusters that are started here: one for each process, because Ray reads it once."""
    return secrets.token_hex(32)


def _weakness() -> tuple[str, ...]:
    return () if os.environ.get("RAY_AUTH_MODE") == "token" else (OPEN,)


@contextmanager
def _settings(values: dict[str, str]) -> Iterator[None]:
    """Environment variables for as long as the block lasts."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _imported() -> Any:
    try:
        import ray
    except ImportError:
        raise WorkerError("ray: is not installed; pip install 'calipers[ray]'") from None
    version = tuple(int(part) for part in re.findall(r"\d+", ray.__version__)[:2])
    if version < OLDEST:
        raise WorkerError(
            f"ray: {ray.__version__} is too old to be used safely; pip install 'calipers[ray]'"
        )
    return ray


def _knock(address: str) -> None:
    """Raises:
    WorkerError: nothing answers at HOST:PORT; Ray itself would try for minutes.
    """
    found = re.fullmatch(r"(?P<host>[\w.-]+|\[[0-9A-Fa-f:.]+\]):(?P<port>\d{1,5})", address)
    if not found or not 0 < int(found["port"]) < 1 << 16:
        raise WorkerError(
            f"ray: {address!r} is no address; give auto, or HOST:PORT of the head of a cluster that this machine "
            "belongs to, as ray start printed it"
        )
    try:
        socket.create_connection((found["host"].strip("[]"), int(found["port"])), KNOCK).close()
    except OSError as error:
        raise WorkerError(
            f"ray: nothing answers at {address} ({error}); is the cluster running, and does this machine reach it?"
        ) from None
