"""What ``calipers gate`` does."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from calipers.cli.options import share_of, writable
from calipers.evaluate.gate import Requirement, gate, junit, read
from calipers.files import write_atomically


def run(
    file: Path, thresholds: Mapping[str, str | None], *, estimates: bool, junit_file: Path | None
) -> bool:
    """Check, print, write; whether all thresholds hold."""
    if junit_file is not None:
        writable("--junit", junit_file.absolute())
    wanted = [
        Requirement(name, share_of(text, f"--{name}"))
        for name, text in thresholds.items()
        if text is not None
    ]
    if not wanted:
        raise ValueError("no threshold: give at least one of --certified, --empirical and --clean")
    result = read(file)
    checked = gate(result, wanted, estimates=estimates)
    for one in checked:
        sys.stdout.write(f"{'pass' if one.passed else 'FAIL'}  {one}\n")
    if junit_file is not None:
        write_atomically(junit_file, junit(checked, result))
    return all(one.passed for one in checked)
