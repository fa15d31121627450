"""Linear and mixed-integer programs as arrays, the solvers that take them, and a child process to run one in.

    min cost·x + offset   subject to   row_lower ≤ A·x ≤ row_upper,  lower ≤ x ≤ upper,  x integral where it says so

A solver is asked, never trusted: a linear program's value is worked out again from its dual (`dual_value`), points are
replayed by whoever asked. This module imports numpy and the solvers alone, so that a child process starts at once and
can be killed, or die, without harm: ``python -m calipers.programs FOLDER`` (see `apart`).
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

UNIT = 2.0**-53
SHARE = 0.95  # of the time is the solver's, so that it can still report what it has
GRACE = 2.0  # seconds after the deadline at which its process is killed


@dataclass(frozen=True, eq=False)
class Program:
    """Constraints over the columns; A by rows in compressed form.

    Args:
        lower, upper, integral: of the columns.
        row_lower, row_upper: of the rows.
        starts, index, value: row i has the entries starts[i] to starts[i + 1].
        slack: how much each row must be loosened to hold in real arithmetic: `dual_value` does, a solver does not.
    """

    lower: Array
    upper: Array
    integral: Array
    row_lower: Array
    row_upper: Array
    starts: Array
    index: Array
    value: Array
    slack: Array

    @property
    def sane(self) -> bool:
        """Whether its numbers are numbers; a solver may hang on others."""
        import numpy as np

        ends = (self.lower, self.upper, self.row_lower, self.row_upper)
        finite = bool(np.isfinite(self.value).all())
        return finite and not any(bool(np.isnan(end).any()) for end in ends)

    @property
    def columns(self) -> int:
        return len(self.lower)

    def relaxed(self) -> Program:
        """Integrality dropped."""
        return replace(self, integral=self.integral & False)

    def with_columns(self, lower: Array, upper: Array) -> Program:
        """More continuous columns, in no row yet."""
        import numpy as np

        return replace(
            self,
            lower=np.append(self.lower, lower),
            upper=np.append(self.upper, upper),
            integral=np.append(self.integral, np.zeros(len(lower), bool)),
        )

    def with_rows(self, rows: list[tuple[Array, Array, float, float]]) -> Program:
        """More rows, each (index, value, lower, upper)."""
        import numpy as np

        if not rows:
            return self
        lengths = [len(index) for index, *_ in rows]
        return replace(
            self,
            row_lower=np.append(self.row_lower, [r[2] for r in rows]),
            row_upper=np.append(self.row_upper, [r[3] for r in rows]),
            starts=np.append(self.starts, self.starts[-1] + np.cumsum(lengths)),
            index=np.concatenate([self.index, *(r[0] for r in rows)]),
            value=np.concatenate([self.value, *(r[1] for r in rows)]),
            slack=np.append(self.slack, np.zeros(len(rows))),
        )


@dataclass(frozen=True)
class Limits:
    """When to stop.

    Args:
        seconds: for all objectives together.
        memory: bytes for the solver's process, where the system can limit it; None: no limit.
        above: stop once the optimum is known to exceed this.
        below: stop at a point whose value is lower than this.
    """

    seconds: float = math.inf
    memory: int | None = None
    above: float = math.inf
    below: float = -math.inf


@dataclass(frozen=True, eq=False)
class Solution:
    """What a solver says of one objective: lower ≤ optimum ≤ upper, and a point that attains ``upper``.

    ``status`` is "optimal", "stopped" (a limit of `Limits`), or in words what went wrong; ``dual`` holds the row duals
    of a linear program.
    """

    status: str
    lower: float = -math.inf
    upper: float = math.inf
    x: Array | None = None
    dual: Array | None = None
    nodes: int = 0
    seconds: float = 0.0


# -- back-ends: (program, limits) -> a function of one objective ---------------------------------------------------

Solve = Callable[["Array"], Solution]


def _highs(program: Program, limits: Limits) -> Solve:
    import highspy as hs
    import numpy as np

    whole = bool(program.integral.any())
    tight = 1e-7 if whole else 1e-9
    options = {
        "output_flag": False,
        "threads": 1,
        "mip_rel_gap": 0.0,
        "mip_abs_gap": 0.0,
        "primal_feasibility_tolerance": tight,
        "dual_feasibility_tolerance": tight,
    }
    solver, lp = hs.Highs(), hs.HighsLp()  # type: ignore[no-untyped-call]
    for name, value in options.items():
        solver.setOptionValue(name, value)
    if math.isfinite(limits.below):
        solver.setOptionValue("objective_target", limits.below)
    lp.num_col_, lp.num_row_ = program.columns, len(program.row_lower)
    lp.col_cost_ = np.zeros(program.columns)
    lp.col_lower_, lp.col_upper_ = program.lower, program.upper
    lp.row_lower_, lp.row_upper_ = program.row_lower, program.row_upper
    lp.a_matrix_.format_ = hs.MatrixFormat.kRowwise
    lp.a_matrix_.start_, lp.a_matrix_.index_ = program.starts, program.index
    lp.a_matrix_.value_ = program.value
    if whole:
        kinds = (hs.HighsVarType.kContinuous, hs.HighsVarType.kInteger)
        lp.integrality_ = [kinds[int(i)] for i in program.integral]
    passed = solver.passModel(lp)
    if math.isfinite(limits.above):

        def stop(event: Any) -> None:
            if event.data_out.mip_dual_bound > limits.above:
                event.interrupt()

        solver.cbMipInterrupt += stop
    everything = np.arange(program.columns, dtype=np.int32)
    end = time.perf_counter() + limits.seconds

    def solve(cost: Array) -> Solution:
        if passed == hs.HighsStatus.kError or not np.isfinite(cost).all():
            return Solution("the solver refuses the program")
        begin = time.perf_counter()
        left = end - begin
        if left <= 0:
            return Solution("out of time")
        if math.isfinite(left):
            solver.setOptionValue("time_limit", solver.getRunTime() + left)
        solver.changeColsCost(program.columns, everything, cost)
        solver.run()
        state, info = solver.getModelStatus(), solver.getInfo()
        found = solver.getSolution()
        status = {
            hs.HighsModelStatus.kOptimal: "optimal",
            hs.HighsModelStatus.kInterrupt: "stopped",
            hs.HighsModelStatus.kObjectiveTarget: "stopped",
            hs.HighsModelStatus.kTimeLimit: "out of time",
            hs.HighsModelStatus.kMemoryLimit: "out of memory",
        }.get(state, f"the solver ended with {solver.modelStatusToString(state)!r}")
        has_point = bool(found.value_valid) and info.primal_solution_status == 2
        value = info.objective_function_value if has_point else math.inf
        lower = info.mip_dual_bound if whole else (value if status == "optimal" else -math.inf)
        return Solution(
            status,
            lower,
            value,
            np.array(found.col_value) if has_point else None,
            np.array(found.row_dual) if found.dual_valid and not whole else None,
            max(int(info.mip_node_count), 0) if whole else 0,
            time.perf_counter() - begin,
        )

    return solve


def _scip(program: Program, limits: Limits) -> Solve:
    from pyscipopt import Model, quicksum

    end = time.perf_counter() + limits.seconds

    def solve(cost: Array) -> Solution:
        begin = time.perf_counter()
        model = Model()
        model.hideOutput()
        model.setParam("limits/gap", 0.0)
        model.setParam("limits/absgap", 0.0)
        model.setParam("numerics/feastol", 1e-8)
        if math.isfinite(end):
            model.setParam("limits/time", max(end - begin, 0.0))
        if math.isfinite(limits.below):
            model.setParam("limits/primal", limits.below)
        if math.isfinite(limits.above):
            model.setParam("limits/dual", limits.above)
        x = [
            model.addVar(lb=_end(a), ub=_end(b), vtype="I" if i else "C", obj=float(c))
            for a, b, i, c in zip(program.lower, program.upper, program.integral, cost, strict=True)
        ]
        for index, value, low, high in _rows(program):
            total = quicksum(v * x[j] for j, v in zip(index, value, strict=True))
            if high < math.inf:
                model.addCons(total <= high)
            if low > -math.inf:
                model.addCons(total >= low)
        model.optimize()
        word = model.getStatus()
        status = {
            "optimal": "optimal",
            "primallimit": "stopped",
            "duallimit": "stopped",
            "timelimit": "out of time",
            "memlimit": "out of memory",
        }.get(word, f"the solver ended with {word!r}")
        point = _array([model.getVal(v) for v in x]) if model.getNSols() else None
        return Solution(
            status,
            model.getDualbound(),
            model.getObjVal() if point is not None else math.inf,
            point,
            None,
            int(model.getNTotalNodes()),
            time.perf_counter() - begin,
        )

    return solve


def _gurobi(program: Program, limits: Limits) -> Solve:
    import gurobipy as gp

    model = gp.Model()
    settings = {"OutputFlag": 0, "Threads": 1, "MIPGap": 0.0, "MIPGapAbs": 0.0}
    for name, setting in {**settings, "FeasibilityTol": 1e-8, "IntFeasTol": 1e-8}.items():
        model.setParam(name, setting)
    kinds = ["I" if i else "C" for i in program.integral]
    x = model.addMVar(program.columns, lb=program.lower, ub=program.upper, vtype=kinds).tolist()
    for index, value, low, high in _rows(program):
        total = gp.LinExpr(value.tolist(), [x[j] for j in index])
        if high < math.inf:
            model.addConstr(total <= high)
        if low > -math.inf:
            model.addConstr(total >= low)
    if math.isfinite(limits.below):
        model.setParam("BestObjStop", limits.below)
    if math.isfinite(limits.above):
        model.setParam("BestBdStop", limits.above)
    end = time.perf_counter() + limits.seconds

    def solve(cost: Array) -> Solution:
        begin = time.perf_counter()
        if math.isfinite(end):
            model.setParam("TimeLimit", max(end - begin, 0.0))
        model.setObjective(gp.LinExpr(cost.tolist(), x))
        model.optimize()
        codes = {
            gp.GRB.OPTIMAL: "optimal",
            gp.GRB.USER_OBJ_LIMIT: "stopped",
            gp.GRB.TIME_LIMIT: "out of time",
            gp.GRB.MEM_LIMIT: "out of memory",
        }
        status = codes.get(model.Status, f"the solver ended with status {model.Status}")
        point = _array([v.X for v in x]) if model.SolCount else None
        return Solution(
            status,
            model.ObjBound,
            model.ObjVal if point is not None else math.inf,
            point,
            None,
            int(model.NodeCount),
            time.perf_counter() - begin,
        )

    return solve


def _array(values: list[float]) -> Array:
    import numpy as np

    return np.array(values)


def _end(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _rows(program: Program) -> Iterator[tuple[Array, Array, float, float]]:
    for i, (low, high) in enumerate(zip(program.row_lower, program.row_upper, strict=True)):
        cut = slice(program.starts[i], program.starts[i + 1])
        yield program.index[cut], program.value[cut], float(low), float(high)


BACKENDS: dict[str, tuple[str, Callable[[Program, Limits], Solve]]] = {
    "highs": ("highspy", _highs),
    "scip": ("pyscipopt", _scip),
    "gurobi": ("gurobipy", _gurobi),
}
"""Name -> the package it needs, and the back-end."""


def require(backend: str) -> None:
    """Refuse a back-end that cannot run here.

    Raises:
        ValueError: no such back-end.
        SolverError: its package is not installed.
    """
    from calipers.errors import SolverError, unknown_name

    if backend not in BACKENDS:
        raise unknown_name("backend", backend, BACKENDS)
    package, _ = BACKENDS[backend]
    if find_spec(package) is None:
        raise SolverError(
            f"backend: {backend!r} needs the package {package}; run 'pip install {package}', "
            "or use backend='highs'"
        )


def solver(program: Program, limits: Limits | None = None, *, backend: str = "highs") -> Solve:
    """A function of one objective that solves in this process, each call starting where the last one ended."""
    require(backend)
    return _start(backend, program, limits or Limits())


def _start(backend: str, program: Program, limits: Limits) -> Solve:
    if not program.sane:
        return lambda _cost: Solution("the program holds NaN or infinite coefficients")
    return BACKENDS[backend][1](program, limits)


# -- what a dual proves -----------------------------------------------------------------------------------------------


def dual_value(program: Program, cost: Array, dual: Array, *, rigorous: bool = True) -> float:
    """A lower bound on min cost·x over the program without its integrality, from any vector of row duals.

        cost·x = y·Ax + (cost − Aᵀy)·x ≥ Σ_i min(y_i·rows_i) + Σ_j min((cost − Aᵀy)_j·[lower_j, upper_j])

    Sound: whatever ``dual`` holds (weak duality): signs that meet an infinite side are set to 0, rows loosened by their
    slack; with ``rigorous`` the rounding of this computation is subtracted. Reduced costs on an unbounded column give
    −inf.
    """
    import numpy as np

    y = np.where(np.isfinite(dual), dual, 0.0)
    side = np.where(y > 0, program.row_lower - program.slack, program.row_upper + program.slack)
    y = np.where(np.isfinite(side), y, 0.0)
    side = np.where(y == 0, 0.0, side)
    owner = np.repeat(np.arange(len(y)), np.diff(program.starts))
    products = program.value * y[owner]
    reduced = cost - np.bincount(program.index, products, program.columns)
    low, high = program.lower, program.upper
    with np.errstate(invalid="ignore"):
        ends = np.where(reduced == 0, 0.0, np.where(reduced > 0, reduced * low, reduced * high))
    terms = np.concatenate([y * side, ends])
    if not np.isfinite(terms).all():
        return -math.inf
    total = math.fsum(terms)
    if not rigorous:
        return total
    count = np.bincount(program.index, minlength=program.columns).max(initial=0) + 3
    gamma = 2 * count * UNIT / (1 - count * UNIT)
    sizes = np.abs(cost) + np.bincount(program.index, np.abs(products), program.columns)
    far = np.maximum(np.abs(low), np.abs(high))
    with np.errstate(invalid="ignore"):
        noise = np.where(sizes == 0, 0.0, gamma * sizes * far)
    # the products round once, their sum (fsum) once more, and the sums below a few times
    error = math.fsum(noise) + 4 * UNIT * math.fsum(np.abs(terms)) + 1e-300
    return math.nextafter(total - error * (1 + 1e-9), -math.inf)


# -- in a process of its own ------------------------------------------------------------------------------------------


def apart(
    program: Program,
    costs: Array,
    limits: Limits,
    *,
    backend: str = "highs",
    done: Callable[[int, Solution], None] | None = None,
) -> list[Solution]:
    """Solve for each row of ``costs`` in a child process, which is killed at the deadline: one `Solution` a row.

    A crash, a kill or a lack of memory is a status in words, never an exception, and leaves what came before it.

    Args:
        done: told each solution as it comes; what it raises (Ctrl-C too) ends the child.
    """
    import numpy as np

    require(backend)
    end = time.perf_counter() + limits.seconds
    with tempfile.TemporaryDirectory(prefix="calipers-") as name:
        folder = Path(name)
        given: dict[str, Any] = {f.name: getattr(program, f.name) for f in fields(program)}
        options: dict[str, Any] = {
            k: math.nan if v is None else v for k, v in asdict(limits).items()
        }
        with (folder / "program.npz").open("wb") as file:
            until = time.time() + limits.seconds * SHARE  # the child's clock starts later
            np.savez(file, **given, **options, costs=costs, backend=backend, until=until)
        root = str(Path(__file__).parents[1])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        with (folder / "errors").open("wb") as errors:
            child = subprocess.Popen(  # noqa: S603 - this interpreter, this module
                [sys.executable, "-m", "calipers.programs", name],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
            )
        try:
            found = list(_collect(child, folder, len(costs), end, done))
        finally:
            child.kill()
            child.wait()
    return found


def _collect(
    child: subprocess.Popen[bytes],
    folder: Path,
    count: int,
    end: float,
    done: Callable[[int, Solution], None] | None,
) -> Iterator[Solution]:
    for i in range(count):
        path, pause = folder / f"{i}.npz", 0.001
        while not path.exists() and child.poll() is None and time.perf_counter() < end + GRACE:
            time.sleep(pause)
            pause = min(2 * pause, 0.05)
        solution = _read(path) if path.exists() else Solution(_death(child, folder))
        if done is not None:
            done(i, solution)
        yield solution


def _death(child: subprocess.Popen[bytes], folder: Path) -> str:
    code = child.poll()
    if code is None:
        return "out of time"
    words = (folder / "errors").read_text(errors="replace").strip().splitlines()
    last = words[-1] if words else ""
    if "MemoryError" in last or "bad_alloc" in last or "bad alloc" in last.lower():
        return "out of memory"
    return f"the solver's process died with code {code}" + (f": {last[:200]}" if last else "")


def _read(path: Path) -> Solution:
    import numpy as np

    with np.load(path, allow_pickle=False) as data:
        values = {name: data[name] for name in data.files}
    numbers = {k: v.item() if v.ndim == 0 else v for k, v in values.items()}
    return Solution(**numbers)


def main(name: str) -> None:
    """The child: read the program, write each solution as soon as it is there."""
    import numpy as np

    folder = Path(name)
    with np.load(folder / "program.npz", allow_pickle=False) as data:
        given = {key: data[key] for key in data.files}
    program = Program(**{f.name: given[f.name] for f in fields(Program)})
    memory = given["memory"].item()
    until, above, below = (given[k].item() for k in ("until", "above", "below"))
    seconds = until - time.time()
    limits = Limits(seconds, None if math.isnan(memory) else int(memory), above, below)
    if limits.memory is not None:
        _limit_memory(limits.memory)
    solve = _start(given["backend"].item(), program, limits)
    for i, cost in enumerate(given["costs"]):
        solution = solve(cost)
        values = {f.name: getattr(solution, f.name) for f in fields(solution)}
        known: dict[str, Any] = {k: v for k, v in values.items() if v is not None}
        with (folder / f"{i}.part").open("wb") as file:
            np.savez(file, **known)
        (folder / f"{i}.part").replace(folder / f"{i}.npz")


def _limit_memory(size: int) -> None:
    try:
        import resource
    except ImportError:  # not on this system: the solver's own limits remain
        return
    resource.setrlimit(resource.RLIMIT_AS, (size, size))


if __name__ == "__main__":
    main(sys.argv[1])
