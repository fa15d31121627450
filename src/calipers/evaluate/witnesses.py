"""Witnesses on disk: one ``.npz`` with everything needed to replay them, a picture, and a text per counterexample.

``witnesses.npz`` holds plain arrays, nothing is pickled: ``x``, ``y``, ``clean``, ``index`` (positions in the data
set), ``prediction``, ``margin``, ``outputs``; and texts: ``threat`` (JSON, exact numbers as strings; what is a tensor
in it is an array ``threat_...``), ``model`` and ``data`` (content digests), ``model_name``, ``data_name``, ``format``.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calipers.data import digest, read_arrays
from calipers.errors import DataError
from calipers.evaluate.pictures import as_change, as_image, labelled, png
from calipers.evaluate.result import NORM
from calipers.graph.graph import Network
from calipers.sets import ThreatModel
from calipers.vnnlib import format_assignment
from calipers.vnnlib.reader import Variable

FORMAT = "calipers witnesses 1"
FILE = "witnesses.npz"
SHOWN = 10  # columns of the picture
_ARRAYS = ("x", "y", "clean", "index", "prediction", "margin", "outputs")
_TEXTS = ("threat", "model", "data", "model_name", "data_name", "format")
_PARTS = ("eps", "lower", "upper", "mask")


@dataclass(frozen=True, eq=False)
class Witnesses:
    """Points ``x`` (W, *x) that break a network at examples ``clean`` (W, *x) with labels ``y`` (W,).

    Args:
        index: (W,) where the examples stand in the data set.
        margin: (W,) float64, the largest margin of all evaluations; at most 0.
        outputs: (W, K) of the network at ``x``, each alone.
        model, data: content digests; the data's is that of the whole data set.
    """

    x: Tensor
    y: Tensor
    clean: Tensor
    index: Tensor
    margin: Tensor
    outputs: Tensor
    threat: ThreatModel
    model: str
    data: str
    model_name: str = ""
    data_name: str = ""

    def __len__(self) -> int:
        return len(self.x)

    @property
    def prediction(self) -> Tensor:
        """The class that the network predicts at each point, (W,)."""
        return self.outputs.argmax(1)

    def require_fit(self, network: Network) -> None:
        """Refuse a network of other inputs or another number of classes.

        Raises:
            DataError: naming both.
        """
        shape, classes = tuple(self.x.shape[1:]), self.outputs.shape[1]
        if (shape, classes) != (network.input_shape, network.num_classes):
            raise DataError(
                f"witnesses: inputs of shape {shape} and {classes} classes; the network takes {network.input_shape} "
                f"and has {network.num_classes}"
            )


def save_witnesses(folder: str | Path, witnesses: Witnesses) -> None:
    """``witnesses.npz``, ``witnesses.png`` (where inputs are images) and ``counterexamples/example_I.txt``.

    The texts are in VNN-LIB 1.0's format; I is the example's position in the data set. The folder appears whole or
    not at all.

    Raises:
        ValueError: the folder exists and is not empty, or its parent does not exist.
    """
    target = Path(folder).absolute()
    require_free(target)
    aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        with (aside / FILE).open("wb") as file:
            np.savez(file, **_arrays(witnesses))
        picture = contact_sheet(witnesses)
        if picture is not None:
            (aside / "witnesses.png").write_bytes(png(picture))
        texts = aside / "counterexamples"
        texts.mkdir()
        digits = len(str(int(witnesses.index.max()))) if len(witnesses) else 1
        for row, index in enumerate(witnesses.index.tolist()):
            text = counterexample(witnesses, row)
            (texts / f"example_{index:0{digits}}.txt").write_text(text, encoding="ascii")
        aside.chmod(0o755)
        os.replace(aside, target)  # noqa: PTH105 - over an empty folder
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def require_free(folder: Path) -> None:
    """Refuse a folder that cannot be written whole.

    Raises:
        ValueError: it exists and is not empty, or its parent does not exist or cannot be written to.
    """
    if not folder.parent.is_dir():
        raise ValueError(f"save: the folder {folder.parent} does not exist")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"save: {folder} exists and is not an empty folder; name a new one")
    if not os.access(folder.parent, os.W_OK):
        raise ValueError(f"save: {folder.parent} cannot be written to")


def load_witnesses(path: str | Path) -> Witnesses:
    """What `save_witnesses` has written: the ``.npz`` file, or the folder that holds it.

    The points are not checked against the network or the set: `calipers.evaluate.replay` does that.

    Raises:
        DataError: missing, truncated, pickled, not saved by `save_witnesses`, or arrays that do not fit each other.
    """
    file = Path(path)
    file = file / FILE if file.is_dir() else file
    expected = "a witnesses.npz saved by calipers attack --save"
    optional = tuple(f"threat_{name}" for name in _PARTS)
    found = read_arrays(file, (*_ARRAYS, *_TEXTS), optional, expected=expected)
    wrong = [k for k in _TEXTS if found[k].dtype.kind != "U" or found[k].ndim]
    wrong += [k for k in found if k not in _TEXTS and not _numeric(found[k].dtype)]
    if wrong:
        raise DataError(f"{file}: {', '.join(wrong)}: wrong type of array; expected {expected}")
    if str(found["format"]) != FORMAT:
        raise DataError(f"{file}: format {str(found['format'])[:40]!r}, not {FORMAT!r}")
    _require_shapes(file, found)
    arrays = {k: torch.from_numpy(np.ascontiguousarray(found[k])) for k in _ARRAYS}
    prediction = arrays.pop("prediction")
    texts = {k: str(found[k]) for k in _TEXTS}
    tensors = {k: torch.from_numpy(found[f"threat_{k}"]) for k in _PARTS if f"threat_{k}" in found}
    witnesses = Witnesses(
        **arrays,
        threat=_threat(file, texts["threat"], tensors),
        model=texts["model"],
        data=texts["data"],
        model_name=texts["model_name"],
        data_name=texts["data_name"],
    )
    if not torch.equal(prediction, witnesses.prediction):
        raise DataError(f"{file}: prediction is not the class of the largest output; damaged?")
    return witnesses


def _numeric(dtype: np.dtype[Any]) -> bool:
    """Whether torch has this type."""
    return dtype.kind in "fib" and dtype.itemsize <= 8 and dtype.isnative


def _require_shapes(file: Path, found: dict[str, Any]) -> None:
    count, x = len(found["y"]) if found["y"].ndim else -1, found["x"]
    fits = (
        x.ndim >= 2
        and x.dtype == found["clean"].dtype == found["outputs"].dtype
        and x.dtype.kind == "f"
        and found["margin"].dtype == np.float64
        and all(found[k].dtype == np.int64 for k in ("y", "index", "prediction"))
        and found["clean"].shape == x.shape
        and len(x) == count
        and all(found[k].shape == (count,) for k in ("index", "prediction", "margin"))
        and found["outputs"].ndim == 2
        and len(found["outputs"]) == count
        and found["outputs"].shape[1] >= 2
    )
    if not fits:
        shapes = ", ".join(f"{k} {found[k].dtype} {found[k].shape}" for k in _ARRAYS)
        raise DataError(f"{file}: arrays that do not fit each other ({shapes})")
    if not all(np.isfinite(found[k]).all() for k in ("x", "clean", "outputs")):
        raise DataError(f"{file}: NaN or infinite values")
    classes = found["outputs"].shape[1]
    if count and not (
        found["index"].min() >= 0 and 0 <= found["y"].min() <= found["y"].max() < classes
    ):
        raise DataError(f"{file}: labels outside 0..{classes - 1}, or negative positions")


# -- the threat model ------------------------------------------------------------------------------------


def _arrays(w: Witnesses) -> dict[str, Any]:
    arrays = {k: getattr(w, k).detach().cpu().numpy() for k in _ARRAYS}
    tensors = {
        f"threat_{k}": v.detach().cpu().numpy()
        for k in _PARTS
        if isinstance(v := getattr(w.threat, k), Tensor)
    }
    texts = {
        "threat": threat_text(w.threat),
        "format": FORMAT,
        **{k: getattr(w, k) for k in ("model", "data", "model_name", "data_name")},
    }
    return {**arrays, **tensors, **{k: np.array(v, dtype=np.str_) for k, v in texts.items()}}


def threat_text(threat: ThreatModel) -> str:
    """The threat model as JSON that gives back the same one: exact numbers stay texts, floats have all their digits.

    Tensors are left out; so is what is None.
    """
    entries: dict[str, Any] = {"norm": NORM[float(threat.p)]}
    for name in ("eps", "lower", "upper", "grid"):
        value = getattr(threat, name)
        if isinstance(value, Fraction):
            value = str(value)
        if value is not None and not isinstance(value, Tensor):
            entries[name] = value
    return json.dumps(entries)


def _threat(file: Path, text: str, tensors: dict[str, Tensor]) -> ThreatModel:
    try:
        entries = json.loads(text)
        norms = {name: p for p, name in NORM.items()}
        return ThreatModel(norms[entries.pop("norm")], **{**entries, **tensors})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{file}: cannot read the threat model {text[:80]!r} ({error})") from None


# -- for people and other tools --------------------------------------------------------------------------


def counterexample(witnesses: Witnesses, row: int) -> str:
    """One witness as the text of a counterexample, VNN-LIB 1.0: inputs X_i, outputs Y_j."""
    x, y = witnesses.x[row].flatten(), witnesses.outputs[row]
    variables = tuple(
        Variable(name, None, (len(values),), flat=True, at=0)
        for name, values in (("X", x), ("Y", y))
    )
    return f"sat\n{format_assignment(variables, {'X': x, 'Y': y})}"


def contact_sheet(witnesses: Witnesses) -> np.ndarray[Any, np.dtype[np.uint8]] | None:
    """A picture, (H, W, 3): a column per example with the clean image, the change (amplified to full scale) and the
    adversarial image, labels above and below; None where inputs are no images or no change breaks anything.

    Shows at most one example a class until all classes had one; examples that need no change are left out.
    """
    changed = (witnesses.x != witnesses.clean).flatten(1).any(1)
    shape = witnesses.x.shape[1:]
    if len(shape) != 3 or shape[0] not in (1, 3) or not bool(changed.any()):
        return None
    seen: dict[int, int] = {}
    order = []
    for row in torch.nonzero(changed).flatten().tolist():
        label = int(witnesses.y[row])
        order.append((seen.setdefault(label, 0), row))
        seen[label] += 1
    rows = [row for _, row in sorted(order)[:SHOWN]]
    clean, x = (t[rows].double().numpy() for t in (witnesses.clean, witnesses.x))
    low, high = _range(witnesses)
    limit, scale = np.abs(x - clean).max(), (high - low) or 1.0
    columns = [
        labelled(
            [as_image((a - low) / scale), as_change(b - a, limit), as_image((b - low) / scale)],
            str(int(witnesses.y[row])),
            str(int(witnesses.prediction[row])),
        )
        for row, a, b in zip(rows, clean, x, strict=True)
    ]
    return np.concatenate(columns, 1)


def _range(witnesses: Witnesses) -> tuple[float, float]:
    """What black and white stand for: the domain where it is finite, else the range of the examples."""
    ends = [_floats(v) for v in (witnesses.threat.lower, witnesses.threat.upper)]
    if all(bool(torch.isfinite(e).all()) for e in ends):
        return ends[0].min().item(), ends[1].max().item()
    both = torch.stack([witnesses.clean, witnesses.x])
    return both.min().item(), both.max().item()


def _floats(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value.double()
    number = value if isinstance(value, float) else float(Fraction(value))
    return torch.tensor(number, dtype=torch.float64)


def same_examples(witnesses: Witnesses, x: Tensor, y: Tensor, name: str) -> None:
    """Refuse a data set that is not the one the witnesses were found on.

    Raises:
        DataError: another digest (both are named).
    """
    found = digest(x, y)
    if found != witnesses.data:
        raise DataError(
            f"{name}: other data (digest {found}) than the witnesses were found on ({witnesses.data_name}, digest "
            f"{witnesses.data})"
        )
