"""The examples run, and the README's code does what it says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
RESULTS = {
    "01_attack.py": r"accuracy under FGSM \d+%, under PGD with restarts \d+%",
    "02_bound.py": r"digits_pgd +0\.03 +crown +\d+%",
    "03_audit.py": r"\d+% certified <= robust accuracy <= \d+% empirical",
    "04_onnx.py": r"ONNX file: certified margins \[",
    "05_binarised.py": r"(?s)40 steps +accuracy 9\d%.*through +accuracy 7\d%.*certified +accuracy 6\d%.*zero grad",
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


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.name)
def test_an_example_is_short_and_runs(path: Path, tmp_path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 60
    begin = time.monotonic()
    printed = python(str(path), folder=tmp_path)
    assert time.monotonic() - begin < 60  # 20 s on an idle machine
    assert re.search(RESULTS[path.name], printed), printed
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left == (["audit.html"] if path.name == "03_audit.py" else [])


def test_the_readmes_code_runs(tmp_path: Path) -> None:
    """All its Python blocks, in order, as one program in an empty folder."""
    blocks = BLOCK.findall((ROOT / "README.md").read_text())
    script = tmp_path / "readme.py"
    script.write_text("\n".join(blocks))
    python(str(script), folder=tmp_path)
