"""Runs that were kept, to compare."""

from calipers.evaluate.runs import read


def settled(directory):
    """All that a run says but seconds, number by number."""
    run = read(directory)
    return (
        [r._replace(seconds=0.0) for r in run.records],
        [t._replace(seconds=0.0) for t in run.stages],
        run.failures,
    )
