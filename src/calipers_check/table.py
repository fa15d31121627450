"""Table matrices as triplets, with what an encoding needs of them (torch's own warn of their beta state)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, eq=False)
class Table:
    """Entries ``value`` at (row, column), sorted by row, none twice."""

    row: Array
    column: Array
    value: Array
    rows: int

    @classmethod
    def units(cls, columns: Array) -> Table:
        """Row i is the unit vector of column ``columns[i]``; a negative one gives an empty row."""
        row = np.flatnonzero(columns >= 0)
        return cls(row, columns[row], np.ones(len(row)), len(columns))

    @classmethod
    def of(cls, dense: Array) -> Table:
        row, column = dense.nonzero()
        return cls(row, column, dense[row, column], len(dense))

    @classmethod
    def total(cls, parts: list[Table]) -> Table:
        """The sum of matrices of as many rows."""
        if len(parts) == 1:
            return parts[0]
        row, column, value = (
            np.concatenate([getattr(p, name) for p in parts]) for name in ("row", "column", "value")
        )
        return _merged(row, column, value, parts[0].rows)

    @classmethod
    def stack(cls, parts: list[Table]) -> Table:
        """One below the other."""
        starts = np.cumsum([0, *(p.rows for p in parts)])
        row = np.concatenate([p.row + s for p, s in zip(parts, starts, strict=False)])
        column = np.concatenate([p.column for p in parts])
        return cls(row, column, np.concatenate([p.value for p in parts]), int(starts[-1]))

    @property
    def starts(self) -> Array:
        """Where each row begins, and the end."""
        return np.append(0, np.cumsum(np.bincount(self.row, minlength=self.rows)))

    def __matmul__(self, other: Table) -> Table:
        starts = other.starts
        first, count = starts[self.column], np.diff(starts)[self.column]
        if (count == 1).all():
            at = first
        else:  # entry e of this matrix meets all entries of row column[e] of the other
            ends = np.cumsum(count)
            at = np.arange(ends[-1] if len(ends) else 0) + np.repeat(first - (ends - count), count)
        row, value = np.repeat(self.row, count), np.repeat(self.value, count) * other.value[at]
        return _merged(row, other.column[at], value, self.rows)

    def __neg__(self) -> Table:
        return Table(self.row, self.column, -self.value, self.rows)

    def scaled(self, factors: Array) -> Table:
        """Each row times its factor."""
        return Table(self.row, self.column, self.value * factors[self.row], self.rows)

    def nonzero(self) -> Table:
        """Without entries of 0."""
        keep = self.value != 0
        return Table(self.row[keep], self.column[keep], self.value[keep], self.rows)

    def take(self, rows: Array) -> Table:
        """Some of the rows, in the order asked for."""
        return Table.units(rows) @ self

    def dense(self, columns: int) -> Array:
        out = np.zeros((self.rows, columns))
        out[self.row, self.column] = self.value
        return out


def _merged(row: Array, column: Array, value: Array, rows: int) -> Table:
    width = int(column.max(initial=0)) + 1
    key, place = np.unique(row * width + column, return_inverse=True)
    return Table(key // width, key % width, np.bincount(place, value, len(key)), rows)
