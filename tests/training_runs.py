"""Small trainings for the tests: seconds on one thread, objectives written out."""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calipers.bounds import interval
from calipers.sets import ThreatModel
from calipers.spec import Spec
from calipers.training.run import Run
from calipers.training.schedules import constant
from calipers.zoo import mlp

THREAT = ThreatModel(math.inf, "0.05")


class Loss(NamedTuple):
    total: Tensor
    measures: dict
    carry: Tensor | None = None


def measured(total, logits, y, **more):
    return Loss(total, {"clean": (logits.argmax(1) == y).float().mean(), **more})


def standard(network, x, y, threat, *, seeds):
    logits = network.module(x)
    return measured(F.cross_entropy(logits, y), logits, y)


def fgsm(network, x, y, threat, *, seeds, step=1.0):
    """One signed step: the objective that overfits catastrophically."""
    point = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(F.cross_entropy(network.module(point), y), point)
    logits = network.module((x + step * threat.eps * g.sign()).clamp(0, 1))
    share = (logits.argmax(1) == y).float().mean()
    return measured(F.cross_entropy(logits, y), logits, y, attacked=share)


def bounded(network, x, y, threat, *, seeds):
    """Interval bounds, the set and the margins by the verifier's own code."""
    module = network.module
    logits = module(x)
    module.eval()
    margins = interval(network, threat.around(x), Spec.label(y, network.num_classes))
    module.train()
    padded = torch.cat([torch.zeros(len(x), 1), -margins], 1)
    loss = F.cross_entropy(padded, torch.zeros(len(x), dtype=torch.long))
    certified = (margins > 0).all(1).float().mean()
    return measured(loss, logits, y, certified=certified)


def noisy(network, x, y, threat, *, seeds):
    """Draws from the global generator, as dropout does."""
    return standard(network, x + 0.1 * torch.rand_like(x), y, threat, seeds=seeds)


def dropout_net() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2),
        nn.Linear(32, 10),
    )  # fmt: skip


def normalised_net() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10)
    )


def small(**changes) -> Run:
    """Digits, two layers, one epoch unless told otherwise."""
    given = {
        "name": "small",
        "data": "digits",
        "model": partial(mlp, 64, 32, 10),
        "threat": THREAT,
        "objective": standard,
        "eps": constant(0.05),
        "lr": constant(1e-2),
        "epochs": 1,
        "batch": 128,
        "attack": partial(weak),
    }
    return Run(**given | changes)


def weak(model, region, spec, *, seeds, dtype):
    """The cheapest attack: the final evaluation of these tests is not what they are about."""
    return region.project(region.center.to(dtype))
