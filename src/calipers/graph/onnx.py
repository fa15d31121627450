"""ONNX files straight to `Graph`: the same vocabulary that `capture` emits, without ``torch.export``.

Each example is computed as the file computes it alone (batch 1); whatever depends on constants only is computed
now. The result is a `Network` whose module holds the file's tensors as buffers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from calipers.errors import CaptureError, ModelError, UnsupportedOp
from calipers.graph.graph import Network
from calipers.graph.onnx_file import (
    MAX_BYTES,
    active_inputs,
    declared,
    has_batch,
    read_model,
    session,
    torch_dtype,
)
from calipers.graph.onnx_folds import FOLDS
from calipers.graph.onnx_graph import Builder, Call, Const, Value
from calipers.graph.onnx_rules import ANYWHERE, RULES
from calipers.graph.onnx_write import save_onnx

__all__ = ["load_onnx", "save_onnx", "session"]
_SHAPES = frozenset({"Shape", "Size"})  # known whatever the input's value is
_MALFORMED = (
    ArithmeticError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError
)  # fmt: skip
REMEDY = "Rewrite the model without them, or simplify the file (constant folding) before loading it"


def load_onnx(path: str | Path, *, max_bytes: int = MAX_BYTES) -> Network:
    """The network in an ONNX file (``.onnx``, or gzip's ``.onnx.gz``), operator sets 7 to 21 and later.

    The input's first axis is the batch if it is free or a 1 in front of features; otherwise one example is the
    whole input. The output is flattened to (B, K).

    Args:
        max_bytes: cap on the file, on all constants together, and on one intermediate value.

    Raises:
        FileNotFoundError: no such file.
        CaptureError: not a model, damaged, several inputs or outputs, or an operator's form that cannot be read.
        UnsupportedOp: operators without a rule; all of them are named.
        ModelTooLarge: sizes beyond ``max_bytes``; raised before memory is asked for.
        ModelError: a parameter is NaN or infinite.
    """
    path = Path(path)
    model = read_model(path, max_bytes)
    try:
        return _network(model, path, max_bytes)
    except UnsupportedOp as error:
        raise UnsupportedOp(error.problems, f"{error.remedy} ({path})") from None
    except (CaptureError, ModelError) as error:
        raise type(error)(f"{path}: {error}") from None


def _network(model: Any, path: Path, max_bytes: int) -> Network:
    version = _version(model)
    source = _one(active_inputs(model), "inputs")
    target = _one(list(model.graph.output), "outputs")
    shape = _input_shape(source)
    dtype = torch_dtype(source.type.tensor_type.elem_type)
    if not dtype.is_floating_point:
        raise CaptureError(f"input {source.name!r} is {dtype}; robustness is about real inputs")
    _check_operators(model, source.name, version)
    readers = Counter(name for node in model.graph.node for name in node.input)
    readers[target.name] += 1
    b = Builder(max_bytes, dtype, path.parent, readers)
    lead = has_batch(shape)
    start = b.enter(source.name, tuple(1 if n is None else n for n in shape), lead)
    b.values[source.name] = start
    for tensor in model.graph.initializer:
        b.values[tensor.name] = Const(b.read(tensor), tensor.name)
    for node in model.graph.node:
        _read(b, _call(node, version), [*node.input])
    output = b.values.get(target.name)
    if not isinstance(output, Value):
        raise CaptureError(f"output {target.name!r} does not depend on the input; check the export")
    graph, module = b.finish(start.name, output)
    return Network(graph, module, start.own, str(path))


def _version(model: Any) -> int:
    versions = [o.version for o in model.opset_import if o.domain in {"", "ai.onnx"}]
    if not versions:
        raise CaptureError("declares no version of the default operator set; export it again")
    if max(versions) < 7:
        raise CaptureError(
            f"operator set {max(versions)} is too old; convert the file to 7 or later"
        )
    if len(model.graph.sparse_initializer):
        raise CaptureError("holds sparse initializers; export it with dense tensors")
    return int(max(versions))


def _one(values: list[Any], what: str) -> Any:
    if len(values) != 1:
        names = ", ".join(repr(v.name) for v in values) or "none"
        raise CaptureError(
            f"has {len(values)} {what} ({names}); extract the part with one (onnx.utils.extract_model)"
        )
    return values[0]


def _input_shape(source: Any) -> list[int | None]:
    shape = declared(source)
    if shape is None or any(n is None for n in shape[1:]):
        raise CaptureError(
            f"input {source.name!r} has no fixed shape ({shape}); fix all dimensions but the batch"
        )
    return shape


# -- which operators -------------------------------------------------------------------------------------


def _check_operators(model: Any, source: str, version: int) -> None:
    """Every operator of the file without a rule, in one error."""
    active = {source}
    problems = []
    own = {f.name for f in model.functions if f.domain in {"", "ai.onnx"}}
    for node in model.graph.node:
        moving = any(name in active for name in node.input)
        if moving and node.op_type not in _SHAPES:
            active.update(node.output)
        known = RULES.keys() if moving else RULES.keys() | FOLDS.keys()
        domain = node.domain in {"", "ai.onnx"} and node.op_type not in own
        if not domain or node.op_type not in known | _SHAPES:
            prefix = "" if domain else f"{node.domain or 'function'}."
            problems.append(f"{prefix}{node.op_type} (node {_label(node)!r}, opset v{version})")
    if problems:
        raise UnsupportedOp(problems, REMEDY)


def _label(node: Any) -> str:
    return str(node.name or next(iter(node.output), "unnamed"))


def _call(node: Any, version: int) -> Call:
    from onnx.helper import get_attribute_value

    attrs: Mapping[str, Any] = {a.name: get_attribute_value(a) for a in node.attribute}
    return Call(node.op_type, _label(node), version, attrs, tuple(node.output))


# -- one node --------------------------------------------------------------------------------------------


def _read(b: Builder, call: Call, names: list[str]) -> None:
    """Evaluate or translate one ONNX node."""
    unknown = [n for n in names if n and n not in b.values]
    if unknown:
        raise CaptureError(f"{call} reads {unknown[0]!r}, which no earlier node makes")
    if any(out in b.values for out in call.outputs if out):
        raise CaptureError(f"{call} makes a value that exists already; the file is damaged")
    b.call = call
    try:
        made = _evaluate(b, call, [b.values[n] if n else None for n in names])
    except (CaptureError, ModelError) as error:
        raise type(error)(f"{call} {error}") from None
    except _MALFORMED as error:
        raise CaptureError(f"{call} is malformed ({error}); export the model again") from error
    b.values.update(zip(call.outputs, made, strict=False))


def _evaluate(
    b: Builder, call: Call, inputs: list[Value | Const | None]
) -> Iterator[Value | Const]:
    if call.op in _SHAPES:
        return iter([_shape(call, inputs[0])])
    if any(isinstance(value, Value) for value in inputs):
        if not isinstance(inputs[0], Value) and call.op not in ANYWHERE:
            raise CaptureError("may depend on the network's input through its first input only")
        made = RULES[call.op](b, call, *inputs)
    elif call.op in FOLDS:
        tensors = [value.tensor if isinstance(value, Const) else None for value in inputs]
        made = Const(FOLDS[call.op](b, call, *tensors), call.outputs[0])
    else:
        made = b.fold(RULES[call.op], call, inputs)
    return iter([made] if isinstance(made, (Value, Const)) else made)


def _shape(call: Call, value: Value | Const | None) -> Const:
    if value is None:
        raise CaptureError("has no input")
    sizes = torch.tensor(value.shape, dtype=torch.int64)
    if call.op == "Size":
        return Const(sizes.prod(), call.outputs[0])
    return Const(sizes[call.attr("start", 0) : call.attr("end")], call.outputs[0])
