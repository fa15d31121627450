"""Walking a tree: intervals, proofs and trimmed boxes of its nodes, many at a time; what is not proved is refused."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from calipers_check.bounds import Choices, Engine, Planes, Pushes, Rows, U, View, gamma
from calipers_check.errors import Refused
from calipers_check.layers import Array, Network, Scale, Smooth
from calipers_check.tree import Tree
from calipers_check.vnnlib import Ball, Clause

BATCH = 256  # nodes at once, at most
EXACT = 1 << 19  # multiplications of rationals that all of a certificate's nodes may take
SMALL = 1 << 11  # networks of so few products are always worth them
WAITING = 1 << 28  # numbers of all nodes that wait, at most


class Goal:
    """The functionals of a tree's clauses, one after the other; ``clause`` counts within the tree."""

    def __init__(self, numbers: Sequence[int], clauses: Sequence[Clause]) -> None:
        own = [clauses[c] for c in numbers]
        self.numbers, self.count = np.array(numbers), len(own)
        self.C = np.concatenate([c.C for c in own])
        self.d = np.concatenate([c.d for c in own])
        sizes = [len(c.d) for c in own]
        self.clause = np.repeat(np.arange(len(own)), sizes)
        self.first = np.concatenate([[0], np.cumsum(sizes)])


class Root(NamedTuple):
    """The whole region: its engine, what is known, and the elements that may change further down."""

    engine: Engine
    view: View


class Open(NamedTuple):
    """Nodes to be proved: boxes, the ends of live elements, and which clauses are still open, (N, ...) each."""

    node: Array
    lower: Array
    upper: Array
    low: Array
    high: Array
    open: Array

    def at(self, index: Array | slice) -> Open:
        return Open(*(v[index] for v in self))


class Found(NamedTuple):
    """Bounds that proofs gave: a row's node (its place in the batch), clause (−1: all), plane and minimum."""

    owner: Array
    clause: Array
    planes: Planes
    least: Array


class Budget:
    """How many multiplications of rationals are left."""

    def __init__(self) -> None:
        self.left = EXACT

    def pays(self, cost: int) -> bool:
        self.left -= max(cost, 0)
        return self.left >= 0


class Proof:
    """One tree over one root.

    Args:
        root: where another tree's node 0 left off, or the bare root.
    """

    def __init__(self, tree: Tree, goal: Goal, root: Root, budget: Budget) -> None:
        self.tree, self.goal, self.engine, self.budget = tree, goal, root.engine, budget
        self.network = root.engine.network
        self.root = View(root.view.lower, root.view.upper, dict(root.view.known))
        self._refine(self.engine, self.root, np.zeros(1, dtype=np.int64))
        self.live = {k: np.flatnonzero(self.engine.free(k, self.root)[0]) for k in self.tree.steps}
        sizes = [len(v) for v in self.live.values()]
        self.begin = dict(zip(self.live, np.concatenate([[0], np.cumsum(sizes)]), strict=False))
        self.place = {}  # of an element among the live ones, −1 for none
        for k, elements in self.live.items():
            self.place[k] = np.full(self.root.known[k][0].shape[1], -1)
            self.place[k][elements] = self.begin[k] + np.arange(len(elements))
        self.batch = max(1, min(BATCH, (1 << 22) // (4 * sum(self.network.sizes))))

    def run(self) -> None:
        """Prove every clause at the root, or raise.

        Raises:
            Refused: naming a node where a clause stays open.
        """
        ends = [[self.root.known[k][i][:, live] for k, live in self.live.items()] for i in (0, 1)]
        low, high = (np.concatenate([np.zeros((1, 0)), *v], 1) for v in ends)
        still = np.ones((1, self.goal.count), dtype=bool)
        first = np.zeros(1, dtype=np.int64)
        self.walk([Open(first, self.root.lower, self.root.upper, low, high, still)])

    def walk(self, stack: list[Open]) -> None:
        """Prove these nodes and all below them."""
        while stack:
            self.engine.hurry()
            children = self._children(self._visited(_taken(stack, self.batch)))
            if len(children.node):
                stack.append(children)
            each = 2 * (self.network.inputs + children.low.shape[1])
            if each * sum(len(some.node) for some in stack) > WAITING:
                raise Refused("too many nodes wait to be proved")

    # -- one batch --------------------------------------------------------------------------------------------------

    def _visited(self, nodes: Open) -> Open:
        """The nodes that are not proved, with what they know now."""
        nodes = nodes.at(~self._empty(nodes))
        if not len(nodes.node):
            return nodes
        view = self._view(nodes)
        if self._refine(self.engine, view, nodes.node, first=False):
            nodes = self._learned(nodes, view)
            keep = ~view.empty
            if not keep.all():
                nodes = nodes.at(keep)
                view = self._view(nodes)
        found = self._proofs(self.engine, view, nodes.node, nodes.open)
        still = nodes.open & ~self._proved(found, len(nodes.node))
        nodes = nodes._replace(open=still)
        nodes = self._trimmed(nodes, found)
        leaf = self.tree.child[nodes.node] == 0
        left = np.flatnonzero(leaf & nodes.open.any(1))
        if len(left):
            self._leaves(nodes, found, left)
        return nodes.at(nodes.open.any(1) & ~leaf)

    def _empty(self, nodes: Open) -> Array:
        return np.asarray((nodes.lower > nodes.upper).any(1) | (nodes.low > nodes.high).any(1))

    def _view(self, nodes: Open) -> View:
        known = {}
        for k, elements in self.live.items():
            span = slice(self.begin[k], self.begin[k] + len(elements))
            ends = []
            for whole, own in zip(self.root.known[k], (nodes.low, nodes.high), strict=True):
                end = np.repeat(whole, len(nodes.node), 0)
                end[:, elements] = own[:, span]
                ends.append(end)
            known[k] = ends[0], ends[1]
        return View(nodes.lower, nodes.upper, known)

    def _learned(self, nodes: Open, view: View) -> Open:
        ends = [[view.known[k][i][:, live] for k, live in self.live.items()] for i in (0, 1)]
        low, high = (np.concatenate([nodes.low[:, :0], *v], 1) for v in ends)
        return nodes._replace(low=low, high=high)

    def _proved(self, found: Sequence[Found], count: int) -> Array:
        proved = np.zeros((count, self.goal.count), dtype=bool)
        for some in found:
            good = (some.least > 0) & (some.least < math.inf)
            every = good & (some.clause < 0)
            proved[some.owner[every]] = True
            good &= ~every
            proved[some.owner[good], some.clause[good]] = True
        return proved

    def _leaves(self, nodes: Open, found: Sequence[Found], left: Array) -> None:
        """Leaves of the batch that are not proved yet, by their places."""
        for i in left:
            self._last_resort(nodes.at(slice(i, i + 1)), found, int(i))

    def _last_resort(self, node: Open, found: Sequence[Found], place: int) -> None:
        """The proofs of one node in rational arithmetic; or refuse.

        Raises:
            Refused: not proved either.
        """
        left = self.goal.numbers[node.open[0]]
        values = [
            float(v)
            for some in found
            for o, c, v in zip(some.owner, some.clause, some.least, strict=True)
            if o == place and (c < 0 or node.open[0, c])
        ]
        if self._rationally(node, found, place):
            return
        best = f"best bound {max(values):.6g}" if values else "no proof for it"
        raise Refused(f"node {node.node[0]}: clause {left[0]} is not proved, {best}")

    def _rationally(self, node: Open, found: Sequence[Found], place: int) -> bool:
        plain = not any(
            isinstance(s, Smooth) or (isinstance(s, Scale) and s.rounded)
            for s in self.network.steps
        )
        rows = len(self.goal.d) + 1
        close = self.network.products <= SMALL or any(
            ((some.owner == place) & ~(some.least + 2 * some.planes.lost <= 0)).any()
            for some in found
        )
        if not plain or not close or not self.budget.pays(4 * rows * self.network.products):
            return False
        exact = Engine(
            self.network, node.lower[0], node.upper[0], exact=True, deadline=self.engine.deadline
        )
        view = View(exact.root.lower, exact.root.upper, {})
        for k, (low, high) in self._view(node).known.items():
            if np.isfinite(low).all() and np.isfinite(high).all():
                view.meet(k, exact.array(low), exact.array(high))
            else:
                return False
        free = sum(int(exact.free(k, view).sum()) for k in self.tree.steps)
        if self.budget.pays(8 * (free + 1) * self.network.products):
            exact.intervals(view, lambda k: exact.crown(view, int(k)))
        if bool(view.empty[0]):
            return True
        found = self._proofs(exact, view, node.node, node.open)
        return bool((self._proved(found, 1) | ~node.open).all())

    # -- intervals --------------------------------------------------------------------------------------------------

    def _refine(self, engine: Engine, view: View, nodes: Array, *, first: bool = True) -> bool:
        """Apply the nodes' rules to ``view``; whether there was any. Node 0 has had its own in the beginning."""
        rules = self.tree.bounds[nodes]
        if not first:
            rules = np.where(nodes == 0, 0, rules)
        if not rules.any():
            return False
        for rule in (1, 2, 3):
            place = np.flatnonzero(rules == rule)
            if not len(place):
                continue
            part = view
            if len(place) < len(view):
                known = {k: (low[place], high[place]) for k, (low, high) in view.known.items()}
                part = View(view.lower[place], view.upper[place], known)

            def refine(k: int, part: View = part, rule: int = rule, place: Array = place) -> None:
                if rule > 1:
                    engine.crown(part, k)
                if rule > 2:
                    self._stored(engine, part, k, nodes[place])

            engine.intervals(part, refine)
            if part is not view:
                for k, ends in part.known.items():
                    for whole, own in zip(view.known[k], ends, strict=True):
                        whole[place] = own
                    view.cache.pop(k, None)
        return True

    def _stored(self, engine: Engine, view: View, k: int, nodes: Array) -> None:
        """The rows of these nodes for the operand of step k."""
        tree = self.tree
        number = int(np.searchsorted(tree.steps, k))
        first, last = (np.searchsorted(tree.bound_node, nodes, side) for side in ("left", "right"))
        rows = [
            a + np.flatnonzero(tree.bound_layer[a:b] == number)
            for a, b in zip(first, last, strict=True)
        ]
        owner = np.repeat(np.arange(len(nodes)), [len(r) for r in rows])
        row = np.concatenate([np.zeros(0, dtype=np.int64), *rows])
        width = int(tree.columns.before[number])
        for part in engine.chunks(len(row)):
            some = row[part]
            places = tree.bound_start[some][:, None] + np.arange(width)
            numbers = tree.shares(tree.bound_choice[places])
            choices = self._choices(engine, numbers)
            element, sign = tree.bound_element[some], tree.bound_sign[some]
            engine.improve(view, k, owner[part], element, sign, choices)

    def _choices(self, engine: Engine, numbers: Array) -> Choices:
        """``numbers`` of the first columns, by activation."""
        before, elements = self.tree.columns.before, self.tree.columns.elements
        split = {
            int(self.tree.steps[a]): engine.array(numbers[:, before[a] : before[a + 1]])
            for a in elements
            if before[a + 1] <= numbers.shape[1]
        }
        return Choices({int(self.tree.steps[a]): e for a, e in elements.items()}, split)

    # -- proofs -----------------------------------------------------------------------------------------------------

    def _proofs(self, engine: Engine, view: View, nodes: Array, still: Array) -> list[Found]:
        rules = self.tree.proof[nodes]
        found = []
        for rule, prove in ((1, self._by_interval), (2, self._by_crown)):
            wanted = still[:, self.goal.clause] & (rules == rule)[:, None]
            owner, functional = np.nonzero(wanted)
            if len(owner):
                found += prove(engine, view, owner, functional)
        first, last = (np.searchsorted(self.tree.line_node, nodes, s) for s in ("left", "right"))
        owner = np.repeat(np.arange(len(nodes)), last - first)
        row = np.concatenate([np.zeros(0, dtype=np.int64), *map(np.arange, first, last)])
        if len(row):
            found += self._by_lines(engine, view, owner, row, still)
        return found

    def _by_interval(self, engine: Engine, view: View, owner: Array, f: Array) -> list[Found]:
        low, high = engine.intervals(View(view.lower, view.upper, dict(view.known)))[-1]
        middle = low + (high - low) / 2
        radius = np.maximum(high - middle, middle - low)
        g = engine.gamma(low.shape[1] + 8)
        C, d = engine.array(self.goal.C[f]), engine.array(self.goal.d[f])
        size = (np.abs(C) * (np.abs(middle) + radius)[owner]).sum(1) + np.abs(d)
        value = (C * middle[owner]).sum(1) - (np.abs(C) * radius[owner]).sum(1) + d
        value = value - (2 * g * size + engine.tiny)
        none = Planes(engine.array(np.zeros((0, self.network.inputs))), value[:0], 2 * g * size)
        return [Found(owner, self.goal.clause[f], none, value)]

    def _by_crown(self, engine: Engine, view: View, owner: Array, f: Array) -> list[Found]:
        found = []
        for part in engine.chunks(len(owner)):
            at, some = owner[part], f[part]
            C, d = engine.array(self.goal.C[some]), engine.array(self.goal.d[some])
            rows = Rows(C, at, d, np.zeros(len(at)))
            planes = engine.pull(view, len(self.network.steps), rows)
            found.append(Found(at, self.goal.clause[some], planes, engine.least(view, planes, at)))
        return found

    def _by_lines(
        self, engine: Engine, view: View, owner: Array, row: Array, still: Array
    ) -> list[Found]:
        clause = self.tree.line_clause[row]
        inside = np.full(max(self.tree.clauses) + 1, -1)  # those of empty boxes stay so
        inside[self.goal.numbers] = np.arange(self.goal.count)
        clause = np.where(clause < 0, -1, inside[clause])
        wanted = np.where(clause < 0, np.any(still, 1)[owner], still[owner, clause])
        owner, row, clause = owner[wanted], row[wanted], clause[wanted]
        found = []
        for part in engine.chunks(len(row)):
            at, some, c = owner[part], row[part], clause[part]
            number = self.tree.line_choice[some]
            choices = None
            if len(self.tree.choice):
                choices = self._choices(engine, self.tree.shares(self.tree.choice[number]))
                choices = self._defaults(engine, view, choices, at, number < 0)
            rows = self._combined(engine, at, some, c)
            pushes = self._pushes(engine, some)
            planes = engine.pull(view, len(self.network.steps), rows, choices, pushes)
            found.append(Found(at, c, planes, engine.least(view, planes, at)))
        return found

    def _defaults(
        self, engine: Engine, view: View, choices: Choices, owner: Array, plain: Array
    ) -> Choices:
        """With the default numbers in the rows ``plain``."""
        if not plain.any():
            return choices
        for k, numbers in choices.numbers.items():
            low, high = (v[owner[plain]][:, choices.elements[k]] for v in view.known[k])
            numbers[plain] = engine.array((high > -low).astype(np.float64))
        return choices

    def _combined(self, engine: Engine, owner: Array, row: Array, clause: Array) -> Rows:
        """The weighted functionals of the clauses, with what rounding them may cost."""
        goal, tree = self.goal, self.tree
        C, d = np.zeros((len(row), goal.C.shape[1])), np.zeros(len(row))
        C, d = engine.array(C), engine.array(d)
        E = np.zeros(len(row))
        for i, (r, c) in enumerate(zip(row, clause, strict=True)):
            if c < 0:
                continue
            span = slice(goal.first[c], goal.first[c + 1])
            own, offset = engine.array(goal.C[span]), engine.array(goal.d[span])
            if len(offset) == 1:
                C[i], d[i] = own[0], offset[0]
            elif len(offset):
                start = tree.weight_start[r]
                w = engine.array(tree.weight[start : start + len(offset)])
                C[i], d[i] = w @ own, w @ offset
                if not engine.exact:
                    size = np.abs(w) @ (np.abs(own) @ engine.sizes[-1] + np.abs(offset))
                    E[i] = 2 * gamma(len(w) + 4) * size
        return Rows(C, owner, d, E)

    def _pushes(self, engine: Engine, row: Array) -> dict[int, Pushes] | None:
        """Σ multiplier·(what is known) of the splits on the rows' paths, by activation."""
        tree = self.tree
        if tree.multiplier is None:
            return None
        parts: list[tuple[Array, ...]] = []
        at, place = tree.line_node[row], np.arange(len(row))
        while len(at):
            up = tree.parent[at]
            below = tree.child[up] == at
            known = (tree.layer[up] >= 0) & (at > 0)
            m = np.zeros(len(at))
            own = tree.line_start[row[place[known]]] + tree.depth[at[known]] - 1
            m[known] = tree.multiplier[own]
            some = known & (m > 0)
            parts.append((place[some], up[some], np.where(below, -m, m)[some]))
            going = up > 0
            at, place = up[going], place[going]
        place, up, m = (np.concatenate(v) for v in zip(*parts, strict=True))
        found = {}
        for number in np.unique(tree.layer[up]):
            some = tree.layer[up] == number
            k = int(tree.steps[number])
            point = tree.point[up[some]]
            found[k] = Pushes(
                place[some], tree.element[up[some]], engine.array(m[some]), engine.array(point)
            )
        return found

    # -- boxes ------------------------------------------------------------------------------------------------------

    def _trimmed(self, nodes: Open, found: Sequence[Found]) -> Open:
        """With smaller boxes where the rule asks for it."""
        wanted = (self.tree.trim[nodes.node] == 1) & nodes.open.any(1)
        if not wanted.any():
            return nodes
        lower, upper = np.full(nodes.lower.shape, math.inf), np.full(nodes.upper.shape, -math.inf)
        still = nodes.open.copy()
        for c in range(self.goal.count):
            l, u = nodes.lower.copy(), nodes.upper.copy()
            planes = _ranked(found, c)
            for _ in range(2):
                for owner, G, b in planes:
                    l[owner], u[owner] = _cut(l[owner], u[owner], G, b)
            still[:, c] &= ~(wanted & (l > u).any(1))
            keep = still[:, c, None]
            lower = np.where(keep, np.minimum(lower, l), lower)
            upper = np.where(keep, np.maximum(upper, u), upper)
        some = (wanted & still.any(1))[:, None]
        lower, upper = np.where(some, lower, nodes.lower), np.where(some, upper, nodes.upper)
        return nodes._replace(lower=lower, upper=upper, open=still)

    def _children(self, nodes: Open) -> Open:
        """Both halves of every node."""
        tree = self.tree
        layer, element = tree.layer[nodes.node], tree.element[nodes.node]
        point = tree.point[nodes.node]
        halves = []
        for side in (0, 1):
            child = tree.child[nodes.node] + side
            half = nodes._replace(
                node=child, lower=nodes.lower.copy(), upper=nodes.upper.copy(),
                low=nodes.low.copy(), high=nodes.high.copy(),
            )  # fmt: skip
            there = np.ones(len(child), dtype=bool)
            for number in np.unique(layer):
                row = np.flatnonzero(layer == number)
                e, p = element[row], point[row]
                if number < 0:
                    _meet(half.lower, half.upper, row, e, p, side)
                    continue
                k = int(tree.steps[number])
                place = self.place[k][e]
                live = place >= 0
                _meet(half.low, half.high, row[live], place[live], p[live], side)
                low, high = (v[0, e[~live]] for v in self.root.known[k])
                there[row[~live]] = ~(low > p[~live] if side == 0 else high < p[~live])
            halves.append(half.at(there))
        return Open(*(np.concatenate(v) for v in zip(*halves, strict=True)))


def _meet(low: Array, high: Array, row: Array, column: Array, point: Array, side: int) -> None:
    """Cut intervals in place: below the points, or above."""
    if side == 0:
        high[row, column] = np.fmin(high[row, column], point)
    else:
        low[row, column] = np.fmax(low[row, column], point)


def _ranked(found: Sequence[Found], clause: int) -> list[tuple[Array, Array, Array]]:
    """The clause's planes as a list of (nodes, G, c) in which no node comes twice in one entry."""
    ranked = []
    for some in found:
        if not len(some.planes.G):
            continue
        mine = np.flatnonzero((some.clause == clause) | (some.clause < 0))
        order = mine[np.argsort(some.owner[mine], kind="stable")]
        owner = some.owner[order]
        first = np.searchsorted(owner, owner)
        rank = np.arange(len(owner)) - first
        for r in range(int(rank.max()) + 1 if len(rank) else 0):
            at = order[rank == r]
            ranked.append((some.owner[at], some.planes.G[at], some.planes.c[at]))
    return ranked


def _cut(lower: Array, upper: Array, G: Array, c: Array) -> tuple[Array, Array]:
    """The box around the part where G·x + c <= 0; lower above upper where there is none."""
    middle = lower + (upper - lower) / 2
    radius = np.maximum(upper - middle, middle - lower) * (1 + 4 * U)
    size = (np.abs(G) * (np.abs(middle) + radius)).sum(1) + np.abs(c)
    least = c + (G * middle).sum(1) - (np.abs(G) * radius).sum(1)
    least = least - 4 * gamma(G.shape[1] + 4) * size
    room = -least[:, None] / np.abs(G)
    room = room + 8 * U * np.abs(room)
    up = np.nextafter(lower + room, math.inf)
    down = np.nextafter(upper - room, -math.inf)
    cut_upper = np.where(G > 0, np.fmin(upper, up), upper)
    cut_lower = np.where(G < 0, np.fmax(lower, down), lower)
    none = (least > 0)[:, None]
    return np.where(none, math.inf, cut_lower), np.where(none, -math.inf, cut_upper)


def _taken(stack: list[Open], count: int) -> Open:
    """The last ``count`` nodes of the stack."""
    parts: list[Open] = []
    while stack and count > 0:
        top = stack.pop()
        if len(top.node) > count:
            stack.append(top.at(slice(0, len(top.node) - count)))
            top = top.at(slice(len(top.node) - count, None))
        parts.append(top)
        count -= len(top.node)
    return (
        parts[0]
        if len(parts) == 1
        else Open(*(np.concatenate(v) for v in zip(*parts, strict=True)))
    )


def bare_root(
    network: Network, lower: Array, upper: Array, deadline: float, ball: Ball | None = None
) -> Root:
    engine = Engine(network, lower, upper, exact=False, deadline=deadline, ball=ball)
    return Root(engine, engine.root)
