"""What searches note is enough: the independent checker accepts what is made of it, and nothing of a faulty search."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from calipers.bracket import Verdict
from calipers.evaluate import audit
from calipers.evaluate.certificates import certificates
from calipers.evaluate.queries import read
from calipers.evaluate.strict import certified, checked
from calipers.exact import branch, split_inputs
from calipers.exact.certificate import of_query
from calipers.exact.record import Proof, Record
from calipers.graph.graph import Network
from calipers.sets import ThreatModel
from calipers.vnnlib import Query
from calipers_check import check
from exact_checks import deadline
from queries import text, write_network

Subject = tuple[Network, Query, tuple[Path, Path]]


def subject(folder: Path, seed: int, sizes: tuple[int, ...] = (2, 10, 10, 2)) -> Subject:
    """A random network; unsafe is what no one of many samples comes near: one clause of one functional, one of two."""
    generator = torch.Generator().manual_seed(seed)
    layers = [
        (
            (torch.randn(n, m, generator=generator) / m**0.5).tolist(),
            (0.3 * torch.randn(n, generator=generator)).tolist(),
        )
        for m, n in pairwise(sizes)
    ]
    file = write_network(folder / f"net{seed}.onnx", layers)
    x = (2.2 * torch.rand(40000, 2, generator=generator) - 1.1).clamp(-1, 1)  # corners too
    for weight, bias in layers[:-1]:
        x = torch.relu(x @ torch.tensor(weight).T + torch.tensor(bias))
    y = x @ torch.tensor(layers[-1][0]).T + torch.tensor(layers[-1][1])
    top, both = y[:, 0].max() + 0.02, y.min(1).values.max() + 0.02
    unsafe = f"(or (>= Y_0 {top:.6f}) (and (>= Y_0 {both:.6f}) (>= Y_1 {both:.6f})))"
    query = folder / f"query{seed}.vnnlib"
    query.write_text(text("-1", "1", unsafe))
    return *read(file, query), (file, query)


def recorded(what: Subject, solve: Callable[..., Any], **options: Any) -> tuple[Any, Record]:
    network, query, _ = what
    region, spec, _ = query.cases[0]
    record = Record()
    found = solve(network, region, spec, deadline=deadline(), record=record, **options)
    return found, record


def refusal(what: Subject, how: Record | str) -> str:
    network, query, files = what
    return checked(of_query(network, files, query.cases, {(0, 0): how}), files, 60.0)


@pytest.mark.parametrize("solve", [branch, split_inputs])
def test_searches_are_proved_again(tmp_path: Path, solve: Callable[..., Any]) -> None:
    splits = 0
    for seed in range(3):
        what = subject(tmp_path, seed)
        found, record = recorded(what, solve)
        network, query, _ = what
        plain = solve(network, query.cases[0].region, query.cases[0].spec, deadline=deadline())
        assert found.robust
        assert plain.robust
        if (
            record.renewed
        ):  # the checker may find other intervals: then another search, without, is made
            result = certified(network, query, what[2], {(0, 0): record}, deadline(60))
            assert result.accepted, result.reason
        else:
            assert refusal(what, record) == ""
        splits += found.domains
    assert splits > 20


def test_refused_certificates_are_made_again(tmp_path: Path) -> None:
    """Intervals computed again all the time are not what the checker finds; a search without them is tried then."""
    network, query, files = subject(tmp_path, 0)
    found, record = recorded((network, query, files), branch, period=1, steps=2)
    assert found.robust
    assert record.renewed
    result = certified(network, query, files, {(0, 0): record}, deadline(60))
    assert result.accepted, result.reason


def test_the_whole_region_at_once(tmp_path: Path) -> None:
    """A named bound, and optimised lines, where these suffice."""
    network, query, files = subject(tmp_path, 0, (2, 4, 2))
    easy = files[1].with_name("easy.vnnlib")
    easy.write_text(text("-0.01", "0.01", "(>= Y_0 50)"))
    what = *read(files[0], easy), (files[0], easy)
    assert refusal(what, "crown") == ""
    found, record = recorded(what, branch, whole=True)
    assert found.robust
    assert refusal(what, record) == ""
    optimised = subject(
        tmp_path, 5, (2, 6, 2)
    )  # one hidden layer: no interval to optimise, only lines
    found, record = recorded(optimised, branch)
    assert found.robust
    assert not record.rows
    assert refusal(optimised, record) == ""
    assert refusal((network, query, files), "interval")  # which does not suffice there


# -- faults -----------------------------------------------------------------------------------------------------------


def swapped(record: Record) -> None:
    """The proofs of each child at the other one."""
    roots = len(record.clauses)
    for i, proof in enumerate(record.proofs):
        other = ((proof.node - roots) ^ 1) + roots
        node = torch.where(proof.node < roots, proof.node, other)
        record.proofs[i] = proof._replace(node=node)


def without_a_leaf(record: Record) -> None:
    last = record.proofs[-1]
    record.proofs[-1] = Proof(*(v[:-1] for v in last))


def without_multipliers(record: Record) -> None:
    record.proofs = [p._replace(multipliers=p.multipliers * 0) for p in record.proofs]


def huge_multipliers(record: Record) -> None:
    record.proofs = [p._replace(multipliers=p.multipliers + 10) for p in record.proofs]


def negative_multipliers(record: Record) -> None:
    record.proofs = [p._replace(multipliers=p.multipliers - 1e-3) for p in record.proofs]


def other_points(record: Record) -> None:
    record.point = [p + 0.25 for p in record.point]


FAULTS = (
    swapped, without_a_leaf, without_multipliers, huge_multipliers, negative_multipliers, other_points,
)  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_the_producer_are_refused(
    tmp_path: Path, fault: Callable[[Record], None]
) -> None:
    what = subject(tmp_path, 1)
    found, record = recorded(what, branch)
    assert found.domains > 4
    record.proofs = [p for p in record.proofs if len(p.node)]
    fault(record)
    assert refusal(what, record)


# -- the command line -------------------------------------------------------------------------------------------------


def test_verify_writes_what_was_accepted(tmp_path: Path, run: Any) -> None:
    _, _, files = subject(tmp_path, 2)
    proof, answer = tmp_path / "proof.cert", tmp_path / "answer.json"
    code, out, err = run(
        "verify", *files, "--timeout", 60, "--certificate", proof, "--json", answer
    )
    assert (code, out) == (0, "unsat\n")
    assert "certificate accepted" in err
    said = json.loads(answer.read_text())["certificate"]
    assert said["accepted"]
    assert said["bytes"] == proof.stat().st_size
    assert checked(proof.read_bytes(), files, math.inf) == ""


def test_fast_answers_say_so(tmp_path: Path, run: Any) -> None:
    _, _, files = subject(tmp_path, 2)
    answer = tmp_path / "answer.json"
    code, out, _ = run("verify", *files, "--timeout", 60, "--fast", "--json", answer)
    assert (code, out) == (0, "unsat\n")
    assert json.loads(answer.read_text())["certificate"] is None
    code, _, err = run("verify", *files, "--fast", "--certificate", tmp_path / "no.cert")
    assert code == 2
    assert "--fast" in err


def test_a_refused_certificate_is_no_answer(
    tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from calipers.evaluate import strict

    monkeypatch.setattr(strict, "checked", lambda *_: "planted")
    _, _, files = subject(tmp_path, 2)
    code, out, err = run("verify", *files, "--timeout", 60)
    assert (code, out) == (0, "unknown\n")
    assert "not accepted: planted" in err


def test_certified_examples_of_an_audit(tmp_path: Path) -> None:
    """Every certified example has a certificate about its own box, with the property inside."""
    network, _, _ = subject(tmp_path, 3)
    x = torch.rand(8, 2, generator=torch.Generator().manual_seed(0))
    threat = ThreatModel(math.inf, 0.1, lower=0.0, upper=1.0)
    with torch.no_grad():
        y = network(x).argmax(1)
    result = audit(network, (x, y), threat, seconds=20)
    robust = [int(i) for i, v in enumerate(result.bracket.verdict()) if v is Verdict.ROBUST]
    assert robust
    found = certificates(result, network, tmp_path / "certificates")
    assert found == dict.fromkeys(robust, "")
    for i in robust:
        proof = tmp_path / "certificates" / f"{i}.cert"
        assert check(proof, tmp_path / "certificates" / "network.onnx").digest is not None
