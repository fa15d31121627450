"""What may be pointed at other people's files: each promise with its tests, here or by name in `PROMISES`.

A promise without a test that exists fails `test_every_promise_has_its_tests`.
"""

from __future__ import annotations

import ast
import json
import math
import os
import pickle
import re
import socket
import sys
import time
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from calipers import ThreatModel, audit, save_onnx
from calipers.data import load, load_mask
from calipers.errors import CalipersError, DataError, ModelError
from calipers.evaluate.bench import Result, _line, read_results
from calipers.evaluate.cascade import Stage, clean, select
from calipers.evaluate.certified import read_certified
from calipers.evaluate.empirical import empirical
from calipers.evaluate.runs import exported, read
from calipers.evaluate.witnesses import load_witnesses
from calipers.files import bomb, cell, text_of
from calipers.graph.capture import capture
from calipers.graph.onnx import load_onnx
from calipers.models import load_model, load_weights
from calipers.training.checkpoints import load as load_checkpoint
from peak import peak, restart

ROOT = Path(__file__).parents[1]
SOURCES = {p.relative_to(ROOT / "src").as_posix(): p for p in (ROOT / "src").rglob("*.py")}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in SOURCES.items()}

PROMISES: dict[str, tuple[str, ...]] = {
    "data files run no code": (
        "test_no_file_runs_code", "test_layers::test_no_module_unpickles_prints_or_swallows",
        "test_layers::test_each_offence_is_seen", "test_data::test_bad_npz",
    ),
    "code runs only if it is named on the command line": (
        "test_no_module_beside_the_data_is_imported", "test_settings_name_no_code",
        "test_a_python_file_is_run_only_with_its_factory_named",
    ),
    "external data of ONNX files stay beside them": ("test_onnx::test_external_data_elsewhere_are_refused",),
    "huge declared tensors are refused before allocation": (
        "test_onnx::test_huge_declared_sizes_are_refused_before_allocation", "test_huge_arrays_are_refused",
        "test_data::test_an_idx_bomb_is_refused_by_its_header",
    ),
    "protobuf's limits are named": ("test_deep_and_long_protobuf",),
    "decompression is bounded": (
        "test_onnx::test_compressed_bombs_are_refused", "test_archives_that_are_bombs",
        "test_parser_limits::test_beyond_the_limit_nothing_is_read",
        "test_check_corrupted::test_bombs_take_neither_time_nor_memory",
    ),
    "queries are read in linear time": (
        "test_parser_limits::test_a_million_deep_is_an_error_at_once",
        "test_parser_limits::test_exponential_clauses_are_an_error_at_once",
        "test_parser_limits::test_time_is_linear_in_the_text", "test_parser_limits::test_forty_megabytes",
        "test_parser_limits::test_any_bytes_are_an_answer_or_an_error", "test_numbers_of_queries",
    ),
    "settings are plain data": ("test_deep_json_is_named", "test_nothing_reads_yaml"),
    "no string of a report becomes markup": (
        "test_report::test_no_string_becomes_markup", "test_report::test_the_page_is_self_contained_and_says_it_all",
        "test_report_in_browser::test_it_loads_nothing_and_fits",
        "test_report_in_browser::test_hostile_strings_stay_text",
        "test_explorer::test_hostile_names_stay_text",
    ),
    "tables run no formulas": ("test_cells_come_back_and_run_nothing", "test_a_run_s_table_runs_nothing"),
    "nothing listens but to this machine": (
        "test_only_named_modules_talk_to_the_network",
        "test_explorer::test_by_default_only_the_loopback_interface_is_bound",
        "test_explorer::test_beyond_this_machine_there_is_always_a_token",
        "test_explorer::test_other_host_names_are_refused",
        "test_explorer::test_other_sites_and_other_methods_are_refused",
        "test_explorer::test_wrong_paths_and_values_are_named_and_harmless",
        "test_explorer::test_nothing_is_written",
    ),
    "Ray: loopback, a token, no dashboard": (
        "test_cluster::test_a_cluster_of_our_own_is_closed_to_others",
        "test_cluster::test_a_lost_node_changes_nothing", "test_cluster::test_old_versions_are_refused",
    ),
    "a kill damages no run": (
        "test_workers::test_killed_workers_change_nothing",
        "test_workers::test_a_killed_driver_loses_the_batch_in_progress_only",
        "test_store::test_killed_and_resumed_is_uninterrupted",
        "test_store::test_any_damage_is_found_and_the_rest_is_kept",
    ),
    "children are limited, and their end is a reason": (
        "test_milp::test_a_lack_of_memory_is_a_status", "test_milp::test_a_crash_is_a_status",
        "test_workers::test_a_crash_and_a_lack_of_memory_cost_one_example_each",
        "test_bench::test_a_worker_that_dies_or_hangs_is_replaced",
    ),
    "downloads are asked for, and checked": (
        "test_downloads::test_anything_else_is_refused_and_leaves_nothing",
        "test_downloads::test_the_checksums_are_the_real_files", "test_only_named_modules_talk_to_the_network",
    ),
    "archives give their named members and nothing else": (
        "test_downloads::test_an_archive_gives_its_members_and_nothing_else",
    ),
    "results that are passed on hold no folders and no user": ("test_results_name_no_folder_and_no_user",),
    "versions are pinned, with what was mended as lower limits": ("test_dependencies_are_recent_enough",),
    "a network made to deceive is seen": (
        "test_inspect::test_cancellation_is_reported",
        "test_bounds_rounding::test_a_backdoor_in_the_rounding_is_refused",
    ),
}  # fmt: skip
PROMISED = 19  # rows of the list of threats


def functions_of(file: str) -> set[str]:
    tree = ast.parse((ROOT / "tests" / f"{file}.py").read_text(encoding="utf-8"))
    return {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}


def test_every_promise_has_its_tests() -> None:
    assert len(PROMISES) == PROMISED
    for promise, tests in PROMISES.items():
        assert tests, promise
        for test in tests:
            file, _, name = test.rpartition("::")
            assert name in functions_of(file or Path(__file__).stem), f"{promise}: no test {test}"


# -- files that would run code ---------------------------------------------------------------------------------


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.canary),)


def evil_files(folder: Path) -> tuple[Path, dict[str, Path]]:
    """Files of every kind that is read, each of which would make the canary if it were unpickled."""
    canary = folder / "canary"
    evil, raw = Evil(canary), pickle.dumps(Evil(canary))
    files = {name: folder / name for name in (
        "whole.pt", "state.pt", "old.pth", "raw.pt", "net.safetensors", "x.npz", "x.npy", "mask.npy",
        "witnesses.npz", "checkpoint.pt", "net.onnx", "q.vnnlib", "robust.npy", "robust.json", "net.pt2",
    )}  # fmt: skip
    torch.save(evil, files["whole.pt"])
    torch.save({"weight": torch.zeros(2), "extra": evil}, files["state.pt"])
    torch.save(evil, files["old.pth"], _use_new_zipfile_serialization=False)
    torch.save({"identity": "{}", "state": {"a": evil}}, files["checkpoint.pt"])
    objects = np.array([evil], dtype=object)
    np.savez(files["x.npz"], x=objects, y=np.array([0]))
    np.savez(files["witnesses.npz"], **dict.fromkeys(("x", "y", "clean", "format"), objects))
    for name in ("x.npy", "mask.npy", "robust.npy"):
        np.save(files[name], objects)
    for name in ("raw.pt", "net.safetensors", "net.onnx", "q.vnnlib", "robust.json", "net.pt2"):
        files[name].write_bytes(raw)
    with files["x.npy"].open("rb") as file:  # the corpus is a live one
        np.load(file, allow_pickle=True)
    assert canary.is_dir()
    canary.rmdir()
    return canary, files


READERS: dict[str, Callable[[Path], object]] = {
    "whole.pt": load_weights,
    "state.pt": load_weights,
    "old.pth": load_weights,
    "raw.pt": load_weights,
    "net.safetensors": load_weights,
    "net.pt2": lambda p: load_model(str(p)),
    "net.onnx": lambda p: load_model(str(p)),
    "x.npz": lambda p: load(str(p)),
    "x.npy": lambda p: load(str(p.rename(p.parent / "x.npz"))),
    "mask.npy": load_mask,
    "witnesses.npz": load_witnesses,
    "checkpoint.pt": lambda p: load_checkpoint(p, {}),
    "robust.npy": lambda p: read_certified(p, {}, torch.arange(1), 1),
    "robust.json": lambda p: read_certified(p, {}, torch.arange(1), 1),
}


@pytest.mark.parametrize("name", READERS)
def test_no_file_runs_code(name: str, tmp_path: Path) -> None:
    canary, files = evil_files(tmp_path)
    with pytest.raises((CalipersError, ValueError)):
        READERS[name](files[name])
    assert not canary.exists()


COMMANDS = (
    ("audit", "digits_pgd", "--data", "x.npz"),
    ("audit", "net.onnx"),
    ("audit", "digits_pgd", "--weights", "whole.pt"),
    ("audit", "digits_pgd", "--mask", "mask.npy"),
    ("attack", "digits_pgd", "--certified", "robust.npy"),
    ("replay", "witnesses.npz", "--network", "digits_pgd"),
    ("verify", "net.onnx", "q.vnnlib"),
    ("inspect", "net.pt2"),
    ("check", "witnesses.npz", "--network", "net.onnx"),
    ("gate", "robust.json", "--certified", "50%"),
)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_no_command_runs_code_from_files(
    run: Any, command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    canary, _ = evil_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*command)
    assert code != 0
    assert not canary.exists()
    blamed = [word for word in command if "." in word] + ["refused: the header"]
    assert any(word in out + err for word in blamed)  # the file is what is wrong


# -- code ------------------------------------------------------------------------------------------------------


def test_no_module_beside_the_data_is_imported(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder with a network, data, and Python files of names that might be looked up."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
    data = load("digits")
    save_onnx(capture(net, data.x[:1]), tmp_path / "net.onnx")
    np.savez(tmp_path / "data.npz", x=data.x[:5].numpy(), y=data.y[:5].numpy())
    canary = tmp_path / "canary"
    for name in (
        "net",
        "data",
        "digits",
        "model",
        "conftest",
        "sitecustomize",
        "setup",
        "calipers_user_net",
    ):
        (tmp_path / f"{name}.py").write_text(f"import os; os.mkdir({str(canary)!r})")
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    code, _, err = run(
        "audit", "net.onnx", "--data", "data.npz", "--methods", "clean", "--run", "run"
    )
    assert code == 0, err
    loaded = [getattr(sys.modules[name], "__file__", None) for name in set(sys.modules) - before]
    assert not [file for file in loaded if file and str(tmp_path) in file]
    assert not canary.exists()


@pytest.mark.parametrize(
    "value", ["os.system", "builtins:eval", "__import__('os')", "!!python/object:os.system"]
)
@pytest.mark.parametrize("key", ["objective", "network", "optimizer", "epochs", "data"])
def test_settings_name_no_code(run: Any, key: str, value: str, tmp_path: Path) -> None:
    code, _, err = run(
        "train", "digits_standard", "--set", f"{key}={value}", "--run", tmp_path / "r"
    )
    assert code == 2
    assert err.startswith("calipers: ")
    assert key in err or value in err
    assert not (tmp_path / "r").exists()


def test_a_python_file_is_run_only_with_its_factory_named(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    file = tmp_path / "model.py"
    file.write_text(f"import os\nos.mkdir({str(canary)!r})\n")
    for spec in (str(file), f"{file}x:make", f"{tmp_path}/model"):
        with pytest.raises((ModelError, ValueError)):
            load_model(spec, None, (3,))
    assert not canary.exists()


# -- sizes -----------------------------------------------------------------------------------------------------


def quick_and_small(call: Callable[[], object], error: type[Exception], message: str) -> None:
    """The error, within two CPU seconds and 300 MiB."""
    restart()
    before, begin = peak(), time.process_time()
    with pytest.raises(error, match=message):
        call()
    assert time.process_time() - begin < 2
    assert peak() - before < 300 << 20


def zipped(path: Path, member: str, size: int, head: bytes = b"") -> Path:
    """An archive with one member of ``size`` zeros."""
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open(member, "w", force_zip64=True) as out,
    ):
        out.write(head)
        block = bytes(1 << 20)
        for _ in range(size >> 20):
            out.write(block)
    return path


def header(shape: tuple[int, ...]) -> bytes:
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}"
    padded = text + " " * (-(len(text) + 11) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + len(padded).to_bytes(2, "little") + padded.encode()


def test_archives_that_are_bombs(tmp_path: Path) -> None:
    size = 512 << 20
    head = header((size // 4, 1))
    data = zipped(tmp_path / "x.npz", "x.npy", size, head)
    assert data.stat().st_size < 4 << 20
    assert bomb(data) >= size
    quick_and_small(lambda: load(str(data)), DataError, "bytes once unpacked")
    quick_and_small(lambda: load_witnesses(data), DataError, "bytes once unpacked")
    weights = zipped(tmp_path / "w.pt", "archive/data/0", size)
    quick_and_small(lambda: load_weights(weights), ModelError, "bytes once unpacked")
    quick_and_small(lambda: load_checkpoint(weights, {}), CalipersError, "bytes once unpacked")


def test_what_is_honest_is_no_bomb(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "mask.npz", x=np.zeros((1000, 1000)))  # dense, but small
    np.savez_compressed(tmp_path / "data.npz", x=np.random.default_rng(0).random((500, 500)))
    torch.save({"w": torch.zeros(1000)}, tmp_path / "w.pt")
    (tmp_path / "no.zip").write_bytes(b"PK\x03\x04 but no archive")
    (tmp_path / "empty").write_bytes(b"")
    assert [bomb(file) for file in sorted(tmp_path.iterdir())] == [0] * 5
    assert bomb(tmp_path / "not there") == 0


@pytest.mark.parametrize("shape", [(1 << 40, 3), (1 << 62, 1 << 62), (1 << 34,), (-1, 4)])
def test_huge_arrays_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """Headers that declare more than the file has."""
    raw = header(shape) + bytes(400)
    (tmp_path / "x.npy").write_bytes(raw)
    (tmp_path / "y.npy").write_bytes(raw)
    with zipfile.ZipFile(tmp_path / "d.npz", "w") as archive:
        archive.writestr("x.npy", raw)
        archive.writestr("y.npy", raw)
    for path in (tmp_path, tmp_path / "d.npz"):
        quick_and_small(lambda path=path: load(str(path)), DataError, "numpy file|too large|empty")  # type: ignore[misc]


def field(number: int, content: bytes) -> bytes:
    """A field of a protobuf message that holds bytes or another message."""
    size, length = b"", len(content)
    while length > 127:
        size += bytes([length & 127 | 128])
        length >>= 7
    return bytes([number << 3 | 2]) + size + bytes([length]) + content


def test_deep_and_long_protobuf(tmp_path: Path) -> None:
    graph = b""
    for _ in range(200):  # a graph in an attribute of a node of a graph
        graph = field(1, field(4, b"If") + field(5, field(1, b"then_branch") + field(6, graph)))
    deep = tmp_path / "deep.onnx"
    deep.write_bytes(field(7, graph))
    quick_and_small(lambda: load_onnx(deep), CalipersError, "deep.onnx")
    long = tmp_path / "long.onnx"
    with long.open("wb") as file:
        file.truncate((1 << 31) + (1 << 27))  # sparse: takes no room
    quick_and_small(lambda: load_onnx(long), CalipersError, "exceed max_bytes")


@pytest.mark.parametrize(
    "number", ["1e1000000", "1e-1000000", "nan", "inf", "1_0", "0x10", "1e", "--1", "9" * 5000]
)
def test_numbers_of_queries(number: str) -> None:
    from calipers.vnnlib import loads

    text = "(declare-const X_0 Real)(declare-const Y_0 Real)(assert (>= X_0 0))(assert (<= X_0 1))"
    begin = time.process_time()
    with pytest.raises(CalipersError):
        loads(f"{text}(assert (<= Y_0 {number}))")
    assert time.process_time() - begin < 1


# -- plain data ------------------------------------------------------------------------------------------------


def test_deep_json_is_named(run: Any, tmp_path: Path) -> None:
    deep = "[" * 200_000
    for name in ("result.json", "run.json"):
        (tmp_path / name).write_text(deep)
    code, _, err = run("gate", tmp_path / "result.json", "--certified", "50%")
    assert code == 2
    assert "result.json" in err
    for call in (
        lambda: read(tmp_path),
        lambda: read_certified(tmp_path / "result.json", {}, torch.arange(1), 1),
        lambda: audit(
            nn.Linear(4, 2),
            (torch.rand(2, 4), torch.tensor([0, 1])),
            ThreatModel(2, 0.1),
            run=tmp_path,
        ),
    ):
        with pytest.raises(CalipersError):
            call()


def imported(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def test_nothing_reads_yaml() -> None:
    for name, tree in TREES.items():
        assert not {m.split(".")[0] for m in imported(tree)} & {
            "yaml",
            "shelve",
            "xmlrpc",
            "imp",
        }, name


# -- tables ----------------------------------------------------------------------------------------------------

FORMULAS = ("=1+1", "+1", "-2", "@SUM(A1)", "\tx", "=cmd|' /C calc'!A0", "'=1")


@pytest.mark.parametrize("text", [*FORMULAS, "plain", "", "'", "it's", "a=b"])
def test_cells_come_back_and_run_nothing(text: str) -> None:
    written = str(cell(text))
    assert not written.startswith(("=", "+", "-", "@", "\t", "\r"))
    if not text.startswith("'"):
        assert text_of(written) == text
    assert cell(-1.5) == -1.5


def test_results_of_benchmarks_come_back(tmp_path: Path) -> None:
    result = Result(
        "=suite",
        "@net.onnx",
        "-p.vnnlib",
        10.0,
        "error",
        lower=-math.inf,
        reason="=cmd|x",
        version="v",
    )
    file = tmp_path / "r.csv"
    file.write_text(
        _line(list(vars(Result("s", "n", "p", 1.0, "sat")))) + _line(list(vars(result).values()))
    )
    assert read_results(file) == [result]
    cells = file.read_text().splitlines()[1].split(",")
    assert not [c for c in cells if c.startswith(("=", "+", "@")) or (c[:1] == "-" and c != "-inf")]


def test_a_run_s_table_runs_nothing(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 3)).eval()
    x = torch.rand(3, 4)
    stages = (Stage("=HYPERLINK(1)", "attack", clean),)
    audit(net, (x, net(x).argmax(1)), ThreatModel(2, 0.1), cascade=stages, run=tmp_path)
    text = exported(read(tmp_path), ".csv").decode()
    assert "'=HYPERLINK(1)" in text
    assert not re.search(r"(^|,)[=+@]", text, re.MULTILINE)


# -- the network -----------------------------------------------------------------------------------------------

TALKERS = {
    "calipers/cli/serving.py": {"uvicorn"},
    "calipers/downloads.py": {"urllib"},
    "calipers/evaluate/cluster.py": {"socket", "ray"},
    "calipers/evaluate/workers.py": {"multiprocessing"},
}
NETWORK = ("socket", "socketserver", "http", "urllib", "ssl", "ftplib", "smtplib", "asyncio", "uvicorn", "fastapi",
           "starlette", "requests", "httpx", "aiohttp", "ray", "multiprocessing", "webbrowser", "xmlrpc")  # fmt: skip
SERVES = "calipers/serve"  # the explorer, whose own tests say to whom it listens


def test_only_named_modules_talk_to_the_network() -> None:
    for name, tree in TREES.items():
        talks = {m for m in imported(tree) if m != "urllib.parse"}  # which only takes texts apart
        used = {m.split(".")[0] for m in talks} & set(NETWORK)
        if name.startswith(SERVES):
            assert (ROOT / "tests" / "test_explorer.py").exists(), name
            continue
        assert used <= TALKERS.get(name, set()), f"{name} imports {sorted(used)}"
        shells = [
            ast.unparse(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call)
            and (ast.unparse(n.func) in ("os.system", "os.popen") or any(k.arg == "shell" for k in n.keywords))
        ]  # fmt: skip
        assert not shells, name


# -- what is passed on -----------------------------------------------------------------------------------------


def test_results_name_no_folder_and_no_user(tmp_path: Path) -> None:
    folder = tmp_path / "secret-folder"
    folder.mkdir()
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    x = torch.rand(6, 4)
    y = net(x).argmax(1)
    save_onnx(capture(net, x), folder / "net.onnx")
    np.savez(folder / "data.npz", x=x.numpy(), y=y.numpy())
    network, data = load_onnx(folder / "net.onnx"), load(str(folder / "data.npz"))
    threat = ThreatModel(math.inf, 0.3)
    result = audit(
        network,
        data,
        threat,
        cascade=select(["fgsm", "crown"]),
        run=folder / "run",
        samples=5,
        diagnose=True,
    )
    result.report(folder / "report.html")
    attacked = empirical(network, data, threat, level="quick")
    passed_on = {
        "json": json.dumps(result.json()),
        "report": (folder / "report.html").read_text(),
        "attack": json.dumps(attacked.json()),
        "csv": exported(read(folder / "run"), ".csv").decode(),
        "run as json": exported(read(folder / "run"), ".json").decode(),
        "tex": exported(read(folder / "run"), ".tex").decode(),
    }
    known = ["secret-folder", str(tmp_path), str(Path.home()) + "/", socket.gethostname()]
    user = os.environ.get("USER", "")
    known += [user] if len(user) > 5 else []  # "root" is a word, too
    for name, text in passed_on.items():
        for word in known:
            assert word not in text, f"{name} says {word}"


# -- dependencies ----------------------------------------------------------------------------------------------

MENDED = {"torch": (2, 10), "onnx": (1, 21), "jinja2": (3, 1), "ray": (2, 54)}


def test_dependencies_are_recent_enough() -> None:
    """Lower limits at the versions that mended what is known, and a pinned version of the largest."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [
        *project["dependencies"],
        *(d for e in project["optional-dependencies"].values() for d in e),
    ]
    limits = {}
    for text in asked:
        name, version = re.split("[>=]=", text)[:2]
        limits[name] = tuple(int(part) for part in version.split(".")[:2])
    for name, least in MENDED.items():
        assert limits[name] >= least, name
    assert re.search(r"^torch==\d", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
