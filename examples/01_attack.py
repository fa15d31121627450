"""Attack the built-in digits network, and let `witness` decide what counts."""

import math

import calipers as cp
from calipers.data import load
from calipers.models import load_model

net = load_model("digits_standard")
data = load("digits")
x, y = data.x[:100], data.y[:100]

print(f"clean: {(net(x).argmax(1) == y).sum()} of {len(x)} right")
for p, eps in ((math.inf, 0.1), (2, 0.6), (1, 2.0)):
    threat = cp.ThreatModel(p=p, eps=eps)  # the ball, intersected with [0, 1]
    region, spec = threat.around(x), cp.Spec.label(y, net.num_classes)
    once = cp.witness(net, region, spec, cp.fgsm(net, region, spec))
    best = cp.witness(net, region, spec, cp.attack(net, x, y, threat))
    print(
        f"{threat.describe()}: accuracy under FGSM {once.accuracy()[1]:.0%}, under PGD with restarts "
        f"{best.accuracy()[1]:.0%}"
    )

threat = cp.ThreatModel(p=math.inf, eps=0.2)
wanted = (y + 1) % 10
found = cp.targeted(net, threat.around(x), y, wanted, num_classes=10)
print(
    f"to the next digit at {threat.describe()}: {found.fooled.sum()} fooled, {found.hit.sum()} hit"
)
