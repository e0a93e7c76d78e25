"""Classes, verdicts, artefacts, stability, rankings and the table: every rule at its edges."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from palimpsest.dictionaries import Dictionary
from palimpsest.diff.classes import (
    CLASSES,
    VERDICTS,
    artefacts,
    classify,
    decoder_cosine,
    delta_norm,
    norms,
    split_pairs,
    verdicts,
)
from palimpsest.diff.config import ClassOptions
from palimpsest.diff.methods import Method
from palimpsest.diff.nulls import null_count
from palimpsest.diff.rankings import HIGHEST_NU, rankings
from palimpsest.diff.result import PatchRow
from palimpsest.diff.scaling import TARGETS, Scaling
from palimpsest.diff.stability import match_latents, summarise_match
from palimpsest.diff.summary import share_text
from palimpsest.diff.table import to_table
from palimpsest.errors import ConfigError, DictionaryError

D, N, NAN = 16, 12, float("nan")


def crosscoder(n=N, seed=0, **changes):
    torch.manual_seed(seed)
    return Dictionary(D, n, k=2, models=2, view="pair", **changes).requires_grad_(False)


def with_norms(base, tuned):
    """A crosscoder with these decoder norms."""
    made = crosscoder(len(base))
    made.W_dec.copy_(torch.nn.functional.normalize(made.W_dec, dim=2))
    made.W_dec[:, 0] *= torch.tensor(base, dtype=torch.float32)[:, None]
    made.W_dec[:, 1] *= torch.tensor(tuned, dtype=torch.float32)[:, None]
    return made


def sae(view, n=N):
    return Dictionary(D, n, k=2, view=view).requires_grad_(False)


def scaling_of(n=N, *, lo=0.1, **nu):
    """ν by target; β_tuned's interval starts at `lo`."""
    full = {name: np.broadcast_to(np.asarray(nu.get(name, NAN), float), n).copy() for name in TARGETS}
    low = {name: np.broadcast_to(np.asarray(lo, float), n).copy() for name in TARGETS}
    beta = {name: np.stack([one, np.ones(n)]) for name, one in full.items()}
    return Scaling(beta, low, full, full, full, np.full(n, 9))


def test_delta_norm_is_the_formula_and_nan_without_norms():
    norm = np.array([[0.0, 2.0], [2.0, 0.0], [1.0, 1.0], [1.0, 4.0], [4.0, 1.0], [0.0, 0.0]])
    np.testing.assert_allclose(delta_norm(norm), [1, 0, 0.5, 0.875, 0.125, NAN])
    made = with_norms([3.0, 0.0], [1.0, 2.0])
    np.testing.assert_allclose(norms(made), [[3, 1], [0, 2]], rtol=1e-6)
    np.testing.assert_allclose(delta_norm(norms(made)), [0.5 * ((1 - 3) / 3 + 1), 1.0], rtol=1e-6)


def test_decoder_cosine():
    made = crosscoder(3)
    made.W_dec[0, 1] = 4 * made.W_dec[0, 0]
    made.W_dec[1, 1] = -made.W_dec[1, 0]
    made.W_dec[2, 1] = 0
    np.testing.assert_allclose(decoder_cosine(made), [1, -1, NAN], rtol=1e-6)


def test_classes_of_a_crosscoder_at_the_thresholds():
    # Δnorm = 1 - base / (2 tuned) for tuned >= base, and tuned / (2 base) below.
    tuned_only = [(0.0, 1.0), (0.125, 1.0)]
    base_only = [(1.0, 0.0), (1.0, 0.125)]
    shared = [(1.0, 1.0), (1.0, 0.875), (0.875, 1.0)]
    other = [(0.5, 1.0), (1.0, 0.5), (0.25, 1.0), (0.0, 0.0)]
    rows = tuned_only + base_only + shared + other
    expected = ["tuned-only"] * 2 + ["base-only"] * 2 + ["shared"] * 3 + ["other"] * 4
    method = Method(with_norms([a for a, _ in rows], [b for _, b in rows]))
    alive, scaling = np.ones(len(rows), bool), scaling_of(len(rows))
    assert classify(method, scaling, alive, ClassOptions()).tolist() == expected
    # The lines themselves belong to no extreme, and to what is shared.
    edges = ClassOptions(tuned_only=0.875, base_only=0.125, shared_from=0.25, shared_to=0.75)
    edge = crosscoder(5)
    edge.W_dec.zero_()  # One coordinate each: norms without rounding.
    edge.W_dec[:, :, 0] = torch.tensor([[0.25, 1], [1, 0.25], [0.5, 1], [1, 0.5], [0.125, 1]])
    found = classify(Method(edge), scaling_of(5), np.ones(5, bool), edges)
    assert found.tolist() == ["other", "other", "shared", "shared", "tuned-only"]
    alive[:4] = False
    assert classify(method, scaling, alive, ClassOptions())[:5].tolist() == ["dead"] * 4 + ["shared"]


@pytest.mark.parametrize("view", ["diff", "tuned", "base"])
def test_classes_of_one_decoder_come_from_the_centred_ratio(view):
    nu = [0.299, 0.3, 0.66, 0.67, 1.0, 1.5, 1.51, 3.3, 3.34, np.inf, NAN, -4.0]
    found = classify(Method(sae(view)), scaling_of(centred=nu), np.ones(N, bool), ClassOptions())
    assert found.tolist() == (
        ["tuned-only", "other", "other", "shared", "shared", "shared", "other", "other"]
        + ["base-only", "base-only", "other", "tuned-only"]
    )
    assert set(found) <= set(CLASSES)


def test_verdicts_of_a_crosscoder():
    error = [0.19, 0.2, 0.19, -0.1, -0.11, 0.1, 0.1, NAN, 0.1, 0.0, 5.0, 0.1]
    reconstruction = [0.49, 0.4, 0.5, 0.1, 0.1, -0.2, NAN, 0.1, 0.1, 0.0, 0.1, 0.1]
    scaling = scaling_of(error=error, reconstruction=reconstruction)
    scaling.beta_tuned_lo["error"][8] = 0.0
    scaling.beta_tuned_lo["reconstruction"][11] = NAN
    yes, no, unknown = "tuned-specific", "rejected", "undetermined"
    expected = [yes, no, no, yes, unknown, unknown, unknown, unknown, unknown, yes, no, unknown]
    found = verdicts(Method(crosscoder()), scaling, ClassOptions())
    assert found.tolist() == expected and set(found) <= set(VERDICTS)
    loose = ClassOptions(nu_error=0.21, nu_reconstruction=0.51, nu_floor=-0.5)
    found = verdicts(Method(crosscoder()), scaling, loose)
    assert found.tolist() == [yes] * 6 + [unknown] * 3 + [yes, no, unknown]


@pytest.mark.parametrize("view", ["diff", "tuned", "base"])
def test_verdicts_of_one_decoder(view):
    scaling = scaling_of(4, centred=[0.29, 0.3, -0.2, 0.1])
    scaling.beta_tuned_lo["centred"][3] = -0.01
    found = verdicts(Method(sae(view, 4)), scaling, ClassOptions())
    assert found.tolist() == ["tuned-specific", "rejected", "undetermined", "undetermined"]


def test_lines_that_overlap_are_refused():
    for changes in ({"tuned_only": 0.5}, {"base_only": 0.5}, {"tuned_only": 1.1}, {"base_only": -0.1}):
        with pytest.raises(ConfigError, match="overlap"):
            ClassOptions(**changes)


def test_split_pairs_are_close_first_and_only_of_opposite_classes():
    made = with_norms([0, 0, 1, 1, 1, 1, 0, 1], [1, 1, 0, 0, 0, 1, 1, 1])
    rows = torch.nn.functional.normalize(torch.randn(3, D), dim=1)
    near = torch.nn.functional.normalize(rows[0] + 0.06 * rows[2], dim=0)
    made.W_dec[0, 1], made.W_dec[2, 0], made.W_dec[3, 0] = 2 * rows[0], near, 3 * rows[0]
    made.W_dec[1, 1], made.W_dec[4, 0] = rows[1], -rows[1]
    # Shared latents are in no pair, though their directions are those of others.
    made.W_dec[5, 0], made.W_dec[5, 1] = rows[0], rows[0]
    found = split_pairs(Method(made), ClassOptions())
    assert found.tolist() == [[0, 3], [0, 2]] and found.dtype == np.int64
    assert split_pairs(Method(crosscoder()), ClassOptions()).shape == (0, 2)
    assert split_pairs(Method(sae("diff")), ClassOptions()).shape == (0, 2)


def test_split_pairs_do_not_depend_on_tiles(monkeypatch):
    made = with_norms([0.0] * 10 + [1.0] * 10, [1.0] * 10 + [0.0] * 10)
    made.W_dec[10:, 0] = made.W_dec[:10, 1].flip(0)
    whole = split_pairs(Method(made), ClassOptions())
    assert sorted(whole.tolist()) == [[i, 19 - i] for i in range(10)]
    monkeypatch.setattr("palimpsest.diff.classes.TILE", 3)
    assert sorted(split_pairs(Method(made), ClassOptions()).tolist()) == sorted(whole.tolist())
    monkeypatch.setattr("palimpsest.diff.classes.MOST_PAIRS", 4)
    assert len(split_pairs(Method(made), ClassOptions())) == 4


def test_artefacts_are_counted_among_the_tuned_only_that_were_asked():
    classes = np.array(["tuned-only"] * 5 + ["shared"] * 5 + ["base-only"] * 2)
    verdict = np.array(
        ["rejected", "rejected", "tuned-specific", "undetermined", "rejected"] + ["rejected"] * 7
    )
    error = [0.9, 0.1, 0.1, 0.9, 0.3, 0.8, 0.9, 1.0, 1.1, 1.2, 0.0, 0.0]
    reconstruction = [0.1, 0.9, 0.1, 0.9, 0.9, 0.9, 1.0, 1.0, 1.0, 1.1, 0.0, 0.0]
    scaling = scaling_of(error=error, reconstruction=reconstruction)
    pairs = np.array([[0, 10], [1, 11], [2, 10], [3, 10]])
    counts = np.array([[10, 10, 10], [50, 50, 4], [0, 10, 0], [20, 5, 0]])
    found = artefacts({"class": classes, "verdict": verdict}, scaling, (pairs, counts), ClassOptions())
    assert (found["shrinkage"], found["decoupling"]) == (2, 2)
    # A latent that never fires makes no pair; the others' overlap is that of Jaccard.
    assert (found["split_pairs"], found["split_pairs_apart"]) == (3, 2)
    assert found["split_pairs_overlap"] == pytest.approx((1 + 4 / 96 + 0) / 3)
    assert found["split_examples"][1] == {"tuned_only": 1, "base_only": 11, "overlap": pytest.approx(4 / 96)}
    assert found["shared_error"]["50"] == 1.0 and found["shared_reconstruction"]["50"] == 1.0
    assert found["tuned_only_like_shared_error"] == pytest.approx(1 / 4)
    empty = (np.zeros((0, 2), np.int64), np.zeros((0, 3), np.int64))
    none = {"class": np.array(["other"] * N), "verdict": np.array(["undetermined"] * N)}
    found = artefacts(none, scaling_of(), empty, ClassOptions())
    assert (found["shrinkage"], found["split_pairs"], found["split_pairs_overlap"]) == (0, 0, None)
    assert found["shared_error"] is None and found["tuned_only_like_shared_error"] is None


@pytest.mark.parametrize("tile", [5, 1024])
def test_a_permuted_copy_is_the_same_and_a_random_one_is_not(monkeypatch, tile):
    monkeypatch.setattr("palimpsest.diff.stability.TILE", tile)
    made, twin = crosscoder(40), crosscoder(40, seed=1)
    order = torch.randperm(40)
    twin.W_dec.copy_(made.W_dec[order] * (0.5 + torch.rand(40, 1, 1)))
    match = match_latents(made, twin)
    np.testing.assert_allclose(match.score, 1, atol=1e-6)
    assert match.mutual.all() and (order.numpy()[match.latent] == np.arange(40)).all()
    found = np.array(["tuned-only"] * 3 + ["shared"] * 36 + ["dead"])
    assert summarise_match(match, found, "twin") == {
        "twin": "twin",
        "alive": {"latents": 39, "mean": pytest.approx(1), "above_0.7": 1.0, "above_0.9": 1.0},
        "tuned_only": {"latents": 3, "mean": pytest.approx(1), "above_0.7": 1.0, "above_0.9": 1.0},
    }
    other = match_latents(made, crosscoder(60, seed=2))
    assert other.score.max() < 0.8 and other.score.mean() < 0.6 and not other.mutual.all()
    dense = torch.cosine_similarity(
        made.W_dec.flatten(1)[:, None], crosscoder(60, seed=2).W_dec.flatten(1), dim=2
    )
    np.testing.assert_allclose(other.score, dense.amax(1), atol=1e-6)
    assert other.latent.tolist() == dense.argmax(1).tolist()
    assert other.mutual.tolist() == (dense.argmax(0)[dense.argmax(1)] == torch.arange(40)).tolist()
    nothing = summarise_match(other, np.array(["dead"] * 40), "t")
    assert nothing["alive"] == {"latents": 0, "mean": None, "above_0.7": None, "above_0.9": None}


def test_a_twin_of_another_kind_is_refused():
    for twin in (sae("diff"), Dictionary(D + 1, N, k=2, models=2, view="pair")):
        with pytest.raises(DictionaryError, match="another kind"):
            match_latents(crosscoder(), twin)
    with pytest.raises(DictionaryError, match="another kind"):
        match_latents(sae("tuned"), sae("base"))


def columns_of(n=N, **changes):
    fields = {
        "dead": np.zeros(n, bool),
        "delta_norm": np.linspace(0, 1, n),
        "nu_reconstruction": np.linspace(1, 0, n),
        "nu_error": np.linspace(0.5, 0, n),
        "nu_centred": np.linspace(0, 1, n),
        "activation_change": np.arange(n, dtype=float),
    }
    return fields | {key: np.asarray(value) for key, value in changes.items()}


def test_rankings_of_a_crosscoder():
    error, reconstruction = np.linspace(0.5, 0, N), np.linspace(1, 0, N)
    error[[0, 1, 2]], reconstruction[3] = [NAN, -0.2, HIGHEST_NU + 0.1], np.inf
    norm = np.linspace(0, 1, N)
    norm[4] = NAN
    columns = columns_of(nu_error=error, nu_reconstruction=reconstruction, delta_norm=norm)
    columns["dead"][11] = True
    attributed = np.zeros(N)
    attributed[[2, 5, 11]] = [0.1, 0.9, 3.0]
    found = rankings(Method(crosscoder()), columns, -0.1, attributed)
    assert found["delta_norm"].tolist() == [10, 9, 8, 7, 6, 5, 3, 2, 1, 0]
    assert found["nu"].tolist() == [10, 9, 8, 7, 6, 5, 4]
    assert found["activation_change"].tolist() == list(range(10, -1, -1))
    assert found["attribution"][:2].tolist() == [5, 2] and 11 not in found["attribution"]
    for attributed in (None, np.zeros(N)):
        assert "attribution" not in rankings(Method(crosscoder()), columns, -0.1, attributed)


def test_the_rank_of_nu_is_the_sum_of_both_ranks():
    error, reconstruction = [0.1, 0.0, 0.2, 0.3], [0.0, 0.9, 0.8, 1.0]
    columns = columns_of(4, nu_error=error, nu_reconstruction=reconstruction)
    # Sums of ranks: 2+1, 1+3, 3+2, 4+4.
    assert rankings(Method(crosscoder(4)), columns, -0.1)["nu"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("view", ["diff", "tuned", "base"])
def test_rankings_of_one_decoder(view):
    found = rankings(Method(sae(view)), columns_of(), -0.1)
    assert set(found) == {"nu", "activation_change"}
    assert found["nu"].tolist() == list(range(N))


def test_rankings_of_latents_without_any_ratio():
    columns = columns_of(nu_error=np.full(N, NAN), delta_norm=np.full(N, NAN))
    found = rankings(Method(crosscoder()), columns, -0.1)
    assert len(found["nu"]) == len(found["delta_norm"]) == 0 and len(found["activation_change"]) == N


def test_what_is_not_defined_is_null_in_the_table():
    columns = {
        "latent": np.arange(3, dtype=np.int32),
        "class": np.array(["shared", "dead", "shared"]),
        "nu": np.array([1.0, NAN, np.inf]),
        "dead": np.array([False, True, False]),
        "fires": np.array([1, 0, 5]),
    }
    table = to_table(columns)
    assert table.column_names == list(columns)
    assert table["nu"].to_pylist() == [1.0, None, np.inf] and table["nu"].null_count == 1
    assert table["class"].to_pylist() == ["shared", "dead", "shared"]
    assert table["dead"].to_pylist() == [False, True, False]
    assert [str(table.schema.field(name).type) for name in ("latent", "fires")] == ["int32", "int64"]


def test_counts_over_null_diffs():
    rows = [{"raw": 3, "surviving": 1}, {"raw": 4, "surviving": 0}]
    assert null_count(rows, "raw") == 3.5 and null_count(rows, "surviving") == 0.5
    assert null_count([], "raw") is None


def test_a_share_in_words():
    row = PatchRow("all", 3, "all", 0.1, 0.5, (0.4, 0.6))
    assert share_text(row) == "50.0% [40.0%, 60.0%]"
    assert share_text(PatchRow("all", 3, "all", 0.1, 0.5, None)) == "50.0%"
    assert share_text(PatchRow("all", 3, "all", 0.1, None, None)) == "no share"
