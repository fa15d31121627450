import base64
import io
import json
import math
import re
import struct
import sys
import xml.etree.ElementTree as ET
import zlib
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import calipers as cp
from calipers import ThreatModel, audit, curve, save_onnx
from calipers.attacks.diagnostics import Finding
from calipers.bracket import Evidence, Verdict
from calipers.data import Data, load
from calipers.evaluate.cascade import select
from calipers.evaluate.curve import Curve
from calipers.evaluate.figures import converted, figures, save
from calipers.evaluate.pages import asset, source_hash
from calipers.evaluate.pictures import as_change, as_image, margin_histogram, png, stacked_bar
from calipers.evaluate.report import curve_plot, render
from calipers.evaluate.result import Row
from calipers.models import load_model

THREAT = ThreatModel(math.inf, "0.1")
PAYLOADS = (
    "</script><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'><svg onload=alert(1)>",
    "</style><style>*{background:url(https://evil.example/)}",
    "javascript:alert(1)",
    "{{ 7*7 }}{% for x in y %}",
    "<!--<a href=https://evil.example>",
)


@pytest.fixture(scope="module")
def result():
    data = load("digits")
    return audit(load_model("digits_pgd"), (data.x[:60], data.y[:60]), THREAT, name="digits_pgd")


class Page(HTMLParser):
    """Every tag with its attributes, and the visible text."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def harmless(html):
    """Nothing is loaded, nothing but our own style and script, no handler, no link but to what the page holds or to a
    file beside it."""
    page = Page(html)
    names = {tag for tag, _ in page.tags}
    assert not names & {"iframe", "object", "embed", "base", "form"}
    for one in ("style", "script"):
        assert sum(tag == one for tag, _ in page.tags) == 1
        (text,) = re.findall(f"<{one}>(.*?)</{one}>", html, re.DOTALL)
        assert f"{one}-src '{source_hash(text)}'" in policy(page)
        assert text == asset({"style": "style.css", "script": "table.js"}[one])
    for tag, attributes in page.tags:
        for key, value in attributes.items():
            assert not key.startswith("on"), (tag, key)
            assert key not in ("style", "srcdoc", "action"), (tag, key)
            if key == "src":
                assert value.startswith("data:image/png;base64,")
            if key == "href":
                assert value.startswith(("data:application/octet-stream;base64,", "./")) or (
                    (tag, value) == ("link", "data:,")
                )
    return page


def policy(page):
    (found,) = [
        a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"
    ]
    return found


def test_the_page_is_self_contained_and_says_it_all(result):
    page = harmless(render(result))
    assert policy(page).startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    assert "unsafe" not in policy(page)
    assert render(result) == render(result)
    for word in (
        f"{100 * result.certified:.2f} %",
        f"{100 * result.empirical:.2f} %",
        "crown_ibp",
        "auto",
    ):
        assert word in page.text
    assert "linf eps=0.1 in [0, 1]" in page.text
    images = [a for t, a in page.tags if t == "img"]
    assert len(images) % 3 == 0
    assert len(images) >= 3
    assert all(a["alt"] for a in images)
    pictures = [a for t, a in page.tags if t == "svg"]
    assert len(pictures) == 4
    assert all(a["role"] == "img" and a["aria-label"] for a in pictures)
    assert all(a.get("scope") in ("col", "row") for t, a in page.tags if t == "th")


@pytest.mark.parametrize("payload", PAYLOADS)
def test_no_string_becomes_markup(result, payload):
    data = Data(result.x, result.y, 0.0, 1.0, payload, (payload,) * 10)
    evidence = tuple(
        replace(e, method=payload) if e else None for e in result.bracket.upper_evidence
    )
    hostile = replace(
        result,
        name=payload,
        data=data,
        notes=(payload,),
        stopped=payload,
        differences={payload: 0.1},
        identity={payload: payload, "list": [payload]},
        findings=(Finding(payload, True, 1.0, 0.5, payload, payload, 1.0),),
        methods=(Row(payload, "attack", 1.0, 5, 2, payload, units=result.methods[0].units),),
        bracket=replace(
            result.bracket,
            upper_evidence=evidence,
            lower_evidence=tuple(
                Evidence(payload, path=f"/some/where/{payload}") for _ in range(len(result))
            ),
        ),
    )
    page = harmless(render(hostile))
    assert page.text.count(payload) >= 10
    curve = Curve((hostile, hostile), hostile, 1.0, payload, (payload,))
    harmless(render(hostile, curve, Path("/some/where")))
    for svg in figures(hostile, curve).values():
        names = {e.tag.rpartition("}")[2] for e in ET.fromstring(svg).iter()}  # noqa: S314
        assert names <= {"svg", "style", "rect", "path", "text", "circle", "polyline", "polygon"}
    assert len(page.tags) == len(Page(render(replace(hostile, name="x"))).tags)


def test_written_whole(result, tmp_path):
    result.report(tmp_path / "r.html")
    assert (tmp_path / "r.html").read_text(encoding="utf-8").endswith("</html>\n")


def test_samples_show_intervals_and_positions(tmp_path):
    out = audit(
        load_model("digits_standard"),
        load("digits"),
        THREAT,
        samples=40,
        cascade=select(["clean", "fgsm"]),
    )
    page = harmless(render(out))
    assert "40 of 500 examples drawn at random" in page.text
    assert "Whiskers" in page.text
    assert all(f"{i}" in page.text for i in out.positions.tolist())


@pytest.mark.parametrize("features", [6, 600])
def test_inputs_that_are_no_images(features):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(features, 8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.rand(30, features)
    with torch.no_grad():
        y = net(x).argmax(1)
    out = audit(net, (x, y), ThreatModel(2, 0.8))
    page = harmless(render(out))
    assert out.empirical < 1
    assert sum(t == "svg" for t, _ in page.tags) > 4 or features > 512


def test_nothing_broken_and_one_class():
    net = nn.Linear(3, 2)
    with torch.no_grad():
        net.weight.zero_()
        net.bias.copy_(torch.tensor([2.0, 0.0]))
    out = audit(net, (torch.rand(5, 3), torch.zeros(5, dtype=torch.int64)), THREAT)
    assert out.certified == 1
    assert "Broken examples" not in harmless(render(out)).text


def decode(data):
    """A PNG back into pixels, filter 0 only."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, parts = 8, {}
    while at < len(data):
        (size,) = struct.unpack(">I", data[at : at + 4])
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
        assert struct.unpack(">I", data[at + 8 + size : at + 12 + size])[0] == zlib.crc32(
            kind + body
        )
        parts[kind] = body
        at += 12 + size
    width, height = struct.unpack(">II", parts[b"IHDR"][:8])
    lines = np.frombuffer(zlib.decompress(parts[b"IDAT"]), np.uint8).reshape(height, 1 + 3 * width)
    assert not lines[:, 0].any()
    return lines[:, 1:].reshape(height, width, 3)


def test_png_round_trip():
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    assert np.array_equal(decode(png(image)), image)


def test_colours_of_images_and_changes():
    gray = as_image(np.array([[[0.0, 1.0], [0.5, 2.0]]]))
    assert gray[..., 0].tolist() == [[0, 255], [128, 255]]
    assert as_image(np.zeros((3, 2, 4))).shape == (2, 4, 3)
    change = as_change(np.array([[[-0.1, 0.0, 0.1]]]), 0.1)
    assert change.tolist() == [[[0, 90, 181], [255, 255, 255], [213, 94, 0]]]
    assert (as_change(np.zeros((1, 2, 2)), 0.0) == 255).all()


def test_the_images_of_the_page_are_the_examples(result):
    uris = re.findall(r"data:image/png;base64,([^\"]+)", render(result))
    first = decode(base64.b64decode(uris[0]))
    known = [as_image(x.double().numpy()) for x in result.x]
    assert any(np.array_equal(first, image) for image in known)


def test_the_histogram_counts_everything_and_splits_at_zero():
    lower = np.array([-math.inf, -3.0, -0.1, 0.2, 40.0, *np.linspace(-1, 1, 50)])
    upper = np.array([math.inf, -0.2, *np.linspace(-1, 2, 50)])
    svg, table = margin_histogram(lower, upper)
    assert sum(row[2] for row in table) == 54
    assert sum(row[3] for row in table) == 51
    assert any(a == 0 for a, *_ in table)
    assert all(not a < 0 < b for a, b, *_ in table)
    assert "nan" not in svg
    for values in (
        np.array([]),
        np.zeros(3),
        np.full(3, math.inf),
        np.full(4, -1e-12),
        np.full(4, 1e30),
    ):
        svg, _ = margin_histogram(values, values)
        assert "nan" not in svg
        assert "inf" not in svg


def test_the_bar_adds_up():
    svg = stacked_bar([("robust", 0.25), ("unknown", 0.25), ("broken", 0.5)], [(0.2, 0.3)])
    widths = [float(w) for w in re.findall(r'width="([\d.]+)" height="34"', svg)]
    assert widths == [160.0, 160.0, 320.0]


# -- drill-down, figures ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def curved():
    data = load("digits")
    eps = ("0.1", "0.03", "0.2")
    return curve(load_model("digits_pgd"), (data.x[:40], data.y[:40]), THREAT, eps)


def test_a_curve_is_drawn_with_its_numbers(curved):
    page = harmless(render(curved.main, curved))
    for one in curved.audits:
        assert f"{100 * one.certified:.2f} %" in page.text
        assert f"{100 * one.empirical:.2f} %" in page.text
    assert sum(t == "svg" for t, _ in page.tags) == 5
    assert "certified to" in page.text


def test_each_example_has_what_every_method_said(result):
    html = render(result)
    for row in result.methods:
        if row.units is not None:
            assert html.count(f'<tr><th scope="row">{row.name}</th>') == 1 + len(row.units.rows)
    first = next(r for r in result.methods if r.units is not None)
    assert f"{first.units.upper[0].item():+.4f}".replace("-", "−") in html


def test_the_links_hold_the_witnesses(result):
    found = re.findall(r'href="data:application/octet-stream;base64,([^"]+)"', render(result))
    points = [np.load(io.BytesIO(base64.b64decode(f)), allow_pickle=False) for f in found]
    assert len(points) == result.counts[Verdict.VULNERABLE]
    kept = [z.numpy() for z in result.bracket.witness]
    assert all(any(np.array_equal(p, z) for z in kept) for p in points)


def test_certificates_beside_the_report_are_links_others_are_names(result, tmp_path):
    evidence = (Evidence("crown", path=str(tmp_path / "proofs" / "a b#.cert")),) * len(result)
    proved = replace(result, bracket=replace(result.bracket, lower_evidence=evidence))
    assert 'href="./proofs/a%20b%23.cert"' in render(proved, folder=tmp_path)
    elsewhere = render(proved, folder=tmp_path / "reports")
    assert "a b#.cert" in elsewhere
    assert '.cert"' not in elsewhere
    assert str(tmp_path) not in elsewhere


def test_figures_are_files(curved, tmp_path):
    missing = curved.figures(tmp_path)
    assert not missing or "calipers[figures]" in missing
    names = {"bracket", "margins", "classes", "costs", "curve"}
    assert {p.stem for p in tmp_path.glob("*.svg")} == names
    for file in tmp_path.glob("*.svg"):
        ET.parse(file)  # noqa: S314
        assert "var(" not in file.read_text()


def test_figures_as_png_and_pdf(result):
    pytest.importorskip("cairosvg", reason="extra figures", exc_type=(ImportError, OSError))
    svg = figures(result)["margins"]
    assert converted(svg, ".png").startswith(b"\x89PNG")
    assert converted(svg, ".pdf").startswith(b"%PDF")
    with pytest.raises(ValueError, match=r"\.svg, \.png, \.pdf"):
        converted(svg, ".gif")


def test_without_cairosvg_the_svg_files_are_there(result, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cairosvg", None)
    assert "calipers[figures]" in save(tmp_path, figures(result))
    assert {p.suffix for p in tmp_path.iterdir()} == {".svg"}


def test_every_colour_class_of_a_page_has_a_colour_in_files(curved):
    drawn = "".join(figures(curved.main, curved).values())
    used = {c for names in re.findall(r'class="([^"]+)"', drawn) for c in names.split()}
    style = re.findall(r"<style>(.*?)</style>", drawn)[0]
    assert all(f".{c}" in style and f".{c}" in asset("style.css") for c in used)


def test_diagnosed_attacks_stand_in_the_report(run, tmp_path):
    page, out = tmp_path / "r.html", tmp_path / "r.json"
    code, said, _ = run(
        "audit",
        "--samples",
        20,
        "--methods",
        "fgsm,crown",
        "--diagnose",
        "--report",
        page,
        "--json",
        out,
    )
    assert code == 0
    names = [f["name"] for f in json.loads(out.read_text())["diagnostics"]]
    assert len(names) >= 5
    for name in names:
        assert f"attacks, {name}" in page.read_text()
        assert name in said


def test_no_folder_of_this_machine_is_in_the_report(run, tmp_path):
    data = load("digits")
    np.savez(tmp_path / "few.npz", x=data.x[:10].numpy(), y=data.y[:10].numpy())
    save_onnx(load_model("digits_pgd"), tmp_path / "net.onnx")
    page = tmp_path / "pages" / "r.html"
    page.parent.mkdir()
    code, *_ = run(
        "audit", tmp_path / "net.onnx", "--data", tmp_path / "few.npz", "--methods", "fgsm", "--run", tmp_path / "run",
        "--report", page,
    )  # fmt: skip
    assert code == 0
    html = page.read_text()
    assert "net.onnx" in html
    assert "few.npz" in html
    assert str(tmp_path) not in html
    assert str(Path.home()) not in html
    named = audit(
        cp.load_onnx(tmp_path / "net.onnx"), data, THREAT, samples=5, cascade=select(["fgsm"])
    )
    assert named.name == "net.onnx"


@pytest.mark.parametrize("eps", [("0",), ("0", "0.1"), (0.1,)])
def test_curves_of_one_radius_or_from_zero(eps):
    data = load("digits")
    found = curve(
        load_model("digits_pgd"), (data.x[:8], data.y[:8]), THREAT, eps, cascade=select(["fgsm", "interval"])
    )  # fmt: skip
    html = render(found.main, found)
    harmless(html)
    assert "nan" not in str(curve_plot(found))
    if eps[0] == "0":
        assert found.certified[0] == found.empirical[0] == found.main.clean_accuracy


def test_a_sample_s_report_tells_sampling_error_from_unknown(run, tmp_path):
    page = tmp_path / "r.html"
    code, *_ = run("audit", "--samples", 40, "--methods", "fgsm,interval", "--report", page)
    assert code == 0
    said = re.sub(r"\s+", " ", page.read_text())
    assert "On all 500 examples between" in said
    assert re.search(r"Of these [\d.]+%, [\d.]+% are unknown .* sampling error", said)
