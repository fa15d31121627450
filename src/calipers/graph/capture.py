"""``nn.Module`` to `Graph` through ``torch.export``.

The batch dimension stays free, train/eval is looked up at call time, in-place operators become renamings, and
normalisation layers stay one node each. An operator without a lowering stays in the graph as itself: the network
runs and can be attacked, and bounds name what they lack.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from calipers.errors import CaptureError
from calipers.graph.graph import Graph, Network, Node, Ref
from calipers.graph.lower import INPLACE, LOWER, SPLITS, VIEWS, Call, splits
from calipers.graph.primitives import identity, slice_

REMEDY = (
    "keep examples independent along dimension 0, and avoid data-dependent control flow in forward"
)


def capture(module: nn.Module, example: Tensor) -> Network:
    """The network of a module; its parameters stay the module's own.

    Args:
        example: a batch of inputs, (B, *x) with B >= 1; only its shape and dtype matter.

    Raises:
        CaptureError: the module cannot be exported with a free batch dimension, mixes the examples of a batch, has several
            outputs, or overwrites a value that a view still shows; the message has a remedy.
    """
    if not isinstance(module, nn.Module):
        raise CaptureError(
            f"module: expected an nn.Module, got {type(module).__name__}; wrap the callable in one"
        )
    if example.ndim < 2 or not len(example):
        raise CaptureError(
            f"example: shape {tuple(example.shape)} has no batch; pass at least one example as (1, *x)"
        )
    pair = (
        example[:1].expand(2, *example.shape[1:]).contiguous().detach()
    )  # export specialises a batch of 1
    with _evaluating(module):
        program = _export(module, pair)
    graph = _Reader(program, module).graph()
    return Network(graph, module, tuple(example.shape[1:]))


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode, restored afterwards module by module."""
    modes = [(m, m.training) for m in module.modules()]
    try:
        module.eval()
        yield
    finally:
        for owner, mode in modes:
            owner.training = mode


def _export(module: nn.Module, pair: Tensor) -> Any:
    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    try:
        with torch.no_grad():
            return torch.export.export(module, (pair,), dynamic_shapes=dynamic, strict=False)
    except Exception as error:  # noqa: BLE001 - torch.export raises many kinds; each means the same here
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CaptureError(
            f"cannot capture {type(module).__name__}: {first[:300]}; {REMEDY}"
        ) from error


class _Reader:
    """One pass over an exported program."""

    def __init__(self, program: Any, module: nn.Module) -> None:
        self.program, self.module = program, module
        self.nodes: list[Node] = []
        self.params: dict[str, str] = {}
        self.constants: dict[str, Tensor] = {}
        self.values: dict[Any, Any] = {}  # fx node -> Ref, or a list of Refs for a split
        self.fx = list(program.graph.nodes)
        self.batch: Any = None
        self.fresh = 0

    def graph(self) -> Graph:
        inputs = self._placeholders()
        for node in self.fx:
            if node.op == "call_function":
                self._call(node)
        outputs = next(n for n in self.fx if n.op == "output").args[0]
        if len(outputs) != 1 or outputs[0] not in self.values:
            raise CaptureError(f"the module returns {len(outputs)} values; return the logits alone")
        output = self.values[outputs[0]].name
        shape = tuple(outputs[0].meta["val"].shape)
        if len(shape) != 2:
            raise CaptureError(
                f"the output has shape (batch, {', '.join(map(str, shape[1:]))}); return logits (batch, K)"
            )
        return Graph(tuple(self.nodes), self.params, inputs, output, self.constants)

    def _placeholders(self) -> tuple[str, ...]:
        signature = self.program.graph_signature
        state = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        lifted = signature.inputs_to_lifted_tensor_constants
        inputs: list[str] = []
        for node in self.fx:
            if node.op != "placeholder":
                continue
            if node.name in state:
                self.values[node] = self._parameter(state[node.name])
            elif node.name in lifted:
                name = f"const:{lifted[node.name]}"
                self.constants[name] = self.program.constants[lifted[node.name]].detach()
                self.values[node] = Ref(name)
            else:
                self.values[node] = Ref(node.name)
                self.batch = node.meta["val"].shape[0]
                inputs.append(node.name)
        return tuple(inputs)

    def _parameter(self, path: str) -> Ref:
        value = f"@{path}"
        self.params[value] = path
        return Ref(value)

    def _call(self, node: Any) -> None:
        val = node.meta.get("val")
        target = node.target
        if target is operator.getitem and isinstance(self.values.get(node.args[0]), list):
            self.values[node] = self.values[node.args[0]][node.args[1]]
            return
        if not isinstance(val, (Tensor, list, tuple)):
            return  # sizes and their arithmetic: output shapes say it all
        if target in INPLACE:
            self._check_views(node)
        call = self._describe(node, val)
        if target in SPLITS:
            self._split(node, call, val)
            return
        lower = LOWER.get(INPLACE.get(target, target))
        try:
            op, args, *rest = lower(call) if lower else (target, tuple(call.args))
        except CaptureError as error:
            raise CaptureError(f"{self._where(node)}: {error}") from None
        kwargs: Mapping[str, Any] = rest[0] if rest else {}
        if lower is None:
            kwargs = {k: self._value(v) for k, v in node.kwargs.items()}
        self._add(node.name, op, args, kwargs, call.shape, node)
        if target in INPLACE:  # later readers of the overwritten value see the new one
            self.values[node.args[0]] = Ref(node.name)

    def _describe(self, node: Any, val: Any) -> Call:
        first = val[0] if isinstance(val, (list, tuple)) else val
        active = self._active(node)
        shape = self._free(tuple(first.shape), node) if active else tuple(first.shape)
        path = self._path(node)
        shapes = {self._name(a): a.meta["val"] for a in node.all_input_nodes}

        def fake(x: Any) -> Any:
            return shapes.get(x.name) if isinstance(x, Ref) else None

        def emit(op: Any, *args: Any, shape: tuple[int, ...], **kwargs: Any) -> Ref:
            self.fresh += 1
            return self._add(f"{node.name}.{self.fresh}", op, args, kwargs, shape, node)

        return Call(
            args=[self._value(a) for a in node.args],
            shape=shape,
            rank=lambda x: fake(x).ndim,
            shape_of=lambda x: tuple(fake(x).shape)[1:],
            emit=emit,
            training=lambda flag: self._flag(path, flag),
        )

    def _name(self, node: Any) -> str | None:
        value = self.values.get(node)
        return value.name if isinstance(value, Ref) else None

    def _active(self, node: Any) -> bool:
        val = node.meta["val"]
        first = val[0] if isinstance(val, (list, tuple)) else val
        return any(not isinstance(s, int) for s in first.shape)

    def _free(self, shape: tuple[Any, ...], node: Any) -> tuple[int, ...]:
        """The shape without the batch, which must stand first and nowhere else."""
        if not shape or shape[0] != self.batch or any(not isinstance(s, int) for s in shape[1:]):
            raise CaptureError(
                f"{self._where(node)}: shape {tuple(map(str, shape))} mixes the batch into features; {REMEDY}"
            )
        return shape[1:]

    def _value(self, arg: Any) -> Any:
        if isinstance(arg, torch.fx.Node):
            return self.values.get(
                arg
            )  # None for a size: only shape arguments hold those, and they are not read
        if isinstance(arg, (list, tuple)):
            return [self._value(a) for a in arg]
        return arg

    def _flag(self, path: str, flag: bool) -> Any:
        """The owner's mode, unless the module asks for training mode even in evaluation."""
        if flag:
            return True
        name = f"@{path}:training"
        self.params[name] = f"{path}:training"
        return Ref(name)

    def _split(self, node: Any, call: Call, val: Any) -> None:
        rank = val[0].ndim
        default = call.args[2] if len(call.args) > 2 else 0
        dim = default % rank
        sizes = [part.shape[dim] for part in val]
        parts = []
        for i, args in enumerate(splits(call, sizes, dim)):
            shape = tuple(val[i].shape)[1:]
            parts.append(self._add(f"{node.name}.{i}", slice_, args, {}, shape, node))
        self.values[node] = parts

    def _add(
        self, name: str, op: Any, args: Any, kwargs: Any, shape: tuple[int, ...], node: Any
    ) -> Ref:
        if op is identity and isinstance(args[0], Ref):
            self.values[node] = args[0]
            return args[0]
        trace = (node.meta.get("stack_trace") or "").strip().splitlines()
        source = " ".join(line.strip() for line in trace[-2:])
        self.nodes.append(
            Node(name, op, tuple(args), dict(kwargs), shape, self._path(node), source)
        )
        self.values[node] = Ref(name)
        return Ref(name)

    def _path(self, node: Any) -> str:
        stack = node.meta.get("nn_module_stack")
        return str(list(stack.values())[-1][0]) if stack else ""

    def _where(self, node: Any) -> str:
        path = self._path(node) or type(self.module).__name__
        return f"{node.target} in {path!r}"

    def _check_views(self, node: Any) -> None:
        """An in-place operator is a renaming only if no view of the same memory is read again."""
        base = node.args[0]
        position = {n: i for i, n in enumerate(self.fx)}
        now = position[node]

        def read_later(n: Any) -> bool:
            return any(position[u] > now for u in n.users)

        views = [u for u in base.users if u.target in VIEWS and position[u] < now]
        if base.op == "call_function" and base.target in VIEWS:
            views.append(base.args[0])
        if base.op == "placeholder" or any(read_later(v) for v in views):
            raise CaptureError(
                f"{self._where(node)} overwrites memory that something else still reads; "
                "use the out-of-place operator there (torch.relu(x) instead of x.relu_(), inplace=False)"
            )
