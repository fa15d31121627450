"""Calipers brackets the adversarial robustness of a neural network: certified <= robust <= empirical accuracy.

Importing this package imports neither torch nor anything heavy: names resolve on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from calipers.api import attack as attack
    from calipers.api import bound as bound
    from calipers.api import verify as verify
    from calipers.attacks import ATTACKS as ATTACKS
    from calipers.attacks import apgd as apgd
    from calipers.attacks import auto as auto
    from calipers.attacks import closest as closest
    from calipers.attacks import ddn as ddn
    from calipers.attacks import diagnose as diagnose
    from calipers.attacks import distance as distance
    from calipers.attacks import ensemble as ensemble
    from calipers.attacks import expectation as expectation
    from calipers.attacks import falsify as falsify
    from calipers.attacks import fgsm as fgsm
    from calipers.attacks import fmn as fmn
    from calipers.attacks import from_numpy as from_numpy
    from calipers.attacks import gini as gini
    from calipers.attacks import loss_curve as loss_curve
    from calipers.attacks import pgd as pgd
    from calipers.attacks import polished as polished
    from calipers.attacks import restart_losses as restart_losses
    from calipers.attacks import search as search
    from calipers.attacks import square as square
    from calipers.attacks import straight_through as straight_through
    from calipers.attacks import targeted as targeted
    from calipers.bounds import BOUNDS as BOUNDS
    from calipers.bounds import alpha_crown as alpha_crown
    from calipers.bounds import crown as crown
    from calipers.bounds import crown_ibp as crown_ibp
    from calipers.bounds import dual as dual
    from calipers.bounds import interval as interval
    from calipers.bounds import lp as lp
    from calipers.bracket import Bracket as Bracket
    from calipers.bracket import Evidence as Evidence
    from calipers.bracket import Verdict as Verdict
    from calipers.bracket import witness as witness
    from calipers.evaluate.audit import audit as audit
    from calipers.evaluate.curve import curve as curve
    from calipers.evaluate.explain import explain as explain
    from calipers.evaluate.verify import decide as decide
    from calipers.exact import certify as certify
    from calipers.exact import milp as milp
    from calipers.graph.capture import capture as capture
    from calipers.graph.graph import Network as Network
    from calipers.graph.onnx import load_onnx as load_onnx
    from calipers.graph.onnx import save_onnx as save_onnx
    from calipers.graph.onnx import session as session
    from calipers.sets import Region as Region
    from calipers.sets import ThreatModel as ThreatModel
    from calipers.spec import Spec as Spec
    from calipers.training.loop import train as train
    from calipers.training.run import Run as Run

_WHERE = {
    "attack": "calipers.api",
    "bound": "calipers.api",
    "verify": "calipers.api",
    "ATTACKS": "calipers.attacks",
    "apgd": "calipers.attacks",
    "auto": "calipers.attacks",
    "falsify": "calipers.attacks",
    "fgsm": "calipers.attacks",
    "pgd": "calipers.attacks",
    "search": "calipers.attacks",
    "targeted": "calipers.attacks",
    "closest": "calipers.attacks",
    "ddn": "calipers.attacks",
    "diagnose": "calipers.attacks",
    "distance": "calipers.attacks",
    "fmn": "calipers.attacks",
    "from_numpy": "calipers.attacks",
    "polished": "calipers.attacks",
    "square": "calipers.attacks",
    "ensemble": "calipers.attacks",
    "expectation": "calipers.attacks",
    "straight_through": "calipers.attacks",
    "gini": "calipers.attacks",
    "loss_curve": "calipers.attacks",
    "restart_losses": "calipers.attacks",
    "BOUNDS": "calipers.bounds",
    "alpha_crown": "calipers.bounds",
    "crown": "calipers.bounds",
    "crown_ibp": "calipers.bounds",
    "dual": "calipers.bounds",
    "interval": "calipers.bounds",
    "lp": "calipers.bounds",
    "Bracket": "calipers.bracket",
    "Evidence": "calipers.bracket",
    "Verdict": "calipers.bracket",
    "witness": "calipers.bracket",
    "audit": "calipers.evaluate",
    "curve": "calipers.evaluate",
    "decide": "calipers.evaluate",
    "explain": "calipers.evaluate",
    "certify": "calipers.exact",
    "milp": "calipers.exact",
    "capture": "calipers.graph.capture",
    "Network": "calipers.graph.graph",
    "load_onnx": "calipers.graph.onnx",
    "save_onnx": "calipers.graph.onnx",
    "session": "calipers.graph.onnx",
    "Region": "calipers.sets",
    "ThreatModel": "calipers.sets",
    "Spec": "calipers.spec",
    "train": "calipers.training",
    "Run": "calipers.training",
}
__all__ = ["__version__", *_WHERE]  # noqa: PLE0604 - the table is the list


def __getattr__(name: str) -> Any:
    if name == "recipes":
        return importlib.import_module("calipers.recipes")
    if name not in _WHERE:
        raise AttributeError(f"module 'calipers' has no attribute {name!r}")
    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
