"""Whether the attacks' failures on a network should be believed, on a few of the examples that were measured."""

from __future__ import annotations

from calipers.attacks.diagnostics import Finding, diagnose
from calipers.data import Data
from calipers.evaluate.sampling import sample
from calipers.graph.graph import Network, evaluating
from calipers.seeds import seeds as seeds_of
from calipers.sets import ThreatModel
from calipers.spec import Spec

DIAGNOSED = 60  # examples: what is wrong with a model shows on few


def diagnosis(network: Network, data: Data, threat: ThreatModel, seed: int) -> tuple[Finding, ...]:
    """One finding per check of `calipers.diagnose`, on a few of the examples, drawn at random.

    Cost: 400 to 1000 passes per example.
    """
    few, _ = sample(data, min(DIAGNOSED, len(data)), seed)
    x = few.x.to(network.device, network.dtype)
    y = few.y.to(network.device)
    with evaluating(network.module):
        found = diagnose(
            network,
            threat.around(x),
            Spec.label(y, network.num_classes),
            domain=(threat.lower, threat.upper),
            dtype=x.dtype,
            seeds=seeds_of(x, seed, "diagnose"),
        )
    return tuple(found)
