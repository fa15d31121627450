"""Bounds: intervals forward, linear functions backward, with everything accounted for that rounding can do.

`Engine` works in float64, or exactly in rationals; the code is the same, and only the margins for rounding are zero.
A row A of coefficients of a value v stands for A·v; pulled back through a step it becomes rows of the values that the
step reads. Its coefficients are floats with errors, so what is claimed is f >= A·v + b − E, where E collects, at each
value, |A|·noise: noise is gamma_n times the magnitudes that the exact coefficients would have met there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from calipers_check.errors import Refused
from calipers_check.layers import RATIONAL, Affine, Array, Dense, Kink, Maximum, Network
from calipers_check.smooth import image as smooth_image
from calipers_check.smooth import lines as smooth_lines
from calipers_check.vnnlib import Ball

U = 2.0**-53
TINY = 1e-290  # more than any sum of underflows
NUMBERS = 1 << 17  # of one array of rows
BROAD = 1 << 24  # and of one in the middle of a step


def gamma(n: float) -> float:
    """What n roundings can do, relatively (with a margin for computing it)."""
    return 1.01 * n * U / (1 - n * U) if n * U < 0.5 else math.inf


class Lines(NamedTuple):
    """Below and above an activation: slope·v + offset, (nodes, elements) each; None: no offset."""

    below: Array
    below_offset: Array | None
    above: Array
    above_offset: Array | None


class View:
    """Boxes of inputs, one for each of N nodes, and what is known there of the activations' operands.

    ``known`` maps the number of each step that is no affine one to the ends (N, n) of its operand's elements.
    """

    def __init__(self, lower: Array, upper: Array, known: dict[int, tuple[Array, Array]]) -> None:
        self.lower, self.upper, self.known = lower, upper, known
        self.cache: dict[int, Lines] = {}

    def __len__(self) -> int:
        return len(self.lower)

    def meet(self, k: int, low: Array, high: Array) -> None:
        """Intersect; what is not a number says nothing."""
        old = self.known.get(k)
        if old is not None:
            low, high = np.fmax(low, old[0]), np.fmin(high, old[1])
        self.known[k] = low, high
        self.cache.pop(k, None)

    @property
    def empty(self) -> Any:
        """Which nodes have a box or an interval without any point: (N,)."""
        found = (self.lower > self.upper).any(1)
        for low, high in self.known.values():
            found |= (low > high).any(1)
        return found


class Rows(NamedTuple):
    """Rows to pull back, each over the node ``owner``, with b and E; see the module."""

    A: Array
    owner: Array
    b: Array
    E: Array


class Choices(NamedTuple):
    """Line numbers of rows: for an activation the columns' elements, and (rows, columns)."""

    elements: dict[int, Array]
    numbers: dict[int, Array]


class Pushes(NamedTuple):
    """Σ m·(v − point) >= 0 to be subtracted at an activation's operand: row, element, m and point of each term."""

    row: Array
    element: Array
    m: Array
    point: Array


class Planes(NamedTuple):
    """f >= G·x + c on the box of each row's node; ``lost`` is what rounding has taken from c."""

    G: Array
    c: Array
    lost: Array


class Engine:
    """The network in one arithmetic, over a root box that contains all others.

    Args:
        deadline: of `time.monotonic`.
        ball: which the inputs also lie in.
    """

    def __init__(
        self,
        network: Network,
        lower: Array,
        upper: Array,
        *,
        exact: bool,
        deadline: float,
        ball: Ball | None = None,
    ) -> None:
        self.ball = ball
        self.network, self.exact, self.deadline = network, exact, deadline
        self.steps: list[Any] = [s.exact() if exact else s for s in network.steps]
        self.u: float = 0 if exact else U
        self.tiny: float = 0 if exact else TINY
        self.rows = max(1, min(NUMBERS // max(network.sizes), BROAD // network.broadest))
        self.sharp = _sharp(network)
        self.root = View(self.array(lower).reshape(1, -1), self.array(upper).reshape(1, -1), {})
        self.noise: list[Array] = []
        boxes = self.intervals(self.root)
        if not exact:
            self._measure(boxes)

    def array(self, values: Array) -> Any:
        """Float64 numbers in this arithmetic."""
        found = np.asarray(values, dtype=np.float64)
        return RATIONAL(found) if self.exact and found.size else found

    def gamma(self, n: float) -> float:
        return 0 if self.exact else gamma(n)

    # -- forward ----------------------------------------------------------------------------------------------------

    def intervals(
        self, view: View, refine: Callable[[int], None] | None = None
    ) -> list[tuple[Array, Array]]:
        """The boxes of all values. ``view.known`` is met with them; then ``refine(k)`` may improve it for step k."""
        boxes = [(view.lower, view.upper)]
        for k, step in enumerate(self.steps):
            self.hurry()
            if isinstance(step, Affine):
                boxes.append(self._affine(step, [boxes[v] for v in step.sources]))
                continue
            view.meet(k, *boxes[step.sources[0]])
            if refine is not None:
                refine(k)
            boxes.append(self._image(k, view))
        return boxes

    def hurry(self) -> None:
        if time.monotonic() > self.deadline:
            raise Refused("the time limit is reached")

    def _affine(self, step: Affine, ends: list[tuple[Array, Array]]) -> tuple[Array, Array]:
        if not step.terms and step.bias is None:
            return step.along(0, ends[0][0]), step.along(0, ends[0][1])
        g = self.gamma(step.terms + 8)
        center = reach = self.array(np.zeros(1))
        for j, (low, high) in enumerate(ends):
            middle = low + (high - low) / 2
            radius = np.maximum(high - middle, middle - low)
            radius = radius + (g * (np.abs(middle) + radius) + self.tiny)
            center, reach = center + step.along(j, middle), reach + step.sizes(j, radius)
        reach = reach * (1 + 2 * g) + self.tiny
        if step.bias is not None:
            center = center + step.bias
            reach = reach + 8 * self.u * np.abs(step.bias)
        return center - reach, center + reach

    def _image(self, k: int, view: View) -> tuple[Array, Array]:
        step, (low, high) = self.steps[k], view.known[k]
        if isinstance(step, Maximum):
            return self._windows(step, low).max(2), self._windows(step, high).max(2)
        if not isinstance(step, Kink):
            return smooth_image(step.function, low, high)
        ends = [
            np.where(v >= 0, v * self._slope(step.right), v * self._slope(step.left))
            for v in (low, high)
        ]
        least, most = np.minimum(*ends), np.maximum(*ends)
        if step.left < 0:
            least = np.where(~((low >= 0) | (high <= 0)), np.minimum(least, 0), least)
        if step.left in (0, 1, -1):
            return least, most
        return (
            least - (2 * self.u * np.abs(least) + self.tiny),
            most + (2 * self.u * np.abs(most) + self.tiny),
        )

    def _slope(self, value: float) -> Any:
        return RATIONAL(value) if self.exact else value

    @staticmethod
    def _windows(step: Maximum, v: Array) -> Array:
        return np.where(step.index >= 0, v[:, step.index], -math.inf)

    def _measure(self, boxes: list[tuple[Array, Array]]) -> None:
        """``noise`` of every value: what a unit of |A| there may cost by rounding, there and in the step before."""
        size = [np.maximum(np.abs(low), np.abs(high))[0] for low, high in boxes]
        uses = [sum(v in step.sources for step in self.steps) for v in range(len(size))]
        n = len(size[0])
        self.noise = [(uses[0] + 4) * U * size[0] + 4 * gamma(2 * n + 8) * size[0] + TINY]
        for v, step in enumerate(self.steps, 1):
            noise = (uses[v] + 8) * U * size[v]
            if isinstance(step, Affine):
                g = gamma(step.terms + 2) if step.terms else 0.0
                for j, s in enumerate(step.sources):
                    noise = noise + g * step.sizes(j, size[s][None])[0]
                if step.bias is not None:
                    noise = noise + gamma(step.size + 4) * np.abs(step.bias)
            elif isinstance(step, Maximum):
                overlap = np.bincount(step.index[step.index >= 0]).max()
                largest = self._windows(step, size[step.sources[0]][None])[0].max(1)
                noise = noise + gamma(overlap + 4) * largest
            else:
                noise = noise + 8 * U * self._reach(step) * size[step.sources[0]]
            self.noise.append(noise + TINY)
        self.sizes = size
        self.floor = TINY * (8 + sum(v.sum() + 8 for v in size))  # underflow

    def _reach(self, step: object) -> float:
        """The steepest line."""
        return max(1.0, abs(step.left)) if isinstance(step, Kink) else 1.0

    # -- lines ------------------------------------------------------------------------------------------------------

    def free(self, k: int, view: View) -> Array:
        """Elements of the operand on whose interval the activation is not linear: (N, n)."""
        step, (low, high) = self.steps[k], view.known[k]
        if isinstance(step, Kink):
            return ~((low >= 0) | (high <= 0))  # so also where an end is unknown
        if not isinstance(step, Maximum):
            return np.ones(low.shape, dtype=bool)
        lows, highs = self._windows(step, low), self._windows(step, high)
        possible = ~(highs < lows.max(2, keepdims=True)) & (step.index >= 0)
        possible &= possible.sum(2, keepdims=True) > 1
        found = np.zeros(low.shape, dtype=bool)
        node, window, place = np.nonzero(possible)
        found[node, step.index[window, place]] = True
        return found

    def lines(self, k: int, view: View) -> Lines:
        """Default lines of an activation of single elements."""
        if k not in view.cache:
            step, ends = self.steps[k], view.known[k]
            kink = isinstance(step, Kink)
            view.cache[k] = (
                self._kink_lines(step, *ends)
                if kink
                else Lines(*smooth_lines(step.function, *ends))
            )
        return view.cache[k]

    def _kink_lines(self, step: Kink, low: Array, high: Array) -> Lines:
        left, right = self._slope(step.left), self._slope(step.right)
        free = ~((low >= 0) | (high <= 0))
        one = np.where(low >= 0, right, left)
        through = np.where(free, np.where(high > -low, right, left), one)
        width = np.where(free, high - low, 1)
        chord = np.where(free, (right * high - left * low) / width, one)
        first, last = (left - chord) * low, (right - chord) * high
        if step.right >= step.left:
            offset = np.maximum(first, last)
            offset = np.where(free, offset + 8 * self.u * np.abs(offset) + self.tiny, 0)
            return Lines(through, None, chord, offset)
        offset = np.minimum(first, last)
        offset = np.where(free, offset - 8 * self.u * np.abs(offset) - self.tiny, 0)
        return Lines(chord, offset, through, None)

    # -- backward ---------------------------------------------------------------------------------------------------

    def pull(
        self,
        view: View,
        value: int,
        rows: Rows,
        choices: Choices | None = None,
        pushes: dict[int, Pushes] | None = None,
    ) -> Planes:
        """The linear functions of the input below the rows of a value, for the nodes of ``view`` that own them."""
        A, owner, b, E = rows
        waiting = {value: A}
        for v in range(value, 0, -1):
            if v not in waiting:
                continue
            self.hurry()
            A, step = waiting.pop(v), self.steps[v - 1]
            if not self.exact:
                E = E + np.abs(A) @ self.noise[v]
            if isinstance(step, Affine):
                if step.bias is not None:
                    b = b + A @ step.bias
                made = [(s, step.back(j, A)) for j, s in enumerate(step.sources)]
            else:
                A, offset, lost = self._bend(v - 1, view, A, owner, choices)
                b, E = b + offset, E + lost
                made = [(step.sources[0], A)]
                if pushes is not None and v - 1 in pushes:
                    E = E + 2 * self.u * np.abs(b)
                    offset, lost = self._push(step.sources[0], A, pushes[v - 1])
                    b, E = b + offset, E + lost
            E = E + 2 * self.u * np.abs(b)
            for s, more in made:
                if s in waiting:
                    more = waiting[s] + more
                    if not self.exact:
                        E = E + 2 * U * (np.abs(more) @ self.sizes[s])
                waiting[s] = more
        G = waiting.get(0)
        if G is None:
            G = self.array(np.zeros((len(b), self.network.inputs)))
        if self.exact:
            return Planes(G, b, E)
        E = E + np.abs(G) @ self.noise[0]
        E = 1.001 * E + 4 * U * np.abs(b) + self.floor
        return Planes(G, b - E, E)

    def _bend(
        self, k: int, view: View, A: Array, owner: Array, choices: Choices | None
    ) -> tuple[Array, Array, Array]:
        """Rows of the operand, what is added to b, and to E."""
        step = self.steps[k]
        if isinstance(step, Maximum):
            return self._bend_maximum(step, view.known[k], A, owner)
        lines = Lines(*(_own(v, owner) for v in self.lines(k, view)))
        if choices is not None and k in choices.numbers and isinstance(step, Kink):
            lines = self._chosen(step, lines, choices.elements[k], choices.numbers[k])
        total = size = self.array(np.zeros(len(A)))
        for part, offset in ((np.maximum, lines.below_offset), (np.minimum, lines.above_offset)):
            if offset is not None:  # one line serves positive coefficients, the other negative ones
                own = part(A, 0)
                more = _dot(own, offset)
                total = total + more
                # a kink's terms have one sign
                size = size + (
                    np.abs(more) if isinstance(step, Kink) else _dot(np.abs(own), np.abs(offset))
                )
        return (
            A * np.where(A > 0, lines.below, lines.above),
            total,
            self.gamma(A.shape[1] + 4) * size,
        )

    def _chosen(self, step: Kink, lines: Lines, elements: Array, numbers: Array) -> Lines:
        """With the slopes that ``numbers`` choose, for elements whose two slopes differ."""
        left, right = self._slope(step.left), self._slope(step.right)
        convex = step.right >= step.left
        # where the function is linear both lines are that function, without offsets
        offset: Any = lines.above_offset if convex else lines.below_offset
        free = np.broadcast_to(offset[:, elements] != 0, numbers.shape)
        slope = np.clip(left + numbers * (right - left), min(left, right), max(left, right))
        old = lines.below if convex else lines.above
        new = np.array(np.broadcast_to(old, (len(numbers), old.shape[1])))
        new[:, elements] = np.where(free, slope, new[:, elements])
        return lines._replace(below=new) if convex else lines._replace(above=new)

    def _bend_maximum(
        self, step: Maximum, known: tuple[Array, Array], A: Array, owner: Array
    ) -> tuple[Array, Array, Array]:
        low, high = (self._windows(step, v) for v in known)
        pick = low.argmax(2)[..., None]
        chosen = np.take_along_axis(np.broadcast_to(step.index, low.shape), pick, 2)[..., 0]
        others = high.copy()
        np.put_along_axis(others, pick, -math.inf, 2)
        alone = (np.take_along_axis(low, pick, 2)[..., 0] >= others.max(2)) & (chosen >= 0)
        most = high.max(2)
        chosen, alone, most = _own(chosen, owner), _own(alone, owner), _own(most, owner)
        through = (A >= 0) | alone
        parts = np.where(through, 0, A * np.where(alone, 0, most))
        parts = np.where(chosen < 0, math.nan, parts)  # nothing is known of the window
        found = np.zeros((len(A), known[0].shape[1]), dtype=A.dtype)
        row = np.arange(len(A))[:, None]
        np.add.at(found, (row, np.broadcast_to(chosen, A.shape)), np.where(through, A, 0))
        lost = self.gamma(A.shape[1] + 2) * np.abs(parts).sum(1)
        return found, parts.sum(1), lost

    def _push(self, value: int, A: Array, push: Pushes) -> tuple[Array, Array]:
        """Change the rows ``A`` in place; what is added to b and to E."""
        np.add.at(A, (push.row, push.element), -push.m)
        offset, lost = (np.zeros(len(A), dtype=A.dtype) for _ in range(2))
        terms = push.m * push.point
        np.add.at(offset, push.row, terms)
        if not self.exact:
            size = np.abs(terms) + 2 * np.abs(push.m) * self.sizes[value][push.element]
            np.add.at(lost, push.row, gamma(len(push.row) + 4) * size + TINY)
        return offset, lost

    def least(self, view: View, planes: Planes, owner: Array) -> Any:
        """The minimum of each plane over its node's box, rounded down. `Planes.c` has room for the sum's rounding."""
        middle = view.lower + (view.upper - view.lower) / 2
        radius = np.maximum(view.upper - middle, middle - view.lower)
        radius = radius + (4 * self.u * radius + self.tiny)
        G = planes.G
        middle, radius = _own(middle, owner), _own(radius, owner)
        found = planes.c + (_dot(G, middle) - _dot(np.abs(G), radius))
        if self.ball is None or self.exact:
            return found
        return np.fmax(found, self._over_ball(self.ball, planes))

    @staticmethod
    def _over_ball(ball: Ball, planes: Planes) -> Any:
        """c + G·center − eps·|G|, in the dual norm, rounded down."""
        G, n = planes.G, len(ball.center)
        norm = np.abs(G).max(1)
        if ball.p == 2:  # the room is for squares that underflow
            norm = np.sqrt((G * G).sum(1)) * (1 + gamma(n + 4)) + n * 1e-150
        size = np.abs(G) @ np.abs(ball.center) + ball.eps * norm + np.abs(planes.c)
        return planes.c + G @ ball.center - ball.eps * norm - (2 * gamma(n + 8) * size + TINY)

    # -- rows -------------------------------------------------------------------------------------------------------

    def units(self, value: int, element: Array, sign: Array, owner: Array) -> tuple[int, Rows]:
        """Rows sign·v[element], and their value: where that is free they are already rows of the value before."""
        step = self.steps[value - 1] if value else None
        sign = self.array(sign)
        E = np.zeros(len(element)) if self.exact else self.noise[value][element]
        if isinstance(step, Dense) and len(step.weight) == step.size:
            A = step.weight[element] * sign[:, None]
            b = sign * (0 if step.bias is None else step.bias[element])
            return step.sources[0], Rows(A, owner, b, E)
        A = np.zeros((len(element), self.network.sizes[value]))
        A = self.array(A)
        A[np.arange(len(element)), element] = sign
        zero = self.array(np.zeros(len(element)))
        return value, Rows(A, owner, zero, 0 * E)

    def crown(self, view: View, k: int) -> None:
        """Improve what is known of the operand of k by backward substitution, where it is not linear: from above first,
        and then from below where it is still not linear."""
        value = self.steps[k].sources[0]
        if self.sharp[value] and self.ball is None:
            return
        for sign in (-1.0, 1.0):
            owner, element = np.nonzero(self.free(k, view))
            order = np.lexsort((self.network.nearby(value)[element], owner))
            owner, element = owner[order], element[order]
            for part in self.chunks(len(owner)):
                at, e = owner[part], element[part]
                self.improve(view, k, at, e, np.full(len(at), sign))

    def improve(
        self,
        view: View,
        k: int,
        owner: Array,
        element: Array,
        sign: Array,
        choices: Choices | None = None,
    ) -> None:
        """Improve single ends: from below where ``sign`` is 1, from above where it is −1."""
        value = self.steps[k].sources[0]
        start, rows = self.units(value, element, sign, owner)
        found = self.least(view, self.pull(view, start, rows, choices), owner)
        if not self.exact:
            found = np.where(
                np.isfinite(found), found, math.nan
            )  # a sum that overflows says nothing
        low, high = (np.array(v) for v in view.known[k])
        below = sign > 0
        np.fmax.at(low, (owner[below], element[below]), found[below])
        np.fmin.at(high, (owner[~below], element[~below]), -found[~below])
        view.meet(k, low, high)

    def chunks(self, count: int, rows: int = 1) -> Iterable[slice]:
        """Slices of ``count`` things of so many rows each, as many as are worked on at a time."""
        size = max(1, self.rows // rows)
        return (slice(i, i + size) for i in range(0, count, size))


def _own(values: Any, owner: Array) -> Any:
    """The rows' own entries of what nodes have; one node serves all."""
    if values is None or len(values) == 1:
        return values
    if len(values) == len(owner) and (owner == np.arange(len(owner))).all():
        return values
    return np.take(values, owner, 0)


def _dot(rows: Array, vectors: Array) -> Any:
    """The product of each row with its vector, or with the only one."""
    if rows.dtype == object:
        return (rows * vectors).sum(1)
    return rows @ vectors[0] if len(vectors) == 1 else np.einsum("rn,rn->r", rows, vectors)


def _sharp(network: Network) -> list[bool]:
    """Values whose intervals over a box are exact, but for rounding: one affine step from independent elements."""
    status = ["free"]
    for step in network.steps:
        before = status[step.sources[0]]
        if len(step.sources) > 1:
            status.append("loose")
        elif isinstance(step, Affine) and not step.elementwise:
            status.append("sharp" if before == "free" else "loose")
        else:
            status.append("loose" if isinstance(step, Maximum) and before != "free" else before)
    return [s != "loose" for s in status]
