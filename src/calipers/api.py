"""The one-line calls: labels in, points, certified margins or brackets out."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from calipers.attacks import search
from calipers.attacks.inputs import called
from calipers.bounds import crown
from calipers.bounds.planner import out_of_memory
from calipers.bracket import Bracket, require_eval
from calipers.errors import CalipersError, DataError, ModelError
from calipers.graph.graph import Network
from calipers.seeds import seeds as seeds_of
from calipers.sets import ThreatModel, require_tensor
from calipers.spec import Spec

BATCH = 250


def attack(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    method: Callable[..., Tensor] | None = None,
    seed: int = 0,
    allow_softmax: bool = False,
) -> Tensor:
    """For every example the point of lowest margin that ``method`` found: (B, *x), in the dtype of ``x``.

    All points lie strictly in their sets. Whether one breaks the model is decided by `calipers.witness`.

    Args:
        method: a fixed-budget attack; None is the cascade at its standard level, which Ctrl-C ends early with the
            points found so far.
        allow_softmax: attack a model that returns probabilities all the same. Gradients vanish there, so attacks other
            than on the margin find too little.

    Raises:
        DataError: inputs outside the domain, not finite, or not floating point.
        ValueError: labels that the model's outputs do not have.
        ModelError: normalisation or dropout is in training mode; the model does not take inputs of this shape or dtype;
            its outputs are NaN, infinite, probabilities, or no row of logits for each example.
    """
    from calipers.evaluate.checks import check_outputs

    require_eval(model)
    _require_examples(x, y)
    region = threat.around(x)
    with torch.no_grad():
        logits = _outputs(model, x)
    check_outputs(logits, len(x), allow_softmax=allow_softmax)
    spec = Spec.label(y, logits.shape[1])
    seeds = seeds_of(x, seed, "attack")
    if method is None:
        return search(model, region, spec, seeds=seeds, dtype=x.dtype).points
    return method(model, region, spec, seeds=seeds, dtype=x.dtype)


def _require_examples(x: Tensor, y: Tensor) -> None:
    """Raises:
    DataError: ``x`` is no floating-point tensor.
    ValueError: ``y`` is no label for each example.
    """
    require_tensor(x)
    if not x.is_floating_point():
        raise DataError(
            f"x: dtype {x.dtype} is not floating point; convert and scale the inputs first"
        )
    if isinstance(y, Tensor) and y.ndim == 1 and len(y) != len(x):
        raise ValueError(f"y: {len(y)} labels for {len(x)} examples")


def _outputs(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The model's outputs on all examples.

    Raises:
        ModelError: it fails there, or returns something other than a tensor.
    """
    parts = []
    for part in torch.split(x, BATCH):
        try:
            parts.append(called(model, part))
        except (RuntimeError, ValueError, IndexError) as error:
            if isinstance(error, CalipersError) or out_of_memory(error):
                raise
            raise ModelError(
                f"model: fails on examples of shape {tuple(x.shape[1:])}, {x.dtype} ({error}); give it (batch, "
                "*features) as it was trained on"
            ) from error
    odd = [part for part in parts if not (isinstance(part, Tensor) and part.ndim == 2)]
    if not odd:
        return torch.cat([part for part in parts if isinstance(part, Tensor)])
    if isinstance(odd[0], Tensor):
        return odd[0]
    raise ModelError(
        f"model: returns {type(odd[0]).__name__}, not a tensor; wrap it so that it returns its logits alone"
    )


def bound(
    network: Network,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    method: Callable[..., Tensor] = crown,
    memory: int | None = None,
) -> Tensor:
    """Certified margins over the rivals in class order, (B, K − 1): never above the true minimum.

    Computed in float64 with the rounding of the computation subtracted, so a positive row proves robustness of
    the stored parameters in real arithmetic.

    Raises:
        UnsupportedOp: an op of the network has no entry in the op table.
        DataError, ValueError: as `attack`.
    """
    if not isinstance(network, Network):
        raise DataError(
            f"network: bounds need a captured network, not {type(network).__name__}; "
            "call calipers.capture(model, example) first"
        )
    _require_examples(x, y)
    spec = Spec.label(y, network.num_classes)
    with torch.no_grad():
        return method(
            network, threat.around(x), spec, dtype=torch.float64, rigorous=True, memory=memory
        )


def verify(
    network: Network,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    seconds: float = 30.0,
    seed: int = 0,
    memory: int | None = None,
) -> Bracket:
    """A bracket of each example's minimal margin, decided as far as the time suffices; ``verdict()`` names the rows.

    The audit's stages, cheapest first, then complete search with an equal share of the time left for each example that
    is still open, the most promising first.

    Sound: lower ends hold in real arithmetic on the stored parameters; upper ends <= 0 have a witness that was replayed
    in float64 and, where the network can be written as ONNX, in onnxruntime.

    Args:
        seconds: for all examples together.

    Raises:
        DataError, ModelError, ValueError: as `attack`; evaluations of the network that differ.
        SoundnessError: two methods contradict each other.
    """
    from calipers.evaluate.brackets import brackets

    if not isinstance(network, Network):
        raise DataError(
            f"network: a captured network is needed, not {type(network).__name__}; "
            "call calipers.capture(model, example) first"
        )
    _require_examples(x, y)
    Spec.label(y, network.num_classes)  # checks the labels
    if not seconds > 0:
        raise ValueError(f"seconds: {seconds!r} is no time limit; give a positive number")
    return brackets(network, x, y, threat, seconds=seconds, seed=seed, memory=memory)
