"""One thread, fixed seeds, and hypothesis without deadlines (derandomised in CI)."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "default", deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("ci", settings.get_profile("default"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeds() -> Iterator[None]:
    """Each test starts from the same random state, and leaves torch's defaults as it found them."""
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - some libraries draw from the global generator
    yield
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()


@pytest.fixture
def run(monkeypatch, capsys):
    """The command line in this process: (exit code, stdout, stderr)."""

    from calipers.cli import main

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["calipers", *map(str, arguments)])
        try:
            main()
            code = 0
        except SystemExit as exit_:
            code = exit_.code or 0
        return (code, *capsys.readouterr())

    return call
