"""Figures: well-formed, to scale, and with escaped names."""

from __future__ import annotations

import base64
import math
import xml.etree.ElementTree as ET
import zlib

import numpy as np
import pytest
import torch
from torch import Tensor

from calipers import Spec, ThreatModel, gini, loss_curve, pgd, restart_losses
from calipers import data as datasets
from calipers.evaluate import plots
from calipers.models import load_model
from calipers.seeds import seeds
from calipers.sets import equivalent_eps

SVG = "{http://www.w3.org/2000/svg}"
NET, TEST = load_model("digits_standard").module, datasets.load("digits")
X, Y = TEST.x[:3], TEST.y[:3]
SPEC = Spec.label(Y, 10)


def parse(svg: str) -> ET.Element:
    return ET.fromstring(svg)  # noqa: S314 - the library's own text


def found(p: float) -> Tensor:
    return pgd(NET, ThreatModel(p, equivalent_eps(p, 64, 0.1)).around(X), SPEC)


def pixels(image: ET.Element) -> np.ndarray:
    """Of an 8 by 8 PNG in a data URI."""
    data = base64.b64decode(image.attrib["href"].split(",")[1])
    start = data.index(b"IDAT") + 4
    raw = zlib.decompressobj().decompress(data[start:])
    return np.frombuffer(raw, np.uint8).reshape(8, 1 + 24)[:, 1:].reshape(8, 8, 3)


def test_changes_show_dense_and_sparse_ones() -> None:
    points = {"linf": found(math.inf), "l2 <b>": found(2), "l1 & l1": found(1)}
    tree = parse(plots.changes(X, points))
    images = tree.findall(f"{SVG}image")
    assert len(images) == 3 * 4
    pale = [int((pixels(image) > 230).all(2).sum()) for image in images[3:]]
    assert sum(pale[0:3]) < sum(pale[3:6]) < sum(pale[6:9])
    texts = [text.text for text in tree.findall(f"{SVG}text")]
    assert {"input", *points} <= set(texts)
    for point in points.values():
        for index in gini(point - X).tolist():
            assert f"Gini {index:.2f}" in texts
    _, _, width, height = map(float, tree.attrib["viewBox"].split())
    for image in images:
        assert float(image.attrib["x"]) + float(image.attrib["width"]) <= width
        assert float(image.attrib["y"]) + float(image.attrib["height"]) <= height


def test_curves_and_restarts_are_to_scale() -> None:
    region = ThreatModel(math.inf, 0.1).around(X)
    curve = loss_curve(NET, region, SPEC)
    lines = parse(plots.curves(curve)).findall(f"{SVG}polyline")
    assert len(lines) == len(X) + 1
    drawn = torch.tensor(
        [[float(pair.split(",")[1]) for pair in line.attrib["points"].split()] for line in lines]
    )
    top, bottom = curve.max(), curve.min()
    expected = plots.GAP + (plots.HEIGHT - plots.BOTTOM - plots.GAP) * (top - curve) / (
        top - bottom
    )
    torch.testing.assert_close(drawn[:-1], expected.T.float(), rtol=0, atol=0.06)
    losses = restart_losses(NET, region, SPEC, restarts=5, seeds=seeds(X, 0, "t"))
    circles = parse(plots.spread(losses)).findall(f"{SVG}circle")
    assert len(circles) == (5 + 1) * len(X)
    best = [c for c in circles if c.attrib["class"] == "best"]
    assert len({c.attrib["cx"] for c in best}) == len(X)
    assert all(plots.GAP <= float(c.attrib["cy"]) <= plots.HEIGHT - plots.BOTTOM for c in circles)


def test_lines_are_to_scale_on_both_kinds_of_axes() -> None:
    series = {
        "a <b>": [(1e-3, 1.0), (1e-2, 3.0), (1e-1, math.nan)],
        "c": [(1e-1, 2.0), (-1.0, 0.0)],
    }
    tree = parse(plots.lines(series, "eps", "margin", log="x"))
    first = tree.find(f"{SVG}polyline")
    assert first is not None
    (x0, y0), (x1, y1) = (map(float, p.split(",")) for p in first.attrib["points"].split())
    ends = plots.LEFT + plots.GAP, plots.WIDTH - 2 * plots.GAP
    assert x0 == pytest.approx(ends[0])
    assert x1 == pytest.approx(sum(ends) / 2)  # the middle of 1e-3 and 1e-1 on a logarithmic axis
    assert y0 == pytest.approx(plots.HEIGHT - plots.BOTTOM - 8)
    assert y1 == pytest.approx(plots.GAP + 8)
    texts = [text.text for text in tree.iter(f"{SVG}text")]
    assert {"a <b>", "c", "eps", "margin", "0.001", "0.01", "0.1", "1.5", "3"} <= set(texts)
    assert len(tree.findall(f"{SVG}circle")) == 2 + 1 + 2  # no point at a negative x, nor at NaN
    dots = parse(plots.lines(series, "eps", "margin", log="xy", joined=False))
    assert dots.find(f"{SVG}polyline") is None
    with pytest.raises(ValueError, match="no finite point"):
        plots.lines({"a": [(0.0, math.inf)]}, "x", "y")


def test_constant_values_and_no_change_are_drawn_too() -> None:
    parse(plots.curves(torch.ones(4, 2)))
    parse(plots.spread(torch.ones(1, 1)))
    parse(plots.changes(X, {"none": X}))


def test_what_is_no_image_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(3, 64\) is no batch of images"):
        plots.changes(X.flatten(1), {})
    with pytest.raises(ValueError, match="points: other has shape"):
        plots.changes(X, {"other": X[:1]})
