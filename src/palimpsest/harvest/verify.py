"""The live check: whether a store's activations are those of a model, on a few documents that the store keeps whole."""

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import torch
from jaxtyping import Float, Int
from torch import Tensor

from palimpsest.errors import ArtifactError
from palimpsest.log import log
from palimpsest.models import LanguageModel, ModelPair, fingerprint
from palimpsest.store import ActivationStore, Probe

FULL_ERROR = 2e-3
"""Error allowed where the store and the live model both compute in float32, measured in the store's type."""

HALF_ERROR = 5e-2
"""Error allowed where one of them computes in 16 bits, whose rounding depends on the shape of a batch."""


def check_store(
    store: ActivationStore, source: LanguageModel | ModelPair, *, side: str = "base"
) -> float | None:
    """Run a store's probe through the live model, or models, and compare with what the store holds.

    Of every site and document the root mean square over tokens of ‖stored − live‖ / max(‖live‖, median ‖live‖) is
    taken, after rounding the live activations to the store's type. A `LanguageModel` is held against a store's base.

    Args:
        store: The store.
        source: The model, or the pair, that the store is believed to come from.
        side: Which model of the store a single model is: base or tuned.

    Returns:
        The largest error found, or None (with a warning in the log) for a store without a probe.

    Raises:
        ArtifactError: The activations differ; names the model, the site, the document and what is likely the reason.
    """
    probe = store.probe()
    if probe is None:
        log.warning(
            "%s was written before stores kept documents for a live check: it is used unchecked. "
            "Harvest it again to have it checked",
            store.path,
        )
        return None
    if isinstance(source, ModelPair) and len(store.models) == 2:
        sides = [(place, source.side(side)) for place, side in enumerate(("base", "tuned"))]
    else:
        one = source.base if isinstance(source, ModelPair) else source
        sides = [(0 if isinstance(source, ModelPair) else store.models.index(side), one)]
    places = _stored_places(store, probe)
    worst = 0.0
    for place, model in sides:
        name = store.models[place]
        live = _live(store, probe, model, name)
        for site in store.sites:
            stored = _stored(store, site, places)[:, place]
            worst = max(worst, *_compared(store, probe, model, name, site, stored, live[site]))
        _check_weights(store, model, name)
    return worst


def _compared(
    store: ActivationStore,
    probe: Probe,
    model: LanguageModel,
    name: str,
    site: str,
    stored: Float[Tensor, "tokens d_model"],
    live: Float[Tensor, "tokens d_model"],
) -> Iterator[float]:
    """The error of each document; refuses one that is too large."""
    half = probe.compute != "float32" or model.dtype.itemsize < 4
    allowed = HALF_ERROR if half else FULL_ERROR
    for document, row in _documents(probe):
        ours, theirs = stored[row].float(), live[row].to(store.dtype).float()
        norm = theirs.norm(dim=-1)
        relative = (ours - theirs).norm(dim=-1) / norm.maximum(norm.median()).clamp_min(1e-12)
        error = float(relative.square().mean().sqrt())
        # Written so that NaN is refused.
        if not error <= allowed:
            raise ArtifactError(
                f"{store.path} does not hold the activations of {model.name} as its {name} model",
                expected=f"a relative error of at most {allowed:g} at {site}",
                found=f"{error:.2g} in document {document}; {_reason(store, model, name)}",
                fix="Give the model that the store was harvested from, or harvest it again",
            )
        yield error


def _documents(probe: Probe) -> Iterator[tuple[int, Tensor]]:
    """Each document with its places among the kept tokens of the probe."""
    document = probe.document[probe.keep]
    for one in document.unique().tolist():
        yield one, (document == one).nonzero().squeeze(1)


@torch.inference_mode()
def _live(
    store: ActivationStore, probe: Probe, model: LanguageModel, name: str
) -> dict[str, Float[Tensor, "tokens d_model"]]:
    entries, largest = model.model.get_input_embeddings().weight.shape[0], int(probe.input_ids.max())
    if largest >= entries:
        raise ArtifactError(
            f"{store.path} holds tokens that the {name} model {model.name} does not have",
            expected=f"tokens below {entries}",
            found=f"token {largest}",
            fix="Give the model that the store was harvested from",
        )
    for site in store.sites:
        model.sites.tap(site)
    found: dict[str, list[Tensor]] = {site: [] for site in store.sites}
    # One document at a time: another batch shape than the harvest's, and no padding that could matter.
    for ids, mask, keep in zip(probe.input_ids, probe.attention_mask, probe.keep, strict=True):
        length = int(mask.sum())
        acts = model.read(ids[None, :length].long(), store.sites).acts
        for site in store.sites:
            if (width := acts[site].shape[-1]) != store.d_model:
                raise ArtifactError(
                    f"{store.path} holds activations of another width than the {name} model's at {site}",
                    expected=f"{width}, of {model.name}",
                    found=store.d_model,
                    fix="Give the model that the store was harvested from",
                )
            found[site].append(acts[site][0].cpu()[keep[:length]])
    return {site: torch.cat(rows) for site, rows in found.items()}


def _stored_places(store: ActivationStore, probe: Probe) -> list[tuple[int, Int[Tensor, " tokens"]]]:
    """Where the store holds the probe's kept tokens, in their order: shards, and the rows of each."""
    position = torch.arange(probe.keep.shape[1]).expand_as(probe.keep)[probe.keep]
    wanted = list(zip(probe.document[probe.keep].tolist(), position.tolist(), strict=True))
    tokens = probe.input_ids[probe.keep].int()
    found: list[tuple[int, Tensor]] = []
    done = 0
    # The writer put all of them into the first shard; a store that was copied together may differ.
    for shard in range(len(store.shards)):
        labels = store.labels(shard)
        row_of = {
            key: row
            for row, key in enumerate(
                zip(labels["document"].tolist(), labels["position"].tolist(), strict=True)
            )
        }
        rows = [row_of[key] for key in wanted[done:] if key in row_of]
        if rows and torch.equal(labels["token_ids"][rows], tokens[done : done + len(rows)]):
            found.append((shard, torch.tensor(rows)))
            done += len(rows)
        if done == len(wanted):
            return found
    raise ArtifactError(
        f"{store.path} does not hold the tokens that it was to be checked on",
        expected=f"the {len(wanted)} tokens of its probe",
        found=f"{done} of them",
        fix="The store is damaged: harvest it again",
    )


def _stored(
    store: ActivationStore, site: str, places: list[tuple[int, Int[Tensor, " tokens"]]]
) -> Float[Tensor, "tokens models d_model"]:
    parts = []
    for shard, rows in places:
        first, last = int(rows.min()), int(rows.max())
        with store.open_shard(shard) as file:
            parts.append(file.rows(f"acts.{site}", first, last + 1)[rows - first])
    return torch.cat(parts)


def _check_weights(store: ActivationStore, model: LanguageModel, name: str) -> None:
    """Say when activations agree though the weights do not, as below the first layer that a fine-tune changed."""
    recorded = store.manifest["inputs"].get(name, {}).get("sha256")
    if recorded not in (None, fingerprint(model)):
        log.warning(
            "%s agrees with the activations of %s at %s, but was harvested from other weights, or from the same "
            "in another type",
            store.path,
            model.name,
            ", ".join(store.sites),
        )


def _reason(store: ActivationStore, model: LanguageModel, name: str) -> str:
    """What differs between the harvest and now, the likeliest first."""
    manifest = store.manifest
    origin = manifest["inputs"].get(name, {})
    revision = manifest["config"].get("models", {}).get("revision" if name == "base" else "tuned_revision")
    if origin.get("sha256") not in (None, fingerprint(model)):
        described = f"{origin.get('path')}" + (f" at revision {revision}" if revision else "")
        return f"the store was harvested from other weights, those of {described}"
    then, now = manifest["packages"].get("transformers"), _installed("transformers")
    if then != now:
        return f"the weights are the same; the store was harvested with transformers {then}, this is {now}"
    return "the weights and the transformers version are the same: its rows were changed, or the model was"


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
