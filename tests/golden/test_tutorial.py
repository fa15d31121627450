"""The numbers printed in a tutorial, from its own weights: Kolter and Madry, Adversarial Robustness.

Bounds and clean errors run over all 10,000 test images. Attacks on the convolutional networks take minutes there, so by
default they run on every k-th image, with the tolerance that the sample's size asks for (the tests' names say so);
with ``CALIPERS_GOLDEN=full`` they run over all images, with the published tolerance.

Attacks may be *stronger* than published, and are on the convolutional network without any defence. There float32
cross-entropy loses the label's gradient on the images whose probability rounds to 1 (29 % of them); ours keeps it. Over
all images, ours against published: FGSM .4802 (.4173; the tutorial's own lines give .4679 today in float32, and our
rate in float64), PGD .7563 (.7432), ten restarts .7755 (.7648), l2 .8109 (.7854). For this network the published
rate less the tolerance is a limit from below only.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from calipers import Network, Spec, ThreatModel, fgsm, interval, pgd, targeted
from calipers.attacks.losses import cross_entropy
from calipers.bounds import preactivations
from calipers.data import Data, load
from calipers.models import load_model
from calipers.reproduce import WEIGHTS
from calipers.seeds import seeds

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
TUTORIAL = SHARED / "tutorial"
FULL = os.environ.get("CALIPERS_GOLDEN") == "full"
INF = math.inf
BATCH = 50  # the quickest on a single core

pytestmark = pytest.mark.skipif(
    not (TUTORIAL / "published.json").is_file() or not (SHARED / "mnist").is_dir(),
    reason="the tutorial's weights and MNIST are not beside the checkout (shared/data)",
)


@cache
def published() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((TUTORIAL / "published.json").read_text())
    return found


@cache
def net(name: str) -> Network:
    return load_model(WEIGHTS[name], weights=TUTORIAL / f"{name}.pt")


@cache
def mnist() -> Data:
    return load("mnist", data_dir=SHARED / "mnist")


def linf(eps: float, *, box: bool) -> ThreatModel:
    return ThreatModel(INF, eps) if box else ThreatModel(INF, eps, -INF, INF)


def every(k: int) -> Tensor:
    """Every k-th test image; all of them in a full run."""
    return torch.arange(0, 10_000, 1 if FULL else k)


def tolerance(points: float, share: float, rows: Tensor) -> float:
    """The published tolerance over all images; two standard errors of the share over a sample, if that is more."""
    if len(rows) == 10_000:
        return points
    return max(points, 2 * math.sqrt(share * (1 - share) / len(rows)))


@torch.no_grad()
def wrong(name: str, points: Tensor, y: Tensor) -> Tensor:
    return net(name)(points).argmax(1) != y


def errors(name: str, rows: Tensor, threat: ThreatModel, attack: Callable[..., Tensor]) -> Tensor:
    """Which of the test images ``rows`` are misclassified at the attack's points."""
    found = []
    for part in rows.split(BATCH):
        x, y = mnist().x[part], mnist().y[part]
        region = threat.around(x)
        points = attack(net(name), region, Spec.label(y, 10), seeds=seeds(x, 0, "golden"))
        assert region.contains(points).all()
        found.append(wrong(name, points, y))
    return torch.cat(found)


def rate(mask: Tensor) -> float:
    return mask.double().mean().item()


PGD = partial(pgd, steps=40, step_size=0.1, drop=True)  # alpha 0.01 at eps 0.1
L2 = partial(pgd, steps=40, step_size=0.05, drop=True)  # alpha 0.1 at eps 2


# -- clean errors and bounds: exact ----------------------------------------------------------------------------


@cache
@torch.no_grad()
def clean_margins(name: str) -> Tensor:
    """Of all 10,000 images."""
    margins = []
    for part in torch.arange(10_000).split(BATCH):
        y = net(name)(mnist().x[part])
        margins.append(Spec.label(mnist().y[part], 10).margin_at(y))
    return torch.cat(margins)


@pytest.mark.parametrize("name", WEIGHTS)
def test_clean_error_is_exact(name: str) -> None:
    assert int((clean_margins(name) <= 0).sum()) == round(1e4 * published()["clean_error"][name])


@torch.no_grad()
def logit_range(name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    region = linf(0.1, box=True).around(mnist().x[:1])
    boxes = preactivations(net(name), region, tight=False, dtype=dtype)
    low, high = boxes[net(name).graph.output]
    # the same range from functionals: the last layer is not merged into anything but ±1
    eye = torch.eye(10)
    spec = Spec.functional(torch.cat([eye, -eye])[None])
    ends = interval(net(name), region, spec, dtype=dtype)[0]
    torch.testing.assert_close(ends, torch.cat([low[0], -high[0]]), rtol=1e-5, atol=0)
    return low[0].double(), high[0].double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_interval_logits_of_dnn_2(dtype: torch.dtype) -> None:
    low, high = logit_range("ch3_model_dnn_2", dtype)
    printed = published()["ibp_logit_bounds_test_image_0_eps_0.1_with_box"]["ch3_model_dnn_2"]
    assert [round(v, 2) for v in low.tolist()] == printed["lower"]
    assert [round(v, 2) for v in high.tolist()] == printed["upper"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_interval_logit_0_of_the_cnn(dtype: torch.dtype) -> None:
    low, high = logit_range("ch3_model_cnn", dtype)
    printed = published()["ibp_logit_bounds_test_image_0_eps_0.1_with_box"]["ch3_model_cnn_logit_0"]
    assert [low[0].item(), high[0].item()] == pytest.approx(printed, rel=1e-6)


@pytest.mark.parametrize("options", [{}, {"dtype": torch.float64, "rigorous": True}])
@torch.no_grad()
def test_margins_with_the_last_layer_elided(options: dict[str, Any]) -> None:
    printed = published()["interval_margins_last_layer_elided_small_test_image_0_eps_0.02"]
    expected = printed["lower_bound_of_h7_minus_hj_for_j_0_to_9"]
    eye = torch.eye(10)
    assert mnist().y[0] == 7
    spec = Spec.functional((eye[7] - eye)[None])
    region = linf(0.02, box=True).around(mnist().x[:1])
    found = interval(net("ch3_model_small"), region, spec, **options)[0].tolist()
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-9)


@torch.no_grad()
def unverified(name: str, threat: ThreatModel, rows: Tensor) -> Tensor:
    """Those of ``rows`` whose interval margins are not all positive. The printed digits come from float32 without
    margins for rounding: no image is within rounding of 0 (the nearest margins are 5e-4 to 7e-3)."""
    left = []
    for part in rows.split(BATCH):
        spec = Spec.label(mnist().y[part], 10)
        lower = interval(net(name), threat.around(mnist().x[part]), spec)
        left.append(part[~(lower.amin(1) > 0)])
    return torch.cat(left)


def nested(name: str, *threats: ThreatModel) -> list[Tensor]:
    """`unverified` for threat models of which each contains the next: what is verified stays so, and a sample shows
    that the shortcut leaves nothing out."""
    left = [unverified(name, threats[0], torch.arange(10_000))]
    for threat in threats[1:]:
        left.append(unverified(name, threat, left[-1]))
        sample = torch.arange(0, 10_000, 50)
        expected = sample[torch.isin(sample, left[-1])]
        assert torch.equal(unverified(name, threat, sample), expected)
    return left


def test_interval_verified_errors_of_the_adversarially_trained_cnn_are_exact() -> None:
    printed = published()["ibp_verified_error_no_box_ch4_model_cnn_robust"]
    found = nested("ch4_model_cnn_robust", linf(5e-4, box=False), linf(1e-4, box=False))
    shares = [f"{len(rows) / 1e4:.4f}" for rows in found]
    assert shares == [f"{printed[key]:.4f}" for key in ("eps_0.0005", "eps_0.0001")]


@cache
def uncertified_robust_2() -> tuple[Tensor, Tensor]:
    without, with_box = nested("ch4_model_cnn_robust_2", linf(0.1, box=False), linf(0.1, box=True))
    return without, with_box


def test_interval_verified_errors_of_the_interval_trained_cnn_are_exact() -> None:
    printed = published()["ibp_verified_error_ch4_model_cnn_robust_2_eps_0.1"]
    shares = [f"{len(rows) / 1e4:.4f}" for rows in uncertified_robust_2()]
    assert shares == [f"{printed[key]:.4f}" for key in ("no_box", "with_box")]


# -- FGSM --------------------------------------------------------------------------------------------------------


def printed_rate(attack: str, name: str) -> float:
    value: float = published()["attack_error_no_box_linf_0.1"][attack][name]
    return value


@pytest.mark.parametrize(
    ("name", "k"), [("ch3_model_dnn_2", 1), ("ch3_model_dnn_4", 1), ("ch4_model_cnn_robust", 5)]
)
def test_fgsm_error_on_every_kth_image_is_within_five_points(name: str, k: int) -> None:
    found = rate(errors(name, every(k), linf(0.1, box=False), fgsm))
    assert abs(found - printed_rate("fgsm", name)) <= 0.05


def test_fgsm_error_of_the_cnn_on_every_tenth_image_is_that_of_the_exact_gradient() -> None:
    name, rows = "ch3_model_cnn", every(10)
    ours = errors(name, rows, linf(0.1, box=False), fgsm)
    assert rate(ours) >= printed_rate("fgsm", name) - 0.05
    # the notebook's own lines: in float64 they break what ours break, in float32 fewer, because the label's gradient is
    # lost where its probability rounds to 1
    double = net(name).in_double()
    single, exact = (lecture_fgsm(model, name, rows) for model in (net(name), double))
    assert abs(rate(ours) - rate(exact)) <= 0.002
    assert rate(single) < rate(exact)


def lecture_fgsm(model: Callable[[Tensor], Tensor], name: str, rows: Tensor) -> Tensor:
    """x + eps·sign(∇ mean cross-entropy): the wrong predictions of the network at it."""
    found = []
    for part in rows.split(BATCH):
        x, y = mnist().x[part], mnist().y[part]
        point = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(F.cross_entropy(model(point), y), point)
        found.append(wrong(name, x + 0.1 * g.sign(), y))
    return torch.cat(found)


@pytest.mark.parametrize("name", ["ch3_model_dnn_2", "ch3_model_dnn_4"])
def test_fgsm_with_the_box_is_lower_than_without(name: str) -> None:
    rows = every(2)
    within, without = (rate(errors(name, rows, linf(0.1, box=box), fgsm)) for box in (True, False))
    assert within < without - 0.1


def test_fgsm_with_the_box_is_lower_than_without_on_every_tenth_image_of_the_cnn() -> None:
    rows = every(10)
    without, within = (
        rate(errors("ch3_model_cnn", rows, linf(0.1, box=box), fgsm)) for box in (False, True)
    )
    assert within < without - 0.1


# -- PGD ---------------------------------------------------------------------------------------------------------

SIGN = "pgd_sign_alpha_0.01_40_steps_zero_start"


@pytest.mark.parametrize("name", ["ch3_model_dnn_2", "ch3_model_dnn_4"])
def test_pgd_error_on_every_third_image_is_within_a_point(name: str) -> None:
    rows = every(3)
    expected = printed_rate(SIGN, name)
    found = rate(errors(name, rows, linf(0.1, box=False), PGD))
    assert abs(found - expected) <= tolerance(0.01, expected, rows)


def test_pgd_error_of_the_cnn_on_every_thirtieth_image() -> None:
    name, rows = "ch3_model_cnn", every(30)
    expected = printed_rate(SIGN, name)
    found = rate(errors(name, rows, linf(0.1, box=False), PGD))
    room = tolerance(0.01, expected, rows)
    assert found >= expected - room
    # over all images it is 1.3 points stronger than published, see the module's docstring
    assert FULL or found <= expected + room


def test_pgd_error_of_the_interval_trained_cnn_is_within_a_point() -> None:
    """What interval bounds certify cannot be broken, so the rest is all that needs an attack."""
    name = "ch4_model_cnn_robust_2"
    rows = uncertified_robust_2()[0]
    broken = int(errors(name, rows, linf(0.1, box=False), PGD).sum())
    assert abs(broken / 1e4 - printed_rate(SIGN, name)) <= 0.01


def test_pgd_error_of_the_adversarially_trained_cnn_on_the_500_images_nearest_to_failure() -> None:
    """Of 10,000, those of the lowest margin; the other 9,500 can only add to the count."""
    name = "ch4_model_cnn_robust"
    rows = torch.arange(10_000) if FULL else clean_margins(name).argsort()[:500].sort().values
    broken = int(errors(name, rows, linf(0.1, box=False), PGD).sum())
    assert abs(broken / 1e4 - printed_rate(SIGN, name)) <= 0.01


def test_ten_random_restarts_on_every_150th_image_of_the_cnn() -> None:
    name, rows = "ch3_model_cnn", every(150)
    expected = printed_rate("pgd_10_random_restarts", name)
    attack = partial(PGD, restarts=10, random_start=True)
    found = rate(errors(name, rows, linf(0.1, box=False), attack))
    room = tolerance(0.01, expected, rows)
    assert found >= expected - room
    assert FULL or found <= expected + room  # all images: 1.1 points stronger


@pytest.mark.parametrize(
    ("name", "k"), [("ch3_model_dnn_2", 10), ("ch3_model_dnn_4", 10), ("ch3_model_cnn", 50)]
)
def test_l2_attack_with_the_box_on_every_kth_image(name: str, k: int) -> None:
    """At least as strong as the tutorial's, which rescales after clipping where we project exactly."""
    expected = published()["attack_error_with_box_l2_2.0_alpha_0.1_40_steps"][name]
    rows = every(k)
    found = rate(errors(name, rows, ThreatModel(2, 2.0), L2))
    assert found >= expected - tolerance(0.01, expected, rows)


# -- eighteen images ---------------------------------------------------------------------------------------------

OBJECTIVES = {
    "label": "to_0_objective_1_target_minus_label",
    "others": "to_0_objective_2_target_minus_sum_of_others",
}
TARGETED = "targeted_ch3_model_cnn_first_18_test_images_no_box_eps_0.2_alpha_0.01_40_steps"


def towards(target: int, objective: str) -> tuple[int, int, int]:
    """How many of the first 18 images have another label, are fooled, hit the target."""
    x, y = mnist().x[:18], mnist().y[:18]
    x, y = x[y != target], y[y != target]
    result = targeted(
        net("ch3_model_cnn"),
        linf(0.2, box=False).around(x),
        y,
        torch.full_like(y, target),
        num_classes=10,
        objective=objective,
        attack=partial(pgd, steps=40, step_size=0.05),
    )
    assert linf(0.2, box=False).around(x).contains(result.points).all()
    return len(y), int(result.fooled.sum()), int(result.hit.sum())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_targeted_counts(objective: str) -> None:
    printed = published()[TARGETED][OBJECTIVES[objective]]
    count, fooled, hit = towards(0, objective)
    assert count == printed["of"]
    assert abs(fooled - printed["fooled"]) <= 1
    assert abs(hit - printed["hit_target"]) <= 1


def test_everything_can_be_made_a_two() -> None:
    assert towards(2, "label") == (17, 17, 17)


def test_plain_gradient_steps_need_an_enormous_step() -> None:
    printed = published()["plain_gradient_pgd_ch3_model_cnn"]
    x, y = mnist().x[:18], mnist().y[:18]
    points = pgd(
        net("ch3_model_cnn"),
        linf(printed["eps"], box=False).around(x),
        Spec.label(y, 10),
        steps=printed["steps"],
        step_size=printed["alpha"],
        direction="gradient",
        drop=True,
    )
    assert abs(int(wrong("ch3_model_cnn", points, y).sum()) - printed["wrong_of_18"]) <= 1


def test_the_gradient_at_zero_is_tiny() -> None:
    printed = published()["plain_gradient_pgd_ch3_model_cnn"]
    x = mnist().x[:100].clone().requires_grad_()
    spec = Spec.label(mnist().y[:100], 10)
    mean = cross_entropy(spec.values(net("ch3_model_cnn")(x)), spec).mean()
    (g,) = torch.autograd.grad(mean, x)
    expected = printed["mean_abs_gradient_at_zero_of_the_mean_loss_first_100"]
    assert float(f"{g.abs().mean().item():.2e}") == expected
