"""Square: forward passes alone, strictly inside, near the optimum of affine models, the same in any batch."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import attack_checks as checks
import geometry
from attack_checks import EPS, INF, NORMS, K, N, batch, margins, network
from calipers import Region, Spec, ThreatModel, from_numpy, pgd, square, witness
from calipers.attacks.windows import Layout, mix, random_words, unit_of
from calipers.data import load
from calipers.errors import ModelError, RegionError
from calipers.models import load_model
from calipers.seeds import seeds

F64 = torch.float64
SHORT = partial(square, queries=150)
SHAPES = [(10,), (2, 3, 5), (1, 4, 4), (4, 6), (3, 1, 4), (2, 2, 2, 2), (1,), (1, 1, 1)]


def affine(shape: tuple[int, ...], classes: int, count: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(classes, math.prod(shape), dtype=F64, generator=generator)
    return weight, torch.rand(count, *shape, dtype=F64, generator=generator)


# -- what every attack must do -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("p", NORMS)
def test_points_are_strictly_inside(p: float, dtype: torch.dtype) -> None:
    checks.check_membership(SHORT, p, dtype)
    checks.check_membership(partial(SHORT, drop=False, loss="cross_entropy"), p, dtype)


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("p", NORMS)
def test_results_do_not_depend_on_the_batch(p: float, drop: bool) -> None:
    checks.check_batch_independence(SHORT, p, drop=drop)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("p", NORMS)
def test_inputs_of_any_shape_in_any_order(p: float, shape: tuple[int, ...]) -> None:
    weight, x = affine(shape, 3)
    y = torch.arange(len(x)) % 3
    region, s = ThreatModel(p, EPS[p]).around(x), seeds(x, 0, "test")

    def run(rows: Tensor) -> Tensor:
        spec = Spec.label(y[rows], 3)
        return SHORT(
            lambda z: z.flatten(1) @ weight.T, region[rows], spec, dtype=F64, seeds=s[rows]
        )

    rows = torch.arange(len(x))
    points = run(rows)
    assert points.shape == x.shape
    assert region.contains(points).all()
    assert (points != x).any()
    for other in (
        run(rows.flip(0)).flip(0),
        torch.cat([run(part) for part in rows.split(3)]),
    ):
        torch.testing.assert_close(other, points, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("p", NORMS)
def test_never_worse_than_the_centre(p: float) -> None:
    net = network()
    x, y = batch(net)
    spec, region = Spec.label(y, K), ThreatModel(p, 20 * EPS[p], -INF, INF).around(x)
    for queries in (1, 2, 3, 40):
        points = square(
            net, region, spec, queries=queries, dtype=F64, drop=False, seeds=seeds(x, 0, "t")
        )
        assert (margins(net, spec, points) <= margins(net, spec, x)).all()


# -- strength: closed forms ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", NORMS)
def test_affine_models_reach_the_closed_form(p: float) -> None:
    run = partial(square, queries=2000, drop=False, seeds=torch.arange(8))
    checks.check_linear_optimum(run, p, 1 + 1e-9 if p == INF else 1.05)


def sets(x: Tensor, p: float) -> dict[str, tuple[Region, Tensor, Tensor, float]]:
    """Regions with the box and radius that the oracle gets."""
    low, high = torch.linspace(-0.5, 0, N, dtype=F64), torch.linspace(1, 3, N, dtype=F64)
    mask = torch.arange(N) % 3 == 0
    frozen = (torch.where(mask, 0.0, x), torch.where(mask, 1.0, x))
    eps = EPS[p]
    found = {
        "box": (ThreatModel(p, eps).around(x), *(torch.full_like(x, v) for v in (0, 1)), eps),
        "per feature": (
            ThreatModel(p, eps, low, high).around(x),
            low.expand_as(x),
            high.expand_as(x),
            eps,
        ),
        "masked": (Region.ball(x, eps, p, *frozen), *frozen, eps),
    }
    if p == INF:
        sides = x - torch.linspace(0, 0.2, N), x + torch.linspace(0.3, 0, N)
        found["no eps"] = (Region.box(*sides), *sides, 1e9)
    return found


@pytest.mark.parametrize("p", NORMS)
def test_every_target_in_every_kind_of_box(p: float) -> None:
    """The drop of the margin is at least 1/1.25 of the best: an oracle that shares no code with the library."""
    weight, x = affine((N,), 3)
    y = (x @ weight.T).argmax(1)
    long = np.longdouble
    for name, (region, low, high, eps) in sets(x, p).items():
        t = (y + 1 + torch.arange(len(x)) % 2) % 3  # one or the other
        spec = Spec.target(y, t, 3)
        run = partial(square, queries=2000, drop=False, dtype=F64, seeds=seeds(x, 0, "t"))
        points = run(lambda z: z @ weight.T, region, spec)
        assert region.contains(points).all()
        slope = weight[t] - weight[y]
        gain = ((points - x) * slope).sum(1)
        for i in range(len(x)):
            a, c, lo, hi = (v[i].numpy().astype(long) for v in (slope, x, low, high))
            best = float((a * (geometry.furthest(a, c, long(eps), p, lo, hi) - c)).sum())
            assert best / 1.25 <= gain[i] <= best + 1e-9, (name, i)


@pytest.mark.parametrize("p", NORMS)
def test_images_are_attacked_as_strongly_as_by_gradients(p: float) -> None:
    """On the packaged digits the two robust accuracies differ by at most 3 of 60 examples."""
    net, data = load_model("digits_pgd"), load("digits")
    x, y = data.x[:60], data.y[:60]
    eps = {INF: 0.15, 2: 0.7, 1: 1.5}[p]
    spec, region = Spec.label(y, 10), ThreatModel(p, eps).around(x)
    points = square(net, region, spec, queries=1500, p_init=0.2, seeds=seeds(x, 0, "t"))
    gradient = pgd(net, region, spec, steps=100, loss="margin", drop=True)
    ours, theirs = (int((margins(net, spec, z) > 0).sum()) for z in (points, gradient))
    assert 5 < theirs < 55
    assert ours <= theirs + 3
    broken = witness(net, region, spec, points).upper <= 0
    assert int((~broken).sum()) <= ours + 1  # one may lie on the boundary to a rounding


def test_a_patch_is_found() -> None:
    """Only a 3 by 3 patch may change: the search spends its queries there."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(4, 1, 28, 28, dtype=F64, generator=generator)
    weight = torch.randn(2, 784, dtype=F64, generator=generator)
    free = torch.zeros(1, 28, 28, dtype=torch.bool)
    free[:, 20:23, 4:7] = True
    region = Region.box(torch.where(free, 0.0, x), torch.where(free, 1.0, x))
    y = torch.zeros(4, dtype=torch.long)
    slope = weight[1] - weight[0]
    points = square(
        lambda z: z.flatten(1) @ weight.T,
        region,
        Spec.label(y, 2),
        queries=400,
        drop=False,
        dtype=F64,
        seeds=seeds(x, 0, "t"),
    )
    best = region.maximizer(slope.view(1, 1, 28, 28).expand_as(x))
    gain, most = (((z - x).flatten(1) * slope).sum(1) for z in (points, best))
    assert (1.25 * gain >= most).all()
    assert torch.equal(points[:, ~free], x[:, ~free])


# -- queries -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", NORMS)
def test_only_forward_passes_and_no_more_than_asked(p: float) -> None:
    net = network()
    x, y = batch(net)
    rows: list[int] = []

    def forward(z: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        assert not z.requires_grad
        rows.append(len(z))
        return net(z)

    region = ThreatModel(p, 3 * EPS[p]).around(x)
    run = partial(square, forward, region, Spec.label(y, K), dtype=F64, seeds=seeds(x, 0, "t"))
    for queries in (1, 2, 3, 120):
        rows.clear()
        run(queries=queries, drop=False)
        assert rows == [len(x)] * queries
    run(queries=120)
    assert sum(rows[120:]) < 120 * len(x) / 2


def test_what_is_broken_at_the_centre_is_returned_as_it_is() -> None:
    net = network()
    x, y = batch(net)
    y[::2] = (y[::2] + 1) % K
    region = ThreatModel(INF, 0.1).around(x)
    points = SHORT(net, region, Spec.label(y, K), dtype=F64, seeds=seeds(x, 0, "t"))
    assert torch.equal(points[::2], x[::2])


def test_seeds_decide_and_torch_s_generator_is_left_alone() -> None:
    net = network()
    x, y = batch(net)
    region = ThreatModel(2, 0.1).around(x)
    state = torch.get_rng_state()
    first, again, other = (
        SHORT(net, region, Spec.label(y, K), dtype=F64, seeds=seeds(x, s, "t"), drop=False)
        for s in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again)
    assert (first != other).any(1).all()


# -- models that are no modules ------------------------------------------------------------------------------------


def test_a_numpy_model_gives_the_same_points() -> None:
    weight, x = affine((N,), K, 12)
    y = (x @ weight.T).argmax(1)
    region, spec = ThreatModel(2, 0.5).around(x), Spec.label(y, K)

    def plain(z: np.ndarray) -> np.ndarray:
        assert type(z) is np.ndarray
        logits = z @ weight.numpy().T
        z[:] = np.nan  # its own copy
        return logits

    run = partial(SHORT, region=region, spec=spec, dtype=F64, seeds=seeds(x, 0, "t"))
    points = run(from_numpy(plain))
    torch.testing.assert_close(points, run(lambda z: z @ weight.T))
    assert (margins(from_numpy(plain), spec, points) <= 0).any()


@pytest.mark.parametrize("p", [2, INF])
def test_a_model_that_changes_its_argument(p: float) -> None:
    net = nn.Sequential(nn.ReLU(inplace=True), network())
    x, y = batch(net)
    region = ThreatModel(p, EPS[p], -1, 1).around(x)

    def rude(z: Tensor) -> Tensor:
        y = net(z)
        z.fill_(math.nan)
        return y

    run = partial(SHORT, region=region, spec=Spec.label(y, K), dtype=F64, seeds=seeds(x, 0, "t"))
    torch.testing.assert_close(run(rude), run(lambda z: net(z.clone())))


@pytest.mark.parametrize("wrong", [lambda z: z[:, 0], lambda z: z[:1], lambda z: z > 0])
def test_wrong_numpy_outputs_are_named(wrong: object) -> None:
    with pytest.raises(ModelError, match="4 examples gave outputs of shape"):
        from_numpy(wrong)(torch.rand(4, 3))  # type: ignore[arg-type]


def test_an_onnx_file_is_attacked_in_onnxruntime(tmp_path: Path) -> None:
    import calipers

    net, data = load_model("digits_standard"), load("digits")
    calipers.save_onnx(net, tmp_path / "net.onnx")
    x, y = data.x[:30], data.y[:30]
    region, spec = ThreatModel(INF, 0.1).around(x), Spec.label(y, 10)
    model = calipers.session(tmp_path / "net.onnx")
    points = square(model, region, spec, queries=500, seeds=seeds(x, 0, "t"))
    broken = witness(net, region, spec, points, replicas=[model]).upper <= 0
    clean = witness(net, region, spec, x).upper <= 0
    assert int(broken.sum()) >= int(clean.sum()) + 10


# -- specifications and outputs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["margin", "cross_entropy"])
def test_general_specifications_are_attacked(loss: str) -> None:
    """(y0 > y1 or y0 > y2) and y3 < 0.5: at least as many are broken as by gradients."""
    net = network()
    x, _ = batch(net, 40)
    rows = torch.tensor([[1.0, -1, 0, 0], [1, 0, -1, 0], [0, 0, 0, -1]])
    spec = Spec(
        rows.expand(40, -1, -1), torch.tensor([0, 0, 0.5]).expand(40, -1), torch.tensor([0, 0, 1])
    )
    region = ThreatModel(INF, 0.1).around(x)
    points = square(net, region, spec, queries=500, loss=loss, dtype=F64, seeds=seeds(x, 0, "t"))
    gradient = pgd(net, region, spec, loss=loss, dtype=F64)
    before, ours, theirs = (margins(net, spec, z) <= 0 for z in (x, points, gradient))
    assert before.sum() < theirs.sum()
    assert theirs.sum() <= ours.sum()
    assert not (before & ~ours).any()


def test_a_tie_that_is_allowed_is_no_end() -> None:
    """y >= 0 for a network whose output is 0 at the centre: the attack goes on until y < 0."""
    x = torch.full((3, 6), 0.5)
    spec = Spec(
        torch.ones(3, 1, 1), torch.zeros(3, 1), torch.tensor([0]), strict=torch.tensor([False])
    )

    def model(z: Tensor) -> Tensor:
        return (torch.relu(z[:, :1] - 0.6) - torch.relu(z[:, 1:2] - 0.6) * 2).round(decimals=3)

    region = ThreatModel(INF, 0.3).around(x)
    points = square(model, region, spec, queries=200, seeds=torch.arange(3))
    assert spec.violated(model(points)).all()


@pytest.mark.parametrize("poison", [math.nan, INF, -INF])
def test_outputs_that_are_not_finite_never_count(poison: float) -> None:
    net = network()
    x, y = batch(net)
    spec, region = Spec.label(y, K), ThreatModel(2, 0.5).around(x)

    def broken(z: Tensor) -> Tensor:
        return torch.where((z[:, :1] - z[:, 1:2]) > 0.3, poison, net(z))

    points = SHORT(broken, region, spec, dtype=F64, seeds=seeds(x, 0, "t"))
    clean = torch.isfinite(broken(x)).all(1)
    assert clean.any()
    assert torch.isfinite(broken(points)[clean]).all()
    assert (margins(broken, spec, points) <= margins(broken, spec, x))[clean].all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"queries": 0}, "queries: 0"),
        ({"p_init": 0.0}, "p_init: 0.0"),
        ({"p_init": 1.5}, "p_init: 1.5"),
        ({"p_init": math.nan}, "p_init: nan"),
        ({"loss": "margins"}, "Did you mean 'margin'"),
        ({"seeds": None}, "one seed per example"),
        ({"seeds": torch.arange(3)}, "seeds: 3 for 12 examples"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, object], message: str) -> None:
    net = network()
    x, y = batch(net)
    region = ThreatModel(INF, 0.1).around(x)
    with pytest.raises(ValueError, match=message):
        square(
            net, region, Spec.label(y, K), **{"dtype": F64, "seeds": seeds(x, 0, "t"), **options}
        )  # type: ignore[arg-type]


def test_an_unbounded_region_is_refused() -> None:
    x = torch.rand(2, 3)
    region = Region.box(x - 1, x + INF)
    with pytest.raises(RegionError, match="square: the region is unbounded"):
        square(lambda z: z, region, Spec.label(torch.tensor([0, 1]), 3), seeds=torch.arange(2))


# -- parts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_windows_are_distinct_features_around_their_anchor(shape: tuple[int, ...]) -> None:
    layout, n = Layout.of(torch.Size(shape), torch.device("cpu")), math.prod(shape)
    anchors = torch.arange(n).repeat(5)
    words = random_words(torch.arange(len(anchors)), 3, 1)[0]
    for share in (1.0, 0.4, 1e-6):
        size = layout.size(share)
        window = layout.window(size, anchors, words[:, :2])
        assert ((window >= 0) & (window < n)).all()
        assert all(len(set(row)) == len(row) for row in window.tolist())
        channel = n // layout.channels
        assert (window % channel == (anchors % channel).unsqueeze(1)).any(1).all()
        if not layout.vector:
            assert window.shape[1] == layout.channels * size**2
            place = window % channel
            rows, columns = place // layout.width, place % layout.width
            assert (rows.amax(1) - rows.amin(1) == size - 1).all()
            assert (columns.amax(1) - columns.amin(1) == size - 1).all()
    if layout.vector:
        assert layout.window(layout.size(1.0), anchors, words[:, :2]).shape[1] == n


def test_the_hash_is_splitmix64() -> None:
    """The published generator's numbers from seed 1234567, and uniform on the whole."""
    step = 0x9E3779B97F4A7C15
    state = torch.tensor([(1234567 + k * step + 2**63) % 2**64 - 2**63 for k in range(1, 6)])
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert [v % 2**64 for v in mix(state).tolist()] == expected
    unit = unit_of(random_words(torch.arange(50), 0, 40, 10))
    assert ((unit >= 0) & (unit < 1)).all()
    assert abs(unit.mean() - 0.5) < 0.01
    assert abs(unit.var() - 1 / 12) < 0.003
    assert len(unit.unique()) == unit.numel()
    flat = unit.flatten(0, 1)
    assert torch.corrcoef(flat.T).sub(torch.eye(10)).abs().max() < 0.1
