"""The independent checker: certificates by hand, exact oracles, planted counterexamples, what it reads."""

from __future__ import annotations

import gzip
import itertools
import re
import subprocess
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper
from scipy.optimize import linprog

from calipers_check import Refused, Unusable, check
from calipers_check.bounds import Engine, Rows, View
from calipers_check.onnx_file import network as read_network
from calipers_check.vnnlib import clauses
from certificates import Case, Layers, mlp, onnx_bytes, query, random_layers, value

CROWN, SPLIT = np.uint8([2]), np.int32([1, 0, 0])
I32, F64, U8 = np.int32, np.float64, np.uint8


def two_neurons() -> Layers:
    """y = −relu(x) − relu(1/2 − x), at most −1/2, between 0 and 1/2."""
    return [
        (np.array([[1.0], [-1.0]], np.float32), np.array([0.0, 0.5], np.float32)),
        (np.array([[-1.0, -1.0]], np.float32), np.zeros(1, np.float32)),
    ]


def two_neuron_case(folder: Path, threshold: str = "-0.4999") -> tuple[Case, dict[str, np.ndarray]]:
    """The first neuron is split. Where it is inactive, relu(1/2 − x) >= 1/2 − x and the split's x <= 0 prove it."""
    text = query([-1.0], [1.0], 1, f"(>= Y_0 {threshold})")
    arrays = {
        "0/child": SPLIT,
        "0/layer": I32([0]),
        "0/element": I32([0]),
        "0/point": F64([0]),
        "0/line.node": I32([1, 2]),
        "0/line.clause": I32([0, 0]),
        "0/line.choice": I32([-1, -1]),
        "0/multiplier": F64([1.0, 0.0]),
    }
    return Case(folder, mlp(two_neurons()), text), arrays


def accepts(case: Case, path: Path, **options: Any) -> bool:
    try:
        check(path, case.network, case.prop, **options)
    except Refused:
        return False
    return True


# -- by hand --------------------------------------------------------------------------------------------------------


def test_a_certificate_by_hand_for_two_neurons(tmp_path: Path) -> None:
    case, arrays = two_neuron_case(tmp_path)
    path = case.write(arrays)
    found = check(path, case.network, case.prop)
    assert (found.clauses, found.trees, found.nodes) == (1, 1, 3)
    path.write_bytes(gzip.compress(path.read_bytes()))
    assert accepts(case, path)


def test_the_ten_lines_of_the_documentation(tmp_path: Path) -> None:
    """The page's own code, run as it stands, writes a certificate that is accepted."""
    page = Path(__file__).parents[1] / "docs" / "certificates.md"
    code = "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S))
    for threshold, expected in (("0.51", True), ("-0.5", False)):
        case, _ = two_neuron_case(tmp_path, threshold)
        path = tmp_path / "proof.cert"
        exec(code, {"network": case.network, "prop": case.prop, "path": path})  # noqa: S102
        assert accepts(case, path) is expected


def test_what_the_split_and_the_multipliers_are_for(tmp_path: Path) -> None:
    case, arrays = two_neuron_case(tmp_path)
    assert accepts(case, case.write(arrays))
    root = {"0/bounds": CROWN, "0/proof": CROWN}
    assert not accepts(case, case.write(root))
    assert not accepts(case, case.write(arrays | {"0/multiplier": F64([0.0, 0.0])}))
    assert not accepts(case, case.write(arrays | {"0/multiplier": F64([0.0, 1.0])}))
    shared = arrays | {
        "0/column.layer": I32([0, 0]),
        "0/column.element": I32([0, 1]),
        "0/choice": np.float16([[1, 1]]),
        "0/line.choice": I32([0, -1]),
    }
    assert accepts(case, case.write(shared))
    whole = {k: v for k, v in shared.items() if "column" in k or k == "0/choice"}
    whole |= {"0/line.node": I32([0]), "0/line.clause": I32([0]), "0/line.choice": I32([0])}
    assert accepts(case, case.write(whole))


@pytest.mark.parametrize("threshold", ["-0.5", "-0.5001", "-1.0"])
def test_the_planted_counterexample_of_two_neurons(tmp_path: Path, threshold: str) -> None:
    case, arrays = two_neuron_case(tmp_path, threshold)
    for factors in itertools.product((0.0, 0.5, 1.0, 2.0, 1e9), repeat=2):
        assert not accepts(case, case.write(arrays | {"0/multiplier": F64(factors)}))


def test_the_input_may_be_split_and_boxes_trimmed(tmp_path: Path) -> None:
    layers = random_layers(3)
    top = maximum(layers, [-1, -1], [1, 1])
    case = Case(tmp_path, mlp(layers), query([-1.0, -1.0], [1.0, 1.0], 1, f"(>= Y_0 {top + 0.1})"))
    for trim in (0, 1):
        arrays = bisected(10) | {"0/bounds": CROWN, "0/proof": CROWN, "0/trim": U8([trim])}
        assert accepts(case, case.write(arrays))


def bisected(depth: int) -> dict[str, np.ndarray]:
    """Uniform halves of [-1, 1]^2."""
    n = 2 ** (depth + 1) - 1
    child, element, point = np.zeros(n, I32), np.zeros(n, I32), np.zeros(n)
    boxes = [((-1.0, -1.0), (1.0, 1.0))]
    for i in range(2**depth - 1):
        low, high = boxes[i]
        e = int(high[1] - low[1] > high[0] - low[0])
        middle = (low[e] + high[e]) / 2
        child[i], element[i], point[i] = 2 * i + 1, e, middle
        for k, (l, h) in enumerate(((low, high), (low, high))):
            ends = [list(l), list(h)]
            ends[1 - k][e] = middle
            boxes.append((tuple(ends[0]), tuple(ends[1])))
    return {"0/child": child, "0/layer": I32([-1]), "0/element": element, "0/point": point}


# -- enumeration ----------------------------------------------------------------------------------------------------


def region(layers: Layers, pattern: Sequence[bool], low: Any, high: Any) -> tuple[Any, ...]:
    """The output and all operands as affine functions of x where the neurons have this pattern."""
    G, g = np.eye(layers[0][0].shape[1]), np.zeros(layers[0][0].shape[1])
    signs, rows, ends = iter(pattern), [], []
    for i, (weight, bias) in enumerate(layers):
        G, g = weight.astype(float) @ G, weight.astype(float) @ g + bias
        if i == len(layers) - 1:
            break
        on = np.array([next(signs) for _ in bias])
        side = np.where(on, 1.0, -1.0)
        rows.append(side[:, None] * G)
        ends.append(side * g)
        G, g = G * on[:, None], g * on
    return G, g, np.concatenate(rows), np.concatenate(ends)


def maximum(layers: Layers, low: Sequence[float], high: Sequence[float]) -> float:
    """The largest output over a box, by one linear program for each activation pattern."""
    count = sum(len(b) for _, b in layers[:-1])
    best = -np.inf
    for pattern in itertools.product((False, True), repeat=count):
        G, g, rows, ends = region(layers, pattern, low, high)
        found = linprog(-G[0], A_ub=-rows, b_ub=ends, bounds=list(zip(low, high, strict=True)))
        if found.status == 0:
            best = max(best, g[0] - found.fun)
    return float(best)


def full_tree(layers: Layers, low: Any, high: Any) -> dict[str, np.ndarray]:
    """All neurons split, multipliers from the duals of each leaf's linear program; Farkas' where it is infeasible."""
    widths = [len(b) for _, b in layers[:-1]]
    neurons = [(layer, e) for layer, w in enumerate(widths) for e in range(w)]
    depth = len(neurons)
    n = 2 ** (depth + 1) - 1
    child = np.where(np.arange(n) < 2**depth - 1, 2 * np.arange(n) + 1, 0)
    level = np.floor(np.log2(np.arange(n) + 1)).astype(int)
    split = np.array([*neurons, (0, 0)])[level]
    clause, multipliers = [], []
    for leaf in range(2**depth):
        pattern = [bool(leaf >> (depth - 1 - i) & 1) for i in range(depth)]
        G, _, rows, ends = region(layers, pattern, low, high)
        bounds = list(zip(low, high, strict=True))
        found = linprog(-G[0], A_ub=-rows, b_ub=ends, bounds=bounds)
        clause.append(0 if found.status == 0 else -1)
        if found.status != 0:  # how far the constraints must give way
            wide = np.concatenate([-rows, -np.ones((depth, 1))], 1)
            cost = [0.0] * len(low) + [1.0]
            found = linprog(cost, A_ub=wide, b_ub=ends, bounds=[*bounds, (0, None)])
        multipliers.append(np.maximum(-found.ineqlin.marginals, 0))
    leaves = np.arange(2**depth - 1, n)
    return {
        "0/child": child.astype(I32),
        "0/layer": split[:, 0].astype(I32),
        "0/element": split[:, 1].astype(I32),
        "0/bounds": np.where(np.arange(n) == 0, 2, 0).astype(U8),
        "0/line.node": leaves.astype(I32),
        "0/line.clause": I32(clause),
        "0/line.choice": np.full(len(leaves), -1, I32),
        "0/multiplier": np.concatenate(multipliers),
    }


@pytest.mark.parametrize("seed", range(4))
def test_full_trees_with_dual_multipliers_prove_whatever_enumeration_does(
    tmp_path: Path, seed: int
) -> None:
    layers = random_layers(seed, (2, 3, 3, 1))
    low, high = [-1.0, -0.5], [0.5, 1.0]
    top, arrays = maximum(layers, low, high), full_tree(layers, low, high)
    for gap, expected in ((1e-6, True), (0.0, None), (-1e-9, False), (-0.1, False)):
        case = Case(tmp_path, mlp(layers), query(low, high, 1, f"(>= Y_0 {top + gap!r})"))
        found = accepts(case, case.write(arrays))
        assert expected is None or found is expected


# -- planted --------------------------------------------------------------------------------------------------------


def random_certificate(
    rng: np.random.Generator, layers: Layers, splits: int
) -> dict[str, np.ndarray]:
    """Anything well-formed."""
    widths = [len(b) for _, b in layers[:-1]]
    inputs = layers[0][0].shape[1]
    n = 2 * splits + 1
    child, at = np.zeros(n, I32), [0]
    for k in range(1, n, 2):
        child[at.pop(rng.integers(len(at)))] = k
        at += [k, k + 1]
    layer = rng.integers(-1, len(widths), n)
    element = [rng.integers(widths[k] if k >= 0 else inputs) for k in layer]
    depth = np.zeros(n, int)
    for i in np.flatnonzero(child):
        depth[child[i] : child[i] + 2] = depth[i] + (layer[i] >= 0)
    rows = np.sort(rng.integers(0, n, 3 * n))
    columns = [(k, e) for k, w in enumerate(widths) for e in range(w)]
    U = len(columns)
    bound_layer = rng.integers(0, len(widths), 6)
    before = np.concatenate([[0], np.cumsum(widths)])
    return {
        "0/child": child,
        "0/layer": layer.astype(I32),
        "0/element": I32(element),
        "0/point": rng.normal(size=n) * rng.integers(0, 2, n),
        "0/bounds": np.where(np.arange(n) == 0, 3, rng.integers(0, 3, n)).astype(U8),
        "0/proof": rng.integers(0, 3, n).astype(U8),
        "0/trim": rng.integers(0, 2, n).astype(U8),
        "0/column.layer": I32([k for k, _ in columns]),
        "0/column.element": I32([e for _, e in columns]),
        "0/bound.node": np.zeros(6, I32),
        "0/bound.layer": bound_layer.astype(I32),
        "0/bound.element": I32([rng.integers(widths[k]) for k in bound_layer]),
        "0/bound.side": rng.integers(0, 2, 6).astype(U8),
        "0/bound.choice": rng.integers(0, 256, before[bound_layer].sum()).astype(U8),
        "0/line.node": rows.astype(I32),
        "0/line.clause": rng.integers(-1, 1, 3 * n).astype(I32),
        "0/line.choice": rng.integers(-1, 5, 3 * n).astype(I32),
        "0/choice": rng.random((5, U)).astype(np.float16),
        "0/multiplier": (rng.exponential(size=depth[rows].sum())).astype(np.float32),
    }


@pytest.mark.parametrize("kind", ["Relu", "LeakyRelu", "Abs", "concave"])
def test_no_certificate_is_accepted_where_a_counterexample_is_planted(
    tmp_path: Path, kind: str
) -> None:
    """The network attains the threshold exactly, at one corner or inside; any tree, any numbers."""
    rng = np.random.default_rng(0)
    left = {"Relu": 0.0, "LeakyRelu": 0.25, "Abs": -1.0, "concave": 1.5}[kind]
    attributes = {"alpha": left} if kind in ("LeakyRelu", "concave") else {}
    for seed in range(12):
        layers = random_layers(seed, (2, 3, 3, 1))
        x = [float(v) for v in rng.choice([-1.0, 1.0, 0.25], 2)]
        top = max(
            value(layers, p, left)[0]
            for p in itertools.product((-1.0, 1.0, 0.25), repeat=2)
            if list(p) == x or seed % 2
        )
        threshold = float(top)
        threshold = (
            threshold if Fraction(threshold) <= top else float(np.nextafter(threshold, -9e9))
        )
        op = "LeakyRelu" if kind == "concave" else kind
        text = query([-1.0, -1.0], [1.0, 1.0], 1, f"(>= Y_0 {threshold!r})")
        case = Case(tmp_path, mlp(layers, op, **attributes), text)
        for splits in (0, 1, 3, 10):
            assert not accepts(case, case.write(random_certificate(rng, layers, splits)))


def test_every_clause_of_a_tree_is_proved(tmp_path: Path) -> None:
    """One clause is proved at once, the other nowhere near its counterexample."""
    layers = random_layers(3)
    top = maximum(layers, [-1, -1], [1, 1])
    for easy, hard in ((0, 1), (1, 0)):
        gap = {easy: 50.0, hard: -0.01}
        text = query(
            [-1.0, -1.0], [1.0, 1.0], 1, f"(or (>= Y_0 {top + gap[0]}) (>= Y_0 {top + gap[1]}))"
        )
        case = Case(tmp_path, mlp(layers), text)
        for depth in (0, 1, 6):
            arrays = bisected(depth) | {"0/bounds": CROWN, "0/proof": CROWN, "0/trim": U8([1])}
            for trees in ([{"clauses": [0, 1]}], [{"clauses": [1, 0]}]):
                assert not accepts(case, case.write(arrays, trees))
            with pytest.raises(Refused, match=f"clause {hard} is in no tree"):
                check(case.write(arrays, [{"clauses": [easy]}]), case.network, case.prop)


def test_negative_multipliers_and_weights_would_prove_anything(tmp_path: Path) -> None:
    """The neuron lies far below 5, so a negative multiple of 5 − v is as large as one likes."""
    case, arrays = two_neuron_case(tmp_path, "-1")
    arrays |= {"0/point": F64([5.0])}
    for factor in (-1.0, -1e6, np.nan, np.inf):
        with pytest.raises(Refused, match=r"negative|not finite"):
            check(
                case.write(arrays | {"0/multiplier": F64([factor, 0.0])}), case.network, case.prop
            )
    case = Case(
        tmp_path, mlp(two_neurons()), query([-1.0], [1.0], 1, "(and (>= Y_0 -1) (>= Y_0 -4))")
    )
    root = {"0/line.node": I32([0]), "0/line.clause": I32([0]), "0/line.choice": I32([-1])}
    for weights in ([-1.0, 0.0], [1.0, -2.0], [0.0, np.nan]):
        with pytest.raises(Refused, match=r"negative|not finite"):
            check(case.write(root | {"0/weight": F64(weights)}), case.network, case.prop)
    with pytest.raises(Refused, match="missing"):
        check(case.write(root), case.network, case.prop)


@pytest.mark.parametrize("number", [-0.001, 1.001, 3.0, np.nan, np.inf])
def test_line_numbers_outside_of_their_range(tmp_path: Path, number: float) -> None:
    case, arrays = two_neuron_case(tmp_path)
    arrays |= {
        "0/column.layer": I32([0, 0]), "0/column.element": I32([0, 1]), "0/choice": F64([[number, 1]]),
    }  # fmt: skip
    with pytest.raises(Refused, match=r"outside|not finite"):
        check(case.write(arrays), case.network, case.prop)


@pytest.mark.parametrize("layer", [-1, 0])
@pytest.mark.parametrize("gap", [-0.05, 0.05])
def test_halves_leave_nothing_out(tmp_path: Path, layer: int, gap: float) -> None:
    """y = −|x − 1/4| is unsafe near its peak alone, which lies next to the point of the split."""
    layers = [
        (np.float32([[1], [-1]]), np.float32([-0.25, 0.25])),
        (np.float32([[-1, -1]]), np.float32([0])),
    ]
    point = gap if layer == 0 else 0.25 + gap
    arrays = {
        "0/child": SPLIT, "0/layer": I32([layer]), "0/element": I32([0]), "0/point": F64([point]),
        "0/bounds": U8([2]), "0/proof": U8([2]), "0/trim": U8([1]),
    }  # fmt: skip
    case = Case(tmp_path, mlp(layers), query([-1.0], [1.0], 1, "(>= Y_0 -0.01)"))
    assert not accepts(case, case.write(arrays))


def test_what_is_trimmed_holds_no_point_below_the_plane() -> None:
    """Points of the box on the plane itself, or below it, in rational arithmetic, stay; most of the rest goes."""
    from calipers_check.prove import _cut

    rng = np.random.default_rng(0)
    lower = rng.normal(size=(300, 3))
    upper = lower + rng.random((300, 3)) * rng.choice([0, 1e-8, 1.0], (300, 3))
    G = rng.normal(size=(300, 3)) * rng.choice([0, 1e-9, 1.0], (300, 3))
    on = lower + rng.random((300, 3)) * (upper - lower)  # through here
    corner = np.where(G > 0, lower, upper)
    on = np.where(rng.random((300, 1)) < 0.5, on, corner + (on - corner) * [1, 0, 0])
    c = -(G * on).sum(1)
    with np.errstate(all="ignore"):
        l, u = _cut(lower, upper, G, c)
    for i in range(300):
        known = (lower[i] <= on[i]).all() and (on[i] <= upper[i]).all()
        terms = (Fraction(g) * Fraction(v) for g, v in zip(G[i], on[i], strict=True))
        if known and sum(terms, Fraction(c[i])) <= 0:
            assert (l[i] <= on[i]).all()
            assert (on[i] <= u[i]).all()
    assert (u - l < 0.9 * (upper - lower)).any(1).mean() > 0.2


def test_the_maximum_of_a_window_is_not_that_of_its_best_known_element(tmp_path: Path) -> None:
    """One element is at least 0, another reaches further."""
    data = onnx_bytes(
        [helper.make_node("MaxPool", ["x"], ["y"], kernel_shape=[2, 2])],
        {},
        (1, 1, 2, 2),
        (1, 1, 1, 1),
    )
    low, high = [0.0, -1.0, -1.0, -1.0], [0.5, 1.0, 0.25, -0.5]
    arrays = {"0/bounds": CROWN, "0/proof": CROWN}
    for unsafe, expected in (
        ("(>= Y_0 1.0)", False), ("(>= Y_0 1.001)", True), ("(<= Y_0 0.0)", False), ("(<= Y_0 -0.001)", True)
    ):  # fmt: skip
        case = Case(tmp_path, data, query(low, high, 1, unsafe))
        assert accepts(case, case.write(arrays)) is expected


def test_random_certificates_are_accepted_where_there_is_room(tmp_path: Path) -> None:
    """So the test above does not refuse for want of form."""
    rng = np.random.default_rng(1)
    layers = random_layers(0, (2, 3, 3, 1))
    case = Case(tmp_path, mlp(layers), query([-1.0, -1.0], [1.0, 1.0], 1, "(>= Y_0 50)"))
    for splits in (0, 1, 3, 10):
        arrays = random_certificate(rng, layers, splits)
        arrays["0/proof"] = np.maximum(arrays["0/proof"], 1)
        assert accepts(case, case.write(arrays))


def test_cancelling_weights_are_never_certified_and_their_absence_is(tmp_path: Path) -> None:
    """(1e16 + x) − 1e16 loses x in floats: y = x there, which reaches 1 over the reals, though floats see 0."""
    big = np.float32(1e16)
    layers = [
        (np.array([[1.0], [0.0]], np.float32), np.array([big, big], np.float32)),
        (np.array([[1.0, -1.0]], np.float32), np.zeros(1, np.float32)),
    ]
    assert value(layers, [1.0])[0] == 1
    arrays = {"0/bounds": CROWN, "0/proof": CROWN}
    case = Case(tmp_path, mlp(layers), query([-1.0], [1.0], 1, "(>= Y_0 0.75)"))
    assert not accepts(case, case.write(arrays))
    # the rationals see what floats cannot
    case = Case(tmp_path, mlp(layers), query([-1.0], [1.0], 1, "(>= Y_0 1.25)"))
    assert accepts(case, case.write(arrays))


@pytest.mark.parametrize("proof", [1, 2])
def test_long_sums_lose_what_their_length_allows(tmp_path: Path, proof: int) -> None:
    """1 + n·2^-53 sums to about 1 in floats: each term is half a unit in the last place of the first."""
    n = 20_000
    first = np.full((n, 1), 2.0**-53, np.float32)
    first[0] = 1.0
    layers = [
        (first, np.zeros(n, np.float32)),
        (np.ones((1, n), np.float32), np.zeros(1, np.float32)),
    ]
    arrays = {"0/bounds": U8([1]), "0/proof": U8([proof])}
    for more, expected in ((-3, False), (10 * n, True)):
        threshold = 1 + (n - 1 + more) * 2.0**-53
        case = Case(tmp_path, mlp(layers), query([1.0], [1.0], 1, f"(>= Y_0 {threshold!r})"))
        assert accepts(case, case.write(arrays)) is expected


def test_sums_whose_order_matters_count_as_real_sums(tmp_path: Path) -> None:
    """1e8 + 1 − 1e8 − 1 in float32 is −1, 0 or 1 by order; over the reals it is 0, and only that can be claimed."""
    row = np.array([[1e8, 1.0, -1e8, -1.0]], np.float32)
    layers = [
        (np.zeros((4, 1), np.float32), np.ones(4, np.float32)),
        (row, np.zeros(1, np.float32)),
    ]
    arrays = {"0/bounds": CROWN, "0/proof": CROWN}
    case = Case(tmp_path, mlp(layers), query([0.0], [1.0], 1, "(>= Y_0 0.5)"))
    assert accepts(case, case.write(arrays))
    path = case.write(arrays)
    path.write_bytes(path.read_bytes().replace(b'\\"real\\"', b'\\"depl\\"'))
    assert not accepts(case, path)
    case = Case(tmp_path, mlp(layers), query([0.0], [1.0], 1, "(>= Y_0 0.0)"))
    assert not accepts(case, case.write(arrays))


@pytest.mark.parametrize("seed", range(6))
def test_planes_lie_below_the_network_exactly(seed: int) -> None:
    """Backward substitution against rational evaluation, where cancellation makes rounding large."""
    rng = np.random.default_rng(seed)
    scale = 10.0 ** rng.integers(-12, 12, 3)
    layers = [
        ((w * s).astype(np.float32), (b * s).astype(np.float32))
        for (w, b), s in zip(random_layers(seed, (3, 5, 4, 2)), scale, strict=True)
    ]
    net = read_network(mlp(layers))
    low, high = rng.normal(size=3), None
    high = low + rng.choice([0.0, 1e-9, 1.0], 3)
    engine = Engine(net, low, high, exact=False, deadline=np.inf)
    view = View(engine.root.lower, engine.root.upper, {})
    boxes = engine.intervals(view, lambda k: engine.crown(view, k))
    C = np.array([[1.0, -1.0], [-1.0, 1.0], [1.0, 1.0]])
    rows = Rows(C, np.zeros(3, int), np.zeros(3), np.zeros(3))
    planes = engine.pull(view, len(net.steps), rows)
    least = engine.least(view, planes, rows.owner)
    for _ in range(30):
        t = rng.choice([0.0, 1.0, rng.random()], 3)
        x = np.clip(low + t * (high - low), low, high)
        y = value(layers, x)
        for i, c in enumerate(C):
            f = sum((Fraction(a) * v for a, v in zip(c, y, strict=True)), Fraction(0))
            plane = Fraction(planes.c[i]) + sum(
                (Fraction(g) * Fraction(v) for g, v in zip(planes.G[i], x, strict=True)),
                Fraction(0),
            )
            assert f >= plane
            assert f >= Fraction(least[i])
        for v, l, u in zip(y, boxes[-1][0][0], boxes[-1][1][0], strict=True):
            assert Fraction(l) <= v <= Fraction(u)


# -- other networks -------------------------------------------------------------------------------------------------


def convolutional(rng: np.random.Generator) -> bytes:
    """Most of what the reader knows, on a 1×2×6×6 image."""

    def small(*shape: int) -> np.ndarray:
        return (0.5 * rng.normal(size=shape)).astype(np.float32)

    nodes = [
        helper.make_node("Sub", ["x", "mean"], ["c"]),
        helper.make_node("Div", ["c", "scale"], ["d"]),
        helper.make_node("Conv", ["d", "w", "wb"], ["e"], strides=[1, 2], pads=[1, 0, 1, 1]),
        helper.make_node("BatchNormalization", ["e", "g", "gb", "m", "var"], ["f"]),
        helper.make_node("LeakyRelu", ["f"], ["h"], alpha=0.1),
        helper.make_node("MaxPool", ["h"], ["p"], kernel_shape=[2, 2], pads=[0, 0, 1, 1]),
        helper.make_node("AveragePool", ["h"], ["q"], kernel_shape=[2, 2], pads=[0, 0, 1, 1]),
        helper.make_node("Conv", ["p", "v"], ["r"], group=2, kernel_shape=[1, 1]),
        helper.make_node("Concat", ["r", "q"], ["s"], axis=1),
        helper.make_node("Transpose", ["s"], ["t"], perm=[0, 2, 3, 1]),
        helper.make_node("Flatten", ["t"], ["u"]),
        helper.make_node("MatMul", ["u", "M"], ["z"]),
        helper.make_node("Add", ["z", "k"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Sub", ["b", "a"], ["n"]),
        helper.make_node("Slice", ["n", "one", "five"], ["o"]),
        helper.make_node("Gemm", ["o", "L", "lb"], ["y"], transB=1),
    ]
    parameters = {
        "mean": small(2, 1, 1), "scale": np.full((2, 1, 1), 0.7, np.float32), "w": small(4, 2, 3, 3), "wb": small(4),
        "g": 1 + small(4), "gb": small(4), "m": small(4), "var": np.float32([0.5, 1, 2, 3]), "v": small(2, 2, 1, 1),
        "M": small(6 * 3 * 6, 7), "k": small(7), "one": np.int64([0, 1]), "five": np.int64([1, 6]),
        "L": small(2, 5), "lb": small(2),
    }  # fmt: skip
    return onnx_bytes(nodes, parameters, (1, 2, 6, 6), (1, 2))


def outputs(data: bytes, points: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    import onnxruntime

    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    run = [session.run(None, {"x": p.reshape(shape).astype(np.float32)})[0][0] for p in points]
    return np.array(run)


def test_a_network_of_many_operators_lies_above_its_planes() -> None:
    rng = np.random.default_rng(0)
    data = convolutional(rng)
    net = read_network(data)
    for width in (1e-3, 0.2, 1.0):
        low = np.float32(rng.random(72)).astype(float)
        high = np.float32(low + width).astype(float)
        engine = Engine(net, low, high, exact=False, deadline=np.inf)
        view = View(engine.root.lower, engine.root.upper, {})
        engine.intervals(view, lambda k: engine.crown(view, k))  # noqa: B023
        C = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [1.0, -1.0]])
        rows = Rows(C, np.zeros(4, int), np.zeros(4), np.zeros(4))
        planes = engine.pull(view, len(net.steps), rows)
        least = engine.least(view, planes, rows.owner)
        points = np.clip(low + (high - low) * rng.choice([0.0, 0.5, 1.0], (40, 72)), low, high)
        values = outputs(data, points, (1, 2, 6, 6)) @ C.T
        below = planes.c + np.float32(points) @ planes.G.T
        assert (values >= below - 1e-4).all()
        assert (values >= least - 1e-4).all()
        if width < 0.01:  # and close, where little is relaxed
            assert (values.min(0) - least < 0.3).all()


@pytest.mark.parametrize("kind", ["Sigmoid", "Tanh"])
def test_smooth_lines_hold_everywhere(kind: str) -> None:
    from calipers_check.smooth import image, lines

    rng = np.random.default_rng(0)
    low = np.concatenate([rng.normal(size=400) * 4, rng.normal(size=100) * 1e-6, [-700, -30.0]])
    high = low + np.concatenate(
        [rng.exponential(size=400) * 4, rng.random(100) * 1e-6, [1400, 1e-9]]
    )
    name = kind.lower()
    below, under, above, over = lines(name, low, high)
    bottom, top = image(name, low, high)

    def f(v: np.ndarray) -> np.ndarray:
        v = v.astype(np.longdouble)
        return np.tanh(v) if kind == "Tanh" else 1 / (1 + np.exp(-v))

    gaps = []
    for t in np.linspace(0, 1, 101):
        v = np.clip(low + t * (high - low), low, high)
        assert (below * v.astype(np.longdouble) + under <= f(v)).all()
        assert (above * v.astype(np.longdouble) + over >= f(v)).all()
        assert ((bottom <= f(v)) & (f(v) <= top)).all()
        gaps.append((above - below) * v + over - under)
    assert (np.max(gaps, 0) <= 1.02 * (top - bottom) + 1e-10).mean() > 0.9  # and they are of use


def test_a_smooth_network_is_certified(tmp_path: Path) -> None:
    layers = random_layers(1)
    for kind in ("Sigmoid", "Tanh"):
        text = query([-0.1, -0.1], [0.1, 0.1], 1, "(or (>= Y_0 3) (<= Y_0 -3))")
        case = Case(tmp_path, mlp(layers, kind), text)
        arrays = {"0/bounds": CROWN, "0/proof": CROWN}
        assert accepts(case, case.write(arrays, [{"clauses": [0, 1]}]))
        y = outputs(mlp(layers, kind), np.zeros((1, 2)), (1, 2))[0, 0]
        case = Case(
            tmp_path, mlp(layers, kind), query([-0.1] * 2, [0.1] * 2, 1, f"(>= Y_0 {y - 1e-3})")
        )
        assert not accepts(case, case.write(arrays))


def test_sparse_products_are_dense_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """As numbers, as magnitudes and as rows; also in rationals."""
    import calipers_check.onnx_file as reader

    rng = np.random.default_rng(0)
    weight = rng.normal(size=(30, 40)).astype(np.float32) * (rng.random((30, 40)) < 0.03)
    layers = [(weight, np.ones(30, np.float32)), (weight[:1, :30], np.ones(1, np.float32))]
    sparse = read_network(mlp(layers)).steps[0]
    monkeypatch.setattr(reader, "SPARSE", 10**9)
    dense = read_network(mlp(layers)).steps[0]
    assert type(sparse) is not type(dense)
    x, A = rng.normal(size=(3, 40)), rng.normal(size=(3, 30))
    for kind in (lambda s: s, lambda s: s.exact()):
        one, other = kind(sparse), kind(dense)
        for name, v in (("along", x), ("sizes", np.abs(x)), ("back", A)):
            v = v if kind(sparse) is sparse else np.frompyfunc(Fraction, 1, 1)(v)
            gap = getattr(one, name)(0, v) - getattr(other, name)(0, v)
            assert np.abs(gap.astype(float)).max() < 1e-14
    assert sparse.terms <= dense.terms


def test_convolutions_are_pulled_back_from_any_part_of_the_image() -> None:
    """A·(Lx) = (AL)·x in whole numbers, for rows that are zero but for a few places, and for rows of zeros."""
    rng = np.random.default_rng(0)
    for kind in ({"strides": [2, 1], "pads": [1, 0, 2, 1]}, {"dilations": [2, 2]}, {"group": 2}):
        weight = rng.integers(-3, 4, (4, 2 // kind.get("group", 1), 3, 2)).astype(np.float32)
        node = helper.make_node("Conv", ["x", "w"], ["y"], **kind)
        conv = read_network(onnx_bytes([node], {"w": weight}, (1, 2, 7, 6), (1, 4, 1, 1))).steps[0]
        x = rng.integers(-5, 6, (1, 84)).astype(float)
        y = conv.along(0, x)[0]
        for used in (0, 1, 2, len(y)):
            A = np.zeros((3, len(y)))
            places = rng.choice(len(y), used, replace=False)
            A[:, places] = rng.integers(-3, 4, (3, used))
            assert np.array_equal(A @ y, conv.back(0, A) @ x[0])


def test_values_that_are_read_more_than_once(tmp_path: Path) -> None:
    """y = relu(x) + relu(x) + x − x, at most 2; a bias behind a shared product belongs to one reader alone."""
    nodes = [
        helper.make_node("MatMul", ["x", "W"], ["p"]),
        helper.make_node("Identity", ["p"], ["q"]),
        helper.make_node("Add", ["q", "b"], ["r"]),
        helper.make_node("Relu", ["p"], ["h"]),
        helper.make_node("Add", ["h", "h"], ["s"]),
        helper.make_node("Sub", ["r", "p"], ["t"]),
        helper.make_node("Add", ["s", "t"], ["y"]),
    ]
    parameters = {"W": np.float32([[1.0]]), "b": np.float32([5.0])}
    data = onnx_bytes(nodes, parameters, (1, 1), (1, 1))
    arrays = {"0/bounds": CROWN, "0/proof": CROWN}
    for threshold, expected in (("7.001", True), ("7", False), ("6.9", False)):
        case = Case(tmp_path, data, query([-1.0], [1.0], 1, f"(>= Y_0 {threshold})"))
        assert accepts(case, case.write(arrays)) is expected


def test_networks_that_are_refused() -> None:
    """What would be misread is not read."""
    W, one = np.float32([[1.0]]), (1, 1)

    def network(*nodes: Any, **more: Any) -> bytes:
        return onnx_bytes(list(nodes), {"W": W, **more}, one, one)

    for data in (
        b"", b"not onnx",
        network(helper.make_node("Gemm", ["x", "W"], ["y"], alpha=0.5)),
        network(helper.make_node("Softmax", ["x"], ["y"])),
        network(helper.make_node("Mul", ["x", "x"], ["y"])),
        network(helper.make_node("Div", ["W", "x"], ["y"])),
        network(helper.make_node("Relu", ["x"], ["y"], odd=1)),
        network(helper.make_node("Relu", ["z"], ["y"])),
        network(helper.make_node("Add", ["W", "W"], ["z"]), helper.make_node("Add", ["x", "z"], ["y"])),
        network(helper.make_node("MatMul", ["x", "N"], ["y"]), N=np.float32([[np.nan]])),
        network(helper.make_node("Relu", ["x"], ["y"], domain="other")),
        network(helper.make_node("Identity", ["W"], ["y"])),
        network(helper.make_node("Cast", ["x"], ["y"], to=7)),
        network(helper.make_node("Div", ["x", "O"], ["y"]), O=np.float32([0.0])),
    ):  # fmt: skip
        with pytest.raises(Unusable):
            read_network(data)


def test_trees_that_share_a_root(tmp_path: Path) -> None:
    """Two clauses over one box: the second tree starts where node 0 of the first left off, with its columns."""
    case, arrays = two_neuron_case(tmp_path)
    text = query([-1.0], [1.0], 1, "(or (>= Y_0 -0.4999) (>= Y_0 -0.499))")
    case = Case(tmp_path, mlp(two_neurons()), text)
    second = {
        "1/line.node": I32([0]), "1/line.clause": I32([1]), "1/line.choice": I32([0]),
        "1/choice": np.uint8([[255, 255]]),
    }  # fmt: skip
    columns = {"0/column.layer": I32([0, 0]), "0/column.element": I32([0, 1])}
    trees = [{"clauses": [0]}, {"clauses": [1], "root": 0}]
    assert accepts(case, case.write(arrays | columns | second, trees))
    assert not accepts(case, case.write(arrays | second, trees))
    own = {"1/column.layer": I32([0, 0]), "1/column.element": I32([0, 1])}
    assert not accepts(case, case.write(arrays | columns | second | own, trees))
    text = query([-1.0], [1.0], 1, "(or (>= Y_0 -0.4999) (and (<= X_0 0.5) (>= Y_0 -0.499)))")
    case = Case(tmp_path, mlp(two_neurons()), text)
    with pytest.raises(Refused, match="its box"):
        check(case.write(arrays | columns | second, trees), case.network, case.prop)


# -- queries --------------------------------------------------------------------------------------------------------


def test_disjuncts_of_a_query_in_order() -> None:
    text = query(
        [0.0, 0.0], [1.0, 0.1], 2, "(or (and (<= X_0 0.3) (>= Y_0 Y_1)) (< (+ Y_1 (* 2 Y_0)) 0.1))"
    )
    found = clauses(text + "(assert (<= Y_1 5))")
    assert [c.C.tolist() for c in found] == [[[0, 1], [-1, 1]], [[0, 1], [2, 1]]]
    assert [c.upper.tolist() for c in found] == [[np.nextafter(0.3, 1), 0.1], [1.0, 0.1]]
    assert Fraction(found[0].upper[0]) >= Fraction("0.3")
    assert Fraction(found[0].upper[1]) >= Fraction("0.1")
    assert Fraction(found[1].d[1]) <= Fraction("-0.1")


def test_version_2_says_the_same() -> None:
    text = """(vnnlib-version <2.0>) ; a comment
    (declare-network N (declare-input A real [1, 2]) (declare-output B real [2]))
    (assert (and (<= A[0,0] 1.0) (>= A[0,0] 0.0))) (assert (== A[0,1] 0.5))
    (assert (or (> B[0] B[1]) (!= B[0] 0.25)))"""
    found = clauses(text)
    assert [c.C.tolist() for c in found] == [[[-1, 1]], [[1, 0]], [[-1, 0]]]
    assert found[0].lower.tolist() == [0.0, 0.5]


def test_empty_disjuncts_need_no_proof(tmp_path: Path) -> None:
    text = query(
        [0.0], [1.0], 1, "(or (and (>= X_0 2) (>= Y_0 0)) (and (<= X_0 0.5) (>= X_0 0.6)))"
    )
    case = Case(tmp_path, mlp(two_neurons()), text)
    assert accepts(case, case.write({}, [{"clauses": [0, 1]}]))
    assert accepts(case, case.write({}, []))


@pytest.mark.parametrize(
    "text",
    [
        "", "(", "(assert (<= X_0 1))", "(assert (<= X_0 1)) x", ")", "(declare-const Z Real)",
        "(declare-const X_0 Real)(declare-const Y_0 Real)(assert (<= X_0 1))(assert (>= Y_0 0))",
        "(declare-const X_0 Real)(declare-const Y_0 Real)(assert (<= X_0 1 2))",
        "(declare-const X_0 Real)(declare-const Y_0 Real)(assert (<= X_1 1))",
        "(declare-const X_0 Real)(declare-const Y_0 Real)(assert (<= (* Y_0 Y_0) 1))",
        "(declare-const X_0 Real)(declare-const Y_0 Real)(assert (<= X_0 nan))",
        "(declare-const X_0 Real)(declare-const Y_0 Real)(assert (<= X_0 1e999))",
        "(declare-const X_99999999 Real)(declare-const Y_0 Real)", "(" * 10**6,
    ],
)  # fmt: skip
def test_texts_that_are_no_queries(text: str) -> None:
    with pytest.raises(Unusable):
        clauses(text)


def test_too_many_disjuncts_are_refused_at_once() -> None:
    one = "(assert (or (<= Y_0 0) (>= Y_0 1)))"
    with pytest.raises(Unusable, match="too many"):
        clauses(query([0.0], [1.0], 1, "(<= Y_0 5)") + one * 40)


# -- the program ----------------------------------------------------------------------------------------------------


def program(*arguments: Any) -> tuple[int, str]:
    code = (
        "import sys; from calipers_check.__main__ import main; code = main(sys.argv[1:]);"
        "assert not {'torch', 'calipers'} & {m.split('.')[0] for m in sys.modules}; sys.exit(code)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    return run.returncode, run.stdout + run.stderr


def test_the_program_needs_neither_torch_nor_calipers(tmp_path: Path) -> None:
    case, arrays = two_neuron_case(tmp_path)
    given = (case.write(arrays), "--network", case.network)
    assert program(*given, "--property", case.prop)[0] == 0
    code, said = program(*given)
    assert code == 2
    assert "--property" in said
    case.write(arrays | {"0/multiplier": F64([0.0, 0.0])})
    code, said = program(*given, "--property", case.prop)
    assert code == 1
    assert said.startswith("refused: tree 0: node")
    assert program(*given[:2], tmp_path / "none.onnx", "--property", case.prop)[0] == 2


def test_calipers_check_forwards_without_torch(tmp_path: Path) -> None:
    case, arrays = two_neuron_case(tmp_path)
    code = "import sys; from calipers.cli import main\ntry: main()\nfinally: assert 'torch' not in sys.modules"
    given = ["check", case.write(arrays), "--network", case.network, "--property", case.prop]
    run = subprocess.run(
        [sys.executable, "-c", code, *map(str, given)], capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stdout[:8]) == (0, "accepted"), run.stderr
