"""A limit on working memory: bounds get it, attacks' batches keep within it, results do not change."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import calipers as cp
from calipers.attacks import pgd
from calipers.data import load
from calipers.evaluate.audit import bytes_of
from calipers.evaluate.cascade import default_cascade
from calipers.evaluate.fold import attack_bytes
from calipers.models import load_model

THREAT = cp.ThreatModel(math.inf, "0.1")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        (2048, 2048),
        ("2GB", 2 * 10**9),
        ("1.5GiB", 3 * 2**29),
        ("500 mb", 5 * 10**8),
        ("3KiB", 3072),
        ("7B", 7),
        ("2G", 2 * 10**9),
    ],
)
def test_sizes(text, size: int) -> None:
    assert bytes_of(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1", 0, "0.1", "2XB", "2 G B", "1e9", "2Gi2", None])
def test_what_is_no_size_is_named(text) -> None:
    with pytest.raises(ValueError, match=r"memory: .* is no size; give bytes"):
        bytes_of(text)


def test_methods_keep_within_it() -> None:
    network, data = load_model("digits_pgd"), load("digits")
    each = attack_bytes(network, data.x)
    seen: dict[str, list] = {}

    def spied(stage):
        def method(model, region, spec, **keywords):
            seen.setdefault(stage.side, []).append(
                keywords.get("memory") if stage.side == "bound" else len(region)
            )
            return stage.method(model, region, spec, **keywords)

        return replace(stage, method=method)

    cascade = [spied(stage) for stage in default_cascade(network)]
    pair = data.x[:30], data.y[:30]
    limited = cp.audit(network, pair, THREAT, memory=7 * each + 5, cascade=cascade)
    assert max(seen["attack"]) == 7
    assert set(seen["bound"]) == {7 * each + 5}
    free = cp.audit(network, pair, THREAT)
    assert limited.bracket.verdict() == free.bracket.verdict()
    torch.testing.assert_close(limited.bracket.lower, free.bracket.lower)
    seen.clear()
    cp.audit(network, pair, THREAT, cascade=cascade)
    assert set(seen["bound"]) == {None}
    least = cp.audit(network, pair, THREAT, memory=1, deployed=True)
    assert least.certified == free.certified


@pytest.mark.parametrize("kind", ["dense", "conv"])
def test_an_attack_saves_no_more_than_is_planned(kind: str) -> None:
    modules = {
        "dense": nn.Sequential(
            nn.Flatten(),
            nn.Linear(64, 300),
            nn.ReLU(),
            nn.Linear(300, 200),
            nn.Tanh(),
            nn.Linear(200, 5),
        ),
        "conv": nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(128, 5),
        ),
    }
    x, y = torch.rand(20, 1, 8, 8), torch.arange(20) % 5
    network = cp.capture(modules[kind].eval(), x[:2])
    known = {p.data_ptr() for p in [*network.module.parameters(), *network.module.buffers()]}
    saved, most = [0], [0]

    def pack(tensor):
        if tensor.data_ptr() not in known:
            saved[0] += tensor.numel() * tensor.element_size()
            most[0] = max(most[0], saved[0])
        return tensor

    def counted(z):
        saved[0] = 0
        return network(z)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        pgd(counted, THREAT.around(x), cp.Spec.label(y, 5), steps=2)
    planned = 20 * attack_bytes(network, x)
    assert 0.05 * planned < most[0] <= planned


def test_the_command_line_option(monkeypatch, capsys) -> None:
    from calipers.cli import main

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["calipers", "audit", "--samples", "20", *arguments])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        return code, capsys.readouterr().err

    assert run("--memory", "20MB")[0] == 0
    code, err = run("--memory", "lots")
    assert code == 2
    assert "memory: 'lots' is no size" in err
    assert "Traceback" not in err
