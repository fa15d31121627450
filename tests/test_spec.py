"""Specifications against a brute-force fold in plain Python."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from calipers.errors import SpecError
from calipers.spec import Spec


def folded(values: list[float], clause: list[int]) -> float:
    """min over clauses of max within, by enumeration."""
    return min(max(v for v, c in zip(values, clause, strict=True) if c == k) for k in set(clause))


def broken(values: list[float], clause: list[int], strict: list[bool]) -> bool:
    """Some clause has no functional that holds."""
    holds = [v > 0 if s else v >= 0 for v, s in zip(values, strict, strict=True)]
    return any(
        not any(h for h, c in zip(holds, clause, strict=True) if c == k) for k in set(clause)
    )


def test_label_lists_the_rivals_in_class_order() -> None:
    y = torch.tensor([2, 0, 3])
    spec = Spec.label(y, 4)
    logits = torch.tensor([[1.0, 2.0, 4.0, 8.0], [16.0, 1.0, 2.0, 3.0], [0.0, 0.5, 0.25, 0.125]])
    assert spec.values(logits).tolist() == [
        [3.0, 2.0, -4.0],
        [15.0, 14.0, 13.0],
        [0.125, -0.375, -0.125],
    ]
    assert spec.margin(spec.values(logits)).tolist() == [-4.0, 13.0, -0.375]
    assert spec.violated(logits).tolist() == [True, False, True]
    assert spec.simple
    assert len(spec) == 3
    assert spec[torch.tensor([2])].values(logits[2:]).tolist() == [[0.125, -0.375, -0.125]]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_any_integer_dtype_labels(dtype: torch.dtype) -> None:
    y = torch.tensor([1, 0, 1], dtype=dtype)
    expected = Spec.label(y.long(), 2)
    assert torch.equal(Spec.label(y, 2).C, expected.C)
    assert expected.C.tolist() == [[[-1, 1]], [[1, -1]], [[-1, 1]]]  # two classes: one rival
    assert torch.equal(Spec.target(y, 1 - y, 2).C, expected.C)


@given(st.integers(2, 6), st.integers(0, 2**31))
def test_label_margin_is_the_gap_to_the_best_rival(classes: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, classes, generator=generator, dtype=torch.float64)
    y = torch.randint(classes, (4,), generator=generator)
    spec = Spec.label(y, classes)
    for row, label, margin in zip(
        logits.tolist(), y.tolist(), spec.margin(spec.values(logits)).tolist(), strict=True
    ):
        assert margin == row[label] - max(v for j, v in enumerate(row) if j != label)
    assert torch.equal(spec.violated(logits), logits.argmax(1) != y)
    # permuting the classes permutes the rivals and keeps the margin
    order = torch.randperm(classes, generator=generator)
    renamed = Spec.label(order.argsort()[y], classes)
    assert torch.equal(
        renamed.margin(renamed.values(logits[:, order])), spec.margin(spec.values(logits))
    )


def test_target_counts_one_rival() -> None:
    spec = Spec.target(torch.tensor([0, 1]), torch.tensor([2, 0]), 3)
    logits = torch.tensor([[1.0, 9.0, 0.5], [3.0, 2.0, 9.0]])
    assert spec.margin(spec.values(logits)).tolist() == [0.5, -1.0]
    assert spec.violated(logits).tolist() == [False, True]


def test_functional_is_a_conjunction() -> None:
    C = torch.tensor([[[1.0, 0.0], [0.0, -1.0]]])
    spec = Spec.functional(C, torch.tensor([[-0.5, 2.0]]))
    assert spec.margin(spec.values(torch.tensor([[1.0, 1.0]]))).item() == 0.5
    assert Spec.functional(C).d.tolist() == [[0.0, 0.0]]
    assert spec.clause.tolist() == [0, 1]
    assert spec.values(torch.tensor([[1.0, 1.0]], dtype=torch.float64)).dtype == torch.float64


@st.composite
def formulas(draw: st.DrawFn) -> tuple[Spec, list[int], list[bool], Tensor]:
    clauses = draw(st.integers(1, 4))
    clause = draw(
        st.permutations([*range(clauses), *draw(st.lists(st.integers(0, clauses - 1), max_size=5))])
    )
    strict = draw(st.lists(st.booleans(), min_size=len(clause), max_size=len(clause)))
    number = st.sampled_from([0.0, 1.0, -1.0, 0.5, 2.0])
    M = len(clause)
    C = torch.tensor(
        draw(st.lists(number, min_size=4 * M, max_size=4 * M)), dtype=torch.float64
    ).view(2, M, 2)
    d = torch.tensor(
        draw(st.lists(number, min_size=2 * M, max_size=2 * M)), dtype=torch.float64
    ).view(2, M)
    y = torch.tensor(draw(st.lists(number, min_size=4, max_size=4)), dtype=torch.float64).view(2, 2)
    return Spec(C, d, torch.tensor(clause), torch.tensor(strict)), list(clause), strict, y


@given(formulas())
def test_margin_and_violation_against_enumeration(
    drawn: tuple[Spec, list[int], list[bool], Tensor],
) -> None:
    spec, clause, strict, y = drawn
    values = [
        [
            sum(c * v for c, v in zip(row, y[i].tolist(), strict=True)) + spec.d[i, m].item()
            for m, row in enumerate(spec.C[i].tolist())
        ]
        for i in range(2)
    ]
    assert spec.values(y).tolist() == values
    assert spec.margin(spec.values(y)).tolist() == [folded(v, clause) for v in values]
    assert spec.violated(y).tolist() == [broken(v, clause, strict) for v in values]
    assert spec.simple == (len(set(clause)) == len(clause))
    many = torch.randn(3, 2, len(clause))  # any leading shape folds
    expected = [[folded(v, clause) for v in row] for row in many.tolist()]
    assert spec.margin(many).tolist() == expected


@given(formulas(), st.integers(0, 2**31))
def test_margin_is_monotone(drawn: tuple[Spec, list[int], list[bool], Tensor], seed: int) -> None:
    """So it folds lower bounds to a lower bound, and upper ones to an upper one."""
    spec, _, _, y = drawn
    generator = torch.Generator().manual_seed(seed)
    values = spec.values(y)
    slack = torch.rand(values.shape, generator=generator, dtype=torch.float64)
    assert (spec.margin(values - slack) <= spec.margin(values)).all()
    assert (spec.margin(values + slack) >= spec.margin(values)).all()


def test_ties_and_strictness() -> None:
    C = torch.tensor([[[1.0, -1.0]]])
    tie = torch.tensor([[2.0, 2.0]])
    strict = Spec(C, torch.zeros(1, 1), torch.tensor([0]))
    loose = Spec(C, torch.zeros(1, 1), torch.tensor([0]), torch.tensor([False]))
    assert strict.strict.tolist() == [True]
    assert strict.violated(tie).tolist() == [True]  # a tie is a failure of robustness
    assert loose.violated(tie).tolist() == [False]
    assert loose.violated(tie + torch.tensor([0.0, 1e-6])).tolist() == [True]
    assert strict.margin(strict.values(tie)).item() == 0
    assert loose[slice(0, 1)].strict.tolist() == [False]
    assert Spec.label(torch.tensor([0]), 2).violated(tie).tolist() == [True]


@pytest.mark.parametrize("clause", [[0, 1], [0, 0]])
def test_nan_is_neither_a_margin_nor_a_violation(clause: list[int]) -> None:
    spec = Spec(torch.eye(2).unsqueeze(0), torch.zeros(1, 2), torch.tensor(clause))
    for outputs in ([math.nan, -1.0], [-1.0, math.nan], [math.nan, math.nan], [math.nan, 1.0]):
        y = torch.tensor([outputs])
        assert math.isnan(spec.margin(spec.values(y)).item())
        assert spec.violated(y).tolist() == [False]
    for outputs in ([-math.inf, -1.0], [math.inf, -1.0]):
        assert spec.violated(torch.tensor([outputs])).tolist() == [False]
    assert spec.violated(torch.tensor([[-1.0, -1.0]])).tolist() == [True]


def test_margin_is_differentiable() -> None:
    spec = Spec(torch.eye(3).unsqueeze(0), torch.zeros(1, 3), torch.tensor([0, 0, 1]))
    values = torch.tensor([[1.0, 2.0, 3.0]], requires_grad=True)
    spec.margin(values).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [[0.0, 1.0, 0.0]]


@pytest.mark.parametrize(
    ("y", "classes", "message"),
    [
        (torch.tensor([0, 3]), 3, r"labels 0\.\.3 are outside 0\.\.2"),
        (torch.tensor([-1, 0]), 3, r"labels -1\.\.0"),
        (torch.tensor([0]), 1, "num_classes: 1 leaves no rival"),
        (torch.tensor([0.0]), 3, "vector of integers"),
        (torch.tensor([True]), 3, "vector of integers"),
        (torch.tensor([[0]]), 3, "vector of integers"),
        (torch.tensor(0), 3, "vector of integers"),
    ],
)
def test_label_refuses(y: Tensor, classes: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Spec.label(y, classes)
    with pytest.raises(ValueError, match=message):
        Spec.target(y, y, classes)


def test_target_refuses() -> None:
    with pytest.raises(ValueError, match=r"t: labels 7\.\.7"):
        Spec.target(torch.tensor([0]), torch.tensor([7]), 3)
    with pytest.raises(ValueError, match="t: 1 targets for 2 labels"):
        Spec.target(torch.tensor([0, 1]), torch.tensor([2]), 3)


@pytest.mark.parametrize(
    ("C", "d", "clause", "message"),
    [
        (torch.ones(2, 3), torch.ones(2, 3), [0, 1, 2], "do not fit"),
        (torch.ones(2, 3, 4), torch.ones(2, 2), [0, 1, 2], "do not fit"),
        (torch.ones(2, 3, 4), torch.ones(2, 3), [0, 1], "do not fit"),
        (torch.ones(2, 3, 4), torch.ones(2, 3), [[0, 1, 2]], "do not fit"),
        (torch.ones(2, 3, 4), torch.ones(2, 3), [0, 2, 2], "without gaps"),
        (torch.ones(2, 3, 4), torch.ones(2, 3), [1, 2, 3], "without gaps"),
        (torch.ones(2, 3, 4), torch.ones(2, 3), [-1, 0, 1], "without gaps"),
        (torch.ones(2, 3, 4), torch.ones(2, 3), [0.0, 1.0, 2.0], "without gaps"),
        (torch.full((2, 3, 4), math.nan), torch.ones(2, 3), [0, 1, 2], "finite"),
        (torch.ones(2, 3, 4), torch.full((2, 3), math.inf), [0, 1, 2], "finite"),
        (torch.ones(2, 0, 4), torch.ones(2, 0), [], "no functional"),
    ],
)
def test_malformed_specs_are_refused(C: Tensor, d: Tensor, clause: list[int], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Spec(C, d, torch.tensor(clause))


def test_strict_must_fit() -> None:
    with pytest.raises(SpecError, match="strict has shape"):
        Spec(torch.ones(1, 2, 3), torch.ones(1, 2), torch.tensor([0, 1]), torch.tensor([True]))
