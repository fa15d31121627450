"""Maxima and minima built from ReLUs: the same function as maxima, decided as linear programs decide it."""

from __future__ import annotations

import gzip
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linprog
from torch import Tensor, nn

import certificates
import networks
from calipers.evaluate.queries import read
from calipers.evaluate.strict import decide_strictly
from calipers.exact import split_inputs
from calipers.exact.lattice import with_maxima
from calipers.graph.graph import Network, bind, evaluate
from calipers.graph.onnx import save_onnx
from calipers.sets import Region
from calipers.spec import Spec
from calipers_check import lattice as check_lattice
from calipers_check import layers
from exact_checks import deadline

F64 = torch.float64


def built(module: nn.Sequential) -> Network:
    b = networks.Builder((module[0].in_features,))
    h = b.x
    for layer in module:
        plain = isinstance(layer, nn.Linear)
        h = (
            b(F.linear, h, layer.weight.detach(), layer.bias.detach())
            if plain
            else b(torch.relu, h)
        )
    return b.network()


def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(torch.zeros(len(weight)) if bias is None else bias)
    return layer


def halved(groups: int, width: int, sign: float) -> list[nn.Module]:
    """One round of the tournaments of ``groups`` groups: minima (−1) or maxima (1) of neighbours."""
    pair = torch.tensor([[1.0, 1], [-1, -1], [1, -1], [-1, 1]])
    back = torch.tensor([[0.5, -0.5, sign / 2, sign / 2]])
    count = groups * width // 2
    return [
        linear(torch.block_diag(*[pair] * count)),
        nn.ReLU(),
        linear(torch.block_diag(*[back] * count)),
    ]


def lattice(
    seed: int, functions: int = 6, groups: int = 4, width: int = 4
) -> tuple[nn.Sequential, Tensor, Tensor, Tensor]:
    """max over groups of the least of some affine functions of two inputs; weights, biases, who is in which group."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(functions, 2, generator=generator)
    bias = torch.randn(functions, generator=generator)
    members = torch.randint(functions, (groups, width), generator=generator)
    layers: list[nn.Module] = [
        linear(weight, bias),
        linear(torch.eye(functions)[members.flatten()]),
    ]
    size = width
    while size > 1:
        layers += halved(groups, size, -1)
        size //= 2
    while groups > 1:
        layers += halved(1, groups, 1)
        groups //= 2
    return nn.Sequential(*layers), weight, bias, members


def same(network: Network, other: Network, count: int = 200) -> bool:
    x = 2 * torch.randn(count, *network.input_shape, dtype=F64)
    y, z = (evaluate(n.graph, bind(n.graph, n.module, dtype=F64), x) for n in (network, other))
    return torch.allclose(y, z, rtol=0, atol=1e-13)


def operations(network: Network) -> list[str]:
    return [n.op.__name__ for n in network.graph.nodes]


@pytest.mark.parametrize("seed", range(3))
def test_a_lattice_becomes_a_maximum_of_minima(seed: int) -> None:
    module, weight, bias, members = lattice(seed)
    network = built(module)
    short = with_maxima(network)
    assert "relu" not in operations(short)
    assert operations(short).count("maximum") == 2
    assert same(network, short)
    x = torch.randn(100, 2)
    expected = (x @ weight.T + bias)[:, members].amin(2).amax(1)
    env = bind(short.graph, short.module, dtype=F64)
    assert torch.allclose(
        evaluate(short.graph, env, x.double())[:, 0], expected.double(), atol=1e-5
    )


@pytest.mark.parametrize("above", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_decided_as_linear_programs_decide_it(seed: int, above: bool) -> None:
    """The least value on a box: of all choices of a member for each group, the least of their maxima's minima."""
    module, weight, bias, members = lattice(seed)
    network = built(module)
    w, b = weight.double().numpy(), bias.double().numpy()
    least = np.inf
    for chosen in itertools.product(*(np.unique(m) for m in members.numpy())):
        rows = np.array(chosen)
        found = linprog(
            [0, 0, 1],
            np.c_[w[rows], -np.ones(len(rows))],
            -b[rows],
            bounds=[(-1, 1)] * 2 + [(None, None)],
        )
        least = min(least, found.fun)
    spec = Spec(
        torch.ones(1, 1, 1),
        torch.tensor([[(0.001 if above else -0.001) - least]]),
        torch.tensor([0]),
    )
    region = Region.box(torch.full((1, 2), -1.0), torch.ones(1, 2))
    found = split_inputs(network, region, spec, deadline=deadline(60))
    assert found.robust == above, found
    assert (found.point is not None) != above


@pytest.mark.parametrize("seed", range(3))
def test_rows_of_one_relu_are_maxima(seed: int) -> None:
    """Leaky ReLUs of both slopes, plain ones, opposite and repeated rows, and one without any."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(4, 3, generator=generator)
    first = linear(torch.cat([rows, -rows, rows[:1]]), torch.zeros(9))
    back = torch.zeros(6, 9)
    for i, (plus, minus) in enumerate([(1, -0.25), (-1, 0.5), (2, 0), (0, -1)]):
        back[i, i], back[i, 4 + i] = plus, minus
    back[4, 0], back[4, 8] = 0.5, 0.25
    module = nn.Sequential(
        first,
        nn.ReLU(),
        linear(back, torch.arange(6.0)),
        nn.Linear(6, 2),
        nn.ReLU(),
        nn.Linear(2, 2),
    )
    network = built(module)
    short = with_maxima(network)
    assert operations(short).count("maximum") >= 1
    assert same(network, short)


def stepped(module: nn.Sequential) -> layers.Network:
    """The same as the checker has it."""
    steps: list[layers.Step] = []
    for number, layer in enumerate(module):
        if isinstance(layer, nn.Linear):
            weight, bias = (v.detach().double().numpy() for v in (layer.weight, layer.bias))
            steps.append(layers.Dense((number,), len(weight), weight, bias=bias))
        else:
            steps.append(layers.Kink((number,), steps[-1].size, 0.0, 1.0))
    return layers.Network(module[0].in_features, steps)


def exactly(network: layers.Network, x: np.ndarray) -> np.ndarray:
    """The outputs in rational arithmetic."""
    values = [layers.RATIONAL(x)]
    for step in (s.exact() for s in network.steps):
        sources = [values[v] for v in step.sources]
        if isinstance(step, layers.Affine):
            value = sum(step.along(j, v) for j, v in enumerate(sources))
            values.append(value if step.bias is None else value + step.bias)
        elif isinstance(step, layers.Maximum):
            values.append(sources[0][:, step.index].max(2))
        else:
            values.append(np.maximum(sources[0], 0))
    return values[-1]


@pytest.mark.parametrize("seed", range(3))
def test_the_checker_folds_exactly(seed: int) -> None:
    network = stepped(lattice(seed)[0])
    folded = check_lattice.with_maxima(network)
    kinds = [type(s).__name__ for s in folded.steps]
    assert kinds.count("Maximum") == 2
    assert "Kink" not in kinds
    x = np.random.default_rng(seed).normal(size=(20, 2))
    assert (exactly(network, x) == exactly(folded, x)).all()


@pytest.mark.parametrize("scale", [1.0, 2.0**-600, 2.0**-300, 2.0**300, 2.0**600])
def test_products_that_would_vanish_or_overflow_are_not_folded(scale: float) -> None:
    pair = linear(torch.tensor([[1.1, -0.3], [-1.1, 0.3]])), linear(torch.tensor([[0.7, -0.7]]))
    network = stepped(nn.Sequential(pair[0], nn.ReLU(), pair[1]))
    for step in network.steps:
        if isinstance(step, layers.Dense):
            step.weight = step.weight * scale
    folded = check_lattice.with_maxima(network)
    assert (folded is not network) or scale != 1
    assert (folded is network) or 2.0**-400 < scale < 2.0**400
    x = np.random.default_rng(0).normal(size=(5, 2))
    assert (exactly(network, x) == exactly(folded, x)).all()


@pytest.mark.parametrize("above", [True, False])
def test_certificates_of_lattices(tmp_path: Path, above: bool) -> None:
    module, *_ = lattice(0)
    grid = torch.cartesian_prod(*[torch.linspace(-1, 1, 401, dtype=F64)] * 2)
    values = module.double()(grid).detach()
    edge = float(values.min() - 0.01 if above else values.max() + 0.01)
    save_onnx(built(lattice(0)[0]), tmp_path / "net.onnx")
    relation = "<=" if above else ">="
    text = certificates.query([-1.0] * 2, [1.0] * 2, 1, f"({relation} Y_0 {edge!r})")
    (tmp_path / "q.vnnlib").write_text(text)
    files = tmp_path / "net.onnx", tmp_path / "q.vnnlib"
    network, query = read(*files)
    decision, certificate = decide_strictly(network, query, files, seconds=60)
    assert decision.verdict == "unsat", decision
    assert certificate is not None
    assert certificate.accepted
    assert b"fold" in gzip.decompress(certificate.data or b"")


def test_other_networks_stay_as_they_are() -> None:
    dense = nn.Sequential(
        nn.Linear(3, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 2)
    )
    few = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))  # each row reads several ReLUs
    for module in (dense, few, nn.Sequential(nn.Linear(3, 2))):
        network = built(module)
        assert with_maxima(network) is network


def test_sums_that_would_round_are_left_alone() -> None:
    first = linear(torch.tensor([[1.0, 3e-30], [-1.0, -3e-30]]))
    module = nn.Sequential(first, nn.ReLU(), linear(torch.tensor([[1.0, 1e-30]])))
    network = built(module)
    assert with_maxima(network) is network
