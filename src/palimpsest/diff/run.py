"""The diff as a stage: a config in, an artifact folder out; every finished pass is kept."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from palimpsest.artifacts import RunFolder, check_claim, open_artifact
from palimpsest.diff.attribution import AttributionResult, attribute_pair
from palimpsest.diff.classes import artefacts, classify, sensitivity, verdicts
from palimpsest.diff.config import DiffConfig
from palimpsest.diff.finding import Evidence, finding_of
from palimpsest.diff.inputs import Inputs, manifest_inputs, open_inputs
from palimpsest.diff.nulls import COMPARED, null_notes
from palimpsest.diff.passes import kept_arrays, kept_values
from palimpsest.diff.patching import Candidates, patch_pair
from palimpsest.diff.rankings import rankings
from palimpsest.diff.result import Attributed, Behaviour, Diff, Patching
from palimpsest.diff.scaling import Scaling, geometry, scale_latents, with_means
from palimpsest.diff.stability import match_latents, summarise_match
from palimpsest.diff.statistics import Statistics, collect_statistics, masses
from palimpsest.diff.table import latent_columns, to_table
from palimpsest.evaluate.views import origin_notes
from palimpsest.options import config_dict

STAGE = "diff"
RESULT = "diff.json"
LATENTS = "latents.parquet"


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
        inputs=manifest_inputs(inputs),
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


def _measure(run: RunFolder, inputs: Inputs) -> tuple[Diff, dict[str, NDArray]]:
    """All passes, in an order in which each can use what the last one found."""
    config, method = inputs.config, inputs.method
    seconds: dict[str, float] = {}
    text = inputs.texts.pass_over(config.tokens, config.models.tokens_per_batch)
    statistics = Statistics(
        kept_arrays(
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
    notes += null_notes(inputs.nulls, _own(inputs, statistics.tokens))
    return finding_of(evidence, inputs, seconds, notes), columns


def _own(inputs: Inputs, tokens: int) -> dict[str, Any]:
    """The figures of this diff that a null should share."""
    described = inputs.method.dictionary.describe()
    trained = described["metadata"].get("tokens")
    thresholds = {key: float(value) for key, value in vars(inputs.config.classes).items()}
    own = {key: described[key] for key in COMPARED}
    return own | {"tokens": tokens, "trained_on": trained, "thresholds": thresholds}


def _scale(inputs: Inputs, statistics: Statistics) -> tuple[Scaling, dict[str, NDArray], dict[str, Any]]:
    """Ratios with intervals, the class and verdict of each latent, artefacts and stability."""
    config, method, arrays = inputs.config, inputs.method, statistics.arrays
    fixed = geometry(method)
    scaling = scale_latents(
        with_means(method, arrays["scaling/sums"], arrays["group/sums"]),
        fixed,
        arrays["group/tokens"],
        confidence=config.confidence,
        resamples=config.resamples,
        seed=config.run.seed,
    )
    found: dict[str, NDArray] = {
        "class": classify(method, scaling, statistics.alive, config.classes),
        "verdict": verdicts(method, scaling, config.classes),
    }
    rows: dict[str, Any] = {"artefacts": {}, "stability": []}
    rows["sensitivity"] = sensitivity(method, scaling, fixed, statistics.alive, config.classes)
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

    kept = kept_values(run, "attribution", seconds, compute)
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

    return Patching.from_dict(kept_values(run, "patching", seconds, compute))
