"""Work, counted: how many times an example went through the network, whatever the machine.

One unit is a *pass*: one example through the network once, forward, or backward from the outputs to the input (no
parameter gradients are formed here, so both cost about the same). A gradient step of an attack on B examples is 2·B
passes. Wrap a model with `counted`, or report work of another kind with `spend`; `counting` collects both.

A forward pass on inputs that require gradients counts one backward pass along with it, which is what gradient attacks
take; hooks that saw the backward pass itself would cost a fifth of a small network's step. Whoever takes several
gradients of one forward pass reports the others with `spend`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Model = Callable[[Tensor], Tensor]


@dataclass
class Work:
    """Passes so far, summed over examples: ``forward`` (and what was spent otherwise) and ``backward``."""

    forward: float = 0.0
    backward: float = 0.0

    @property
    def passes(self) -> float:
        return self.forward + self.backward


_CURRENT: ContextVar[Work | None] = ContextVar("calipers_work", default=None)


@contextmanager
def counting() -> Iterator[Work]:
    """Collect the work done inside, also that of inner ``counting`` blocks."""
    outer, work = _CURRENT.get(), Work()
    token = _CURRENT.set(work)
    try:
        yield work
    finally:
        _CURRENT.reset(token)
        if outer is not None:
            outer.forward += work.forward
            outer.backward += work.backward


def spend(passes: float) -> None:
    """Report work that no `counted` model sees: the forward passes that it is worth, summed over examples."""
    work = _CURRENT.get()
    if work is not None:
        work.forward += passes


class Counted:
    """A model whose passes are counted inside `counting`; everything else about it is the model's own."""

    __slots__ = ("model",)

    def __init__(self, model: Model) -> None:
        self.model = model

    def __call__(self, x: Tensor) -> Tensor:
        y = self.model(x)
        work = _CURRENT.get()
        if work is not None:
            rows = len(x)
            work.forward += rows
            if x.requires_grad and y.requires_grad:
                work.backward += rows
        return y

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def input_passes(self, x: Tensor) -> CountedPasses | None:
        """The model's passes without autograd, if it has any for inputs like ``x``, counted too."""
        offer = getattr(self.model, "input_passes", None)
        passes = None if offer is None else offer(x)
        return None if passes is None else CountedPasses(passes)


class CountedPasses:
    """Passes without autograd; a forward pass counts the backward pass that is taken for it."""

    __slots__ = ("backward", "passes")

    def __init__(self, passes: Any) -> None:
        self.passes, self.backward = passes, passes.backward

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.passes.forward(x)
        work = _CURRENT.get()
        if work is not None:
            work.forward += len(x)
            work.backward += len(x)
        return y


def counted(model: Model) -> Counted:
    """``model``, its forward and backward passes counted wherever `counting` is on."""
    return model if isinstance(model, Counted) else Counted(model)


def bare(model: Any) -> Any:
    """The model itself, without the counter."""
    return model.model if isinstance(model, Counted) else model
