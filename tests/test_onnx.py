"""The ONNX reader and writer against onnxruntime: operators, public networks, hostile files, round trips."""

# ruff: noqa: E501 - one case per line

from __future__ import annotations

import gzip
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

import test_classifiers
from calipers.errors import CaptureError, ModelError, ModelTooLarge, UnsupportedOp
from calipers.graph.capture import capture
from calipers.graph.graph import Network, bind, concrete, walk
from calipers.graph.onnx import load_onnx, save_onnx, session
from peak import peak, restart

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
MAX = 2**63 - 1
RNG = np.random.default_rng(0)


def floats(*shape: int) -> np.ndarray[Any, Any]:
    return np.asarray(RNG.standard_normal(shape), dtype=np.float32)


def ints(*values: int) -> np.ndarray[Any, Any]:
    return np.array(values, dtype=np.int64)


def write(
    path: Path,
    nodes: Sequence[Any],
    shape: Sequence[Any] | None,
    constants: dict[str, np.ndarray[Any, Any]] | None = None,
    *,
    opset: int = 17,
    kind: int = TensorProto.FLOAT,
    inputs: Sequence[str] = ("x",),
    outputs: Sequence[str] = ("y",),
    ir: int = 8,
) -> Path:
    tensors = [numpy_helper.from_array(v, k) for k, v in (constants or {}).items()]
    graph = helper.make_graph(
        list(nodes),
        "test",
        [helper.make_tensor_value_info(name, kind, shape) for name in inputs],
        [helper.make_tensor_value_info(name, kind, None) for name in outputs],
        tensors,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir)
    path.write_bytes(model.SerializeToString())
    return path


def agree(
    path: Path,
    network: Network,
    count: int = 3,
    scale: float = 1.0,
    replay: Callable[[Tensor], Tensor] | None = None,
) -> float:
    """Largest difference to onnxruntime relative to max(1, |output|); batch and single rows must both agree."""
    x = (torch.randn(count, *network.input_shape, dtype=torch.float64) * scale).to(network.dtype)
    reference = (replay or session(path))(x)
    with torch.no_grad():
        together = network(x)
        alone = torch.cat([network(row[None]) for row in x])
    assert together.shape == reference.shape
    assert together.shape[1:] == network.graph.node[network.graph.output].shape
    size = max(1.0, float(reference.abs().max()))
    return max(float((y - reference).abs().max()) / size for y in (together, alone))


def check_shapes(network: Network) -> None:
    """Every node's shape, which the reader computes by arithmetic, is the one its value has."""
    env = bind(network.graph, network.module)
    env[network.graph.inputs[0]] = torch.rand(2, *network.input_shape).to(network.dtype)
    values = walk(network.graph, env, concrete)
    for node in network.graph.nodes:
        assert tuple(values[node.name].shape) == (2, *node.shape), node


# -- operators -------------------------------------------------------------------------------------------


@dataclass
class Case:
    id: str
    shape: Sequence[Any]
    nodes: Sequence[tuple[str, str, str, dict[str, Any]]]  # operator, inputs, outputs, attributes
    constants: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    opsets: Sequence[int] = (17,)


def one(
    id_: str, shape: Any, op: str, inputs: str = "x", opsets: Any = (17,), /, **rest: Any
) -> Case:
    """A single node: arrays among the keywords are initializers, everything else is an attribute."""
    arrays = {k: v for k, v in rest.items() if isinstance(v, np.ndarray)}
    attrs = {k: v for k, v in rest.items() if k not in arrays}
    return Case(id_, shape, [(op, inputs, "y", attrs)], arrays, opsets)


IMAGE = (1, 3, 9, 8)
OLD, NEW = (7, 9, 11), (13, 17, 21)
CASES = [
    # elementwise
    *(one(op, (1, 6), op, "x", (7, 13, 17, 21)) for op in ("Relu", "Sigmoid", "Tanh", "Abs", "Neg", "Exp")),
    one("leaky", ("N", 6), "LeakyRelu", "x", (7, 16), alpha=0.2),
    one("clip attr", (1, 6), "Clip", "x", (7, 10), min=-0.3, max=0.5),
    one("clip one attr", (1, 6), "Clip", "x", (7,), min=0.1),
    one("clip inputs", (1, 6), "Clip", "x a b", (11, 13), a=np.float32([-0.3])[0:1].reshape(()), b=np.float32([0.4]).reshape(())),
    one("clip max only", (1, 6), "Clip", "x  b", (13,), b=np.array(0.4, np.float32)),
    one("clip infinite", (1, 6), "Clip", "x a b", (13,), a=np.array(0, np.float32), b=np.array(np.inf, np.float32)),
    one("identity", (1, 6), "Identity"),
    one("dropout", (1, 6), "Dropout", "x", (7, 10), ratio=0.5),
    one("dropout input", (1, 6), "Dropout", "x a", (13,), a=np.array(0.5, np.float32)),
    one("cast", (1, 6), "Cast", "x", (9, 13), to=1),
    # arithmetic with constants: either side, every rank
    *(
        one(f"{op} {n} {s} {x}", x, op, pair, (7, 14), c=np.asarray(np.abs(floats(*s)) + np.float32(0.5)))
        for op in ("Add", "Sub", "Mul", "Div")
        for n, pair in (("right", "x c"), ("left", "c x"))
        for s, x in (
            ((), (1, 3, 4)), ((4,), (1, 3, 4)), ((3, 1), (1, 3, 4)), ((1, 3, 4), (1, 3, 4)), ((2, 3, 4), (1, 3, 4)),
            ((1, 2, 3, 4), (1, 3, 4)), ((5, 1, 3, 4), (1, 3, 4)), ((4,), (4,)), ((1, 4), (4,)), ((3, 4), (4,)),
            ((2, 3, 4), (3, 4)), ((1, 3, 4), (3, 4)), ((2, 1), ("N", 4)), ((5,), (1, 3, 1)),
        )
    ),
    *(
        Case(f"{op} active", (1, 3, 4), [("Relu", "x", "a", {}), ("Sigmoid", "x", "b", {}), (op, "a b", "y", {})])
        for op in ("Add", "Sub", "Mul")
    ),
    Case("add ranks", (1, 3, 4), [("ReduceSum", "x", "a", {"axes": [0], "keepdims": 0}), ("Add", "a x", "y", {})], {}, (11,)),
    Case("add lead and not", (1, 3), [("Transpose", "x", "a", {"perm": [1, 0]}), ("Add", "a x", "y", {})]),
    one("sum", (1, 4), "Sum", "c x x", (8, 13), c=floats(4)),
    # products
    *(
        one(f"gemm {ta}{tb} {cs}", shape, "Gemm", "x w c" if cs is not None else "x w", (7, 9, 11, 13),
            w=floats(5, 4) if tb else floats(4, 5), **({"c": floats(*cs)} if cs is not None else {}), transA=ta, transB=tb)
        for ta, shape in ((0, (1, 4)), (0, ("N", 4)), (0, (3, 4)), (1, (4, 1)), (1, (4, 3)))
        for tb in (0, 1)
        for cs in ((5,), (1, 5), (1,), ())
    ),
    one("gemm no bias", (1, 4), "Gemm", "x w", (11, 13), w=floats(4, 5)),
    one("gemm scaled", (1, 4), "Gemm", "x w c", (11,), w=floats(4, 5), c=floats(5), alpha=0.3, beta=2.0),
    one("gemm left", (4, 3), "Gemm", "w x c", (11,), w=floats(5, 4), c=floats(5, 1), alpha=2.0),
    one("gemm left turned", (4, 3), "Gemm", "w x", (11,), w=floats(4, 5), transA=1),
    *(
        one(f"matmul {s} {w}", s, "MatMul", "x w", (7, 13), w=floats(*w))
        for s, w in (
            ((1, 4), (4, 5)), (("N", 4), (4, 5)), ((4,), (4, 5)), ((3, 4), (4, 5)), ((1, 3, 4), (4, 5)), ((1, 4), (4,)),
            ((4,), (4,)), ((1, 3, 4), (4,)), ((1, 3, 4), (1, 4, 5)), ((1, 3, 4), (2, 4, 5)), ((3, 4), (2, 4, 5)),
            ((1, 3, 4), (2, 3, 4, 5)), ((1, 2, 3, 4), (2, 4, 5)),
        )
    ),
    *(
        one(f"matmul left {w} {s}", s, "MatMul", "w x", (7, 13), w=floats(*w))
        for w, s in (
            ((5, 4), (4, 1)), ((5, 4), (4,)), ((5, 4), (4, 3)), ((5, 4), (1, 4, 3)), ((2, 5, 4), (1, 4, 3)), ((5, 1), (1, 3)),
        )
    ),
    Case("matmul add", ("N", 4), [("MatMul", "x w", "a", {}), ("Add", "a c", "y", {})], {"w": floats(4, 5), "c": floats(5)}, (7, 13)),
    Case("matmul add left", (1, 4), [("MatMul", "x w", "a", {}), ("Add", "c a", "y", {})], {"w": floats(4, 5), "c": floats(1, 5)}),
    Case("matmul read twice", (1, 4), [("MatMul", "x w", "a", {}), ("Add", "a c", "b", {}), ("Add", "a b", "y", {})],
         {"w": floats(4, 5), "c": floats(5)}),
    Case("matmul active", (1, 3, 4), [("Transpose", "x", "a", {"perm": [0, 2, 1]}), ("MatMul", "x a", "y", {})]),
    # convolutions
    *(
        one(f"conv {a}", IMAGE, "Conv", "x w b", (7, 11, 17), w=floats(4, 3, 3, 2), b=floats(4), **a)
        for a in (
            {}, {"strides": [2, 1]}, {"pads": [1, 1, 1, 1]}, {"pads": [0, 1, 2, 0]}, {"dilations": [2, 3]},
            {"auto_pad": "SAME_UPPER", "strides": [2, 3]}, {"auto_pad": "SAME_LOWER"}, {"auto_pad": "VALID", "strides": [2, 2]},
        )
    ),
    one("conv no bias", IMAGE, "Conv", "x w", w=floats(4, 3, 3, 3), kernel_shape=[3, 3]),
    one("conv groups", (1, 4, 6, 6), "Conv", "x w", w=floats(6, 2, 3, 3), group=2),
    one("conv 1d", ("N", 3, 9), "Conv", "x w b", w=floats(4, 3, 3), b=floats(4), pads=[1, 2], strides=[2]),
    one("conv 3d", (1, 2, 5, 5, 5), "Conv", "x w", w=floats(3, 2, 2, 2, 2)),
    *(
        one(f"deconv {a}", IMAGE, "ConvTranspose", "x w b", (7, 11), w=floats(3, 4, 3, 2), b=floats(4), **a)
        for a in (
            {}, {"strides": [2, 2]}, {"strides": [2, 3], "pads": [1, 0, 1, 0]}, {"strides": [2, 2], "output_padding": [1, 1]},
            {"strides": [2, 2], "pads": [1, 0, 0, 1]}, {"dilations": [2, 2]},
            {"strides": [2, 2], "output_shape": [18, 16]},
            {"strides": [2, 2], "output_shape": [18, 16], "auto_pad": "SAME_UPPER"},
            {"strides": [2, 1], "auto_pad": "SAME_UPPER"}, {"strides": [2, 1], "auto_pad": "SAME_LOWER"},
        )
    ),
    one("deconv groups", (1, 4, 5, 5), "ConvTranspose", "x w", w=floats(4, 3, 3, 3), group=2),
    one("deconv 1d", (1, 3, 9), "ConvTranspose", "x w", w=floats(3, 4, 3)),
    # pooling
    *(
        one(f"{op} {a}", IMAGE, op, "x", (7, 11, 17), kernel_shape=[3, 2], **a)
        for op in ("MaxPool", "AveragePool")
        for a in (
            {}, {"strides": [2, 2]}, {"pads": [1, 1, 1, 1], "strides": [2, 2]}, {"pads": [0, 0, 1, 1], "strides": [2, 2]},
            {"pads": [1, 0, 0, 1]}, {"auto_pad": "SAME_UPPER", "strides": [2, 2]}, {"auto_pad": "SAME_LOWER", "strides": [2, 3]},
            {"auto_pad": "VALID"},
        )
    ),
    *(
        one(f"{op} ceil {a}", IMAGE, op, "x", (11, 19), kernel_shape=[3, 3], ceil_mode=1, **a)
        for op in ("MaxPool", "AveragePool")
        for a in ({"strides": [2, 2]}, {"strides": [3, 3]}, {"strides": [2, 2], "pads": [1, 1, 1, 1]})
    ),
    *(
        one(f"average include {a}", IMAGE, "AveragePool", "x", (7, 11), kernel_shape=[3, 3], count_include_pad=1, **a)
        for a in ({"pads": [1, 1, 1, 1]}, {"pads": [1, 0, 1, 1], "strides": [2, 2]}, {"pads": [2, 2, 2, 2]})
    ),
    one("average ceil include", IMAGE, "AveragePool", "x", (19,), kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1, pads=[1, 1, 1, 1], count_include_pad=1),
    one("max dilated", IMAGE, "MaxPool", "x", (11,), kernel_shape=[3, 3], dilations=[2, 2]),
    one("max 1d", (1, 3, 9), "MaxPool", "x", kernel_shape=[2], strides=[2]),
    one("average 3d", (1, 2, 4, 4, 4), "AveragePool", "x", kernel_shape=[2, 2, 2]),
    one("global average", IMAGE, "GlobalAveragePool", "x", (7, 17)),
    one("global max", IMAGE, "GlobalMaxPool", "x", (7, 17)),
    one("batch norm", IMAGE, "BatchNormalization", "x s b m v", (7, 9, 14, 15), s=floats(3), b=floats(3), m=floats(3), v=np.abs(floats(3)) + 0.1, epsilon=1e-3),
    one("batch norm rows", ("N", 4), "BatchNormalization", "x s b m v", s=floats(4), b=floats(4), m=floats(4), v=np.abs(floats(4)) + 0.1),
    # shapes
    *(one(f"flatten {a}", (1, 3, 4, 2), "Flatten", "x", (7, 13), axis=a) for a in (0, 1, 2, 3, 4)),
    one("flatten -1", (1, 3, 4), "Flatten", "x", (13,), axis=-1),
    one("flatten rows", (3, 4, 2), "Flatten", "x", (13,)),
    *(
        one(f"reshape {x} {s}", x, "Reshape", "x s", (7, 13, 21), s=ints(*s))
        for x, s in (
            ((1, 3, 4), (1, 12)), ((1, 3, 4), (-1, 12)), ((1, 3, 4), (0, -1)), ((1, 3, 4), (-1, 4)), ((1, 3, 4), (3, 4)), ((1, 3, 4), (-1,)),
            ((12,), (3, 4)), ((12,), (1, 12)), ((12,), (1, 1, 3, 4)), (("N", 12), (-1, 3, 4)), ((3, 4), (1, 12)), ((3, 4), (0, 2, 2)),
        )
    ),
    *(
        one(f"transpose {x} {p}", x, "Transpose", "x", (7, 13), **({"perm": p} if p else {}))
        for x, p in (
            ((1, 3, 4, 2), [0, 2, 3, 1]), ((1, 3, 4), [2, 0, 1]), ((1, 3, 4), None), ((1, 4), [1, 0]), ((3, 4), [1, 0]), ((3, 4, 2), [1, 2, 0]),
        )
    ),
    *(one(f"squeeze attr {a}", (1, 3, 1, 2), "Squeeze", "x", (7, 11), axes=a) for a in ([2], [0], [0, 2], [-2])),
    *(one(f"squeeze {a}", (1, 3, 1, 2), "Squeeze", "x a", (13, 21), a=ints(*a)) for a in ([2], [0], [-2, 0])),
    one("squeeze all", (1, 3, 1, 2), "Squeeze", "x", (7, 13)),
    *(one(f"unsqueeze attr {a}", (1, 3), "Unsqueeze", "x", (7, 11), axes=a) for a in ([1], [0], [0, 3])),
    *(one(f"unsqueeze {a} {s}", s, "Unsqueeze", "x a", (13, 21), a=ints(*a)) for a in ([1], [0], [-1], [0, -1]) for s in ((1, 3), (5,), (3, 2))),
    *(
        one(f"expand {x} {s}", x, "Expand", "x s", (8, 13), s=ints(*s))
        for x, s in (((1, 3, 1), (1, 3, 4)), ((1, 3, 1), (4,)), ((1, 3, 1), (2, 3, 4)), ((3, 1), (2, 3, 4)), ((1, 3), (1, 1, 3)), ((4,), (1, 4)))
    ),
    *(one(f"concat {a} {s}", s, "Concat", "x x x", (7, 13), axis=a) for a in (0, 1, -1) for s in ((1, 3, 2), (3, 2))),
    *(
        one(f"concat constant {a} {n}", s, "Concat", n, (7, 13), axis=a, c=floats(*c))
        for a, s, c in ((1, (1, 3, 2), (1, 2, 2)), (-1, (1, 3, 2), (1, 3, 4)), (0, (1, 3, 2), (2, 3, 2)), (0, (3, 2), (2, 2)))
        for n in ("x c", "c x", "x c x", "c x c")
    ),
    *(
        one(f"slice attr {a} {e} {x}", s, "Slice", "x", (7, 9), axes=x, starts=a, ends=e)
        for s, a, e, x in (
            ((1, 6, 5), [1], [4], [1]), ((1, 6, 5), [-3], [MAX], [2]), ((1, 6, 5), [0, 1], [1, -1], [0, 2]), ((6, 5), [1, 0], [3, 2], [0, 1]),
            ((1, 6, 5), [0], [1], [0]),
        )
    ),
    *(
        one(f"slice {a} {e} {x} {t}", s, "Slice", "x a e i t", (10, 13), a=ints(*a), e=ints(*e), i=ints(*x), t=ints(*t))
        for s, a, e, x, t in (
            ((1, 6, 5), [1], [4], [1], [1]), ((1, 6, 5), [-4], [-1], [-1], [2]), ((1, 6, 5), [-1], [-MAX], [1], [-1]),
            ((1, 6, 5), [4], [0], [1], [-2]), ((6, 5), [0, 5], [6, 0], [0, 1], [2, -1]), ((1, 6, 5), [0], [MAX], [0], [1]),
        )
    ),
    *(
        one(f"gather {a} {i.tolist()} {s}", s, "Gather", "x i", (7, 13), axis=a, i=i)
        for s, a, i in (
            ((1, 6, 5), 1, ints(0, 2, 5)), ((1, 6, 5), 1, ints(3, 1)), ((1, 6, 5), -1, np.array(2)), ((1, 6, 5), 0, np.array(0)),
            ((1, 6, 5), 2, ints(0, 4, 1, 1).reshape(2, 2)), ((6, 5), 0, ints(4, 0)), ((1, 6, 5), 1, np.array(-1)), ((1, 3), 0, ints(0, 0)),
        )
    ),
    *(
        Case(f"split {v} {a}", s, [("Split", i, "p q", a), ("Concat", "q p", "y", {"axis": a["axis"]})], c, v)
        for s, i, a, c, v in (
            ((1, 6), "x", {"axis": 1}, {}, (7, 13)), ((1, 6), "x", {"axis": -1, "split": [2, 4]}, {}, (7, 11)),
            ((1, 6), "x s", {"axis": 1}, {"s": ints(5, 1)}, (13, 18)), ((1, 5), "x", {"axis": 1, "num_outputs": 2}, {}, (18, 21)),
            ((6, 2), "x", {"axis": 0}, {}, (11, 13)),
        )
    ),
    *(one(f"pad attr {p}", (1, 3, 4), "Pad", "x", (7, 10), pads=p, value=0.5) for p in ([0, 1, 0, 0, 0, 2], [0, 0, 0, 0, 0, 0], [0, -1, 0, 0, 0, -1])),
    one("pad batch axis", (1, 3), "Pad", "x", (7,), pads=[1, 0, 0, 1]),
    one("pad rows", (3, 4), "Pad", "x p v", (11, 13), p=ints(1, 0, 0, 2), v=np.array(-1, np.float32)),
    one("pad input", IMAGE, "Pad", "x p", (11, 18), p=ints(0, 0, 1, 2, 0, 0, 3, 0)),
    one("pad axes", IMAGE, "Pad", "x p v a", (18, 21), p=ints(1, 2, 3, 0), v=np.array(2, np.float32), a=ints(-1, 2)),
    # reductions
    *(
        one(f"{op} attr {a} {k} {s}", s, op, "x", (7, 11), **({"axes": a} if a else {}), keepdims=k)
        for op in ("ReduceMean", "ReduceSum", "ReduceMax")
        for a in ([1], [-1], [0, 2], [0], None)
        for k in (0, 1)
        for s in ((1, 3, 4), (2, 3, 4))
    ),
    one("sum input", (1, 3, 4), "ReduceSum", "x a", (13, 21), a=ints(-1), keepdims=0),
    one("mean input", (1, 3, 4), "ReduceMean", "x a", (18, 21), a=ints(1, 2)),
    one("sum noop", (1, 3, 4), "ReduceSum", "x", (13,), noop_with_empty_axes=1),
    one("mean attr 13", (1, 3, 4), "ReduceMean", "x", (13,), axes=[2]),
    # functions
    *(one(op, (1, 6), op, "x", v) for op, v in (
        ("Erf", (13,)), ("Sin", (13,)), ("Cos", (13,)), ("Atan", (13,)), ("Sign", (13,)), ("Round", (11,)), ("Floor", (13,)), ("Ceil", (13,)),
        ("Softplus", (7,)), ("Softsign", (7,)), ("HardSwish", (14,)), ("Mish", (18,)), ("Elu", (7,)), ("Selu", (7,)), ("Celu", (12,)),
        ("HardSigmoid", (7,)), ("ThresholdedRelu", (10,)), ("Gelu", (20,)),
    )),
    *(one(f"{op} {a}", (1, 6), op, "x", (20,), **a) for op, a in (
        ("Elu", {"alpha": 0.5}), ("Selu", {"alpha": 2.0, "gamma": 0.9}), ("Celu", {"alpha": 0.7}), ("HardSigmoid", {"alpha": 0.5, "beta": 0.2}),
        ("ThresholdedRelu", {"alpha": 0.3}), ("Gelu", {"approximate": "tanh"}),
    )),
    *(Case(op, (1, 6), [("Exp", "x", "a", {}), (op, "a", "y", {})]) for op in ("Log", "Sqrt", "Reciprocal")),
    *(one(f"pow {p}", (1, 6), "Pow", "x p", (7, 15), p=np.array(p, np.float32)) for p in (2, 3, 4, 1, 0)),
    *(Case(f"pow of positive {p}", (1, 6), [("Exp", "x", "a", {}), ("Pow", "a p", "y", {})], {"p": np.float32(p)}) for p in (0.5, 1.7, -1, -2, -0.5)),
    one("prelu", (1, 3, 4), "PRelu", "x s", (9, 16), s=floats(3, 1)),
    one("prelu one", (1, 6), "PRelu", "x s", s=floats(1)),
    one("square", (1, 6), "Mul", "x x"),
    Case("silu", (1, 6), [("Sigmoid", "x", "a", {}), ("Mul", "x a", "y", {})]),
    *(
        Case(f"gelu {i}", (1, 6), [("Div", "x r", "a", {}), ("Erf", "a", "b", {}), ("Add", "b o", "c", {}), *tail],
             {"r": np.float32(math.sqrt(2)), "o": np.float32(1), "h": np.float32(0.5)})
        for i, tail in enumerate((
            [("Mul", "x c", "d", {}), ("Mul", "d h", "y", {})], [("Mul", "x h", "d", {}), ("Mul", "d c", "y", {})], [("Mul", "c x", "y", {})],
        ))
    ),
    Case("div active", (1, 3, 4), [("Exp", "x", "a", {}), ("Relu", "x", "b", {}), ("Div", "b a", "y", {})]),
    Case("max active", (1, 3, 4), [("Sin", "x", "a", {}), ("Max", "x a c", "y", {})], {"c": floats(4)}),
    Case("min active", (1, 3, 4), [("Sin", "x", "a", {}), ("Min", "c x a", "y", {})], {"c": floats(4)}),
    one("max constant", (1, 3, 4), "Max", "c x", (8, 13), c=floats(3, 1)),
    *(
        Case(f"{op} {p}", (1, 6), [(op, p, "a", {}), ("Cast", "a", "y", {"to": 1})], {"c": floats(6)}, (9, 16) if "Equal" not in op else (16,))
        for op in ("Greater", "Less", "GreaterOrEqual", "LessOrEqual")
        for p in ("x c", "c x")
    ),
    Case("not", (1, 6), [("Greater", "x c", "a", {}), ("Not", "a", "b", {}), ("Cast", "b", "y", {"to": 1})], {"c": floats(6)}),
    one("where", (1, 6), "Where", "m x c", m=np.array([True, False, True, True, False, False]), c=floats(6)),
    Case("where condition", (1, 6), [("Greater", "x c", "a", {}), ("Sin", "x", "b", {}), ("Where", "a b c", "y", {})], {"c": floats(6)}),
    # over axes
    *(one(f"{op} {a} {s}", s, op, "x", (7, 11, 13), axis=a) for op in ("Softmax", "LogSoftmax") for a, s in ((1, (1, 4)), (-1, (1, 3, 4)), (1, (1, 3, 4)), (0, (3, 4)))),
    one("softmax default", (1, 3, 4), "Softmax", "x", (11, 13)),
    one("layer norm", (1, 3, 4), "LayerNormalization", "x s b", (17,), s=floats(4), b=floats(4)),
    one("layer norm two axes", (1, 3, 4), "LayerNormalization", "x s", (17,), s=floats(3, 4), axis=1, epsilon=1e-3),
    one("instance norm", IMAGE, "InstanceNormalization", "x s b", (7,), s=floats(3), b=floats(3)),
    one("group norm", (1, 4, 3, 2), "GroupNormalization", "x s b", (21,), s=floats(4), b=floats(4), num_groups=2),
    one("reduce min", (1, 3, 4), "ReduceMin", "x", (11,), axes=[1]),
    *(one(f"{op}", (1, 3, 4), op, "x", (11,), axes=[2], keepdims=0) for op in ("ReduceL1", "ReduceL2", "ReduceSumSquare")),
    # resizing and padding
    *(
        one(f"resize {a}", (1, 2, 3, 4), "Resize", "x  s", (13, 19), s=np.float32([1, 1, 2, r]), **a)
        for r in (2, 1.5)
        for a in (
            {}, {"mode": "linear"}, {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
            {"mode": "linear", "coordinate_transformation_mode": "align_corners"}, {"mode": "linear", "coordinate_transformation_mode": "pytorch_half_pixel"},
            {"nearest_mode": "ceil"}, {"nearest_mode": "round_prefer_ceil"},
        )
    ),
    one("resize sizes", (1, 2, 3, 4), "Resize", "x   s", (13,), s=ints(1, 2, 7, 6), mode="linear"),
    one("upsample", (1, 2, 3, 4), "Upsample", "x s", (9,), s=np.float32([1, 1, 2, 3])),
    *(one(f"depth to space {m}", (1, 8, 2, 3), "DepthToSpace", "x", (11, 13), blocksize=2, mode=m) for m in ("DCR", "CRD")),
    one("tile", (1, 3, 4), "Tile", "x r", r=ints(1, 2, 3)),
    *(one(f"pad {m}", (1, 2, 3, 4), "Pad", "x p", (11,), p=ints(0, 0, 1, 2, 0, 0, 2, 3), mode=m) for m in ("reflect", "edge")),
]  # fmt: skip
VARIANTS = [pytest.param(c, v, id=f"{c.id}-v{v}") for c in CASES for v in c.opsets]


@pytest.mark.parametrize(("case", "opset"), VARIANTS)
def test_operator_agrees_with_onnxruntime(case: Case, opset: int, tmp_path: Path) -> None:
    nodes = [
        helper.make_node(op, [n if n != "-" else "" for n in i.split(" ")], o.split(), **a)
        for op, i, o, a in case.nodes
    ]
    path = write(tmp_path / "m.onnx", nodes, case.shape, case.constants, opset=opset)
    network = load_onnx(path)
    assert agree(path, network) <= 1e-5
    check_shapes(network)
    again = tmp_path / "again.onnx"
    save_onnx(network, again)
    onnx.checker.check_model(again)
    assert agree(again, load_onnx(again)) <= 1e-5
    x = torch.rand(2, *network.input_shape)
    assert torch.allclose(load_onnx(again)(x), network(x), atol=1e-5)


@pytest.mark.parametrize("seed", range(60))
def test_random_windows_agree_with_onnxruntime(seed: int, tmp_path: Path) -> None:
    """Strides, paddings, dilations and rounding drawn at random, for pooling and convolutions."""
    rng = np.random.default_rng(seed)
    op = ("MaxPool", "AveragePool", "Conv", "ConvTranspose")[seed % 4]
    kernel = [int(k) for k in rng.integers(2, 5, 2)]
    attrs: dict[str, Any] = {
        "kernel_shape": kernel,
        "strides": [int(s) for s in rng.integers(1, 4, 2)],
    }
    attrs["pads"] = [int(rng.integers(0, kernel[i % 2] // 2 + 1)) for i in range(4)]
    constants, inputs = {}, ["x"]
    if op.startswith("Conv"):
        constants, inputs = (
            {"w": floats(2, 3, *kernel)},
            ["x", "w"],
        )
        attrs["dilations"] = [int(d) for d in rng.integers(1, 3, 2)]
        channels = 3 if op == "Conv" else 2
    else:
        attrs["ceil_mode"] = int(rng.integers(2))
        channels = 2
    if op == "AveragePool":
        attrs["count_include_pad"] = int(rng.integers(2))
    shape = (1, channels, *(int(n) for n in rng.integers(9, 13, 2)))
    node = helper.make_node(op, inputs, ["y"], **attrs)
    path = write(tmp_path / "m.onnx", [node], shape, constants, opset=19)
    try:
        network = load_onnx(path)
    except CaptureError as error:
        assert op == "MaxPool" and "padding is wider" in str(error)  # noqa: PT017, PT018
        return
    assert agree(path, network) <= 1e-5
    check_shapes(network)


def test_linear_layers_are_one_node(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Flatten", ["x"], ["f"]),
        helper.make_node("MatMul", ["f", "w"], ["a"]),
        helper.make_node("Add", ["a", "c"], ["b"]),
        helper.make_node("Reshape", ["b", "s"], ["y"]),
    ]
    constants = {"w": floats(6, 4), "c": floats(4), "s": ints(1, 4)}
    network = load_onnx(write(tmp_path / "m.onnx", nodes, (1, 2, 3), constants))
    assert [node.op.__name__ for node in network.graph.nodes] == ["reshape", "linear"]
    assert dict(network.module.named_buffers()).keys() == {"w", "c"}
    assert network.graph.params == {"@w": "w", "@c": "c"}
    assert network.input_shape == (2, 3)
    assert network.source == str(tmp_path / "m.onnx")


def test_constants_are_folded(tmp_path: Path) -> None:
    """Shape arithmetic and masks as exporters write them leave no node behind."""
    make = helper.make_node
    nodes = [
        make("Shape", ["x"], ["s"]),
        make("Gather", ["s", "zero"], ["batch"], axis=0),
        make("Reshape", ["batch", "one"], ["b1"]),
        make("Constant", [], ["minus"], value_ints=[-1]),
        make("Concat", ["b1", "minus"], ["target"], axis=0),
        make("Reshape", ["x", "target"], ["flat"]),
        make(
            "ConstantOfShape",
            ["count"],
            ["ones"],
            value=numpy_helper.from_array(np.array([1], np.int64)),
        ),
        make("Mul", ["ones", "minus"], ["neg"]),
        make("Equal", ["two", "neg"], ["eq"]),
        make("Where", ["eq", "ones", "two"], ["size"]),
        make("Expand", ["row", "size"], ["wide"]),
        make("Range", ["zero0", "six", "one0"], ["range"]),
        make("Cast", ["range"], ["real"], to=1),
        make("Div", ["real", "five"], ["part"]),
        make("Conv", ["image", "filter"], ["folded"]),
        make("ReduceSum", ["folded"], ["total"], keepdims=0),
        make("Split", ["row2"], ["r1", "r2"], axis=1),
        make("Slice", ["wide", "zero", "one", "zero"], ["first"]),
        make("Add", ["flat", "part"], ["a"]),
        make("Mul", ["a", "total"], ["b"]),
        make("Add", ["b", "first"], ["c"]),
        make("Add", ["c", "r2"], ["d"]),
        make("Size", ["x"], ["n"]),
        make("Cast", ["n"], ["nf"], to=1),
        make("Div", ["d", "nf"], ["y"]),
    ]
    constants = {
        "zero": ints(0), "one": ints(1), "count": ints(2), "two": ints(2, 6), "row": floats(1, 6), "row2": floats(1, 12),
        "zero0": np.array(0), "six": np.array(6), "one0": np.array(1), "five": np.float32([5]),
        "image": floats(1, 1, 3, 3), "filter": floats(1, 1, 2, 2),
    }  # fmt: skip
    path = write(tmp_path / "m.onnx", nodes, (1, 2, 3), constants)
    network = load_onnx(path)
    assert agree(path, network) <= 1e-5
    assert {n.op.__name__ for n in network.graph.nodes} == {"reshape", "add", "mul", "div"}
    assert all(n.name in network.graph.active for n in network.graph.nodes)


@pytest.mark.parametrize(
    "op", ["Add", "Sub", "Mul", "Div", "Max", "Min", "Mod", "Pow", "Less", "Greater", "Equal"]
)
def test_folding_of_arithmetic_agrees(op: str, tmp_path: Path) -> None:
    make = helper.make_node
    for kind in (np.int64, np.float32):
        attrs = {"fmod": 1} if op == "Mod" and kind is np.float32 else {}
        nodes = [
            make(op, ["a", "b"], ["c"], **attrs),
            make("Cast", ["c"], ["d"], to=1),
            make("Add", ["x", "d"], ["y"]),
        ]
        a, b = np.array([[-7, 7, 5], [2, -3, 4]], kind), np.array([2, 3, 3], kind)
        path = write(tmp_path / "m.onnx", nodes, (1, 3), {"a": a, "b": b})
        assert agree(path, load_onnx(path)) <= 1e-5


def test_double_models_stay_double(tmp_path: Path) -> None:
    node = helper.make_node("Gemm", ["x", "w"], ["y"])
    w = RNG.standard_normal((4, 3))
    path = write(tmp_path / "m.onnx", [node], (1, 4), {"w": w}, kind=TensorProto.DOUBLE)
    network = load_onnx(path)
    assert network.dtype == torch.float64
    assert agree(path, network) <= 1e-14


def test_odd_names_become_buffers(tmp_path: Path) -> None:
    names = ["1/w:0", "1/w.0", "training", "graph", "forward", "_buffers", "ünïcode"]
    nodes, last = [], "x"
    for i, name in enumerate(names):
        nodes.append(helper.make_node("Mul", [last, name], [f"@{name}" if i % 2 else f"v{i}"]))
        last = nodes[-1].output[0]
    nodes.append(helper.make_node("Identity", [last], ["y"]))
    path = write(tmp_path / "m.onnx", nodes, (1, 4), {n: floats(4) for n in names})
    network = load_onnx(path)
    assert agree(path, network) <= 1e-5
    assert len(dict(network.module.named_buffers())) == len(names)
    assert network.module.double()(torch.rand(2, 4).double()).dtype == torch.float64


def test_typed_data_and_initializers_listed_as_inputs(tmp_path: Path) -> None:
    w, b = floats(4, 3), floats(3)
    tensors = [
        helper.make_tensor("w", TensorProto.FLOAT, (4, 3), w.reshape(-1).tolist()),
        helper.make_tensor("b", TensorProto.FLOAT, (3,), b.tolist()),
    ]
    info = [
        helper.make_tensor_value_info(n, 1, s)
        for n, s in (("w", (4, 3)), ("x", (1, 4)), ("b", (3,)))
    ]
    out = [helper.make_tensor_value_info("y", 1, (1, 3))]
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", "w", "b"], ["y"])], "g", info, out, tensors
    )
    opsets = [helper.make_opsetid("ai.onnx.ml", 2), helper.make_opsetid("", 8)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=3)
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    assert agree(path, load_onnx(path)) <= 1e-6


# -- public networks -------------------------------------------------------------------------------------

FILES = sorted([*DATA.glob("vnncomp/*/onnx/*.onnx*"), *DATA.glob("bounds/*.onnx")])


def suite(path: Path) -> str:
    return path.parts[-3] if "vnncomp" in path.parts else "bounds"


@pytest.mark.skipif(not FILES, reason=f"no public networks under {DATA}")
@pytest.mark.parametrize("name", sorted({suite(f) for f in FILES}) or ["none"])
def test_public_networks_agree_with_onnxruntime(name: str, tmp_path: Path) -> None:
    """Every file of a suite (of large ones of one size the first); the first of each size also over several scales of
    input, and written again."""
    seen: set[tuple[Any, ...]] = set()
    for path in (f for f in FILES if suite(f) == name):
        network, small = load_onnx(path), path.stat().st_size < 500_000
        kind = tuple((n.op, n.shape) for n in network.graph.nodes)
        if kind in seen and not small:
            continue
        replay, new = session(path), kind not in seen and small
        seen.add(kind)
        for scale in (0.1, 1.0, 10.0) if new else (1.0,):
            assert agree(path, network, 3 if new else 2, scale, replay) <= 1e-4, path
        if new:
            check_shapes(network)
            save_onnx(network, tmp_path / "again.onnx")
            assert agree(tmp_path / "again.onnx", network) <= 1e-5


# -- refusals --------------------------------------------------------------------------------------------

GEMM = [helper.make_node("Gemm", ["x", "w"], ["y"], name="layer")]


def gemm(path: Path, **rest: Any) -> Path:
    return write(path, GEMM, (1, 4), {"w": floats(4, 3)}, **rest)


def altered(path: Path, change: Callable[[Any], None]) -> Path:
    model = onnx.load_model_from_string(gemm(path).read_bytes())
    change(model)
    path.write_bytes(model.SerializeToString())
    return path


def test_all_unsupported_operators_are_named(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Cosh", ["x"], ["a"], name="first"),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Hardmax", ["b"], ["c"], name="second"),
        helper.make_node("FusedThing", ["c"], ["d"], domain="com.vendor"),
        helper.make_node("If", ["d"], ["y"], name="branch"),
    ]
    path = write(tmp_path / "m.onnx", nodes, (1, 4), opset=13)
    with pytest.raises(UnsupportedOp) as caught:
        load_onnx(path)
    assert caught.value.problems == (
        "Cosh (node 'first', opset v13)",
        "Hardmax (node 'second', opset v13)",
        "com.vendor.FusedThing (node 'd', opset v13)",
        "If (node 'branch', opset v13)",
    )
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("node", "constants", "words"),
    [
        (helper.make_node("Pad", ["x", "p"], ["y"], mode="odd"), {"p": ints(0, 0, 0, 1, 0, 0, 0, 1)}, "odd"),
        (helper.make_node("Conv", ["x", "x"], ["y"]), {}, "constant"),
        (helper.make_node("Conv", ["x", "w"], ["y"]), {"w": floats(2, 5, 3, 3)}, "do not fit"),
        (helper.make_node("MatMul", ["x", "w"], ["y"]), {"w": floats(5, 3)}, "cannot multiply"),
        (helper.make_node("Reshape", ["x", "s"], ["y"]), {"s": ints(1, 5)}, "cannot reshape"),
        (helper.make_node("Add", ["x", "c"], ["y"]), {"c": floats(7)}, "broadcast"),
        (helper.make_node("Transpose", ["x"], ["y"], perm=[0, 1, 1, 3]), {}, "permutation"),
        (helper.make_node("Flatten", ["x"], ["y"], axis="one"), {}, "malformed"),
        (helper.make_node("Relu", [], ["y"]), {}, "malformed"),
        (helper.make_node("Relu", ["nothing"], ["y"]), {}, "no earlier node"),
        (helper.make_node("Cast", ["x"], ["y"], to=11), {}, "precision"),
        (helper.make_node("Gather", ["w", "x"], ["y"]), {"w": floats(3)}, "looks up"),
        (helper.make_node("Reshape", ["w", "x"], ["y"]), {"w": floats(3)}, "first input only"),
        (helper.make_node("MaxPool", ["x"], ["y", "positions"], kernel_shape=[2, 2]), {}, "positions"),
        (helper.make_node("Slice", ["x", "a", "a", "a", "z"], ["y"]), {"a": ints(1), "z": ints(0)}, "step is 0"),
        (helper.make_node("Dropout", ["x", "r", "t"], ["y"]), {"r": np.array(0.5, np.float32), "t": np.array(True)}, "training"),
        (helper.make_node("AveragePool", ["x"], ["y"], kernel_shape=[2, 2], dilations=[2, 2]), {}, "dilated"),
        (helper.make_node("Unsqueeze", ["x", "a"], ["y"]), {"a": ints(0, 0)}, "twice"),
        (helper.make_node("Conv", ["x", "w", "b"], ["y"]), {"w": floats(2, 3, 3, 3), "b": floats(3)}, "do not fit"),
        (helper.make_node("ConvTranspose", ["x", "w"], ["y"], output_padding=[1, 1]), {"w": floats(3, 2, 3, 3)}, "exceeds"),
        (helper.make_node("Mul", ["x", "c"], ["y"]), {"c": np.ones(4)}, "one precision"),
        (helper.make_node("Identity", ["w"], ["y"]), {"w": floats(3)}, "does not depend"),
    ],
    ids=lambda v: v.op_type if hasattr(v, "op_type") else None,
)  # fmt: skip
def test_forms_that_cannot_be_read_say_so(
    node: Any, constants: dict[str, Any], words: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "m.onnx", [node], (1, 3, 4, 4), constants, opset=19)
    with pytest.raises(CaptureError, match=words) as caught:
        load_onnx(path)
    assert str(path) in str(caught.value)


def test_several_inputs_or_outputs_are_named(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Add", ["left", "right"], ["y"]),
        helper.make_node("Relu", ["y"], ["z"]),
    ]
    path = write(tmp_path / "m.onnx", nodes, (1, 4), inputs=("left", "right"))
    with pytest.raises(CaptureError, match=r"2 inputs.*'left', 'right'"):
        load_onnx(path)
    path = write(tmp_path / "m.onnx", nodes[1:], (1, 4), inputs=("y",), outputs=("z", "y"))
    with pytest.raises(CaptureError, match=r"2 outputs.*'z', 'y'"):
        load_onnx(path)


@pytest.mark.parametrize("shape", [("N", 3, "H"), ("N", None), None])
def test_free_dimensions_beyond_the_batch_are_refused(shape: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", [helper.make_node("Relu", ["x"], ["y"])], shape)
    with pytest.raises(CaptureError, match="no fixed shape"):
        load_onnx(path)


def test_files_that_are_no_models(tmp_path: Path) -> None:
    good = gemm(tmp_path / "good.onnx").read_bytes()
    path = tmp_path / "bad.onnx"
    for data, words in [
        (b"", "empty"),
        (b"<!DOCTYPE html><html>Not found</html>", "web page"),
        (b"\n  <html></html>", "web page"),
        (b"\xff" * 100, "not an ONNX model"),
        (good[: len(good) // 2], "not an ONNX model"),
        (good[:2], "no ONNX graph"),
        (gzip.compress(good)[:-20], "gzip"),
        (gzip.compress(good)[:30], "gzip"),
        (b"\x1f\x8bnonsense", "gzip"),
        (gzip.compress(b""), "no ONNX graph"),
    ]:
        path.write_bytes(data)
        with pytest.raises(CaptureError, match=words) as caught:
            load_onnx(path)
        assert str(path) in str(caught.value)
        with pytest.raises(CaptureError):
            session(path)
    with pytest.raises(FileNotFoundError):
        load_onnx(tmp_path / "missing.onnx")
    with pytest.raises(CaptureError, match="regular file"):
        load_onnx(tmp_path)
    os.mkfifo(tmp_path / "pipe.onnx")
    with pytest.raises(CaptureError, match="regular file"):
        load_onnx(tmp_path / "pipe.onnx")


def test_damaged_files_never_escape_our_errors(tmp_path: Path) -> None:
    """Truncated at every length, and with bytes flipped: either a network or one of our errors."""
    good = gemm(tmp_path / "good.onnx").read_bytes()
    path = tmp_path / "bad.onnx"
    rng = np.random.default_rng(0)
    damaged = [good[:n] for n in range(1, len(good), 3)]
    for _ in range(300):
        data = bytearray(good)
        for i in rng.integers(0, len(good), int(rng.integers(1, 4))):
            data[i] = int(rng.integers(256))
        damaged.append(bytes(data))
    refused = 0
    for data in damaged:
        path.write_bytes(data)
        try:
            load_onnx(path, max_bytes=2**20)
        except (CaptureError, ModelError):
            refused += 1
    assert refused > len(damaged) // 3


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_parameters_that_are_not_finite_are_named(value: float, tmp_path: Path) -> None:
    w = floats(4, 3)
    w[1, 2] = value
    path = write(tmp_path / "m.onnx", GEMM, (1, 4), {"w": w})
    with pytest.raises(ModelError, match="'w': 1 of 12"):
        load_onnx(path)
    node = helper.make_node("Mul", ["x", "c"], ["y"])
    path = write(tmp_path / "m.onnx", [node], (1, 4), {"c": np.array(value, np.float32)})
    with pytest.raises(ModelError, match="'c'"):
        load_onnx(path)


def test_data_must_match_the_declared_shape(tmp_path: Path) -> None:
    def dims(*sizes: int) -> Callable[[Any], None]:
        def change(model: Any) -> None:
            del model.graph.initializer[0].dims[:]
            model.graph.initializer[0].dims.extend(sizes)

        return change

    path = tmp_path / "m.onnx"
    for sizes in ((4, 4), (4, 2), (4,), (0, 3)):
        with pytest.raises(CaptureError, match="do not match the declared shape"):
            load_onnx(altered(path, dims(*sizes)))
    with pytest.raises(CaptureError, match="negative"):
        load_onnx(altered(path, dims(-4, -3)))
    for sizes in ((2**40, 3), (2**62, 2**62, 2**62), (0, 2**62)):
        with pytest.raises(ModelTooLarge):
            load_onnx(altered(path, dims(*sizes)))


def bomb(kind: str) -> tuple[list[Any], dict[str, Any]]:
    make = helper.make_node
    huge = ints(2**20, 2**20)
    last = make("Add", ["x", "z"], ["y"])
    if kind == "ConstantOfShape":
        return [make("ConstantOfShape", ["s"], ["z"]), last], {"s": huge}
    if kind == "Expand":
        return [make("Expand", ["c", "s"], ["z"]), last], {"c": floats(1), "s": huge}
    if kind == "Expand active":
        return [make("Expand", ["x", "s"], ["y"])], {"s": ints(2**20, 2**20, 1, 4)}
    if kind == "Tile":
        return [make("Tile", ["c", "s"], ["z"]), last], {"c": floats(1, 1), "s": huge}
    if kind == "Pad":
        return [make("Pad", ["x", "p"], ["y"])], {"p": ints(0, 0, 0, 2**40)}
    if kind == "Pad constant":
        return [make("Pad", ["c", "p"], ["z"]), last], {"c": floats(4), "p": ints(0, 2**40)}
    if kind == "Range":
        return [make("Range", ["a", "b", "d"], ["r"]), make("Cast", ["r"], ["z"], to=1), last], {
            "a": np.array(0), "b": np.array(2**50), "d": np.array(1),
        }  # fmt: skip
    if kind == "outer sum":
        return [make("Add", ["c", "d"], ["z"]), last], {"c": floats(2**17, 1), "d": floats(2**17)}
    if kind == "outer product":
        return [make("MatMul", ["c", "d"], ["z"]), last], {
            "c": floats(2**17, 1),
            "d": floats(1, 2**17),
        }
    if kind == "chain":  # each is small, all together are not
        steps = [make("Expand", ["c", "s"], [f"z{i}"]) for i in range(40)]
        return [*steps, make("Add", ["x", "z0"], ["y"])], {"c": floats(1), "s": ints(2**14, 2**13)}
    reach = [
        make("Concat", ["x" if i == 0 else f"a{i}"] * 64, [f"a{i + 1}"], axis=1) for i in range(7)
    ]
    return [*reach, make("Relu", ["a7"], ["y"])], {}


BOMBS = (
    "ConstantOfShape", "Expand", "Expand active", "Tile", "Pad", "Pad constant", "Range", "outer sum", "outer product", "chain", "doubling",
)  # fmt: skip


@pytest.mark.parametrize("kind", BOMBS)
def test_huge_declared_sizes_are_refused_before_allocation(kind: str, tmp_path: Path) -> None:
    nodes, constants = bomb(kind)
    path = write(tmp_path / "m.onnx", nodes, (1, 4), constants)
    restart()
    before = peak()
    start = time.perf_counter()
    with pytest.raises(ModelTooLarge):
        load_onnx(path, max_bytes=2**29 if kind == "chain" else 2**31)
    assert time.perf_counter() - start < 1
    assert peak() - before < 2**30  # "chain" may make its first constants


def test_compressed_bombs_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx.gz"
    path.write_bytes(gzip.compress(bytes(2**24)))
    with pytest.raises(ModelTooLarge, match="decompresses to more than"):
        load_onnx(path)
    path.write_bytes(gzip.compress(os.urandom(2**16)))
    with pytest.raises(ModelTooLarge):
        load_onnx(path, max_bytes=2**15)
    path = gemm(tmp_path / "plain.onnx")
    with pytest.raises(ModelTooLarge):
        load_onnx(path, max_bytes=10)


def external(path: Path, location: str, **entries: int) -> Path:
    def change(model: Any) -> None:
        tensor = model.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in {"location": location, **entries}.items():
            tensor.external_data.add(key=key, value=str(value))

    return altered(path, change)


def test_external_data_beside_the_model(tmp_path: Path) -> None:
    w = floats(4, 3)
    (tmp_path / "w.bin").write_bytes(bytes(8) + w.tobytes())
    path = external(tmp_path / "m.onnx", "w.bin", offset=8, length=48)
    network = load_onnx(path)
    assert torch.equal(network.module.get_buffer("w"), torch.from_numpy(w).T)
    assert agree(path, network) <= 1e-6


def test_external_data_elsewhere_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    data = floats(4, 3).tobytes()
    (tmp_path / "secret.bin").write_bytes(data)
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    (folder / "inner").mkdir()
    (folder / "inner" / "w.bin").write_bytes(data)
    (folder / "short.bin").write_bytes(data[:-4])
    os.mkfifo(folder / "pipe.bin")
    places = ["../secret.bin", str(tmp_path / "secret.bin"), "link.bin", "inner/w.bin", "inner\\w.bin", "C:w.bin", "", ".", "..",
              "/dev/zero", "pipe.bin", "inner"]  # fmt: skip
    for place in places:
        path = external(folder / "m.onnx", place)
        for read in (load_onnx, session):
            with pytest.raises(CaptureError, match="beside the model"):
                read(path)
    with pytest.raises(CaptureError, match="No such file"):
        load_onnx(external(folder / "m.onnx", "missing.bin"))
    with pytest.raises(CaptureError, match="shorter than declared"):
        load_onnx(external(folder / "m.onnx", "short.bin"))
    with pytest.raises(CaptureError, match="do not match"):
        load_onnx(external(folder / "m.onnx", "short.bin", length=44))
    with pytest.raises(CaptureError, match="do not match"):
        load_onnx(external(folder / "m.onnx", "short.bin", offset=-4, length=48))


def test_old_operator_sets_and_functions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match="too old"):
        load_onnx(gemm(tmp_path / "m.onnx", opset=6))

    def overload(model: Any) -> None:
        body = [helper.make_node("Neg", ["a"], ["b"])]
        opsets = [helper.make_opsetid("", 17)]
        model.functions.append(helper.make_function("", "Gemm", ["a"], ["b"], body, opsets))

    with pytest.raises(UnsupportedOp, match="Gemm"):
        load_onnx(altered(tmp_path / "m.onnx", overload))


# -- writing ---------------------------------------------------------------------------------------------


class Wide(nn.Module):
    """Uses much of the vocabulary on purpose."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding="same", bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.up = nn.ConvTranspose2d(4, 3, 2, stride=2)
        self.flat = nn.BatchNorm2d(3, affine=False)
        self.rows = nn.Linear(8, 5)
        self.out = nn.utils.parametrizations.weight_norm(nn.Linear(36, 4))
        self.drop = nn.Dropout(0.3)
        self.register_buffer("shift", torch.rand(3, 1, 1))
        for norm in (self.norm, self.flat):
            norm.running_mean.uniform_(-1, 1)
            norm.running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.nn.functional.leaky_relu(self.norm(self.conv(x)), 0.1)
        x = torch.nn.functional.avg_pool2d(x, 2, 1, 1) - torch.nn.functional.max_pool2d(x, 2, 1, 1)
        x = self.flat(self.up(x[:, :, 1:, :-1])) * self.shift - 0.5
        x = x.mean(3).transpose(1, 2).sigmoid() + x.sum(2).permute(0, 2, 1)[:, :8].abs()
        x = self.rows(x.transpose(1, 2)).clamp(-0.4, 0.6)
        x = torch.cat([x, torch.tanh(x), 1 - x / 3], 2)
        x = torch.nn.functional.pad(x, (0, 1), value=0.5)[:, :, 4:]
        return self.out(self.drop(torch.relu(-x).flatten(1)))


MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "wide": (Wide, (2, 4, 5)),
    "mlp": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)), (3, 4)),
    "cnn": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)
        ),
        (1, 8, 8),
    ),
    "conv 1d": (lambda: nn.Sequential(nn.Conv1d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(18, 2)), (2, 8)),
    "double": (lambda: nn.Sequential(nn.Linear(4, 3), nn.Sigmoid()).double(), (4,)),
    "rows": (lambda: nn.Sequential(nn.Linear(4, 3, bias=False), nn.ReLU(), nn.Flatten()), (2, 4)),
    **{name: (make, (1, 8, 8)) for name, make in test_classifiers.MODULES.items()},
}  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_modules_survive_the_round_trip(name: str, tmp_path: Path) -> None:
    make, shape = MODULES[name]
    module = make().eval()
    dtype = next(module.parameters()).dtype
    network = capture(module, torch.rand(1, *shape, dtype=dtype))
    path = tmp_path / "m.onnx"
    save_onnx(network, path)
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 17)]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    again = load_onnx(path)
    x = torch.randn(5, *shape, dtype=dtype)
    with torch.no_grad():
        expected = module(x)
        assert again.input_shape == shape
        assert again.dtype == dtype
        assert torch.allclose(again(x), expected, atol=1e-5, rtol=1e-5)
        assert torch.allclose(session(path)(x), expected, atol=1e-5, rtol=1e-5)


def test_present_parameters_are_written(tmp_path: Path) -> None:
    module = nn.Linear(3, 2)
    network = capture(module, torch.rand(1, 3))
    with torch.no_grad():
        module.weight.fill_(2.0)
    save_onnx(network, tmp_path / "m.onnx.gz")
    assert bool((load_onnx(tmp_path / "m.onnx.gz").module.get_buffer("weight") == 2).all())
    names = [
        t.name
        for t in onnx.load_model_from_string(
            gzip.decompress((tmp_path / "m.onnx.gz").read_bytes())
        ).graph.initializer
    ]
    assert names == ["weight", "bias"]


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(4), nn.Dropout(0.5)])
def test_training_mode_is_refused(layer: nn.Module, tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(4, 4), layer)
    network = capture(module, torch.rand(1, 4))
    module.train()
    with pytest.raises(CaptureError, match="eval"):
        save_onnx(network, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())
    module.eval()
    save_onnx(network, tmp_path / "m.onnx")


def test_ops_without_an_onnx_form_are_named(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Threshold(0.1, 0.0), nn.Softshrink())
    network = capture(module, torch.rand(1, 4))
    with pytest.raises(UnsupportedOp, match=r"threshold.*softshrink"):
        save_onnx(network, tmp_path / "m.onnx")


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.onnx"
    network = capture(nn.Linear(3, 2), torch.rand(1, 3))
    path.write_bytes(b"old")

    def fail(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save_onnx(network, path)
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
    assert path.read_bytes() == b"old"


def test_reading_needs_no_export_machinery(tmp_path: Path) -> None:
    """A fresh process reads a file without torch.export's tracing, sympy or onnxruntime."""
    path = gemm(tmp_path / "m.onnx")
    code = (
        "import sys, torch; before = set(sys.modules)\n"
        f"from calipers.graph.onnx import load_onnx; load_onnx({str(path)!r})\n"
        "new = set(sys.modules) - before\n"
        "print(*(m for m in new if m.split('.')[0] in {'sympy', 'onnxruntime', 'onnxscript'} or '_dynamo' in m"
        " or m.startswith(('torch.export', 'torch.fx', 'torch._meta'))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not done.stdout.strip()
