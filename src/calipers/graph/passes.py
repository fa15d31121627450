"""A captured network's forward pass and its backward pass to the input, without autograd and in memory used again.

Autograd asks for fresh memory at every step of an attack, which costs a small network as much as its arithmetic. A
network all of whose ops stand in `RULES` is differentiated by the table instead; any other one by autograd.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calipers.graph import primitives as prim
from calipers.graph.graph import Graph, Network, Node, Ref, bind, concrete

Op = Callable[..., Any]


class Pass(NamedTuple):
    """One node both ways.

    Args:
        forward: the values of its active operands -> its own.
        backward: (gradient, value, *operands' values) -> the gradient of each operand.
        into: (gradient, room) -> the gradient of its only operand, in given memory; None: it has no use for that.
    """

    forward: Callable[..., Tensor]
    backward: Callable[..., Sequence[Tensor]]
    into: Callable[[Tensor, Tensor], Tensor] | None = None


class Site(NamedTuple):
    """Where a rule is applied.

    Args:
        memory: uninitialised memory for a batch of examples of a shape.
        value: whether the operand's value may be overwritten by the node's own.
        gradient: whether the gradient may be overwritten by the operand's.
    """

    node: Node
    memory: Callable[[Sequence[int]], Tensor]
    value: bool
    gradient: bool


Rule = Callable[..., "Pass | None"]  # (site, *args, **kwargs); active args are a `Ref`


def _linear(site: Site, x: Any, w: Any, b: Tensor | None = None) -> Pass | None:
    if type(x) is not Ref or type(w) is Ref or len(site.node.shape) != 1:
        return None
    value, back, columns = site.memory(site.node.shape), site.memory(w.shape[1:]), w.T

    def forward(x: Tensor) -> Tensor:
        if b is None:
            return torch.mm(x, columns, out=value)
        return torch.addmm(b, x, columns, out=value)

    def into(g: Tensor, room: Tensor) -> Tensor:
        return torch.mm(g, w, out=room)

    return Pass(forward, lambda g, *_: (torch.mm(g, w, out=back),), into)


def _relu(site: Site, _x: Any) -> Pass:
    undo = torch.ops.aten.threshold_backward.grad_input
    value = None if site.value else site.memory(site.node.shape)
    back = None if site.gradient else site.memory(site.node.shape)

    def forward(x: Tensor) -> Tensor:
        return torch.clamp_min(x, 0.0, out=x if value is None else value)

    def backward(g: Tensor, y: Tensor, _: Tensor) -> tuple[Tensor]:
        return (undo(g, y, 0, grad_input=g if back is None else back),)

    return Pass(forward, backward)


def _reshape(_: Site, _x: Any, shape: Sequence[int]) -> Pass:
    return Pass(
        lambda x: x.reshape(len(x), *shape),
        lambda g, _y, x: (g.reshape(x.shape),),
    )


def _conv2d(
    _: Site,
    x: Any,
    w: Any,
    b: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Pass | None:
    if type(x) is not Ref or type(w) is Ref or isinstance(padding, str):
        return None
    s, p, d = ([v] * 2 if isinstance(v, int) else list(v) for v in (stride, padding, dilation))
    wanted = [True, False, False]  # of the input, whose shape alone is read

    def backward(g: Tensor, _: Tensor, x: Tensor) -> tuple[Tensor]:
        undo = torch.ops.aten.convolution_backward
        return (undo(g, x, w, None, s, p, d, False, [0, 0], groups, wanted)[0],)

    return Pass(lambda x: torch.conv2d(x, w, b, s, p, d, groups), backward)


def _batch_norm(
    site: Site, _x: Any, w: Any, b: Any, mean: Any, var: Any, training: bool, eps: float
) -> Pass | None:
    if training or mean is None or var is None:
        return None
    factor = torch.rsqrt(var + eps)
    factor = (factor if w is None else factor * w).view(-1, *[1] * (len(site.node.shape) - 1))
    return Pass(
        lambda x: prim.batch_norm(x, w, b, mean, var, False, eps),
        lambda g, *_: (g.mul_(factor) if site.gradient else g * factor,),
    )


def _add(site: Site, x: Any, y: Any) -> Pass:
    value = site.memory(site.node.shape)
    if type(x) is Ref and type(y) is Ref:
        return Pass(
            lambda x, y: torch.add(x, y, out=value),
            lambda g, _, x, y: (g.sum_to_size(x.shape), g.sum_to_size(y.shape)),
        )
    c = y if type(x) is Ref else x
    return Pass(
        lambda x: torch.add(x, c, out=value),
        lambda g, _, x: (g.sum_to_size(x.shape),),
    )


def _scaled(site: Site, op: Op, c: Any) -> Pass:
    """``op(x, c)``, a product or a quotient."""
    value, back = site.memory(site.node.shape), site.memory(site.node.shape)
    return Pass(
        lambda x: op(x, c, out=value),
        lambda g, _, x: (op(g, c, out=back).sum_to_size(x.shape),),
    )


def _mul(site: Site, x: Any, y: Any) -> Pass | None:
    if type(x) is Ref and type(y) is Ref:
        return None
    return _scaled(site, torch.mul, y if type(x) is Ref else x)


def _div(site: Site, x: Any, y: Any) -> Pass | None:
    return _scaled(site, torch.div, y) if type(x) is Ref and type(y) is not Ref else None


def _dropout(_: Site, _x: Any, _rate: float, training: bool) -> Pass | None:
    return None if training else Pass(lambda x: x, lambda g, *_: (g,))


def _max_pool(
    _: Site, _x: Any, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil: bool = False
) -> Pass | None:
    if len(kernel) != 2:
        return None
    rest = list(kernel), list(stride), list(padding), list(dilation), ceil
    places: list[Tensor] = []

    def forward(x: Tensor) -> Tensor:
        y: Tensor
        y, places[:] = (found := torch.ops.aten.max_pool2d_with_indices(x, *rest))[0], found[1:]
        return y

    def backward(g: Tensor, _: Tensor, x: Tensor) -> tuple[Tensor]:
        return (torch.ops.aten.max_pool2d_with_indices_backward(g, x, *rest, places[0]),)

    return Pass(forward, backward)


def _average_pool(
    site: Site,
    _x: Any,
    kernel: Any,
    stride: Any,
    padding: Any,
    ceil: bool = False,
    pads: bool = True,
) -> Pass | None:
    if len(kernel) != 2:
        return None
    rest = list(kernel), list(stride), list(padding), ceil, pads
    undo = torch.ops.aten.avg_pool2d_backward
    return Pass(
        lambda x: site.node.op(x, *rest),
        lambda g, _, x: (undo(g, x, *rest, None),),
    )


RULES: dict[Op, Rule] = {
    F.linear: _linear,
    torch.relu: _relu,
    torch.conv2d: _conv2d,
    torch.add: _add,
    torch.mul: _mul,
    torch.div: _div,
    prim.batch_norm: _batch_norm,
    torch.neg: lambda *_: Pass(torch.neg, lambda g, *_: (g.neg(),)),
    prim.dropout: _dropout,
    prim.identity: lambda *_: Pass(lambda x: x, lambda g, *_: (g,)),
    prim.reshape: _reshape,
    prim.max_pool: _max_pool,
    prim.average_pool: _average_pool,
}
# whose value is memory of their own that their backward pass does not read
OWN: frozenset[Op] = frozenset({F.linear, torch.conv2d, torch.add, prim.batch_norm})
# whose operands' gradients may share the memory of their own
SHARING: frozenset[Op] = frozenset({torch.add, prim.dropout, prim.identity, prim.reshape})


class Passes:
    """Forward and backward passes for one shape of inputs. One run's own: two may not use it at a time.

    Parameters are those at the time it was made. Values stay until the next pass replaces them: memory that is freed at
    the end of every step goes back to the system, and comes again page by page.
    """

    def __init__(self, graph: Graph, steps: Sequence[tuple[str, tuple[str, ...], Pass]]) -> None:
        self.source, self.output = graph.inputs[0], graph.output
        self.steps = steps
        self.values: dict[str, Tensor] = {}
        self.first = _first(graph)

    def forward(self, x: Tensor) -> Tensor:
        """The outputs (B, K): good until the next call."""
        values = self.values
        values[self.source] = x
        for name, reads, step in self.steps:
            values[name] = step.forward(*[values[read] for read in reads])
        return values[self.output]

    def backward(self, toward: Tensor, room: Tensor | None = None) -> Tensor:
        """The derivative of ⟨toward, outputs⟩ in the inputs of the last `forward`: good until the next one.

        Args:
            room: as the inputs, contiguous; the result may be written there.
        """
        values, gradients = self.values, {self.output: toward}
        for name, reads, step in reversed(self.steps):
            own, value = gradients.pop(name), values[name]
            if room is not None and name == self.first and step.into is not None:
                gradients[reads[0]] = step.into(own, room.view(values[reads[0]].shape))
                continue
            parts = step.backward(own, value, *[values[read] for read in reads])
            for read, part in zip(reads, parts, strict=True):
                known = gradients.get(read)
                gradients[read] = part if known is None else known + part
        return gradients[self.source]


def _first(graph: Graph) -> str | None:
    """The only node to read the input, or nothing but a view of it."""
    name = graph.inputs[0]
    while len(readers := [node for node in graph.nodes if name in node.operands]) == 1:
        name = readers[0].name
        if readers[0].op not in (prim.reshape, prim.identity):
            return name
    return None


def passes(network: Network, x: Tensor) -> Passes | None:
    """The passes for inputs like ``x`` (B, *x), or None where only autograd will do: an op without a rule, a layer in
    training mode, a module that hooks change, autocast, another dtype than the parameters', or no CPU.
    """
    graph, module = network.graph, network.module
    plain = x.device.type == "cpu" and x.shape[1:] == network.input_shape
    if not plain or torch.is_autocast_enabled("cpu") or _hooked(module):
        return None
    if any(node.name in graph.active and node.op not in RULES for node in graph.nodes):
        return None
    env = bind(graph, module)
    tensors = {name: v.detach() for name, v in env.items() if isinstance(v, Tensor)}
    if any(v.is_floating_point() and v.dtype != x.dtype for v in tensors.values()):
        return None
    values: dict[str, Any] = {**env, **tensors, graph.inputs[0]: Ref(graph.inputs[0])}
    readers = Counter([graph.output, *(name for node in graph.nodes for name in node.operands)])
    if not all(readers[name] for name in graph.active) or graph.output not in graph.active:
        return None  # what nobody reads has no gradient
    owned = _owned(graph, readers)
    steps = []

    def memory(shape: Sequence[int]) -> Tensor:
        return x.new_empty((len(x), *shape))

    for node in graph.nodes:
        args = node.fill(values)
        if node.name not in graph.active:
            values[node.name] = concrete(node, args, node.kwargs)
            continue
        values[node.name] = Ref(node.name)
        reads = tuple(name for name in node.operands if name in graph.active)
        source = graph.node.get(reads[0])
        free = source is not None and source.op in OWN and readers[source.name] == 1
        site = Site(node, memory, free, node.name in owned)
        step = None if node.kwargs else RULES[node.op](site, *args)
        if step is None:
            return None
        steps.append((node.name, reads, step))
    return Passes(graph, steps)


def _owned(graph: Graph, readers: Mapping[str, int]) -> frozenset[str]:
    """The values whose gradient no other value's shares."""
    found: set[str] = set()
    for node in reversed(graph.nodes):
        reads = [name for name in node.operands if name in graph.active]
        apart = node.op not in SHARING or (len(reads) == 1 and node.name in found)
        found.update(name for name in reads if apart or readers[name] > 1)
    return frozenset(found)


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _hooked(module: nn.Module) -> bool:
    return any(getattr(m, hooks) for m in module.modules() for hooks in HOOKS)
