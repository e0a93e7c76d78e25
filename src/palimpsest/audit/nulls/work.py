"""One null after the other: trained, measured over the battery, kept as figures; the body of every worker."""

import hashlib
import json
import os
import signal
import time
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor

from palimpsest.artifacts import disk, input_entry
from palimpsest.audit.battery.folder import Battery
from palimpsest.audit.battery.make import CACHE
from palimpsest.audit.battery.text import load_documents, packed_blocks, text_key
from palimpsest.audit.measure import Size, measure_corpus
from palimpsest.audit.nulls.config import CalibrateConfig
from palimpsest.audit.nulls.recipes import NullRecipe
from palimpsest.audit.nulls.store import Figures, figures_of
from palimpsest.audit.nulls.training import trained_null
from palimpsest.audit.sums import CorpusSums, Measure
from palimpsest.corpus import Corpus, Document
from palimpsest.errors import ArtifactError, CorpusError, NumericsError
from palimpsest.harvest import Harvester
from palimpsest.harvest.cached import CachedHarvester
from palimpsest.log import log, quiet
from palimpsest.models import LanguageModel, ModelPair, load_model
from palimpsest.options import ModelOptions, config_dict

RECIPE = 1
"""Version of how a null of a given recipe is trained and measured; raise it when that changes."""

TEXT_BLOCKS = 2048
"""Blocks of a null corpus that are read at most: more than any short fine-tune sees."""


class Workshop:
    """A loaded base with everything that training and measuring a null takes.

    Args:
        config: How nulls are made.
        base: The base model; read it from the battery when absent.
    """

    def __init__(self, config: CalibrateConfig, base: LanguageModel | None = None) -> None:
        self.config = config
        self.battery = Battery(config.path)
        self.options = _model_options(config, self.battery)
        self.model = base or load_model(self.battery.base["path"], self.options)
        dictionaries = [one.to(self.model.device) for one in self.battery.dictionaries()]
        self.measures = [
            Measure(r.name, d, r.site, k_max=min(config.k_max, d.n_latents), latents=False)
            for r, d in zip(self.battery.readers, dictionaries, strict=True)
        ]
        self._blocks: dict[str, Tensor] = {}
        self._base: LanguageModel | None = None
        self._audited: set[bytes] | None = None

    def check(self) -> None:
        """Refuse a base, tokenizer or library that gives other numbers than the battery holds."""
        self.battery.check_base(self.model, [measure.dictionary for measure in self.measures])

    def families(self) -> list[str]:
        """Texts to train on: those named by the user, else every corpus with a set-aside share."""
        named = [name for name, _ in self.config.texts]
        if named:
            return named
        found = [row["name"] for row in self.battery.description["corpora"] if row["aside_documents"]]
        if not found:
            raise CorpusError(
                f"The battery {self.battery.path} has no text to train nulls on",
                expected="a set-aside share, or --null-corpus NAME=FILE",
                found="--set-aside 0",
            )
        return found

    def blocks(self, family: str) -> Int[Tensor, "blocks seq"]:
        """The family's text in blocks of training length.

        Raises:
            CorpusError: It does not fill two steps.
        """
        if family not in self._blocks:
            length = min(self.config.block_length, self.model.context or self.config.block_length)
            eos = self.model.tokenizer.eos_token_id
            source = dict(self.config.texts).get(family)
            documents = self.battery.aside(family) if source is None else self._read(source, family, length)
            blocks = packed_blocks(documents, length, eos)
            if len(blocks) < 2:
                raise CorpusError(
                    f"Too little text to train nulls on {family}",
                    expected=f"at least {2 * length} tokens",
                    found=f"{sum(map(len, documents))} tokens in {len(documents)} documents",
                    fix="Pass more text with --null-corpus, or make the battery with a larger --set-aside",
                )
            self._blocks[family] = blocks
        return self._blocks[family]

    def _read(self, source: str, family: str, length: int) -> list[Document]:
        """Documents of a null corpus cut at `length`, read as the battery reads its own; audited ones are left out."""
        if self._audited is None:
            texts = (load_documents(self.battery.text(name).path) for name in self.battery.names)
            self._audited = {text_key(document) for text in texts for document in text}
        corpus = Corpus(source, self.model.tokenizer, name=family, options=self.battery.text_options)
        documents, tokens, dropped = [], 0, 0
        for document in corpus.documents():
            if text_key(document) in self._audited:
                dropped += 1
                continue
            cut = (document.token_ids[:length], document.roles[:length], document.special[:length])
            documents.append(Document(document.index, *cut))
            tokens += len(documents[-1])
            if tokens >= TEXT_BLOCKS * length:
                break
        if dropped:
            log.warning("%d documents of the null corpus %s are audited ones: left out.", dropped, family)
        return documents

    def make(self, recipe: NullRecipe) -> tuple[dict[str, Any], Figures]:
        """Train one null, measure it and give the base back untouched."""
        started = time.monotonic()
        with trained_null(
            self.model, self.blocks(recipe.family), recipe, batch_size=self.config.batch_size
        ) as outcome:
            trained = time.monotonic()
            diverged, figures = outcome.diverged, {}
            if diverged is None:
                try:
                    figures = figures_of(self.measure())
                except NumericsError as error:
                    diverged = str(error)
            record = recipe.key | {
                "name": recipe.name,
                "applied_lr": outcome.lr,
                "tokens": outcome.tokens,
                "loss_first": _finite(outcome.loss_first),
                "loss_last": _finite(outcome.loss_last),
                "diverged": diverged,
                "seconds_training": trained - started,
                "seconds_measuring": time.monotonic() - trained,
            }
        return record, figures

    def measure(self, model: LanguageModel | None = None) -> dict[str, dict[str, CorpusSums]]:
        """Read the whole battery with the model as it is now."""
        battery, config = self.battery, self.config
        model = model or self.model
        if config.kl:
            harvester = self._paired(model)
        else:
            harvester = CachedHarvester(model, battery.sites, battery.base_side, loss=battery.has_loss)
        found = {}
        for name in battery.names:
            row = battery.row(name)
            size = Size(row["documents"], row["tokens"], row["bad_rows"])
            found[name] = measure_corpus(
                harvester, battery.text(name), size, self.measures, config.models.tokens_per_batch
            )
        return found

    def _paired(self, model: LanguageModel) -> Harvester:
        """KL compares two predictions, so an untouched base stands beside the null."""
        if self._base is None:
            self._base = load_model(self.battery.base["path"], self.options)
        base = self._base
        pair = ModelPair({"base": lambda: base, "tuned": lambda: model}, base.tokenizer, kind="full")
        return Harvester(pair, self.battery.sites, loss=True, kl=True)


def cache_file(battery: Path, config: CalibrateConfig, recipe: NullRecipe, text: str) -> Path:
    """Where the figures of one null lie; its name changes with everything that they depend on."""
    keep = config_dict(config)
    shared = {key: keep[key] for key in ("batch_size", "block_length", "k_max", "kl") if key in keep}
    versions = {name: version(name) for name in ("torch", "transformers", "peft")}
    models = keep["models"] if config.models != ModelOptions() else {}
    content = [RECIPE, recipe.key, shared, models, text, input_entry(battery)["sha256"], versions]
    key = json.dumps(content, sort_keys=True)
    return battery / CACHE / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.safetensors"


def save_null(path: Path, record: dict[str, Any], figures: Figures) -> None:
    """Write one null's record and figures, whole or not at all."""
    with disk.replacing(path) as temporary:
        arrays = {key: np.ascontiguousarray(array) for key, array in figures.items()}
        record_bytes = np.frombuffer(json.dumps(record).encode(), np.uint8)
        save_file(arrays | {"record": record_bytes}, temporary)


def load_null(path: Path) -> tuple[dict[str, Any], Figures]:
    """What `save_null` wrote."""
    try:
        arrays = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ArtifactError(
            f"{path} cannot be read", found=str(error), fix="Delete it and run the command again"
        ) from error
    return json.loads(arrays.pop("record").tobytes().decode()), arrays


def _model_options(config: CalibrateConfig, battery: Battery) -> ModelOptions:
    """How the base is loaded: as the battery's was, where the user does not say otherwise.

    Running a checkpoint's code is never taken over: that is asked for each time.
    """
    if config.models != ModelOptions():
        return config.models
    made = battery.artifact.manifest["config"]["models"]
    known = {field.name for field in fields(ModelOptions)} - {"trust_remote_code"}
    return ModelOptions(**{key: value for key, value in made.items() if key in known})


_workshop: list[Workshop] = []


def start_worker(config: CalibrateConfig, threads: int) -> None:
    """Prepare a worker process: its share of the cores, no bars, no say in interruptions."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(threads)
    quiet()
    _workshop.append(Workshop(config))


def work(recipe: NullRecipe, path: Path) -> str:
    """Make one null in a worker."""
    record, figures = _workshop[0].make(recipe)
    save_null(path, record, figures)
    return recipe.name


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
