"""Two processes on the CPU are one process with the joint batch."""

import os
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.optim import SGD

from calipers.errors import TrainingError
from calipers.models import load_weights
from calipers.training import objectives, train
from calipers.training.distributed import Group, group
from calipers.training.schedules import constant
from training_runs import fgsm, normalised_net, small

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {"objective": fgsm, "epochs": 1, "validation": 97, "l1": 1e-5, "clip": 1.0, "awp": 0.005}
CERTIFIED = partial(objectives.ibp, weight=0.7)  # the regulariser is no mean over examples
RUNS = {
    "plain": small(**SETTINGS),
    "parts": small(**SETTINGS, accumulate=2),
    # a bias before normalisation has gradient 0, and Adam would turn what rounding leaves of it into steps
    "normalised": small(
        model=normalised_net, objective=CERTIFIED, validation=97, optimiser=SGD, lr=constant(0.1)
    ),
}
CHILD = """
import sys, torch
torch.set_num_threads(1)
from calipers.training import objectives, train
from test_distributed import RUNS
for name, run in RUNS.items():
    result = train(run, directory=f"{sys.argv[1]}/{name}")
    assert (result.test is None) == (torch.distributed.get_rank() > 0)
"""


def test_two_processes_are_one_with_the_joint_batch(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = f"{ROOT / 'src'}{os.pathsep}{ROOT / 'tests'}"
    common = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, str(tmp_path)],
            env={**common, "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"},
            stderr=subprocess.PIPE, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    errors = [child.communicate(timeout=120)[1] for child in children]
    assert [child.returncode for child in children] == [0, 0], errors
    plain = train(RUNS["plain"])
    alone = {"plain": plain, "parts": plain, "normalised": train(RUNS["normalised"])}
    for name, expected in alone.items():
        joint = load_weights(tmp_path / name / "model.safetensors")
        for k, v in expected.network.module.state_dict().items():
            assert torch.allclose(v.float(), joint[k].float(), rtol=0, atol=1e-6), (name, k)


def test_shares_are_equal_or_refused():
    rows = torch.arange(12)
    parts = [Group(rank, 3).share(rows) for rank in range(3)]
    assert torch.equal(torch.cat(parts), rows)
    with pytest.raises(TrainingError, match="12 examples cannot be shared by 5"):
        Group(0, 5).share(rows)


def test_alone_there_is_one_group():
    only = group()
    assert only == Group()
    assert only.agree({"a": 1}) == {"a": 1}
