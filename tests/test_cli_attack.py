"""The commands attack, replay and transfer, run on the built-in digits."""

import json
import math
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

import calipers as cp
from calipers.attacks.diagnostics import CHECKS
from calipers.evaluate import load_witnesses
from calipers.models import load_model

CALIPERS = [sys.executable, "-c", "from calipers.cli import main; main()"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """What an attack on 60 digits has saved, and its JSON."""
    folder = tmp_path_factory.mktemp("saved")
    subprocess.run(
        [*CALIPERS, "attack", "--samples", "60", "--level", "quick", "--save", str(folder / "w"),
         "--json", str(folder / "a.json")],
        check=True, capture_output=True,
    )  # fmt: skip
    return folder


def test_attack_prints_both_accuracies_and_a_row_per_stage(run, tmp_path):
    code, out, err = run("attack", "--json", tmp_path / "a.json")
    assert code == 0
    assert "digits_pgd on digits/test, linf eps=0.1 in [0, 1]" in out
    assert "clean accuracy      98.00 %  490 of 500" in out
    assert "median passes" in out
    assert err.splitlines()[0].startswith("1: 10 steps: 490 tried;")
    result = json.loads((tmp_path / "a.json").read_text())
    assert result["n"] == 500
    assert result["clean_accuracy"] == 0.98
    assert 0.7 < result["empirical_accuracy"] < 0.86
    assert result["vulnerable"] == len(result["broken_examples"])
    assert result["vulnerable"] == sum(s["broken"] for s in result["stages"])
    assert result["stages"][0]["name"] == "clean"
    assert result["median_passes"] > 20
    assert result["stopped"] is None
    assert f"{500 - result['vulnerable']} of 500" in out


def test_attack_finds_what_the_same_search_finds(run, tmp_path):
    """The command adds nothing and loses nothing: broken are the clean errors and what `cp.attack` breaks."""
    assert run("attack", "--level", "quick", "--seed", 3, "--json", tmp_path / "a.json")[0] == 0
    from calipers.data import load

    data, net = load("digits"), load_model("digits_pgd")
    threat = cp.ThreatModel(math.inf, "0.1")
    points = cp.search(net, threat.around(data.x), cp.Spec.label(data.y, 10), level="quick").points
    bracket = cp.witness(net, threat.around(data.x), cp.Spec.label(data.y, 10), points)
    broken = torch.nonzero(bracket.upper <= 0).flatten().tolist()
    assert json.loads((tmp_path / "a.json").read_text())["broken_examples"] == broken


def test_a_single_attack_with_options(run, tmp_path):
    code, out, _ = run(
        "attack", "--method", "pgd", "--steps", 5, "--restarts", 2, "--samples", 80, "--norm", "l2",
        "--eps", "8/255", "--json", tmp_path / "a.json",
    )  # fmt: skip
    assert code == 0
    assert "pgd(restarts=2, steps=5)" in out
    assert "95 % interval" in out
    result = json.loads((tmp_path / "a.json").read_text())
    assert (result["n"], result["population"]) == (80, 500)
    assert result["threat"]["eps"] == "8/255"


def test_grid_and_mask(run, tmp_path):
    mask = np.zeros((1, 8, 8), bool)
    mask[:, 2:6, 2:6] = True
    np.save(tmp_path / "m.npy", mask)
    code, _, err = run(
        "attack", "--grid", "1/16", "--eps", "2/16", "--mask", tmp_path / "m.npy", "--samples", 50,
        "--level", "quick", "--save", tmp_path / "w",
    )  # fmt: skip
    assert code == 0, err
    found = load_witnesses(tmp_path / "w")
    assert len(found)
    assert torch.equal(found.x * 16, (found.x * 16).round())
    assert not ((found.x != found.clean) & ~torch.from_numpy(mask)).any()
    code, out, _ = run("replay", tmp_path / "w", "--network", "digits_pgd")
    assert code == 0
    assert f"{len(found)} strict" in out


def test_saved_files(saved):
    result = json.loads((saved / "a.json").read_text())
    found = load_witnesses(saved / "w" / "witnesses.npz")
    assert found.index.tolist() == result["broken_examples"]
    assert found.threat == cp.ThreatModel(math.inf, "0.1", 0.0, 1.0)
    assert (found.margin <= 0).all()
    assert (found.prediction != found.y).all()
    region, spec = found.threat.around(found.clean), cp.Spec.label(found.y, 10)
    assert (cp.witness(load_model("digits_pgd"), region, spec, found.x).upper <= 0).all()
    assert (saved / "w" / "witnesses.png").read_bytes().startswith(b"\x89PNG")
    texts = sorted((saved / "w" / "counterexamples").iterdir())
    assert [t.name for t in texts] == [f"example_{i:03}.txt" for i in found.index.tolist()]
    assert texts[0].read_text().startswith("sat\n((X_0 ")
    assert sorted(p.name for p in saved.iterdir()) == ["a.json", "w"]


def test_a_folder_in_use_is_refused(run, saved):
    before = sorted((saved / "w").iterdir())
    code, out, err = run("attack", "--save", saved / "w")
    assert (code, out) == (2, "")
    assert "not an empty folder" in err
    assert sorted((saved / "w").iterdir()) == before


def test_what_is_certified_costs_nothing(run, tmp_path):
    audit = run(
        "audit", "--samples", 100, "--methods", "crown_ibp", "--json", tmp_path / "audit.json"
    )
    assert audit[0] == 0
    common = ("attack", "--samples", 100, "--level", "quick")
    code, out, _ = run(
        *common, "--certified", tmp_path / "audit.json", "--json", tmp_path / "a.json"
    )
    assert code == 0
    proved = json.loads((tmp_path / "audit.json").read_text())["certified_examples"]
    result = json.loads((tmp_path / "a.json").read_text())
    assert result["certified"] == len(proved) > 0
    assert f"{len(proved)} known to be robust" in out
    assert run(*common, "--json", tmp_path / "b.json")[0] == 0
    assert (
        json.loads((tmp_path / "b.json").read_text())["broken_examples"]
        == result["broken_examples"]
    )
    for change, word in (
        (("--eps", "0.2"), "threat"),
        (("--seed", 1), "data"),
        (("digits_standard",), "model"),
    ):
        code, _, err = run(*common, *change, "--certified", tmp_path / "audit.json")
        assert code == 2
        assert f"{word}: " in err
    np.save(tmp_path / "all.npy", np.ones(500, bool))
    code, _, err = run(*common, "--certified", tmp_path / "all.npy")
    assert code == 2
    assert "misclassified" in err


def test_limits(run, tmp_path):
    code, out, _ = run("attack", "--level", "thorough", "--seconds", "0.000001")
    assert code == 0
    assert "stopped early (time)" in out
    code, out, _ = run("attack", "--passes", 30, "--samples", 60, "--json", tmp_path / "a.json")
    assert code == 0
    assert "the limit on passes ended the search early" in out
    assert json.loads((tmp_path / "a.json").read_text())["median_passes"] < 120


def test_ctrl_c_prints_and_saves_what_was_found(tmp_path):
    (tmp_path / "net.py").write_text(
        "import torch, time\nfrom torch import nn\nfrom calipers.zoo import mlp\n"
        "class Slow(nn.Sequential):\n"
        "    def forward(self, x):\n"
        "        if not torch.compiler.is_compiling() and x.requires_grad: time.sleep(0.05)\n"
        "        return super().forward(x)\n"
        "def make(): return Slow(*mlp(64, 10))\n"
    )
    process = subprocess.Popen(
        [*CALIPERS, "attack", f"{tmp_path / 'net.py'}:make", "--level", "thorough", "--norm", "l2",
         "--save", str(tmp_path / "w"), "--json", str(tmp_path / "a.json")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert "10 steps" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "stopped early (interrupted)" in out
    result = json.loads((tmp_path / "a.json").read_text())
    assert result["stopped"] == "interrupted"
    assert len(load_witnesses(tmp_path / "w")) == result["vulnerable"] > 0


# -- replay ----------------------------------------------------------------------------------------------


def test_replay_by_three_evaluations(run, saved, tmp_path):
    code, out, _ = run(
        "replay", saved / "w", "--network", "digits_pgd", "--data", "digits", "--json", tmp_path / "r.json"
    )  # fmt: skip
    assert code == 0
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["strict"] == result["n"] > 0
    assert set(result["replays"][0]["margins"]) == {"onnxruntime", "torch float32", "torch float64"}
    assert f"{result['n']} strict · 0 tolerant · 0 fails" in out


def test_replay_on_the_exported_network(run, saved, tmp_path):
    cp.save_onnx(load_model("digits_pgd"), tmp_path / "net.onnx")
    code, _, err = run("replay", saved / "w", "--network", tmp_path / "net.onnx")
    assert code == 2
    assert err.count("digest") == 2
    assert run("replay", saved / "w", "--network", tmp_path / "net.onnx", "--converted")[0] == 0


def test_replay_fails_where_a_witness_was_moved(run, saved, tmp_path):
    arrays = dict(np.load(saved / "w" / "witnesses.npz", allow_pickle=False))
    # the change of one pixel is enlarged, by a little more than the radius: tolerant, and by much more: fails
    moved = arrays["x"].copy()
    row = int((arrays["x"] != arrays["clean"]).reshape(len(moved), -1).any(1).argmax())
    pixel = np.unravel_index(np.abs(moved[row] - arrays["clean"][row]).argmax(), moved[row].shape)
    sign = np.sign(moved[row][pixel] - arrays["clean"][row][pixel])
    for factor, code, word in ((1 + 5e-5, 0, "1 tolerant"), (1.5, 1, "1 fails")):
        moved[row][pixel] = arrays["clean"][row][pixel] + sign * np.float32(0.1 * factor)
        np.savez(tmp_path / "moved.npz", **{**arrays, "x": moved})
        found = run(
            "replay",
            tmp_path / "moved.npz",
            "--network",
            "digits_pgd",
            "--json",
            tmp_path / "r.json",
        )
        assert found[0] == code
        assert word in found[1]
        replayed = json.loads((tmp_path / "r.json").read_text())["replays"][row]
        assert replayed["verdict"] == word.split()[1]
        assert "of the set's size outside of it" in replayed["reason"]
        (tmp_path / "r.json").unlink()


@pytest.fixture
def query(tmp_path):
    """A query and its network: y = (x, 2x) on [0, 1], unsafe where the second output exceeds 1.5."""
    linear = torch.nn.Linear(1, 2)
    linear.weight.data, linear.bias.data = torch.tensor([[1.0], [2.0]]), torch.zeros(2)
    cp.save_onnx(cp.capture(linear, torch.zeros(1, 1)), tmp_path / "net.onnx")
    (tmp_path / "q.vnnlib").write_text(
        "(declare-const X_0 Real)(declare-const Y_0 Real)(declare-const Y_1 Real)"
        "(assert (>= X_0 0.0))(assert (<= X_0 0.9))(assert (>= Y_1 1.5))"
    )
    return tmp_path


@pytest.mark.parametrize(
    ("x", "code", "word"),
    [
        ("0.8", 0, "strict"),
        ("0.75", 0, "strict"),
        ("0.9", 0, "strict"),  # float32(0.9) is below 0.9
        ("0.90005", 0, "tolerant"),
        ("0.902", 1, "fails"),
        ("0.5", 1, "fails"),
        ("0.749999", 1, "fails"),
    ],
)
def test_replay_of_a_counterexample_in_text(run, query, x, code, word):
    (query / "c.txt").write_text(f"sat\n((X_0 {x})\n (Y_0 7)\n (Y_1 7))\n")
    found = run(
        "replay", query / "c.txt", "--network", query / "net.onnx", "--property", query / "q.vnnlib",
        "--json", query / "r.json",
    )  # fmt: skip
    assert found[0] == code, found
    assert f"1 {word}" in found[1]
    assert json.loads((query / "r.json").read_text())[word] == 1


def test_a_bound_that_holds_only_as_rounded_is_tolerant(run, query):
    text = (query / "q.vnnlib").read_text().replace("<= X_0 0.9", "<= X_0 0.8")
    (query / "q.vnnlib").write_text(text)
    arguments = ("--network", query / "net.onnx", "--property", query / "q.vnnlib")
    for decimal, word in (("0.8", "1 strict"), ("0.80000001", "1 tolerant")):
        # float32 rounds both to a number above 0.8; the first one, as it is written, is not above
        (query / "c.txt").write_text(f"((X_0 {decimal}) (Y_0 7) (Y_1 7))")
        code, out, _ = run("replay", query / "c.txt", *arguments)
        assert code == 0
        assert word in out


def test_our_texts_replay_against_a_query(run, saved, tmp_path):
    """The text of a witness breaks the query that says the same as its threat model."""
    found = load_witnesses(saved / "w")
    region = found.threat.around(found.clean)
    lines = [f"(declare-const X_{i} Real)" for i in range(64)]
    lines += [f"(declare-const Y_{j} Real)" for j in range(10)]
    for i, (low, high) in enumerate(
        zip(region.lower[0].flatten().tolist(), region.upper[0].flatten().tolist(), strict=True)
    ):
        lines += [f"(assert (>= X_{i} {low!r}))", f"(assert (<= X_{i} {high!r}))"]
    label = int(found.y[0])
    rivals = " ".join(f"(and (>= Y_{j} Y_{label}))" for j in range(10) if j != label)
    (tmp_path / "q.vnnlib").write_text("\n".join([*lines, f"(assert (or {rivals}))"]))
    text = saved / "w" / "counterexamples" / f"example_{int(found.index[0]):03}.txt"
    code, out, err = run(
        "replay", text, "--network", "digits_pgd", "--property", tmp_path / "q.vnnlib"
    )
    assert code == 0, err
    assert "0 fails" in out


# -- transfer --------------------------------------------------------------------------------------------


def test_transfer(run, saved, tmp_path):
    code, out, _ = run("transfer", saved / "w", "digits_standard", "--json", tmp_path / "t.json")
    assert code == 0
    result = json.loads((tmp_path / "t.json").read_text())
    assert result["n"] >= result["eligible"] >= result["transferred"] > 0
    assert len(result["transferred_examples"]) == result["transferred"]
    assert result["accuracy"] < result["clean_accuracy"]
    assert f"{result['transferred']} of {result['eligible']}" in out
    code, out, _ = run("transfer", saved / "w", "digits_pgd")
    assert code == 0
    assert "0 of " in out
    assert "the model that the witnesses were found on" in out


def test_methods_lists_the_attacks(run):
    code, out, _ = run("methods")
    assert code == 0
    attacks = out[: out.index("Exact")]
    assert all(f"  {name} " in attacks for name in cp.ATTACKS)
    assert "quick, standard, thorough" in out


# -- bad input -------------------------------------------------------------------------------------------


def names(folder):
    return {p.name for p in folder.iterdir()} - {"__pycache__"}


@pytest.fixture(scope="module")
def damaged(saved, tmp_path_factory):
    """A folder with files that are cut, tampered with, or of another kind; commands that fail leave it as it is."""
    tmp_path = tmp_path_factory.mktemp("damaged")
    content = (saved / "w" / "witnesses.npz").read_bytes()
    arrays = dict(np.load(saved / "w" / "witnesses.npz", allow_pickle=False))
    (tmp_path / "w.npz").write_bytes(content)
    (tmp_path / "cut.npz").write_bytes(content[: len(content) // 2])
    np.savez(tmp_path / "shape.npz", **{**arrays, "x": arrays["x"][1:]})
    np.savez(tmp_path / "threat.npz", **{**arrays, "threat": np.array('{"norm": "l9"}')})
    np.savez(tmp_path / "pickled.npz", **{**arrays, "y": np.array([print], dtype=object)})
    np.savez(tmp_path / "other.npz", x=arrays["x"], y=arrays["y"])
    np.savez_compressed(tmp_path / "bomb.npz", **{**arrays, "x": np.zeros(10**7)})
    np.savez(tmp_path / "d.npz", x=arrays["x"], y=arrays["y"])
    np.save(tmp_path / "short.npy", np.ones(3, bool))
    (tmp_path / "cut.npy").write_bytes(b"\x93NUMPY")
    (tmp_path / "x.json").write_text("{}")
    (tmp_path / "net.py").write_text(
        "from torch import nn\ndef make(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))"
    )
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["attack", "--method", "pgdd"], "Did you mean 'pgd'"),
        (["attack", "--level", "quik"], "Did you mean 'quick'"),
        (["attack", "--method", "pgd", "--level", "quick"], "level: only the cascade"),
        (["attack", "--method", "fgsm", "--steps", "3"], "--steps: fgsm has no such option"),
        (["attack", "--method", "pgd", "--steps", "0"], "--steps"),
        (["attack", "--budget", "soon"], "--budget"),
        (["attack", "--passes", "0"], "passes"),
        (["attack", "--passes", "nan"], "passes"),
        (["attack", "--samples", "501"], "samples"),
        (["attack", "--certified", "none.json"], "none.json"),
        (["attack", "--certified", "none.npy"], "no such file"),
        (["attack", "--certified", "x.json"], "not the JSON of an audit"),
        (["attack", "--certified", "short.npy"], "one for each of 500"),
        (["attack", "--certified", "cut.npy"], "truncated"),
        (["attack", "--save", "no/such/w"], "does not exist"),
        (["attack", "--save", "x.json"], "not an empty folder"),
        (["attack", "--json", "no/such/a.json"], "does not exist"),
        (["replay", "none.npz", "--network", "digits_pgd"], "no such file"),
        (["replay", "none.txt", "--network", "digits_pgd"], "--property"),
        (["replay", "none.txt", "--network", "digits_pgd", "--property", "none"], "none"),
        (["replay", "cut.npz", "--network", "digits_pgd"], "truncated"),
        (["replay", "pickled.npz", "--network", "digits_pgd"], "pickled objects"),
        (["replay", "other.npz", "--network", "digits_pgd"], "no clean"),
        (["replay", "bomb.npz", "--network", "digits_pgd"], "once unpacked"),
        (["replay", "w.npz", "--network", "digits_standard"], "digest"),
        (["replay", "w.npz", "--network", "digits_pgd", "--data", "d.npz"], "digest"),
        (["replay", "w.npz", "--network", "digits_pgd", "--property", "q"], "leave it out"),
        (["replay", "shape.npz", "--network", "digits_pgd"], "do not fit each other"),
        (["replay", "threat.npz", "--network", "digits_pgd"], "threat model"),
        (["transfer", "w.npz", "digits_pdg"], "Did you mean 'digits_pgd'"),
        (["transfer", "w.npz", "net.py:make"], "the network takes"),
        (["transfer", "none.npz", "digits_pgd"], "no such file"),
    ],
)
def test_bad_input_is_one_paragraph(run, damaged, monkeypatch, arguments, message):
    monkeypatch.chdir(damaged)
    before = names(damaged)
    outputs = [] if "--json" in arguments else ["--json", "out.json"]
    if arguments[0] == "attack" and "--save" not in arguments:
        outputs += ["--save", "witnesses"]
    code, out, err = run(*arguments, *outputs)
    assert code == 2
    assert message in err
    assert err.startswith("calipers: ")
    assert err.count("\n") == 1
    assert out == ""
    assert names(damaged) == before


def test_diagnose_adds_a_line_for_each_check(run):
    code, out, err = run(
        "attack", "digits_pgd", "--eps", "0.1", "--samples", "30", "--level", "quick", "--diagnose"
    )
    assert code == 0, err
    for check in CHECKS:
        assert f"ok       {check}" in out


def test_an_audit_can_be_diagnosed_too(run, tmp_path):
    file = tmp_path / "audit.json"
    code, out, err = run(
        "audit", "digits_pgd", "--eps", "0.1", "--samples", "10", "--methods", "clean,fgsm", "--diagnose",
        "--json", str(file),
    )  # fmt: skip
    assert code == 0, err
    for check in CHECKS:
        assert f"ok       {check}" in out
    found = json.loads(file.read_text())["diagnostics"]
    assert [f["name"] for f in found] == list(CHECKS)
    assert not any(f["warning"] for f in found)
