"""`calipers.reproduce`: its printed values are the published ones, and what is quick to compute agrees."""

import json
import math
from pathlib import Path

import pytest

from calipers.errors import DataError
from calipers.reproduce import CLAIMS, RIVALS, Claim, Measured, reproduce

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
PUBLISHED = SHARED / "tutorial" / "published.json"
shared = pytest.mark.skipif(
    not PUBLISHED.is_file() or not (SHARED / "mnist").is_dir(),
    reason="the tutorial's weights and MNIST are not beside the checkout (shared/data)",
)
BY_NAME = {f"{c.section}: {c.what}": c for c in CLAIMS}


def numbers(content):
    """All numbers in a JSON value."""
    if isinstance(content, dict | list):
        parts = content.values() if isinstance(content, dict) else content
        return [n for part in parts for n in numbers(part)]
    return [float(content)] if isinstance(content, int | float) else []


@shared
def test_every_printed_value_is_a_published_one():
    known = set(numbers(json.loads(PUBLISHED.read_text()))) | {17.0}  # "all 17 others reach 2"
    for name, claim in BY_NAME.items():
        assert set(claim.published) <= known, name


@shared
def test_the_exact_margins_stand_in_the_order_of_the_rivals():
    printed = json.loads(PUBLISHED.read_text())["milp_small_test_image_0_with_box"]
    margins = printed["eps_0.1_margin_label_minus_target"]
    (claim,) = (c for c in CLAIMS if "nine exact margins" in c.what)
    assert claim.published == tuple(margins[str(t)] for t in RIVALS)


QUICK = (
    "dnn_2: test error",
    "unstable neurons",
    "linear program",
    "logit",
    "elided",
    "mean gradient",
    "made a two",
)


@shared
@pytest.mark.parametrize("text", QUICK)
def test_what_is_quick_agrees(text):
    lines = list(reproduce(SHARED, fast=True, only=text))
    assert lines
    assert {line.verdict for line in lines} == {"agrees"}, [
        (l.claim.what, l.measured) for l in lines
    ]


def claim(**options):
    return Claim("s", "w", (0.5,), lambda _: Measured((0.0,)), **options)


@pytest.mark.parametrize(
    ("one", "value", "rows", "verdict"),
    [
        (claim(tolerance=0.01), 0.51, 10_000, "agrees"),
        (claim(tolerance=0.01), 0.511, 10_000, "differs"),
        (claim(tolerance=0.01), 0.49, 10_000, "agrees"),
        (claim(tolerance=0.01, may_exceed=True), 0.6, 10_000, "stronger"),
        (claim(tolerance=0.01, may_exceed=True), 0.4, 10_000, "differs"),
        (claim(tolerance=0.01, corrects="why"), 0.4, 10_000, "corrected"),
        (claim(tolerance=0.01), 0.59, 100, "agrees"),  # two standard errors are 0.1
        (claim(tolerance=0.01), 0.61, 100, "differs"),
        (claim(tolerance=0.1, relative=True), 0.54, None, "agrees"),
        (claim(tolerance=0.1, relative=True), 0.56, None, "differs"),
        (claim(), 0.5, None, "agrees"),
        (claim(tolerance=1.0, may_exceed=True), math.nan, None, "differs"),
    ],
)
def test_verdicts(one, value, rows, verdict):
    assert one.verdict(Measured((value,), rows)) == verdict


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(DataError, match=r"ch3_model_small\.pt.*locuslab"):
        list(reproduce(tmp_path, only="unstable neurons"))


def test_the_command(run, tmp_path):
    code, _, err = run("reproduce", "--data-dir", tmp_path, "--only", "no such claim")
    assert code == 2
    assert "no claim holds" in err
    if PUBLISHED.is_file():
        file = tmp_path / "a.json"
        code, out, _ = run(
            "reproduce", "--data-dir", SHARED, "--fast", "--only", "unstable", "--json", file
        )
        assert code == 0
        assert "1 claims: 1 agrees" in out
        assert json.loads(file.read_text())["claims"][0]["ours"] == [60.0]
