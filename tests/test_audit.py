import math
import random
import time
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from scipy.stats import beta
from torch import nn

import calipers as cp
from calipers import ThreatModel, audit, explain
from calipers.bracket import Verdict
from calipers.confidence import clopper_pearson
from calipers.data import load
from calipers.describe import describe
from calipers.errors import DataError, ModelError, SoundnessError, UnsupportedOp
from calipers.evaluate.cascade import Stage, default_cascade, select
from calipers.models import load_model

THREAT = ThreatModel(math.inf, "0.1")


def digits(n=80):
    data = load("digits")
    return data.x[:n], data.y[:n]


def shown(renderable):
    console = Console(width=140, file=None, record=True, force_terminal=False)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


@pytest.fixture(scope="module")
def network():
    return load_model("digits_pgd")


@pytest.fixture(scope="module")
def result(network):
    return audit(network, digits(), THREAT)


# -- the fold -----------------------------------------------------------------------------------------------


def test_the_built_in_network_is_bracketed(result):
    assert 0.5 < result.certified <= result.empirical < result.clean_accuracy <= 1
    assert result.unknown == len(result) - sum(
        result.counts[v] for v in (Verdict.ROBUST, Verdict.VULNERABLE)
    )
    assert sum(r.decided for r in result.methods) == len(result) - result.unknown
    assert (result.bracket.lower <= result.bracket.upper + result.bracket.rounding).all()
    assert result.stopped is None
    assert not result.cut.any()


def test_each_stage_sees_only_what_is_open(result):
    open_rows = len(result)
    *stages, complete = result.methods
    assert complete.note == "not tried: needs a time limit"
    for row in stages:
        assert row.tried == open_rows
        open_rows -= row.decided
    assert open_rows == result.unknown


def test_witnesses_break_the_network(network, result):
    broken = torch.tensor([v is Verdict.VULNERABLE for v in result.verdicts])
    points = result.bracket.witness[broken]
    assert THREAT.around(result.x[broken]).contains(points).all()
    predicted = network(points).argmax(1)
    assert (predicted != result.y[broken]).all()
    assert torch.equal(predicted, result.adversarial[broken])


def test_clean_errors_are_broken_by_the_clean_stage(result):
    wrong = result.predictions != result.y
    assert wrong.any()
    for row in torch.nonzero(wrong).flatten().tolist():
        assert result.verdicts[row] is Verdict.VULNERABLE
        assert result.reason(row) == "broken by clean"
        assert torch.equal(result.bracket.witness[row], result.x[row])


def test_chunks_do_not_matter(network, result):
    for chunk in (1, 33):
        other = audit(network, digits(), THREAT, chunk=chunk)
        assert other.verdicts == result.verdicts
        assert torch.allclose(other.bracket.lower, result.bracket.lower, rtol=1e-9, atol=1e-9)


def test_the_order_of_examples_does_not_matter(network, result):
    order = torch.randperm(80, generator=torch.Generator().manual_seed(1))
    x, y = digits()
    other = audit(network, (x[order], y[order]), THREAT)
    assert list(other.verdicts) == [result.verdicts[i] for i in order.tolist()]


def test_a_module_and_its_state_are_left_alone():
    module = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 20), nn.Dropout(0.5), nn.ReLU(), nn.Linear(20, 10)
    )
    module[3].eval()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    modes = [m.training for m in module.modules()]
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = audit(module, digits(20), THREAT, cascade=select(["clean", "interval", "fgsm"]))
    assert [m.training for m in module.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in module.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    second = audit(module, digits(20), THREAT, cascade=select(["clean", "interval", "fgsm"]))
    assert first.verdicts == second.verdicts


def test_zero_radius_is_clean_accuracy(network):
    still = audit(network, digits(), ThreatModel(math.inf, 0))
    assert still.certified == still.empirical == still.clean_accuracy


def test_a_larger_radius_never_helps(network):
    results = [audit(network, digits(40), ThreatModel(2, eps)) for eps in (0.1, 0.3, 0.9)]
    assert [r.certified for r in results] == sorted((r.certified for r in results), reverse=True)
    assert [r.empirical for r in results] == sorted((r.empirical for r in results), reverse=True)


# -- what goes wrong in a method is never a verdict -----------------------------------------------------------


def faulty(name, side, method):
    clean, *_ = select(["clean"])
    return (clean, Stage(name, side, method))


def constant(value):
    return lambda network, region, spec, **_: torch.full(spec.d.shape, value, dtype=torch.float64)


def raising(error):
    def method(*_, **__):
        raise error

    return method


def test_nan_bounds_prove_nothing(network):
    out = audit(network, digits(), THREAT, cascade=faulty("nan", "bound", constant(math.nan)))
    assert out.certified == 0


def test_an_unsound_bound_is_found_out(network):
    cascade = (Stage("bad", "bound", constant(1e-3)), *default_cascade())
    proved_all = audit(network, digits(), THREAT, cascade=cascade)
    assert (
        proved_all.certified == 1
    )  # alone it is believed; clean errors contradict it as soon as they are seen
    with pytest.raises(SoundnessError, match="bad"):
        audit(
            network,
            digits(),
            THREAT,
            cascade=(Stage("bad", "bound", constant(-1e-3)), *select(["clean"])),
        )


@pytest.mark.parametrize(
    ("error", "note"),
    [
        (UnsupportedOp(["sin in 'f'"], "Use another."), "skipped: unsupported: sin in 'f'"),
        (MemoryError(), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory"),
    ],
)
@pytest.mark.parametrize("side", ["bound", "attack"])
def test_failing_methods_leave_rows_unknown(network, error, note, side):
    out = audit(network, digits(), THREAT, cascade=faulty("f", side, raising(error)))
    assert note in out.methods[1].note
    assert out.methods[1].decided == 0
    assert out.certified == 0
    assert out.empirical == out.clean_accuracy
    assert note in shown(out.table())


def test_a_bug_is_not_swallowed(network):
    with pytest.raises(RuntimeError, match="shapes"):
        audit(
            network, digits(), THREAT, cascade=faulty("f", "bound", raising(RuntimeError("shapes")))
        )


@pytest.mark.parametrize(
    "points", [lambda r: r.center.float() + 0.5, lambda r: r.center.float() * math.nan]
)
def test_points_outside_the_set_break_nothing(network, points):
    cheat = faulty("cheat", "attack", lambda model, region, spec, **_: points(region))
    assert audit(network, digits(), THREAT, cascade=cheat).empirical > 0.9


def test_one_disagreeing_replica_stops_an_attack(network):
    x, y = digits()
    loyal = lambda z: network(x[(z.flatten(1)[:, None] - x.flatten(1)).abs().amax(2).argmin(1)])  # noqa: E731
    out = audit(network, (x, y), THREAT, replicas=[loyal])
    assert out.empirical == out.clean_accuracy


# -- limits ---------------------------------------------------------------------------------------------------


def slow(seconds):
    def method(network, region, spec, **_):
        time.sleep(seconds * len(region))
        return torch.full(spec.d.shape, -1.0, dtype=torch.float64)

    return method


def test_the_time_limit_holds_and_is_marked(network):
    begin = time.perf_counter()
    out = audit(network, digits(), THREAT, seconds=1.0, cascade=faulty("slow", "bound", slow(0.05)))
    assert time.perf_counter() - begin < 2.5
    assert out.stopped == "time"
    assert 0 < out.methods[1].tried < 79
    assert out.cut.sum() == len(out) - out.methods[1].tried - out.methods[0].decided
    row = int(torch.nonzero(out.cut)[0])
    assert out.reason(row).startswith("stopped by time")
    assert "stopped early (time)" in shown(out.table())


def test_ctrl_c_keeps_what_is_done(network):
    calls = []

    def progress(at):
        calls.append(at)
        if at.stage == "fgsm":
            raise KeyboardInterrupt

    out = audit(network, digits(), THREAT, progress=progress)
    assert out.stopped == "interrupted"
    assert [r.note for r in out.methods] == ["", "", "interrupted"] + ["not reached"] * 6
    assert out.methods[2].tried == 1
    assert out.clean_accuracy > out.empirical
    assert out.cut.sum() == out.unknown
    assert calls[-1].robust + calls[-1].vulnerable + calls[-1].unknown == 80


def test_arguments_out_of_range(network):
    for wrong in ({"seconds": 0}, {"samples": 0}, {"samples": 81}, {"chunk": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            audit(network, digits(), THREAT, **wrong)
    with pytest.raises(ValueError, match="Did you mean 'crown'"):
        select(["clean", "crwn"])
    with pytest.raises(ValueError, match="at least one"):
        select([])


# -- samples ---------------------------------------------------------------------------------------------------


def test_a_sample_has_confidence_intervals(network):
    out = audit(network, load("digits"), THREAT, samples=60, seed=3)
    assert (len(out), out.population, out.sampled) == (60, 500, True)
    assert torch.equal(load("digits").x[out.positions], out.x)
    low, high = out.confidence["certified"]
    assert low < out.certified < high
    assert "95 % interval" in shown(out.table())
    again = audit(network, load("digits"), THREAT, samples=60, seed=3)
    assert torch.equal(again.positions, out.positions)
    assert (
        audit(network, digits(), THREAT, samples=80, cascade=select(["clean"])).confidence is None
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 3000), st.floats(0, 1), st.sampled_from([0.9, 0.95, 0.99]))
def test_clopper_pearson_is_scipys(n, share, confidence):
    k, tail = round(share * n), (1 - confidence) / 2
    low, high = clopper_pearson(k, n, confidence)
    assert low == pytest.approx(beta.ppf(tail, k, n - k + 1) if k else 0, abs=1e-9)
    assert high == pytest.approx(beta.ppf(1 - tail, k + 1, n - k) if k < n else 1, abs=1e-9)


def test_clopper_pearson_covers():
    draws = random.Random(0)  # noqa: S311
    inside = 0
    for _ in range(400):
        k = sum(draws.random() < 0.3 for _ in range(50))
        low, high = clopper_pearson(k, 50)
        inside += low <= 0.3 <= high
    assert inside >= 0.95 * 400 - 10
    for k, n, confidence in ((3, 2, 0.9), (-1, 2, 0.9), (0, 0, 0.9), (1, 2, 1.0)):
        with pytest.raises(ValueError, match=r"successes|confidence"):
            clopper_pearson(k, n, confidence)


# -- checks before measuring -----------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self, change=None):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.change = change or (lambda y: y)

    def forward(self, x):
        return self.change(self.linear(x))


class Noisy(Net):
    def forward(self, x):
        return self.linear(x) + torch.rand_like(self.linear(x))


class Mixing(Net):
    def forward(self, x):
        y = self.linear(x)
        return y - y.mean(0)


def four(n=12):
    torch.manual_seed(0)
    return torch.rand(n, 4), torch.arange(n) % 3


def poisoned():
    net = Net()
    with torch.no_grad():
        net.linear.bias[1] = math.nan
    return net


@pytest.mark.parametrize(
    ("net", "data", "error", "message"),
    [
        (poisoned(), four(), ModelError, r"linear\.bias contain NaN"),
        (Net(lambda y: y.softmax(1)), four(), ModelError, "Return logits"),
        (Net(lambda y: y * 1e38 * 1e38), four(), ModelError, "outputs: NaN or infinite on 12 of 12"),
        (Net(), (four()[0], four()[1] + 1), DataError, r"outside 0\.\.2"),
        (Net(), (four()[0], four()[1] - 1), DataError, r"-1\.\.1 are outside"),
        (Net(), (four()[0][:0], four()[1][:0]), DataError, "empty"),
        (Net(), (four()[0] * 3, four()[1]), DataError, "outside the input domain"),
        (Net(), ((four()[0] * 255).to(torch.uint8), four()[1]), DataError, "/ 255"),
        (Net(), (four()[0] * math.nan, four()[1]), DataError, "NaN"),
        (Net(), (four()[0], four()[1].float()), DataError, "labels must be integers"),
    ],
)  # fmt: skip
def test_each_check_has_its_error(net, data, error, message):
    with pytest.raises(error, match=message):
        audit(net, data, THREAT)


def test_shapes_must_fit(network):
    with pytest.raises(DataError, match=r"the model takes \(1, 8, 8\)"):
        audit(network, four(), THREAT)


def test_log_softmax_and_logits_pass():
    stages = select(["clean", "interval"])
    audit(Net(), four(), THREAT, cascade=stages)


def test_softmax_can_be_allowed():
    out = audit(
        Net(lambda y: y.softmax(1)),
        four(),
        THREAT,
        allow_softmax=True,
        cascade=select(["clean", "fgsm"]),
    )
    assert "may be too high" in out.notes[0]
    assert "may be too high" in shown(out.table())


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Noisy(), "not deterministic"),
        (Mixing(), "mixes the examples"),
        (Net(lambda y: y + 1), "captured graph: outputs differ"),
    ],
)
def test_a_module_that_is_not_its_graph_is_refused(module, message):
    captured = cp.capture(Net(), torch.rand(2, 4))
    with pytest.raises(ModelError, match=message):
        audit(cp.Network(captured.graph, module, (4,)), four(), THREAT)


def test_a_replica_of_another_network_is_refused(network):
    with pytest.raises(ModelError, match="replica 1: outputs differ"):
        audit(network, digits(), THREAT, replicas=[lambda x: network(x) + 0.1])


def test_agreement_is_reported(result):
    assert result.differences["captured graph"] <= 1e-4
    assert result.differences["onnxruntime"] <= 1e-4
    assert not result.notes


# -- forms of the result ---------------------------------------------------------------------------------------


def test_json_and_table(result, network):
    out = result.json()
    assert out["n"] == out["population"] == 80
    assert out["clean_accuracy"] >= out["empirical_accuracy"] >= out["certified_accuracy"]
    assert out["unknown"] + out["robust"] + out["vulnerable"] == 80
    assert out["threat"] == {"norm": "linf", "eps": "0.1", "lower": 0.0, "upper": 1.0}
    assert [m["name"] for m in out["methods"]] == [s.name for s in default_cascade(network)]
    text = shown(result.table())
    for part in ("robust accuracy between", "certified accuracy", "auto", "crown_ibp"):
        assert part in text


def test_stages_describe_themselves():
    described = [stage.describe() for stage in default_cascade()]
    assert len(set(described)) == len(described)
    method = partial(partial(audit, seed=1, run="a"), seed=2)
    assert describe(method) == "calipers.evaluate.audit.audit(run='a', seed=2)"


# -- explain ---------------------------------------------------------------------------------------------------


def test_explain_nests(network):
    out = explain(network, digits(), THREAT, index=5)
    sides = [v.side for v in out.values]
    assert sides == ["bound"] * 4 + ["attack"] * 4
    margins = [v.margin for v in out.values]
    bounds, attacks = margins[:4], margins[4:]
    assert bounds == sorted(bounds)
    assert attacks == sorted(attacks)
    assert bounds[-1] <= attacks[0]
    assert out.bracket.lower.item() == bounds[-1]
    text = shown(out.table())
    assert "≤ minimal margin ≤" in text
    with pytest.raises(ValueError, match="index"):
        explain(network, digits(), THREAT, index=80)


def test_explain_names_what_is_skipped(network):
    stages = faulty("f", "bound", raising(UnsupportedOp(["sin"], "No.")))
    assert "skipped: unsupported: sin" in shown(
        explain(network, digits(), THREAT, cascade=stages).table()
    )


def test_under_a_time_limit_a_bound_that_decides_nothing_leaves_the_time_to_others():
    network, data = load_model("digits_pgd"), load("digits")
    clean, interval, *_ = select(["clean", "interval"])
    stages = (clean, Stage("never", "bound", constant(-9.0)), interval)
    threat = ThreatModel(math.inf, "0.02")
    out = audit(network, data, threat, cascade=stages, seconds=60, chunk=50)
    _, never, interval = out.methods
    assert 200 <= never.tried < 300
    assert "none of the" in never.note
    assert interval.tried > 450
    assert out.stopped is None
    assert not out.cut.any()
    untimed = audit(network, data, threat, cascade=stages)
    assert untimed.methods[1].tried == interval.tried
    assert untimed.certified == out.certified
