"""What ``calipers doctor`` does."""

from __future__ import annotations

import sys

from calipers.doctor import examine


def run() -> bool:
    """Print each check as it is finished; whether none failed."""
    failed = []
    for check in examine():
        sys.stdout.write(f"{check.mark:4}  {check.name:13} {check.said}\n")
        sys.stdout.flush()
        if check.ok is False:
            failed.append(check.name)
    said = f"not fit to measure: {', '.join(failed)}" if failed else "fit to measure"
    sys.stdout.write(f"{said}\n")
    return not failed
