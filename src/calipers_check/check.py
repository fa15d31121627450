"""A certificate against a network and a property."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from calipers_check import container, onnx_file, vnnlib
from calipers_check.errors import Refused, Unusable
from calipers_check.lattice import with_maxima
from calipers_check.layers import Array, Network, without_maxima
from calipers_check.prove import Budget, Goal, Proof, Root, bare_root
from calipers_check.tree import NAMES, Tree
from calipers_check.vnnlib import Ball, Clause

MAXIMA = {"relu": without_maxima, "fold": with_maxima}
INLINE = ("lower", "upper", "center", "eps", "C", "d", "clause")


class Accepted(NamedTuple):
    """What was proved.

    Args:
        digest: of a property written into the certificate; None for a text, whose digest has been compared.
    """

    clauses: int
    trees: int
    nodes: int
    digest: str | None


def check(
    certificate: Path,
    network: Path,
    prop: Path | None = None,
    *,
    seconds: float = math.inf,
    max_bytes: int = container.MAX_BYTES,
) -> Accepted:
    """Accept the certificate: the network has the property, in real arithmetic.

    Args:
        prop: the VNN-LIB text; None for a property written into the certificate.
        seconds: after which to refuse.
        max_bytes: of any of the files, decompressed.

    Raises:
        Refused: for the reason that it names.
        Unusable: a file is missing, or the network or property cannot be read.
    """
    try:
        return _check(certificate, network, prop, time.monotonic() + seconds, max_bytes)
    except (Refused, Unusable, MemoryError):
        raise
    except Exception as error:
        raise Refused(f"not understood: {type(error).__name__}: {str(error)[:200]}") from error


def _check(
    certificate: Path, network: Path, prop: Path | None, deadline: float, max_bytes: int
) -> Accepted:
    document, arrays = container.parse(container.read_bytes(certificate, max_bytes))
    _expect(document, {"format", "version", "semantics", "network", "property", "trees"}, {"notes"})
    for key, value in (("format", "calipers-certificate"), ("version", 1), ("semantics", "real")):
        if document[key] != value or isinstance(document[key], bool):
            raise Refused(f"{key}: {str(document[key])[:40]!r}; expected {value!r}")
    model = _readable(network, max_bytes)
    _compare("network", document["network"], model)
    net = onnx_file.network(model)
    trees = document["trees"]
    if not isinstance(trees, list):
        raise Refused("trees: not a list")
    parts = _parts(arrays, len(trees))
    own = parts.pop("property", {})
    clauses, digest = _property(document["property"], own, prop, max_bytes)
    if any(len(c.lower) != net.inputs for c in clauses):
        raise Unusable(f"property: not about the network's {net.inputs} inputs")
    if any(c.C.shape[1] != net.sizes[-1] for c in clauses):
        raise Unusable(f"property: not about the network's {net.sizes[-1]} outputs")
    with np.errstate(all="ignore"):
        nodes = _prove(net, clauses, trees, parts, deadline)
    return Accepted(len(clauses), len(trees), nodes, digest)


def _expect(
    value: Any, needed: set[str], optional: frozenset[str] | set[str] = frozenset()
) -> None:
    if not isinstance(value, dict) or not needed <= set(value) <= needed | optional:
        keys = sorted(value) if isinstance(value, dict) else value
        raise Refused(f"expected the keys {sorted(needed)}, not {str(keys)[:80]}")


def _readable(path: Path, limit: int) -> bytes:
    try:
        return container.read_bytes(path, limit)
    except Refused as error:
        raise Unusable(str(error)) from None


def _compare(what: str, entry: Any, data: bytes) -> None:
    _expect(entry, {"sha256"})
    if entry["sha256"] != hashlib.sha256(data).hexdigest():
        raise Refused(f"{what}: the certificate is for another one; their digests differ")


def _parts(arrays: Mapping[str, Array], trees: int) -> dict[str, dict[str, Array]]:
    """The arrays of each tree, and of the property, by what stands before their names' slash."""
    parts: dict[str, dict[str, Array]] = {str(t): {} for t in range(trees)}
    for whole, array in arrays.items():
        place, _, name = whole.partition("/")
        if place == "property":
            parts.setdefault(place, {})[name] = array
        elif place in parts and name in NAMES:
            parts[place][name] = array
        else:
            raise Refused(f"array {whole[:60]!r}: not part of any tree")
    return parts


def _property(
    entry: Any, arrays: Mapping[str, Array], prop: Path | None, limit: int
) -> tuple[list[Clause], str | None]:
    if isinstance(entry, dict) and "inline" in entry:
        if prop is not None:
            raise Refused("property: written into the certificate, so not that of the file")
        return _inline(entry, arrays)
    if arrays:
        raise Refused("property: arrays of a property that is not written into the certificate")
    if prop is None:
        raise Unusable("property: the certificate is for a VNN-LIB file; give it with --property")
    text = _readable(prop, limit)
    _compare("property", entry, text)
    return vnnlib.clauses(text.decode(errors="replace")), None


def _inline(entry: Any, arrays: Mapping[str, Array]) -> tuple[list[Clause], str]:
    _expect(entry, {"inline", "p"})
    if entry["inline"] is not True or entry["p"] not in ("1", "2", "inf"):
        raise Refused("property: p must be 1, 2 or inf, as a text")
    round_ = entry["p"] != "inf"
    names = [n for n in INLINE if round_ or n not in ("center", "eps")]
    if set(arrays) != set(names):
        raise Refused(f"property: expected the arrays {', '.join(names)}")
    own = {name: arrays[name] for name in names}
    numbers = [v for name, v in own.items() if name != "clause"]
    if any(v.dtype != np.float64 or not np.isfinite(v).all() for v in numbers):
        raise Refused("property: expected finite float64 numbers")
    lower, C, d, clause = (own[name] for name in ("lower", "C", "d", "clause"))
    fits = all(v.ndim == 1 for n, v in own.items() if n != "C") and C.ndim == 2
    sides = [own[name] for name in ("upper", "center") if name in own]
    fits = fits and all(v.shape == lower.shape for v in sides)
    if not fits or not len(C) == len(d) == len(clause) > 0 or (round_ and len(own["eps"]) != 1):
        raise Refused("property: arrays of shapes that do not fit")
    steps = np.diff(clause.astype(np.int64), prepend=0)
    if clause.dtype != np.int32 or clause[0] or not np.isin(steps, [0, 1]).all():
        raise Refused("property: clauses are not numbered in order, in I32")
    if (lower > own["upper"]).any():
        raise Refused("property: a box without any point")
    ball = Ball(own["center"], float(own["eps"][0]), int(entry["p"])) if round_ else None
    if ball is not None and ball.eps < 0:
        raise Refused("property: a negative radius")
    bytes_ = b"".join([entry["p"].encode(), *(v.tobytes() for v in own.values())])
    digest = hashlib.sha256(bytes_).hexdigest()
    of = [clause == c for c in range(int(clause[-1]) + 1)]
    return [Clause(lower, own["upper"], C[c], d[c], False, ball) for c in of], digest


# -- trees ----------------------------------------------------------------------------------------------------


def _prove(
    network: Network,
    clauses: Sequence[Clause],
    trees: Sequence[Any],
    arrays: Mapping[str, Mapping[str, Array]],
    deadline: float,
) -> int:
    """Prove every clause; returns how many nodes the trees have.

    Args:
        arrays: of each tree, by its number as a text.
    """
    shared = _documents(trees, len(clauses))
    counts = [len(c.d) for c in clauses]
    networks = {None: network}
    roots: dict[int, tuple[Root, Tree]] = {}
    budget, nodes, missing = Budget(), 0, {i for i, c in enumerate(clauses) if not c.void}
    for t, document in enumerate(trees):
        numbers, base = document["clauses"], document.get("root")
        form = document.get("maxima")
        if form not in networks:
            networks[form] = MAXIMA[form](network)
        net = networks[form]
        try:
            if base is not None and base not in roots:
                raise Refused("its root is that of a tree with nothing to prove")
            columns = roots[base][1].columns if base is not None else None
            tree = Tree(arrays[str(t)], net, numbers, counts, columns)
            nodes += len(tree)
            wanted = [c for c in numbers if not clauses[c].void]
            if not wanted:
                continue
            lower = np.min([clauses[c].lower for c in wanted], 0)
            upper = np.max([clauses[c].upper for c in wanted], 0)
            root = (
                roots[base][0]
                if base is not None
                else bare_root(net, lower, upper, deadline, clauses[wanted[0]].ball)
            )
            box = root.view
            if not (np.array_equal(box.lower[0], lower) and np.array_equal(box.upper[0], upper)):
                raise Refused("its box is not that of the tree whose root it shares")
            proof = Proof(tree, Goal(wanted, clauses), root, budget)
            if t in shared:
                roots[t] = Root(root.engine, proof.root), tree
            proof.run()
        except Refused as error:
            raise Refused(f"tree {t}: {error}") from None
        missing -= set(wanted)
    if missing:
        raise Refused(f"clause {min(missing)} is in no tree")
    return nodes


def _documents(trees: Sequence[Any], count: int) -> set[int]:
    """Check what the document says of the trees; returns those whose root others share."""
    if len(trees) > count:
        raise Refused(f"trees: {len(trees)} of them for {count} clauses")
    shared = set()
    for t, document in enumerate(trees):
        _expect(document, {"clauses"}, {"root", "maxima"})
        form = document.get("maxima", "relu")
        if not isinstance(form, str) or form not in MAXIMA:
            raise Refused(f"tree {t}: maxima: {str(form)[:40]!r}; expected 'relu' or 'fold'")
        numbers, base = document["clauses"], document.get("root", 0)
        if (
            not isinstance(numbers, list)
            or not numbers
            or len(set(map(str, numbers))) < len(numbers)
        ):
            raise Refused(f"tree {t}: clauses must be different numbers")
        if any(type(c) is not int or not 0 <= c < count for c in numbers):
            raise Refused(f"tree {t}: the property has clauses 0 to {count - 1}")
        if "root" in document:
            if type(base) is not int or not 0 <= base < t or "root" in trees[base]:
                raise Refused(f"tree {t}: no earlier tree {base!r} with a root of its own")
            if trees[base].get("maxima") != document.get("maxima"):
                raise Refused(f"tree {t}: reads maxima otherwise than tree {base}")
            shared.add(base)
    return shared
