"""Branch and bound over neurons: sub-problems in batches, each bounded by optimised lines and multipliers.

The root is bounded by alpha-CROWN, rounding subtracted. What is left open is split: a neuron's operand lies on one
side of a point or on the other. The search runs in float32; a sub-problem is closed only by a bound in float64 with
rounding subtracted, at the lines and multipliers that the search found. So its answers hold in real arithmetic.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from calipers.bounds.interval import propagate
from calipers.bounds.ladder import functionals, neurons, tightener
from calipers.bounds.slopes import ascended, tighten
from calipers.bounds.state import DEFAULT_MEMORY, State, check_spec, start, working_dtype
from calipers.bracket import witness
from calipers.exact.domains import Batch, Domains, Layer, Problem, joined
from calipers.exact.leaf import programmable, solved
from calipers.exact.maxima import without_maxima
from calipers.exact.outcome import Outcome
from calipers.exact.record import Proof, Record, as_bytes
from calipers.graph.graph import Network
from calipers.ops.kinds import Lines
from calipers.sets import Interval, Region
from calipers.spec import Spec

LARGE = 4000  # neurons from which on the root's bounds are computed in float32
METRIC = 0.1, 1.0, 0.1  # how far choices, multipliers and weights may move, relative to each other
MOMENTUM = 0.7
VALUES = 1 << 20
PATIENCE = 25  # times as many steps for what cannot be split further
SHARE = 0.25  # of the rows bounded so far that intervals computed again may cost
INSIDE = 0.1  # choices and multipliers are kept so far from their ends where splits are picked
ROWS = 512  # intermediate bounds computed together
MORE, SPAN = 3, 4  # times as many steps where progress over so many lets hope for a proof
SLACK = 1e-2  # of the root's bound, which proofs that are noted have to spare: a checker's intervals differ a little
REACH = 0.1  # steps aim at a positive bound, so far on the other side of zero
SCORES: dict[str, Callable[[Batch], Tensor]] = {}


def branch(
    network: Network,
    region: Region,
    spec: Spec,
    *,
    deadline: float,
    memory: int | None = None,
    attack: Callable[[Region, Spec], Tensor] | None = None,
    progress: Callable[[Outcome], None] | None = None,
    batch: int | None = None,
    steps: int = 8,
    candidates: int = 8,
    score: str = "gap",
    period: int = 3,
    record: Record | None = None,
    whole: bool = False,
) -> Outcome:
    """Decide one region: a proof in real arithmetic, or a member where the margin is seen to fail.

    Args:
        attack: called once, where the bounds of the whole region do not suffice.
        batch: sub-problems bounded together; None: as many as `VALUES` numbers of the network allow, 64 to 1024.
        steps: ascent steps on the lines and multipliers of a batch; `MORE` times as many for what they seem to prove.
        candidates: splits tried on every sub-problem; the one whose children are bounded best is taken.
        score: how candidates are found, a name of `SCORES`.
        period: splits at least after which a sub-problem's intervals are computed again.
        record: an empty one, which then tells how everything was proved.
        whole: stop once the region as a whole is bounded.

    Raises:
        UnsupportedOp: an op of the network has no entry in the op table.
        ValueError: more than one example, or an unknown score.

    Sound: children cover their parent, multipliers are not negative, choices lie in [0, 1], and every closed
    sub-problem was bounded in float64 with all rounding subtracted.
    Reference: Wang et al. 2021 (beta-CROWN), De Palma et al. 2021 (filtered smart branching).
    """
    if len(region) != 1:
        raise ValueError(f"region: {len(region)} examples; a search takes one")
    if score not in SCORES:
        raise ValueError(f"score: {score!r} is not one of {', '.join(SCORES)}")
    if batch is None:
        values = sum(math.prod(node.shape) for node in network.graph.nodes)
        batch = min(max(VALUES // values, 64), 1024)
    search = Search(
        without_maxima(network), region, spec, deadline, memory, progress, batch, steps, candidates, score, period,
        record, whole,
    )  # fmt: skip
    with torch.no_grad():
        try:
            search.run(attack)
        except TimeoutError:
            search.reason = search.reason or "the time is up"
    return search.outcome()


class Search:
    """One run of `branch`."""

    def __init__(
        self,
        network: Network,
        region: Region,
        spec: Spec,
        deadline: float,
        memory: int | None,
        progress: Callable[[Outcome], None] | None,
        batch: int,
        steps: int,
        candidates: int,
        score: str,
        period: int,
        record: Record | None,
        whole: bool,
    ) -> None:
        self.record, self.whole = record, whole
        self.network, self.region, self.spec = network, region, spec
        self.deadline, self.memory, self.progress = deadline, memory, progress
        self.batch, self.steps, self.candidates = batch, steps, candidates
        self.score = SCORES[score]
        self.period = period
        self.lower, self.count, self.reason = -math.inf, 0, ""
        self.work = self.renewed = (
            0  # rows of all passes, and of those for intervals computed again
        )
        self.point: Tensor | None = None

    def outcome(self) -> Outcome:
        reason = "" if self.point is not None else self.reason
        return Outcome(self.lower, self.point, self.count, reason)

    def run(self, attack: Callable[[Region, Spec], Tensor] | None) -> None:
        open_, low = self.root()
        if not open_.any() or not self.worth(low[open_[self.spec.clause]]):
            return
        if attack is not None:
            self.judge(attack(self.region, self.spec).detach())
        stack = [self.planted(self.sure.root(*self._starts(open_, low)), open_)]
        if self.point is None:
            stack[0] = self.improved(stack[0])
        while stack and self.point is None:
            stack[-1] = self.closed(stack[-1])
            domains = self.refreshed(_taken(stack, self.batch))
            if not len(domains):
                continue
            splittable = self.problem.undecided(domains)
            done = ~splittable.any(1)
            if bool(done.any()) and not self.finished(domains[done]):
                return
            if bool(done.all()):
                continue
            children = self.split(domains[~done], splittable[~done])
            self.count += len(children)
            stack.append(self.improved(children))
            left = sum(map(len, stack))
            if left * children.bytes_each > (self.memory or DEFAULT_MEMORY):
                self.reason = f"{left} open sub-problems are more than the memory limit holds"
                return
            if self.progress:
                self.progress(replace(self.outcome(), reason=f"{left} open"))
        if self.point is None:
            self.lower = max(self.lower, math.ulp(0.0))

    def worth(self, low: Tensor) -> bool:
        """Whether what the root left open, with these bounds, is to be split."""
        if not bool(torch.isfinite(low).all()):
            self.reason = "bounds of the whole region are not finite, and splits of neurons will not make them so"
        elif self.whole:
            self.reason = "only the region as a whole was bounded"
        return not self.reason

    # -- the root -----------------------------------------------------------------------------------------------------

    def root(self) -> tuple[Tensor, Tensor]:
        """Alpha-CROWN over the whole region, in stages: which clauses stay open, and the functionals' bounds."""
        large = neurons(self.network) > LARGE
        state = self._state(torch.float32 if large else torch.float64, rigorous=True)
        C, d = check_spec(state, self.spec)
        output = self.network.graph.output
        propagate(state, tighten=tightener(state), until=output)
        low = functionals(state, C, d)
        open_ = self._open(low)
        record = self.record
        keep_rows, keep = (record.keep_rows, record.keep_region) if record else (None, None)
        if record is not None:
            record.begin(state, low[0])
        if open_.any():
            self._keep(low)
            wanted = open_[self.spec.clause].unsqueeze(0)
            tighten(state, C, wanted, steps=4, share=0.999, keep=keep_rows)
            low = torch.maximum(low, ascended(state, C, d, wanted, steps=12, keep=keep))
            open_ = self._open(low)
        if open_.any() and not large:  # what mattered little before may matter among many splits
            wanted = open_[self.spec.clause].unsqueeze(0)
            tighten(state, C, wanted, steps=4, share=1.0, keep=keep_rows)
        self._keep(low)
        if record is not None:
            record.region = {m: v for m, v in record.region.items() if low[0, m] > 0}
        if open_.any():
            members = _members(self.spec)
            boxes = state.boxes
            self.sure = self._problem(boxes, members, torch.float64, rigorous=True)
            self.problem = self._problem(boxes, members, torch.float32, rigorous=False)
            if record is not None:
                self._demand(SLACK * low[0].abs())
        return open_, low[0]

    def planted(self, root: Domains, open_: Tensor) -> Domains:
        """The root of the search, in its record too."""
        if self.record is None:
            return root
        layers = self.problem.layers.values()
        self.record.elements = {v.node.name: v.columns for v in layers}
        clauses = torch.nonzero(open_).flatten().tolist()
        return replace(root, node=self.record.plant([[c] for c in clauses]))

    def _open(self, low: Tensor) -> Tensor:
        return ~(self.spec.clauses(low)[0] > 0)

    def _keep(self, low: Tensor) -> None:
        value = float(self.spec.margin(low)[0])
        if value > self.lower:
            self.lower = value

    def _demand(self, slack: Tensor) -> None:
        for problem in (self.sure, self.problem):
            problem.slack = slack.to(problem.d)

    def _state(self, dtype: torch.dtype, *, rigorous: bool) -> State:
        working = working_dtype(self.network, self.spec, dtype, rigorous=rigorous)
        state = start(
            self.network,
            self.region,
            dtype=working,
            rigorous=rigorous,
            memory=self.memory,
            statistics=None,
        )
        state.deadline = self.deadline
        for name, value in state.env.items():
            if isinstance(value, Tensor):
                state.env[name] = value.detach()
        return state

    def _problem(
        self, boxes: dict[str, Interval], members: Tensor, dtype: torch.dtype, *, rigorous: bool
    ) -> Problem:
        state = self._state(dtype, rigorous=rigorous)
        propagate(state)
        for name, box in boxes.items():
            if name in state.boxes and name not in self.network.graph.inputs:
                own = state.boxes[name]
                state.boxes[name] = Interval(
                    torch.maximum(own.lower, box.lower.to(own.lower)),
                    torch.minimum(own.upper, box.upper.to(own.upper)),
                )
        state.cache.clear()
        C, d = check_spec(state, self.spec)
        return Problem(state, C[0], d[0], members, None if rigorous else self.sure)

    def _starts(self, open_: Tensor, low: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        clauses = torch.nonzero(open_).flatten()
        members = self.problem.members[clauses]
        values = low.to(self.problem.C)[members.clamp_min(0)].masked_fill(members < 0, -math.inf)
        best, pick = values.max(1)
        weights = torch.full_like(values, 0.1).scatter(1, pick.unsqueeze(1), 1.0)
        return clauses, weights.masked_fill(members < 0, 0.0), best

    # -- one round ----------------------------------------------------------------------------------------------------

    def improved(self, domains: Domains) -> Domains:
        """The same sub-problems, bounded."""
        parts = [
            self._ascend(domains[i : i + self.batch]) for i in range(0, len(domains), self.batch)
        ]
        return joined(parts)

    def _ascend(self, domains: Domains) -> Domains:
        """Polyak's subgradient steps with momentum towards a positive bound; what is proved takes no more part.

        An open sub-problem leaves its last point to its children, which is further on its way than the best one; but
        where that is worse than what the parent had they begin anew. After the first steps only those go on that would
        be proved if each further step gained what the last ones did on average.
        """
        work, alive = Batch(self.problem, domains), torch.arange(len(domains))
        best = torch.full_like(domains.bound, -math.inf)
        kept = [v.clone() for v in work.leaves]
        velocity: list[Tensor] = []
        middle: Tensor | None = None  # of the points below: near the relaxation's minimum
        target = best
        most, earlier = MORE * self.steps, best
        for i in range(most + 1):
            last = i == most
            for leaf in work.leaves:
                leaf.requires_grad_(not last)
            if last:
                work.choice.mul_(255).round_().div_(255)  # as it will be kept
            self.work += len(alive) * (1 if last else 3)
            with torch.set_grad_enabled(not last):
                bound, rows = work.evaluate()
                total = bound.sum()
            value = bound.detach()
            best[alive] = torch.maximum(best[alive], torch.nan_to_num(value, nan=-math.inf))
            for old, new in zip(kept, work.leaves, strict=True):
                old[alive] = new.detach()
            if not i:
                target = REACH * value.abs()
            points = self._lowest(rows.detach())
            middle = points if middle is None else middle + (points - middle) / (i + 1)
            if i % 8 == 0:
                self.judge(points)
            open_ = ~(value > 0)
            if i % SPAN == 0:
                gain, earlier = (best - earlier)[alive] / SPAN, best.clone()
                if i >= self.steps:
                    open_ &= best[alive] + (most - i) * gain > 0
            if last or not bool(open_.any()):
                if i:
                    self.judge(middle)
                break
            grads = torch.autograd.grad(
                total, work.leaves, allow_unused=True, materialize_grads=True
            )
            velocity = _step(work, value, target, grads, velocity)
            if int(open_.sum()) < 0.75 * len(open_):
                rest = torch.nonzero(open_).flatten()
                work, alive, target = work[rest], alive[rest], target[rest]
                velocity = [v[rest] for v in velocity]
                middle = middle[rest]
        return self._left(domains, best, kept)

    def _left(self, domains: Domains, best: Tensor, kept: Sequence[Tensor]) -> Domains:
        """Sub-problems with the bounds found and what their children begin with."""
        choice, multiplier, weights = kept
        if domains.where.shape[1]:
            astray = (best < domains.bound).unsqueeze(1)
            start = self.problem.starts(Interval(domains.low, domains.high))
            choice = torch.where(astray, start, choice)
            multiplier = multiplier.masked_fill(astray, 0.0)
        return replace(
            domains,
            bound=torch.maximum(domains.bound, best) if domains.where.shape[1] else best,
            choice=as_bytes(choice),
            multiplier=multiplier,
            weights=weights,
        )

    def closed(self, domains: Domains) -> Domains:
        """Without the sub-problems that a bound in float64, rounding subtracted, proves."""
        ready = domains.bound > 0
        if not bool(ready.any()):
            return domains
        rows = torch.nonzero(ready).flatten()
        proved = torch.zeros_like(ready)
        for i in range(0, len(rows), self.batch):
            some = rows[i : i + self.batch]
            batch = Batch(self.sure, domains[some])
            bound, _ = batch.evaluate()
            proved[some] = bound > 0
            if self.record is not None:
                self.record.proofs.append(_proof(batch, bound > 0))
        left = domains[~proved]
        return replace(left, bound=left.bound.clamp_max(0.0))

    def finished(self, domains: Domains) -> bool:
        """Whether sub-problems without a neuron to split are proved: as linear programs, or else by patience.

        They need nothing to spare, since nothing in them depends on intervals.
        """
        slack = self.sure.slack
        self._demand(torch.zeros_like(slack))
        linear = programmable(self.sure)
        left = self._programs(domains) if linear else domains
        if len(left) and self.point is None:
            few, self.steps = self.steps, PATIENCE * self.steps
            left = self.closed(self.improved(left))
            self.steps = few
        if len(left) and self.point is None:
            what = "its linear program is a near tie" if linear else "it is no linear program"
            self.reason = f"a sub-problem without a neuron to split stayed open: {what}"
        self._demand(slack)
        return not len(left)

    def _programs(self, domains: Domains) -> Domains:
        """Without the sub-problems that their linear programs' duals prove."""
        solutions = []
        for i in range(len(domains)):
            self.sure.state.spend(0)
            domain, point = solved(
                self.sure, domains[i : i + 1], self.deadline - time.perf_counter()
            )
            solutions.append(domain)
            if point is not None:
                point = point.reshape(1, *self.network.input_shape).to(self.network.dtype)
                self.judge(self.region.project(point))
                if self.point is not None:
                    return domains
        domains = joined(solutions)
        hoped = torch.ones_like(domains.bound)  # so that all are looked at
        return self.closed(replace(domains, bound=hoped))

    def refreshed(self, domains: Domains) -> Domains:
        """With intervals of their own where enough splits have been made since the last time; without empty ones.

        No more of them than `SHARE` of the work so far pays for: an element costs two rows, twice as dear in float64.
        """
        due = domains.depth - domains.fresh >= self.period
        costs = 4 * self.problem.undecided(domains)[:, self.problem.first :].sum(1)
        due &= (costs * due).cumsum(0) <= SHARE * self.work - self.renewed
        if not bool(due.any()):
            return domains
        self.renewed += int(costs[due].sum())
        some, empty = self.sure.refreshed(domains[due], ROWS)
        if self.record is not None:
            self.record.renewed.append(some.node)
        return joined([domains[~due], some[~empty]])

    def split(self, domains: Domains, splittable: Tensor) -> Domains:
        """Both children of every sub-problem."""
        watched = Batch(self.problem, domains, watch=True)
        # a line of slope 0 or a multiplier of 0 would hide all elements that it depends on, however loose they are
        watched.choice.clamp_(INSIDE, 1 - INSIDE)
        watched.multiplier.clamp_min_(INSIDE)
        watched.evaluate()
        score = self.score(watched).masked_fill(~splittable, -math.inf)
        sizes = _per_layer(watched, _size)
        sizes = torch.where(sizes > 0, sizes, 1.0)
        k = min(self.candidates, score.shape[1])
        picks = score.topk(k, 1).indices
        points = self.problem.points(watched.box).gather(1, picks)
        if k > 1:
            tried = [self._children(domains, picks[:, i], points[:, i], sizes) for i in range(k)]
            bounds = torch.stack(
                [Batch(self.problem, t).evaluate()[0].reshape(2, -1) for t in tried]
            )  # (k, 2, n)
            gain = bounds.clamp_max(0).amin(1) + 1e-2 * bounds.clamp_max(0).amax(1)
            possible = splittable.gather(1, picks).T
            chosen = gain.masked_fill(~possible, -math.inf).argmax(0, keepdim=True).T
            picks, points = picks.gather(1, chosen), points.gather(1, chosen)
        children = self._children(domains, picks[:, 0], points[:, 0], sizes)
        if self.record is None:
            return children
        below, above = self.record.split(domains.node, picks[:, 0], points[:, 0])
        return replace(children, node=torch.cat([above, below]))

    def _children(self, domains: Domains, element: Tensor, point: Tensor, sizes: Tensor) -> Domains:
        depth = domains.where.shape[1]
        room = domains.deeper(depth + 1)
        parts = []
        for side in (1, -1):
            where, at = room.where.clone(), room.point.clone()
            sides, scale = room.side.clone(), room.scale.clone()
            where[:, depth], at[:, depth], sides[:, depth] = element, point, side
            low, high = room.low.clone(), room.high.clone()
            end, limit = (low, torch.fmax) if side > 0 else (high, torch.fmin)
            column = element.unsqueeze(1)
            end.scatter_(1, column, limit(end.gather(1, column), point.unsqueeze(1)))
            scale[:, depth] = sizes.gather(1, element.unsqueeze(1)).squeeze(1)
            parts.append(
                replace(room, low=low, high=high, where=where, point=at, side=sides, scale=scale)
            )
        return joined(parts)

    def _lowest(self, rows: Tensor) -> Tensor:
        """Where the bounds' linear functions, ``rows`` (n, *x), are lowest."""
        region = self.region
        if region.grid is not None:
            region = region[torch.zeros(len(rows), dtype=torch.long, device=rows.device)]
        return region.maximizer(-rows.double()).to(self.network.dtype)

    def judge(self, points: Tensor) -> None:
        """Keep the first of ``points`` (n, *x) that `witness` accepts."""
        spec = self.spec[torch.zeros(len(points), dtype=torch.long, device=points.device)]
        failed = torch.nonzero(spec.violated(self.network(points))).flatten()
        for i in failed.tolist():
            x = points[i : i + 1]
            if witness(self.network, self.region, self.spec, x).upper.item() <= 0:
                self.point = x[0]
                return


def _step(
    work: Batch, value: Tensor, target: Tensor, grads: Sequence[Tensor], velocity: list[Tensor]
) -> list[Tensor]:
    """One projected step of the length at which a linear function would reach the target; the new velocity.

    What is proved does not move: its point is the proof.
    """
    moves = []
    for leaf, grad, metric in zip(work.leaves, grads, METRIC, strict=True):
        blocked = (leaf <= 0) & (grad < 0)
        if leaf is not work.multiplier:
            blocked |= (leaf >= 1) & (grad > 0)
        moves.append(grad.masked_fill(blocked, 0.0) * metric)
    if velocity:
        moves = [m + MOMENTUM * v for m, v in zip(moves, velocity, strict=True)]
    size = sum((m.square() / r).sum(1) for m, r in zip(moves, METRIC, strict=True))
    length = torch.where(value > 0, 0.0, (target - value) / (size + 1e-12)).unsqueeze(1)
    for leaf, move in zip(work.leaves, moves, strict=True):
        leaf.addcmul_(move, length)
        leaf.clamp_(0.0, None if leaf is work.multiplier else 1.0)
    return moves


def _taken(stack: list[Domains], count: int) -> Domains:
    """The last ``count`` sub-problems, off the stack."""
    parts: list[Domains] = []
    while stack and count > 0:
        top = stack.pop()
        if len(top) > count:
            stack.append(top[:-count])
            top = top[-count:]
        parts.append(top)
        count -= len(top)
    return joined(parts)


def _proof(batch: Batch, proved: Tensor) -> Proof:
    """What bounds the sub-problems ``proved`` of a batch."""
    domains = batch.domains[proved]
    taken = domains.where >= 0
    order = (~taken).to(torch.int8).argsort(dim=1, stable=True)  # the splits first, in their order
    unit = batch.sign.abs()[proved]
    multipliers = torch.where(taken, batch.multiplier[proved] * unit, 0.0).gather(1, order)
    weights = batch.problem.share(domains.clause, batch.weights[proved])
    return Proof(
        domains.node,
        domains.clause,
        weights,
        domains.choice[:, batch.problem.numbers],
        taken.sum(1),
        multipliers,
    )


def _members(spec: Spec) -> Tensor:
    """The numbers of each clause's functionals, (clauses, most), −1 for none."""
    lists: list[list[int]] = [[] for _ in range(spec.count)]
    for m, c in enumerate(spec.clause.tolist()):
        lists[c].append(m)
    most = max(map(len, lists))
    return torch.tensor([v + [-1] * (most - len(v)) for v in lists], device=spec.clause.device)


def _per_layer(batch: Batch, rule: Callable[..., Tensor]) -> Tensor:
    """``rule`` of the rows, the lines and the intervals of every layer's undecided elements: (n, U)."""
    parts: list[Any] = []
    for name, layer in batch.problem.layers.items():
        box = Interval(*(v[:, layer.span] for v in batch.box))
        if name not in batch.seen:  # no row reaches it
            parts.append(torch.zeros_like(box.lower))
            continue
        parts.append(rule(batch.seen[name], batch.chosen[name], box, layer))
    return torch.cat(parts, 1)


def _size(A: Tensor, *_: Any) -> Tensor:
    """The size of each row's coefficients, at least its layer's mean."""
    size = A.abs()
    return torch.maximum(size, size.mean(1, keepdim=True))


def _gaps(batch: Batch, *, lower: bool) -> Tensor:
    """How much each element's lines can cost the bound: its row times how far the upper line is from the function where
    it would be split, or, with ``lower``, the lower line at the nearer end."""
    points = batch.problem.points(batch.box)

    def rule(A: Tensor, lines: Lines, box: Interval, layer: Layer) -> Tensor:
        args = batch.problem.arguments(layer)

        def f(at: Tensor) -> Tensor:
            value: Tensor = layer.node.op(at, *args)
            return value

        def line(slope: Tensor, offset: Tensor, at: Tensor) -> Tensor:
            return slope * (at - layer.z) + offset + layer.out

        at = points[:, layer.span]
        cost = -A.clamp_max(0) * (line(lines.upper_slope, lines.upper_offset, at) - f(at))
        if lower:
            below = lines.lower_slope, lines.lower_offset
            ends = [f(end) - line(*below, end) for end in box]
            cost = cost + A.clamp_min(0) * torch.minimum(*ends)
        return cost

    return _per_layer(batch, rule)


def _widths(batch: Batch) -> Tensor:
    """How far each element's operand reaches to both sides of where it would be split, times its row."""
    points = batch.problem.points(batch.box)

    def rule(A: Tensor, _: Lines, box: Interval, layer: Layer) -> Tensor:
        at = points[:, layer.span]
        return A.abs() * torch.minimum(box.upper - at, at - box.lower)

    return _per_layer(batch, rule)


SCORES |= {
    "gap": partial(_gaps, lower=True),
    "intercept": partial(_gaps, lower=False),
    "width": _widths,
}
