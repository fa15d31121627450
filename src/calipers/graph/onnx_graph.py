"""The graph under construction while an ONNX file is read: values, the batch axis, and constants.

ONNX shapes are taken at batch 1. Our graphs have a free batch first. A `Value` knows both views: with ``lead`` its
ONNX axis 0 (of size 1) is our batch; without, our batch stands before all ONNX axes. Whatever the file does to its own
axes, each example is computed as the file computes it alone. Shapes come from arithmetic, never from running an
operator (meta tensors would cost a second of imports).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from calipers.errors import CaptureError
from calipers.graph import primitives as prim
from calipers.graph.graph import Graph, GraphModule, Node, Ref, concrete, walk
from calipers.graph.onnx_file import check_finite, fits, read_tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Value:
    """A value that depends on the input. ``shape`` is the ONNX shape at batch 1."""

    name: str
    shape: Shape
    lead: bool

    @property
    def own(self) -> Shape:
        """Our shape, without the batch."""
        return self.shape[1:] if self.lead else self.shape

    @property
    def rank(self) -> int:
        return len(self.shape)

    def dim(self, axis: int) -> int:
        """Our dimension of an ONNX axis."""
        return axis if self.lead else axis + 1


@dataclass(frozen=True, eq=False)
class Const:
    """A tensor that is known now; ``name`` is the ONNX name it comes from."""

    tensor: Tensor
    name: str

    @property
    def shape(self) -> Shape:
        return tuple(self.tensor.shape)

    @property
    def rank(self) -> int:
        return self.tensor.ndim


Input = Value | Const
Output = Value | Const | Sequence[Value | Const]


@dataclass(frozen=True)
class Call:
    """One ONNX node: its operator, its attributes, how many outputs are asked for."""

    op: str
    name: str
    version: int
    attrs: Mapping[str, Any]
    outputs: tuple[str, ...]

    def attr(self, name: str, default: Any = None) -> Any:
        return self.attrs.get(name, default)

    def text(self, name: str, default: str) -> str:
        value = self.attrs.get(name, default)
        return value.decode() if isinstance(value, bytes) else str(value)

    def __str__(self) -> str:
        return f"{self.op} (node {self.name!r})"


@dataclass
class Builder:
    """Nodes and constants so far.

    Args:
        folder: where the model lies.
        max_bytes: cap on one value of one example, and on all constants together.
        readers: how many nodes (or outputs) read an ONNX value.
    """

    max_bytes: int
    dtype: torch.dtype
    folder: Path
    readers: Mapping[str, int] = field(default_factory=dict)
    nodes: list[Node] = field(default_factory=list)
    made: dict[str, Node] = field(default_factory=dict)
    own: dict[str, Shape] = field(default_factory=dict)  # value name -> our shape
    tensors: dict[str, Tensor] = field(default_factory=dict)  # value name -> constant
    values: dict[str, Value | Const] = field(default_factory=dict)  # ONNX name -> what it is
    call: Call | None = None
    spent: int = 0
    _known: dict[int, str] = field(default_factory=dict)
    _taken: set[str] = field(default_factory=set)

    # -- making ------------------------------------------------------------------------------------------

    def fresh(self, name: str) -> str:
        """``name``, or the first of ``name.1``, ``name.2``, ... that is free."""
        unique, count = name, 0
        while unique in self._taken:
            count += 1
            unique = f"{name}.{count}"
        self._taken.add(unique)
        return unique

    def enter(self, name: str, shape: Shape, lead: bool) -> Value:
        """A value from outside: the input, or a constant's stand-in."""
        value = Value(self.fresh(name), shape, lead)
        self.own[value.name] = value.own
        return value

    def emit(
        self, op: Callable[..., Any], *args: Any, shape: Sequence[int], lead: bool = False
    ) -> Value:
        """A new node; `Value` and `Const` arguments become references. ``shape`` is the ONNX shape."""
        call = self.call
        base = call.outputs[0] if call else op.__name__
        value = Value(self.fresh(base), tuple(shape), lead)
        fits(value.own, self.dtype.itemsize, self.max_bytes, f"value {value.name!r}")
        node = Node(
            value.name,
            op,
            tuple(self._argument(a) for a in args),
            {},
            value.own,
            call.name if call else "",
            call.op if call else "",
        )
        self.nodes.append(node)
        self.made[value.name] = node
        self.own[value.name] = value.own
        return value

    def _argument(self, value: Any) -> Any:
        if isinstance(value, Value):
            return Ref(value.name)
        if isinstance(value, Const):
            return self._reference(value)
        if isinstance(value, list):
            return [self._argument(item) for item in value]
        return value

    def _reference(self, const: Const) -> Ref:
        key = id(const.tensor)  # the tensor stays in self.tensors, so its id stays its own
        if key not in self._known:
            check_finite(const.tensor, const.name)
            name = self.fresh(f"@{const.name}")
            self._known[key] = name
            self.tensors[name] = const.tensor
        return Ref(self._known[key])

    def read(self, proto: Any) -> Tensor:
        """A tensor of the file, booked as a constant."""
        tensor = read_tensor(proto, self.folder, self.max_bytes - self.spent)
        self.spent += tensor.numel() * tensor.itemsize
        return tensor

    def allocate(self, shape: Sequence[int], itemsize: int = 8) -> None:
        """Book a constant's bytes before it is made.

        Raises:
            ModelTooLarge: all constants together would exceed the budget.
        """
        label = f"constant of {self.call}" if self.call else "constant"
        self.spent += fits(tuple(shape), itemsize, self.max_bytes - self.spent, label)

    # -- shapes and the batch ----------------------------------------------------------------------------

    def shaped(self, x: Value, shape: Sequence[int], lead: bool) -> Value:
        """``x`` with another ONNX shape of as many elements; a node is made only if our own shape changes."""
        target = Value(x.name, tuple(shape), lead)
        if math.prod(x.own) != math.prod(target.own):
            raise CaptureError(f"cannot reshape {x.shape} to {tuple(shape)}")
        source = x
        while (node := self.made.get(source.name)) is not None and node.op is prim.reshape:
            source = Value(node.args[0].name, self.own[node.args[0].name], False)
        if x.own == target.own:
            return target
        if source.own == target.own:
            return Value(source.name, target.shape, lead)
        return self.emit(prim.reshape, source, target.own, shape=shape, lead=lead)

    def natural(self, x: Value, shape: Sequence[int]) -> Value:
        """``x`` reshaped; a leading 1 is the batch."""
        return self.shaped(x, shape, bool(shape) and shape[0] == 1)

    def batched(self, x: Value) -> Value:
        """``x`` as a batch of images or rows: ONNX axis 0 must have size 1 and is the batch."""
        if not x.rank or x.shape[0] != 1:
            raise CaptureError(
                f"expects a batch in axis 0, but one example has shape {x.shape}; export the model for batch 1"
            )
        return self.shaped(x, x.shape, True)

    def alone(self, x: Value) -> Value:
        """``x`` with our batch before all ONNX axes."""
        return self.shaped(x, x.shape, False)

    def align(self, operands: Sequence[Input]) -> tuple[list[Input], Shape, bool]:
        """Operands that broadcast together under torch's rules, with the result's ONNX shape and ``lead``."""
        shape = broadcast([o.shape for o in operands])
        rank = len(shape)
        padded = [(1,) * (rank - o.rank) + o.shape for o in operands]
        active = [o for o in operands if isinstance(o, Value)]
        lead = (
            rank > 0
            and all(p[0] == 1 for p in padded)
            and any(o.lead or o.rank < rank for o in active)
        )
        out: list[Input] = []
        for operand, full in zip(operands, padded, strict=True):
            out.append(self.shaped(operand, full, lead) if isinstance(operand, Value) else operand)
        return out, shape, lead

    # -- moving parts ------------------------------------------------------------------------------------

    def taken(self, x: Value, axis: int, index: Sequence[int]) -> Value:
        """Some positions along one ONNX axis, in the given order: a slice if they are evenly spaced."""
        size = x.shape[axis]
        if not index or any(not -size <= i < size for i in index):
            raise CaptureError(f"positions {list(index)[:5]} do not fit axis {axis} of {x.shape}")
        index = [i % size for i in index]
        if index == list(range(size)):
            return x
        x = self.alone(x) if x.lead and axis == 0 else x
        shape = (*x.shape[:axis], len(index), *x.shape[axis + 1 :])
        step = index[1] - index[0] if len(index) > 1 else 1
        if step > 0 and index == list(range(index[0], index[-1] + 1, step)):
            ends = (index[0], index[-1] + 1, step)
            return self.emit(prim.slice_, x, x.dim(axis), *ends, shape=shape, lead=x.lead)
        where = Const(torch.tensor(index), f"{x.name}.index")
        return self.emit(torch.index_select, x, x.dim(axis), where, shape=shape, lead=x.lead)

    def padded(self, x: Value, ends: Sequence[tuple[int, int]], value: float = 0.0) -> Value:
        """``x`` with (before, after) elements of ``value`` per ONNX axis; negative ones are cut."""
        if not any(map(any, ends)):
            return x
        x = self.alone(x) if x.lead and any(ends[0]) else x
        first = next(i for i, e in enumerate(ends) if any(e))
        flat = tuple(n for e in reversed(ends[first:]) for n in e)
        shape = tuple(n + before + after for n, (before, after) in zip(x.shape, ends, strict=True))
        return self.emit(prim.pad, x, flat, value, shape=shape, lead=x.lead)

    # -- ends --------------------------------------------------------------------------------------------

    def fold(self, rule: Callable[..., Output], call: Call, inputs: Sequence[Any]) -> Output:
        """The rule's result on constants: it builds nodes as for an active first input, which are run and dropped."""
        first = inputs[0]
        mark = len(self.nodes)
        stand_in = self.enter("folded", first.shape, False)
        made = rule(self, call, stand_in, *inputs[1:])
        results = [made] if isinstance(made, (Value, Const)) else list(made)
        for node in self.nodes[mark:]:
            self.allocate(node.shape)
        part = Graph(tuple(self.nodes[mark:]), {}, (stand_in.name,), stand_in.name)
        env = walk(part, {**self.tensors, stand_in.name: first.tensor[None]}, concrete)
        del self.nodes[mark:]
        return [
            Const(env[r.name].reshape(r.shape), out) if isinstance(r, Value) else r
            for r, out in zip(results, call.outputs, strict=False)
        ]

    def finish(self, source: str, output: Value) -> tuple[Graph, nn.Module]:
        """The graph of what the output needs, (B, K), and its module, whose buffers are the constants."""
        self.call = None
        if len(output.own) != 1:
            size = math.prod(output.own)
            output = self.shaped(output, (1, size), True)
        if output.name == source:
            output = self.emit(prim.reshape, output, output.own, shape=output.shape, lead=True)
        needed, kept = {output.name}, []
        for node in reversed(self.nodes):
            if node.name in needed:
                kept.append(node)
                needed.update(node.operands)
        tensors = {name: t for name, t in self.tensors.items() if name in needed}
        mixed = [n for n, t in tensors.items() if t.is_floating_point() and t.dtype != self.dtype]
        if mixed:
            raise CaptureError(
                f"{mixed[0].removeprefix('@')!r} is {tensors[mixed[0]].dtype} in a network on {self.dtype}; "
                "export it in one precision"
            )
        params = buffer_names(tensors)
        graph = Graph(tuple(reversed(kept)), params, (source,), output.name)
        return graph, GraphModule(graph, {params[v]: t for v, t in tensors.items()})


def broadcast(shapes: Sequence[Shape]) -> Shape:
    """The common shape under numpy's rules; `CaptureError` if there is none."""
    rank = max(map(len, shapes))
    padded = [(1,) * (rank - len(s)) + s for s in shapes]
    out = []
    for sizes in zip(*padded, strict=True):
        wide = {s for s in sizes if s != 1} or {1}
        if len(wide) > 1:
            raise CaptureError(f"shapes {', '.join(map(str, shapes))} do not broadcast")
        out.append(wide.pop())
    return tuple(out)


def buffer_names(values: Mapping[str, Any]) -> dict[str, str]:
    """value name -> a distinct name that ``register_buffer`` takes."""
    taken = set(dir(nn.Module())) | {"graph"}
    names: dict[str, str] = {}
    for value in values:
        base = re.sub(r"\W", "_", value.removeprefix("@")) or "constant"
        if base[0].isdigit():
            base = f"p{base}"
        name, count = base, 0
        while name in taken:
            count += 1
            name = f"{base}_{count}"
        taken.add(name)
        names[value] = name
    return names
