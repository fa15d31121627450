"""``nn.Module`` to `Graph` through ``torch.export``.

The batch dimension stays free, train/eval is looked up at call time, in-place operators become renamings, and
normalisation layers stay one node each. An operator without a lowering stays in the graph as itself: the network
runs and can be attacked, and bounds name what they lack.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from calipers.errors import CaptureError
from calipers.graph.attention import batch_first
from calipers.graph.graph import Graph, Network, Node, Ref, bind, evaluate, evaluating
from calipers.graph.lower import (
    INPLACE,
    LOWER,
    MOVES,
    PASSES,
    PERMUTES,
    REPEATS,
    SHAPED,
    SPLITS,
    VIEWS,
    splits,
)
from calipers.graph.lower.calls import Call
from calipers.graph.primitives import constant, identity, reshape, slice_

REMEDY = (
    "keep examples independent along dimension 0, and avoid data-dependent control flow in forward"
)


def capture(module: nn.Module, example: Tensor) -> Network:
    """The network of a module; its parameters stay the module's own.

    Args:
        example: a batch of inputs, (B, *x) with B >= 1.

    Raises:
        CaptureError: the module cannot be exported with a free batch dimension, mixes the examples of a batch,
            has several outputs, or overwrites a value that a view still shows; or the finished graph does not
            reproduce the module on the example. The message has a remedy.

    Cost: the export (0.1 to 0.8 s) and three passes.
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
    with evaluating(module):
        program = _export(module, pair)
        network = Network(_Reader(program, module).graph(), module, tuple(example.shape[1:]))
        _check(network, pair)
    return network


@torch.no_grad()
def _check(network: Network, pair: Tensor) -> None:
    """The graph computes what the module computes, and an example's output does not depend on its batch."""
    rows = pair.clone()
    if rows.is_floating_point():
        noise = torch.randn(rows.shape[1:], generator=torch.Generator().manual_seed(0))
        rows[1] += noise.to(rows)
    kind = type(network.module).__name__
    together = network.module(rows)
    if not isinstance(together, Tensor):
        raise CaptureError(f"{kind} returns a {type(together).__name__}; return the logits alone")
    try:
        alone = network.module(rows[1:])
    except (RuntimeError, ValueError, IndexError) as error:
        raise CaptureError(f"{kind} fails on a batch of one: {error}; {REMEDY}") from error
    try:
        walked = evaluate(network.graph, bind(network.graph, network.module), rows)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise CaptureError(f"the graph of {kind} does not run: {error}; {REMEDY}") from error
    if not _close(together[1:], alone):
        raise CaptureError(
            f"{kind}: the output for an example changes with the rest of its batch, or at random; {REMEDY}"
        )
    if not _close(walked, together):
        raise CaptureError(
            f"the graph of {kind} does not reproduce its outputs; please report it, with the module's forward"
        )


def _close(a: Tensor, b: Tensor) -> bool:
    tolerance = torch.finfo(b.dtype).eps ** 0.5
    scale = b.abs().nan_to_num(0.0, 0.0, 0.0).max().item()
    return (
        a.shape == b.shape
        and a.dtype == b.dtype
        and torch.allclose(a, b, rtol=tolerance, atol=tolerance * scale, equal_nan=True)
    )


def _export(module: nn.Module, pair: Tensor) -> Any:
    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    try:
        with torch.no_grad(), batch_first():
            return torch.export.export(module, (pair,), dynamic_shapes=dynamic, strict=False)
    except Exception as error:  # torch.export raises many kinds; each means the same here
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CaptureError(
            f"cannot capture {type(module).__name__} on examples of shape {tuple(pair.shape[1:])}: {first[:300]}; "
            f"{REMEDY}"
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
        self.active: set[Any] = set()  # fx nodes that depend on the input
        self.batch: Any = None
        self.fresh = 0
        self.moved: dict[
            Any, int
        ] = {}  # fx node -> where its batch stands, if not first: our value has it first

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
                self.active.add(node)
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
            self._item(node)
            return
        if not isinstance(val, (Tensor, list, tuple)):
            return  # sizes and their arithmetic: output shapes say it all
        if self._repeated(node, val):
            return
        self._check_sizes(node)
        schema = getattr(target, "_schema", None)
        overwrites = schema is not None and schema.is_mutable
        if overwrites:
            self._check_views(node)
            target = INPLACE[target]
        if any(n in self.active for n in node.all_input_nodes):
            self.active.add(node)
        if self._moved(node, val):
            return
        call = self._describe(node, val)
        if node in self.active and target in SPLITS:
            self._split(node, call, val)
            return
        # a value that does not depend on the input keeps its whole shape, and its operator as it is
        lower = LOWER.get(target) if node in self.active else None
        try:
            op, args, *rest = lower(call) if lower else (target, tuple(call.args))
        except CaptureError as error:
            raise CaptureError(f"{self._where(node)}: {error}") from None
        kwargs: Mapping[str, Any] = rest[0] if rest else {}
        if lower is None:
            kwargs = {k: self._value(v) for k, v in node.kwargs.items()}
        if not node.all_input_nodes and isinstance(
            val, Tensor
        ):  # a literal tensor: torch.ones(3), say
            name = f"const:{node.name}"
            self.constants[name] = op(*args, **kwargs)
            self.values[node] = Ref(name)
            return
        result = self._add(node.name, op, args, kwargs, call.shape, node)
        if overwrites:  # later readers, by any name of the overwritten value, see the new one
            names = self._names(node)
            self.values.update(dict.fromkeys(names & self.values.keys(), result))

    def _arguments(self, node: Any) -> list[Any]:
        """All arguments by position where a lowering will read them: ATen keeps some (alpha, value) by name."""
        args = list(node.args)
        if node not in self.active or INPLACE.get(node.target, node.target) not in LOWER:
            return args
        left = dict(node.kwargs)
        for argument in node.target._schema.arguments[len(args) :]:  # noqa: SLF001 - torch has no public name
            if not left:
                break
            args.append(left.pop(argument.name, argument.default_value))
        return args

    def _repeated(self, node: Any, val: Any) -> bool:
        """A constant repeated for each example (a class token), and nothing else: a value of the input's batch."""
        if node.target not in REPEATS:
            return False
        source, counts = node.args[:2]
        size = tuple(source.meta["val"].shape)
        front = val.shape[0] == self.batch and isinstance(counts[0], torch.fx.Node)
        if not front or source in self.active or len(counts) != len(size) or size[0] != 1:
            return False
        if tuple(val.shape[1:]) != size[1:]:
            return False
        self.active.add(node)
        self.fresh += 1
        own = self._add(
            f"{node.name}.{self.fresh}", torch.squeeze, (self.values[source], 0), {}, size[1:], node
        )
        first = next(n for n in self.fx if n in self.active)
        self._add(node.name, constant, (self.values[first], own), {}, size[1:], node)
        return True

    def _item(self, node: Any) -> None:
        """One of several parts."""
        whole, index = node.args
        self.values[node] = self.values[whole][index]
        self.active.add(node)
        if whole in self.moved:
            self.moved[node] = self.moved[whole]

    def _moved(self, node: Any, val: Any) -> bool:
        """Whether the batch is moved, or does not stand first, and the call has been dealt with."""
        if node in self.active and node.target in MOVES and self._move(node, val):
            return True
        if any(n in self.moved for n in node.all_input_nodes):
            raise CaptureError(
                f"{self._where(node)} works on a value whose batch is not first; {REMEDY}"
            )
        return False

    def _move(self, node: Any, val: Any) -> bool:
        """A permutation that moves the batch, or what is picked from its result; False for any other call."""
        x = node.args[0]
        start = self.moved.get(x, 0)  # where the batch stands in the operand
        order = [
            start,
            *(d for d in range(x.meta["val"].ndim) if d != start),
        ]  # of our value's dimensions
        if node.target in PERMUTES:
            target = [order.index(d) for d in PERMUTES[node.target](node)]
            place = target.index(0)
            if start == place == 0:
                return False
            dims = (0, *(d for d in target if d))
            self._place(node, torch.permute, (self.values[x], dims), val, place)
            return True
        if not start:
            return False
        if node.target in PASSES:
            self.values[node], self.moved[node] = self.values[x], start
            return True
        dim = (node.args[1] if len(node.args) > 1 else 0) % len(order)
        if dim == start:
            return False
        picks = (
            range(len(val))
            if isinstance(val, (list, tuple))
            else [node.args[2] % x.meta["val"].shape[dim]]
        )
        parts, place = [], start - (dim < start)
        for i in picks:
            part = val[i] if isinstance(val, (list, tuple)) else val
            shape = self._batch_first(x.meta["val"], start)
            shape = (*shape[: order.index(dim) - 1], 1, *shape[order.index(dim) :])
            self.fresh += 1
            one = self._add(
                f"{node.name}.{self.fresh}",
                slice_,
                (self.values[x], order.index(dim), i, i + 1, 1),
                {},
                shape,
                node,
            )
            self.fresh += 1
            own = self._batch_first(part, place)
            parts.append(self._add(f"{node.name}.{self.fresh}", reshape, (one, own), {}, own, node))
        self.values[node] = parts if isinstance(val, (list, tuple)) else parts[0]
        if place:
            self.moved[node] = place
        return True

    def _place(self, node: Any, op: Any, args: tuple[Any, ...], val: Tensor, place: int) -> None:
        self._add(node.name, op, args, {}, self._batch_first(val, place), node)
        if place:
            self.moved[node] = place

    def _batch_first(self, val: Tensor, place: int) -> tuple[int, ...]:
        """The shape without the batch, which stands at ``place``."""
        return tuple(n for i, n in enumerate(val.shape) if i != place)

    def _check_sizes(self, node: Any) -> None:
        """The batch size may only stand where shapes do: the graph itself does not know it."""
        sizes = [
            n
            for n in node.all_input_nodes
            if not isinstance(n.meta.get("val"), (Tensor, list, tuple))
        ]
        if sizes and node.target not in SHAPED:
            raise CaptureError(
                f"{self._where(node)} uses the batch size as a value; broadcast over the batch instead"
            )
        if sizes and not any(n in self.active for n in node.all_input_nodes):
            raise CaptureError(
                f"{self._where(node)} repeats a constant for each example; let it broadcast instead, or add it "
                "to a multiple by zero of the input"
            )

    def _names(self, node: Any) -> set[Any]:
        """The nodes that are the memory an in-place operator overwrites, not a part or a view of it."""
        names = {node}
        while node.target in INPLACE:
            node = node.args[0]
            names.add(node)
        todo = list(names)
        while todo:
            for user in todo.pop().users:
                if user.target in INPLACE and user.args[0] in names and user not in names:
                    names.add(user)
                    todo.append(user)
        return names

    def _describe(self, node: Any, val: Any) -> Call:
        first = val[0] if isinstance(val, (list, tuple)) else val
        active = node in self.active
        shape = self._free(tuple(first.shape), node) if active else tuple(first.shape)
        path = self._path(node)
        shapes = {self._name(a): a.meta["val"] for a in node.all_input_nodes}
        fixed = {self._name(a) for a in node.all_input_nodes if a not in self.active}

        def fake(x: Any) -> Any:
            return shapes.get(x.name) if isinstance(x, Ref) else None

        def emit(op: Any, *args: Any, shape: tuple[int, ...], **kwargs: Any) -> Ref:
            self.fresh += 1
            return self._add(f"{node.name}.{self.fresh}", op, args, kwargs, shape, node)

        return Call(
            args=[self._value(a) for a in self._arguments(node)],
            shape=shape,
            rank=lambda x: fake(x).ndim,
            shape_of=lambda x: tuple(fake(x).shape)[0 if x.name in fixed else 1 :],
            emit=emit,
            training=lambda flag: self._flag(path, flag),
            active=lambda x: isinstance(x, Ref) and x.name in shapes and x.name not in fixed,
            dtype=lambda x: fake(x).dtype,
            original=lambda: (
                node.target,
                tuple(self._value(a) for a in node.args),
                {k: self._value(v) for k, v in node.kwargs.items()},
            ),
        )

    def _name(self, node: Any) -> str | None:
        value = self.values.get(node)
        return value.name if isinstance(value, Ref) else None

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
        if node.target not in INPLACE:
            raise CaptureError(
                f"{self._where(node)} works in place and has no rule; use the out-of-place operator there"
            )
        position = {n: i for i, n in enumerate(self.fx)}
        names = self._names(node)
        memory, todo = set(names), list(names)
        while todo:  # everything that may share the memory: views, and what is viewed
            shown = todo.pop()
            near = [
                u
                for u in shown.users
                if (u.target in VIEWS or u.target in INPLACE) and u.args[0] is shown
            ]
            if shown.target in VIEWS or shown.target in INPLACE:
                near.append(shown.args[0])
            todo += [n for n in near if n not in memory]
            memory.update(near)
        now = position[node]
        stale = [n for n in memory - names if position[n] < now]
        outside = any(n.op == "placeholder" for n in memory)
        if outside or any(position[u] > now for n in stale for u in n.users):
            raise CaptureError(
                f"{self._where(node)} overwrites memory that something else still reads; "
                "use the out-of-place operator there (torch.relu(x) instead of x.relu_(), inplace=False)"
            )
