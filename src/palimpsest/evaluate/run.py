"""The evaluation as a stage: a config in, an artifact folder out."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from palimpsest.artifacts import RunFolder, check_claim, input_entry, open_artifact
from palimpsest.corpus import Corpus
from palimpsest.corpus.rows import parse_source
from palimpsest.dictionaries import Dictionary, load_dictionary
from palimpsest.errors import ConfigError
from palimpsest.evaluate.config import EvaluateConfig, Reads
from palimpsest.evaluate.estimate import Settings
from palimpsest.evaluate.measure import Measured, measure_dictionary
from palimpsest.evaluate.result import Evaluation
from palimpsest.evaluate.text import evaluation_batches
from palimpsest.evaluate.views import Source, site_of
from palimpsest.log import log
from palimpsest.models import LanguageModel, fingerprint, load_model, load_pair
from palimpsest.options import CorpusOptions, config_dict

STAGE = "evaluation"
RESULT = "evaluation.json"
LATENTS = "density.parquet"


def run_evaluate(config: EvaluateConfig) -> Evaluation:
    """Measure a dictionary and write `evaluation.json` and `density.parquet` to `config.run.out`.

    Returns:
        The figures, as `Evaluation.from_dict(artifact.read_json("evaluation.json"))` gives them again.

    Raises:
        PalimpsestError: Bad input, before anything is written; or NaN during the passes. An interrupted evaluation
            starts again with `resume`; a finished one is read.
    """
    check_claim(config.run.out, resume=config.run.resume, overwrite=config.run.overwrite)
    for source in config.corpus:
        parse_source(source)
    dictionary = load_dictionary(config.dictionary)
    _check_view(config, dictionary)
    source = load_source(config)
    # No name is kept for the base: a pair that holds one model at a time must be able to drop it.
    site = site_of(dictionary, _first(source), config.site, loss=config.loss)
    device = _first(source).device
    corpus = open_corpus(config, source)
    batches = evaluation_batches(corpus, config.tokens, config.models.tokens_per_batch)
    with RunFolder(
        config.run.out,
        stage=STAGE,
        config=config_dict(config),
        inputs=_inputs(config, source, corpus),
        seed=config.run.seed,
        device=str(device),
        models={key: value for key in ("model", "base", "tuned") if (value := getattr(config, key))},
        resume=config.run.resume,
        overwrite=config.run.overwrite,
    ) as run:
        if run.already_complete:
            return read_evaluation(config.run.out)
        started = time.perf_counter()
        settings = Settings(config.confidence, config.resamples, config.run.seed)
        on_device = dictionary.to(device)
        found = measure_dictionary(on_device, source, batches, settings, site=site, loss=config.loss)
        evaluation = replace(
            found.evaluation,
            dictionary={"path": config.dictionary} | found.evaluation.dictionary,
            masking=_masking(corpus.options),
        )
        run.timing("evaluate", time.perf_counter() - started)
        run.write_json(RESULT, evaluation.to_dict())
        _write_latents(run, found)
        run.finish(summary=evaluation.summary)
    return evaluation


def read_evaluation(path: str | Path) -> Evaluation:
    """The figures of a finished evaluation folder.

    Raises:
        ArtifactError: The folder is unfinished, edited, or another stage's.
    """
    return Evaluation.from_dict(open_artifact(path, stage=STAGE).read_json(RESULT))


def _check_view(config: EvaluateConfig, dictionary: Dictionary) -> None:
    """Say before any model is loaded that one model is too few, or one at a time."""
    if dictionary.view in ("base", "tuned"):
        return
    if config.model is not None:
        raise ConfigError(
            f"{config.dictionary} reads a base and a tuned model (view {dictionary.view})",
            expected="--base BASE and --tuned TUNED",
            found=f"--model {config.model}",
        )
    if config.models.one_at_a_time:
        raise ConfigError(
            f"{config.dictionary} reads both models at once (view {dictionary.view})",
            fix="Leave --one-at-a-time out",
        )


def load_source(config: Reads) -> Source:
    """The model or the pair that the options name."""
    if config.model is not None:
        return load_model(config.model, config.models)
    assert config.base is not None and config.tuned is not None
    return load_pair(config.base, config.tuned, config.models)


def _first(source: Source) -> LanguageModel:
    return source if isinstance(source, LanguageModel) else source.base


def open_corpus(config: Reads, source: Source) -> Corpus:
    """The text that the options name, its documents cut at the model's context."""
    options, context = config.corpora, _first(source).context
    if context is not None and options.max_length > context:
        log.warning("Documents are cut at the model's context of %d tokens.", context)
        options = replace(options, max_length=context)
    return Corpus(list(config.corpus), source.tokenizer, options=options)


def _masking(options: CorpusOptions) -> str:
    if options.all_positions:
        return "every token"
    if options.roles:
        return f"tokens of the roles {', '.join(options.roles)}, no special tokens"
    return "content tokens: no BOS, special or chat-template tokens"


def _inputs(config: EvaluateConfig, source: Source, corpus: Corpus) -> dict[str, Any]:
    local = Path(config.dictionary).exists()
    entries: dict[str, Any] = {
        "dictionary": input_entry(config.dictionary)
        if local
        else {"path": config.dictionary, "sha256": None},
        "corpus": corpus.fingerprint(),
    }
    if isinstance(source, LanguageModel):
        return entries | {"model": {"path": config.model, "sha256": fingerprint(source)}}
    entries["base"] = {"path": config.base, "sha256": fingerprint(source.base)}
    assert config.tuned is not None
    if not source.one_at_a_time:
        entries["tuned"] = {"path": config.tuned, "sha256": fingerprint(source.tuned)}
    elif Path(config.tuned).is_dir():
        # The tuned model is loaded only when the base is done; its files say as much.
        entries["tuned"] = input_entry(config.tuned)
    else:
        entries["tuned"] = {"path": config.tuned, "sha256": None}
    return entries


def _write_latents(run: RunFolder, found: Measured) -> None:
    """One row per model and latent: on how many of the measured tokens it fires."""
    import pyarrow

    sides = list(found.fires)
    fires = np.concatenate([found.fires[side] for side in sides])
    n_latents = len(fires) // len(sides)
    columns = {
        "side": np.repeat(sides, n_latents).tolist(),
        "latent": np.tile(np.arange(n_latents, dtype=np.int32), len(sides)),
        "fires": fires,
        "density": fires / found.evaluation.tokens,
    }
    run.write_table(LATENTS, pyarrow.table(columns))
