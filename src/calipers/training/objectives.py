"""Training objectives by name: presets of `calipers.training.step.family`, which take its keywords too.

(network, x, y, threat, *, seeds, ...) -> Loss          threat.eps is the radius of this step
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from calipers.attacks.gradient import step_length
from calipers.graph.graph import Network
from calipers.sets import ThreatModel
from calipers.training import margins, points
from calipers.training.points import Point
from calipers.training.regions import around, radius
from calipers.training.step import (
    Loss,
    Mix,
    Objective,
    at_point,
    at_x,
    combined,
    family,
    mart_mix,
    multiplied,
    on_region,
    small_box,
    summed,
    trades_mix,
    with_latent,
)

# -- the clean example ------------------------------------------------------------------------------


def _attack(point: Callable[..., Any], options: dict[str, Any], **defaults: Any) -> Point:
    """``point`` with the options that are its own, taken out of ``options``."""
    chosen = {name: options.pop(name, default) for name, default in defaults.items()}
    return partial(point, **chosen)


CLIMB: dict[str, Any] = {
    "steps": 10, "step_size": 0.25, "restarts": 1, "random_start": True, "scale": 1.0,
}  # fmt: skip


def standard(
    network: Network, x: Tensor, y: Tensor, threat: ThreatModel, *, seeds: Tensor, **options: Any
) -> Loss:
    """Cross-entropy at the examples."""
    return family(network, x, y, threat, seeds=seeds, mix=at_x, **options)


def smoothing(
    network: Network,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    seeds: Tensor,
    sigma: float = 0.25,
    policy: str = "adversarial_batch",
    **options: Any,
) -> Loss:
    """Cross-entropy at x + sigma·N(0, 1), the loss that networks for randomised smoothing are trained with.

    The noise leaves the domain; the radius does not count.

    Reference: Cohen et al. 2019, section 3.3.
    """

    def noisy(_model: Any, _threat: Any, x: Tensor, _y: Tensor, seeds: Tensor) -> Tensor:
        return torch.add(x, points.normal(seeds, x), alpha=sigma)

    return family(
        network, x, y, threat, seeds=seeds, mix=at_point, point=noisy, policy=policy, **options
    )


# -- adversarial points -----------------------------------------------------------------------------


def pgd(
    network: Network, x: Tensor, y: Tensor, threat: ThreatModel, *, seeds: Tensor, **options: Any
) -> Loss:
    """Cross-entropy at the last point of projected gradient ascent.

    Keywords of `points.pgd`: steps, step_size, restarts, random_start, scale.

    Reference: Madry et al. 2018.
    """
    attack = _attack(points.pgd, options, **CLIMB)
    return family(network, x, y, threat, seeds=seeds, mix=at_point, point=attack, **options)


def fgsm_rs(
    network: Network, x: Tensor, y: Tensor, threat: ThreatModel, *, seeds: Tensor, **options: Any
) -> Loss:
    """Cross-entropy at one long step from a random start.

    Reference: Wong et al. 2020, algorithm 3.
    """
    attack = _attack(points.pgd, options, **CLIMB | {"steps": 1, "step_size": 1.25})
    return family(network, x, y, threat, seeds=seeds, mix=at_point, point=attack, **options)


def n_fgsm(
    network: Network, x: Tensor, y: Tensor, threat: ThreatModel, *, seeds: Tensor, **options: Any
) -> Loss:
    """Cross-entropy at one step from a noisy example, not projected back: keywords ``noise`` and ``step_size``.

    Reference: de Jorge et al. 2022.
    """
    attack = _attack(points.n_fgsm, options, noise=2.0, step_size=1.0)
    return family(network, x, y, threat, seeds=seeds, mix=at_point, point=attack, **options)


def free(
    network: Network,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    seeds: Tensor,
    carry: Tensor | None = None,
    step_size: float = 1.0,
    **options: Any,
) -> Loss:
    """Cross-entropy at x + δ, where each replay moves δ by the gradient that the last one's backward pass left.

    The first replay's δ is 0. Pass the loss's ``carry`` to the next replay of the batch, after ``total.backward()``.

    Raises:
        ValueError: ``carry`` has no gradient: it was not differentiated by ``backward``.

    Cost: a standard step for each replay.
    Reference: Shafahi et al. 2019, algorithm 1.
    """
    region = around(threat, x)
    point = x.detach().clone()
    if carry is not None:
        if carry.grad is None:
            raise ValueError(
                "carry: has no gradient; call loss.total.backward() before the next replay"
            )
        length = step_length(region, step_size, x.dtype)
        point = region.ascend(carry.detach(), carry.grad.clone(), length)
    point.requires_grad_()
    options.setdefault("policy", "adversarial_batch")

    def given(*_: Any) -> Tensor:
        return point

    loss = family(network, x, y, threat, seeds=seeds, mix=at_point, point=given, **options)
    return loss._replace(carry=point)


def trades(
    network: Network,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    seeds: Tensor,
    beta: float = 6.0,
    **options: Any,
) -> Loss:
    """CE(clean) + beta·KL(clean ‖ attacked), the point maximising the divergence.

    Reference: Zhang et al. 2019, eq. 5.
    """
    attack = _attack(points.trades, options, steps=10, step_size=0.25, scale=1.0, noise=0.001)
    mix = partial(trades_mix, beta=beta)
    return family(network, x, y, threat, seeds=seeds, mix=mix, point=attack, **options)


def mart(
    network: Network,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    seeds: Tensor,
    beta: float = 5.0,
    **options: Any,
) -> Loss:
    """CE(attacked) − log(1.0001 − largest rival probability) + beta·KL(clean ‖ attacked)·(1 − clean probability).

    Reference: Wang et al. 2020, eq. 11.
    """
    attack = _attack(points.pgd, options, **CLIMB)
    mix = partial(mart_mix, beta=beta)
    return family(network, x, y, threat, seeds=seeds, mix=mix, point=attack, **options)


def multi_norm_max(
    network: Network,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    seeds: Tensor,
    others: Sequence[tuple[float, float]],
    **options: Any,
) -> Loss:
    """Cross-entropy at the worst of one attack for each norm: the threat's own and ``others``, pairs (p, eps).

    Reference: Tramèr and Boneh 2019, section 2.2.
    """
    attack = _attack(partial(points.strongest, others=others), options, **CLIMB)
    return family(network, x, y, threat, seeds=seeds, mix=at_point, point=attack, **options)


def multi_norm_avg(
    network: Network,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    seeds: Tensor,
    others: Sequence[tuple[float, float]],
    **options: Any,
) -> Loss:
    """The mean cross-entropy at the points of one attack for each norm.

    Reference: Tramèr and Boneh 2019, section 2.2.
    """
    attack = _attack(partial(points.every, others=others), options, **CLIMB)

    def stacked(*args: Any) -> Tensor:
        found: Any = attack(*args)
        return torch.cat(found)

    return family(network, x, y, threat, seeds=seeds, mix=at_point, point=stacked, **options)


def multi_norm_msd(
    network: Network,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    seeds: Tensor,
    others: Sequence[tuple[float, float]],
    **options: Any,
) -> Loss:
    """Cross-entropy at the end of one ascent that takes, at every step, the best norm's step.

    Reference: Maini et al. 2020.
    """
    attack = _attack(
        partial(points.steepest_of_several, others=others), options, steps=20, step_size=0.1
    )
    return family(network, x, y, threat, seeds=seeds, mix=at_point, point=attack, **options)


# -- bounds -----------------------------------------------------------------------------------------


def ibp(
    network: Network, x: Tensor, y: Tensor, threat: ThreatModel, *, seeds: Tensor, **options: Any
) -> Loss:
    """Cross-entropy at interval margins. With `ibp_initialise` and ``regularise`` it is Shi's fast variant.

    Reference: Gowal et al. 2018, eq. 12; Shi et al. 2021.
    """
    return family(network, x, y, threat, seeds=seeds, mix=on_region, **options)


def crown_ibp(
    network: Network,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    seeds: Tensor,
    beta: float = 1.0,
    **options: Any,
) -> Loss:
    """Cross-entropy at (1 − beta)·interval + beta·CROWN-IBP margins.

    Reference: Zhang et al. 2020, eq. 10.
    """
    bound = partial(margins.crown_ibp, beta=beta)
    return family(network, x, y, threat, seeds=seeds, mix=on_region, bound=bound, **options)


def dual(
    network: Network, x: Tensor, y: Tensor, threat: ThreatModel, *, seeds: Tensor, **options: Any
) -> Loss:
    """Cross-entropy at dual margins, every layer's bounds from the dual too.

    Reference: Wong and Kolter 2018, eq. 13.
    """
    return family(network, x, y, threat, seeds=seeds, mix=on_region, bound=margins.dual, **options)


def sabr(
    network: Network,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    seeds: Tensor,
    share: float = 0.4,
    shrink: float = 1.0,
    **options: Any,
) -> Loss:
    """Cross-entropy at interval margins on a small box around the adversarial point.

    Args:
        share: the box's size relative to the whole; 1 is `ibp`, 0 is `pgd`.
        shrink: see `margins.interval`.

    Reference: Müller et al. 2023 (SABR), eq. 4.
    """
    attack = _attack(points.pgd, options, **CLIMB | {"steps": 8})
    return family(
        network, x, y, threat, seeds=seeds, mix=on_region, point=attack,
        region=partial(small_box, share=share), bound=partial(margins.interval, shrink=shrink), **options,
    )  # fmt: skip


def cc_ibp(
    network: Network,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    seeds: Tensor,
    alpha: float = 0.5,
    **options: Any,
) -> Loss:
    """Cross-entropy at a convex combination of interval margins (alpha) and adversarial ones.

    Reference: De Palma et al. 2024, eq. 6.
    """
    attack = _attack(points.pgd, options, **CLIMB)
    mix = partial(combined, alpha=alpha)
    return family(network, x, y, threat, seeds=seeds, mix=mix, point=attack, **options)


def mtl_ibp(
    network: Network,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    seeds: Tensor,
    alpha: float = 0.5,
    **options: Any,
) -> Loss:
    """alpha·CE(interval margins) + (1 − alpha)·CE(attacked).

    Reference: De Palma et al. 2024, eq. 7.
    """
    attack = _attack(points.pgd, options, **CLIMB)
    mix = partial(summed, alpha=alpha)
    return family(network, x, y, threat, seeds=seeds, mix=mix, point=attack, **options)


def exp_ibp(
    network: Network,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    seeds: Tensor,
    alpha: float = 0.5,
    **options: Any,
) -> Loss:
    """CE(interval margins)^alpha · CE(attacked)^(1 − alpha).

    Reference: De Palma et al. 2024, eq. 8.
    """
    attack = _attack(points.pgd, options, **CLIMB)
    mix = partial(multiplied, alpha=alpha)
    return family(network, x, y, threat, seeds=seeds, mix=mix, point=attack, **options)


def taps(
    network: Network,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    seeds: Tensor,
    split: int = 1,
    boost: float = 5.0,
    latent_steps: int = 10,
    latent_step_size: float = 0.2,
    **options: Any,
) -> Loss:
    """CE(margins of a latent attack)·CE(interval margins); while eps is below ``eps_max``, `ibp`.

    Args:
        split: activation layers behind the cut.
        boost: factor on the gradient of the latent loss.

    Reference: Mao et al. 2023 (TAPS), section 3.
    """
    mix = _latent_mix(threat, options, split, boost, latent_steps, latent_step_size)
    return family(network, x, y, threat, seeds=seeds, mix=mix, **options)


def staps(
    network: Network,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    seeds: Tensor,
    share: float = 0.4,
    shrink: float = 1.0,
    split: int = 1,
    boost: float = 5.0,
    latent_steps: int = 10,
    latent_step_size: float = 0.2,
    **options: Any,
) -> Loss:
    """`taps` on `sabr`'s small box.

    Reference: Mao et al. 2023, section 3.5.
    """
    attack = _attack(points.pgd, options, **CLIMB | {"steps": 8})
    mix = _latent_mix(threat, options, split, boost, latent_steps, latent_step_size)
    return family(
        network, x, y, threat, seeds=seeds, mix=mix, point=attack,
        region=partial(small_box, share=share), bound=partial(margins.interval, shrink=shrink), **options,
    )  # fmt: skip


def _latent_mix(
    threat: ThreatModel,
    options: Mapping[str, Any],
    split: int,
    boost: float,
    steps: int,
    step_size: float,
) -> Mix:
    end = options.get("eps_max")
    if end is not None and radius(threat) < end:
        return on_region
    return partial(with_latent, split=split, boost=boost, steps=steps, step_size=step_size)


OBJECTIVES: dict[str, Objective] = {
    f.__name__: f
    for f in (
        standard, smoothing, fgsm_rs, n_fgsm, free, pgd, trades, mart, multi_norm_max, multi_norm_avg, multi_norm_msd,
        ibp, crown_ibp, dual, sabr, taps, staps, cc_ibp, mtl_ibp, exp_ibp,
    )
}  # fmt: skip
