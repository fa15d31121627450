"""Whether an audit's failed attacks should be believed: `calipers.attacks.diagnose` on a few of its examples."""

from __future__ import annotations

from calipers.attacks.diagnostics import Finding, diagnose
from calipers.data import Data
from calipers.evaluate.audit import inputs, sample
from calipers.graph.graph import Network, evaluating
from calipers.seeds import seeds as seeds_of
from calipers.sets import ThreatModel
from calipers.spec import Spec

FEW = 60  # examples: what is wrong with a model shows on few


def diagnosed(network: Network, data: Data, threat: ThreatModel, seed: int) -> list[Finding]:
    """What `diagnose` finds on at most `FEW` examples, drawn by ``seed``."""
    few, _ = sample(data, min(FEW, len(data)), seed)
    x, y = inputs(few.x, network, threat), few.y.to(network.device)
    with evaluating(network.module):
        return diagnose(
            network, threat.around(x), Spec.label(y, network.num_classes), domain=(threat.lower, threat.upper),
            dtype=x.dtype, seeds=seeds_of(x, seed, "diagnose"),
        )  # fmt: skip
