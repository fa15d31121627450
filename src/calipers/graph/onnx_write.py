"""Any `Graph` of the vocabulary as an ONNX file: operator set 17, a free batch, parameters as initializers.

One table from ops to short functions, the mirror image of the reader's. Nodes that do not depend on the input are
evaluated and stored.
"""

from __future__ import annotations

import gzip
import math
import os
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from calipers.errors import CaptureError, ModelTooLarge, UnsupportedOp
from calipers.graph import primitives as prim
from calipers.graph.graph import Graph, Network, Node, Ref, bind, concrete, resolve, walk

OPSET, IR_VERSION = 17, 8
_ELEMENT = {torch.float32: 1, torch.int32: 6, torch.int64: 7, torch.float16: 10, torch.float64: 11}
_PROTOBUF_LIMIT = 2**31 - 1


def save_onnx(network: Network, path: str | Path) -> None:
    """Write the network's graph with its present parameters; gzip's if the name ends in ``.gz``.

    The file appears complete or not at all. Input and output have a free batch in axis 0.

    Raises:
        CaptureError: a layer is in training mode, or a dtype that ONNX files of ours do not hold.
        UnsupportedOp: ops without an ONNX form; all of them are named.
        ModelTooLarge: more than 2 GiB of parameters.
    """
    path = Path(path)
    with torch.no_grad():
        data = _model(network)
    if path.suffix == ".gz":
        data = gzip.compress(data, mtime=0)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with part.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _model(network: Network) -> bytes:
    from onnx import helper

    graph = network.graph
    writer = Writer(graph, _constants(network), network.dtype)
    missing = [n for n in graph.nodes if n.name in graph.active and n.op not in WRITE]
    if missing:
        raise UnsupportedOp(
            [f"{getattr(n.op, '__name__', n.op)} (in {n.path or n.name!r})" for n in missing],
            "The ONNX writer knows the ops that bounds know; replace these layers",
        )
    for node in graph.nodes:
        if node.name in graph.active:
            writer.write(node)
    output = writer.final()
    kind = _element(network.dtype, "the network")
    size = graph.node[graph.output].shape if graph.nodes else network.input_shape
    source = writer.names[graph.inputs[0]]
    total = sum(len(t.raw_data) for t in writer.initializers)
    if total > _PROTOBUF_LIMIT - 2**20:
        raise ModelTooLarge(f"{total} bytes of parameters exceed the 2 GiB that one file holds")
    body = helper.make_graph(
        writer.nodes,
        "calipers",
        [helper.make_tensor_value_info(source, kind, ["batch", *network.input_shape])],
        [helper.make_tensor_value_info(output, kind, ["batch", *size])],
        writer.initializers,
    )
    opset = helper.make_opsetid("", OPSET)
    model = helper.make_model(
        body, opset_imports=[opset], ir_version=IR_VERSION, producer_name="calipers"
    )
    return bytes(model.SerializeToString())


def _constants(network: Network) -> dict[str, Any]:
    """Parameters, constants, and all values that do not depend on the input."""
    graph = network.graph
    fixed = tuple(n for n in graph.nodes if n.name not in graph.active)
    env = bind(graph, network.module)
    part = Graph(fixed, graph.params, graph.inputs, fixed[-1].name if fixed else graph.inputs[0])
    return walk(part, env, concrete)


def _element(dtype: torch.dtype, what: str) -> int:
    if dtype not in _ELEMENT:
        raise CaptureError(f"{what} has dtype {dtype}; convert it with .float() before saving")
    return _ELEMENT[dtype]


class Writer:
    """ONNX nodes and initializers so far."""

    def __init__(self, graph: Graph, env: Mapping[str, Any], dtype: torch.dtype) -> None:
        self.graph, self.env, self.dtype = graph, env, dtype
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self.taken: set[str] = set()
        self.names = {name: self.fresh(name) for name in graph.inputs}  # value -> ONNX name
        self.stored: dict[Any, str] = {}
        self.shape: tuple[int, ...] = ()  # of the node being written, without the batch
        self.name = ""

    def fresh(self, name: str) -> str:
        base = re.sub(r"[^\w.]", "_", name.removeprefix("@")) or "value"
        unique, count = base, 0
        while unique in self.taken:
            count += 1
            unique = f"{base}_{count}"
        self.taken.add(unique)
        return unique

    def write(self, node: Node) -> None:
        self.shape, self.name = node.shape, node.name
        args = [self._argument(a) for a in node.args]
        kwargs = {k: self._argument(v) for k, v in node.kwargs.items()}
        try:
            self.names[node.name] = WRITE[node.op](self, *args, **kwargs)
        except CaptureError as error:
            raise CaptureError(
                f"{node.op.__name__} in {node.path or node.name!r}: {error}"
            ) from None

    def _argument(self, value: Any) -> Any:
        """An ONNX name for an active value, the tensor (under its name) for a constant one."""
        if isinstance(value, list):
            return [self._argument(v) for v in value]
        if isinstance(value, Ref):
            if value.name in self.names:
                return self.names[value.name]
            found = self.env[value.name]
            return (
                Stored(found, self.graph.params.get(value.name, value.name))
                if isinstance(found, Tensor)
                else found
            )
        return resolve(value, self.env)

    def add(self, op: str, *inputs: Any, **attributes: Any) -> str:
        """A node; tensors and numbers among the inputs become initializers, None an omitted input."""
        from onnx import helper

        names = ["" if v is None else self.operand(v) for v in inputs]
        while names and not names[-1]:
            names.pop()
        output = self.fresh(self.name)
        self.nodes.append(helper.make_node(op, names, [output], name=output, **attributes))
        return output

    def operand(self, value: Any) -> str:
        if isinstance(value, str):
            return value
        if isinstance(value, (int, float)):
            value = Stored(torch.tensor(value, dtype=self.dtype), f"{self.name}.number")
        if not value.tensor.is_floating_point() or value.tensor.dtype == self.dtype:
            return self.store(value.tensor, value.name)
        return self.store(value.tensor.to(self.dtype), value.name)

    def integers(self, values: Sequence[int]) -> str:
        return self.store(torch.tensor(list(values), dtype=torch.int64), f"{self.name}.sizes")

    def store(self, tensor: Tensor, name: str) -> str:
        from onnx import TensorProto

        key = (name, tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        if tensor.numel() and key in self.stored and name in self.graph.params.values():
            return self.stored[key]
        unique = self.fresh(name)
        data = tensor.detach().cpu().contiguous()
        proto = TensorProto(
            name=unique, data_type=_element(tensor.dtype, repr(name)), dims=tuple(tensor.shape)
        )
        proto.raw_data = np.ascontiguousarray(data.numpy()).tobytes()
        self.initializers.append(proto)
        self.stored[key] = unique
        return unique

    def final(self) -> str:
        """The output's name; the input itself is passed through a node."""
        name = self.graph.output
        if name in self.graph.inputs:
            self.name = "output"
            return self.add("Identity", self.names[name])
        return self.names[name]


class Stored:
    """A constant tensor and the name it shall have in the file."""

    def __init__(self, tensor: Tensor, name: str) -> None:
        self.tensor, self.name = tensor, name


# -- one function per op ---------------------------------------------------------------------------------


def _pair(value: Any, count: int) -> list[int]:
    items = [value] if isinstance(value, int) else list(value)
    return items * count if len(items) == 1 else items


def _plain(op: str) -> Callable[..., str]:
    return lambda w, *args: w.add(op, *args)


def _constant(value: Any, what: str) -> Any:
    if isinstance(value, str):
        raise CaptureError(f"{what} depends on the network's input; ONNX needs a constant")
    return value


def _linear(w: Writer, x: Any, weight: Any, bias: Any = None) -> str:
    _constant(weight, "weight")
    if len(w.shape) == 1:
        return w.add("Gemm", x, weight, bias, transB=1)
    product = w.add("MatMul", x, Stored(weight.tensor.mT, weight.name))
    return product if bias is None else w.add("Add", product, bias)


def _conv(w: Writer, x: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0,
          dilation: Any = 1, groups: int = 1) -> str:  # fmt: skip
    kernel = list(_constant(weight, "weight").tensor.shape[2:])
    n = len(kernel)
    dilations = _pair(dilation, n)
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
        pads = [t // 2 for t in total] + [t - t // 2 for t in total]
    else:
        pads = ([0] * n if padding == "valid" else _pair(padding, n)) * 2
    return w.add(
        "Conv", x, weight, bias, kernel_shape=kernel, strides=_pair(stride, n), pads=pads,
        dilations=dilations, group=groups,
    )  # fmt: skip


def _conv_transpose(w: Writer, x: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0,
                    output_padding: Any = 0, groups: int = 1, dilation: Any = 1) -> str:  # fmt: skip
    kernel = list(_constant(weight, "weight").tensor.shape[2:])
    n = len(kernel)
    return w.add(
        "ConvTranspose", x, weight, bias, kernel_shape=kernel, strides=_pair(stride, n),
        pads=_pair(padding, n) * 2, output_padding=_pair(output_padding, n), group=groups,
        dilations=_pair(dilation, n),
    )  # fmt: skip


def _clamp(w: Writer, x: Any, low: Any = None, high: Any = None) -> str:
    for end in (low, high):
        if isinstance(end, str) or (isinstance(end, Stored) and end.tensor.ndim):
            raise CaptureError("clamping by tensors has no ONNX form here; clamp by numbers")
    return w.add("Clip", x, low, high)


def _reshape(w: Writer, x: Any, shape: Sequence[int]) -> str:
    if len(shape) == 1:
        return w.add("Flatten", x, axis=1) if shape[0] else w.add("Identity", x)
    return w.add("Reshape", x, w.integers([-1, *shape]))


def _expand(w: Writer, x: Any, shape: Sequence[int]) -> str:
    return w.add("Expand", x, w.integers([1, *shape]))


def _slice(w: Writer, x: Any, dim: int, start: int, stop: int, step: int = 1) -> str:
    ends = (w.integers([v]) for v in (start, stop, dim, step))
    return w.add("Slice", x, *ends)


def _pad(w: Writer, x: Any, pads: Sequence[int], value: float = 0.0) -> str:
    rank = len(w.shape) + 1
    before, after = [0] * rank, [0] * rank
    for i in range(len(pads) // 2):
        before[rank - 1 - i], after[rank - 1 - i] = pads[2 * i], pads[2 * i + 1]
    return w.add("Pad", x, w.integers(before + after), float(value))


def _average_pool(w: Writer, x: Any, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
                  ceil_mode: bool = False, count_include_pad: bool = True) -> str:  # fmt: skip
    return w.add(
        "AveragePool", x, kernel_shape=list(kernel), strides=list(stride), pads=list(padding) * 2,
        ceil_mode=int(ceil_mode), count_include_pad=int(count_include_pad),
    )  # fmt: skip


def _max_pool(w: Writer, x: Any, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
              dilation: Sequence[int], ceil_mode: bool = False) -> str:  # fmt: skip
    return w.add(
        "MaxPool", x, kernel_shape=list(kernel), strides=list(stride), pads=list(padding) * 2,
        dilations=list(dilation), ceil_mode=int(ceil_mode),
    )  # fmt: skip


def _batch_norm(w: Writer, x: Any, weight: Any, bias: Any, mean: Any, var: Any, training: bool,
                eps: float) -> str:  # fmt: skip
    if training or mean is None or var is None:
        raise CaptureError("batch statistics have no ONNX form; call .eval() before saving")
    count = mean.tensor.shape
    weight = weight or Stored(torch.ones(count, dtype=mean.tensor.dtype), f"{mean.name}.one")
    bias = bias or Stored(torch.zeros(count, dtype=mean.tensor.dtype), f"{mean.name}.zero")
    return w.add("BatchNormalization", x, weight, bias, mean, var, epsilon=float(eps))


def _dropout(w: Writer, x: Any, rate: float, training: bool) -> str:
    if training and rate:
        raise CaptureError("dropout in training mode is random; call .eval() before saving")
    return w.add("Identity", x)


def _mean(w: Writer, x: Any, dims: Sequence[int], keepdim: bool = False) -> str:
    return w.add("ReduceMean", x, axes=list(dims), keepdims=int(keepdim))


def _sum(w: Writer, x: Any, dims: Sequence[int], keepdim: bool = False) -> str:
    return w.add("ReduceSum", x, w.integers(dims), keepdims=int(keepdim))


def _maximum(w: Writer, x: Any, dims: Sequence[int], keepdim: bool = False) -> str:
    return w.add("ReduceMax", x, axes=list(dims), keepdims=int(keepdim))


def _elu(w: Writer, x: Any, alpha: float = 1.0, scale: float = 1.0, rate: float = 1.0) -> str:
    if rate == 1:
        y = w.add("Elu", x, alpha=float(alpha))
    elif abs(alpha * rate - 1) <= 1e-12:
        y = w.add("Celu", x, alpha=float(alpha))
    else:
        raise CaptureError("has no ONNX form with this alpha and rate; use ELU, SELU or CELU")
    return y if scale == 1 else w.add("Mul", y, float(scale))


def _gelu(w: Writer, x: Any) -> str:
    bell = w.add("Add", w.add("Erf", w.add("Mul", x, math.sqrt(0.5))), 1.0)
    return w.add("Mul", w.add("Mul", x, bell), 0.5)


def _tanh_gelu(w: Writer, x: Any) -> str:
    cube = w.add("Mul", w.add("Pow", x, 3.0), 0.044715)
    inner = w.add("Mul", w.add("Add", x, cube), 2 * math.sqrt(2 / math.pi))
    return w.add("Mul", x, w.add("Sigmoid", inner))


def _step(w: Writer, x: Any, at: float = 0.0) -> str:
    if at not in (0, 1):
        raise CaptureError(f"a step that is {at} at 0 has no ONNX form")
    above = w.add("GreaterOrEqual" if at else "Greater", x, 0.0)
    return w.add("Cast", above, to=_element(w.dtype, "the network"))


def _center(w: Writer, x: Any, dims: Sequence[int]) -> str:
    return w.add("Sub", x, w.add("ReduceMean", x, axes=list(dims), keepdims=1))


def _differences(w: Writer, x: Any, dim: int) -> str:
    rank = len(w.shape)  # of the operand, batch included
    order = [*(i for i in range(rank) if i != dim), dim]
    along = w.add("Unsqueeze", w.add("Transpose", x, perm=order), w.integers([dim]))
    return w.add("Sub", along, w.add("Unsqueeze", x, w.integers([rank])))


def _repeated(w: Writer, x: Any, value: Any) -> str:
    batch = w.add("Slice", w.add("Shape", x), *(w.integers([v]) for v in (0, 1)))
    size = w.add("Concat", batch, w.integers(value.tensor.shape), axis=0)
    return w.add("Expand", Stored(value.tensor[None], value.name), size)


def _interpolate(w: Writer, x: Any, size: Sequence[int], mode: str, corners: bool = False) -> str:
    front = w.add("Slice", w.add("Shape", x), *(w.integers([v]) for v in (0, 2)))
    target = w.add("Concat", front, w.integers(size), axis=0)
    if mode == "nearest":
        how = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    else:
        how = {"coordinate_transformation_mode": "align_corners" if corners else "half_pixel"}
    return w.add(
        "Resize", x, None, None, target, mode="nearest" if mode == "nearest" else "linear", **how
    )


WRITE: dict[Callable[..., Any], Callable[..., str]] = {
    F.linear: _linear,
    F.leaky_relu: lambda w, x, slope=0.01: w.add("LeakyRelu", x, alpha=float(slope)),
    torch.abs: _plain("Abs"),
    torch.add: _plain("Add"),
    torch.cat: lambda w, parts, dim: w.add("Concat", *parts, axis=dim),
    torch.clamp: _clamp,
    torch.conv1d: _conv,
    torch.conv2d: _conv,
    torch.conv3d: _conv,
    torch.conv_transpose1d: _conv_transpose,
    torch.conv_transpose2d: _conv_transpose,
    torch.conv_transpose3d: _conv_transpose,
    torch.div: _plain("Div"),
    **{
        op: _plain(name)
        for op, name in (
            (torch.exp, "Exp"),
            (torch.log, "Log"),
            (torch.sqrt, "Sqrt"),
            (torch.erf, "Erf"),
            (torch.sin, "Sin"),
            (torch.cos, "Cos"),
            (torch.atan, "Atan"),
            (torch.sign, "Sign"),
            (torch.round, "Round"),
            (torch.floor, "Floor"),
            (torch.ceil, "Ceil"),
            (torch.reciprocal, "Reciprocal"),
            (F.softsign, "Softsign"),
            (F.hardswish, "HardSwish"),
            (prim.softplus, "Softplus"),
        )
    },
    torch.pow: lambda w, x, exponent: w.add("Pow", x, float(exponent)),
    torch.rsqrt: lambda w, x: w.add("Reciprocal", w.add("Sqrt", x)),
    F.gelu: _gelu,
    F.mish: lambda w, x: w.add("Mul", x, w.add("Tanh", w.add("Softplus", x))),
    F.silu: lambda w, x: w.add("Mul", x, w.add("Sigmoid", x)),
    prim.tanh_gelu: _tanh_gelu,
    prim.elu: _elu,
    prim.step: _step,
    prim.center: _center,
    prim.constant: _repeated,
    prim.differences: _differences,
    prim.interpolate: _interpolate,
    torch.index_select: lambda w, x, dim, index: w.add("Gather", x, index, axis=dim),
    torch.matmul: _plain("MatMul"),
    torch.mean: _mean,
    torch.mul: _plain("Mul"),
    prim.weigh: _plain("Mul"),
    prim.einsum: lambda w, x, y, equation: w.add("Einsum", x, y, equation=equation),
    torch.neg: _plain("Neg"),
    torch.permute: lambda w, x, dims: w.add("Transpose", x, perm=list(dims)),
    torch.relu: _plain("Relu"),
    torch.sigmoid: _plain("Sigmoid"),
    torch.sum: _sum,
    torch.tanh: _plain("Tanh"),
    prim.average_pool: _average_pool,
    prim.batch_norm: _batch_norm,
    prim.dropout: _dropout,
    prim.expand: _expand,
    prim.identity: _plain("Identity"),
    prim.max_pool: _max_pool,
    prim.maximum: _maximum,
    prim.pad: _pad,
    prim.reshape: _reshape,
    prim.slice_: _slice,
}
