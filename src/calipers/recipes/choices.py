"""What several recipes let one choose by name."""

from __future__ import annotations

from calipers.errors import unknown_name
from calipers.training import objectives
from calipers.training.step import Objective

BOUNDS: dict[str, Objective] = {"interval": objectives.ibp, "crown_ibp": objectives.crown_ibp}


def bounded(bound: str) -> Objective:
    """The objective that trains on this bound.

    Raises:
        ValueError: an unknown name.
    """
    if bound not in BOUNDS:
        raise unknown_name("bound", bound, BOUNDS)
    return BOUNDS[bound]
