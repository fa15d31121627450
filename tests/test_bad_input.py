"""Bad input through the public API: a named error for each case that attack libraries pass over in silence.

Tables: what is given, and what every function says. No traceback out of the depth of torch, no NaN that counts as
success, no label that counts as broken before anything was tried.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import calipers as cp
from calipers.attacks import ATTACKS
from calipers.errors import CalipersError, DataError, ModelError
from calipers.evaluate import empirical
from calipers.evaluate.cascade import select

K, SHAPE, COUNT = 4, (1, 5, 5), 8
THREAT = cp.ThreatModel(math.inf, 0.1)


def classifier() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(25, 12), nn.ReLU(), nn.Linear(12, K)).eval()


NET = classifier()
X = torch.rand(COUNT, *SHAPE, generator=torch.Generator().manual_seed(1))
with torch.no_grad():
    Y = NET(X).argmax(1)
NETWORK = cp.capture(NET, X[:2])
STAGES = select(["clean", "interval", "fgsm"])

Function = Callable[[Any, Any, cp.ThreatModel], object]
ATTACKING: dict[str, Function] = {
    "attack": lambda x, y, t: cp.attack(NET, x, y, t),
    "attack a captured network": lambda x, y, t: cp.attack(NETWORK, x, y, t),
    **{
        name: lambda x, y, t, f=f: cp.attack(NET, x, y, t, method=f)  # type: ignore[misc]
        for name, f in ATTACKS.items()
    },
}
MEASURING: dict[str, Function] = {
    "empirical": lambda x, y, t: empirical(NET, (x, y), t, level="quick"),
    "audit": lambda x, y, t: cp.audit(NETWORK, (x, y), t, cascade=STAGES),
    "bound": lambda x, y, t: cp.bound(NETWORK, x, y, t),
    "interval": lambda x, y, t: cp.bound(NETWORK, x, y, t, method=cp.interval),
    "verify": lambda x, y, t: cp.verify(NETWORK, x, y, t, seconds=2),
    "explain": lambda x, y, t: cp.explain(NETWORK, (x, y), t, index=0),
}
FUNCTIONS = {**ATTACKING, **MEASURING}
each_function = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)


def one_hot() -> Tensor:
    return nn.functional.one_hot(Y, K)


def with_nan() -> Tensor:
    x = X.clone()
    x[2, 0, 3, 3] = math.nan
    return x


LABELS: dict[str, tuple[Any, str]] = {
    "label out of range": (torch.where(Y[0] == Y, K, Y), r"labels?\W.* outside 0\.\."),
    "label -1": (torch.where(Y[0] == Y, -1, Y), "outside|negative"),
    "label -100": (torch.full_like(Y, -100), "outside|negative"),
    "labels as floats": (Y.float(), "integers"),
    "labels one-hot": (one_hot(), r"shape \(8, 4\)"),
    "one label": (Y[0], r"shape \(\)"),
    "too few labels": (Y[:5], "5|expected one class number per example"),
    "too many labels": (Y.repeat(2), "16|expected one class number per example"),
}
INPUTS: dict[str, tuple[Any, str]] = {
    "images beyond [0, 1]": (2 * X - 0.5, r"outside the input domain \(values -0\.\d+\.\.1\.\d+\)"),
    "images in 0..255": (255 * X, r"outside the input domain \(values .*\.\.2\d\d"),
    "NaN pixel": (with_nan(), "1 of 8 examples contain NaN or infinite"),
    "infinite pixel": (torch.where(X > 0.9, math.inf, X), "contain NaN or infinite"),
    "no batch axis": (X[0], "8 labels for 1 examples|shape"),
    "wrong number of features": (X.flatten(1)[:, 1:], r"shape \(24,\)"),
    "int64 images": ((255 * X).long(), "int64"),
    "uint8 images": ((255 * X).byte(), "uint8"),
}
RADII: dict[str, tuple[Any, str]] = {
    "eps < 0": (-0.1, r"eps: -0\.1 is negative"),
    "eps NaN": (math.nan, r"eps: .*nan is not finite"),
    "eps NaN as text": ("nan", "eps: .*nan"),
    "eps no number": ("a lot", "eps: .*a lot"),
    "eps one per feature for l2": (torch.ones(25), "eps: one radius per feature"),
}


@contextmanager
def named(message: str) -> Iterator[None]:
    """An error made on purpose, with that message."""
    with pytest.raises((CalipersError, ValueError), match=message) as found:
        yield
    assert type(found.value) is ValueError or isinstance(found.value, CalipersError)
    text = str(found.value)
    assert len(text) > 20
    assert not text.startswith(("Expected", "mat1", "Target"))


@each_function
@pytest.mark.parametrize(("y", "message"), LABELS.values(), ids=LABELS)
def test_labels(function: Function, y: Any, message: str) -> None:
    with named(message):
        function(X, y, THREAT)


@each_function
@pytest.mark.parametrize(("x", "message"), INPUTS.values(), ids=INPUTS)
def test_inputs(function: Function, x: Any, message: str) -> None:
    with named(message):
        function(x, Y, THREAT)


@pytest.mark.parametrize(("eps", "message"), RADII.values(), ids=RADII)
def test_radii(eps: Any, message: str) -> None:
    with named(message):
        cp.ThreatModel(2 if isinstance(eps, Tensor) else math.inf, eps)


@pytest.mark.parametrize("p", [0, 3, -1, math.nan, "linf", None])
def test_norms(p: Any) -> None:
    with named("p: .* is not one of 1, 2, inf"):
        cp.ThreatModel(p, 0.1)


NUMPY: dict[str, tuple[Any, Any]] = {
    "arrays": (X.numpy(), Y.numpy()),
    "lists": (X.tolist(), Y.tolist()),
    "an array of inputs": (X.numpy(), Y),
}


@pytest.mark.parametrize(
    "name", [n for n in FUNCTIONS if n not in ("audit", "empirical", "explain")]
)
@pytest.mark.parametrize(("x", "y"), NUMPY.values(), ids=NUMPY)
def test_what_is_no_tensor_is_named_with_the_remedy(name: str, x: Any, y: Any) -> None:
    with named("x: (ndarray|list), not a tensor; convert it with torch.as_tensor"):
        FUNCTIONS[name](x, y, THREAT)


@pytest.mark.parametrize("name", ["audit", "empirical", "explain"])
@pytest.mark.parametrize(("x", "y"), NUMPY.values(), ids=NUMPY)
def test_data_sets_may_be_arrays(name: str, x: Any, y: Any) -> None:
    FUNCTIONS[name](x, y, THREAT)


@each_function
def test_a_radius_of_0_is_the_clean_result(function: Function) -> None:
    wrong = (Y + 1) % K
    for y, share in ((Y, 1.0), (wrong, 0.0)):
        found = function(X, y, cp.ThreatModel(math.inf, 0.0))
        if isinstance(found, Tensor) and found.shape == X.shape:
            assert torch.equal(found, X)
        elif hasattr(found, "clean_accuracy"):
            assert found.clean_accuracy == share
            assert getattr(found, "empirical", getattr(found, "accuracy", None)) == share


@each_function
def test_labels_of_any_integer_type(function: Function) -> None:
    for dtype in (torch.int32, torch.uint8, torch.int16):
        function(X, Y.to(dtype), THREAT)


@pytest.mark.parametrize("name", [n for n in FUNCTIONS if n not in ("bound", "interval")])
def test_another_precision_than_the_model_s(name: str) -> None:
    """Data of an audit are converted; an attack would have to guess in which precision to answer."""
    if name in MEASURING:
        FUNCTIONS[name](X.double(), Y, THREAT)
    else:
        with named(r"model: does not take torch\.float64"):
            FUNCTIONS[name](X.double(), Y, THREAT)


@pytest.mark.parametrize("name", ATTACKING)
def test_no_examples_give_no_points(name: str) -> None:
    found = FUNCTIONS[name](X[:0], Y[:0], THREAT)
    assert isinstance(found, Tensor)
    assert found.shape == (0, *SHAPE)


@pytest.mark.parametrize("name", ["empirical", "audit", "verify", "explain"])
def test_nothing_to_measure_is_named(name: str) -> None:
    with named("empty|no examples"):
        FUNCTIONS[name](X[:0], Y[:0], THREAT)


# -- options ---------------------------------------------------------------------------------------------


OPTIONS: dict[str, tuple[Callable[[], object], str]] = {
    **{
        f"{name}: {option}={value}": (
            partial(cp.attack, NET, X, Y, THREAT, method=partial(ATTACKS[name], **{option: value})),
            message,
        )
        for name, option, value, message in (
            ("pgd", "steps", 0, "steps: 0"),
            ("pgd", "steps", -1, "steps: -1"),
            ("pgd", "restarts", 0, "restarts: 0"),
            ("pgd", "step_size", 0.0, r"step_size: 0\.0"),
            ("pgd", "step_size", math.nan, "step_size: nan"),
            ("pgd", "loss", "hinge", "hinge"),
            ("pgd", "direction", "up", "up"),
            ("apgd", "steps", 0, "steps: 0"),
            ("apgd", "restarts", 0, "restarts: 0"),
            ("square", "queries", 0, "queries: 0"),
            ("square", "p_init", 0.0, r"p_init: 0\.0"),
            ("auto", "level", "easy", "easy"),
            ("auto", "rows", 0, "rows: 0"),
        )
    },
    "audit: samples": (lambda: cp.audit(NETWORK, (X, Y), THREAT, samples=99), "samples: 99"),
    "audit: seconds": (lambda: cp.audit(NETWORK, (X, Y), THREAT, seconds=0), "seconds: 0"),
    "audit: chunk": (lambda: cp.audit(NETWORK, (X, Y), THREAT, chunk=0), "chunk: 0"),
    "audit: workers": (lambda: cp.audit(NETWORK, (X, Y), THREAT, workers=0), "workers: 0"),
    "audit: memory": (lambda: cp.audit(NETWORK, (X, Y), THREAT, memory="lots"), "memory: 'lots'"),
    "audit: precision": (lambda: cp.audit(NETWORK, (X, Y), THREAT, precision=2), "precision: 2"),
    "verify: seconds": (lambda: cp.verify(NETWORK, X, Y, THREAT, seconds=0), "seconds: 0"),
    "bound: no network": (lambda: cp.bound(NET, X, Y, THREAT), "capture"),  # type: ignore[arg-type]
    "verify: no network": (lambda: cp.verify(NET, X, Y, THREAT), "capture"),  # type: ignore[arg-type]
    "explain: index": (lambda: cp.explain(NETWORK, (X, Y), THREAT, index=99), "index: 99"),
}


@pytest.mark.parametrize(("call", "message"), OPTIONS.values(), ids=OPTIONS)
def test_options_out_of_range(call: Callable[[], object], message: str) -> None:
    with named(message):
        call()


# -- models ----------------------------------------------------------------------------------------------


class Wrong(nn.Module):
    """The classifier with its outputs changed."""

    def __init__(self, change: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.net, self.change = classifier(), change

    def forward(self, x: Tensor) -> Any:
        return self.change(self.net(x))


MODELS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "NaN": (lambda y: y * math.nan, "outputs: NaN or infinite on 8 of 8 examples"),
    "NaN for some": (
        lambda y: torch.where(y[:, :1] > y[:, :1].mean(), math.nan, y), r"NaN or infinite on \d of 8",
    ),
    "infinite": (lambda y: y / 0, "outputs: NaN or infinite"),
    "probabilities": (lambda y: y.softmax(1), "all 8 rows lie in .0, 1. and sum to 1.*Return logits"),
    "one logit": (lambda y: y[:, :1], r"one logit z for two classes.*torch\.cat"),
    "a tuple": (lambda y: (y, y), "returns tuple, not a tensor"),
    "a dict": (lambda y: {"logits": y}, "returns dict, not a tensor"),
    "nothing": (lambda y: None, "returns NoneType, not a tensor"),
    "classes": (lambda y: y.argmax(1), r"outputs have shape \(8,\)"),
    "classes as rows": (lambda y: (y > 0).long(), "torch.int64"),
    "one row for all": (lambda y: y.sum(0, keepdim=True), r"shape \(1, 4\)"),
    "a number": (lambda y: y.sum(), r"outputs have shape \(\)"),
    "images": (lambda y: y.unsqueeze(1), r"outputs have shape \(8, 1, 4\)"),
    "too few classes": (lambda y: y[:, :2], r"outside 0\.\.1"),
}  # fmt: skip


@pytest.mark.parametrize("name", [None, *ATTACKS])
@pytest.mark.parametrize(("change", "message"), MODELS.values(), ids=MODELS)
def test_models(name: str | None, change: Callable[[Tensor], Any], message: str) -> None:
    method = None if name is None else ATTACKS[name]
    with named(message):
        cp.attack(Wrong(change).eval(), X, Y, THREAT, method=method)


AUDITED = (
    "NaN",
    "infinite",
    "probabilities",
    "one logit",
    "a tuple",
    "classes",
    "images",
    "too few classes",
)


@pytest.mark.parametrize("name", AUDITED)
def test_models_are_refused_by_audits_too(name: str) -> None:
    for function in (cp.audit, empirical):
        with pytest.raises((CalipersError, ValueError)):
            function(Wrong(MODELS[name][0]).eval(), (X, Y), THREAT)


def test_probabilities_may_be_attacked_where_that_is_asked_for() -> None:
    model = Wrong(lambda y: y.softmax(1))
    points = cp.attack(model, X, Y, THREAT, allow_softmax=True)
    assert THREAT.around(X).contains(points).all()


def test_one_logit_with_the_remedy_is_a_binary_model() -> None:
    def two(y: Tensor) -> Tensor:
        return torch.cat([-y[:, :1], y[:, :1]], 1) / 2

    model = Wrong(two).eval()
    with torch.no_grad():
        z = NET(X)[:, 0]
        y = model(X).argmax(1)
    assert torch.equal(y, (z > 0).long())
    result = cp.audit(model, (X, y), THREAT, cascade=STAGES)
    assert 0 <= result.certified <= result.empirical <= result.clean_accuracy == 1
    torch.testing.assert_close(
        result.margins.float(), z.abs()
    )  # the margin is |z|: eps means what it did


def test_a_failure_of_the_model_itself_stays_in_the_message() -> None:
    def model(x: Tensor) -> Tensor:
        raise RuntimeError("the cat sat on the keyboard")

    with pytest.raises(ModelError, match=r"shape \(1, 5, 5\).*the cat sat") as found:
        cp.attack(model, X, Y, THREAT)
    assert isinstance(found.value.__cause__, RuntimeError)


# -- counts that differ ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("count", [1, COUNT - 1, COUNT + 1, 2 * COUNT])
def test_specifications_of_another_number_of_examples(name: str, count: int) -> None:
    """One specification would broadcast to all examples."""
    region = THREAT.around(X)
    spec = cp.Spec.label(Y.repeat(2)[:count], K)
    seeds = torch.arange(COUNT)
    with named(rf"spec: {count} specifications for {COUNT} examples"):
        ATTACKS[name](NET, region, spec, seeds=seeds)


@pytest.mark.parametrize("count", [1, COUNT - 1, 2 * COUNT])
def test_bounds_witnesses_and_distances_too(count: int) -> None:
    region = THREAT.around(X)
    spec = cp.Spec.label(Y.repeat(2)[:count], K)
    calls: tuple[Callable[[], object], ...] = (
        lambda: cp.witness(NET, region, spec, X),
        lambda: cp.fmn(NET, X, spec, p=math.inf),
        lambda: cp.ddn(NET, X, spec),
        lambda: cp.closest(NET, X, spec, p=math.inf),
        lambda: cp.diagnose(NET, region, spec),
        *(lambda f=f: f(NETWORK, region, spec) for f in (cp.interval, cp.crown, cp.crown_ibp)),  # type: ignore[misc]
    )
    for call in calls:
        with named(f"{count}.*{COUNT}"):
            call()


@pytest.mark.parametrize("name", ["auto", "square"])
def test_seeds_of_another_number_of_examples(name: str) -> None:
    with named("seeds: "):
        ATTACKS[name](NET, THREAT.around(X), cp.Spec.label(Y, K), seeds=torch.arange(3))


# -- files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (X, np.full(COUNT, -1), "outside"),
        (X, Y.double(), "integers"),
        (X, Y[:3], "expected one class number per example"),
        (3 * X, Y, "outside the input domain"),
        ((255 * X).byte(), Y, "store floats"),
        (with_nan(), Y, "NaN"),
        (X[:0], Y[:0], "empty"),
        (np.array([{"a": 1}] * COUNT), Y, "pickled objects"),
        (np.full((COUNT, 2), "a"), Y, "expected numbers"),
        (X + 1j, Y, "expected numbers"),
    ],
)
def test_files_of_data(tmp_path: Any, x: Any, y: Any, message: str) -> None:
    from calipers.data import load

    np.savez(tmp_path / "data.npz", x=np.asarray(x), y=np.asarray(y))
    with pytest.raises(DataError, match=message):
        load(str(tmp_path / "data.npz"))
