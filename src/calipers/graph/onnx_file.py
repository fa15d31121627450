"""Untrusted ONNX files: bytes, the parsed model, its tensors, and a second opinion from onnxruntime.

Nothing here allocates more than what the file holds, or more than the byte budget: sizes are compared before memory
is asked for. Every refusal names the file and what to do.
"""

from __future__ import annotations

import gzip
import math
import os
import stat
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calipers.errors import CaptureError, ModelError, ModelTooLarge

MAX_BYTES = 2 * 2**30
MAX_RATIO = 200  # the densest honest file known to us expands 181-fold
_CHUNK = 1 << 20
_GZIP = b"\x1f\x8b"
# ONNX element type -> (torch, numpy); what the graph can hold
_DTYPES: dict[int, tuple[torch.dtype, str]] = {
    1: (torch.float32, "<f4"),
    2: (torch.uint8, "u1"),
    3: (torch.int8, "i1"),
    5: (torch.int16, "<i2"),
    6: (torch.int32, "<i4"),
    7: (torch.int64, "<i8"),
    9: (torch.bool, "?"),
    10: (torch.float16, "<f2"),
    11: (torch.float64, "<f8"),
    16: (torch.bfloat16, "<i2"),
}


def torch_dtype(elem_type: int) -> torch.dtype:
    """The torch dtype of an ONNX element type.

    Raises:
        CaptureError: no such dtype is supported (strings, complex numbers, 4- and 8-bit floats, ...).
    """
    if elem_type not in _DTYPES:
        raise CaptureError(
            f"element type {elem_type} is not supported; export the model with float32 tensors"
        )
    return _DTYPES[elem_type][0]


def read_bytes(path: Path, max_bytes: int = MAX_BYTES) -> bytes:
    """The file's bytes, decompressed if they are gzip's (whatever the name).

    Raises:
        FileNotFoundError: no such file.
        ModelTooLarge: more than ``max_bytes``, or a compression ratio that no model reaches.
        CaptureError: not a regular file, empty, or a damaged gzip stream.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise CaptureError(f"{path}: not a regular file; give the path of an .onnx file")
    if found.st_size > max_bytes:
        raise ModelTooLarge(
            f"{path}: {found.st_size} bytes exceed max_bytes={max_bytes}; raise max_bytes if you trust it"
        )
    if not found.st_size:
        raise CaptureError(f"{path}: the file is empty; export or download it again")
    with path.open("rb") as file:
        if file.read(2) != _GZIP:
            file.seek(0)
            return file.read(max_bytes)
        file.seek(0)
        return _gunzip(path, file, min(max_bytes, MAX_RATIO * found.st_size))


def _gunzip(path: Path, file: Any, limit: int) -> bytes:
    parts: list[bytes] = []
    total = 0
    try:
        with gzip.GzipFile(fileobj=file) as stream:
            while part := stream.read(_CHUNK):
                total += len(part)
                if total > limit:
                    raise ModelTooLarge(
                        f"{path}: decompresses to more than {limit} bytes (the cap is max_bytes, and {MAX_RATIO} "
                        "times the compressed size); decompress it yourself if you trust it"
                    )
                parts.append(part)
    except (OSError, EOFError, zlib.error) as error:
        raise CaptureError(f"{path}: damaged gzip stream ({error}); download it again") from None
    return b"".join(parts)


def read_model(path: Path, max_bytes: int = MAX_BYTES) -> Any:
    """The parsed ``ModelProto``, which has nodes, an output and a version of the default operator set.

    Raises:
        CaptureError: see `read_bytes`; also what is not a model: a truncated file, a web page, ...
    """
    return parse(read_bytes(path, max_bytes), path)


def parse(data: bytes, path: Path) -> Any:
    """`read_model` on bytes that were read already; ``path`` is for messages."""
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    remedy = "export or download it again"
    if data.lstrip()[:1] == b"<":
        raise CaptureError(f"{path}: this is a web page (HTML or XML), not an ONNX model; {remedy}")
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError:
        raise CaptureError(f"{path}: not an ONNX model, or a truncated one; {remedy}") from None
    if not model.ir_version or not model.graph.node or not model.graph.output:
        raise CaptureError(f"{path}: holds no ONNX graph (no nodes or no output); {remedy}")
    return model


# -- tensors ---------------------------------------------------------------------------------------------


def fits(shape: tuple[int, ...], itemsize: int, budget: int, what: str) -> int:
    """The bytes of a tensor of ``shape``, at most ``budget``.

    Raises:
        CaptureError: a negative dimension.
        ModelTooLarge: more bytes than the budget; raised before anything is allocated.
    """
    if any(d < 0 for d in shape):
        raise CaptureError(f"{what}: negative dimension in {shape}; the file is damaged")
    # an empty tensor may still declare absurd sizes, which strides would overflow on
    size = itemsize * math.prod(max(d, 1) for d in shape)
    if size > budget:
        raise ModelTooLarge(
            f"{what}: shape {shape} needs {size} bytes, more than the {budget} allowed; "
            "raise max_bytes if you trust the file"
        )
    return size


def read_tensor(proto: Any, folder: Path, budget: int) -> Tensor:
    """A ``TensorProto`` as a tensor that owns its memory.

    Args:
        folder: where the model lies; external data must lie there too.

    Raises:
        CaptureError: the data do not match the declared shape, or lie outside ``folder``, or an unsupported type.
        ModelTooLarge: more than ``budget`` bytes.
        ModelError: NaN or infinite values (a lone infinite number is left to the operator that reads it).
    """
    what = f"tensor {proto.name!r}"
    shape = tuple(proto.dims)
    try:
        dtype = torch_dtype(proto.data_type)
    except CaptureError as error:
        raise CaptureError(f"{what}: {error}") from None
    size = fits(shape, dtype.itemsize, budget, what)
    if 0 in shape:
        size = 0
    raw = _external(proto, folder, size) if proto.data_location == 1 else proto.raw_data
    if proto.data_location == 1 or proto.HasField("raw_data"):
        array = np.frombuffer(raw, dtype=_DTYPES[proto.data_type][1]) if len(raw) == size else None
    else:
        array = _typed(proto, size // dtype.itemsize)
    if array is None:
        raise CaptureError(
            f"{what}: its data do not match the declared shape {shape}; the file is damaged, export it again"
        )
    value = torch.from_numpy(np.array(array)).view(dtype).reshape(shape)
    check_finite(value, proto.name, lone=True)
    return value


def _typed(proto: Any, count: int) -> Any:
    """Data from the typed field of the element type, or None if there are not ``count`` values."""
    kind = proto.data_type
    field, numpy_type = {
        1: (proto.float_data, "<f4"),
        11: (proto.double_data, "<f8"),
        7: (proto.int64_data, "<i8"),
    }.get(kind, (proto.int32_data, "<i4"))
    if len(field) != count:
        return None
    array = np.array(field, dtype=numpy_type)
    if kind in (10, 16):  # half precision travels as its bit pattern
        return array.astype("<u2").view(_DTYPES[kind][1])
    return array.astype(_DTYPES[kind][1])


def _external(proto: Any, folder: Path, size: int) -> bytes:
    """External data, from a plain file beside the model."""
    entries = {entry.key: entry.value for entry in proto.external_data}
    location = entries.get("location", "")
    what = f"tensor {proto.name!r}"
    refuse = CaptureError(
        f"{what}: external data at {location!r} refused; the file must be a plain file beside the model, "
        "named without any path"
    )
    if not location or location in {".", ".."} or any(c in location for c in "/\\:\0"):
        raise refuse
    try:
        offset, length = int(entries.get("offset", 0)), int(entries.get("length", size))
    except ValueError:
        raise CaptureError(f"{what}: external offset or length is no number") from None
    if offset < 0 or length != size:
        raise CaptureError(
            f"{what}: {length} external bytes do not match the declared shape {tuple(proto.dims)}"
        )
    # O_NOFOLLOW: a symlink is refused by the same call that opens it, so nothing can be swapped in between
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    target = folder / location
    if target.is_symlink():
        raise refuse
    try:
        handle = os.open(target, flags | getattr(os, "O_BINARY", 0))
    except OSError as error:
        raise CaptureError(
            f"{what}: external data {location!r}: {error.strerror}; it must be a plain file beside the model"
        ) from None
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode):
        os.close(handle)
        raise refuse
    with os.fdopen(handle, "rb") as file:
        if offset + length > found.st_size:
            raise CaptureError(f"{what}: external file {location!r} is shorter than declared")
        file.seek(offset)
        return file.read(length)


def check_finite(value: Tensor, name: str, *, lone: bool = False) -> None:
    """Raise `ModelError` if a float tensor holds NaN or infinity.

    Args:
        lone: let a single infinite number pass (a clip bound).
    """
    # one NaN or infinity makes any sum so; a sum that merely overflows is looked at closely
    if not value.is_floating_point() or bool(torch.isfinite(value.sum())):
        return
    if bool(torch.isfinite(value).all()):
        return
    if lone and value.numel() == 1 and not bool(value.isnan().any()):
        return
    bad = int((~torch.isfinite(value)).sum())
    raise ModelError(
        f"tensor {name!r}: {bad} of {value.numel()} values are NaN or infinite; retrain or export the model again"
    )


def write_tensor(path: Path, name: str, tensor: Tensor) -> None:
    """``tensor`` as a serialized ``TensorProto``, row-major, in its own dtype."""
    import onnx

    kind = next(k for k, (dtype, _) in _DTYPES.items() if dtype == tensor.dtype)
    proto = onnx.TensorProto(name=name, data_type=kind, dims=tuple(tensor.shape))
    _embed(proto, tensor.detach().cpu())
    path.write_bytes(proto.SerializeToString())


# -- inputs ----------------------------------------------------------------------------------------------


def active_inputs(model: Any) -> list[Any]:
    """The graph's inputs that are no initializers (old files list both)."""
    held = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in held]


def declared(value: Any) -> list[int | None] | None:
    """The declared shape, None for a free dimension; None if there is no shape."""
    kind = value.type.tensor_type
    if not kind.HasField("shape"):
        return None
    return [d.dim_value if d.dim_value > 0 else None for d in kind.shape.dim]


def has_batch(shape: list[int | None]) -> bool:
    """Whether axis 0 is the batch: it is free, or a fixed 1 in front of features."""
    return bool(shape) and (shape[0] is None or (shape[0] == 1 and len(shape) > 1))


# -- replay ----------------------------------------------------------------------------------------------


def session(path: str | Path, *, max_bytes: int = MAX_BYTES) -> Callable[[Tensor], Tensor]:
    """The file run by onnxruntime (CPU, one thread): an evaluation that shares no code with ours.

    The returned function maps (B, *x) to (B, K). Each example is run alone, unless the file declares a free batch
    for input and output.

    Raises:
        CaptureError: onnxruntime refuses the file; see also `read_model`.
    """
    import onnxruntime as ort

    path = Path(path)
    data = read_bytes(path, max_bytes)
    model = parse(data, path)
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4  # errors are raised; the log would only repeat them
    outside = [tensor for tensor in model.graph.initializer if tensor.data_location == 1]
    for tensor in outside:  # onnxruntime would follow the path: it gets the checked bytes instead
        _embed(tensor, read_tensor(tensor, path.parent, max_bytes))
    if outside:
        data = model.SerializeToString()
    try:
        run = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # noqa: BLE001 - onnxruntime's errors have no common base but Exception
        first = str(error).strip().splitlines()[0][:300]
        raise CaptureError(f"{path}: onnxruntime refuses the model: {first}") from None
    source = active_inputs(model)[0]
    shape = declared(source) or []
    free = bool(shape) and shape[0] is None
    ends = declared(model.graph.output[0])
    whole = free and bool(ends) and ends is not None and ends[0] is None
    lead = has_batch(shape)

    def one(x: Tensor) -> Tensor:
        feed = {source.name: x.detach().cpu().contiguous().numpy()}
        return torch.from_numpy(np.array(run.run(None, feed)[0]))

    def replay(x: Tensor) -> Tensor:
        if whole:
            y = one(x)
            if len(y) == len(x):
                return y.reshape(len(x), -1)
        return torch.stack([one(row[None] if lead else row).reshape(-1) for row in x])

    return replay


def _embed(tensor: Any, data: Tensor) -> None:
    raw = data.contiguous().view(torch.uint8) if data.ndim else data.reshape(1).view(torch.uint8)
    tensor.raw_data = raw.numpy().tobytes()
    tensor.data_location = 0
    del tensor.external_data[:]
