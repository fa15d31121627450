"""The examples run, and the README's code does what it says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
SHELL = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)
RESULTS = {
    "01_attack.py": r"accuracy under FGSM \d+%, under PGD with restarts \d+%",
    "02_bound.py": r"digits_pgd +0\.03 +crown +\d+%",
    "03_audit.py": r"\d+% certified <= robust accuracy <= \d+% empirical",
    "04_onnx.py": r"ONNX file: certified margins \[",
    "05_binarised.py": r"(?s)40 steps +accuracy 9\d%.*through +accuracy 7\d%.*certified +accuracy 6\d%.*zero grad",
    "06_linear.py": r"(?s)robust +loss \S+ \(gap \de-\d+\), accuracy 9\d%, exact robust accuracy 69%.*: 69%.*separable",
}


SCRIPTS = {
    "calipers": "from calipers.cli import main; main()",
    "calipers-check": "from calipers_check.__main__ import script; script()",
}


def python(*arguments: str, folder: Path) -> str:
    """What a fresh interpreter prints; warnings are errors there too."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_all_examples_are_known() -> None:
    assert [path.name for path in EXAMPLES] == list(RESULTS)


ONE_AFTER_THE_OTHER = """
import os, runpy, sys
for path in sys.argv[1:]:
    folder = os.path.basename(path)
    os.mkdir(folder)
    os.chdir(folder)
    print(f"=== {folder}", flush=True)
    sys.argv = [path]
    runpy.run_path(path, run_name="__main__")
    os.chdir("..")
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, list[str]]]:
    """What each example prints and writes, each in an empty folder, all in one fresh interpreter."""
    folder = tmp_path_factory.mktemp("examples")
    printed = python("-c", ONE_AFTER_THE_OTHER, *map(str, EXAMPLES), folder=folder)
    parts = dict(part.split("\n", 1) for part in printed.split("=== ")[1:])
    return {k: (v, sorted(p.name for p in (folder / k).iterdir())) for k, v in parts.items()}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.name)
def test_an_example_is_short_and_runs(path: Path, ran: dict[str, tuple[str, list[str]]]) -> None:
    assert len(path.read_text().splitlines()) <= 60
    printed, left = ran[path.name]
    assert re.search(RESULTS[path.name], printed), printed
    assert left == (["audit.html"] if path.name == "03_audit.py" else [])


def test_the_readmes_code_runs(tmp_path: Path) -> None:
    """All its Python blocks, in order, as one program in an empty folder; then the commands about what that wrote."""
    readme = (ROOT / "README.md").read_text()
    script = tmp_path / "readme.py"
    script.write_text("\n".join(BLOCK.findall(readme)))
    python(str(script), folder=tmp_path)
    section = readme.partition("## Verify a property")[2]
    for name, start in SCRIPTS.items():
        program = tmp_path / name
        program.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{start}" "$@"\n')
        program.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(
        ["sh", "-e", "-c", SHELL.findall(section)[0]],
        cwd=tmp_path,
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:2] == ["unsat", "unsat"]
    assert lines[2].startswith("accepted: ")
    assert lines[3] == "sat"
    assert re.search(r"\S+ +2 +1 +1 +0 +0 +0", done.stdout)
    written = {p.name for p in tmp_path.iterdir()}
    assert {"safe.cert", "answer.json", "results.csv", "cactus.svg", "scripts"} < written
