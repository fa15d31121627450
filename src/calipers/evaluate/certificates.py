"""Certificates of an audit's certified examples, each checked."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from calipers.bracket import Verdict
from calipers.errors import CalipersError, CertificateError
from calipers.evaluate.audit import inputs
from calipers.evaluate.result import Audit
from calipers.evaluate.solvers import complete
from calipers.evaluate.strict import checked
from calipers.exact.certificate import NAMED, of_region
from calipers.exact.record import Record
from calipers.graph.graph import Network, evaluating
from calipers.graph.onnx import save_onnx
from calipers.sets import Region
from calipers.spec import Spec

LEAST = 10.0  # seconds for an example, or twice what its proof took in the audit


def certificates(
    audit: Audit, network: Network, folder: Path, progress: Callable[[str], None] = lambda _: None
) -> dict[int, str]:
    """Write ``POSITION.cert`` for every certified example whose certificate is accepted, beside ``network.onnx``.

    Returns:
        for each certified example, by its position in the data, why it has none; empty if it has one.

    Cost: a bound's name costs nothing, what took more is proved again by a search that notes how.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "network.onnx"
    save_onnx(network, file)
    x = inputs(audit.data.x, network, audit.threat)
    found: dict[int, str] = {}
    with evaluating(network.module):
        for row, verdict in enumerate(audit.bracket.verdict()):
            if verdict is not Verdict.ROBUST:
                continue
            position = int(audit.positions[row])
            evidence = audit.bracket.lower_evidence[row]
            name, spent = (evidence.method, evidence.seconds) if evidence else ("", 0.0)
            name = name.partition(" at eps ")[0]  # what proved a larger set may prove this one
            region = audit.threat.around(x[row : row + 1])
            spec = Spec.label(audit.data.y[row : row + 1].to(network.device), network.num_classes)
            path = folder / f"{position}.cert"
            found[position] = _example(
                network, file, region, spec, name, max(LEAST, 2 * spent), path
            )
            progress(f"example {position}: {found[position] or 'accepted'}")
    return found


def linked(audit: Audit, folder: Path, found: Mapping[int, str]) -> Audit:
    """The audit with the path of each accepted certificate in its evidence."""
    evidence = list(audit.bracket.lower_evidence)
    for row, position in enumerate(audit.positions.tolist()):
        here = evidence[row]
        if here is not None and found.get(position) == "":
            evidence[row] = replace(here, path=str(folder / f"{position}.cert"))
    return replace(audit, bracket=replace(audit.bracket, lower_evidence=tuple(evidence)))


def _example(
    network: Network,
    file: Path,
    region: Region,
    spec: Spec,
    name: str,
    seconds: float,
    path: Path,
) -> str:
    """Why there is no accepted certificate; empty if there is, at ``path``."""
    end = time.perf_counter() + seconds
    reason = ""
    try:
        for how in ([name] if name in NAMED else []) + [None]:
            proof = how or _searched(network, region, spec, end)
            data = of_region(network, file, region, spec, proof, end - time.perf_counter())
            reason = checked(data, (file, None), end - time.perf_counter())
            if not reason:
                path.write_bytes(data)
                return ""
    except CalipersError as error:
        return str(error)
    return reason


def _searched(network: Network, region: Region, spec: Spec, end: float) -> Record:
    with torch.no_grad():
        found = complete(network, region, spec, deadline=end, record=True)
    if found.record is None or not found.outcome.robust:
        raise CertificateError(f"not proved again: {found.outcome.reason}")
    return found.record
