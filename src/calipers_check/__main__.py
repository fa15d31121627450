"""``calipers-check CERTIFICATE --network F [--property F]``: exit code 0 accepted, 1 refused, 2 bad usage."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from calipers_check.check import check
from calipers_check.container import MAX_BYTES
from calipers_check.errors import Refused, Unusable

ACCEPTED, REFUSED, UNUSABLE = 0, 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Check one certificate; the first line on stdout is "accepted: ..." or "refused: ...". Returns the exit code."""
    parser = argparse.ArgumentParser(
        "calipers-check", description="Check a certificate: that a network has a property."
    )
    parser.add_argument("certificate", type=Path)
    parser.add_argument("--network", type=Path, required=True, help="ONNX file, or gzip's of one")
    parser.add_argument("--property", type=Path, help="VNN-LIB file, if not in the certificate")
    parser.add_argument("--seconds", type=float, default=math.inf, help="refuse after this time")
    parser.add_argument("--max-bytes", type=int, default=MAX_BYTES, help="of a file, decompressed")
    options = parser.parse_args(arguments)
    begin = time.monotonic()
    try:
        found = check(
            options.certificate,
            options.network,
            options.property,
            seconds=options.seconds,
            max_bytes=options.max_bytes,
        )
    except Refused as error:
        return _say(f"refused: {error}", REFUSED)
    except (Unusable, MemoryError) as error:
        return _say(f"unusable: {error or 'out of memory'}", UNUSABLE)
    about = f"{found.clauses} clauses by {found.trees} trees of {found.nodes} nodes"
    if found.digest is not None:
        about += f"; property {found.digest}"
    return _say(f"accepted: {about}; {time.monotonic() - begin:.1f} s", ACCEPTED)


def _say(line: str, code: int) -> int:
    plain = " ".join(line.split()).encode("ascii", "backslashreplace").decode()
    sys.stdout.write(plain + "\n")
    return code


def script() -> None:
    """The console script."""
    sys.exit(main())


if __name__ == "__main__":
    script()
