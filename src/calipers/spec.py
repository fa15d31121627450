"""What must hold of a network's output: a conjunction of clauses over linear functionals.

    safe  iff  for all clauses c there is a functional m in c with (C·y + d)_m > 0      (>= 0 where not strict)

The *margin* is the minimum over clauses of the maximum within a clause. It is monotone in the functionals'
values, so the same fold maps exact values to the margin, lower bounds to a lower bound, upper to upper.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from calipers.errors import SpecError


@dataclass(frozen=True, eq=False)
class Spec:
    """Linear functionals of the output grouped into clauses, one set per example.

    Args:
        C: coefficients, (B, M, K).
        d: offsets, (B, M).
        clause: the clause of each functional, (M,) integers; clauses are numbered 0, 1, ... without gaps.
        strict: whether each functional must be > 0 (True) or only >= 0, (M,); all strict by default.
        of_label: the classes (B,), where the specification is `label`'s: what then is quicker to compute directly.

    Raises:
        SpecError: the shapes do not fit, a value is not finite, or a clause is empty.
    """

    C: Tensor
    d: Tensor
    clause: Tensor
    strict: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool))
    of_label: Tensor | None = None

    def __post_init__(self) -> None:
        if self.strict.numel() == 0:
            everywhere = torch.ones(self.clause.shape, dtype=torch.bool, device=self.clause.device)
            object.__setattr__(self, "strict", everywhere)
        M = self.clause.shape[0] if self.clause.ndim == 1 else -1
        if self.C.ndim != 3 or self.d.shape != self.C.shape[:2] or self.C.shape[1] != M:
            raise SpecError(
                f"spec: C {tuple(self.C.shape)}, d {tuple(self.d.shape)}, clause {tuple(self.clause.shape)} "
                "do not fit; expected (B, M, K), (B, M), (M,)"
            )
        if self.strict.shape != self.clause.shape:
            raise SpecError(
                f"spec: strict has shape {tuple(self.strict.shape)}, clause {tuple(self.clause.shape)}"
            )
        if not bool(torch.isfinite(self.C).all() & torch.isfinite(self.d).all()):
            raise SpecError("spec: coefficients must be finite")
        if not M:
            raise SpecError("spec: no functional at all, so nothing is asked of the network")
        if self.clause.is_floating_point() or sorted(set(self.clause.tolist())) != list(
            range(int(self.clause.max()) + 1)
        ):
            raise SpecError("spec: clauses must be numbered 0, 1, ... without gaps")

    @classmethod
    def label(cls, y: Tensor, num_classes: int) -> Spec:
        """Untargeted robustness: y_label − y_j > 0 for each of the K − 1 rivals j in class order.

        Raises:
            ValueError: a label is outside 0..num_classes − 1.
        """
        _check_labels(y, num_classes, "y")
        y = y.long()
        rivals = torch.arange(num_classes - 1, device=y.device).expand(len(y), -1)
        rivals = rivals + (rivals >= y.unsqueeze(1))  # skips the label
        eye = torch.eye(num_classes, device=y.device)
        C = eye[y].unsqueeze(1) - eye[rivals]
        clause = torch.arange(num_classes - 1, device=y.device)
        return cls(C, torch.zeros(C.shape[:2], device=y.device), clause, of_label=y)

    @classmethod
    def target(cls, y: Tensor, t: Tensor, num_classes: int) -> Spec:
        """Only the rival ``t`` counts: y_label − y_target > 0. Its attack objective is target minus label."""
        _check_labels(y, num_classes, "y")
        _check_labels(t, num_classes, "t")
        if y.shape != t.shape:
            raise ValueError(f"t: {len(t)} targets for {len(y)} labels")
        if bool((y == t).any()):
            raise ValueError(
                f"t: {int((y == t).sum())} of {len(t)} targets equal their label; nothing can tell them apart"
            )
        eye = torch.eye(num_classes, device=y.device)
        return cls.functional((eye[y.long()] - eye[t.long()]).unsqueeze(1))

    @classmethod
    def functional(cls, C: Tensor, d: Tensor | None = None) -> Spec:
        """Each row of ``C`` (B, M, K) as a clause of its own."""
        offsets = torch.zeros(C.shape[:2], dtype=C.dtype, device=C.device) if d is None else d
        return cls(C, offsets, torch.arange(C.shape[1], device=C.device))

    def values(self, y: Tensor) -> Tensor:
        """C·y + d for outputs ``y`` (B, K): (B, M)."""
        C, d = self.C.to(y.dtype), self.d.to(y.dtype)
        return torch.baddbmm(d.unsqueeze(-1), C, y.unsqueeze(-1)).squeeze(-1)

    @cached_property
    def count(self) -> int:
        """The number of clauses."""
        return int(self.clause.max()) + 1

    @cached_property
    def simple(self) -> bool:
        """Whether each clause has one functional."""
        return self.count == len(self.clause)

    def margin(self, values: Tensor) -> Tensor:
        """min over clauses of max within: (..., M) to (...). NaN stays NaN."""
        return self.clauses(values).amin(-1)

    def clauses(self, values: Tensor) -> Tensor:
        """The value of each clause, the maximum within: (..., M) to (..., clauses)."""
        if self.simple:
            return values
        start = values.new_full((*values.shape[:-1], self.count), -math.inf)
        return start.scatter_reduce(-1, self.clause.expand_as(values), values, "amax")

    def margin_at(self, y: Tensor) -> Tensor:
        """The margin of outputs ``y`` (..., B, K): (..., B)."""
        if self.of_label is None:
            if y.ndim > 2:
                return torch.stack([self.margin_at(part) for part in y])
            return self.margin(self.values(y))
        label = self.of_label.unsqueeze(1).expand(*y.shape[:-1], 1)
        rivals = y.scatter(-1, label, -math.inf)
        return (y.gather(-1, label) - rivals.amax(-1, keepdim=True)).squeeze(-1)

    def violated(self, y: Tensor) -> Tensor:
        """Whether outputs ``y`` break the specification: (B,) bool. NaN outputs do not count as a violation."""
        values = self.values(y)
        fails = torch.where(self.strict, values <= 0, values < 0).to(torch.int8)
        if not self.simple:
            ones = fails.new_ones((len(fails), self.count))
            fails = ones.scatter_reduce(-1, self.clause.expand_as(values), fails, "amin")
        return fails.amax(-1).bool() & torch.isfinite(y).all(-1)

    def __getitem__(self, index: Tensor | slice) -> Spec:
        label = None if self.of_label is None else self.of_label[index]
        return Spec(self.C[index], self.d[index], self.clause, self.strict, label)

    def __len__(self) -> int:
        return len(self.C)


def _check_labels(y: Tensor, num_classes: int, name: str) -> None:
    if not isinstance(y, Tensor):
        raise ValueError(
            f"{name}: {type(y).__name__}, not a tensor; convert it with torch.as_tensor"
        )
    if y.is_floating_point() or y.dtype == torch.bool or y.ndim != 1:
        raise ValueError(
            f"{name}: labels must be a vector of integers, not {y.dtype} of shape {tuple(y.shape)}"
        )
    if num_classes < 2:
        raise ValueError(f"num_classes: {num_classes} leaves no rival; at least 2 are needed")
    if len(y) and not 0 <= int(y.min()) <= int(y.max()) < num_classes:
        raise ValueError(
            f"{name}: labels {int(y.min())}..{int(y.max())} are outside 0..{num_classes - 1}, "
            f"the classes of the model's {num_classes} outputs"
        )
