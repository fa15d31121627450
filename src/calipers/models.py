"""From what a user names to a `Network`: an ONNX file, a factory in a Python file, or a name of the zoo.

Weights come from ``.safetensors``, or from ``.pt`` files read weights-only: a file that would need to run code
to be read is refused, there is no fallback.
"""

from __future__ import annotations

import importlib.util
import pickle
import sys
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from calipers.errors import CalipersError, ModelError, unknown_name
from calipers.files import bomb, write_atomically
from calipers.graph.graph import Network
from calipers.zoo import ZOO

_ONNX = (".onnx", ".onnx.gz")


def load_model(
    spec: str,
    weights: str | Path | None = None,
    example_shape: Sequence[int] | None = None,
) -> Network:
    """The network that ``spec`` names, in evaluation mode.

    Args:
        spec: ``file.onnx`` (or ``.onnx.gz``), ``module.py:factory`` (a function without arguments that returns an
            ``nn.Module``; the file is run), or a name of the zoo.
        weights: a ``.safetensors`` or ``.pt`` file for the latter two.
        example_shape: the shape of one input, for a factory.

    Raises:
        ModelError: a file is missing, malformed or does not fit; the message has a remedy.
        ValueError: no such name in the zoo.
    """
    if spec.endswith(_ONNX):
        if weights is not None:
            raise ModelError(f"{spec}: an ONNX file has its own weights; leave --weights out")
        return _from_onnx(spec)
    path, colon, factory = spec.rpartition(":")
    if colon and path.endswith(".py"):
        if example_shape is None:
            raise ModelError(
                f"{spec}: the shape of one input is not known; give --input-shape, such as 1,28,28, or data"
            )
        module, shape = _from_factory(Path(path), factory), tuple(example_shape)
    elif spec in ZOO:
        module, shape = ZOO[spec].build(), ZOO[spec].shape
    else:
        raise _unknown(spec)
    packaged = ZOO[spec].weights if spec in ZOO else None
    if weights is not None:
        _fill(module, load_weights(weights), str(weights))
    elif packaged:
        resource = resources.files("calipers") / "zoo_data" / packaged
        with resources.as_file(resource) as file:
            _fill(module, load_weights(file), packaged)
    elif spec in ZOO:
        raise ModelError(
            f"{spec}: this is an architecture without packaged weights; give --weights"
        )
    from calipers.graph.capture import capture

    return capture(module.eval(), torch.zeros(1, *shape))


def _unknown(spec: str) -> Exception:
    if spec.endswith(".py"):
        return ModelError(
            f"{spec}: name the function that builds the model too, as {spec}:make_model"
        )
    if Path(spec).suffix in (".pt", ".pth", ".safetensors"):
        return ModelError(
            f"{spec}: these are weights without an architecture; give MODEL as module.py:factory (or a name of the "
            f"zoo) and --weights {spec}"
        )
    if Path(spec).suffix or len(Path(spec).parts) > 1:
        return ModelError(
            f"{spec}: not a model; expected FILE.onnx, MODULE.py:FACTORY or a name of the zoo"
        )
    return unknown_name("model", spec, [*ZOO, "FILE.onnx", "MODULE.py:FACTORY"])


def _from_onnx(spec: str) -> Network:
    path = Path(spec)
    if not path.is_file():
        raise ModelError(f"{spec}: no such file")
    _refuse_web_page(path)
    from calipers.graph.onnx import load_onnx

    return load_onnx(path)


def _refuse_web_page(path: Path) -> None:
    with path.open("rb") as file:
        head = file.read(64).lstrip().lower()
    if head.startswith((b"<!doc", b"<html", b"<?xml", b"version https://git-lfs")):
        raise ModelError(
            f"{path}: this is a web page or a Git LFS pointer, not a model; fetch the file itself"
        )


def _from_factory(path: Path, factory: str) -> nn.Module:
    if not path.is_file():
        raise ModelError(f"{path}: no such file")
    module = _import(path)
    build = getattr(module, factory, None)
    if not callable(build):
        public = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise unknown_name(f"{path}", factory, public)
    try:
        model = build()
    except Exception as error:
        raise ModelError(
            f"{path}:{factory}() failed: {type(error).__name__}: {error}; it is called without arguments"
        ) from error
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"{path}:{factory}() returned {type(model).__name__}; it must return an nn.Module"
        )
    return model


def _import(path: Path) -> ModuleType:
    """The module in ``path``; its folder is importable while it runs."""
    name = f"calipers_user_{path.stem}"
    found = importlib.util.spec_from_file_location(name, path)
    if found is None or found.loader is None:
        raise ModelError(f"{path}: not a Python file")
    module = importlib.util.module_from_spec(found)
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    sys.modules[name] = module  # dataclasses and pickling look classes up here
    try:
        found.loader.exec_module(module)
    except CalipersError:
        raise
    except Exception as error:
        raise ModelError(f"{path}: failed to run: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(folder)
    return module


def load_weights(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a ``.safetensors`` or ``.pt``/``.pth`` file, on the CPU. Never runs code from the file.

    Raises:
        ModelError: missing, truncated, a web page, not a plain state dict, or a pickle that would need to run code.
    """
    file = Path(path)
    if not file.is_file():
        raise ModelError(f"{file}: no such file")
    _refuse_web_page(file)
    if file.suffix == ".safetensors":
        return _safetensors(file)
    if size := bomb(file):
        raise ModelError(f"{file}: {size:,} bytes once unpacked, far more than weights compress to")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle protocol
            state = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported" in str(error) or "GLOBAL" in str(error) or "weights_only" in str(error):
            raise ModelError(
                f"{file}: not a plain state dict: reading it could run code ({_first(error)}), so it is refused. Save "
                "the tensors alone, torch.save(model.state_dict(), file), or as .safetensors"
            ) from None
        raise _damaged(file, error) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError, AttributeError,
            IndexError, zipfile.BadZipFile) as error:  # fmt: skip
        raise _damaged(file, error) from None
    return _plain(state, file)


def _safetensors(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state: dict[str, Tensor] = load_file(file, device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(file, error) from None
    return state


def save_weights(module: nn.Module, path: str | Path) -> None:
    """The module's state in a ``.safetensors`` file, whole or not at all; `load_weights` reads it."""
    from safetensors.torch import save

    state = {k: v.detach().cpu().contiguous() for k, v in module.state_dict().items()}
    write_atomically(path, save(state))


def _plain(state: Any, file: Path) -> dict[str, Tensor]:
    """A state dict, also one level down under the usual name."""
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not state:
        raise ModelError(f"{file}: holds {type(state).__name__}, not a state dict of named tensors")
    odd = [str(k) for k, v in state.items() if not isinstance(v, Tensor)]
    if odd:
        raise ModelError(
            f"{file}: entries {', '.join(odd[:5])} are not tensors; save model.state_dict() alone"
        )
    return {str(k): v for k, v in state.items()}


def _damaged(file: Path, error: Exception) -> ModelError:
    return ModelError(
        f"{file}: truncated or not a weights file ({_first(error)}); fetch or save it again"
    )


def _first(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = next((line for line in lines if "Unsupported" in line or "GLOBAL" in line), None)
    return (named or (lines[0] if lines else type(error).__name__))[:160]


def _fill(module: nn.Module, state: Mapping[str, Tensor], file: str) -> None:
    """Strict loading, with every difference named at once."""
    own = module.state_dict()
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [
        f"{k} is {tuple(state[k].shape)}, the model needs {tuple(own[k].shape)}"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    parts = [
        *([f"missing: {', '.join(missing[:8])}{' ...' if missing[8:] else ''}"] if missing else []),
        *([f"unexpected: {', '.join(extra[:8])}{' ...' if extra[8:] else ''}"] if extra else []),
        *([f"shapes: {'; '.join(shapes[:4])}{' ...' if shapes[4:] else ''}"] if shapes else []),
    ]
    if parts:
        raise ModelError(f"{file} does not fit {type(module).__name__}: {'. '.join(parts)}")
    module.load_state_dict(dict(state))
