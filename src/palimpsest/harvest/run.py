"""The harvest as a stage: a config in, an activation store out."""

from collections.abc import Iterable, Iterator

from jaxtyping import Float
from torch import Tensor

from palimpsest.artifacts import Artifact, RunFolder, check_claim, open_artifact
from palimpsest.corpus import Corpus, TokenBatch
from palimpsest.errors import ConfigError
from palimpsest.harvest.config import HarvestConfig
from palimpsest.harvest.stream import Harvester, kept_places, read_side
from palimpsest.log import progress
from palimpsest.models import LanguageModel, ModelPair, fingerprint, load_model, load_pair
from palimpsest.options import config_dict
from palimpsest.store import StoreWriter

Acts = dict[str, Float[Tensor, "tokens models d_model"]]


def run_harvest(config: HarvestConfig) -> Artifact:
    """Write the activations of a model, or of both models side by side, to a store.

    Returns:
        The finished store folder; read it with `palimpsest.store.ActivationStore`.

    Raises:
        PalimpsestError: Bad input. An interrupted harvest continues with `resume` after its last whole document.
    """
    if not config.site:
        raise ConfigError("A harvest needs a site", expected="--site resid_post.13")
    check_claim(config.run.out, resume=config.run.resume, overwrite=config.run.overwrite)
    source = (
        load_model(config.base, config.models)
        if config.tuned is None
        else load_pair(config.base, config.tuned, config.models)
    )
    if isinstance(source, ModelPair) and source.one_at_a_time:
        raise ConfigError("A store holds both models side by side", fix="Leave --one-at-a-time out")
    model = source.base if isinstance(source, ModelPair) else source
    sites = [model.sites.canonical(site) for site in config.site]
    for site in sites:
        model.sites.tap(site)
    corpus = Corpus(list(config.corpus), model.tokenizer, options=config.corpora)
    inputs = {"corpus": corpus.fingerprint(), "base": {"path": config.base, "sha256": fingerprint(model)}}
    if isinstance(source, ModelPair):
        inputs["tuned"] = {"path": config.tuned, "sha256": fingerprint(source.tuned)}
    with RunFolder(
        config.run.out,
        stage="store",
        config=config_dict(config),
        inputs=inputs,
        seed=config.run.seed,
        device=str(model.device),
        resume=config.run.resume,
        overwrite=config.run.overwrite,
    ) as run:
        if run.already_complete:
            return open_artifact(config.run.out, stage="store")
        writer = StoreWriter(
            run,
            sites=sites,
            models=("base", "tuned") if isinstance(source, ModelPair) else ("base",),
            d_model=_width(model, sites),
            dtype=config.store_dtype,
        )
        _write(writer, source, corpus, sites, config.models.tokens_per_batch)
        writer.finish()
    return open_artifact(config.run.out, stage="store")


def _write(
    writer: StoreWriter,
    source: ModelPair | LanguageModel,
    corpus: Corpus,
    sites: list[str],
    tokens_per_batch: int,
) -> None:
    model = source.base if isinstance(source, ModelPair) else source
    with progress(f"harvesting {corpus.name}") as advance:
        for batch, acts in _acts(source, _missing(corpus.batches(tokens_per_batch), writer), sites):
            kept, _ = kept_places(batch)
            writer.add_probe(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                keep=batch.keep,
                document=batch.document,
                compute=model.dtype,
            )
            writer.append(
                acts,
                token_ids=batch.input_ids.reshape(-1)[kept],
                document=batch.document.reshape(-1)[kept],
                position=kept % batch.input_ids.shape[1],
            )
            advance(len(kept))


def _width(model: LanguageModel, sites: list[str]) -> int:
    """The width that all sites have; `mlp_act`, for one, is wider than the residual stream."""
    widths = {site: model.width(site) for site in sites}
    if len(set(widths.values())) > 1:
        raise ConfigError(
            "A store holds sites of one width",
            found=", ".join(f"{site}: {width}" for site, width in widths.items()),
            fix="Harvest them into two stores",
        )
    return widths[sites[0]]


def _missing(batches: Iterable[TokenBatch], writer: StoreWriter) -> Iterator[TokenBatch]:
    """The batches that an interrupted run had not stored, without those that hold nothing to keep."""
    for batch in batches:
        kept, _ = kept_places(batch)
        if len(kept) and not writer.holds(batch.document.reshape(-1)[kept]):
            yield batch


def _acts(
    source: ModelPair | LanguageModel, batches: Iterable[TokenBatch], sites: list[str]
) -> Iterator[tuple[TokenBatch, Acts]]:
    if isinstance(source, LanguageModel):
        for batch in batches:
            yield batch, {site: acts[:, None] for site, acts in read_side(source, batch, sites).items()}
        return
    for paired in Harvester(source, sites, loss=False).stream("store", batches):
        yield paired.context, paired.acts
