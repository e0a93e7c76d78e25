"""The diff as a stage: a config in, an artifact folder out; every finished pass is kept."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from palimpsest.artifacts import RunFolder, check_claim, disk, input_entry, open_artifact
from palimpsest.corpus.rows import parse_source
from palimpsest.dictionaries import Dictionary, load_dictionary
from palimpsest.diff.attribution import AttributionResult, attribute_pair
from palimpsest.diff.attribution.answers import read_behaviours
from palimpsest.diff.classes import artefacts, classify, verdicts
from palimpsest.diff.config import DiffConfig
from palimpsest.diff.finding import Evidence, finding_of
from palimpsest.diff.methods import Method
from palimpsest.diff.nulls import null_rows
from palimpsest.diff.patching import Candidates, check_text, patch_pair
from palimpsest.diff.rankings import rankings
from palimpsest.diff.result import Attributed, Behaviour, Diff, Patching
from palimpsest.diff.scaling import Scaling, geometry, scale_latents
from palimpsest.diff.stability import check_twin, match_latents, summarise_match
from palimpsest.diff.statistics import Statistics, collect_statistics, masses
from palimpsest.diff.table import latent_columns, to_table
from palimpsest.diff.text import Texts
from palimpsest.errors import SiteError
from palimpsest.evaluate.views import origin_notes, site_of
from palimpsest.models import ModelPair, fingerprint, load_pair
from palimpsest.options import config_dict, parse_assignment

STAGE = "diff"
RESULT = "diff.json"
LATENTS = "latents.parquet"


class Inputs(NamedTuple):
    """What a diff reads, opened and checked."""

    config: DiffConfig
    method: Method
    pair: ModelPair
    site: str
    texts: Texts
    twins: list[Dictionary]
    nulls: list[dict[str, Any]]


def run_diff(config: DiffConfig) -> Diff:
    """Measure every latent, put it to the causal test, and write `diff.json` and `latents.parquet`.

    Returns:
        What `read_diff` gives again.

    Raises:
        PalimpsestError: Bad input, before anything is written; NaN during a pass. With `resume` the passes that an
            interrupted run finished are read.
    """
    check_claim(config.run.out, resume=config.run.resume, overwrite=config.run.overwrite)
    inputs = open_inputs(config)
    with RunFolder(
        config.run.out,
        stage=STAGE,
        config=config_dict(config),
        inputs=_entries(inputs),
        seed=config.run.seed,
        device=str(inputs.pair.base.device),
        models={"base": config.base, "tuned": config.tuned},
        resume=config.run.resume,
        overwrite=config.run.overwrite,
    ) as run:
        if run.already_complete:
            return read_diff(config.run.out)
        found, columns = _measure(run, inputs)
        run.write_json(RESULT, found.to_dict())
        run.write_table(LATENTS, to_table(columns))
        for name, seconds in found.seconds.items():
            run.timing(name, seconds)
        run.finish(summary=found.summary)
    return found


def read_diff(path: str | Path) -> Diff:
    """What a finished diff found.

    Raises:
        ArtifactError: The folder is unfinished, edited, or another stage's.
    """
    return Diff.from_dict(open_artifact(path, stage=STAGE).read_json(RESULT))


def open_inputs(config: DiffConfig) -> Inputs:
    """Load and check everything that a diff reads; the cheap checks first.

    Raises:
        PalimpsestError: Something is missing, or does not fit the rest.
    """
    for source in config.corpus:
        parse_source(parse_assignment(source)[1])
    dictionary = load_dictionary(config.dictionary)
    nulls = null_rows(config.null)
    twins = [load_dictionary(path) for path in config.twin]
    pair = load_pair(config.base, config.tuned, config.models)
    site = site_of(dictionary, pair.base, config.site, loss=False)
    method = Method(dictionary.to(pair.base.device))
    for twin in twins:
        check_twin(dictionary, twin)
    texts = Texts(config.corpus, pair.tokenizer, config.corpora, pair.base.context)
    _check_later_passes(config, pair, site, texts)
    return Inputs(config, method, pair, site, texts, twins, nulls)


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


def _measure(run: RunFolder, inputs: Inputs) -> tuple[Diff, dict[str, NDArray]]:
    """All passes, in an order in which each can use what the last one found."""
    config, method = inputs.config, inputs.method
    seconds: dict[str, float] = {}
    text = inputs.texts.pass_over(config.tokens, config.models.tokens_per_batch)
    statistics = Statistics(
        _kept(
            run,
            "statistics",
            seconds,
            lambda: (
                collect_statistics(
                    method, inputs.pair, inputs.site, inputs.texts, text, config.classes
                ).arrays
            ),
        )
    )
    started = time.perf_counter()
    scaling, found, rows = _scale(inputs, statistics)
    seconds["scaling"] = time.perf_counter() - started
    attribution = _attribute(run, inputs, seconds) if config.attribution.attribute else None
    if attribution is not None:
        found["causal_share"] = attribution.causal_share
        found |= {f"behaviour[{name}]": share for name, share in attribution.by_behaviour.items()}
    else:
        found["causal_share"] = np.full(method.dictionary.n_latents, np.nan)
    columns = latent_columns(method, statistics, scaling, found, inputs.texts.names)
    patching = _patch(run, inputs, statistics, columns, seconds) if config.patching.patch else None
    evidence = Evidence(statistics, scaling, columns, rows, patching, attribution, inputs.nulls)
    notes = inputs.pair.notes + origin_notes(method.dictionary, inputs.pair, inputs.site)
    return finding_of(evidence, inputs, seconds, notes), columns


def _scale(inputs: Inputs, statistics: Statistics) -> tuple[Scaling, dict[str, NDArray], dict[str, Any]]:
    """Ratios with intervals, the class and verdict of each latent, artefacts and stability."""
    import torch

    config, method, arrays = inputs.config, inputs.method, statistics.arrays
    scaling = scale_latents(
        arrays["scaling/sums"],
        geometry(method, torch.from_numpy(arrays["mean"])),
        confidence=config.confidence,
        resamples=config.resamples,
        seed=config.run.seed,
    )
    found: dict[str, NDArray] = {
        "class": classify(method, scaling, statistics.alive, config.classes),
        "verdict": verdicts(method, scaling, config.classes),
    }
    rows: dict[str, Any] = {"artefacts": {}, "stability": []}
    if method.kind == "crosscoder":
        pairs = (arrays["split/pairs"], arrays["split/counts"])
        rows["artefacts"] = artefacts(found, scaling, pairs, config.classes)
    scores = []
    for path, twin in zip(config.twin, inputs.twins, strict=True):
        match = match_latents(method.dictionary, twin)
        rows["stability"].append(summarise_match(match, found["class"], path))
        scores.append(match.score)
    if scores:
        found["stability"] = np.mean(scores, axis=0)
    return scaling, found, rows


def _attribute(run: RunFolder, inputs: Inputs, seconds: dict[str, float]) -> AttributionResult:
    made: list[AttributionResult] = []

    def compute() -> dict[str, Any]:
        found = attribute_pair(inputs.method, inputs.pair, inputs.site, inputs.texts, inputs.config)
        made.append(found)
        return {
            "found": [asdict(one) for one in found.found],
            "behaviours": [asdict(one) for one in found.behaviours],
            "causal_share": found.causal_share.tolist(),
            "by_behaviour": {name: share.tolist() for name, share in found.by_behaviour.items()},
        }

    kept = _kept_json(run, "attribution", seconds, compute)
    if made:
        return made[0]
    return AttributionResult(
        [Attributed(**row) for row in kept["found"]],
        np.array(kept["causal_share"]),
        {name: np.array(share) for name, share in kept["by_behaviour"].items()},
        [Behaviour(**row) for row in kept["behaviours"]],
    )


def _patch(
    run: RunFolder,
    inputs: Inputs,
    statistics: Statistics,
    columns: dict[str, NDArray],
    seconds: dict[str, float],
) -> Patching:
    method, config = inputs.method, inputs.config
    share = columns["causal_share"]
    candidates = Candidates(
        np.flatnonzero(statistics.alive),
        masses(method, statistics),
        rankings(method, columns, config.classes.nu_floor, share if np.isfinite(share).all() else None),
        statistics.arrays["difference"],
    )

    def compute() -> dict[str, Any]:
        return asdict(patch_pair(method, inputs.pair, inputs.site, inputs.texts, candidates, config))

    return Patching.from_dict(_kept_json(run, "patching", seconds, compute))


def _kept(
    run: RunFolder, name: str, seconds: dict[str, float], compute: Callable[[], dict[str, NDArray]]
) -> dict[str, NDArray]:
    """The arrays of a pass: computed, or read where an interrupted run finished it."""
    path = run.part(f"{name}.safetensors")
    if path.exists():
        seconds[name] = json.loads(run.part(f"{name}.seconds").read_text())
        return load_file(path)
    started = time.perf_counter()
    arrays = compute()
    seconds[name] = time.perf_counter() - started
    disk.write_bytes(run.part(f"{name}.seconds"), disk.to_json(seconds[name]))
    with disk.replacing(path) as temporary:
        # Not ascontiguousarray, which makes a row of a scalar.
        save_file({key: np.asarray(value, order="C") for key, value in arrays.items()}, temporary)
    return arrays


def _kept_json(
    run: RunFolder, name: str, seconds: dict[str, float], compute: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """The same for plain values."""
    path = run.part(f"{name}.json")
    if not path.exists():
        started = time.perf_counter()
        values = compute()
        values["seconds"] = time.perf_counter() - started
        disk.write_bytes(path, disk.to_json(values))
    kept = json.loads(path.read_text())
    seconds[name] = kept.pop("seconds")
    return kept


def _entries(inputs: Inputs) -> dict[str, Any]:
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
