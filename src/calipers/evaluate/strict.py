"""Strict answers to queries: *unsat* only with a certificate that the independent checker accepts.

`decide` proves in rigorous arithmetic already. A certificate asks less to be believed: `calipers_check` alone. It is
made of what the search noted, and checked as a file would be. Networks with ops that the format does not know, and
those with smooth activations, have no certificate; there rigorous arithmetic is what an answer rests on.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from calipers.errors import CertificateError
from calipers.evaluate.solvers import problem
from calipers.evaluate.verify import Decision, decide
from calipers.exact import branch
from calipers.exact.certificate import numbered, of_query
from calipers.exact.record import Record
from calipers.graph.graph import Network
from calipers.vnnlib import Query
from calipers_check import Refused, Unusable, check

NEVER = 1 << 30  # splits after which intervals are computed again
LATE = "its certificate was not checked in time"


@dataclass(frozen=True, eq=False)
class Certified:
    """What became of a certificate.

    Args:
        data: its bytes; None if there is none.
        accepted: whether the checker accepts it.
        reason: why not, in words.
        making, checking: seconds.
    """

    data: bytes | None = None
    accepted: bool = False
    reason: str = ""
    making: float = 0.0
    checking: float = 0.0

    def json(self) -> dict[str, Any]:
        return {
            "accepted": self.accepted,
            "reason": self.reason,
            "bytes": None if self.data is None else len(self.data),
            "making_seconds": round(self.making, 4),
            "checking_seconds": round(self.checking, 4),
        }


def decide_strictly(
    network: Network,
    query: Query,
    files: tuple[Path, Path],
    *,
    seconds: float,
    memory: int | None = None,
    progress: Callable[[str], None] = lambda _: None,
    **options: Any,
) -> tuple[Decision, Certified | None]:
    """`decide`, but *unsat* on a piecewise-linear network only if its certificate is accepted.

    Args:
        files: the network's and the query's.
        options: of `decide`.
    """
    begin = time.perf_counter()
    found = decide(
        network, query, seconds=seconds, memory=memory, progress=progress, record=True, **options
    )
    if found.verdict != "unsat":
        return found, None
    progress("certificate")
    end = begin + seconds
    result = certified(network, query, files, found.proofs, end, memory)
    found = replace(found, seconds=time.perf_counter() - begin)
    if result.accepted:
        return replace(found, reason=f"{found.reason}; certificate accepted"), result
    if not coverable(network, query):
        note = f"no certificate: {result.reason}"
        return replace(found, notes=(*found.notes, note)), result
    late = time.perf_counter() >= end
    text = LATE if late else f"its certificate is not accepted: {result.reason}"
    reason = f"{found.reason}, but {text}; --fast answers without one"
    return replace(found, verdict="timed-out" if late else "unknown", reason=reason), result


def coverable(network: Network, query: Query) -> bool:
    """Whether the format covers the network: piecewise linear, of ops that it knows."""
    with suppress(CertificateError):
        numbered(network)
        return not query.cases or problem(network, query.cases[0].region).piecewise
    return False


def certified(
    network: Network,
    query: Query,
    files: tuple[Path, Path],
    proofs: Mapping[tuple[int, int], Record | str],
    end: float,
    memory: int | None = None,
) -> Certified:
    """The certificate of what ``proofs`` say; if the checker refuses it, of another search.

    Default lines depend on intervals that the checker may find tighter, which can make what follows from them looser: a
    named bound may not suffice, nor may intervals computed again. The other search computes none again.

    Args:
        end: of `time.perf_counter`.
    """
    result = _checked(network, query, files, proofs, end)
    if result.accepted or result.data is None or time.perf_counter() >= end:
        return result
    again: dict[tuple[int, int], Record | str] = dict(proofs)
    for (case, row), how in proofs.items():
        if isinstance(how, Record) and how.of_inputs:
            continue
        region, spec, _ = query.cases[case]
        one, record = torch.tensor([row]), Record()
        found = branch(
            network, region[one], spec[one], deadline=end, memory=memory, period=NEVER,
            record=record,
        )  # fmt: skip
        if not found.robust:
            return result
        again[case, row] = record
    return _checked(network, query, files, again, end)


def _checked(
    network: Network,
    query: Query,
    files: tuple[Path, Path],
    proofs: Mapping[tuple[int, int], Record | str],
    end: float,
) -> Certified:
    begin = time.perf_counter()
    try:
        data = of_query(network, files, query.cases, proofs, end - begin)
    except (CertificateError, Unusable) as error:
        return Certified(None, False, str(error), time.perf_counter() - begin)
    made = time.perf_counter()
    reason = checked(data, files, end - made)
    now = time.perf_counter()
    return Certified(data, not reason, reason, made - begin, now - made)


def checked(data: bytes, files: tuple[Path, Path | None], seconds: float) -> str:
    """Why the checker refuses a certificate; empty if it accepts it."""
    with tempfile.TemporaryDirectory(prefix="calipers-") as folder:
        path = Path(folder) / "proof.cert"
        path.write_bytes(data)
        try:
            check(path, *files, seconds=max(seconds, 0.0))
        except (Refused, Unusable) as error:
            return str(error)
    return ""
