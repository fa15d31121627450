import gzip
import struct
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from calipers.data import checked, digest, load
from calipers.errors import DataError

SHARED = Path(__file__).resolve().parents[2] / "shared"
X = np.full((4, 3), 0.5, np.float32)
Y = np.array([0, 1, 2, 1])


def test_digits_are_in_the_package():
    test, train = load("digits"), load("digits", split="train")
    assert (len(train), len(test)) == (1297, 500)
    assert test.x.shape == (500, 1, 8, 8)
    assert test.x.dtype == torch.float32
    assert test.y.dtype == torch.int64
    assert (test.x.min(), test.x.max()) == (0, 1)
    assert test.classes == tuple("0123456789")
    assert torch.equal((test.x * 16).round(), test.x * 16)
    assert test.digest != train.digest
    assert torch.bincount(test.y).min() > 30


def test_digest_sees_shape_dtype_and_values():
    x = torch.zeros(2, 3)
    others = [x.double(), x.reshape(3, 2), x + 1, x.half()]
    assert len({digest(t) for t in [x, *others]}) == 5
    assert digest(x) == digest(torch.zeros(3, 2).T)


def write_idx(path: Path, array: np.ndarray) -> None:
    head = struct.pack(f">{1 + array.ndim}i", 0x800 + array.ndim, *array.shape)
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wb") as file:
        file.write(head + array.tobytes())


def test_mnist_plain_and_gzip(tmp_path):
    images = np.arange(2 * 28 * 28, dtype=np.int64).reshape(2, 28, 28).astype(np.uint8)
    write_idx(tmp_path / "t10k-images-idx3-ubyte", images)
    write_idx(tmp_path / "t10k-labels-idx1-ubyte.gz", np.array([3, 9], np.uint8))
    data = load("mnist", data_dir=tmp_path)
    assert data.x.shape == (2, 1, 28, 28)
    assert torch.equal(data.x[1, 0], torch.from_numpy(images[1].astype(np.float32) / 255))
    assert data.y.tolist() == [3, 9]


@pytest.mark.skipif(not (SHARED / "data" / "mnist").exists(), reason="no shared MNIST files")
def test_the_real_mnist():
    data = load("mnist", data_dir=SHARED / "data" / "mnist")
    assert data.x.shape == (10000, 1, 28, 28)
    assert torch.bincount(data.y).tolist() == [
        980,
        1135,
        1032,
        1010,
        982,
        892,
        958,
        1028,
        974,
        1009,
    ]


def test_cifar10_layout(tmp_path):
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    records = np.random.default_rng(0).integers(0, 10, (5, 3073), dtype=np.uint8)
    (folder / "test_batch.bin").write_bytes(records.tobytes())
    data = load("cifar10", data_dir=tmp_path)
    assert data.x.shape == (5, 3, 32, 32)
    assert data.y.tolist() == records[:, 0].tolist()
    assert data.x[2, 1, 0, 3] == records[2, 1 + 1024 + 3] / np.float32(255)
    assert data.classes[0] == "airplane"


def test_npz_and_folder(tmp_path):
    np.savez(tmp_path / "a.npz", x=X * 4, y=Y, upper=np.full(3, 2.0), classes=["a", "b", "c"])
    data = load(str(tmp_path / "a.npz"))
    assert data.classes == ("a", "b", "c")
    assert isinstance(data.upper, torch.Tensor)
    assert data.lower == 0
    np.save(tmp_path / "x.npy", X.astype(">f8"))
    np.save(tmp_path / "y.npy", Y.astype(np.int16))
    assert torch.equal(load(str(tmp_path)).x, torch.from_numpy(X))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"x": (X * 255).astype(np.uint8)}, "/ 255"),
        ({"x": X.astype(object)}, "pickled objects"),
        ({"x": np.where(X > 0, np.nan, X)}, "4 of 4 examples contain NaN"),
        ({"x": X * 3}, "outside the input domain"),
        ({"x": X[:0], "y": Y[:0]}, "empty"),
        ({"x": X[:, 0]}, r"expected \(N, \*features\)"),
        ({"x": X.astype("S3")}, "expected numbers"),
        ({"x": X.astype(complex)}, "expected numbers"),
        ({"y": Y[:3]}, "one class number per example"),
        ({"y": Y.astype(float)}, "labels must be integers"),
        ({"y": Y - 1}, "labels -1..1 are outside"),
        ({"classes": np.array(["a", "b"])}, "outside 0..1"),
        ({"lower": np.zeros(2)}, "does not fit examples"),
        ({"lower": np.nan}, "lower contains NaN"),
        ({"y": None}, "no y in the archive"),
    ],
)
def test_bad_npz(tmp_path, fields, message):
    content = {k: v for k, v in ({"x": X, "y": Y} | fields).items() if v is not None}
    np.savez(tmp_path / "bad.npz", **content)
    with pytest.raises(DataError, match=message):
        load(str(tmp_path / "bad.npz"))


def test_damaged_files(tmp_path):
    path = tmp_path / "d.npz"
    np.savez_compressed(path, x=X, y=Y)
    whole = path.read_bytes()
    for cut in (0, 10, len(whole) // 2, len(whole) - 5):
        path.write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"truncated|not a numpy file"):
            load(str(path))
    for i in range(0, len(whole), 7):  # a flipped byte is an error or does no harm, never a crash
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 0xFF]) + whole[i + 1 :])
        with suppress(DataError):
            load(str(path))
    path.write_bytes(b"<!DOCTYPE html><html>404</html>")
    with pytest.raises(DataError, match="web page"):
        load(str(path))
    images = tmp_path / "t10k-images-idx3-ubyte"
    write_idx(images, np.zeros((2, 28, 28), np.uint8))
    for change in (lambda b: b[:-1], lambda b: b + b"0", lambda b: b[:9], lambda b: b"1" + b[1:]):
        images.write_bytes(change(images.read_bytes()))
        with pytest.raises(DataError, match="fetch it again"):
            load("mnist", data_dir=tmp_path)
        write_idx(images, np.zeros((2, 28, 28), np.uint8))
    images.rename(tmp_path / (images.name + ".gz"))
    with pytest.raises(DataError, match="fetch it again"):
        load("mnist", data_dir=tmp_path)
    (tmp_path / "test_batch.bin").write_bytes(bytes(3073 * 2 - 1))
    with pytest.raises(DataError, match="fetch it again"):
        load("cifar10", data_dir=tmp_path)


def test_an_idx_bomb_is_refused_by_its_header(tmp_path):
    head = struct.pack(">4i", 0x803, 2**30, 2**10, 2**10)
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(head)
    with pytest.raises(DataError, match="more than any file"):
        load("mnist", data_dir=tmp_path)


def test_missing_and_unknown(tmp_path):
    with pytest.raises(DataError, match="--data-dir"):
        load("mnist")
    with pytest.raises(DataError, match="no t10k-images"):
        load("mnist", data_dir=tmp_path)
    with pytest.raises(ValueError, match="Did you mean 'digits'"):
        load("digit")
    with pytest.raises(ValueError, match="Did you mean 'test'"):
        load("digits", split="tests")
    with pytest.raises(DataError, match="no such file"):
        load(str(tmp_path / "no.npz"))
    with pytest.raises(DataError, match="no such file"):
        load(str(tmp_path))
    with pytest.raises(DataError, match="one split"):
        load(str(tmp_path / "no.npz"), split="train")
    (tmp_path / "a.csv").write_text("1,2")
    with pytest.raises(DataError, match="not a data file"):
        load(str(tmp_path / "a.csv"))


def test_checked_takes_tensors():
    data = checked(torch.from_numpy(X).double(), torch.from_numpy(Y), name="t")
    assert data.x.dtype == torch.float32
    assert data.classes == ("0", "1", "2")
