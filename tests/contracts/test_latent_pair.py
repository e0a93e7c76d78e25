"""A latent adapter as the tuned side of a pair: read, audited and diffed like any other fine-tune."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from audit_world import WORDS, audited, write_corpus
from helpers import assert_close, assert_not_close, python_source
from pair_fixture import adapt, lora, save
from palimpsest.dictionaries import Dictionary, TrainConfig, load_dictionary
from palimpsest.diff import AttributionOptions, DiffConfig, NullConfig, PatchOptions, make_null, run_diff
from palimpsest.errors import ConfigError, DictionaryError, NumericsError, PairError
from palimpsest.evaluate import EvaluateConfig, run_evaluate
from palimpsest.harvest import HarvestConfig, run_harvest
from palimpsest.models import (
    UpperHalf,
    edits_activations,
    fingerprint,
    load_model,
    load_pair,
    replace,
    verify_sites,
    weight_deltas,
)
from palimpsest.models.spectrum import base_deltas
from palimpsest.options import ModelOptions, RunOptions
from palimpsest.report import build_report
from palimpsest.store import ActivationStore
from palimpsest.train import TrainPairConfig, train_pair
from palimpsest.tune.adapter import LatentConfig

D_MODEL, LATENTS, SITE = 32, 96, "resid_post.1"
SITES = ["resid_post.0", "resid_pre.1", "mlp_out.1", "resid_post.1", "resid_post.2"]
MODELS = ModelOptions(device="cpu", tokens_per_batch=512)


def dictionary(folder, site=SITE, seed=7):
    torch.manual_seed(seed)
    made = Dictionary(D_MODEL, LATENTS, activation="topk", k=8, metadata={"site": site})
    with torch.no_grad():
        made.b_enc.add_(0.05 * torch.randn(LATENTS))
    made.save_pretrained(folder)
    return str(folder)


def adapter(world, name, *, site=SITE, seed=1, scale=0.5, **options):
    """A folder with a latent adapter of random values."""
    config = LatentConfig(target_hooks=[(options.pop("dictionary", world.dictionary), site)], **options)
    adapt(world.base, world.root / name, config, seed=seed, scale=scale)
    return world.root / name


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_llama):
    root = tmp_path_factory.mktemp("latent")
    made = SimpleNamespace(root=root, base=str(tiny_llama(seed=3, num_hidden_layers=3)))
    made.corpora = {name: write_corpus(root / f"{name}.jsonl", words) for name, words in WORDS.items()}
    made.dictionary = dictionary(root / "dictionary")
    made.tuned = str(adapter(made, "adapter"))
    return made


@pytest.fixture(scope="module")
def pair(world):
    return load_pair(world.base, world.tuned, MODELS)


@pytest.fixture
def ids():
    return torch.randint(3, 320, (2, 12), generator=torch.Generator().manual_seed(1))


def dense_edit(world, hidden, ids, model):
    """h + s z W_dec by the definition, densely; BOS and padding stay."""
    from safetensors.torch import load_file

    made = load_dictionary(world.dictionary)
    (s,) = load_file(f"{world.tuned}/adapter_model.safetensors").values()
    z = made.encode(hidden.flatten(0, 1)).dense()
    delta = ((s * z) @ made.W_dec[:, 0]).view_as(hidden)
    special = torch.isin(ids, torch.tensor([model.tokenizer.bos_token_id, model.tokenizer.pad_token_id]))
    return hidden + delta * ~special[..., None]


def test_the_base_side_is_the_plain_base_to_the_bit(world, pair, ids):
    plain = load_model(world.base, MODELS)
    before, expected = pair.base.read(ids, SITES, head=True), plain.read(ids, SITES, head=True)
    pair.tuned.read(ids, SITES)
    after = pair.base.read(ids, SITES, head=True)
    for site in SITES:
        assert torch.equal(before.acts[site], expected.acts[site])
        assert torch.equal(after.acts[site], expected.acts[site])
    assert torch.equal(after.head_input, expected.head_input)
    assert fingerprint(pair.base) == fingerprint(plain)
    assert pair.kind == "adapter" and edits_activations(pair.tuned) and not edits_activations(pair.base)


def test_the_tuned_side_is_the_edit_and_nothing_else(world, pair, ids):
    ids[:, 0], ids[1, -1] = pair.tokenizer.bos_token_id, pair.tokenizer.pad_token_id
    plain = load_model(world.base, MODELS)
    below = plain.read(ids, SITES).acts
    found = pair.tuned.read(ids, SITES, head=True)
    with replace(plain.sites, SITE, lambda hidden: dense_edit(world, hidden, ids, plain)):
        expected = plain.read(ids, SITES, head=True)
    for site in ("resid_post.0", "resid_pre.1", "mlp_out.1"):
        assert torch.equal(found.acts[site], below[site])
    for site in (SITE, "resid_post.2"):
        assert_not_close(found.acts[site], below[site], atol=1e-2)
    assert_close(found.acts[SITE], dense_edit(world, below[SITE], ids, plain), rtol=1e-4, atol=1e-5)
    assert torch.equal(found.acts[SITE][:, 0], below[SITE][:, 0])
    assert_close(found.head_input, expected.head_input, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("site", ["resid_post.1", "mlp_out.1", "attn_out.0", "resid_pre.2"])
def test_sites_hold_wherever_the_adapter_is(world, ids, site):
    pair = load_pair(world.base, adapter(world, f"at-{site}", site=site), MODELS)
    verify_sites(pair.tuned)
    verify_sites(pair.base)
    assert_not_close(
        pair.tuned.read(ids, [], head=True).head_input, pair.base.read(ids, [], head=True).head_input
    )


@pytest.mark.parametrize("site", ["resid_post.0", "resid_post.1", "resid_post.2"])
def test_the_upper_half_at_below_and_above_the_adapter(world, pair, ids, site):
    """Given activations stand at the site; an adapter above still edits, one at the site or below does not."""
    upper = UpperHalf(pair.tuned, site)
    assert upper.bypassed == int(site[-1]) + 1
    own = pair.tuned.read(ids, [site], head=True)
    assert_close(upper.run(ids, own.acts[site]), own.head_input, rtol=1e-4, atol=1e-5)
    other = pair.base.read(ids, [site], head=True)
    found = upper.run(ids, torch.cat([other.acts[site], own.acts[site]]))
    if site == "resid_post.0":
        assert_not_close(found[: len(ids)], other.head_input, atol=1e-3)
    else:
        assert_close(found[: len(ids)], other.head_input, rtol=1e-4, atol=1e-5)
    assert_close(found[len(ids) :], own.head_input, rtol=1e-4, atol=1e-5)


def test_no_weight_differs_and_random_changes_say_so(world, pair):
    before = {name: one.clone() for name, one in pair.tuned.model.named_parameters()}
    rows = weight_deltas(pair)
    assert [row.layer for row in rows] == [0, 1, 2, None]
    assert all(row.norm_delta == 0 and row.norm_base > 0 for row in rows)
    assert [row.norm_base for row in rows] == pytest.approx(
        [row.norm_base for row in weight_deltas(load_pair(world.base, world.base, MODELS))]
    )
    with pytest.raises(NumericsError, match="edits activations and changes no weight"):
        base_deltas(pair)
    assert all(torch.equal(before[name], one) for name, one in pair.tuned.model.named_parameters())


def test_a_linear_map_behind_a_raw_path_is_not_merged_either(world):
    path = "path.model.layers.1.mlp.down_proj"
    pair = load_pair(world.base, adapter(world, "raw", site=path, component="bias", skip_ids=[]), MODELS)
    assert all(row.norm_delta == 0 for row in weight_deltas(pair))


def test_the_fingerprint_knows_values_dictionary_and_settings(world, pair, tmp_path):
    def of(folder):
        return fingerprint(load_pair(world.base, folder, MODELS).tuned)

    told = fingerprint(pair.tuned)
    assert of(world.tuned) == told != fingerprint(pair.base)
    moved = shutil.copytree(world.tuned, tmp_path / "moved" / "adapter")
    assert of(moved) == told
    assert of(adapter(world, "other-values", seed=2)) != told
    other = dictionary(world.root / "other-dictionary", seed=8)
    assert of(adapter(world, "other-dictionary-adapter", dictionary=other)) != told
    for name, options in {
        "whole": {"skip_ids": []},
        "first": {"scope": "first"},
        "exp": {"transform": "exp"},
    }.items():
        assert of(adapter(world, f"settings-{name}", **options)) != told


@pytest.mark.parametrize("recorded", ["absolute", "relative", "sibling"])
def test_the_recorded_base_may_be_written_in_several_ways(world, recorded, tmp_path, monkeypatch):
    shutil.copytree(world.base, tmp_path / "base")
    folder = shutil.copytree(world.tuned, tmp_path / "adapters" / "mine")
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    monkeypatch.chdir(tmp_path)
    config["base_model_name_or_path"] = {
        "absolute": str(tmp_path / "base"),
        "relative": "base",
        "sibling": "../base",
    }[recorded]
    path.write_text(json.dumps(config))
    assert load_pair("base", folder, MODELS).notes == []
    alone = load_model(folder, MODELS)
    assert alone.adapter_on and fingerprint(alone) == fingerprint(load_pair("base", folder, MODELS).tuned)


def test_another_base_is_refused_unless_forced(world, tiny_llama):
    other = tiny_llama(seed=4, num_hidden_layers=3)
    with pytest.raises(PairError, match="another base"):
        load_pair(other, world.tuned, MODELS)
    assert "names" in load_pair(other, world.tuned, ModelOptions(device="cpu", force_base=True)).notes[0]


def test_an_adapter_alone_is_its_base_with_the_adapter_on(world, pair, ids, tmp_path):
    alone = load_model(world.tuned, MODELS)
    assert torch.equal(alone.read(ids, [SITE]).acts[SITE], pair.tuned.read(ids, [SITE]).acts[SITE])
    adapt(world.base, tmp_path / "lora", lora())
    assert_not_close(
        load_model(tmp_path / "lora", MODELS).read(ids, [SITE]).acts[SITE],
        pair.base.read(ids, [SITE]).acts[SITE],
    )
    config = tmp_path / "lora" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": None}))
    with pytest.raises(PairError, match="does not say which model"):
        load_model(tmp_path / "lora", MODELS)


def test_nothing_has_to_be_imported_first(world):
    code = (
        "import sys\nfrom palimpsest import load_pair\n"
        "assert not any(name.startswith('palimpsest.tune') for name in sys.modules)\n"
        "pair = load_pair(sys.argv[1], sys.argv[2])\nprint(pair.kind, pair.tuned.adapter_prefix)"
    )
    done = python_source(code, world.base, world.tuned)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["adapter", "latent_"]


def test_an_audit(world, tmp_path):
    found = audited(world, tmp_path / "run", kl=True, resamples=100).json
    assert found["pair"]["kind"] == "adapter" and found["site"] == SITE
    assert (
        found["layers"] is None and found["layers_note"] == "the adapter edits activations; no weight changed"
    )
    assert found["pair"]["fingerprint_tuned"] != found["pair"]["fingerprint_base"]
    assert all(row["relative_drift"] > 0 and row["kl"] > 0 for row in found["datasets"])
    assert all(row["relative_drift"] < 10 for row in found["datasets"])
    text = build_report(tmp_path / "run", tmp_path / "page.html").read_text(encoding="utf-8")
    assert "the adapter edits activations; no weight changed" in text
    assert "Weight changes: not measured" not in text


def test_an_audit_of_an_adapter_that_does_nothing_finds_nothing(world, tmp_path):
    nothing = adapter(world, "nothing", scale=0.0)
    found = audited(
        SimpleNamespace(**(vars(world) | {"tuned": str(nothing)})), tmp_path / "run", kl=True, resamples=100
    ).json
    for row in found["datasets"]:
        assert row["kl"] == row["delta_loss"] == row["relative_drift"] == 0
        assert set(row["intersection_mean"].values()) == {1.0}


def test_a_diff(world, tmp_path):
    corpora = tuple(f"{name}={path}" for name, path in world.corpora.items())
    config = DiffConfig(
        base=world.base,
        tuned=world.tuned,
        dictionary=world.dictionary,
        corpus=corpora,
        run=RunOptions(out=tmp_path / "run"),
        tokens=600,
        resamples=100,
        patching=PatchOptions(patch_tokens=200, random_sets=1),
        attribution=AttributionOptions(attribution_tokens=200, steps=2),
        models=MODELS,
    )
    run_diff(config)
    found = json.loads((tmp_path / "run" / "diff.json").read_text())
    shares = {row["set"]: row["share"] for row in found["patching"] if row["positions"] == "all"}
    # The adapter edits this very site and nothing above it: the site's difference is the whole change.
    assert shares["raw"] == pytest.approx(1, abs=1e-4) and shares["none"] == 0
    kl = next(row["kl"] for row in found["patching"] if row["set"] == "none")
    assert found["patched"]["base_kl"]["all"] == pytest.approx(kl, rel=1e-3) and kl > 0.01


def test_a_random_change_of_no_weights_is_refused_by_name(world, tmp_path):
    config = NullConfig(
        base=world.base,
        tuned=world.tuned,
        corpus=(world.corpora["general"],),
        site=SITE,
        tokens=200,
        run=RunOptions(out=tmp_path / "null"),
        models=MODELS,
    )
    with pytest.raises(NumericsError, match="edits activations and changes no weight"):
        make_null(config)


def test_a_dictionary_of_the_difference_can_be_trained(world, tmp_path):
    config = TrainPairConfig(
        base=world.base,
        tuned=world.tuned,
        corpus=(world.corpora["general"],),
        site=SITE,
        view="diff",
        recipe=TrainConfig(n_latents=32, k=4, tokens=4096, batch_size=256, view="diff"),
        run=RunOptions(out=tmp_path / "diff-sae"),
        models=MODELS,
    )
    train_pair(config)
    assert load_dictionary(tmp_path / "diff-sae").view == "diff"


def test_harvest_and_evaluate(world, pair, tmp_path):
    text = (world.corpora["general"],)
    run_harvest(
        HarvestConfig(
            base=world.base,
            tuned=world.tuned,
            corpus=text,
            site=(SITE,),
            store_dtype="float32",
            run=RunOptions(out=tmp_path / "store"),
            models=MODELS,
        )
    )
    acts = torch.cat([batch.acts for batch in ActivationStore(tmp_path / "store").batches(256, SITE)])
    assert_not_close(acts[:, 1], acts[:, 0], atol=1e-2)
    evaluated = {
        name: run_evaluate(
            EvaluateConfig(
                world.dictionary,
                corpus=text,
                tokens=300,
                resamples=100,
                run=RunOptions(out=tmp_path / name),
                models=MODELS,
                **models,
            )
        )
        for name, models in {
            "alone": {"model": world.tuned},
            "base": {"model": world.base},
            "pair": {"base": world.base, "tuned": world.tuned},
        }.items()
    }
    assert evaluated["alone"].models[0].fve == evaluated["pair"].side("tuned").fve
    assert evaluated["base"].models[0].fve == evaluated["pair"].side("base").fve
    assert evaluated["alone"].models[0].fve != evaluated["base"].models[0].fve


@pytest.mark.parametrize("scope", ["prompt", "answer", "last"])
def test_scopes_that_text_does_not_tell_are_refused(world, scope):
    with pytest.raises(PairError, match=f"does not say which is which.*scope {scope}"):
        load_pair(world.base, adapter(world, f"scope-{scope}", scope=scope), MODELS)


def test_a_changed_or_missing_dictionary_is_refused(world, tmp_path):
    moved = dictionary(tmp_path / "dictionary", seed=7)
    folder = adapter(world, "moved-dictionary", dictionary=moved)
    load_pair(world.base, folder, MODELS)
    shutil.rmtree(moved)
    with pytest.raises((PairError, DictionaryError, ConfigError), match="dictionary"):
        load_pair(world.base, folder, MODELS)
    dictionary(moved, seed=8)
    with pytest.raises(DictionaryError, match="another one than the adapter was trained with"):
        load_pair(world.base, folder, MODELS)


def test_values_that_do_not_fit_are_refused(world, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(world.tuned, tmp_path / "short")
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({name: one[:-1].clone() for name, one in weights.items()}, folder / "adapter_model.safetensors")
    with pytest.raises(PairError, match="does not fit"):
        load_pair(world.base, folder, MODELS)
    save_file({f"{name}x": one for name, one in weights.items()}, folder / "adapter_model.safetensors")
    with pytest.raises(PairError, match="does not hold the numbers"):
        load_pair(world.base, folder, MODELS)


def test_a_merged_constant_adapter_is_the_pair_of_its_checkpoint(world, ids, tmp_path, tiny_tokenizer):
    folder = adapter(world, "constant", component="bias", skip_ids=[], scale=0.2)
    from peft import PeftModel

    from pair_fixture import load_hf

    merged = PeftModel.from_pretrained(load_hf(world.base), str(folder)).merge_and_unload()
    full = load_pair(world.base, save(merged, tmp_path / "merged", tiny_tokenizer), MODELS)
    ours = load_pair(world.base, folder, MODELS)
    found, expected = ours.tuned.read(ids, SITES, head=True), full.tuned.read(ids, SITES, head=True)
    assert_close(found.acts["resid_post.2"], expected.acts["resid_post.2"], rtol=1e-4, atol=1e-5)
    assert_close(found.head_input, expected.head_input, rtol=1e-4, atol=1e-5)
