"""What must hold before anything is measured: each check is one function that raises one clear error.

A result is a statement about a function; these checks establish that there is one function (graph, module and
onnxruntime agree; it is deterministic; examples of a batch do not touch each other) and that the data are its inputs.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from calipers.bracket import Model
from calipers.errors import CaptureError, DataError, ModelError
from calipers.graph.graph import Network, bind, evaluate
from calipers.sets import Region, ThreatModel

TOLERANCE = 1e-4  # of max(1, max |output|), for two float32 evaluations of one network
BATCH = 250
OVERLAP_MEMORY = 1 << 27  # bytes


@dataclass(frozen=True, eq=False)
class Checks:
    """What the checks found.

    Args:
        logits: the module's outputs on all examples, (N, K), on the CPU.
        differences: comparison -> the largest difference of an output.
        notes: what could not be compared, or was allowed although it weakens the result.
    """

    logits: Tensor
    differences: Mapping[str, float]
    notes: tuple[str, ...]


def batches(x: Tensor, size: int = BATCH) -> list[Tensor]:
    """``x`` in parts of at most ``size`` rows."""
    return [x[i : i + size] for i in range(0, len(x), size)]


@torch.no_grad()
def check(
    network: Network,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    replicas: Mapping[str, Model] | None = None,
    allow_softmax: bool = False,
) -> Checks:
    """All checks, cheapest first, on examples ``x`` (N, *x) with labels ``y`` (N,). Call it inside `evaluating`.

    Args:
        replicas: other evaluations of the same network by name, such as onnxruntime's.
        allow_softmax: measure a network that returns probabilities all the same. Bounds stay sound; attacks
            see vanishing gradients, so the empirical accuracy may be far too high, and a note says so.

    Raises:
        ModelError: NaN or infinite parameters or outputs, probabilities instead of logits, evaluations that differ.
        DataError: the examples or labels do not fit the network, or lie outside the domain.
    """
    check_parameters(network)
    check_data(network, x, y, threat)
    logits = torch.cat([network(part).cpu() for part in batches(x)])
    notes = check_outputs(logits, len(x), allow_softmax=allow_softmax)
    if len(y) and int(y.max()) >= logits.shape[1]:
        raise DataError(
            f"labels: {int(y.min())}..{int(y.max())} are outside 0..{logits.shape[1] - 1}, the classes of the model's "
            f"{logits.shape[1]} outputs"
        )
    check_determinism(network, x, logits)
    forwards: dict[str, Callable[[Tensor], Tensor]] = {
        "captured graph": _graph_forward(network),
        **(replicas or {}),
    }
    differences = {name: agreement(name, f, x, logits) for name, f in forwards.items()}
    return Checks(logits, differences, notes)


def check_parameters(network: Network) -> None:
    """All parameters, buffers and constants are finite, or a `ModelError` names those that are not."""
    named = {
        **dict(network.module.named_parameters()),
        **dict(network.module.named_buffers()),
        **network.graph.constants,
    }
    bad = [n for n, t in named.items() if t.is_floating_point() and not torch.isfinite(t).all()]
    if bad:
        raise ModelError(
            f"parameters: {', '.join(bad[:5])} contain NaN or infinite values; the training diverged or the file is "
            "damaged"
        )


def check_data(network: Network, x: Tensor, y: Tensor, threat: ThreatModel) -> None:
    """The examples have the network's input shape and lie in the domain; labels are class numbers."""
    if not len(x):
        raise DataError("data: no examples; there is nothing to audit")
    if tuple(x.shape[1:]) != network.input_shape:
        raise DataError(
            f"data: examples have shape {tuple(x.shape[1:])}, the model takes {network.input_shape}; reshape the data"
        )
    if int(y.min()) < 0:
        raise DataError(f"labels: {int(y.min())} is negative; number the classes from 0")
    for part in batches(x):
        threat.around(part)


def check_outputs(logits: Tensor, count: int, *, allow_softmax: bool) -> tuple[str, ...]:
    """The outputs on ``count`` examples are finite logits of two classes or more, or a `ModelError` says what they are.
    Returns notes."""
    shape = tuple(logits.shape)
    if logits.ndim == 2 and shape[1] == 1:
        raise ModelError(
            f"model: outputs have shape {shape}, one logit z for two classes; return one for each, as in "
            "torch.cat([-z, z], 1) / 2"
        )
    if logits.ndim != 2 or shape[0] != count or shape[1] < 2 or not logits.is_floating_point():
        raise ModelError(
            f"model: outputs have shape {shape} and type {logits.dtype} for {count} examples; a classifier returns "
            "(batch, K) floating-point logits, K >= 2"
        )
    if not torch.isfinite(logits).all():
        rows = int((~torch.isfinite(logits).all(1)).sum())
        raise ModelError(
            f"outputs: NaN or infinite on {rows} of {count} examples; check weights and scaling"
        )
    return check_softmax(logits, allow_softmax) if count else ()


def check_softmax(logits: Tensor, allowed: bool) -> tuple[str, ...]:
    """Outputs are not probabilities, or that is allowed and noted."""
    total = logits.double().sum(1)
    if bool((logits < 0).any() | (logits > 1).any()) or bool(((total - 1).abs() > 1e-3).any()):
        return ()
    saturated = (logits.amax(1) >= 1 - 1e-6).float().mean().item()
    finding = (
        f"outputs: all {len(logits)} rows lie in [0, 1] and sum to 1, so the model returns probabilities "
        f"({saturated:.0%} of them saturated at 1)"
    )
    if allowed:
        return (f"{finding}; gradients vanish there, so the empirical accuracy may be too high",)
    raise ModelError(
        f"{finding}; gradients vanish there and attacks look weaker than they are. Return logits (drop the final "
        "softmax), or choose allow_softmax=True (--allow-softmax)"
    )


def check_determinism(network: Network, x: Tensor, logits: Tensor) -> None:
    """The same inputs give the same outputs again, and an example alone gives what it gives in a batch."""
    part = x[:BATCH]
    again = (network(part).cpu() - logits[: len(part)]).abs().max().item()
    if again > 0:
        raise ModelError(
            f"the model is not deterministic: two passes over the same inputs differ by {again:.3g}; remove noise and "
            "dropout that stay active in evaluation mode"
        )
    alone = torch.cat([network(part[i : i + 1]).cpu() for i in range(min(8, len(part)))])
    apart = (alone - logits[: len(alone)]).abs().max().item()
    if not apart <= _limit(logits):
        raise ModelError(
            f"the model mixes the examples of a batch: outputs of an example alone differ by {apart:.3g}; use running "
            "statistics in normalisation layers and keep examples independent"
        )


@dataclass(frozen=True)
class Overlap:
    """Sets that hold an example of another class: nothing can be robust and right there.

    Args:
        count: at least so many of the ``tried`` examples have such a set.
        first, second: the closest pair found, ``second`` in the set of ``first``, and their ``distance`` in the norm.
    """

    count: int
    tried: int
    first: int
    second: int
    distance: float

    def note(self, y: Tensor, threat: ThreatModel, positions: Tensor | None = None) -> str:
        """One sentence with the figures; ``positions`` translates the examples' numbers."""
        pair = [
            f"{int(i if positions is None else positions[i])}, class {int(y[i])}"
            for i in (self.first, self.second)
        ]
        return (
            f"eps is large for these data: the sets of {self.count} of {self.tried} examples hold an example of "
            f"another class (examples {pair[0]}, and {pair[1]}, are "
            f"{self.distance:.4g} apart; {threat.describe()}), so no classifier can be right and robust on all of them"
        )


@torch.no_grad()
def overlaps(
    x: Tensor, y: Tensor, threat: ThreatModel, *, memory: int = OVERLAP_MEMORY, work: float = 1e11
) -> Overlap | None:
    """Whether the allowed change of an example leads to an example of another class; None if none was found.

    Every reported pair is decided by `Region.contains`. Pairs are narrowed down by Euclidean distances first.

    Args:
        memory: bytes to work in, roughly.
        work: products to spend on distances; beyond it only the first examples' sets are looked at.

    Cost: N²·n products for N examples of n numbers.
    """
    flat = x.flatten(1).float()
    flat = flat - flat.mean(0)
    count, size = flat.shape
    square = flat.square().sum(1)
    tried = min(count, max(1, int(work / (count * size))))
    rows = max(1, min(tried, memory // max(32 * count, 64 * size)))
    holds = torch.zeros(count, dtype=torch.bool, device=x.device)
    best = (math.inf, 0, 0)
    for start in range(0, tried, rows):
        part = slice(start, min(start + rows, tried))
        region = threat.around(x[part])
        near = torch.addmm(square[part, None] + square, flat[part], flat.T, alpha=-2)
        near -= (size + 8) * torch.finfo(torch.float32).eps * (square[part, None] + square)
        wanted = (near <= _reach(region)[:, None]) & (y[part, None] != y)
        order = near.argsort(1)
        rank, row = torch.nonzero(wanted.gather(1, order).T).T  # each example's nearest one first
        pairs = torch.stack([row, order[row, rank]], 1)
        for some in torch.split(pairs, max(1, memory // (128 * size))):
            some = some[~holds[some[:, 0] + start]]
            inside = some[region[some[:, 0]].contains(x[some[:, 1]])]
            if not len(inside):
                continue
            holds[inside[:, 0] + start] = True
            gap = (x[inside[:, 0] + start] - x[inside[:, 1]]).flatten(1).double()
            distance, place = torch.linalg.vector_norm(gap, ord=threat.p, dim=1).min(0)
            found = (distance.item(), int(inside[place, 0]) + start, int(inside[place, 1]))
            best = min(best, found)
    total = int(holds.sum())
    return Overlap(total, tried, best[1], best[2], best[0]) if total else None


def _reach(region: Region) -> Tensor:
    """The squared Euclidean radius of a ball around each centre that covers its region, (B,) float32, rounded up."""
    box = torch.maximum(region.outer_upper - region.center, region.center - region.outer_lower)
    reach: Tensor = torch.linalg.vector_norm(box.flatten(1), dim=1)
    if region.p != math.inf:
        reach = torch.minimum(reach, region.outer_eps)
    return (reach.square() * (1 + 1e-6)).float()


def _graph_forward(network: Network) -> Callable[[Tensor], Tensor]:
    env = bind(network.graph, network.module)
    return lambda x: evaluate(network.graph, env, x)


def agreement(name: str, forward: Callable[[Tensor], Tensor], x: Tensor, logits: Tensor) -> float:
    """The largest difference between ``forward`` and the module's ``logits``.

    Raises:
        ModelError: it exceeds the rounding of float32.
    """
    outputs = torch.cat([forward(part).cpu() for part in batches(x)])
    difference = (outputs.to(logits.dtype) - logits).abs().max().item()
    if not difference <= _limit(logits):
        raise ModelError(
            f"{name}: outputs differ from the module's by {difference:.3g} (allowed: {_limit(logits):.3g}); the two "
            "do not compute the same function, so no verdict would mean anything"
        )
    return difference


def _limit(logits: Tensor) -> float:
    return TOLERANCE * max(1.0, logits.abs().max().item())


def onnxruntime_replica(network: Network) -> Model | str:
    """onnxruntime's evaluation of the network, from its own file or one written for it; else the reason why not."""
    from calipers.graph.onnx import save_onnx, session

    if network.source and network.source.endswith((".onnx", ".onnx.gz")):
        return session(network.source)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        try:
            save_onnx(network, path)
        except CaptureError as error:
            return f"not compared with onnxruntime: {error}"
        return session(path)
