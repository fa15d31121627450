"""Exact minima of margins over small regions: what every complete search is checked against.

`plane_minimum` is rational arithmetic: a network of two inputs, piecewise linear, is cut into polygons on which it is
affine. `pattern_minimum` enumerates activation patterns of any piecewise-linear network with a linear program (scipy's)
for each; a ball in l2 is cut by tangent planes until its point is a member.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linprog
from torch import Tensor

import networks
import rationals
from calipers.bracket import witness
from calipers.exact import Outcome
from calipers.graph import primitives as prim
from calipers.graph.graph import Network, Node, Ref
from calipers.sets import Region
from calipers.spec import Spec

F64, INF = torch.float64, math.inf
ZERO = Fraction(0)
Array = Any
Polygon = list[tuple[Fraction, Fraction]]


def deadline(seconds: float = 30.0) -> float:
    return time.perf_counter() + seconds


# -- verdicts ---------------------------------------------------------------------------------------------------------


def check_verdict(
    found: Outcome,
    network: Network,
    region: Region,
    spec: Spec,
    exact: float | Fraction,
    noise: float = 0.0,
) -> None:
    """What a search may say where the minimal margin is ``exact``, known to within ``noise``."""
    assert not (found.lower > 0 and exact <= -noise), f"called robust, the minimum is {exact}"
    assert found.lower <= exact + noise, f"a bound of {found.lower}, the minimum is {exact}"
    decided = found.robust or found.point is not None
    assert decided != bool(found.reason), "a reason if and only if undecided"
    if found.point is not None:
        assert not found.robust
        assert found.point.shape == network.input_shape
        upper = witness(network, region, spec, found.point[None]).upper.item()
        assert upper <= 0, "a point where the network does not fail"
        assert exact <= 1e-6 + noise, f"called vulnerable, the minimum is {exact}"


# why a search may leave open what it has all the time to decide
UNFINISHED = "a sub-problem without a neuron to split stayed open: it is no linear program"


def check_decided(found: Outcome, exact: float | Fraction, tolerance: float = 1e-4) -> None:
    """A complete search decides whatever is further from 0 than a tolerance."""
    if found.reason == UNFINISHED:
        return
    if exact > tolerance:
        assert found.robust, f"the minimum is {float(exact)}: {found}"
    if exact < -tolerance:
        assert found.point is not None, f"the minimum is {float(exact)}: {found}"


# -- the pieces of activations ----------------------------------------------------------------------------------------


class Piece(NamedTuple):
    """f(z) = slope·z + offset for low <= z <= high (None: no end)."""

    low: Any
    high: Any
    slope: Any
    offset: Any


def relu(leak: Any = 0) -> list[Piece]:
    return [Piece(None, 0, leak, 0), Piece(0, None, 1, 0)]


def clamp(low: Any = None, high: Any = None) -> list[Piece]:
    found = [Piece(low, high, 1, 0)]
    if low is not None:
        found.append(Piece(None, low, 0, low))
    if high is not None:
        found.append(Piece(high, None, 0, high))
    return found


PIECES: dict[Any, Callable[..., list[Piece]]] = {
    torch.relu: relu,
    F.leaky_relu: relu,
    torch.abs: lambda: relu(-1),
    torch.clamp: clamp,
}


def pieces(node: Node, number: Callable[[Any], Any]) -> list[Piece]:
    """Of an activation's node, its constants as ``number`` makes them."""
    found = PIECES[node.op](*node.args[1:])
    return [Piece(*(None if v is None else number(v) for v in piece)) for piece in found]


# -- two inputs, in rational arithmetic -------------------------------------------------------------------------------


def side(polygon: Polygon, normal: Array, offset: Fraction) -> Polygon:
    """The part of a convex polygon where normal·x + offset >= 0."""
    values = [normal[0] * x + normal[1] * y + offset for x, y in polygon]
    kept: Polygon = []
    for i, (p, v) in enumerate(zip(polygon, values, strict=True)):
        q, w = polygon[i - 1], values[i - 1]
        if v * w < 0:
            t = v / (v - w)
            kept.append((p[0] + t * (q[0] - p[0]), p[1] + t * (q[1] - p[1])))
        if v >= 0:
            kept.append(p)
    return kept


Cell = tuple[Polygon, Array, Array]  # and on it the value: matrix (n, 2) and offset (n,)


def bent(cell: Cell, options: list[Piece]) -> Iterator[Cell]:
    """The cells into which an activation's pieces cut one, and its output there."""
    polygon, A, c = cell
    parts: list[Cell] = [(polygon, A[:0], c[:0])]
    for row, b in zip(A, c, strict=True):
        parts = [
            (
                inside,
                np.vstack([done, piece.slope * row]),
                np.append(ends, piece.slope * b + piece.offset),
            )
            for inner, done, ends in parts
            for piece in options
            if (inside := between(inner, row, b, piece))
        ]
    yield from parts


def between(polygon: Polygon, row: Array, b: Fraction, piece: Piece) -> Polygon:
    if piece.low is not None:
        polygon = side(polygon, row, b - piece.low)
    if polygon and piece.high is not None:
        polygon = side(polygon, -row, piece.high - b)
    return polygon


def plane_cells(network: Network, region: Region) -> Iterator[Cell]:
    """The polygons on which a network of linear layers and activations of two inputs is affine."""
    module: Any = network.module
    identity = np.array([[Fraction(1), ZERO], [ZERO, Fraction(1)]])
    cells: list[Cell] = [(corners(region), identity, np.array([ZERO, ZERO]))]
    for node in network.graph.nodes:
        if node.op is F.linear:
            W, b = (rationals.rational(getattr(module, a.name)) for a in node.args[1:3])
            cells = [(p, W.dot(A), W.dot(c) + b) for p, A, c in cells]
        else:
            options = pieces(node, Fraction)
            cells = [part for cell in cells for part in bent(cell, options)]
    yield from cells


def corners(region: Region) -> Polygon:
    """A box of two inputs, or an l1 ball cut by it."""
    low, high = ([Fraction(v) for v in end[0].tolist()] for end in region.hull())
    box: Polygon = [(low[0], low[1]), (high[0], low[1]), (high[0], high[1]), (low[0], high[1])]
    if region.p == 1:
        cx, cy = (Fraction(v) for v in region.center[0].tolist())
        eps = Fraction(region.outer_eps[0].item())
        for s, t in itertools.product((1, -1), repeat=2):
            box = side(box, (Fraction(s), Fraction(t)), eps - s * cx - t * cy)
    else:
        assert region.p == INF
    return box


def plane_minimum(network: Network, region: Region, spec: Spec) -> Fraction:
    """The minimal margin, exactly."""
    C, d = rationals.rational(spec.C[0]), rationals.rational(spec.d[0])
    members = [np.flatnonzero(spec.clause.numpy() == k) for k in range(spec.count)]
    best: list[Fraction] = []
    for polygon, A, c in plane_cells(network, region):
        rows, ends = C.dot(A), C.dot(c) + d
        for own in members:
            for i in own:  # where i is the largest of its clause
                part = polygon
                for j in own:
                    part = side(part, rows[i] - rows[j], ends[i] - ends[j]) if part else part
                best += [rows[i][0] * x + rows[i][1] * y + ends[i] for x, y in part]
    return min(best)


def check_intervals(network: Network, region: Region, problem: Any, domains: Any) -> None:
    """Intervals hold the members' values: sub-problems split at kinks are unions of cells, whose corners count."""
    points = {p for polygon, _, _ in plane_cells(network, region) for p in polygon}
    traces = [rationals.trace(network, np.array(p, dtype=object)) for p in points]
    elements = [
        (layer.node.operands[0], column)
        for layer in problem.layers.values()
        for column in layer.columns.tolist()
    ]
    for i in range(len(domains)):
        splits = [
            (elements[where], Fraction(point), side)
            for where, point, side in zip(
                *(getattr(domains, k)[i].tolist() for k in ("where", "point", "side")), strict=True
            )
            if where >= 0
        ]
        for values in traces:
            if any(side * (values[name][k] - point) < 0 for (name, k), point, side in splits):
                continue
            ends = domains.low[i].tolist(), domains.high[i].tolist()
            for (name, k), low, high in zip(elements, *ends, strict=True):
                assert low <= values[name][k] <= high, f"{name}[{k}] outside its interval"


# -- any piecewise-linear network, by linear programs -----------------------------------------------------------------


class Part(NamedTuple):
    """A set of inputs G·x <= h, and the values of the network there: affine maps, (n, inputs) and (n,)."""

    G: Array
    h: Array
    values: dict[str, tuple[Array, Array]]


def pattern_minimum(network: Network, region: Region, spec: Spec) -> float:
    """The minimal margin by one linear program for each activation pattern and clause."""
    low, high = (end[0].flatten().numpy() for end in region.hull())
    n = len(low)
    G, h = _ball_rows(region, n)
    parts = [Part(G, h, {"x": (np.eye(n), np.zeros(n))})]
    for node in network.graph.nodes:
        parts = [new for part in parts for new in _after(network, node, part, low, high)]
    C, d = spec.C[0].double().numpy(), spec.d[0].double().numpy()
    best = INF
    for part in parts:
        A, c = part.values[network.graph.output]
        for k in range(spec.count):
            own = spec.clause.numpy() == k
            best = min(best, _least(part, C[own] @ A, C[own] @ c + d[own], region, low, high))
    return best


def _ball_rows(region: Region, n: int) -> tuple[Array, Array]:
    if region.p != 1:
        return np.zeros((0, n)), np.zeros(0)
    signs = np.array(list(itertools.product([-1.0, 1.0], repeat=n)))
    return signs, signs @ region.center[0].flatten().numpy() + region.outer_eps[0].item()


def _after(network: Network, node: Node, part: Part, low: Array, high: Array) -> Iterator[Part]:
    """The parts into which a node's kinks cut one, with the node's value."""
    if node.op in PIECES:
        options = pieces(node, float)
        A, c = part.values[node.operands[0]]
        cuts = [[(row, b, piece) for piece in options] for row, b in zip(A, c, strict=True)]
        made = _cut(part, cuts, _between, low, high)
    elif node.op is prim.max_pool:
        made = _pooled(network, node, part, low, high)
    else:
        yield part._replace(values=part.values | {node.name: _affine(network, node, part)})
        return
    for G, h, rows, ends in made:
        yield Part(G, h, part.values | {node.name: (np.array(rows), np.array(ends))})


def _affine(network: Network, node: Node, part: Part) -> tuple[Array, Array]:
    """A node affine in its perturbed values, from its values at the maps' columns."""
    module: Any = network.module

    def at(column: int | None) -> Array:
        def argument(item: Any) -> Any:
            if isinstance(item, list):
                return [argument(i) for i in item]
            if not isinstance(item, Ref):
                return item
            if item.name not in part.values:
                return getattr(module, item.name).detach().double()
            A, c = part.values[item.name]
            value = c if column is None else A[:, column] + c
            shape = network.graph.node[item.name].shape if item.name != "x" else network.input_shape
            return torch.from_numpy(value.copy()).reshape(1, *shape)

        y = node.op(*map(argument, node.args), **node.kwargs)
        return y.flatten().numpy()

    constant = at(None)
    inputs = part.G.shape[1]
    return np.stack([at(i) - constant for i in range(inputs)], 1), constant


def _between(option: Any) -> tuple[list[tuple[Array, float]], Array, float]:
    """The constraints of a piece, and the value there."""
    row, b, piece = option
    rows = []
    if piece.low is not None:
        rows.append((-row, b - piece.low))
    if piece.high is not None:
        rows.append((row, piece.high - b))
    return rows, piece.slope * row, piece.slope * b + piece.offset


def _pooled(network: Network, node: Node, part: Part, low: Array, high: Array) -> Iterator[Any]:
    """Max pooling: which entry of each window is the largest."""
    A, c = part.values[node.operands[0]]
    name = node.operands[0]
    shape = network.graph.node[name].shape if name != "x" else network.input_shape
    index = torch.arange(1.0, len(A) + 1, dtype=F64).reshape(1, *shape)
    kernel, stride, padding, dilation = node.args[1:5]
    padded = F.pad(index, (padding[1], padding[1], padding[0], padding[0]))
    windows = F.unfold(padded.transpose(0, 1), kernel, dilation, 0, stride)  # (channels, k, places)
    cuts = []
    for window in windows.transpose(1, 2).reshape(-1, windows.shape[1]).long().tolist():
        own = [i - 1 for i in window if i]
        cuts.append([(i, own, A, c) for i in own])
    yield from _cut(part, cuts, _largest, low, high)


def _largest(option: Any) -> tuple[list[tuple[Array, float]], Array, float]:
    i, own, A, c = option
    return [(A[j] - A[i], c[i] - c[j]) for j in own if j != i], A[i], c[i]


def _cut(
    part: Part, cuts: list[list[Any]], constraints: Callable[..., Any], low: Array, high: Array
) -> Iterator[Any]:
    """(G, h, rows, ends) for each choice of one option for every element that leaves some inputs."""
    found: list[Any] = [(part.G, part.h, [], [])]
    for options in cuts:
        further = []
        for G, h, rows, ends in found:
            for option in options:
                more, row, end = constraints(option)
                least = [np.minimum(g * low, g * high).sum() - b for g, b in more]
                most = [np.maximum(g * low, g * high).sum() - b for g, b in more]
                if any(v > 1e-12 for v in least):
                    continue
                need = [m for m, v in zip(more, most, strict=True) if v > 0]
                inner = (G, h)
                if need:
                    inner = (
                        np.vstack([G, *(g for g, _ in need)]),
                        np.append(h, [b for _, b in need]),
                    )
                    if (
                        linprog(
                            np.zeros(len(low)), *inner, bounds=[*zip(low, high, strict=True)]
                        ).status
                        != 0
                    ):
                        continue
                further.append((*inner, [*rows, row], [*ends, end]))
                if not need:
                    break  # the element does this everywhere in the box
        found = further
    yield from found


def _least(part: Part, A: Array, c: Array, region: Region, low: Array, high: Array) -> float:
    """min over the part of max over the rows of A·x + c."""
    G = np.block(
        [[part.G, np.zeros((len(part.G), 1))], [A, -np.ones((len(A), 1))]]
    )  # and a column t >= each row
    h = np.concatenate([part.h, -c])
    n = len(low)
    center, eps = region.center[0].flatten().numpy(), region.outer_eps[0].item()
    sides = [*zip(low, high, strict=True), (None, None)]
    for _ in range(100):
        found = linprog(np.append(np.zeros(n), 1.0), G, h, bounds=sides)
        if found.status != 0:
            return INF
        away = found.x[:n] - center
        if region.p != 2 or np.linalg.norm(away) <= eps * (1 + 1e-4):
            return float(found.fun)
        away /= np.linalg.norm(away)
        G = np.vstack([G, np.append(away, 0.0)])
        h = np.append(h, eps + away @ center)
    raise AssertionError("the tangent planes do not close in on the ball")


# -- networks and specifications --------------------------------------------------------------------------------------


def dense(seed: int, sizes: tuple[int, ...], op: Any = torch.relu, *extra: Any) -> Network:
    """Linear layers and an activation between."""
    b = networks.Builder(sizes[:1], seed)
    h = b.x
    for n in sizes[1:-1]:
        h = b(op, b.linear(h, n), *extra)
    b.linear(h, sizes[-1])
    return b.network()


def integral(seed: int, sizes: tuple[int, ...], op: Any = torch.relu, *extra: Any) -> Network:
    """The same with small integers for weights and quarters for biases: float32 adds without rounding."""
    b = networks.Builder(sizes[:1], seed)

    def draw(*shape: int) -> Tensor:
        return torch.randint(-3, 4, shape, generator=b.generator).float()

    h = b.x
    for n, after in itertools.pairwise(sizes[:-1]):
        h = b(op, b(F.linear, h, draw(after, n), draw(after) / 4), *extra)
    b(F.linear, h, draw(sizes[-1], sizes[-2]), draw(sizes[-1]) / 4)
    return b.network()


def shifted(spec: Spec, by: float | Fraction) -> Spec:
    """Every functional moved, in float64; the margin moves with them."""
    return Spec(spec.C.double(), spec.d.double() + float(by), spec.clause, spec.strict)


def drawn(seed: int, clause: list[int], outputs: int) -> Spec:
    """Random functionals."""
    generator = torch.Generator().manual_seed(seed)
    C = torch.randn(1, len(clause), outputs, generator=generator)
    return Spec(C, torch.zeros(1, len(clause)), torch.tensor(clause))
