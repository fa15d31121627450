"""Measuring a network: checks, the cascade that brackets its robust accuracy, stored runs, reports."""

from calipers.evaluate.audit import audit as audit
from calipers.evaluate.explain import explain as explain
from calipers.evaluate.result import Audit as Audit
