"""Attacks: points of low margin, an upper bound on the minimal margin each."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from calipers.attacks.adapters import from_numpy as from_numpy
from calipers.attacks.apgd import apgd as apgd
from calipers.attacks.boundary import ddn as ddn
from calipers.attacks.boundary import fmn as fmn
from calipers.attacks.cascade import LEVELS as LEVELS
from calipers.attacks.cascade import Found as Found
from calipers.attacks.cascade import auto as auto
from calipers.attacks.cascade import search as search
from calipers.attacks.diagnostics import Finding as Finding
from calipers.attacks.diagnostics import diagnose as diagnose
from calipers.attacks.falsify import falsify as falsify
from calipers.attacks.gradient import Targeted as Targeted
from calipers.attacks.gradient import fgsm as fgsm
from calipers.attacks.gradient import pgd as pgd
from calipers.attacks.gradient import targeted as targeted
from calipers.attacks.losses import LOSSES as LOSSES
from calipers.attacks.measures import gini as gini
from calipers.attacks.measures import loss_curve as loss_curve
from calipers.attacks.measures import restart_losses as restart_losses
from calipers.attacks.minimum_norm import MinimumNorm as MinimumNorm
from calipers.attacks.minimum_norm import closest as closest
from calipers.attacks.minimum_norm import distance as distance
from calipers.attacks.minimum_norm import polished as polished
from calipers.attacks.search import calibrated as calibrated
from calipers.attacks.square import square as square
from calipers.attacks.wrappers import ensemble as ensemble
from calipers.attacks.wrappers import expectation as expectation
from calipers.attacks.wrappers import straight_through as straight_through

ATTACKS: dict[str, Callable[..., Tensor]] = {
    "fgsm": fgsm,
    "pgd": pgd,
    "apgd": apgd,
    "square": square,
    "auto": auto,
}
MINIMUM_NORM: dict[str, MinimumNorm] = {"fmn": fmn, "ddn": ddn, "closest": closest}
