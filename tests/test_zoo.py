import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from calipers.data import load
from calipers.errors import ModelError
from calipers.models import load_model, load_weights
from calipers.zoo import ZOO, mlp

SHARED = Path(__file__).resolve().parents[2] / "shared"
TUTORIAL = SHARED / "data" / "tutorial"


@pytest.mark.parametrize(("name", "least"), [("digits_standard", 0.97), ("digits_pgd", 0.95)])
def test_trained_digits_networks(name, least):
    network = load_model(name)
    data = load("digits")
    with torch.no_grad():
        correct = (network(data.x).argmax(1) == data.y).float().mean()
    assert correct >= least
    assert not network.module.training
    assert network.input_shape == (1, 8, 8)
    assert network.num_classes == 10


@pytest.mark.skipif(not TUTORIAL.exists(), reason="no shared tutorial weights")
@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("tutorial_dnn_2", "ch3_model_dnn_2.pt"),
        ("tutorial_dnn_4", "ch3_model_dnn_4.pt"),
        ("tutorial_small", "ch3_model_small.pt"),
        ("tutorial_cnn", "ch4_model_cnn.pt"),
        ("tutorial_cnn_robust_2", "ch4_model_cnn_robust_2.pt"),
    ],
)
def test_the_tutorials_legacy_cuda_files_load(name, file):
    network = load_model(name, weights=TUTORIAL / file)
    state = torch.load(TUTORIAL / file, map_location="cpu", weights_only=True)
    assert all(torch.equal(state[k], v) for k, v in network.module.state_dict().items())
    assert network(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


def test_every_entry_builds():
    for entry in ZOO.values():
        assert entry.build()(torch.zeros(2, *entry.shape)).shape == (2, 10)


def test_a_factory_in_a_file(tmp_path):
    (tmp_path / "helper.py").write_text("WIDTH = 5")
    (tmp_path / "net.py").write_text(
        "import helper\nfrom torch import nn\n"
        "def make(): return nn.Sequential(nn.Linear(3, helper.WIDTH), nn.ReLU(), nn.Linear(5, 2))\n"
        "def broken(): raise RuntimeError('no')\ndef number(): return 3\n"
    )
    spec = f"{tmp_path / 'net.py'}:make"
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    for file, save in (("w.pt", torch.save), ("w.safetensors", save_file)):
        save(model.state_dict(), tmp_path / file)
        network = load_model(spec, weights=tmp_path / file, example_shape=(3,))
        x = torch.rand(4, 3)
        assert torch.equal(network(x), model(x))
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, tmp_path / "nested.pt")
    assert load_weights(tmp_path / "nested.pt").keys() == model.state_dict().keys()
    with pytest.raises(ModelError, match="--input-shape"):
        load_model(spec)
    with pytest.raises(ValueError, match="Did you mean 'make'"):
        load_model(spec + "r", example_shape=(3,))
    with pytest.raises(ModelError, match="RuntimeError: no"):
        load_model(f"{tmp_path / 'net.py'}:broken", example_shape=(3,))
    with pytest.raises(ModelError, match="returned int"):
        load_model(f"{tmp_path / 'net.py'}:number", example_shape=(3,))
    with pytest.raises(ModelError, match="name the function"):
        load_model(str(tmp_path / "net.py"))
    (tmp_path / "bad.py").write_text("1 / 0")
    with pytest.raises(ModelError, match="ZeroDivisionError"):
        load_model(f"{tmp_path / 'bad.py'}:make", example_shape=(3,))


class Evil:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def test_files_that_are_no_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "w.pt"
    path.write_bytes(pickle.dumps({"a": Evil()}))
    with pytest.raises(ModelError, match="refused"):
        load_weights(path)
    torch.save(nn.Linear(2, 2), path)
    with pytest.raises(ModelError, match="refused"):
        load_weights(path)
    torch.save({"a": Evil()}, path)
    with pytest.raises(ModelError, match="refused"):
        load_weights(path)
    assert not (tmp_path / "pwned").exists()
    torch.save({"a": 3}, path)
    with pytest.raises(ModelError, match="entries a are not tensors"):
        load_weights(path)
    torch.save(torch.zeros(3), path)
    with pytest.raises(ModelError, match="not a state dict"):
        load_weights(path)
    for content in (b"<!DOCTYPE html><p>404", b"version https://git-lfs.github.com/spec/v1\n"):
        path.write_bytes(content)
        with pytest.raises(ModelError, match="web page"):
            load_weights(path)
    with pytest.raises(ModelError, match="no such file"):
        load_weights(tmp_path / "none.pt")


@pytest.mark.parametrize("legacy", [True, False])
def test_truncated_weights(tmp_path, legacy):
    path = tmp_path / "w.pt"
    torch.save(mlp(3, 4, 2).state_dict(), path, _use_new_zipfile_serialization=not legacy)
    whole = path.read_bytes()
    for cut in (0, 1, 20, len(whole) // 3, len(whole) // 2, len(whole) - 9):
        path.write_bytes(whole[:cut])
        with pytest.raises(ModelError, match=r"w\.pt"):
            load_weights(path)
    save_file(mlp(3, 4, 2).state_dict(), tmp_path / "w.safetensors")
    whole = (tmp_path / "w.safetensors").read_bytes()
    for cut in (0, 7, 100, len(whole) - 1):
        (tmp_path / "w.safetensors").write_bytes(whole[:cut])
        with pytest.raises(ModelError, match="truncated"):
            load_weights(tmp_path / "w.safetensors")


def test_weights_that_do_not_fit_are_named(tmp_path):
    state = mlp(64, 64, 32, 10).state_dict()
    state["9.weight"] = state.pop("5.weight")
    state["1.bias"] = torch.zeros(3)
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(ModelError) as caught:
        load_model("digits_pgd", weights=tmp_path / "w.pt")
    for part in ("missing: 5.weight", "unexpected: 9.weight", "1.bias is (3,)", "needs (64,)"):
        assert part in str(caught.value)


def test_models_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="Did you mean 'digits_pgd'"):
        load_model("digits_pdg")
    with pytest.raises(ModelError, match="give --weights"):
        load_model("tutorial_cnn")
    with pytest.raises(ModelError, match="weights without an architecture"):
        load_model("net.safetensors")
    with pytest.raises(ModelError, match="no such file"):
        load_model(str(tmp_path / "no.onnx"))
    with pytest.raises(ModelError, match="no such file"):
        load_model(str(tmp_path / "no.py") + ":make", example_shape=(3,))
    with pytest.raises(ModelError, match="not a model"):
        load_model(str(tmp_path / "x.txt"))
    (tmp_path / "page.onnx").write_text("<html>")
    with pytest.raises(ModelError, match="web page"):
        load_model(str(tmp_path / "page.onnx"))
    with pytest.raises(ModelError, match="leave --weights out"):
        load_model("net.onnx", weights="w.pt")
