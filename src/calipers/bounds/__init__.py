"""Lower bounds on a specification's functionals over a region."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from calipers.bounds.forward import forward as forward
from calipers.bounds.ladder import crown as crown
from calipers.bounds.ladder import crown_ibp as crown_ibp
from calipers.bounds.ladder import interval as interval
from calipers.bounds.ladder import preactivations as preactivations
from calipers.bounds.lp import Relaxation as Relaxation
from calipers.bounds.lp import lp as lp
from calipers.bounds.lp import lp_points as lp_points
from calipers.bounds.lp import lp_preactivations as lp_preactivations
from calipers.bounds.lp import relaxation as relaxation
from calipers.bounds.slopes import alpha_crown as alpha_crown
from calipers.bounds.slopes import dual as dual

BOUNDS: dict[str, Callable[..., Tensor]] = {
    "interval": interval,
    "forward": forward,
    "crown_ibp": crown_ibp,
    "dual": dual,
    "crown": crown,
    "alpha_crown": alpha_crown,
    "lp": lp,
}

BELOW = {
    "forward": "interval",
    "crown_ibp": "interval",
    "dual": "interval",
    "crown": "crown_ibp",
    "alpha_crown": "crown",
    "lp": "crown",
}  # the rung that each one is never below
