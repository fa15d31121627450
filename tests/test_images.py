import builtins

import numpy as np
import pytest
import torch

from calipers.data import load
from calipers.errors import DataError

Image = pytest.importorskip("PIL.Image")
RNG = np.random.default_rng(0)


def folder(root, mode="RGB", size=(5, 4), suffix=".png"):
    stored = {}
    for name in ("cat", "ant"):
        (root / name).mkdir()
        for i in range(2):
            shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], 3)
            pixels = RNG.integers(0, 256, shape, dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}{suffix}")
            stored[name, i] = pixels
    return stored


def test_a_folder_per_class(tmp_path):
    stored = folder(tmp_path)
    (tmp_path / "notes").mkdir()
    (tmp_path / "cat" / "readme.txt").write_text("no image")
    data = load(str(tmp_path))
    assert data.classes == ("ant", "cat")
    assert data.y.tolist() == [0, 0, 1, 1]
    assert data.x.shape == (4, 3, 4, 5)
    expected = torch.from_numpy(stored["cat", 1].transpose(2, 0, 1).astype(np.float32) / 255)
    assert torch.equal(data.x[3], expected)


def test_grey_images_have_one_channel(tmp_path):
    stored = folder(tmp_path, "L")
    data = load(str(tmp_path))
    assert data.x.shape == (4, 1, 4, 5)
    assert torch.equal((data.x[0, 0] * 255).round().byte(), torch.from_numpy(stored["ant", 0]))


def test_bad_images_are_named(tmp_path, monkeypatch):
    folder(tmp_path)
    odd = tmp_path / "cat" / "z.png"
    odd.write_bytes(b"<html>")
    with pytest.raises(DataError, match=r"z\.png: not an image that can be read"):
        load(str(tmp_path))
    whole = (tmp_path / "cat" / "0.png").read_bytes()
    odd.write_bytes(whole[:60])
    with pytest.raises(DataError, match=r"z\.png: not an image that can be read"):
        load(str(tmp_path))
    Image.new("RGB", (7, 7)).save(odd)
    with pytest.raises(DataError, match=r"7 x 7 pixels, but 0\.png has 5 x 4"):
        load(str(tmp_path))
    monkeypatch.setattr("calipers.images.LARGEST", 30)
    with pytest.raises(DataError, match=r"7 x 7 pixels is more than 30"):
        load(str(tmp_path))


def test_without_pillow_the_message_says_so(tmp_path, monkeypatch):
    folder(tmp_path)
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("PIL"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match=r"pip install 'calipers\[images\]'"):
        load(str(tmp_path))
