"""``calipers verify`` and ``supports``: the first line is a verdict, whatever happens."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import time
from pathlib import Path

import onnx
import onnx.numpy_helper
import pytest
import torch

from calipers.cli import verifying
from calipers.evaluate.verify import Decision
from calipers.graph.onnx import session
from calipers.vnnlib import parse_assignment
from queries import ANSWERS, DIAMOND, SECOND, text, write_network

VERDICTS = ("sat", "unsat", "unknown", "timed-out")
CALIPERS = [sys.executable, "-c", "from calipers.cli import main; main()"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("verify")
    write_network(found / "net.onnx", DIAMOND)
    wide = [([[1.0, 2.0, 3.0]], [0.0]), ([[1.0], [2.0]], [0.0, 0.0])]
    write_network(found / "wide.onnx", wide)
    write_network(found / "three.onnx", [([[1.0, 2.0]] * 3, [0.0] * 3)])
    for name, unsafe in (("sat", "(>= Y_0 1.5)"), ("unsat", "(>= Y_0 2.5)")):
        (found / f"{name}.vnnlib").write_text(text("-1", "1", unsafe))
        second = unsafe.replace("Y_0", "Y[0,0]")
        for kind in ("real", "float32"):
            (found / f"{name}_{kind}.vnnlib").write_text(SECOND.format(kind=kind, unsafe=second))
    return found


@pytest.mark.parametrize("name", ["sat", "unsat"])
def test_the_short_form(run, folder: Path, name: str) -> None:
    code, out, err = run("verify", folder / "net.onnx", folder / f"{name}.vnnlib", "--timeout", 20)
    assert code == 0
    assert out.split("\n")[0] == name
    assert name in err
    if name == "unsat":
        assert out == "unsat\n"


def test_a_counterexample_of_the_first_version(run, folder: Path) -> None:
    _, out, _ = run("verify", folder / "net.onnx", folder / "sat.vnnlib")
    lines = out.splitlines()
    assert [line.strip(" ()").split()[0] for line in lines] == ["sat", "X_0", "X_1", "Y_0", "Y_1"]
    values = parse_assignment(out)
    x = values["X"].float()[None]
    assert torch.equal(session(folder / "net.onnx")(x)[0].double(), values["Y"])
    assert values["Y"][0] >= 1.5
    assert x.abs().max() <= 1


@pytest.mark.parametrize("kind", ["real", "float32"])
def test_the_standard_form(run, folder: Path, kind: str) -> None:
    network = f"f={folder / 'net.onnx'}"
    code, out, _ = run(
        "verify", folder / f"sat_{kind}.vnnlib", "--network", network, "--timeout", "20"
    )
    assert code == 0
    lines = out.splitlines()
    assert lines[0] == "sat"
    assert lines[1] == f"X {kind} [1,2]"
    assert lines[4] == f"Y {kind} [1,2]"
    assert len(lines) == 7
    assert parse_assignment(out)["Y"].shape == (1, 2)
    code, out, err = run("verify", folder / f"unsat_{kind}.vnnlib", "--network", network)
    assert (code, out) == (0, "unsat\n")
    assert ("rounding of the network's forward pass" in err) == (kind == "float32")


def test_serialised_assignments(run, folder: Path, tmp_path: Path) -> None:
    code, out, _ = run(
        "verify", folder / "sat_float32.vnnlib", "--network", f"f={folder / 'net.onnx'}",
        "--serialise-assignments", tmp_path / "new",
    )  # fmt: skip
    assert (code, out) == (0, "sat\n")
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["X.pb", "Y.pb"]
    protos = {}
    for name in "XY":
        protos[name] = onnx.TensorProto.FromString((tmp_path / "new" / f"{name}.pb").read_bytes())
        assert protos[name].name == name
        assert protos[name].data_type == onnx.TensorProto.FLOAT
        assert list(protos[name].dims) == [1, 2]
    x, y = (torch.from_numpy(onnx.numpy_helper.to_array(protos[n]).copy()) for n in "XY")
    assert torch.equal(session(folder / "net.onnx")(x), y)
    assert y[0, 0] >= 1.5


def test_gzip_and_json(run, folder: Path, tmp_path: Path) -> None:
    for name in ("net.onnx", "unsat.vnnlib"):
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress((folder / name).read_bytes()))
    target = tmp_path / "a.json"
    code, out, _ = run(
        "verify", tmp_path / "net.onnx.gz", tmp_path / "unsat.vnnlib.gz", "--json", target
    )
    assert (code, out) == (0, "unsat\n")
    content = json.loads(target.read_text())
    assert content["verdict"] == "unsat"
    assert content["exit_code"] == 0
    assert content["files"] == ["net.onnx.gz", "unsat.vnnlib.gz"]
    assert str(tmp_path) not in target.read_text()


BAD = {
    "no query": (["net.onnx", "none.vnnlib"], "none.vnnlib: no such file"),
    "no network": (["none.onnx", "sat.vnnlib"], "none.onnx: no such file"),
    "nothing": (["sat.vnnlib"], "--network: 0 given"),
    "three files": (["net.onnx", "sat.vnnlib", "sat.vnnlib"], "got 3 files"),
    "both forms": (["net.onnx", "sat.vnnlib", "--network", "f=net.onnx"], "got 2 files and 1 networks"),
    "two networks": (
        ["sat_real.vnnlib", "--network", "f=net.onnx", "--network", "g=net.onnx"], "--network: 2 given"),
    "wrong name": (["sat_real.vnnlib", "--network", "g=net.onnx"], "'g' is not declared; .* declares 'f'"),
    "no name": (["sat_real.vnnlib", "--network", "net.onnx"], "write NAME=FILE.onnx"),
    "inputs": (["wide.onnx", "sat.vnnlib"], "declares 2 inputs, but the network's input shape"),
    "outputs": (["three.onnx", "sat.vnnlib"], "declares 2 outputs, the network has 3"),
    "dtype": (["net.onnx", "double.vnnlib"], "X is declared float64, the network computes in float32"),
    "missing variable": (["net.onnx", "missing.vnnlib"], "'Y_7' is not declared"),
    "several declared": (["net.onnx", "several.vnnlib"], "several networks are not supported"),
    "truncated": (["net.onnx", "cut.vnnlib"], "is never closed; is the file truncated"),
    "no model": (["page.onnx", "sat.vnnlib"], "web page"),
    "time 0": (["net.onnx", "unsat.vnnlib", "--timeout", "0"], "time limit is 0 s"),
    "time -1": (["net.onnx", "unsat.vnnlib", "--timeout", "-1"], "no time limit"),
    "time nan": (["net.onnx", "unsat.vnnlib", "--timeout", "nan"], "no time limit"),
    "time soon": (["net.onnx", "unsat.vnnlib", "--timeout", "soon"], "no time limit"),
    "memory": (["net.onnx", "unsat.vnnlib", "--memory", "much"], "is no size"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_unknown_with_the_reason(run, folder: Path, case: str, tmp_path: Path) -> None:
    (folder / "double.vnnlib").write_text(SECOND.format(kind="float64", unsafe="(>= Y[0,0] 2.5)"))
    (folder / "missing.vnnlib").write_text(text("-1", "1", "(>= Y_7 1)"))
    (folder / "cut.vnnlib").write_text(text("-1", "1", "(>= Y_0 1)")[:-4])
    (folder / "page.onnx").write_text("<!doctype html>")
    second = SECOND.format(kind="real", unsafe="(>= Y[0,0] 2.5)")
    declared = "(declare-network g (declare-input A real [1]) (declare-output B real [1]))\n(assert (and (>= X[0,0]"
    (folder / "several.vnnlib").write_text(second.replace("(assert (and (>= X[0,0]", declared))
    arguments, message = BAD[case]
    given = [
        f"{a.partition('=')[0]}={folder / a.partition('=')[2]}"
        if "=" in a
        else folder / a
        if a.endswith(("lib", "onnx"))
        and "--network" not in arguments[max(0, arguments.index(a) - 1)]
        else a
        for a in arguments
    ]
    target = tmp_path / "a.json"
    code, out, err = run("verify", *given, "--json", target)
    assert (code, out) == (2, "unknown\n")
    assert "(exit code 2)" in err
    content = json.loads(target.read_text())
    assert (content["verdict"], content["exit_code"]) == ("unknown", 2)
    import re

    assert re.search(message, content["reason"]), content["reason"]


def test_contradictory_boxes_are_unsat_with_the_reason(run, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.vnnlib").write_text(text("1", "-1", "(>= Y_0 1.5)"))
    code, out, err = run("verify", folder / "net.onnx", tmp_path / "a.vnnlib")
    assert (code, out) == (0, "unsat\n")
    assert "X_0 has lower bound 1 above its upper bound -1, so no input is left" in err
    (tmp_path / "b.vnnlib").write_text(
        text("-1", "1", "(or (and (>= X_0 2) (>= Y_0 0)) (> Y_1 Y_1))")
    )
    code, out, err = run("verify", folder / "net.onnx", tmp_path / "b.vnnlib")
    assert (code, out) == (0, "unsat\n")
    assert "no input satisfies" in err


def test_a_crash_is_unknown(run, folder: Path, monkeypatch) -> None:
    def crash(*_, **__):
        raise AttributeError("a bug")

    monkeypatch.setattr(verifying, "decide_strictly", crash)
    code, out, err = run("verify", folder / "net.onnx", folder / "unsat.vnnlib")
    assert (code, out) == (3, "unknown\n")
    assert "AttributeError: a bug (exit code 3)" in err


def test_ctrl_c_is_unknown(run, folder: Path, monkeypatch) -> None:
    def press(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(verifying, "decide_strictly", press)
    code, out, _ = run("verify", folder / "net.onnx", folder / "unsat.vnnlib")
    assert (code, out) == (130, "unknown\n")


def test_the_answer_is_given_once(capsys) -> None:
    answer = verifying._Answer()
    assert answer.give(Decision("unsat", "proved")) == 0
    answer.give(Decision("timed-out", "late"))
    assert capsys.readouterr().out == "unsat\n"


def test_one_long_step_does_not_outlast_the_limit(folder: Path) -> None:
    """The main thread is busy in one call that no interrupt reaches; the process ends all the same."""
    code = (
        "import signal, sys, time\nfrom calipers.cli import verifying, main\n"
        "def hang(*a, **k):\n"
        "    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})\n    time.sleep(60)\n"
        "verifying.decide_strictly = hang\n"
        f"sys.argv = ['calipers', 'verify', {str(folder / 'net.onnx')!r}, {str(folder / 'sat.vnnlib')!r},"
        " '--timeout', '0.5']\nmain()\n"
    )
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert time.perf_counter() - begin < 20
    assert (done.returncode, done.stdout) == (0, "timed-out\n")


def test_cold_start_is_quick(folder: Path) -> None:
    """A verdict in a fresh process costs at most a second of CPU time on top of torch."""

    def cpu(*command: str) -> float:
        source = "import resource, runpy, sys\n{}\n"
        source = source.format(command[0])
        source += "u = resource.getrusage(resource.RUSAGE_SELF); sys.stderr.write(f'\\ncpu {u.ru_utime + u.ru_stime}')"
        done = subprocess.run(
            [sys.executable, "-c", source, *command[1:]], capture_output=True, text=True, check=True
        )
        return float(done.stderr.rsplit("cpu ", 1)[1])

    torch_alone = min(cpu("import torch") for _ in range(2))
    script = (
        "sys.argv[0] = 'calipers'\nfrom calipers.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "assert not {'jinja2', 'scipy', 'rich.console', 'torch._dynamo'} & set(sys.modules), 'heavy import'"
    )
    arguments = ["verify", str(folder / "net.onnx"), str(folder / "unsat.vnnlib")]
    whole = min(cpu(script, *arguments) for _ in range(2))
    assert whole - torch_alone < 1.0


# -- supports ----------------------------------------------------------------------------------------------------

PERMITTED = {
    "--hidden-node-theories": {"NH", "H"},
    "--multiple-input-output-theories": {"SIO", "MIO"},
    "--multiple-network-theories": {"SNET", "MENET", "MINET", "MNET"},
    "--multiple-node-comparison-theories": {"SNC", "MNC"},
    "--arithmetic-complexity-theories": {"BND", "OUTC", "LIN", "POLY"},
    "--optimised-disjunctive-reasoning": {"true", "false"},
    "--serialise-assignments": {"true", "false"},
}


@pytest.mark.parametrize("option", PERMITTED)
def test_theories_are_those_of_the_standard(run, option: str) -> None:
    code, out, err = run("supports", option)
    assert (code, err) == (0, "")
    lines = out.split()
    assert lines
    assert set(lines) <= PERMITTED[option]


def test_versions_types_operators(run) -> None:
    assert run("supports", "--onnx-opset-versions")[1].split() == ["7", "21"]
    assert run("supports", "--vnnlib-versions")[1].split() == ["1.0", "2.1"]
    assert "real" in run("supports", "--onnx-element-types")[1].split()
    operators = run("supports", "--onnx-operators")[1].split("\n")
    assert {"Conv", "Relu", "Gemm", "MaxPool"} < set(operators)
    assert all(" " not in line for line in operators)
    code, out, _ = run("supports")
    assert code == 2
    assert out == ""
    assert run("--name")[1] == "Calipers\n"
    assert run("--version")[1] == "0.1.0\n"


def test_every_known_answer_on_the_command_line(run, folder: Path, tmp_path: Path) -> None:
    for i, (unsafe, answer) in enumerate(ANSWERS.items()):
        file = tmp_path / f"{i}.vnnlib"
        file.write_text(text("-1", "1", unsafe))
        first = run("verify", folder / "net.onnx", file, "--timeout", "5")[1].split("\n")[0]
        assert first in VERDICTS
        assert first in (answer, "unknown", "timed-out")
