"""Names, options and help of all commands, a module for each group; what a command does is in the package above.

Nothing heavy is imported here: each command imports what it runs.
"""

from typer.models import CommandInfo

from calipers.cli.syntax import attacks, audits, machine, queries, trainings
from calipers.cli.syntax.application import app

# what a stranger needs first stands first in the help
ORDER = (
    *("audit", "attack", "replay", "transfer", "explain", "inspect", "methods", "gate"),
    *("landscape", "serve"),
    *("verify", "check", "bench", "supports", "train", "compare", "sweep", "download"),
    *("reproduce", "doctor"),
)


def _place(command: CommandInfo) -> int:
    name = command.name or getattr(command.callback, "__name__", "")
    return ORDER.index(name) if name in ORDER else len(ORDER)


app.registered_commands.sort(key=_place)

__all__ = ["app", "attacks", "audits", "machine", "queries", "trainings"]
