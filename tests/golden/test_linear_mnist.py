"""The lectures' robust linear classifier, MNIST 0 against 1 at eps 0.2 without a box: the optimum, proved.

The tutorial's own figures (.0251 robust, .0038 clean) are of a run that has not converged; its file says so.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import calipers as cp
from calipers.data import load
from calipers.training.linear import RobustLogisticRegression, RobustlySeparable

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
pytestmark = pytest.mark.skipif(
    not (SHARED / "mnist").is_dir(), reason="MNIST is not beside the checkout (shared/data)"
)


def zero_one(split: str) -> tuple[np.ndarray, np.ndarray]:
    data = load("mnist", data_dir=SHARED / "mnist", split=split)
    rows = data.y < 2
    return data.x[rows].flatten(1).double().numpy(), data.y[rows].numpy()


@pytest.fixture(scope="module")
def test_data() -> tuple[np.ndarray, np.ndarray]:
    return zero_one("test")


@pytest.fixture(scope="module")
def train_data() -> tuple[np.ndarray, np.ndarray]:
    return zero_one("train")


@pytest.fixture(scope="module")
def model(train_data: tuple) -> RobustLogisticRegression:
    x, y = train_data
    assert x.shape == (12665, 784)
    return RobustLogisticRegression(0.2).fit(x, y)


def test_the_training_loss_is_the_certified_optimum(model: RobustLogisticRegression) -> None:
    published = json.loads((SHARED / "tutorial" / "published.json").read_text())
    assert "0.118652" in published["linear_zero_vs_one_eps_0.2_no_box"]["note"]
    assert model.certified_
    assert model.gap_ <= 1e-7
    assert model.loss_ == pytest.approx(0.118652, abs=1e-6)
    assert abs(model.coef_).sum() == pytest.approx(19.95, abs=0.01)


def test_adversarial_error(model: RobustLogisticRegression, test_data: tuple) -> None:
    x, y = test_data
    assert 1 - model.robust_score(x, y) <= 0.0190
    assert 1 - model.score(x, y) == pytest.approx(0.0052, abs=6e-4)


def test_pgd_never_exceeds_the_exact_value(
    model: RobustLogisticRegression, test_data: tuple
) -> None:
    x, y = test_data
    inputs, label = torch.from_numpy(x[:500]).float(), torch.from_numpy(y[:500])
    region = cp.ThreatModel(math.inf, 0.2, -math.inf, math.inf).around(inputs)
    spec, layer = cp.Spec.label(label, 2), model.to_module(torch.float64)
    found = cp.pgd(model.to_module(), region, spec, steps=20, seeds=torch.arange(500))
    with torch.no_grad():
        reached = spec.margin(spec.values(layer(found.double()))).numpy()
    exact = model.robust_margins(inputs.double().numpy(), y[:500])
    assert (reached >= exact - 1e-6).all()
    np.testing.assert_allclose(reached, exact, atol=1e-4)  # one linear functional: PGD attains it


def test_at_a_small_radius_the_classes_are_separable(train_data: tuple) -> None:
    x, y = train_data
    with pytest.raises(RobustlySeparable):
        RobustLogisticRegression(0.02).fit(x[::10], y[::10])


def test_the_standard_model_is_fragile(train_data: tuple, test_data: tuple) -> None:
    """Its adversarial error by the closed form, without an attack; which model, depends on the ridge."""
    x, y = train_data
    standard = RobustLogisticRegression(0, l2=1e-2).fit(x[::8], y[::8])
    assert standard.certified_
    assert standard.score(*test_data) >= 0.997
    standard.set_params(eps=0.2)
    assert 1 - standard.robust_score(*test_data) > 0.3
    x, y = test_data
    assert standard.score(standard.perturb(x, y), y) == pytest.approx(standard.robust_score(x, y))
