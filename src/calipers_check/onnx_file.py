"""ONNX files to steps. Every number of the file counts as the real number that it is; nothing is computed with them
that could round, so constants are only moved, never added."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from calipers_check.errors import Unusable
from calipers_check.layers import (
    SPARSE,
    Array,
    Conv,
    Dense,
    Kink,
    Maximum,
    Network,
    Pick,
    Scale,
    Smooth,
    Sparse,
    Step,
    Sum,
)

MAX_NUMBERS = 1 << 28  # of one value, or of one table of indices


class Variable:
    """A value that depends on the input: its number and its shape, batch axis included."""

    def __init__(self, number: int, shape: Sequence[int]) -> None:
        self.number, self.shape = number, tuple(shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def positions(self) -> Array:
        return np.arange(self.size).reshape(self.shape)


def network(data: bytes) -> Network:
    """The network in an ONNX file's bytes.

    Raises:
        Unusable: no ONNX file, not one input and one output, or an operator that is not supported.
    """
    import onnx

    try:
        model = onnx.load_from_string(data)
    except Exception as error:  # noqa: BLE001  protobuf raises what it likes
        raise Unusable(f"network: not readable as ONNX: {str(error)[:200]}") from None
    try:
        return _Reader(model).network()
    except Unusable:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise Unusable(f"network: inconsistent: {str(error)[:200]}") from None


class _Reader:
    """One pass over the nodes, which ONNX keeps in order of dependence."""

    def __init__(self, model: Any) -> None:
        from onnx import defs, numpy_helper

        graph = model.graph
        own, last = (
            {o.version for o in model.opset_import if o.domain in DOMAINS},
            defs.onnx_opset_version(),
        )
        version = max(own, default=0)
        if len(own) != 1 or not 7 <= version <= last:
            raise Unusable(
                f"network: operators of versions {sorted(own)}; expected one, 7 to {last}"
            )
        if model.functions or graph.sparse_initializer:
            raise Unusable("network: functions and sparse parameters are not supported")
        if any(tensor.data_location for tensor in graph.initializer):
            raise Unusable("network: parameters in other files are not read")
        self.graph, self.to_array = graph, numpy_helper.to_array
        self.schema: Any = lambda name: defs.get_schema(name, version, "")
        self.steps: list[Step] = []
        self.known: dict[str, Any] = {"": None}  # names to variables and constants
        for tensor in graph.initializer:
            self.define(tensor.name, self.to_array(tensor))
        inputs = [i for i in graph.input if i.name not in self.known]
        if len(inputs) != 1 or len(graph.output) != 1:
            raise Unusable(
                f"network: {len(inputs)} inputs, {len(graph.output)} outputs; expected 1"
            )
        dims = [d.dim_value for d in inputs[0].type.tensor_type.shape.dim]
        shape = [d or (1 if i == 0 else 0) for i, d in enumerate(dims)]  # no number: the batch
        if not 0 < math.prod(shape) <= MAX_NUMBERS:
            raise Unusable(f"network: the input's shape {dims} is not fixed")
        self.define(inputs[0].name, Variable(0, shape))
        self.inputs = math.prod(shape)

    def define(self, name: str, value: Any) -> None:
        if name in self.known:
            raise Unusable(f"network: two values have the name {name[:40]!r}")
        self.known[name] = value

    def network(self) -> Network:
        for node in self.graph.node:
            for name, value in zip(node.output, self.node(node), strict=True):
                if name:
                    self.define(name, value)
        out = self.known[self.graph.output[0].name]
        if not isinstance(out, Variable):
            raise Unusable("network: the output does not depend on the input")
        last = len(self.steps)
        if out.number != last:
            self.pick(out, out.positions)
        return Network(self.inputs, _merged(self.steps))

    def node(self, node: Any) -> list[Any]:
        """The values of the node's outputs; None for those that are not computed, and so must not be read."""
        if node.domain not in DOMAINS or node.op_type not in OPERATORS:
            raise Unusable(f"network: operator {node.op_type} is not supported")
        rule, understood = OPERATORS[node.op_type]
        attributes = self.attributes(node, set(understood.split()))
        args = [self.known[name] for name in node.input]
        if not any(isinstance(a, Variable) for a in args) and node.op_type not in CONSTANT:
            raise Unusable(f"network: {node.op_type} of constants; fold them before")
        found = rule(self, args, attributes)
        found = found if isinstance(found, list) else [found]
        if any(isinstance(f, Variable) and f.size > MAX_NUMBERS for f in found):
            raise Unusable(f"network: {node.op_type} makes too large a value")
        if node.op_type in SECOND:
            found += [None] * (len(node.output) - 1)
        if len(node.output) != len(found):
            raise Unusable(f"network: {node.op_type} with {len(node.output)} outputs")
        return found

    def attributes(self, node: Any, understood: set[str]) -> dict[str, Any]:
        """The node's attributes, after a look at the operator's definition in this version of the operators."""
        schema = self.schema(node.op_type)
        if schema.deprecated or not schema.min_input <= len(node.input) <= schema.max_input:
            raise Unusable(f"network: {node.op_type} of {len(node.input)} values")
        found = {}
        for a in node.attribute:
            known = schema.attributes.get(a.name)
            if a.name not in understood or known is None or a.name in found:
                raise Unusable(f"network: {node.op_type} with {a.name[:40]} is not supported")
            if int(known.type.value) != a.type or a.ref_attr_name:
                raise Unusable(f"network: attribute {a.name} is not of its type")
            found[a.name] = _attribute(a, self.to_array)
        return found

    # -- steps ------------------------------------------------------------------------------------------------------

    def add(self, step: Step, shape: Sequence[int]) -> Variable:
        if math.prod(shape) != step.size:
            raise Unusable(f"network: a step of {step.size} numbers for the shape {tuple(shape)}")
        self.steps.append(step)
        return Variable(len(self.steps), shape)

    def pick(self, x: Variable, index: Array) -> Variable:
        """``index`` has the result's shape."""
        index = np.asarray(index)
        return self.add(Pick((x.number,), index.size, index.reshape(-1, 1), x.size), index.shape)

    def moved(self, x: Any, move: Callable[[Array], Array]) -> Any:
        """What only moves elements, for variables and constants alike."""
        return self.pick(x, move(x.positions)) if isinstance(x, Variable) else move(x)

    def wide(self, x: Variable, shape: Sequence[int]) -> Variable:
        return x if x.shape == tuple(shape) else self.pick(x, np.broadcast_to(x.positions, shape))

    def shifted(self, x: Variable, constant: Array) -> Variable:
        shape = np.broadcast_shapes(x.shape, constant.shape)
        bias = np.broadcast_to(_real(constant), shape).reshape(-1)
        x = self.wide(x, shape)
        return self.add(Scale((x.number,), x.size, np.ones(x.size), bias=bias), shape)

    def scaled(
        self, x: Variable, constant: Array, *, divide: bool = False, rounded: bool = False
    ) -> Variable:
        x = self.wide(x, np.broadcast_shapes(x.shape, constant.shape))
        factor = np.broadcast_to(_real(constant), x.shape).reshape(-1)
        if divide and not factor.all():
            raise Unusable("network: a division by zero")
        return self.add(Scale((x.number,), x.size, factor, divide, rounded), x.shape)

    def summed(self, parts: Sequence[Variable], signs: Sequence[int]) -> Variable:
        shape = np.broadcast_shapes(*(p.shape for p in parts))
        numbers = tuple(self.wide(p, shape).number for p in parts)
        return self.add(Sum(numbers, math.prod(shape), tuple(signs)), shape)

    def dense(self, x: Variable, matrix: Array, bias: Array | None = None) -> Variable:
        """x @ matrix."""
        if matrix.ndim != 2 or x.shape[-1] != len(matrix):
            raise Unusable(f"network: a matrix of shape {matrix.shape} times {x.shape}")
        shape = (*x.shape[:-1], matrix.shape[1])
        if bias is not None:
            bias = np.broadcast_to(_real(bias), shape).reshape(-1)
        if x.size == len(matrix) and 0 < SPARSE * np.count_nonzero(matrix) < matrix.size:
            column, row = np.nonzero(matrix)
            order = np.argsort(row, kind="stable")
            column, row = column[order], row[order]
            entry, size = _real(matrix[column, row]), matrix.shape[1]
            step: Step = Sparse((x.number,), size, row, column, entry, x.size, bias=bias)
            return self.add(step, shape)
        weight = _real(np.ascontiguousarray(matrix.T))
        return self.add(Dense((x.number,), math.prod(shape), weight, bias=bias), shape)


def _real(constant: Array) -> Array:
    """In float64, exactly."""
    if constant.dtype.kind not in "fiuV":
        raise Unusable(f"network: parameters of type {constant.dtype} are not supported")
    found = constant.astype(np.float64)
    if not np.isfinite(found).all():
        raise Unusable("network: a parameter is not finite")
    if constant.dtype.kind in "iu" and (np.abs(found) >= 2.0**53).any():
        raise Unusable("network: a whole number too large for float64")
    return found


def _merged(steps: Sequence[Step]) -> list[Step]:
    """The same function without steps that move nothing, biases taken into the products before them."""

    def still(_: list[Step], step: Step, source: int) -> bool:
        return isinstance(step, Pick) and step.straight and source + 1 < len(steps)

    steps = _rebuilt(steps, still)
    readers = Counter(v for step in steps for v in step.sources)

    def taken(made: list[Step], step: Step, source: int) -> bool:
        before = made[-1] if made else None
        fits = (
            isinstance(step, Scale)
            and bool((step.factor == 1).all())
            and isinstance(before, Dense | Sparse | Conv)
            and before.bias is None
            and step.sources[0] == source
            and readers[source] == 1
        )
        if fits and isinstance(before, Dense | Sparse | Conv) and isinstance(step, Scale):
            made[-1] = replace(before, bias=step.bias)
        return fits

    return _rebuilt(steps, taken)


def _rebuilt(steps: Sequence[Step], dropped: Callable[[list[Step], Step, int], bool]) -> list[Step]:
    """Without the steps that ``dropped(those before, step, number of the value made last)`` takes out; what read them
    reads what they read."""
    number = {0: 0}
    made: list[Step] = []
    for k, step in enumerate(steps, 1):
        if dropped(made, step, k - 1):
            number[k] = number[step.sources[0]]
        else:
            made.append(replace(step, sources=tuple(number[v] for v in step.sources)))
            number[k] = len(made)
    return made


def _attribute(a: Any, to_array: Callable[[Any], Array]) -> Any:
    match a.type:
        case 1:
            return a.f
        case 2:
            return a.i
        case 3:
            return a.s.decode(errors="replace")
        case 4 if not a.t.data_location:
            return to_array(a.t)
        case 6:
            return list(a.floats)
        case 7:
            return list(a.ints)
    raise Unusable(f"network: attribute {a.name} of an unknown kind")


# -- operators: (reader, arguments, attributes) -> variable, constant or a list of them ---------


def _constant(_: _Reader, args: Any, attributes: dict[str, Any]) -> Any:
    if "value" in attributes:
        return attributes["value"]
    for name, dtype in (("value_float", np.float32), ("value_int", np.int64)):
        if name in attributes:
            return np.array(attributes[name], dtype)
    for name, dtype in (("value_floats", np.float32), ("value_ints", np.int64)):
        if name in attributes:
            return np.array(attributes[name], dtype)
    raise Unusable("network: a constant of an unknown kind")


def _same(_: _Reader, args: Any, attributes: dict[str, Any]) -> Any:
    return args[0]


def _dropout(_: _Reader, args: Any, attributes: dict[str, Any]) -> Any:
    if len(args) > 2 and args[2] is not None and np.any(args[2]):
        raise Unusable("network: Dropout while training")
    return args[0]


def _cast(_: _Reader, args: Any, attributes: dict[str, Any]) -> Any:
    kinds = {1: np.float32, 6: np.int32, 7: np.int64, 11: np.float64}
    x, dtype = args[0], kinds.get(attributes["to"])
    if isinstance(x, Variable) and attributes["to"] in (1, 11):
        return x
    if isinstance(x, Variable) or dtype is None or not np.array_equal(x.astype(dtype), x):
        raise Unusable("network: a cast that changes numbers")
    return x.astype(dtype)


def _shape_of(_: _Reader, args: Any, attributes: dict[str, Any]) -> Any:
    return np.array(args[0].shape, np.int64)


def _reshape(r: _Reader, args: Any, attributes: dict[str, Any]) -> Any:
    x = args[0]
    shape = [int(v) for v in np.atleast_1d(args[1])]
    if not attributes.get("allowzero"):
        shape = [x.shape[i] if v == 0 else v for i, v in enumerate(shape)]
    return r.moved(x, lambda v: v.reshape(shape))


def _flatten(r: _Reader, args: Any, attributes: dict[str, Any]) -> Any:
    axis = attributes.get("axis", 1)
    shape = args[0].shape
    axis += len(shape) if axis < 0 else 0
    return r.moved(args[0], lambda v: v.reshape(math.prod(shape[:axis]), -1))


def _transpose(r: _Reader, args: Any, attributes: dict[str, Any]) -> Any:
    return r.moved(args[0], lambda v: v.transpose(attributes.get("perm")))


def _axes(args: Any, attributes: dict[str, Any]) -> tuple[int, ...]:
    axes = attributes.get("axes", args[1] if len(args) > 1 else None)
    return () if axes is None else tuple(int(v) for v in np.atleast_1d(axes))


def _squeeze(r: _Reader, args: Any, attributes: dict[str, Any]) -> Any:
    return r.moved(args[0], lambda v: v.squeeze(_axes(args, attributes) or None))


def _unsqueeze(r: _Reader, args: Any, attributes: dict[str, Any]) -> Any:
    return r.moved(args[0], lambda v: np.expand_dims(v, _axes(args, attributes)))


def _slice(r: _Reader, args: Any, attributes: dict[str, Any]) -> Any:
    if "starts" in attributes:
        starts, ends, axes, steps = (
            attributes["starts"],
            attributes["ends"],
            attributes.get("axes"),
            None,
        )
    else:
        starts, ends, axes, steps = (*args[1:], None, None)[:4]
    starts = [int(v) for v in np.atleast_1d(starts)]
    axes = range(len(starts)) if axes is None else [int(v) for v in np.atleast_1d(axes)]
    steps = [1] * len(starts) if steps is None else [int(v) for v in np.atleast_1d(steps)]
    cut = [slice(None)] * len(args[0].shape)
    for axis, start, end, step in zip(axes, starts, np.atleast_1d(ends), steps, strict=True):
        if step < 1 or cut[axis] != slice(None):
            raise Unusable("network: a slice backwards, or twice along one axis")
        cut[axis] = slice(start, int(end), step)
    return r.moved(args[0], lambda v: v[tuple(cut)])


def _gather(r: _Reader, args: Any, attributes: dict[str, Any]) -> Any:
    return r.moved(
        args[0], lambda v: np.take(v, args[1].astype(np.int64), attributes.get("axis", 0))
    )


def _split(r: _Reader, args: Any, attributes: dict[str, Any]) -> Any:
    axis = attributes.get("axis", 0)
    sizes = attributes.get("split", args[1] if len(args) > 1 else None)
    if sizes is None:
        raise Unusable("network: Split without sizes")
    if min(sizes) < 0 or sum(sizes) != args[0].shape[axis]:
        raise Unusable("network: Split into other sizes than the operand's")
    ends = np.cumsum([int(v) for v in sizes])[:-1]
    count = len(sizes)
    return [r.moved(args[0], lambda v, i=i: np.split(v, ends, axis)[i]) for i in range(count)]  # type: ignore[misc]


def _pad(r: _Reader, args: Any, attributes: dict[str, Any]) -> Any:
    x = args[0]
    pads: Any = attributes.get("pads", args[1] if len(args) > 1 else None)
    value = attributes.get("value", 0.0) if len(args) < 3 or args[2] is None else float(args[2])
    if attributes.get("mode", "constant") != "constant" or value or len(args) > 3:
        raise Unusable("network: only padding with zeros is supported")
    pads = [int(v) for v in np.atleast_1d(pads)]
    n = len(x.shape)
    if min(pads) < 0 or len(pads) != 2 * n:
        raise Unusable("network: padding that removes elements is not supported")
    widths = list(zip(pads[:n], pads[n:], strict=True))
    return r.pick(x, np.pad(x.positions, widths, constant_values=-1))


def _expand(r: _Reader, args: Any, attributes: dict[str, Any]) -> Any:
    shape = np.broadcast_shapes(args[0].shape, tuple(int(v) for v in args[1]))
    return r.moved(args[0], lambda v: np.broadcast_to(v, shape))


def _concat(r: _Reader, args: Any, attributes: dict[str, Any]) -> Any:
    if not all(isinstance(a, Variable) for a in args):
        raise Unusable("network: Concat with a constant")
    axis = attributes["axis"]
    parts = []
    for k in range(len(args)):
        places = [a.positions if i == k else np.full(a.shape, -1) for i, a in enumerate(args)]
        parts.append(r.pick(args[k], np.concatenate(places, axis)))
    return parts[0] if len(parts) == 1 else r.summed(parts, [1] * len(parts))


def _add(r: _Reader, args: Any, attributes: dict[str, Any]) -> Any:
    a, b = args
    if isinstance(a, Variable) and isinstance(b, Variable):
        return r.summed([a, b], [1, 1])
    i = 0 if isinstance(a, Variable) else 1
    return r.shifted(args[i], args[1 - i])


def _sub(r: _Reader, args: Any, attributes: dict[str, Any]) -> Any:
    a, b = args
    if isinstance(a, Variable) and isinstance(b, Variable):
        return r.summed([a, b], [1, -1])
    if isinstance(a, Variable):
        return r.shifted(a, -_real(b))
    return r.shifted(r.summed([b], [-1]), a)


def _mul(r: _Reader, args: Any, attributes: dict[str, Any]) -> Any:
    a, b = args if isinstance(args[0], Variable) else reversed(args)
    if isinstance(b, Variable):
        raise Unusable("network: products of variables are not supported")
    return r.scaled(a, b)


def _div(r: _Reader, args: Any, attributes: dict[str, Any]) -> Any:
    if isinstance(args[1], Variable):
        raise Unusable("network: division by a variable is not supported")
    return r.scaled(args[0], args[1], divide=True)


def _neg(r: _Reader, args: Any, attributes: dict[str, Any]) -> Any:
    return r.summed([args[0]], [-1])


def _matmul(r: _Reader, args: Any, attributes: dict[str, Any]) -> Any:
    a, b = args
    if isinstance(a, Variable) and isinstance(b, np.ndarray) and b.ndim == 2:
        return r.dense(a, b)
    if isinstance(b, Variable) and isinstance(a, np.ndarray) and a.ndim == 2 and len(b.shape) > 1:
        turned = r.moved(b, lambda v: v.swapaxes(-1, -2))
        return r.moved(r.dense(turned, a.T), lambda v: v.swapaxes(-1, -2))
    raise Unusable("network: only products with a constant matrix are supported")


def _gemm(r: _Reader, args: Any, attributes: dict[str, Any]) -> Any:
    x, matrix = args[:2]
    bias = args[2] if len(args) > 2 else None
    if not isinstance(x, Variable) or isinstance(matrix, Variable) or isinstance(bias, Variable):
        raise Unusable(
            "network: Gemm with anything but a constant matrix and bias is not supported"
        )
    if len(x.shape) != 2:
        raise Unusable("network: Gemm of other than two dimensions")
    if attributes.get("transA"):
        x = r.moved(x, np.transpose)
    if attributes.get("alpha", 1.0) != 1.0 or attributes.get("beta", 1.0) != 1.0:
        raise Unusable("network: Gemm with alpha or beta is not supported")
    return r.dense(x, matrix.T if attributes.get("transB") else matrix, bias)


def _window(x: Variable, attributes: dict[str, Any], kernel: Sequence[int]) -> tuple[Any, ...]:
    """Stride, padding (begin, then end), dilation and the output's size, for the last axes of x."""
    if attributes.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise Unusable("network: automatic padding is not supported")
    n = len(kernel)
    stride = attributes.get("strides") or [1] * n
    pads = attributes.get("pads") or [0] * (2 * n)
    dilation = attributes.get("dilations") or [1] * n
    if any(pads) and "auto_pad" in attributes and attributes["auto_pad"] != "NOTSET":
        raise Unusable("network: padding that is automatic and given")
    if (len(stride), len(pads), len(dilation)) != (n, 2 * n, n) or min(*dilation, *kernel) < 1:
        raise Unusable("network: a window's attributes do not fit")
    if attributes.get("ceil_mode") or len(x.shape) != n + 2 or x.shape[0] != 1:
        raise Unusable("network: a window over this shape, or rounded up, is not supported")
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    out = [
        (size + pads[i] + pads[i + n] - reach[i]) // stride[i] + 1
        for i, size in enumerate(x.shape[2:])
    ]
    if min(out) < 1 or min(stride) < 1 or min(pads) < 0:
        raise Unusable("network: a window larger than its operand")
    return stride, pads, dilation, out


def _conv(r: _Reader, args: Any, attributes: dict[str, Any]) -> Any:
    x, weight = args[:2]
    bias = args[2] if len(args) > 2 else None
    if not isinstance(x, Variable) or isinstance(weight, Variable) or isinstance(bias, Variable):
        raise Unusable("network: Conv with variable parameters is not supported")
    kernel = attributes.get("kernel_shape", weight.shape[2:])
    if tuple(kernel) != weight.shape[2:] or (bias is not None and bias.shape != weight.shape[:1]):
        raise Unusable("network: Conv whose parameters' shapes do not fit")
    stride, pads, dilation, out = _window(x, attributes, weight.shape[2:])
    flat = weight.ndim == 3  # one dimension: a row
    if weight.ndim not in (3, 4):
        raise Unusable("network: Conv of other than one or two dimensions is not supported")
    shape: Any = (x.shape[1], *([1] if flat else []), *x.shape[2:])
    end: Any = (len(weight), *([1] if flat else []), *out)
    weight = _real(weight).reshape(*weight.shape[:2], -1, weight.shape[-1])

    def two(v: Sequence[int], fill: int) -> Any:
        return (fill, v[0]) if flat else tuple(v)

    size = len(pads) // 2
    padding = (*two(pads[:size], 0), *two(pads[size:], 0))
    if bias is not None:
        bias = np.repeat(_real(bias), math.prod(out))
    groups = attributes.get("group", 1)
    if weight.shape[1] * groups != x.shape[1] or len(weight) % groups:
        raise Unusable("network: Conv whose channels do not fit")
    step = Conv(
        (x.number,), math.prod(end), weight, shape, end, two(stride, 1), padding, two(dilation, 1),
        groups, bias=bias,
    )  # fmt: skip
    return r.add(step, (1, len(weight), *out))


def _windows(x: Variable, attributes: dict[str, Any]) -> tuple[Array, tuple[int, ...]]:
    """The positions (out, k) of a pool's windows, −1 outside, and the result's shape."""
    kernel = attributes["kernel_shape"]
    stride, pads, dilation, out = _window(x, attributes, kernel)
    n = len(kernel)
    widths = [(0, 0), (0, 0), *((pads[i], pads[i + n]) for i in range(n))]
    grid = np.pad(x.positions, widths, constant_values=-1)
    reach = tuple(d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True))
    view = np.lib.stride_tricks.sliding_window_view(grid, reach, tuple(range(2, n + 2)))
    view = view[(slice(None), slice(None), *(slice(None, None, s) for s in stride))]
    steps: Any = (..., *(slice(None, None, d) for d in dilation))
    view = view[steps]
    if math.prod(view.shape) > MAX_NUMBERS:
        raise Unusable("network: windows with too many elements")
    return view.reshape(-1, math.prod(kernel)), (1, x.shape[1], *out)


def _max_pool(r: _Reader, args: Any, attributes: dict[str, Any]) -> Any:
    index, shape = _windows(args[0], attributes)
    if not (index >= 0).any(1).all():
        raise Unusable("network: a maximum over padding alone")
    return r.add(Maximum((args[0].number,), len(index), index), shape)


def _mean(r: _Reader, x: Variable, index: Array, shape: Sequence[int], padding: bool) -> Variable:
    total = r.add(Pick((x.number,), len(index), index, x.size), shape)
    count = np.full(len(index), index.shape[1]) if padding else (index >= 0).sum(1)
    return r.scaled(total, count.reshape(shape), divide=True)


def _average_pool(r: _Reader, args: Any, attributes: dict[str, Any]) -> Any:
    index, shape = _windows(args[0], attributes)
    return _mean(r, args[0], index, shape, bool(attributes.get("count_include_pad")))


def _global_average(r: _Reader, args: Any, attributes: dict[str, Any]) -> Any:
    shape = args[0].shape
    index = args[0].positions.reshape(shape[0] * shape[1], -1)
    return _mean(r, args[0], index, (*shape[:2], *[1] * (len(shape) - 2)), True)


def _batch_normalization(r: _Reader, args: Any, attributes: dict[str, Any]) -> Any:
    x, *parameters = args
    if any(isinstance(p, Variable) or p.shape != x.shape[1:2] for p in parameters):
        raise Unusable("network: BatchNormalization with parameters that do not fit")
    around = [1, -1] + [1] * (len(x.shape) - 2)
    scale, shift, mean, variance = (_real(p).reshape(around) for p in parameters)
    variance = variance + float(np.float32(attributes.get("epsilon", 1e-5)))
    if not (variance > 0).all():
        raise Unusable("network: a variance that is negative")
    root = np.sqrt(variance)
    x = r.scaled(r.shifted(x, -mean), scale)
    return r.shifted(r.scaled(x, root, divide=True, rounded=True), shift)


def _kink(left: float | None) -> Callable[..., Any]:
    def rule(r: _Reader, args: Any, attributes: dict[str, Any]) -> Any:
        slope = attributes.get("alpha", float(np.float32(0.01))) if left is None else left
        if not abs(slope) < 1e6:
            raise Unusable(f"network: a slope of {slope}")
        return r.add(Kink((args[0].number,), args[0].size, slope, 1.0), args[0].shape)

    return rule


def _smooth(name: str) -> Callable[..., Any]:
    def rule(r: _Reader, args: Any, attributes: dict[str, Any]) -> Any:
        return r.add(Smooth((args[0].number,), args[0].size, name), args[0].shape)

    return rule


CONSTANT = {
    "Constant", "Identity", "Cast", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Gather",
    "Expand", "Dropout",
}  # fmt: skip
DOMAINS = ("", "ai.onnx")
SECOND = ("Dropout", "MaxPool")  # which may have a second output, if nothing reads it
_POOL = "kernel_shape strides pads dilations auto_pad ceil_mode"
# the rule of each operator, and the attributes that it understands
OPERATORS: dict[str, tuple[Callable[..., Any], str]] = {
    "Constant": (_constant, "value value_float value_int value_floats value_ints"),
    "Identity": (_same, ""),
    "Dropout": (_dropout, "ratio seed"),
    "Cast": (_cast, "to saturate"),
    "Shape": (_shape_of, ""),
    "Reshape": (_reshape, "allowzero"),
    "Flatten": (_flatten, "axis"),
    "Transpose": (_transpose, "perm"),
    "Squeeze": (_squeeze, "axes"),
    "Unsqueeze": (_unsqueeze, "axes"),
    "Slice": (_slice, "starts ends axes"),
    "Gather": (_gather, "axis"),
    "Split": (_split, "axis split"),
    "Pad": (_pad, "mode pads value"),
    "Expand": (_expand, ""),
    "Concat": (_concat, "axis"),
    "Add": (_add, ""),
    "Sub": (_sub, ""),
    "Mul": (_mul, ""),
    "Div": (_div, ""),
    "Neg": (_neg, ""),
    "MatMul": (_matmul, ""),
    "Gemm": (_gemm, "alpha beta transA transB"),
    "Conv": (_conv, "kernel_shape strides pads dilations group auto_pad"),
    "MaxPool": (_max_pool, f"{_POOL} storage_order"),
    "AveragePool": (_average_pool, f"{_POOL} count_include_pad"),
    "GlobalAveragePool": (_global_average, ""),
    "BatchNormalization": (_batch_normalization, "epsilon momentum"),
    "Relu": (_kink(0.0), ""),
    "LeakyRelu": (_kink(None), "alpha"),
    "Abs": (_kink(-1.0), ""),
    "Sigmoid": (_smooth("sigmoid"), ""),
    "Tanh": (_smooth("tanh"), ""),
}
