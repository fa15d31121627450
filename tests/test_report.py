import base64
import math
import re
import struct
import zlib
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from torch import nn

from calipers import ThreatModel, audit
from calipers.data import Data, load
from calipers.evaluate.cascade import select
from calipers.evaluate.pictures import as_change, as_image, margin_histogram, png, stacked_bar
from calipers.evaluate.report import render
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
    page = Page(html)
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "iframe", "object", "embed", "link", "base", "form", "a"}
    assert sum(tag == "style" for tag, _ in page.tags) == 1
    for tag, attributes in page.tags:
        for key, value in attributes.items():
            assert not key.startswith("on"), (tag, key)
            assert key not in ("style", "href", "srcdoc", "action"), (tag, key)
            if key == "src":
                assert value.startswith("data:image/png;base64,")
    return page


def test_the_page_is_self_contained_and_says_it_all(result):
    page = harmless(render(result))
    policy = next(
        a["content"] for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"
    )
    nonce = next(a["nonce"] for t, a in page.tags if t == "style")
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'nonce-")
    assert f"'nonce-{nonce}'" in policy
    assert len(nonce) >= 20
    assert nonce not in render(result)
    for word in (
        f"{100 * result.certified:.2f} %",
        f"{100 * result.empirical:.2f} %",
        "crown_ibp",
        "auto",
    ):
        assert word in page.text
    assert "linf eps=0.1 in [0, 1]" in page.text
    assert sum(t == "img" for t, _ in page.tags) % 3 == 0
    assert sum(t == "img" for t, _ in page.tags) >= 3
    assert sum(t == "svg" for t, _ in page.tags) == 2


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
        methods=(Row(payload, "attack", note=payload),),
        bracket=replace(result.bracket, upper_evidence=evidence),
    )
    page = harmless(render(hostile))
    assert page.text.count(payload) >= 10
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
    assert sum(t == "svg" for t, _ in page.tags) > 2 or features > 512


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
