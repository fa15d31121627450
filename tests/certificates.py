"""Certificates written from docs/certificates.md alone, small ONNX networks and queries to write them for."""

from __future__ import annotations

import hashlib
import itertools
import json
import struct
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

NAMES = {"int32": "I32", "int64": "I64", "uint8": "U8", "float64": "F64", "float32": "F32"}
NAMES["float16"] = "F16"
Layers = Sequence[tuple[np.ndarray, np.ndarray]]


def packed(document: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"certificate": json.dumps(document)}}
    data = b""
    for name, value in arrays.items():
        raw = np.ascontiguousarray(value).tobytes()
        header[name] = {
            "dtype": NAMES[value.dtype.name],
            "shape": list(value.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def document(network: Path, prop: Path, trees: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    def digest(path: Path) -> dict[str, str]:
        return {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}

    return {
        "format": "calipers-certificate",
        "version": 1,
        "semantics": "real",
        "network": digest(network),
        "property": digest(prop),
        "trees": list(trees),
    }


def onnx_bytes(
    nodes: Sequence[onnx.NodeProto],
    parameters: Mapping[str, np.ndarray],
    inputs: Sequence[int],
    outputs: Sequence[int],
) -> bytes:
    """A network from x to y."""
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, inputs)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, outputs)],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in parameters.items()],
    )
    opset = [helper.make_opsetid("", 13)]
    return helper.make_model(graph, opset_imports=opset, ir_version=8).SerializeToString()


def mlp(layers: Layers, activation: str = "Relu", **attributes: Any) -> bytes:
    """Products with (out, in) matrices, an activation between them."""
    nodes, parameters, last = [], {}, "x"
    for i, (weight, bias) in enumerate(layers):
        parameters |= {f"W{i}": weight, f"b{i}": bias}
        end = "y" if i == len(layers) - 1 else f"v{i}"
        nodes.append(helper.make_node("Gemm", [last, f"W{i}", f"b{i}"], [end], transB=1))
        if end != "y":
            nodes.append(helper.make_node(activation, [end], [f"h{i}"], **attributes))
        last = f"h{i}"
    size = layers[0][0].shape[1], layers[-1][0].shape[0]
    return onnx_bytes(nodes, parameters, (1, size[0]), (1, size[1]))


def random_layers(seed: int, sizes: Sequence[int] = (2, 4, 4, 1)) -> Layers:
    rng = np.random.default_rng(seed)
    return [
        (
            rng.normal(size=(n, m)).astype(np.float32),
            (0.3 * rng.normal(size=n)).astype(np.float32),
        )
        for m, n in itertools.pairwise(sizes)
    ]


def value(layers: Layers, x: Sequence[Fraction | float], left: float = 0.0) -> list[Fraction]:
    """The network at a point, exactly."""
    h = [Fraction(v) for v in x]
    for i, (weight, bias) in enumerate(layers):
        h = [
            sum((Fraction(float(w)) * v for w, v in zip(row, h, strict=True)), Fraction(float(b)))
            for row, b in zip(weight, bias, strict=True)
        ]
        if i < len(layers) - 1:
            h = [v if v >= 0 else Fraction(left) * v for v in h]
    return h


def query(lower: Sequence[float], upper: Sequence[float], outputs: int, unsafe: str) -> str:
    """A VNN-LIB 1.0 text; ``unsafe`` is a formula."""
    lines = [f"(declare-const X_{i} Real)" for i in range(len(lower))]
    lines += [f"(declare-const Y_{i} Real)" for i in range(outputs)]
    for i, (l, u) in enumerate(zip(lower, upper, strict=True)):
        lines += [f"(assert (>= X_{i} {l!r}))", f"(assert (<= X_{i} {u!r}))"]
    return "\n".join([*lines, f"(assert {unsafe})"])


class Case:
    """Files of a network and a query in a folder, and certificates for them."""

    def __init__(self, folder: Path, network: bytes, text: str) -> None:
        self.folder = folder
        self.network, self.prop = folder / "net.onnx", folder / "prop.vnnlib"
        self.network.write_bytes(network)
        self.prop.write_text(text)

    def document(self, trees: Sequence[Mapping[str, Any]] = ({"clauses": [0]},)) -> dict[str, Any]:
        return document(self.network, self.prop, trees)

    def write(
        self,
        arrays: Mapping[str, np.ndarray],
        trees: Sequence[Mapping[str, Any]] = ({"clauses": [0]},),
    ) -> Path:
        return self.save(packed(self.document(trees), arrays))

    def save(self, data: bytes) -> Path:
        path = self.folder / "proof.cert"
        path.write_bytes(data)
        return path
