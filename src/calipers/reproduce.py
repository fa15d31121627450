"""The numbers that a tutorial printed, computed again from its own weights: published value, ours, verdict.

Kolter and Madry, Adversarial Robustness: Theory and Practice (adversarial-ml-tutorial.org). Images are MNIST's test
images in their order, pixels in [0, 1]. Bounds, programs and l2 attacks stay inside that box; l_inf attacks and chapter
4 do not.

Attacks may find more than was printed: where float32 rounds a probability to 1 the tutorial's cross-entropy has no
gradient in the label's output, and ours has. Such claims agree from below (`Claim.may_exceed`). Claims that the
tutorial got wrong carry the reason.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor

from calipers.attacks import fgsm, pgd, targeted
from calipers.bounds import interval, lp, preactivations
from calipers.bounds.encode import encode, prepare
from calipers.data import Data, load
from calipers.errors import DataError
from calipers.exact import certify
from calipers.graph.graph import Network
from calipers.models import load_model
from calipers.seeds import seeds
from calipers.sets import Region, ThreatModel
from calipers.spec import Spec

INF = math.inf
BATCH = 50
WEIGHTS = {
    "ch3_model_dnn_2": "tutorial_dnn_2",
    "ch3_model_dnn_4": "tutorial_dnn_4",
    "ch3_model_small": "tutorial_small",
    "ch3_model_cnn": "tutorial_cnn",
    "ch4_model_cnn": "tutorial_cnn",
    "ch4_model_cnn_robust": "tutorial_cnn",
    "ch4_model_cnn_robust_2": "tutorial_cnn_robust_2",
}
RIVALS = (0, 1, 2, 3, 4, 5, 6, 8, 9)  # of the first test image, a seven
EYE = torch.eye(10)
PGD = partial(pgd, steps=40, step_size=0.1, drop=True)  # steps of 0.01 at eps 0.1
L2 = partial(pgd, steps=40, step_size=0.05, drop=True)  # steps of 0.1 at eps 2


@dataclass(frozen=True)
class Material:
    """Weights and images.

    Args:
        folder: with the tutorial's ``.pt`` files and MNIST's, or with folders ``tutorial`` and ``mnist`` of them.
        fast: attacks run on every k-th image only, k the claim's own.
    """

    folder: Path
    fast: bool = False
    networks: dict[str, Network] = field(default_factory=dict)

    @cached_property
    def mnist(self) -> Data:
        inner = self.folder / "mnist"
        return load("mnist", data_dir=inner if inner.is_dir() else self.folder)

    def network(self, name: str) -> Network:
        if name not in self.networks:
            file = next(
                (
                    f
                    for f in (self.folder / "tutorial" / f"{name}.pt", self.folder / f"{name}.pt")
                    if f.is_file()
                ),
                None,
            )
            if file is None:
                raise DataError(
                    f"{self.folder}: has no {name}.pt; put the tutorial's weights there (the models folder of "
                    "github.com/locuslab/adversarial-ml-tutorial), beside MNIST's four files"
                )
            self.networks[name] = load_model(WEIGHTS[name], weights=file)
        return self.networks[name]

    def rows(self, stride: int) -> Tensor:
        """Every ``stride``-th test image where it is to be fast; all of them otherwise."""
        return torch.arange(0, len(self.mnist), stride if self.fast else 1)

    def first(self, eps: float) -> Region:
        """The l_inf ball around the first test image, inside the box."""
        return ThreatModel(INF, eps).around(self.mnist.x[:1])


@dataclass(frozen=True)
class Measured:
    """What a claim gave.

    Args:
        rows: how many images a rate is of; None: no rate.
    """

    values: tuple[float, ...]
    rows: int | None = None


@dataclass(frozen=True)
class Claim:
    """A printed result.

    Args:
        tolerance: how far ours may be from it, absolutely; with ``relative`` in units of the printed value.
        may_exceed: it is an attack's rate, and a better attack finds more.
        corrects: why the printed value is not what it should be.
        slow: left out of a fast run.
    """

    section: str
    what: str
    published: tuple[float, ...]
    measure: Callable[[Material], Measured]
    tolerance: float = 0.0
    relative: bool = False
    may_exceed: bool = False
    corrects: str = ""
    slow: bool = False

    def room(self, measured: Measured, printed: float) -> float:
        """The tolerance; of a rate on a sample two standard errors, if that is more."""
        if self.relative:
            return self.tolerance * abs(printed)
        if measured.rows is None or measured.rows == 10_000:
            return self.tolerance
        share = min(max(printed, 0.5 / measured.rows), 1 - 0.5 / measured.rows)
        return max(self.tolerance, 2 * math.sqrt(share * (1 - share) / measured.rows))

    def verdict(self, measured: Measured) -> str:
        """``agrees``, ``stronger`` (an attack found more), ``corrected``, or ``differs``."""
        gaps = [
            (ours - printed, self.room(measured, printed) * (1 + 1e-9) + 1e-12)
            for ours, printed in zip(measured.values, self.published, strict=True)
        ]
        if all(abs(gap) <= room for gap, room in gaps):
            return "agrees"
        if self.may_exceed and all(gap >= -room for gap, room in gaps):
            return "stronger"
        return "corrected" if self.corrects else "differs"


@dataclass(frozen=True)
class Line:
    """A claim, what we found, and the verdict; ``measured`` is None for what was left out."""

    claim: Claim
    measured: Measured | None
    verdict: str
    seconds: float


def reproduce(
    folder: str | Path,
    *,
    fast: bool = False,
    only: str = "",
    claims: tuple[Claim, ...] | None = None,
) -> Iterator[Line]:
    """Each claim's line, as it is finished.

    Args:
        folder: see `Material`.
        fast: attacks on every k-th image, and without the claims that take minutes.
        only: those whose section or description holds this text.

    Raises:
        DataError: weights or images are missing or damaged.
    """
    material = Material(Path(folder), fast)
    for claim in CLAIMS if claims is None else claims:
        if only.lower() not in f"{claim.section} {claim.what}".lower():
            continue
        if fast and claim.slow:
            yield Line(claim, None, "left out", 0.0)
            continue
        begin = time.perf_counter()
        measured = claim.measure(material)
        yield Line(claim, measured, claim.verdict(measured), time.perf_counter() - begin)


# -- measurements ----------------------------------------------------------------------------------------------


def linf(eps: float, *, box: bool = False) -> ThreatModel:
    return ThreatModel(INF, eps) if box else ThreatModel(INF, eps, -INF, INF)


def batches(rows: Tensor) -> tuple[Tensor, ...]:
    return torch.split(rows, BATCH)


@torch.no_grad()
def _margins(m: Material, name: str) -> Tensor:
    """Of all test images."""
    found = []
    for part in batches(torch.arange(len(m.mnist))):
        y = m.network(name)(m.mnist.x[part])
        found.append(Spec.label(m.mnist.y[part], 10).margin_at(y))
    return torch.cat(found)


def clean(m: Material, name: str) -> Measured:
    return _rate(_margins(m, name) <= 0)


def _rate(wrong: Tensor, of: int | None = None) -> Measured:
    return Measured((int(wrong.sum()) / (of or len(wrong)),), of or len(wrong))


def broken(
    m: Material, rows: Tensor, name: str, threat: ThreatModel, attack: Callable[..., Tensor]
) -> Tensor:
    """Which of the images ``rows`` are misclassified at the attack's points."""
    net, found = m.network(name), []
    for part in batches(rows):
        x, y = m.mnist.x[part], m.mnist.y[part]
        points = attack(net, threat.around(x), Spec.label(y, 10), seeds=seeds(x, 0, "reproduce"))
        with torch.no_grad():
            found.append(net(points).argmax(1) != y)
    return torch.cat(found)


def attacked(
    m: Material, name: str, threat: ThreatModel, attack: Callable[..., Tensor], stride: int
) -> Measured:
    return _rate(broken(m, m.rows(stride), name, threat, attack))


def attacked_near(m: Material, name: str, attack: Callable[..., Tensor], near: int) -> Measured:
    """Where few images break, a fast run attacks the ``near`` nearest to failure; the others could only add."""
    rows = torch.arange(len(m.mnist))
    if m.fast:
        rows = _margins(m, name).argsort()[:near].sort().values
    return _rate(broken(m, rows, name, linf(0.1), attack), len(m.mnist))


@torch.no_grad()
def unverified(m: Material, name: str, threat: ThreatModel) -> Measured:
    found = []
    for part in batches(torch.arange(len(m.mnist))):
        spec = Spec.label(m.mnist.y[part], 10)
        found.append(~(interval(m.network(name), threat.around(m.mnist.x[part]), spec).amin(1) > 0))
    return _rate(torch.cat(found))


@torch.no_grad()
def logits(m: Material, name: str, count: int, digits: int) -> Measured:
    """The first logits' interval bounds at eps 0.1, lower ends first, rounded as printed."""
    net = m.network(name)
    boxes = preactivations(net, m.first(0.1), tight=False, dtype=torch.float64)
    ends = [end[0, :count].tolist() for end in boxes[net.graph.output]]
    return Measured(tuple(round(v, digits) for end in ends for v in end))


@torch.no_grad()
def elided(m: Material) -> Measured:
    spec = Spec.functional((EYE[7] - EYE)[None])
    return Measured(tuple(interval(m.network("ch3_model_small"), m.first(0.02), spec)[0].tolist()))


def relaxed(m: Material, eps: float, targets: tuple[int, ...]) -> Measured:
    spec = Spec.label(torch.tensor([7]), 10)
    found = lp(
        m.network("ch3_model_small"),
        m.first(eps),
        spec,
        intermediate="interval",
        raw=True,
        dtype=torch.float64,
    )
    return Measured(tuple(found[0, RIVALS.index(t)].item() for t in targets))


def binaries(m: Material) -> Measured:
    program = encode(prepare(m.network("ch3_model_small"), m.first(0.1), "interval"), relaxed=False)
    return Measured((float(program.kinks),))


def exact_margins(m: Material) -> Measured:
    found = certify(m.network("ch3_model_small"), m.first(0.1), 7)
    return Measured(tuple(found.optima[t].value for t in RIVALS))


def towards(m: Material, target: int, objective: str) -> Measured:
    """Of the first 18 images those of another label: how many are fooled, and how many hit the target."""
    x, y = m.mnist.x[:18], m.mnist.y[:18]
    x, y = x[y != target], y[y != target]
    found = targeted(
        m.network("ch3_model_cnn"), linf(0.2).around(x), y, torch.full_like(y, target),
        num_classes=10, objective=objective, attack=partial(pgd, steps=40, step_size=0.05),
    )  # fmt: skip
    return Measured((float(found.fooled.sum()), float(found.hit.sum())))


def plain_steps(m: Material) -> Measured:
    attack = partial(pgd, steps=1000, step_size=1e4, direction="gradient", drop=True)
    wrong = broken(m, torch.arange(18), "ch3_model_cnn", linf(0.1), attack)
    return Measured((float(wrong.sum()),))


def zero_gradient(m: Material) -> Measured:
    """The mean size of the mean cross-entropy's gradient over the first 100 images."""
    x = m.mnist.x[:100].clone().requires_grad_()
    values = Spec.label(m.mnist.y[:100], 10).values(m.network("ch3_model_cnn")(x))
    loss = torch.log1p(torch.exp(-values).sum(1)).mean()
    (gradient,) = torch.autograd.grad(loss, x)
    return Measured((gradient.abs().mean().item(),))


def zero_against_one(m: Material, value: str) -> Measured:
    """Linear models of zeros and ones at eps 0.2, without the box."""
    from calipers.training.linear import RobustLogisticRegression

    inner = m.folder / "mnist"
    train = load("mnist", data_dir=inner if inner.is_dir() else m.folder, split="train")
    (x, y), (tx, ty) = (
        (d.x[d.y < 2].flatten(1).double().numpy(), d.y[d.y < 2].numpy()) for d in (train, m.mnist)
    )
    model = RobustLogisticRegression(eps=0.2).fit(x, y)
    scores = {"error": model.score, "adversarial": model.robust_score}
    return Measured((1 - scores[value](tx, ty),), 10_000)


# -- the table -------------------------------------------------------------------------------------------------

_FGSM = (
    ("ch3_model_dnn_2", 0.9259, 3),
    ("ch3_model_dnn_4", 0.8827, 3),
    ("ch3_model_cnn", 0.4173, 20),
    ("ch4_model_cnn_robust", 0.0258, 10),
)
_CLEAN = {
    "ch3_model_dnn_2": 0.0285, "ch3_model_dnn_4": 0.021, "ch3_model_small": 0.0321, "ch3_model_cnn": 0.0105,
    "ch4_model_cnn": 0.0106, "ch4_model_cnn_robust": 0.0085, "ch4_model_cnn_robust_2": 0.0515,
}  # fmt: skip
_DNN_2 = (
    -20.79, -23.55, -17.5, -16.72, -32.42, -22.67, -30.8, -15.0, -23.63, -24.76,
    18.33, 14.59, 26.34, 28.89, 18.66, 28.71, 11.5, 32.54, 24.4, 25.3,
)  # fmt: skip
_ELIDED = (
    -7.426559, -2.029249, -8.31501, -15.399408, 2.38136, -10.803006, 5.575859, 0.0, -13.850781, -11.277755,
)  # fmt: skip
_LP_002 = (
    8.67912, 12.233313, 4.120828, 1.857739, 16.236514, 7.964242, 23.459304, 6.10315, 5.581247,
)  # fmt: skip
_MILP = (
    -2.545013, 3.043377, -4.966118334049208, -7.309837, 4.741011, -4.870591, 7.980441, -6.953625, -3.31437,
)  # fmt: skip
UNCONVERGED = "the tutorial's model is not converged; here the optimum of its problem is proved"
RESTARTS = partial(PGD, restarts=10, random_start=True)
PGD20 = partial(PGD, steps=20)


def _linear(what: str, printed: float, value: str) -> Claim:
    measure = partial(zero_against_one, value=value)
    title = f"0 against 1, robust training: {what}"
    return Claim("linear", title, (printed,), measure, 0.0005, corrects=UNCONVERGED)


def _attacked(
    net: str,
    what: str,
    printed: float,
    attack: Callable[..., Tensor],
    stride: int,
    *,
    threat: ThreatModel | None = None,
    tolerance: float = 0.01,
    section: str = "attacks",
) -> Claim:
    """An error rate under attack; ``stride`` 0: of a network that few images break (`attacked_near`)."""
    around = linf(0.1) if threat is None else threat
    if stride:
        measure = partial(attacked, name=net, threat=around, attack=attack, stride=stride)
    else:
        measure = partial(attacked_near, name=net, attack=attack, near=int(20_000 * printed))
    return Claim(section, f"{net}: {what}", (printed,), measure, tolerance, may_exceed=True)


def _fgsm(net: str, printed: float, stride: int) -> Claim:
    return _attacked(net, "error under FGSM, linf 0.1", printed, fgsm, stride, tolerance=0.05)


def _l2(net: str, printed: float, stride: int) -> Claim:
    return _attacked(
        net, "error under PGD-40, l2 2.0", printed, L2, stride, threat=ThreatModel(2, 2.0)
    )


def _unverified(net: str, eps: float, printed: float, *, box: bool = False) -> Claim:
    where = " inside the box" if box else ""
    measure = partial(unverified, name=net, threat=linf(eps, box=box))
    return Claim("training", f"{net}: unverified by intervals, {eps:g}{where}", (printed,), measure)


_PGD = "error under PGD-40, linf 0.1"
_SMALL = "small, the first test image"
CLAIMS: tuple[Claim, ...] = (
    _linear("test error", 0.0038, "error"),
    _linear("adversarial test error", 0.0251, "adversarial"),
    *(
        Claim("networks", f"{n}: test error", (v,), partial(clean, name=n))
        for n, v in _CLEAN.items()
    ),
    _fgsm("ch3_model_dnn_2", 0.9259, 3),
    _fgsm("ch3_model_dnn_4", 0.8827, 3),
    _fgsm("ch3_model_cnn", 0.4173, 20),
    _fgsm("ch4_model_cnn_robust", 0.0258, 10),
    Claim(
        "attacks",
        "ch3_model_cnn: mean gradient, first 100 images",
        (1.83e-06,),
        zero_gradient,
        0.003,
        relative=True,
    ),
    Claim("attacks", "1,000 plain gradient steps of 1e4: wrong of 18", (13.0,), plain_steps, 1.0),
    _attacked("ch3_model_dnn_2", _PGD, 0.9637, PGD, 5),
    _attacked("ch3_model_dnn_4", _PGD, 0.9838, PGD, 5),
    _attacked("ch3_model_cnn", _PGD, 0.7432, PGD, 50),
    _attacked("ch3_model_cnn", "PGD-40 with 10 random restarts", 0.7648, RESTARTS, 150),
    Claim(
        "attacks",
        "all made a two: fooled, hit",
        (17.0, 17.0),
        partial(towards, target=2, objective="label"),
    ),
    Claim(
        "attacks",
        "made a zero, minus label: fooled, hit of 15",
        (15.0, 8.0),
        partial(towards, target=0, objective="label"),
        1.0,
    ),
    Claim(
        "attacks",
        "made a zero, minus all others: the same",
        (12.0, 11.0),
        partial(towards, target=0, objective="others"),
        1.0,
    ),
    _l2("ch3_model_dnn_2", 0.9232, 10),
    _l2("ch3_model_dnn_4", 0.9435, 10),
    _l2("ch3_model_cnn", 0.7854, 50),
    Claim("exact", f"{_SMALL}: unstable neurons at 0.1", (60.0,), binaries),
    Claim(
        "exact",
        f"{_SMALL}: nine exact margins at 0.1",
        _MILP,
        exact_margins,
        1e-4,
        relative=True,
        slow=True,
    ),
    Claim(
        "relaxed",
        f"{_SMALL}: linear program at 0.1",
        (-26.119774634225454,),
        partial(relaxed, eps=0.1, targets=(2,)),
        1e-6,
        relative=True,
    ),
    Claim(
        "relaxed",
        f"{_SMALL}: nine linear programs at 0.02",
        _LP_002,
        partial(relaxed, eps=0.02, targets=RIVALS),
        1e-6,
        relative=True,
    ),
    Claim(
        "interval",
        "dnn_2: logits at 0.1",
        _DNN_2,
        partial(logits, name="ch3_model_dnn_2", count=10, digits=2),
    ),
    Claim(
        "interval",
        "cnn: first logit at 0.1",
        (-2998.6592, 2305.799),
        partial(logits, name="ch3_model_cnn", count=1, digits=4),
        1e-6,
        relative=True,
    ),
    Claim("interval", f"{_SMALL}: elided margins at 0.02", _ELIDED, elided, 1e-4, relative=True),
    _attacked(
        "ch4_model_cnn", "error under PGD-20, linf 0.1", 0.7083, PGD20, 50, section="training"
    ),
    _attacked(
        "ch4_model_cnn_robust", "error under PGD-20, linf 0.1", 0.0283, PGD20, 0, section="training"
    ),
    _attacked("ch4_model_cnn_robust", _PGD, 0.0286, PGD, 0, section="training"),
    _unverified("ch4_model_cnn_robust", 5e-4, 0.6985),
    _unverified("ch4_model_cnn_robust", 1e-4, 0.0261),
    _unverified("ch4_model_cnn_robust_2", 0.1, 0.0967),
    _unverified("ch4_model_cnn_robust_2", 0.1, 0.0952, box=True),
    _attacked("ch4_model_cnn_robust_2", _PGD, 0.0779, PGD, 0, section="training"),
)
