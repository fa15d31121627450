"""A linear classifier trained against the exact worst case, with a proof that no other model does better."""

import math

import calipers as cp
from calipers.data import load
from calipers.training.linear import (
    NormRegularisedLogisticRegression,
    RobustLogisticRegression,
    RobustlySeparable,
)


def two(split):
    """The digits 3 and 8, flat."""
    data = load("digits", split=split)
    rows = (data.y == 3) | (data.y == 8)
    return data.x[rows].flatten(1).double(), data.y[rows]


(x, y), (x_test, y_test) = two("train"), two("test")
models = {
    "standard": RobustLogisticRegression(0, l2=1e-3),
    "norm outside": NormRegularisedLogisticRegression(0.2),
    "robust": RobustLogisticRegression(0.2),
}
for name, model in models.items():
    model.fit(x.numpy(), y.numpy()).set_params(eps=0.2)
    clean, robust = (f(x_test.numpy(), y_test.numpy()) for f in (model.score, model.robust_score))
    print(
        f"{name:13} loss {model.loss_:.6f} (gap {model.gap_:.0e}), "
        f"accuracy {clean:.0%}, exact robust accuracy {robust:.0%}"
    )

# an attack finds what the formula says, and not more
robust, label = models["robust"], (y_test == 8).long()
layer, threat = robust.to_module(), cp.ThreatModel(math.inf, 0.2, -math.inf, math.inf)
x_adv = cp.attack(layer, x_test.float(), label, threat)
print(f"robust under attack: {(layer(x_adv).argmax(1) == label).float().mean():.0%}")

try:
    RobustLogisticRegression(0.01).fit(x.numpy(), y.numpy())
except RobustlySeparable as error:
    print("eps 0.01:", error)
