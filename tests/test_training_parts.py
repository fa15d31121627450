import importlib
import json
import math
import platform
import subprocess
import sys

import pytest
import torch
from torch import nn

from calipers.attacks import pgd
from calipers.bounds import interval
from calipers.data import checked, load
from calipers.graph.capture import capture
from calipers.seeds import mixed
from calipers.sets import ThreatModel
from calipers.training import health
from calipers.training.augment import crop, flip, flip_and_crop
from calipers.training.examples import order, per_epoch, rows_of, seeds_of, split, stored
from calipers.training.logs import Log, read
from calipers.training.measures import measure, unstable
from calipers.training.weights import average, copied, holding, l1, perturbed
from calipers.zoo import mlp

# -- examples ----------------------------------------------------------------------------------------------------------


def test_images_of_bytes_are_kept_as_bytes_and_come_back_exactly():
    levels = torch.arange(256).reshape(4, 1, 8, 8)
    images = checked(levels.float() / 255, torch.arange(4), name="i")
    kept = stored(images, torch.tensor([0, 2, 3]), torch.device("cpu"))
    assert kept.stored.dtype == torch.uint8
    x, y = kept[torch.tensor([1, 2])]
    assert torch.equal(x, images.x[2:])
    assert y.tolist() == [2, 3]
    digits = load("digits")
    others = stored(digits, torch.arange(5), torch.device("cpu"))
    assert others.stored.dtype == torch.float32
    assert torch.equal(others[torch.arange(5)][0], digits.x[:5])


def test_the_split_is_disjoint_complete_and_always_the_same():
    rows, held = split(1000, 200)
    assert len(held) == 200
    assert sorted(torch.cat([rows, held]).tolist()) == list(range(1000))
    assert torch.equal(split(1000, 200)[1], held)
    assert len(split(10, 0)[1]) == 0


def test_every_epoch_sees_whole_batches_of_different_examples():
    count, batch = 103, 10
    assert per_epoch(count, batch) == 10
    epochs = []
    for epoch in range(3):
        steps = range(10 * epoch, 10 * epoch + 10)
        rows = torch.cat([rows_of(s, count=count, batch=batch, seed=0) for s in steps])
        assert len(set(rows.tolist())) == 100
        epochs.append(rows)
    assert not torch.equal(epochs[0], epochs[1])
    assert not torch.equal(order(count, 0, 0), order(count, 1, 0))
    assert len(rows_of(0, count=4, batch=10, seed=0)) == 4


def test_seeds_differ_by_example_step_and_seed():
    rows = torch.arange(50)
    seen = [seeds_of(rows, seed=s, step=t) for s in (0, 1) for t in (0, 1)]
    assert len(set(torch.cat(seen).tolist())) == 200
    assert torch.equal(seeds_of(rows[7:9], seed=1, step=1), seen[3][7:9])


# -- augmentation ------------------------------------------------------------------------------------------------------


def test_a_crop_is_a_window_of_the_image_padded_by_its_edge():
    x = torch.rand(200, 3, 6, 5)
    seeds = mixed(torch.arange(200), 3)
    found = crop(x, seeds=seeds, padding=2)
    padded = torch.nn.functional.pad(x, (2, 2, 2, 2), mode="replicate")
    shifts = set()
    for image, big in zip(found, padded, strict=True):
        windows = {(i, j): big[:, i : i + 6, j : j + 5] for i in range(5) for j in range(5)}
        match = [k for k, w in windows.items() if torch.equal(w, image)]
        assert match
        shifts.add(match[0])
    assert len(shifts) == 25
    assert torch.equal(crop(x, seeds=seeds, padding=0), x)
    with pytest.raises(ValueError, match="padding: -1"):
        crop(x, seeds=seeds, padding=-1)


def test_about_half_are_flipped_and_each_depends_on_its_seed_alone():
    x, seeds = torch.rand(400, 1, 4, 4), mixed(torch.arange(400), 9)
    turned = (flip(x, seeds=seeds) != x).flatten(1).any(1)
    assert 150 < int(turned.sum()) < 250
    both = flip_and_crop(x, seeds=seeds)
    assert torch.equal(both[37:41], flip_and_crop(x[37:41], seeds=seeds[37:41]))


# -- weights -----------------------------------------------------------------------------------------------------------


def net() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2)
    )


def test_l1_is_of_matrices_alone():
    module = net()
    expected = module[1].weight.abs().sum() + module[4].weight.abs().sum()
    assert torch.isclose(l1(module), expected)


def test_an_average_is_the_sum_of_its_past():
    module, values = net(), []
    mean = copied(module)
    first = mean["1.weight"].clone()
    for _ in range(3):
        with torch.no_grad():
            module[1].weight.normal_()
            module[2].running_mean.normal_()
        values.append(module[1].weight.detach().clone())
        average(mean, module, 0.8)
    expected = 0.8**3 * first + 0.2 * (0.64 * values[0] + 0.8 * values[1] + values[2])
    assert torch.allclose(mean["1.weight"], expected, atol=1e-6)
    assert torch.equal(mean["2.running_mean"], module[2].running_mean)
    with holding(module, mean):
        assert torch.equal(module[1].weight, mean["1.weight"])
    assert torch.equal(module[1].weight, values[2])


def test_weights_are_perturbed_by_gamma_of_their_norm_uphill_and_come_back():
    module = net().double()
    x, y = torch.rand(20, 4, dtype=torch.float64), torch.randint(2, (20,))

    def loss():
        return nn.functional.cross_entropy(module(x), y)

    before = copied(module)
    value = loss()
    value.backward()
    with perturbed(module, 0.01):
        moved = module[1].weight - before["1.weight"]
        assert torch.isclose(moved.norm(), 0.01 * before["1.weight"].norm())
        assert torch.equal(module[1].bias, before["1.bias"])
        assert loss() > value
    assert all(torch.equal(v, before[k]) for k, v in module.named_parameters())


# -- logs --------------------------------------------------------------------------------------------------------------


def test_a_log_drops_what_came_after_the_checkpoint_and_what_was_cut(tmp_path):
    log = Log(tmp_path)
    for step in (10, 20, 30):
        log.write({"step": step, "loss": math.nan if step == 20 else 0.5})
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 40, "lo')
    assert [r["step"] for r in read(tmp_path / "log.jsonl")] == [10, 20, 30]
    again = Log(tmp_path, step=20)
    again.write({"step": 25})
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [10, 20, 25]
    assert json.loads(lines[1])["loss"] == "nan"
    with pytest.raises(ValueError, match="directory"):
        Log(None, tensorboard=True)


def test_tensorboard_gets_the_numbers_and_its_absence_is_said(tmp_path, monkeypatch):
    seen = []

    class Writer:
        def __init__(self, folder):
            seen.append(folder)

        def add_scalar(self, *entry):
            seen.append(entry)

        def flush(self):
            pass

    def absent(name):
        raise ImportError(name)

    module = type("module", (), {"SummaryWriter": Writer})
    monkeypatch.setattr(importlib, "import_module", lambda name: module)
    Log(tmp_path, tensorboard=True).write({"step": 3, "loss": 0.5, "finding": "chance"})
    assert seen == [str(tmp_path / "tensorboard"), ("step", 3, 3), ("loss", 0.5, 3)]
    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(ValueError, match="pip install tensorboard"):
        Log(tmp_path, tensorboard=True)


# -- health ------------------------------------------------------------------------------------------------------------


def kinds(*records, full=True):
    return [f.kind for f in health.examine([{"full": True, **r} for r in records], 10, full=full)]


def test_the_monitor_sees_what_it_should():
    assert kinds({"clean": 0.112}, {"clean": 0.113}) == ["chance"]
    assert kinds({"loss": 2.301}, {"loss": 2.3026}) == ["chance"]  # bounds alone, no accuracy
    assert not kinds({"loss": 2.301}, {"loss": 1.9})
    assert kinds({"clean": 0.112}, {"clean": 0.5}) == []
    assert kinds({"clean": 0.1}) == []
    assert kinds({"clean": 0.1}, {"clean": 0.1, "step": 34}) == []
    good, bad = {"attacked": 0.6, "probe": 0.55}, {"attacked": 0.99, "probe": 0.01}
    assert kinds(good, bad) == ["overfitting"]
    assert kinds(good, {"attacked": 0.3, "probe": 0.3}) == []  # harder at a larger eps, for both
    assert kinds({"attacked": 0.99, "probe": 0.9}, {"attacked": 0.99, "probe": 0.85}) == []
    nothing = {"valid_certified": 0.0}
    assert kinds(nothing, nothing) == ["uncertified"]
    assert kinds(nothing, nothing, full=False) == []
    assert kinds(nothing, {}, nothing, {}) == ["uncertified"]  # measured every other epoch
    assert kinds(nothing, {"valid_certified": 0.2}) == []
    assert kinds(*({"unstable": u} for u in (0.1, 0.12, 0.2))) == ["unstable"]
    assert kinds(*({"unstable": u} for u in (0.01, 0.02, 0.04))) == []
    assert kinds(*({"unstable": u} for u in (0.2, 0.19, 0.22))) == []
    assert kinds() == []


def test_every_finding_says_what_to_change():
    records = [
        {
            "full": True,
            "clean": 0.1,
            "attacked": 1.0,
            "probe": p,
            "valid_certified": 0.0,
            "unstable": u,
        }
        for p, u in ((0.8, 0.1), (0.5, 0.2), (0.1, 0.4))
    ]
    found = health.examine(records, 10, full=True)
    assert len(found) == len(health.CHECKS)
    for finding in found:
        assert any(word in finding.message for word in ("lr", "n_fgsm", "eps rise"))
    assert "gradient" in health.not_finite(1.5, 0.3, math.nan)
    assert "loss" in health.not_finite(1.5, math.inf, math.nan)


# -- measures ----------------------------------------------------------------------------------------------------------


def test_measures_are_nested_and_agree_with_the_methods_themselves():
    data = load("digits")
    module = mlp(64, 16, 10)
    network = capture(module, data.x[:2])
    x, y, threat = data.x[:60], data.y[:60], ThreatModel(math.inf, "0.01")
    optimiser = torch.optim.Adam(module.parameters(), 1e-2)
    for _ in range(30):
        optimiser.zero_grad()
        nn.functional.cross_entropy(module(x), y).backward()
        optimiser.step()
    module.train()
    found = measure(network, x, y, threat, bounds=(interval,), attack=pgd)
    assert module.training
    assert found.clean == int((module(x).argmax(1) == y).sum())
    assert 0 < found.proved <= found.attacked <= found.clean
    assert found.shares()["certified"] == found.proved / 60
    quick = measure(network, x, y, threat, attack=pgd, final=False)
    assert quick.attacked == found.attacked
    assert 0 < unstable(network, x, threat) < unstable(network, x, ThreatModel(math.inf, "0.1")) < 1
    assert unstable(network, x, ThreatModel(math.inf, 0.0)) == 0
    assert measure(network, x, y, threat).json()["attacked"] is None


# -- memory ------------------------------------------------------------------------------------------------------------

KEPT = """
import resource, torch
from calipers.training.allocation import keep_freed_memory

keep_freed_memory()
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        held = [torch.ones(1 << 21) for _ in range(4)]
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_what_a_step_frees_is_there_for_the_next():
    """Twenty tensors of 8 MB: 40,960 pages where freed memory goes back to the system."""
    done = subprocess.run([sys.executable, "-c", KEPT], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 400
