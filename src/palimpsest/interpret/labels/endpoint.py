"""A server with an OpenAI-style `/chat/completions`: asked with a time limit, again when it is busy, and never trusted.

The key goes to this one address and nowhere else: no redirect is followed, no proxy reads along, and what
the server says is cut, cleaned and cleared of the key before anyone sees it.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from email.message import Message
from http.client import HTTPException
from typing import Any, NamedTuple
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, ProxyHandler, Request, build_opener

from palimpsest.errors import ConfigError
from palimpsest.interpret.labels.config import LOOPBACK, check_endpoint
from palimpsest.interpret.labels.prompts import judge_messages, label_messages, read_fits, read_label
from palimpsest.interpret.labels.protocol import Evidence, ProviderError, Text
from palimpsest.labelcache import tidy

BUSY = (408, 409, 425, 429, 500, 502, 503, 504, 529)
FATAL = (301, 302, 303, 307, 308, 401, 403, 404, 405)
LONGEST_WAIT = 30.0
MOST_BYTES = 4 << 20
LABEL_TOKENS, JUDGE_TOKENS = 200, 400
"""Tokens of an answer at most."""
TOGETHER = 10
"""Texts in one question to a judge."""


class _Manner(NamedTuple):
    """How a server wants to be asked: the name of the answer's limit, and whether it takes a temperature."""

    limit: str
    temperature: bool


class Endpoint:
    """A server and a model on it.

    Args:
        address: Up to `/v1`.
        model: As the server calls it.
        key: Sent as a bearer token; None for a server that needs none.
        timeout: Seconds for one answer.
        retries: Further attempts when it is busy.
        allow_http: Permit plain http to another machine.
        sleep: Waits; for tests.

    Raises:
        ConfigError: The address would give the key away, or the key cannot be sent.
    """

    def __init__(
        self,
        address: str,
        model: str,
        key: str | None = None,
        *,
        timeout: float | int = 60,
        retries: int = 4,
        allow_http: bool = False,
        sleep: Callable[[float], None] | None = None,
    ) -> None:
        check_endpoint(address, allow_http)
        self.address, self.model = address.rstrip("/") + "/chat/completions", model
        self._key, self._timeout, self._retries, self._sleep = key, timeout, retries, sleep or time.sleep
        if key is not None and not (key.isascii() and key.isprintable() and key == key.strip() and key):
            raise ConfigError("The key cannot be sent", expected="printable characters without spaces around")
        parts = urlsplit(address)
        # A proxy sees what goes over plain http.
        direct = parts.scheme == "http" or parts.hostname in LOOPBACK
        self._opener = build_opener(_NoRedirect(), *([ProxyHandler({})] if direct else []))
        self._manner, self._lock = _Manner("max_tokens", True), threading.Lock()

    def ask(self, messages: Sequence[dict[str, str]], most: int) -> str:
        """The model's answer at temperature 0.

        Args:
            messages: The conversation.
            most: Tokens of the answer at most.

        Raises:
            ProviderError: No answer after all attempts, or one that is none.
        """
        attempt = 0
        while True:
            last, manner = attempt >= self._retries, self._manner
            try:
                return self._answer(self._post(messages, most, manner))
            except HTTPError as error:
                found = self._refusal(error)
                # No attempt: the question has not been put yet. Each way of asking is left once at most.
                if error.code == 400 and self._adapt(found, manner):
                    continue
                if error.code not in BUSY or last:
                    fatal = error.code in FATAL
                    raise ProviderError(f"{self.address} refuses", found=found, fatal=fatal) from None
                self._sleep(_wait(error.headers, attempt))
            except (OSError, HTTPException, ValueError) as error:
                # A server that says nothing for the whole time is not asked as often as one that is busy.
                if last or (isinstance(error, TimeoutError) and attempt >= 1):
                    raise ProviderError(
                        f"{self.address} gives no answer", found=self.clear(error) or type(error).__name__
                    ) from None
                self._sleep(_wait(None, attempt))
            attempt += 1

    def _post(self, messages: Sequence[dict[str, str]], most: int, manner: _Manner) -> Any:
        body: dict[str, Any] = {"model": self.model, "messages": list(messages), manner.limit: most}
        if manner.temperature:
            body["temperature"] = 0
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        headers["User-Agent"] = "palimpsest-lm"
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        data = json.dumps(body).encode()
        ends = time.monotonic() + self._timeout
        # The address was checked: http or https, and http only where that was allowed.
        with self._opener.open(Request(self.address, data, headers), timeout=self._timeout) as answer:
            return json.loads(_read(answer, ends))

    def _answer(self, page: Any) -> str:
        """The text of the first choice.

        Raises:
            ValueError: There is none.
        """
        try:
            text = page["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError):
            raise ValueError("the answer holds no choices[0].message.content") from None
        if not isinstance(text, str):
            raise ValueError("the answer holds no text")
        return text if self._key is None else text.replace(self._key, "[key]")

    def _refusal(self, error: HTTPError) -> str:
        """What the server says, in a few words; nothing of what it says about a key."""
        with error:
            if error.code in (401, 403):
                return f"{error.code}, the key is refused" if self._key else f"{error.code}, it wants a key"
            try:
                page = json.loads(_read(error, time.monotonic() + self._timeout))
            except (OSError, HTTPException, ValueError):
                page = None
        inner = page.get("error", page) if isinstance(page, dict) else page
        said = inner.get("message") if isinstance(inner, dict) else inner
        words = self.clear(said) if said else None
        return f"{error.code}" + (f", {words}" if words else "")

    def clear(self, said: object) -> str | None:
        """One short line of what was said, without the key; None where nothing is left."""
        text = str(said)
        return tidy(text if self._key is None else text.replace(self._key, "[key]"))

    def _adapt(self, said: str, asked: _Manner) -> bool:
        """Ask as newer models want it, when the server says so; False when it was asked like that."""
        with self._lock:
            # Another thread may have learnt it while this question was under way.
            if self._manner != asked:
                return True
            if asked.limit == "max_tokens" and "max_completion_tokens" in said:
                self._manner = asked._replace(limit="max_completion_tokens")
            elif asked.temperature and "temperature" in said:
                self._manner = asked._replace(temperature=False)
            return self._manner != asked


class EndpointLabeller:
    """Labels by a model behind a server."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint

    def label(self, evidence: Evidence) -> str | None:
        """What the model says of the latent."""
        label = read_label(self.endpoint.ask(label_messages(evidence), LABEL_TOKENS))
        # Once more: JSON may have spelt the key in escapes.
        return None if label is None else self.endpoint.clear(label)


class EndpointJudge:
    """Verdicts by a model behind a server."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint

    def judge(self, label: str, texts: Sequence[Text]) -> list[bool | None]:
        """What the model says of a few texts at a time; None for all of a question that it answers otherwise."""
        found: list[bool | None] = []
        for first in range(0, len(texts), TOGETHER):
            some = texts[first : first + TOGETHER]
            found += read_fits(self.endpoint.ask(judge_messages(label, some), JUDGE_TOKENS), len(some))
        return found


def key_of(variable: str, address: str) -> str | None:
    """The key in an environment variable; None for a server on this machine when it is not set.

    Raises:
        ConfigError: There is none for a server elsewhere.
    """
    key = os.environ.get(variable, "").strip()
    if key:
        return key
    if urlsplit(address).hostname in LOOPBACK:
        return None
    raise ConfigError(
        f"There is no key in {variable}",
        expected=f"the server's key in the environment variable {variable}, or in the one of --key-variable",
    )


class _NoRedirect(HTTPRedirectHandler):
    """A redirect would take the key along."""

    def redirect_request(
        self, req: Request, fp: Any, code: int, msg: str, headers: Message, newurl: str
    ) -> None:
        del req, fp, code, msg, headers, newurl


def _read(answer: Any, ends: float) -> bytes:
    """The whole answer, unless it is too long or comes in drops."""
    data = bytearray()
    while piece := answer.read1(1 << 16):
        data += piece
        if len(data) > MOST_BYTES:
            raise ValueError(f"the answer is longer than {MOST_BYTES} bytes")
        if time.monotonic() > ends:
            raise TimeoutError("the answer took too long")
    return bytes(data)


def _wait(headers: Any, attempt: int) -> float:
    """Seconds before the next attempt: as the server wishes, within limits, else twice as long each time."""
    asked = headers.get("Retry-After") if headers is not None else None
    try:
        return (
            min(LONGEST_WAIT, max(0.0, float(asked)))
            if asked is not None
            else min(LONGEST_WAIT, 2.0**attempt)
        )
    except ValueError:
        return min(LONGEST_WAIT, 2.0**attempt)
