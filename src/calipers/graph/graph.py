"""The one internal graph: nodes that name their arguments, parameters by name.

A `Graph` holds no tensors but its constants: `bind` looks parameters up in a module at call time, so that
``.to()``, ``.double()``, averaged weights and optimiser steps all work and results stay differentiable.
`walk` is the only loop over nodes: what a node means is the ``rule`` that the reader brings along.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from calipers.errors import CaptureError

if TYPE_CHECKING:
    from calipers.graph.passes import Passes

T = TypeVar("T")
TRAINING = ":training"
Rule = Callable[["Node", Sequence[Any], Mapping[str, Any]], T]


@dataclass(frozen=True)
class Ref:
    """An argument that is another value of the graph: an input, a parameter, a constant or a node."""

    name: str


@dataclass(frozen=True)
class Node:
    """``name = op(*args, **kwargs)``.

    Args:
        op: a function on batched tensors, normally one of the op table's.
        args, kwargs: plain values and `Ref` (also inside lists).
        shape: the output's shape without the batch; for a node that does not depend on the input, its whole shape.
        path: the module that made it (``"features.0"``), or the ONNX node's name.
        source: the line of user code, or the ONNX operator.
    """

    name: str
    op: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    shape: tuple[int, ...] = ()
    path: str = ""
    source: str = ""

    @cached_property
    def operands(self) -> tuple[str, ...]:
        """Names of all values it reads, in order; one read twice stands twice."""
        return tuple(_refs((self.args, tuple(self.kwargs.values()))))

    @cached_property
    def slots(self) -> tuple[tuple[int, str], ...]:
        """Which of ``args`` are values of the graph, and which values."""
        return tuple((i, a.name) for i, a in enumerate(self.args) if type(a) is Ref)

    @cached_property
    def lists(self) -> tuple[int, ...]:
        """Which of ``args`` hold values of the graph inside lists."""
        return tuple(i for i, a in enumerate(self.args) if type(a) is not Ref and any(_refs(a)))

    def fill(self, env: Mapping[str, Any]) -> list[Any]:
        """``args`` with every `Ref` replaced by what ``env`` holds for it."""
        args = list(self.args)
        for i, name in self.slots:
            args[i] = env[name]
        for i in self.lists:
            args[i] = resolve(args[i], env)
        return args


@dataclass(frozen=True, eq=False)
class Graph:
    """A straight-line program.

    Args:
        params: value name -> dotted name in the module (``"conv1.weight"``), or ``"bn1:training"`` for a mode flag.
        constants: value name -> tensor that no module attribute holds.
        inputs: names of the inputs (one, for now).
        output: name of the output.
    """

    nodes: tuple[Node, ...]
    params: Mapping[str, str]
    inputs: tuple[str, ...]
    output: str
    constants: Mapping[str, Tensor] = field(default_factory=dict)

    @cached_property
    def active(self) -> frozenset[str]:
        """The values that depend on an input."""
        names = set(self.inputs)
        for node in self.nodes:
            if any(name in names for name in node.operands):
                names.add(node.name)
        return frozenset(names)

    @cached_property
    def node(self) -> Mapping[str, Node]:
        return {node.name: node for node in self.nodes}

    @cached_property
    def position(self) -> Mapping[str, int]:
        return {node.name: i for i, node in enumerate(self.nodes)}

    @cached_property
    def reads(self) -> tuple[tuple[str, str, Callable[[Any], Any]], ...]:
        """The tensors that `bind` looks up in a module: value, dotted name, and how to read it."""
        names = ((v, n) for v, n in self.params.items() if not n.endswith(TRAINING))
        return tuple((value, name, operator.attrgetter(name)) for value, name in names)

    @cached_property
    def modes(self) -> Mapping[str, str]:
        """The values that are training flags, and the dotted names of the modules that have them."""
        names = self.params.items()
        return {v: n.removesuffix(TRAINING) for v, n in names if n.endswith(TRAINING)}

    @cached_property
    def widest(self) -> int:
        """The largest per-example number of elements of a node that depends on the input."""
        return max((math.prod(n.shape) for n in self.nodes if n.name in self.active), default=1)

    @cached_property
    def last_use(self) -> Mapping[str, tuple[str, ...]]:
        """node -> the values that nobody reads after it."""
        seen: set[str] = {self.output}
        result: dict[str, tuple[str, ...]] = {}
        for node in reversed(self.nodes):
            dead = tuple(name for name in dict.fromkeys(node.operands) if name not in seen)
            seen.update(dead)
            result[node.name] = tuple(name for name in dead if name not in self.params)
        return result


def _refs(value: Any) -> Iterable[str]:
    if isinstance(value, Ref):
        yield value.name
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _refs(item)


def resolve(value: Any, env: Mapping[str, Any]) -> Any:
    """``value`` with each `Ref` replaced by what ``env`` holds for it."""
    kind = type(value)
    if kind is Ref:
        return env[value.name]
    if kind is list or kind is tuple:
        return kind(resolve(item, env) for item in value)
    return value


def walk(graph: Graph, env: dict[str, T], rule: Rule[T], *, free: bool = False) -> dict[str, T]:
    """Evaluate the nodes in order; ``env`` starts with inputs, parameters and constants and gains every node's value.

    Args:
        rule: called with (node, args, kwargs), the arguments resolved.
        free: forget each value after its last use (the output stays).
    """
    dead = graph.last_use if free else {}
    for node in graph.nodes:
        args = node.fill(env)
        kwargs = (
            {k: resolve(v, env) for k, v in node.kwargs.items()} if node.kwargs else node.kwargs
        )
        env[node.name] = rule(node, args, kwargs)
        for name in dead.get(node.name, ()):
            env.pop(name, None)
    return env


def concrete(node: Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The rule that runs the op itself."""
    return node.op(*args, **kwargs)


def bind(
    graph: Graph,
    module: nn.Module,
    *,
    dtype: torch.dtype | None = None,
    statistics: Mapping[str, Tensor] | None = None,
) -> dict[str, Any]:
    """The parameters, buffers and constants of ``graph``, looked up in ``module`` now.

    Args:
        dtype: cast floating-point values (differentiably); None keeps them.
        statistics: dotted buffer name -> tensor to use instead (a clean batch's mean and variance, so that
            bounds in training mode are bounds of a fixed affine map); a layer with both replaced counts as
            not training.

    Raises:
        CaptureError: the module has no such attribute, so it is not the one that was captured.
    """
    replaced = statistics or {}
    env: dict[str, Any] = {}
    try:
        for value, name, read in graph.reads:
            env[value] = _cast(replaced[name] if name in replaced else read(module), dtype)
        frozen = {name.rpartition(".")[0] for name in replaced}
        for value, name in graph.modes.items():
            env[value] = name not in frozen and module.get_submodule(name).training
    except AttributeError as error:
        raise CaptureError(
            f"parameter {name!r} is missing: capture the module again ({error})"
        ) from None
    for value, tensor in graph.constants.items():
        env[value] = _cast(tensor, dtype)
    return env


def _cast(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is None or value.dtype == dtype or not value.is_floating_point():
        return value
    return value.to(dtype)


@dataclass(frozen=True, eq=False)
class Network:
    """A module with its graph. Calling it runs the module itself.

    Args:
        input_shape: the shape of one example.
        source: the file it was read from, if any.
    """

    graph: Graph
    module: nn.Module
    input_shape: tuple[int, ...]
    source: str | None = None

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = self.module(x)
        return y

    @cached_property
    def sizes(self) -> tuple[int, int, int]:
        """Numbers of one example: in all values that depend on the input, in the widest of them, and in the last."""
        active = (node for node in self.graph.nodes if node.name in self.graph.active)
        counts = [math.prod(self.input_shape), *(math.prod(node.shape) for node in active)]
        return sum(counts), max(counts), counts[-1]

    def in_double(self) -> Callable[[Tensor], Tensor]:
        """The same function in float64, from the graph; parameters are cast once, now."""
        env = bind(self.graph, self.module, dtype=torch.float64)
        return lambda x: evaluate(self.graph, env, x.double())

    def input_passes(self, x: Tensor) -> Passes | None:
        """Forward and backward passes without autograd for inputs like ``x`` (B, *x), or None: see `graph.passes`."""
        from calipers.graph.passes import passes

        return passes(self, x)

    @property
    def num_classes(self) -> int:
        return self.graph.node[self.graph.output].shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its floating-point parameters (float32 if it has none)."""
        for _, _, read in self.graph.reads:
            dtype: torch.dtype = read(self.module).dtype
            if dtype.is_floating_point:
                return dtype
        dtypes = (tensor.dtype for tensor in self.graph.constants.values())
        return next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)

    @property
    def device(self) -> torch.device:
        tensors = [*self.module.parameters(), *self.module.buffers()]
        return tensors[0].device if tensors else torch.device("cpu")


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode, restored afterwards module by module."""
    modes = [(m, m.training) for m in module.modules()]
    try:
        module.eval()
        yield
    finally:
        for owner, mode in modes:
            owner.training = mode


def evaluate(graph: Graph, env: Mapping[str, Any], x: Tensor) -> Tensor:
    """The output for inputs ``x``, by a concrete walk. ``env`` comes from `bind`."""
    values: dict[str, Any] = {**env, graph.inputs[0]: x}
    y: Tensor = walk(graph, values, concrete, free=True)[graph.output]
    return y


class GraphModule(nn.Module):
    """A graph's own module: its constants are buffers, its forward is the concrete walk."""

    def __init__(self, graph: Graph, constants: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.graph = graph
        for name, tensor in constants.items():
            self.register_buffer(name, tensor)

    def forward(self, x: Tensor) -> Tensor:
        return evaluate(self.graph, bind(self.graph, self), x)
