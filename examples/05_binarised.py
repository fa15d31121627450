"""Rounding pixels to 0 or 1 removes most l_inf noise, and the gradient: FGSM and PGD stop at the clean accuracy."""

import math

import torch
from torch import nn

import calipers as cp
from calipers.attacks.diagnostics import lines
from calipers.data import load
from calipers.seeds import seeds
from calipers.zoo import mlp

torch.manual_seed(0)
train, test = load("digits", split="train"), load("digits")
net = mlp(64, 64, 32, 10)
optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
for _ in range(300):
    optimizer.zero_grad()
    nn.functional.cross_entropy(net(train.x.round()), train.y).backward()
    optimizer.step()


def binarised(x):
    return net(x.round())


def through(x):
    return net(cp.straight_through(torch.round)(x))


x, y = test.x[:100], test.y[:100]
threat = cp.ThreatModel(p=math.inf, eps=0.1)
region, spec, s = threat.around(x), cp.Spec.label(y, 10), seeds(x, 0, "example")
near = ((x - 0.5).abs() <= 0.1).flatten(1).sum(1).double().mean()
print(f"{threat.describe()}: {near:.1f} of 64 pixels can change sides")

attacks = {
    "no change": x,
    "FGSM": cp.fgsm(binarised, region, spec),
    "PGD, 40 steps": cp.pgd(binarised, region, spec),
    "PGD, straight through": cp.pgd(through, region, spec, loss="margin"),
    "all, straight through": cp.auto(through, region, spec, seeds=s),
    "square, no gradients": cp.square(binarised, region, spec, queries=2000, seeds=s),
}
for name, points in attacks.items():  # judged on the model itself, never on the wrapper
    print(f"{name:21} accuracy {cp.witness(binarised, region, spec, points).accuracy()[1]:.0%}")

# Rounding is monotone: it maps the set into the box between its rounded ends, which a bound can cover.
box = cp.Region.box(*(side.round() for side in region.hull()))
captured = cp.capture(net.eval(), x[:2])
certified = cp.crown(captured, box, spec, dtype=torch.float64, rigorous=True).amin(1) > 0
print(f"{'certified':21} accuracy {certified.double().mean():.0%}")

print("\nwhat the diagnostics say about gradient attacks on it:")
findings = cp.diagnose(binarised, region, spec, seeds=s)
print("\n".join(lines(findings, all_of_them=False)))
