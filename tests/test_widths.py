"""The per-layer report: counts by hand, sampled widths inside, and the command that shows it."""

from __future__ import annotations

import math

import pytest
import torch

import networks
from calipers.bounds.widths import layer_widths
from calipers.evaluate.tables import widest, widths_table
from calipers.graph.graph import bind, concrete, walk
from calipers.sets import Region
from networks import ARCHITECTURES, Builder

F64 = torch.float64
INF = math.inf


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_widths_hold_what_is_sampled(name: str) -> None:
    network = ARCHITECTURES[name](0)
    region = Region.ball(networks.inputs(network, 4, 3), 0.2, INF, 0.0, 1.0)
    rows = layer_widths(network, region, dtype=F64)
    env = bind(network.graph, network.module, dtype=F64)
    seeds = torch.arange(4)
    traces = [
        walk(network.graph, {**env, "x": region.sample(seeds + 4 * i, F64)}, concrete)
        for i in range(20)
    ]
    assert rows[-1].name == network.graph.output
    for row in rows:
        loose, tight = row.rungs["interval"], row.rungs["crown"]
        assert 0 <= tight.unstable <= loose.unstable <= 1
        assert tight.mean <= loose.mean * (1 + 1e-12)
        assert tight.mean <= tight.largest
        values = torch.stack([trace[row.name] for trace in traces])
        spread = values.amax(0) - values.amin(0)
        assert spread.mean().item() <= tight.mean + 1e-12
        assert spread.max().item() <= tight.largest + 1e-12


def test_counts_of_one_layer() -> None:
    """x in [-1, 1]: x + 2 is stable, x and x − 0.5 are not."""
    b = Builder((1,))
    h = b(torch.nn.functional.linear, b.x, torch.ones(3, 1), torch.tensor([2.0, 0.0, -0.5]))
    b(torch.nn.functional.linear, b.relu(h), torch.ones(1, 3))
    region = Region.box(torch.tensor([[-1.0]]), torch.tensor([[1.0]]))
    relu, output = layer_widths(b.network(), region)
    assert (relu.op, relu.neurons, relu.name) == ("relu", 3, h.name)
    for rung in relu.rungs.values():
        assert rung.unstable == pytest.approx(2 / 3)
        assert rung.mean == rung.largest == 2.0
    assert output.op == ""
    assert output.rungs["interval"].mean == pytest.approx(2 + 1 + 0.5)


def test_a_maximum_counts_its_windows() -> None:
    network = ARCHITECTURES["max_pool"](0)
    rows = layer_widths(network, Region.ball(networks.inputs(network, 2, 3), 0.0, INF))
    pool = rows[0]
    assert pool.op == "max_pool"
    assert pool.neurons == math.prod(network.graph.node[network.graph.nodes[1].name].shape)
    assert pool.rungs["interval"].unstable == 0.0  # a point decides every window
    network = networks.mlp(0)
    rows = layer_widths(network, Region.ball(networks.inputs(network, 2, 3), 0.0, INF))
    assert widest(rows).startswith("No neuron is unstable")


def test_the_command_shows_it(run) -> None:
    code, out, _ = run("inspect", "digits_pgd", "--data", "digits", "--eps", "0.05", "--samples", 3)
    assert code == 0
    assert "Intervals on 3 of digits" in out
    assert "relu" in out.rpartition("interval")[2]
    assert "neurons of an example are unstable for CROWN" in out
    plain = run("inspect", "digits_pgd")
    assert plain[0] == 0
    assert "Intervals on" not in plain[1]
    assert out.startswith(plain[1])
    assert run("inspect", "digits_pgd", "--data", "digits", "--samples", 0)[0] == 2
    code, _, err = run("inspect", "digits_pgd", "--data", "digits", "--norm", "l3")
    assert code == 2
    assert "norm: unknown name 'l3'" in err


def test_names_are_escaped() -> None:
    from rich.console import Console

    network = networks.mlp(0)
    rows = layer_widths(network, Region.ball(networks.inputs(network, 2, 3), 0.1, INF))
    console = Console(width=100, record=True)
    console.print(widths_table(rows, "a [b]title[/b]"))
    assert "a [b]title[/b]" in console.export_text()
