"""Sub-problems without a neuron to split: linear programs over the input, whose duals are multipliers.

Where every activation is linear on its interval, the clause's functionals f_m and the splits' constraints h_i >= 0 are
affine in x, and min over the box of max_m f_m is a linear program. Its row duals are weights and multipliers, which
prove the sub-problem as any others would; its point is where the network may fail. The solver is not trusted.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calipers.bounds.linear import linear_bounds
from calipers.bounds.state import flat
from calipers.exact.domains import Batch, Domains, Problem
from calipers.exact.record import as_bytes
from calipers.ops.kinds import Activation, Affine
from calipers.programs import Limits, Program, Solution, solver
from calipers.sets import Interval

Array = np.ndarray[Any, np.dtype[Any]]


def programmable(problem: Problem) -> bool:
    """Whether the network is linear wherever no neuron can be split, and the region is a box."""
    state = problem.state
    known = all(
        isinstance(s.kind, Affine) or (isinstance(s.kind, Activation) and s.kind.tuned is not None)
        for s in state.facts.steps
    )
    return known and math.isinf(state.region.p) and state.frame.bounded


def solved(problem: Problem, domain: Domains, seconds: float) -> tuple[Domains, Tensor | None]:
    """One sub-problem (n = 1) with the weights and multipliers of the optimum, and the flat input where it is attained.

    Args:
        problem: in float64.
    """
    functionals, offsets = _functionals(problem, domain)
    splits, levels = _splits(problem, domain)
    reach = flat(problem.state.frame.above)[0].numpy()
    center = flat(problem.state.frame.origin)[0]
    found = _solve(functionals, offsets, splits, levels, reach, seconds)
    count = len(offsets)
    if (
        found.dual is None
    ):  # no point satisfies all splits: how far they are from being satisfiable shows it
        found = _solve(np.zeros((1, len(reach))), np.zeros(1), splits, levels, reach, seconds, 1.0)
        if found.dual is None or not found.lower > 0:
            return domain, None
        low = (offsets - np.abs(functionals) @ reach).max()
        weights = np.eye(count)[(offsets - np.abs(functionals) @ reach).argmax()]
        multipliers = np.maximum(found.dual[1:], 0) * (2 * max(1.0 - low, 0.0) / found.lower)
        return _with(problem, domain, weights, multipliers), None
    weights = np.maximum(found.dual[:count], 0)
    point = None if found.x is None else center + torch.from_numpy(found.x[: len(reach)])
    return _with(problem, domain, weights, np.maximum(found.dual[count:], 0)), point


def _with(problem: Problem, domain: Domains, weights: Array, multipliers: Array) -> Domains:
    taken = torch.nonzero(domain.where[0] >= 0).flatten()
    own = torch.zeros_like(domain.multiplier, dtype=torch.float64)
    own[0, taken] = torch.from_numpy(multipliers) / domain.scale[0, taken]
    some = torch.zeros_like(domain.weights, dtype=torch.float64)
    some[0, : len(weights)] = torch.from_numpy(weights)
    box = Interval(domain.low.double(), domain.high.double())
    return replace(domain, weights=some, multiplier=own, choice=as_bytes(problem.starts(box)))


def _functionals(problem: Problem, domain: Domains) -> tuple[Array, Array]:
    """Rows over x − centre and offsets of the clause's functionals."""
    numbers = problem.members[domain.clause[0]]
    numbers = numbers[numbers >= 0]
    state = problem.state
    output = state.network.graph.output
    z = flat(state.env[output])[0]
    rows, bias = _affine(problem, domain, output, problem.C[numbers])
    return rows, (problem.C[numbers] @ z + problem.d[numbers]).numpy() + bias


def _splits(problem: Problem, domain: Domains) -> tuple[Array, Array]:
    """Rows and offsets of what the path's splits say is not negative, in their order."""
    taken = torch.nonzero(domain.where[0] >= 0).flatten()
    where, side = domain.where[0, taken], domain.side[0, taken].double()
    width = flat(problem.state.frame.above).shape[1]
    rows, levels = np.zeros((len(taken), width)), np.zeros(len(taken))
    for layer in problem.layers.values():
        here = torch.nonzero((where >= layer.span.start) & (where < layer.span.stop)).flatten()
        if not len(here):
            continue
        local = where[here] - layer.span.start
        operand = layer.node.operands[0]
        size = problem.state.env[operand][0].numel()
        units = torch.zeros(len(here), size, dtype=torch.float64)
        units[torch.arange(len(here)), layer.columns[local]] = 1.0
        slopes, bias = _affine(problem, domain, operand, units)
        sign = side[here].numpy()
        value = layer.z[local].numpy() + bias - domain.point[0, taken][here].double().numpy()
        rows[here.numpy()], levels[here.numpy()] = slopes * sign[:, None], value * sign
    return rows, levels


def _affine(problem: Problem, domain: Domains, name: str, rows: Tensor) -> tuple[Array, Array]:
    """Rows (R, elements) of a value's deviation from its reference, as functions of x − centre."""
    state = problem.state
    shape = state.env[name].shape[1:]
    same = domain[torch.zeros(len(rows), dtype=torch.long)]
    A = rows.reshape(len(rows), 1, *shape)
    found, bias = linear_bounds(state, name, A, Batch(problem, same, fresh=True))
    return flat(found[:, 0]).numpy(), bias[:, 0].numpy()


def _solve(
    functionals: Array,
    offsets: Array,
    splits: Array,
    levels: Array,
    reach: Array,
    seconds: float,
    elastic: float = 0.0,
) -> Solution:
    """min t + s over the box: t >= functionals·x + offsets, splits·x + levels + s >= 0 (s: only if ``elastic``)."""
    n, rows = len(reach), len(offsets) + len(levels)
    matrix = np.zeros((rows, n + 2))
    matrix[: len(offsets), :n], matrix[: len(offsets), n] = -functionals, 1.0
    matrix[len(offsets) :, :n], matrix[len(offsets) :, n + 1] = splits, elastic
    top = np.abs(offsets).max() + (np.abs(functionals) @ reach).max() + 1.0
    far = (np.abs(levels) + np.abs(splits) @ reach).max(initial=0.0) + 1.0
    program = Program(
        lower=np.concatenate([-reach, [-top, 0.0]]),
        upper=np.concatenate([reach, [top, far if elastic else 0.0]]),
        integral=np.zeros(n + 2, bool),
        row_lower=np.concatenate([offsets, -levels]),
        row_upper=np.full(rows, math.inf),
        starts=np.arange(rows + 1) * (n + 2),
        index=np.tile(np.arange(n + 2), rows),
        value=matrix.reshape(-1),
        slack=np.zeros(rows),
    )
    cost = np.zeros(n + 2)
    cost[n], cost[n + 1] = 1.0, 1.0
    return solver(program, Limits(seconds))(cost)
