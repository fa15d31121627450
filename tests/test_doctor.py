"""`calipers doctor`: what is fine is said to be, and what is broken is found."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import calipers.bounds
import calipers.exact
from calipers import doctor
from calipers.cli import app


@pytest.fixture
def flushing() -> Iterator[None]:
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormal numbers")
    yield
    torch.set_flush_denormal(False)


def test_this_machine_is_fit() -> None:
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert lines[-1] == "fit to measure"
    assert not [line for line in lines if line.startswith("FAIL")]
    names = {line.split()[1] for line in lines[:-1]}
    assert {*doctor.REQUIRED, *doctor.OPTIONAL, *doctor.CHECKS} <= names


def test_a_bound_above_the_minimum_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    true = calipers.bounds.crown

    def wrong(*args: object, **keywords: object) -> Tensor:
        return true(*args, **keywords) + 10.0  # type: ignore[arg-type]

    wrong.__name__ = "crown"
    monkeypatch.setattr(calipers.bounds, "crown", wrong)
    with pytest.raises(ArithmeticError, match="crown says"):
        doctor.sandwich()


def test_an_attack_below_the_minimum_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    true = calipers.exact.optima

    def high(*args: object, **keywords: object) -> object:
        import dataclasses

        return [dataclasses.replace(o, lower=o.lower + 10.0) for o in true(*args, **keywords)]  # type: ignore[arg-type]

    monkeypatch.setattr(calipers.exact, "optima", high)
    with pytest.raises(ArithmeticError, match="fgsm says"):
        doctor.sandwich()
    with pytest.raises(ArithmeticError, match=r"the minimum is -0\.6"):
        doctor.solver()


@pytest.mark.usefixtures("flushing")
def test_flushed_subnormal_numbers_are_found() -> None:
    with pytest.raises(ValueError, match="set_flush_denormal"):
        doctor.arithmetic()


@pytest.mark.parametrize(
    ("have", "least", "ok"),
    [("2.13.0+cpu", "2.10", True), ("2.9.1", "2.10", False), (None, "1", False)],
)
def test_versions_are_compared_as_numbers(
    have: str | None, least: str, ok: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_installed", lambda _: have)
    monkeypatch.setattr(doctor, "_needed", lambda: dict.fromkeys(doctor.REQUIRED, least))
    checks = list(doctor.packages())
    assert all(check.ok is ok for check in checks[: len(doctor.REQUIRED)])
    assert all(check.ok in (None, True) for check in checks[len(doctor.REQUIRED) :])


def test_a_failed_check_is_the_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> str:
        raise RuntimeError("no solver")

    only: dict[str, Callable[[], str]] = {"solver": broken}
    monkeypatch.setattr(doctor, "CHECKS", only)
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 1
    assert "FAIL  solver        RuntimeError: no solver" in done.output
    assert done.output.endswith("not fit to measure: solver\n")
