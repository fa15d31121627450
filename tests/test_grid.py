"""Sets on a grid, against the enumeration of all their points in rational arithmetic."""

from __future__ import annotations

import itertools
import json
import math
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import calipers as cp
from calipers import grid as grids
from calipers.attacks import fgsm, pgd
from calipers.bounds import crown, interval
from calipers.cli import main
from calipers.data import load
from calipers.errors import DataError, RegionError
from calipers.grid import spacing, stored, to_grid
from calipers.models import load_model
from calipers.seeds import seeds as example_seeds
from calipers.sets import Region, ThreatModel

INF = math.inf
PIXEL = Fraction(1, 255)


def pixels(*levels: int) -> Tensor:
    """One 8-bit example, as a loader gives it."""
    return (torch.tensor(levels, dtype=torch.uint8).float() / 255).unsqueeze(0)


def members(
    center: list[int], p: float, eps: Fraction, grid: Fraction, lower: Fraction, upper: Fraction
) -> list[tuple[int, ...]]:
    """All members' levels, by the definition."""
    reach = math.floor(eps / grid)
    axes = [
        [k for k in range(c - reach, c + reach + 1) if k == c or lower <= k * grid <= upper]
        for c in center
    ]

    def near(point: tuple[int, ...]) -> bool:
        gaps = [abs(k - c) * grid for k, c in zip(point, center, strict=True)]
        if p == INF:
            return max(gaps) <= eps
        return sum(gaps) <= eps if p == 1 else sum(g * g for g in gaps) <= eps * eps

    return [point for point in itertools.product(*axes) if near(point)]


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[int], float, Fraction, Fraction, torch.dtype, int]:
    grid = draw(st.sampled_from([PIXEL, Fraction(1, 16), Fraction(2, 7), Fraction(3)]))
    center = draw(st.lists(st.integers(0, int(1 / grid) or 3), min_size=1, max_size=3))
    p = draw(st.sampled_from([1.0, 2.0, INF]))
    eps = grid * draw(st.fractions(0, 4, max_denominator=5))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    return center, p, eps, grid, dtype, draw(st.integers(0, 2**20))


def built(
    case: tuple[list[int], float, Fraction, Fraction, torch.dtype, int],
) -> tuple[Region, Tensor]:
    """The region of a case, and all its members as stored numbers (N, n)."""
    center, p, eps, grid, dtype, _ = case
    top = Fraction(1) if grid < 1 else Fraction(9)
    x = stored(torch.tensor([center]), grid, dtype)
    region = ThreatModel(p, eps, "0", top, grid=grid).around(x)
    return region, stored(
        torch.tensor(members(center, p, eps, grid, Fraction(0), top)), grid, dtype
    )


def check_members(case: tuple[list[int], float, Fraction, Fraction, torch.dtype, int]) -> None:
    """`contains` is the enumeration, on grid points around and on their float neighbours."""
    region, points = built(case)
    known = {tuple(p) for p in points.tolist()}
    center, _, _, grid, dtype, seed = case
    generator = torch.Generator().manual_seed(seed)
    shift = torch.randint(-6, 7, (200, len(center)), generator=generator)
    near = stored(torch.tensor(center) + shift, grid, dtype)
    many = region[torch.zeros(200, dtype=torch.long)]
    assert many.contains(near).tolist() == [tuple(p) in known for p in near.tolist()]
    everywhere = region[torch.zeros(len(points), dtype=torch.long)]
    assert everywhere.contains(points).all()
    assert everywhere.relaxed.contains(points).all()
    for towards in (-INF, INF):
        off = points.clone()
        off[:, 0] = torch.nextafter(off[:, 0], torch.tensor(towards, dtype=dtype))
        assert not everywhere.contains(off).any()


def check_points(case: tuple[list[int], float, Fraction, Fraction, torch.dtype, int]) -> None:
    """Whatever gives points gives members; the nearest and the best ones where that is promised."""
    region, points = built(case)
    center, p, _, grid, dtype, seed = case
    generator = torch.Generator().manual_seed(seed)
    many = region[torch.zeros(8, dtype=torch.long)]
    noise = torch.randn(8, len(center), generator=generator, dtype=torch.float64)
    z = (many.center + 3 * float(grid) * noise).to(dtype)
    a = noise.flip(0).to(dtype)
    known = {tuple(q) for q in points.tolist()}
    found = {
        "snap": many.snap(z),
        "project": many.project(z),
        "maximizer": many.maximizer(a),
        "sample": many.sample(torch.arange(8), dtype),
        "ascend": many.ascend(many.center.clone().to(dtype), a, 0.3 * float(grid)),
    }
    for name, got in found.items():
        assert got.dtype == dtype
        assert all(tuple(q) in known for q in got.tolist()), name
        assert many.contains(got).all(), name
    stay = region[torch.zeros(len(points), dtype=torch.long)]
    assert torch.equal(stay.snap(points), points)
    values = points.double() @ a.double().T
    best = values.amax(0)
    reached = (found["maximizer"].double() * a.double()).sum(1)
    if p != 2:
        torch.testing.assert_close(reached, best, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found["sample"], many.snap(found["sample"]), rtol=0, atol=0)
    if p == INF:
        distance = (points.double().unsqueeze(0) - z.double().unsqueeze(1)).abs().amax(2).amin(1)
        chosen = (found["snap"].double() - z.double()).abs().amax(1)
        torch.testing.assert_close(chosen, distance, rtol=1e-12, atol=1e-12)
    # bounds cover every member
    assert (many.support(a.double()) >= best - 1e-12 * (1 + best.abs())).all()
    low, high = region.hull()
    assert ((points.double() >= low) & (points.double() <= high)).all()


@given(cases())
def test_contains_is_the_enumeration(case) -> None:
    check_members(case)


@given(cases())
def test_points_are_members(case) -> None:
    check_points(case)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_both_usual_loaders_give_grid_points(dtype: torch.dtype) -> None:
    k = torch.arange(256)
    expected = [float(np.float64(i) / 255) for i in range(256)]
    assert torch.equal(
        stored(k, PIXEL, dtype), torch.tensor(expected, dtype=torch.float64).to(dtype)
    )
    assert torch.equal(stored(k, PIXEL, dtype), k.to(dtype) / torch.tensor(255, dtype=dtype))
    assert torch.equal(to_grid(k.to(dtype) * (1 / 255), "1/255"), stored(k, PIXEL, dtype))


@pytest.mark.parametrize("eps", ["8/255", 8 / 255, Fraction(8, 255), np.float32(8 / 255).item()])
@pytest.mark.parametrize("grid", ["1/255", 1 / 255, PIXEL])
def test_eight_of_255_is_exactly_eight_levels(eps, grid) -> None:
    region = ThreatModel(INF, eps, grid=grid).around(pixels(100, 3, 250))
    up, down = torch.ones(1, 3), -torch.ones(1, 3)
    assert torch.equal(region.maximizer(up), pixels(108, 11, 255))
    assert torch.equal(region.maximizer(down), pixels(92, 0, 242))
    assert not region.contains(pixels(109, 3, 250)).any()
    assert region.grid == PIXEL


def test_a_radius_between_levels_is_rounded_down_and_bounds_gain_by_it() -> None:
    x = pixels(100, 120)
    region = ThreatModel(INF, "0.1", grid="1/255").around(x)  # 25.5 levels
    assert torch.equal(region.maximizer(torch.ones(1, 2)), pixels(125, 145))
    assert torch.equal(region.hull().upper.float(), pixels(125, 145))


@pytest.mark.parametrize("tensors", [False, True])
def test_sides_between_levels_are_rounded_inwards(tensors: bool) -> None:
    sides = ("0.1", "0.9") if not tensors else (torch.tensor(0.1), torch.full((2,), 0.9))
    region = ThreatModel(INF, 1, *sides, grid="1/255").around(pixels(100, 120))
    up, down = region.maximizer(torch.ones(1, 2)), region.maximizer(-torch.ones(1, 2))
    assert torch.equal(up, pixels(229, 229))  # 229.5
    assert torch.equal(down, pixels(26, 26))  # 25.5


@pytest.mark.parametrize("p", [1.0, 2.0])
def test_per_example_radii_and_tensor_sides(p: float) -> None:
    x = pixels(10, 20, 30).repeat(3, 1)
    eps = torch.tensor([0.0, 3 / 255, 7 / 255])
    low, high = pixels(9, 0, 30)[0], pixels(255, 21, 255)[0]
    region = Region.ball(x, eps, p, low, high, grid="1/255")
    a = torch.tensor([[-1.0, 0.5, -0.2]]).expand(3, -1)
    for i, reach in enumerate((0, 3, 7)):
        allowed = members([10, 20, 30], p, Fraction(reach, 255), PIXEL, Fraction(0), Fraction(1))
        allowed = [q for q in allowed if q[0] >= 9 and q[1] <= 21 and q[2] >= 30]
        points = stored(torch.tensor(allowed), PIXEL, torch.float32)
        part = region[torch.full((len(points),), i)]
        assert part.contains(points).all()
        best = max((points.double() @ a[i].double()).tolist())
        got = (region.maximizer(a)[i].double() @ a[i].double()).item()
        assert got <= best + 1e-12
        if p == 1:
            assert got >= best - 1e-12


def test_a_mask_and_a_radius_per_feature_hold_on_the_grid() -> None:
    x = pixels(10, 20, 30)
    eps = torch.tensor([2 / 255, 5 / 255, 9 / 255])
    threat = ThreatModel(INF, eps, mask=torch.tensor([True, False, True]), grid="1/255")
    assert torch.equal(threat.around(x).maximizer(torch.ones(1, 3)), pixels(12, 20, 39))


def test_small_changes_become_some_whole_ones() -> None:
    """A fifth of a level everywhere is a level in a fifth of the features (p = 1), or a 25th (p = 2)."""
    x = pixels(*[100] * 100)
    change = 0.2 / 255 * (1 + 0.01 * torch.rand(1, 100))
    for p, count in ((1.0, 20), (2.0, 4)):
        region = ThreatModel(p, 40 / 255, grid="1/255").around(x)
        moved = ((region.snap(x + change) - x) * 255).round()
        assert moved.sum() == pytest.approx(count, abs=1)
        assert set(moved.flatten().tolist()) == {0.0, 1.0}
    assert torch.equal(ThreatModel(INF, 40 / 255, grid="1/255").around(x).snap(x + change), x)


def test_short_steps_still_move() -> None:
    x = pixels(*[100] * 5)
    for p in (1.0, 2.0, INF):
        region = ThreatModel(p, 20 / 255, grid="1/255").around(x)
        step = region.ascend(x.clone(), torch.tensor([[1.0, 0.9, -0.8, 0.7, -0.6]]), 0.01 / 255)
        assert not torch.equal(step, x)
        assert region.contains(step).all()


def test_the_maximizer_for_p_2_is_nearly_exact() -> None:
    generator = np.random.default_rng(0)
    for _ in range(40):
        center, a = generator.integers(0, 6, 4).tolist(), generator.standard_normal(4)
        grid, eps = Fraction(1, 16), Fraction(int(generator.integers(4, 60)), 160)
        region = ThreatModel(2, eps, grid=grid).around(
            stored(torch.tensor([center]), grid, torch.float64)
        )
        allowed = members(center, 2, eps, grid, Fraction(0), Fraction(1))
        gains = (np.array(allowed) - np.array(center)) @ a / 16
        got = ((region.maximizer(torch.tensor(a)[None]) - region.center)[0].numpy() @ a).item()
        assert gains.max() + 1e-9 >= got >= 0.8 * gains.max()


def test_without_a_grid_nothing_changes() -> None:
    region = ThreatModel(2, 0.5).around(torch.rand(3, 4))
    z = torch.randn(3, 4)
    assert region.snap(z) is z
    assert region.relaxed is region
    assert region.grid is None


def test_nan_stays_visible_and_narrow_dtypes_are_refused() -> None:
    region = ThreatModel(INF, "8/255", grid="1/255").around(pixels(1, 2))
    z = torch.tensor([[math.nan, 0.0]])
    assert torch.isnan(region.project(z)[0, 0])
    assert not region.contains(region.project(z)).any()
    assert not region.contains(torch.tensor([[INF, 0.0]])).any()
    with pytest.raises(
        RegionError, match=r"torch\.float32 numbers, which torch\.float16 cannot hold"
    ):
        region.maximizer(torch.ones(1, 2, dtype=torch.float16))
    wide = region.maximizer(torch.ones(1, 2, dtype=torch.float64))
    assert torch.equal(wide, pixels(9, 10).double())


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ("0", "grid: '0' is not positive"),
        (-0.5, "grid: -0.5 is not positive"),
        ("fine", "grid: number: cannot read 'fine'"),
        (math.nan, "grid: number: nan is not finite"),
    ],
)
def test_bad_grids_are_named(grid, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ThreatModel(INF, 0.1, grid=grid)


def test_a_grid_that_the_dtype_cannot_hold_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"grid: 1/255 needs levels up to 255, torch\.bfloat16 tells 128"
    ):
        ThreatModel(INF, 1, grid="1/255").around(torch.zeros(1, 2, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"levels up to infinity.*bounded domain"):
        ThreatModel(INF, INF, 0.0, INF, grid="1/255").around(torch.zeros(1, 2))


def test_a_centre_off_the_grid_names_the_remedy() -> None:
    with pytest.raises(
        DataError, match=r"1 of 2 examples are off the grid of 1/255 \(example 1 holds 0\.3.*/ 255"
    ):
        ThreatModel(INF, 0.1, grid="1/255").around(
            torch.cat([pixels(3, 4), torch.tensor([[0.3, 1.0]])])
        )


def test_a_float_grid_is_the_ratio_that_rounds_to_it() -> None:
    assert spacing(1 / 255) == PIXEL
    assert spacing("1/255") == PIXEL
    assert spacing(2 / 255) == 2 * PIXEL
    assert spacing(0.5) == Fraction(1, 2)
    assert spacing(math.pi) == Fraction(math.pi)


# -- with networks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [(INF, "2/16"), (2.0, "0.6"), (1.0, "2")])
def test_attacks_return_members_and_bounds_hold(norm: tuple[float, str]) -> None:
    network, data = load_model("digits_standard"), load("digits")
    x, y = data.x[:30], data.y[:30]
    region = ThreatModel(norm[0], norm[1], grid="1/16").around(x)
    spec = cp.Spec.label(y, 10)
    for attack in (fgsm, partial(pgd, steps=15, restarts=2, loss="margin")):
        points = attack(network, region, spec, seeds=example_seeds(x, 0, "a"))
        assert region.contains(points).all()
        reached = spec.margin(spec.values(network(points)))
        assert (reached < spec.margin(spec.values(network(x)))).double().mean() > 0.8
        for bound in (interval, crown):
            low = spec.margin(bound(network, region, spec, dtype=torch.float64, rigorous=True))
            assert (low <= reached + 1e-4).all()


def test_an_audit_on_the_grid(tmp_path, monkeypatch, capsys) -> None:
    network, data = load_model("digits_pgd"), load("digits")
    pair = data.x[:40], data.y[:40]
    threat = ThreatModel(INF, "0.1", grid="1/16")  # one level
    result = cp.audit(network, pair, threat, run=tmp_path / "run")
    assert threat.around(pair[0]).contains(result.bracket.witness).all()
    free = cp.audit(network, pair, ThreatModel(INF, "0.1"))
    assert result.certified >= free.certified
    assert result.json()["threat"]["grid"] == "1/16"
    assert "grid" in result.identity["threat"]
    assert "on the grid of 1/16" in threat.describe()
    with pytest.raises(cp.evaluate.store.StoreMismatch, match="threat"):
        cp.audit(network, pair, ThreatModel(INF, "0.1"), run=tmp_path / "run")


def test_float64_networks_get_their_own_grid_points() -> None:
    network = load_model("digits_pgd")
    network.module.double()
    x, y = load("digits").x[:5], load("digits").y[:5]
    wide = (x * 16 / 17, y)  # on a grid that float32 rounds
    threat = ThreatModel(INF, "1/17", grid="1/17")
    assert len(cp.audit(network, (to_grid(wide[0], "1/17"), y), threat)) == 5
    with pytest.raises(DataError, match="off the grid"):
        cp.audit(network, (wide[0] + 1e-3, y), threat)


def run(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["calipers", *arguments])
    try:
        main()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    return (code, *capsys.readouterr())


def test_the_command_line_takes_a_grid(tmp_path, monkeypatch, capsys) -> None:
    file = str(tmp_path / "a.json")
    code, out, _ = run(
        monkeypatch, capsys, "audit", "--samples", "20", "--grid", "1/16", "--json", file
    )
    assert code == 0
    assert "on the grid of 1/16" in out
    assert json.loads(Path(file).read_text())["threat"]["grid"] == "1/16"
    code, out, _ = run(monkeypatch, capsys, "explain", "--grid", "1/16")
    assert code == 0
    for bad, message in (("1/255", "off the grid of 1/255"), ("0", "'0' is not positive")):
        code, _, err = run(monkeypatch, capsys, "audit", "--samples", "20", "--grid", bad)
        assert code == 2
        assert message in err
        assert "Traceback" not in err


# -- planted faults -------------------------------------------------------------------------------------


def float_radius(self: grids.Levels, x: Tensor) -> Tensor:
    """Membership by the floats' own distances."""
    levels = grids._position(x, self.grid).round().long()
    on = (self.values(levels).double() == x.double()).flatten(1).all(1)
    gap = (x.double() - self.values(self.center).double()).flatten(1)
    eps = (
        self.budget.double() ** (1 / self.p) if self.p != INF else (self.upper - self.center).amax()
    )
    return on & (torch.linalg.vector_norm(gap, ord=self.p, dim=1) <= eps * float(self.grid))


def off_by_one(self: grids.Levels, x: Tensor) -> Tensor:
    return TRUE_CONTAINS(self, x) | TRUE_CONTAINS(self, x - float(self.grid))


def plain_rounding(self: grids.Levels, x: Tensor) -> Tensor:
    """Forgets the ball."""
    levels = grids._position(x, self.grid).round().long()
    return torch.minimum(torch.maximum(levels, self.lower), self.upper)


def overspent(
    self: grids.Levels, length: Tensor, gain: Tensor, cap: Tensor, budget: Tensor
) -> Tensor:
    return TRUE_FILL(self, length, gain, cap, budget + 1)


def narrow_radius(self: grids.Levels) -> Tensor:
    """Without the rounding of the stored numbers."""
    return self.budget.double() ** (1 / self.p) * float(self.grid)


TRUE_CONTAINS, TRUE_FILL = grids.Levels.contains, grids.Levels._fill


def check_many() -> None:
    generator = np.random.default_rng(1)
    for seed in range(60):
        center = generator.integers(0, 256, 3).tolist()
        p = float(generator.choice([1, 2, INF]))
        eps = PIXEL * Fraction(int(generator.integers(0, 16)), 4)
        case = (center, p, eps, PIXEL, torch.float32, seed)
        check_members(case)
        check_points(case)


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("contains", float_radius),
        ("contains", off_by_one),
        ("snap", plain_rounding),
        ("_fill", overspent),
        ("radius", narrow_radius),
    ],
)
def test_planted_faults_are_caught(name: str, fault, monkeypatch) -> None:
    monkeypatch.setattr(grids.Levels, name, fault)
    with pytest.raises(AssertionError):
        check_many()
