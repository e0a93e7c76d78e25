"""The door of the app: who may ask, from where, and what an answer may do in the browser.

Only the person who was shown the address gets in, and no other page of the same browser does: the token is exchanged
for a cookie that no script reads and no other site sends; the Host header must be this machine, so that a name that was
pointed here afterwards (DNS rebinding) gets nothing; requests that the browser says come from elsewhere are refused.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import quote

from palimpsest.web.asking import LONGEST_PATH, LONGEST_QUERY, read_fields
from palimpsest.web.refusals import PageError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

POLICY = (
    "default-src 'none'; script-src 'self'; style-src-elem 'self' 'nonce-{nonce}'; style-src-attr 'unsafe-inline'; "
    "img-src 'self' data:; connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = (
    ("x-content-type-options", "nosniff"),
    ("x-frame-options", "DENY"),
    ("referrer-policy", "no-referrer"),
    ("cross-origin-opener-policy", "same-origin"),
    ("cross-origin-resource-policy", "same-origin"),
    ("permissions-policy", "camera=(), geolocation=(), microphone=()"),
    ("x-robots-tag", "noindex"),
)
METHODS = ("GET", "HEAD", "POST")
OWN = (None, "none", "same-origin")
"""What a browser says of a request that no other site caused; older ones say nothing."""

HOP = (
    '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Palimpsest</title>'
    '<meta http-equiv="refresh" content="0; url=/"></head><body><p><a href="/">Open the app</a></p></body></html>'
)
STRANGER = "This app is open only to who has its address: open the one that palimpsest serve printed, token included."
REFUSED = (
    '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Not allowed</title></head>'
    "<body><h1>Not allowed</h1><p>{}</p></body></html>"
)


class Door:
    """Wraps the app; every request passes here first.

    Args:
        app: What answers those who may ask.
        token: What the address that was printed carries.
        port: Where the app listens.
    """

    def __init__(self, app: App, token: str, port: int) -> None:
        self._app, self._token = app, token.encode()
        self.desk: Any = None
        self._session = secrets.token_urlsafe(32)
        self._cookie = f"palimpsest-{port}"
        names = ("127.0.0.1", "localhost", "[::1]")
        self._hosts = {f"{name}:{port}" for name in names} | (set(names) if port == 80 else set())

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Let a request in, or answer it here."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        nonce = secrets.token_urlsafe(16)
        guarded = _guarded(send, nonce)
        try:
            fields = self._check(scope)
        except PageError as error:
            await _say(guarded, error.status, REFUSED.format(_plain(str(error))))
            return
        given = [text for key, text in fields if key == "token"]
        if given:
            await self._enter(scope, guarded, given[0])
        elif not self._knows(scope):
            await _say(guarded, 403, REFUSED.format(STRANGER))
        else:
            inner = {**scope, "state": {**scope.get("state", {}), "nonce": nonce, "fields": fields}}
            await self._app(inner, receive, guarded)

    def _check(self, scope: Message) -> tuple[tuple[str, str], ...]:
        """Refuse what comes from elsewhere or is too long; returns the fields of the query."""
        hosts = _header(scope, b"host")
        if len(hosts) != 1 or hosts[0].lower() not in self._hosts:
            raise _forbidden(
                "This app answers to 127.0.0.1 and localhost at its own port only. "
                "Where a port is forwarded, forward it to the same number."
            )
        if scope["method"] not in METHODS:
            raise RefusedError("This app only reads: GET and POST.", 405)
        if len(scope["path"]) > LONGEST_PATH or len(scope["query_string"]) > LONGEST_QUERY:
            raise RefusedError("The address is too long.", 414)
        fields = read_fields(scope["query_string"])
        site = (_header(scope, b"sec-fetch-site") or [None])[0]
        origins = _header(scope, b"origin")
        own = {f"http://{host}" for host in self._hosts}
        # A form of ours is sent with the origin `null`, as no referrer is told; then the browser's own word counts.
        if any(one not in own and not (one == "null" and site == "same-origin") for one in origins):
            raise _forbidden("This request comes from another page.")
        if scope["method"] == "POST" and site != "same-origin" and not origins:
            raise _forbidden("This request does not say where it comes from.")
        arriving = scope["method"] == "GET" and any(key == "token" for key, _ in fields)
        if site not in OWN and not arriving:
            raise _forbidden("This request comes from another page.")
        return fields

    async def _enter(self, scope: Message, send: Send, token: str) -> None:
        """Exchange the token for a cookie, and go on without it in the address."""
        if not secrets.compare_digest(token.encode(), self._token):
            await _say(send, 403, REFUSED.format("The token in this address is not the one of this app."))
            return
        cookie = f"{self._cookie}={self._session}; HttpOnly; SameSite=Strict; Path=/"
        headers = [("set-cookie", cookie)]
        site = (_header(scope, b"sec-fetch-site") or [None])[0]
        if site not in OWN:
            # A redirect would still count as the other site's, which is not sent the cookie; our own page is.
            await _say(send, 200, HOP, headers)
            return
        path = scope["path"] if not scope["path"].startswith(("//", "/\\")) else "/"
        await _say(send, 303, "", [*headers, ("location", quote(path))])

    def _knows(self, scope: Message) -> bool:
        # Not by the standard library's reader: it gives up at the odd cookie of another app at 127.0.0.1.
        for text in _header(scope, b"cookie"):
            for pair in text.split(";"):
                name, _, value = pair.strip().partition("=")
                if name == self._cookie and secrets.compare_digest(value.encode(), self._session.encode()):
                    return True
        return False


class RefusedError(PageError):
    """Not let in."""

    def __init__(self, problem: str, status: int) -> None:
        super().__init__(problem)
        self.status = status


def _forbidden(problem: str) -> RefusedError:
    return RefusedError(problem, 403)


def _header(scope: Message, name: bytes) -> list[str]:
    return [value.decode("latin-1") for key, value in scope["headers"] if key == name]


def _plain(text: str) -> str:
    from markupsafe import escape

    return str(escape(text))


def _guarded(send: Send, nonce: str) -> Send:
    """Adds what every answer says to the browser."""
    policy = ("content-security-policy", POLICY.format(nonce=nonce))
    stored = ("cache-control", "no-store")
    added = [(name.encode(), value.encode()) for name, value in (*HEADERS, stored, policy)]

    async def guarded(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = list(message.get("headers", ()))
            given = {name.lower() for name, _ in headers}
            missing = [pair for pair in added if pair[0] not in given]
            message = {**message, "headers": [*headers, *missing]}
        await send(message)

    return guarded


async def _say(send: Send, status: int, html: str, headers: list[tuple[str, str]] | None = None) -> None:
    body = html.encode()
    pairs = [
        ("content-type", "text/html; charset=utf-8"),
        ("content-length", str(len(body))),
        *(headers or []),
    ]
    raw = [(name.encode(), value.encode("latin-1")) for name, value in pairs]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
