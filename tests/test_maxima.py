"""Maxima as ReLUs: the same function here and in the checker, and searches that split them leave certificates."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from torch import nn

import calipers as cp
from calipers.evaluate.queries import read
from calipers.evaluate.strict import checked
from calipers.exact import branch
from calipers.exact.certificate import Tree, of_query
from calipers.exact.maxima import without_maxima
from calipers.exact.record import Record
from calipers.graph.graph import bind, evaluate
from calipers.models import load_model
from calipers_check import layers, onnx_file
from exact_checks import deadline

NETWORKS = {
    "pool": nn.MaxPool2d(2),
    "overlapping, padded": nn.MaxPool2d(3, 2, 1),
    "dilated, ceil": nn.MaxPool2d(2, 2, dilation=2, ceil_mode=True),
    "of a line": nn.Sequential(nn.Flatten(2), nn.MaxPool1d(3)),
}


class Largest(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.amax(2) + x.amax((2, 3), keepdim=True).flatten(1, 2)


@pytest.mark.parametrize("module", [*NETWORKS.values(), Largest()], ids=[*NETWORKS, "axes"])
def test_the_function_stays(module: nn.Module) -> None:
    x = torch.randn(50, 2, 5, 6, dtype=torch.float64)
    module = nn.Sequential(module, nn.Flatten())
    network = cp.capture(module, x)
    plain = without_maxima(network)
    assert plain is not network
    assert not {n.op.__name__ for n in plain.graph.nodes} & {"max_pool", "maximum"}
    y = evaluate(plain.graph, bind(plain.graph, plain.module), x)
    assert torch.allclose(y, module(x), rtol=0, atol=1e-14)


def test_without_maxima_nothing_changes() -> None:
    network = cp.capture(nn.Linear(2, 2), torch.zeros(2, 2))
    assert without_maxima(network) is network


def pooled(folder: Path, seed: int, pads: list[int]) -> Path:
    """Conv, Relu, MaxPool, Gemm on a 1×1×4×4 image of which four pixels may change."""
    rng = np.random.default_rng(seed)
    values = {
        "w": rng.normal(size=(3, 1, 3, 3)), "b": rng.normal(size=3), "v": rng.normal(size=(2, 12)) / 12**0.5,
        "c": rng.normal(size=2),
    }  # fmt: skip
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["h"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MaxPool", ["r"], ["p"], kernel_shape=[2, 2], strides=[2, 2], pads=pads),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "v", "c"], ["y"], transB=1),
    ]
    if any(pads):  # windows that overlap
        nodes[2] = helper.make_node(
            "MaxPool", ["r"], ["p"], kernel_shape=[3, 3], strides=[2, 2], pads=pads
        )
    ends = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        for name, shape in (("x", [1, 1, 4, 4]), ("y", [1, 2]))
    ]
    weights = [onnx.numpy_helper.from_array(v.astype(np.float32), k) for k, v in values.items()]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.save(model, folder / "net.onnx")
    return folder / "net.onnx"


@pytest.mark.parametrize("pads", [[0, 0, 0, 0], [1, 1, 1, 1]])
@pytest.mark.parametrize("seed", [0, 1])
def test_searches_that_split_maxima_are_certified(
    tmp_path: Path, seed: int, pads: list[int]
) -> None:
    file = pooled(tmp_path, seed, pads)
    generator = torch.Generator().manual_seed(seed)
    free = [5, 6, 9, 10]
    x = torch.zeros(100_000, 16)
    x[:, free] = (torch.rand(len(x), 4, generator=generator) - 0.5).clamp(-0.2, 0.2)
    network = load_model(str(file))
    top = float(network(x.reshape(-1, 1, 4, 4))[:, 0].max()) + (0.05 if not any(pads) else 0.3)
    lines = [f"(declare-const X_{i} Real)" for i in range(16)]
    lines += ["(declare-const Y_0 Real)", "(declare-const Y_1 Real)"]
    for i in range(16):
        r = 0.2 if i in free else 0
        lines.append(f"(assert (>= X_{i} {-r}))\n(assert (<= X_{i} {r}))")
    query_file = tmp_path / "q.vnnlib"
    query_file.write_text("\n".join([*lines, f"(assert (>= Y_0 {top:.6f}))"]))
    network, query = read(file, query_file)
    region, spec, _ = query.cases[0]
    record = Record()
    found = branch(network, region, spec, deadline=deadline(30), record=record)
    assert found.robust, found
    assert found.domains > 0
    files = (file, query_file)
    data = of_query(network, files, query.cases, {(0, 0): record})
    assert checked(data, files, 60.0) == ""


def test_the_checkers_maxima_are_those_of_the_network(tmp_path: Path) -> None:
    file = pooled(tmp_path, 0, [1, 1, 1, 1])
    network = onnx_file.network(file.read_bytes())
    plain = layers.without_maxima(network)
    x = np.random.default_rng(0).normal(size=(40, 16))

    def run(net: layers.Network) -> np.ndarray:
        values = [x]
        for step in net.steps:
            sources = [values[s] for s in step.sources]
            if isinstance(step, layers.Affine):
                y = sum(step.along(j, v) for j, v in enumerate(sources))
                values.append(y if step.bias is None else y + step.bias)
            elif isinstance(step, layers.Maximum):
                padded = np.concatenate([sources[0], np.full((len(x), 1), -np.inf)], 1)
                values.append(padded[:, step.index].max(2))
            else:
                v = sources[0]
                values.append(np.where(v < 0, step.left * v, step.right * v))
        return values[-1]

    assert len(plain.activations) == 1 + 4  # of nine: four pairs, two, one, one
    assert np.allclose(run(plain), run(network), rtol=0, atol=1e-12)


def test_the_entry_says_so() -> None:
    assert (
        json.dumps(Tree([0], {}, 1, "relu").entry(2))
        == '{"clauses": [0], "root": 1, "maxima": "relu"}'
    )
