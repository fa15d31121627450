"""Which examples are known to be robust: flags of one's own, or what an audit has proved."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calipers.data import read_array
from calipers.errors import DataError, StoreMismatch

MUST_AGREE = ("model", "data", "threat")


def read_certified(
    certified: Tensor | str | Path | None,
    identity: Mapping[str, Any],
    positions: Tensor,
    population: int,
) -> Tensor:
    """Flags of the examples at ``positions`` (N,) of a data set of ``population`` examples, (N,) bool.

    Args:
        certified: flags, one per example of the data set or one per position; or a file: ``.npy`` with such flags, or
            the JSON of an audit of the same model, examples and threat model. None: no example is known.
        identity: content digests of model and data, and the threat model, as an audit stores them.

    Raises:
        DataError: the file is missing, damaged or something else; the flags have the wrong number or type.
        StoreMismatch: the audit is one of another model, of other examples or another threat model; all are named.
    """
    if certified is None:
        return torch.zeros(len(positions), dtype=torch.bool)
    if not isinstance(certified, Tensor):
        file = Path(certified)
        if file.suffix != ".npy":
            return torch.isin(positions, _proved(file, identity))
        certified = torch.from_numpy(read_array(file, expected="an .npy file with bools"))
    if certified.dtype is not torch.bool or certified.shape not in (
        (population,),
        (len(positions),),
    ):
        raise DataError(
            f"certified: {tuple(certified.shape)} values of {certified.dtype}; expected bools, one for each of "
            f"{population} examples"
        )
    return certified[positions] if len(certified) == population else certified


def _proved(file: Path, identity: Mapping[str, Any]) -> Tensor:
    """The examples that an audit has proved, by their positions."""
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        theirs = stored["identity"]
        proved = torch.tensor([int(i) for i in stored["certified_examples"]], dtype=torch.int64)
        differing = [k for k in MUST_AGREE if theirs[k] != identity[k]]
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise DataError(
            f"{file}: not the JSON of an audit (calipers audit --json), nor an .npy file with bools"
        ) from None
    if differing:
        shown = "; ".join(f"{k}: {theirs[k]} there, {identity[k]} here" for k in differing)
        raise StoreMismatch(
            f"{file} is an audit of something else ({shown}); audit the same model, --data, --samples, --seed and "
            "threat model"
        )
    return proved
