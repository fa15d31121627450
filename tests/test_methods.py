"""Every registered method has a card, and the commands show it."""

from __future__ import annotations

import pytest

from calipers.attacks import ATTACKS, MINIMUM_NORM
from calipers.bounds import BOUNDS
from calipers.exact import EXACT
from calipers.methods import SIDES, Side, find, statement
from calipers.training.objectives import OBJECTIVES

ENTRIES = [(side, name) for side in SIDES for name in side.methods]


def test_all_registers_have_a_side() -> None:
    shown = [side.methods for side in SIDES]
    for register in (ATTACKS, MINIMUM_NORM, EXACT, BOUNDS, OBJECTIVES):
        assert any(register is methods for methods in shown)


@pytest.mark.parametrize("side", SIDES, ids=lambda side: side.name)
def test_cards_and_methods_are_the_same_names(side: Side) -> None:
    assert list(side.cards) == list(side.methods)


@pytest.mark.parametrize(("side", "name"), ENTRIES, ids=lambda at: getattr(at, "name", at))
def test_a_card_has_all_fields(side: Side, name: str) -> None:
    assert statement(side.methods[name]).endswith((".", ":"))
    for field, said in side.cards[name]._asdict().items():
        assert len(said) > 5, f"{name}: {field}"
        assert "  " not in said, f"{name}: {field} has two spaces"
    assert not side.cards[name].paper.startswith(" ")


def test_a_name_on_several_sides_shows_all() -> None:
    assert [side.name for side, _, _ in find("pgd")] == ["attack", "objective"]
    with pytest.raises(ValueError, match=r"Did you mean 'crown'\?"):
        find("cron")
