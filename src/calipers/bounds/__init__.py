"""Lower bounds on a specification's functionals over a region."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from calipers.bounds.ladder import crown as crown
from calipers.bounds.ladder import crown_ibp as crown_ibp
from calipers.bounds.ladder import interval as interval
from calipers.bounds.ladder import preactivations as preactivations

BOUNDS: dict[str, Callable[..., Tensor]] = {
    "interval": interval,
    "crown_ibp": crown_ibp,
    "crown": crown,
}
