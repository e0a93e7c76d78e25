"""A whole diff where the answer is known: a planted direction, changes in no direction, no change at all."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import pair_fixture
from audit_world import D_MODEL, SITE, WORDS, add_noise, assert_same, edited, plant, write_corpus
from pair_fixture import adapt, lora
from palimpsest.artifacts import open_artifact
from palimpsest.dictionaries import Dictionary, Partition, TrainConfig, train_dictionary
from palimpsest.diff import AttributionOptions, DiffConfig, PatchOptions, read_diff, run, run_diff
from palimpsest.diff.scaling import COLUMNS, Geometry, scale_latents
from palimpsest.diff.text import GROUPS, Texts, read_pair
from palimpsest.errors import ArtifactError, CorpusError
from palimpsest.models import load_pair
from palimpsest.options import CorpusOptions, ModelOptions, RunOptions

PLANTED = 17


def activations(world, tuned, tokens=10**6):
    """Measured activations of both models, `[tokens, 2, d_model]`."""
    pair = load_pair(world.base, tuned, ModelOptions(device="cpu"))
    texts = Texts(world.corpora, pair.tokenizer, CorpusOptions(), pair.base.context)
    rows = []
    for _, batch in texts.pass_over(tokens, 2048):
        places = texts.places(batch)
        acts = read_pair(pair, SITE, batch, places.flat, torch.device("cpu"))
        rows.append(acts[places.measured])
    return torch.cat(rows)


def quiet_direction(world):
    """A direction that the base hardly writes."""
    acts = activations(world, world.base)[:, 0]
    return torch.linalg.eigh(acts.T @ acts).eigenvectors[:, 0].contiguous()


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_llama, tiny_tokenizer):
    root = tmp_path_factory.mktemp("diff")
    corpora = tuple(
        f"{name}={write_corpus(root / f'{name}.jsonl', words, documents=40)}" for name, words in WORDS.items()
    )
    base = str(tiny_llama(seed=3, num_hidden_layers=3))
    made = SimpleNamespace(root=root, base=base, corpora=corpora, tokenizer=tiny_tokenizer)
    made.direction = quiet_direction(made)

    def edit(model):
        plant(model, tiny_tokenizer, made.direction)
        add_noise(model, 0.002, 1)

    made.tuned = edited(base, root / "fine-tune", edit)
    return made


def trained(world, tuned, folder, seed=0, **changes):
    acts = activations(world, tuned)
    generator = torch.Generator().manual_seed(seed)

    def stream():
        while True:
            yield acts[torch.randperm(len(acts), generator=generator)]

    fields = {
        "n_latents": 96,
        "k": 6,
        "activation": "batch_topk",
        "tokens": 60_000,
        "batch_size": 512,
        "lr": 8e-3,
    }
    made = train_dictionary(stream(), TrainConfig(**(fields | {"seed": seed} | changes)))
    made.metadata |= {"site": SITE}
    made.save_pretrained(world.root / folder)
    return str(world.root / folder)


def config_of(world, tuned, dictionary, out, **changes):
    run = {key: changes.pop(key) for key in ("resume", "seed") if key in changes}
    fields = {
        "dictionary": dictionary,
        "corpus": world.corpora,
        "run": RunOptions(out=world.root / out, **run),
        "tokens": 3000,
        "resamples": 200,
        "patching": PatchOptions(patch_tokens=600, random_sets=2),
        "attribution": AttributionOptions(attribution_tokens=400, steps=4),
        "models": ModelOptions(device="cpu", tokens_per_batch=1024),
    }
    return DiffConfig(world.base, str(tuned), **(fields | changes))


LITTLE = {
    "tokens": 1000,
    "patching": PatchOptions(patch_tokens=200, random_sets=1),
    "attribution": AttributionOptions(attribution_tokens=150, steps=3),
}


def drift(acts):
    return float((acts[:, 1] - acts[:, 0]).norm() / acts[:, 0].norm())


def save(made, folder):
    made.metadata |= {"site": SITE}
    made.requires_grad_(False).save_pretrained(folder)
    return str(folder)


def crosscoder_of(direction):
    """Signed coordinates that are read from the base and written in both models, and one latent of their difference.

    Latent 0 was shrunk: the base, which holds its coordinate as much as the tuned model, does not write it.
    """
    made = Dictionary(D_MODEL, 2 * D_MODEL + 1, activation="relu", models=2, view="pair")
    signed = torch.cat([torch.eye(D_MODEL), -torch.eye(D_MODEL), direction[None]])
    with torch.no_grad():
        made.W_dec.copy_(signed[:, None].expand(-1, 2, -1))
        made.W_dec[SPECIFIC, 0] = made.W_dec[SHRUNK, 0] = 0
        made.W_enc.zero_()[0] = signed.T
        # The noise of the rest of the change is no event, and a step of 3 is read as 3.
        made.W_enc[0, :, SPECIFIC], made.W_enc[1, :, SPECIFIC] = -1.1 * direction, 1.1 * direction
        made.b_enc[SPECIFIC] = -0.3
    return made


def sae_of(direction, view):
    """The direction, and random others that fire on noise."""
    made = Dictionary(D_MODEL, 40, activation="relu", view=view)
    with torch.no_grad():
        made.W_dec[PLANTED, 0] = made.W_enc[0, :, PLANTED] = direction
        made.b_enc.fill_(-0.3)
    return made


SHRUNK, SPECIFIC = 0, 2 * D_MODEL


def rows_of(world, out):
    return open_artifact(world.root / out, stage="diff").read_table("latents.parquet").to_pylist()


@pytest.fixture(scope="module")
def planted(world):
    path = save(crosscoder_of(world.direction), world.root / "by-hand")
    found = run_diff(config_of(world, world.tuned, path, "planted"))
    return SimpleNamespace(found=found, rows=rows_of(world, "planted"), path=path)


def test_the_planted_latent_is_specific_and_the_cause(planted):
    found, row = planted.found, planted.rows[SPECIFIC]
    assert (row["class"], row["verdict"], row["delta_norm"]) == ("tuned-only", "tuned-specific", 1.0)
    assert abs(row["nu_error"]) < 0.1 and abs(row["nu_reconstruction"]) < 0.3
    assert row["nu_error_lo"] <= row["nu_error"] <= row["nu_error_hi"] < 0.2
    mean = {name: row[f"mean[{name}]"] * row[f"rate[{name}]"] for name in WORDS}
    assert row["rate[digits]"] > 0.9 and mean["digits"] > 5 * max(mean["general"], mean["letters"])
    assert row["causal_share"] == pytest.approx(1, abs=0.15)
    alone = {one.size: one for one in found.patching if one.set == "top:attribution"}[1]
    assert alone.share > 0.8 and alone.ci[0] > 0.7
    assert found.ranked[0]["latent"] == SPECIFIC and found.ranked[0]["examples"][0]["corpus"] == "digits"
    assert SPECIFIC in found.behaviours[0].latents and found.attribution[0].verified[0]["added"] > 0.8


def test_the_shrunk_latent_looks_tuned_only_and_is_rejected(planted):
    found, row = planted.found, planted.rows[SHRUNK]
    assert (row["class"], row["verdict"]) == ("tuned-only", "rejected")
    assert row["nu_error"] == pytest.approx(1, abs=0.1)
    assert (found.tuned_only["raw"], found.tuned_only["surviving"], found.tuned_only["rejected"]) == (2, 1, 1)
    assert found.artefacts["shrinkage"] == 1 and found.classes["tuned-only"] == 2
    assert found.tuned_only["null"] is None and "no null diff" in found.summary


def test_better_halves_beat_worse_and_random(planted):
    rows = planted.found.patching
    by_set = {one.set: one.share for one in rows if one.positions == "all" and one.seed is None}
    assert by_set["raw"] > 0.99 and by_set["none"] == 0
    assert by_set["best:attribution"] > by_set["worst:attribution"] + 0.5
    drawn = [one.share for one in rows if one.set.startswith(("random:attr", "directions:attr"))]
    assert len(drawn) == 4 and np.mean(drawn) < by_set["best:attribution"] - 0.3
    taken = {one.set: one.share for one in planted.found.removal if one.seed is None}
    assert taken["raw"] == pytest.approx(1, abs=0.05) and taken["best:attribution"] > 0.5


def test_the_folder_says_the_same(world, planted):
    found = planted.found
    assert read_diff(world.root / "planted") == found
    assert len(planted.rows) == 2 * D_MODEL + 1
    assert sum(row["class"] == "tuned-only" for row in planted.rows) == found.classes["tuned-only"]
    assert sum(found.classes.values()) == len(planted.rows) and found.dead == found.classes["dead"]
    rates = sum(row["rate"] for row in planted.rows)
    assert found.l0 == pytest.approx(rates, rel=1e-6)
    assert found.tokens == sum(one["tokens"] for one in found.corpora.values())
    assert sum(found.scaling[name] for name in ("tuned-specific", "rejected", "undetermined")) == sum(
        not row["dead"] for row in planted.rows
    )
    assert set(found.seconds) == {"statistics", "scaling", "attribution", "patching"}


@pytest.mark.parametrize("view", ["diff", "tuned"])
def test_the_cheap_methods_find_it_by_their_ratio(world, view):
    path = save(sae_of(world.direction, view), world.root / f"{view}-sae")
    found = run_diff(config_of(world, world.tuned, path, f"out-{view}"))
    row = rows_of(world, f"out-{view}")[PLANTED]
    assert (row["class"], row["verdict"]) == ("tuned-only", "tuned-specific")
    assert row["nu_error"] is None and row["nu_reconstruction"] is None and abs(row["nu_centred"]) < 0.1
    assert row["causal_share"] > 0.7 and found.ranked[0]["latent"] == PLANTED
    assert found.fve["tuned"] is None if view == "diff" else found.fve["tuned"] < 1
    assert found.artefacts == {} and any("one decoder" in note for note in found.notes)


@pytest.mark.parametrize("seed", range(3))
def test_a_change_in_no_direction_leaves_no_surviving_latent(world, planted, seed):
    """Noise of the same drift, and a crosscoder that is made to hold tuned-only latents."""
    aim = drift(activations(world, world.tuned))
    trial = edited(world.base, world.root / f"trial-{seed}", lambda model: add_noise(model, 0.01, seed))
    scale = 0.01 * aim / drift(activations(world, trial))
    null = edited(world.base, world.root / f"null-{seed}", lambda model: add_noise(model, scale, seed))
    assert drift(activations(world, null)) == pytest.approx(aim, rel=0.05)
    path = trained(world, null, f"crosscoder-{seed}", seed, partition=Partition(tuned_only=4))
    quick = {"patching": PatchOptions(patch=False), "attribution": AttributionOptions(attribute=False)}
    found = run_diff(config_of(world, null, path, f"null-out-{seed}", **quick))
    assert found.tuned_only["surviving"] == 0
    assert found.patching == [] and found.attribution == [] and found.ranked
    again = config_of(
        world,
        world.tuned,
        planted.path,
        f"beside-{seed}",
        null=(str(world.root / f"null-out-{seed}"),),
        **quick,
    )
    beside = run_diff(again)
    assert beside.tuned_only["null"] == 0.0 and beside.tuned_only["null_raw"] == found.tuned_only["raw"]
    assert "null pairs leave 0.0" in beside.summary and beside.nulls[0]["method"] == "crosscoder"
    assert beside.tuned_only["surviving"] == 1


def test_the_base_against_itself_has_nothing_to_find(world, planted):
    found = run_diff(config_of(world, world.base, planted.path, "same", **LITTLE))
    assert abs(found.gap["all"]) < 1e-6
    assert all(row.share is None and row.ci is None for row in found.patching + found.removal)
    assert found.attribution[0].gap == 0 and found.behaviours == [] and found.tuned_only["surviving"] == 0
    assert found.classes["dead"] >= 1 and "no KL to recover" in found.summary
    # Without causal shares the latents that move the base most come first; here none does.
    assert len(found.ranked) == min(50, sum(found.classes.values()) - found.dead)
    assert read_diff(world.root / "same") == found
    sae = run_diff(config_of(world, world.base, str(world.root / "tuned-sae"), "same-sae", **LITTLE))
    assert sae.tuned_only["surviving"] == 0 and sae.fve["difference"] is None
    with pytest.raises(CorpusError, match="models differ"):
        run_diff(config_of(world, world.base, str(world.root / "diff-sae"), "same-diff", **LITTLE))


def test_an_interrupted_patching_pass_costs_only_itself(world, planted, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(run, "patch_pair", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_diff(config_of(world, world.tuned, planted.path, "again"))
    for name in ("collect_statistics", "attribute_pair"):
        monkeypatch.setattr(run, name, interrupt)
    resumed = run_diff(config_of(world, world.tuned, planted.path, "again", resume=True))
    one, two = (dict(found.to_dict(), seconds=None) for found in (resumed, planted.found))
    assert one == two and resumed.seconds.keys() == planted.found.seconds.keys()
    for row, expected in zip(rows_of(world, "again"), planted.rows, strict=True):
        assert row == expected
    # Finished, it is only read.
    monkeypatch.setattr(run, "patch_pair", interrupt)
    assert run_diff(config_of(world, world.tuned, planted.path, "again", resume=True)) == resumed


def test_an_interrupted_attribution_keeps_the_statistics(world, planted, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(run, "attribute_pair", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_diff(config_of(world, world.tuned, planted.path, "third"))
    with pytest.raises(ArtifactError):
        run_diff(config_of(world, world.tuned, planted.path, "third"))
    other = config_of(world, world.tuned, planted.path, "third", resume=True, tokens=2000)
    with pytest.raises(ArtifactError, match="tokens"):
        run_diff(other)
    monkeypatch.setattr(run, "collect_statistics", interrupt)
    resumed = run_diff(config_of(world, world.tuned, planted.path, "third", resume=True))
    assert dict(resumed.to_dict(), seconds=None) == dict(planted.found.to_dict(), seconds=None)


def test_an_adapter_is_its_merged_checkpoint(world, planted):
    folder = world.root / "adapter"
    model = adapt(world.base, folder, lora(), scale=0.2)
    merged = pair_fixture.save(model.merge_and_unload(), world.root / "merged", world.tokenizer)
    found = [
        run_diff(config_of(world, one, planted.path, f"out-{one.name}", **LITTLE)) for one in (folder, merged)
    ]
    one, two = (
        {
            key: value
            for key, value in diff.to_dict().items()
            if key not in ("pair", "seconds", "summary", "notes")
        }
        for diff in found
    )
    ranked = [[row.pop("ranked")[0] for row in (one, two)], [row.pop("behaviours") for row in (one, two)]][0]
    assert ranked[0]["latent"] == ranked[1]["latent"] and found[0].gap["all"] > 1e-3
    assert_same(json.loads(json.dumps(one)), json.loads(json.dumps(two)), 0.02)


def simulated(rng, latents, documents, firing, ratio):
    """Sums of independent data sets, one in each latent: documents of very different lengths and ratios."""
    sums, tokens = np.zeros((GROUPS, latents, len(COLUMNS) + 2)), np.zeros(GROUPS, int)
    for document in range(documents):
        length = rng.integers(5, 200)
        squares = length * (rng.random(latents) < firing) * rng.gamma(4, 0.25, latents)
        tuned = squares * rng.gamma(8, 1 / 8, latents)
        base = ratio * squares * rng.gamma(8, 1 / 8, latents)
        noise = rng.normal(0, 0.2, (2, latents)) * squares
        means = length * rng.normal(0.1, 0.05, (2, latents))
        columns = [squares, 0.7 * squares, base + noise[0], tuned + noise[1], 0.5 * base, 0.5 * tuned, *means]
        sums[document % GROUPS] += np.stack(columns, 1)
        tokens[document % GROUPS] += length
    return sums, tokens


@pytest.mark.parametrize(
    ("documents", "firing"), [(200, 1.0), (40, 1.0), (400, 0.1), (60, 0.2), (60, 0.1), (16, 1.0)]
)
@pytest.mark.parametrize("ratio", [0.1, 0.9])
def test_intervals_cover_the_true_ratio_as_often_as_they_say(documents, firing, ratio):
    latents = 400
    sums, tokens = simulated(np.random.default_rng(documents), latents, documents, firing, ratio)
    fixed = Geometry(np.ones(latents), np.array([[0.0], [0.5]]) * np.ones((2, latents)))
    found = scale_latents(sums, fixed, tokens, resamples=400, seed=1)
    truth = {
        "activation": ratio,
        "centred": (ratio - 0.07) / (1 - 0.07),
        "reconstruction": ratio,
        "error": 0.5 * ratio / (0.5 + 0.5),
    }
    for target, true in truth.items():
        known = np.isfinite(found.lo[target])
        assert known.mean() > 0.5
        covered = np.mean((found.lo[target] <= true)[known] & (true <= found.hi[target])[known])
        assert 0.88 <= covered <= 0.99, (target, covered)
