"""Planted faults in the op table and the bounds: the contract and the sandwich must catch each of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import contract
import networks
import sandwiches
from calipers.bounds import crown, crown_ibp, interval, preactivations
from calipers.graph import primitives as prim
from calipers.ops import OPS, register
from calipers.ops.kinds import Activation, Affine, Extremum, Kind, Lines, Pieces
from calipers.sets import Interval, Region
from calipers.spec import Spec
from contract import Case, Const, In

INF = math.inf
REAL: dict[Any, Any] = dict(OPS)


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Register a faulty entry; the real one returns afterwards."""
    planted = []

    def put(op: Callable[..., Any], kind: Kind) -> None:
        planted.append(op)
        register(op, kind)

    yield put
    for op in planted:
        register(op, REAL[op])
    assert REAL == OPS


def sandwich(name: str, p: float = INF, eps: float = 0.3, seed: int = 0) -> None:
    network = networks.ARCHITECTURES[name](seed)
    x = networks.inputs(network, 4, 7)
    region = Region.ball(x, eps, p, 0.0, 1.0)
    sandwiches.check_sound(network, region, Spec.label(torch.arange(4) % 3, 3))


def exactness(p: float = 2.0) -> None:
    network = networks.affine(0)
    region = Region.ball(networks.inputs(network, 4, 7), 0.5, p, 0.0, 1.0)
    spec = Spec.label(torch.arange(4) % 3, 3)
    exact = sandwiches.exact_affine_minimum(network, region, spec, p, 0.5, True)
    sandwiches.check_affine_is_exact(network, region, spec, exact)


def lines(case: Case) -> None:
    ends = [-40.0, -2.0, -0.5, 0.0, 0.25, 1.5, 40.0]
    contract.check_lines(case, [(l, u) for l in ends for u in ends if l <= u])


# -- entries with one thing wrong -----------------------------------------------------------------------------


def relaxed(op: Any, change: Callable[..., Lines]) -> Activation:
    kind = REAL[op]
    return replace(kind, relax=lambda x, *args: change(x, kind.relax(x, *args)))


def no_offset(_: Interval, l: Lines) -> Lines:
    return l._replace(upper_offset=torch.zeros_like(l.upper_offset))


def flat_chord(_: Interval, l: Lines) -> Lines:
    return l._replace(upper_slope=l.upper_slope * 0.9)


def steep_below(_: Interval, l: Lines) -> Lines:
    return l._replace(lower_slope=torch.ones_like(l.lower_slope) * 1.25)


def sides_swapped(_: Interval, l: Lines) -> Lines:
    return Lines(l.upper_slope, l.upper_offset, l.lower_slope, l.lower_offset)


def tangent_at_the_end(x: Interval, l: Lines) -> Lines:
    """The tangent at the upper end, which cuts through the convex part."""
    s = torch.sigmoid(x.upper)
    slope = s * (1 - s)
    return l._replace(upper_slope=slope, upper_offset=s - slope * x.upper)


def mirrored_offset(_: Interval, l: Lines) -> Lines:
    """Right up to rounding relative to 1, not to the function's own size near 0."""
    return l._replace(lower_offset=(l.lower_offset + 1.0) - 1.0 + 1e-16)


def rounded_slopes(_: Interval, l: Lines) -> Lines:
    """What torch.where of two numbers does to a slope."""
    return Lines(l[0].float().to(l[0].dtype), l[1], l[2].float().to(l[0].dtype), l[3])


def loose_where_linear(_: Interval, l: Lines) -> Lines:
    return l._replace(upper_offset=l.upper_offset + 1e-3)


RELU, ABS = Case(torch.relu, (In(40),)), Case(torch.abs, (In(40),))
SIGMOID, TANH = Case(torch.sigmoid, (In(40),)), Case(torch.tanh, (In(40),))
LEAKY, CLAMP = Case(F.leaky_relu, (In(40), -0.3)), Case(torch.clamp, (In(40), -0.3, 0.4))
LINEAR = Case(F.linear, (In(5), Const(4, 5), Const(4)))
CONV = Case(torch.conv2d, (In(6, 6, 7), Const(3, 6, 3, 3), Const(3), [2, 2], [1, 1], [1, 1], 1))
GROUPED = Case(torch.conv2d, (In(4, 5, 4), Const(6, 2, 2, 2), None, [1, 2], [0, 1], [1, 1], 2))
NORM = Case(
    prim.batch_norm,
    (In(3, 2, 2), Const(3), Const(3), Const(3), Const(3, positive=True), False, 1e-5),
)
POOL = Case(prim.max_pool, (In(2, 5, 6), (2, 2), (2, 2), (0, 0), (1, 1), True))
GATE = Case(torch.mul, (In(4), In(4)))
WIDE = Case(torch.mul, (In(2, 1), Const(2, 3)))
CAT = Case(torch.cat, ([In(2, 3), In(2, 1), In(2, 2)], 2))
PAD = Case(prim.pad, (In(2, 3), (1, 0, 2, 1), -0.5))
NEG = Case(torch.neg, (In(6),))
MEAN = Case(torch.mean, (In(3, 4), (2,), False))

check_affine, check_interval = contract.check_affine, contract.check_interval
check_rows, check_windows = contract.check_rows, contract.check_windows
check_pieces = contract.check_pieces


def changed(case: Case, **facts: Any) -> tuple[Any, Any]:
    return case.op, replace(REAL[case.op], **facts)


def flipped_kernel(A: Tensor, index: int, shape: Any, x: Any, w: Tensor, *rest: Any) -> Tensor:
    return REAL[torch.conv2d].transpose(A, index, shape, x, w.flip(2, 3), *rest)


def no_output_padding(A: Tensor, _i: int, _s: Any, _x: Any, w: Tensor, *rest: Any) -> Tensor:
    _, stride, padding, dilation, groups = rest
    return F.conv_transpose2d(A, w, None, stride, padding, 0, groups, dilation)


def one_group(A: Tensor, _i: int, shape: Any, _x: Any, w: Tensor, *rest: Any) -> Tensor:
    return REAL[torch.conv2d].transpose(A, _i, shape, _x, w, *rest).flip(1)


def signed_magnitude(scale: float, x: Tensor, w: Tensor, b: Any = None) -> Tensor:
    return F.linear(x, w, None if b is None else b.abs() * scale)


def magnitude_without_bias(_: float, x: Tensor, w: Tensor, _b: Any = None) -> Tensor:
    return F.linear(x, w.abs())


def signed_norm(scale: float, x: Tensor, w: Any, b: Any, m: Any, v: Tensor, t: Any, e: float):
    y = REAL[prim.batch_norm].magnitude(scale, x, w, b, m, v, t, e)
    return y * w.sign().reshape(-1, 1, 1)


def negative_norm(A: Tensor, *rest: Any) -> Tensor:
    return -REAL[prim.batch_norm].transpose(A, *rest)


def norm_without_eps(A: Tensor, _i: int, _s: Any, _x: Any, w: Tensor, *rest: Any) -> Tensor:
    return A * (w / rest[2].sqrt()).reshape(-1, 1, 1)


def shifted_windows(*args: Any) -> Tensor:
    """Each window's last element is missed."""
    index = REAL[prim.max_pool].windows(*args)
    return torch.cat([index[..., :-1], index[..., :1]], -1)


def neighbour(*args: Any) -> Tensor:
    index = REAL[prim.max_pool].windows(*args)
    return torch.where(index >= 0, (index + 1) % 60, index)


def wide_transpose(A: Tensor, _i: int, _s: Any, x: Any, y: Any) -> Tensor:
    return A * y


def frozen_factor(A: Tensor, index: int, _s: Any, x: Tensor, y: Tensor) -> Tensor:
    """The derivative at the reference instead of a plane."""
    other = (y, x)[index]
    return (A.reshape(-1, len(other), *A.shape[1:]) * other).reshape(A.shape)


def wrong_slice(A: Tensor, index: int, shape: Any, parts: Any, dim: int) -> Tensor:
    return A.narrow(dim, 0, shape[dim - 1])


def sum_for_mean(A: Tensor, *rest: Any) -> Tensor:
    return REAL[torch.sum].transpose(A, *rest)


ENDS_ONLY = lambda f: lambda x, *a: Interval(f(x.lower, *a), f(x.upper, *a))  # noqa: E731

FAULTS: dict[str, tuple[tuple[Any, Any], Callable[[], None]]] = {
    "relu: offset dropped": ((torch.relu, relaxed(torch.relu, no_offset)), lambda: lines(RELU)),
    "relu: offset dropped (net)": (
        (torch.relu, relaxed(torch.relu, no_offset)),
        lambda: sandwich("mlp"),
    ),
    "relu: chord too flat": ((torch.relu, relaxed(torch.relu, flat_chord)), lambda: lines(RELU)),
    "relu: chord too flat (net)": (
        (torch.relu, relaxed(torch.relu, flat_chord)),
        lambda: sandwich("conv", eps=1e-3),
    ),
    "relu: lower line too steep": (
        (torch.relu, relaxed(torch.relu, steep_below)),
        lambda: lines(RELU),
    ),
    "relu: loose where linear": (
        (torch.relu, relaxed(torch.relu, loose_where_linear)),
        lambda: lines(RELU),
    ),
    "abs: sides swapped": ((torch.abs, relaxed(torch.abs, sides_swapped)), lambda: lines(ABS)),
    "abs: sides swapped (net)": (
        (torch.abs, relaxed(torch.abs, sides_swapped)),
        lambda: sandwich("abs"),
    ),
    "sigmoid: tangent at the wrong end": (
        (torch.sigmoid, relaxed(torch.sigmoid, tangent_at_the_end)),
        lambda: lines(SIGMOID),
    ),
    "sigmoid: sides swapped (net)": (
        (torch.sigmoid, relaxed(torch.sigmoid, sides_swapped)),
        lambda: sandwich("sigmoid"),
    ),
    "sigmoid: lower line absolute, not relative": (
        (torch.sigmoid, relaxed(torch.sigmoid, mirrored_offset)),
        lambda: contract.check_lines(SIGMOID, [(-42.0, -38.0)]),
    ),
    "tanh: slopes in float32": (
        (torch.tanh, relaxed(torch.tanh, rounded_slopes)),
        lambda: lines(TANH),
    ),
    "leaky: slopes in float32": (
        (F.leaky_relu, relaxed(F.leaky_relu, rounded_slopes)),
        lambda: lines(LEAKY),
    ),
    "abs: image by its ends": (
        changed(ABS, image=ENDS_ONLY(torch.abs)),
        lambda: check_interval(ABS),
    ),
    "leaky: image by its ends": (
        changed(LEAKY, image=ENDS_ONLY(F.leaky_relu)),
        lambda: check_interval(LEAKY),
    ),
    "clamp: image without limits": (
        changed(CLAMP, image=lambda x, *_: x),
        lambda: check_interval(CLAMP),
    ),
    "clamp: always linear": (
        changed(CLAMP, linear=lambda x, *_: x.lower == x.lower),
        lambda: lines(CLAMP),
    ),
    "abs: pieces of relu": (
        changed(ABS, pieces=lambda: Pieces((0.0,), (0.0, 1.0), 0.0)),
        lambda: check_pieces(ABS),
    ),
    "linear: radius without |W|": (
        changed(LINEAR, magnitude=signed_magnitude),
        lambda: check_interval(LINEAR),
    ),
    "linear: radius without |W| (net)": (
        changed(LINEAR, magnitude=signed_magnitude),
        lambda: sandwich("mlp"),
    ),
    "linear: no magnitude": (changed(LINEAR, magnitude=None), lambda: check_affine(LINEAR)),
    "linear: magnitude without bias": (
        changed(LINEAR, magnitude=magnitude_without_bias),
        lambda: check_affine(LINEAR),
    ),
    "linear: nothing is summed": (
        changed(LINEAR, terms=lambda *_: 0),
        lambda: check_affine(LINEAR),
    ),
    "linear: separable": (changed(LINEAR, separable=True), lambda: check_affine(LINEAR)),
    "linear: rows of the wrong neuron": (
        changed(LINEAR, rows=lambda index, x, w, b=None: w[(index + 1) % len(w)]),
        lambda: check_affine(LINEAR),
    ),
    "conv: kernel flipped": (changed(CONV, transpose=flipped_kernel), lambda: check_affine(CONV)),
    "conv: kernel flipped (net)": (
        changed(CONV, transpose=flipped_kernel),
        exactness,
    ),
    "conv: output padding missing": (
        changed(CONV, transpose=no_output_padding),
        lambda: check_affine(CONV),
    ),
    "conv: groups mixed up": (changed(GROUPED, transpose=one_group), lambda: check_affine(GROUPED)),
    "norm: sign lost": (changed(NORM, magnitude=signed_norm), lambda: check_interval(NORM)),
    "norm: transpose negative": (
        changed(NORM, transpose=negative_norm),
        lambda: check_affine(NORM),
    ),
    "norm: transpose without eps": (
        changed(NORM, transpose=norm_without_eps),
        lambda: check_affine(NORM),
    ),
    "pool: an element missed": (
        (prim.max_pool, Extremum(shifted_windows)),
        lambda: check_windows(POOL),
    ),
    "pool: the neighbour's line": ((prim.max_pool, Extremum(neighbour)), lambda: check_rows(POOL)),
    "product: one factor is a constant": (
        (torch.mul, replace(REAL[torch.mul].affine, perturbed="any", transpose=frozen_factor)),
        lambda: check_rows(GATE),
    ),
    "product: broadcasting not undone": (
        (torch.mul, replace(REAL[torch.mul].affine, transpose=wide_transpose)),
        lambda: check_affine(WIDE),
    ),
    "cat: always the first part": (changed(CAT, transpose=wrong_slice), lambda: check_affine(CAT)),
    "neg: monotone": (changed(NEG, magnitude=None), lambda: check_interval(NEG)),
    "mean: transpose of the sum": (
        changed(MEAN, transpose=sum_for_mean),
        lambda: check_affine(MEAN),
    ),
    "mean: nothing is summed": (changed(MEAN, terms=lambda *_: 0), lambda: check_affine(MEAN)),
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_entry_is_caught(name: str, plant: Any) -> None:
    (op, kind), check = FAULTS[name]
    check()  # the real entry passes the same check
    plant(op, kind)
    with pytest.raises(AssertionError):
        check()


# -- faults in the bounds themselves ------------------------------------------------------------------------------


def test_upper_side_without_bias_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tutorial's own slip: the bias is added to the lower side only."""

    def slipped(network: Any, *args: Any, **kwargs: Any) -> dict[str, Interval]:
        boxes = preactivations(network, *args, **kwargs)
        node = network.graph.node[network.graph.output]
        bias = getattr(network.module, node.args[2].name).to(boxes[node.name].upper.dtype)
        boxes[node.name] = Interval(boxes[node.name].lower, boxes[node.name].upper - bias)
        return boxes

    check_interval(LINEAR)
    monkeypatch.setattr(contract, "preactivations", slipped)
    with pytest.raises(AssertionError):
        check_interval(LINEAR)


def wrong_way(network: Any, region: Region, spec: Spec, **kwargs: Any) -> Tensor:
    """Keeps the worse of two lower bounds."""
    both = (f(network, region, spec, **kwargs) for f in (interval, crown))
    return torch.minimum(*both)


def upper_for_lower(network: Any, region: Region, spec: Spec, **kwargs: Any) -> Tensor:
    """The other side of the functional's interval: its upper bound."""
    negative = Spec(-spec.C, -spec.d, spec.clause)
    return -crown(network, region, negative, **kwargs)


def at_the_centre(network: Any, region: Region, spec: Spec, **kwargs: Any) -> Tensor:
    return crown(network, Region.ball(region.center, 0.0, region.p), spec, **kwargs)


def half_the_radius(network: Any, region: Region, spec: Spec, **kwargs: Any) -> Tensor:
    return crown(network, Region.ball(region.center, region.eps / 2, region.p), spec, **kwargs)


def rivals_rolled(network: Any, region: Region, spec: Spec, **kwargs: Any) -> Tensor:
    return crown(network, region, spec, **kwargs).roll(1, 1)


@pytest.mark.parametrize(
    "fault", [wrong_way, upper_for_lower, at_the_centre, half_the_radius, rivals_rolled]
)
def test_planted_bound_is_caught(fault: Callable[..., Tensor]) -> None:
    network = networks.mlp(0)
    region = Region.ball(networks.inputs(network, 4, 7), 0.15, INF, 0.0, 1.0)
    spec = Spec.label(torch.arange(4) % 3, 3)
    rungs = {"interval": interval, "crown_ibp": crown_ibp}
    sandwiches.check_sound(network, region, spec, bounds={**rungs, "crown": crown})
    with pytest.raises(AssertionError):
        sandwiches.check_sound(network, region, spec, bounds={**rungs, "crown": fault})


@pytest.mark.parametrize("p", [1.0, 2.0])
def test_support_without_the_box_is_caught(p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sound, but not exact: the dual norm alone."""
    exactness(p)

    def ball_only(self: Region, a: Tensor, frame: Any = None) -> Tensor:
        rows = a.reshape(*a.shape[: a.ndim - self.center.ndim + 1], -1)
        dual = torch.linalg.vector_norm(rows, ord=2 if self.p == 2 else INF, dim=-1)
        return dual * self.outer_eps.to(a.dtype)

    monkeypatch.setattr(Region, "reach", ball_only)
    with pytest.raises(AssertionError):
        exactness(p)


def test_a_new_op_needs_no_more_than_an_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """The contract accepts a right entry for an op of one's own, so it tests entries, not the built-in ones."""
    double = Case(torch.positive, (In(6),))
    with pytest.raises(KeyError):
        check_affine(double)
    monkeypatch.setitem(OPS, torch.positive, Affine(transpose=lambda A, *_: A, separable=True))
    check_affine(double)
    check_interval(double)
