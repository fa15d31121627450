"""Bad models, labels, sets and interruptions: every attack refuses them by name, or claims nothing."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from attack_checks import EPS, NORMS, K, batch, margins, network
from calipers import (
    Spec,
    ThreatModel,
    Verdict,
    apgd,
    attack,
    auto,
    fgsm,
    pgd,
    square,
    targeted,
    witness,
)
from calipers.attacks.inputs import input_gradient, outputs_of, traced
from calipers.errors import DataError, ModelError
from calipers.seeds import seeds
from sandwiches import QUICK

INF = math.inf
ATTACKS = {"fgsm": fgsm, "pgd": pgd, "apgd": apgd, "auto": auto, "square": square}
NET = network()
X, Y = batch(NET)
THREAT = ThreatModel(INF, 0.15)
REGION, SPEC, SEEDS = THREAT.around(X), Spec.label(Y, K), seeds(X, 0, "t")
each_attack = pytest.mark.parametrize("method", QUICK.values(), ids=QUICK)
SQUARE = QUICK["square"]


def run(
    method: Callable[..., Tensor], model: Callable[[Tensor], Tensor], refused: str = ""
) -> Tensor:
    """The attack itself and the one-line call find members of the set, if the latter does not refuse the model."""
    points = method(model, REGION, SPEC, dtype=X.dtype, seeds=SEEDS)
    if refused:
        with pytest.raises(ModelError, match=refused):
            attack(model, X, Y, THREAT, method=method)
    else:
        points = attack(model, X, Y, THREAT, method=method)
    assert points.shape == X.shape
    assert REGION.contains(points).all()
    return points


# -- models --------------------------------------------------------------------------------------------


@each_attack
def test_nan_outputs_are_never_a_success(method: Callable[..., Tensor]) -> None:
    points = run(method, lambda x: NET(x) * math.nan, "NaN or infinite on 12 of 12")
    found = witness(lambda x: NET(x) * math.nan, REGION, SPEC, points)
    assert (found.upper == INF).all()
    assert set(found.verdict()) == {Verdict.UNKNOWN}


@each_attack
def test_nan_for_some_examples_leaves_the_others_their_attack(
    method: Callable[..., Tensor],
) -> None:
    def model(x: Tensor) -> Tensor:
        sick = torch.cdist(x, X[::2], p=INF).amin(1) < 0.16
        return torch.where(sick[:, None], math.nan, NET(x))

    points = run(method, model, r"NaN or infinite on \d of 12")
    well = torch.isfinite(margins(model, SPEC, X))
    assert 0 < well.sum() < len(X)
    usual = method(NET, REGION, SPEC, dtype=X.dtype, seeds=SEEDS)
    torch.testing.assert_close(points[well], usual[well])


@pytest.mark.parametrize("name", ["pgd", "apgd", "auto", "square"])
def test_nan_on_the_way_is_no_better_than_the_start(name: str) -> None:
    def model(x: Tensor) -> Tensor:
        y = NET(x)
        far = (x - X).abs().amax(1) > 0.05 if len(x) == len(X) else (x.sum(1) > 6)
        return torch.where(far[:, None], math.nan, y)

    points = ATTACKS[name](model, REGION, SPEC, dtype=X.dtype, seeds=SEEDS)
    assert REGION.contains(points).all()
    found, start = margins(NET, SPEC, points), margins(NET, SPEC, X)
    assert (found <= start).all()


@each_attack
def test_infinite_outputs_crash_nothing(method: Callable[..., Tensor]) -> None:
    run(method, lambda x: NET(x) / 0, "NaN or infinite")


def test_probabilities_do_not_stop_attacks_on_the_margin() -> None:
    for method in (QUICK[name] for name in ("apgd", "auto", "square")):
        broken = margins(NET, SPEC, run(method, lambda x: NET(x).softmax(1), "probabilities")) <= 0
        assert broken.sum() >= (margins(NET, SPEC, run(method, NET)) <= 0).sum() - 1


@each_attack
def test_layers_in_training_mode_are_refused_and_left_as_they_are(
    method: Callable[..., Tensor],
) -> None:
    model = nn.Sequential(NET, nn.Dropout(0.5))
    with pytest.raises(ModelError, match=r"1 in training mode; call \.eval\(\)"):
        attack(model, X, Y, THREAT, method=method)
    assert model.training


def test_only_the_black_box_works_without_gradients() -> None:
    for model in (lambda x: NET(x).detach(), lambda x: torch.from_numpy(NET(x).detach().numpy())):
        torch.testing.assert_close(run(SQUARE, model), run(SQUARE, NET))


@pytest.mark.parametrize(
    ("y", "message"),
    [
        ((torch.zeros(3, K), 0), "returns tuple, not a tensor"),
        ({"logits": 0}, "returns dict"),
        (None, "returns NoneType"),
        (torch.zeros(3, K - 1), rf"shape \(3, {K - 1}\).*shape \(3, {K}\), a row of {K}"),
        (torch.zeros(2, K), rf"shape \(2, {K}\)"),
        (torch.zeros(3), r"shape \(3,\)"),
        (torch.zeros(3, 1, K), rf"shape \(3, 1, {K}\)"),
        (torch.zeros(3, K, dtype=torch.int64), r"torch\.int64"),
    ],
)
def test_what_is_no_row_of_outputs_per_example_is_named(y: object, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        outputs_of(y, SPEC[:3], 3)


def test_outputs_that_fit_pass_through() -> None:
    y = torch.zeros(3, K)
    assert outputs_of(y, SPEC[:3], 3) is y


@pytest.mark.parametrize(
    "model",
    [
        lambda x: NET(x).detach(),
        lambda x: torch.from_numpy(NET(x).numpy()),
        lambda x: NET(x.detach()),  # depends on parameters alone
        lambda x: NET(torch.from_numpy(x.detach().numpy())),
        lambda x: NET(torch.heaviside(x - 0.5, x)),
        lambda x: NET(torch.special.zeta(x + 2, x + 1)),
    ],
)
def test_models_without_a_gradient_are_named_and_the_black_box_offered(
    model: Callable[[Tensor], Tensor],
) -> None:
    point = X.clone().requires_grad_()
    with pytest.raises(ModelError, match=r"no gradient in the inputs.*calipers\.square"):
        input_gradient(traced(model, point, SPEC), point, torch.ones(len(X), K))


def test_gradients_and_other_errors_pass_through() -> None:
    point = X.clone().requires_grad_()
    toward = torch.rand(len(X), K, dtype=X.dtype)
    gradient = input_gradient(traced(NET, point, SPEC), point, toward)
    (expected,) = torch.autograd.grad((NET(point) * toward).sum(), point)
    torch.testing.assert_close(gradient, expected)
    with pytest.raises(RuntimeError, match="mat1"):
        traced(lambda x: NET(x[:, 1:]), point, SPEC)


# -- labels and targets --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (Y + K, rf"y: labels .* are outside 0\.\.{K - 1}, the classes of the model's {K} outputs"),
        (Y - K, "are outside"),
        (Y.double(), "vector of integers, not torch.float64"),
        (Y.unsqueeze(1), r"of shape \(12, 1\)"),
        (Y > 0, "torch.bool"),
    ],
)
def test_labels_that_are_no_classes_are_refused(y: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attack(NET, X, y, THREAT)
    with pytest.raises(ValueError, match=message):
        Spec.label(y, K)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (Y + K, "t: labels .* are outside"),
        (Y[:3], "t: 3 targets for 12 labels"),
        (Y.double(), "t: labels must be a vector of integers"),
    ],
)
def test_targets_that_are_no_classes_are_refused(target: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        targeted(NET, REGION, Y, target, num_classes=K)


def test_clauses_that_do_not_exist_are_refused() -> None:
    for target in (K - 1, -1):
        with pytest.raises(ValueError, match=rf"target: clauses must be in 0\.\.{K - 2}"):
            apgd(NET, REGION, SPEC, target=torch.full_like(Y, target), dtype=X.dtype)


# -- sets ------------------------------------------------------------------------------------------------


@each_attack
@pytest.mark.parametrize("p", NORMS)
def test_a_radius_of_0_gives_the_example_back(method: Callable[..., Tensor], p: float) -> None:
    threat = ThreatModel(p, 0.0)
    points = attack(NET, X, Y, threat, method=method)
    assert torch.equal(points, X)
    with torch.no_grad():
        wrong = (NET(X).argmax(1) + 1) % K
    found = witness(NET, threat.around(X), Spec.label(wrong, K), points)
    assert found.accuracy()[1] == 0  # and an example that is wrong is broken by no change at all


@each_attack
@pytest.mark.parametrize("p", NORMS)
def test_a_mask_that_frees_nothing_gives_the_example_back(
    method: Callable[..., Tensor], p: float
) -> None:
    frozen = ThreatModel(p, EPS[p], mask=torch.zeros(X.shape[1], dtype=torch.bool))
    assert torch.equal(attack(NET, X, Y, frozen, method=method), X)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(3, dtype=torch.bool), r"mask: shape \(3,\) does not broadcast.*\(10,\)"),
        (torch.ones(len(X), 10, dtype=torch.bool), r"mask: shape \(12, 10\) does not broadcast"),
        (torch.ones(10), "mask: dtype torch.float32 is not bool"),
    ],
)
def test_masks_that_do_not_fit_are_refused(mask: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attack(NET, X, Y, ThreatModel(INF, 0.1, mask=mask))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        ((10 * X).long(), "torch.int64 is not floating point"),
        (3 * X, "outside the input domain"),
        (X * math.nan, "12 of 12 examples contain NaN"),
    ],
)
def test_inputs_outside_the_domain_are_refused(x: Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        attack(NET, x, Y, THREAT)


@each_attack
def test_no_examples_give_no_points(method: Callable[..., Tensor]) -> None:
    assert attack(NET, X[:0], Y[:0], THREAT, method=method).shape == (0, 10)


@each_attack
@pytest.mark.parametrize(
    "model",
    [
        lambda x: (NET(x), x),
        lambda x: None,
        lambda x: NET(x)[:, 0],
        lambda x: NET(x).unsqueeze(1),
        lambda x: NET(x).argmax(1),
    ],
)
def test_what_is_no_classifier_is_refused(
    method: Callable[..., Tensor], model: Callable[[Tensor], Tensor]
) -> None:
    with pytest.raises(ModelError, match="model: "):
        method(model, REGION, SPEC, dtype=X.dtype, seeds=SEEDS)
    with pytest.raises(ModelError, match="model: "):
        attack(model, X, Y, THREAT, method=method)


@each_attack
@pytest.mark.parametrize("model", [lambda x: NET(x)[:, :-1], lambda x: NET(x)[:-1]])
def test_outputs_that_do_not_fit_the_specification_are_refused(
    method: Callable[..., Tensor], model: Callable[[Tensor], Tensor]
) -> None:
    with pytest.raises(ModelError, match=r"a row of 4 for each example"):
        method(model, REGION, SPEC, dtype=X.dtype, seeds=SEEDS)


@pytest.mark.parametrize("name", ["fgsm", "pgd", "apgd", "auto"])
@pytest.mark.parametrize(
    "model", [lambda x: NET(x).detach(), lambda x: torch.from_numpy(NET(x).numpy())]
)
def test_gradient_attacks_without_gradients_name_the_black_box(
    name: str, model: Callable[[Tensor], Tensor]
) -> None:
    with pytest.raises(ModelError, match=r"calipers\.square"):
        attack(model, X, Y, THREAT, method=ATTACKS[name])


def test_counts_that_differ_are_refused() -> None:
    for y in (Y[:3], Y.repeat(2)):
        with pytest.raises(ValueError, match=rf"y: {len(y)} labels for {len(X)} examples"):
            attack(NET, X, y, THREAT)
    for target in (Y[:3], Y.double()):
        with pytest.raises(ValueError, match=r"target: .* is not one clause for each"):
            apgd(NET, REGION, SPEC, target=target, dtype=X.dtype)
    with pytest.raises(ValueError, match="12 of 12 targets equal their label"):
        targeted(NET, REGION, Y, Y, num_classes=K)


def test_ctrl_c_keeps_what_the_cascade_found_so_far() -> None:
    """`attack` returns it; `auto`, which an audit would take for complete, does not."""
    calls = 0

    def model(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt
        y: Tensor = NET(x)
        return y

    points = attack(model, X, Y, THREAT)
    assert calls == 5
    assert THREAT.around(X).contains(points).all()
    calls = 0
    with pytest.raises(KeyboardInterrupt):
        attack(model, X, Y, THREAT, method=auto)


# -- interruptions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fgsm", "pgd", "apgd", "square"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_attack_leaves_everything_as_it_was(
    name: str, error: type[BaseException]
) -> None:
    net = network()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    calls = 0

    def model(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == (1 if name == "fgsm" else 4):
            raise error("stop")
        y: Tensor = net(x)
        return y

    x = X.clone()
    with pytest.raises(error, match="stop"):
        ATTACKS[name](model, REGION, SPEC, dtype=X.dtype, seeds=SEEDS)
    assert torch.is_grad_enabled()
    assert torch.equal(x, X)
    for key, parameter in net.named_parameters():
        assert parameter.requires_grad
        assert parameter.grad is None
        assert torch.equal(parameter, before[key])


OTHER = torch.float32 if X.dtype == torch.float64 else torch.float64
MISTAKES: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "numpy inputs": (lambda: attack(NET, X.numpy(), Y, THREAT), DataError, "as_tensor"),  # type: ignore[arg-type]
    "a list of labels": (lambda: attack(NET, X, Y.tolist(), THREAT), ValueError, "y: list"),  # type: ignore[arg-type]
    "another dtype": (lambda: attack(NET, X.to(OTHER), Y, THREAT), ModelError, "does not take"),
    "too few specifications": (
        lambda: fgsm(NET, THREAT.around(X), Spec.label(Y[:2], K)), ValueError, "2 specifications for",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_common_mistakes_are_named(mistake: str) -> None:
    call, error, message = MISTAKES[mistake]
    with pytest.raises(error, match=message):
        call()


def test_gradients_are_there_inside_of_no_grad(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in searches, which run so; also where torch has not loaded what compares shapes."""
    point, toward = X.clone().requires_grad_(), torch.ones(len(X), K, dtype=X.dtype)
    expected = input_gradient(traced(NET, point, SPEC), point, toward)
    monkeypatch.delitem(sys.modules, "torch.fx.experimental.symbolic_shapes", raising=False)
    y = traced(NET, point, SPEC)
    with torch.no_grad():
        assert torch.equal(input_gradient(y, point, toward), expected)
