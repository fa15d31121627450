"""How far a share measured on a sample may be from the share in the population."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable

import numpy as np

SLACK = 1e-9  # of a probability: more than the rounding of its logarithms


def clopper_pearson(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """An interval that holds the true share with at least the given confidence, whatever that share is.

    The ends solve P(X >= k | p) = α/2 and P(X <= k | p) = α/2 for X binomial: the exact (Clopper-Pearson) interval.
    It is also valid, and somewhat wide, for a sample drawn without replacement.

    Raises:
        ValueError: not 0 <= successes <= trials with trials >= 1, or a confidence outside (0, 1).
    """
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"successes: {successes} of {trials} trials is not a share")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: {confidence} is not between 0 and 1")
    tail = (1 - confidence) / 2
    n, k = trials, successes
    low = 0.0 if k == 0 else _crossing(lambda p: _probability(n, k, n, p) - tail)
    high = 1.0 if k == n else _crossing(lambda p: tail - _probability(n, 0, k, p))
    return low, high


def hypergeometric(
    successes: int, trials: int, population: int, confidence: float = 0.95
) -> tuple[float, float]:
    """An interval that holds the share of a finite population with at least the given confidence, whatever it is, when
    ``trials`` of its members were drawn without replacement.

    The shares K/population that an exact test at level α/2 on either side does not reject:
    P(X >= k | K) > α/2 and P(X <= k | K) > α/2 for X hypergeometric. Never wider than what is possible at all, and a
    point where everybody was drawn.

    Raises:
        ValueError: as `clopper_pearson`, or fewer members than trials.
    """
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"successes: {successes} of {trials} trials is not a share")
    if population < trials:
        raise ValueError(f"population: {population} has no sample of {trials}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: {confidence} is not between 0 and 1")
    tail = (1 - confidence) / 2
    N, n, k = population, trials, successes
    logs = _log_factorials(N)

    def rejected(K: int, first: int, last: int) -> bool:
        return _drawn(logs, N, n, K, first, last) <= tail * (1 - SLACK)

    low, high = k, N - (n - k)  # so many there are at least, and at most
    least = bisect.bisect_left(range(low, high), True, key=lambda K: not rejected(K, k, n))
    most = bisect.bisect_left(range(low + 1, high + 1), True, key=lambda K: rejected(K, 0, k))
    return (low + least) / N, (low + most) / N


def _drawn(
    logs: np.ndarray[tuple[int], np.dtype[np.float64]],
    N: int,
    n: int,
    K: int,
    first: int,
    last: int,
) -> float:
    """P(first <= X <= last) for X hypergeometric: n drawn of N, of which K count."""
    k = np.arange(max(first, n - (N - K), 0), min(last, n, K) + 1)
    if not len(k):
        return 0.0
    ways = logs[K] - logs[k] - logs[K - k] + logs[N - K] - logs[n - k] - logs[N - K - n + k]
    return float(np.exp(ways - (logs[N] - logs[n] - logs[N - n])).sum())


def _probability(n: int, first: int, last: int, p: float) -> float:
    """P(first <= X <= last) for X binomial(n, p), 0 < p < 1."""
    k = np.arange(first, last + 1)
    chosen = _log_factorials(n)
    logs = chosen[n] - chosen[k] - chosen[n - k] + k * math.log(p) + (n - k) * math.log1p(-p)
    return float(np.exp(logs).sum())


def _log_factorials(n: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])


def _crossing(rising: Callable[[float], float]) -> float:
    """Where a rising function on (0, 1) changes sign, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if rising(middle) < 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2
