"""What ``calipers reproduce`` does."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from calipers.cli.options import writable
from calipers.files import write_atomically
from calipers.reproduce import Line, reproduce

WIDTH = 62
SHOWN = 2  # values of a claim on its line


def run(folder: Path, *, fast: bool, only: str, json_file: Path | None) -> bool:
    """Print each claim as it is finished, then the counts; whether none differs."""
    if json_file is not None:
        writable("--json", json_file.absolute())
    lines: list[Line] = []
    head = f"{'claim':{WIDTH}}  {'printed':>20}  {'ours':>20}  verdict"
    for line in reproduce(folder, fast=fast, only=only):
        if not lines:
            sys.stdout.write(head + "\n")
        lines.append(line)
        sys.stdout.write(_text(line) + "\n")
        sys.stdout.flush()
    if not lines:
        raise ValueError(f"--only: no claim holds {only!r}")
    counts = Counter(line.verdict for line in lines)
    said = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    sys.stdout.write(f"{len(lines)} claims: {said}; {sum(line.seconds for line in lines):.0f} s\n")
    if json_file is not None:
        content = {"fast": fast, "claims": [_plain(line) for line in lines]}
        write_atomically(json_file, json.dumps(content, indent=1) + "\n")
    return not counts["differs"]


def _text(line: Line) -> str:
    claim, measured = line.claim, line.measured
    ours = "–" if measured is None else _values(measured.values)
    sample = ""
    if measured is not None and measured.rows not in (None, 10_000):
        sample = f" (of {measured.rows} images)"
    reason = f": {claim.corrects}" if line.verdict == "corrected" else ""
    return (
        f"{claim.section + ': ' + claim.what:{WIDTH}}  {_values(claim.published):>20}  {ours:>20}  "
        f"{line.verdict}{sample}{reason}  [{line.seconds:.1f} s]"
    )


def _values(values: tuple[float, ...]) -> str:
    more = ", ..." if len(values) > SHOWN else ""
    return ", ".join(f"{v:.5g}" for v in values[:SHOWN]) + more


def _plain(line: Line) -> dict[str, Any]:
    measured = line.measured
    return {
        "section": line.claim.section,
        "claim": line.claim.what,
        "published": list(line.claim.published),
        "ours": None if measured is None else list(measured.values),
        "images": None if measured is None else measured.rows,
        "verdict": line.verdict,
        "reason": line.claim.corrects if line.verdict == "corrected" else "",
        "seconds": round(line.seconds, 2),
    }
