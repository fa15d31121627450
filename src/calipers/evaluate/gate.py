"""Thresholds on an audit's result, for continuous integration: what must hold, whether it does, JUnit XML.

Where a sample was audited, a share counts as its worse 95 % confidence limit, so that a gate does not pass by luck.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

from calipers.errors import DataError

SHARES = {
    "clean": "clean_accuracy",
    "certified": "certified_accuracy",
    "empirical": "empirical_accuracy",
}
LARGEST = 256 << 20  # bytes of a result file


@dataclass(frozen=True)
class Requirement:
    """At least ``least`` of the examples must be ``name``: "clean" (correct), "certified" or "empirical" (unbroken)."""

    name: str
    least: float

    def __post_init__(self) -> None:
        if self.name not in SHARES:
            raise ValueError(f"name: {self.name!r} is not one of {', '.join(SHARES)}")
        if not 0 <= self.least <= 1:
            raise ValueError(f"{self.name}: {self.least} is not a share between 0 and 1")


@dataclass(frozen=True)
class Checked:
    """A requirement and what was measured: the share, and the value that counts."""

    requirement: Requirement
    measured: float
    counted: float

    @property
    def passed(self) -> bool:
        return self.counted >= self.requirement.least

    def __str__(self) -> str:
        name, least = self.requirement.name, self.requirement.least
        sampled = self.counted != self.measured
        limit = f", with 95 % confidence at least {self.counted:.2%}" if sampled else ""
        return f"{name} accuracy {self.measured:.2%}{limit}; required {least:.2%}"


def gate(
    result: Mapping[str, Any], requirements: Sequence[Requirement], *, estimates: bool = False
) -> list[Checked]:
    """Each requirement held against an audit's JSON (`Audit.json`).

    Args:
        estimates: let a sample's shares count as they are.

    Raises:
        ValueError: no requirement, or the same one twice.
        DataError: the result lacks a share, or it is no number between 0 and 1, or the shares are not in order.
    """
    if not requirements:
        raise ValueError(
            "no requirement: a gate that checks nothing always passes; give a threshold"
        )
    names = [r.name for r in requirements]
    if len(set(names)) < len(names):
        raise ValueError(f"a requirement is given twice: {', '.join(names)}")
    shares = {name: _share(result, key) for name, key in SHARES.items()}
    if not shares["certified"] <= shares["empirical"] <= shares["clean"]:
        raise DataError(f"result: certified <= empirical <= clean does not hold of {shares}")
    limits = result.get("confidence_95")
    found = []
    for requirement in requirements:
        measured = counted = shares[requirement.name]
        if limits is not None and not estimates:
            counted = min(measured, _limit(limits, requirement.name))
        found.append(Checked(requirement, measured, counted))
    return found


def read(file: str | Path) -> dict[str, Any]:
    """The JSON that ``calipers audit --json`` wrote.

    Raises:
        DataError: the file is missing, too large, or something else.
    """
    file = Path(file)
    if not file.is_file():
        raise DataError(f"{file}: no such file; write it with calipers audit --json")
    if file.stat().st_size > LARGEST:
        raise DataError(f"{file}: more than {LARGEST >> 20} MiB; this is no audit's result")
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise DataError(f"{file}: not JSON; write it with calipers audit --json") from None
    if isinstance(result, dict) and "curve" in result:
        raise DataError(f"{file}: a curve over several radii; write the result of one --eps")
    if not isinstance(result, dict) or "certified_accuracy" not in result:
        raise DataError(f"{file}: not the result of an audit; write it with calipers audit --json")
    return result


def junit(checked: Sequence[Checked], result: Mapping[str, Any]) -> str:
    """The outcome as JUnit XML, a test case per requirement."""
    failures = sum(not c.passed for c in checked)
    suite = ET.Element(
        "testsuite", name="calipers gate", tests=str(len(checked)), failures=str(failures),
        errors="0", skipped="0",
    )  # fmt: skip
    where = _text(f"{result.get('model', 'model')} on {result.get('data', 'data')}")
    for one in checked:
        case = ET.SubElement(
            suite, "testcase", classname=where, name=f"{one.requirement.name} accuracy"
        )
        if not one.passed:
            ET.SubElement(case, "failure", message=str(one)).text = str(one)
        else:
            ET.SubElement(case, "system-out").text = str(one)
    root = ET.Element("testsuites")
    root.append(suite)
    return ET.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _text(value: str) -> str:
    """Without the control characters that XML cannot hold."""
    return "".join(c if c.isprintable() else "�" for c in value)


def _share(result: Mapping[str, Any], key: str) -> float:
    value: Any = result.get(key)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 <= value <= 1:
        raise DataError(f"result: {key} is {value!r}, not a share between 0 and 1")
    return float(value)


def _limit(limits: Any, name: str) -> float:
    try:
        low = float(limits[name][0])
    except (KeyError, IndexError, TypeError, ValueError):
        low = math.nan
    if not 0 <= low <= 1:
        raise DataError(
            f"result: confidence_95 of {name} is no pair of shares; run the audit again"
        )
    return low
