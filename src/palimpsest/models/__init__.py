"""Base and tuned models: loading, sites, reading and editing activations, weight comparison."""

from palimpsest.models.capture import capture, replace
from palimpsest.models.load import load_model, load_pair
from palimpsest.models.pair import SIDES, LanguageModel, ModelPair, Reading, Side
from palimpsest.models.sites import SiteMap, canonical_site, site_from_tlens, tlens_from_site
from palimpsest.models.upper import UpperHalf
from palimpsest.models.verify import verify_sites
from palimpsest.models.weights import LayerDelta, edits_activations, fingerprint, weight_deltas

__all__ = [
    "SIDES",
    "LanguageModel",
    "LayerDelta",
    "ModelPair",
    "Reading",
    "Side",
    "SiteMap",
    "UpperHalf",
    "canonical_site",
    "capture",
    "edits_activations",
    "fingerprint",
    "load_model",
    "load_pair",
    "replace",
    "site_from_tlens",
    "tlens_from_site",
    "verify_sites",
    "weight_deltas",
]
