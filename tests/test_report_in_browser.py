"""The report in a real browser: it loads nothing, complains about nothing, sorts, opens, and fits a phone."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from browser import NARROW, WIDE, browser, opened
from calipers import ThreatModel, curve
from calipers.data import Data, load
from calipers.evaluate.cascade import select
from calipers.evaluate.comparison import compare
from calipers.evaluate.landscape import landscape
from calipers.models import load_model

THREAT = ThreatModel(math.inf, "0.1")
PAYLOAD = "</script><img src=https://evil.example/x onerror=alert(1)><svg onload=alert(2)>"


@pytest.fixture(scope="module")
def found():
    data = load("digits")
    return curve(
        load_model("digits_pgd"), (data.x[:40], data.y[:40]), THREAT,
        ("0.1", "0.2"), cascade=select(["fgsm", "crown_ibp", "pgd-20", "crown"]), name="digits_pgd",
    )  # fmt: skip


@pytest.fixture(scope="module")
def chromium():
    with browser() as running:
        yield running


def hostile(found):
    def spoil(one):
        data = Data(one.x, one.y, 0.0, 1.0, PAYLOAD, (PAYLOAD,) * 10)
        methods = tuple(replace(r, name=PAYLOAD, note=PAYLOAD) for r in one.methods)
        said = tuple(
            e and replace(e, method=PAYLOAD, path=PAYLOAD) for e in one.bracket.lower_evidence
        )
        return replace(
            one, name=PAYLOAD, data=data, notes=(PAYLOAD,), stopped=PAYLOAD, methods=methods,
            differences={PAYLOAD: 0.1}, identity={PAYLOAD: PAYLOAD, "list": [PAYLOAD]},
            bracket=replace(one.bracket, lower_evidence=said, upper_evidence=said),
        )  # fmt: skip

    return replace(found.each(spoil), stopped=PAYLOAD, left=(PAYLOAD,))


@pytest.mark.parametrize("size", [WIDE, NARROW])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_loads_nothing_and_fits(found, chromium, tmp_path, size, scheme):
    found.report(tmp_path / "r.html")
    url = (tmp_path / "r.html").as_uri()
    with opened(chromium, url, size=size, color_scheme=scheme) as seen:
        assert [r for r in seen.requests if not r.startswith("data:")] == [url]
        assert seen.complaints == []
        assert seen.overflow <= 0


def test_hostile_strings_stay_text(found, chromium, tmp_path):
    hostile(found).report(tmp_path / "r.html")
    url = (tmp_path / "r.html").as_uri()
    with opened(chromium, url) as seen:
        alerts = []
        seen.page.on("dialog", lambda d: (alerts.append(d.message), d.dismiss()))
        for summary in seen.page.query_selector_all("summary")[:5]:
            summary.click()
        assert [r for r in seen.requests if not r.startswith("data:")] == [url]
        assert seen.complaints == []
        assert alerts == []
        assert seen.page.locator("img[onerror], svg[onload]").count() == 0
        assert seen.page.locator("h1").inner_text() == PAYLOAD


def test_examples_sort_filter_and_open(found, chromium, tmp_path):
    found.report(tmp_path / "r.html")
    with opened(chromium, (tmp_path / "r.html").as_uri()) as seen:
        page = seen.page
        rows = "table[data-sort] > tbody > tr:first-child"
        page.get_by_role("button", name="lower").click()
        lower = page.eval_on_selector_all(
            f"{rows} > td:nth-child(5)", "cells => cells.map(c => Number(c.dataset.v))"
        )
        assert lower == sorted(lower)
        assert (
            page.get_by_role("columnheader", name="lower").get_attribute("aria-sort") == "ascending"
        )
        page.get_by_role("button", name="lower").press("Enter")  # by keyboard
        assert (
            page.get_by_role("columnheader", name="lower").get_attribute("aria-sort")
            == "descending"
        )
        page.get_by_label("certified", exact=True).uncheck()
        assert page.locator("tbody[data-kind=robust]:visible").count() == 0
        assert page.locator("tbody[data-kind=broken]:visible").count() > 0
        page.locator("tbody[data-kind=broken] summary").first.click()
        detail = page.locator("tbody[data-kind=broken] .detail").first
        assert detail.is_visible()
        assert detail.locator("img").count() == 3
        with page.expect_download() as download:
            detail.get_by_role("link", name="witness").click()
        assert download.value.suggested_filename.endswith("-witness.npy")


def test_without_scripts_it_says_everything(found, chromium, tmp_path):
    found.report(tmp_path / "r.html")
    with opened(chromium, (tmp_path / "r.html").as_uri(), java_script_enabled=False) as seen:
        page = seen.page
        page.locator("tbody[data-kind=broken] summary").first.click()
        assert page.locator("tbody[data-kind=broken] .detail").first.is_visible()
        assert page.locator("svg[role=img]").count() == 5


@pytest.mark.parametrize("size", [WIDE, NARROW])
def test_the_other_pages_load_nothing_and_fit(chromium, tmp_path, size):
    network, data = load_model("digits_pgd"), load("digits")
    landscape({PAYLOAD: network}, data, 0.1, size=5).save(tmp_path / "surface.html")
    cascade = select(["fgsm", "crown_ibp"])
    for name in ("a", "b"):
        few = (data.x[:20], data.y[:20])
        curve(network, few, THREAT, ("0.05", "0.1"), run=tmp_path / name, cascade=cascade)
    compare([tmp_path / "a", tmp_path / "b"], tmp_path / "compare.html")
    for file in ("surface.html", "compare.html"):
        url = (tmp_path / file).as_uri()
        with opened(chromium, url, size=size) as seen:
            assert [r for r in seen.requests if not r.startswith("data:")] == [url]
            assert seen.complaints == []
            assert seen.overflow <= 0


def contrast(first, second):
    def light(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    high, low = sorted((light(first), light(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_marks_have_the_contrast_that_wcag_asks_for(found, chromium, tmp_path, scheme):
    found.report(tmp_path / "r.html")
    with opened(chromium, (tmp_path / "r.html").as_uri(), color_scheme=scheme) as seen:
        style = "getComputedStyle(document.documentElement).getPropertyValue"

        def colour(name):
            text = seen.page.evaluate(f"{style}('--{name}')").strip()
            return "#" + "".join(2 * c for c in text[1:]) if len(text) == 4 else text

        for paper in ("paper", "card"):
            for ink in ("ink", "soft", "link"):
                assert contrast(colour(ink), colour(paper)) >= 4.5, (ink, paper)
            for mark in ("robust", "unknown", "broken", *"abcdef"):
                assert contrast(colour(mark), colour(paper)) >= 3, (mark, paper)
