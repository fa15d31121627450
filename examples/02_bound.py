"""Certified margins: no change in the set can push the margin below them."""

import math
import time

import calipers as cp
from calipers.data import load
from calipers.models import load_model

data = load("digits")
x, y = data.x[:100], data.y[:100]

print("network           eps    method     certified  mean margin  ms per image")
for name in ("digits_standard", "digits_pgd"):
    net = load_model(name)
    for eps in ("0.01", "0.03"):  # strings keep their exact value
        threat = cp.ThreatModel(p=math.inf, eps=eps)
        for method in (cp.interval, cp.crown_ibp, cp.crown):
            begin = time.perf_counter()
            margins = cp.bound(net, x, y, threat, method=method).amin(1)
            each = 1e3 * (time.perf_counter() - begin) / len(x)
            share = (margins > 0).double().mean()
            print(
                f"{name:17} {eps:6} {method.__name__:10} {share:9.0%} {margins.mean():12.3f} {each:13.2f}"
            )

upper = cp.attack(net, x, y, threat)
spec = cp.Spec.label(y, net.num_classes)
found = cp.witness(net, threat.around(x), spec, upper)
assert (margins <= found.upper).all(), "a bound never exceeds what an attack found"
print("every bound is below the margin that the attack found")
