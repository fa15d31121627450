"""What a network is made of: affine steps, activations and maxima on flattened values.

A step knows its linear part as a map of vectors (`along`), of their magnitudes (`sizes`) and of rows of coefficients
(`back`), and how many roundings one of its sums takes (`terms`). All of them work on float64 arrays and, after
`exact`, on arrays of `Fraction`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np

Array = np.ndarray
TILE = 4  # places of an image, in both directions, whose rows are worked on together
SPARSE = 20  # entries of a matrix for each that is not 0, from which on only those are kept
RATIONAL = np.frompyfunc(Fraction, 1, 1)


@dataclass
class Step:
    """One step; it reads the values ``sources`` and makes one of ``size`` numbers."""

    sources: tuple[int, ...]
    size: int

    def exact(self) -> Step:
        """The same with rational numbers."""
        other = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, np.ndarray) and value.dtype == np.float64:
                setattr(other, name, RATIONAL(value))
            if isinstance(value, tuple) and isinstance(value[-1], np.ndarray):
                setattr(other, name, (*value[:-1], RATIONAL(value[-1])))
        return other


@dataclass
class Affine(Step):
    """sum over sources of L_j v_j, plus bias."""

    bias: Array | None = field(default=None, kw_only=True)
    elementwise = False  # whether an output depends on one input, each on another

    @property
    def terms(self) -> int:
        """Roundings that one coefficient of a sum may take part in; 0: nothing rounds."""
        return 0

    def along(self, j: int, x: Array) -> Array:
        """L_j x for vectors (N, in)."""
        raise NotImplementedError

    def sizes(self, j: int, x: Array) -> Array:
        """|L_j| x."""
        return self.along(j, x)

    def back(self, j: int, A: Array) -> Array:
        """A L_j for rows (R, out)."""
        raise NotImplementedError


@dataclass
class Dense(Affine):
    """The last axis, of ``weight.shape[1]`` numbers, times the matrix."""

    weight: Array  # (out, in)

    def __post_init__(self) -> None:
        self.magnitude = np.abs(self.weight)

    @property
    def terms(self) -> int:
        return max(self.weight.shape)

    def _times(self, x: Array, weight: Array) -> Array:
        return (x.reshape(-1, weight.shape[0]) @ weight).reshape(len(x), -1)

    def along(self, j: int, x: Array) -> Array:
        return self._times(x, self.weight.T)

    def sizes(self, j: int, x: Array) -> Array:
        return self._times(x, self.magnitude.T)

    def back(self, j: int, A: Array) -> Array:
        return self._times(A, self.weight)


@dataclass
class Sparse(Affine):
    """A matrix given by its entries that are not 0."""

    row: Array
    column: Array
    entry: Array
    width: int  # of the operand

    def __post_init__(self) -> None:
        order = np.lexsort((self.row, self.column))
        self.by_row = self.row, self.column, self.entry
        self.by_column = self.column[order], self.row[order], self.entry[order]

    @property
    def terms(self) -> int:
        return int(max(np.bincount(self.row).max(), np.bincount(self.column).max()))

    @staticmethod
    def _times(x: Array, size: int, to: Array, index: Array, entry: Array) -> Array:
        """``to`` is sorted."""
        found = np.zeros((len(x), size), dtype=x.dtype)
        start = np.flatnonzero(np.diff(to, prepend=-1))
        found[:, to[start]] = np.add.reduceat(x[:, index] * entry, start, 1)
        return found

    def along(self, j: int, x: Array) -> Array:
        return self._times(x, self.size, *self.by_row)

    def sizes(self, j: int, x: Array) -> Array:
        return self._times(x, self.size, self.row, self.column, np.abs(self.entry))

    def back(self, j: int, A: Array) -> Array:
        return self._times(A, self.width, *self.by_column)


@dataclass
class Conv(Affine):
    """A two-dimensional convolution."""

    weight: Array  # (out, in / groups, h, w)
    shape: tuple[int, int, int]  # of the operand
    out: tuple[int, int, int]
    stride: tuple[int, int]
    pad: tuple[int, int, int, int]  # top, left, bottom, right
    dilation: tuple[int, int]
    groups: int

    @property
    def terms(self) -> int:
        return int(np.prod(self.weight.shape))  # more than any sum, in either direction

    def _windows(self) -> list[tuple[int, int, range, range]]:
        """For each place of the kernel the rows and columns of the padded operand that it meets."""
        spans = []
        for i in range(self.weight.shape[2]):
            for k in range(self.weight.shape[3]):
                at = (i * self.dilation[0], k * self.dilation[1])
                rows, columns = (
                    range(a, a + s * (n - 1) + 1, s)
                    for a, s, n in zip(at, self.stride, self.out[1:], strict=True)
                )
                spans.append((i, k, rows, columns))
        return spans

    def _padded(self) -> tuple[int, int, int]:
        top, left, bottom, right = self.pad
        return self.shape[0], self.shape[1] + top + bottom, self.shape[2] + left + right

    def _inner(self) -> tuple[slice, slice]:
        top, left, _, _ = self.pad
        return slice(top, top + self.shape[1]), slice(left, left + self.shape[2])

    def _apply(self, x: Array, weight: Array) -> Array:
        n, g = len(x), self.groups
        wide = np.zeros((n, *self._padded()), dtype=x.dtype)
        wide[:, :, *self._inner()] = x.reshape(n, *self.shape)
        wide = wide.reshape(n, g, -1, *wide.shape[2:])
        parts = [wide[..., _slice(r), _slice(c)] for _, _, r, c in self._windows()]
        patches = np.stack(parts, 3).reshape(n, g, -1, self.out[1] * self.out[2])
        return (weight.reshape(g, len(weight) // g, -1) @ patches).reshape(n, -1)

    def along(self, j: int, x: Array) -> Array:
        return self._apply(x, self.weight)

    def sizes(self, j: int, x: Array) -> Array:
        return self._apply(x, np.abs(self.weight))

    def back(self, j: int, A: Array) -> Array:
        n, g, (_, height, width) = len(A), self.groups, self.weight.shape[1:]
        A = A.reshape(n, *self.out)
        used = (A != 0).any((0, 1))  # rows of neighbours see a part of the image alone
        (top, bottom), (left, right) = (_span(used.any(1 - axis)) for axis in (0, 1))
        h, w = bottom - top, right - left
        rows = A[:, :, top:bottom, left:right].reshape(n, g, -1, h * w)
        weight = self.weight.reshape(g, rows.shape[2], -1, height, width)
        (down, across), (deep, far) = self.stride, self.dilation
        spans = down * (h - 1) + 1, across * (w - 1) + 1
        sizes = spans[0] + deep * (height - 1), spans[1] + far * (width - 1)
        part = np.zeros((n, self.shape[0], *sizes), dtype=A.dtype)
        for i in range(height):
            for k in range(width):
                more = weight[..., i, k].swapaxes(1, 2) @ rows
                y, x = (slice(a, a + n) for a, n in zip((i * deep, k * far), spans, strict=True))
                part[:, :, y, x][..., ::down, ::across] += more.reshape(n, -1, h, w)
        found = np.zeros((n, *self.shape), dtype=A.dtype)
        first = down * top - self.pad[0], across * left - self.pad[1]
        cuts = [
            _overlap(f, m, size) for f, m, size in zip(first, sizes, self.shape[1:], strict=True)
        ]
        found[:, :, *(there for there, _ in cuts)] = part[:, :, *(here for _, here in cuts)]
        return found.reshape(n, -1)


def _slice(places: range) -> slice:
    return slice(places.start, places.stop, places.step)


def _overlap(first: int, count: int, size: int) -> tuple[slice, slice]:
    """Of ``count`` places from ``first`` on those among ``size``, and where they are among the ``count``."""
    begin, end = max(first, 0), max(min(first + count, size), 0)
    return slice(begin, end), slice(begin - first, max(end, begin) - first)


def _span(used: Array) -> tuple[int, int]:
    """From the first that is used to behind the last; one place where there is none."""
    places = np.flatnonzero(used)
    return (int(places[0]), int(places[-1]) + 1) if len(places) else (0, 1)


@dataclass
class Pick(Affine):
    """Sums of elements: output i of those at ``index[i]``, −1 for nothing."""

    index: Array  # (out, k)
    width: int  # of the operand

    def __post_init__(self) -> None:
        used = self.index[self.index >= 0]
        self.most = int(np.bincount(used, minlength=1).max()) if used.size else 0
        self.elementwise = self.most <= 1 and self.index.shape[1] == 1
        self.straight = self.elementwise and np.array_equal(self.index[:, 0], np.arange(self.width))

    @property
    def terms(self) -> int:
        return 0 if self.elementwise else self.most + self.index.shape[1]

    def along(self, j: int, x: Array) -> Array:
        if self.straight:
            return x
        found = x[:, self.index]
        if (self.index < 0).any():
            found[:, self.index < 0] = 0
        return found[..., 0] if found.shape[2] == 1 else found.sum(2)

    def back(self, j: int, A: Array) -> Array:
        if self.straight:
            return A
        found = np.zeros((len(A), self.width), dtype=A.dtype)
        for column in self.index.T:
            known = column >= 0
            if self.elementwise:
                found[:, column[known]] = A[:, known]
            else:
                np.add.at(found.T, column[known], A[:, known].T)
        return found


@dataclass
class Scale(Affine):
    """Each element times, or divided by, its own constant."""

    factor: Array  # (size,)
    divide: bool = False
    rounded: bool = False  # the constants stand for numbers next to them
    elementwise = True

    @property
    def terms(self) -> int:
        return 4

    def _times(self, x: Array, factor: Array) -> Array:
        return x / factor if self.divide else x * factor

    def along(self, j: int, x: Array) -> Array:
        return self._times(x, self.factor)

    def sizes(self, j: int, x: Array) -> Array:
        return self._times(x, np.abs(self.factor))

    def back(self, j: int, A: Array) -> Array:
        return self._times(A, self.factor)


@dataclass
class Sum(Affine):
    """The sum of the sources, each with a sign."""

    signs: tuple[int, ...]

    @property
    def terms(self) -> int:
        return len(self.signs) + 2

    def along(self, j: int, x: Array) -> Array:
        return x if self.signs[j] > 0 else -x

    def sizes(self, j: int, x: Array) -> Array:
        return x

    def back(self, j: int, A: Array) -> Array:
        return self.along(j, A)


@dataclass
class Kink(Step):
    """f(v) = left·v below 0 and right·v above."""

    left: float
    right: float


@dataclass
class Maximum(Step):
    """The largest element of each window; −1 is no element."""

    index: Array  # (out, k)


@dataclass
class Smooth(Step):
    """An increasing function of each element: "sigmoid" or "tanh"."""

    function: str


@dataclass
class Network:
    """Value 0 is the input, step k makes value k + 1, and the last value is the output."""

    inputs: int
    steps: list[Step]
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def activations(self) -> list[int]:
        """The numbers of the steps that are not affine, in order."""
        return [k for k, step in enumerate(self.steps) if not isinstance(step, Affine)]

    @property
    def sizes(self) -> list[int]:
        """How many numbers each value has."""
        return [self.inputs, *(step.size for step in self.steps)]

    def nearby(self, value: int) -> Array:
        """Each element's place in an order in which neighbours in an image follow each other, tile by tile."""
        size, v = self.sizes[value], value
        while v > 0:  # back to the convolution whose image it still is
            step = self.steps[v - 1]
            if isinstance(step, Conv) or step.size != size:
                break
            v = step.sources[0]
        if not v or not isinstance(step, Conv) or step.size != size:
            return np.arange(size)
        channel, y, x = np.indices(step.out).reshape(3, -1)
        return np.argsort(np.lexsort((channel, x, y, x // TILE, y // TILE)))

    @property
    def broadest(self) -> int:
        """How many numbers a row may take in the middle of a step."""
        return max(self.inputs, *(_broad(step) for step in self.steps))

    @property
    def products(self) -> int:
        """About how many multiplications one evaluation takes."""
        return sum(_products(step) for step in self.steps)


def without_maxima(network: Network) -> Network:
    """The same function, each maximum as ReLUs of a tournament.

    With k elements in each window and h = k // 2, for i < h: v_i <- v_i + ReLU(v_(i+h) - v_i); v_2h, if there is one,
    goes on beside them. Where a window has no element, its first one stands again.
    """
    steps: list[Step] = []
    number = [0]  # of each value, in the new network

    def add(step: Step) -> int:
        steps.append(step)
        return len(steps)

    for step in network.steps:
        sources = tuple(number[v] for v in step.sources)
        if not isinstance(step, Maximum):
            other = copy.copy(step)
            other.sources = sources
            number.append(add(other))
            continue
        first = step.index[np.arange(step.size), (step.index >= 0).argmax(1)]
        index = np.where(step.index >= 0, step.index, first[:, None])
        (count, k), width = index.shape, network.sizes[step.sources[0]]
        value = add(Pick(sources, k * count, index.T.reshape(-1, 1), width))
        while k > 1:
            h, place = k // 2, np.arange(k * count)[:, None]
            play, wait = (
                h * count,
                (k % 2) * count,
            )  # how many numbers play, and how many go on beside them
            first = add(Pick((value,), play, place[:play], k * count))
            second = add(Pick((value,), play, place[play : 2 * play], k * count))
            more = add(Kink((add(Sum((second, first), play, (1, -1))),), play, 0.0, 1.0))
            rest = np.concatenate([place[:play], place[2 * play :]])
            before = add(Pick((value,), play + wait, rest, k * count))
            beside = np.where(place[: play + wait] < play, place[: play + wait], -1)
            more = add(Pick((more,), play + wait, beside, play))
            value, k = add(Sum((before, more), play + wait, (1, 1))), k - h
        number.append(value)
    return Network(network.inputs, steps, network.notes)


def _products(step: Step) -> int:
    match step:
        case Dense():
            return step.weight.size * max(step.size // max(len(step.weight), 1), 1)
        case Conv():
            return step.weight.size * step.out[1] * step.out[2]
        case Sparse():
            return len(step.entry)
        case Pick() | Maximum():
            return step.index.size
    return step.size


def _broad(step: Step) -> int:
    if isinstance(step, Conv):
        return int(np.prod(step.weight.shape[1:])) * step.groups * step.out[1] * step.out[2]
    return len(step.entry) if isinstance(step, Sparse) else step.size
