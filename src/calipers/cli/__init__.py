"""The command line. Importing it imports neither torch nor any heavy package; each command imports what it runs.

Every expected error (`CalipersError`, a bad argument, a missing file) becomes one paragraph on stderr and exit code 2.
Results go to stdout, progress to stderr, files are written whole or not at all.
"""

from __future__ import annotations

import os
import sys

from calipers.cli.syntax import app
from calipers.errors import CalipersError

__all__ = ["app", "main"]


def main() -> None:
    """The console script."""
    try:
        app(prog_name="calipers")
    except (CalipersError, ValueError, OSError) as error:
        if os.environ.get("CALIPERS_TRACEBACK"):
            raise
        sys.stderr.write(f"calipers: {' '.join(str(error).split())}\n")
        sys.exit(2)
