"""What a sample says about a data set: which part of the interval is sampling error, and which is unknown.

Of n examples drawn at random, without replacement, r have a certificate and v a witness. Robust accuracy of the whole
set lies between the share that the same methods would certify and the share that they would not break, so

    low(r) <= robust accuracy <= high(n - v)

with the confidence that is asked for, where low and high are one-sided exact limits at the level α / (2·comparisons):
both ends, and all of ``comparisons`` audits of the same sample (several eps, say), hold together (Bonferroni). They
hold for what was chosen before the sample was seen; `history` says what had been measured on it before.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calipers.confidence import clopper_pearson, hypergeometric
from calipers.data import Data

CONFIDENCE = 0.95
LARGEST = 1 << 22  # bytes of a run.json that is looked into


@dataclass(frozen=True)
class Sampling:
    """The counts of a sample, and what follows for the data set, or for what the data set itself is a sample of.

    Args:
        population: examples of the data set.
        n: of them drawn; ``right`` classified correctly, ``proved`` robust, ``unbroken`` without a witness.
        seed: of the draw.
        comparisons: audits of this sample that the confidence is for, together.
    """

    population: int
    n: int
    right: int
    proved: int
    unbroken: int
    seed: int
    comparisons: int = 1
    confidence: float = CONFIDENCE

    @property
    def level(self) -> float:
        """The confidence of each two-sided interval, so that one end of each holds in all comparisons together."""
        return 1 - (1 - self.confidence) / self.comparisons

    @property
    def shares(self) -> dict[str, tuple[float, float]]:
        """Clopper-Pearson intervals of the three shares."""
        counts = {"clean": self.right, "certified": self.proved, "empirical": self.unbroken}
        return {name: clopper_pearson(k, self.n, self.level) for name, k in counts.items()}

    @property
    def beyond(self) -> tuple[float, float]:
        """Robust accuracy on what the data set was drawn from: Clopper-Pearson's limits."""
        shares = self.shares
        return shares["certified"][0], shares["empirical"][1]

    @property
    def within(self) -> tuple[float, float]:
        """Robust accuracy on the data set: limits of the hypergeometric distribution, never the wider ones."""
        low, _ = hypergeometric(self.proved, self.n, self.population, self.level)
        _, high = hypergeometric(self.unbroken, self.n, self.population, self.level)
        return low, high

    @property
    def unknown(self) -> float:
        """The share of the sample that is neither proved nor broken: more examples do not change that."""
        return (self.unbroken - self.proved) / self.n

    @property
    def error(self) -> tuple[float, float]:
        """What the sample adds to the interval of the data set, below and above: more time does not change that."""
        low, high = self.within
        return self.proved / self.n - low, high - self.unbroken / self.n

    def json(self) -> dict[str, Any]:
        return {
            "design": "simple random sample without replacement",
            "n": self.n,
            "population": self.population,
            "seed": self.seed,
            "confidence": self.confidence,
            "comparisons": self.comparisons,
            "simultaneous": "Bonferroni, over both ends and all comparisons",
            "data_set": {"robust_accuracy": list(self.within), "limits": "hypergeometric"},
            "distribution": {"robust_accuracy": list(self.beyond), "limits": "Clopper-Pearson"},
            "unknown": self.unknown,
            "sampling_error": list(self.error),
        }

    def lines(self) -> list[str]:
        """For people."""
        (low, high), (below, above) = self.within, self.error
        wide, beyond = high - low, self.beyond
        several = (
            f", {self.comparisons} audits of this sample together" if self.comparisons > 1 else ""
        )
        first = (
            f"on all {self.population} examples between {low:.2%} and {high:.2%} ({self.confidence:.0%} confidence, "
            f"both ends{several}); on new ones like them between {beyond[0]:.2%} and {beyond[1]:.2%}"
        )
        second = (
            f"of these {wide:.2%}, {self.unknown:.2%} are unknown (more time) and {below + above:.2%} sampling error "
            f"(more examples: {below:.2%} below, {above:.2%} above)"
        )
        return [first, second]


def sample(data: Data, samples: int | None, seed: int) -> tuple[Data, Tensor]:
    """``samples`` examples drawn without replacement, in the data's order, and their positions in it."""
    if samples is None or samples == len(data):
        return data, torch.arange(len(data))
    if not 1 <= samples <= len(data):
        raise ValueError(
            f"samples: {samples} is not between 1 and {len(data)}, the number of examples"
        )
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(data), generator=generator)[:samples].sort().values
    part = Data(data.x[rows], data.y[rows], data.lower, data.upper, data.name, data.classes)
    return part, rows


def history(run: str | Path | None, identity: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The runs beside ``run`` that measured the same examples otherwise: where, when, and in what they differ.

    Whoever chooses eps, recipe or budget by what these said has looked at the sample before.
    """
    if run is None:
        return []
    own = Path(run).absolute()
    found = []
    for record in sorted(own.parent.glob("*/run.json")):
        if record.parent == own or record.stat().st_size > LARGEST:
            continue
        with suppress(OSError, ValueError, RecursionError, AttributeError, TypeError, LookupError):
            content = json.loads(record.read_text(encoding="utf-8"))
            other = content["identity"]
            differs = {
                key: other.get(key)
                for key in ("model", "threat", "cascade", "deployed", "replicas")
                if other.get(key) != identity.get(key)
            }
            if other["data"] == identity["data"] and differs:
                began = content["starts"][0]["time"]
                found.append({"run": record.parent.name, "time": began, "differs": differs})
    return found
