"""Exact decisions: searches that end in a proof or a witness."""

from calipers.exact.outcome import Outcome as Outcome
