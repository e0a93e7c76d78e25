"""What others say that a latent stands for: from a file, or from Neuronpedia, which is asked once for each latent.

Descriptions are written by strangers and by language models: they are cut to one short line of printable text here,
and whoever prints them treats them as text and nothing else.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from palimpsest.artifacts.disk import write_bytes
from palimpsest.errors import ArtifactError, ConfigError
from palimpsest.log import log, progress
from palimpsest.neuronpedia import NeuronpediaId, parse_neuronpedia

SERVER = "https://www.neuronpedia.org/api/feature"
LENGTH = 160
"""Characters of a label that are kept."""
MOST_BYTES = 32 << 20
"""A latent's page holds its activating texts, too."""
TIMEOUT = 10.0
RETRIES = 2
BUDGET = 120.0
"""Seconds after which no further label is asked for."""
MOST_FAILURES = 3
"""Latents in a row that may fail before the server is left alone."""

Fetch = Callable[[str], Any]


class Wanted(NamedTuple):
    """One latent that wants a label.

    Attributes:
        site: Where its dictionary reads.
        latent: Its number.
        source: Neuronpedia id of the dictionary, or None.
    """

    site: str
    latent: int
    source: str | None = None


def neuronpedia_id(metadata: dict[str, Any]) -> str | None:
    """The Neuronpedia id `model/source` in a dictionary's metadata; None where there is none that can be read."""
    theirs = metadata.get("saelens")
    for text in (
        metadata.get("neuronpedia"),
        theirs.get("neuronpedia_id") if isinstance(theirs, dict) else None,
    ):
        found = parse_neuronpedia(text) if isinstance(text, str) else None
        if found:
            return f"{found.model}/{found.source}"
    return None


def tidy(text: object) -> str | None:
    """A label as one short line of printable characters; None for what is no text or blank."""
    if not isinstance(text, str):
        return None
    line = " ".join("".join(c if c.isprintable() else " " for c in text[: 4 * LENGTH]).split())
    return (line if len(line) <= LENGTH else line[: LENGTH - 1] + "…") or None


def find_labels(
    wanted: Sequence[Wanted], file: Path | None = None, *, offline: bool = False, fetch: Fetch | None = None
) -> dict[tuple[str, int], str]:
    """Labels of latents, as far as there are any.

    Args:
        wanted: The latents, the most wanted first.
        file: Labels by Neuronpedia id or site; what Neuronpedia says is added. By default a file in ~/.cache.
        offline: Ask no server.
        fetch: Reads the JSON behind an address; for tests.

    Returns:
        Labels by site and latent. No network and no answer are no errors.

    Raises:
        ConfigError: `file` exists and holds no labels.
    """
    cache = LabelCache(file)
    asked = [one for one in wanted if one.source is not None and cache.get(one) is None]
    if asked and not offline and not no_network():
        for one, label in _ask(asked, fetch or fetch_page).items():
            cache.put(one, label)
        cache.save()
    labels = {(one.site, one.latent): cache.get(one) for one in wanted}
    return {place: label for place, label in labels.items() if label is not None}


class LabelCache:
    """Labels in a file: by Neuronpedia id or site, then by latent.

    Args:
        file: The file; by default one in ~/.cache, which may be missing or damaged.

    Raises:
        ConfigError: `file` exists and holds no labels.
    """

    def __init__(self, file: Path | None = None) -> None:
        self.path = file or _cache_file()
        self._labels = _read(self.path, required=file is not None)
        self._changed = False

    def get(self, one: Wanted) -> str | None:
        """The label of a latent: that of its site, else that of its Neuronpedia id; None where there is none."""
        for key in (one.site, one.source):
            of = self._labels.get(key) if key is not None else None
            value = of.get(str(one.latent)) if isinstance(of, dict) else None
            found = tidy(value.get("label") if isinstance(value, dict) else value)
            if found is not None:
                return found
        return None

    def put(self, one: Wanted, label: str) -> None:
        """Take in what Neuronpedia said."""
        self._labels.setdefault(str(one.source), {})[str(one.latent)] = label
        self._changed = True

    def save(self) -> None:
        """Write the file if something was taken in; where that cannot be done, a warning says so."""
        if self._changed:
            _write(self.path, self._labels)
            self._changed = False


def _ask(wanted: Sequence[Wanted], fetch: Fetch) -> dict[Wanted, str]:
    found: dict[Wanted, str] = {}
    failures, ends = 0, time.monotonic() + BUDGET
    with progress("labels of the latents", len(wanted), unit="latents") as advance:
        for one in wanted:
            source = parse_neuronpedia(one.source)
            if failures >= MOST_FAILURES or time.monotonic() > ends or source is None:
                break
            try:
                label = described(fetch(page_address(source, one.latent)))
                failures = 0
            except (OSError, HTTPException, ValueError) as error:
                failures += 1
                log.info("No label for latent %d of %s: %s", one.latent, one.source, error)
                continue
            finally:
                advance()
            if label is not None:
                found[one] = label
    if failures >= MOST_FAILURES:
        log.warning("Neuronpedia does not answer; latents without a label in the cache have none.")
    return found


def page_address(source: NeuronpediaId, latent: int) -> str:
    """Where a latent's page is; an id's parts are letters, digits, dots and dashes: nothing leaves the path."""
    return f"{SERVER}/{source.model}/{source.source}/{latent}"


def described(page: Any) -> str | None:
    """The first explanation on a latent's page."""
    listed = page.get("explanations") if isinstance(page, dict) else None
    for one in listed if isinstance(listed, list) else []:
        found = tidy(one.get("description")) if isinstance(one, dict) else None
        if found is not None:
            return found
    return None


def fetch_page(address: str) -> Any:
    """The JSON behind an address; tried again where the server is busy or the line broke.

    Raises:
        OSError: No answer, or one that says no.
        ValueError: The answer is no JSON, or too long.
    """
    request = Request(address, headers={"User-Agent": "palimpsest-lm", "Accept": "application/json"})
    for attempt in range(RETRIES + 1):
        try:
            # The address is ours: https, one server, an id that was checked.
            with urlopen(request, timeout=TIMEOUT) as answer:
                data = answer.read(MOST_BYTES + 1)
        except (URLError, TimeoutError, ConnectionError) as error:
            final = isinstance(error, HTTPError) and error.code not in (429, 500, 502, 503, 504)
            if final or attempt == RETRIES:
                raise
            time.sleep(2.0**attempt)
            continue
        if len(data) > MOST_BYTES:
            raise ValueError(f"the answer is longer than {MOST_BYTES} bytes")
        return json.loads(data)
    raise AssertionError


def no_network() -> bool:
    """Whether the environment forbids asking servers (HF_HUB_OFFLINE)."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def _cache_file() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "palimpsest" / "labels.json"


def _read(path: Path, *, required: bool) -> dict[str, Any]:
    """The labels of a file; a damaged cache is an empty one, a file that was asked for is not."""
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        found, problem = None, str(error)
    else:
        problem = type(found).__name__
    if isinstance(found, dict) and all(isinstance(one, dict) for one in found.values()):
        return found
    if required:
        raise ConfigError(
            f"{path} holds no labels",
            expected="JSON: {site or Neuronpedia id: {latent: label}}",
            found=problem,
        )
    return {}


def _write(path: Path, labels: dict[str, Any]) -> None:
    try:
        write_bytes(path, (json.dumps(labels, ensure_ascii=False, indent=1) + "\n").encode(errors="replace"))
    except (OSError, ArtifactError) as error:
        log.warning("Labels cannot be kept in %s: %s", path, error)
