"""What a diff reads, opened and checked before anything is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from palimpsest.artifacts import input_entry
from palimpsest.corpus.named import named_source
from palimpsest.corpus.rows import parse_source
from palimpsest.dictionaries import Dictionary, load_dictionary
from palimpsest.diff.attribution.answers import read_behaviours
from palimpsest.diff.config import DiffConfig
from palimpsest.diff.methods import Method
from palimpsest.diff.nulls import check_nulls, null_rows
from palimpsest.diff.patching import check_text
from palimpsest.diff.stability import check_twin
from palimpsest.diff.text import Texts
from palimpsest.errors import DictionaryError, SiteError
from palimpsest.evaluate.views import site_of
from palimpsest.models import SIDES, ModelPair, fingerprint, load_pair
from palimpsest.options import parse_assignment


class Inputs(NamedTuple):
    """What a diff reads, opened and checked."""

    config: DiffConfig
    method: Method
    pair: ModelPair
    site: str
    texts: Texts
    twins: list[Dictionary]
    nulls: list[dict[str, Any]]


def open_inputs(config: DiffConfig) -> Inputs:
    """Load and check everything that a diff reads; the cheap checks first.

    Raises:
        PalimpsestError: Something is missing, or does not fit the rest.
    """
    for source in config.corpus:
        parse_source(named_source(source)[1])
    dictionary = load_dictionary(config.dictionary)
    if not config.other_pair:
        check_origin(dictionary, config)
    nulls = null_rows(config.null)
    twins = [load_dictionary(path) for path in config.twin]
    pair = load_pair(config.base, config.tuned, config.models)
    site = site_of(dictionary, pair.base, config.site, loss=False)
    method = Method(dictionary.to(pair.base.device))
    weights: dict[str, str | None] = {side: fingerprint(pair.side(side)) for side in SIDES}
    check_nulls(nulls, method.kind, site, weights)
    for twin in twins:
        check_twin(dictionary, twin)
    texts = Texts(config.corpus, pair.tokenizer, config.corpora, pair.base.context, template=config.template)
    _check_later_passes(config, pair, site, texts)
    return Inputs(config, method, pair, site, texts, twins, nulls)


def check_origin(dictionary: Dictionary, config: DiffConfig) -> None:
    """Refuse a dictionary that names models of other names than the pair's; folders move, so their paths may differ.

    Raises:
        DictionaryError: It does.
    """
    about = dictionary.metadata
    trained = about["model"] if isinstance(about.get("model"), dict) else about
    own = {side: str(trained[side]) for side in SIDES if trained.get(side)}
    given = {"base": config.base, "tuned": config.tuned}
    if dictionary.view in ("base", "tuned") and isinstance(about.get("model"), str):
        own = {dictionary.view: about["model"]}
    for side, name in own.items():
        if Path(name).name != Path(given[side]).resolve().name and Path(name).name != Path(given[side]).name:
            raise DictionaryError(
                f"The dictionary {config.dictionary} was trained on another pair",
                expected=f"{given[side]} as its {side} model",
                found=name,
                fix="Name that pair, or pass --other-pair to read it all the same",
            )


def _check_later_passes(config: DiffConfig, pair: ModelPair, site: str, texts: Texts) -> None:
    """What a later pass would refuse is refused before the first: with other options a run cannot be resumed."""
    patching, attribution = config.patching, config.attribution
    if (patching.patch or attribution.attribute) and ":" in pair.tuned.sites.tap(site).side:
        raise SiteError(
            f"Nothing can be put in at {site}",
            found="a site that its module only reports",
            fix="Use a residual site, or pass --no-patch and --no-attribute",
        )
    if patching.patch:
        check_text(texts, config)
    if attribution.attribute:
        texts.pass_over(1, 1, "odd")
        read_behaviours(attribution.behaviour, pair.tokenizer, texts, attribution.attribution_tokens)


def manifest_inputs(inputs: Inputs) -> dict[str, Any]:
    """What the manifest records of everything that was read."""
    config, texts = inputs.config, inputs.texts

    def entry(path: str) -> dict[str, Any]:
        return input_entry(path) if Path(path).exists() else {"path": path, "sha256": None}

    entries = {
        "dictionary": entry(config.dictionary),
        "base": {"path": config.base, "sha256": fingerprint(inputs.pair.base)},
        "tuned": {"path": config.tuned, "sha256": fingerprint(inputs.pair.tuned)},
    }
    entries |= {f"corpus/{corpus.name}": corpus.fingerprint() for corpus in texts.corpora}
    entries |= {f"twin/{index}": entry(path) for index, path in enumerate(config.twin)}
    entries |= {f"null/{index}": entry(path) for index, path in enumerate(config.null)}
    entries |= {
        f"behaviour/{index}": entry(parse_assignment(source)[1])
        for index, source in enumerate(config.attribution.behaviour)
    }
    return entries
