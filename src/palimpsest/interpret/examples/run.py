"""The examples as a stage: a config in, a folder out that the report, the app and the labels read."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from palimpsest.artifacts import Artifact, RunFolder, check_claim, input_entry, open_artifact
from palimpsest.corpus.named import named_source
from palimpsest.corpus.rows import parse_source
from palimpsest.evaluate.views import origin_notes
from palimpsest.interpret.examples.collect import Collected, collect
from palimpsest.interpret.examples.config import ExamplesConfig
from palimpsest.interpret.examples.table import latent_table, lens_columns, neighbour_columns, token_columns
from palimpsest.interpret.examples.text import Texts
from palimpsest.interpret.examples.vocabulary import id_count, token_texts
from palimpsest.interpret.examples.windows import write_examples
from palimpsest.interpret.lens import can_read, lens_table
from palimpsest.interpret.subject import Subject, open_subject
from palimpsest.interpret.token_odds import EventCounts
from palimpsest.latents.schema import ABOUT, EXAMPLES, LATENTS, STAGE, VOCAB, vocab_schema
from palimpsest.models import LanguageModel, fingerprint
from palimpsest.options import config_dict

SCHEMA = 1
T = TypeVar("T")

SENTENCES = {
    "sae": {
        "value": "The larger of the two models' codes on the token.",
        "base": "The code of the base's activation.",
        "tuned": "The code of the tuned model's activation.",
    },
    "lone": {"value": "The code of the model's activation.", "base": "The code of the model's activation."},
    "pair": {
        "value": "The joint code of both models' activations.",
        "base": "The code when both inputs are the base's activation.",
        "tuned": "The code when both inputs are the tuned model's activation.",
    },
    "diff": {"value": "The code of the difference, tuned minus base; there is none of one model alone."},
}


@dataclass
class _Clock:
    """Seconds of each part of the work."""

    seconds: dict[str, float] = field(default_factory=dict)

    def time(self, name: str, work: Callable[[], T]) -> T:
        started = time.perf_counter()
        found = work()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
        return found


def run_examples(config: ExamplesConfig) -> Artifact:
    """Read the text once, and write `examples.json`, `latents.parquet`, `examples.parquet` and `vocab.parquet`.

    Returns:
        The folder; `palimpsest.latents.LatentIndex` asks it questions.

    Raises:
        PalimpsestError: Bad input, before anything is written; NaN during the pass. With `resume` the chunks of text
            that an interrupted run finished are not read by the models again.
    """
    check_claim(config.run.out, resume=config.run.resume, overwrite=config.run.overwrite)
    for source in config.corpus:
        parse_source(named_source(source)[1])
    subject = open_subject(config.base, config.tuned, config.dictionary, config.site, config.models)
    first = subject.model("base")
    texts = Texts(config.corpus, subject.tokenizer, config.corpora, first.context, template=config.template)
    texts.require_tokens()
    with RunFolder(
        config.run.out,
        stage=STAGE,
        config=config_dict(config),
        inputs=_inputs(config, subject, texts),
        seed=config.run.seed,
        device=str(first.device),
        models={"base": config.base, "tuned": config.tuned} if config.tuned else {"base": config.base},
        resume=config.run.resume,
        overwrite=config.run.overwrite,
    ) as run:
        if run.already_complete:
            return open_artifact(config.run.out, stage=STAGE)
        del first
        summary = _work(run, config, subject, texts)
        return run.finish(summary=summary)


def _work(run: RunFolder, config: ExamplesConfig, subject: Subject, texts: Texts) -> str:
    clock = _Clock()
    origin = origin_notes(subject.dictionary, subject.source, subject.site)
    collected = clock.time("read", lambda: collect(subject, texts, config, run))
    tallies, words = collected.tallies, token_texts(subject.tokenizer)
    # A head may have rows, and a corpus tokens, that the tokenizer has no name for.
    words += [f"⟨{number}⟩" for number in range(len(words), len(tallies.vocabulary))]
    alive = np.flatnonzero(tallies.fires)
    columns: dict[str, Any] = {}
    if (cofiring := collected.cofiring) is not None:
        near = clock.time("neighbours", lambda: cofiring.neighbours(config.neighbours))
        columns |= neighbour_columns(alive, near)
    odds = EventCounts(tallies.fires, tallies.vocabulary, collected.lots)
    with run.writing(EXAMPLES) as temporary:
        clock.time("examples", lambda: write_examples(collected, config, temporary, odds))
    columns |= token_columns(alive, odds.best(), words)
    notes = _notes(collected, subject) + origin
    refused = can_read(subject) if config.lens else None
    if config.lens and refused is None:
        size = id_count(subject.tokenizer)
        table = clock.time("lens", lambda: lens_table(subject, torch.from_numpy(alive), size))
        columns |= lens_columns(table, words)
    notes += [refused] if refused else []
    run.write_table(LATENTS, latent_table(alive, tallies, texts.names, subject.dictionary, columns))
    _write_vocabulary(run, words)
    about = _about(config, subject, texts, collected, alive)
    about |= {"notes": notes, "seconds": clock.seconds}
    read = config.lens and refused is None
    about["lens"] = {"base": read, "tuned": read and "tuned" in subject.sides}
    run.write_json(ABOUT, about)
    for name, seconds in clock.seconds.items():
        run.timing(name, seconds)
    return about["summary"]


def _about(
    config: ExamplesConfig, subject: Subject, texts: Texts, collected: Collected, alive: NDArray[np.int64]
) -> dict[str, Any]:
    tallies, dictionary = collected.tallies, subject.dictionary
    tokens = int(tallies.tokens.sum())
    kind = dictionary.view if dictionary.view in SENTENCES else "sae" if config.tuned else "lone"
    path = Path(config.dictionary)
    about: dict[str, Any] = {
        "schema": SCHEMA,
        "summary": f"{len(alive):,} of {dictionary.n_latents:,} latents fire on {tokens:,} tokens of "
        f"{', '.join(texts.names)}.",
        "pair": {"base": config.base, "tuned": config.tuned},
        "site": subject.site,
        "dictionary": {
            "path": config.dictionary,
            "sha256": input_entry(path)["sha256"] if path.exists() else None,
            **dictionary.describe(),
        },
        "view": dictionary.view,
        "signals": SENTENCES[kind],
        "corpora": {
            name: {"documents": int(documents), "tokens": int(count)}
            for name, documents, count in zip(texts.names, tallies.documents, tallies.tokens, strict=True)
        },
        "tokens": tokens,
        "latents": dictionary.n_latents,
        "alive": len(alive),
        "seed": config.run.seed,
    }
    return about | {name: getattr(config, name) for name in ("tops", "bins", "per_bin", "before", "after")}


def _notes(collected: Collected, subject: Subject) -> list[str]:
    """What a reader of the examples should know."""
    notes = [] if isinstance(subject.source, LanguageModel) else list(subject.source.notes)
    if collected.copies:
        notes.append(
            f"{collected.copies:,} documents are token for token copies of another: their tokens count, but examples "
            "come from the first."
        )
    if subject.dictionary.input_norm:
        notes.append(f"Activations are in units of each token's {subject.dictionary.input_norm}.")
    if collected.cofiring is not None:
        notes.append(f"Neighbours were counted on {collected.cofiring.tokens:,} random tokens.")
    return notes


def _inputs(config: ExamplesConfig, subject: Subject, texts: Texts) -> dict[str, Any]:
    path = Path(config.dictionary)
    entries: dict[str, Any] = {
        "dictionary": input_entry(path) if path.exists() else {"path": config.dictionary, "sha256": None}
    }
    entries["base"] = {"path": config.base, "sha256": fingerprint(subject.model("base"))}
    if config.tuned is not None:
        entries["tuned"] = _tuned_entry(config.tuned, subject)
    return entries | {f"corpus/{corpus.name}": corpus.fingerprint() for corpus in texts.corpora}


def _tuned_entry(tuned: str, subject: Subject) -> dict[str, Any]:
    source = subject.source
    if isinstance(source, LanguageModel) or not source.one_at_a_time:
        return {"path": tuned, "sha256": fingerprint(subject.model("tuned"))}
    # The tuned model is loaded only when the base is done; its files say as much.
    return input_entry(tuned) if Path(tuned).is_dir() else {"path": tuned, "sha256": None}


def _write_vocabulary(run: RunFolder, words: list[str]) -> None:
    import pyarrow as pa

    columns = {"id": np.arange(len(words), dtype=np.int32), "text": words}
    run.write_table(VOCAB, pa.table(columns, vocab_schema()))
