"""Bracket a network's robust accuracy: certified <= robust <= empirical, and a report to look at."""

import math
import sys
from pathlib import Path

import calipers as cp
from calipers.data import load
from calipers.models import load_model

target = Path(sys.argv[1] if len(sys.argv) > 1 else "audit.html")
data = load("digits")
threat = cp.ThreatModel(p=math.inf, eps=0.05)

for name in ("digits_standard", "digits_pgd"):
    result = cp.audit(load_model(name), data, threat, samples=100, name=name)
    print(
        f"{name}: {result.certified:.0%} certified <= robust accuracy <= {result.empirical:.0%} empirical "
        f"({threat.describe()}, {result.seconds:.1f} s)"
    )

result.report(str(target))
print(f"report of {name}: {target}")
