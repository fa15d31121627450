"""Bounds whose lines are chosen: optimised for each functional (alpha-CROWN), or parallel (the Wong-Kolter dual).

Any choice of lines gives a bound, so an optimiser can only fail to help: `ascend` keeps the best value it saw.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from calipers.bounds.interval import propagate
from calipers.bounds.ladder import (
    Statistics,
    at_reference,
    chunked,
    crown_over_ibp,
    functionals,
    interval_bounds,
    nonlinear_operands,
    parts,
    refine,
    tightener,
)
from calipers.bounds.linear import Bend, both_bounds, deviations, look, lower_bounds
from calipers.bounds.patches import Patch, Rows, clip, dense
from calipers.bounds.planner import row_bytes
from calipers.bounds.state import State, check_spec, detached, flat, joined
from calipers.graph.graph import Network, Node
from calipers.ops.kinds import Activation
from calipers.sets import Interval, Region
from calipers.spec import Spec


class Choice(NamedTuple):
    """The two numbers of `Tuned` for each coefficient of an activation's rows, what their lines are made of, and the
    windows that they lie on, if any."""

    lower: Tensor
    upper: Tensor
    box: Interval
    z: Tensor
    out: Tensor
    windows: Patch | None = None


class OwnLines:
    """Lines of every row's own, by activation; they begin where `Tuned.start` says."""

    windows = True

    def __init__(self, numbers: Mapping[str, tuple[Tensor, Tensor]] | None = None) -> None:
        self.choices: dict[str, Choice] = {}
        self.numbers = numbers or {}  # lines that were chosen before

    @property
    def leaves(self) -> list[Tensor]:
        """What can be optimised; a tensor that serves both sides once."""
        both = {id(v): v for c in self.choices.values() for v in (c.lower, c.upper)}
        return [v for v in both.values() if v.requires_grad]

    def pulled(self, state: State, kind: Activation, node: Node, A: Rows) -> tuple[Rows, Tensor]:
        c = self.choices.get(node.name)
        if c is None:
            c = self.choices[node.name] = self._begin(state, kind, node, A)
        lines = deviations(state, kind, node, c.box, c.z, c.out, (c.lower, c.upper))
        data = clip(A, node.shape).data if isinstance(A, Patch) else A
        rows, bias = Bend.apply(data, *lines)  # type: ignore[no-untyped-call]
        return A.moved(rows, clipped=True) if isinstance(A, Patch) else rows, bias

    def _begin(self, state: State, kind: Activation, node: Node, A: Rows) -> Choice:
        args, _ = state.arguments(node)
        box, shape = (
            state.boxes[node.operands[0]],
            A.shape if isinstance(A, Tensor) else A.data.shape,
        )
        values: tuple[Tensor, ...] = (*box, args[0], state.env[node.name])
        if isinstance(A, Patch):
            values = look(state, f"context of {node.name}", torch.cat(values, 1), A).chunk(4, 2)
        box, z, out = Interval(*values[:2]), values[2], values[3]
        windows = A if isinstance(A, Patch) else None
        if kind.tuned is None:
            none = box.lower.new_zeros(())
            return Choice(none, none, box, z, out)

        if node.name in self.numbers:
            return Choice(*self.numbers[node.name], box, z, out, windows)

        def leaf(value: Tensor) -> Tensor:
            return value.detach().expand(shape).clone().requires_grad_(torch.is_grad_enabled())

        lower, upper = kind.tuned.start(box, *args[1:])
        first = leaf(lower)
        return Choice(first, first if upper is lower else leaf(upper), box, z, out, windows)


class Best:
    """The numbers of the lines that gave every row its best bound."""

    levels: int | None = None  # all are multiples of one in so many

    def __init__(self) -> None:
        self.numbers: dict[str, tuple[Tensor, Tensor]] = {}

    def take(self, better: Tensor, chosen: OwnLines) -> None:
        """Keep the numbers of the rows that are ``better`` (S, B) now."""
        for name, choice in chosen.choices.items():
            if not choice.lower.ndim:
                continue
            new = (choice.lower.detach(), choice.upper.detach())
            old = self.numbers.get(name, new)
            some = better.reshape(*better.shape, *[1] * (new[0].ndim - 2))
            lower, upper = (torch.where(some, n, o) for n, o in zip(new, old, strict=True))
            self.numbers[name] = lower, upper


class Kept:
    """The numbers of the lower lines that gave every row its best bound, in 255ths."""

    levels: int | None = 255

    def __init__(self) -> None:
        self.bytes: dict[str, Tensor] = {}
        self.windows: dict[str, Patch | None] = {}

    def take(self, better: Tensor, chosen: OwnLines) -> None:
        """Keep the numbers of the rows that are ``better`` (S, B) now."""
        for name, choice in chosen.choices.items():
            if not choice.lower.ndim:
                continue
            new = (choice.lower.detach() * 255).round_().to(torch.uint8)
            old = self.bytes.get(name)
            some = better.reshape(*better.shape, *[1] * (new.ndim - 2))
            self.bytes[name] = new if old is None else torch.where(some, new, old)
            self.windows[name] = choice.windows

    def dense(self, state: State) -> dict[str, Tensor]:
        """(S, B, elements) by activation."""
        found = {}
        for name, value in self.bytes.items():
            window = self.windows[name]
            whole = (
                dense(window.moved(value, clipped=False), state.shape(name)) if window else value
            )
            found[name] = whole.flatten(2)
        return found


Evaluate = Callable[[OwnLines], Tensor]
Search = Callable[[Evaluate, int, Kept | None], Tensor]  # of so many steps, see `ascend`
Keep = Callable[[str, Tensor, Interval, dict[str, Tensor]], None]


def alpha_crown(
    network: Network,
    region: Region,
    spec: Spec,
    *,
    steps: int = 8,
    intermediate_steps: int = 3,
    share: float = 0.995,
    stop: bool = True,
    dtype: torch.dtype | None = None,
    rigorous: bool = False,
    memory: int | None = None,
    statistics: Statistics | None = None,
) -> Tensor:
    """Lower bounds by CROWN with lines optimised for each functional, never below `crown`'s.

    First the intermediate bounds that the functionals depend on most are tightened, each with lines of its own; then
    the functionals' own lines are optimised.

    Args:
        steps: ascent steps for the functionals.
        intermediate_steps: ascent steps for intermediate bounds; 0 leaves them as CROWN found them.
        share: of all that the functionals could gain from intermediate bounds (to first order), how much is pursued.
        stop: leave out examples and functionals that are already proved.

    Differentiable in the parameters and in the region's centre: the lines are found without gradients, then all bounds
    are computed once more with them, and lines do not move (envelope theorem; exact for the lines found).

    Sound: as `crown`, for any choice of lines; ``rigorous`` covers every step.
    Cost: a step is about two of `crown`'s passes over the rows that take part; gradients keep all rows of the last.
    Reference: Xu et al. 2021 (alpha-CROWN), section 3.1.
    """
    if steps < 0 or intermediate_steps < 0 or not 0 <= share <= 1:
        raise ValueError(
            f"steps: {steps}, intermediate_steps: {intermediate_steps} must not be negative, "
            f"share: {share} must lie in [0, 1]"
        )
    run = partial(
        _alpha, steps=steps, intermediate_steps=intermediate_steps, share=share, stop=stop
    )
    return chunked(run, network, region, spec, dtype, rigorous, memory, statistics)


def dual(
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
    """The dual bound: one backward pass with parallel lines over pre-activation bounds from the same pass.

    Never below `interval`'s, whose ends its own pre-activation bounds also respect, unless ``raw`` asks for the paper's
    algorithm alone: every neuron's bounds by the dual pass itself.

    Sound: as `crown`, of which it is the special case of parallel lines. Arguments as in `interval`.
    Cost: as `crown`; with ``raw`` two backward rows for every neuron.
    Reference: Wong and Kolter 2018, Theorem 1 and Algorithm 1.
    """
    run = partial(dual_bounds, raw=raw)
    return chunked(run, network, region, spec, dtype, rigorous, memory, statistics)


def parallel(kind: Activation, box: Interval, args: Sequence[Any]) -> tuple[Tensor, Tensor] | None:
    """The choice that makes a kink's line through the origin parallel to the chord."""
    if kind.tuned is None or kind.pieces is None or len(kind.pieces(*args).points) != 1:
        return None
    zero = torch.zeros_like(box.lower)
    first, last = (kind.tuned.lines(box, v, v, *args) for v in (zero, zero + 1))

    def share(start: Tensor, end: Tensor, target: Tensor) -> Tensor:
        span = end - start
        return torch.where(span != 0, (target - start) / torch.where(span != 0, span, 1.0), zero)

    lower = share(first.lower_slope, last.lower_slope, first.upper_slope)
    return lower, share(first.upper_slope, last.upper_slope, first.lower_slope)


def dual_bounds(state: State, spec: Spec, *, raw: bool) -> Tensor:
    C, d = check_spec(state, spec)
    weak = None if raw else interval_bounds(state, spec)
    state.choose = parallel
    propagate(state, tighten=tightener(state, raw=raw), until=state.network.graph.output)
    found = functionals(state, C, d)
    return found if weak is None else torch.maximum(found, weak)


# -- optimised lines ------------------------------------------------------------------------------------------------


def ascend(
    evaluate: Evaluate,
    *,
    steps: int,
    rate: float = 0.5,
    decay: float = 0.75,
    kept: Kept | Best | None = None,
) -> Tensor:
    """The best bounds that ``evaluate`` gave along ``steps`` steps of Adam on the lines, projected to [0, 1].

    Args:
        evaluate: bounds, of any shape, under the lines given.
        rate: first step, in units of the whole interval of choices; ``decay`` times as long in each further step.
        kept: takes the numbers behind the bounds.
    """
    chosen = OwnLines()
    moments: list[tuple[Tensor, Tensor]] = []
    best: Tensor | None = None
    for i in range(steps + 1):
        with torch.set_grad_enabled(i < steps):
            bound = evaluate(chosen)
            total = bound.sum()
        value = bound.detach()
        better = torch.ones_like(value, dtype=torch.bool) if best is None else value > best
        best = value if best is None else torch.where(better, value, best)
        if kept is not None:
            kept.take(better, chosen)
        if not total.requires_grad:  # the last step, or nothing depends on lines
            break
        leaves = chosen.leaves
        if not leaves:  # no line to choose
            break
        grads = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
        moments = moments or [(torch.zeros_like(g), torch.zeros_like(g)) for g in grads]
        with torch.no_grad():
            for leaf, (mean, square), grad in zip(leaves, moments, grads, strict=True):
                mean.lerp_(grad, 0.1)
                square.mul_(0.999).addcmul_(grad, grad, value=0.001)
                size = (square / (1 - 0.999 ** (i + 1))).sqrt_().add_(1e-12)
                leaf.addcdiv_(mean, size, value=rate * decay**i / (1 - 0.9 ** (i + 1)))
                leaf.clamp_(0, 1)
                if kept is not None and kept.levels:
                    leaf.mul_(kept.levels).round_().div_(kept.levels)
    if best is None:
        raise ValueError(f"steps: {steps} is negative")
    return best


def searching(evaluate: Evaluate, steps: int, kept: Kept | None = None) -> Tensor:
    return ascend(evaluate, steps=steps, kept=kept)


@dataclass
class Log:
    """What the optimisation of one batch decided, to be done again with gradients: a bound is the largest over all
    lines, so its derivative is that at the lines found (envelope theorem).

    Args:
        wanted: the functionals that were optimised, (B, M).
        values: the elements of each intermediate value that were, (B, N), in order.
        lines: of each search, in order.
    """

    wanted: Tensor | None = None
    values: dict[str, Tensor] = field(default_factory=dict)
    lines: list[dict[str, tuple[Tensor, Tensor]]] = field(default_factory=list)

    def record(self, evaluate: Evaluate, steps: int, _: Kept | None = None) -> Tensor:
        best = Best()
        found = ascend(evaluate, steps=steps, kept=best)
        self.lines.append(best.numbers)
        return found

    def replay(self, evaluate: Evaluate, _steps: int, _: Kept | None = None) -> Tensor:
        return evaluate(OwnLines(self.lines.pop(0)))


def _alpha(
    state: State, spec: Spec, *, steps: int, intermediate_steps: int, share: float, stop: bool
) -> Tensor:
    searched = partial(
        _optimised, steps=steps, intermediate_steps=intermediate_steps, share=share, stop=stop
    )
    log = Log() if _tracked(state) else None
    with torch.no_grad():
        found = searched(detached(state), spec, log=log)
    return _with_gradients(state, spec, log) if log else found


def _tracked(state: State) -> bool:
    """Whether gradients are wanted."""
    values = [*state.env.values(), state.frame.above, *state.frame.hull]
    return torch.is_grad_enabled() and any(
        isinstance(v, Tensor) and v.requires_grad for v in values
    )


def _optimised(
    state: State,
    spec: Spec,
    *,
    steps: int,
    intermediate_steps: int,
    share: float,
    stop: bool,
    log: Log | None = None,
) -> Tensor:
    best = crown_over_ibp(state, spec)
    wanted = ~(spec.clauses(best) > 0) if stop else best.new_ones(len(best), spec.count).bool()
    wanted = wanted[:, spec.clause]
    if not wanted.any() or not steps:
        return best
    if log:
        log.wanted = wanted
    search = log.record if log else searching
    rows, some, part = _open(state, spec, wanted)
    C, d = check_spec(some, part)
    if intermediate_steps:
        names = tighten(some, C, wanted[rows], steps=intermediate_steps, share=share, search=search)
        if log:
            log.values = names
    found = ascended(some, C, d, wanted[rows], steps=steps, search=search)
    return torch.maximum(best, best.index_copy(0, rows, found))


def _open(state: State, spec: Spec, wanted: Tensor) -> tuple[Tensor, State, Spec]:
    """The examples of which some functional is ``wanted``, alone."""
    rows = torch.nonzero(wanted.any(1)).flatten()
    return rows, state if len(rows) == len(wanted) else state.select(rows), spec[rows]


def _with_gradients(state: State, spec: Spec, log: Log) -> Tensor:
    """The bounds under the lines of ``log``, intermediate ones included."""
    best = crown_over_ibp(state, spec)
    if log.wanted is None:
        return best
    rows, some, part = _open(state, spec, log.wanted)
    C, d = check_spec(some, part)
    for name, mask in log.values.items():
        refine(some, name, mask, partial(_optimised_box, steps=0, search=log.replay))
        some.cache.clear()
    found = ascended(some, C, d, log.wanted[rows], steps=0, search=log.replay)
    return torch.maximum(best, best.index_copy(0, rows, found))


def ascended(
    state: State,
    C: Tensor,
    d: Tensor,
    wanted: Tensor,
    *,
    steps: int,
    keep: Callable[[Tensor, dict[str, Tensor]], None] | None = None,
    search: Search = searching,
) -> Tensor:
    """Bounds of the functionals, (B, M), −inf where they are not ``wanted``.

    Args:
        keep: of one example, told the numbers of some functionals (S,) and of their lines (S, elements), by activation.
    """
    output = state.network.graph.output
    most = int(wanted.sum(1).max())
    order = wanted.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]
    rows = C.gather(1, order.unsqueeze(2).expand(-1, -1, C.shape[2])).transpose(0, 1)
    values = at_reference(state, C, d).gather(1, order)
    found = []
    for part, span, cuts in parts(state, [most] * state.batch, _row(state)):
        pieces = []
        for cut in cuts:
            kept = Kept() if keep else None
            pieces.append(
                search(
                    lambda chosen, A=rows[cut, span], part=part: lower_bounds(  # type: ignore[misc]
                        part, output, A, chosen=chosen
                    )[0],
                    steps,
                    kept,
                )
            )
            if keep and kept:
                keep(order[0, cut], {k: v[:, 0] for k, v in kept.dense(part).items()})
        found.append(joined(pieces, 0).T + values[span])
    bounds = joined(found, 0)
    low = bounds.new_full(d.shape, -torch.inf).scatter(1, order, bounds)
    return torch.where(wanted, low, -torch.inf)


def _row(state: State) -> int:
    """Working memory of one row under optimisation: what every activation keeps."""
    return 4 * row_bytes(state.network, state.dtype)


def tighten(
    state: State,
    C: Tensor,
    wanted: Tensor,
    *,
    steps: int,
    share: float,
    keep: Keep | None = None,
    search: Search = searching,
) -> dict[str, Tensor]:
    """Optimise the intermediate bounds on which the ``wanted`` (B, M) functionals depend most, from the input on:
    the elements (B, N) that were chosen, by value.

    Args:
        keep: of one example, told a value's name, some elements (S,), their bounds, and the numbers of the lines that
            gave these, (2S, elements), lower sides first, by activation.
    """
    names = nonlinear_operands(state)
    status = state.facts.exactness
    names = {k: v for k, v in names.items() if status[k] == "loose" or state.region.p < torch.inf}
    if not names:
        return {}
    gains = _gains(state, C * wanted.unsqueeze(2), list(names))
    chosen = {name: mask & _first(gains[name] * mask, share) for name, mask in names.items()}
    for name, mask in chosen.items():
        refine(state, name, mask, partial(_optimised_box, steps=steps, keep=keep, search=search))
        state.cache.clear()
    return chosen


def _optimised_box(
    part: State,
    name: str,
    index: Tensor,
    *,
    steps: int,
    keep: Keep | None = None,
    search: Search = searching,
) -> Interval:
    """`both_bounds` with lines of each row's own."""

    def evaluate(chosen: OwnLines) -> Tensor:
        low, high = both_bounds(part, name, index, chosen)
        return torch.cat([low, -high])

    kept = Kept() if keep else None
    found = search(evaluate, steps, kept)
    box = Interval(found[: len(index)], -found[len(index) :])
    if keep and kept:
        numbers = {k: v[:, 0] for k, v in kept.dense(part).items()}
        keep(name, index[:, 0], Interval(*(end[:, 0] for end in box)), numbers)
    return box


def _first(gain: Tensor, share: float) -> Tensor:
    """The largest entries of each row that make up ``share`` of its sum, as a mask."""
    ordered, index = gain.sort(1, descending=True)
    before = ordered.cumsum(1) - ordered
    return torch.zeros_like(gain, dtype=torch.bool).scatter(
        1, index, before < share * ordered.sum(1, keepdim=True)
    )


def _gains(state: State, C: Tensor, names: list[str]) -> dict[str, Tensor]:
    """How much the sum of the functionals' bounds would gain, to first order, if a value's interval closed: (B, N)."""
    known = dict(state.boxes)
    leaves = {n: Interval(*(v.clone().requires_grad_() for v in known[n])) for n in names}
    state.boxes.update(leaves)
    with torch.enable_grad():
        (bound,) = lower_bounds(
            state, state.network.graph.output, C.transpose(0, 1), chosen=OwnLines()
        )
        ends = [v for n in names for v in leaves[n]]
        grads = iter(
            torch.autograd.grad(bound.sum(), ends, allow_unused=True, materialize_grads=True)
            if bound.requires_grad
            else [torch.zeros_like(v) for v in ends]
        )
    state.boxes.update({n: known[n] for n in names})
    state.cache.clear()
    return {
        n: flat((next(grads).abs() + next(grads).abs()) * (known[n].upper - known[n].lower))
        for n in names
    }
