"""Trees of input splits as the checker reads them: where it refuses a leaf, weights for it, or further splits.

A search that splits inputs bounds boxes in ways of its own, which are not all rules of the format. So its tree is
walked by the checker's own program, with rules alone, and grows where these do not suffice.
"""

from __future__ import annotations

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
    """Leaves that were refused.

    Args:
        nodes: N of them.
        planes: for each clause of the tree, with the leaves (L,) that it is open at, slopes (R, L, n) and offsets
            (R, L) of its R functionals' planes there; none where the rules gave none.
    """

    nodes: Open
    planes: list[tuple[int, Array, Array, Array]]


class _Grower(Proof):
    """A proof that collects what it cannot prove."""

    left: list[_Left]

    def below(self, nodes: Open) -> None:
        """Go on with the children of ``nodes``."""
        self.walk([self._children(nodes)])

    def _leaves(self, nodes: Open, found: Sequence[Found], left: Array) -> None:
        whole = [s for s in found if len(s.planes.G)]
        planes = []
        if whole:
            owner, clause = (
                np.concatenate(v) for v in zip(*((s.owner, s.clause) for s in whole), strict=True)
            )
            G, c = (
                np.concatenate(v)
                for v in zip(*((s.planes.G, s.planes.c) for s in whole), strict=True)
            )
            for k, many in enumerate(np.diff(self.goal.first)):
                some = np.flatnonzero(nodes.open[left, k])
                mine = np.flatnonzero((clause == k) & np.isin(owner, left[some]))
                if len(mine) == many * len(some) > 0:  # else some rule of theirs gave none
                    order = np.argsort(owner[mine], kind="stable")
                    rows = mine[order].reshape(len(some), many).T
                    planes.append((k, some, G[rows], c[rows]))
        self.left.append(_Left(nodes.at(left), planes))


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
                left = [
                    v
                    for v in (_weighted(v, numbers, lines) for v in proof.left)
                    if len(v.nodes.node)
                ]
                proof.left = []
                if not left:
                    break
                arrays = _split(arrays, left)
                if len(arrays["child"]) > NODES:
                    raise CertificateError(f"the tree has more than {NODES} nodes")
                proof.tree = Tree(arrays, network, numbers, counts, None)
                parts = zip(*(v.nodes for v in left), strict=True)
                proof.below(Open(*(np.concatenate(v) for v in parts)))
    except Refused as error:
        raise CertificateError(f"the checker's rules do not suffice: {error}") from None
    return {**arrays, **_lines(lines)}


def _weighted(left: _Left, numbers: Sequence[int], lines: list[tuple[int, int, Array]]) -> _Left:
    """Without the leaves at which weights of the functionals prove all open clauses; these are noted."""
    box, still = left.nodes, left.nodes.open.copy()
    center = torch.from_numpy(box.lower / 2 + box.upper / 2)
    radius = torch.from_numpy((box.upper - box.lower) / 2)
    found = []
    for clause, some, slopes, offsets in left.planes:
        if len(offsets) < 2:
            continue
        G, at = torch.from_numpy(slopes), torch.from_numpy(some)
        values = torch.from_numpy(offsets) + (G * center[at]).sum(2)
        rows = torch.arange(len(offsets))
        planes = Planes(G, values, 0 * rows, center[at], radius[at])
        weights = blend(planes, rows, STEPS)
        good = (planes.mean(rows, weights).lows[0] > 1e-9 * values.abs().amax(0)).numpy()
        still[some[good], clause] = False
        found.append((clause, some[good], weights.T.numpy()[good]))
    done = np.asarray(~still.any(1))
    for clause, some, own in found:
        keep = done[some]
        nodes = box.node[some[keep]].tolist()
        lines += [(n, numbers[clause], w) for n, w in zip(nodes, own[keep], strict=True)]
    place = np.cumsum(~done) - 1
    planes_left = [
        (k, place[some[keep]], G[:, keep], c[:, keep])
        for k, some, G, c in left.planes
        for keep in [~done[some]]
    ]
    return _Left(box.at(~done), planes_left)


def _split(arrays: Arrays, left: Sequence[_Left]) -> Arrays:
    """With two more nodes below every leaf in ``left``, split where its planes vary most."""
    count, new = len(arrays["child"]), 2 * sum(len(v.nodes.node) for v in left)
    pads = {"layer": -1, "bounds": 2, "proof": 2, "trim": 1}
    arrays = {
        k: np.concatenate([v, np.full(new, pads.get(k, 0), v.dtype)]) for k, v in arrays.items()
    }
    for nodes, planes in left:
        width = nodes.upper - nodes.lower
        steep = np.full_like(width, 1e-300)
        for _, some, G, _ in planes:
            steep[some] += np.abs(G).sum(0)
        dim = (width * steep).argmax(1)
        row = np.arange(len(dim))
        low, high = nodes.lower[row, dim], nodes.upper[row, dim]
        point = low / 2 + high / 2
        if not (np.isfinite(point) & (low < point) & (point < high)).all():
            raise CertificateError("a box too small to be cut is not proved by the checker's rules")
        arrays["child"][nodes.node] = count + 2 * row
        arrays["layer"][nodes.node], arrays["element"][nodes.node] = -1, dim
        arrays["point"][nodes.node] = point
        count += 2 * len(row)
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
