"""What the explorer shows: a run directory read once, and what is measured on request, one thing at a time.

Nothing here writes: the store is opened read-only, and what is measured live is kept in memory alone.
"""

from __future__ import annotations

import math
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import torch
from markupsafe import Markup

from calipers.attacks import ATTACKS
from calipers.attacks.surface import Surface, surface
from calipers.bounds import BOUNDS
from calipers.bracket import Bracket
from calipers.data import Data
from calipers.errors import CalipersError, StoreMismatch
from calipers.evaluate.audit import evaluations, inputs
from calipers.evaluate.cascade import Stage, default_cascade
from calipers.evaluate.comparison import Side, sides
from calipers.evaluate.examples import KIND, WORD, Picture, bounds_of_data, picture, signed
from calipers.evaluate.fold import Job, measure, search
from calipers.evaluate.jaws import Jaw, nested, over_radius
from calipers.evaluate.result import threat_identity
from calipers.evaluate.runs import Record, Stored, radius_given
from calipers.evaluate.sampling import sample
from calipers.evaluate.store import model_digest
from calipers.graph.graph import Network
from calipers.rounding import exact
from calipers.sets import ThreatModel
from calipers.spec import Spec
from calipers.work import counting

QUICK = ("clean", "fgsm", "pgd-20", "interval", "crown_ibp", "crown")
PATIENCE = 3.0  # seconds after which no further quick method, and no further radius, is begun
RADII = 12  # of the picture over the radius
SEARCH = 20.0  # seconds of a complete search
SIZE = 21  # points along each axis of a surface
KEPT = 64  # answers kept in memory
SLACK = 1e-3  # of stored ends, which are read without their rounding radius
LARGEST = 1000  # radius that is accepted
NUMBER = re.compile(r"\d{1,6}(\.\d{1,12})?(/\d{1,9})?|\.\d{1,12}", re.ASCII)


class Busy(CalipersError):
    """Another request is being measured and takes long."""


class Measured(NamedTuple):
    """A method's word on an example, live."""

    name: str
    side: str
    bracket: Bracket
    seconds: float
    work: float
    note: str

    @property
    def value(self) -> str:
        """For people."""
        low, high = self.bracket.lower.item(), self.bracket.upper.item()
        parts = [f"≥ {signed(low)}"] if math.isfinite(low) else []
        parts += [f"≤ {signed(high)}"] if math.isfinite(high) else []
        return ", ".join(parts) or "–"


class Live(NamedTuple):
    """The bracket of an example at a radius, measured now.

    Args:
        left: the quick methods for which there was no time.
    """

    eps: str
    bracket: Bracket
    methods: tuple[Measured, ...]
    left: tuple[str, ...]
    nested: Markup
    pictures: tuple[Picture, ...]
    prediction: str

    @property
    def verdict(self) -> str:
        return WORD[self.bracket.verdict()[0]]

    @property
    def kind(self) -> str:
        return KIND[self.bracket.verdict()[0]]

    @property
    def ends(self) -> tuple[str, str]:
        return signed(self.bracket.lower.item()), signed(self.bracket.upper.item())


@dataclass
class Explorer:
    """A run (or the runs of a curve) with its network and data.

    Args:
        rows: what the runs say about each example, by run.
        positions: where the examples stand in the data set.
    """

    side: Side
    network: Network
    data: Data
    positions: list[int]
    threat: ThreatModel
    rows: list[dict[int, Record]]
    replicas: tuple[Callable[..., Any], ...]
    lock: threading.Lock = field(default_factory=threading.Lock)
    cache: OrderedDict[tuple[object, ...], Any] = field(default_factory=OrderedDict)

    def __len__(self) -> int:
        return len(self.data)

    @property
    def largest(self) -> float:
        """The largest radius of the runs."""
        return max(float(r) for r in radii(self.side))

    def threats(self) -> list[str]:
        """What each run's adversary may do, in words."""
        return [replace(self.threat, eps=_eps(run)).describe() for run in self.side.runs]

    def class_name(self, index: int) -> str:
        names = self.data.classes
        return names[index] if index < len(names) else str(index)

    # -- live ----------------------------------------------------------------------------------------------------------

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One measurement at a time.

        Raises:
            Busy: another one takes long.
        """
        if not self.lock.acquire(timeout=2 * SEARCH):
            raise Busy("another example is being measured; try again in a moment")
        try:
            yield
        finally:
            self.lock.release()

    def _kept(self, key: tuple[object, ...], make: Callable[[], Any]) -> Any:
        """The answer from memory, or made now."""
        with self._alone():
            if key not in self.cache:
                self.cache[key] = make()
            self.cache.move_to_end(key)
            while len(self.cache) > KEPT:
                self.cache.popitem(last=False)
            return self.cache[key]

    def _job(self, row: int, eps: str) -> Job:
        threat = replace(self.threat, eps=eps)
        x = inputs(self.data.x[row : row + 1], self.network, threat)
        y = self.data.y[row : row + 1].to(self.network.device)
        return Job(self.network, x, y, threat, 0, self.replicas)

    def bracket(self, row: int, eps: str, extra: Measured | None = None) -> Live:
        """The example's bracket at ``eps`` by the quick methods, by what the runs say about other radii, and ``extra``.

        Raises:
            SoundnessError: two of them contradict each other.
        """
        said, left = self._kept(("bracket", row, exact(eps)), lambda: self._quick(row, eps))
        said = [*said, *([extra] if extra else [])]
        bracket = Bracket.unknown(1)
        for one in said:
            bracket = bracket.meet(one.bracket)
        shown = tuple(m for m in said if m.note or m.value != "–")
        order = sorted(shown, key=lambda m: (m.bracket.lower.item(), m.bracket.upper.item()))
        jaws = [Jaw(m.name, m.bracket.lower.item(), m.bracket.upper.item()) for m in order]
        return Live(eps, bracket, shown, left, nested(jaws), *self._pictures(row, bracket))

    def _quick(self, row: int, eps: str) -> tuple[list[Measured], tuple[str, ...]]:
        """What the quick methods say, and those for which there was no time."""
        job, begin = self._job(row, eps), time.perf_counter()
        stages = {s.name: s for s in default_cascade(self.network)}
        said, left = [stored(self, row, eps)], []
        for name in QUICK:
            if time.perf_counter() - begin > PATIENCE:
                left.append(name)
            else:
                said.append(_measured(job, stages[name]))
        return said, tuple(left)

    def _pictures(self, row: int, bracket: Bracket) -> tuple[tuple[Picture, ...], str]:
        x = self.data.x[row].double()
        low, high = bounds_of_data(self.data)
        scale = (high - low) or 1.0
        clean = picture(((x - low) / scale).numpy())
        point = None if bracket.witness is None else bracket.witness[0].cpu()
        if point is None or not bool(torch.isfinite(point).all()):
            return (clean,), ""
        with torch.no_grad():
            said = int(self.network(bracket.witness).argmax(1)[0])  # type: ignore[arg-type]
        z = point.double()
        delta = (z - x).numpy()
        pictures = (
            clean,
            picture(delta, float(abs(delta).max())),
            picture(((z - low) / scale).numpy()),
        )
        return pictures, self.class_name(said)

    def over_radius(self, row: int, now: str) -> Markup:
        """Both ends over the radius, by bounds and attacks that are quick enough, from 0 to twice the runs' largest."""
        eps, low, high = self._kept(("radii", row), lambda: self._over_radius(row))
        return over_radius(eps, low, high, float(exact(now)))

    def _over_radius(self, row: int) -> tuple[list[float], list[float], list[float]]:
        stages = {s.name: s for s in default_cascade(self.network)}
        begin, last = time.perf_counter(), Fraction(str(2 * self.largest or 0.1))
        chosen = [stages[n] for n in ("crown", "crown_ibp") if n in stages][:1]
        took = _measured(self._job(row, "0"), chosen[0]).seconds
        if took * RADII > PATIENCE:
            chosen = [stages["crown_ibp"]]
        eps, low, high = [], [], []
        for i in range(RADII + 1):
            if i and time.perf_counter() - begin > PATIENCE:
                break
            text = str(last * i / RADII)
            job = self._job(row, text)
            bound, attack = _measured(job, chosen[0]), _measured(job, stages["pgd-20"])
            eps.append(float(exact(text)))
            low.append(bound.bracket.lower.item())
            high.append(attack.bracket.upper.item())
        # sets are nested: no end rises with the radius
        for i in range(len(low) - 2, -1, -1):
            low[i] = max(low[i], low[i + 1])
        for i in range(1, len(high)):
            high[i] = min(high[i], high[i - 1])
        return eps, low, high

    def run(self, row: int, eps: str, method: str) -> Measured:
        """One attack, bound or complete search on one example.

        Raises:
            ValueError: no such method.
        """
        stage = methods().get(method)
        if stage is None:
            raise ValueError(f"method: there is no {method[:40]!r}")
        key = ("run", row, exact(eps), method)
        found: Measured = self._kept(key, lambda: _measured(self._job(row, eps), stage))
        return found

    def surface(self, row: int, eps: str) -> Surface:
        """The loss surface of an example up to ``eps``."""

        def make() -> Surface:
            job = self._job(row, eps)
            spec = Spec.label(job.y, self.network.num_classes)
            return surface(self.network, job.x, spec, float(exact(eps)), size=SIZE)

        found: Surface = self._kept(("surface", row, exact(eps)), make)
        return found


def methods() -> dict[str, Stage]:
    """What can be run on one example, by name."""
    found = {name: Stage(name, "attack", method) for name, method in ATTACKS.items()}
    found |= {name: Stage(name, "bound", method) for name, method in BOUNDS.items()}
    exacts = {s.name: s for s in default_cascade() if s.side == "exact"}
    return found | exacts


def _measured(job: Job, stage: Stage) -> Measured:
    """The stage on the job's only example; what fails says nothing, with the reason."""
    begin, note, part = time.perf_counter(), "", Bracket.unknown(1)
    rows = torch.tensor([0], device=job.x.device)
    with counting() as work:
        try:
            part = (
                search(job, stage, rows, begin + SEARCH)
                if stage.side == "exact"
                else measure(job, stage, rows)
            )
        except (CalipersError, RuntimeError, MemoryError) as error:
            note = " ".join(str(error).split())[:300]
    return Measured(stage.name, stage.side, part, time.perf_counter() - begin, work.passes, note)


def stored(explorer: Explorer, row: int, eps: str) -> Measured:
    """What the runs say at ``eps``: lower ends of radii at least as large, upper ends of those no larger."""
    now, low, high = exact(eps), -math.inf, math.inf
    for radius, records in zip(radii(explorer.side), explorer.rows, strict=True):
        record = records.get(row)
        if record is not None:
            low = max(low, record.lower) if radius >= now else low
            high = min(high, record.upper) if radius <= now else high
    lower, upper, slack = (torch.tensor([v], dtype=torch.float64) for v in (low, high, SLACK))
    part = Bracket(lower, upper, rounding=slack)
    return Measured("stored", "carried", part, 0.0, 0.0, "")


def radii(side: Side) -> list[Fraction]:
    """The runs' radii, exactly."""
    return [exact(_eps(run)) for run in side.runs]


def _eps(run: Stored) -> str | float:
    """The radius as it was given.

    Raises:
        StoreMismatch: the run's record has none, or one per feature.
    """
    given = radius_given(run)
    if given is None:
        raise StoreMismatch(f"{run.directory}: its record has no radius that is one number")
    return given


def radius_text(text: str) -> str:
    """A radius from a request.

    Raises:
        ValueError: no plain number, or more than `LARGEST`.
    """
    if not NUMBER.fullmatch(text) or exact(text) > LARGEST:
        raise ValueError(f"eps: cannot read {text[:40]!r}; write a number such as 0.1 or 8/255")
    return text


def explore(directory: str | Path, network: Network, data: Data, threat: ThreatModel) -> Explorer:
    """The explorer of a run directory, or of one with a run for each radius.

    Args:
        data: the whole data set: the sample of the run is drawn again.
        threat: its radius does not matter.

    Raises:
        DataError, StoreMismatch: no run directory, or of another network, other data, or another threat model.
    """
    (side,) = sides([directory], least=1)
    identity = side.runs[0].identity
    count = len(side.runs[0].records)
    part, positions = data, torch.arange(len(data))
    if identity.get("data") != data.digest and 0 < count < len(data):
        part, positions = sample(data, count, int(identity.get("seed", 0)))
    found = {"model": model_digest(network), "data": part.digest}
    wrong = [name for name, value in found.items() if identity.get(name) != value]
    for run in side.runs:
        said, mine = (
            str(run.identity.get("threat")),
            threat_identity(replace(threat, eps=_eps(run))),
        )
        if said != mine:
            wrong.append(f"threat ({said}; given: {mine})")
    if wrong:
        raise StoreMismatch(
            f"{directory}: the run is of another {', '.join(dict.fromkeys(wrong))}; give MODEL, --data and the other "
            "options as for the audit"
        )
    agreeing, _ = evaluations(network, ())
    return Explorer(
        side, network, part, positions.tolist(), threat,
        [{r.example: r for r in run.records} for run in side.runs], tuple(agreeing.values()),
    )  # fmt: skip


def listing(explorer: Explorer, run: int) -> Sequence[dict[str, Any]]:
    """The overview's rows: the examples of one run, the unknown first, each kind by rising distance from 0."""
    rank = {"unknown": 0, "vulnerable": 1, "robust": 2}
    kinds = {"unknown": "unknown", "vulnerable": "broken", "robust": "robust"}
    words = {"unknown": "unknown", "vulnerable": "broken", "robust": "certified"}
    records = sorted(
        explorer.rows[run].values(),
        key=lambda r: (rank[r.verdict], abs(r.lower if r.verdict == "robust" else r.upper)),
    )
    return [
        {
            "row": r.example, "position": explorer.positions[r.example],
            "label": explorer.class_name(int(explorer.data.y[r.example])), "kind": kinds[r.verdict],
            "verdict": words[r.verdict], "lower": r.lower, "upper": r.upper, "lower_text": signed(r.lower),
            "upper_text": signed(r.upper), "by": r.lower_by if r.verdict == "robust" else r.upper_by,
            "seconds": r.seconds,
        }
        for r in records
    ]  # fmt: skip
