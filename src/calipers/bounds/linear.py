"""Linear bounds backward (CROWN): rows of functionals pulled back through the graph.

For rows A of a value h with reference z, the walk keeps A·(h − z) ≥ Σ A_v·(v − z_v) + bias over fewer and earlier
values v, and concretises at the input by the region's exact support function. An affine op is its transpose; an
activation picks the lower line where A ≥ 0 and the upper one where A < 0; written with the lines' mean and
difference, A ↦ A·mid − |A|·bend/2. Upper bounds are lower bounds of −A: both sides share every step until the first
activation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from calipers.bounds import patches
from calipers.bounds.patches import Parts, Patch, Rows
from calipers.bounds.planes import bilinear, extremum
from calipers.bounds.state import State, absolute, at, dot, flat
from calipers.graph.graph import Node
from calipers.ops import Step
from calipers.ops.affine import AFFINE
from calipers.ops.kinds import Activation, Affine, Bilinear, Extremum, Kind, Lines
from calipers.sets import Interval

MANY = 64  # rows of one example from which on picking the columns that count pays


class Chosen(Protocol):
    """Lines, and multipliers, that are each row's own; ``windows``: whether it also knows those of a `Patch`."""

    @property
    def windows(self) -> bool: ...

    def pulled(self, state: State, kind: Activation, node: Node, A: Rows) -> tuple[Rows, Tensor]:
        """The rows ``A`` of an activation pulled back to its operand, and what that adds to the bounds: in deviations
        from the reference (`deviations`), rounding subtracted."""
        ...


def lower_bounds(
    state: State,
    name: str,
    A: Tensor,
    tail: Collection[str] = (),
    *,
    last: bool = True,
    chosen: Chosen | None = None,
) -> list[Tensor]:
    """Lower bounds of A·(h − z) for rows ``A`` (S, B, *shape) of the value ``name``: (S, B) each.

    Args:
        tail: values; if given there is one more bound, first in the list: where the walk leaves them, what it
            has reached is concretised by its intervals.
        last: go on to the input for one more bound.
        chosen: lines of the rows' own.
    """
    pull = _Pull(state, name, chosen)
    pull.rows[name] = pull.given = A
    totals = []
    if tail:
        pull.walk(tail)
        totals.append(pull.total(own=not last))
    if last:
        pull.walk()
        totals.append(pull.total(own=True))
    return totals


def linear_bounds(
    state: State, name: str, A: Tensor, chosen: Chosen | None = None
) -> tuple[Tensor, Tensor]:
    """Rows G (S, B, *x) and offsets b (S, B) with A·(h − z) ≥ G·(x − z_x) + b on the region, for rows ``A`` of the
    value ``name``; the rounding of all but the product with G is subtracted in b."""
    pull = _Pull(state, name, chosen)
    pull.rows[name] = A
    pull.walk()
    (source,) = state.network.graph.inputs
    rows = _dense(pull.rows[source], state.shape(source))
    return rows, rows.new_zeros(rows.shape[:2]) if pull.bias is None else pull.bias


def at_the_input(state: State, name: str, A: Tensor, chosen: Chosen) -> tuple[Tensor, Tensor]:
    """Rows ``A`` (S, B, *shape) of a value pulled back to the input, and their `lower_bounds`."""
    rows, bias = linear_bounds(state, name, A, chosen)
    return rows, concretise(state, state.network.graph.inputs[0], rows) + bias


def both_bounds(state: State, name: str, index: Tensor, chosen: Chosen | None = None) -> Interval:
    """Bounds of the elements ``index`` (S, B), flat positions of the value ``name``: (S, B) each."""
    z = flat(state.env[name]).gather(1, index.T).T
    low, high = _Pull(state, name, chosen).elements_at(index)
    # adding the reference value rounds once more
    slack: Tensor | float = 0.0
    if state.rigorous:
        slack = state.gamma(1) * (z.abs() + torch.maximum(low.abs(), high.abs())) + state.tiny
    return Interval(z + low - slack, z + high + slack)


def side_bounds(
    state: State, name: str, index: Tensor, *, kink: float, second: bool = False
) -> Interval:
    """One bound of each of the elements ``index`` (S, B), the other one infinite: the one that its reference says will
    keep it on one side of ``kink``; or the ``second``."""
    z = flat(state.env[name]).gather(1, index.T).T
    up = (z < kink) != second
    low = _Pull(state, name).sides_at(index, torch.where(up, -1.0, 1.0).to(state.dtype))
    if state.rigorous:
        low = low - (state.gamma(1) * (z.abs() + low.abs()) + state.tiny)
    return Interval(torch.where(up, -math.inf, z + low), torch.where(up, z - low, math.inf))


class _Pull:
    """One backward walk. ``rows`` holds what is still to be pulled back, ``bias`` what has been settled."""

    def __init__(self, state: State, name: str, chosen: Chosen | None = None) -> None:
        self.state, self.name, self.chosen = state, name, chosen
        self.rows: dict[str, Rows] = {}
        self.bias: Tensor | None = None
        self.given: Tensor | None = None  # rows that are somebody else's
        self.elements = self.mirrored = False
        self.settled: set[str] = set()  # affine values whose rounding is in the bias already

    def elements_at(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Lower and upper bounds of unit rows."""
        self.elements = True
        self._begin(index)
        self.walk()
        if not self.mirrored:
            return self.total(), -self.total(-1.0)
        low = self.total(own=True)
        half = len(low) // 2
        return low[:half], -low[half:]

    def sides_at(self, index: Tensor, sign: Tensor) -> Tensor:
        """Lower bounds of unit rows times ``sign`` (S, B)."""
        self._begin(index)
        for name, rows in self.rows.items():
            data = rows if isinstance(rows, Tensor) else rows.data
            signed = data * sign.reshape(*sign.shape, *[1] * (data.ndim - 2))
            self.rows[name] = signed if isinstance(rows, Tensor) else rows.moved(signed)
        self.walk()
        return self.total(own=True)

    def _begin(self, index: Tensor) -> None:
        """Unit rows, already taken through an affine op."""
        node = self.state.network.graph.node[self.name]
        kind = self.state.kind(node)
        rows = _unit_rows(self.state, kind, node, index)
        if rows is not None:
            noise = _affine_noise(self.state, kind, node)  # type: ignore[arg-type]
            if noise is not None:
                self.bias = -flat(noise).gather(1, index.T).T
            self.rows[node.operands[0]] = rows
        else:
            count = math.prod(node.shape)
            A = torch.zeros(*index.shape, count, dtype=self.state.dtype, device=index.device)
            A.scatter_(2, index.unsqueeze(2), 1.0)
            self.rows[self.name] = A.reshape(*index.shape, *node.shape)

    def walk(self, within: Collection[str] | None = None) -> None:
        """Pull everything back to the input, or out of the values ``within``."""
        for step in reversed(self.state.facts.steps):
            name = step.node.name
            if name in self.rows and (within is None or name in within):
                self._step(step, self.rows.pop(name))

    def total(self, sign: float = 1.0, *, own: bool = False) -> Tensor:
        """The bound over what is left, concretised; with ``own`` the rows are not needed any more."""
        parts = []
        for name, A in self.rows.items():
            kept = self.given is not None and isinstance(A, Tensor) and _shared(A, self.given)
            rows = A if sign > 0 else -A
            parts.append(concretise(self.state, name, rows, own=own and not kept))
        if isinstance(self.bias, Tensor):
            parts.append(self.bias)
        return sum(parts[1:], parts[0])

    def _step(self, step: Step, A: Rows) -> None:
        state, node, kind = self.state, step.node, step.kind
        state.spend(math.prod((A if isinstance(A, Tensor) else A.data).shape[:2]))
        if isinstance(A, Patch) and not (
            isinstance(kind, (Affine, Activation)) and patches.worthwhile(A, node.shape)
        ):
            A = patches.dense(A, node.shape)
        split = self.elements and not self.mirrored and not isinstance(kind, Affine)
        if split:
            self._mirror()
        bias: Tensor | None
        if isinstance(kind, Affine):
            parts, bias = _affine(state, step, A, noisy=node.name not in self.settled)
        elif not isinstance(kind, Activation):
            parts, bias = RULES[type(kind)](state, step, _mirrored(A) if split else A)
        elif self.chosen is not None:
            pulled = _mirrored(A) if split else A
            if isinstance(pulled, Patch) and not self.chosen.windows:
                pulled = patches.dense(pulled, node.shape)
            pulled, bias = self.chosen.pulled(state, kind, node, pulled)
            parts = {0: pulled}
        elif isinstance(A, Tensor) and (linear := _dense_linear_before(state, node, A.shape[0])):
            parts, bias = _activation_and_linear(state, kind, node, linear, A, split)
            node = linear
        else:
            alone = isinstance(A, Tensor) and _noise_before(state, node) is not None
            if alone:
                self.settled.add(node.operands[0])
            parts, bias = activation(state, kind, node, A, split, noisy=alone)
        lost = _underflow(state, step, node)
        if lost is not None:
            bias = (
                (-lost).expand(_count(next(iter(parts.values()))), -1)
                if bias is None
                else bias - lost
            )
        if bias is not None:
            self.bias = bias if self.bias is None else self.bias + bias
        for index, rows in parts.items():
            name = node.operands[index]
            known = self.rows.get(name)
            self.rows[name] = rows if known is None else _sum(known, rows, state.shape(name))

    def _mirror(self) -> None:
        """From here on lower and upper side differ: every row is followed by its negative."""
        self.mirrored = True
        self.rows = {k: _mirrored(v) for k, v in self.rows.items()}
        if isinstance(self.bias, Tensor):  # so far only rounding, the same for both
            self.bias = torch.cat([self.bias, self.bias])


def _count(A: Rows) -> int:
    return (A if isinstance(A, Tensor) else A.data).shape[0]


def _shared(A: Tensor, B: Tensor) -> bool:
    return A.untyped_storage().data_ptr() == B.untyped_storage().data_ptr()


def _mirrored(A: Rows) -> Rows:
    return A.mirrored() if isinstance(A, Patch) else torch.cat([A, -A])


def _dense(A: Rows, shape: tuple[int, ...]) -> Tensor:
    return patches.dense(A, shape) if isinstance(A, Patch) else A


def _sum(first: Rows, second: Rows, shape: tuple[int, ...]) -> Rows:
    if isinstance(first, Patch) and isinstance(second, Patch):
        total = patches.added(first, second)
        if total is not None:
            return total
    return _dense(first, shape) + _dense(second, shape)


def _unit_rows(state: State, kind: Kind, node: Node, index: Tensor) -> Rows | None:
    """Rows of the op's own matrix, where it can give them without unit vectors."""
    args, kwargs = state.arguments(node)
    if not isinstance(kind, Affine):
        return None
    if node.op is torch.conv2d:
        return patches.start(node, index, args[1])
    rows: Tensor | None = kind.rows(index, *args, **kwargs) if kind.rows else None
    return rows


def concretise(state: State, name: str, A: Rows, *, own: bool = False) -> Tensor:
    """min A·(v − z) over what is known of the value ``name``: the region at the input, its interval elsewhere. With
    ``own`` A may be overwritten."""
    size: Tensor | None = (
        None  # how far the value may lie from its reference, where that is all there is
    )
    if name not in state.network.graph.inputs:
        size = state.once("deviation", name, deviation)
    elif math.isinf(state.region.p) and state.frame.bounded:
        size = state.frame.above  # the reference is the middle of the box
    if size is not None and isinstance(A, Patch) and name in state.network.graph.inputs:
        low = -_patch_dot(state, name, A.moved(A.data.abs()), size)
        count = math.prod(A.data.shape[2:])
    else:
        if isinstance(A, Patch):
            A = patches.dense(A, state.shape(name))
        if size is None:
            return _over_region(state, name, A)
        low = -dot(A, size, size=True, own=own)
        count = math.prod(A.shape[2:])
    return low * (1 + state.gamma(count + 4)) - state.tiny if state.rigorous else low


def _over_region(state: State, name: str, A: Tensor) -> Tensor:
    """`concretise` at the input, for a region that is no bounded box."""
    symmetric = math.isinf(state.region.p)
    low = -state.region.reach(A if symmetric else -A, state.frame)
    if not symmetric:
        low = low + dot(A, state.once("shift", name, lambda s, n: s.frame.origin - s.env[n]))
    if not state.rigorous:
        return low
    size = state.once("deviation", name, deviation)
    far = dot(A, size, size=True)
    gamma = state.gamma(math.prod(A.shape[2:]) + 4)
    if state.region.p == 2 and bool((state.region.outer_eps < _SQUARES[state.dtype]).any()):
        low = -far  # the ball's own value has squares that underflow
    return low - (gamma * far + 4 * state.tiny)


# radii from here on have squares that keep their digits
_SQUARES = {torch.float32: 1e-13, torch.float64: 1e-146}


def deviation(state: State, name: str) -> Tensor:
    """How far the value may lie from its reference."""
    box, z = state.boxes[name], state.env[name]
    if not state.rigorous and name in state.widths and name not in state.off_centre:
        return 0.5 * state.widths[name]
    return torch.maximum(z - box.lower, box.upper - z)


def look(state: State, what: str, v: Tensor, A: Patch) -> Tensor:
    """The windows of ``v`` that rows lie on; the table of all of them serves every chunk of rows."""
    h, w = A.data.shape[-2:]
    key = (f"{what} {h} {w} {A.grid}", "table")
    if key not in state.cache:
        state.cache[key] = patches.table(v, h, w, A.grid)
    return patches.windows(state.cache[key], A)


def _patch_dot(state: State, what: str, A: Patch, v: Tensor) -> Tensor:
    return (A.data * look(state, what, v, A)).flatten(2).sum(-1)


# -- affine -------------------------------------------------------------------------------------------------


def _affine(
    state: State, step: Step, A: Rows, *, noisy: bool = True
) -> tuple[Parts, Tensor | None]:
    node, active = step.node, step.perturbed
    kind: Affine = step.kind  # type: ignore[assignment]
    args, _ = state.arguments(node)
    noise = _affine_noise(state, kind, node) if noisy else None
    bias: Tensor | None = None
    parts: Parts = {}
    if isinstance(A, Patch):
        if noise is not None:
            bias = -_patch_dot(state, f"noise of {node.name}", A.moved(A.data.abs()), noise)
        for index in active:
            shape = state.shape(node.operands[index])
            rows = patches.through_affine(node, A, shape, args, state.root.cache)
            if rows is not None:
                parts[index] = rows
        if len(parts) == len(active):
            return parts, bias
        A = patches.dense(A, node.shape)
    if noise is not None:
        bias = -dot(A, noise, size=True)
    stacked = A.flatten(0, 1)
    for index in active:
        back = transposed(state, step, index, stacked)
        parts[index] = back.reshape(*A.shape[:2], *back.shape[1:])
    return parts, bias


def transposed(state: State, step: Step, index: int, A: Tensor) -> Tensor:
    """AᵀL of an affine step for rows A (R, *out): (R, *in) for its operand number ``index``."""
    node, kind = step.node, step.kind
    args, kwargs = state.arguments(node)
    shape = state.shape(node.operands[index])
    back = None
    if isinstance(kind, Affine) and kind.transpose:
        back = kind.transpose(A, index, shape, *args, **kwargs)
    back = vjp(node.op, A, index, shape, args, kwargs) if back is None else back
    return back.reshape(len(A), *shape)


def vjp(
    op: Callable[..., Tensor],
    A: Tensor,
    index: int,
    shape: tuple[int, ...],
    args: list[Any],
    kwargs: Mapping[str, Any],
) -> Tensor:
    """AᵀL by automatic differentiation; rows are a batch, since examples do not mix. The op need only be linear where
    its argument is positive."""
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        x = A.new_ones((len(A), *shape)).requires_grad_()
        y = op(*at(args, {index: x}), **kwargs)
        (rows,) = torch.autograd.grad(y, x, A, create_graph=differentiable)
    return rows


def _affine_noise(state: State, kind: Affine, node: Node) -> Tensor | None:
    """Per output element: the rounding of the reference trace and of the transposed rows at this op."""
    if not state.rigorous:
        return None

    def make(state: State, _: str) -> Tensor | None:
        args, kwargs = state.arguments(node)
        gamma = state.gamma(kind.terms(*args, **kwargs))
        if not gamma:
            return None
        active = state.network.graph.active
        sizes = {
            i: state.env[name].abs() + deviation(state, name)
            for i, name in enumerate(node.operands)
            if name in active
        }
        with torch.no_grad():
            if kind.magnitude is not None:
                return gamma * kind.magnitude(1.0, *at(args, sizes), **kwargs) + state.tiny
            size: Tensor = node.op(*absolute(at(args, sizes)), **kwargs)
            return gamma * size + state.tiny

    return state.once("noise", node.name, make)


def _noise_before(state: State, node: Node) -> Tensor | None:
    """The rounding at the affine op whose value only the activation ``node`` reads: None where there is none."""
    graph, name = state.network.graph, node.operands[0]
    if not state.rigorous or name not in graph.node or name not in graph.active:
        return None
    before = graph.node[name]
    kind = state.kind(before)
    if not isinstance(kind, Affine) or sum(name in n.operands for n in graph.nodes) > 1:
        return None
    return _affine_noise(state, kind, before)


def _underflow(state: State, step: Step, last: Node) -> Tensor | None:
    """What rows may lose at a step by underflow, whatever their size: each coefficient up to `State.tiny`, times the
    deviation that it multiplies, and the bias as much: (B,). ``last``: a node before it that the step took along."""
    if not state.rigorous:
        return None

    def make(state: State, name: str) -> Tensor:
        read = [k for k in state.network.graph.node[name].operands if k in state.boxes]
        far = [flat(deviation(state, k)).sum(1) for k in dict.fromkeys(read)]
        return (2 * sum(far[1:], far[0]) + 4) * state.tiny

    nodes = [step.node] if last is step.node else [step.node, last]
    kinds = [state.kind(node) for node in nodes]
    rounds = [
        node.name
        for node, kind in zip(nodes, kinds, strict=True)
        if not isinstance(kind, Affine) or kind.terms(*(a := state.arguments(node))[0], **a[1])
    ]
    losses = [state.once("underflow", name, make) for name in rounds]
    return sum(losses[1:], losses[0]) if losses else None


# -- activations --------------------------------------------------------------------------------------------


class _Relaxed(NamedTuple):
    """Lines in deviations from the reference: slope mid ∓ bend/2, offset at the reference offset ∓ gap/2."""

    mid: Tensor
    bend: Tensor
    offset: Tensor
    gap: Tensor


def deviations(
    state: State,
    kind: Activation,
    node: Node,
    box: Interval,
    z: Tensor,
    out: Tensor,
    choice: tuple[Tensor, Tensor] | None,
) -> Lines:
    """The lines of an activation in deviations from the reference: offsets at the reference, less the output there."""
    args, kwargs = state.arguments(node)
    if choice is None or kind.tuned is None:
        lines: Lines = kind.relax(box, *args[1:], **kwargs)
    else:
        lines = kind.tuned.lines(box, *choice, *args[1:], **kwargs)
    low = torch.addcmul(lines.lower_offset - out, lines.lower_slope, z)
    high = torch.addcmul(lines.upper_offset - out, lines.upper_slope, z)
    if state.rigorous:
        with torch.no_grad():
            size = z.abs() + torch.maximum(box.lower.abs(), box.upper.abs())
            slopes = lines.lower_slope.abs() + lines.upper_slope.abs()
            offsets = lines.lower_offset.abs() + lines.upper_offset.abs() + out.abs()
            # the lines themselves, and the sums over all neurons that their offsets will enter
            rounding = state.gamma(16 + int(kind.ulps)) * (slopes * size + offsets)
            sums = state.gamma(math.prod(node.shape)) * (low.abs() + high.abs() + rounding)
            rounding = rounding + sums + state.tiny
        low, high = low - rounding, high + rounding
    return Lines(lines.lower_slope, low, lines.upper_slope, high)


def _relaxed(state: State, kind: Activation, node: Node) -> _Relaxed:
    args, _ = state.arguments(node)
    box, out = state.boxes[node.operands[0]], state.env[node.name]
    choice = state.choose(kind, box, args[1:]) if state.choose else None
    lower_slope, low, upper_slope, high = deviations(state, kind, node, box, args[0], out, choice)
    gap, bend = high - low, upper_slope - lower_slope
    mid, offset = torch.add(lower_slope, bend, alpha=0.5), torch.add(low, gap, alpha=0.5)
    return _Relaxed(mid, bend, offset, gap)


class Bend(torch.autograd.Function):
    """Lines of rows' own: A ↦ A⁺·lower + A⁻·upper, slopes and offsets alike: (rows, bias of each row).

    With ``columns`` only these elements of rows (S, N) have lines; the others have the slopes ``mid``, and no offset.

    Written out because optimising lines spends its time here: the sides are picked once, and little is kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        A: Tensor,
        low_slope: Tensor,
        low: Tensor,
        up_slope: Tensor,
        high: Tensor,
        columns: Tensor | None = None,
        mid: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        own = A if columns is None else A.index_select(1, columns)
        positive = own >= 0
        slope = torch.where(positive, low_slope, up_slope)
        offset = torch.where(positive, low, high)
        ctx.save_for_backward(own, slope, offset)
        ctx.columns, ctx.mid = columns, mid
        ctx.shapes = [v.shape for v in (low_slope, low, up_slope, high)]
        bias = (own * offset).flatten(min(2, own.ndim - 1)).sum(-1)
        if columns is None or mid is None:
            return own * slope, bias
        return (A * mid).index_copy_(1, columns, own * slope), bias

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        own, slope, offset = ctx.saved_tensors
        whole, bias = grads
        rows = whole if ctx.columns is None else whole.index_select(1, ctx.columns)
        bias = bias.reshape(*bias.shape, *[1] * (own.ndim - bias.ndim))
        found: list[Tensor | None] = [None] * 7
        if ctx.needs_input_grad[0]:
            found[0] = torch.addcmul(rows * slope, bias, offset)
            if ctx.columns is not None:
                found[0] = (whole * ctx.mid).index_copy_(1, ctx.columns, found[0])
        for clamp, first in ((own.clamp_min, 1), (own.clamp_max, 3)):
            if not (ctx.needs_input_grad[first] or ctx.needs_input_grad[first + 1]):
                continue
            side = clamp(0)
            for i, grad in ((first, rows), (first + 1, bias)):
                if ctx.needs_input_grad[i]:
                    found[i] = (side * grad).sum_to_size(ctx.shapes[i - 1])
        return tuple(found)


def activation(
    state: State, kind: Activation, node: Node, A: Rows, split: bool, *, noisy: bool = False
) -> tuple[Parts, Tensor]:
    """A ↦ A·mid − |A|·bend/2; with ``split`` the negative rows too, which share both products. With ``noisy`` dense
    rows also lose the rounding of the affine op before it, in the same product."""
    if isinstance(A, Patch):
        maps = state.once("line maps", node.name, lambda s, n: torch.cat(_lines(s, kind, n), 1))
        looked = look(state, f"lines of {node.name}", maps, A)
        mid, bend, offset, gap = looked.chunk(4, 2)
        data, size = A.data, A.data.abs()
        straight = (data * offset).flatten(2).sum(-1)
        loss = (size * gap).flatten(2).sum(-1)
    else:
        mid, bend, offset, gap = _lines(state, kind, node.name)
        gap = state.once("noisy gap", node.name, _noisy_gap) if noisy else gap
        data, size = A, A.abs()
        straight, loss = dot(A, offset), dot(size, gap)
    along = data * mid
    if not split:
        rows = along.addcmul_(size, bend, value=-0.5)
        bias = torch.sub(straight, loss, alpha=0.5)
        return {0: A.moved(rows, clipped=True) if isinstance(A, Patch) else rows}, bias
    bent = size * (-0.5 * bend)
    rows = _both(along, bent)
    bias = torch.cat([straight - 0.5 * loss, -straight - 0.5 * loss])
    return {0: A.repeated(rows, clipped=True) if isinstance(A, Patch) else rows}, bias


def _noisy_gap(state: State, name: str) -> Tensor:
    """The gap between an activation's lines, and twice the rounding before it: rows A have coefficients of at most
    |A|·(|mid| + bend) there."""
    node = state.network.graph.node[name]
    kind: Activation = state.kind(node)  # type: ignore[assignment]
    mid, bend, _, gap = _lines(state, kind, name)
    noise = _noise_before(state, node)
    return gap if noise is None else gap + 2 * (mid.abs() + bend.abs()) * noise


def _both(along: Tensor, bent: Tensor) -> Tensor:
    """The rows of both sides, bent + along and bent − along, one after the other."""
    if torch.is_grad_enabled() and (along.requires_grad or bent.requires_grad):
        return torch.cat([bent + along, bent - along])
    both = bent.new_empty(2 * len(bent), *bent.shape[1:])
    torch.add(bent, along, out=both[: len(bent)])
    torch.sub(bent, along, out=both[len(bent) :])
    return both


def _dense_linear_before(state: State, node: Node, rows: int) -> Node | None:
    """The linear layer that feeds an activation, where `_activation_and_linear` can take both steps."""
    if state.batch > 1 or rows < MANY:
        return None
    before = state.network.graph.node.get(node.operands[0])
    if before is None or before.op is not F.linear or torch.is_grad_enabled():
        return None
    if state.arguments(before)[0][1].layout != torch.strided:
        return None
    return before if len(state.shape(before.operands[0])) == 1 else None


def _activation_and_linear(
    state: State, kind: Activation, node: Node, linear: Node, A: Tensor, split: bool
) -> tuple[Parts, Tensor]:
    """Both steps for the rows of one example, over the neurons that count: inactive ones have no column in the
    product, and only unstable ones bend, so the two sides of an element share the product with all others."""
    mid, bend, offset, gap = (v[0] for v in _lines(state, kind, node.name))
    key = (f"columns of {node.name}", "table")
    if key not in state.cache:
        bent = torch.nonzero(bend).flatten()
        alive = torch.nonzero((mid != 0) | (bend != 0)).flatten()
        few = 8 * len(alive) <= 7 * len(mid)  # picking nearly all costs more than it saves
        live = alive if few else None
        weight = state.arguments(linear)[0][1]
        state.cache[key] = live, bent, _picked(weight, live, 0), weight.index_select(0, bent)
    live, bent, weight, bent_weight = state.cache[key]
    rows, size = A[:, 0], A[:, 0].abs()
    straight, loss = rows @ offset, size @ (0.5 * gap)
    along = rows * mid
    change = size.index_select(1, bent) * (-0.5 * bend[bent]) if split else None
    if change is None:
        along.addcmul_(size, bend, value=-0.5)
    along = _picked(along, live, 1)
    noise = _affine_noise(state, AFFINE[F.linear], linear)
    if noise is not None:
        loss = loss + along.abs() @ _picked(noise[0], live, 0)
        if change is not None:
            loss = loss + change.abs() @ noise[0, bent]
    if change is None:
        return {0: (along @ weight).unsqueeze(1)}, (straight - loss).unsqueeze(1)
    count = len(along)
    both = along.new_empty(2 * count, weight.shape[1])
    torch.mm(along, weight, out=both[:count])
    bends = change @ bent_weight
    torch.sub(bends, both[:count], out=both[count:])
    both[:count] += bends
    bias = torch.cat([straight - loss, -straight - loss])
    return {0: both.unsqueeze(1)}, bias.unsqueeze(1)


def _picked(values: Tensor, index: Tensor | None, dim: int) -> Tensor:
    return values if index is None else values.index_select(dim, index)


def _lines(state: State, kind: Activation, name: str) -> _Relaxed:
    node = state.network.graph.node[name]
    return state.once("lines", name, lambda s, _: _relaxed(s, kind, node))


RULES: dict[type, Callable[..., tuple[Parts, Tensor | None]]] = {
    Affine: _affine,
    Bilinear: bilinear,
    Extremum: extremum,
}
