"""Examples decided as far as a time limit allows: the audit's fold, without its report."""

from __future__ import annotations

import math
import time

from torch import Tensor

from calipers.bracket import Bracket
from calipers.evaluate.audit import inputs
from calipers.evaluate.cascade import default_cascade
from calipers.evaluate.checks import check, onnxruntime_replica
from calipers.evaluate.fold import Job, fold, interruptible
from calipers.graph.graph import Network, evaluating
from calipers.sets import ThreatModel


def brackets(
    network: Network,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    seconds: float = math.inf,
    seed: int = 0,
    memory: int | None = None,
) -> Bracket:
    """The bracket of each example, by the audit's stages and complete search; see `calipers.verify`.

    Raises:
        ModelError, DataError: a check before measuring failed.
        SoundnessError: two methods contradict each other.
    """
    begin = time.perf_counter()
    with evaluating(network.module), interruptible() as pressed:
        runtime = onnxruntime_replica(network)
        agreeing = {} if isinstance(runtime, str) else {"onnxruntime": runtime}
        x, y = inputs(x, network, threat), y.to(network.device)
        check(network, x, y, threat, replicas=agreeing, allow_softmax=True)
        job = Job(
            network, x, y, threat, seed, tuple(agreeing.values()), deadline=begin + seconds,
            pressed=pressed, memory=memory,
        )  # fmt: skip
        return fold(job, default_cascade(network), None)[0]
