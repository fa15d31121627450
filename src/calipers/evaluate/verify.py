"""One query decided: attacks and bounds in turn, cheapest first, then complete search, until the time is up.

- *sat*: a witness that `calipers.witness` accepts (strictly in its set, broken alone in the network's precision, in
  float64 and in onnxruntime) and at which the query's exact tree is true with onnxruntime's outputs;
- *unsat*: every box of every case has a lower bound that is positive after all rounding is subtracted;
- *unknown*, *timed-out*: neither, whatever went wrong, with the reason.

Before either verdict the network and onnxruntime must agree at the centres of the boxes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cached_property, partial
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor

from calipers.attacks.falsify import FIRST as SAMPLES
from calipers.attacks.falsify import Suggestion, falsify
from calipers.bounds import alpha_crown, crown, crown_ibp, interval
from calipers.bounds.corners import corners
from calipers.bounds.deployed import deviation
from calipers.bounds.ladder import neurons
from calipers.bracket import Model, witness
from calipers.errors import CalipersError, ModelError, UnsupportedOp
from calipers.evaluate.cascade import LARGE
from calipers.evaluate.checks import agreement, check_parameters, onnxruntime_replica
from calipers.evaluate.limits import TimeIsUp, alarm
from calipers.evaluate.solvers import FEW, complete, harder, problem
from calipers.exact import Outcome, branch
from calipers.exact.lattice import with_maxima
from calipers.exact.record import Record
from calipers.graph.graph import Network, evaluating
from calipers.sets import Region
from calipers.spec import Spec
from calipers.vnnlib import Case, Query, format_assignment

Verdict = Literal["sat", "unsat", "unknown", "timed-out"]
BOUNDS = (interval, crown_ibp, crown)
FIRST = 0.05  # seconds of attack before any bound
SECOND = 0.5  # seconds of attack before bounds are optimised
ATTACK = 0.2  # the part of the time left that the attack before the complete search may take
LONGEST = 5.0  # seconds of it at most
LAST = 10.0  # seconds of attack at most where searches give up before the time is up
ROUNDS = 9  # batches of points of an attack where work is limited, not time
PACE, LEAST_PACE = (
    2e-8,
    2e-5,
)  # seconds for a value of the network at one point, and for a point, roughly
CANDIDATES = 4  # points of a batch that are replayed
CENTRES = 4  # boxes of a case whose centres are compared
ROWS = 200  # boxes of a query that are listed in its result


@dataclass
class Box:
    """One box of a query: how far the search came there.

    Args:
        case, row: its place in `Query.cases`.
        lower: a lower bound on its margin; positive once proved.
        method: what gave the bound.
        domains: sub-problems of the complete search.
        reason: why that left it undecided.
    """

    case: int
    row: int
    lower: float = -math.inf
    method: str = ""
    domains: int = 0
    reason: str = ""

    def json(self) -> dict[str, Any]:
        lower = self.lower if math.isfinite(self.lower) else str(self.lower)
        return {**vars(self), "lower": lower}


@dataclass(frozen=True, eq=False)
class Decision:
    """The answer to a query.

    Args:
        verdict: ``sat``, ``unsat``, ``unknown`` or ``timed-out``.
        reason: why, in words.
        method: what decided it.
        lower: a lower bound on the margin over all boxes.
        seconds: how long it took.
        x, y: (1, *x) and (1, K), a witness and onnxruntime's outputs there; None without one.
        rounded: the witness satisfies an input's bounds only where these are read as the nearest numbers of the
            network's precision, since no number of it lies between them (X_0 = 0.1).
        decimals: how to write the inputs of such a witness: inside the exact set, ``x`` is what they round to, and the
            network in float64 is broken at them too; None where there are none, or no need.
        boxes: how far each box came, undecided ones first, at most `ROWS`.
        notes: what else should be known.
        proofs: how each box was proved, by case and row: the name of a bound or the record of a search.
    """

    verdict: Verdict
    reason: str = ""
    method: str = ""
    lower: float = -math.inf
    seconds: float = 0.0
    x: Tensor | None = None
    y: Tensor | None = None
    rounded: bool = False
    decimals: tuple[Decimal, ...] | None = None
    boxes: tuple[Box, ...] = ()
    notes: tuple[str, ...] = ()
    proofs: Mapping[tuple[int, int], Record | str] = field(default_factory=dict)

    def json(self) -> dict[str, Any]:
        """Everything but the witness's numbers, which have a format of their own."""
        return {
            "verdict": self.verdict,
            "reason": self.reason,
            "method": self.method,
            "lower": self.lower if math.isfinite(self.lower) else str(self.lower),
            "seconds": round(self.seconds, 4),
            "rounded": self.rounded,
            "boxes": [b.json() for b in self.boxes],
            "notes": list(self.notes),
        }

    def counterexample(self, query: Query) -> str:
        """The witness as a text, without the line ``sat``; empty without one."""
        if self.x is None or self.y is None or self.verdict != "sat":
            return ""
        values: dict[str, Tensor | Sequence[Decimal]] = {**query.cases[0].lift(self.x, self.y)}
        if self.decimals is not None:
            values[query.input.name] = self.decimals
        return format_assignment((query.input, query.output), values)


class _Decided(Exception):
    """A witness was accepted; ends the search from wherever it is."""


class _Enough(Exception):
    """The limit on sub-problems is reached."""


def decide(
    network: Network,
    query: Query,
    *,
    seconds: float = math.inf,
    memory: int | None = None,
    domains: int | None = None,
    exact: bool = False,
    real: bool = False,
    seed: int = 0,
    record: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> Decision:
    """The answer to ``query``, read with the network's dtype (``vnnlib.load(..., dtype=network.dtype)``).

    Whatever fails leaves it ``unknown`` with the reason; only Ctrl-C comes through.

    Args:
        seconds: time limit, kept to about a second.
        memory: bytes that bounds and searches plan for.
        domains: sub-problems that the complete search of a box may bound. With this limit attacks take a fixed number
            of rounds too, so that the answer does not depend on the machine as long as the time suffices.
        exact: accept no witness that needs an input's bound to be rounded.
        real: a query that declares float types asks about real arithmetic all the same; otherwise ``unsat`` there also
            covers the rounding of the network's own forward pass.
        record: keep what a certificate is made of, in `Decision.proofs`.
        progress: told what is being done, now and then.
    """
    begin = time.perf_counter()
    if not seconds > 0:
        return Decision("unknown", f"the time limit is {seconds:g} s, so nothing was tried")
    search = _Search(
        network, query, begin + seconds, memory, domains, exact, real, seed, progress, record
    )
    verdict, reason, method = _outcome(search)
    took = time.perf_counter() - begin
    boxes = sorted(search.boxes, key=lambda b: (b.lower > 0, b.lower))
    lower = min((b.lower for b in boxes), default=math.inf)
    return Decision(
        verdict, reason, method, lower, took, search.x, search.y, search.rounded, search.decimals,
        tuple(boxes[:ROWS]), tuple(search.notes), search.proofs,
    )  # fmt: skip


def _outcome(search: _Search) -> tuple[Verdict, str, str]:
    try:
        with alarm(search.deadline), evaluating(search.network.module):
            search.run()
    except _Decided:
        return "sat", f"broken by {search.stage}, replayed in {search.judges}", search.stage
    except TimeIsUp:
        return "timed-out", f"time was up during {search.stage}; {search.standing()}", ""
    except (CalipersError, ValueError, RuntimeError, ArithmeticError, MemoryError) as error:
        text = " ".join(str(error).split()) or "out of memory"
        return "unknown", f"{search.stage}: {type(error).__name__}: {text}", ""
    left = search.open()
    if left:
        reasons = dict.fromkeys(b.reason for b in left if b.reason)
        late = time.perf_counter() >= search.deadline
        text = "; ".join([search.standing(), *list(reasons)[:3]])
        return ("timed-out" if late else "unknown"), text, ""
    methods = ", ".join(dict.fromkeys(b.method for b in search.boxes))
    if not search.boxes:
        return "unsat", "no input satisfies the query's constraints on inputs", "reader"
    return "unsat", f"proved by {methods} on {_counted(len(search.boxes), 'box', 'boxes')}", methods


def _counted(count: int, one: str, many: str) -> str:
    return f"1 {one}" if count == 1 else f"{count} {many}"


@dataclass
class _Search:
    """The state of one decision."""

    network: Network
    query: Query
    deadline: float
    memory: int | None
    domains: int | None
    exact: bool
    real: bool
    seed: int
    progress: Callable[[str], None]
    record: bool
    boxes: list[Box] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    proofs: dict[tuple[int, int], Record | str] = field(default_factory=dict)
    stage: str = "reading"
    x: Tensor | None = None
    y: Tensor | None = None
    rounded: bool = False
    decimals: tuple[Decimal, ...] | None = None
    compared: bool = False

    @property
    def left(self) -> float:
        return self.deadline - time.perf_counter()

    @property
    def judges(self) -> str:
        own = str(self.network.dtype).removeprefix("torch.")
        others = () if self.replica is None else ("onnxruntime",)
        return ", ".join((own, *(("float64",) if own != "float64" else ()), *others))

    def open(self) -> list[Box]:
        """The boxes without a proof; NaN proves nothing."""
        return [b for b in self.boxes if not b.lower > 0]

    def standing(self) -> str:
        left = self.open()
        lower = min((b.lower for b in left), default=math.inf)
        return f"{len(left)} of {_counted(len(self.boxes), 'box', 'boxes')} open, lower bound {lower:.4g}"

    def run(self) -> None:
        """From cheap to expensive; ends by itself when all boxes are proved or nothing is left to try."""
        self.boxes = [
            Box(c, r) for c, case in enumerate(self.query.cases) for r in range(len(case.region))
        ]
        if not self.boxes:
            return
        check_parameters(self.network)
        self.stage = "attack"
        self.attack(FIRST, len(SAMPLES) if self.few else None)
        self.stage = "comparison with onnxruntime"
        self.compare()
        if not self.safe_cases:
            self.stage = "attack"
            self.attack(self.left)
            return
        folded = with_maxima(self.network)
        for method in BOUNDS:
            self.stage = method.__name__
            self.bound(method, folded)
            if not self.open():
                return
        midway = None
        if not self.few:  # there the complete search bounds cheaply enough, and attacks as it goes
            self.stage = "attack"
            self.attack(min(ATTACK * self.left, SECOND))
            if len(self.open()) == 1:  # which the complete search begins with bounding like that
                midway = self.long_attack
            else:
                self.stage = "alpha_crown"
                if self.record:
                    self.bound_recorded()
                else:
                    self.bound(alpha_crown, self.network)
                if not self.open():
                    return
                self.long_attack()
        self.stage = "complete search"
        self.complete(midway)
        if self.open() and self.domains is None:
            self.stage = "attack"
            self.attack(min(self.left, LAST))

    # -- evaluations ------------------------------------------------------------------------------------

    @cached_property
    def replica(self) -> Model | None:
        """onnxruntime, made when first needed."""
        found = onnxruntime_replica(self.network)
        if isinstance(found, str):
            self.notes.append(found)
            return None
        return found

    def compare(self) -> None:
        """The network and onnxruntime give the same outputs at the centres of the boxes.

        Raises:
            ModelError: they do not, or outputs are NaN or infinite.
        """
        if self.compared:
            return
        for region, _, _ in self.query.cases:
            few = region[torch.arange(min(len(region), CENTRES))]
            x = few.project(few.center.to(self.network.dtype))
            with torch.no_grad():
                y = self.network(x)
            if not bool(torch.isfinite(y).all()):
                raise ModelError("outputs are NaN or infinite at the centre of a box")
            if self.replica is not None:
                agreement("onnxruntime", self.replica, x, y)
        self.compared = True

    # -- the upper end ----------------------------------------------------------------------------------

    def attack(self, seconds: float, rounds: int | None = None) -> None:
        """Falsify the open boxes, the cases in turn, by at most so many batches of points each.

        Where work is limited, not time, by `ROUNDS` of them, whatever time that takes.
        """
        if self.domains is not None:
            seconds, rounds = self.left, ROUNDS
        end = time.perf_counter() + seconds
        places = sorted({b.case for b in self.open()})
        for i, place in enumerate(places):
            case = self.query.cases[place]
            rows = torch.tensor([b.row for b in self.open() if b.case == place])
            region, spec = case.region[rows], case.spec[rows]
            until = time.perf_counter() + (end - time.perf_counter()) / (len(places) - i)
            found = falsify(
                self.network, region, spec, seconds=until - time.perf_counter(),
                suggest=partial(self._suggest, region, spec), dtype=self.network.dtype, seed=self.seed,
                pace=self.pace,
            )  # fmt: skip
            for points, which in islice(found, rounds):
                self.judge(region, spec, points, which)
                if time.perf_counter() > until:
                    break

    @cached_property
    def pace(self) -> float | None:
        """Seconds for a point: None to measure it, or a rough figure that depends on the network alone."""
        if self.domains is None:
            return None
        values = sum(math.prod(node.shape) for node in self.network.graph.nodes)
        return max(PACE * values, LEAST_PACE)

    def _suggest(self, region: Region, spec: Spec) -> Iterable[Suggestion]:
        with suppress(CalipersError, ValueError):
            for batch in corners(self.network, region, spec):
                yield Suggestion(*batch)

    def long_attack(self) -> None:
        """What comes between bounds of whole boxes and their parts."""
        stage, self.stage = self.stage, "attack"
        self.attack(min(ATTACK * self.left, LONGEST))
        self.stage = stage

    def judge(self, region: Region, spec: Spec, points: Tensor, rows: Tensor) -> None:
        """Replay the most promising points; an accepted one ends the search.

        Raises:
            _Decided: a witness was accepted.
        """
        with torch.no_grad():
            margin = spec[rows].margin_at(self.network(points).double())
        broken = torch.nonzero(margin <= 0).flatten()
        order = broken[margin[broken].argsort()]
        for i in order[:CANDIDATES].tolist():
            one = rows[i : i + 1]
            if self.accept(region[one], spec[one], points[i : i + 1]):
                self.compare()
                raise _Decided

    @torch.no_grad()
    def accept(self, region: Region, spec: Spec, x: Tensor) -> bool:
        """Whether ``x`` (1, *x) is a witness of the query; it is kept."""
        x = x.to(self.network.dtype)
        replicas: Sequence[Model] = () if self.replica is None else (self.replica,)
        found = witness(self.network, region, spec, x, replicas=replicas)
        if not bool((found.upper <= 0).all()):
            return False
        y = (self.replica or self.network)(x)
        strict = self.query.holds(x, y)
        if not strict and (self.exact or not self.query.holds(x, y, dtype=self.network.dtype)):
            return False
        self.x, self.y, self.rounded = x, y, not strict
        self.decimals = None if strict else self._decimals(x, y)
        return True

    def _decimals(self, x: Tensor, y: Tensor) -> tuple[Decimal, ...] | None:
        """How to write a witness where the bounds hold no number of the network's precision."""
        found = self.query.decimals(x, y)
        if found is None:
            return None
        point = torch.tensor([float(v) for v in found], dtype=torch.float64).reshape(x.shape)
        y = self.network.in_double()(point.to(x.device))
        return tuple(found) if self.query.holds(found, y) else None

    # -- the lower end ----------------------------------------------------------------------------------

    @cached_property
    def safe_cases(self) -> Sequence[tuple[Region, Spec]]:
        """What has to be proved, by case: the specification, less the forward pass's rounding where the query
        declares float types; empty where there is no bound on that."""
        declared = {self.query.input.dtype, self.query.output.dtype} - {None}
        if self.real or not declared:
            return [(case.region, case.spec) for case in self.query.cases]
        names = ", ".join(sorted(str(d).removeprefix("torch.") for d in declared))
        try:
            harder = [(c.region, self._rounded(c)) for c in self.query.cases]
        except (UnsupportedOp, ValueError) as error:
            self.notes.append(f"no proof for {names}: {error}")
            for box in self.boxes:
                box.reason = (
                    f"no proof for {names} ({error}); declare the tensors real, or add --real"
                )
            return []
        self.notes.append(f"unsat covers the rounding of the network's forward pass ({names})")
        return harder

    def _rounded(self, case: Case) -> Spec:
        radius = deviation(
            self.network, case.region, case.spec, dtype=self.network.dtype, memory=self.memory
        )
        return harder(case.spec, radius)

    def bound(self, method: Callable[..., Tensor], network: Network) -> None:
        """Lower bounds of the open boxes by one method; of large networks in float32, rounding subtracted too."""
        dtype = torch.float32 if 2 * neurons(network) > LARGE else torch.float64
        for place, (region, spec) in enumerate(self.safe_cases):
            boxes = [b for b in self.open() if b.case == place]
            if not boxes:
                continue
            rows = torch.tensor([b.row for b in boxes])
            try:
                with torch.no_grad():
                    values = method(
                        network, region[rows], spec[rows], dtype=dtype, rigorous=True,
                        memory=self.memory,
                    )  # fmt: skip
            except UnsupportedOp as error:
                for box in boxes:
                    box.reason = str(error)
                return
            self.progress(f"{self.stage}: {self.standing()}")
            for box, lower in zip(boxes, spec[rows].margin(values).tolist(), strict=True):
                if lower > box.lower:
                    box.lower, box.method = lower, method.__name__
                if lower > 0:
                    self.proofs[box.case, box.row] = method.__name__

    def bound_recorded(self) -> None:
        """`alpha_crown`, as the complete search has it for the whole of an open box, with a record."""
        for box in self.open():
            row = torch.tensor([box.row])
            region, spec = self.safe_cases[box.case]
            record = Record()
            found = branch(
                self.network, region[row], spec[row], deadline=self.deadline, memory=self.memory,
                record=record, whole=True,
            )  # fmt: skip
            self.note(box, found.lower, "alpha_crown", record)

    def note(self, box: Box, lower: float, method: str, record: Record | None) -> None:
        """Keep a lower bound of a box, and what proves it."""
        if lower > box.lower:
            box.lower, box.method = lower, method
        if lower > 0 and record is not None:
            self.proofs[box.case, box.row] = record

    @cached_property
    def few(self) -> bool:
        return all(problem(self.network, c.region).varying <= FEW for c in self.query.cases)

    def complete(self, midway: Callable[[], None] | None) -> None:
        """Complete search, box by box, the most promising first; what one leaves of its time the later ones have."""
        left = sorted(self.open(), key=lambda b: -b.lower)
        for i, box in enumerate(left):
            now = time.perf_counter()
            row = torch.tensor([box.row])
            region, spec = self.safe_cases[box.case]
            own = self.query.cases[box.case].spec[row]
            self.stage = f"complete search of box {i + 1} of {len(left)}"
            found = None
            with suppress(_Enough):
                found = complete(
                    self.network, region[row], spec[row], memory=self.memory,
                    deadline=now + (self.deadline - now) / (len(left) - i),
                    progress=partial(self._follow, box), accept=partial(self.accept, region[row], own),
                    record=self.record, midway=midway,
                )  # fmt: skip
            if found is None:
                box.reason = f"{self.domains} sub-problems, the limit, did not decide it"
                continue
            outcome = found.outcome
            box.domains, box.reason = outcome.domains, outcome.reason
            whole = found.method == "branch" and not outcome.domains
            method = "alpha_crown" if whole else found.method
            self.note(box, outcome.lower, method, found.record)
            if outcome.point is not None:
                self.stage = found.method
                self.compare()
                raise _Decided

    def _follow(self, box: Box, outcome: Outcome) -> None:
        self.progress(
            f"{self.stage}: {outcome.domains} sub-problems, lower bound {outcome.lower:.4g}"
        )
        box.lower, box.domains = max(box.lower, outcome.lower), outcome.domains
        if self.domains is not None and outcome.domains >= self.domains:
            raise _Enough
