"""Maxima and minima that a network builds from ReLUs, as maxima: exactly the same function.

A row p·x + v·ReLU(q·x) is the larger (v > 0) or smaller of p·x and (p + v·q)·x, and a tournament of such rows is one
maximum over all that it compares. Lattice networks, which are maxima of minima of affine functions, become that again:
bounds see what cancels, and a few comparisons stand in the place of thousands of ReLUs.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from calipers_check import layers
from calipers_check.layers import Network, Step
from calipers_check.table import Array, Table

FEW = 16  # ReLUs that a row may read: two pairs of opposite ones, and the same again, are usual
TINY, HUGE = 2.0**-400, 2.0**400  # beyond them products of numbers or units may vanish or overflow
MOST = 1 << 25  # products in one product of tables
EXACT = 2.0**53  # multiples of a unit up to so many of it are float64 numbers


class Part(NamedTuple):
    """A value and how it comes from others.

    Args:
        rows: affine rows over the only source; the last column is the constant.
        windows: (n, k), elements of the only source whose largest is each element of this one.
        relu: whether it is the only source's ReLU. Parts that are nothing of all this are kept as they are.
    """

    name: str
    sources: tuple[str, ...]
    size: int
    rows: Table | None = None
    windows: Array | None = None
    relu: bool = False


def with_maxima(network: Network) -> Network:
    """The same function with maxima in the place of ReLUs that build them; the network itself if there are none."""
    parts = [_part(number, step) for number, step in enumerate(network.steps, 1)]
    folded = fold(parts, {"0": network.inputs})
    if folded is None:
        return network
    place, steps, own = {"0": 0}, list[Step](), dict(enumerate(network.steps, 1))
    sizes = [network.inputs]
    for number, part in enumerate(folded, 1):
        sources = tuple(place[name] for name in part.sources)
        old = own[int(part.name)] if part.name.isdigit() else None
        steps.append(_step(part, sources, sizes[sources[0]], old))
        sizes.append(part.size)
        place[part.name] = number
    return Network(network.inputs, steps, network.notes)


def _part(number: int, step: Step) -> Part:
    rows = None
    if isinstance(step, layers.Dense) and len(step.weight) == step.size:
        rows = affine(Table.of(step.weight), step.weight.shape[1], step.bias)
    elif isinstance(step, layers.Sparse):
        rows = affine(Table(*step.by_row, step.size), step.width, step.bias)
    relu = isinstance(step, layers.Kink) and (step.left, step.right) == (0, 1)
    return Part(str(number), tuple(map(str, step.sources)), step.size, rows, relu=relu)


def affine(weight: Table, width: int, bias: Array | None) -> Table:
    """Rows with their constants in the column ``width``."""
    if bias is None:
        return weight
    place = np.arange(weight.rows)
    constants = Table(place, np.full(weight.rows, width), bias, weight.rows)
    return Table.total([weight, constants]).nonzero()


def _step(part: Part, sources: tuple[int, ...], width: int, old: Step | None) -> Step:
    if old is not None:
        kept = copy.copy(old)
        kept.sources = sources
        return kept
    if part.windows is not None:
        return layers.Maximum(sources, part.size, part.windows)
    row, column, entry = _entries(part)
    last = column == width
    bias = np.zeros(part.size)
    bias[row[last]] = entry[last]
    row, column, entry = (v[~last] for v in (row, column, entry))
    if len(entry) and layers.SPARSE * len(entry) < part.size * width:
        return layers.Sparse(sources, part.size, row, column, entry, width, bias=bias)
    weight = Table(row, column, entry, part.size).dense(width)
    return layers.Dense(sources, part.size, weight, bias=bias)


def _entries(part: Part) -> tuple[Array, Array, Array]:
    if part.rows is None:
        raise TypeError(f"{part.name} has no rows")
    return part.rows.row, part.rows.column, part.rows.value


def fold(parts: Sequence[Part], inputs: Mapping[str, int]) -> list[Part] | None:
    """The same function with maxima, in an order in which it can be computed; None if there are none.

    Weights are added and multiplied only where that is exact in float64. The last part is the output in both.

    Args:
        inputs: names and sizes of the values that no part makes.
    """
    by_name = {part.name: part for part in parts}
    if not any(_narrow(part, by_name) for part in parts):
        return None
    folding = _Folding(by_name, {**inputs, **{p.name: p.size for p in parts}})
    for part in parts:
        folding.take(part)
    if not folding.maxima:
        return None
    folding.last(parts[-1].name)
    return folding.made


def _narrow(part: Part, parts: Mapping[str, Part]) -> bool:
    """Whether this is a linear layer of few ReLUs in each row."""
    if part.rows is None or part.sources[0] not in parts or not parts[part.sources[0]].relu:
        return False
    inner = part.rows.row[part.rows.column < parts[part.sources[0]].size]
    return len(inner) > 0 and int(np.bincount(inner).max()) <= FEW


class _Rows(NamedTuple):
    """Affine rows over the value ``base`` of ``width`` elements; the last column, number ``width``, is the constant."""

    base: str
    width: int
    table: Table


class _Maximum(NamedTuple):
    """Of rows ``elements``, over the windows (n, k) of their numbers."""

    elements: _Rows
    windows: Array


@dataclass(eq=False)
class _Folding:
    """What is known so far.

    Args:
        rows: what values are affine in.
        maxima: values that are maxima, by name.
        place: which part made holds a value.
    """

    parts: Mapping[str, Part]
    sizes: Mapping[str, int]
    rows: dict[str, _Rows] = field(default_factory=dict)
    maxima: dict[str, _Maximum] = field(default_factory=dict)
    place: dict[str, str] = field(default_factory=dict)
    made: list[Part] = field(default_factory=list)

    def take(self, part: Part) -> None:
        """Read one part."""
        if part.rows is not None:
            self.rows[part.name] = self._through(part, part.rows)
        elif not part.relu:  # which are made when somebody needs them
            self._keep(part)

    def last(self, name: str) -> None:
        """Have the last part made hold the value ``name``."""
        place = self._emit(name)
        if not self.made or self.made[-1].name != place:
            units = Table.units(np.arange(self.sizes[name]))
            self.made.append(Part(f"{name}:last", (place,), self.sizes[name], units))

    def _through(self, part: Part, weight: Table) -> _Rows:
        source = part.sources[0]
        if self._relu(source):
            found = self._compared(part, weight)
            if found is not None:
                return found
        else:
            rows = self._over(source)
            table = _product(weight, _homogeneous(rows))
            if table is not None:
                return rows._replace(table=table)
        self._keep(part)
        return self._own(part.name)

    def _relu(self, name: str) -> bool:
        return name in self.parts and self.parts[name].relu

    def _compared(self, part: Part, weight: Table) -> _Rows | None:
        """The rows of a linear layer after ReLUs, as maxima of two rows each up to sign; None if they are not."""
        rows = self._over(self.parts[part.sources[0]].sources[0])
        head, opposite = _families(rows.table)
        inputs = np.flatnonzero(head >= 0)
        # ReLU(−z) = ReLU(z) − z
        bent = _product(weight, Table.units(np.append(head, -1)))
        turned = Table(
            inputs[opposite], head[opposite], -np.ones(int(opposite.sum())), len(head) + 1
        )
        past = _product(weight, turned)
        if bent is None or past is None:
            return None
        bent = bent.nonzero()
        if len(bent.row) != len(np.unique(bent.row)):
            return None
        sign = np.ones(part.size)
        sign[bent.row] = np.sign(bent.value)
        constant = Table.units(np.where(np.arange(len(head) + 1) == len(head), rows.width, -1))
        first = _sum(_product(past, rows.table), _product(weight, constant))
        second = _sum(first, _product(bent, rows.table))
        if first is None or second is None:
            return None
        both = Table.stack([first.scaled(sign), second.scaled(sign)])
        pairs = np.stack([np.arange(part.size), part.size + np.arange(part.size)], 1)
        self.maxima[part.name] = self._joined(rows._replace(table=both), pairs)
        turned = Table(np.arange(part.size), np.arange(part.size), sign, part.size)
        return _Rows(part.name, part.size, turned)

    def _joined(self, elements: _Rows, windows: Array) -> _Maximum:
        """The maximum, of what its elements are maxima of if they all are."""
        table, known = elements.table.nonzero(), self.maxima.get(elements.base)
        unit = len(table.row) == table.rows == len(np.unique(table.row)) and bool(
            (table.value == 1).all()
        )
        if known is not None and unit and bool((table.column < elements.width).all()):
            elements = known.elements
            windows = known.windows[table.column][windows].reshape(len(windows), -1)
            table = elements.table
        head, opposite = _families(table)
        keys, number = np.unique(2 * head + opposite, return_inverse=True)
        place = np.zeros(len(keys), int)
        place[number[::-1]] = np.arange(len(number))[::-1]
        windows = np.sort(number[windows], 1)
        windows = np.where(np.diff(windows, axis=1, prepend=-1) > 0, windows, windows[:, :1])
        windows = np.sort(windows, 1)
        repeats = int((windows == windows[:, :1]).sum(1).min()) - 1
        return _Maximum(elements._replace(table=table.take(place)), windows[:, repeats:])

    # -- values as rows, and rows as parts ------------------------------------------------------------------------

    def _over(self, name: str) -> _Rows:
        if name not in self.rows:
            self._emit(name)
            return self._own(name)
        return self.rows[name]

    def _own(self, name: str) -> _Rows:
        count = self.sizes[name]
        self.rows[name] = _Rows(name, count, Table.units(np.arange(count)))
        return self.rows[name]

    def _keep(self, part: Part) -> None:
        sources = tuple(map(self._emit, part.sources))
        self.place[part.name] = part.name
        self.made.append(part._replace(sources=sources))

    def _emit(self, name: str) -> str:
        """The part that holds the value ``name``, made if need be."""
        if name not in self.place:
            if name not in self.parts:
                self.place[name] = name
            elif self._relu(name):
                self._keep(self.parts[name])
            else:
                self.place[name] = self._affine(f"{name}:rows", self.rows[name])
        return self.place[name]

    def _affine(self, name: str, rows: _Rows) -> str:
        base = self._largest(rows.base) if rows.base in self.maxima else self._emit(rows.base)
        self.made.append(Part(name, (base,), rows.table.rows, rows.table))
        return name

    def _largest(self, name: str) -> str:
        done = f"{name}:largest"
        if done not in self.place:
            maximum = self.maxima[name]
            elements = self._affine(f"{name}:compared", maximum.elements)
            self.made.append(Part(done, (elements,), len(maximum.windows), windows=maximum.windows))
            self.place[done] = done
        return done


# -- exact sums -------------------------------------------------------------------------------------------------------


def _homogeneous(rows: _Rows) -> Table:
    """With one more row, for the constant."""
    return Table.stack([rows.table, Table.units(np.array([rows.width]))])


def _product(left: Table, right: Table) -> Table | None:
    """Where it is exact, and not too large."""
    terms = max(np.bincount(left.row, minlength=1).max(), 1)
    exact = _quanta(left.value) * _quanta(right.value) * terms <= EXACT
    fits = np.bincount(right.row, minlength=right.rows)[left.column].sum() <= MOST
    return left @ right if exact and fits else None


def _sum(left: Table | None, right: Table | None) -> Table | None:
    if left is None or right is None:
        return None
    exact = 2 * _quanta(np.concatenate([left.value, right.value])) <= EXACT
    return Table.total([left, right]) if exact else None


def _quanta(numbers: Array) -> float:
    """The largest of the numbers, in units of the largest power of two that all are multiples of; inf where they are
    too large or small."""
    numbers = np.abs(numbers[numbers != 0])
    if not len(numbers):
        return 0.0
    if not (numbers < HUGE).all():
        return math.inf
    mantissa, exponent = np.frexp(numbers)
    digits = (mantissa * EXACT).astype("i8")
    unit = (digits & -digits) * np.exp2(exponent - 53)
    return float(numbers.max() / unit.min()) if unit.min() > TINY else math.inf


def _families(table: Table) -> tuple[Array, Array]:
    """For each row the number of one that is equal to it up to sign, the same for all of them, and whether the signs
    differ. Rows are told apart exactly; sums with random weights only say which to compare."""
    table = table.nonzero()
    weights = np.random.default_rng(0).random(int(table.column.max(initial=0)) + 1)
    sums = np.bincount(table.row, table.value * weights[table.column], table.rows)
    order = np.argsort(np.abs(sums), kind="stable")
    upright = np.where(sums < 0, -1.0, 1.0)
    ordered = table.take(order).scaled(upright[order])
    later = -ordered.take(np.arange(1, table.rows))
    change = Table.total([ordered.take(np.arange(table.rows - 1)), later]).nonzero()
    fresh = np.ones(table.rows, bool)
    fresh[1:] = np.bincount(change.row, minlength=table.rows - 1) > 0
    head = np.empty(table.rows, int)
    head[order] = order[fresh][np.cumsum(fresh) - 1]
    return head, upright != upright[head]
