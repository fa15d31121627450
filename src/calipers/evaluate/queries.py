"""A network and a query about it, read together."""

from __future__ import annotations

from pathlib import Path

from calipers.errors import SpecError
from calipers.graph.graph import Network
from calipers.graph.onnx import load_onnx
from calipers.vnnlib import Query, load


def read(
    model: str | Path, path: str | Path, name: str | None = None, *, network: Network | None = None
) -> tuple[Network, Query]:
    """Network and query from their files; they fit each other.

    Args:
        name: of the network, as the query should declare it.
        network: the one in the file ``model``, if it was read before.

    Raises:
        NoInputs: nothing can break the query, see `calipers.vnnlib.load`.
        CalipersError, OSError: a file cannot be read, or they do not fit.
    """
    if not Path(path).is_file():
        raise SpecError(f"{path}: no such file")
    if not Path(model).is_file():
        raise SpecError(f"{model}: no such file")
    network = network or load_onnx(model)
    query = load(path, input_shape=network.input_shape, dtype=network.dtype)
    fit(network, query)
    if name is not None and query.network is not None and name != query.network:
        raise SpecError(f"--network: {name!r} is not declared; {path} declares {query.network!r}")
    return network, query


def fit(network: Network, query: Query) -> None:
    """Refuse a query of another network.

    Raises:
        SpecError: another number of outputs, or another element type than the network's.
    """
    if query.output.size != network.num_classes:
        raise SpecError(
            f"{query.path}: declares {query.output.size} outputs, the network has {network.num_classes}; is this the "
            "network of the query?"
        )
    own = str(network.dtype).removeprefix("torch.")
    for variable in (query.input, query.output):
        if variable.dtype not in (None, network.dtype):
            declared = str(variable.dtype).removeprefix("torch.")
            raise SpecError(
                f"{query.path}: {variable.name} is declared {declared}, the network computes in {own}; declare it "
                f"{own}, or real"
            )
