import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import calipers
from calipers.attacks import pgd
from calipers.bounds import crown, interval
from calipers.data import checked, load
from calipers.errors import DataError, ModelError, StoreMismatch, TrainingError
from calipers.models import load_model, load_weights
from calipers.sets import ThreatModel
from calipers.training import Trained, checkpoints, loop, train
from calipers.training.augment import crop
from calipers.training.logs import read
from calipers.training.schedules import constant, linear, piecewise
from training_runs import bounded, dropout_net, fgsm, noisy, small, standard

ROOT = Path(__file__).resolve().parents[1]
EVERYTHING = {
    "model": dropout_net,
    "objective": noisy,
    "epochs": 2,
    "ema": 0.9,
    "awp": 0.01,
    "l1": 1e-5,
    "clip": 1.0,
    "accumulate": 2,
    "augment": partial(crop, padding=1),
    "validation": 200,
    "select": "clean",
    "lr": linear(1e-2, 1e-3, end=2),
}


def weights(result: Trained) -> dict[str, torch.Tensor]:
    return dict(result.network.module.state_dict())


def same(a: Trained, b: Trained) -> bool:
    return all(torch.equal(v, weights(b)[k]) for k, v in weights(a).items())


def test_a_training_learns_and_writes_down_what_it_did(tmp_path):
    run = small(epochs=8, validation=200, select="clean", attack=partial(pgd, steps=5))
    result = calipers.train(run, directory=tmp_path)
    assert result.test.n == 500
    assert result.test.clean > 450
    assert result.test.proved <= result.test.attacked <= result.test.clean
    assert result.test.unknown == result.test.attacked - result.test.proved
    assert [r["epoch"] for r in result.history] == list(range(1, 9))
    best = max(r["valid_clean"] for r in result.history)
    assert result.history[result.epoch - 1]["valid_clean"] == best
    stored = load_weights(tmp_path / "model.safetensors")
    assert all(torch.equal(v, stored[k]) for k, v in weights(result).items())
    network = load_model(str(tmp_path / "model.onnx"))
    test = load("digits")
    assert int((network(test.x).argmax(1) == test.y).sum()) == result.test.clean
    record = json.loads((tmp_path / "result.json").read_text())
    assert record["test"]["clean"] == result.test.clean
    assert len(read(tmp_path / "log.jsonl")) == 8
    assert "mlp(64, 32, 10)" in json.loads((tmp_path / "run.json").read_text())["model"]
    assert not result.network.module.training


def test_everything_follows_from_the_run_and_its_seed():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = train(small(**EVERYTHING))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    torch.rand(3)
    assert same(first, train(small(**EVERYTHING)))
    assert not same(first, train(small(**EVERYTHING, seed=1)))


@pytest.mark.parametrize("stop", [1, 10, 13])
def test_resumed_is_uninterrupted(tmp_path, monkeypatch, stop):
    """Killed in the middle of an epoch and at its end, with everything that has a state switched on."""
    run = small(**EVERYTHING)
    whole = train(run)
    monkeypatch.setattr(loop, "SAVE_EVERY", 0.0)

    def killed(status):
        if status.phase == "train" and status.done == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(run, directory=tmp_path, progress=killed)
    said = []
    again = train(run, directory=tmp_path, progress=said.append)
    assert same(whole, again)
    assert again.epoch == whole.epoch
    assert [r["valid_clean"] for r in again.history] == [r["valid_clean"] for r in whole.history]
    assert [r["loss"] for r in again.history] == pytest.approx([r["loss"] for r in whole.history])
    if stop > 1:
        assert "goes on at epoch" in said[0].message
    assert len(read(tmp_path / "log.jsonl")) == 2
    third = train(run, directory=tmp_path)  # finished: nothing is trained or measured again
    assert same(whole, third)
    assert third.test == again.test


CHILD = """
import sys, time, torch
torch.set_num_threads(1)
from training_runs import small
from calipers.training import train
from test_training import LONG
def show(s):
    if s.phase == "train" and s.done == 8 * 3 + 5:
        print("now", flush=True)
        time.sleep(60)
train(small(**LONG), directory=sys.argv[1], progress=show)
"""
LONG = EVERYTHING | {"epochs": 6}


def test_kill_9_in_the_middle_of_an_epoch(tmp_path):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT / 'tests'}"}
    arguments = [sys.executable, "-c", CHILD, str(tmp_path)]
    with subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "now\n"
        child.send_signal(signal.SIGKILL)
        assert child.wait(60) == -signal.SIGKILL
    assert not (tmp_path / "result.json").exists()
    assert len(read(tmp_path / "log.jsonl")) == 3
    assert same(train(small(**LONG)), train(small(**LONG), directory=tmp_path))
    assert [r["epoch"] for r in read(tmp_path / "log.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_another_training_in_the_directory_is_refused(tmp_path):
    train(small(), directory=tmp_path)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(StoreMismatch, match=r"epochs: stored 1, now 3.*seed: stored 0, now 4"):
        train(small(epochs=3, seed=4), directory=tmp_path)
    with pytest.raises(
        StoreMismatch, match=r"model: stored .*mlp\(64, 32, 10\).*now .*dropout_net"
    ):
        train(small(model=dropout_net), directory=tmp_path)
    with pytest.raises(StoreMismatch, match=r"eps=0.05.*eps=0.1 "):
        train(small(threat=ThreatModel(float("inf"), "0.1")), directory=tmp_path)
    fewer = load("digits", split="train")
    fewer = checked(fewer.x[:600], fewer.y[:600], name="fewer")
    with pytest.raises(StoreMismatch, match="digest"):
        train(small(), directory=tmp_path, data=(fewer, None))
    with pytest.raises(TrainingError, match="holds a checkpoint"):
        train(small(), directory=tmp_path, resume=False)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"<html>", b"PK\x03\x04rubbish", None])
def test_a_damaged_checkpoint_is_refused(tmp_path, content):
    train(small(), directory=tmp_path)
    file = tmp_path / "checkpoint.pt"
    file.write_bytes(file.read_bytes()[:-200] if content is None else content)
    with pytest.raises(StoreMismatch, match="not a checkpoint that can be read"):
        train(small(), directory=tmp_path)


class Trap:
    def __reduce__(self):
        return (os.mkdir, ("trapped",))


def test_a_checkpoint_never_runs_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"identity": "{}", "state": {"module": Trap()}}, tmp_path / "checkpoint.pt")
    with pytest.raises(StoreMismatch, match="not a checkpoint"):
        checkpoints.load(tmp_path / "checkpoint.pt", {})
    assert not Path("trapped").exists()


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path):
    import resource

    file = tmp_path / "checkpoint.pt"
    checkpoints.save(file, {"a": 1}, {"w": torch.ones(10)})
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, old[1]))
        with pytest.raises(
            TrainingError, match=r"cannot be written.*previous checkpoint is intact"
        ):
            checkpoints.save(file, {"a": 1}, {"w": torch.ones(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert torch.equal(checkpoints.load(file, {"a": 1})["w"], torch.ones(10))
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_bad_data_are_refused_before_training():
    x = torch.rand(20, 1, 8, 8)
    y = torch.arange(20)
    with pytest.raises(DataError, match=r"labels go up to 19, but the model has 10 outputs"):
        train(small(), data=(checked(x, y, name="d"), None))
    wide = checked(3 * x, y % 10, name="d", upper=3.0)
    with pytest.raises(DataError, match="outside the input domain"):
        train(small(), data=(wide, None))
    with pytest.raises(DataError, match="leaves none to train on"):
        train(small(validation=20), data=(checked(x, y % 10, name="d"), None))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs: 0"),
        ({"clip": 0.0}, "clip: 0.0"),
        ({"ema": 1.0}, "ema: 1.0"),
        ({"select": "robust", "validation": 5}, "Known: attacked, certified, clean"),
        ({"select": "clean"}, "set validation"),
        ({"accumulate": 3}, "does not divide"),
        ({"replays": 2, "accumulate": 2}, "accumulate=1"),
        ({"device": "tpu"}, "cpu, gpu"),
        ({"l1": float("nan")}, "l1: nan"),
    ],
)
def test_bad_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        small(**change)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there():
    run = small(device="gpu", minutes=30.0, hardware="a large GPU")
    with pytest.raises(
        TrainingError, match=r"30 minutes on a large GPU.*about 0.0 hours.*--anyway"
    ):
        train(run)
    assert train(run, anyway=True).test.n == 500
    with pytest.raises(TrainingError, match=r"about \d+\.\d hours"):
        train(run, data=(load("digits"), None))


def exploding(network, x, y, threat, *, seeds):
    loss = standard(network, x, y, threat, seeds=seeds)
    return loss._replace(total=loss.total * (float("nan") if threat.eps > 0.04 else 1.0))


def test_a_step_that_is_not_finite_stops_with_advice(tmp_path):
    run = small(objective=exploding, epochs=3, eps=piecewise((0, 0.0), (2, 0.0), (2, 0.05)))
    with pytest.raises(TrainingError, match=r"loss is not finite at epoch 2.00.*Lower lr"):
        train(run, directory=tmp_path)
    assert len(read(tmp_path / "log.jsonl")) == 2


def test_accumulated_gradients_are_the_whole_batches():
    whole = train(small())
    parts, one_by_one = train(small(accumulate=4)), train(small(accumulate=128))
    for k, v in weights(whole).items():
        assert torch.allclose(v, weights(parts)[k], atol=1e-6), k
        assert torch.allclose(v, weights(one_by_one)[k], atol=1e-5), k


def test_without_perturbation_awp_is_plain_and_with_it_differs():
    plain, off, on = (train(small(awp=g)) for g in (0.0, 1e-30, 0.01))
    assert same(plain, off)
    assert not same(plain, on)


def collapse(network, x, y, threat, *, seeds):
    """An objective whose single-step accuracy is perfect while PGD's is not: from epoch one on labels are shifted."""
    loss = standard(network, x, (y + (threat.eps > 0.049)) % 10, threat, seeds=seeds)
    return loss._replace(measures={**loss.measures, "attacked": torch.ones(())})


def test_catastrophic_overfitting_rolls_back_and_changes(tmp_path, monkeypatch):
    rising = piecewise((0, 0.01), (3, 0.01), (3, 0.05))
    run = small(objective=collapse, fallback=fgsm, eps=rising, epochs=6)
    said = []
    result = train(run, directory=tmp_path, progress=said.append)
    assert [f.kind for f in result.findings] == ["overfitting"]
    assert "n_fgsm" in result.findings[0].message
    assert any("back to epoch 3" in s.message for s in said)
    assert [r["epoch"] for r in result.history] == [1, 2, 3, 4, 5, 6]
    assert result.test.clean > 400
    whole = weights(result)

    def killed(status):  # in the epoch that will have to be undone
        if status.phase == "train" and status.done == 10 * 3 + 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "SAVE_EVERY", 0.0)
    with pytest.raises(KeyboardInterrupt):
        train(run, directory=tmp_path / "again", progress=killed)
    again = weights(train(run, directory=tmp_path / "again"))
    assert all(torch.equal(v, again[k]) for k, v in whole.items())
    stuck = train(small(objective=collapse, eps=rising, epochs=6))
    assert stuck.test.clean < 100


def test_certified_training_selects_on_certified_validation_accuracy():
    run = small(
        objective=bounded, epochs=12, validation=200, select="certified", check=2,
        eps=piecewise((0, 0.0), (4, 0.05)), lr=constant(5e-3), bounds=(interval, crown),
    )  # fmt: skip
    result = train(run)
    measured = [r for r in result.history if "valid_certified" in r]
    assert [r["epoch"] for r in measured] == [2, 4, 6, 8, 10, 12]
    chosen = {r["epoch"]: r["valid_certified"] for r in measured if r["full"]}
    assert chosen[result.epoch] == max(chosen.values())
    assert result.test.certified["interval"] > 300
    assert result.test.certified["crown"] >= result.test.certified["interval"]
    assert 0 <= measured[-1]["unstable"] < 1


def test_the_monitors_certified_number_is_the_verifiers():
    result = train(small(objective=bounded, epochs=2))
    test = load("digits")
    network, threat = result.network, result.run.threat
    margins = calipers.bound(network, test.x, test.y, threat, method=interval)
    assert int((margins > 0).all(1).sum()) == result.test.certified["interval"]


def test_a_module_that_cannot_be_captured_says_so():
    class Odd(nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :10] * x.mean()

    with pytest.raises((ModelError, calipers.errors.CaptureError), match="batch"):
        train(small(model=Odd))


def test_runs_are_values():
    run = small()
    assert dataclasses.replace(run, epochs=5).epochs == 5
    assert run.describe() == small().describe()
    assert run.describe() != small(model=dropout_net).describe()
    assert time.perf_counter()
