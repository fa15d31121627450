"""Certificates: what proves a property, written down for an independent checker (docs/certificates.md has the format).

Nothing here decides anything. What a search noted in its `Record`, or the name of the bound that sufficed, becomes
trees of splits with the numbers that `calipers_check` needs to find the same bounds again, by its own means.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import struct
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from calipers.errors import CertificateError
from calipers.exact.grow import grown
from calipers.exact.lattice import with_maxima
from calipers.exact.maxima import without_maxima
from calipers.exact.record import Proof, Record
from calipers.graph import primitives as prim
from calipers.graph.graph import Network
from calipers.ops import facts
from calipers.ops.kinds import Affine
from calipers.sets import Region
from calipers.spec import Spec
from calipers.vnnlib import Case
from calipers_check import lattice, onnx_file
from calipers_check.container import read_bytes
from calipers_check.vnnlib import Clause
from calipers_check.vnnlib import clauses as clauses_of

Array = np.ndarray[Any, np.dtype[Any]]
Arrays = dict[str, Array]
FORMAT, VERSION = "calipers-certificate", 1
DTYPES = {"i4": "I32", "u1": "U8", "f8": "F64", "f4": "F32", "f2": "F16"}
ACTIVATIONS = (torch.relu, F.leaky_relu, torch.abs, prim.max_pool, torch.sigmoid, torch.tanh)
INTERVAL, CROWN, LINES = 1, 2, 3
ONE = np.ones(1, "u1")
NAMED = {"interval": INTERVAL, "crown_ibp": INTERVAL, "crown": CROWN}  # bound -> rule for intervals


class Tree(NamedTuple):
    """A tree of the document.

    Args:
        clauses: that it proves.
        back: how many trees before it is the one whose root it shares; 0 for none.
        maxima: "relu" if it is about the network with its maxima as ReLUs, "fold" if with its ReLUs as maxima.
    """

    clauses: list[int]
    arrays: Arrays
    back: int = 0
    maxima: str = ""

    def entry(self, number: int) -> dict[str, Any]:
        """Its line in the document."""
        base = {"root": number - self.back} if self.back else {}
        return {"clauses": self.clauses, **base, **({"maxima": self.maxima} if self.maxima else {})}


class Claim(NamedTuple):
    """A clause of the document, as a clause of ours.

    Args:
        number: in the document.
        clause: of the specification.
        functionals: of ours, in the document's order.
        members: (members,) their places among those of the clause.
        factors: (members,) what ours are multiplied by to become the document's.
    """

    number: int
    clause: int
    functionals: list[int]
    members: Array
    factors: Array


class Numbers(NamedTuple):
    """The format's numbers of activations, by node, and by the value that each reads."""

    node: dict[str, int]
    operand: dict[str, int]


# -- the file ---------------------------------------------------------------------------------------------------------


def digest(path: str | Path) -> dict[str, str]:
    """Of a file's bytes; of the decompressed ones where it is gzip's."""
    data = Path(path).read_bytes()
    if data[:2] == b"\x1f\x8b":
        data = gzip.decompress(data)
    return {"sha256": hashlib.sha256(data).hexdigest()}


def encoded(
    network: str | Path,
    claim: Mapping[str, Any],
    trees: Sequence[Tree],
    arrays: Arrays | None = None,
) -> bytes:
    """The bytes of a certificate.

    Args:
        network: the ONNX file.
        claim: the document's "property".
        arrays: those of a property inside the certificate.
    """
    document = {
        "format": FORMAT,
        "version": VERSION,
        "semantics": "real",
        "network": digest(network),
        "property": claim,
        "trees": [tree.entry(t) for t, tree in enumerate(trees)],
    }
    every = {f"{t}/{name}": v for t, tree in enumerate(trees) for name, v in tree.arrays.items()}
    header: dict[str, Any] = {"__metadata__": {"certificate": json.dumps(document)}}
    parts, end = [], 0
    for name, value in {**(arrays or {}), **every}.items():
        raw = np.ascontiguousarray(value).tobytes()
        kind, shape = DTYPES[value.dtype.str[1:]], list(value.shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [end, end + len(raw)]}
        end += len(raw)
        parts.append(raw)
    text = json.dumps(header).encode()
    whole = b"".join([struct.pack("<Q", len(text)), text, *parts])
    return gzip.compress(whole, 1, mtime=0)


def of_query(
    network: Network,
    files: tuple[Path, Path],
    cases: Sequence[Case],
    proofs: Mapping[tuple[int, int], Record | str],
    seconds: float = math.inf,
) -> bytes:
    """The certificate that a query cannot be satisfied.

    Args:
        files: the network's and the query's.
        cases: of the query.
        proofs: for each case and row what proved its specification, a record or the name of a bound.
        seconds: that trees of input splits may take to grow, see `grown`.

    Raises:
        CertificateError: the format has no words for it.
    """
    clauses = clauses_of(_text(files[1]))
    found = [Tree([c], {"bounds": ONE}) for c, clause in enumerate(clauses) if clause.void]
    for place, claims in matched(clauses, cases).items():
        found += _grown(proofs[place], claims, clauses, network, files[0], seconds)
    return encoded(files[0], digest(files[1]), found)


def of_region(
    network: Network,
    file: Path,
    region: Region,
    spec: Spec,
    how: Record | str,
    seconds: float = math.inf,
) -> bytes:
    """The certificate that a specification holds on one box, both written into it.

    Args:
        file: the network's.
        how: what proved it, a record or the name of a bound.

    Raises:
        CertificateError: the format has no words for it.
    """
    if not math.isinf(region.p):
        raise CertificateError(f"certificates are about boxes, not about balls in l{region.p:g}")
    ends = (v[0].double().flatten().numpy() + 0.0 for v in (region.outer_lower, region.outer_upper))
    order = spec.clause.argsort(stable=True)
    own = {
        "property/lower": next(ends),
        "property/upper": next(ends),
        "property/C": spec.C[0, order].double().numpy(),
        "property/d": spec.d[0, order].double().numpy(),
        "property/clause": spec.clause[order].numpy().astype("i4"),
    }
    claims, clauses = [], []
    for c in range(spec.count):
        members = np.flatnonzero(spec.clause.numpy() == c)
        rows = spec.C[0].double().numpy()[members], spec.d[0].double().numpy()[members]
        clauses.append(Clause(own["property/lower"], own["property/upper"], *rows))
        count = len(members)
        claims.append(Claim(c, c, members.tolist(), np.arange(count), np.ones(count)))
    found = _grown(how, claims, clauses, network, file, seconds)
    return encoded(file, {"inline": True, "p": "inf"}, found, own)


def _grown(
    how: Record | str,
    claims: Sequence[Claim],
    clauses: Sequence[Clause],
    network: Network,
    file: Path,
    seconds: float,
) -> list[Tree]:
    """The trees of one search or bound; of input splits such that the checker's rules suffice."""
    numbers = numbered(network)
    folded = with_maxima(network) is not network
    form = "fold" if folded else ""
    if isinstance(how, str):
        return [named(how, claims)._replace(maxima=form)]
    if not how.of_inputs:  # what `branch` notes is about the network without its maxima
        plain = without_maxima(network)
        split = plain is not network
        found = trees(how, claims, numbered(plain) if split else numbers)
        return [tree._replace(maxima="relu" if split else "") for tree in found]
    own = list(trees(how, claims, numbers))
    model = onnx_file.network(read_bytes(file))
    if folded:
        model = lattice.with_maxima(model)
    return [
        t._replace(arrays=grown(t.arrays, model, clauses, t.clauses, seconds), maxima=form)
        for t in own
    ]


def _text(path: Path) -> str:
    data = path.read_bytes()
    return (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode()


# -- trees ------------------------------------------------------------------------------------------------------------


def named(rule: str, claims: Sequence[Claim]) -> Tree:
    """A bound over the whole region, by its name."""
    arrays = {"bounds": np.array([NAMED[rule]], "u1"), "proof": np.array([CROWN], "u1")}
    return Tree([c.number for c in claims], arrays)


def trees(record: Record, claims: Sequence[Claim], activations: Numbers) -> Iterator[Tree]:
    """What a search noted, as a tree for each of its roots.

    Args:
        claims: the document's clauses about the search's region.
        activations: the numbers of the nonlinear nodes, see `numbered`.
    """
    own: dict[int, list[Claim]] = defaultdict(list)
    for claim in claims:
        own[claim.clause].append(claim)
    columns = _Columns(record, activations)
    grown = {c for clauses in record.clauses for c in clauses}
    at_once = [claim for c, some in own.items() if c not in grown for claim in some]
    if not record.clauses:
        yield Tree([c.number for c in at_once], columns.whole(at_once))
        return
    for tree, (clauses, nodes) in enumerate(
        zip(record.clauses, _nodes(record, columns), strict=True)
    ):
        mine = [claim for c in clauses for claim in own[c]]
        also = at_once if not tree else []
        lines = [columns.lines(claim, nodes) for claim in mine if not record.of_inputs]
        lines += [columns.of_region(also)] if also else []
        root = columns.root() if not tree and not record.of_inputs else {}
        arrays = {**nodes.arrays, **root, **(_joined(lines) if lines else {})}
        yield Tree([c.number for c in (*mine, *also)], arrays, tree)


class _Nodes(NamedTuple):
    """One tree: its arrays, and the number in it of each of the record's nodes, −1 for those of other trees."""

    arrays: Arrays
    local: Array


class _Lines(NamedTuple):
    """Stored proofs, see the format."""

    node: Array
    clause: Array
    choice: Array
    multiplier: list[Array]
    weight: list[Array]


def _nodes(record: Record, columns: _Columns) -> Iterator[_Nodes]:
    """The record's nodes, tree by tree. Children were made in pairs after their parents, and stay so."""
    roots = len(record.clauses)
    parent, element = (_numpy(v, "i8") for v in (record.parent, record.element))
    point = _numpy(record.point, "f8")
    tree = np.arange(record.count)
    for parents, first in _pairs(record):
        tree[first] = tree[first + 1] = tree[parents]
    flags = np.zeros(record.count, "u1")
    flags[_numpy(record.renewed, "i8")] = CROWN
    tried = np.zeros(record.count, "u1")
    tried[_numpy(record.tried, "i8")] = 1
    child = np.zeros(record.count, "i8")
    child[parent] = roots + 2 * np.arange(len(parent))
    split = np.zeros(record.count, "i8")
    where = np.zeros(record.count)
    split[parent], where[parent] = element, point
    layer = np.full(record.count, -1)
    if not record.of_inputs and len(columns.layer):
        layer[parent], split[parent] = columns.layer[element], columns.element[element]
    for root in range(roots):
        some = np.flatnonzero(tree == root)
        local = np.full(record.count, -1)
        local[some] = np.arange(len(some))
        bounds = flags[some]
        arrays = {
            "child": np.where(child[some] > 0, local[child[some]], 0).astype("i4"),
            "layer": layer[some].astype("i4"),
            "element": split[some].astype("i4"),
            "point": where[some],
            "bounds": bounds,
        }
        if record.of_inputs:
            arrays["bounds"] = tried[some] * np.uint8(CROWN)
            arrays["proof"] = arrays["bounds"]
            arrays["trim"] = tried[some]
        else:
            bounds[0] = 0 if root else columns.rule
        yield _Nodes(arrays, local)


def _pairs(record: Record) -> Iterator[tuple[Array, Array]]:
    """Split nodes, and the first child of each, in the order in which they were made."""
    count = len(record.clauses)
    for chunk in record.parent:
        parents = chunk.numpy()
        yield parents, count + 2 * np.arange(len(parents))
        count += 2 * len(parents)


def _numpy(chunks: Sequence[Tensor], dtype: str) -> Array:
    return np.concatenate([v.numpy() for v in chunks] or [np.zeros(0)]).astype(dtype)


class _Columns:
    """Line numbers: the columns of a record, and its rows over them.

    Args:
        layer, element: (U,).
        rule: how the intervals at the root are found.
    """

    def __init__(self, record: Record, activations: Numbers) -> None:
        self.record, self.activations = record, activations
        wanted = record.elements or record.columns
        layers, elements, places, first = [], [], [], 0
        for name, known in record.columns.items():
            own = wanted.get(name, known[:0]).numpy()
            layers.append(np.full(len(own), activations.node[name]))
            elements.append(own)
            places.append(first + np.searchsorted(known.numpy(), own))
            first += len(known)
        none = [np.zeros(0, "i8")]
        self.layer, self.element = np.concatenate(layers or none), np.concatenate(elements or none)
        self.places = np.concatenate(places or none)  # among the record's columns
        self.rule = LINES if record.rows else CROWN

    def root(self) -> Arrays:
        """What every tree of the search begins with."""
        arrays = {
            "column.layer": self.layer.astype("i4"),
            "column.element": self.element.astype("i4"),
        }
        if not self.record.rows:
            return arrays
        layer, element, side, numbers = self.best_rows()
        before = np.searchsorted(self.layer, layer)
        return {
            **arrays,
            "bound.node": np.zeros(len(layer), "i4"),
            "bound.layer": layer.astype("i4"),
            "bound.element": element.astype("i4"),
            "bound.side": side.astype("u1"),
            "bound.choice": np.concatenate([v[:n] for v, n in zip(numbers, before, strict=True)]),
        }

    def best_rows(self) -> tuple[Array, Array, Array, Array]:
        """Of several rows for one end the tightest: over intervals that are tighter now it gives no less."""
        found = defaultdict(list)
        for some in self.record.rows:
            found[self.activations.operand[some.name]].append(some)
        parts = []
        for number, rows in sorted(found.items()):
            for end in (0, 1):
                own = [r for r in rows if r.side == end]
                element = np.concatenate([r.element.numpy() for r in own])
                bound = np.concatenate([r.bound.numpy() for r in own]) * (1 - 2 * end)
                order = np.lexsort((-bound, element))
                first = order[np.unique(element[order], return_index=True)[1]]
                numbers = np.concatenate([r.numbers.numpy()[:, self.places] for r in own])[first]
                count = len(first)
                parts.append((np.full(count, number), element[first], np.full(count, end), numbers))
        layer, element, side, numbers = (
            np.concatenate(column) for column in zip(*parts, strict=True)
        )
        return layer, element, side, numbers

    def whole(self, claims: Sequence[Claim]) -> Arrays:
        """The tree of a search that needed no split."""
        bounds = {"bounds": np.array([self.rule], "u1")}
        return {**bounds, **self.root(), **_joined([self.of_region(claims)])}

    def of_region(self, claims: Sequence[Claim]) -> _Lines:
        """Proofs of functionals at the root."""
        picked, weights = [], []
        for claim in claims:
            place = next(i for i, m in enumerate(claim.functionals) if m in self.record.region)
            picked.append(self.record.region[claim.functionals[place]].numpy()[self.places])
            one = np.zeros(len(claim.functionals))
            one[place] = 1.0
            weights.append(one if len(one) > 1 else one[:0])
        return _Lines(
            np.zeros(len(claims), "i8"),
            np.array([c.number for c in claims]),
            np.stack(picked),
            [np.zeros(0)] * len(claims),
            weights,
        )

    def lines(self, claim: Claim, nodes: _Nodes) -> _Lines:
        """The proofs of one clause at its leaves."""
        parts = [_lines(proof, claim, nodes) for proof in self.record.proofs]
        return _Lines(
            np.concatenate([p.node for p in parts]),
            np.concatenate([p.clause for p in parts]),
            np.concatenate([p.choice for p in parts]),
            [v for p in parts for v in p.multiplier],
            [v for p in parts for v in p.weight],
        )


def _lines(proof: Proof, claim: Claim, nodes: _Nodes) -> _Lines:
    own = np.flatnonzero((proof.clause == claim.clause).numpy())
    node, depth = nodes.local[proof.node.numpy()[own]], proof.depth.numpy()[own]
    multipliers = proof.multipliers.numpy()[own]
    weights = proof.weights.numpy()[own][:, claim.members] / claim.factors
    several = len(claim.functionals) > 1
    return _Lines(
        node,
        np.full(len(own), claim.number),
        proof.numbers.numpy()[own],
        [m[:n] for m, n in zip(multipliers, depth, strict=True)],
        list(weights) if several else [weights[0, :0]] * len(own) if len(own) else [],
    )


def _joined(parts: Sequence[_Lines]) -> Arrays:
    """The stored proofs of one tree, in the order of its nodes."""
    node = np.concatenate([p.node for p in parts])
    order = np.argsort(node, kind="stable")
    multipliers = [v for p in parts for v in p.multiplier]
    weights = [v for p in parts for v in p.weight]
    arrays = {
        "line.node": node[order].astype("i4"),
        "line.clause": np.concatenate([p.clause for p in parts])[order].astype("i4"),
        "line.choice": np.arange(len(node), dtype="i4"),
        "choice": np.concatenate([p.choice for p in parts])[order],
    }
    for name, rows in (("multiplier", multipliers), ("weight", weights)):
        value = np.concatenate([rows[i] for i in order] or [np.zeros(0)]).astype("f8")
        if len(value):
            arrays[name] = value
    return arrays


# -- what the document calls things ------------------------------------------------------------------------------------


def numbered(network: Network) -> Numbers:
    """How the format numbers the network's activations.

    Raises:
        CertificateError: the network has a nonlinear op that the format does not know.
    """
    found = Numbers({}, {})
    for step in facts(network.graph).steps:
        if step.node.op in ACTIVATIONS:
            found.operand.setdefault(step.reads[0], len(found.node))
            found.node[step.node.name] = len(found.node)
        elif not isinstance(step.kind, Affine):
            name = getattr(step.node.op, "__name__", str(step.node.op))
            raise CertificateError(f"certificates have no rule for {step.node.source or name}")
    return found


def matched(clauses: Sequence[Clause], cases: Sequence[Case]) -> dict[tuple[int, int], list[Claim]]:
    """Which of the document's clauses are about which case and row.

    Raises:
        CertificateError: one of them is about none.
    """
    ends = [
        [end.flatten(1).double().numpy() for end in (c.region.outer_lower, c.region.outer_upper)]
        for c in cases
    ]
    found: dict[tuple[int, int], list[Claim]] = defaultdict(list)
    latest: list[tuple[int, int]] = []  # clauses that follow each other often share their box
    for number, clause in enumerate(clauses):
        if clause.void:
            continue
        boxes = (
            (c, int(row))
            for c, (low, high) in enumerate(ends)
            for row in np.flatnonzero(((low <= clause.lower) & (clause.upper <= high)).all(1))
        )
        for place in chain(latest, boxes):
            low, high = (end[place[1]] for end in ends[place[0]])
            inside = (low <= clause.lower).all() and (clause.upper <= high).all()
            claim = _claim(number, clause, cases[place[0]].spec[place[1] : place[1] + 1])
            if inside and claim is not None:
                break
        else:
            raise CertificateError(f"the checker reads a clause {number} that the search did not")
        found[place].append(claim)
        latest = [place]
    return found


def _claim(number: int, clause: Clause, spec: Spec) -> Claim | None:
    """The clause of ``spec`` that is the document's, if there is one."""
    rows = torch.cat([spec.C[0], spec.d[0].unsqueeze(1)], 1).double().numpy()
    asked = np.concatenate([clause.C, clause.d[:, None]], 1)
    sizes, wanted = np.abs(rows[:, :-1]).max(1), np.abs(asked[:, :-1]).max(1, initial=0.0)
    for c in range(spec.count):
        members = np.flatnonzero(spec.clause.numpy() == c)
        if len(members) != len(asked):
            continue
        left, order = list(members), []
        for row, size in zip(asked, wanted, strict=True):
            same = [m for m in left if np.allclose(rows[m] * size, row * sizes[m], 1e-12, 1e-300)]
            if not same:
                break
            left.remove(same[0])
            order.append(int(same[0]))
        else:
            return Claim(number, c, order, np.searchsorted(members, order), wanted / sizes[order])
    return None
