"""What every gradient attack is made of: a look at the network, and a record of the best points.

A *row* is one search: an example, perhaps one of several starts or targets of it. Rows of one example are its
``owner``'s; the record has one entry per owner. The working set shrinks as examples are broken.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from calipers.attacks.inputs import input_gradient, outputs_of, traced
from calipers.attacks.losses import Loss, read
from calipers.spec import Spec

Model = Callable[[Tensor], Tensor]


def required(seeds: Tensor | None, count: int, *, random: bool) -> Tensor:
    """The seeds, or zeros where nothing is random.

    Raises:
        ValueError: there are none, or not one for each example.
    """
    if seeds is None:
        if random:
            raise ValueError(
                "seeds: random starts need one seed per example (calipers.seeds.seeds)"
            )
        return torch.zeros(count, dtype=torch.int64)
    if seeds.shape != (count,):
        raise ValueError(
            f"seeds: shape {tuple(seeds.shape)} is not one for each of {count} examples"
        )
    return seeds


class Passes(Protocol):
    """Passes for one shape of inputs: the outputs, and then the derivative of ⟨toward, outputs⟩ in the inputs; both in
    memory that the next passes write to, the latter perhaps in ``room`` (as the inputs)."""

    def forward(self, x: Tensor) -> Tensor: ...

    def backward(self, toward: Tensor, room: Tensor | None = None) -> Tensor: ...


class Repeated:
    """A model during one run, which allocates its memory once if the model has ``input_passes(x)``: that gives `Passes`
    for inputs like ``x``, which then serve all looks, or None. Calls go to the model itself."""

    def __init__(self, model: Model) -> None:
        self.model, self.offer = model, getattr(model, "input_passes", None)
        self.shape: torch.Size | None = None
        self.known: Passes | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return self.model(x)

    def at(self, x: Tensor) -> Passes | None:
        """The passes for inputs like ``x``, if there are any."""
        if self.offer is not None and x.shape != self.shape:
            self.shape, self.known = x.shape, self.offer(x)
        return self.known


def repeated(model: Model) -> Repeated:
    """The model for one run; one that is already in a run stays as it is."""
    return model if isinstance(model, Repeated) else Repeated(model)


class Look(NamedTuple):
    """The input gradient of each row's own loss (R, *x), its margin and that loss (R,)."""

    gradient: Tensor
    margin: Tensor
    loss: Callable[[], Tensor]


def look(model: Model, loss: Loss, spec: Spec, x: Tensor, target: Tensor | None = None) -> Look:
    """One forward pass and one backward pass to the input.

    The loss is differentiated on the logits alone, so that the network's backward pass is the whole cost; gradients
    of parameters are neither computed nor touched.
    """
    passes = model.at(x) if isinstance(model, Repeated) else None
    if passes is None:
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            logits = traced(model, point, spec)
        said = read(loss, logits.detach(), spec, target)
        return Look(input_gradient(logits, point, said.toward), said.margin(), said.loss)
    said = read(loss, outputs_of(passes.forward(x), spec, len(x)).clone(), spec, target)
    return Look(passes.backward(said.toward).clone(), said.margin(), said.loss)


def slope(model: Model, loss: Loss, trail: Trail) -> Tensor:
    """The gradient of a `look` at ``trail.here``, whose outputs the trail notes. It may lie in the memory of the next
    point, which is ``trail.here`` then: at most one of them is needed at a time."""
    x, spec = trail.here, trail.spec
    passes = model.at(x) if isinstance(model, Repeated) else None
    if passes is None:
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            logits = traced(model, point, spec)
        outputs = logits.detach()
        trail.note(outputs)
        return input_gradient(logits, point, read(loss, outputs, spec).toward)
    outputs = outputs_of(passes.forward(x), spec, len(x))
    return passes.backward(read(loss, outputs, spec).toward, trail.note(outputs))


def calibrated(
    model: Model, x: Tensor, sizes: tuple[int, ...] = (32, 64, 128, 256, 512), seconds: float = 0.1
) -> int:
    """How many rows at a time cost least per row, by timing passes of ``x`` (B, *x) forward and back: one of ``sizes``.

    Large batches leave the cache, small ones waste calls; where the optimum lies differs by a factor of ten between
    networks. Two passes of each size, or fewer once ``seconds`` are spent. What is chosen changes results by rounding,
    so for runs that must repeat bit by bit give a number instead.
    """
    begin = time.perf_counter()
    costs: dict[int, float] = {}
    for size in sizes:
        part = x[torch.arange(size, device=x.device) % len(x)]
        for _ in range(3):  # the first one warms up
            start = time.perf_counter()
            with torch.enable_grad():
                point = part.detach().requires_grad_()
                y = model(point)
            torch.autograd.grad(y.sum(), point)
            costs[size] = (time.perf_counter() - start) / size
        if time.perf_counter() - begin > seconds:
            break
    return min(costs, key=lambda size: costs[size])


@dataclass
class Record:
    """The best point of each example so far; lower margins win, NaN never does.

    With ``first`` the first point that breaks an example stays: others decide when its rows leave the batch, so that
    what came later would depend on them.
    """

    points: Tensor
    margin: Tensor
    shared: bool = True  # with the search that handed the points over, so not to be written to
    looks: Tensor | None = None  # (B,) counts the looks at each example, if given
    queries: Tensor | None = None  # (B,) counts single forward passes
    judge: Callable[[Tensor, Tensor], Tensor] | None = (
        None  # (examples, points) -> margins to believe
    )

    @classmethod
    def at(cls, points: Tensor) -> Record:
        """No margin known yet."""
        return cls(points, points.new_full((len(points),), torch.inf))

    def update(
        self, owner: Tensor | None, points: Tensor, margin: Tensor, *, first: bool = False
    ) -> None:
        """Take over what is better. ``points`` must not be overwritten afterwards.

        Args:
            owner: (R,) in rising order, the example of each row; None: one row per example.
        """
        if self.looks is not None:
            rows = torch.arange(len(margin), device=margin.device) if owner is None else owner
            self.looks.index_add_(0, rows, torch.ones_like(rows, dtype=self.looks.dtype))
        if self.judge is not None:
            margin = self._judged(owner, points, margin)
        known = self.margin if owner is None else self.margin[owner]
        better = margin < known
        if first:
            better &= known > 0
        if owner is None and bool(better.all()):  # the usual step of an attack: nothing is copied
            self.points, self.margin, self.shared = points, margin, True
            return
        rows = torch.nonzero(better).flatten()
        if not len(rows):
            return
        target = rows
        if owner is not None:
            rows = _lowest(rows, owner, margin, self.margin)
            target = owner[rows]
        self._put(target, points.index_select(0, rows), margin.index_select(0, rows))

    def take(self, points: Tensor, margins: Tensor) -> None:
        """Take over what is better among several points of each example, as `update` would one after the other.

        Args:
            points: (k, B, *x), which may be overwritten afterwards.
            margins: (k, B).
        """
        lowest, at = torch.where(margins < torch.inf, margins, torch.inf).min(0)
        rows = torch.nonzero(lowest < self.margin).flatten()
        if not len(rows):
            return
        count = len(lowest)
        flat, chosen = points.flatten(0, 1), at[rows] * count + rows
        if len(rows) == count:
            room = None if self.shared else self.points
            self.points = torch.index_select(flat, 0, chosen, out=room)
            self.margin, self.shared = lowest, False
            return
        self._put(rows, flat.index_select(0, chosen), lowest.index_select(0, rows))

    def _put(self, examples: Tensor, points: Tensor, margin: Tensor) -> None:
        if self.shared:
            self.points, self.margin, self.shared = self.points.clone(), self.margin.clone(), False
        self.points.index_copy_(0, examples, points)
        self.margin.index_copy_(0, examples, margin)

    def _judged(self, owner: Tensor | None, points: Tensor, margin: Tensor) -> Tensor:
        """The margins of rows that look broken, by the judge: the search may run in a coarser precision."""
        doubtful = torch.nonzero(margin <= 0).flatten()
        if not len(doubtful) or self.judge is None:
            return margin
        examples = doubtful if owner is None else owner[doubtful]
        self.query(examples)
        with torch.no_grad():
            believed = self.judge(examples, points[doubtful])
        return margin.index_copy(0, doubtful, believed)

    def query(self, examples: Tensor) -> None:
        """Count one forward pass for each of ``examples``."""
        if self.queries is not None:
            self.queries.index_add_(
                0, examples, torch.ones_like(examples, dtype=self.queries.dtype)
            )

    def alive(self) -> Tensor:
        """The examples that are not broken."""
        return torch.nonzero(~(self.margin <= 0)).flatten()


TRAIL = 8  # points kept before the best are looked for
TRAIL_BYTES = 2**24  # fewer where they are large, but two


class Trail:
    """The points of a run in which no row is dropped, and what it takes to record the best of them.

    Between two passes of a network every small call costs several microseconds, and copying points costs more: so
    margins are computed, and points copied, once every few steps. What is recorded is what `Record.update` would
    have kept after every step.
    """

    def __init__(self, record: Record, spec: Spec, start: Tensor) -> None:
        size = max(start.numel() * start.element_size(), 1)
        self.points = start.new_empty((max(2, min(TRAIL, TRAIL_BYTES // size)), *start.shape))
        self.places = self.points.unbind(0)
        self.record, self.spec, self.filled = record, spec, 0
        self.outputs: Tensor | None = None
        self.here = self.places[0].copy_(start)

    def note(self, outputs: Tensor) -> Tensor:
        """Take the outputs at the point `here`; returns the place of the next point, which is `here` from now on."""
        if self.outputs is None:
            self.outputs = outputs.new_empty((len(self.points), *outputs.shape))
        self.outputs[self.filled].copy_(outputs)  # a model may use its own memory again
        self.filled += 1
        if self.filled == len(self.points):
            self.settle()
        self.here = self.places[self.filled]
        return self.here

    def settle(self) -> None:
        """Record the best of what was noted."""
        if self.outputs is None or not self.filled:
            return
        margins = self.spec.margin_at(self.outputs[: self.filled])
        self.record.take(self.points[: self.filled], margins)
        self.filled = 0


def _lowest(rows: Tensor, owner: Tensor, margin: Tensor, known: Tensor) -> Tensor:
    """Of ``rows``, for each owner the first one of lowest margin."""
    owners, values = owner[rows], margin[rows]
    lowest = known.scatter_reduce(0, owners, values, "amin")
    rows = rows[values == lowest[owners]]
    owners = owner[rows]
    fresh = torch.ones_like(owners, dtype=torch.bool)
    fresh[1:] = owners[1:] != owners[:-1]
    return rows[fresh]


@dataclass
class Rows:
    """The working set of a run: every field that has one entry per row is a tensor, a Region or a Spec.

    Subclasses add their own state; `keep` cuts all of it.
    """

    owner: Tensor | None

    def keep(self, index: Tensor) -> None:
        """Go on with these rows only."""
        if self.owner is None:
            self.owner = index
        else:
            self.owner = self.owner[index]
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name != "owner" and hasattr(value, "__getitem__"):
                setattr(self, f.name, value[index])

    def shrink(self, record: Record, margin: Tensor) -> bool:
        """Drop the rows whose example is broken; whether any is left."""
        broken = margin <= 0
        if self.owner is not None:
            broken = record.margin[self.owner] <= 0
        left = len(broken) - int(broken.sum())
        if 0 < left < len(broken):
            self.keep(torch.nonzero(~broken).flatten())
        return left > 0
