"""The explorer: what it shows is what the run and the methods say; who may ask; a real browser on it."""

from __future__ import annotations

import http.client
import math
import re
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import replace

import pytest
import torch

import calipers as cp
from browser import NARROW, WIDE, browser, opened
from calipers import Spec, ThreatModel, curve
from calipers.data import Data, load
from calipers.errors import DataError, StoreMismatch
from calipers.evaluate.cascade import select
from calipers.models import load_model

pytest.importorskip("starlette", reason="extra serve")
uvicorn = pytest.importorskip("uvicorn", reason="extra serve")

from calipers.serve.explorer import explore, methods, radius_text, stored  # noqa: E402
from calipers.serve.server import COOKIE, configured, loopback  # noqa: E402

PAYLOAD = "</td><script>alert(1)</script><img src=x onerror=alert(2)>"
THREAT = ThreatModel(math.inf, "0.1")


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A run directory of two radii over a sample."""
    run = tmp_path_factory.mktemp("explorer") / "run"
    cascade = select(["fgsm", "crown_ibp", "pgd-20", "crown"])
    network, data = load_model("digits_pgd"), load("digits")
    found = curve(network, data, THREAT, ("0.05", "0.1"), run=run, cascade=cascade, samples=30)
    return run, network, data, found


@pytest.fixture(scope="module")
def explorer(kept):
    run, network, data, _ = kept
    return explore(run, network, data, THREAT)


@contextmanager
def serving(explorer, host="127.0.0.1", token=None):
    """(port, address) of a running server."""
    config, bound, address = configured(explorer, host, 0, token)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    try:
        end = time.monotonic() + 20
        while not server.started and time.monotonic() < end:
            time.sleep(0.01)
        yield bound.getsockname()[1], address
    finally:
        server.should_exit = True
        thread.join(20)
        bound.close()


@pytest.fixture(scope="module")
def port(explorer):
    with serving(explorer) as (port, _):
        yield port


def ask(port, path, method="GET", **headers):
    """(status, headers, text)."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(
            method, path, headers={k.replace("_", "-"): v for k, v in headers.items()}
        )
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read().decode()
    finally:
        connection.close()


# -- what is shown ------------------------------------------------------------------------------------------------


def test_the_sample_of_the_run_is_found_again(kept, explorer):
    *_, found = kept
    assert explorer.positions == found.main.positions.tolist()
    assert torch.equal(explorer.data.x, found.main.x)


def test_brackets_hold_what_strong_methods_say(explorer):
    for row in (0, 7, 19):
        x, y = explorer.data.x[row : row + 1], explorer.data.y[row : row + 1]
        for eps in ("0.03", "1/10"):
            live = explorer.bracket(row, eps)
            threat = replace(THREAT, eps=eps)
            assert live.bracket.lower.item() <= live.bracket.upper.item() + 1e-5
            bound = cp.bound(explorer.network, x, y, threat).min().item()
            assert live.bracket.lower.item() >= bound - 1e-9
            points = cp.attack(explorer.network, x, y, threat, method=cp.apgd)
            reached = Spec.label(y, 10).margin_at(explorer.network(points)).item()
            assert reached >= live.bracket.lower.item() - 1e-5


def test_the_runs_say_what_holds_at_other_radii(kept, explorer):
    *_, found = kept
    small, large = found.audits
    for row in range(len(explorer)):
        between = stored(explorer, row, "0.07").bracket
        assert between.lower.item() == large.bracket.lower[row].item()
        assert between.upper.item() == small.bracket.upper[row].item()
        above = stored(explorer, row, "0.2").bracket
        assert math.isinf(above.lower.item())


def test_every_method_runs_on_an_example(explorer):
    for name, stage in methods().items():
        said = explorer.run(3, "0.05", name)
        assert said.name == name
        if stage.side != "exact":
            assert not said.note, (name, said.note)
        explorer.bracket(3, "0.05", said)  # raises where it contradicts the others
    with pytest.raises(ValueError, match="there is no 'nonsense'"):
        explorer.run(0, "0.1", "nonsense")


def test_another_model_data_or_threat_is_refused(kept, tmp_path):
    run, network, data, _ = kept
    with pytest.raises(StoreMismatch, match="another model"):
        explore(run, load_model("digits_standard"), data, THREAT)
    with pytest.raises(StoreMismatch, match="another data"):
        explore(run, network, Data(data.x[:200], data.y[:200], 0.0, 1.0, "d", ()), THREAT)
    with pytest.raises(StoreMismatch, match=r"another threat \(p=inf"):
        explore(run, network, data, replace(THREAT, grid="1/16"))
    with pytest.raises(DataError, match="not the run directory"):
        explore(tmp_path, network, data, THREAT)


@pytest.mark.parametrize(
    "text", ["", "-1", "nan", "inf", "1e9", "1" * 9, "0.1; x", "1/0", "9999", "0x1", "१"]
)
def test_radii_of_requests_are_plain_numbers(text):
    with pytest.raises(ValueError):  # noqa: PT011
        radius_text(text)


# -- who may ask ---------------------------------------------------------------------------------------------------


def test_pages_and_files_with_their_headers(port):
    for path in ("/", "/example/0", "/style.css", "/explorer.js", "/table.js", "/?run=0&page=0"):
        status, headers, _ = ask(port, path)
        assert status == 200, path
        policy = headers["content-security-policy"]
        assert policy.startswith("default-src 'none'")
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert "server" not in headers
        assert "set-cookie" not in headers


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:{}", "127.0.0.1", "127.0.0.1:1", "localhost.evil:{}", ""]
)
def test_other_host_names_are_refused(port, host):
    assert ask(port, "/", Host=host.format(port))[0] in (400, 403)


def test_our_own_names_are_served(port):
    for name in ("127.0.0.1", "localhost"):
        assert ask(port, "/", Host=f"{name}:{port}")[0] == 200


def test_other_sites_and_other_methods_are_refused(port):
    assert ask(port, "/", Origin="http://evil.example")[0] == 403
    assert ask(port, "/", Origin="null")[0] == 403
    assert ask(port, "/", Origin=f"http://127.0.0.1:{port}")[0] == 200
    for site in ("cross-site", "same-site"):
        assert ask(port, "/example/0?method=auto", Sec_Fetch_Site=site)[0] == 403
    for method in ("POST", "PUT", "DELETE", "OPTIONS", "TRACE"):
        assert ask(port, "/", method)[0] == 405


@pytest.mark.parametrize(
    "path",
    ["/example/-1", "/example/30", "/example/../run.json", "/example/x", "/run.sqlite", "/..%2f..%2fetc/passwd",
     "/style.css/..",
     "/example/0?eps=nan", "/example/0?eps=1e999", "/example/0?method=os.system", "/?run=9", "/?page=-1",
     "/example/99999999999999999999", "/" + "a" * 5000],
)  # fmt: skip
def test_wrong_paths_and_values_are_named_and_harmless(port, path):
    status, headers, text = ask(port, path)
    assert status in (400, 404)
    assert headers["content-security-policy"].startswith("default-src 'none'")
    assert "Traceback" not in text


def test_oversized_requests_are_refused(port):
    with suppress(ConnectionError):  # it may hang up while we write
        assert ask(port, "/", X_Long="a" * 200_000)[0] >= 400
    assert ask(port, "/")[0] == 200


def test_a_token_is_asked_for_everywhere(explorer):
    with serving(explorer, token="a-secret") as (port, address):  # noqa: S106
        assert address.endswith("?token=a-secret")
        for path in ("/", "/example/0", "/style.css", "/nothing"):
            assert ask(port, path)[0] == 401
            assert ask(port, path + "?token=wrong")[0] == 401
            assert ask(port, path, Cookie=f"{COOKIE}=wrong")[0] == 401
        status, headers, _ = ask(port, "/example/0?eps=0.05&token=a-secret")
        assert (status, headers["location"]) == (303, "/example/0?eps=0.05")
        assert "HttpOnly" in headers["set-cookie"]
        assert "samesite=strict" in headers["set-cookie"].lower()
        assert ask(port, "/", Cookie=f"{COOKIE}=a-secret")[0] == 200
        _, headers, _ = ask(port, "//evil.example/?token=a-secret")
        assert headers["location"].startswith("/evil.example")
        assert ask(port, "/", Cookie=f"{COOKIE}=a-secret", Host="evil.example")[0] == 403


def test_beyond_this_machine_there_is_always_a_token(explorer):
    for host in ("127.0.0.1", "localhost", "::1", "127.8.8.8"):
        assert loopback(host)
    for host in ("0.0.0.0", "::", "192.168.1.1", "example.org", ""):  # noqa: S104
        assert not loopback(host)
    with serving(explorer, host="0.0.0.0") as (port, address):  # noqa: S104
        assert len(re.search(r"token=(.+)", address)[1]) >= 24
        assert ask(port, "/")[0] == 401


def test_by_default_only_the_loopback_interface_is_bound(explorer):
    _, bound, address = configured(explorer, "127.0.0.1", 0)
    with bound:
        assert bound.getsockname()[0] == "127.0.0.1"
        assert "token" not in address
        with pytest.raises(OSError, match="--port"):
            configured(explorer, "127.0.0.1", bound.getsockname()[1])


def test_nothing_is_written(kept, port):
    run, *_ = kept
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    ask(port, "/")
    ask(port, "/example/2?method=pgd&surface=1")
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_requests_at_the_same_time_all_get_their_answers(port):
    found = []
    threads = [
        threading.Thread(target=lambda i=i: found.append(ask(port, f"/example/{i}?eps=0.0{i + 1}")))
        for i in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [status for status, *_ in found] == [200] * 6


def test_hostile_names_stay_text(kept, explorer):
    spoilt = replace(explorer.data, name=PAYLOAD, classes=(PAYLOAD,) * 10)
    side = replace(explorer.side, name=PAYLOAD)
    rows = [
        {k: r._replace(lower_by=PAYLOAD, upper_by=PAYLOAD) for k, r in records.items()}
        for records in explorer.rows
    ]
    with serving(replace(explorer, data=spoilt, side=side, rows=rows)) as (port, _):
        for path in ("/", "/example/1?surface=1", f"/example/1?eps={PAYLOAD.replace(' ', '%20')}"):
            text = ask(port, path)[2]
            assert "<script>alert" not in text
            assert "<img src=x" not in text


def test_the_command_names_what_is_missing(run, tmp_path, monkeypatch):
    code, _, err = run("serve", tmp_path, "--port", 0)
    assert code == 2
    assert "not the run directory" in err
    monkeypatch.setitem(__import__("sys").modules, "uvicorn", None)
    assert "calipers[serve]" in run("serve", tmp_path)[2]


# -- in a browser -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium():
    with browser() as running:
        yield running


@pytest.mark.parametrize("size", [WIDE, NARROW])
@pytest.mark.parametrize("path", ["/", "/example/3?surface=1"])
def test_it_asks_this_machine_alone_and_fits(chromium, port, size, path):
    with opened(chromium, f"http://127.0.0.1:{port}{path}", size=size) as seen:
        own = f"http://127.0.0.1:{port}/"
        assert all(r.startswith((own, "data:")) for r in seen.requests)
        assert seen.complaints == []
        assert seen.overflow <= 0


def test_the_slider_moves_the_bracket(chromium, port):
    with opened(chromium, f"http://127.0.0.1:{port}/") as seen:
        page = seen.page
        page.get_by_label("unknown", exact=True).uncheck()
        page.locator("tbody[data-kind=robust] a").first.click()
        assert "certified at eps 0.1" in page.locator(".headline").inner_text()
        page.locator("#slider").fill("0.2")
        page.get_by_text("at eps 0.2:").wait_for()
        page.locator("#slider").fill("0.02")
        page.get_by_text("at eps 0.02:").wait_for()
        assert "certified" in page.locator(".headline").inner_text()
        page.locator("#eps").fill("1/20")
        page.locator("#method").select_option("apgd")
        page.get_by_label("loss surface").check()
        page.get_by_role("button", name="measure").click()
        page.get_by_text("apgd: ≤").wait_for()
        assert page.get_by_role("heading", name="Loss surface").is_visible()
        assert "method=apgd" in page.url
        page.locator("#eps").fill("nonsense")
        page.get_by_role("button", name="measure").click()
        page.get_by_text("eps: cannot read 'nonsense'").wait_for()
        assert [c for c in seen.complaints if "400" not in c] == []


def test_it_works_without_scripts(chromium, port):
    address = f"http://127.0.0.1:{port}/example/4"
    with opened(chromium, address, java_script_enabled=False) as seen:
        seen.page.locator("#eps").fill("0.04")
        seen.page.locator("#method").select_option("alpha_crown")
        seen.page.get_by_role("button", name="measure").click()
        assert "at eps 0.04" in seen.page.locator(".headline").inner_text()
        assert "alpha_crown: ≥" in seen.page.locator(".note").first.inner_text()


def test_a_page_of_another_site_cannot_ask(chromium, port, tmp_path):
    (tmp_path / "evil.html").write_text(
        f"<script>fetch('http://127.0.0.1:{port}/').then(a => a.text()).then(t => document.title = t,"
        f" () => document.title = 'refused')</script><iframe src='http://127.0.0.1:{port}/'></iframe>"
    )
    with opened(chromium, (tmp_path / "evil.html").as_uri()) as seen:
        seen.page.wait_for_function("document.title === 'refused'")
        assert seen.page.frames[-1].locator("table").count() == 0


def test_the_token_opens_the_browser_session(chromium, explorer):
    with serving(explorer, token="a-secret") as (_, address), opened(chromium, address) as seen:  # noqa: S106
        assert "token" not in seen.page.url
        seen.page.locator("tbody[data-kind] a").first.click()
        assert seen.page.locator(".headline").is_visible()
