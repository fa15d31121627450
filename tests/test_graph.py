"""Graphs built by hand: resolution, liveness, memory, binding."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import Tensor, nn

from calipers.errors import CaptureError
from calipers.graph import primitives as prim
from calipers.graph.graph import (
    Graph,
    GraphModule,
    Network,
    Node,
    Ref,
    bind,
    concrete,
    evaluate,
    resolve,
    walk,
)


def small() -> tuple[Graph, dict[str, Tensor]]:
    """y = relu(x·Wᵀ) + x·c, with a constant subgraph W' = 2W."""
    nodes = (
        Node("double", torch.mul, (Ref("@weight"), 2.0), shape=(3, 3)),
        Node("linear", torch.nn.functional.linear, (Ref("x"), Ref("double")), shape=(3,)),
        Node("relu", torch.relu, (Ref("linear"),), shape=(3,)),
        Node("scaled", torch.mul, (Ref("x"), Ref("c")), shape=(3,)),
        Node("y", torch.add, (Ref("relu"), Ref("scaled")), {"alpha": 3}, shape=(3,)),
    )
    constants = {"c": torch.tensor([1.0, -2.0, 0.5])}
    return Graph(nodes, {"@weight": "weight"}, ("x",), "y", constants), constants


def test_evaluate_against_plain_torch() -> None:
    graph, constants = small()
    module = nn.Linear(3, 3, bias=False)
    for batch in (1, 4):
        x = torch.randn(batch, 3)
        expected = torch.relu(x @ (2 * module.weight).T) + 3 * x * constants["c"]
        torch.testing.assert_close(
            evaluate(graph, bind(graph, module), x), expected, rtol=1e-6, atol=1e-6
        )
    env = bind(graph, module, dtype=torch.float64)
    assert env["@weight"].dtype == env["c"].dtype == torch.float64
    assert evaluate(graph, env, x.double()).dtype == torch.float64
    assert set(env) == {"@weight", "c"}  # evaluate leaves its environment as it was


def test_active_values_depend_on_the_input() -> None:
    graph, _ = small()
    assert graph.active == {"x", "linear", "relu", "scaled", "y"}
    assert graph.node["relu"].operands == ("linear",)
    twice = Node("n", torch.cat, ([Ref("a"), Ref("b"), Ref("a")], 1), {"out": (Ref("c"),)})
    assert twice.operands == ("a", "b", "a", "c")


def test_walk_frees_values_after_their_last_use() -> None:
    graph, _ = small()
    module = nn.Linear(3, 3, bias=False)
    alive: list[set[str]] = []

    def rule(node: Node, args: list[object], kwargs: dict[str, object]) -> object:
        alive.append(set(env))
        return concrete(node, args, kwargs)

    env: dict[str, object] = {**bind(graph, module), "x": torch.randn(2, 3)}
    result = walk(graph, env, rule, free=True)
    assert alive == [
        {"@weight", "c", "x"},
        {"@weight", "c", "x", "double"},
        {"@weight", "c", "x", "linear"},
        {"@weight", "c", "x", "relu"},
        {"@weight", "relu", "scaled"},
    ]
    assert set(result) == {"@weight", "y"}
    whole = walk(graph, {**bind(graph, module), "x": torch.randn(2, 3)}, concrete)
    assert set(whole) == {"@weight", "c", "x", "double", "linear", "relu", "scaled", "y"}


def test_resolve_goes_into_lists() -> None:
    env = {"a": 1, "b": 2}
    assert resolve([Ref("a"), (Ref("b"), 3), "a", None], env) == [1, (2, 3), "a", None]
    assert type(resolve([Ref("a")], env)) is list
    with pytest.raises(KeyError):
        resolve(Ref("missing"), env)


def test_bind_looks_up_now_and_substitutes_statistics() -> None:
    net = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout())
    params = {"@m": "0.running_mean", "@t": "0:training", "@d": "1:training", "@w": "0.weight"}
    graph = Graph((), params, ("x",), "x")
    assert bind(graph, net)["@t"] is True
    net[0].eval()
    assert bind(graph, net)["@t"] is False
    assert bind(graph, net)["@d"] is True
    net.train()
    other = torch.ones(2)
    env = bind(graph, net, statistics={"0.running_mean": other})
    assert env["@m"] is other
    assert env["@t"] is False
    assert env["@d"] is True
    assert env["@w"] is net[0].weight
    net[0].weight = nn.Parameter(torch.zeros(2))
    assert bind(graph, net)["@w"].sum() == 0
    with pytest.raises(CaptureError, match="missing"):
        bind(graph, nn.Sequential(nn.ReLU()))
    with pytest.raises(CaptureError, match=r"'0:training'|'0\.running_mean'"):
        bind(graph, nn.Linear(2, 2))


def test_graph_module_and_network() -> None:
    graph, constants = small()
    weight = torch.randn(3, 3)
    graph = Graph(graph.nodes, {"@weight": "weight", "c": "c"}, ("x",), "y")
    module = GraphModule(graph, {"weight": weight, **constants})
    x = torch.randn(2, 3)
    expected = torch.relu(x @ (2 * weight).T) + 3 * x * constants["c"]
    torch.testing.assert_close(module(x), expected, rtol=1e-6, atol=1e-6)
    net = Network(graph, module, (3,))
    assert net.num_classes == 3
    assert net.dtype == torch.float32
    assert net.device == torch.device("cpu")
    torch.testing.assert_close(net(x), expected, rtol=1e-6, atol=1e-6)
    assert net.in_double()(x).dtype == torch.float64
    assert module.double()(x.double()).dtype == torch.float64
    assert net.dtype == torch.float64


def test_primitives_keep_the_batch_first() -> None:
    x = torch.arange(24.0).reshape(2, 3, 4)
    assert torch.equal(prim.reshape(x, (12,)), x.flatten(1))
    assert torch.equal(prim.expand(x[:, :1], (5, 4)), x[:, :1].repeat(1, 5, 1))
    assert torch.equal(prim.slice_(x, 2, 1, 4, 2), x[:, :, 1:4:2])
    assert torch.equal(prim.maximum(x, (1, 2), False), x.flatten(1).max(1).values)
    assert torch.equal(prim.pad(x, (1, 0), 7.0)[..., 0], torch.full((2, 3), 7.0))
    assert torch.equal(prim.average_pool(x, (2,), (2,), (0,)), (x[..., ::2] + x[..., 1::2]) / 2)
    assert torch.equal(prim.max_pool(x, (2,), (2,), (0,), (1,)), x[..., 1::2])
    assert prim.identity(x) is x
    assert prim.dropout(x, 0.5, False) is x


@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 4), (6, 3, 2, 2)])
@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_is_its_formula(shape: tuple[int, ...], affine: bool) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    column = (1, 3, *[1] * (len(shape) - 2))
    mean, var, weight, bias = (torch.rand(3, dtype=torch.float64) + 0.5 for _ in range(4))
    scale, shift = (weight, bias) if affine else (None, None)

    def formula(m: Tensor, v: Tensor) -> Tensor:
        y = (x - m.view(column)) / torch.sqrt(v.view(column) + 1e-3)
        return y * weight.view(column) + bias.view(column) if affine else y

    def run(m: Tensor | None, v: Tensor | None, training: bool) -> Tensor:
        return prim.batch_norm(x, scale, shift, m, v, training, 1e-3)

    torch.testing.assert_close(run(mean, var, False), formula(mean, var))
    axes = [0, *range(2, len(shape))]
    own = formula(x.mean(axes), x.var(axes, unbiased=False))
    torch.testing.assert_close(run(mean, var, True), own)
    torch.testing.assert_close(run(None, None, False), own)
    live = mean.clone().requires_grad_(), var.clone().requires_grad_()
    torch.testing.assert_close(run(*live, False), formula(mean, var))
    assert torch.autograd.gradcheck(lambda m, v: run(m, v, False), live)


def test_ops_are_called_with_resolved_arguments() -> None:
    node = Node("n", operator.add, (Ref("a"), 2))
    assert walk(Graph((node,), {}, ("a",), "n"), {"a": 3}, concrete)["n"] == 5
