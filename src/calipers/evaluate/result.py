"""What an audit found, and its forms: numbers, a table, JSON, a report."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from calipers.attacks.diagnostics import Finding
from calipers.bracket import Bracket, Verdict
from calipers.data import Data
from calipers.evaluate.sampling import Sampling
from calipers.grid import spacing
from calipers.sets import Number, ThreatModel

if TYPE_CHECKING:
    from rich.console import Group

    from calipers.attacks.diagnostics import Finding

NORM = {1.0: "l1", 2.0: "l2", math.inf: "linf"}


class Units(NamedTuple):
    """What a method said about each example it was tried on, all (M,): which example, both ends, seconds and work."""

    rows: Tensor
    lower: Tensor
    upper: Tensor
    seconds: Tensor
    work: Tensor


@dataclass(frozen=True)
class Row:
    """One method's share of an audit: the examples it was tried on, those it decided, its seconds.

    Args:
        stored: the part of ``seconds`` spent in earlier, interrupted calls.
        work: passes of the network, summed over examples (`calipers.work`); 0 where a method does not count.
        units: the same by example, where it was tried on any.
    """

    name: str
    side: str
    seconds: float = 0.0
    tried: int = 0
    decided: int = 0
    note: str = ""
    stored: float = 0.0
    work: float = 0.0
    units: Units | None = field(default=None, repr=False, compare=False)

    @property
    def passes(self) -> str:
        """Passes per example, for people."""
        return f"{self.work / self.tried:.1f}" if self.work and self.tried else "–"


@dataclass(frozen=True, eq=False)
class Audit:
    """certified <= robust accuracy <= empirical, with everything that supports it.

    Args:
        data: the examples that were audited (the sample, if one was drawn).
        positions: where they stand in the data set, (N,).
        logits: outputs on them, (N, K).
        adversarial: the class predicted at each example's worst point, (N,).
        population: how many examples the data set has.
        stopped: None, ``time`` or ``interrupted``; ``cut`` (N,) marks the rows that this left unknown.
        notes: what weakens the result or could not be compared.
        differences: comparison of evaluations -> largest difference of an output.
        identity: versions and content digests, as stored in a run directory.
        deployed: whether certified speaks of the executed network too, its rounding included.
        findings: of the diagnostics, if they were asked for.
        comparisons: audits of the same sample that the confidence is for, together.
        earlier: the runs beside this one that had measured the same examples otherwise.
    """

    threat: ThreatModel
    data: Data
    positions: Tensor
    name: str
    logits: Tensor
    bracket: Bracket
    adversarial: Tensor
    methods: tuple[Row, ...]
    seconds: float
    population: int
    seed: int
    stopped: str | None
    cut: Tensor
    notes: tuple[str, ...]
    differences: Mapping[str, float]
    identity: Mapping[str, Any]
    deployed: bool = False
    findings: tuple[Finding, ...] = ()
    comparisons: int = 1
    earlier: tuple[Mapping[str, Any], ...] = ()

    def __len__(self) -> int:
        return len(self.data)

    @property
    def x(self) -> Tensor:
        return self.data.x

    @property
    def y(self) -> Tensor:
        return self.data.y

    @cached_property
    def predictions(self) -> Tensor:
        """The clean predictions, (N,)."""
        return self.logits.argmax(1)

    @cached_property
    def margins(self) -> Tensor:
        """The clean margins, (N,) float64: the label's output minus the largest other one."""
        outputs = self.logits.double()
        own = outputs.gather(1, self.y.unsqueeze(1)).squeeze(1)
        rivals = outputs.scatter(1, self.y.unsqueeze(1), -math.inf).amax(1)
        return own - rivals

    @cached_property
    def verdicts(self) -> tuple[Verdict, ...]:
        return tuple(self.bracket.verdict())

    @cached_property
    def counts(self) -> dict[Verdict, int]:
        """How many examples have each verdict."""
        return {v: self.verdicts.count(v) for v in Verdict}

    @property
    def clean_accuracy(self) -> float:
        """The share of examples classified correctly without any change; a tie is an error."""
        return (self.margins > 0).double().mean().item()

    @property
    def certified(self) -> float:
        """The share proved robust: the lower end of robust accuracy."""
        return self.bracket.accuracy()[0]

    @property
    def empirical(self) -> float:
        """The share that no attack broke: the upper end of robust accuracy."""
        return self.bracket.accuracy()[1]

    @property
    def unknown(self) -> int:
        """How many examples are neither proved nor broken."""
        return self.counts[Verdict.UNKNOWN]

    @property
    def sampled(self) -> bool:
        return len(self) < self.population

    @cached_property
    def confidence(self) -> dict[str, tuple[float, float]] | None:
        """95 % intervals of both ends for the whole data set, if a sample was audited; see `sampling`."""
        return None if self.sampling is None else self.sampling.shares

    @cached_property
    def sampling(self) -> Sampling | None:
        """What the sample says about the whole data set, if a sample was audited."""
        if not self.sampled:
            return None
        return Sampling(
            population=self.population,
            n=len(self),
            right=int((self.margins > 0).sum()),
            proved=self.counts[Verdict.ROBUST],
            unbroken=len(self) - self.counts[Verdict.VULNERABLE],
            seed=self.seed,
            comparisons=self.comparisons,
        )

    def _positions(self, verdict: Verdict) -> list[int]:
        """Where the examples of this verdict stand in the data set."""
        return [
            p for p, v in zip(self.positions.tolist(), self.verdicts, strict=True) if v is verdict
        ]

    def reason(self, row: int) -> str:
        """Why an example has its verdict, in a few words."""
        said = self.bracket.reason(row)
        if bool(self.cut[row]):
            return (
                f"stopped by {self.stopped}; {said}"
                if self.stopped == "time"
                else f"interrupted; {said}"
            )
        return said

    def json(self) -> dict[str, Any]:
        """The result as plain values, stable across versions of the package."""
        return {
            "n": len(self),
            "population": self.population,
            "clean_accuracy": self.clean_accuracy,
            "certified_accuracy": self.certified,
            "empirical_accuracy": self.empirical,
            "robust": self.counts[Verdict.ROBUST],
            "vulnerable": self.counts[Verdict.VULNERABLE],
            "unknown": self.unknown,
            "certified_examples": self._positions(Verdict.ROBUST),
            "broken_examples": self._positions(Verdict.VULNERABLE),
            "sampling": self.sampling and self.sampling.json(),
            "earlier": [dict(run) for run in self.earlier],
            "confidence_95": self.confidence and {k: list(v) for k, v in self.confidence.items()},
            "seconds": self.seconds,
            "stopped": self.stopped,
            "threat": threat_json(self.threat),
            "deployed": self.deployed,
            "methods": [
                {
                    "name": r.name,
                    "side": r.side,
                    "tried": r.tried,
                    "decided": r.decided,
                    "seconds": r.seconds,
                    "work": r.work,
                    "note": r.note,
                }
                for r in self.methods
            ],
            "model": self.name,
            "data": self.data.name,
            "seed": self.seed,
            "notes": list(self.notes),
            "diagnostics": [
                {**vars(f), "value": f.value if math.isfinite(f.value) else str(f.value)}
                for f in self.findings
            ],
            "largest_difference_of_outputs": dict(self.differences),
            "identity": dict(self.identity),
            "environment": environment(),
        }

    def table(self) -> Group:
        """The result for a terminal (a rich renderable)."""
        from calipers.evaluate.tables import audit_table

        return audit_table(self)

    def report(self, path: str | Path) -> None:
        """One self-contained HTML file, written whole or not at all."""
        from calipers.evaluate.report import render
        from calipers.files import write_atomically

        write_atomically(path, render(self, folder=Path(path).parent))

    def figures(self, folder: str | Path) -> str:
        """The report's figures as SVG, PNG and PDF; why the last two are missing, or nothing."""
        from calipers.evaluate.figures import figures, save

        return save(folder, figures(self))


def threat_identity(threat: ThreatModel) -> str:
    """The threat model as a string that tells any two apart."""
    parts = (
        f"{name}={v.double().tolist() if isinstance(v, Tensor) else v!r}"
        for name, v in vars(threat).items()
        if name != "p" and v is not None
    )
    return f"p={float(threat.p):g} {' '.join(parts)}"


def threat_json(threat: ThreatModel) -> dict[str, Any]:
    """The threat model as JSON: ``grid`` and ``free`` (how many features of the mask may change) only where set."""
    sides = {name: _plain(getattr(threat, name)) for name in ("eps", "lower", "upper")}
    optional = {
        "grid": None if threat.grid is None else str(spacing(threat.grid)),
        "free": None if threat.mask is None else int(threat.mask.sum()),
    }
    given = {k: v for k, v in optional.items() if v is not None}
    return {"norm": NORM[float(threat.p)], **sides, **given}


def _plain(value: Number | Tensor) -> Any:
    """A number as JSON: exact values as strings, infinities as strings, tensors by their range."""
    if isinstance(value, Tensor):
        return {"minimum": value.min().item(), "maximum": value.max().item()}
    if isinstance(value, (int, float)) and math.isfinite(value):
        return value
    return str(value)


def environment() -> dict[str, str | int]:
    """What a time depends on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "system": platform.system(),
        "threads": torch.get_num_threads(),
    }
