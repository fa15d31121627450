"""What ``calipers serve`` does."""

from __future__ import annotations

import sys
from pathlib import Path

from calipers.cli.commands import Subject
from calipers.errors import DataError
from calipers.graph.graph import evaluating


def run(directory: Path, subject: Subject, *, host: str, port: int, token: str | None) -> None:
    """Serve until Ctrl-C."""
    try:
        import uvicorn

        from calipers.serve.server import configured
    except ImportError:
        raise DataError(
            "serve needs starlette and uvicorn; pip install 'calipers[serve]'"
        ) from None
    from calipers.serve.explorer import explore

    network, data, threat = subject.load()
    with evaluating(network.module):
        explorer = explore(directory, network, data, threat)
        config, bound, address = configured(explorer, host, port, token)
        sys.stderr.write(f"{explorer.side.name} at {address} (Ctrl-C ends it)\n")
        sys.stderr.flush()
        with bound:
            uvicorn.Server(config).run(sockets=[bound])
