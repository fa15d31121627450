"""The public names: each resolves, and importing the package imports nothing heavy."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys

import pytest

import calipers


@pytest.mark.parametrize("name", sorted(set(calipers.__all__) - {"__version__"}))
def test_name_resolves(name: str) -> None:
    where = calipers._WHERE[name]
    value = getattr(calipers, name)
    assert value is getattr(importlib.import_module(where), name)
    assert name in dir(calipers)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        calipers.nothing  # noqa: B018


def test_names_have_no_duplicates_and_the_stubs_agree() -> None:
    assert len(calipers.__all__) == len(set(calipers.__all__))
    assert set(calipers.__all__) == {"__version__", *calipers._WHERE}


def run(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True
    )
    return result.stdout.strip()


HEAVY = [
    "torch",
    "numpy",
    "onnx",
    "onnxruntime",
    "scipy",
    "jinja2",
    "ray",
    "highspy",
    "typer",
    "rich",
    "safetensors",
]


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = f"import sys, calipers; calipers.__version__; dir(calipers); print([m for m in {HEAVY} if m in sys.modules])"
    assert run(code) == "[]"


def test_geometry_imports_torch_alone() -> None:
    """L0 needs neither torch.export nor an ONNX package."""
    heavy = [*HEAVY[2:], "torch.export", "calipers.graph"]
    baseline = run(f"import sys, torch; print([m for m in {heavy} if m in sys.modules])")
    use = "calipers.ThreatModel, calipers.Spec, calipers.witness"
    code = f"import sys, calipers; {use}; print([m for m in {heavy} if m in sys.modules])"
    assert run(code) == baseline
