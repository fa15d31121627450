"""Branch and bound by splitting the input box, for networks of few varying inputs.

Batches of boxes are bounded together: affine forms carried forward give every neuron an interval, a backward pass
improves those that are unstable, and another one gives a plane below each functional. A clause of several functionals
also gets the plane of a weighted mean of them. The planes trim the boxes; what is left is cut in the dimension that
helps most, which is measured: both halves are bounded, forward alone and in float32, for each candidate. Halves that
look proved then are bounded forward alone first. Everything that is proved is proved in float64, rounding subtracted.
Maxima that the network builds from ReLUs are bounded as maxima, unless notes are asked for.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from calipers.bounds.forward import functionals_of, propagate_forms
from calipers.bounds.ladder import at_reference, tightener
from calipers.bounds.linear import linear_bounds
from calipers.bounds.state import State, flat, start, with_sparse_weights
from calipers.bracket import witness
from calipers.errors import RegionError
from calipers.exact.boxes import Boxes, Frontier, Planes, blend, divisible, halves, joined, trimmed
from calipers.exact.lattice import with_maxima
from calipers.exact.outcome import Outcome
from calipers.exact.record import Record
from calipers.graph.graph import Network
from calipers.sets import Region
from calipers.spec import Spec

Attack = Callable[[Region, Spec], Tensor]
Progress = Callable[[Outcome], None]

DIMENSIONS = 32  # varying inputs up to which boxes can be split with any hope
BATCH = 512  # boxes at once, at most
PACE = 0.2  # seconds that a batch may take
SPREAD = 8  # pieces up to which a box is cut before they are bounded
NEAR = 0.25  # of the bound before it: pieces whose estimate is above are bounded first
SYMBOLS = 64  # new symbols per value in a proof
ROUGH = 8  # and in an estimate
REFINED = 64  # unstable neurons of a value that a backward pass is worth
CANDIDATES = 6  # dimensions of which both halves are tried
SHARE = 0.12  # of the time for the attack, and of the first second once more
ATTACKED = 64  # boxes of one turn of it
STEPS = 16  # towards the weights of a clause's functionals
MEMORY = 1 << 30


def split_inputs(
    network: Network,
    region: Region,
    spec: Spec,
    *,
    deadline: float,
    memory: int | None = None,
    attack: Attack | None = None,
    progress: Progress | None = None,
    record: Record | None = None,
) -> Outcome:
    """Decide the specification on one box, jointly for all clauses, by splitting it.

    Sound: a positive ``lower`` holds in real arithmetic on the stored parameters, for every point of the region's outer
    box; ``point`` has passed `calipers.witness`.

    Args:
        deadline: of `time.perf_counter`; bounds stop at the next step of the network after it.
        memory: bytes to plan for, also of the boxes that wait.
        attack: called now and then with the most promising boxes, for about an eighth of the time.
        progress: called about once a second.
        record: an empty one, which then tells how everything was proved.

    Raises:
        ValueError: the region is no bounded box, or of more than one example.
        UnsupportedOp: an op of the network has no entry in the op table.
    """
    _require(region, spec)
    with torch.no_grad():
        search = _search(with_maxima(network), region, spec, memory or MEMORY, deadline)
        search.record = record
        if len(search.inputs) > DIMENSIONS:
            return Outcome(
                reason=f"{len(search.inputs)} inputs vary; boxes of up to {DIMENSIONS} are split"
            )
        return search.run(deadline, attack, progress)


def _require(region: Region, spec: Spec) -> None:
    if len(region) != 1 or len(spec) != 1:
        raise ValueError(
            f"region: {len(region)} examples and {len(spec)} specifications; one at a time"
        )
    if region.p != math.inf:
        raise ValueError(
            f"region: an l{region.p:g} ball cannot be cut into boxes; use a search over ReLUs"
        )
    hull = region.hull()
    if not bool(torch.isfinite(hull.lower).all() & torch.isfinite(hull.upper).all()):
        raise ValueError(
            "region: the box is unbounded; give every input a lower and an upper bound"
        )


def _search(network: Network, region: Region, spec: Spec, memory: int, deadline: float) -> _Search:
    exact, rough = (
        with_sparse_weights(
            start(network, region, dtype=dtype, rigorous=rigorous, memory=memory, statistics=None)
        )
        for dtype, rigorous in ((torch.float64, True), (torch.float32, False))
    )
    exact.deadline = rough.deadline = deadline
    lower, upper = (flat(v) for v in region.hull())
    return _Search(
        region,
        spec,
        exact,
        rough,
        torch.nonzero((upper > lower)[0]).flatten(),
        Boxes(
            lower,
            upper,
            torch.ones(1, spec.count, dtype=torch.bool),
            torch.full((1,), -math.inf, dtype=torch.float64),
            torch.full((1,), -math.inf, dtype=torch.float64),
            torch.zeros(1, dtype=torch.long),
        ),
        memory,
    )


@dataclass(eq=False)
class _Search:
    """One search.

    Args:
        exact, rough: the network with its parameters bound, for proofs and for estimates.
        inputs: positions of the inputs that vary.
        proved: the least value at which anything has been proved so far.
        attacked: seconds spent in the attack.
        lasted: of them in its last turn, and so in the next, it is thought.
        turns: of the attack.
        stuck: there is a box that can be neither decided nor cut.
    """

    region: Region
    spec: Spec
    exact: State
    rough: State
    inputs: Tensor
    root: Boxes
    memory: int
    proved: float = math.inf
    attacked: float = 0.0
    lasted: float = 0.03
    turns: int = 0
    stuck: bool = False
    domains: int = 0
    hard: Frontier = field(default_factory=Frontier)
    easy: Frontier = field(default_factory=Frontier)
    record: Record | None = None

    @property
    def network(self) -> Network:
        return self.exact.network

    def run(self, deadline: float, attack: Attack | None, progress: Progress | None) -> Outcome:
        self.hard.push(self.root)
        if self.record is not None:
            self.record.of_inputs = True
            self.record.plant([range(self.spec.count)])
        size, limit = 1, self.largest()
        begin = said = time.perf_counter()
        while self.waiting:
            now, worked = time.perf_counter(), time.thread_time()
            if now >= deadline or self.hard.bytes + self.easy.bytes > self.memory:
                what = "time" if now >= deadline else "memory"
                return self.outcome(reason=f"{what} is up: {self.waiting} boxes are left")
            quick = self.easy.count >= size or not self.hard.count
            boxes = (self.easy if quick else self.hard).pop(size)
            granted = SHARE * (now - begin + min(now - begin, 1.0))
            turn = attack if self.attacked + self.lasted <= granted else None
            try:
                point = self.step(boxes, quick, turn)
            except TimeoutError:
                self.hard.push(boxes)
                continue
            if point is not None:
                return Outcome(point=point, domains=self.domains)
            if self.stuck:
                return self.outcome(reason="a box too small to be cut is undecided")
            if progress is not None and now > said + 1:
                said = now
                progress(self.outcome(reason="going on"))
            # by this thread's own time: the load of other processes should not change the batches
            worked = time.thread_time() - worked
            if worked > PACE:
                size = max(1, size // 2)
            elif worked < PACE / 2 and boxes.number == size:
                size = min(limit, (2 if worked > PACE / 8 else SPREAD) * size)
        return self.outcome()

    def step(self, boxes: Boxes, quick: bool, attack: Attack | None) -> Tensor | None:
        """Bound the boxes and put back what is left of them, cut unless this was ``quick``; or a witness."""
        left, points = self.bound(boxes, thorough=not quick)
        point = self.witness(points)
        if point is None and attack is not None:
            point = self.attack(attack, left)
        if point is None and quick:
            self.hard.push(left)
        elif point is None and left.number:
            self.split(left)
        return point

    @property
    def waiting(self) -> int:
        return self.hard.count + self.easy.count

    def outcome(self, reason: str = "") -> Outcome:
        lower = min(self.hard.bound, self.easy.bound, self.proved)
        return Outcome(min(lower, 0.0) if self.waiting else lower, None, self.domains, reason)

    def largest(self) -> int:
        """Boxes at once: their forms, a few times over."""
        steps = len(self.exact.facts.steps)
        widest = max(self.network.graph.widest, self.root.lower.shape[1])
        symbols = min(len(self.inputs) + SYMBOLS * steps, 4 * SYMBOLS)
        return max(1, min(BATCH, self.memory // (8 * 8 * widest * symbols)))

    def attack(self, attack: Attack, boxes: Boxes) -> Tensor | None:
        """A witness from the boxes of lowest bound and from everywhere, the latter twice as often."""
        begin = time.perf_counter()
        self.turns += 1
        some = self.root if self.turns % 3 else boxes.at(boxes.bound.argsort()[:ATTACKED])
        if not some.number:
            return None
        shape = (-1, *self.network.input_shape)
        region = Region.box(some.lower.reshape(shape), some.upper.reshape(shape))
        spec = self.spec[torch.zeros(some.number, dtype=torch.long)]
        point = self.witness(attack(region, spec))
        self.lasted = time.perf_counter() - begin
        self.attacked += self.lasted
        return point

    # -- bounds -----------------------------------------------------------------------------------------------------

    def bound(self, boxes: Boxes, *, thorough: bool) -> tuple[Boxes, Tensor]:
        """What is left of the boxes, trimmed, and points where the specification is most likely to fail."""
        self.domains += boxes.number
        node = boxes.node
        planes = self.planes(self.exact, boxes, thorough=thorough)
        values = planes.clauses(self.spec.count)
        cut = 2.0**-30 * (planes.values.abs() + (planes.slopes.abs() * planes.radius).sum(-1)).amax(
            0
        )
        cut = torch.where(cut > 0, cut, 1e-300)
        shut = boxes.open & (values > 0)
        self.prove(torch.where(shut, values, math.inf).amin(1))
        worst = torch.where(boxes.open, values, math.inf).argmin(1)
        boxes = boxes._replace(open=boxes.open & ~shut)
        bound = torch.where(boxes.open, values, math.inf).amin(1)
        boxes = boxes._replace(bound=torch.where(bound.isnan(), -math.inf, bound))
        points = torch.cat([planes.center, self.corners(boxes, planes, worst)])
        some = boxes.open.any(1)
        before, boxes = boxes.at(some), trimmed(boxes.at(some), _some(planes, some), cut[some])
        same = (before.lower == boxes.lower) & (before.upper == boxes.upper)
        less = ~same.all(1) | (before.open != boxes.open).any(1)
        self.prove(cut[some][less])
        if self.record is not None:
            changed = shut.any(1)
            changed[some] |= less
            self.record.tried.append(node[changed])
        return boxes.at(boxes.open.any(1)), points

    def prove(self, values: Tensor) -> None:
        if len(values):
            self.proved = min(self.proved, values.min().item())

    def planes(self, base: State, boxes: Boxes, *, thorough: bool) -> Planes:
        """Planes below each functional, and below a mean of each clause's."""
        shape = (-1, *self.network.input_shape)
        state = base.over(Region.box(boxes.lower.reshape(shape), boxes.upper.reshape(shape)))
        output = self.network.graph.output
        form = propagate_forms(
            state,
            symbols=max(SYMBOLS if state.rigorous else ROUGH, len(self.inputs)),
            inputs=self.inputs,
            keep=(output,),
            tighten=tightener(state, most=REFINED) if thorough else None,
        )[output]
        C, d = (
            v.to(state.dtype).expand(boxes.number, *v.shape[1:]) for v in (self.spec.C, self.spec.d)
        )
        clause = self.spec.clause
        center, radius = flat(state.frame.origin), flat(state.frame.above)

        def below(C: Tensor, d: Tensor, clause: Tensor) -> Planes:
            A, value = C.transpose(0, 1), at_reference(state, C, d).T
            rows, bias = linear_bounds(state, output, A)
            back = _planes(state, flat(rows, 2), value + bias, clause, center, radius)
            low, along = functionals_of(state, form, A)
            along = along[:, :, : len(self.inputs)]
            slopes = torch.zeros_like(flat(rows, 2))
            wide = radius[:, self.inputs]
            slopes[:, :, self.inputs] = torch.where(wide > 0, along / wide, 0.0)
            reach = along.abs().sum(-1)
            value = value + low + reach - state.gamma(len(self.inputs) + 4) * reach
            ahead = _planes(state, slopes, value, clause, center, radius)
            better = ahead.lows > back.lows
            return back._replace(
                slopes=torch.where(better.unsqueeze(2), ahead.slopes, back.slopes),
                values=torch.where(better, ahead.values, back.values),
            )

        found = below(C, d, clause)
        if self.spec.simple:
            return found
        parts = [found]
        for number in range(self.spec.count):
            rows = torch.nonzero(clause == number).flatten()
            if len(rows) == 1 or not bool(boxes.open[:, number].any()):
                continue
            weights = blend(found, rows, STEPS if state.rigorous else STEPS // 2)
            if not state.rigorous:  # the planes' own mean is near enough
                parts.append(found.mean(rows, weights))
                continue
            weights = weights.T.unsqueeze(1)  # (N, 1, rows)
            mean, offset = weights @ C[:, rows], (weights @ d[:, rows].unsqueeze(2)).squeeze(2)
            plane = below(mean, offset, clause[rows[:1]])
            # the mean's own rounding
            high = state.boxes[output].lower.abs().maximum(state.boxes[output].upper.abs())
            size = (
                weights @ (C[:, rows].abs() @ high.unsqueeze(2) + d[:, rows].abs().unsqueeze(2))
            ).flatten()
            parts.append(
                plane._replace(values=plane.values - 2 * state.gamma(len(rows) + 2) * size)
            )
        return found._replace(
            slopes=torch.cat([p.slopes for p in parts]),
            values=torch.cat([p.values for p in parts]),
            clause=torch.cat([p.clause for p in parts]),
        )

    # -- points -----------------------------------------------------------------------------------------------------

    def corners(self, boxes: Boxes, planes: Planes, worst: Tensor) -> Tensor:
        """Where the best plane of each box's worst clause is lowest."""
        own = planes.clause.unsqueeze(1) == worst
        best = torch.where(own, planes.lows, -math.inf).argmax(0)
        slope = planes.slopes[best, torch.arange(boxes.number)]
        return torch.where(slope > 0, boxes.lower, boxes.upper)

    def witness(self, points: Tensor) -> Tensor | None:
        """The first of the most promising points that `calipers.witness` accepts."""
        try:
            inner = self.region.inner(self.network.dtype)
        except RegionError:
            return None  # no member in the network's dtype
        x = points.reshape(-1, *self.network.input_shape).to(self.network.dtype)
        x = x.clamp(inner.lower, inner.upper)
        y = self.network(x).double()
        margin = self.spec.margin(y @ self.spec.C[0].double().T + self.spec.d[0].double())
        for i in margin.argsort()[:4].tolist():
            if not margin[i] <= 0:
                break
            if bool((witness(self.network, self.region, self.spec, x[i : i + 1]).upper <= 0).all()):
                return x[i]
        return None

    # -- splits -----------------------------------------------------------------------------------------------------

    def split(self, boxes: Boxes) -> None:
        """Cut boxes, and few hopeless pieces again and again: to bound a few takes as long as to bound many."""
        begin = time.thread_time()
        while boxes.number:
            pieces = self.cut(boxes)
            if self.stuck:
                return
            likely = pieces.hope > 0
            self.easy.push(pieces.at(likely))
            near = pieces.hope > NEAR * pieces.bound
            again = ~likely & ~near
            if (
                self.record is not None
                or pieces.number >= SPREAD
                or time.thread_time() - begin > PACE / 4
            ):
                again[:] = False
            self.hard.push(pieces.at(~likely & ~again))
            boxes = pieces.at(again)

    def cut(self, boxes: Boxes) -> Boxes:
        """The halves of each box, cut where their estimated bounds are best."""
        boxes = boxes.at(boxes.bound.argsort(descending=True))  # the worst on top
        cut = divisible(boxes.lower, boxes.upper)
        if not bool(cut.any(1).all()):
            self.hard.push(boxes)
            self.stuck = True
            return boxes
        tried = self.candidates(boxes)
        pieces = [halves(boxes, dim) for dim in tried.T]
        hopes = self.estimate(joined([half for pair in pieces for half in pair]))
        hopes = hopes.reshape(len(pieces), 2, boxes.number)
        gain = hopes.clamp_max(0).sum(1)
        gain = torch.where(cut.gather(1, tried).T, gain, -math.inf)
        best = gain.argmax(0, keepdim=True)
        chosen = tried.gather(1, best.T).squeeze(1)
        pair = halves(boxes, chosen)
        nodes = boxes.node, boxes.node
        if self.record is not None:
            point = pair[0].upper.gather(1, chosen.unsqueeze(1)).squeeze(1)
            nodes = self.record.split(boxes.node, chosen, point)
        return joined(
            [
                half._replace(hope=hope.gather(0, best).squeeze(0), node=node)
                for half, hope, node in zip(pair, hopes.unbind(1), nodes, strict=True)
            ]
        )

    def candidates(self, boxes: Boxes) -> Tensor:
        """Dimensions (N, candidates) worth trying."""
        width = (boxes.upper - boxes.lower)[:, self.inputs]
        if len(self.inputs) <= CANDIDATES:
            return self.inputs.expand(boxes.number, -1)
        share = width / (self.root.upper - self.root.lower)[:, self.inputs]
        return self.inputs[share.topk(CANDIDATES, 1).indices]

    def estimate(self, boxes: Boxes) -> Tensor:
        """What the margin's bound will be, about."""
        most = 4 * self.largest()
        found = []
        for i in range(0, boxes.number, most):
            part = boxes.at(slice(i, i + most))
            values = self.planes(self.rough, part, thorough=False).clauses(self.spec.count)
            found.append(torch.where(part.open, values, math.inf).amin(1))
        return torch.cat(found).double()


def _planes(
    state: State, slopes: Tensor, values: Tensor, clause: Tensor, center: Tensor, radius: Tensor
) -> Planes:
    """In float64; with the rounding of the sum that gives the lowest value subtracted."""
    if state.rigorous:
        size = (slopes.abs() * radius).sum(-1) + values.abs()
        values = values - state.gamma(slopes.shape[-1] + 4) * size
        values = values - (slopes.shape[-1] + 4) * state.tiny
    return Planes(slopes.double(), values.double(), clause, center.double(), radius.double())


def _some(planes: Planes, index: Tensor) -> Planes:
    return planes._replace(
        slopes=planes.slopes[:, index],
        values=planes.values[:, index],
        center=planes.center[index],
        radius=planes.radius[index],
    )
