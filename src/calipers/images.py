"""Folders of images, one folder per class; needs Pillow (the ``images`` extra)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from calipers.errors import DataError

SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}
)
LARGEST = 2**24  # pixels of one image


def classes_in(folder: Path) -> list[str]:
    """The names of the folders in ``folder`` that hold images, sorted: a class each."""
    return sorted(d.name for d in folder.iterdir() if d.is_dir() and any(_files(d)))


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())


def read(folder: Path) -> tuple[Any, Any, tuple[str, ...]]:
    """All images as bytes (N, C, H, W), their class numbers (N,), and the classes' names.

    Grey images have one channel if all are grey, otherwise all have three. Transparency is dropped.

    Raises:
        DataError: Pillow is missing, an image is damaged, too large, or of another size than the others.
    """
    names = classes_in(folder)
    files = [(path, number) for number, name in enumerate(names) for path in _files(folder / name)]
    opened = [_open(path) for path, _ in files]
    grey = all(kind in ("L", "1", "I;16") for kind, _ in opened)
    shapes = [pixels.shape[:2] for _, pixels in opened]
    for (path, _), shape in zip(files, shapes, strict=True):
        if shape != shapes[0]:
            raise DataError(
                f"{path}: {shape[1]} x {shape[0]} pixels, but {files[0][0].name} has {shapes[0][1]} x {shapes[0][0]}; "
                "bring all images to one size first"
            )
    stack = np.stack([pixels[..., :1] if grey else pixels for _, pixels in opened])
    labels = np.array([number for _, number in files], dtype=np.int64)
    return np.ascontiguousarray(stack.transpose(0, 3, 1, 2)), labels, tuple(names)


def _open(path: Path) -> tuple[str, Any]:
    """The image's own mode, and its pixels in three channels."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise DataError(
            f"{path.parent.parent}: reading images needs Pillow; pip install 'calipers[images]', or store the images "
            "in an .npz with x and y"
        ) from None
    try:
        with Image.open(path) as image:
            width, height = image.size
            if width * height > LARGEST:
                raise DataError(f"{path}: {width} x {height} pixels is more than {LARGEST:,}")
            return image.mode, np.asarray(image.convert("RGB"))
    except (
        UnidentifiedImageError,
        OSError,
        ValueError,
        SyntaxError,
        Image.DecompressionBombError,
    ) as error:
        raise DataError(f"{path}: not an image that can be read ({str(error)[:100]})") from None
