"""`latents.parquet`: everything that was found, one row for each latent that fires."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from palimpsest.corpus import Role
from palimpsest.dictionaries import Dictionary
from palimpsest.interpret.examples.listing import Listing
from palimpsest.interpret.examples.tallies import LOWEST, SignalTally, Tallies
from palimpsest.interpret.lens import LensTable
from palimpsest.latents.schema import ROLES, SIGNALS, latent_schema


def latent_table(
    alive: NDArray[np.int64],
    tallies: Tallies,
    corpora: Sequence[str],
    dictionary: Dictionary,
    columns: dict[str, Any],
) -> pa.Table:
    """The table of the latents that fire.

    Args:
        alive: Their numbers.
        tallies: What was counted.
        corpora: Names of the corpora.
        dictionary: For the lengths of its decoder rows.
        columns: Neighbours, tokens and lens columns, as the functions of this module make them.
    """
    total = max(int(tallies.tokens.sum()), 1)
    found: dict[str, Any] = {"latent": alive.astype(np.int32), "fires": tallies.fires[alive]}
    found["rate"] = tallies.fires[alive] / total
    for name in SIGNALS:
        found |= _moments(name, tallies.tally(name), alive, total)
    value = tallies.signals["value"]
    for place, name in enumerate(corpora):
        found[f"rate[{name}]"] = value.fires[place, alive] / max(int(tallies.tokens[place]), 1)
    for name in ROLES:
        role = Role[name.upper()]
        there = tallies.role_tokens[role] > 0
        share = tallies.role_fires[alive, role] / tallies.fires[alive]
        found[f"share[{name}]"] = share if there else None
    found |= _geometry(dictionary, alive) | _histograms(tallies, alive) | columns
    schema, rows = latent_schema(corpora), len(alive)
    arrays = []
    for field in schema:
        column = found.get(field.name)
        if column is None:
            arrays.append(pa.nulls(rows, field.type))
        elif isinstance(column, pa.Array):
            arrays.append(column.cast(field.type))
        else:
            arrays.append(pa.array(column, field.type, from_pandas=True))
    return pa.Table.from_arrays(arrays, schema=schema)


def neighbour_columns(alive: NDArray[np.int64], found: Listing) -> dict[str, Any]:
    """Columns of the neighbours."""
    lengths = found.lengths(alive)
    return {"neighbours": ragged(lengths, found.item), "neighbour_scores": ragged(lengths, found.score)}


def token_columns(alive: NDArray[np.int64], found: Listing, texts: Sequence[str]) -> dict[str, Any]:
    """Columns of the tokens that a latent prefers."""
    lengths = found.lengths(alive)
    return {"tokens": named(lengths, found.item, texts), "tokens_z": ragged(lengths, found.score)}


def lens_columns(table: LensTable | None, texts: Sequence[str]) -> dict[str, Any]:
    """Columns of the logit lens; none where nothing was read."""
    found: dict[str, Any] = {}
    if table is None:
        return found
    ends = {f"promoted_{side}": pair for side, pair in table.promoted.items()}
    ends |= {f"suppressed_{side}": pair for side, pair in table.suppressed.items()}
    if table.changed is not None:
        ends["changed"] = table.changed
    for name, pair in ends.items():
        ids, logits = (one.numpy() for one in pair)
        lengths = np.full(len(ids), ids.shape[1])
        found[name] = named(lengths, ids.reshape(-1), texts)
        found[f"{name}_logits"] = ragged(lengths, logits.reshape(-1))
    return found


def ragged(lengths: NDArray[np.integer], values: NDArray) -> pa.ListArray:
    """Rows of different lengths as one column."""
    offsets = np.concatenate([[0], lengths.cumsum()]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


def named(lengths: NDArray[np.integer], ids: NDArray[np.integer], texts: Sequence[str]) -> pa.ListArray:
    """Token ids as their texts."""
    words = pa.array(texts, pa.string()).take(pa.array(ids.astype(np.int32)))
    return pa.ListArray.from_arrays(ragged(lengths, ids).offsets, words)


def _moments(name: str, tally: SignalTally | None, alive: NDArray[np.int64], total: int) -> dict[str, Any]:
    """Mean and largest activation, and for a model's own signal how often it fires."""
    if tally is None:
        return {}
    fires = tally.fires.sum(0)[alive]
    mean = np.divide(tally.total[alive], fires, out=np.full(len(alive), np.nan), where=fires > 0)
    own = {f"mean_{name}": mean, f"max_{name}": tally.largest[alive]}
    return own if name == "value" else own | {f"rate_{name}": fires / total}


def _geometry(dictionary: Dictionary, alive: NDArray[np.int64]) -> dict[str, Any]:
    """Lengths of the decoder rows, and the cosine of a crosscoder's two."""
    norms = dictionary.decoder_norms().detach().float().cpu().numpy()[alive]
    if dictionary.models == 1:
        return {"norm_base": norms[:, 0], "norm_tuned": norms[:, 0]}
    rows = dictionary.W_dec.detach()
    cosine = (
        torch.nn.functional.cosine_similarity(rows[:, 0].float(), rows[:, 1].float(), dim=1)
        .cpu()
        .numpy()[alive]
    )
    # A row of length 0 points nowhere.
    cosine = np.where((norms > 0).all(1), cosine, np.nan)
    return {"norm_base": norms[:, 0], "norm_tuned": norms[:, 1], "decoder_cosine": cosine}


def _histograms(tallies: Tallies, alive: NDArray[np.int64]) -> dict[str, Any]:
    """Firings per half octave of every signal, all from one first to one last bin."""
    known = {name: tally.histogram[alive] for name in SIGNALS if (tally := tallies.tally(name)) is not None}
    if not len(alive):
        return {}
    there = np.logical_or.reduce([one > 0 for one in known.values()])
    first, last = there.argmax(1), there.shape[1] - there[:, ::-1].argmax(1)
    found: dict[str, Any] = {"histogram_start": (first + LOWEST).astype(np.int16)}
    place = np.arange(there.shape[1])
    inside = (place >= first[:, None]) & (place < last[:, None])
    for name, counts in known.items():
        found[f"histogram_{name}"] = ragged(last - first, counts[inside].astype(np.int64))
    return found
