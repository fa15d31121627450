"""Attacks on the checker: networks that other programs read differently, files made to exhaust it, claims mixed up.

Every network here is one that a careless reader would take for another function; the checker must refuse it.
"""

from __future__ import annotations

import gzip
import importlib
import json
import math
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from calipers_check import Refused, Unusable, check
from calipers_check.onnx_file import network as read_network
from certificates import Case, mlp, onnx_bytes, packed, query, random_layers
from test_check import F64, I32, U8, accepts, two_neuron_case, two_neurons

F32, I64 = np.float32, np.int64
SQUARE = (1, 1, 4, 4)
KERNEL = {"w": np.ones((1, 1, 3, 3), F32)}
FOUR = {"g": np.ones(1, F32), "b": np.zeros(1, F32), "m": np.zeros(1, F32), "v": np.ones(1, F32)}


def one(op: str, inputs: str = "x", outputs: str = "y", **attributes: Any) -> Any:
    return helper.make_node(op, inputs.split(","), outputs.split(","), **attributes)


def model(data: bytes, change: Callable[[Any], Any]) -> bytes:
    found = onnx.load_from_string(data)
    change(found)
    return found.SerializeToString()


# -- networks ---------------------------------------------------------------------------------------------------------


def two(*nodes: Any, **parameters: np.ndarray) -> bytes:
    return onnx_bytes(list(nodes), parameters, (1, 2), (1, 2))


def image(*nodes: Any, **parameters: np.ndarray) -> bytes:
    return onnx_bytes(list(nodes), {**KERNEL, **FOUR, **parameters}, SQUARE, (1, 1, 2, 2))


MISREAD = {
    "automatic padding": image(one("Conv", "x,w", auto_pad="SAME_UPPER")),
    "padding given and automatic": image(one("Conv", "x,w", auto_pad="VALID", pads=[1, 1, 1, 1])),
    "another kernel than the weights'": image(one("Conv", "x,w", kernel_shape=[2, 2])),
    "groups that do not fit": image(one("Conv", "x,w", group=2)),
    "no group": image(one("Conv", "x,w", group=0)),
    "no dilation": image(one("Conv", "x,w", dilations=[0, 0])),
    "strides of one axis": image(one("Conv", "x,w", strides=[2])),
    "a bias for other channels": image(one("Conv", "x,w,c"), c=np.ones(2, F32)),
    "a window rounded up": image(one("MaxPool", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1)),
    "negative padding": image(one("MaxPool", kernel_shape=[2, 2], pads=[-1, 0, 0, 0])),
    "a maximum of padding": image(one("MaxPool", kernel_shape=[1, 1], pads=[1, 1, 1, 1])),
    "an index that is read": image(one("MaxPool", "x", "h,y", kernel_shape=[2, 2])),
    "statistics of the batch": image(one("BatchNormalization", "x,g,b,m,v", "y,m1,v1,m2,v2")),
    "training": image(one("BatchNormalization", "x,g,b,m,v", training_mode=1)),
    "a negative variance": image(one("BatchNormalization", "x,g,b,m,n"), n=np.array([-1], F32)),
    "normalisation of other channels": image(
        one("BatchNormalization", "x,g,b,m,t"), t=np.ones(2, F32)
    ),
    "padding that mirrors": image(one("Pad", "x,p", mode="reflect"), p=np.zeros(8, I64)),
    "padding with ones": image(one("Pad", "x,p,g"), p=np.ones(8, I64)),
    "a slice backwards": two(
        one("Slice", "x,s,e,a,t"), s=np.array([-9]), e=np.array([-9]), a=np.array([1]), t=np.array([-1])
    ),
    "slices along one axis twice": two(
        one("Slice", "x,s,e,a"), s=np.array([0, 1]), e=np.array([1, 2]), a=np.array([1, -1])
    ),
    "parts that leave something out": two(one("Split", "x,s", "y,z", axis=1), s=np.array([1, 0])),
    "more parts than the operand has": two(one("Split", "x,s", "y,z", axis=1), s=np.array([1, 2])),
    "a scaled product": two(one("Gemm", "x,W", alpha=2.0), W=np.eye(2, dtype=F32)),
    "a scaled bias": two(one("Gemm", "x,W,c", beta=0.5), W=np.eye(2, dtype=F32), c=np.ones(2, F32)),
    "a product that is not real": two(one("Mul", "x,c"), c=np.array([1j, 1])),
    "a sum of three": two(one("Add", "x,c,c"), c=np.ones(2, F32)),
    "an activation of two": two(one("Relu", "x,c"), c=np.ones(2, F32)),
    "an attribute of an earlier version": two(one("Squeeze", "x", axes=[0])),
    "a limit that is not read": two(one("Clip", "x,l"), l=np.zeros((), F32)),
    "an attribute of another type": two(one("LeakyRelu", alpha=1)),
    "a slope that is not a number": two(one("LeakyRelu", alpha=float("nan"))),
    "a cast to integers": two(one("Cast", to=TensorProto.INT32)),
    "a cast to half precision": two(one("Cast", to=TensorProto.FLOAT16)),
    "a cast of a constant that rounds": two(
        one("Cast", "c", "d", to=TensorProto.FLOAT), one("Add", "x,d"), c=np.array([0.1, 0.1])
    ),
    "dropout while training": two(
        one("Dropout", "x,r,t"), r=np.array(0.5, F32), t=np.array(True)
    ),
    "a value defined twice": two(one("Neg", "x", "h"), one("Relu", "x", "h"), one("Neg", "h")),
    "the input defined again": two(one("Neg", "x", "x"), one("Relu", "x")),
    "a parameter defined again": two(one("Neg", "x", "c"), one("Add", "x,c"), c=np.ones(2, F32)),
    "a value read before it is made": two(one("Neg", "h"), one("Relu", "x", "h")),
    "a value that has no name": two(one("Relu", "x", ""), one("Neg", "")),
    "an operator of another domain": two(one("Relu", domain="com.microsoft")),
    "an infinite parameter": two(one("Add", "x,c"), c=np.array([np.inf, 0], F32)),
    "a constant that is not finite": two(
        one("Constant", "", "c", value_floats=[np.nan, 1.0]), one("Add", "x,c")
    ),
    "a parameter too large for float64": two(one("Add", "x,c"), c=np.array([2**62 + 1, 0])),
    "products of variables": two(one("MatMul", "x,x")),
    "an output that does not depend on the input": two(one("Identity", "c"), c=np.ones(2, F32)),
}  # fmt: skip


@pytest.mark.parametrize("what", MISREAD)
def test_networks_that_could_be_misread(what: str) -> None:
    with pytest.raises(Unusable):
        read_network(MISREAD[what])


def bfloat16(value: int) -> Any:
    return helper.make_tensor(
        "c", TensorProto.BFLOAT16, [2], np.uint16([value, 0]).tobytes(), raw=True
    )


def version(number: int, domain: str = "") -> Callable[[Any], Any]:
    def change(m: Any) -> None:
        del m.opset_import[:]
        m.opset_import.append(helper.make_opsetid(domain, number))

    return change


def repeated(m: Any) -> None:
    m.graph.initializer.append(numpy_helper.from_array(np.zeros(2, F32), "c"))


def doubled_attribute(m: Any) -> None:
    m.graph.node[0].op_type = "LeakyRelu"
    del m.graph.node[0].input[1]
    m.graph.node[0].attribute.extend(helper.make_attribute("alpha", v) for v in (0.1, 0.5))


MODELS: dict[str, Callable[[Any], Any]] = {
    "version 6": version(6),
    "version 1, by the domain's other name": version(1, "ai.onnx"),
    "no version": lambda m: m.opset_import.pop(),
    "a version yet to come": version(999),
    "two versions": lambda m: m.opset_import.append(helper.make_opsetid("ai.onnx", 9)),
    "a parameter twice": repeated,
    "an attribute twice": doubled_attribute,
    "a sparse parameter": lambda m: m.graph.sparse_initializer.add(),
    "a parameter in another file": lambda m: setattr(m.graph.initializer[0], "data_location", 1),
    "a function": lambda m: m.functions.add(),
    "two outputs": lambda m: m.graph.output.append(m.graph.output[0]),
    "two inputs": lambda m: m.graph.input.append(helper.make_tensor_value_info("z", 1, (1, 2))),
    "an open size": lambda m: m.graph.input[0].type.tensor_type.shape.dim[1].Clear(),
    "not a number, in bfloat16": lambda m: m.graph.initializer[0].CopyFrom(bfloat16(0x7FC0)),
    "infinity, in bfloat16": lambda m: m.graph.initializer[0].CopyFrom(bfloat16(0x7F80)),
}


@pytest.mark.parametrize("what", MODELS)
def test_models_that_could_be_misread(what: str) -> None:
    data = two(one("Add", "x,c"), c=np.ones(2, F32))
    assert read_network(data).inputs == 2
    with pytest.raises(Unusable):
        read_network(model(data, MODELS[what]))


def test_parameters_that_are_inputs_too_are_parameters() -> None:
    """As in onnxruntime, where a file's own value is the default."""
    data = two(one("Add", "x,c"), c=np.ones(2, F32))
    listed = model(
        data, lambda m: m.graph.input.insert(0, helper.make_tensor_value_info("c", 1, (2,)))
    )
    assert read_network(listed).inputs == 2


@pytest.mark.parametrize("kind", [np.float16, np.float64, "bfloat16", "subnormal"])
def test_parameters_of_all_precisions_count_as_the_numbers_they_are(
    tmp_path: Path, kind: Any
) -> None:
    """y = x0 + c: certified below 1 + c, not at it."""
    value = {"bfloat16": 1.0, "subnormal": 1e-44}.get(kind, 0.1)
    c = np.array([value, 0], kind if not isinstance(kind, str) else F32)
    data = two(one("Add", "x,c"), c=c)
    if kind == "bfloat16":
        data = model(data, lambda m: m.graph.initializer[0].CopyFrom(bfloat16(0x3F80)))
    top = float(c[0])  # over x0 <= 0
    arrays = {"0/bounds": U8([2]), "0/proof": U8([2])}
    for threshold, expected in ((top, False), (math.nextafter(top, -1), False), (2 * top, True)):
        case = Case(tmp_path, data, query([-1.0, 0.0], [0.0, 1.0], 2, f"(>= Y_0 {threshold!r})"))
        assert accepts(case, case.write(arrays)) is expected


def test_sums_that_overflow_prove_nothing(tmp_path: Path) -> None:
    """Partial sums beyond the largest float64, in every order: the real sum is 0."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        row = rng.permutation(np.repeat([1e308, -1e308], 8))
        layers = [(np.vstack([row, -row]), np.zeros(2)), (np.array([[1.0, 1.0]]), np.zeros(1))]
        text = query([1.0] * 16, [1.0] * 16, 1, "(>= Y_0 0)")
        case = Case(tmp_path, mlp(layers), text)
        rows = {
            "0/bound.node": I32([0, 0]), "0/bound.layer": I32([0, 0]), "0/bound.element": I32([0, 1]),
            "0/bound.side": U8([0, 1]), "0/bound.choice": U8([]),
        }  # fmt: skip
        for proof in (1, 2):
            arrays = {"0/bounds": U8([3]), "0/proof": U8([proof]), "0/trim": U8([1])}
            assert not accepts(case, case.write({**arrays, **rows}))


# -- properties -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "unsafe",
    [
        "(>= Y_0 -0.5)",  # what the network attains
        "(> Y_0 -0.500001)",
        "(not (< Y_0 -0.5))",
        "(or (>= Y_0 5) (>= Y_0 -0.5))",
        "(or (and (>= Y_0 5) (<= X_0 0)) (and (>= Y_0 -0.5) (>= X_0 0.25)))",
        "(and (or (>= X_0 0.75) (<= X_0 0.25)) (>= Y_0 -0.5))",
        "(and (<= X_0 0.1) (>= X_0 0.1) (>= Y_0 -0.5))",  # a point that is no float64
        "(and (<= (+ X_0 Y_0) 5) (>= Y_0 -0.5))",  # relates inputs and outputs
        "(>= (* 3 Y_0) -1.5)",
        "(<= (- Y_0) (* 0.1 5))",
        "(and (>= Y_0 -0.6) (>= Y_0 -0.5))",
    ],
)
def test_texts_whose_unsafe_points_exist(tmp_path: Path, unsafe: str) -> None:
    """y = −relu(x) − relu(1/2 − x) is −1/2 on all of [0, 1/2]."""
    case = Case(tmp_path, mlp(two_neurons()), query([-1.0], [1.0], 1, unsafe))
    child = {
        "0/child": I32([1, 0, 0]),
        "0/layer": I32([0]),
        "0/element": I32([0]),
        "0/point": F64([0]),
    }
    arrays = child | {"0/bounds": U8([2]), "0/proof": U8([2]), "0/trim": U8([1])}
    for clauses in ([0], [0, 1], [1]):
        trees = [{"clauses": clauses}]
        try:
            check(case.write(arrays, trees), case.network, case.prop)
        except (Refused, Unusable):
            continue
        pytest.fail("accepted")


def test_bounds_that_are_missing_are_not_made_up(tmp_path: Path) -> None:
    case, arrays = two_neuron_case(tmp_path)
    text = case.prop.read_text()
    for line in ("(assert (>= X_0 -1.0))", "(assert (<= X_0 1.0))"):
        case.prop.write_text(text.replace(line, ""))
        with pytest.raises(Unusable, match="no finite bound"):
            check(case.write(arrays), case.network, case.prop)
    case.prop.write_text(text + "(declare-const X_1 Real)(assert (>= X_1 0))(assert (<= X_1 0))")
    with pytest.raises(Unusable, match="1 inputs"):
        check(case.write(arrays), case.network, case.prop)
    case.prop.write_text(
        "(vnnlib-version <2.0>)(declare-network N (declare-input X real [1]))" + text
    )
    with pytest.raises((Unusable, Refused)):
        check(case.write(arrays), case.network, case.prop)


def inline(case: Case, p: str, **own: np.ndarray) -> Path:
    arrays = {f"property/{k}": v for k, v in own.items()} | {
        "0/bounds": U8([2]),
        "0/proof": U8([2]),
    }
    return case.save(packed(case.document() | {"property": {"inline": True, "p": p}}, arrays))


def test_digests_of_inline_properties_tell_them_apart(tmp_path: Path) -> None:
    """The norm counts, and the same bytes cannot be cut into other arrays."""
    case, _ = two_neuron_case(tmp_path)
    own = {
        "lower": F64([-1.0]), "upper": F64([1.0]), "center": F64([0.0]), "eps": F64([0.5]), "C": F64([[-1.0]]),
        "d": F64([5.0]), "clause": I32([0]),
    }  # fmt: skip
    digests = {check(inline(case, p, **own), case.network).digest for p in ("1", "2")}
    assert len(digests) == 2
    for wrong in (np.int64([0]), U8([0])):
        with pytest.raises(Refused, match="I32"):
            check(inline(case, "2", **own | {"clause": wrong}), case.network)


def test_a_property_about_nothing_is_refused(tmp_path: Path) -> None:
    case, _ = two_neuron_case(tmp_path)
    own = {"C": F64([[1.0]]), "d": F64([0.0]), "clause": I32([0])}
    with pytest.raises(Refused, match="without any point"):
        check(inline(case, "inf", lower=F64([1.0]), upper=F64([-1.0]), **own), case.network)


def test_empty_clauses_beside_others(tmp_path: Path) -> None:
    """A line for a clause whose box is empty proves that clause, and no other."""
    text = query(
        [-1.0],
        [1.0],
        1,
        "(or (>= Y_0 -0.5) (and (>= X_0 2) (>= Y_0 -9)) (and (>= X_0 3) (>= Y_0 9)))",
    )
    case = Case(tmp_path, mlp(two_neurons()), text)
    lines = {"0/line.node": I32([0]), "0/line.clause": I32([2]), "0/line.choice": I32([-1])}
    assert not accepts(case, case.write(lines, [{"clauses": [0, 1, 2]}]))


# -- trees ------------------------------------------------------------------------------------------------------------


def test_each_clause_needs_a_proof_on_its_own_box(tmp_path: Path) -> None:
    """A tree's box holds those of all its clauses; no clause is proved on another's."""
    easy, hard = "(and (<= X_0 0) (>= Y_0 -0.49))", "(and (>= X_0 0) (>= Y_0 -0.5))"
    case = Case(tmp_path, mlp(two_neurons()), query([-1.0], [1.0], 1, f"(or {easy} {hard})"))
    arrays = {"0/bounds": U8([2]), "0/proof": U8([2]), "0/trim": U8([1])}
    more = {"1/bounds": U8([2]), "1/proof": U8([2])}
    assert not accepts(case, case.write(arrays, [{"clauses": [0, 1]}]))
    assert not accepts(case, case.write(arrays | more, [{"clauses": [0]}, {"clauses": [1]}]))
    assert not accepts(
        case, case.write(arrays | more, [{"clauses": [0]}, {"clauses": [1], "root": 0}])
    )
    assert not accepts(case, case.write(arrays | more, [{"clauses": [0]}, {"clauses": [0]}]))


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8])
def test_numbers_of_every_integer_type(tmp_path: Path, kind: Any) -> None:
    """Large, negative, and wrapped around: refused as out of range, never taken modulo anything."""
    case, arrays = two_neuron_case(tmp_path)
    info = np.iinfo(kind)
    for name in ("child", "layer", "element", "line.node", "line.clause", "line.choice"):
        old = arrays[f"0/{name}"].astype(kind)
        for wrong in {int(info.min), int(info.max), 2**32 + 1, -(2**31), -3, 77} - {0}:
            if not info.min <= wrong <= info.max:
                continue
            new = old.copy()
            new[0] = wrong
            assert not accepts(case, case.write(arrays | {f"0/{name}": new})), (name, wrong)


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_zero_has_no_sign(tmp_path: Path, zero: float) -> None:
    case, arrays = two_neuron_case(tmp_path)
    assert accepts(case, case.write(arrays | {"0/point": F64([zero])}))
    case, arrays = two_neuron_case(tmp_path, "-0.5")
    signed = {"0/point": F64([zero]), "0/multiplier": F64([1.0, zero])}
    assert not accepts(case, case.write(arrays | signed))


@pytest.mark.parametrize("point", [5e-324, -5e-324, 1e-310, 1e308, -1e308])
def test_splits_at_extreme_points(tmp_path: Path, point: float) -> None:
    """Both halves together are the whole, wherever it is cut."""
    case, arrays = two_neuron_case(tmp_path, "-0.5")
    for layer in (-1, 0):
        cut = {
            "0/point": F64([point]),
            "0/layer": I32([layer]),
            "0/bounds": U8([2]),
            "0/proof": U8([2]),
        }
        if layer < 0:
            cut["0/multiplier"] = F64([])
        for trim in (0, 1):
            assert not accepts(case, case.write(arrays | cut | {"0/trim": U8([trim])}))


# -- exhaustion -------------------------------------------------------------------------------------------------------


def refused(case: Case, data: bytes, seconds: float = 3.0) -> str:
    """Why, after a look at the clock; other processes may slow this one down, so its own time counts."""
    path, begin = case.save(data), time.process_time()
    with pytest.raises(Refused) as error:
        check(path, case.network, case.prop, seconds=60)
    assert time.process_time() - begin < seconds
    return str(error.value)


def headed(header: Any, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def test_headers_made_to_exhaust(tmp_path: Path) -> None:
    case, _ = two_neuron_case(tmp_path)
    meta = {"__metadata__": {"certificate": json.dumps(case.document())}}
    entry = {"dtype": "I32", "shape": [0], "data_offsets": [0, 0]}
    digits = int("9" * 4000)
    deep: Any = []
    for _ in range(400):
        deep = [deep]
    for odd in (
        {"shape": [digits] * 3000}, {"shape": deep}, {"dtype": deep}, {"dtype": ["I32"]}, {"data_offsets": deep},
        {"shape": [0, digits], "data_offsets": [0, digits]}, {"data_offsets": [digits, digits]},
    ):  # fmt: skip
        assert "array" in refused(case, headed(meta | {"0/child": entry | odd}))
    assert refused(case, headed(b'{"a":' * 100_000))
    assert refused(case, headed(b"9" * 1_000_000))
    assert refused(case, headed(b'{"__metadata__":{"certificate":"\\ud800"}}'))
    assert refused(case, headed(b"\xff\xfe{}"))
    many = {f"{i}/child": entry for i in range(50_000)}
    assert "part of any tree" in refused(case, headed(meta | many))
    trees = case.document([{"clauses": [0]}] * 100_000)
    assert "of them for 1 clauses" in refused(
        case, headed({"__metadata__": {"certificate": json.dumps(trees)}})
    )


def test_gzip_of_very_many_members(tmp_path: Path) -> None:
    case, arrays = two_neuron_case(tmp_path)
    whole = case.write(arrays).read_bytes()
    assert "members" in refused(case, gzip.compress(b"") * 100_000)
    path = case.save(gzip.compress(whole[:100]) + gzip.compress(whole[100:]))
    assert accepts(case, path)


def test_rows_of_one_node_are_counted(tmp_path: Path) -> None:
    """Their planes are kept until the node is left."""
    case, _ = two_neuron_case(tmp_path)
    for count, reason in ((110, "not proved"), (111, "too many rows"), (10**6, "too many rows")):
        zeros = np.zeros(count, np.uint8)
        lines = {
            "0/line.node": zeros,
            "0/line.clause": zeros,
            "0/line.choice": np.full(count, -1, I32),
        }
        assert reason in refused(case, case.write(lines).read_bytes())


def test_nodes_that_wait_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import calipers_check.prove as prove

    monkeypatch.setattr(prove, "WAITING", 1000)
    monkeypatch.setattr(prove, "BATCH", 1)
    layers = random_layers(3)
    case = Case(tmp_path, mlp(layers), query([-1.0, -1.0], [1.0, 1.0], 1, "(>= Y_0 50)"))
    n = 400
    child = np.zeros(2 * n + 1, np.int32)
    child[np.concatenate([[0], np.arange(2, 2 * n, 2)])] = np.arange(1, 2 * n, 2)
    arrays = {"0/child": child, "0/layer": I32([-1]), "0/point": F64([0.0])}
    with pytest.raises(Refused, match="wait"):
        check(case.write(arrays), case.network, case.prop)


def test_what_the_checker_does_not_understand_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it is at fault itself."""
    own = importlib.import_module("calipers_check.check")
    case, arrays = two_neuron_case(tmp_path)

    def broken(*_: Any) -> Any:
        raise IndexError("planted")

    monkeypatch.setattr(own, "bare_root", broken)
    with pytest.raises(Refused, match="planted"):
        check(case.write(arrays), case.network, case.prop)


def test_reasons_are_one_line_of_plain_text(tmp_path: Path, capsys: Any) -> None:
    """A file's own words must not look like another verdict."""
    from calipers_check.__main__ import main

    case, arrays = two_neuron_case(tmp_path)
    path = case.write(arrays | {"x\naccepted: \ud800": I32([0])})
    code = main([str(path), "--network", str(case.network), "--property", str(case.prop)])
    said = capsys.readouterr().out
    assert code == 1
    assert said.startswith("refused: ")
    assert said.count("\n") == 1
    assert said.isascii()
