"""Labels from Neuronpedia: asked once for each latent, kept on this machine and in the artifact."""

from __future__ import annotations

from collections.abc import Callable
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError

from palimpsest.errors import ConfigError
from palimpsest.interpret.labels.protocol import Evidence, ProviderError
from palimpsest.labelcache import (
    LabelCache,
    Wanted,
    described,
    fetch_page,
    neuronpedia_id,
    no_network,
    page_address,
)
from palimpsest.neuronpedia import parse_neuronpedia

SAVED_EVERY = 50


class NeuronpediaLabeller:
    """What Neuronpedia says of the latents of one of its dictionaries.

    Args:
        source: Its id, as in `gemma-2-2b/20-gemmascope-res-16k`.
        fetch: Reads the JSON behind an address, and tries again by itself.
        cache: Where answers are kept.

    Raises:
        ConfigError: `source` is no such id.
    """

    def __init__(
        self, source: str, fetch: Callable[[str], Any] | None = None, cache: LabelCache | None = None
    ) -> None:
        found = parse_neuronpedia(source)
        if found is None:
            raise ConfigError(
                f"'{source[:80]}' is no id of Neuronpedia", expected="as in gemma-2-2b/20-gemmascope-res-16k"
            )
        self._id, self._source = found, f"{found.model}/{found.source}"
        self._fetch, self._cache = fetch or fetch_page, cache or LabelCache()
        self._unsaved = 0

    def label(self, evidence: Evidence) -> str | None:
        """The first explanation on the latent's page; None where there is no page or nothing on it.

        Raises:
            ProviderError: The server does not answer, or may not be asked.
        """
        wanted = Wanted(self._source, evidence.latent, self._source)
        known = self._cache.get(wanted)
        if known is not None:
            return known
        if no_network():
            raise ProviderError("HF_HUB_OFFLINE forbids to ask Neuronpedia", fatal=True)
        try:
            label = described(self._fetch(page_address(self._id, evidence.latent)))
        except (OSError, HTTPException, ValueError) as error:
            if isinstance(error, HTTPError) and error.code == 404:
                return None
            refused = isinstance(error, HTTPError) and error.code in (401, 403)
            raise ProviderError("Neuronpedia does not answer", found=error, fatal=refused) from error
        if label is not None:
            self._cache.put(wanted, label)
            self._unsaved += 1
            if self._unsaved >= SAVED_EVERY:
                self.close()
        return label

    def knows(self, latent: int) -> bool:
        """Whether the answer is here already, so that nobody need be asked."""
        return self._cache.get(Wanted(self._source, latent, self._source)) is not None

    def close(self) -> None:
        """Keep what was found for other runs."""
        self._cache.save()
        self._unsaved = 0


def source_of(about: dict[str, Any], given: str | None) -> str:
    """The Neuronpedia id of the dictionary of an examples folder.

    Raises:
        ConfigError: It has none, and none was given.
    """
    dictionary = about.get("dictionary") or {}
    found = given or neuronpedia_id(dictionary.get("metadata") or {}) or neuronpedia_id(dictionary)
    if found is None:
        raise ConfigError(
            "This dictionary has no id at Neuronpedia",
            expected="one in its metadata, or --neuronpedia gemma-2-2b/20-gemmascope-res-16k",
            found=dictionary.get("path"),
            fix="Name it, or choose --provider tokens, local or openai",
        )
    return found
