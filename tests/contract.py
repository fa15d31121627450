"""The contract of the op table, as functions: what an entry of each kind must satisfy.

Oracles: dense Jacobians by torch.autograd, the functions written out in numpy's extended precision, loops over windows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from calipers.bounds import crown, preactivations
from calipers.graph import primitives as prim
from calipers.graph.graph import Graph, Network, Node, Ref
from calipers.ops import OPS, Activation, Affine, Bilinear, Extremum
from calipers.sets import Interval, Region
from calipers.spec import Spec
from networks import Builder

F64 = torch.float64
U = 2.0**-53
LONG = np.longdouble


@dataclass(frozen=True)
class In:
    """A perturbed argument of this per-example shape."""

    shape: tuple[int, ...]

    def __init__(self, *shape: int) -> None:
        object.__setattr__(self, "shape", shape)


@dataclass(frozen=True)
class Const:
    """A constant tensor; ``positive`` for variances and the like."""

    shape: tuple[int, ...]
    positive: bool = False

    def __init__(self, *shape: int, positive: bool = False) -> None:
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "positive", positive)


@dataclass(frozen=True)
class Case:
    """``op`` with arguments, perturbed ones marked `In` (also inside lists) and random constants `Const`."""

    op: Callable[..., Any]
    args: tuple[Any, ...]
    name: str = field(default="")

    def __str__(self) -> str:
        return f"{self.op.__name__}-{self.name}"

    def filled(self, seed: int = 0) -> tuple[list[Any], list[tuple[int, ...]]]:
        """Arguments with float32-representable constants in float64, and the shapes of the perturbed ones."""
        generator = torch.Generator().manual_seed(seed)
        shapes = []

        def fill(item: Any) -> Any:
            if isinstance(item, list):
                return [fill(i) for i in item]
            if isinstance(item, In):
                shapes.append(item.shape)
                return item
            if isinstance(item, Const):
                value = torch.randn(item.shape, generator=generator)
                return (value.abs() + 0.1 if item.positive else value).double()
            return item

        return [fill(a) for a in self.args], shapes


def put(args: list[Any], values: list[Any]) -> list[Any]:
    """``args`` with the perturbed ones replaced in order."""
    queue = iter(values)

    def visit(item: Any) -> Any:
        if isinstance(item, list):
            return [visit(i) for i in item]
        return next(queue) if isinstance(item, In) else item

    return [visit(a) for a in args]


def numbers(args: list[Any]) -> list[int]:
    """Which numbers the perturbed arguments have among all value arguments."""
    flat: list[Any] = []

    def visit(item: Any) -> None:
        if isinstance(item, list):
            for i in item:
                visit(i)
        elif isinstance(item, (In, Tensor)):
            flat.append(item)

    for a in args:
        visit(a)
    return [i for i, item in enumerate(flat) if isinstance(item, In)]


def _flat(x: Tensor) -> Tensor:
    return x.reshape(len(x), -1)  # also where one example is a single number


def points(shapes: list[tuple[int, ...]], count: int, seed: int) -> list[Tensor]:
    """Float32-representable float64 points."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, *s, generator=generator).double() for s in shapes]


def network(case: Case, dtype: torch.dtype = torch.float32) -> Network:
    """The op alone: its perturbed arguments are cut from one input vector."""
    args, shapes = case.filled()
    sizes = [math.prod(s) for s in shapes]
    b = Builder((sum(sizes),))
    parts, start = [], 0
    for size, shape in zip(sizes, shapes, strict=True):
        part = b(prim.slice_, b.x, 1, start, start + size, 1)
        parts.append(b(prim.reshape, part, shape))
        start += size
    b(case.op, *put(args, parts))
    return b.network(dtype)


# -- affine ---------------------------------------------------------------------------------------------


def jacobians(case: Case, args: list[Any], shapes: list[tuple[int, ...]]) -> tuple[Any, Tensor]:
    """The dense matrix of each perturbed argument, (out, in), and the constant term, (out)."""

    def f(*x: Tensor) -> Tensor:
        y: Tensor = case.op(*put(args, [v[None] for v in x]))[0]
        return y

    zeros = tuple(torch.zeros(s, dtype=F64) for s in shapes)
    matrices = torch.autograd.functional.jacobian(f, zeros)
    out = f(*zeros)
    return [m.reshape(out.numel(), -1) for m in matrices], out.flatten()


def check_affine(case: Case) -> None:
    kind = OPS[case.op]
    kind = kind.affine if isinstance(kind, Bilinear) else kind
    assert isinstance(kind, Affine)
    args, shapes = case.filled()
    L, c = jacobians(case, args, shapes)
    x = points(shapes, 3, 1)
    flat = [v.flatten(1) for v in x]
    y = case.op(*put(args, x))
    out = tuple(y.shape[1:])
    n = kind.terms(*put(args, x))
    gamma = 2 * (n + 4) * U  # of the oracle's sums and of the op's
    dense = sum(v @ m.T for v, m in zip(flat, L, strict=True)) + c
    size = sum(v.abs() @ m.abs().T for v, m in zip(flat, L, strict=True)) + c.abs()
    count = sum(m.shape[1] for m in L)
    slack = (2 * (count + 4) * U + gamma) * size
    assert ((y.reshape(3, -1) - dense).abs() <= slack).all(), "the op is not affine"

    # what it sums: float32 stays within gamma_n times the magnitudes, in both directions
    low = case.op(*put(single(args), [v.float() for v in x])).double()
    unit = 2.0**-24
    allowed = (n + 2) * unit / (1 - (n + 2) * unit) if n else 0.0
    scalars = [abs(a - float(np.float32(a))) for a in args if isinstance(a, float)]
    error = (low - y).reshape(3, -1).abs()
    assert (error <= allowed * size + slack + sum(scalars)).all(), ("terms too small", n)

    # magnitude
    positive = [v.abs() for v in x]
    expected = sum(v.flatten(1) @ m.abs().T for v, m in zip(positive, L, strict=True))
    if kind.magnitude is None:
        assert all((m >= 0).all() for m in L), "no magnitude, but L has a negative entry"
    else:
        linear = _flat(kind.magnitude(0.0, *put(args, positive)))
        assert ((linear - expected).abs() <= slack).all(), "magnitude(0) is not |L|x"
        full = _flat(kind.magnitude(1.0, *put(args, positive)))
        assert (full >= expected + c.abs() - slack).all(), "magnitude(1) < |L|x + |c|"
        assert (full >= y.reshape(3, -1).abs() - slack).all()

    # transpose, or the VJP
    A = torch.randn(5, *out, generator=torch.Generator().manual_seed(3)).double()
    for index, shape, matrix in zip(numbers(args), shapes, L, strict=True):
        rows = _flat(A) @ matrix
        bound = 2 * (math.prod(out) + n + 8) * U * (_flat(A).abs() @ matrix.abs())
        if kind.transpose is None:
            continue
        back = kind.transpose(A, index, shape, *put(args, x))
        if back is None:
            continue
        assert back.shape == (5, *shape), (back.shape, shape)
        assert ((_flat(back) - rows).abs() <= bound).all(), "transpose is not the VJP"
        back = kind.transpose(A.float(), index, shape, *put(single(args), [v.float() for v in x]))
        rows32 = (_flat(back.double()) - rows).abs()
        weight = _flat(A).abs() @ matrix.abs()
        # elementwise factors are themselves computed; sums over broadcast outputs count like outputs
        folds = math.prod(out) // max(math.prod(shape), 1)
        allowed = (max(n, folds) + 3) * unit
        assert (rows32 <= allowed * weight + bound).all(), ("terms too small backward", n)
    if kind.rows is not None:
        index = torch.tensor([[0, 1], [1, 0], [-1, 0]]) % math.prod(out)
        rows = kind.rows(index, *put(args, x))
        if rows is not None:
            expected = L[0][index].reshape(*index.shape, *shapes[0])
            assert torch.equal(rows, expected), "rows are not rows of L"
    if kind.separable:
        assert all(((m != 0).sum(1) <= 1).all() for m in L), "not separable"


def single(item: Any) -> Any:
    """Arguments in float32."""
    if isinstance(item, list):
        return [single(i) for i in item]
    return item.float() if isinstance(item, Tensor) and item.is_floating_point() else item


# -- the interval rule, through the public function --------------------------------------------------------


def check_interval(case: Case) -> None:
    """The box of the op's value: exact in float64, and containing the exact range with rigorous rounding."""
    args, shapes = case.filled()
    centres, radii = points(shapes, 3, 4), [p.abs() * 0.7 for p in points(shapes, 3, 5)]
    radii[0][0] = 0.0  # a point
    if positive(case):
        centres = [c.abs() + r + 0.125 for c, r in zip(centres, radii, strict=True)]
    lows = torch.cat(
        [(c - r).float().double().flatten(1) for c, r in zip(centres, radii, strict=True)], 1
    )
    highs = torch.cat(
        [(c + r).float().double().flatten(1) for c, r in zip(centres, radii, strict=True)], 1
    )
    region = Region.box(lows, highs)
    low, high = exact_range(case, args, shapes, lows, highs)
    size = torch.maximum(low.abs(), high.abs()) + 1.0
    net = network(case)
    name = net.graph.output

    def box(dtype: torch.dtype, rigorous: bool) -> tuple[Tensor, Tensor]:
        found = preactivations(net, region, tight=False, dtype=dtype, rigorous=rigorous)[name]
        return _flat(found.lower.double()), _flat(found.upper.double())

    found = box(F64, False)
    assert ((found[0] - low).abs() <= 2.0**-40 * size).all(), ("lower end", found[0] - low)
    assert ((found[1] - high).abs() <= 2.0**-40 * size).all(), ("upper end", found[1] - high)
    oracle = 2.0**-48 * size  # of the range itself
    for dtype in (F64, torch.float32):
        found = box(dtype, True)
        slack = oracle if dtype == F64 else 1e-3 * oracle
        assert (found[0] <= low + slack).all(), (dtype, "rigorous lower end", found[0] - low)
        assert (found[1] >= high - slack).all(), (dtype, "rigorous upper end", found[1] - high)
        wide = 4096 * torch.finfo(dtype).eps * (size + region_size(case, args, shapes, lows, highs))
        assert (found[0] >= low - wide).all(), "far too careful"
        assert (found[1] <= high + wide).all(), "far too careful"
    # sampled values lie inside
    t = torch.rand(50, *lows.shape, dtype=F64)
    x = (lows + t * (highs - lows)).flatten(0, 1)
    y = net.in_double()(x).reshape(50, len(lows), -1)
    found = box(F64, True)
    assert (y >= found[0] - 1e-14 * size).all()
    assert (y <= found[1] + 1e-14 * size).all()


def region_size(
    case: Case, args: list[Any], shapes: list[Any], low: Tensor, high: Tensor
) -> Tensor:
    """|L|·|x| + |c| for affine ops, where sums cancel."""
    if not isinstance(OPS[case.op], (Affine, Bilinear)) or (
        len(shapes) > 1 and case.op is torch.mul
    ):
        return torch.zeros(())
    L, c = jacobians(case, args, shapes)
    return torch.maximum(low.abs(), high.abs()) @ torch.cat(L, 1).abs().T + c.abs()


def exact_range(
    case: Case, args: list[Any], shapes: list[tuple[int, ...]], low: Tensor, high: Tensor
) -> tuple[Tensor, Tensor]:
    kind = OPS[case.op]
    if isinstance(kind, Activation):
        f = FUNCTIONS[case.op]
        ends = []
        for l, u in zip(low.flatten().tolist(), high.flatten().tolist(), strict=True):
            grid = np.linspace(LONG(l), LONG(u), 501)
            values = f(np.concatenate([grid, np.array(stops(case, l, u), LONG)]), *args[1:])
            ends.append((float(values.min()), float(values.max())))
        table = torch.tensor(ends, dtype=F64).reshape(*low.shape, 2)
        return table[..., 0], table[..., 1]
    sizes = [math.prod(s) for s in shapes]
    if isinstance(kind, Bilinear) and len(shapes) == 2:
        x, y = (
            torch.stack([a, b])
            for a, b in zip(low.split(sizes, 1), high.split(sizes, 1), strict=True)
        )
        corners = [
            (x[i].reshape(-1, *shapes[0]) * y[j].reshape(-1, *shapes[1])).flatten(1)
            for i, j in itertools.product((0, 1), repeat=2)
        ]
        return torch.stack(corners).amin(0), torch.stack(corners).amax(0)
    if isinstance(kind, Extremum):  # a maximum is monotone
        return tuple(
            torch.from_numpy(
                naive_maximum(case.op, args, e.reshape(-1, *shapes[0]).numpy())
            ).reshape(len(low), -1)
            for e in (low, high)
        )  # type: ignore[return-value]
    L, c = jacobians(case, args, shapes)
    matrix = torch.cat(L, 1)
    plus, minus = matrix.clamp_min(0), matrix.clamp_max(0)
    return low @ plus.T + high @ minus.T + c, high @ plus.T + low @ minus.T + c


# -- activations --------------------------------------------------------------------------------------------


def _sigmoid(z: np.ndarray) -> np.ndarray:
    e = np.exp(-np.abs(z))
    return np.where(z >= 0, 1 / (1 + e), e / (1 + e))


def _clamp(z: np.ndarray, low: Any = None, high: Any = None) -> np.ndarray:
    z = z if low is None else np.maximum(z, LONG(low))
    return z if high is None else np.minimum(z, LONG(high))


def _erfc_tail(z: np.ndarray) -> np.ndarray:
    """erfc for z >= 2 by Laplace's continued fraction."""
    value = np.zeros_like(z)
    for n in range(60, 0, -1):
        value = LONG(n) / 2 / (z + value)
    return np.exp(-z * z) / ((z + value) * np.sqrt(LONG(np.pi)))


def _erf_series(z: np.ndarray) -> np.ndarray:
    """erf for |z| <= 2 by a series of terms of one sign."""
    term, total = z, z
    for n in range(1, 48):
        term = term * (2 * z * z) / LONG(2 * n + 1)
        total = total + term
    return 2 / np.sqrt(PI) * np.exp(-z * z) * total


PI = LONG(4) * np.arctan(LONG(1))


def _erfc(z: np.ndarray) -> np.ndarray:
    """Relative accuracy everywhere."""
    z = np.asarray(z, LONG)
    size = np.abs(z)
    far = _erfc_tail(np.maximum(size, 2))
    return np.where(size < 2, 1 - _erf_series(np.clip(z, -2, 2)), np.where(z > 0, far, 2 - far))


def _erf(z: np.ndarray) -> np.ndarray:
    return np.where(np.abs(z) < 2, _erf_series(np.clip(z, -2, 2)), 1 - _erfc(z))


def _softplus(z: np.ndarray) -> np.ndarray:
    return np.maximum(z, 0) + np.log1p(np.exp(-np.abs(z)))


def _tanh_gelu(z: np.ndarray) -> np.ndarray:
    inner = np.sqrt(2 / PI) * (z + LONG(0.044715) * z**3)
    return z * _sigmoid(2 * inner)


def _elu(z: np.ndarray, alpha: float = 1.0, scale: float = 1.0, rate: float = 1.0) -> np.ndarray:
    left = LONG(alpha) * np.expm1(LONG(rate) * np.minimum(z, 0))
    return LONG(scale) * np.where(z > 0, z, left)


FUNCTIONS: dict[Callable[..., Any], Callable[..., np.ndarray]] = {
    torch.relu: lambda z: np.maximum(z, LONG(0)),
    F.leaky_relu: lambda z, s=0.01: np.where(z >= 0, z, LONG(s) * z),
    torch.abs: np.abs,
    torch.clamp: _clamp,
    torch.sigmoid: _sigmoid,
    torch.tanh: np.tanh,
    torch.erf: _erf,
    torch.atan: np.arctan,
    F.softsign: lambda z: z / (1 + np.abs(z)),
    F.silu: lambda z: z * _sigmoid(z),
    F.mish: lambda z: z * np.tanh(_softplus(z)),
    F.hardswish: lambda z: z * np.clip(z + 3, 0, 6) / 6,
    F.gelu: lambda z: z * _erfc(-z / np.sqrt(LONG(2))) / 2,
    prim.tanh_gelu: _tanh_gelu,
    prim.softplus: _softplus,
    prim.elu: _elu,
    torch.exp: np.exp,
    torch.log: np.log,
    torch.sqrt: np.sqrt,
    torch.rsqrt: lambda z: 1 / np.sqrt(z),
    torch.reciprocal: lambda z: 1 / z,
    torch.pow: lambda z, p: z ** (int(p) if p == int(p) else LONG(p)),
    torch.sin: np.sin,
    torch.cos: np.cos,
    torch.sign: np.sign,
    prim.step: lambda z, at=0.0: np.where(z == 0, at, np.where(z > 0, 1.0, 0.0)),
    torch.round: np.rint,
    torch.floor: np.floor,
    torch.ceil: np.ceil,
}
# extrema (mpmath, 20 digits), beside 0 and the arguments
TURNS = {
    F.silu: [-1.2784645427610737951],
    F.mish: [-1.1924312145154952121],
    F.hardswish: [-1.5, -3.0, 3.0],
    F.gelu: [-0.75179152469356445746],
    prim.tanh_gelu: [-0.75246142207101625849],
    torch.sin: [(k + 0.5) * math.pi for k in range(-1300, 1300)],
    torch.cos: [k * math.pi for k in range(-1300, 1300)],
}
POSITIVE = {torch.log, torch.sqrt, torch.rsqrt, torch.reciprocal}


def positive(case: Case) -> bool:
    """Whether the function is tested on positive numbers only."""
    return case.op in POSITIVE or (case.op is torch.pow and case.args[1] != int(case.args[1]))


def stops(case: Case, l: float, u: float) -> list[float]:
    """Points inside [l, u] where extrema, kinks or steps may be."""
    named = [v for v in case.args[1:] if isinstance(v, (int, float))]
    known = [0.0, *named, *TURNS.get(case.op, [])]
    if case.op in (torch.round, torch.floor, torch.ceil) and u - l < 100:
        middle = math.floor(l)
        known += [middle + k / 2 for k in range(int(2 * (u - l)) + 3)]
    near = [v for v in known if l <= v <= u]
    return [*near, *(float(np.nextafter(v, w)) for v in near for w in (l, u))]


def check_lines(
    case: Case,
    intervals: list[tuple[float, float]],
    dtype: torch.dtype = F64,
    choice: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Lines below and above the function on a dense grid, within a few units in the last place of their own
    terms; equal to it where it is linear.

    Args:
        choice: of the lines that can be optimised.
    """
    if positive(case):
        intervals = [(abs(l), abs(l) + u - l) for l, u in intervals if l]
        if not intervals:
            return
    kind = OPS[case.op]
    assert isinstance(kind, Activation)
    extra = case.args[1:]
    f = FUNCTIONS[case.op]
    low, high = (torch.tensor(e, dtype=dtype) for e in zip(*intervals, strict=True))
    box = Interval(low, high)
    linear = kind.linear(box, *extra)
    if choice is None:
        found = kind.relax(box, *extra)
    else:
        assert kind.tuned is not None
        found = kind.tuned.lines(box, choice[0].to(dtype), choice[1].to(dtype), *extra)
    lines = [v.double().numpy().astype(LONG) for v in found]
    info = torch.finfo(dtype)
    ulps = 8 + kind.ulps
    for i, (l, u) in enumerate(zip(low.tolist(), high.tolist(), strict=True)):
        t = np.concatenate([np.linspace(LONG(0), LONG(1), 257), np.logspace(-12, -0.01, 40)])
        t = np.concatenate([t, 1 - t])
        z = np.clip(LONG(l) + t * (LONG(u) - LONG(l)), l, u)
        z = np.concatenate([z, np.array([l, u, *stops(case, l, u)], LONG)])
        with np.errstate(over="ignore"):
            y = f(z, *extra)
        if np.abs(y).max() > info.max / 4:
            continue
        a_lo, b_lo, a_up, b_up = (v[i] for v in lines)
        assert np.isfinite([a_lo, b_lo, a_up, b_up]).all(), (case, l, u)
        reach = max(abs(l), abs(u))
        terms = (abs(a_lo) + abs(a_up)) * reach + abs(b_lo) + abs(b_up) + np.abs(y)
        slack = ulps * info.eps * terms + info.tiny
        below, above = y - (a_lo * z + b_lo), (a_up * z + b_up) - y
        assert (below >= -slack).all(), (str(case), "lower line", l, u, float(below.min()))
        assert (above >= -slack).all(), (str(case), "upper line", l, u, float(above.min()))
        if linear[i]:
            assert (below <= slack).all(), (str(case), "lower line is loose", l, u)
            assert (above <= slack).all(), (str(case), "upper line is loose", l, u)


def check_tuned(case: Case, intervals: list[tuple[float, float]], seed: int = 0) -> None:
    """Lines that can be optimised are sound for any choice, and start as the ordinary ones."""
    kind = OPS[case.op]
    assert isinstance(kind, Activation)
    if kind.tuned is None:
        return
    if positive(case):
        intervals = [(abs(l), abs(l) + u - l) for l, u in intervals if l]
    box = Interval(*(torch.tensor(e, dtype=F64) for e in zip(*intervals, strict=True)))
    choice = kind.tuned.start(box, *case.args[1:])
    assert all(((c >= 0) & (c <= 1)).all() for c in choice)
    begun = kind.tuned.lines(box, *choice, *case.args[1:])
    ordinary = kind.relax(box, *case.args[1:])
    for end in box:
        for k in (0, 2):
            mine, theirs = (v[k] * end + v[k + 1] for v in (begun, ordinary))
            size = (ordinary[k] * end).abs() + ordinary[k + 1].abs()
            assert ((mine - theirs).abs() <= 1e-14 * (1 + size)).all(), str(case)
    more = [c.expand(3, -1) for c in choice]  # several choices for one interval
    for mine, ordinary in zip(kind.tuned.lines(box, *more, *case.args[1:]), begun, strict=True):
        assert (mine - ordinary).abs().max() <= 1e-12 * (1 + ordinary.abs().max())
    generator = torch.Generator().manual_seed(seed)
    for kept in ((0.0, 0.0), (1.0, 1.0), None, None):
        draw = torch.rand(2, len(intervals), generator=generator)
        chosen = draw if kept is None else torch.tensor(kept).unsqueeze(1).expand_as(draw)
        check_lines(case, intervals, F64, (chosen[0], chosen[1]))


def check_tightness(case: Case) -> None:
    """On a grid of ordinary intervals each line touches the function (no line could be moved towards it)."""
    kind = OPS[case.op]
    assert isinstance(kind, Activation)
    extra, f = case.args[1:], FUNCTIONS[case.op]
    ends = [-3.0, -1.25, -0.5, -0.125, 0.25, 0.625, 1.0, 2.5]
    pairs = [(l, u) for l in ends for u in ends if l < u]
    if positive(case):
        pairs = [(l + 3.125, u + 3.125) for l, u in pairs]
    low, high = (torch.tensor(e, dtype=F64) for e in zip(*pairs, strict=True))
    lines = [v.numpy() for v in kind.relax(Interval(low, high), *extra)]
    for i, (l, u) in enumerate(pairs):
        z = np.concatenate(
            [
                np.linspace(l, u, 4001),
                stops(case, l, u),
            ]
        )
        y = f(z.astype(LONG), *extra)
        a_lo, b_lo, a_up, b_up = (v[i] for v in lines)
        assert (y - (a_lo * z + b_lo)).min() <= 1e-6, (str(case), "lower line does not touch", l, u)
        assert ((a_up * z + b_up) - y).min() <= 1e-6, (str(case), "upper line does not touch", l, u)


def check_pieces(case: Case) -> None:
    kind = OPS[case.op]
    assert isinstance(kind, Activation)
    if kind.pieces is None:
        return
    pieces = kind.pieces(*case.args[1:])
    assert len(pieces.slopes) == len(pieces.points) + 1
    assert list(pieces.points) == sorted(pieces.points)
    z = np.concatenate([np.linspace(-5, 5, 1001), pieces.points]).astype(LONG)
    first = LONG(pieces.points[0])
    y = LONG(pieces.value) + LONG(pieces.slopes[0]) * np.minimum(z - first, 0)
    ends = [*pieces.points[1:], math.inf]
    for start, end, slope in zip(pieces.points, ends, pieces.slopes[1:], strict=True):
        y = y + LONG(slope) * np.clip(z - LONG(start), 0, LONG(end) - LONG(start))
    expected = FUNCTIONS[case.op](z, *case.args[1:])
    assert np.abs(y - expected).max() <= 1e-15


# -- maxima and products -------------------------------------------------------------------------------------


def naive_maximum(op: Callable[..., Any], args: list[Any], x: np.ndarray) -> np.ndarray:
    """A maximum by loops over numpy arrays; the geometry of pooling as torch documents it."""
    if op is prim.maximum:
        return x.max(tuple(args[1]), keepdims=args[2])
    kernel, stride, padding, dilation = args[1:5]
    ceil_mode = bool(args[5]) if len(args) > 5 else False
    n = len(kernel)
    sizes = x.shape[-n:]
    out = []
    for size, k, s, p, d in zip(sizes, kernel, stride, padding, dilation, strict=True):
        reach = size + 2 * p - d * (k - 1) - 1
        count = (math.ceil(reach / s) if ceil_mode else reach // s) + 1
        if ceil_mode and (count - 1) * s >= size + p:
            count -= 1
        out.append(count)
    y = np.full((*x.shape[:-n], *out), -np.inf)
    for place in itertools.product(*(range(o) for o in out)):
        for tap in itertools.product(*(range(k) for k in kernel)):
            at = [
                i * s - p + t * d
                for i, s, p, t, d in zip(place, stride, padding, tap, dilation, strict=True)
            ]
            if all(0 <= a < size for a, size in zip(at, sizes, strict=True)):
                where = (..., *place)
                y[where] = np.maximum(y[where], x[(..., *at)])
    return y


def check_windows(case: Case) -> None:
    kind = OPS[case.op]
    assert isinstance(kind, Extremum)
    args, shapes = case.filled()
    (x,) = points(shapes, 3, 6)
    y = case.op(*put(args, [x]))
    assert torch.equal(y, torch.from_numpy(naive_maximum(case.op, args, x.numpy())))
    index = kind.windows(shapes[0], *args[1:])
    assert index.shape[:-1] == y.shape[1:]
    taken = torch.where(index >= 0, x.flatten(1)[:, index.clamp_min(0)], -math.inf)
    assert torch.equal(taken.amax(-1), y), "windows do not reproduce the maximum"


def check_rows(case: Case, raw: bool = True) -> None:
    """Linear bounds of random functionals of the op's value lie under them; single maxima are exact."""
    net = network(case)
    args, shapes = case.filled()
    n = sum(math.prod(s) for s in shapes)
    generator = torch.Generator().manual_seed(9)
    center = torch.randn(4, n, generator=generator).double()
    radius = torch.rand(4, n, generator=generator).double() * 2
    if positive(case):
        center = center.abs() + radius + 0.125
    region = Region.box(center - radius, center + radius)
    K = math.prod(net.graph.node[net.graph.output].shape)
    flat = flattened(net, K)
    C = torch.cat([torch.eye(K), -torch.eye(K), torch.randn(8, K, generator=generator)]).expand(
        4, -1, -1
    )
    spec = Spec.functional(C)
    low = crown(flat, region, spec, dtype=F64, raw=raw)
    t = torch.rand(400, 4, n, dtype=F64)
    t = torch.where(torch.rand(400, 4, n) < 0.3, t.round(), t)
    x = (region.lower + t * (region.upper - region.lower)).flatten(0, 1)
    y = flat.in_double()(x).reshape(400, 4, K)
    values = torch.einsum("bmk,sbk->sbm", C.double(), y)
    assert (low <= values + 1e-12 * (1 + values.abs())).all(), (low - values.amin(0)).max()
    reach = values.amax(0) - values.amin(0)
    assert (low >= values.amin(0) - 20 * (reach + 1)).all(), "useless"
    if isinstance(OPS[case.op], Extremum):
        bottom, top = exact_range(case, args, shapes, region.lower, region.upper)
        assert (low[:, :K] - bottom).abs().max() <= 1e-12
        assert (low[:, K : 2 * K] + top).abs().max() <= 1e-12


def flattened(net: Network, size: int) -> Network:
    """The same network with a vector as output."""
    graph = net.graph
    node = Node("flat", prim.reshape, (Ref(graph.output), (size,)), shape=(size,))
    longer = Graph((*graph.nodes, node), graph.params, graph.inputs, "flat", graph.constants)
    return replace(net, graph=longer)
