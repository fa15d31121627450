"""A folder of competition results checked again, by the rules of VNN-COMP 2026, and by stricter ones.

Ten points for a correct answer, −150 for an incorrect one, nothing otherwise; an answer after its instance's limit
is none. A counterexample's own outputs are ignored: its inputs are replayed in onnxruntime. There are two readings of
a bound on an input: as written, in rational arithmetic (*exact*), and as the competition's checker compares it,
rounded to the network's precision (*rounded*). A counterexample that needs a tolerance of 1e-4 on inputs earns its
points, but does not prove another tool's ``unsat`` wrong.
"""

from __future__ import annotations

import ast
import csv
import gzip
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from calipers.errors import CalipersError, SpecError
from calipers.evaluate.queries import read
from calipers.graph.onnx import session
from calipers.vnnlib import Query, instances, parse_assignment

TOLERANCE = Fraction(1, 10_000)
RIGHT, WRONG = 10, -150
MAX_BYTES = 1 << 28  # of an unpacked counterexample
# the first prefix that fits says what a result means
WORDS = (
    ("unsat", "unsat"), ("sat", "sat"), ("violated", "sat"), ("holds", "unsat"), ("timeout", "timeout"),
    ("timed-out", "timeout"), ("timed_out", "timeout"), ("run_instance_timeout", "timeout"),
    ("prepare_instance_timeout", "timeout"), ("prepare_instance_error_", "unknown"), ("no_result_in_file", "unknown"),
    ("error_nonmaximal", "unknown"), ("error", "error"), ("unknown", "unknown"),
)  # fmt: skip
VERSIONS = ("1.0", "2.0", "2.1")
Class = Literal[
    "correct", "correct_up_to_tolerance", "spec_not_violated", "wrong_shape", "malformed_ce", "no_ce",
    "unsupported",
]  # fmt: skip
CREDIT: Mapping[str, int] = {"correct": RIGHT, "correct_up_to_tolerance": RIGHT, "unsupported": 0}


class Row(NamedTuple):
    """A line of ``results.csv``: ``category, network, property, prepare time, result, run time``."""

    category: str
    network: str
    query: str
    result: str
    seconds: float

    @property
    def key(self) -> tuple[str, str, str]:
        """Category without a leading year, network and query without endings: what tools and machines agree on."""
        category = self.category[5:] if self.category[4:5] == "_" else self.category
        return category, _inner(self.network), _inner(self.query)


def stem(path: str) -> str:
    """The file's name without folders, ``.gz`` and ending."""
    name = path.replace("\\", "/").rsplit("/", 1)[-1].removesuffix(".gz")
    return name.removesuffix(".onnx").removesuffix(".vnnlib")


def _inner(path: str) -> str:
    """The name with its folder, if that tells files apart (medical/net_0)."""
    folder = Path(path.replace("\\", "/")).parent.name
    return stem(path) if folder in {"", "onnx", "vnnlib"} else f"{folder}/{stem(path)}"


def results(folder: Path) -> list[Row]:
    """The rows of a tool's ``results.csv`` (the file itself, or the folder that holds it).

    Raises:
        SpecError: no such file, a line of another form, or a result that the rules do not know.
    """
    file = folder if folder.is_file() else folder / "results.csv"
    if not file.is_file():
        raise SpecError(f"{file}: no such file; give a folder with a results.csv")
    found = []
    with file.open(newline="", encoding="utf-8", errors="replace") as lines:
        rows = csv.reader(lines)
        for row in rows:
            where = f"{file}, line {rows.line_num}"
            if not row:
                continue
            try:
                category, network, prop, _, result, seconds = (cell.strip() for cell in row)
                took = float(seconds)
            except ValueError:
                raise SpecError(
                    f"{where}: expected category,network,property,prepare time,result,run time"
                ) from None
            found.append(Row(category, network, prop, word(result, where), took))
    return found


def word(result: str, where: str = "result") -> str:
    """What a result means: sat, unsat, unknown, timeout or error.

    Raises:
        SpecError: none of the words that the rules know.
    """
    text = result.strip().lower()
    if not text:
        return "unknown"
    for prefix, meaning in WORDS:
        if text.startswith(prefix):
            return meaning
    raise SpecError(f"{where}: {result[:40]!r} is no result that the rules know")


# -- where things are --------------------------------------------------------------------------------------------


def source(benchmarks: Path, row: Row, path: str, top: str) -> Path:
    """The file that a row's ``path`` (of the machine where it ran) means among the benchmarks of this one.

    Args:
        top: ``onnx`` or ``vnnlib``, the folder from which on the path is kept.

    Raises:
        SpecError: it is not there.
    """
    parts = Path(path.replace("\\", "/")).parts
    inside = len(parts) - 1 - parts[::-1].index(top) if top in parts else len(parts) - 1
    own = Path(*parts[inside:]) if top in parts else Path(top, parts[-1])
    version = next((v for v in VERSIONS if v in parts), "")
    names = [row.category, *(n for n in (row.category[5:],) if row.category[4:5] == "_")]
    roots = [benchmarks / n for n in names] + [benchmarks / "benchmarks" / n for n in names]
    roots = [r / v for r in roots for v in (version, *VERSIONS, "") if v or r]
    roots += [benchmarks]
    plain = own.as_posix().removesuffix(".gz")
    flat = own.name.removesuffix(".gz")
    for root in roots:
        for name in (plain, f"{plain}.gz", flat, f"{flat}.gz"):
            if (root / name).is_file():
                return root / name
    raise SpecError(f"{row.category}: {own.as_posix()} is not among the benchmarks in {benchmarks}")


def counterexample(folder: Path, row: Row) -> Path | None:
    """The file with a row's counterexample, if there is one."""
    folder = folder.parent if folder.is_file() else folder
    net, prop = stem(row.network), stem(row.query)
    parent = Path(row.network.replace("\\", "/")).parent.name
    names = {f"{p}{net}_{prop}.counterexample{z}" for p in ("", f"{parent}_") for z in ("", ".gz")}
    own = [d for d in sorted(folder.iterdir()) if d.is_dir() and d.name.endswith(row.category)]
    for place in (*own, folder):
        for found in sorted(place.rglob("*.counterexample*")) if place != folder else ():
            if found.name in names:
                return found
        for name in sorted(names):
            if (place / name).is_file():
                return place / name
    return None


# -- one counterexample ------------------------------------------------------------------------------------------


class Checked(NamedTuple):
    """What a counterexample is, in both readings, and why."""

    rounded: Class
    exact: Class
    reason: str


def check(file: Path | None, model: Path, query_file: Path) -> Checked:
    """Replay a counterexample of whichever tool in onnxruntime.

    Raises:
        CalipersError, OSError: network or query cannot be read, so nothing can be said.
    """
    network, query = read(model, query_file)
    if file is None:
        return _both("no_ce", "no counterexample was found")
    try:
        text = _content(file)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        return _both("malformed_ce", str(error))
    if len(text.strip()) < 2:
        return _both("no_ce", "the file is empty")
    try:
        values = parse_assignment(text, file.name)
    except SpecError as error:
        return _both("malformed_ce", str(error))
    x = values.get(query.input.name)
    if x is None or x.numel() != query.input.size:
        return _both("wrong_shape", f"expected {query.input.name} with {query.input.size} numbers")
    x = x.reshape(1, *network.input_shape).to(network.dtype)
    y = session(model)(x)
    return _classes(query, x, y, network.dtype)


def _both(found: Class, reason: str) -> Checked:
    return Checked(found, found, reason)


def _content(file: Path) -> str:
    with file.open("rb") as raw:
        zipped = raw.read(2) == b"\x1f\x8b"
    with gzip.open(file) if zipped else file.open("rb") as stream:
        data: bytes = stream.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise OSError(f"{file.name}: more than {MAX_BYTES} bytes")
    return data.decode("utf-8")


def _classes(query: Query, x: torch.Tensor, y: torch.Tensor, dtype: torch.dtype) -> Checked:
    if query.holds(x, y):
        return _both("correct", "strictly inside the bounds as written")
    if query.holds(x, y, dtype=dtype):
        own = str(dtype).removeprefix("torch.")
        return Checked(
            "correct", "correct_up_to_tolerance", f"inside only where bounds are rounded to {own}"
        )
    if query.holds(x, y, dtype=dtype, tolerance=TOLERANCE):
        return _both("correct_up_to_tolerance", f"outside, within {float(TOLERANCE):g}")
    return _both("spec_not_violated", "onnxruntime's outputs do not break the property there")


# -- scores ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scored:
    """A row with its points in both readings.

    Args:
        checked: of a ``sat``: what its counterexample is.
        rounded, exact: points.
    """

    row: Row
    result: str
    checked: Checked | None
    rounded: int
    exact: int
    reason: str = ""


def score(
    folder: Path, benchmarks: Path, *, against: Sequence[Path] = (), cap: float = math.inf
) -> list[Scored]:
    """The points of each row of a tool's results.

    Args:
        benchmarks: the folder of the benchmarks, with or without a folder for each version.
        against: results of other tools; their strictly correct counterexamples prove an ``unsat`` wrong.
        cap: seconds, the limit of an instance that no ``instances.csv`` lists.

    Raises:
        SpecError: results that cannot be read.
    """
    limits = Limits(benchmarks)
    broken = [_broken(other, benchmarks) for other in against]
    found = []
    for row in results(folder):
        late = row.seconds > limits.of(row, cap)
        result = "timeout" if late and row.result in ("sat", "unsat") else row.result
        if result == "sat":
            found.append(_scored_sat(folder, benchmarks, row))
        elif result == "unsat":
            wrong = [sum(row.key in part[i] for part in broken) for i in (0, 1)]
            points = [WRONG if n else RIGHT for n in wrong]
            reason = "another tool has a correct counterexample" if any(wrong) else ""
            found.append(Scored(row, result, None, points[0], points[1], reason))
        else:
            found.append(Scored(row, result, None, 0, 0, "after the limit" if late else ""))
    return found


def _scored_sat(folder: Path, benchmarks: Path, row: Row) -> Scored:
    try:
        checked = _checked(folder, benchmarks, row)
    except (CalipersError, OSError) as error:
        checked = _both("unsupported", " ".join(str(error).split()))
    rounded, exact = (CREDIT.get(c, WRONG) for c in (checked.rounded, checked.exact))
    return Scored(row, "sat", checked, rounded, exact, checked.reason)


def _checked(folder: Path, benchmarks: Path, row: Row) -> Checked:
    if row.network.lstrip().startswith("["):
        names = [name for name, _ in ast.literal_eval(row.network)]
        return _both("unsupported", f"a query about several networks ({', '.join(names)})")
    model = source(benchmarks, row, row.network, "onnx")
    query = source(benchmarks, row, row.query, "vnnlib")
    return check(counterexample(folder, row), model, query)


def _broken(folder: Path, benchmarks: Path) -> tuple[set[tuple[str, str, str]], ...]:
    """The instances that a tool's counterexamples prove sat, in the rounded and in the exact reading."""
    found: tuple[set[tuple[str, str, str]], ...] = (set(), set())
    for row in results(folder):
        if row.result == "sat":
            checked = _scored_sat(folder, benchmarks, row).checked
            for part, reading in zip(
                found, (checked and checked.rounded, checked and checked.exact), strict=True
            ):
                if reading == "correct":
                    part.add(row.key)
    return found


class Limits:
    """The time limits that the benchmarks' ``instances.csv`` give, read when first asked for."""

    def __init__(self, benchmarks: Path) -> None:
        self.benchmarks = benchmarks
        self.known: dict[str, dict[tuple[str, str], float]] = {}

    def of(self, row: Row, otherwise: float) -> float:
        if row.category not in self.known:
            self.known[row.category] = dict(self._read(row.category))
        return self.known[row.category].get((stem(row.network), stem(row.query)), otherwise)

    def _read(self, category: str) -> Iterator[tuple[tuple[str, str], float]]:
        for root in (
            self.benchmarks / category,
            self.benchmarks / "benchmarks" / category,
            self.benchmarks,
        ):
            for folder in (root, *(root / v for v in VERSIONS)):
                if (folder / "instances.csv").is_file():
                    for instance in instances(folder):
                        yield (
                            (stem(str(instance.onnx)), stem(str(instance.vnnlib))),
                            instance.seconds,
                        )
                    return


class Total(NamedTuple):
    """A category's counts and points."""

    category: str
    rows: int
    sat: int
    unsat: int
    tolerated: int
    incorrect: int
    incorrect_exact: int
    points: int
    points_exact: int


def totals(scored: Sequence[Scored]) -> list[Total]:
    """One per category, and one of all where there are several."""
    names = list(dict.fromkeys(s.row.category for s in scored))
    found = [_total(n, [s for s in scored if s.row.category == n]) for n in names]
    return [*found, _total("together", scored)] if len(names) > 1 else found


def _total(name: str, part: Sequence[Scored]) -> Total:
    return Total(
        name,
        len(part),
        sum(s.result == "sat" and s.rounded > 0 for s in part),
        sum(s.result == "unsat" and s.rounded > 0 for s in part),
        sum(s.checked is not None and s.checked.rounded == "correct_up_to_tolerance" for s in part),
        sum(s.rounded < 0 for s in part),
        sum(s.exact < 0 for s in part),
        sum(s.rounded for s in part),
        sum(s.exact for s in part),
    )
