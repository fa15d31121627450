"""The explorer: a run directory as local pages, with live brackets, attacks, bounds and loss surfaces."""
