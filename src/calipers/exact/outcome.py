"""What a complete search of one region reports.

    Solver = (network, region, spec, *, deadline, memory, attack, progress, record) -> Outcome

for a region and a specification of one example (B = 1). ``deadline`` is a value of `time.perf_counter`, ``memory``
bytes of working memory, ``attack`` a function ``(region, spec) -> points`` that the search may call on its sub-regions
(a search imports no attack), ``progress`` is called with an `Outcome` now and then, and
``record``, an empty `Record`, is filled with what proves the outcome.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Outcome:
    """How far a search came.

    Args:
        lower: a lower bound on the margin over the whole region, rounding subtracted: positive proves it robust in real
            arithmetic on the stored parameters. A search may stop at the first positive value.
        point: (*x) a member of the region where the margin was seen to fail. Only `calipers.witness` decides.
        domains: sub-problems bounded.
        reason: what stopped an undecided search, in words; empty where it is decided.
        trusts: the solver on whose word alone ``lower`` rests; empty for a proof of our own.
    """

    lower: float = -math.inf
    point: Tensor | None = None
    domains: int = 0
    reason: str = ""
    trusts: str = ""

    @property
    def robust(self) -> bool:
        return self.lower > 0
