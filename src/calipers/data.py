"""Labelled examples for an audit: built-in names, ``.npz`` files and folders, checked before anything is measured.

Every loader ends in `checked`, so whatever comes out of `load` is float32, finite, inside its domain and labelled
with class numbers; whatever is not is refused with a `DataError` that says how to repair it. Nothing is unpickled.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calipers import images
from calipers.downloads import cache
from calipers.errors import DataError, unknown_name
from calipers.files import bomb

DIGITS_TRAIN = 1297  # of the 1,797 digits, in the order of the packaged file
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIZES: dict[str, tuple[tuple[int, ...], int]] = {  # shape of an example, and training examples
    "digits": ((1, 8, 8), DIGITS_TRAIN),
    "mnist": ((1, 28, 28), 60_000),
    "cifar10": ((3, 32, 32), 50_000),
}
_TEN = tuple("0123456789")
FOLDER = ("x.npy", "y.npy")
_A_FOLDER = "a folder with x.npy and y.npy, or with a folder of images per class"
# what numpy and zipfile raise on damaged files
_DAMAGE = (
    ValueError,
    OSError,
    EOFError,
    KeyError,
    TypeError,
    SyntaxError,
    RuntimeError,
    MemoryError,
    zipfile.BadZipFile,
    zlib.error,
)


@dataclass(frozen=True, eq=False)
class Data:
    """Examples ``x`` (N, *x) in the box [lower, upper], float32, with labels ``y`` (N,) int64.

    Args:
        lower, upper: the input domain, numbers or tensors that broadcast to one example.
        classes: names, for people; labels index into it.
    """

    x: Tensor
    y: Tensor
    lower: float | Tensor
    upper: float | Tensor
    name: str
    classes: tuple[str, ...]

    @cached_property
    def digest(self) -> str:
        """A short content hash of examples and labels."""
        return digest(self.x, self.y)

    def __len__(self) -> int:
        return len(self.x)


def digest(*tensors: Tensor) -> str:
    """A short hash of the shapes, dtypes and bytes of ``tensors``."""
    state = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        array = tensor.detach().cpu().contiguous()
        state.update(f"{tuple(array.shape)} {array.dtype};".encode())
        state.update(array.reshape(-1).view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


def load(spec: str, *, data_dir: str | Path | None = None, split: str = "test") -> Data:
    """The examples that ``spec`` names.

    Args:
        spec: ``digits`` (in the package), ``mnist`` or ``cifar10`` (standard files under ``data_dir``, or where
            `calipers.downloads` keeps them), an ``.npz`` file with ``x`` and ``y`` (optionally ``lower``, ``upper``,
            ``classes``), a folder with ``x.npy`` and ``y.npy``, or one with a folder of images per class.
        split: ``test`` or ``train``; a file or folder of one's own has one split, which counts as ``test``.

    Raises:
        DataError: files are missing, truncated or malformed; the message has a remedy.
        ValueError: an unknown name or split.
    """
    if split not in ("test", "train"):
        raise unknown_name("split", split, ("test", "train"))
    if spec in SOURCES:
        return SOURCES[spec](None if data_dir is None else Path(data_dir), split)
    path = Path(spec)
    if not (path.suffix or path.exists() or len(path.parts) > 1):
        raise unknown_name("data", spec, [*SOURCES, "FILE.npz", "FOLDER"])
    if split != "test":
        raise DataError(
            f"{path}: a file has one split; ask for 'test', or give the training file itself"
        )
    if path.is_dir():
        return _folder(path)
    if path.suffix != ".npz" and path.exists():
        raise DataError(
            f"{path}: not a data file that can be read; give an .npz with x and y, or a folder"
        )
    return _npz(path)


def checked(
    x: Any,
    y: Any,
    *,
    name: str,
    lower: Any = 0.0,
    upper: Any = 1.0,
    classes: tuple[str, ...] = (),
) -> Data:
    """``x`` and ``y`` (arrays or tensors) as `Data`, after every check that needs no model.

    Raises:
        DataError: empty, lengths differ, not floating point, not finite, outside the domain, or labels that are no
            class numbers.
    """
    x, y = _numbers(x, f"{name}: x"), _numbers(y, f"{name}: y")
    if x.ndim < 2:
        raise DataError(f"{name}: x has shape {tuple(x.shape)}; expected (N, *features)")
    if not len(x) or not math.prod(x.shape):
        raise DataError(f"{name}: x of shape {tuple(x.shape)} is empty; there is nothing to audit")
    if y.ndim != 1 or len(y) != len(x):
        raise DataError(
            f"{name}: y has shape {tuple(y.shape)}; expected one class number per example, ({len(x)},)"
        )
    if not x.is_floating_point():
        raise DataError(
            f"{name}: x holds integers ({x.dtype}, values {x.min().item()}..{x.max().item()}); store floats in the "
            "domain the model was trained on, for 8-bit images x.astype('float32') / 255"
        )
    x = x.to(torch.float32)
    if not torch.isfinite(x).all():
        bad = int((~torch.isfinite(x).flatten(1).all(1)).sum())
        raise DataError(f"{name}: {bad} of {len(x)} examples contain NaN or infinite values")
    low, high = _domain(lower, x, name, "lower"), _domain(upper, x, name, "upper")
    outside = int(((x < low) | (x > high)).flatten(1).any(1).sum())
    if outside:
        raise DataError(
            f"{name}: {outside} of {len(x)} examples lie outside the input domain (values "
            f"{x.min().item():g}..{x.max().item():g}); rescale them, or store the domain's bounds as "
            "'lower' and 'upper' in the file"
        )
    return Data(x, _labels(y, name, len(classes)), low, high, name, classes or _numbered(y))


def _numbers(value: Any, where: str) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach()
    array = np.asarray(value)
    if array.dtype.kind not in "fiub":
        raise DataError(f"{where} holds {array.dtype} values; expected numbers")
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:
        array = array.astype(np.float64)
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    return torch.from_numpy(np.array(array))


def _labels(y: Tensor, name: str, count: int) -> Tensor:
    if y.is_floating_point() or y.dtype is torch.bool:
        raise DataError(f"{name}: y holds {y.dtype}; labels must be integers, the class numbers")
    y = y.to(torch.int64)
    if int(y.min()) < 0 or (count and int(y.max()) >= count):
        allowed = f"0..{count - 1}" if count else "0, 1, 2, ..."
        raise DataError(
            f"{name}: labels {int(y.min())}..{int(y.max())} are outside {allowed}; number the classes from 0"
        )
    return y


def _numbered(y: Tensor) -> tuple[str, ...]:
    return tuple(map(str, range(int(y.max()) + 1)))


def _domain(value: Any, x: Tensor, name: str, which: str) -> float | Tensor:
    """A bound of the domain as a number, or as a tensor that broadcasts to one example."""
    bound = torch.as_tensor(value, dtype=torch.float64)
    if torch.isnan(bound).any():
        raise DataError(f"{name}: {which} contains NaN")
    if bound.ndim == 0:
        return float(bound)
    try:
        return bound.expand(x.shape[1:])
    except RuntimeError:
        raise DataError(
            f"{name}: {which} has shape {tuple(bound.shape)}, which does not fit examples of shape {tuple(x.shape[1:])}"
        ) from None


# -- files of one's own --------------------------------------------------------------------------------


def _npz(path: Path) -> Data:
    expected = "an .npz file with x and y, saved by np.savez(file, x=..., y=...)"
    fields = read_arrays(path, ("x", "y"), ("lower", "upper", "classes"), expected=expected)
    names = tuple(str(c) for c in fields.pop("classes", np.array([])).ravel().tolist())
    return checked(fields.pop("x"), fields.pop("y"), name=path.name, classes=names, **fields)


def read_arrays(
    path: str | Path, required: Sequence[str], optional: Sequence[str] = (), *, expected: str
) -> dict[str, Any]:
    """The arrays of these names in an ``.npz`` file; others are not read.

    Args:
        expected: what the file should be, for messages.

    Raises:
        DataError: the file is missing, damaged, or holds pickled objects (which are never loaded), or a required array
            is missing.
    """
    file = Path(path)
    _present(file, expected)
    if size := bomb(file):
        raise DataError(f"{file}: {size:,} bytes once unpacked, far more than arrays compress to")
    try:
        with file.open("rb") as handle, np.load(handle, allow_pickle=False) as archive:
            missing = sorted(set(required) - set(archive.files))
            if missing:
                raise DataError(
                    f"{file}: no {' and no '.join(missing)} in the archive (it holds "
                    f"{', '.join(archive.files[:8]) or 'nothing'}); expected {expected}"
                )
            return {k: archive[k] for k in (*required, *optional) if k in archive.files}
    except _DAMAGE as error:
        raise _unreadable(file, error) from None


def read_array(path: str | Path, *, expected: str) -> Any:
    """The array in an ``.npy`` file.

    Raises:
        DataError: as `read_arrays`.
    """
    file = Path(path)
    _present(file, expected)
    try:
        with file.open("rb") as handle:
            return np.load(handle, allow_pickle=False)
    except _DAMAGE as error:
        raise _unreadable(file, error) from None


def _folder(path: Path) -> Data:
    if not any((path / f).exists() for f in FOLDER) and images.classes_in(path):
        pixels, labels, classes = images.read(path)
        return checked(pixels.astype(np.float32) / 255, labels, name=path.name, classes=classes)
    x, y = (
        read_array(
            path / f, expected="a folder with x.npy and y.npy, or with a folder of images per class"
        )
        for f in FOLDER
    )
    return checked(x, y, name=path.name)


def load_mask(path: str | Path) -> Tensor:
    """The bools of a ``.npy`` file: which features may change.

    Raises:
        DataError: the file is missing or damaged, or does not hold bools.
    """
    file = Path(path)
    array = read_array(file, expected="an .npy file with bools")
    if not isinstance(array, np.ndarray) or array.dtype != np.bool_:
        raise DataError(
            f"{file}: a mask holds bools, one per feature; save it with np.save(file, m.astype(bool))"
        )
    return torch.from_numpy(array)


def _present(path: Path, expected: str) -> None:
    if not path.is_file():
        raise DataError(f"{path}: no such file; expected {expected}")
    with path.open("rb") as file:
        if file.read(64).lstrip().lower().startswith((b"<!doc", b"<html", b"<?xml")):
            raise DataError(
                f"{path}: this is a web page, not data (a download that was refused?); fetch the file again"
            )


def _unreadable(path: Path, error: Exception) -> DataError:
    if "allow_pickle" in str(error) or "Object arrays" in str(error):
        return DataError(
            f"{path}: holds pickled objects, which are never loaded because they can run code; "
            "save plain numeric arrays (x.astype('float32'), y.astype('int64'))"
        )
    return DataError(f"{path}: truncated or not a numpy file ({str(error)[:120]}); write it again")


# -- data sets known by name ---------------------------------------------------------------------------


def _digits(_: Path | None, split: str) -> Data:
    packaged = resources.files("calipers") / "zoo_data" / "digits.npz"
    with packaged.open("rb") as file, np.load(file, allow_pickle=False) as archive:
        x, y = archive["x"].astype(np.float32) / 16, archive["y"].astype(np.int64)
    part = slice(None, DIGITS_TRAIN) if split == "train" else slice(DIGITS_TRAIN, None)
    return checked(x[part, None], y[part], name=f"digits/{split}", classes=_TEN)


def _mnist(data_dir: Path | None, split: str) -> Data:
    prefix = {"test": "t10k", "train": "train"}[split]
    images = _idx(_find(data_dir, f"{prefix}-images-idx3-ubyte", "mnist"), 3)
    labels = _idx(_find(data_dir, f"{prefix}-labels-idx1-ubyte", "mnist"), 1)
    x = images.astype(np.float32)[:, None] / 255
    return checked(x, labels.astype(np.int64), name=f"mnist/{split}", classes=_TEN)


def _cifar10(data_dir: Path | None, split: str) -> Data:
    names = ["test_batch.bin"] if split == "test" else [f"data_batch_{i}.bin" for i in range(1, 6)]
    records = np.concatenate([_records(_find(data_dir, name, "cifar10")) for name in names])
    x = records[:, 1:].reshape(-1, 3, 32, 32).astype(np.float32) / 255
    y = records[:, 0].astype(np.int64)
    return checked(x, y, name=f"cifar10/{split}", classes=CIFAR10)


def _find(data_dir: Path | None, file: str, what: str) -> Path:
    """``file``, plain or gzipped, in ``data_dir`` or the usual folder below it."""
    if data_dir is None:
        data_dir = cache(what)
        if not data_dir.is_dir():
            raise DataError(
                f"{what}: say where its files are with --data-dir (data_dir=), or fetch them: calipers download {what}"
            )
    for folder in (data_dir, data_dir / what, data_dir / "cifar-10-batches-bin"):
        for name in (file, f"{file}.gz"):
            if (folder / name).is_file():
                _present(folder / name, what)
                return folder / name
    raise DataError(f"{what}: no {file} (or {file}.gz) in {data_dir}; check --data-dir")


def _idx(path: Path, dimensions: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """An IDX file of unsigned bytes, read no further than its header declares."""
    header = _read(path, 4 + 4 * dimensions)
    magic, *shape = np.frombuffer(header, ">i4").tolist() if len(header) % 4 == 0 else [0]
    if magic != 0x0800 + dimensions or len(shape) != dimensions or min(shape) < 0:
        raise DataError(
            f"{path}: not an IDX file with {dimensions} dimensions of bytes; fetch it again"
        )
    size = math.prod(shape)
    if size > 2**31:
        raise DataError(f"{path}: declares {size:,} bytes, more than any file of its kind holds")
    body = _read(path, len(header) + size + 1)[len(header) :]
    if len(body) != size:
        found = "more" if len(body) > size else f"{len(body):,}"
        raise DataError(
            f"{path}: the header declares {size:,} bytes, the file has {found}; fetch it again"
        )
    return np.frombuffer(body, np.uint8).reshape(shape)


def _records(path: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """CIFAR's binary layout: records of one label byte and 3,072 image bytes."""
    body = _read(path, 3073 * 10_000 + 1)
    if not body or len(body) % 3073 or len(body) > 3073 * 10_000:
        raise DataError(
            f"{path}: {len(body):,} bytes are not 10,000 records of 3,073 bytes (or fewer whole ones); fetch it again"
        )
    return np.frombuffer(body, np.uint8).reshape(-1, 3073)


def _read(path: Path, limit: int) -> bytes:
    try:
        with path.open("rb") as raw:
            packed = path.suffix == ".gz"
            return gzip.GzipFile(fileobj=raw).read(limit) if packed else raw.read(limit)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: truncated or damaged ({error}); fetch it again") from None


SOURCES: dict[str, Callable[[Path | None, str], Data]] = {
    "digits": _digits,
    "mnist": _mnist,
    "cifar10": _cifar10,
}
