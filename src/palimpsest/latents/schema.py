"""The tables of an examples folder: their columns, in one place for who writes and who reads them. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow

STAGE = "examples"
ABOUT = "examples.json"
LATENTS = "latents.parquet"
EXAMPLES = "examples.parquet"
VOCAB = "vocab.parquet"

LABELS_STAGE = "labels"
LABELS_ABOUT = "labels.json"
LABELS = "labels.parquet"

SIGNALS = ("value", "base", "tuned")
"""What an example shows of a latent: what it was chosen by, and each model's own activation where there is one."""

ROLES = ("template", "system", "user", "assistant", "tool")

ROW_GROUP = 4096
"""Rows of `examples.parquet` that are read together: a latent's examples lie in one or two groups."""


def latent_schema(corpora: Sequence[str]) -> pyarrow.Schema:
    """Columns of `latents.parquet`: one row per alive latent, in the order of their numbers.

    Counts and rates are over the measured tokens. Columns of a signal or a model that does not exist are null.

    - `fires`, `rate`, `mean_value`, `max_value`: of the signal that chooses examples; `mean` over the firings.
    - `rate_base` … `max_tuned`: of each model's own activation.
    - `rate[NAME]`: share of the tokens of each corpus on which it fires; `share[ROLE]`: share of its firings there.
    - `histogram_value`, `histogram_base`, `histogram_tuned`: firings per half octave of the activation; the first
      bin begins at `2 ** (histogram_start / 2)`.
    - `neighbours`, `neighbour_scores`: latents that fire on the same tokens, by the cosine of their firings.
    - `promoted_base` … `suppressed_tuned` with `…_logits`: logit lens of the decoder row through each model's head;
      `changed` with `changed_logits`: tokens whose logit differs most, tuned - base.
    - `tokens` with `tokens_z`: tokens on which it fires beyond their frequency, by z of the log-odds.
    - `norm_base`, `norm_tuned`, `decoder_cosine`: of the decoder rows of a crosscoder; one norm otherwise.
    """
    import pyarrow as pa

    number, many, texts = pa.float32(), pa.list_(pa.float32()), pa.list_(pa.string())
    fields = [("latent", pa.int32()), ("fires", pa.int64()), ("rate", number)]
    fields += [("mean_value", number), ("max_value", number)]
    for side in ("base", "tuned"):
        fields += [(f"{kind}_{side}", number) for kind in ("rate", "mean", "max")]
    fields += [(f"rate[{name}]", number) for name in corpora]
    fields += [(f"share[{role}]", number) for role in ROLES]
    fields += [(name, number) for name in ("norm_base", "norm_tuned", "decoder_cosine")]
    fields += [("histogram_start", pa.int16())]
    fields += [(f"histogram_{signal}", pa.list_(pa.int64())) for signal in SIGNALS]
    fields += [("neighbours", pa.list_(pa.int32())), ("neighbour_scores", many)]
    for side in ("base", "tuned"):
        for kind in ("promoted", "suppressed"):
            fields += [(f"{kind}_{side}", texts), (f"{kind}_{side}_logits", many)]
    fields += [("changed", texts), ("changed_logits", many), ("tokens", texts), ("tokens_z", many)]
    return pa.schema(fields)


def example_schema() -> pyarrow.Schema:
    """Columns of `examples.parquet`, ordered by latent, kind and rank.

    - `kind`: 0 for the strongest, 1 … bins for quantile bins of a random sample, 1 the weakest; `rank` from 0.
    - `corpus`: its number; `document`: the row's number in it; `start`: place of the first token of the window.
    - `peak`: which token of the window the example is about; `value`, `base_value`, `tuned_value`: its activations.
    - `ids`: the window's tokens; `at`: those of them on which any signal is not 0, with `value_at` … beside it.
    """
    import pyarrow as pa

    small, number, many = pa.int16(), pa.float32(), pa.list_(pa.float32())
    fields = [("latent", pa.int32()), ("kind", pa.int8()), ("rank", small), ("corpus", small)]
    fields += [("document", pa.int32()), ("start", pa.int32()), ("peak", small)]
    fields += [(name, number) for name in ("value", "base_value", "tuned_value")]
    fields += [("ids", pa.list_(pa.int32())), ("at", pa.list_(small))]
    fields += [(f"{signal}_at", many) for signal in SIGNALS]
    return pa.schema(fields)


def vocab_schema() -> pyarrow.Schema:
    """Columns of `vocab.parquet`: every token id and how it is shown."""
    import pyarrow as pa

    return pa.schema([("id", pa.int32()), ("text", pa.string())])


def label_schema() -> pyarrow.Schema:
    """Columns of `labels.parquet`.

    `score` is the balanced accuracy of the label on `n` texts that it was not made from, `score_lo` and `score_hi` its
    interval, `score_random` and `score_similar` the same against each kind of negative; null where nothing judged.
    """
    import pyarrow as pa

    scores = [(name, pa.float32()) for name in ("score", "score_lo", "score_hi")]
    split = [(name, pa.float32()) for name in ("score_random", "score_similar")]
    text = [("latent", pa.int32()), ("label", pa.string()), ("provider", pa.string())]
    return pa.schema([*text, *scores, ("n", pa.int32()), *split])
