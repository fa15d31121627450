"""Identities of the inner maximisation that hold exactly, or to rounding: each is one line of mathematics."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calipers import Region, Spec, ThreatModel, fgsm, pgd
from calipers.attacks.losses import cross_entropy, margin_loss

INF = math.inf
K, N, B = 5, 12, 6


def network(outputs: int = K) -> nn.Sequential:
    return nn.Sequential(nn.Linear(N, 20), nn.Tanh(), nn.Linear(20, outputs)).double()


def batch(outputs: int = K) -> tuple[Tensor, Tensor]:
    return torch.rand(B, N, dtype=torch.float64), torch.arange(B) % outputs


def loss_at(model: nn.Module, x: Tensor, y: Tensor, outputs: int = K) -> Tensor:
    spec = Spec.label(y, outputs)
    return cross_entropy(spec.values(model(x)), spec)


def input_gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """By torch's own cross-entropy, summed over the examples."""
    point = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(F.cross_entropy(model(point), y, reduction="sum"), point)
    return g


def ball(x: Tensor, p: float, eps: float, *, box: bool = False) -> Region:
    return (ThreatModel(p, eps) if box else ThreatModel(p, eps, -INF, INF)).around(x)


# -- losses ------------------------------------------------------------------------------------------------------


def test_exp_of_minus_the_loss_is_the_probability() -> None:
    model, (x, y) = network(), batch()
    probability = model(x).softmax(1).gather(1, y[:, None])[:, 0]
    torch.testing.assert_close(loss_at(model, x, y).neg().exp(), probability, rtol=1e-13, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_cross_entropy_is_torchs_per_sample(scale: float, dtype: torch.dtype) -> None:
    logits, y = (scale * torch.randn(200, K)).to(dtype), torch.arange(200) % K
    spec = Spec.label(y, K)
    ours = cross_entropy(spec.values(logits), spec)
    theirs = F.cross_entropy(logits, y, reduction="none")
    assert ours.shape == (200,)
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(ours, theirs, rtol=16 * unit, atol=16 * unit * scale)


def test_cross_entropy_keeps_what_torchs_loses_in_float32() -> None:
    """At a margin of 40 the probability rounds to 1; loss and gradient stay exact to rounding."""
    logits = torch.tensor([[40.0, 0.0, 0.0]], requires_grad=True)
    spec = Spec.label(torch.tensor([0]), 3)
    loss = cross_entropy(spec.values(logits), spec)
    (g,) = torch.autograd.grad(loss.sum(), logits)
    exact = math.log1p(2 * math.exp(-40))
    assert loss.item() == pytest.approx(exact, rel=1e-5)
    assert g[0].tolist() == pytest.approx([-exact, exact / 2, exact / 2], rel=1e-5)


def test_saturated_examples_keep_the_labels_gradient_in_the_attacks() -> None:
    """The label's probability rounds to 1; the input that only the label's logit reads must move all the same."""
    x = torch.tensor([[0.5, 0.5, 0.5]])
    spec, region = Spec.label(torch.tensor([0]), 3), ThreatModel(INF, 0.1).around(x)
    shift = torch.tensor([40.0, 0.0, 0.0])
    for attack in (fgsm, pgd):
        points = attack(lambda z: z + shift, region, spec)
        torch.testing.assert_close(points, torch.tensor([[0.4, 0.6, 0.6]]))


def test_two_logits_are_the_sigmoid() -> None:
    model, (x, y) = network(2), batch(2)
    logits = model(x)
    z = logits.gather(1, y[:, None]) - logits.gather(1, 1 - y[:, None])
    expected = torch.log(1 + torch.exp(-z[:, 0]))
    torch.testing.assert_close(loss_at(model, x, y, 2), expected, rtol=1e-13, atol=0)
    torch.testing.assert_close((-expected).exp(), z[:, 0].sigmoid(), rtol=1e-13, atol=0)


def test_the_margin_loss_is_the_negative_margin() -> None:
    model, (x, y) = network(), batch()
    logits, spec = model(x), Spec.label(y, K)
    rivals = logits.scatter(1, y[:, None], -INF).amax(1)
    expected = rivals - logits.gather(1, y[:, None])[:, 0]
    torch.testing.assert_close(margin_loss(spec.values(logits), spec), expected)


# -- gradients and first steps -------------------------------------------------------------------------------------


def test_the_gradient_at_delta_0_is_the_input_gradient() -> None:
    model, (x, y) = network(), batch()
    delta = torch.zeros_like(x, requires_grad=True)
    (g,) = torch.autograd.grad(loss_at(model, x + delta, y).sum(), delta)
    torch.testing.assert_close(g, input_gradient(model, x, y), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("alpha", [1e-3, 0.3, 50.0])
def test_the_first_plain_step_is_the_clipped_gradient(alpha: float) -> None:
    model, (x, y) = network(), batch()
    step = first_step(model, x, y, ball(x, INF, 0.1), step_size=alpha, direction="gradient")
    expected = (alpha * input_gradient(model, x, y)).clamp(-0.1, 0.1)
    torch.testing.assert_close(step, expected, rtol=1e-9, atol=1e-15)


def test_alpha_to_infinity_gives_eps_times_the_sign() -> None:
    model, (x, y) = network(), batch()
    g = input_gradient(model, x, y)
    assert (g != 0).all()
    step = first_step(model, x, y, ball(x, INF, 0.1), step_size=1e12, direction="gradient")
    torch.testing.assert_close(step, 0.1 * g.sign(), rtol=1e-12, atol=0)


def first_step(model: nn.Module, x: Tensor, y: Tensor, region: Region, **options: object) -> Tensor:
    """The change after one step; all examples must prefer it to the start, or the best-of would hide it."""
    points = pgd(model, region, Spec.label(y, K), steps=1, dtype=x.dtype, **options)  # type: ignore[arg-type]
    spec = Spec.label(y, K)
    with torch.no_grad():
        before, after = (spec.margin(spec.values(model(z))) for z in (x, points))
    assert (after < before).all(), "choose another seed"
    return points - x


@pytest.mark.parametrize(("p", "box"), [(INF, False), (INF, True), (2, False), (1, False)])
def test_fgsm_is_one_steepest_step_of_length_eps(p: float, box: bool) -> None:
    model, (x, y) = network(), batch()
    region, spec = ball(x, p, 0.05, box=box), Spec.label(y, K)
    one = first_step(model, x, y, region, step_size=1.0)
    torch.testing.assert_close(
        one, fgsm(model, region, spec, dtype=x.dtype) - x, rtol=1e-9, atol=1e-12
    )
    size = torch.linalg.vector_norm(one, ord=p, dim=1)
    assert box or torch.allclose(size, torch.full_like(size, 0.05), rtol=1e-9)


@pytest.mark.parametrize("p", [1, 2])
def test_with_a_box_fgsm_gains_at_least_what_one_projected_step_does(p: float) -> None:
    """The maximiser over ball and box is exact; stepping first and projecting then is not."""
    model, (x, y) = network(), batch()
    region, spec = ball(x, p, 0.8, box=True), Spec.label(y, K)
    g = input_gradient(model, x, y)
    step = region.project(x + 0.8 * region.steepest(g))
    best = fgsm(model, region, spec, dtype=x.dtype)
    gain = (g * (best - step)).sum(1)
    assert (gain >= -1e-12).all()
    assert (gain > 1e-3).any()


def test_the_dual_norm_is_the_gain_of_the_first_step() -> None:
    model, (x, y) = network(), batch()
    g = input_gradient(model, x, y)
    for p, q in ((INF, 1), (2, 2), (1, INF)):
        region = ball(x, p, 0.05)
        gain = (g * (fgsm(model, region, Spec.label(y, K), dtype=x.dtype) - x)).sum(1)
        dual = 0.05 * torch.linalg.vector_norm(g, ord=q, dim=1)
        torch.testing.assert_close(gain, dual, rtol=1e-9, atol=0)


# -- the outer minimisation ------------------------------------------------------------------------------------------


def test_the_gradient_at_the_maximiser_is_that_of_the_maximum() -> None:
    """Danskin: for an affine model FGSM is the exact inner maximum, so finite differences of max over the ball agree
    with the gradient at its point, held fixed."""
    x, y = batch(2)
    weight = torch.randn(2, N, dtype=torch.float64)
    spec, region = Spec.label(y, 2), ball(x, INF, 0.1)

    def worst(w: Tensor) -> tuple[Tensor, Tensor]:
        points = fgsm(lambda z: z @ w.T, region, spec, dtype=x.dtype)
        return cross_entropy(spec.values(points @ w.T), spec).sum(), points

    variable = weight.clone().requires_grad_()
    points = worst(weight)[1]
    loss = cross_entropy(spec.values(points @ variable.T), spec).sum()
    (g,) = torch.autograd.grad(loss, variable)
    for i in range(N):
        step = torch.zeros_like(weight)
        step[0, i] = 1e-6
        difference = (worst(weight + step)[0] - worst(weight - step)[0]) / 2e-6
        assert difference.item() == pytest.approx(g[0, i].item(), rel=1e-6, abs=1e-8)


# -- a convolution is a matrix -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stride", "padding", "groups"), [(1, 1, 1), (2, 1, 1), (2, 0, 2)])
def test_a_convolution_equals_its_matrix(stride: int, padding: int, groups: int) -> None:
    """Entry by entry from the definition, as a map, transposed, and inside an attack."""
    conv = nn.Conv2d(2, 4, 3, stride, padding, groups=groups).double()
    size = 6
    out = (size + 2 * padding - 3) // stride + 1
    matrix = torch.zeros(4, out, out, 2, size, size, dtype=torch.float64)
    for o in range(4):
        for c in range(2 // groups):
            channel = c + (o * groups // 4) * (2 // groups)
            for i in range(out):
                for j in range(out):
                    for a in range(3):
                        for b in range(3):
                            row, col = i * stride + a - padding, j * stride + b - padding
                            if 0 <= row < size and 0 <= col < size:
                                matrix[o, i, j, channel, row, col] = conv.weight[o, c, a, b].item()
    flat = matrix.reshape(4 * out * out, 2 * size * size)
    assert conv.bias is not None
    bias = conv.bias.detach().repeat_interleave(out * out)
    x = torch.rand(3, 2, size, size, dtype=torch.float64)
    torch.testing.assert_close(conv(x).flatten(1), x.flatten(1) @ flat.T + bias)
    back = torch.randn(3, 4, out, out, dtype=torch.float64)
    point = x.clone().requires_grad_()
    (vjp,) = torch.autograd.grad(conv(point), point, back)
    torch.testing.assert_close(vjp.flatten(1), back.flatten(1) @ flat)
    head = torch.randn(3, 4 * out * out, dtype=torch.float64)
    spec, region = Spec.label(torch.tensor([0, 1, 2]), 3), ThreatModel(2, 0.3).around(x)
    first = fgsm(lambda z: conv(z).flatten(1) @ head.T, region, spec, dtype=x.dtype)
    second = fgsm(lambda z: (z.flatten(1) @ flat.T + bias) @ head.T, region, spec, dtype=x.dtype)
    torch.testing.assert_close(first, second, rtol=1e-10, atol=1e-12)
