"""Workers of a Ray cluster: the same results as those of this machine, a lost node included, and no door left open."""

import importlib.util
import json
import math
import os
import socket
import subprocess
import sys
import textwrap
import time

import pytest

from calipers import ThreatModel, audit
from calipers.data import load
from calipers.errors import WorkerError
from calipers.evaluate import cluster
from calipers.evaluate.cascade import select
from calipers.evaluate.cluster import LOOPBACK, OPEN, Cluster, Handler
from calipers.evaluate.workers import READY, TRIES, Lost, Raised, Worker
from calipers.models import load_model
from stored_runs import settled

THREAT = ThreatModel(math.inf, "0.1")
STAGES = select(["clean", "interval", "fgsm", "crown_ibp", "pgd-20", "crown"])
needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed (extra ray)"
)


def measure(directory, **options):
    data = load("digits")
    return audit(
        load_model("digits_pgd"), (data.x[:60], data.y[:60]), THREAT, cascade=STAGES, run=directory, workers=2,
        chunk=4, **options,
    )  # fmt: skip


# -- a cluster of two nodes --------------------------------------------------------------------------------


@pytest.fixture
def two_nodes(monkeypatch, tmp_path):
    """A cluster of two nodes on this machine, one processor each, with a token."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0123456789abcdef" * 2)
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster as Nodes

    quick = {
        "health_check_initial_delay_ms": 0,
        "health_check_period_ms": 300,
        "health_check_failure_threshold": 5,
    }
    nodes = Nodes()
    try:
        nodes.add_node(num_cpus=1, include_dashboard=False, _system_config=quick)
        second = nodes.add_node(num_cpus=1)
        yield nodes, second
    finally:
        ray.shutdown()
        nodes.shutdown()


STRANGER = """
    import sys
    from calipers.errors import WorkerError
    from calipers.evaluate import cluster
    from calipers.evaluate.cluster import Cluster, Handler

    cluster.JOIN = 20.0
    try:
        with Cluster(1, Handler, None, address=sys.argv[1]):
            print("let in")
    except WorkerError as error:
        print(error)
"""


def without_ray():
    return {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}


def stranger(address):
    """A process without the token that tries to join; its output is what it was told."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(STRANGER), address], stdout=subprocess.PIPE, text=True,
        env=without_ray(),
    )  # fmt: skip


@needs_ray
@pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::ResourceWarning"
)
def test_a_lost_node_changes_nothing(two_nodes, tmp_path):
    """Two nodes, of which one is lost in the midst: the table of two processes of this machine, bit by bit. Meanwhile
    a process without the token is not let in, and one that asks a port that is no cluster is told so."""
    nodes, second = two_nodes
    units = []

    def progress(at):
        units.append(at)
        if len(units) == 20:
            nodes.remove_node(second, allow_graceful=False)

    with socket.create_server((LOOPBACK, 0)) as silent:
        begin = time.monotonic()
        strangers = [stranger(nodes.address), stranger(f"{LOOPBACK}:{silent.getsockname()[1]}")]
        undisturbed = measure(tmp_path / "here")
        lost = measure(tmp_path / "ray", ray=nodes.address, progress=progress)
        said = [process.communicate(timeout=200)[0] for process in strangers]
        took = time.monotonic() - begin
    assert len(units) > 25
    assert lost.verdicts == undisturbed.verdicts
    assert OPEN not in lost.notes
    assert settled(tmp_path / "ray") == settled(tmp_path / "here")
    import ray

    assert not ray.is_initialized()  # what was joined is left
    for text in said:
        assert "let in" not in text
        assert text.startswith("ray: ")
        assert "cannot use" in text or "was not ready in 20 s" in text
    assert took < 200  # each of them gave up


# -- a cluster of our own ------------------------------------------------------------------------------------

AUTO = """
    import json, math, os, socket, sys
    import torch
    from calipers import ThreatModel
    from calipers.evaluate import cluster

    def prepare(factor):
        if factor < 0:
            raise ValueError("no such factor")
        return lambda task: os._exit(1) if task == 3 else (factor * task, os.environ["RAY_AUTH_MODE"])

    def listening():
        found = []
        for name in ("tcp", "tcp6"):
            for line in open(f"/proc/net/{name}").read().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A":
                    found.append((fields[1].split(":")[0], fields[9]))
        return found

    def ours():
        inodes = {}
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                text = open(f"/proc/{pid}/cmdline").read()
                if "ray" not in text and int(pid) != os.getpid():
                    continue
                for fd in os.listdir(f"/proc/{pid}/fd"):
                    link = os.readlink(f"/proc/{pid}/fd/{fd}")
                    if link.startswith("socket:["):
                        inodes[link[8:-1]] = pid
            except OSError:
                continue
        return inodes

    before = set(listening())
    tasks = iter([(n, 60.0) for n in range(1, 6)])
    with cluster.Cluster(2, prepare, 10) as team:
        answers = {task: answer for task, answer in team.answers(lambda: next(tasks, None))}
        import ray
        inodes = ours()
        doors = sorted({host for host, inode in set(listening()) - before if inode in inodes})
        address = ray.get_runtime_context().gcs_address
        dashboard = bool(ray._private.worker.global_worker.node.webui_url)
    tasks = iter([(6, 60.0)])
    with cluster.Cluster(None, prepare, 10) as team:  # once more in the same process
        again = [answer[0] for _, answer in team.answers(lambda: next(tasks, None))]
    out = {
        "again": again, "answers": {k: list(v) for k, v in answers.items()}, "doors": doors, "address": address,
        "dashboard": dashboard, "left": "RAY_AUTH_TOKEN" in os.environ, "up": ray.is_initialized(),
        "notes": list(team.notes),
    }
    print(json.dumps(out))
"""


@needs_ray
def test_a_cluster_of_our_own_is_closed_to_others(tmp_path):
    """Loopback only, a token, no dashboard; a worker that dies costs its task; nothing is left behind."""
    script = tmp_path / "auto.py"
    script.write_text(textwrap.dedent(AUTO))
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=300, env=without_ray(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    right = {str(n): [10 * n, "token"] for n in (1, 2, 4, 5)}
    assert found["answers"] == {**right, "3": [0, cluster.LOST]}
    assert found["again"] == [60]
    assert not found["dashboard"]
    assert not found["left"]
    assert not found["up"]
    assert found["notes"] == []
    assert found["address"].startswith(LOOPBACK)
    if sys.platform == "linux":
        assert found["doors"]
        for door in found["doors"]:  # as /proc/net/tcp writes 127.0.0.1, and ::ffff:127.0.0.1
            assert door.endswith("0100007F"), found["doors"]


# -- addresses ------------------------------------------------------------------------------------------------


def use(address):
    with Cluster(1, Handler, None, address=address):
        pass


@needs_ray
@pytest.mark.parametrize(
    "address", ["", "ray://host:10001", "host", "host:0", "host:99999", "a b:1", "host:6379/x"]
)
def test_what_is_no_address_is_named(address):
    with pytest.raises(WorkerError, match=r"is no address; give auto, or HOST:PORT"):
        use(address)


@needs_ray
def test_a_port_that_nobody_listens_to_is_named_at_once():
    with socket.socket() as free:
        free.bind((LOOPBACK, 0))
        port = free.getsockname()[1]
    begin = time.monotonic()
    with pytest.raises(WorkerError, match=rf"nothing answers at {LOOPBACK}:{port}"):
        use(f"{LOOPBACK}:{port}")
    assert time.monotonic() - begin < 30  # of which nearly all is Ray's import


@needs_ray
def test_an_address_that_does_not_answer_is_given_up(monkeypatch):
    """A listener whose queue is full does not answer either."""
    monkeypatch.setattr(cluster, "KNOCK", 0.3)
    with socket.socket() as silent, socket.socket() as first:
        silent.bind((LOOPBACK, 0))
        silent.listen(0)
        first.connect(silent.getsockname())
        others = []
        for _ in range(4):
            other = socket.socket()
            other.setblocking(False)
            other.connect_ex(silent.getsockname())
            others.append(other)
        with pytest.raises(WorkerError, match="nothing answers"):
            use(f"{LOOPBACK}:{silent.getsockname()[1]}")
        for other in others:
            other.close()


@needs_ray
def test_the_command_names_what_is_wrong(run):
    code, out, err = run(
        "audit", "digits_pgd", "--samples", "5", "--methods", "clean", "--ray", "nowhere"
    )
    assert code == 2
    assert out == ""
    assert err.startswith("calipers: ray: 'nowhere' is no address")
    code, _, err = run("audit", "digits_pgd", "--samples", "5", "--ray", "auto", "--workers", "0")
    assert code == 2
    assert "workers: 0" in err


def test_without_ray_there_is_a_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(WorkerError, match=r"pip install 'calipers\[ray\]'"):
        use("127.0.0.1:6379")


@pytest.mark.parametrize("version", ["2.53.0", "1.13", "2.9.3"])
def test_old_versions_are_refused(monkeypatch, version):
    fake = type(sys)("ray")
    fake.__version__ = version
    fake.is_initialized = lambda: False
    monkeypatch.setitem(sys.modules, "ray", fake)
    with pytest.raises(WorkerError, match=f"{version} is too old"):
        use("127.0.0.1:6379")


# -- without a cluster ----------------------------------------------------------------------------------------


def test_errors_of_a_handler_are_values():
    handler = Handler()
    assert handler.start(lambda factor: lambda task: factor / task, 6) == READY
    assert handler.handle(3) == 2
    answer = handler.handle(0)
    assert isinstance(answer, Raised)
    assert isinstance(answer.error, ZeroDivisionError)

    def refuse(_):
        raise WorkerError("other sources")

    assert str(handler.start(refuse, None).error) == "other sources"


def test_where_a_machine_was_lost_the_others_go_on():
    team = Cluster(3, Handler, None)
    working = Worker()
    working.ready = True
    team.workers = [working]
    team._started(Worker(), Lost(None))
    assert team.count == 1
    team.workers = []
    for _ in range(TRIES - 1):
        team._started(Worker(), Lost(None))
    with pytest.raises(WorkerError, match="cannot start"):
        team._started(Worker(), Lost(None))


def test_workers_with_other_sources_are_refused(monkeypatch):
    from calipers.evaluate import spread

    team = spread.team(
        1, load_model("digits_pgd"), STAGES, THREAT, seed=0, replicas=(), deployed=False, memory=None, threads=1,
        cap=None, loader=None,
    )  # fmt: skip
    monkeypatch.setattr(spread, "code_digest", lambda: "another")
    with pytest.raises(WorkerError, match="other sources"):
        spread.prepare(team.settings)
