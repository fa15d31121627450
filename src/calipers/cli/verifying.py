"""What ``calipers verify`` does. Its first line on stdout is always one of sat, unsat, unknown, timed-out."""

from __future__ import annotations

import json
import math
import os
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from calipers import __version__
from calipers.cli.options import writable
from calipers.errors import CalipersError, NoInputs, SpecError
from calipers.evaluate.limits import bytes_of
from calipers.evaluate.queries import read
from calipers.evaluate.strict import Certified, decide_strictly
from calipers.evaluate.verify import Decision, decide
from calipers.files import write_atomically
from calipers.graph.graph import Network
from calipers.graph.onnx_file import write_tensor
from calipers.vnnlib import Query

ANSWERED, REFUSED, FAILED, INTERRUPTED = 0, 2, 3, 130
MODELS = (".onnx", ".onnx.gz")
GRACE = 1.0  # seconds after the limit until the process ends, whatever it is doing


@dataclass
class _Answer:
    """Where the answer goes: it is given once, by whoever comes first."""

    json_file: Path | None = None
    folder: Path | None = None
    about: dict[str, Any] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    given: bool = False

    def give(self, decision: Decision, query: Query | None = None, code: int = ANSWERED) -> int:
        """Print and write it; returns the exit code."""
        with self.lock:
            if self.given:
                return code
            self.given = True
            lines: list[str] = [decision.verdict]
            values = _values(decision, query)
            if values and query and self.folder is None:
                lines.append(decision.counterexample(query).rstrip("\n"))
            sys.stdout.write("\n".join(lines) + "\n")
            sys.stdout.flush()
            if values and query and self.folder is not None:
                _serialise(self.folder, query, values, decision)
            ending = f" (exit code {code})" if code else ""
            for line in (f"{decision.verdict}: {decision.reason}{ending}", *decision.notes):
                sys.stderr.write(f"calipers: {line}\n")
            sys.stderr.flush()
            if self.json_file is not None:
                content = {**self.about, **decision.json(), "exit_code": code}
                write_atomically(
                    self.json_file, json.dumps(content, indent=2, allow_nan=False) + "\n"
                )
            return code


def _values(decision: Decision, query: Query | None) -> dict[str, torch.Tensor]:
    if decision.x is None or decision.y is None or query is None or decision.verdict != "sat":
        return {}
    return query.cases[0].lift(decision.x, decision.y)


def _serialise(
    folder: Path, query: Query, values: dict[str, torch.Tensor], decision: Decision
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for variable in (query.input, query.output):
        own = decision.x if decision.x is not None else values[variable.name]
        tensor = values[variable.name].to(variable.dtype or own.dtype)
        write_tensor(folder / f"{variable.name}.pb", variable.name, tensor)


def verify(
    files: Sequence[str],
    *,
    begin: float,
    networks: Sequence[str],
    timeout: str | None,
    folder: Path | None,
    exact: bool,
    real: bool,
    memory: str | None,
    json_file: Path | None,
    seed: int,
    fast: bool,
    certificate: Path | None,
) -> int:
    """Decide, print, write; returns the exit code. Only an argument of --json or the folder may raise.

    Args:
        begin: from when on the time counts (`time.perf_counter`).
    """
    if json_file is not None:
        writable("--json", json_file.absolute())
    if certificate is not None:
        writable("--certificate", certificate.absolute())
        if fast:
            raise ValueError("--fast makes no certificate; leave it out, or --certificate")
    answer = _Answer(
        json_file, folder, {"calipers": __version__, "files": [Path(f).name for f in files]}
    )
    query: Query | None = None
    watchdog: threading.Timer | None = None
    try:
        model, path, name = _subject(files, networks)
        seconds = _seconds(timeout)
        limit = None if memory is None else bytes_of(memory)
        if math.isfinite(seconds):
            left = max(seconds - (time.perf_counter() - begin), 0.0)
            watchdog = threading.Timer(left + GRACE, _end, (answer,))
            watchdog.daemon = True
            watchdog.start()
        network, query = read(model, path, name)
        left = seconds - (time.perf_counter() - begin)
        if left <= 0:
            decision = Decision("timed-out", "time was up before query and network were read")
        else:
            decision, proof = _decided(
                network, query, (Path(model), Path(path)), fast=fast, seconds=left, memory=limit,
                exact=exact, real=real, seed=seed,
            )  # fmt: skip
            _kept(answer, proof, certificate)
    except NoInputs as error:
        return answer.give(Decision("unsat", str(error), "reader"))
    except (CalipersError, ValueError, OSError) as error:
        return answer.give(Decision("unknown", " ".join(str(error).split())), code=REFUSED)
    except KeyboardInterrupt:
        return answer.give(Decision("unknown", "interrupted"), code=INTERRUPTED)
    except Exception as error:
        if os.environ.get("CALIPERS_TRACEBACK"):
            raise
        text = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return answer.give(Decision("unknown", text), code=FAILED)
    finally:
        if watchdog is not None:
            watchdog.cancel()
    return answer.give(decision, query)


def _decided(
    network: Network, query: Query, files: tuple[Path, Path], *, fast: bool, **options: Any
) -> tuple[Decision, Certified | None]:
    """By the search's word alone, or with a certificate."""
    if fast:
        return decide(network, query, progress=_told, **options), None
    return decide_strictly(network, query, files, progress=_told, **options)


def _kept(answer: _Answer, proof: Certified | None, certificate: Path | None) -> None:
    """What is said of the certificate, and the file."""
    answer.about["certificate"] = None if proof is None else proof.json()
    if certificate is not None and proof is not None and proof.data is not None:
        write_atomically(certificate, proof.data)


def _end(answer: _Answer) -> None:
    """The limit is long past and something does not come back: say so and go."""
    answer.give(Decision("timed-out", "time was up inside of one long step"))
    os._exit(ANSWERED)


def _told(text: str) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"calipers: {text}\n")


def _seconds(timeout: str | None) -> float:
    """The limit in seconds.

    Raises:
        ValueError: no positive number.
    """
    if timeout is None:
        return math.inf
    try:
        seconds = float(timeout)
    except ValueError:
        seconds = math.nan
    if seconds == 0:
        raise ValueError("--timeout: the time limit is 0 s, so nothing was tried")
    if not 0 < seconds < threading.TIMEOUT_MAX - GRACE:
        raise ValueError(
            f"--timeout: {timeout!r} is no time limit; give a positive number of seconds"
        )
    return seconds


def _subject(files: Sequence[str], networks: Sequence[str]) -> tuple[str, str, str | None]:
    """The network's file, the query's, and the network's name if one was given.

    Raises:
        SpecError: not exactly one of each.
    """
    if len(files) == 2 and files[0].endswith(MODELS) and not networks:
        return files[0], files[1], None
    if len(files) != 1 or files[0].endswith(MODELS):
        raise SpecError(
            f"expected QUERY.vnnlib --network NAME=FILE.onnx, or MODEL.onnx QUERY.vnnlib; got {len(files)} files "
            f"and {len(networks)} networks"
        )
    if len(networks) != 1:
        raise SpecError(
            f"--network: {len(networks)} given; queries about one network are supported, so give it once"
        )
    name, equals, file = networks[0].partition("=")
    if not equals or not name or not file:
        raise SpecError(f"--network: cannot read {networks[0]!r}; write NAME=FILE.onnx")
    return file, files[0], name
