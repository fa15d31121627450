"""Trees of input splits as the checker reads them: where it refuses a leaf, weights for it, or further splits.

A search that splits inputs bounds boxes in ways of its own, which are not all rules of the format. So its tree is
walked by the checker's own program, with rules alone, and grows where these do not suffice.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from calipers.errors import CertificateError
from calipers.exact.boxes import Planes, blend
from calipers_check.errors import Refused
from calipers_check.layers import Network
from calipers_check.prove import Budget, Found, Goal, Open, Proof, bare_root
from calipers_check.tree import Tree
from calipers_check.vnnlib import Clause

Array = np.ndarray[Any, np.dtype[Any]]
Arrays = dict[str, Array]
STEPS = 32  # towards the weights of a clause's functionals
NODES = 200_000


class _Left(NamedTuple):
    """A leaf that was refused: the node, and the planes (R, n), (R,) of each of its open clauses."""

    node: Open
    planes: list[tuple[int, Array, Array]]


class _Grower(Proof):
    """A proof that collects what it cannot prove."""

    left: list[_Left]

    def below(self, nodes: Open) -> None:
        """Go on with the children of ``nodes``."""
        self.walk([self._children(nodes)])

    def _last_resort(self, node: Open, found: Sequence[Found], place: int) -> None:
        planes = []
        for c in np.flatnonzero(node.open[0]):
            mine = [(s.owner == place) & (s.clause == c) for s in found]
            slopes = np.concatenate([s.planes.G[m] for s, m in zip(found, mine, strict=True)])
            offsets = np.concatenate([s.planes.c[m] for s, m in zip(found, mine, strict=True)])
            planes.append((int(c), slopes, offsets))
        self.left.append(_Left(node, planes))


def grown(
    arrays: Arrays,
    network: Network,
    clauses: Sequence[Clause],
    numbers: Sequence[int],
    seconds: float,
) -> Arrays:
    """The tree's arrays, such that the checker's rules prove the clauses ``numbers``.

    Raises:
        CertificateError: there is no end to it.
    """
    counts = [len(c.d) for c in clauses]
    own = [clauses[c] for c in numbers]
    lower, upper = np.min([c.lower for c in own], 0), np.max([c.upper for c in own], 0)
    end = time.monotonic() + seconds
    lines: list[tuple[int, int, Array]] = []
    try:
        with np.errstate(all="ignore"):
            root = bare_root(network, lower, upper, end)
            tree = Tree(arrays, network, numbers, counts, None)
            proof = _Grower(tree, Goal(numbers, clauses), root, Budget())
            proof.left = []
            proof.run()
            while proof.left:
                left = [v for v in proof.left if not _weighted(v, numbers, lines)]
                proof.left = []
                if not left:
                    break
                arrays = _split(arrays, left)
                if len(arrays["child"]) > NODES:
                    raise CertificateError(f"the tree has more than {NODES} nodes")
                proof.tree = Tree(arrays, network, numbers, counts, None)
                nodes = Open(
                    *(np.concatenate(v) for v in zip(*(v.node for v in left), strict=True))
                )
                proof.below(nodes)
    except Refused as error:
        raise CertificateError(f"the checker's rules do not suffice: {error}") from None
    return {**arrays, **_lines(lines)}


def _weighted(left: _Left, numbers: Sequence[int], lines: list[tuple[int, int, Array]]) -> bool:
    """Whether weights of the functionals prove all open clauses; they are noted."""
    box = left.node
    center = torch.from_numpy(box.lower / 2 + box.upper / 2)
    radius = torch.from_numpy((box.upper - box.lower) / 2)
    found = []
    for c, slopes, offsets in left.planes:
        if len(offsets) < 2:
            return False
        G = torch.from_numpy(slopes)
        values = torch.from_numpy(offsets) + G @ center[0]
        rows = torch.arange(len(offsets))
        planes = Planes(G.unsqueeze(1), values.unsqueeze(1), 0 * rows, center, radius)
        weights = blend(planes, rows, STEPS)
        if not planes.mean(rows, weights).lows.item() > 1e-9 * values.abs().max().item():
            return False
        found.append((int(box.node[0]), numbers[c], weights[:, 0].numpy()))
    lines += found
    return True


def _split(arrays: Arrays, left: Sequence[_Left]) -> Arrays:
    """With two more nodes below every leaf in ``left``, split where its planes vary most."""
    count, new = len(arrays["child"]), 2 * len(left)
    pads = {"layer": -1, "bounds": 2, "proof": 2, "trim": 1}
    arrays = {
        k: np.concatenate([v, np.full(new, pads.get(k, 0), v.dtype)]) for k, v in arrays.items()
    }
    for i, (node, planes) in enumerate(left):
        width = (node.upper - node.lower)[0]
        steep = sum((np.abs(G).sum(0) for _, G, _ in planes), np.zeros_like(width))
        dim = int((width * (steep + 1e-300)).argmax())
        point = node.lower[0, dim] / 2 + node.upper[0, dim] / 2
        if not (node.lower[0, dim] < point < node.upper[0, dim]) or not math.isfinite(point):
            raise CertificateError("a box too small to be cut is not proved by the checker's rules")
        at = int(node.node[0])
        arrays["child"][at] = count + 2 * i
        arrays["layer"][at], arrays["element"][at], arrays["point"][at] = -1, dim, point
    return arrays


def _lines(lines: Sequence[tuple[int, int, Array]]) -> Arrays:
    ordered = sorted(lines, key=lambda v: v[0])
    if not ordered:
        return {}
    return {
        "line.node": np.array([v[0] for v in ordered], "i4"),
        "line.clause": np.array([v[1] for v in ordered], "i4"),
        "line.choice": np.full(len(ordered), -1, "i4"),
        "weight": np.concatenate([v[2] for v in ordered]),
    }
