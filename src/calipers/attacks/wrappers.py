"""Models that resist gradients by accident, as models that can be attacked: rounding, randomness, several networks.

Each returns a plain callable from inputs (B, *x) to outputs (B, K). A point found through a wrapper counts only once
`calipers.witness` has confirmed it on the model itself.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from calipers.attacks.search import Model

Transform = Callable[[Tensor], Tensor]


def straight_through(f: Transform, surrogate: Transform | None = None) -> Transform:
    """The values of ``f``, exactly, with the gradient of ``surrogate`` (the identity if not given).

    For a preprocessing step that has no useful gradient, such as rounding, JPEG or a call out of torch: attack
    ``lambda x: net(straight_through(f)(x))``. ``f`` may be anything that maps a tensor to one of the shape that the
    surrogate gives.

    Raises:
        ValueError: when called, if the shapes differ.

    Cost: one evaluation of ``f``, and one of the surrogate.
    Reference: Athalye, Carlini and Wagner 2018, section 4.1 (BPDA); Bengio et al. 2013.
    """

    def forward(x: Tensor) -> Tensor:
        with torch.no_grad():
            value = f(x.detach())
        smooth = x if surrogate is None else surrogate(x)
        if value.shape != smooth.shape:
            raise ValueError(
                f"straight_through: f gives shape {tuple(value.shape)}, its surrogate {tuple(smooth.shape)}; "
                "pass a surrogate whose outputs have the shape of f's"
            )
        return value + (smooth - smooth.detach())  # adds an exact zero that carries the gradient

    return forward


def expectation(model: Model, samples: int, seed: int) -> Model:
    """The mean output of a randomised model over ``samples`` draws, and the gradient of that mean.

        x ↦ 1/n Σ_i model(x; random numbers of seed + i)

    Every call sees the same draws, so it is a function, and attacks on it are reproducible; what an attack finds may be
    fitted to those draws, so judge it with another seed. Randomness must come from torch's generators, which are
    left as they were. What an example draws depends on its place in the batch, as in the model itself.

    Raises:
        ValueError: ``samples`` is less than 1.

    Cost: ``samples`` passes for each pass.
    Reference: Athalye, Carlini and Wagner 2018, section 4.2; Athalye et al. 2018 (EOT).
    """
    if samples < 1:
        raise ValueError(f"samples: {samples} must be at least 1")

    def forward(x: Tensor) -> Tensor:
        with torch.random.fork_rng(devices=[x.device] if x.device.type == "cuda" else []):
            total = _drawn(model, x, seed)
            for draw in range(1, samples):
                total = total + _drawn(model, x, seed + draw)
        return total / samples

    return forward


def _drawn(model: Model, x: Tensor, seed: int) -> Tensor:
    torch.default_generator.manual_seed(seed)
    if x.is_cuda:
        with torch.cuda.device(x.device):
            torch.cuda.manual_seed(seed)
    return model(x)


def ensemble(*models: Model) -> Model:
    """The mean output of several models, and the gradient of that mean: one point that is to fool all of them.

    For a defence that chooses among its networks, and for points that transfer to a network out of reach.

    Raises:
        ValueError: no model is given.

    Cost: one pass of each model.
    Reference: Liu et al. 2017; Athalye, Carlini and Wagner 2018, section 5.3.
    """
    if not models:
        raise ValueError("models: an ensemble needs at least one")

    def forward(x: Tensor) -> Tensor:
        return torch.stack([model(x) for model in models]).mean(0)

    return forward
