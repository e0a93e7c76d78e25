"""Everything an audit reads, opened and checked before anything is computed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from palimpsest.artifacts import input_entry
from palimpsest.audit.battery.folder import Battery
from palimpsest.audit.battery.make import CALIBRATION
from palimpsest.audit.config import AuditConfig
from palimpsest.audit.controls import control_dictionaries
from palimpsest.audit.measure import Size, Text, survey
from palimpsest.audit.sites import site_of
from palimpsest.audit.sums import Measure
from palimpsest.corpus import Corpus
from palimpsest.corpus.rows import parse_source
from palimpsest.dictionaries import Dictionary, load_dictionary
from palimpsest.errors import ConfigError, DictionaryError
from palimpsest.harvest import activations
from palimpsest.log import log
from palimpsest.models import ModelPair, fingerprint, load_pair

MAIN = "dictionary"
GENERAL = "general"


@dataclass(frozen=True)
class Inputs:
    """A pair, a dictionary, text; with a battery, what its base left.

    Attributes:
        dictionary: The primary one.
        dictionary_path: Where it came from.
        site: Where it reads.
        corpora: Name to text and size, the general one first.
        k_max: Longest lists.
        battery: The battery that the text and the base's readings come from.
        further: Other readers of the battery: name, site, dictionary.
    """

    pair: ModelPair
    dictionary: Dictionary
    dictionary_path: str
    site: str
    corpora: list[tuple[Text, Size]]
    k_max: int
    battery: Battery | None = None
    further: Sequence[tuple[str, str, Dictionary]] = ()

    @property
    def sites(self) -> list[str]:
        """Every site that is read, the primary one first."""
        return list(dict.fromkeys([self.site, *(site for _, site, _ in self.further)]))

    def entries(self, config: AuditConfig) -> dict[str, Any]:
        """What the result depends on; another content of any of these refuses to resume."""
        if self.battery is None:
            entries = {text.name: text.fingerprint() for text, _ in self.corpora if isinstance(text, Corpus)}
        else:
            entries = {"battery": input_entry(self.battery.path)}
            if (nulls := self.battery.path / CALIBRATION).exists():
                entries["nulls"] = input_entry(nulls)
        local = Path(self.dictionary_path).exists()
        unknown = {"path": self.dictionary_path, "sha256": None}
        entries["dictionary"] = input_entry(self.dictionary_path) if local else unknown
        entries["base"] = {"path": config.base, "sha256": fingerprint(self.pair.base)}
        if not self.pair.one_at_a_time:
            entries["tuned"] = {"path": config.tuned, "sha256": fingerprint(self.pair.tuned)}
        elif Path(config.tuned).is_dir():
            # The tuned model is not loaded before the base's pass is done; its files say as much.
            entries["tuned"] = input_entry(config.tuned)
        else:
            entries["tuned"] = {"path": config.tuned, "sha256": None}
        return entries

    def measures(self, config: AuditConfig) -> list[Measure]:
        """What is measured through which dictionary."""
        common: Mapping[str, Any] = {"k": config.k, "pooled": config.legacy, "seed": config.run.seed}
        found = [Measure(MAIN, self.dictionary, self.site, k_max=self.k_max, **common)]
        further = list(self.further)
        if config.controls:
            general = self.corpora[0][0]
            acts = activations(self.pair.base, general.batches(config.models.tokens_per_batch), self.site)
            made = control_dictionaries(acts, self.dictionary, config.run.seed)
            device = self.pair.base.device
            further += [(name, self.site, control.to(device)) for name, control in made.items()]
        for name, site, dictionary in further:
            k_max = min(self.k_max, dictionary.n_latents)
            found.append(Measure(name, dictionary, site, k_max=k_max, latents=False, **common))
        return found


def open_inputs(config: AuditConfig) -> Inputs:
    """Open and check what a config names.

    Raises:
        PalimpsestError: Something is missing or does not fit.
    """
    return _from_text(config) if config.calibration.battery is None else _from_battery(config)


def _from_text(config: AuditConfig) -> Inputs:
    assert config.dictionary is not None and config.general is not None
    for source in (config.general, *(source for _, source in config.tasks)):
        parse_source(source)  # a wrong path is said now, before minutes of loading
    dictionary = load_dictionary(config.dictionary)
    pair = load_pair(config.base, config.tuned, config.models)
    site = site_of(dictionary, config.dictionary, pair.base, config.site, force=config.force_site)
    options = config.corpora
    if config.legacy:
        options = replace(options, all_positions=True)
    if pair.base.context is not None and options.max_length > pair.base.context:
        log.warning("Documents are cut at the model's context of %d tokens.", pair.base.context)
        options = replace(options, max_length=pair.base.context)
    corpora: list[tuple[Text, Size]] = []
    for name, source in [(GENERAL, config.general), *config.tasks]:
        corpus = Corpus(source, pair.tokenizer, name=name, options=options)
        corpora.append((corpus, survey(corpus, config.models.tokens_per_batch, config.minimum_documents)))
    k_max = _k_max(config, dictionary)
    return Inputs(pair, dictionary.to(pair.base.device), config.dictionary, site, corpora, k_max)


def _from_battery(config: AuditConfig) -> Inputs:
    options = config.calibration
    battery = Battery(options.battery or "")
    unknown = [name for name in options.declared if name not in battery.names]
    if unknown:
        raise ConfigError(
            "A declared corpus is not in the battery",
            expected=", ".join(battery.names),
            found=", ".join(unknown),
            fix="Declare names of the battery, or make a battery that holds that text",
        )
    if config.loss and not battery.has_loss:
        log.warning("The battery holds no losses of its base; the audit measures none.")
    dictionaries = battery.dictionaries((config.dictionary,) if config.dictionary else ())
    k_max = _k_max(config, dictionaries[0])
    pair = load_pair(config.base, config.tuned, config.models)
    dictionaries = [dictionary.to(pair.base.device) for dictionary in dictionaries]
    battery.check_base(pair.base, dictionaries)
    corpora: list[tuple[Text, Size]] = []
    for name in battery.names:
        row = battery.row(name)
        size = Size(row["documents"], row["tokens"], row["bad_rows"])
        corpora.append((battery.text(name), size))
    further = [
        (reader.name, reader.site, dictionary)
        for reader, dictionary in zip(battery.readers[1:], dictionaries[1:], strict=True)
    ]
    path = config.dictionary or battery.readers[0].path
    return Inputs(pair, dictionaries[0], path, battery.sites[0], corpora, k_max, battery, further)


def _k_max(config: AuditConfig, dictionary: Dictionary) -> int:
    if config.k > dictionary.n_latents:
        raise DictionaryError(
            "k is larger than the number of latents",
            expected=f"at most {dictionary.n_latents}",
            found=config.k,
        )
    return min(config.k_max, dictionary.n_latents)
