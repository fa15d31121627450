"""The table of losses: closed forms against automatic differentiation and against formulas from the papers."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from calipers import Spec
from calipers.attacks.losses import LOSSES, margin_loss, read, suited

K = 6


def outputs(scale: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    y = scale * torch.randn(40, K, dtype=torch.float64, generator=generator)
    return y, torch.arange(40) % K


def general(spec: Spec) -> Spec:
    """The same specification without the labels, so that no closed form applies."""
    return Spec(spec.C, spec.d, spec.clause)


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_closed_forms_are_the_derivatives(name: str, targeted: bool) -> None:
    y, label = outputs()
    spec = Spec.label(label, K)
    target = (torch.arange(40) * 7) % (K - 1) if targeted else None
    ours, theirs = (read(LOSSES[name], y, s, target) for s in (spec, general(spec)))
    said = ((each.toward, each.margin(), each.loss()) for each in (ours, theirs))
    for a, b in zip(*said, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_targeted_losses_name_the_rival() -> None:
    """Clause t of a label specification is the t-th class without the label."""
    y, label = outputs()
    rival = (label + 1 + torch.arange(40) % (K - 1)) % K
    target = rival - (rival > label).long()
    spec, rows = Spec.label(label, K), torch.arange(40)
    loss = read(LOSSES["margin"], y, spec, target).loss()
    torch.testing.assert_close(loss, y[rows, rival] - y[rows, label])
    loss = read(LOSSES["cross_entropy"], y, spec, target).loss()
    torch.testing.assert_close(loss, log_softmax(y, 1)[rows, rival])
    ordered = y.sort(1, descending=True).values
    expected = (y[rows, rival] - y[rows, label]) / (
        ordered[:, 0] - (ordered[:, 2] + ordered[:, 3]) / 2
    )
    torch.testing.assert_close(read(LOSSES["dlr"], y, spec, target).loss(), expected)


def test_dlr_is_the_papers_and_does_not_depend_on_the_scale() -> None:
    y, label = outputs()
    spec, rows = Spec.label(label, K), torch.arange(40)
    ordered = y.sort(1, descending=True).values
    rivals = y.scatter(1, label.unsqueeze(1), -torch.inf).amax(1)
    expected = -(y[rows, label] - rivals) / (ordered[:, 0] - ordered[:, 2])
    for scale in (1.0, 1e-6, 1e6):
        torch.testing.assert_close(read(LOSSES["dlr"], scale * y, spec).loss(), expected)


def test_dlr_needs_three_classes_and_with_a_target_four(caplog: pytest.LogCaptureFixture) -> None:
    two, three, four = (Spec.label(torch.zeros(2, dtype=torch.long), k) for k in (2, 3, 4))
    with caplog.at_level(logging.WARNING):
        assert suited("dlr", three) is LOSSES["dlr"]
        assert suited("dlr", four, targeted=True) is LOSSES["dlr"]
        assert not caplog.records
        assert suited("dlr", two) is margin_loss
        assert suited("dlr", three, targeted=True) is margin_loss
    assert "loss dlr needs 3 classes, the specification has 2" in caplog.text
    assert "needs 4 classes with a target" in caplog.text


def test_a_saturated_softmax_keeps_its_direction_in_float32() -> None:
    """From margins of 17 on the probability is 1 in float32; its difference to 1 is not lost."""
    y = torch.tensor([[40.0, 0.0, -5.0]])
    toward = read(LOSSES["cross_entropy"], y, Spec.label(torch.tensor([0]), 3)).toward
    assert toward[0, 0] < 0 < toward[0, 1]


def test_disjunctions_follow_the_functional_that_holds_them_up() -> None:
    """A clause of two functionals is broken once both are <= 0: the larger one counts."""
    C = torch.eye(3, dtype=torch.float64).unsqueeze(0)
    spec = Spec(C, torch.zeros(1, 3, dtype=torch.float64), torch.tensor([0, 0, 1]))
    y = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)
    assert read(LOSSES["margin"], y, spec).toward.tolist() == [[0.0, -1.0, 0.0]]
    second = read(LOSSES["margin"], y, spec, torch.tensor([1]))
    assert second.toward.tolist() == [[0.0, 0.0, -1.0]]
    assert second.margin().tolist() == [2.0]
