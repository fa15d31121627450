"""Wrappers: exact values, the intended gradients, and reproducible randomness."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from attack_checks import K, batch, margins, network
from calipers import Spec, ThreatModel, ensemble, expectation, pgd, straight_through

INF = float("inf")


def gradient(f: object, x: Tensor) -> Tensor:
    point = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(f(point).sum(), point)  # type: ignore[operator]
    return g


def test_straight_through_has_the_values_of_f_bit_for_bit_and_the_gradient_of_its_surrogate() -> (
    None
):
    x = torch.randn(50, 7) * 10.0 ** torch.arange(-3.0, 4.0)
    for f in (torch.round, lambda z: (z * 1e-3).floor(), lambda z: torch.tensor(z.numpy() ** 2)):
        assert torch.equal(straight_through(f)(x), f(x))
        torch.testing.assert_close(gradient(straight_through(f), x), torch.ones_like(x))
    assert torch.equal(gradient(straight_through(torch.round, torch.sin), x), x.cos())
    with pytest.raises(ValueError, match=r"\(50,\).*\(50, 7\).*surrogate"):
        straight_through(lambda z: z.sum(1))(x)


def test_an_attack_through_rounding_finds_what_plain_gradients_do_not() -> None:
    net = network()
    x, _ = batch(net)
    region = ThreatModel(INF, 0.3).around(x)

    def model(z: Tensor) -> Tensor:
        return net((4 * z).round() / 4)

    def through(z: Tensor) -> Tensor:
        return net(straight_through(lambda v: (4 * v).round() / 4)(z))

    with torch.no_grad():
        assert torch.equal(model(x), through(x))
        spec = Spec.label(model(x).argmax(1), K)
    plain = pgd(model, region, spec, dtype=x.dtype, loss="margin")
    better = pgd(through, region, spec, dtype=x.dtype, loss="margin")
    assert (margins(model, spec, plain) > 0).all()
    assert (margins(model, spec, better) <= 0).any()
    assert region.contains(better).all()


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + torch.randn_like(x))


def test_expectation_is_a_function_with_the_mean_as_value_and_the_means_gradient() -> None:
    x = torch.rand(5, 3)
    state = torch.get_rng_state()
    mean = expectation(Noisy(), 4, seed=9)
    first, again = mean(x), mean(x)
    assert torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), state)
    factors = []
    with torch.random.fork_rng():
        for draw in range(4):
            torch.manual_seed(9 + draw)
            factors.append(1 + torch.randn(5, 3))
    factor = torch.stack(factors).mean(0)
    torch.testing.assert_close(first, x * factor)
    torch.testing.assert_close(gradient(mean, x), factor)
    assert not torch.equal(expectation(Noisy(), 4, seed=10)(x), first)
    with pytest.raises(ValueError, match="samples: 0"):
        expectation(Noisy(), 0, seed=0)


def test_expectation_tends_to_the_mean_of_the_model() -> None:
    x = torch.ones(400, 3)
    error = expectation(Noisy(), 100, seed=0)(x) - x
    assert error.square().mean().sqrt() < 0.11  # 1 / √100


def test_an_ensemble_is_the_mean_of_its_members() -> None:
    a, b = network(seed=0), network(seed=1)
    x, _ = batch(a)
    torch.testing.assert_close(ensemble(a, b)(x), (a(x) + b(x)) / 2)
    torch.testing.assert_close(gradient(ensemble(a, b), x), (gradient(a, x) + gradient(b, x)) / 2)
    assert torch.equal(ensemble(a)(x), a(x))
    with pytest.raises(ValueError, match="at least one"):
        ensemble()
