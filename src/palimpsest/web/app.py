"""The app: addresses, templates, and what is answered when something is wrong."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from palimpsest.display.text import visible
from palimpsest.errors import ConfigError, PalimpsestError
from palimpsest.log import log
from palimpsest.report.environment import SCRIPTS, asset, environment, style_sheet
from palimpsest.web.asking import LONGEST_BODY, Answer, Ask, read_fields
from palimpsest.web.bench import Bench, opener
from palimpsest.web.config import ServeConfig
from palimpsest.web.desk import Desk
from palimpsest.web.pages import compare, jobs, latents, live, runs, steer, text
from palimpsest.web.refusals import GoneError, NoPageError, PageError, TooLongError
from palimpsest.web.security import POLICY, Door

TEMPLATES = Path(__file__).parent / "templates"
LIBRARY = "vega.js"
EXTRA = "the web extra: pip install 'palimpsest-lm[web]'"

Handler = Callable[[Desk, Ask], Answer]

ROUTES: tuple[tuple[str, str, Handler], ...] = (
    ("GET", "/", runs.index),
    ("GET", "/run/{run}", runs.one),
    ("GET", "/run/{run}/latents", latents.browse),
    ("GET", "/run/{run}/latent/{latent}", latents.one),
    ("GET", "/compare", compare.compare),
    ("GET", "/text", text.form),
    ("POST", "/text", text.send),
    ("GET", "/steer", steer.form),
    ("POST", "/steer", steer.send),
    ("GET", "/job/{job}", jobs.show),
    ("POST", "/job/{job}/cancel", jobs.cancel),
    ("GET", "/live", live.index),
    ("GET", "/live/{run}", live.one),
)

NAV = (
    ("/", "Runs"),
    ("/compare", "Compare"),
    ("/text", "Own text"),
    ("/steer", "Steering"),
    ("/live", "Training"),
)


def create_app(config: ServeConfig, *, token: str, port: int, bench: Bench | None = None) -> Door:
    """The app behind its door.

    Args:
        config: What is served.
        token: What the first address must carry.
        port: Where it listens; other Host headers are refused.
        bench: The models; made from the config where models may be loaded.

    Raises:
        ConfigError: The web extra is not installed.
    """
    try:
        from fastapi import FastAPI
        from starlette.routing import BaseRoute, Route
    except ImportError as error:
        raise ConfigError("The app needs packages that are not installed", expected=EXTRA) from error
    if bench is None and config.model:
        bench = Bench(opener(config))
    desk = Desk(config, bench)
    draw = Drawing(desk)
    routes: list[BaseRoute] = [
        Route(path, _endpoint(desk, draw, handler), methods=[method]) for method, path, handler in ROUTES
    ]
    routes.append(Route("/static/{name}", _static, methods=["GET"]))
    inner = FastAPI(routes=routes, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    inner.add_exception_handler(404, _unknown(draw))
    inner.add_exception_handler(405, _unknown(draw))
    door = Door(inner, token, port)
    door.desk = desk
    return door


class Drawing:
    """Turns answers into HTML.

    Args:
        desk: What all pages share.
    """

    def __init__(self, desk: Desk) -> None:
        self._environment = environment(TEMPLATES)
        # What a field holds goes back as it came; escaped, like everything.
        self._environment.filters["exact"] = escape
        self._environment.filters["lines"] = _lines
        self._base = {
            "asset": asset_url,
            "scripts": SCRIPTS,
            "nav": NAV,
            "root": desk.shelf.root.name,
            "may_load": desk.bench is not None,
        }

    def page(self, answer: Answer, ask: Ask) -> str:
        """The HTML of an answer, or of the part that changes."""
        context = {**self._base, "here": ask.path, "fragment": ask.fragment, **answer.context}
        return self._environment.get_template(answer.template).render(context)

    def refusal(self, error: PageError, ask: Ask) -> Answer:
        """What is shown instead of a page."""
        titles = {404: "Not found", 410: "Gone", 503: "Busy", 413: "Too long", 500: "Something went wrong"}
        context = {"title": titles.get(error.status, "This cannot be shown"), "text": str(error)}
        template = "refusal_part.html.j2" if ask.fragment else "refusal.html.j2"
        return Answer(template, context, status=error.status)


def _lines(text: str) -> Markup:
    """Text of a model or a reader in its own lines; everything else that cannot be seen is made visible."""
    return Markup("\n").join(visible(line) for line in text.split("\n"))


def _endpoint(desk: Desk, draw: Drawing, handler: Handler) -> Any:
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import HTMLResponse, RedirectResponse, Response

    async def endpoint(request: Request) -> Response:
        fields, problem = request.scope["state"]["fields"], None
        if request.method == "POST":
            try:
                fields = read_fields(await _body(request))
            except PageError as error:
                problem = error
            except ClientDisconnect:
                return Response(status_code=400)
        ask = Ask(
            request.url.path, request.path_params, fields, fragment=request.headers.get("x-fragment") == "1"
        )
        answer, html = await run_in_threadpool(_answer, desk, draw, handler, ask, problem)
        if answer.to:
            return RedirectResponse(answer.to, 303)
        response = HTMLResponse(html, answer.status)
        if answer.charts:
            # The chart library writes style elements of its own.
            policy = POLICY.format(nonce=request.scope["state"]["nonce"])
            response.headers["content-security-policy"] = policy.replace(
                f"'nonce-{request.scope['state']['nonce']}'", "'unsafe-inline'"
            )
        return response

    return endpoint


def _answer(
    desk: Desk, draw: Drawing, handler: Handler, ask: Ask, problem: PageError | None
) -> tuple[Answer, str]:
    """Run a page in a thread of its own; whatever goes wrong becomes a page, too."""
    try:
        if problem is not None:
            raise problem
        answer = handler(desk, ask)
        return answer, "" if answer.to else draw.page(answer, ask)
    except PageError as error:
        answer = draw.refusal(error, ask)
    except PalimpsestError as error:
        answer = draw.refusal(PageError(str(error)), ask)
    except Exception as error:
        # Arrow and the system report in many ways that a file was replaced or cut while it was read.
        if isinstance(error, OSError) or type(error).__module__.partition(".")[0] == "pyarrow":
            log.warning("%s could not be read: %s", ask.path, error)
            gone = GoneError(
                "A file of this run cannot be read",
                fix="It was changed while it was shown: load the page again",
            )
            answer = draw.refusal(gone, ask)
        else:
            log.exception("The page %s failed", ask.path)
            answer = draw.refusal(
                FailedError("The page could not be made; the log of palimpsest serve says why"), ask
            )
    return answer, draw.page(answer, ask)


class FailedError(PageError):
    """Something that nobody foresaw."""

    status = 500


async def _body(request: Any) -> bytes:
    """What was sent, up to the limit.

    Raises:
        TooLongError: It is more.
    """
    size, parts = 0, []
    async for part in request.stream():
        size += len(part)
        if size > LONGEST_BODY:
            raise TooLongError("More was sent than the app reads", expected=f"at most {LONGEST_BODY:,} bytes")
        parts.append(part)
    kind = request.headers.get("content-type", "").partition(";")[0].strip()
    if size and kind != "application/x-www-form-urlencoded":
        raise PageError(
            "This is no form of the app", expected="application/x-www-form-urlencoded", found=kind[:60]
        )
    return b"".join(parts)


def _unknown(draw: Drawing) -> Any:
    from starlette.requests import Request
    from starlette.responses import HTMLResponse

    async def unknown(request: Request, error: Exception) -> HTMLResponse:
        ask = Ask(request.url.path)
        answer = draw.refusal(NoPageError("There is no such page here", fix="See the list of runs"), ask)
        return HTMLResponse(draw.page(answer, ask), getattr(error, "status_code", 404))

    return unknown


@lru_cache
def assets() -> dict[str, tuple[str, bytes]]:
    """Every small file that a page may load, by name: its type and its content."""
    script = "text/javascript; charset=utf-8"
    style = str(style_sheet()) + "\n" + (TEMPLATES / "app.css").read_text("utf-8")
    found = {
        "app.css": ("text/css; charset=utf-8", style),
        "app.js": (script, (TEMPLATES / "app.js").read_text("utf-8")),
        "icon.svg": ("image/svg+xml", (TEMPLATES / "icon.svg").read_text("utf-8")),
    }
    found |= {name: (script, asset(name)) for name in SCRIPTS}
    return {name: (kind, text.encode()) for name, (kind, text) in found.items()}


@lru_cache
def _charts_library() -> bytes:
    """The chart library; made when the first chart is looked at, because what makes it takes much memory."""
    from palimpsest.report.pictures import vega_script

    return vega_script().encode()


@lru_cache
def asset_url(name: str) -> str:
    """The address of a file, which changes with its content, so that a browser may keep it."""
    if name == LIBRARY:
        return f"/static/{name}?v={version('vl-convert-python')}"
    return f"/static/{name}?v={hashlib.sha256(assets()[name][1]).hexdigest()[:12]}"


async def _static(request: Any) -> Any:
    """A file of the table; no name from an address ever becomes a path."""
    from starlette.concurrency import run_in_threadpool
    from starlette.responses import Response

    name = request.path_params["name"]
    if name == LIBRARY:
        kind, content = "text/javascript; charset=utf-8", await run_in_threadpool(_charts_library)
    elif name in assets():
        kind, content = assets()[name]
    else:
        return Response("There is no such file.", 404, media_type="text/plain")
    return Response(content, headers={"content-type": kind, "cache-control": "private, max-age=86400"})
