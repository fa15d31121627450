"""Counterexamples as text, in both versions' formats.

1.0: ``((X_0 0.5) ... (Y_0 1.25))``. 2.x: per tensor a line ``X float32 [1,2]``, then one number per line, row-major.
Numbers are written so that reading them back gives the same float64, and with it the same float32. Where a query leaves
an input no such number (X_0 = 0.1), the query's own decimal stands there: the file's point is the one that it writes,
and a network is run on it as rounded to its precision.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from calipers.errors import CaptureError, SpecError
from calipers.graph.onnx_file import read_bytes
from calipers.vnnlib.reader import MAX_BYTES, MAX_DIGITS, MAX_EXPONENT, Variable

_NUMBER = r"[+-]?(?:[0-9]++(?:\.[0-9]*+)?|\.[0-9]++)(?:[eE][+-]?[0-9]++)?"
_PAIR = re.compile(rf"\(\s*+([XY])_([0-9]{{1,9}})\s*+=?\s*+({_NUMBER})\s*+\)", re.ASCII)
_HEADER = re.compile(r"(\w++)\s++(\w++)\s*+\[([0-9,\s]*+)\]", re.ASCII)


class Written(NamedTuple):
    """A tensor as a file writes it: its numbers, row-major, and its shape."""

    numbers: list[Decimal]
    shape: tuple[int, ...]

    def floats(self) -> Tensor:
        """The nearest float64 numbers."""
        return torch.tensor([float(v) for v in self.numbers], dtype=torch.float64).reshape(
            self.shape
        )


def format_assignment(
    variables: tuple[Variable, ...], values: Mapping[str, Tensor | Sequence[Decimal]]
) -> str:
    """The text of an assignment (without the line ``sat``); ``values`` by name, as `Case.lift` gives them, or decimals.

    Raises:
        ValueError: a tensor is missing or has another size than declared, or a value is not finite.
    """
    lines = []
    for variable in variables:
        if variable.name not in values:
            raise ValueError(f"values: {variable.name} is missing")
        texts = _texts(values[variable.name])
        finite = sum(math.isfinite(float(v)) for v in texts)
        if not len(texts) == finite == variable.size:
            raise ValueError(
                f"values: {variable.name} must be {variable.size} finite numbers, not {len(texts)} with "
                f"{len(texts) - finite} infinite or NaN"
            )
        if variable.flat:
            lines += [f"({variable.element(i)} {v})" for i, v in enumerate(texts)]
        else:
            kind = "real" if variable.dtype is None else str(variable.dtype).removeprefix("torch.")
            lines.append(f"{variable.name} {kind} [{','.join(map(str, variable.shape))}]")
            lines += texts
    if variables[0].flat:
        return "(" + "\n ".join(lines) + ")\n"
    return "\n".join(lines) + "\n"


def _texts(values: Tensor | Sequence[Decimal]) -> list[str]:
    if isinstance(values, Tensor):
        return [repr(v) for v in values.detach().double().flatten().tolist()]
    return [str(v) for v in values]


def read_assignment(path: str | Path) -> dict[str, Tensor]:
    """`parse_assignment` on a file, plain or gzip's."""
    return {name: entry.floats() for name, entry in read_decimals(path).items()}


def read_decimals(path: str | Path) -> dict[str, Written]:
    """The tensors in a file, plain or gzip's, as they stand there; errors as of `parse_assignment`."""
    path = Path(path)
    try:
        return _parse(read_bytes(path, MAX_BYTES).decode(), str(path))
    except (OSError, UnicodeDecodeError, CaptureError) as error:
        raise SpecError(f"{path}: cannot be read ({error})") from None


def parse_assignment(text: str, path: str = "assignment") -> dict[str, Tensor]:
    """The tensors of an assignment by name, float64, of whichever tool: ``X`` and ``Y``, flat, for 1.0.

    A leading line ``sat``, comments, any blanks, missing outer parentheses and pairs on one line are all
    accepted.

    Raises:
        SpecError: no assignment; an entry is missing, doubled, or no finite number.
    """
    return {name: entry.floats() for name, entry in _parse(text, path).items()}


def _parse(text: str, path: str) -> dict[str, Written]:
    body = re.sub(r";[^\n]*+", "", text)
    body = re.sub(r"\A\s*+(?:sat|violated)\b", "", body)
    return _pairs(body, path) if body.lstrip().startswith("(") else _tensors(body, path)


def _pairs(body: str, path: str) -> dict[str, Written]:
    rest = re.sub(r"[\s()]++", " ", _PAIR.sub(" ", body)).strip()
    if rest:
        raise SpecError(f"{path}: cannot read {rest[:40]!r}; expected ((X_0 0.5) ... (Y_0 1.25))")
    found: dict[str, dict[int, Decimal]] = {}
    for name, index, value in _PAIR.findall(body):
        entries = found.setdefault(name, {})
        if int(index) in entries:
            raise SpecError(f"{path}: {name}_{index} stands there twice")
        entries[int(index)] = _number(value, path)
    if "X" not in found:
        raise SpecError(f"{path}: holds no X_0; expected ((X_0 0.5) ... (Y_0 1.25))")
    for name, entries in found.items():
        gap = next((i for i in range(len(entries)) if i not in entries), None)
        if gap is not None:
            raise SpecError(f"{path}: {name}_{gap} is missing, but {name}_{max(entries)} is there")
    return {name: Written([e[i] for i in range(len(e))], (len(e),)) for name, e in found.items()}


def _tensors(body: str, path: str) -> dict[str, Written]:
    found: dict[str, Written] = {}
    lines = [line.strip() for line in body.splitlines() if line.strip()]
    at = 0
    while at < len(lines):
        header = _HEADER.fullmatch(lines[at])
        if not header or header[1] in found:
            raise SpecError(
                f"{path}: cannot read {lines[at][:40]!r}; expected a tensor's first line, such as X float32 [1,2], "
                "each once"
            )
        shape = tuple(int(n) for n in header[3].split(",") if n.strip())
        count = math.prod(shape)
        numbers = lines[at + 1 : at + 1 + count]
        if len(numbers) < count:
            raise SpecError(
                f"{path}: {header[1]} has {len(numbers)} of its {count} numbers; truncated?"
            )
        found[header[1]] = Written([_number(n, path) for n in numbers], shape)
        at += 1 + count
    if not found:
        raise SpecError(f"{path}: holds no assignment")
    return found


def _number(text: str, path: str) -> Decimal:
    if not re.fullmatch(_NUMBER, text, re.ASCII) or not math.isfinite(float(text)):
        raise SpecError(f"{path}: {text[:40]!r} is no finite number")
    if len(text) > MAX_DIGITS or abs(int(text.lower().partition("e")[2] or 0)) > MAX_EXPONENT:
        raise SpecError(f"{path}: the number {text[:30]}... has too many digits")
    return Decimal(text)
