"""The rungs: interval, CROWN-IBP and CROWN bounds with one signature.

    (network, region, spec, *, dtype, rigorous, memory, statistics) -> (B, M) lower bounds of ``spec.values``

Each is sound in real arithmetic up to the rounding of its own computation; with ``rigorous=True`` that rounding is
subtracted too, so a positive margin proves robustness of the stored parameters in real arithmetic. All
are differentiable in the parameters and in the region's centre.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial, reduce

import torch
from torch import Tensor

from calipers.bounds.interval import propagate
from calipers.bounds.linear import both_bounds, lower_bounds, side_bounds
from calipers.bounds.patches import elements
from calipers.bounds.planner import examples, in_parts, row_bytes
from calipers.bounds.recorded import Core, recorded
from calipers.bounds.state import (
    State,
    check_spec,
    flat,
    joined,
    met,
    stacked,
    start,
    working_dtype,
)
from calipers.graph.graph import Network, Node
from calipers.ops import facts
from calipers.ops.kinds import Activation, Affine, Bilinear, Extremum
from calipers.sets import Interval, Region
from calipers.spec import Spec

Statistics = Mapping[str, Tensor]
Run = Callable[[State, Spec], Tensor]
INTERMEDIATE = {"interval": False, "crown": True}  # name -> whether `preactivations` is to be tight


def interval(
    network: Network,
    region: Region,
    spec: Spec,
    *,
    dtype: torch.dtype | None = None,
    rigorous: bool = False,
    memory: int | None = None,
    statistics: Statistics | None = None,
) -> Tensor:
    """Lower bounds by interval propagation with the functionals merged into the last affine layers.

    Args:
        dtype: working precision; None is the network's own.
        rigorous: also subtract this computation's rounding, so that the bound holds in real arithmetic.
        memory: bytes of working memory to plan for.
        statistics: replacements for normalisation statistics, see `calipers.graph.bind`.

    Sound: for every region; an l2 or l1 ball is replaced by its bounding box.
    Cost: about two forward passes.
    Reference: Gowal et al. 2018 (IBP), eqs. 6-11.
    """
    return chunked(_ALONE[_interval], network, region, spec, dtype, rigorous, memory, statistics)


def crown_ibp(
    network: Network,
    region: Region,
    spec: Spec,
    *,
    dtype: torch.dtype | None = None,
    rigorous: bool = False,
    memory: int | None = None,
    statistics: Statistics | None = None,
) -> Tensor:
    """Lower bounds by one backward pass over interval pre-activation bounds, never below `interval`'s.

    Sound: the set is concretised exactly (ball and box), see `Region.reach`. Arguments as in `interval`.
    Cost: about three forward passes and one backward pass of M rows.
    Reference: Zhang et al. 2020 (CROWN-IBP), section 3.
    """
    return chunked(_ALONE[_crown_ibp], network, region, spec, dtype, rigorous, memory, statistics)


def crown(
    network: Network,
    region: Region,
    spec: Spec,
    *,
    dtype: torch.dtype | None = None,
    rigorous: bool = False,
    memory: int | None = None,
    statistics: Statistics | None = None,
    raw: bool = False,
) -> Tensor:
    """Lower bounds by backward passes for every neuron that can be unstable, then for the functionals.

    Never below `crown_ibp`'s, unless ``raw`` asks for the last pass alone. Arguments as in `interval`.

    Sound: as `crown_ibp`.
    Cost: one backward row per unstable neuron and side, rows in chunks within ``memory``.
    Reference: Zhang et al. 2018 (CROWN); adaptive lower slopes.
    """
    run = _crown if raw else crown_over_ibp
    return chunked(run, network, region, spec, dtype, rigorous, memory, statistics)


def preactivations(
    network: Network,
    region: Region,
    *,
    tight: bool = True,
    dtype: torch.dtype | None = None,
    rigorous: bool = False,
    memory: int | None = None,
    statistics: Statistics | None = None,
) -> dict[str, Interval]:
    """The interval of every value of the graph, by CROWN where it can help (``tight``) or by intervals alone.

    Where a neuron is stable, or interval bounds are exact, intervals are all there is.
    """
    chosen = working_dtype(network, None, dtype, rigorous=rigorous)

    def part(rows: slice, limit: int) -> dict[str, Interval]:
        some = region if rows == slice(0, len(region)) else region[rows]
        state = start(
            network, some, dtype=chosen, rigorous=rigorous, memory=limit, statistics=statistics
        )
        propagate(state, tighten=tightener(state) if tight else None)
        return state.boxes

    parts = in_parts(
        part,
        len(region),
        size=examples(network, 1, memory, chosen),
        memory=memory,
        least=row_bytes(network, chosen),
    )
    return {name: stacked([p[name] for p in parts]) for name in parts[0]}


def neurons(network: Network) -> int:
    """How many values of the graph come out of a nonlinear op."""
    steps = facts(network.graph).steps
    return sum(math.prod(s.node.shape) for s in steps if not isinstance(s.kind, Affine))


# -- running in chunks ----------------------------------------------------------------------------------------


def chunked(
    run: Run,
    network: Network,
    region: Region,
    spec: Spec,
    dtype: torch.dtype | None,
    rigorous: bool,
    memory: int | None,
    statistics: Statistics | None,
) -> Tensor:
    count = region.center.shape[0]
    if spec.C.shape[0] != count:
        raise ValueError(f"spec: {len(spec)} examples for {count} regions")
    dtype = working_dtype(network, spec, dtype, rigorous=rigorous)
    size = examples(network, spec.C.shape[1], memory, dtype)

    def part(rows: slice, limit: int) -> Tensor:
        whole = rows == slice(0, count)  # then what the region has cached serves the next call
        some, asked = (region, spec) if whole else (region[rows], spec[rows])
        state = start(
            network, some, dtype=dtype, rigorous=rigorous, memory=limit, statistics=statistics
        )
        return run(state, asked) if count else check_spec(state, asked)[1]  # of no example

    least = row_bytes(network, dtype)
    return joined(in_parts(part, count, size=size, memory=memory, least=least), 0)


# -- the three readings ------------------------------------------------------------------------------------------


def interval_bounds(state: State, spec: Spec) -> Tensor:
    return _interval(state, *check_spec(state, spec))


def _interval(state: State, C: Tensor, d: Tensor) -> Tensor:
    graph, known = state.network.graph, state.facts
    tail = known.tail
    propagate(state, until=graph.output, keep=known.kept)
    if not tail:
        return _from_box(state, C, d)
    (low,) = lower_bounds(state, graph.output, C.transpose(0, 1), tail, last=False)
    return at_reference(state, C, d) + low.T


def _from_box(state: State, C: Tensor, d: Tensor) -> Tensor:
    """The output itself is not affine: functionals of its box."""
    low, high = state.boxes[state.network.graph.output]
    low, high = low.unsqueeze(1), high.unsqueeze(1)
    value = (C.clamp_min(0) * low).sum(-1) + (C.clamp_max(0) * high).sum(-1) + d
    size = (C.abs() * torch.maximum(low.abs(), high.abs())).sum(-1) + d.abs()
    return value - (state.gamma(C.shape[-1] + 1) * size + state.tiny)


def at_reference(state: State, C: Tensor, d: Tensor) -> Tensor:
    """C·z + d at the reference output, less its rounding: (B, M)."""
    z: Tensor = state.env[state.network.graph.output]
    value = torch.baddbmm(d.unsqueeze(-1), C, z.unsqueeze(-1))
    gamma = state.gamma(C.shape[-1] + 2)
    if gamma:
        size = torch.baddbmm(d.abs().unsqueeze(-1), C.abs(), z.abs().unsqueeze(-1))
        value = value - (gamma * size + state.tiny)
    return value.squeeze(-1)


def crown_ibp_bounds(state: State, spec: Spec) -> Tensor:
    return _crown_ibp(state, *check_spec(state, spec))


def _crown_ibp(state: State, C: Tensor, d: Tensor) -> Tensor:
    propagate(state, until=state.network.graph.output)
    tail = state.facts.tail
    if not tail:
        return torch.fmax(functionals(state, C, d), _from_box(state, C, d))
    return functionals(state, C, d, tail)


def _checked(core: Core) -> Run:
    return lambda state, spec: core(state, *check_spec(state, spec))


# for a state that nobody looks at afterwards
_ALONE: dict[Core, Run] = {core: _checked(recorded(core)) for core in (_interval, _crown_ibp)}


def _crown(state: State, spec: Spec) -> Tensor:
    propagate(state, tighten=tightener(state, stable=True), until=state.network.graph.output)
    return _LAST(state, spec)


def crown_over_ibp(state: State, spec: Spec) -> Tensor:
    weak = _FIRST(state, spec)
    return torch.fmax(_crown(state, spec), weak)


def functionals(state: State, C: Tensor, d: Tensor, tail: Collection[str] = ()) -> Tensor:
    """The better of the bounds before the tail (if given) and at the input for rows C of the output: (B, M)."""
    output = state.network.graph.output
    row = row_bytes(state.network, state.dtype)
    A = C.transpose(0, 1)
    found = [
        joined(
            [reduce(torch.fmax, lower_bounds(part, output, A[rows, span], tail)) for rows in cuts],
            0,
        )
        for part, span, cuts in parts(state, [len(A)] * state.batch, row)
    ]
    return at_reference(state, C, d) + joined(found, 1).T


_FIRST = _checked(recorded(_crown_ibp, fills=True))
_LAST = _checked(recorded(functionals))


def parts(state: State, counts: list[int], row: int) -> Iterator[tuple[State, slice, list[slice]]]:
    """Cut a batch with ``counts`` rows per example into runs of examples, and those into row ranges, so that
    one piece fits the budget: big examples alone, small ones together."""
    limit = max(1, state.budget // row)  # rows of so many bytes in one piece
    first = 0
    while first < state.batch:
        last, widest = first + 1, counts[first]
        alone = 4 * widest > limit  # then columns of one example's own pay
        while not alone and last < state.batch:
            if max(widest, counts[last]) * (last + 1 - first) > limit:
                break
            widest = max(widest, counts[last])
            last += 1
        span = slice(first, last)
        step = max(2, limit // (last - first) // 2 * 2)  # an element's two rows stay together
        whole = first == 0 and last == state.batch
        cuts = [slice(i, i + step) for i in range(0, widest, step)]
        yield state if whole else state.part(span), span, cuts
        first = last


def tightener(
    state: State, *, raw: bool = False, most: int | None = None, stable: bool = False
) -> Callable[[State, Node], None]:
    """Improve, before a nonlinear node reads them, the intervals of its operands' elements that matter.

    Args:
        raw: every element's interval is replaced by what the backward pass alone gives.
        most: a value of which more elements than this matter in an example is left as it is.
        stable: of an element that one bound shows to be on one side of a kink, the other bound is left as it is, if it
            changes no later one.
    """
    status = state.facts.exactness
    box = math.isinf(state.region.p)
    done = set(state.network.graph.inputs)

    def tighten(state: State, node: Node) -> None:
        kind = state.kind(node)
        if isinstance(kind, Affine):
            return
        for name in node.operands:
            if name not in state.network.graph.active or name in done:
                continue
            done.add(name)
            if box and status[name] != "loose":
                continue
            mask = undecided(state, node, kind, name)
            if most is not None and int(mask.sum(1).max()) > most:
                continue
            kink = kink_of(state, name) if stable else None
            if kink is None:
                refine(state, name, torch.ones_like(mask) if raw else mask, meet=not raw)
                continue
            refine(state, name, mask, partial(side_bounds, kink=kink), sides=1)
            mask &= undecided(state, node, kind, name)
            refine(state, name, mask, partial(side_bounds, kink=kink, second=True), sides=1)

    return tighten


def kink_of(state: State, name: str) -> float | None:
    """Where all that read a value nonlinearly have their only kink, if only affine ops follow: then nobody asks for the
    intervals of what is on one side of it. None also without convolutions: through dense layers alone, the two rows of
    an element share their products, and a second walk for some of them costs what it saves."""
    if not any(step.node.op is torch.conv2d for step in state.facts.steps):
        return None
    readers = [s for s in state.facts.steps if name in s.reads and not isinstance(s.kind, Affine)]
    after = {s.node.name for s in readers}
    kinks: set[tuple[float, ...]] = set()
    for step in readers:
        if not isinstance(step.kind, Activation) or step.kind.pieces is None:
            return None
        kinks.add(step.kind.pieces(*state.arguments(step.node)[0][1:]).points)
    last = all(s.node.name in state.facts.tail for s in state.facts.steps if after & {*s.reads})
    (points,) = kinks if len(kinks) == 1 else ((),)
    return points[0] if last and len(points) == 1 else None


def undecided(
    state: State, node: Node, kind: Activation | Bilinear | Extremum, name: str
) -> Tensor:
    """Mask of the elements (B, N) whose tighter bounds would tighten the node's relaxation."""
    known = state.boxes[name]
    if isinstance(kind, Activation):
        args, kwargs = state.arguments(node)
        return flat(~kind.linear(known, *args[1:], **kwargs))
    return flat(torch.ones_like(known.lower, dtype=torch.bool))


def nonlinear_operands(state: State) -> dict[str, Tensor]:
    """The values that nonlinear nodes read, in order, and which of their elements matter there: (B, N)."""
    found: dict[str, Tensor] = {}
    for step in state.facts.steps:
        kind = state.kind(step.node)
        if isinstance(kind, Affine):
            continue
        for name in step.reads:
            if name not in state.network.graph.inputs:
                mask = undecided(state, step.node, kind, name)
                found[name] = found[name] | mask if name in found else mask
    return found


def refine(
    state: State,
    name: str,
    mask: Tensor,
    bounds: Callable[[State, str, Tensor], Interval] = both_bounds,
    *,
    meet: bool = True,
    sides: int = 2,
) -> None:
    """Meet the interval of ``name`` with the one from ``bounds`` on the elements of ``mask`` (B, N); without ``meet``,
    when it has to be all of them, put it in its place. ``sides``: rows that ``bounds`` takes for an element."""
    counts = mask.sum(1).tolist()
    if not any(counts):
        return
    known = state.boxes[name]
    found = Interval(*(flat(torch.full_like(end, x)) for end, x in zip(known, LIMITS, strict=True)))
    row = row_bytes(state.network, state.dtype)
    small = elements(state.network.graph, state.env, name, state.network.input_shape)
    if small is not None:
        row = min(row, 6 * state.dtype.itemsize * small)
    for part, span, cuts in parts(state, [sides * c for c in counts], row):
        index, filled = _positions(mask[span], counts[span])
        ends = [
            bounds(part, name, index[:, cut.start // sides : cut.stop // sides].T) for cut in cuts
        ]
        for whole, pieces, x in zip(found, zip(*ends, strict=True), LIMITS, strict=True):
            new = joined(list(pieces), 0).T
            # the elements that fill up a shorter list stay as they were, lest bounds depend on the rest of the batch
            whole[span].scatter_(1, index, new if filled is None else new.masked_fill(filled, x))
    shaped = Interval(*(end.reshape(known.lower.shape) for end in found))
    state.replace(name, met(known, shaped) if meet else shaped)


LIMITS = -math.inf, math.inf  # what says nothing, below and above


def _positions(mask: Tensor, counts: list[int]) -> tuple[Tensor, Tensor | None]:
    """Each example's wanted positions, (B, most); where shorter lists are filled up with others, which of them these
    are."""
    if len(counts) == 1:
        return mask.nonzero()[:, 1].unsqueeze(0), None
    order = mask.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    index = order[:, : max(counts)]
    return index, None if min(counts) == max(counts) else ~mask.gather(1, index)
