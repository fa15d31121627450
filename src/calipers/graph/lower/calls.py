"""What a lowering is given, and what several of them say."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from calipers.errors import CaptureError
from calipers.graph import primitives as prim
from calipers.graph.graph import Ref

aten = torch.ops.aten
Lowered = (
    tuple[Callable[..., Any], tuple[Any, ...]]
    | tuple[Callable[..., Any], tuple[Any, ...], Mapping[str, Any]]
)


@dataclass(frozen=True)
class Call:
    """One ATen call on its way into the graph."""

    args: Sequence[Any]
    shape: tuple[int, ...]  # of the output, without the batch
    rank: Callable[[Any], int]  # the rank of an argument, batch included
    shape_of: Callable[[Any], tuple[int, ...]]  # the shape of an argument, without the batch
    emit: Callable[..., Ref]  # makes a further node: emit(op, *args, shape=..., **kwargs)
    training: Callable[[bool], Any]  # the owning module's mode flag
    active: Callable[[Any], bool]  # whether an argument depends on the input
    dtype: Callable[[Any], torch.dtype]  # of an argument
    original: Callable[[], Lowered]  # the operator itself

    def arg(self, index: int, default: Any = None) -> Any:
        return self.args[index] if index < len(self.args) else default


def same(op: Callable[..., Any], count: int | None = None) -> Callable[[Call], Lowered]:
    """The op takes ATen's arguments as they are (the first ``count``)."""
    return lambda c: (op, tuple(c.args[:count]))


def dims_of(dims: Any, rank: int) -> tuple[int, ...]:
    wanted = range(rank) if dims is None else ([dims] if isinstance(dims, int) else dims)
    out = tuple(sorted(d % rank for d in wanted))
    if 0 in out:
        raise CaptureError(
            "a reduction over dimension 0 mixes the examples of a batch; reduce over features only"
        )
    return out


def done(value: Any) -> Lowered:
    """Nothing is left to do."""
    return prim.identity, (value,)


def as_it_is(c: Call) -> Lowered:
    """Without a rule: attacks run it, bounds name it."""
    return c.original()


def made(c: Call, op: Callable[..., Any], *args: Any) -> Any:
    return c.emit(op, *args, shape=c.shape)
