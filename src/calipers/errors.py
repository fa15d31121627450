"""Every error that Calipers raises on purpose.

CalipersError
├── CaptureError        a module cannot be turned into a graph
│   ├── UnsupportedOp   an operator has no description in the table
│   └── ModelTooLarge   a file declares tensors beyond the byte budget
├── ModelError          a model is not what the method needs (NaN weights, softmax outputs, ...)
├── DataError           data are missing, malformed or do not fit the model
├── SpecError           a specification is malformed
│   └── NoInputs        no input satisfies what a query says about inputs, so it has no counterexample
├── RegionError         a region is empty, malformed, or lacks an operation
├── SoundnessError      two methods contradict each other: a bug, never a property of the model
├── SolverError         an external solver failed
├── CertificateError    there is no certificate of what was proved
├── MemoryLimit         a single example does not fit into memory
├── StoreMismatch       a stored run belongs to another model, data, threat or version
├── StoreError          a run directory cannot be written: read-only, full, or in use
├── WorkerError         worker processes cannot be started
└── TrainingError       a training cannot go on (NaN, a GPU that is not there, ...)

A wrong *argument* (a negative radius, an unknown name) is a ``ValueError`` that names the argument and
its value. The command line turns both kinds into one paragraph on stderr and exit code 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CalipersError(Exception):
    """Base of all errors below."""


class CaptureError(CalipersError):
    """A module or file cannot be turned into a graph."""


class UnsupportedOp(CaptureError):
    """One or more operators have no rule; the message names all of them, where they are, and a remedy."""

    def __init__(self, problems: Iterable[str], remedy: str) -> None:
        self.problems = tuple(problems)
        self.remedy = remedy
        listed = "; ".join(self.problems)
        super().__init__(f"unsupported: {listed}. {remedy}")

    def __reduce__(self) -> tuple[type[UnsupportedOp], tuple[tuple[str, ...], str]]:
        return type(self), (self.problems, self.remedy)


class ModelTooLarge(CaptureError):
    """A file declares tensors larger than the byte budget; nothing was allocated."""


class ModelError(CalipersError):
    """The model is not what the method needs; the message says which check failed, with numbers."""


class DataError(CalipersError):
    """Data are missing, malformed, or do not fit the model."""


class SpecError(CalipersError):
    """A specification is malformed."""


class NoInputs(SpecError):
    """No input satisfies the bounds of a query: nothing can break it."""


class RegionError(CalipersError):
    """A region is empty or malformed."""


class SoundnessError(CalipersError):
    """A lower end above an upper end, beyond rounding: two methods contradict each other."""


class SolverError(CalipersError):
    """An external solver failed; its verdict does not count."""


class CertificateError(CalipersError):
    """What was proved cannot be written down as a certificate."""


class MemoryLimit(CalipersError, MemoryError):
    """Not even a single example fits into memory; nothing is known about it."""


class StoreMismatch(CalipersError):
    """A stored run belongs to another model, data set, threat model or code version."""


class StoreError(CalipersError):
    """A run directory cannot be written; what was finished before is still there."""


class WorkerError(CalipersError):
    """Worker processes cannot be started, or end before they work."""


class TrainingError(CalipersError):
    """A training cannot go on, or cannot start here; the message says what to change."""


def unknown_name(what: str, name: str, known: Iterable[str]) -> ValueError:
    """The error for a name that is not in a table, with the nearest known one."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return ValueError(f"{what}: unknown name {name!r}.{hint} Known: {', '.join(names)}.")
