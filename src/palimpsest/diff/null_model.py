"""A null pair for diffs: the base with a random weight change that moves its activations as far as the fine-tune."""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from palimpsest.artifacts import RunFolder, check_claim
from palimpsest.diff.null_config import NullConfig
from palimpsest.diff.text import TextPass, Texts, read_pair
from palimpsest.errors import NumericsError
from palimpsest.harvest.stream import check_finite, kept_rows
from palimpsest.log import progress
from palimpsest.models import LanguageModel, ModelPair, fingerprint, load_model, load_pair
from palimpsest.models.spectrum import SpectrumNull, base_deltas, bisect_alpha
from palimpsest.options import config_dict

STAGE = "null-model"
RECORD = "null.json"


def make_null(config: NullConfig) -> Path:
    """Write base + α·(rotated change of the fine-tune) as a transformers checkpoint, with its tokenizer.

    α is such that the relative drift √(Σ‖h_null - h_base‖² / Σ‖h_base‖²) at the site is that of the fine-tune, to
    about 0.2 %. The checkpoint has the dtype that the pair is read in (float32 on a CPU unless another is asked for),
    so the drift that was matched includes the rounding to that dtype: read the null with the same `--dtype`.

    Returns:
        The folder: a checkpoint that `load_pair(base, folder)` takes, and `null.json` with `alpha`, `drift` of `tuned`
        and `null`, `seed`, `base`, `tuned`, `site`, `dtype` and the measured `tokens`.

    Raises:
        NumericsError: The two models have the same weights, or the same activations at the site; or NaN.
        PalimpsestError: Bad input, before anything is written. An interrupted run starts again with `resume`.

    Source: the rotations, `palimpsest.models.spectrum.SpectrumNull`.
    """
    check_claim(config.run.out, resume=config.run.resume, overwrite=config.run.overwrite)
    pair = load_pair(config.base, config.tuned, config.models)
    site = pair.base.sites.canonical(config.site)
    pair.base.sites.tap(site)
    texts = Texts(config.corpus, pair.tokenizer, config.corpora, pair.base.context)
    with RunFolder(
        config.run.out,
        stage=STAGE,
        config=config_dict(config),
        inputs=_inputs(config, pair, texts),
        seed=config.run.seed,
        device=str(pair.base.device),
        models={"base": config.base, "tuned": config.tuned},
        resume=config.run.resume,
        overwrite=config.run.overwrite,
    ) as run:
        if run.already_complete:
            return run.path
        started = time.perf_counter()
        text = texts.pass_over(config.tokens, config.models.tokens_per_batch)
        drift, target = _drift_of(pair, site, texts, text)
        null, model = _null(config, pair)
        # The tuned model has said what it had to.
        del pair
        alpha, reached = _match(null, model, drift, target)
        with null.at(alpha):
            model.model.save_pretrained(run.path)
        model.tokenizer.save_pretrained(run.path)
        record = {
            "alpha": alpha,
            "drift": {"tuned": target, "null": reached},
            "seed": config.run.seed,
            "base": config.base,
            "tuned": config.tuned,
            "site": site,
            "dtype": str(model.dtype).removeprefix("torch."),
            "tokens": text.tokens,
        }
        run.write_json(RECORD, record)
        run.timing("null", time.perf_counter() - started)
        run.finish()
    return run.path


@dataclass
class _Drift:
    """Relative drift from activations of the base that are held."""

    site: str
    texts: Texts
    text: TextPass
    base: list[Tensor]
    """h_base of each batch's measured tokens, [tokens, d_model]."""
    norm: float
    """Σ‖h_base‖²."""

    @torch.inference_mode()
    def of(self, model: LanguageModel) -> float:
        moved = 0.0
        for held, (_, batch) in zip(self.base, self.text, strict=True):
            places = self.texts.places(batch)
            kept = places.flat[places.measured]
            rows = kept_rows(model.read(batch.input_ids, [self.site]).acts[self.site], kept)
            check_finite(rows, "null", self.site, batch, kept)
            moved += _square(rows.float() - held.to(rows.device))
        return math.sqrt(moved / self.norm)


def _drift_of(pair: ModelPair, site: str, texts: Texts, text: TextPass) -> tuple[_Drift, float]:
    """The measure, and what it says of the tuned model."""
    base, norm, moved = [], 0.0, 0.0
    with progress(f"the drift at {site}", text.tokens) as advance:
        for _, batch in text:
            places = texts.places(batch)
            kept = places.flat[places.measured]
            acts = read_pair(pair, site, batch, kept, pair.base.device)
            norm += _square(acts[:, 0])
            moved += _square(acts[:, 1] - acts[:, 0])
            base.append(acts[:, 0].cpu())
            advance(len(kept))
    if moved == 0:
        # Raises where the weights are the same: that says more.
        base_deltas(pair)
        raise NumericsError(
            f"The fine-tune leaves the activations at {site} as they were",
            fix="Choose a site above the first layer that it changed",
        )
    return _Drift(site, texts, text, base, norm), math.sqrt(moved / norm)


def _null(config: NullConfig, pair: ModelPair) -> tuple[SpectrumNull, LanguageModel]:
    """The random change on weights of their own: the pair's may carry an adapter, which a checkpoint must not."""
    model = load_model(config.base, config.models, tokenizer=pair.tokenizer)
    return SpectrumNull(model, base_deltas(pair), config.run.seed), model


def _match(null: SpectrumNull, model: LanguageModel, drift: _Drift, target: float) -> tuple[float, float]:
    """The scale at which the null drifts as far as `target`, and how far it does."""
    measured: dict[float, float] = {}
    with progress(f"matching the drift at {drift.site}", unit="trials") as advance:

        def nearness(alpha: float) -> float:
            with null.at(alpha):
                measured[alpha] = drift.of(model)
            advance(1)
            # Drift grows about as a power of the scale: its logarithm is what interpolation over log α hits.
            return -math.log(max(measured[alpha], 1e-30))

        alpha = bisect_alpha(nearness, -math.log(target), what="-log(relative drift)")
    return alpha, measured[alpha]


def _square(values: Float[Tensor, "tokens d_model"]) -> float:
    return float(values.square().sum(dtype=torch.float64))


def _inputs(config: NullConfig, pair: ModelPair, texts: Texts) -> dict[str, Any]:
    models = {"base": (config.base, pair.base), "tuned": (config.tuned, pair.tuned)}
    entries: dict[str, Any] = {
        name: {"path": path, "sha256": fingerprint(model)} for name, (path, model) in models.items()
    }
    return entries | {f"corpus {corpus.name}": corpus.fingerprint() for corpus in texts.corpora}
