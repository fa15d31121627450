"""The loss and the margin of one example on a plane through it: the gradient's signs against random ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from calipers.attacks.losses import cross_entropy
from calipers.spec import Spec


@dataclass(frozen=True, eq=False)
class Surface:
    """Values at x + a·sign(g) + b·sign(r), (n, n): a (the gradient's signs) along the first axis, b along the second.

    Args:
        loss, margin: the cross-entropy and the margin there.
        steps: (n,) how far along each direction, in units of the input.
    """

    loss: Tensor
    margin: Tensor
    steps: Tensor

    @property
    def middle(self) -> int:
        """Where the example itself is on both axes."""
        return len(self.steps) // 2

    @property
    def rise(self) -> float:
        """The largest loss on the plane less the example's own."""
        return _rise(self.loss, self.loss[self.middle, self.middle])

    @property
    def steep(self) -> float:
        """The same on the line along the gradient's signs: no small number where the loss is flat."""
        return _rise(self.loss[:, self.middle], self.loss[self.middle, self.middle])

    @property
    def random(self) -> float:
        """The same on the line along the random signs."""
        return _rise(self.loss[self.middle], self.loss[self.middle, self.middle])


def _rise(values: Tensor, own: Tensor) -> float:
    return float(values.max() - own)


@torch.no_grad()
def surface(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    spec: Spec,
    eps: float,
    *,
    seed: int = 0,
    size: int = 41,
    direction: Tensor | None = None,
) -> Surface:
    """The surface around the example ``x`` (1, *x), |a|, |b| <= eps: g is the gradient of the cross-entropy at the
    example, r is random. Points may leave the input domain.

    Args:
        spec: of one row.
        direction: (*x), in the place of the random signs.
        size: points along each axis; odd, so that the example is one of them.

    Raises:
        ValueError: ``size`` is even, or ``eps`` is not positive.

    Cost: size² forward passes and a backward pass.
    Reference: Kolter and Madry, chapter 4.
    """
    if size % 2 == 0:
        raise ValueError(f"size: {size} is even, so the example itself is not on the grid")
    if not eps > 0:
        raise ValueError(f"eps: {eps} is no distance; give a positive number")
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        loss = cross_entropy(spec.values(model(leaf)), spec).sum()
        (gradient,) = torch.autograd.grad(loss, leaf)
    steep, generator = gradient[0].sign(), torch.Generator().manual_seed(seed)
    drawn = torch.randn(x.shape[1:], generator=generator).sign()
    other = (drawn if direction is None else direction).to(x)
    steps = torch.linspace(-eps, eps, size, dtype=x.dtype, device=x.device)
    steps[size // 2] = 0
    spread = steps.view(-1, *[1] * (x.ndim - 1))
    repeated = spec[torch.zeros(size, dtype=torch.int64)]
    outputs = [model(x + a * steep + spread * other) for a in steps]
    losses = [cross_entropy(repeated.values(y), repeated) for y in outputs]
    margins = [repeated.margin_at(y) for y in outputs]
    return Surface(torch.stack(losses), torch.stack(margins), steps)
