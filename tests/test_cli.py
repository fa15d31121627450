import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file

from calipers import __version__
from calipers.cli.options import seconds_of, shape_of
from calipers.errors import ModelError

SHARED = Path(__file__).resolve().parents[2] / "shared"
CALIPERS = [sys.executable, "-c", "from calipers.cli import main; main()"]


def test_version_and_help_are_quick():
    for option in ("--version", "--help"):
        times = []
        for _ in range(3):
            begin = os.times()
            done = subprocess.run([*CALIPERS, option], capture_output=True, text=True, check=True)
            end = os.times()  # CPU time, which other work on the machine hardly changes
            times.append(sum(end[2:4]) - sum(begin[2:4]))
        assert min(times) < 0.5
        assert done.stdout.strip() == __version__ or "calipers" in done.stdout


def test_the_command_line_imports_nothing_heavy():
    heavy = ("torch", "numpy", "onnx", "jinja2", "rich")
    code = f"import sys, calipers.cli; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_audit_without_arguments(run, tmp_path):
    begin = time.perf_counter()
    code, out, err = run("audit", "--json", tmp_path / "a.json", "--report", tmp_path / "r.html")
    assert code == 0
    assert time.perf_counter() - begin < 30
    assert "robust accuracy between" in out
    assert "digits_pgd on digits/test, linf eps=0.1 in [0, 1]" in out
    assert "crown: " in err
    result = json.loads((tmp_path / "a.json").read_text())
    assert {
        "n",
        "clean_accuracy",
        "certified_accuracy",
        "empirical_accuracy",
        "unknown",
        "seconds",
        "threat",
    } <= set(result)
    assert (
        0.6
        < result["certified_accuracy"]
        <= result["empirical_accuracy"]
        < result["clean_accuracy"]
    )
    assert (tmp_path / "r.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_audit_with_every_option(run, tmp_path):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "d.npz", x=rng.random((30, 4), np.float32), y=rng.integers(0, 3, 30))
    (tmp_path / "net.py").write_text(
        "from calipers.zoo import mlp\ndef make(): return mlp(4, 8, 3)\n"
    )
    from calipers.zoo import mlp

    save_file(mlp(4, 8, 3).state_dict(), tmp_path / "w.safetensors")
    code, _, _ = run(
        "audit", f"{tmp_path / 'net.py'}:make", "--weights", tmp_path / "w.safetensors", "--data", tmp_path / "d.npz",
        "--norm", "l2", "--eps", "8/255", "--samples", 20, "--budget", "1m", "--methods", "clean,crown", "--seed", 4,
        "--run", tmp_path / "run", "--json", tmp_path / "a.json", "--input-shape", "4",
    )  # fmt: skip
    assert code == 0
    result = json.loads((tmp_path / "a.json").read_text())
    assert result["threat"] == {"norm": "l2", "eps": "8/255", "lower": 0.0, "upper": 1.0}
    assert [m["name"] for m in result["methods"]] == ["clean", "crown"]
    assert (result["n"], result["population"]) == (20, 30)
    assert result["model"] == "net.py:make"
    assert str(tmp_path) not in (tmp_path / "a.json").read_text()


def test_a_run_goes_on_in_its_directory(run, tmp_path):
    first = run("audit", "--run", tmp_path / "r", "--samples", 50)
    second = run("audit", "--run", tmp_path / "r", "--samples", 50)
    assert (first[0], second[0]) == (0, 0)
    assert second[2] == ""  # no stage had anything left to do
    code, _, err = run("audit", "--run", tmp_path / "r", "--samples", 50, "--eps", "0.2")
    assert code == 2
    assert "another run" in err


def test_ctrl_c_prints_the_partial_bracket(tmp_path):
    (tmp_path / "net.py").write_text(
        "import torch, time\nfrom torch import nn\nfrom calipers.zoo import mlp\n"
        "class Slow(nn.Sequential):\n"
        "    def forward(self, x):\n"
        "        if not torch.compiler.is_compiling() and x.shape[0] > 5: time.sleep(0.1)\n"
        "        return super().forward(x)\n"
        "def make(): return Slow(*mlp(64, 10))\n"
    )
    process = subprocess.Popen(
        [*CALIPERS, "audit", f"{tmp_path / 'net.py'}:make", "--json", str(tmp_path / "a.json")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert "clean" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "stopped early (interrupted)" in out
    assert json.loads((tmp_path / "a.json").read_text())["stopped"] == "interrupted"


def test_explain_inspect_methods(run):
    code, out, _ = run("explain", "--index", 3, "--eps", "0.05")
    assert code == 0
    assert "≤ minimal margin ≤" in out
    code, out, _ = run("inspect", "digits_pgd")
    assert code == 0
    assert "relu" in out.lower()
    code, out, _ = run("methods")
    assert code == 0
    for word in ("Attacks", "Exact", "Bounds", "outer", "pgd", "crown_ibp", "digits_standard"):
        assert word in out


def write(path, content):
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["audit", "digits_pdg"], "Did you mean 'digits_pgd'"),
        (["audit", "--data", "digit"], "Did you mean 'digits'"),
        (["audit", "--norm", "linff"], "Did you mean 'linf'"),
        (["audit", "--methods", "crow"], "Did you mean 'crown'"),
        (["audit", "--eps", "-0.1"], "negative"),
        (["audit", "--eps", "abc"], "cannot read 'abc'"),
        (["audit", "--eps", "1/0"], "divides by zero"),
        (["audit", "--eps", "nan"], "eps"),
        (["audit", "--budget", "soon"], "--budget"),
        (["audit", "--budget", "0"], "--budget"),
        (["audit", "--samples", "501"], "samples"),
        (["audit", "none.onnx"], "no such file"),
        (["audit", "cut.onnx"], "cut.onnx"),
        (["audit", "page.onnx"], "web page"),
        (["audit", "digits_pgd", "--weights", "cut.pt"], "truncated"),
        (["audit", "digits_pgd", "--weights", "none.pt"], "no such file"),
        (["audit", "tutorial_cnn"], "--weights"),
        (["audit", "--data", "mnist"], "--data-dir"),
        (["audit", "--data", "cut.npz"], "cut.npz"),
        (["audit", "--data", "none.npz"], "no such file"),
        (["audit", "--data", "int.npz"], "/ 255"),
        (["audit", "--data", "nan.npz"], "NaN"),
        (["audit", "--data", "far.npz"], "outside the input domain"),
        (["audit", "--data", "label.npz"], "outside 0..9"),
        (["audit", "--data", "shape.npz"], "the model takes (1, 8, 8)"),
        (["audit", "--data", "empty.npz"], "empty"),
        (["audit", "--run", "file.txt"], "file.txt"),
        (["audit", "--report", "no/such/folder/r.html"], "does not exist"),
        (["audit", "--report", "."], "is a folder"),
        (["explain", "--index", "500"], "index"),
        (["inspect", "net.py"], "name the function"),
        (["inspect", "net.py:make", "--input-shape", "0,3"], "--input-shape"),
    ],
)
def test_bad_input_is_one_paragraph(run, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "cut.onnx", b"\x08\x08\x12\x07pytorch")
    write(tmp_path / "page.onnx", b"<!doctype html>")
    write(tmp_path / "cut.pt", b"PK\x03\x04\x00")
    write(tmp_path / "cut.npz", b"PK\x03\x04")
    write(tmp_path / "file.txt", b"x")
    write(tmp_path / "net.py", b"def make(): ...")
    x, y = np.zeros((3, 1, 8, 8), np.float32), np.arange(3)
    np.savez(tmp_path / "int.npz", x=x.astype(np.uint8), y=y)
    np.savez(tmp_path / "nan.npz", x=x + math.nan, y=y)
    np.savez(tmp_path / "far.npz", x=x + 3, y=y)
    np.savez(tmp_path / "label.npz", x=x, y=y + 9)
    np.savez(tmp_path / "shape.npz", x=x[:, :, 1:], y=y)
    np.savez(tmp_path / "empty.npz", x=x[:0], y=y[:0])
    before = set(tmp_path.iterdir())
    outputs = ["--json", "a.json"] if arguments[0] == "audit" else []
    code, out, err = run(*arguments, *outputs)
    assert code == 2
    assert message in err
    assert err.startswith("calipers: ")
    assert err.count("\n") == 1
    assert out == ""
    assert set(tmp_path.iterdir()) == before


def test_usage_errors_exit_with_2(run):
    code, _, err = run("audit", "--no-such-option")
    assert code == 2
    assert "--no-such-option" in err


def test_times_and_shapes():
    assert [seconds_of(t) for t in ("90", "90s", "10m", "1.5h")] == [90, 90, 600, 5400]
    assert shape_of("1,28,28") == shape_of("1x28x28") == (1, 28, 28)
    assert shape_of(None) is None
    for text in ("", "a", "1,-2", "1,,2", "99999,99999"):
        with pytest.raises(ModelError, match="--input-shape"):
            shape_of(text)


@pytest.mark.skipif(
    not (SHARED / "data" / "tutorial").exists(), reason="no shared tutorial weights"
)
def test_a_tutorial_network_on_mnist(run, tmp_path):
    code, _, err = run(
        "audit", "tutorial_small", "--weights", SHARED / "data" / "tutorial" / "ch3_model_small.pt",
        "--data", "mnist", "--data-dir", SHARED / "data" / "mnist", "--eps", "0.02", "--samples", 100,
        "--json", tmp_path / "a.json",
    )  # fmt: skip
    assert code == 0, err
    result = json.loads((tmp_path / "a.json").read_text())
    assert result["certified_accuracy"] <= result["empirical_accuracy"] <= result["clean_accuracy"]
    assert result["certified_accuracy"] > 0.3


def test_an_onnx_file(run, tmp_path):
    import calipers as cp
    from calipers.models import load_model

    cp.save_onnx(load_model("digits_pgd"), tmp_path / "net.onnx")
    code, _, err = run(
        "audit", tmp_path / "net.onnx", "--samples", 60, "--json", tmp_path / "a.json"
    )
    assert code == 0, err
    assert run("audit", "digits_pgd", "--samples", 60, "--json", tmp_path / "b.json")[0] == 0
    first, second = (json.loads((tmp_path / f).read_text()) for f in ("a.json", "b.json"))
    assert abs(first["certified_accuracy"] - second["certified_accuracy"]) < 0.02
    assert "onnxruntime" in first["largest_difference_of_outputs"]
