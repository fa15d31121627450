"""The explorer over HTTP: pages made on this machine, for this machine.

starlette and uvicorn (extra ``serve``) rather than ``http.server``, which calls itself unfit for more than basic
checks: h11 refuses malformed and oversized requests, and a slow client holds no thread.

What a request may do: GET and HEAD alone; a Host that is ours (against DNS rebinding); no other site may have caused it
(`Sec-Fetch-Site`, `Origin`); beyond the loopback interface it needs the token. Names in a path are numbers of examples,
never files. Answers allow nothing from elsewhere.
"""

from __future__ import annotations

import hmac
import ipaddress
import secrets
import socket
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlencode

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route

from calipers.errors import CalipersError
from calipers.evaluate.charts import heatmap, profiles
from calipers.evaluate.pages import asset, live
from calipers.evaluate.pictures import Array
from calipers.serve.explorer import Busy, Explorer, Measured, listing, methods, radius_text

COOKIE = "calipers-token"
PAGE = 500  # examples on a page of the overview
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self' data:; style-src 'self'; script-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
FILES = {"style.css": "text/css", "table.js": "text/javascript", "explorer.js": "text/javascript"}
Next = Callable[[Request], Awaitable[Response]]


class Guard(BaseHTTPMiddleware):
    """Lets through what the module's text says, and nothing else."""

    def __init__(self, app: Any, hosts: frozenset[str], token: str | None, anywhere: bool) -> None:
        super().__init__(app)
        self.hosts, self.token, self.anywhere = hosts, token, anywhere

    async def dispatch(self, request: Request, call_next: Next) -> Response:
        answer = self.refusal(request) or self.welcome(request) or await call_next(request)
        for name, value in HEADERS.items():
            answer.headers[name] = value
        return answer

    def refusal(self, request: Request) -> Response | None:
        if request.method not in ("GET", "HEAD"):
            return PlainTextResponse("only GET", 405)
        host = request.headers.get("host", "")
        if not (host in self.hosts or (self.anywhere and _is_address(host))):
            return PlainTextResponse("this host name is not served", 403)
        origin = request.headers.get("origin")
        if origin is not None and origin != f"http://{host}":
            return PlainTextResponse("asked by another site", 403)
        if request.headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            return PlainTextResponse("asked by another site", 403)
        if self.token is not None and not (
            self.known(request.cookies.get(COOKIE)) or self.known(request.query_params.get("token"))
        ):
            return PlainTextResponse("the address needs its token", 401)
        return None

    def welcome(self, request: Request) -> Response | None:
        """A token in the address becomes a cookie, so that it does not stay there."""
        if self.token is None or "token" not in request.query_params:
            return None
        left = [(k, v) for k, v in request.query_params.multi_items() if k != "token"]
        # a path that begins with two slashes would be another host
        where = "/" + request.url.path.lstrip("/") + (f"?{urlencode(left)}" if left else "")
        answer = RedirectResponse(where, 303)
        answer.set_cookie(COOKIE, self.token, httponly=True, samesite="strict")
        return answer

    def known(self, given: str | None) -> bool:
        wanted = (self.token or "").encode()
        return given is not None and hmac.compare_digest(given.encode(), wanted)


def _is_address(host: str) -> bool:
    """An IP address with a port: what no foreign name can stand for."""
    name = host.rpartition(":")[0].strip("[]") or host
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def application(
    explorer: Explorer, hosts: frozenset[str], token: str | None = None, anywhere: bool = False
) -> Starlette:
    """The pages of ``explorer``.

    Args:
        hosts: the values of the Host header that are served.
        token: what a request must know, if anything.
        anywhere: serve IP addresses, too, as Host.
    """
    routes = [
        Route("/", _page(explorer, overview)),
        Route("/example/{row:int}", _page(explorer, example)),
        *(Route(f"/{name}", _file(name, kind)) for name, kind in FILES.items()),
    ]
    guard = Middleware(Guard, hosts=hosts, token=token, anywhere=anywhere)
    return Starlette(
        routes=routes, middleware=[guard], exception_handlers={HTTPException: _http_error}
    )


def _file(name: str, kind: str) -> Callable[[Request], Response]:
    text = asset(name)
    return lambda _: Response(text, media_type=kind)


def _page(
    explorer: Explorer, make: Callable[[Explorer, Request], str]
) -> Callable[[Request], Response]:
    def answer(request: Request) -> Response:  # not async: starlette runs it in a thread
        try:
            return HTMLResponse(make(explorer, request))
        except Busy as error:
            return _problem(503, str(error))
        except LookupError as error:
            return _problem(404, str(error.args[0]))
        except ValueError as error:
            return _problem(400, str(error))
        except CalipersError as error:
            return _problem(500, str(error))

    return answer


async def _http_error(_: Request, error: Exception) -> Response:
    code = error.status_code if isinstance(error, HTTPException) else 500
    return _problem(code, "there is no such page")


def _problem(code: int, text: str) -> Response:
    return HTMLResponse(live("problem.html", text=text), code)


def overview(explorer: Explorer, request: Request) -> str:
    """The examples of a run."""
    runs = len(explorer.side.runs)
    run = _number(request, "run", runs - 1, 0, runs)
    rows = listing(explorer, run)
    count = max(1, -(-len(rows) // PAGE))
    page = _number(request, "page", 0, 0, count)
    return live(
        "overview.html",
        explorer=explorer,
        run=run,
        runs=[
            (i, text, stored.counts)
            for i, (text, stored) in enumerate(
                zip(explorer.threats(), explorer.side.runs, strict=True)
            )
        ],
        rows=rows[page * PAGE : (page + 1) * PAGE],
        page=page,
        pages=count,
        total=len(rows),
    )  # fmt: skip


def example(explorer: Explorer, request: Request) -> str:
    """One example at a radius, and what was asked to be run on it."""
    row = int(request.path_params["row"])
    if not row < len(explorer):
        raise LookupError(f"there is no example {row}; the run has {len(explorer)}")
    eps = radius_text(request.query_params.get("eps", f"{explorer.largest:.6g}"))
    chosen = request.query_params.get("method", "")
    ran: Measured | None = explorer.run(row, eps, chosen) if chosen else None
    wanted = request.query_params.get("surface") == "1"
    return live(
        "example.html",
        explorer=explorer,
        row=row,
        eps=eps,
        most=f"{2 * explorer.largest or 0.1:.6g}",
        step=f"{(2 * explorer.largest or 0.1) / 100:.6g}",
        position=explorer.positions[row],
        label=explorer.class_name(int(explorer.data.y[row])),
        now=explorer.bracket(row, eps, ran),
        curve=explorer.over_radius(row, eps),
        methods={name: stage.side for name, stage in methods().items()},
        chosen=chosen,
        ran=ran,
        surface=_surface(explorer, row, eps) if wanted else None,
    )


def _surface(explorer: Explorer, row: int, eps: str) -> dict[str, Any]:
    found = explorer.surface(row, eps)

    def array(values: Any) -> Array:
        numbers: Array = values.detach().double().cpu().numpy()
        return numbers

    loss = array(found.loss)
    limits = (float(loss.min()), float(loss.max()))
    reach = float(found.steps.max())
    lines = {
        "along the gradient's signs": loss[:, found.middle],
        "along random signs": loss[found.middle],
    }
    return {
        "map": heatmap(loss, reach, limits, "cross-entropy around the example"),
        "lines": profiles(array(found.steps), lines, limits, "cross-entropy along both directions"),
        "steep": found.steep,
        "random": found.random,
    }


def _number(request: Request, name: str, default: int, low: int, high: int) -> int:
    text = request.query_params.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 9 and low <= int(text) < high):
        raise ValueError(f"{name}: {text[:40]!r} is not one of {low} to {high - 1}")
    return int(text)


def loopback(host: str) -> bool:
    """Whether ``host`` names this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def configured(
    explorer: Explorer, host: str, port: int, token: str | None = None
) -> tuple[uvicorn.Config, socket.socket, str]:
    """A server that is bound but not yet running, and its address for a browser.

    A host other than the loopback interface gets a token, even if none is given.

    Raises:
        OSError: the port is in use, or the host is not this machine's.
    """
    own = host.strip("[]")
    token = token if token or loopback(host) else secrets.token_urlsafe(24)
    family = socket.AF_INET6 if ":" in own else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((own, port))
        bound.listen()
    except OSError as error:
        bound.close()
        raise OSError(f"--host {host} --port {port}: {error.strerror}; give others") from None
    port = bound.getsockname()[1]
    shown = f"[{own}]" if family == socket.AF_INET6 else own
    names = {"127.0.0.1", "localhost", "[::1]", shown} if loopback(host) else {shown}
    everywhere = own in ("0.0.0.0", "::")  # noqa: S104 - asked for, and then with a token
    app = application(explorer, frozenset(f"{n}:{port}" for n in names), token, everywhere)
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, ws="none", http="h11", loop="asyncio",
        lifespan="off", limit_concurrency=32, timeout_keep_alive=5,
    )  # fmt: skip
    address = f"http://{shown}:{port}/" + (f"?token={token}" if token else "")
    return config, bound, address
