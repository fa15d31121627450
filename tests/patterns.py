"""The exact minimum of a ReLU network by brute force: one linear program for each pattern of all its neurons."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linprog
from torch import Tensor

from calipers.graph.graph import Network
from calipers.sets import Region
from calipers.spec import Spec


def layers(network: Network) -> list[tuple[np.ndarray, np.ndarray]]:
    """Weight and bias of each layer of a fully connected network."""
    module: Any = network.module
    return [
        tuple(getattr(module, a.name).detach().double().numpy() for a in node.args[1:3])
        for node in network.graph.nodes
        if node.op is F.linear
    ]  # type: ignore[misc]


def ball_rows(region: Region, i: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Σ |x_k − c_k| ≤ eps as one row per sign pattern; none for a box."""
    n = region.center[i].numel()
    if region.p != 1:
        assert region.p == math.inf
        return np.zeros((0, n)), np.zeros(0)
    signs = np.array(list(itertools.product([-1.0, 1.0], repeat=n)))
    return signs, signs @ region.center[i].flatten().numpy() + region.outer_eps[i].item()


def exact_minimum(
    network: Network, region: Region, C: np.ndarray, d: Any = 0.0, i: int = 0
) -> float:
    """min over example i's set of max over the rows of C·output + d."""
    weights = layers(network)
    n = region.center[i].numel()
    signs, limits = ball_rows(region, i)
    sides = [*zip(*(end[i].flatten().tolist() for end in region.hull()), strict=True), (None, None)]
    best = math.inf
    for pattern in itertools.product([0.0, 1.0], repeat=sum(len(b) for _, b in weights[:-1])):
        A, c, rest = np.eye(n), np.zeros(n), np.array(pattern)
        rows, ends = [signs], [limits]
        for W, b in weights[:-1]:
            A, c = W @ A, W @ c + b
            on, rest = rest[: len(b)], rest[len(b) :]
            flip = 1 - 2 * on[:, None]  # off: z ≤ 0, on: −z ≤ 0
            rows.append(flip * A)
            ends.append(-flip[:, 0] * c)
            A, c = on[:, None] * A, on * c
        W, b = weights[-1]
        A, c = C @ W @ A, C @ (W @ c + b) + d
        inside = np.concatenate(rows)
        G = np.block(
            [[inside, np.zeros((len(inside), 1))], [A, -np.ones((len(A), 1))]]
        )  # t ≥ each row
        found = linprog(np.append(np.zeros(n), 1.0), G, np.concatenate([*ends, -c]), bounds=sides)
        if found.status == 0:
            best = min(best, found.fun)
    return best


def exact_minima(network: Network, region: Region, spec: Spec) -> Tensor:
    """The minimum of each functional: (B, M)."""
    C = spec.C.double().numpy()
    found = [
        [exact_minimum(network, region, row[None], i=i) for row in rows] for i, rows in enumerate(C)
    ]
    return torch.tensor(found, dtype=torch.float64) + spec.d.double()


def exact_margin(network: Network, region: Region, spec: Spec) -> float:
    """The least margin of one example: of its clauses the one that gets lowest."""
    C, d, clause = spec.C[0].double().numpy(), spec.d[0].double().numpy(), spec.clause.numpy()
    return min(
        exact_minimum(network, region, C[clause == c], d[clause == c]) for c in range(spec.count)
    )
