"""Batch normalisation while training: whose statistics each pass uses, and who updates the running ones.

Bounds need normalisation to be a fixed affine map, and so do attacks, whose steps must not see the statistics of
their own points. `observed` runs a batch in training mode and returns its logits and its statistics; `View` is the
network under given statistics, folded into the layers before: what an attack, another pass or a bound then sees.
Statistics carry gradients. Nothing but `update_running` writes to the module.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from calipers.errors import unknown_name
from calipers.graph import primitives as prim
from calipers.graph.graph import Graph, Network, Node, Ref, bind, evaluate, evaluating, walk
from calipers.training.quick import quick

POLICIES = ("clean_batch", "running", "adversarial_batch")
Statistics = Mapping[str, Tensor]


def check_policy(policy: str) -> None:
    """Raises ValueError for an unknown name."""
    if policy not in POLICIES:
        raise unknown_name("policy", policy, POLICIES)


def normalised(network: Network) -> bool:
    """Whether the network has batch normalisation in training mode."""
    return any(
        network.module.get_submodule(layer.name).training for layer in _plan(network.graph).layers
    )


# -- statistics of a batch ---------------------------------------------------------------------------------------------


class Observed(NamedTuple):
    """Logits of a training-mode pass, its batch statistics by buffer name, and the number of values behind each."""

    logits: Tensor
    statistics: dict[str, Tensor]
    counts: dict[str, int]


def observed(network: Network, x: Tensor) -> Observed:
    """A training-mode forward pass, the same as the module's own, without touching its running statistics.

    Means and (biased) variances carry gradients. In a process group they are those of the joint batch.
    """
    graph, module = network.graph, network.module
    found = Observed(x, {}, {})
    if not normalised(network):
        return found._replace(logits=module(x))
    joint = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1

    def rule(node: Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if node.op is not prim.batch_norm or not args[5]:
            return node.op(*args, **kwargs)
        mean, var, count = _moments(args[0], joint=joint)
        layer = _layer(graph, node)
        found.statistics.update({f"{layer}.running_mean": mean, f"{layer}.running_var": var})
        found.counts[layer] = count
        if joint:
            return prim.batch_norm(args[0], args[1], args[2], mean, var, False, args[6])
        return node.op(*args, **kwargs)  # one fused operator, of the same statistics

    env = bind(graph, module)
    env[graph.inputs[0]] = x
    return found._replace(logits=walk(graph, env, rule, free=True)[graph.output])


def _layer(graph: Graph, node: Node) -> str:
    """The name of the module behind a normalisation node."""
    return graph.params[node.args[3].name].rpartition(".")[
        0
    ]  # `capture` refuses layers that keep no statistics


def _moments(x: Tensor, *, joint: bool) -> tuple[Tensor, Tensor, int]:
    dims = [d for d in range(x.ndim) if d != 1]
    count = x.numel() // x.shape[1]
    if not joint:
        var, mean = torch.var_mean(x, dims, correction=0)
        return mean, var, count
    return _joint_moments(x, dims, count)


def _joint_moments(x: Tensor, dims: list[int], count: int) -> tuple[Tensor, Tensor, int]:
    """Over all processes; the gradients flow back to all of them."""
    from torch.distributed.nn.functional import all_reduce

    total = torch.tensor(float(count), device=x.device)
    dist.all_reduce(total)
    mean: Tensor = all_reduce(x.sum(dims)) / total  # type: ignore[no-untyped-call]
    spread = (x - mean.view(-1, *[1] * (x.ndim - 2))).square().sum(dims)
    var = all_reduce(spread) / total  # type: ignore[no-untyped-call]
    return mean, var, int(total)


@torch.no_grad()
def update_running(network: Network, seen: Observed) -> None:
    """One step of the running statistics towards those of a batch, as the module's own training forward would do."""
    for layer, count in seen.counts.items():
        module: Any = network.module.get_submodule(layer)
        module.num_batches_tracked += 1
        momentum = module.momentum
        if momentum is None:  # a plain average
            momentum = 1.0 / float(module.num_batches_tracked)
        mean, var = (seen.statistics[f"{layer}.running_{kind}"] for kind in ("mean", "var"))
        module.running_mean.lerp_(mean, momentum)
        module.running_var.lerp_(var * (count / max(count - 1, 1)), momentum)


# -- a fixed network ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class View:
    """A network whose normalisation is fixed; calling it is a forward pass with gradients in parameters and statistics.

    Args:
        network: the graph with normalisation layers folded where they can be.
        values: what its parameters are, where they are not the module's.
    """

    network: Network
    values: Statistics

    def __call__(self, x: Tensor) -> Tensor:
        return evaluate(self.network.graph, self.bound(), x)

    def bound(self) -> dict[str, Any]:
        """Parameters and statistics by value name; dropout as the module's mode says."""
        return bind(self.network.graph, self.network.module, statistics=self.values)

    def evaluating(self) -> AbstractContextManager[None]:
        """The module in evaluation mode (dropout off), as bounds need it."""
        return evaluating(self.network.module)

    def frozen(self, precision: torch.dtype | None = None) -> Callable[[Tensor], Tensor]:
        """The function that attacks see: parameters and statistics are constants, dropout is off.

        On a CPU its convolutions have their channels innermost: up to a sixth quicker, and twice as quick in bfloat16.

        Args:
            precision: run under autocast in this dtype.
        """
        quicker = quick(self.network.graph)
        graph = quicker.graph
        with self.evaluating():
            values = self.bound().items()
        env = quicker.evaluable(
            {k: _constant(v) if isinstance(v, Tensor) else v for k, v in values}
        )
        if precision is None:
            return lambda x: evaluate(graph, env, x)

        def low(x: Tensor) -> Tensor:
            with torch.autocast(x.device.type, precision):
                return evaluate(graph, env, x).float()

        return low


def _constant(value: Tensor) -> Tensor:
    value = value.detach()
    image = value.ndim == 4 and value.device.type == "cpu"
    # `contiguous` would leave the strides of a single channel, which are what the library goes by
    return value.to(memory_format=torch.channels_last) if image else value


def fixed(network: Network, statistics: Statistics | None = None) -> View:
    """The network under ``statistics``, or under its running ones where none are given.

    Cost: a pass over the parameters of layers before a normalisation.
    """
    plan = _plan(network.graph)
    if not plan.layers:
        return View(network, {})
    given = statistics or {}
    values: dict[str, Tensor] = {}
    for layer in plan.layers:
        module: Any = network.module.get_submodule(layer.name)
        mean, var = (
            given.get(f"{layer.name}.{kind}", getattr(module, kind))
            for kind in ("running_mean", "running_var")
        )
        if layer.weight is None:
            # copies, because the running ones are overwritten later in the step
            values |= {
                f"{layer.name}.running_mean": mean.clone(),
                f"{layer.name}.running_var": var.clone(),
            }
            continue
        scale = torch.rsqrt(var + layer.eps)
        scale = scale if module.weight is None else scale * module.weight
        weight = _attribute(network.module, layer.weight)
        shift = -mean if layer.bias is None else _attribute(network.module, layer.bias) - mean
        values[layer.weight] = weight * scale.view(-1, *[1] * (weight.ndim - 1))
        offset = shift * scale
        values[f"{layer.name}.running_mean"] = (
            offset if module.bias is None else offset + module.bias
        )
    return View(replace(network, graph=plan.graph), values)


def _attribute(module: nn.Module, name: str) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    value: Tensor = getattr(module.get_submodule(owner), leaf)
    return value


class _Layer(NamedTuple):
    """A normalisation layer, and the parameters of the layer before it if it can be folded into that."""

    name: str
    eps: float
    weight: str | None
    bias: str | None


class _Plan(NamedTuple):
    """A graph with its normalisation layers folded. Behind a folded layer its running mean stands for the bias."""

    graph: Graph
    layers: tuple[_Layer, ...]


_PLANS: WeakKeyDictionary[Graph, _Plan] = WeakKeyDictionary()
_FOLDABLE = (F.linear, torch.conv1d, torch.conv2d, torch.conv3d)


def _plan(graph: Graph) -> _Plan:
    plan = _PLANS.get(graph)
    if plan is None:
        plan = _PLANS[graph] = _planned(graph)
    return plan


def _planned(graph: Graph) -> _Plan:
    readers = Counter(name for node in graph.nodes for name in node.operands)
    nodes, layers = {node.name: node for node in graph.nodes}, []
    for node in graph.nodes:
        if node.op is not prim.batch_norm or not isinstance(node.args[5], Ref):
            continue
        name, source = _layer(graph, node), nodes.get(node.operands[0])
        alone = source is not None and readers[source.name] == 1
        if source is None or not alone or not _foldable(graph, source, readers):
            layers.append(_Layer(name, node.args[6], None, None))
            continue
        weight, bias = source.args[1].name, source.args[2] if len(source.args) > 2 else None
        args = (*source.args[:2], node.args[3], *source.args[3:])
        del nodes[source.name]
        nodes[node.name] = replace(source, name=node.name, args=args)
        layers.append(
            _Layer(
                name,
                node.args[6],
                graph.params[weight],
                None if bias is None else graph.params[bias.name],
            )
        )
    order = tuple(nodes[node.name] for node in graph.nodes if node.name in nodes)
    return _Plan(replace(graph, nodes=order) if layers else graph, tuple(layers))


def _foldable(graph: Graph, source: Node, readers: Mapping[str, int]) -> bool:
    """Whether a layer's parameters are the module's own and nobody else's."""
    if source.op not in _FOLDABLE or len(source.args) < 2:
        return False
    own = [a for a in source.args[1:3] if a is not None]
    return all(isinstance(a, Ref) and a.name in graph.params and readers[a.name] == 1 for a in own)
