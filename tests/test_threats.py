"""What people ask of a threat model: radii per example, masks, a box per channel, no change at all."""

from __future__ import annotations

import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import calipers as cp
import geometry as g
from calipers.attacks import ATTACKS, pgd
from calipers.bounds import BOUNDS
from calipers.cli import main
from calipers.data import load
from calipers.errors import DataError
from calipers.models import load_model
from calipers.sets import Region, ThreatModel, equivalent_eps
from geometry import INF, LONG

NORMS = [1.0, 2.0, INF]


def command(monkeypatch, capsys, *arguments: object) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["calipers", *map(str, arguments)])
    try:
        main()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    return (code, *capsys.readouterr())


# -- masks ------------------------------------------------------------------------------------------------


def check_mask(p: float, eps: float, seed: int, dtype: torch.dtype) -> None:
    """Everything the region does, against oracles on the box that is a point where the mask is False."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(1, 5, generator=generator).to(dtype)
    mask = torch.rand(5, generator=generator) < 0.6
    region = ThreatModel(p, eps, mask=mask).around(x)
    frozen = ~mask.unsqueeze(0)
    for side in (region.lower, region.upper, region.outer_lower, region.outer_upper):
        assert torch.equal(side[frozen], x.double()[frozen])
    center = g._long(x[0])
    fixed = frozen[0].numpy()
    low, high = np.where(fixed, center, LONG(0)), np.where(fixed, center, LONG(1))
    z = x + torch.randn(1, 5, generator=generator).to(dtype)
    a = torch.randn(1, 5, generator=generator).to(dtype)
    slope = g._long(a[0])
    best = (slope * (g.furthest(slope, center, LONG(eps), p, low, high) - center)).sum()
    tolerance = (8 * torch.finfo(dtype).eps + 1e-13) * (1 + np.abs(slope).sum())
    nearest = g.nearest(g._long(z[0]), center, LONG(eps), p, low, high)
    projected, point = region.project(z), region.maximizer(a)
    assert np.abs(g._long(projected[0]) - nearest).max() <= tolerance
    gain = (slope * (g._long(point[0]) - center)).sum()
    assert best - tolerance <= gain <= best + tolerance
    top = LONG(region.support(a).item()) - (slope * center).sum()
    assert best - tolerance <= top <= best + tolerance
    moved = region.ascend(x.clone(), a, 0.3)
    for inside in (projected, point, moved, region.sample(torch.tensor([seed]), dtype)):
        assert region.contains(inside).all()
        assert torch.equal(inside[frozen], x[frozen])
    if frozen.any():
        off = x.clone()
        off[frozen] = torch.nextafter(off[frozen], torch.tensor(2.0, dtype=dtype))
        assert not region.contains(off).any()


@given(
    st.sampled_from(NORMS),
    st.sampled_from([0.0, 0.1, 0.5, 3.0]),
    st.integers(0, 2**20),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_a_mask_is_a_box_of_points(p: float, eps: float, seed: int, dtype: torch.dtype) -> None:
    check_mask(p, eps, seed, dtype)


def test_a_mask_over_channels_broadcasts() -> None:
    x = torch.rand(4, 3, 2, 2)
    mask = torch.tensor([True, False, True]).view(3, 1, 1)
    point = ThreatModel(INF, 0.1, mask=mask).around(x).maximizer(torch.ones_like(x))
    assert torch.equal(point[:, 1], x[:, 1])
    assert (point[:, [0, 2]] > x[:, [0, 2]]).all()


@pytest.mark.parametrize("p", [1.0, 2.0])
def test_steps_are_not_spent_on_frozen_features(p: float) -> None:
    region = ThreatModel(p, 0.2, mask=torch.tensor([False, True, True])).around(
        torch.full((1, 3), 0.5)
    )
    step = region.steepest(torch.tensor([[100.0, 3.0, -4.0]]))
    expected = [[0.0, 0.6, -0.8]] if p == 2 else [[0.0, 0.0, -1.0]]
    torch.testing.assert_close(step, torch.tensor(expected))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mask": torch.ones(3)}, r"mask: dtype torch\.float32 is not bool; give True where"),
        (
            {"mask": torch.ones(7, dtype=torch.bool)},
            r"mask: shape \(7,\) does not broadcast to one example of shape",
        ),
        ({"lower": torch.zeros(3)}, r"lower: shape \(3,\) does not broadcast.*\(C, 1, 1\)"),
        ({"upper": torch.ones(2, 3, 4, 4)}, r"upper: shape \(2, 3, 4, 4\) does not broadcast"),
        ({"eps": torch.full((3,), 0.1)}, r"eps: shape \(3,\) does not broadcast"),
    ],
)
def test_shapes_that_do_not_fit_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ThreatModel(**{"p": INF, "eps": 0.1, **arguments}).around(torch.rand(2, 3, 4, 4))


def test_every_method_keeps_the_mask() -> None:
    network, data = load_model("digits_standard"), load("digits")
    x, y = data.x[:20], data.y[:20]
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[:, 2:6, 2:6] = True
    result = cp.audit(network, (x, y), ThreatModel(INF, "0.2", mask=mask))
    assert torch.equal(result.bracket.witness[:, ~mask], x[:, ~mask])
    free = cp.audit(network, (x, y), ThreatModel(INF, "0.2"))
    assert result.certified >= free.certified
    assert result.empirical >= free.empirical
    assert result.json()["threat"]["free"] == 16
    assert "where the mask is true (16 of 64)" in result.threat.describe()


def test_the_command_line_takes_a_mask(tmp_path, monkeypatch, capsys) -> None:
    mask = np.zeros((1, 8, 8), dtype=bool)
    mask[:, 2:6] = True
    np.save(tmp_path / "m.npy", mask)
    np.save(tmp_path / "f.npy", mask.astype(float))
    np.save(tmp_path / "s.npy", mask[:, :3])
    start = ("audit", "--samples", 10, "--mask")
    code, out, _ = command(monkeypatch, capsys, *start, tmp_path / "m.npy")
    assert code == 0
    assert "where the mask is true (32 of 64)" in out
    for file, message in (
        ("f.npy", "a mask holds bools"),
        ("s.npy", "mask: shape (1, 3, 8) does not broadcast"),
        ("no.npy", "no such file"),
    ):
        code, _, err = command(monkeypatch, capsys, *start, tmp_path / file)
        assert code == 2
        assert message in " ".join(err.split())
        assert "Traceback" not in err


# -- radii and boxes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", NORMS)
def test_a_radius_per_example_is_each_example_alone(p: float) -> None:
    x, eps = torch.rand(4, 3), torch.tensor([0.0, 0.1, 0.4, 2.0])
    together = Region.ball(x, eps, p, 0.0, 1.0)
    z, a = torch.randn(4, 3), torch.randn(4, 3)
    for i in range(4):
        alone = Region.ball(x[i : i + 1], eps[i].item(), p, 0.0, 1.0)
        assert torch.equal(together.project(z)[i], alone.project(z[i : i + 1])[0])
        assert torch.equal(together.maximizer(a)[i], alone.maximizer(a[i : i + 1])[0])
        torch.testing.assert_close(together.support(a)[i], alone.support(a[i : i + 1])[0])


def normalised(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Three channels, normalised as image models like it, and the box [0, 1] in their units."""
    mean, std = (
        torch.tensor([0.48, 0.45, 0.4]).view(3, 1, 1),
        torch.tensor([0.2, 0.25, 0.3]).view(3, 1, 1),
    )
    return (x - mean) / std, (0 - mean) / std, (1 - mean) / std


@pytest.mark.parametrize("p", NORMS)
def test_a_box_per_channel(p: float) -> None:
    x, low, high = normalised(torch.rand(2, 3, 2, 2))
    region = ThreatModel(p, 50.0, low, high).around(x)
    up, down = region.maximizer(torch.ones_like(x)), region.maximizer(-torch.ones_like(x))
    torch.testing.assert_close(up, high.expand_as(x))
    torch.testing.assert_close(down, low.expand_as(x))
    assert region.contains(up).all()
    assert not region.contains(torch.nextafter(up, torch.tensor(INF))).any()
    whole = ThreatModel(p, 50.0, low.expand(3, 2, 2), high.expand(3, 2, 2)).around(x)
    z = torch.randn_like(x) * 3
    assert torch.equal(region.project(z), whole.project(z))


def test_normalised_inputs_through_the_command_line(tmp_path, monkeypatch, capsys) -> None:
    x, low, high = normalised(torch.rand(12, 3, 4, 4))
    y = np.arange(12) % 3
    (tmp_path / "net.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def make():\n    torch.manual_seed(0)\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.ReLU(), nn.Linear(8, 3))\n"
    )
    np.savez(tmp_path / "d.npz", x=x.numpy(), y=y, lower=low.numpy(), upper=high.numpy())
    start = ("audit", f"{tmp_path / 'net.py'}:make", "--data", tmp_path / "d.npz", "--eps", "0.2")
    code, out, _ = command(monkeypatch, capsys, *start, "--json", tmp_path / "a.json")
    assert code == 0
    assert "in [per-feature -2.4..-1.33333, per-feature 2..2.6]" in " ".join(out.split())
    threat = json.loads((tmp_path / "a.json").read_text())["threat"]
    assert threat["lower"]["minimum"] == pytest.approx(-2.4)
    np.savez(tmp_path / "d.npz", x=x.numpy(), y=y)  # without the box the inputs are refused
    code, _, err = command(monkeypatch, capsys, *start)
    assert code == 2
    assert "outside the input domain" in err


# -- no change at all -----------------------------------------------------------------------------------


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("grid", [None, "1/16"])
def test_a_radius_of_zero_is_the_clean_point(
    p: float, dtype: torch.dtype, grid: str | None
) -> None:
    x = (torch.randint(0, 17, (6, 5)) / 16).to(dtype)
    region = ThreatModel(p, 0, grid=grid).around(x)
    z = torch.randn(6, 5, dtype=dtype)
    for got in (
        region.project(z),
        region.snap(region.project(z)),
        region.maximizer(z),
        region.ascend(x.clone(), z, 0.1),
        region.ascend(x.clone(), z, 0.1, plain=True),
        region.sample(torch.arange(6), dtype),
    ):
        assert torch.equal(got, x)
    assert torch.equal(region.contains(x), torch.ones(6, dtype=torch.bool))
    assert not region.contains(torch.nextafter(x, torch.tensor(0.5, dtype=dtype))).all()
    torch.testing.assert_close(region.support(z), (z * x).sum(1))


@pytest.mark.parametrize("p", NORMS)
def test_at_radius_zero_attacks_return_the_input_and_bounds_its_value(p: float) -> None:
    network, data = load_model("digits_pgd"), load("digits")
    x, y = data.x[:10], data.y[:10]
    region, spec = ThreatModel(p, 0).around(x), cp.Spec.label(y, 10)
    attacks = {**ATTACKS, "restarts": partial(pgd, restarts=3, loss="margin")}
    seeds = torch.arange(10)
    for name in ("fgsm", "pgd", "restarts"):
        assert torch.equal(attacks[name](network, region, spec, seeds=seeds), x), name
    value = spec.values(network.in_double()(x))
    for name, bound in BOUNDS.items():
        got = bound(network, region, spec, dtype=torch.float64)
        torch.testing.assert_close(got, value, rtol=1e-9, atol=1e-9, msg=name)


# -- radii across norms ---------------------------------------------------------------------------------


def volume(p: float, n: int, r: float) -> float:
    """Of the ball, in dimensions where nothing overflows."""
    if p == INF:
        return (2 * r) ** n
    if p == 1:
        return (2 * r) ** n / math.factorial(n)
    return math.pi ** (n / 2) / math.gamma(n / 2 + 1) * r**n


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("n", [1, 2, 3, 7, 30, 150])
def test_equivalent_radii_have_the_same_volume(p: float, n: int) -> None:
    r = equivalent_eps(p, n, 0.4)
    assert volume(p, n, r) == pytest.approx(volume(INF, n, 0.4), rel=1e-10)
    assert equivalent_eps(p, 1, 0.3) == pytest.approx(0.3)


def test_the_lectures_radius_is_the_limit() -> None:
    limit = math.sqrt(2 * 784 / (math.pi * math.e)) * 0.1
    assert limit == pytest.approx(1.35, abs=0.01)  # the value printed for MNIST
    assert equivalent_eps(2, 784, "0.1", limit=True) == pytest.approx(limit, rel=1e-12)
    assert equivalent_eps(2, 784, 0.1) == pytest.approx(limit, rel=0.006)
    assert equivalent_eps(1, 784, 0.1, limit=True) == pytest.approx(784 / math.e * 0.1)
    assert equivalent_eps(INF, 784, 0.1, limit=True) == equivalent_eps(INF, 784, 0.1) == 0.1
    for p in (1, 2):
        ratios = [
            equivalent_eps(p, n, 1) / equivalent_eps(p, n, 1, limit=True)
            for n in (10, 10**3, 10**7)
        ]
        assert ratios[0] > ratios[1] > ratios[2] > 1
        assert ratios[2] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3, 10, 0.1), "p: 3 is not one of"),
        ((2, 0, 0.1), "n: 0 is not"),
        ((2, 10, -0.1), "eps_inf: -0.1 is negative"),
        ((2, 10, "x"), "eps_inf"),
    ],
)
def test_bad_arguments_of_equivalent_eps(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        equivalent_eps(*arguments)


# -- planted faults -------------------------------------------------------------------------------------


def test_a_leaking_mask_is_caught(monkeypatch) -> None:
    honest = Region.ball.__func__

    def leaking(cls, *arguments, mask=None, **rest):
        if mask is not None:
            mask = mask.clone()
            mask[..., 0] = True
        return honest(cls, *arguments, mask=mask, **rest)

    monkeypatch.setattr(Region, "ball", classmethod(leaking))
    with pytest.raises(AssertionError):
        [check_mask(INF, 0.1, seed, torch.float32) for seed in range(10)]


def test_inputs_must_still_lie_in_the_box() -> None:
    with pytest.raises(DataError, match="outside the input domain"):
        ThreatModel(INF, 0.1, mask=torch.tensor([False])).around(torch.full((1, 1), 2.0))


def test_a_module_with_a_mask_needs_no_change() -> None:
    """The mask is a matter of the region: models see ordinary points."""
    model = nn.Linear(3, 2)
    x, y = torch.rand(2, 3), torch.tensor([0, 1])
    points = cp.attack(model, x, y, ThreatModel(2, 0.3, mask=torch.tensor([True, False, True])))
    assert torch.equal(points[:, 1], x[:, 1])
