"""How much memory bounds take: an estimate before running, and smaller parts where it did not fit after all.

A batch is cut so that its values, their intervals and relaxations stay within the limit; the rows of backward passes
are cut on their own (`State.budget`). Results do not depend on the cuts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from calipers.bounds.state import DEFAULT_MEMORY
from calipers.errors import MemoryLimit
from calipers.graph.graph import Network

T = TypeVar("T")
PER_VALUE = 8  # numbers kept per element: both ends, reference, width, the two lines
PASSING = 8  # numbers in flight per element of the widest value
# the last two are oneDNN's, which does not say why; nothing else makes it fail on a shape that has run
PHRASES = (
    "out of memory",
    "not enough memory",
    "can't allocate",
    "bad_alloc",
    "could not create a primitive",
    "could not execute a primitive",
)


def row_bytes(network: Network, dtype: torch.dtype) -> int:
    """Working memory of one backward row: its widest value, a few times over."""
    return 6 * dtype.itemsize * network.sizes[1]


def example_bytes(network: Network, rows: int, dtype: torch.dtype) -> int:
    """Working memory of one example, roughly and from above, without gradients: what is kept of every value that
    depends on the input, what is in flight at the widest one, and ``rows`` functionals of the output."""
    all_values, widest, last = network.sizes
    return dtype.itemsize * (PER_VALUE * all_values + PASSING * widest + 4 * rows * last)


def examples(network: Network, rows: int, memory: int | None, dtype: torch.dtype) -> int:
    """How many examples to take at a time; the other half of the limit is for the rows of backward passes."""
    limit = (memory or DEFAULT_MEMORY) // 2
    return max(1, limit // example_bytes(network, rows, dtype))


def in_parts(
    run: Callable[[slice, int], T],
    count: int,
    *,
    size: int,
    memory: int | None,
    least: int = 1,
) -> list[T]:
    """``run(rows, memory)`` over ``count`` examples, ``size`` at a time.

    Where memory runs out, both the size and the memory to plan for are halved, and the same examples are tried again.

    Args:
        least: there is no point in planning for fewer bytes than this.

    Raises:
        MemoryLimit: a single example does not fit.
    """
    parts: list[T] = []
    first, size, limit = 0, max(1, min(size, count)), memory or DEFAULT_MEMORY
    while first < count or not parts:
        try:
            parts.append(run(slice(first, min(first + size, count)), limit))
            first += size
            continue
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            if size == 1 and limit <= least:
                reason = str(error).strip() or type(error).__name__
                raise MemoryLimit(
                    f"bounds of a single example do not fit into memory ({reason.splitlines()[0][:200]}); "
                    "use a machine with more, or a bound that needs less (interval)"
                ) from None
        # outside the handler, so that the failed attempt's tensors are free by now
        size, limit = max(1, size // 2), max(min(least, limit), limit // 2)
    return parts


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, by whichever allocator."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(phrase in text for phrase in PHRASES)
