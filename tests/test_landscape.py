"""Loss surfaces: the values are the losses, both directions have their figure, and the tutorial's pictures come out."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from calipers import Spec
from calipers.attacks.surface import surface
from calipers.data import load
from calipers.evaluate.landscape import landscape
from calipers.models import load_model

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="module")
def pair():
    return {n: load_model(n) for n in ("digits_standard", "digits_pgd")}, load("digits")


def test_the_values_are_losses_and_margins(pair):
    networks, data = pair
    net = networks["digits_standard"]
    with torch.no_grad():  # an example whose gradient float32 holds
        row = int(F.cross_entropy(net(data.x), data.y, reduction="none").argmax())
    x, y = data.x[row : row + 1], data.y[row : row + 1]
    direction = torch.zeros(1, 8, 8)
    direction[0, 4, 4] = 1.0
    found = surface(net, x, Spec.label(y, 10), 0.2, size=5, direction=direction)
    leaf = x.clone().requires_grad_()
    F.cross_entropy(net(leaf), y).backward()
    for i, a in enumerate((-0.2, -0.1, 0.0, 0.1, 0.2)):
        for j, b in enumerate((-0.2, -0.1, 0.0, 0.1, 0.2)):
            with torch.no_grad():
                out = net(x + a * leaf.grad.sign() + b * direction)
            rivals = out[0].clone()
            rivals[y] = -torch.inf
            assert found.loss[i, j].item() == pytest.approx(
                F.cross_entropy(out, y).item(), abs=1e-5
            )
            assert found.margin[i, j].item() == pytest.approx(
                (out[0, y] - rivals.max()).item(), abs=1e-4
            )
    assert found.rise == pytest.approx((found.loss.max() - found.loss[2, 2]).item())
    assert found.steep == pytest.approx((found.loss[:, 2].max() - found.loss[2, 2]).item())
    assert found.random == pytest.approx((found.loss[2].max() - found.loss[2, 2]).item())
    assert found.steep > found.random


def test_one_scale_for_all_or_one_each(pair):
    networks, data = pair
    both = landscape(networks, data, 0.1, index=2, size=7)
    assert both.limits("loss", "digits_standard") == both.limits("loss", "digits_pgd")
    own = landscape(networks, data, 0.1, index=2, size=7, common=False)
    assert own.limits("loss", "digits_standard") != own.limits("loss", "digits_pgd")
    assert own.limits("loss", "digits_pgd")[1] == own.surfaces["digits_pgd"].loss.max().item()
    assert json.loads(json.dumps(both.json()))["networks"]["digits_pgd"]["rise"] > 0


def test_files_by_their_ending(pair, tmp_path):
    networks, data = pair
    found = landscape({"<b>&": networks["digits_pgd"]}, data, 0.1, size=5)
    found.save(tmp_path / "s.svg")
    assert "<b>&: cross-entropy" in [
        e.text
        for e in ET.parse(tmp_path / "s.svg").iter()  # noqa: S314
        if e.text
    ]
    found.save(tmp_path / "s.html")
    assert "<b>" not in (tmp_path / "s.html").read_text()
    with pytest.raises(ValueError, match=r"must end in one of"):
        found.save(tmp_path / "s.gif")


def test_bad_input(pair):
    networks, data = pair
    with pytest.raises(ValueError, match="size: 4 is even"):
        landscape(networks, data, 0.1, size=4)
    with pytest.raises(ValueError, match="eps: 0"):
        landscape(networks, data, 0.0)
    with pytest.raises(ValueError, match="index: 500 is outside"):
        landscape(networks, data, 0.1, index=500)


def test_the_command(run, tmp_path):
    out = tmp_path / "l.html"
    code, said, _ = run(
        "landscape", "digits_standard", "--beside", "digits_pgd", "--size", 5, "--out", out,
        "--json", tmp_path / "l.json",
    )  # fmt: skip
    assert code == 0
    assert "digits_pgd" in said
    assert out.read_text().count("<svg") == 8
    assert run("landscape", "--out", tmp_path / "l.gif")[0] == 2
    assert "twice" in run("landscape", "--beside", "digits_pgd")[2]


@pytest.mark.skipif(
    not (SHARED / "tutorial").is_dir() or not (SHARED / "mnist").is_dir(),
    reason="the tutorial's weights and MNIST are not beside the checkout (shared/data)",
)
def test_the_tutorials_surfaces_reach_what_it_printed():
    """Chapter 4: the axes end at 3.0 for the standard network and at 1.2e-4 for the robust one, along NumPy's signs."""
    data = load("mnist", data_dir=SHARED / "mnist")
    x, spec = data.x[:1], Spec.label(data.y[:1], 10)
    signs = np.sign(np.random.RandomState(0).randn(784))
    reached = {}
    for name in ("ch4_model_cnn", "ch4_model_cnn_robust"):
        net = load_model("tutorial_cnn", weights=SHARED / "tutorial" / f"{name}.pt")
        direction = torch.from_numpy(signs).float().view(1, 28, 28)
        found = surface(net, x, spec, 0.1, size=21, direction=direction)
        assert found.steep > 4 * found.random
        reached[name] = found.loss.max().item()
    assert reached["ch4_model_cnn"] == pytest.approx(3.0, abs=0.05)
    assert reached["ch4_model_cnn_robust"] == pytest.approx(1.2e-4, abs=0.15e-4)
