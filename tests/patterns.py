"""Exact minima of networks by brute force, `exact_checks.pattern_minimum`, for one functional or many."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from calipers.graph.graph import Network
from calipers.sets import Region
from calipers.spec import Spec
from exact_checks import pattern_minimum


def layers(network: Network) -> list[tuple[np.ndarray, np.ndarray]]:
    """Weight and bias of each layer of a fully connected network."""
    module: Any = network.module
    return [
        tuple(getattr(module, a.name).detach().double().numpy() for a in node.args[1:3])
        for node in network.graph.nodes
        if node.op is F.linear
    ]  # type: ignore[misc]


def exact_minimum(network: Network, region: Region, C: np.ndarray) -> float:
    """min over the set of one example of max over the rows of C·output."""
    rows = torch.from_numpy(C)[None]
    one = torch.zeros(len(C), dtype=torch.long)
    return pattern_minimum(network, region, Spec(rows, rows.new_zeros(1, len(C)), one))


def exact_minima(network: Network, region: Region, spec: Spec) -> Tensor:
    """The minimum of each functional: (B, M)."""
    C = spec.C.double().numpy()
    found = [
        [exact_minimum(network, region[i : i + 1], row[None]) for row in rows]
        for i, rows in enumerate(C)
    ]
    return torch.tensor(found, dtype=torch.float64) + spec.d.double()
