"""The audit as a stage: a config in, an artifact folder out."""

import shlex
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from palimpsest.artifacts import Artifact, RunFolder, check_claim, input_entry, open_artifact
from palimpsest.audit.config import AuditConfig
from palimpsest.audit.controls import control_dictionaries
from palimpsest.audit.measure import Size, measure_corpora, survey
from palimpsest.audit.results import MAIN, Evidence, audit_finding, estimates_of, write_tables
from palimpsest.audit.sums import Measure
from palimpsest.corpus import Corpus
from palimpsest.corpus.rows import parse_source
from palimpsest.dictionaries import Dictionary, load_dictionary
from palimpsest.errors import DictionaryError
from palimpsest.harvest import Harvester, activations
from palimpsest.log import log
from palimpsest.models import ModelPair, fingerprint, load_pair, weight_deltas
from palimpsest.options import as_flags, config_dict


@dataclass(frozen=True)
class _Inputs:
    """Everything an audit reads, opened and checked."""

    pair: ModelPair
    dictionary: Dictionary
    site: str
    corpora: list[tuple[Corpus, Size]]
    k_max: int


def run_audit(config: AuditConfig, *, command: str | None = None) -> Artifact:
    """Measure what a fine-tune changed, and where: `docs/measures/overlap.md` defines every figure.

    Args:
        config: Pair, dictionary, corpora and options.
        command: Recorded as what reproduces the result; made from the config when absent.

    Returns:
        The finished folder: `audit.json`, `curve.parquet`, `latents.parquet`.

    Raises:
        PalimpsestError: Bad input, before anything is written; or NaN and a full disk during the pass, after
            which `resume` continues with the corpora that are left.
    """
    check_claim(config.run.out, resume=config.run.resume, overwrite=config.run.overwrite)
    inputs = _open(config)
    entries = _input_entries(config, inputs)
    with RunFolder(
        config.out,
        stage="audit",
        config=config_dict(config),
        inputs=entries,
        seed=config.run.seed,
        device=str(inputs.pair.base.device),
        models={"base": config.base, "tuned": config.tuned, "kind": inputs.pair.kind},
        resume=config.run.resume,
        overwrite=config.run.overwrite,
    ) as run:
        if run.already_complete:
            log.warning("%s is complete already; nothing was run.", config.out)
            return open_artifact(config.out, stage="audit")
        evidence = _measure(config, inputs, entries, run)
        estimates = estimates_of(config, evidence, MAIN)
        finding = audit_finding(config, evidence, estimates, command or default_command(config))
        write_tables(run, config, evidence, estimates)
        run.write_json("audit.json", finding.to_dict())
        return run.finish(summary=finding.summary)


def default_command(config: AuditConfig) -> str:
    """The command line that gives this audit."""
    return shlex.join(["palimpsest", "audit", *as_flags(config, positional=("base", "tuned"))])


def _open(config: AuditConfig) -> _Inputs:
    for source in (config.general, *(source for _, source in config.tasks)):
        parse_source(source)  # a wrong path is said now, before minutes of loading
    dictionary = load_dictionary(config.dictionary)
    pair = load_pair(config.base, config.tuned, config.models)
    site = _site(config, dictionary, pair)
    options = config.corpora
    if config.legacy:
        options = replace(options, all_positions=True)
    if pair.base.context is not None and options.max_length > pair.base.context:
        log.warning("Documents are cut at the model's context of %d tokens.", pair.base.context)
        options = replace(options, max_length=pair.base.context)
    minimum = config.minimum_documents
    corpora = []
    for name, source in [("general", config.general), *config.tasks]:
        corpus = Corpus(source, pair.tokenizer, name=name, options=options)
        corpora.append((corpus, survey(corpus, config.models.tokens_per_batch, minimum)))
    k_max = min(config.k_max, dictionary.n_latents)
    if config.k > dictionary.n_latents:
        raise DictionaryError(
            "k is larger than the number of latents",
            expected=f"at most {dictionary.n_latents}",
            found=config.k,
        )
    return _Inputs(pair, dictionary.to(pair.base.device), site, corpora, k_max)


def _site(config: AuditConfig, dictionary: Dictionary, pair: ModelPair) -> str:
    """The site to read, checked against the dictionary's own and against its width."""
    sites = pair.base.sites
    if dictionary.models != 1:
        raise DictionaryError(
            f"{config.dictionary} reads two models at once",
            expected="a dictionary of one model (an SAE): both models are read through it",
            found=f"a dictionary of {dictionary.models} models",
        )
    own = sites.canonical(dictionary.site) if dictionary.site else None
    asked = sites.canonical(config.site) if config.site else None
    if asked:
        sites.tap(asked)
    if own is None and asked is None:
        raise DictionaryError(
            f"{config.dictionary} does not say which site it reads",
            fix="Name it with --site, as in resid_post.13",
        )
    if own and asked and own != asked and not config.force_site:
        raise DictionaryError(
            f"{config.dictionary} was trained on another site",
            expected=own,
            found=asked,
            fix="Leave --site out, or pass --force-site to read it there all the same",
        )
    site = asked or own
    assert site is not None
    sites.tap(site)
    width = pair.base.width(site)
    if dictionary.d_model != width:
        raise DictionaryError(
            f"{config.dictionary} does not fit {config.base}",
            expected=f"a dictionary of width {width}, as {site} has",
            found=f"width {dictionary.d_model}",
            fix="Use a dictionary that was trained on this base model",
        )
    return site


def _input_entries(config: AuditConfig, inputs: _Inputs) -> dict[str, Any]:
    """What the result depends on; another content of any of these refuses to resume."""
    entries = {corpus.name: corpus.fingerprint() for corpus, _ in inputs.corpora}
    local = Path(config.dictionary).exists()
    entries["dictionary"] = (
        input_entry(config.dictionary) if local else {"path": config.dictionary, "sha256": None}
    )
    pair = inputs.pair
    entries["base"] = {"path": config.base, "sha256": fingerprint(pair.base)}
    if not pair.one_at_a_time:
        entries["tuned"] = {"path": config.tuned, "sha256": fingerprint(pair.tuned)}
    elif Path(config.tuned).is_dir():
        # The tuned model is not loaded before the base's pass is done; its files say as much.
        entries["tuned"] = input_entry(config.tuned)
    else:
        entries["tuned"] = {"path": config.tuned, "sha256": None}
    return entries


def _measure(config: AuditConfig, inputs: _Inputs, entries: dict[str, Any], run: RunFolder) -> Evidence:
    started = time.perf_counter()
    pair, dictionary = inputs.pair, inputs.dictionary
    common = {"site": inputs.site, "k": config.k, "pooled": config.legacy, "seed": config.run.seed}
    measures = [Measure("dictionary", dictionary, k_max=inputs.k_max, **common)]
    if config.controls:
        measures += _controls(config, inputs, common)
    harvester = Harvester(pair, [inputs.site], loss=config.loss, kl=config.kl, spool=run.part("spool"))
    sums = measure_corpora(harvester, inputs.corpora, measures, run, config.models.tokens_per_batch)
    run.timing("measure", time.perf_counter() - started)
    prints = {"base": entries["base"]["sha256"], "tuned": fingerprint(pair.tuned)}
    run.update(models={"kind": pair.kind, "base": config.base, "tuned": config.tuned, "fingerprints": prints})
    deltas = None if pair.one_at_a_time else weight_deltas(pair)
    corpora = {corpus.name: (corpus, size) for corpus, size in inputs.corpora}
    dictionary_entry = {"path": config.dictionary, "sha256": entries["dictionary"].get("sha256")}
    return Evidence(pair, dictionary, dictionary_entry, inputs.site, corpora, sums, deltas, prints)


def _controls(config: AuditConfig, inputs: _Inputs, common: dict[str, Any]) -> list[Measure]:
    general = inputs.corpora[0][0]
    acts = activations(inputs.pair.base, general.batches(config.models.tokens_per_batch), inputs.site)
    made = control_dictionaries(acts, inputs.dictionary, config.run.seed)
    device = inputs.pair.base.device
    return [
        Measure(name, control.to(device), k_max=min(inputs.k_max, control.n_latents), latents=False, **common)
        for name, control in made.items()
    ]
