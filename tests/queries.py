"""Small networks and queries as files, with answers that are known by construction."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from calipers.graph.graph import Network
from calipers.graph.onnx import load_onnx, save_onnx
from networks import Builder


def write_network(path: Path, weights: list[tuple[list[list[float]], list[float]]]) -> Path:
    """An ONNX file: affine layers with ReLU between them."""
    b = Builder((len(weights[0][0][0]),))
    h = b.x
    for i, (weight, bias) in enumerate(weights):
        h = b(torch.nn.functional.linear, h, torch.tensor(weight), torch.tensor(bias))
        if i < len(weights) - 1:
            h = b.relu(h)
    save_onnx(b.network(), path)
    return path


# y0 = |x0| + |x1|, y1 = 1: the l1 norm, by four ReLU
DIAMOND = [
    ([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]], [0.0] * 4),
    ([[1.0, 1.0, 1.0, 1.0], [0.0] * 4], [0.0, 1.0]),
]
HEAD = "".join(f"(declare-const {v} Real)\n" for v in ("X_0", "X_1", "Y_0", "Y_1"))


def text(low: str, high: str, unsafe: str) -> str:
    """A query of version 1.0 on the square [low, high]²."""
    box = "".join(f"(assert (>= X_{i} {low}))\n(assert (<= X_{i} {high}))\n" for i in range(2))
    return f"{HEAD}{box}(assert {unsafe})\n"


SECOND = """(vnnlib-version <2.0>)
(declare-network f (declare-input X {kind} [1,2]) (declare-output Y {kind} [1,2]))
(assert (and (>= X[0,0] -1.0) (<= X[0,0] 1.0) (>= X[0,1] -1.0) (<= X[0,1] 1.0)))
(assert {unsafe})
"""
# what is unsafe on [-1, 1]² -> the answer
ANSWERS = {
    "(>= Y_0 1.5)": "sat",
    "(>= Y_0 2.5)": "unsat",
    "(<= Y_0 -0.5)": "unsat",
    "(>= Y_0 2)": "sat",  # at the corners alone
    "(and (>= Y_0 0.5) (<= Y_0 0.75))": "sat",
    "(and (>= Y_0 1.75) (<= X_0 0.5) (>= X_0 -0.5))": "unsat",  # |x0| <= 0.5
    "(or (>= Y_0 3) (<= Y_1 0.5))": "unsat",
    "(or (>= Y_0 3) (and (<= X_0 -0.75) (>= Y_0 Y_1)))": "sat",
}


def diamond(folder: Path) -> tuple[Path, Network]:
    file = write_network(folder / "net.onnx", DIAMOND)
    return file, load_onnx(file)


def norm(x: Tensor) -> Tensor:
    """What `DIAMOND` computes as Y_0."""
    return x.abs().sum(-1)
