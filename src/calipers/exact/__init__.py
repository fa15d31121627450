"""Exact decisions: searches that end in a proof or a witness."""

from collections.abc import Callable

from calipers.exact.branch import branch as branch
from calipers.exact.inputs import split_inputs as split_inputs
from calipers.exact.milp import Certification as Certification
from calipers.exact.milp import Optimum as Optimum
from calipers.exact.milp import certify as certify
from calipers.exact.milp import exact_preactivations as exact_preactivations
from calipers.exact.milp import milp as milp
from calipers.exact.milp import optima as optima
from calipers.exact.outcome import Outcome as Outcome

EXACT: dict[str, Callable[..., Outcome]] = {
    "split_inputs": split_inputs,
    "branch": branch,
    "milp": milp,
}
