"""Dictionary training as a stage: a config in, a dictionary folder out."""

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from palimpsest.artifacts import RunFolder, check_claim, input_entry, open_artifact
from palimpsest.corpus import Corpus, TokenBatch
from palimpsest.dictionaries import Dictionary, checkpoint_position, load_dictionary, train_dictionary
from palimpsest.errors import ConfigError
from palimpsest.harvest.stream import activations, kept_places
from palimpsest.log import progress
from palimpsest.models import fingerprint, load_model
from palimpsest.options import config_dict
from palimpsest.store import ActivationStore
from palimpsest.train.config import TrainSaeConfig

LOG = "training.jsonl"
"""The figures of every reported step, one per line."""

Stream = Iterator[Float[Tensor, "tokens models d_model"]]


class _Source(NamedTuple):
    """Where activations come from: `stream(position)` starts after that many tokens."""

    stream: Callable[[int], Stream]
    inputs: dict[str, Any]
    metadata: dict[str, Any]
    device: str


def train_sae(config: TrainSaeConfig) -> Dictionary:
    """Train a sparse autoencoder and save it, with its origin and its metrics, to `config.run.out`.

    Raises:
        PalimpsestError: Bad input, or NaN in the activations. An interrupted run continues with `resume`
            from its last checkpoint and gives the same weights as an uninterrupted one.
    """
    check_claim(config.run.out, resume=config.run.resume, overwrite=config.run.overwrite)
    source = _from_store(config) if config.store is not None else _from_model(config)
    recipe = replace(config.recipe, seed=config.run.seed, device=source.device)
    with RunFolder(
        config.run.out,
        stage="dictionary",
        config=config_dict(replace(config, recipe=recipe)),
        inputs=source.inputs,
        seed=config.run.seed,
        device=source.device,
        resume=config.run.resume,
        overwrite=config.run.overwrite,
    ) as run:
        if run.already_complete:
            return load_dictionary(config.run.out)
        start = checkpoint_position(config.run.out)
        _cut_log(run, start)
        with (
            progress(f"training on {config.site}", recipe.tokens) as advance,
            run.file(LOG).open("a", encoding="utf-8") as lines,
        ):
            advance(start)
            seen = start

            def on_step(figures: Mapping[str, Any]) -> None:
                nonlocal seen
                advance(figures["tokens"] - seen)
                seen = figures["tokens"]
                lines.write(json.dumps(dict(figures)) + "\n")
                lines.flush()

            stream = source.stream(start)
            try:
                return train_dictionary(stream, recipe, out=run, on_step=on_step, metadata=source.metadata)
            finally:
                stream.close()  # pyright: ignore[reportAttributeAccessIssue]


def _cut_log(run: RunFolder, start: int) -> None:
    """Leave out the steps behind the checkpoint, which are taken again, and a line that was cut short."""
    path = run.file(LOG)
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["tokens"] <= start]
    run.write_bytes(LOG, "".join(kept).encode())


def _from_model(config: TrainSaeConfig) -> _Source:
    assert config.model is not None
    model = load_model(config.model, config.models)
    site = model.sites.canonical(config.site)
    model.sites.tap(site)
    limit = model.context
    if limit is not None and config.block_length > limit:
        raise ConfigError(
            "The blocks are longer than the model's context",
            expected=f"at most {limit} tokens",
            found=config.block_length,
        )
    corpus = Corpus(list(config.corpus), model.tokenizer, options=config.corpora)
    # Said now, before a folder is made: a corpus without a document, or whose first row is bad.
    next(corpus.documents())
    batch_size = max(1, config.models.tokens_per_batch // config.block_length)

    def stream(position: int) -> Stream:
        blocks = corpus.blocks(config.block_length, batch_size=batch_size, epochs=None)
        batches, drop = _after(blocks, position)
        for acts in activations(model, batches, site):
            yield acts[drop:]
            drop = 0

    metadata = {
        "model": config.model,
        "revision": config.models.revision,
        "site": site,
        "corpus": list(config.corpus),
    }
    inputs = {"corpus": corpus.fingerprint(), "model": {"path": config.model, "sha256": fingerprint(model)}}
    return _Source(stream, inputs, metadata, str(model.device))


def _after(blocks: Iterable[TokenBatch], position: int) -> tuple[Iterator[TokenBatch], int]:
    """Skip `position` measured tokens; returns the batches that follow and how many tokens of their first to drop."""
    blocks = iter(blocks)
    while position > 0:
        batch = next(blocks)
        tokens = len(kept_places(batch)[0])
        if tokens > position:
            return itertools.chain([batch], blocks), position
        position -= tokens
    return blocks, 0


def _from_store(config: TrainSaeConfig) -> _Source:
    assert config.store is not None
    store = ActivationStore(config.store)
    if config.site not in store.sites:
        raise ConfigError(
            f"{config.store} does not hold {config.site}", expected=", ".join(store.sites), found=config.site
        )
    if len(store.models) != 1:
        raise ConfigError(
            f"{config.store} holds two models side by side",
            expected="a store of one model",
            fix="Harvest the base alone, without --tuned",
        )

    def stream(position: int) -> Stream:
        for epoch in itertools.count():
            for batch in store.batches(config.recipe.batch_size, config.site, seed=config.run.seed + epoch):
                acts = batch.acts.float()
                if position >= len(acts):
                    position -= len(acts)
                    continue
                yield acts[position:]
                position = 0

    manifest = open_artifact(config.store, stage="store", verify=False).manifest
    metadata = {
        "model": manifest["config"].get("base"),
        "site": config.site,
        "corpus": manifest["config"].get("corpus"),
    }
    device = config.models.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return _Source(stream, {"store": input_entry(config.store)}, metadata, device)
