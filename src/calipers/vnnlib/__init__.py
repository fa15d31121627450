"""VNN-LIB queries: read, lowered to regions and specifications, and their assignments.

A query asks whether some input breaks a property (*sat*). `load` gives batches of boxes with the specification that
must hold on them, for attacks and bounds; `Query.holds` decides *sat* at a replayed point, by the tree as written.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from calipers.errors import SpecError
from calipers.vnnlib.assignment import format_assignment as format_assignment
from calipers.vnnlib.assignment import parse_assignment as parse_assignment
from calipers.vnnlib.assignment import read_assignment as read_assignment
from calipers.vnnlib.assignment import read_decimals as read_decimals
from calipers.vnnlib.lowering import Case as Case
from calipers.vnnlib.lowering import Lift as Lift
from calipers.vnnlib.lowering import lower
from calipers.vnnlib.reader import MAX_BYTES, Text, Variable, parse, read
from calipers.vnnlib.tree import Node as Node
from calipers.vnnlib.tree import decimals
from calipers.vnnlib.tree import holds as holds

Values = Tensor | Sequence[float | Fraction | Decimal]


@dataclass(frozen=True, eq=False)
class Query:
    """A query: *sat* iff some point of some case's region violates its specification.

    Args:
        path: where it was read.
        version: of the language.
        input, output: the declared tensors; a ``dtype`` of None is real.
        tree: what is unsafe, exactly as written.
        cases: batches of boxes with the form of their clauses in common; empty if nothing can be unsafe.
        dtype: how the inputs' bounds are read, see `load`.
        network: the network's name, which version 1.0 does not give.
    """

    path: str
    version: tuple[int, int]
    input: Variable
    output: Variable
    tree: Node
    cases: tuple[Case, ...]
    dtype: torch.dtype | None = None
    network: str | None = None

    def holds(
        self,
        x: Values,
        y: Values,
        *,
        dtype: torch.dtype | None = None,
        tolerance: Fraction = Fraction(0),
    ) -> bool:
        """Whether inputs ``x`` with outputs ``y`` are a counterexample, by rational arithmetic on the tree as written.

        Args:
            dtype, tolerance: see `calipers.vnnlib.holds`; by default every literal counts exactly.
        """
        return holds(self.tree, _flat(x), _flat(y), dtype=dtype, tolerance=tolerance)

    def decimals(self, x: Tensor, y: Tensor) -> list[Decimal] | None:
        """How to write inputs ``x`` so that, with outputs ``y``, what is written is a counterexample exactly.

        They round to ``x`` in the network's precision; where that has no number inside a bound, it is the bound's own.
        None if there are none.
        """
        inputs, outputs = (v.detach().double().flatten().tolist() for v in (x, y))
        return decimals(self.tree, inputs, outputs, self.dtype or torch.float64)


def _flat(values: Values) -> Sequence[float | Fraction | Decimal]:
    return values.detach().double().flatten().tolist() if isinstance(values, Tensor) else values


def load(
    path: str | Path,
    *,
    input_shape: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    max_bytes: int = MAX_BYTES,
) -> Query:
    """The query in a ``.vnnlib`` file (or gzip's), version 1.0 or 2.x.

    Sound: each region's ``outer_*`` encloses the exact box, its inner values lie in it, and each specification
    is at least as hard as the exact property, by less than an ulp of float64 in each offset; so a proof on all cases
    is a proof of the property, while ``sat`` is for `Query.holds` to decide.

    Args:
        input_shape: of one example of the network; by default the declared shape, (n,) for 1.0.
        dtype: the network's. A side without any number of this dtype (X_0 = 0.1) is then widened to the nearest ones,
            as the checker of the verification competitions reads it; by default nothing is widened, and a
            region with such a side has no member, though its bounds are sound.

    Raises:
        NoInputs: its bounds on inputs contradict each other, so nothing can break it.
        SpecError: not a query, or one beyond what is supported: one network with one input and one output, bounds on
            single inputs, affine relations among outputs. The message has file, line and remedy.
    """
    return _query(read(path, max_bytes=max_bytes), input_shape, dtype)


def loads(
    text: str, *, input_shape: Sequence[int] | None = None, dtype: torch.dtype | None = None
) -> Query:
    """`load` on a text."""
    return _query(parse(text), input_shape, dtype)


def _query(text: Text, input_shape: Sequence[int] | None, dtype: torch.dtype | None) -> Query:
    cases = tuple(lower(text, input_shape, dtype))
    return Query(
        text.source.path,
        text.version,
        text.input,
        text.output,
        text.tree,
        cases,
        dtype,
        text.network,
    )


class Instance(NamedTuple):
    """A line of ``instances.csv``."""

    onnx: Path
    vnnlib: Path
    seconds: float


def instances(folder: str | Path) -> list[Instance]:
    """The instances of a benchmark: ``instances.csv`` with lines ``network,property,seconds``, relative to ``folder``.

    ``folder`` may also be such a list itself, whatever its name.

    A file may lie there with or without ``.gz``.

    Raises:
        SpecError: no such list, a malformed line, or a missing file; the line is named.
    """
    table = Path(folder)
    table = table if table.is_file() else table / "instances.csv"
    if not table.is_file():
        raise SpecError(f"{table}: no such file; give the folder of a benchmark")
    found = []
    with table.open(newline="", encoding="utf-8") as file:
        lines = csv.reader(file)
        for line in lines:
            if not line:
                continue
            where = f"{table}, line {lines.line_num}"
            try:
                onnx, vnnlib, seconds = (cell.strip() for cell in line)
                limit = float(seconds)
            except ValueError:
                raise SpecError(
                    f"{where}: expected network,property,seconds with one network"
                ) from None
            found.append(
                Instance(_present(table, onnx, where), _present(table, vnnlib, where), limit)
            )
    return found


def _present(table: Path, name: str, where: str) -> Path:
    other = name.removesuffix(".gz") if name.endswith(".gz") else f"{name}.gz"
    for path in (table.parent / name, table.parent / other):
        if path.is_file():
            return path
    raise SpecError(f"{where}: {name}: no such file")
