"""Recipes by name, their settings as texts, and the commands that train, compare and sweep."""

import json
from pathlib import Path

import pytest
import torch

import calipers
from calipers.bounds import interval
from calipers.data import checked, load
from calipers.errors import TrainingError
from calipers.recipes import RECIPES, build, catalogue, markdown, value
from calipers.training import train


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_builds_and_is_described(name):
    run = RECIPES[name]()
    assert run.name.startswith(name.removesuffix("_collapse"))
    assert run.describe() == RECIPES[name]().describe()
    assert run.seed == 0
    assert RECIPES[name](seed=3).seed == 3
    assert run.device == ("gpu" if name.startswith("cifar10") else "cpu")
    row = next(r for r in catalogue() if r.name == name)
    assert row.about.endswith(".")
    assert getattr(calipers.recipes, name) is RECIPES[name]


HEAD = """# Recipes

`calipers train NAME`, or `calipers.train(calipers.recipes.NAME())`. Times and accuracies were measured with seed 0,
unless a source is named; `calipers train --list` prints the same.

"""
LARGE = "cifar10_linf_2_255_mtl_ibp"  # one of the four on this network: a step takes seconds


@pytest.mark.parametrize("name", [n for n in RECIPES if n == LARGE or not n.startswith("cifar10")])
def test_every_recipe_takes_a_step(name):
    """On random images; what is asserted is that objective, network, schedules and knobs fit."""
    run = RECIPES[name]()
    shape = {"digits": (1, 8, 8), "mnist": (1, 28, 28), "cifar10": (3, 32, 32)}[run.data]
    count = 4 if run.data == "cifar10" else 12
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(count, *shape, generator=generator)
    few = checked(x, torch.arange(count) % 10, name="few", classes=tuple("0123456789"))
    settings = {"validation": "0", "select": "none", "batch": str(count), "epochs": "1"}
    result = train(build(name, settings), data=(few, None), anyway=True)
    assert result.history[0]["loss"] > 0
    assert result.test is None


def test_settings_are_texts_of_the_recipe_or_the_run():
    run = build("digits_pgd", {"epochs": "3", "steps": "2", "ema": "0.99", "clip": "none"})
    assert (run.epochs, run.ema, run.clip) == (3, 0.99, None)
    assert run.objective.keywords["steps"] == 2
    assert build("tutorial_ibp", {"schedule": "false"}).eps(0.0) == 0.1
    assert build("tutorial_ibp").eps(0.0) == 0.0
    for settings, message in (
        ({"epoch": "3"}, "Did you mean 'epochs'"),
        ({"epochs": "many"}, "epochs: cannot read 'many'; expected int"),
        ({"ema": "x"}, "expected float or none"),
        ({"epochs": "0"}, "not at least 1"),
        ({"eps": "0.1"}, "unknown name 'eps'"),
    ):
        with pytest.raises(ValueError, match=message):
            build("digits_pgd", settings)
    with pytest.raises(ValueError, match="Did you mean 'digits_pgd'"):
        build("digit_pgd")
    with pytest.raises(ValueError, match="Known: medium, small, stretch"):
        build("mnist_linf_0p1_ibp", {"network": "large"})
    assert value("a", "1e-3", float) == 1e-3
    assert value("a", "yes", bool) is True
    with pytest.raises(AttributeError, match="no attribute 'x'"):
        calipers.recipes.x  # noqa: B018


def test_the_documented_catalogue_is_the_recipes_own():
    """To write it anew: Path("docs/recipes.md").write_text(HEAD + markdown())."""
    docs = Path(__file__).resolve().parents[1] / "docs" / "recipes.md"
    assert docs.read_text() == HEAD + markdown()


def test_the_tutorials_schedule_epoch_by_epoch():
    eps = build("tutorial_ibp").eps
    published = [0.0, 0.0001, 0.001, 0.01, 0.01, 0.05, 0.05, 0.05, 0.05, 0.05, *[0.1] * 15]
    assert [eps(e + d) for e in range(25) for d in (0.0, 0.999)] == [
        v for v in published for _ in range(2)
    ]
    lr = build("tutorial_pgd").lr
    assert [lr(e) for e in (0, 4.99, 5, 9)] == pytest.approx([0.1, 0.1, 0.01, 0.01])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_recipe_says_how_long_it_would_take():
    with pytest.raises(TrainingError, match=r"needs a GPU.*about \d+ days.*--anyway"):
        train(build("cifar10_linf_8_255_ibp"))


def test_train_compare_and_sweep(run, tmp_path):
    code, out, err = run("train", "digits_ibp", "--set", "epochs=6", "--run", tmp_path / "a",
                         "--json", tmp_path / "a.json")  # fmt: skip
    assert code == 0
    assert "certified %" in out
    assert "model.onnx" in out
    assert "epoch 6 of 6" in err
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["run"]["epochs"] == 6
    code, out, err = run("train", "digits_ibp", "--set", "epochs=7", "--run", tmp_path / "a")
    assert code == 2
    assert "epochs: stored 6, now 7" in err
    code, out, err = run("train", "digits_ibp", "--set", "epochs=6", "--run", tmp_path / "a")
    assert code == 0
    assert "goes on at epoch 6.00" in err
    code, out, _ = run("sweep", "digits_standard", "--vary", "seed=0,1", "--vary", "lr=0.001,0.01",
                       "--set", "epochs=1", "--run", tmp_path / "s")  # fmt: skip
    assert code == 0
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == [
        "seed=0_lr=0.001", "seed=0_lr=0.01", "seed=1_lr=0.001", "seed=1_lr=0.01",
    ]  # fmt: skip
    code, out, _ = run("sweep", "digits_standard", "--vary", "seed+batch=0+500,1+600", "--set", "epochs=1",
                       "--run", tmp_path / "t")  # fmt: skip
    assert code == 0
    assert sorted(p.name for p in (tmp_path / "t").iterdir()) == [
        "seed=0_batch=500", "seed=1_batch=600",
    ]  # fmt: skip
    code, out, _ = run("compare", tmp_path / "a", tmp_path / "s" / "seed=0_lr=0.01")
    assert code == 0
    assert "objective:" in out
    code, _, err = run("compare", tmp_path / "a", tmp_path / "nothing")
    assert code == 2
    assert "no training there" in err
    (tmp_path / "a" / "result.json").write_text("{}")
    assert "not the result of a training" in run("compare", tmp_path / "a")[2]


def test_ctrl_c_ends_with_a_checkpoint_and_says_how_to_go_on(run, tmp_path, monkeypatch):
    def pressed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("calipers.training.loop.step", pressed)
    code, _, err = run("train", "digits_standard", "--run", tmp_path)
    assert code == 130
    assert "the same command goes on" in err
    code, _, err = run("sweep", "digits_standard", "--vary", "seed=0", "--run", tmp_path / "s")
    assert code == 130


def test_the_catalogue_and_bad_arguments(run, tmp_path):
    code, out, _ = run("train", "--list")
    assert code == 0
    assert all(name in out for name in RECIPES)
    for arguments, message in (
        (("train",), "--list"),
        (("train", "digits_pg"), "Did you mean"),
        (("train", "digits_pgd", "--set", "epochs"), "key=value"),
        (("train", "digits_pgd", "--set", "epochs=1", "--set", "epochs=2"), "given twice"),
        (("train", "mnist_linf_0p1_ibp", "--data-dir", tmp_path), "no train-images"),
        (("train", "digits_pgd", "--json", tmp_path / "no" / "f"), "does not exist"),
        (("sweep", "digits_pgd", "--vary", "seed=0,x", "--run", tmp_path), "cannot read 'x'"),
        (("sweep", "digits_pgd", "--vary", "seed+lr=0+1,2", "--run", tmp_path), "needs 2 values"),
        (
            ("sweep", "digits_pgd", "--vary", "seed+lr=0+1", "--vary", "lr=1", "--run", tmp_path),
            "lr is given twice",
        ),
    ):
        code, _, err = run(*arguments)
        assert code == 2
        assert message in err
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def certified():
    """Interval training on the digits, and its test examples."""
    return train(build("digits_ibp", {"epochs": "24"})), load("digits")


def test_each_kind_of_recipe_gives_what_it_promises(certified):
    """Adversarial training resists more than standard training, certified training proves more than either."""
    standard, robust = (
        train(build(name, {"epochs": "6"})).test for name in ("digits_standard", "digits_free")
    )
    proved = certified[0].test
    assert standard.clean > 460
    assert robust.attacked > standard.attacked + 50
    assert proved.proved > robust.proved + 20
    for test in (standard, robust, proved):
        assert test.proved <= test.attacked <= test.clean


def test_the_training_and_the_audit_agree(certified):
    result, test = certified
    threat = result.run.threat
    margins = calipers.bound(result.network, test.x, test.y, threat, method=interval)
    assert int((margins > 0).all(1).sum()) == result.test.certified["interval"]
    low, high = calipers.audit(result.network, test, threat).bracket.accuracy()
    assert result.test.proved / 500 <= low
    assert high <= result.test.attacked / 500
