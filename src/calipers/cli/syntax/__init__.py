"""Names, options and help of all commands, a module for each group; what a command does is in the package above.

Nothing heavy is imported here: each command imports what it runs.
"""

from calipers.cli.syntax import attacks, audits, machine, queries, trainings
from calipers.cli.syntax.application import app

__all__ = ["app", "attacks", "audits", "machine", "queries", "trainings"]
