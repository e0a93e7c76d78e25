"""The table of latents: one row each, everything that the diff knows of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from palimpsest.corpus import Role
from palimpsest.diff.classes import decoder_cosine, delta_norm, norms
from palimpsest.diff.methods import Method
from palimpsest.diff.scaling import TARGETS, Scaling
from palimpsest.diff.statistics import Statistics, masses

if TYPE_CHECKING:
    import pyarrow

NAMES = {
    "activation": "nu_activation",
    "centred": "nu_centred",
    "reconstruction": "nu_reconstruction",
    "error": "nu_error",
}
"""Column of each target's ratio; `…_lo` and `…_hi` are its interval."""


def latent_columns(
    method: Method, statistics: Statistics, scaling: Scaling, found: dict[str, NDArray], names: list[str]
) -> dict[str, NDArray]:
    """Columns by name, NaN where a dictionary of this kind has none.

    Args:
        method: The dictionary.
        statistics: Of the pass.
        scaling: The ratios.
        found: `class` and `verdict` of each latent, and further columns such as `stability`.
        names: Of the corpora.
    """
    arrays, tokens = statistics.arrays, max(statistics.tokens, 1)
    n_latents = method.dictionary.n_latents
    columns: dict[str, NDArray] = {"latent": np.arange(n_latents, dtype=np.int32)}
    columns |= {"class": found["class"], "verdict": found["verdict"], "dead": ~statistics.alive}
    columns |= _decoders(method)
    for target in TARGETS:
        name = NAMES[target]
        columns[name] = scaling.nu[target]
        columns[f"{name}_lo"], columns[f"{name}_hi"] = scaling.lo[target], scaling.hi[target]
        for place, side in enumerate(("base", "tuned")):
            columns[f"beta_{target}_{side}"] = scaling.beta[target][place]
    fires = statistics.fires
    columns |= {"fires": fires, "rate": fires / tokens, "groups": scaling.groups}
    columns["mean_activation"] = _per(arrays["joint/total"].sum(axis=0), fires)
    columns["max_activation"] = arrays["joint/largest"].max(axis=0)
    for side in ("base", "tuned"):
        seen = f"{side}/fires" in arrays
        nothing = np.full(n_latents, np.nan)
        columns[f"rate_{side}"] = arrays[f"{side}/fires"].sum(axis=0) / tokens if seen else nothing
        columns[f"mean_{side}"] = (
            _per(*(arrays[f"{side}/{k}"].sum(axis=0) for k in ("total", "fires"))) if seen else nothing
        )
        columns[f"max_{side}"] = arrays[f"{side}/largest"].max(axis=0) if seen else nothing
    for place, name in enumerate(names):
        fired = arrays["joint/fires"][place]
        columns[f"rate[{name}]"] = fired / max(int(arrays["tokens"][place]), 1)
        columns[f"mean[{name}]"] = _per(arrays["joint/total"][place], fired)
        columns[f"max[{name}]"] = arrays["joint/largest"][place]
    columns |= _shares(arrays)
    columns["activation_change"] = masses(method, statistics) / max(int(arrays["read"]), 1)
    columns["signed_change"] = arrays["change/signed"] / max(int(arrays["read"]), 1)
    columns |= {key: value for key, value in found.items() if key not in columns}
    return columns


def _decoders(method: Method) -> dict[str, NDArray]:
    norm = norms(method.dictionary)
    nothing = np.full(len(norm), np.nan)
    if method.kind == "crosscoder":
        cosine = decoder_cosine(method.dictionary)
        return {
            "norm_base": norm[:, 0],
            "norm_tuned": norm[:, 1],
            "delta_norm": delta_norm(norm),
            "decoder_cosine": cosine,
        }
    one = {"norm_base": nothing, "norm_tuned": nothing, "delta_norm": nothing, "decoder_cosine": nothing}
    side = "norm_base" if method.kind == "base-sae" else "norm_tuned"
    return one | {side: norm[:, 0]}


def _shares(arrays: dict[str, NDArray]) -> dict[str, NDArray]:
    """The part of each latent's activation on tokens of each role; NaN where the text has no such token."""
    sums, seen = arrays["kind/sums"], arrays["kind/tokens"] > 0
    total = sums.sum(axis=0)
    shares = {}
    for role in (Role.TEMPLATE, Role.SYSTEM, Role.USER, Role.ASSISTANT, Role.TOOL):
        share = _per(sums[role], total) if seen[role] else np.full(len(total), np.nan)
        shares[f"{role.name.lower()}_share"] = share
    return shares


def _per(above: NDArray, below: NDArray) -> NDArray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(below > 0, above / below, np.nan)


def to_table(columns: dict[str, NDArray]) -> pyarrow.Table:
    """The columns as a table; what is not defined is null."""
    import pyarrow

    def column(values: NDArray) -> Any:
        if values.dtype.kind == "U":
            return pyarrow.array(values.tolist()).dictionary_encode()
        return pyarrow.array(values, from_pandas=True)

    return pyarrow.table({name: column(values) for name, values in columns.items()})
