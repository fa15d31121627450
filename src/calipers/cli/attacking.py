"""What ``attack``, ``replay`` and ``transfer`` do, with the heavy imports."""

from __future__ import annotations

import inspect
import json
import math
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from calipers.attacks import ATTACKS
from calipers.attacks.diagnostics import lines
from calipers.cli.commands import Subject, console, progress_bar
from calipers.cli.options import seconds_of, shape_of, writable
from calipers.data import load
from calipers.errors import SpecError, StoreMismatch, unknown_name
from calipers.evaluate.attack_tables import replay_table, transfer_table
from calipers.evaluate.diagnosis import diagnosis
from calipers.evaluate.empirical import empirical
from calipers.evaluate.replay import replay as run_replay
from calipers.evaluate.replay import replay_assignment
from calipers.evaluate.store import model_digest
from calipers.evaluate.transfer import transfer as run_transfer
from calipers.evaluate.witnesses import (
    Witnesses,
    load_witnesses,
    require_free,
    same_examples,
    save_witnesses,
)
from calipers.files import write_atomically
from calipers.graph.graph import Network, evaluating
from calipers.models import load_model
from calipers.vnnlib import load as load_query


def attack(
    subject: Subject,
    *,
    method: str,
    level: str | None,
    options: Mapping[str, int | None],
    samples: int | None,
    seconds: str | None,
    passes: float | None,
    certified: Path | None,
    diagnose: bool,
    save: Path | None,
    json_file: Path | None,
    seed: int,
    allow_softmax: bool,
) -> bool:
    """Run, print, write; returns whether Ctrl-C ended it early."""
    chosen = _configured(method, options)
    limit = None if seconds is None else seconds_of(seconds, "--budget")
    if json_file is not None:
        writable("--json", json_file.absolute())
    if save is not None:
        require_free(save.absolute())
    network, data, threat = subject.load()
    with progress_bar() as show:
        result = empirical(
            network,
            data,
            threat,
            method=chosen,
            level=level,
            passes=math.inf if passes is None else passes,
            seconds=limit,
            samples=samples,
            seed=seed,
            certified=certified,
            progress=show,
            allow_softmax=allow_softmax,
            name=subject.name,
        )
    console().print(result.table())
    if diagnose:
        for line in lines(diagnosis(network, data, threat, seed)):
            console().print(line, markup=False, highlight=False, soft_wrap=True)
    if save is not None:
        save_witnesses(save, result.witnesses)
        sys.stderr.write(f"witnesses: {save}\n")
    _write(json_file, result.json())
    return result.stopped == "interrupted"


def _configured(method: str, options: Mapping[str, int | None]) -> str | Callable[..., Tensor]:
    """The attack of that name with the options that were given.

    Raises:
        ValueError: no such attack, or it has no such option.
    """
    if method not in ATTACKS:
        raise unknown_name("--method", method, ATTACKS)
    given = {k: v for k, v in options.items() if v is not None}
    for option, value in given.items():
        having = [n for n, f in ATTACKS.items() if option in inspect.signature(f).parameters]
        if method not in having:
            raise ValueError(f"--{option}: {method} has no such option; {', '.join(having)} have")
        if value < 1:
            raise ValueError(f"--{option}: {value} is not at least 1")
    return partial(ATTACKS[method], **given) if given else method


def replay(
    witness: Path,
    model: str,
    *,
    weights: Path | None,
    input_shape: str | None,
    query: Path | None,
    data: str | None,
    data_dir: Path | None,
    converted: bool,
    json_file: Path | None,
) -> bool:
    """Replay, print, write; returns whether any counterexample fails."""
    if json_file is not None:
        writable("--json", json_file.absolute())
    if witness.is_dir() or witness.suffix == ".npz":
        if query is not None:
            raise ValueError("--property: witnesses bring their own; leave it out")
        witnesses = load_witnesses(witness)
        network = load_model(model, weights, _shape(input_shape, witnesses))
        if not converted:
            _same_network(witnesses, network, model)
        if data is not None:
            examples = load(data, data_dir=data_dir)
            same_examples(witnesses, examples.x, examples.y, examples.name)
        replayed, notes = run_replay(witnesses, network)
        said = witnesses.threat.describe()
    else:
        if query is None:
            raise SpecError(
                f"{witness}: not an .npz file; a counterexample in VNN-LIB's format needs --property FILE.vnnlib"
            )
        network = load_model(model, weights, shape_of(input_shape))
        question = load_query(query, input_shape=network.input_shape, dtype=network.dtype)
        one, notes = replay_assignment(witness, question, network)
        replayed, said = [one], query.name
    console().print(replay_table(replayed, f"{witness.name} on {Path(model).name}, {said}", notes))
    _write(
        json_file,
        {
            "network": Path(model).name,
            "digest": model_digest(network),
            "n": len(replayed),
            **{k: sum(r.verdict == k for r in replayed) for k in ("strict", "tolerant", "fails")},
            "replays": [r.json() for r in replayed],
            "notes": list(notes),
        },
    )
    return any(r.verdict == "fails" for r in replayed)


def _same_network(witnesses: Witnesses, network: Network, model: str) -> None:
    found = model_digest(network)
    if found != witnesses.model:
        raise StoreMismatch(
            f"--network: {Path(model).name} (digest {found}) is not the network that these witnesses break "
            f"({witnesses.model_name}, digest {witnesses.model}). If it is the same one in another form, add "
            "--converted; to try them on another one, use calipers transfer"
        )


def transfer(
    file: Path,
    model: str,
    *,
    weights: Path | None,
    input_shape: str | None,
    json_file: Path | None,
) -> None:
    """Apply, print, write."""
    if json_file is not None:
        writable("--json", json_file.absolute())
    witnesses = load_witnesses(file)
    network = load_model(model, weights, _shape(input_shape, witnesses))
    witnesses.require_fit(network)
    notes = []
    if model_digest(network) == witnesses.model:
        notes.append("this is the model that the witnesses were found on")
    x, clean = (t.to(network.device, network.dtype) for t in (witnesses.x, witnesses.clean))
    with evaluating(network.module):
        result = run_transfer(x, witnesses.y, network, clean=clean)
    console().print(transfer_table(result, witnesses, Path(model).name, notes))
    _write(
        json_file,
        {
            **result.json(),
            "from": witnesses.model_name,
            "to": Path(model).name,
            "data": witnesses.data_name,
            "transferred_examples": witnesses.index[result.fooled].tolist(),
            "notes": notes,
        },
    )


def _shape(text: str | None, witnesses: Witnesses) -> tuple[int, ...]:
    return shape_of(text) or tuple(witnesses.x.shape[1:])


def _write(file: Path | None, content: Mapping[str, Any]) -> None:
    if file is not None:
        write_atomically(file, json.dumps(content, indent=2, allow_nan=False) + "\n")
