"""What one pass leaves: equal to a dense computation of the definitions, however documents are batched."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from scipy import stats

from paired_streams import (
    Letters,
    batch_of,
    codes_of,
    measure_of,
    overlap,
    random_dictionary,
    strongest,
    sums_of,
    texts,
)
from palimpsest.audit import latent_sums
from palimpsest.audit.estimate import CorpusEstimates, Settings
from palimpsest.audit.events import AFTER, BEFORE, KEEP
from palimpsest.audit.latent_sums import FIELDS, halves
from palimpsest.audit.latent_table import latent_rows
from palimpsest.audit.measure import _save
from palimpsest.audit.sums import COLUMNS, Accumulator, CorpusSums

K = 3
CASES = [("topk", 0.0), ("relu", -1.5), ("relu", -4.5), ("jumprelu", -1.0), ("batch_topk", -1.0)]


def dense_columns(dictionary, text):
    """Sums over one document's measured tokens by the definitions, in float64."""
    x = text.acts[text.keep].astype(np.float64)
    z = [codes_of(dictionary, x[:, model]) for model in range(2)]
    decoder, bias = (t.double().numpy() for t in (dictionary.W_dec[:, 0], dictionary.b_dec[0]))
    rebuilt = [codes @ decoder + bias for codes in z]
    delta = x[:, 1] - x[:, 0]
    lists = [[strongest(row, K) for row in codes] for codes in z]
    pairs = list(zip(*lists, strict=True))
    listed = [(a, b) for a, b in pairs if a or b]
    both = [sorted(set(a) & set(b)) for a, b in pairs]
    change = [np.abs(f[i] - b[i]).sum() / (b[i] + f[i]).sum() for i, b, f in zip(both, *z, strict=True) if i]
    loss, kl = text.loss[text.keep], text.kl[text.keep]
    return {
        "tokens": len(x),
        "listed": len(listed),
        "short": sum(min(len(a), len(b)) < K for a, b in listed),
        "length_gap": sum(abs(len(a) - len(b)) / (2 * max(len(a), len(b))) for a, b in listed),
        "value_change": sum(change),
        "valued": len(change),
        "loss_base": np.nansum(loss[:, 0]),
        "loss_tuned": np.nansum(loss[:, 1]),
        "predicted": np.isfinite(loss[:, 0]).sum(),
        "kl": np.nansum(kl),
        "drift": (np.linalg.norm(delta, axis=1) / np.linalg.norm(x[:, 0], axis=1)).sum(),
        "delta_squares": (delta**2).sum(),
        "delta_residual": ((delta - (z[1] - z[0]) @ decoder) ** 2).sum(),
        "residual_base": ((x[:, 0] - rebuilt[0]) ** 2).sum(),
        "residual_tuned": ((x[:, 1] - rebuilt[1]) ** 2).sum(),
        "l0_base": (z[0] > 0).sum(),
        "l0_tuned": (z[1] > 0).sum(),
    }


@pytest.mark.parametrize(("activation", "bias"), CASES)
def test_columns_and_curves_equal_the_definitions(activation, bias):
    dictionary, group = random_dictionary(activation, bias=bias), texts(9, seed=3)
    sums = sums_of([group[:4], group[4:]], measure_of(dictionary, k=K, k_max=12))
    assert sums.documents.tolist() == [text.index for text in group]
    expected = [dense_columns(dictionary, text) for text in group]
    assert set(expected[0]) == set(COLUMNS)
    for name in COLUMNS:
        np.testing.assert_allclose(
            sums.columns[name], [row[name] for row in expected], rtol=2e-5, atol=1e-6, err_msg=name
        )
    for place, text in enumerate(group):
        z = [codes_of(dictionary, text.acts[text.keep, model]) for model in range(2)]
        for k in range(1, 13):
            curve = [overlap(a, b, k) for a, b in zip(*z, strict=True)]
            counts = [len(set(strongest(a, k)) & set(strongest(b, k))) for a, b in zip(*z, strict=True)]
            assert sums.overlap[place, k - 1] == pytest.approx(np.nansum(curve), abs=1e-9)
            assert sums.counts[place, k - 1] == sum(counts)


@pytest.mark.parametrize(("activation", "bias"), CASES)
def test_explained_variance_and_delta_equal_the_definitions(activation, bias):
    dictionary, group = random_dictionary(activation, bias=bias), texts(9, seed=5)
    sums = sums_of([group[:1], group[1:]], measure_of(dictionary, k=K))
    found = CorpusEstimates(sums, Settings(K, False, 0.95, 100, 0), 0)
    x = np.concatenate([text.acts[text.keep] for text in group]).astype(np.float64)
    decoder, bias_out = dictionary.W_dec[:, 0].double().numpy(), dictionary.b_dec[0].double().numpy()
    z = [codes_of(dictionary, x[:, model]) for model in range(2)]
    for model, side in enumerate(("base", "tuned")):
        h = x[:, model]
        residual = h - z[model] @ decoder - bias_out
        expected = 1 - (residual**2).sum() / ((h - h.mean(0)) ** 2).sum()
        assert found.fve(side) == pytest.approx(expected, rel=1e-4)
    delta = x[:, 1] - x[:, 0]
    expected = 1 - ((delta - (z[1] - z[0]) @ decoder) ** 2).sum() / (delta**2).sum()
    value, (lo, hi) = found.r2_delta()
    assert value == pytest.approx(expected, rel=1e-4) and lo < value < hi


@pytest.mark.parametrize("pooled", [False, True], ids=["documents", "pooled"])
@pytest.mark.parametrize(("activation", "bias"), CASES)
def test_sums_per_latent_equal_the_definitions(activation, bias, pooled):
    dictionary, group = random_dictionary(activation, bias=bias), texts(12, seed=7)
    sums = sums_of([group[:5], group[5:]], measure_of(dictionary, k=K, pooled=pooled))
    half = halves(torch.tensor([text.index for text in group]), 5).tolist()
    assert {0, 1} == set(half)
    expected = {name: np.zeros((2, dictionary.n_latents)) for name in FIELDS}
    change, weight = np.zeros((2, 2, dictionary.n_latents)), np.zeros((2, 2))
    for part, text in zip(half, group, strict=True):
        z = [codes_of(dictionary, text.acts[text.keep, model]) for model in range(2)]
        lists = [[strongest(row, K) for row in codes] for codes in z]
        listed = sum(bool(a or b) for a, b in zip(*lists, strict=True))
        weight[part] += 1, listed if pooled else listed > 0
        for a, b in zip(*lists, strict=True):
            share = 1.0 if pooled else 1 / max(listed, 1)
            for names, latents in (
                (("left", "lost"), set(a) - set(b)),
                (("entered", "gained"), set(b) - set(a)),
            ):
                for latent in latents:
                    expected[names[0]][part, latent] += share
                    expected[names[1]][part, latent] += share / (2 * max(len(a), len(b)))
        for side, codes in zip(("base", "tuned"), z, strict=True):
            expected[f"rate_{side}"][part] += (codes > 0).mean(0)
            expected[f"mean_{side}"][part] += codes.mean(0)
        moved = z[1].mean(0) - z[0].mean(0)
        change[part] += np.stack([moved, moved**2])
    np.testing.assert_array_equal(sums.latents["weight"], weight)
    for place, name in enumerate(FIELDS):
        found = sums.latents["sums"][:, place]
        np.testing.assert_allclose(found, expected[name], rtol=1e-4, atol=1e-6, err_msg=name)
    np.testing.assert_allclose(sums.latents["change"], change, rtol=1e-3, atol=1e-6)


def assert_same_sums(found, expected):
    flat, other = found.arrays(), expected.arrays()
    assert flat.keys() == other.keys()
    for name, array in flat.items():
        np.testing.assert_allclose(array, other[name], rtol=2e-5, atol=1e-5, err_msg=name)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_batching_and_order_of_documents_do_not_matter(data):
    activation, bias = data.draw(st.sampled_from(CASES))
    group = texts(7, seed=data.draw(st.integers(0, 99)))
    measure = measure_of(random_dictionary(activation, bias=bias), pooled=data.draw(st.booleans()))
    order = data.draw(st.permutations(range(len(group))))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(group) - 1))))
    shuffled = [group[place] for place in order]
    bounds = zip([0, *cuts], [*cuts, len(group)], strict=True)
    found = sums_of([shuffled[start:stop] for start, stop in bounds], measure)
    assert_same_sums(found, sums_of([group], measure))


def test_small_tiles_of_documents_give_the_same(monkeypatch):
    group, measure = texts(9, seed=1), measure_of(random_dictionary("relu", bias=-1.5))
    expected = sums_of([group], measure)
    monkeypatch.setattr(latent_sums, "TILE_ENTRIES", 2 * measure.dictionary.n_latents)
    assert_same_sums(sums_of([group], measure), expected)


def test_halves_are_even_fixed_and_follow_the_seed():
    documents = torch.arange(4000)
    one, again, other = halves(documents, 3), halves(documents, 3), halves(documents, 4)
    assert torch.equal(one, again) and torch.equal(one[:50], halves(documents[:50], 3))
    assert abs(one.float().mean().item() - 0.5) < 0.04
    assert abs((one == other).float().mean().item() - 0.5) < 0.04
    assert abs((one[1:] == one[:-1]).float().mean().item() - 0.5) < 0.04


def events_of(dictionary, group, k):
    """Every event of every latent: score, values in both lists, document, direction, window of ids."""
    found = {}
    for text in group:
        z = [codes_of(dictionary, text.acts[:, model]) for model in range(2)]
        for place in np.flatnonzero(text.keep):
            a, b = (strongest(codes[place], k) for codes in z)
            for latent in set(a) ^ set(b):
                inside = [codes[place, latent] for codes in z]
                ids = np.r_[np.full(BEFORE, -1), text.ids, np.full(AFTER, -1)][
                    place : place + BEFORE + 1 + AFTER
                ]
                event = (inside, text.index, int(latent in b), ids.tolist())
                found.setdefault(latent, []).append(event)
    return found


@pytest.mark.parametrize("size", [1, 4, 10])
def test_examples_are_the_strongest_events_of_each_latent(size):
    k, k_max = 3, 6
    dictionary, group = random_dictionary("topk", latents=20, k=6), texts(10, seed=11, longest=25, change=0.7)
    groups = [group[start : start + size] for start in range(0, len(group), size)]
    found = sums_of(groups, measure_of(dictionary, k=k, k_max=k_max)).events
    every = events_of(dictionary, group, k)
    assert max(map(len, every.values())) > KEEP
    assert set(found["latent"].tolist()) == set(every)
    for latent, events in every.items():
        mine = np.flatnonzero(found["latent"] == latent)
        strengths = sorted((abs(pair[1] - pair[0]) for pair, *_ in events), reverse=True)
        np.testing.assert_allclose(found["score"][mine], strengths[:KEEP], rtol=1e-4)
        assert len(mine) == min(KEEP, len(events))
        for row in mine:
            pair = [float(found["base"][row]), float(found["tuned"][row])]
            match = [
                event
                for event in events
                if event[1:] == (found["document"][row], found["entered"][row], found["window"][row].tolist())
                and np.allclose(event[0], pair, rtol=1e-4, atol=1e-5)
            ]
            assert match, (latent, pair)


def test_a_value_outside_the_other_list_is_shown_as_zero():
    """With k = k_max the other model's list ends at k, so an event's other value is unknown: 0."""
    dictionary, group = random_dictionary("relu"), texts(6, seed=2)
    found = sums_of([group], measure_of(dictionary, k=3, k_max=3)).events
    other = np.where(found["entered"] == 1, found["base"], found["tuned"])
    own = np.where(found["entered"] == 1, found["tuned"], found["base"])
    assert len(other) and (other == 0).all() and (own > 0).all()
    np.testing.assert_allclose(found["score"], own)


def test_example_text_is_cut_around_the_token():
    dictionary, group = random_dictionary("topk"), texts(10, seed=11, longest=25, change=0.9)
    sums = sums_of([group], measure_of(dictionary))
    table = latent_rows("text", sums, 0.0, Letters(), 5, 0.95).to_pylist()
    chosen = [row for row in table if row["selected"]]
    assert len(chosen) == 5 and all(row["examples"] == [] for row in table if not row["selected"])
    ids = {text.index: text.ids.tolist() for text in group}
    for row in chosen:
        assert 1 <= len(row["examples"]) <= KEEP
        for example in row["examples"]:
            whole = [int(word) for word in " ".join(example[k] for k in ("before", "token", "after")).split()]
            text = ids[example["document"]]
            assert any(text[i : i + len(whole)] == whole for i in range(len(text)))
            assert example["event"] in ("entered", "left") and len(example["token"].split()) == 1


def test_selection_uses_one_half_and_the_test_the_other():
    dictionary, group = random_dictionary("topk"), texts(14, seed=13)
    measure = measure_of(dictionary)
    half = halves(torch.tensor([text.index for text in group]), 5).tolist()
    sums = sums_of([group], measure)
    rows = [r for r in latent_rows("t", sums, 0.0, Letters(), 4, 0.9).to_pylist() if r["selected"]]
    first = sums_of([[t for t, h in zip(group, half, strict=True) if h == 0]], measure).latents["sums"][0]
    score = first[FIELDS.index("lost")] + first[FIELDS.index("gained")]
    assert {row["latent"] for row in rows} == set(np.argsort(-score, kind="stable")[:4].tolist())
    held = [text for text, part in zip(group, half, strict=True) if part == 1]
    means = [[codes_of(dictionary, t.acts[t.keep, m]).mean(0) for t in held] for m in range(2)]
    change = np.array(means[1]) - np.array(means[0])
    expected = stats.ttest_1samp(change, 0.0)
    p = []
    for row in rows:
        latent = row["latent"]
        lo, hi = (bound[latent] for bound in expected.confidence_interval(0.9))
        assert row["change"] == pytest.approx(change[:, latent].mean(), abs=1e-6)
        assert row["change_lo"] == pytest.approx(lo, abs=1e-5)
        assert row["change_hi"] == pytest.approx(hi, abs=1e-5)
        assert row["p"] == pytest.approx(expected.pvalue[latent], abs=1e-4)
        p.append(row["p"])
    np.testing.assert_allclose([row["q"] for row in rows], stats.false_discovery_control(p), rtol=1e-9)


def test_a_single_document_per_half_selects_nothing():
    sums = sums_of([texts(1)], measure_of(random_dictionary()))
    table = latent_rows("t", sums, 0.0, Letters(), 10, 0.95).to_pydict()
    assert len(table["latent"]) > 1 and not any(table["selected"]) and set(table["p"]) == {None}


@pytest.mark.parametrize("latents", [True, False])
def test_sums_survive_a_file(tmp_path, latents):
    sums = sums_of([texts(6, seed=4)], measure_of(random_dictionary(), latents=latents))
    _save(sums, tmp_path / "sums.safetensors")
    again = CorpusSums.from_arrays(load_file(tmp_path / "sums.safetensors"))
    assert list(tmp_path.iterdir()) == [tmp_path / "sums.safetensors"]
    flat, other = sums.arrays(), again.arrays()
    assert flat.keys() == other.keys() and bool(again.events) is latents
    for name, array in flat.items():
        assert array.dtype == other[name].dtype and array.shape == other[name].shape
        np.testing.assert_array_equal(array, other[name])


def test_without_losses_their_columns_are_zero():
    accumulator = Accumulator(measure_of(random_dictionary()))
    accumulator.add(replace(batch_of(texts(4)), loss=None, kl=None))
    columns = accumulator.finish().columns
    assert all((columns[name] == 0).all() for name in ("loss_base", "loss_tuned", "predicted", "kl"))
    assert (columns["tokens"] > 0).all()


def test_no_batch_at_all_gives_empty_sums():
    sums = Accumulator(measure_of(random_dictionary())).finish()
    assert len(sums.documents) == 0 and sums.overlap.shape == sums.counts.shape == (0, 8)
    assert set(sums.columns) == set(COLUMNS) and sums.latents["sums"].shape == (2, len(FIELDS), 24)
